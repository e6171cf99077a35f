"""What every conversion consists of: named steps, which may be begun again, and one that exchanges the tables."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import psycopg

from equitie_data.conversion.definition import Definition, guard, read_definition, run, signature
from equitie_data.conversion.layout import TABLE, TWIN
from equitie_data.conversion.locks import Patience, briefly
from equitie_data.conversion.mirror import Mirror
from equitie_data.conversion.record import Conversion, advance, note
from equitie_data.conversion.twin import access, add_foreign_keys, drop_leftovers, involved, triggers
from equitie_data.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

__all__ = [
    "EXCHANGE",
    "MIRROR",
    "Advanced",
    "Job",
    "Step",
    "create_twin",
    "exchange",
    "exchanged",
    "partitions_of",
    "run_steps",
    "tidy",
]

Advanced: TypeAlias = "Callable[[str, int], None]"
"""Told the name of a step when it begins (with 0) and whenever it got on (with the rows it got on by)."""

Step: TypeAlias = "tuple[str, Callable[[Job], None]]"

EXCHANGE = "exchange"
_BATCH = 20_000  # rows a transaction


@attrs.define
class Job:
    """A conversion at work.

    Attributes:
        conn: The owner's session.
        conversion: Its record.
        patience: How to meet the locks of others.
        advanced: Whom to tell how it gets on.
    """

    conn: Connection[Any]
    conversion: Conversion
    patience: Patience
    advanced: Advanced

    def definition(self) -> Definition:
        """Read the table's definition as it is now."""
        return read_definition(self.conn)

    def briefly(self, what: str, *statements: str) -> None:
        """Run statements in one short transaction."""
        briefly(self.conn, self.patience, lambda: run(self.conn, *statements), what)

    def fact(self, name: str) -> Any:
        """Return what an earlier step has noted."""
        return self.conversion.facts.get(name)


def partitions_of(conn: Connection[Any], table: str) -> list[str]:
    """Return the partitions of a table that hold rows themselves; none for a table that is not partitioned."""
    return [
        name
        for (name,) in conn.execute(
            "SELECT t.relid::regclass::text FROM pg_partition_tree(%s::regclass) AS t"
            " WHERE t.isleaf AND t.parentrelid IS NOT NULL ORDER BY 1",
            (table,),
        )
    ]


def run_steps(job: Job, steps: Sequence[Step]) -> None:
    """Run the steps that are not done yet, and record each."""
    names = [name for name, _ in steps]
    done = names.index(job.conversion.step) + 1 if job.conversion.step else 0
    for name, step in steps[done:]:
        job.advanced(name, 0)
        step(job)
        if job.conversion.step != name:
            advance(job.conn, job.conversion, name)


def exchanged(job: Job, steps: Sequence[Step]) -> bool:
    """Return whether the step that exchanges the tables is done."""
    names = [name for name, _ in steps]
    return bool(job.conversion.step) and names.index(job.conversion.step) >= names.index(EXCHANGE)


def exchange(
    job: Job,
    compose: Callable[[Definition], Sequence[str]],
    *,
    before: Callable[[], None] | None = None,
    copied: bool = True,
    referenced: bool = False,
) -> None:
    """Put the new table into the place of the old one, in one short transaction that is also recorded in it.

    Args:
        job: The conversion.
        compose: Returns the statements, from the table's definition as it is now.
        before: What else belongs into the transaction, done before anything is locked.
        copied: Whether the rows were copied: then the table must be what it was when the copy began.
        referenced: Whether the tables that foreign keys refer to are altered as well.
    """
    attempts = itertools.count()

    def work() -> None:
        definition = job.definition()
        if copied:
            _require_unchanged(job, definition)
        others = involved(definition, referenced=referenced)
        # All locks at once, before anything else is done. Some transactions use the other tables first and then this
        # one, some the other way round; against each kind, one of the two orders gets through.
        order = [*others, TABLE] if next(attempts) % 2 == 0 else [TABLE, *others]
        statements = list(compose(definition))
        unchanged = guard(signature(job.conn))
        if before:
            before()
        advance(job.conn, job.conversion, EXCHANGE)
        started = time.monotonic()
        run(job.conn, f"LOCK TABLE {', '.join(order)} IN ACCESS EXCLUSIVE MODE", unchanged, *statements)
        job.conversion.facts["exchange_seconds"] = round(time.monotonic() - started, 4)

    step = job.conversion.step
    try:
        briefly(job.conn, job.patience, work, "Exchanging the tables")
    except BaseException:
        job.conversion.step = step
        raise
    note(job.conn, job.conversion, exchange_seconds=job.conversion.facts["exchange_seconds"])


def _require_unchanged(job: Job, definition: Definition) -> None:
    if definition.structure() != job.fact("structure"):
        raise ConversionError(
            f"{TABLE} got another column, key, index or constraint since its conversion began: give it up (`partition"
            " status` says how), then begin again. No row was lost or changed."
        )
    gone = job.conn.execute(
        "SELECT count(*) FROM unnest(%s::oid[]) AS p (oid)"
        " WHERE p.oid NOT IN (SELECT t.relid FROM pg_partition_tree(to_regclass(%s)) AS t)",
        (job.fact("leaves"), TABLE),
    ).fetchone()
    if gone != (0,):
        raise ConversionError(
            f"A partition of {TABLE} was detached since the conversion began, and its rows are in the copy: give it up"
            " (`partition status` says how), then begin again. No row was lost or changed."
        )


def create_twin(job: Job, create: Callable[[Definition], None]) -> None:
    """Create the twin, and note what it was made for; what an interrupted run has left of one is dropped.

    Args:
        job: The conversion.
        create: Creates it.
    """
    drop_leftovers(job.conn, job.patience)
    definition = job.definition()

    def work() -> None:
        leaves = [oid for (oid,) in job.conn.execute("SELECT t.relid::oid FROM pg_partition_tree(%s) AS t", (TABLE,))]
        create(definition)
        note(job.conn, job.conversion, structure=definition.structure(), leaves=leaves, last_id=None, copied=0)

    briefly(job.conn, job.patience, work, "Creating the new table")
    # A rehearsal: what the new table refuses is better known now than after the rows are copied.
    with job.conn.transaction(force_rollback=True):
        run(job.conn, *access(definition), *triggers(definition))


def mirror_of(job: Job) -> Mirror:
    """Return what keeps the twin's rows like the table's."""
    return Mirror(job.conn, job.definition().columns(), job.patience)


def _copy(job: Job) -> None:
    mirror = mirror_of(job)
    while True:
        with job.conn.transaction():
            count, last = mirror.copy_batch(job.fact("last_id"), _BATCH)
            if count:
                note(job.conn, job.conversion, last_id=last, copied=(job.fact("copied") or 0) + count)
        if count:
            job.advanced("copy", count)
        if count < _BATCH:
            return


def _indexes(job: Job) -> None:
    # One transaction: what an interrupted run has built is gone.
    with job.conn.transaction():
        run(job.conn, *job.definition().statements("index"))


def _foreign_keys(job: Job) -> None:
    mirror = mirror_of(job)

    def repair(validate: Callable[[], Any]) -> None:
        def repaired() -> None:
            # A row whose deal was deleted since it was copied: the source has deleted it too.
            mirror.catch_up()
            validate()

        try:
            validate()
        except psycopg.errors.ForeignKeyViolation:
            mirror.retried(repaired)

    leaves = partitions_of(job.conn, TWIN)
    add_foreign_keys(
        job.conn,
        job.definition(),
        leaves or [TWIN],
        job.patience,
        repair,
        parent=TWIN if leaves else None,
    )


MIRROR: tuple[Step, ...] = (
    ("capture", lambda job: mirror_of(job).capture()),
    ("copy", _copy),
    ("indexes", _indexes),
    ("foreign keys", _foreign_keys),
    ("catch up", lambda job: mirror_of(job).catch_up(lambda rows: job.advanced("catch up", rows))),
    ("follow", lambda job: mirror_of(job).follow()),
    ("settle", lambda job: mirror_of(job).settle()),
    ("verify", lambda job: note(job.conn, job.conversion, rows=mirror_of(job).verify())),
)
"""The steps that fill the twin, which exists by then, and keep it like the table."""


def validate_inbound(job: Job) -> None:
    """Validate the foreign keys of others that were added without a look at their rows."""
    rows = job.conn.execute(
        "SELECT k.conrelid::regclass::text, quote_ident(k.conname) FROM pg_catalog.pg_constraint AS k"
        " WHERE k.confrelid = %s::regclass AND k.contype = 'f' AND k.conparentid = 0 AND NOT k.convalidated",
        (TABLE,),
    ).fetchall()
    wanted = set(job.fact("validate") or [])
    for table, name in rows:
        if f"{name} of {table}" in wanted:
            run(job.conn, f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def analyze(job: Job) -> None:
    """Gather the partitioned table's own statistics, which autovacuum never does."""
    run(job.conn, f"ANALYZE {TABLE}")


def tidy(job: Job) -> None:
    """Do what can be done after the exchange, in short steps."""
    validate_inbound(job)
    drop_leftovers(job.conn, job.patience)
    analyze(job)
