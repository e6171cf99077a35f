"""The conversions as a program calls them: `convert`, `split`, `undo`, `plan`, `status`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import attrs

from equitie_data.conversion.attach import ATTACH
from equitie_data.conversion.copy_swap import COPY, SPLIT
from equitie_data.conversion.definition import read_definition, run
from equitie_data.conversion.layout import TABLE
from equitie_data.conversion.locks import Patience
from equitie_data.conversion.record import Conversion, begin, close, latest, note
from equitie_data.conversion.schema import partitioning, require_earlier
from equitie_data.conversion.steps import Job, exchanged, run_steps
from equitie_data.conversion.survey import Survey, survey
from equitie_data.conversion.undo import DETACH, UNDO_COPY, abandon, has_rows_elsewhere
from equitie_data.errors import ConversionError
from equitie_data.maintenance.session import take_turn
from equitie_data.migrations.directories import ours
from equitie_data.migrations.history import ensure_history
from equitie_data.migrations.session import open_owner, turn

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

    from equitie_data.conversion.record import Operation
    from equitie_data.conversion.steps import Advanced, Step

__all__ = ["ConversionReport", "ConversionStatus", "convert", "plan", "split", "status", "steps_of", "undo"]

_WAIT_FOR_TURN = 5.0  # seconds


@attrs.frozen(kw_only=True)
class ConversionReport:
    """What a run did.

    Attributes:
        operation: ``attach``, ``copy``, ``split``, ``undo``, or ``none`` when there was nothing to do.
        outcome: ``done``, ``abandoned`` or ``nothing to do``.
        shape: What the table is now: ``flat``, ``attached`` or ``partitioned``.
        partitions: How many partitions it has.
        copied: How many rows were copied.
        exchange_seconds: How long the moment without readers and writers was, waiting for its locks included.
        seconds: How long it took since it was begun.
    """

    operation: str
    outcome: Literal["done", "abandoned", "nothing to do"]
    shape: str
    partitions: int
    copied: int
    exchange_seconds: float | None
    seconds: float


@attrs.frozen(kw_only=True)
class ConversionStatus:
    """Where the table stands.

    Attributes:
        shape: What it is: ``flat``, ``attached`` or ``partitioned``.
        partitions: How many partitions it has.
        operation: The conversion that is under way, or the last one; ``None`` if there never was one.
        state: ``running``, ``done`` or ``abandoned``.
        done: Its steps that are done.
        left: Its steps that are left.
        copied: Rows copied so far.
        advice: What to do next, one sentence.
    """

    shape: str
    partitions: int
    operation: str | None
    state: str | None
    done: tuple[str, ...]
    left: tuple[str, ...]
    copied: int
    advice: str


def _silent(step: str, rows: int) -> None:
    del step, rows


def steps_of(operation: Operation, facts: dict[str, Any]) -> Sequence[Step]:
    """Return the steps of a conversion."""
    if operation == "undo":
        return DETACH if facts.get("detach") else UNDO_COPY
    return {"attach": ATTACH, "copy": COPY, "split": SPLIT}[operation]


@contextmanager
def _session(dsn: str) -> Iterator[Connection[Any]]:
    with open_owner(dsn) as conn:
        # What row-level security hides from us must be an error, and not a row that is left behind.
        conn.execute("SELECT pg_catalog.set_config('row_security', 'off', false)")
        if conn.execute("SELECT pg_catalog.pg_backend_pid()").fetchone() != (conn.info.backend_pid,):
            raise ConversionError(
                "A connection pooler stands in between, behind which session locks are nobody's: name the server itself"
                " in MIGRATION_DATABASE_URL."
            )
        # Neither migrations nor maintenance may meddle with the partitions meanwhile.
        with turn(conn, _WAIT_FOR_TURN), take_turn(conn, _WAIT_FOR_TURN):
            ensure_history(conn)
            yield conn


def convert(
    dsn: str,
    *,
    copy: bool = False,
    boundary: dt.date | None = None,
    drop_inbound_keys: bool = False,
    patience: Patience | None = None,
    advanced: Advanced = _silent,
) -> ConversionReport:
    """Partition ``public.transactions_clean`` while it is read and written, or go on where a run was interrupted.

    The database needs migrations 0001 to 0003; afterwards it has 0004 as well, in the history too.

    Args:
        dsn: The database, as the owner of its tables.
        copy: Copy every row to its month, instead of attaching the table as one partition.
        boundary: First day of the month at which that partition is to end; chosen by the newest row if left out.
        drop_inbound_keys: Let foreign keys go that name the id alone; `undo` brings them back.
        patience: How to meet the locks of others.
        advanced: Told how it gets on.

    Raises:
        ConversionError: Something is in the way; nothing was changed, or the same call goes on later.
    """
    with _session(dsn) as conn:
        require_earlier(conn)
        job = _unfinished(conn, patience, advanced, may_resume=("attach", "copy"))
        if job is None:
            found = survey(conn, copy=copy, boundary=boundary, drop_inbound_keys=drop_inbound_keys)
            if found.shape != "flat":
                return _nothing(found)
            _refuse(found)
            definition = read_definition(conn)
            facts = {
                "boundary": str(found.boundary) if found.boundary else None,
                "dropped": definition.statements("inbound key by id"),
                "dropped_valid": _valid_inbound_keys(conn, "inbound key by id"),
                "validate": _valid_inbound_keys(conn),
            }
            job = Job(conn, begin(conn, found.method, facts), patience or Patience(), advanced)
        elif job.conversion.operation == "undo":
            return _abandon(job)
        _run(job)
        _require_verified(conn)
        return _report(job)


def split(dsn: str, *, patience: Patience | None = None, advanced: Advanced = _silent) -> ConversionReport:
    """Divide the partition that was the flat table into months, while it is read and written.

    Args:
        dsn: The database, as the owner of its tables.
        patience: How to meet the locks of others.
        advanced: Told how it gets on.

    Raises:
        ConversionError: Something is in the way; nothing was changed, or the same call goes on later.
    """
    with _session(dsn) as conn:
        job = _unfinished(conn, patience, advanced, may_resume=("split",))
        if job is None:
            found = survey(conn)
            if found.shape == "flat":
                raise ConversionError(f"{TABLE} is not partitioned: run `partition convert` first.")
            if found.shape == "partitioned":
                return _nothing(found)
            _refuse(found)
            if found.free is not None and found.free < found.size:
                raise ConversionError(
                    f"Splitting copies the rows and needs up to {found.size / 1e9:.1f} GB, but"
                    f" {found.free / 1e9:.1f} GB are free on the server's disk: make room."
                )
            facts = {"boundary": str(found.boundary), "validate": _valid_inbound_keys(conn)}
            job = Job(conn, begin(conn, "split", facts), patience or Patience(), advanced)
        _run(job)
        return _report(job)


def undo(dsn: str, *, patience: Patience | None = None, advanced: Advanced = _silent) -> ConversionReport:
    """Go back to a flat table with every row, those written since included; or give up what has not happened yet.

    Args:
        dsn: The database, as the owner of its tables.
        patience: How to meet the locks of others.
        advanced: Told how it gets on.

    Raises:
        ConversionError: Something is in the way; nothing was changed, or the same call goes on later.
    """
    with _session(dsn) as conn:
        job = _unfinished(conn, patience, advanced, may_resume=("attach", "copy", "split", "undo"))
        if job is not None and job.conversion.operation != "undo":
            if not exchanged(job, steps_of(job.conversion.operation, job.conversion.facts)):
                return _abandon(job)
            # It only had to tidy up.
            _run(job)
            job = None
        if job is None:
            found = survey(conn)
            if found.shape == "flat":
                return _nothing(found)
            _refuse(found)
            job = Job(conn, begin(conn, "undo", _facts_of_undo(conn)), patience or Patience(), advanced)
            if found.shape == "attached":
                note(conn, job.conversion, detach=not has_rows_elsewhere(job))
        elif (
            not exchanged(job, steps_of("undo", job.conversion.facts))
            and job.fact("detach")
            and has_rows_elsewhere(job)
        ):
            # The short way is closed by now.
            abandon(job)
            job = Job(conn, begin(conn, "undo", _facts_of_undo(conn)), patience or Patience(), advanced)
        _run(job)
        return _report(job)


def plan(dsn: str, *, copy: bool = False, boundary: dt.date | None = None, drop_inbound_keys: bool = False) -> Survey:
    """Say what `convert` or `split` would do, and what is in the way. Changes nothing.

    Args:
        dsn: The database, as the owner of its tables.
        copy: As for `convert`.
        boundary: As for `convert`.
        drop_inbound_keys: As for `convert`.
    """
    with open_owner(dsn) as conn:
        require_earlier(conn)
        return survey(conn, copy=copy, boundary=boundary, drop_inbound_keys=drop_inbound_keys)


def status(dsn: str) -> ConversionStatus:
    """Say where the table stands, and an interrupted conversion. Changes nothing.

    Args:
        dsn: The database, as the owner of its tables.
    """
    with open_owner(dsn) as conn:
        found = survey(conn)
        last = latest(conn)
        names: list[str] = []
        done: tuple[str, ...] = ()
        if last:
            names = [name for name, _ in steps_of(last.operation, last.facts)]
            done = tuple(names[: names.index(last.step) + 1]) if last.step else ()
        return ConversionStatus(
            shape=found.shape,
            partitions=found.partitions,
            operation=last.operation if last else None,
            state=last.state if last else None,
            done=done,
            left=tuple(names[len(done) :]) if last and last.state == "running" else (),
            copied=int(last.facts.get("copied") or 0) if last else 0,
            advice=_advice(found, last),
        )


def _advice(found: Survey, last: Conversion | None) -> str:
    if last and last.state == "running":
        command = "convert" if last.operation in {"attach", "copy"} else last.operation
        back = "convert" if last.operation == "undo" else "undo"
        text = f"Run `partition {command}` to go on"
        if "exchange" not in last.step:
            text += f", or `partition {back}` to give it up"
        if last.step == "boundary":
            text += f": until then, rows dated {last.facts.get('boundary')} or later are refused"
        return f"{text}."
    if found.shape == "flat":
        return "Run `partition plan` to see what converting it would take."
    if found.shape == "attached":
        return "Run `partition split` to give every month a partition of its own."
    return "Nothing to do."


def _valid_inbound_keys(conn: Connection[Any], part: str = "inbound key") -> list[str]:
    """Return the foreign keys of others that are valid, and so must be again after they were added NOT VALID."""
    rows = conn.execute(
        "SELECT format('%%I of %%s', k.conname, k.conrelid::regclass) FROM pg_catalog.pg_constraint AS k"
        " WHERE k.confrelid = to_regclass(%s) AND k.contype = 'f' AND k.conparentid = 0 AND k.convalidated",
        (TABLE,),
    ).fetchall()
    valid = {name for (name,) in rows}
    return [piece.name for piece in read_definition(conn).of(part) if piece.name in valid]


def _unfinished(
    conn: Connection[Any], patience: Patience | None, advanced: Advanced, *, may_resume: tuple[str, ...]
) -> Job | None:
    last = latest(conn)
    if last is None or last.state != "running":
        return None
    job = Job(conn, last, patience or Patience(), advanced)
    steps = steps_of(last.operation, last.facts)
    if last.operation == "undo" and "undo" not in may_resume and not exchanged(job, steps) and "attach" in may_resume:
        return job
    if last.operation not in may_resume:
        command = "convert" if last.operation in {"attach", "copy"} else last.operation
        raise ConversionError(
            f"An interrupted `partition {command}` comes first: run it again to let it finish (`partition status` says"
            " where it stands)."
        )
    return job


def _run(job: Job) -> None:
    run_steps(job, steps_of(job.conversion.operation, job.conversion.facts))
    close(job.conn, job.conversion, "done")


def _abandon(job: Job) -> ConversionReport:
    abandon(job)
    return attrs.evolve(_report(job), outcome="abandoned")


def _refuse(found: Survey) -> None:
    if found.obstacles:
        first, *others = found.obstacles
        more = f" ({len(others)} more: see `partition plan`)" if others else ""
        raise ConversionError(f"{first}{more}")


def _facts_of_undo(conn: Connection[Any]) -> dict[str, Any]:
    """Return what the conversion took away, from its record."""
    if latest(conn) is None:
        return {}
    row = conn.execute(
        "SELECT facts FROM equitie_private.partition_conversions"
        " WHERE operation IN ('attach', 'copy') AND state = 'done' ORDER BY conversion_id DESC LIMIT 1"
    ).fetchone()
    facts: dict[str, Any] = dict(row[0]) if row else {}
    current = _valid_inbound_keys(conn)
    return {"keys_by_id": facts.get("dropped", []), "validate": [*facts.get("dropped_valid", []), *current]}


def _require_verified(conn: Connection[Any]) -> None:
    problems = [
        row[0]
        for statement in ours().verifications.get(partitioning().label, ())
        for row in run(conn, statement.text).fetchall()
    ]
    if problems:
        raise ConversionError(f"The table is partitioned, but not as migration 0004 leaves it: {problems[0]}")


def _nothing(found: Survey) -> ConversionReport:
    return ConversionReport(
        operation="none",
        outcome="nothing to do",
        shape=found.shape,
        partitions=found.partitions,
        copied=0,
        exchange_seconds=None,
        seconds=0.0,
    )


def _report(job: Job) -> ConversionReport:
    found = survey(job.conn)
    (seconds,) = run(
        job.conn,
        "SELECT extract(epoch FROM clock_timestamp() - c.started_at)::double precision"
        f" FROM equitie_private.partition_conversions AS c WHERE c.conversion_id = {job.conversion.conversion_id}",
    ).fetchone()
    return ConversionReport(
        operation=job.conversion.operation,
        outcome="done",
        shape=found.shape,
        partitions=found.partitions,
        copied=int(job.fact("copied") or 0),
        exchange_seconds=job.fact("exchange_seconds"),
        seconds=round(seconds, 3),
    )
