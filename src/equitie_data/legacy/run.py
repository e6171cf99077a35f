"""`inspect`, `plan` and `migrate`: the old tables from what they are to views over the clean ones."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from equitie_data import _sql
from equitie_data.errors import LegacyError
from equitie_data.legacy import backup, months
from equitie_data.legacy.copying import Copying
from equitie_data.legacy.ledger import Options, Run, standing_run
from equitie_data.legacy.report import LegacyReport
from equitie_data.legacy.session import open_session
from equitie_data.legacy.sources import Inventory, Source, read_inventory
from equitie_data.legacy.switching import check_unchanged, report_of, sizes, switch
from equitie_data.legacy.undoing import undo_copy
from equitie_data.migrations.session import retried, timeouts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

__all__ = ["copying_of", "inspect", "migrate", "plan"]

_ONE_TRANSACTION_BYTES: Final = 256 * 2**20
_BATCH_ROWS: Final = 20_000
_LOCK_TIMEOUT: Final = 5.0  # seconds
_WAIT: Final = 60.0  # seconds


class _Rehearsed(Exception):  # noqa: N818 - no error: it ends a transaction that was a rehearsal
    """Carries a plan out of the transaction that is rolled back."""


def inspect(dsn: str, *, on_table: Callable[[str], object] = lambda _table: None) -> Inventory:
    """Look for the old tables and say what they hold. Changes nothing.

    Args:
        dsn: The database, as the owner of the old and the clean tables.
        on_table: Told each table before it is scanned.

    Raises:
        LegacyError: The database is not migrated.
        MigrationError: The server cannot be asked.
    """
    with open_session(dsn, _WAIT) as conn, conn.transaction():
        conn.execute("SET TRANSACTION READ ONLY")
        return read_inventory(conn, on_table=on_table)


def plan(
    dsn: str,
    options: Options | None = None,
    *,
    on_progress: Callable[[str, int], object] = lambda _step, _rows: None,
    on_reject: Callable[[dict[str, Any]], object] | None = None,
) -> LegacyReport:
    """Say what `migrate` would do, exactly: it is done up to the switch, in a transaction that is rolled back.

    Writers of the old tables go on meanwhile. It takes as long as reading every row.

    Args:
        dsn: The database, as the owner of the old and the clean tables.
        options: What the user decides.
        on_progress: Told the step and the rows of every batch.
        on_reject: Told every row that would not be taken over, and why.

    Raises:
        LegacyError: Something has to be settled first; the message says what.
    """
    started = time.perf_counter()
    options = options or Options()
    found: list[LegacyReport] = []
    with open_session(dsn, _WAIT) as conn:
        if standing_run(conn) is not None:
            raise LegacyError("The old tables are being taken over, or were: `legacy verify` says how that stands.")
        with contextlib.suppress(_Rehearsed), conn.transaction():
            inventory = read_inventory(conn, keep=options.keep, drop=options.drop)
            _refuse_problems(inventory)
            # Conflicts are listed, not fatal: deciding about them is what a plan is for.
            rehearsed = attrs.evolve(
                options, on_conflict="first" if options.on_conflict == "fail" else options.on_conflict
            )
            copying = _begin(conn, inventory.sources, rehearsed, in_batches=False, on_progress=on_progress)
            copying.decide_all()
            found.append(
                report_of(
                    conn,
                    copying,
                    "planned",
                    lost_grants=inventory.lost_grants,
                    made=months.survey(conn, copying.stages["transaction"]),
                    schema=None,
                    before=None,
                    started=started,
                )
            )
            _pass_rejects(conn, copying.run_id, on_reject)
            raise _Rehearsed
    (report,) = found
    return attrs.evolve(report, run_id=None)


def migrate(
    dsn: str,
    options: Options | None = None,
    *,
    batch_rows: int = _BATCH_ROWS,
    in_batches: bool | None = None,
    lock_timeout: float = _LOCK_TIMEOUT,
    wait: float = _WAIT,
    on_progress: Callable[[str, int], object] = lambda _step, _rows: None,
    on_reject: Callable[[dict[str, Any]], object] | None = None,
) -> LegacyReport:
    """Take the old tables over; afterwards their names are views, and the originals are in a backup schema.

    Up to 256 MB of old tables go in one transaction. Above that the rows are copied in batches, with the old tables
    read-only meanwhile; a run that was killed goes on where it was. What fails is undone as a whole.

    Args:
        dsn: The database, as the owner of the old and the clean tables.
        options: What the user decides; of a run that goes on, what was decided when it began.
        batch_rows: Rows per batch.
        in_batches: Whether to copy in batches, whatever the size.
        lock_timeout: Seconds to wait for running transactions before trying again.
        wait: Seconds to wait for another run.
        on_progress: Told the step and the rows of every batch.
        on_reject: Told every row that was not taken over, and why.

    Returns:
        The reconciliation; that of the run in force, if the old tables were taken over already.

    Raises:
        LegacyError: Something has to be settled first, or the books do not balance; nothing was taken over.
    """
    started = time.perf_counter()
    with open_session(dsn, wait) as conn:
        run = standing_run(conn)
        if run is not None and run.state == "switched":
            _pass_rejects(conn, run.run_id, on_reject)
            assert run.report is not None  # noqa: S101 - written with the switch
            return LegacyReport.from_dict(run.report)
        settings = _Settings(conn, batch_rows, lock_timeout, on_progress, on_reject, started)
        if run is not None and run.state == "undoing":
            undo_copy(conn, run, copying_of(conn, run), finish=True)
            run = None
        if run is not None:
            return _resume(settings, run, options)
        options = options or Options()
        inventory = read_inventory(conn, keep=options.keep, drop=options.drop)
        _refuse_problems(inventory)
        if not inventory.sources:
            raise LegacyError(
                "There is nothing to take over: none of the old tables is there"
                + (f", but views of their names are ({', '.join(inventory.views)})." if inventory.views else ".")
            )
        if in_batches is None:
            in_batches = sum(source.bytes for source in inventory.sources) > _ONE_TRANSACTION_BYTES
        if not in_batches:
            with timeouts(conn, lock=lock_timeout, statement=0):
                return retried(lambda: _in_one_transaction(settings, options))
        with timeouts(conn, lock=lock_timeout, statement=0):
            copying = retried(lambda: _freeze(settings, options))
        return _copy_and_switch(settings, copying, inventory.lost_grants)


@attrs.frozen
class _Settings:
    """What one call of `migrate` was given."""

    conn: Connection[Any]
    batch_rows: int
    lock_timeout: float
    on_progress: Callable[[str, int], object]
    on_reject: Callable[[dict[str, Any]], object] | None
    started: float


def _in_one_transaction(settings: _Settings, options: Options) -> LegacyReport:
    conn = settings.conn
    with conn.transaction():
        found = read_inventory(conn, keep=options.keep, drop=options.drop)
        for source in found.sources:
            conn.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(source.identifier))
        # Counted again, now that nobody writes.
        inventory = read_inventory(conn, keep=options.keep, drop=options.drop)
        _refuse_problems(inventory)
        before = sizes(conn, inventory.sources)
        copying = _begin(
            conn,
            inventory.sources,
            options,
            in_batches=False,
            on_progress=settings.on_progress,
            batch_rows=settings.batch_rows,
        )
        copying.decide_all()
        made = copying.insert_transactions()
        report = switch(conn, copying, made, lost_grants=inventory.lost_grants, before=before, started=settings.started)
        _pass_rejects(conn, copying.run_id, settings.on_reject)
    return report


def _freeze(settings: _Settings, options: Options) -> Copying:
    """Have writes to the old tables refused, and begin the run."""
    conn = settings.conn
    with conn.transaction():
        backup.block_writes(conn, read_inventory(conn, keep=options.keep, drop=options.drop).sources)
        inventory = read_inventory(conn, keep=options.keep, drop=options.drop)
        _refuse_problems(inventory)
        copying = _begin(
            conn,
            inventory.sources,
            options,
            in_batches=True,
            on_progress=settings.on_progress,
            batch_rows=settings.batch_rows,
        )
        conn.execute(
            "INSERT INTO equitie_private.legacy_steps (run_id, step, done, counts) VALUES (%s, 'before', true, %s)",
            (copying.run_id, Jsonb(sizes(conn, inventory.sources))),
        )
    settings.on_progress("freeze", 0)
    return copying


def _resume(settings: _Settings, run: Run, options: Options | None) -> LegacyReport:
    if options is not None and options != run.options:
        raise LegacyError(
            f"Run {run.run_id} was broken off and goes on with the options it began with ({described(run.options)}): "
            "run it again with those, or `legacy rollback` it first."
        )
    copying = copying_of(settings.conn, run, settings.batch_rows, settings.on_progress)
    if not copying.staging_is_whole():
        # The server crashed, which empties unlogged tables: from the start, with the old tables blocked as they are.
        undo_copy(settings.conn, run, copying, finish=False)
        with settings.conn.transaction():
            copying.set_up()
    inventory = read_inventory(settings.conn, keep=run.options.keep, drop=run.options.drop)
    return _copy_and_switch(settings, copying, inventory.lost_grants)


def _copy_and_switch(settings: _Settings, copying: Copying, lost_grants: Sequence[tuple[str, str]]) -> LegacyReport:
    conn = settings.conn
    try:
        copying.decide_all()
        made = copying.insert_transactions()
        before = conn.execute(
            "SELECT counts FROM equitie_private.legacy_steps WHERE run_id = %s AND step = 'before'", (copying.run_id,)
        ).fetchone()
        assert before is not None  # noqa: S101 - written when the run began

        def attempt() -> LegacyReport:
            with conn.transaction():
                check_unchanged(conn, copying)
                report = switch(
                    conn, copying, made, lost_grants=lost_grants, before=before[0], started=settings.started
                )
                _pass_rejects(conn, copying.run_id, settings.on_reject)
            return report

        with timeouts(conn, lock=settings.lock_timeout, statement=0):
            return retried(attempt)
    except LegacyError:
        run = standing_run(conn)
        assert run is not None  # noqa: S101 - it is this one
        _pass_rejects(conn, copying.run_id, settings.on_reject)
        undo_copy(conn, run, copying, finish=True)
        raise


def copying_of(
    conn: Connection[Any],
    run: Run,
    batch_rows: int = _BATCH_ROWS,
    on_progress: Callable[[str, int], object] = lambda _step, _rows: None,
) -> Copying:
    """Return the copy phase of a run that has begun."""
    sources = tuple(Source.from_dict(source) for source in run.sources)
    return Copying(conn, run.run_id, sources, run.options, batch_rows, on_progress)


def _begin(
    conn: Connection[Any],
    sources: tuple[Source, ...],
    options: Options,
    *,
    in_batches: bool,
    on_progress: Callable[[str, int], object],
    batch_rows: int = _BATCH_ROWS,
) -> Copying:
    row = conn.execute(
        "INSERT INTO equitie_private.legacy_runs (state, in_batches, options, sources, audit_mark)"
        " SELECT 'copying', %s, %s, %s, coalesce(max(a.audit_id), 0) FROM public.audit_logs AS a RETURNING run_id",
        (in_batches, Jsonb(attrs.asdict(options)), Jsonb([source.to_dict() for source in sources])),
    ).fetchone()
    assert row is not None  # noqa: S101 - RETURNING
    copying = Copying(conn, row[0], sources, options, batch_rows, on_progress)
    copying.set_up()
    return copying


def _pass_rejects(conn: Connection[Any], run_id: int, on_reject: Callable[[dict[str, Any]], object] | None) -> None:
    if on_reject is None:
        return
    with conn.transaction(), conn.cursor("legacy_rejects", row_factory=dict_row) as cursor:
        cursor.execute(_sql.query("legacy_list_rejects"), {"run_id": run_id})
        for row in cursor:
            on_reject(row)


def _refuse_problems(inventory: Inventory) -> None:
    if inventory.problems:
        first, *more = inventory.problems
        rest = f" ({len(more)} more: `legacy inspect` lists them all.)" if more else ""
        raise LegacyError(f"{first}{rest}")


def described(options: Options) -> str:
    """Return options as the command line has them."""
    parts = [f"--on-conflict {options.on_conflict}"]
    parts += [f"--keep {column}" for column in options.keep]
    parts += [f"--drop {column}" for column in options.drop]
    parts.append(f"--months {options.months}")
    return " ".join(parts)
