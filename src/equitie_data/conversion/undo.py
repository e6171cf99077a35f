"""Back to a flat table with every row, those written since included; and out of a conversion that is not done yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equitie_data.conversion.definition import run
from equitie_data.conversion.layout import BOUNDARY, FLAT_KEY, LEGACY, LEGACY_KEY, SCRATCH, TABLE, TWIN
from equitie_data.conversion.mirror import stop_mirroring
from equitie_data.conversion.record import close
from equitie_data.conversion.schema import build_index, drop_functions
from equitie_data.conversion.steps import EXCHANGE, MIRROR, create_twin, exchange, partitions_of, tidy
from equitie_data.conversion.twin import (
    access,
    bind_anew,
    change_places,
    create_flat,
    drop_leftovers,
    triggers,
    unbind,
)

if TYPE_CHECKING:
    from equitie_data.conversion.definition import Definition
    from equitie_data.conversion.steps import Job, Step

__all__ = ["DETACH", "UNDO_COPY", "abandon", "has_rows_elsewhere"]


def has_rows_elsewhere(job: Job) -> bool:
    """Return whether there are rows outside of the partition that was the flat table."""
    others = [name for name in partitions_of(job.conn, TABLE) if name != LEGACY]
    return any(run(job.conn, f"SELECT EXISTS (SELECT FROM {name})").fetchone() == (True,) for name in others)


def _by_id(job: Job) -> list[str]:
    return list(job.fact("keys_by_id") or [])


# While nothing was written to later months, the flat table is still there, as a partition: it only has to come back.


def _flat_key(job: Job) -> None:
    build_index(
        job.conn,
        f"equitie_part.{FLAT_KEY}",
        f"CREATE UNIQUE INDEX CONCURRENTLY {FLAT_KEY} ON {LEGACY} (transaction_id)",
    )
    run(job.conn, f"CREATE SCHEMA IF NOT EXISTS {SCRATCH}")


def _take_back(job: Job) -> None:
    others = [name for name in partitions_of(job.conn, TABLE) if name != LEGACY]
    is_empty = " AND ".join(f"NOT EXISTS (SELECT FROM {name})" for name in others)

    def compose(definition: Definition) -> list[str]:
        own = definition.of("own statement trigger")
        return [
            (
                f"DO $empty$ BEGIN IF NOT ({is_empty}) THEN RAISE EXCEPTION 'rows were written to other partitions"
                " meanwhile: run partition undo again' USING ERRCODE = 'object_not_in_prerequisite_state';"
                " END IF; END $empty$"
            ),
            *unbind(definition),
            f"ALTER TABLE {TABLE} DETACH PARTITION {LEGACY}",
            *(f'DROP TRIGGER IF EXISTS "{piece.name}" ON {LEGACY}' for piece in own),
            f"ALTER TABLE {LEGACY} DROP CONSTRAINT {LEGACY_KEY}",
            _DROP_STATISTICS,
            f"ALTER TABLE {LEGACY} RENAME TO transactions_clean",
            f"ALTER TABLE equitie_part.transactions_clean SET SCHEMA {SCRATCH}",
            f"ALTER TABLE {TWIN} ADD CONSTRAINT transactions_clean_pkey PRIMARY KEY USING INDEX {FLAT_KEY}",
            f"COMMENT ON TABLE {TWIN} IS 'What an investor put into a deal, and when.'",
            *definition.statements("sequence", "statistics"),
            *access(definition),
            *triggers(definition),
            *change_places(job.conn, definition),
            *bind_anew(definition, by_id=True),
            *_by_id(job),
        ]

    exchange(job, compose, copied=False, referenced=True)


_DROP_STATISTICS = f"""
DO $statistics$
DECLARE
  found text;
BEGIN
  FOR found IN
    SELECT format('%I.%I', e.stxnamespace::regnamespace::text, e.stxname)
    FROM pg_catalog.pg_statistic_ext AS e
    WHERE e.stxrelid = '{LEGACY}'::regclass
  LOOP
    EXECUTE 'DROP STATISTICS ' || found;
  END LOOP;
END
$statistics$
"""


DETACH: tuple[Step, ...] = (
    ("flat key", _flat_key),
    (EXCHANGE, _take_back),
    ("tidy", tidy),
)
"""The steps of taking the flat table back, in order."""


# Otherwise, the rows are copied to a new one.


def _exchange(job: Job) -> None:
    def compose(definition: Definition) -> list[str]:
        return [
            *unbind(definition),
            *access(definition),
            *triggers(definition),
            *change_places(job.conn, definition),
            *bind_anew(definition, by_id=True),
            *_by_id(job),
        ]

    exchange(job, compose)


UNDO_COPY: tuple[Step, ...] = (
    ("twin", lambda job: create_twin(job, lambda definition: create_flat(job.conn, definition))),
    *MIRROR,
    (EXCHANGE, _exchange),
    ("tidy", tidy),
)
"""The steps of copying the rows back, in order."""


def abandon(job: Job) -> None:
    """Take back what a conversion has prepared. It has changed nothing yet, and neither does this."""
    operation = job.conversion.operation
    job.briefly("Giving up the conversion", *stop_mirroring())
    drop_leftovers(job.conn, job.patience)
    if operation == "attach":
        job.briefly(
            "Giving up the conversion",
            f"ALTER TABLE {TABLE} DROP CONSTRAINT IF EXISTS {BOUNDARY}",
            f"ALTER TABLE {TABLE} DROP CONSTRAINT IF EXISTS conversion_has_date",
        )
        run(job.conn, f"DROP INDEX CONCURRENTLY IF EXISTS public.{LEGACY_KEY}")
    if operation in {"attach", "copy"}:
        drop_functions(job.conn)
    if operation == "undo":
        run(job.conn, f"DROP INDEX CONCURRENTLY IF EXISTS equitie_part.{FLAT_KEY}")
    close(job.conn, job.conversion, "abandoned")
