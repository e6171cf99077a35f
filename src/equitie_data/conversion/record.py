"""What a conversion has done so far: a row in ``equitie_private.partition_conversions``, so that any run can go on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from equitie_data.errors import ConversionError
from equitie_data.migrations.history import package_version

if TYPE_CHECKING:
    import datetime as dt

    from psycopg import Connection

__all__ = ["Conversion", "Operation", "advance", "begin", "close", "ensure_record", "latest", "note"]

Operation: TypeAlias = Literal["attach", "copy", "split", "undo"]

# Made when the first conversion begins, not by a migration: it is needed before migration 0004.
_CREATE = (
    """
    CREATE TABLE equitie_private.partition_conversions (
      conversion_id bigint GENERATED ALWAYS AS IDENTITY,
      operation text NOT NULL,
      state text NOT NULL DEFAULT 'running',
      step text NOT NULL DEFAULT '',
      facts jsonb NOT NULL DEFAULT '{}',
      started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
      updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
      finished_at timestamptz,
      started_by text NOT NULL DEFAULT session_user,
      package_version text NOT NULL,
      CONSTRAINT partition_conversions_pkey PRIMARY KEY (conversion_id),
      CONSTRAINT chk_partition_conversions_operation CHECK (operation IN ('attach', 'copy', 'split', 'undo')),
      CONSTRAINT chk_partition_conversions_state CHECK (state IN ('running', 'done', 'abandoned'))
    )
    """,
    # Two at once would convert the same table twice.
    (
        "CREATE UNIQUE INDEX partition_conversions_running ON equitie_private.partition_conversions ((true))"
        " WHERE state = 'running'"
    ),
    (
        "COMMENT ON TABLE equitie_private.partition_conversions IS 'Conversions of public.transactions_clean between a"
        " flat and a partitioned table, running and past.'"
    ),
    "COMMENT ON COLUMN equitie_private.partition_conversions.conversion_id IS 'Key.'",
    (
        "COMMENT ON COLUMN equitie_private.partition_conversions.operation IS 'attach: the flat table becomes a"
        " partition. copy: its rows go to months. split: the partition it became goes to months. undo: back to a flat"
        " table.'"
    ),
    "COMMENT ON COLUMN equitie_private.partition_conversions.state IS 'running, done or abandoned.'",
    "COMMENT ON COLUMN equitie_private.partition_conversions.step IS 'The last step that is done.'",
    "COMMENT ON COLUMN equitie_private.partition_conversions.facts IS 'What later steps need to know of earlier ones.'",
    "COMMENT ON COLUMN equitie_private.partition_conversions.started_at IS 'When it began.'",
    "COMMENT ON COLUMN equitie_private.partition_conversions.updated_at IS 'When it last got on.'",
    "COMMENT ON COLUMN equitie_private.partition_conversions.finished_at IS 'When it ended; NULL while it runs.'",
    "COMMENT ON COLUMN equitie_private.partition_conversions.started_by IS 'Database role that began it.'",
    "COMMENT ON COLUMN equitie_private.partition_conversions.package_version IS 'Version of equitie_data.'",
    "REVOKE ALL ON equitie_private.partition_conversions FROM PUBLIC, anon, authenticated, equitie_staff, service_role",
    (
        "REVOKE ALL ON SEQUENCE equitie_private.partition_conversions_conversion_id_seq"
        " FROM PUBLIC, anon, authenticated, equitie_staff, service_role"
    ),
)


@attrs.define
class Conversion:
    """One conversion.

    Attributes:
        conversion_id: Its key.
        operation: What is done.
        state: ``running``, ``done`` or ``abandoned``.
        step: The last step that is done; empty before the first.
        facts: What later steps need to know of earlier ones.
        started_at: When it began.
        updated_at: When it last got on.
    """

    conversion_id: int
    operation: Operation
    state: str
    step: str
    facts: dict[str, Any]
    started_at: dt.datetime
    updated_at: dt.datetime


def ensure_record(conn: Connection[Any]) -> None:
    """Create the table where it is missing."""
    if conn.execute("SELECT to_regclass('equitie_private.partition_conversions')").fetchone() != (None,):
        return
    with conn.transaction():
        for statement in _CREATE:
            conn.execute(statement)


def latest(conn: Connection[Any]) -> Conversion | None:
    """Return the last conversion that was begun; ``None`` if there never was one."""
    if conn.execute("SELECT to_regclass('equitie_private.partition_conversions')").fetchone() == (None,):
        return None
    row = conn.execute(
        "SELECT conversion_id, operation, state, step, facts, started_at, updated_at"
        " FROM equitie_private.partition_conversions ORDER BY conversion_id DESC LIMIT 1"
    ).fetchone()
    return Conversion(*row) if row else None


def begin(conn: Connection[Any], operation: Operation, facts: dict[str, Any]) -> Conversion:
    """Record that a conversion begins."""
    ensure_record(conn)
    conn.execute(
        "INSERT INTO equitie_private.partition_conversions (operation, facts, package_version) VALUES (%s, %s, %s)",
        (operation, json.dumps(facts), package_version()),
    )
    found = latest(conn)
    if found is None:
        raise ConversionError("The conversion could not be recorded in equitie_private.partition_conversions.")
    return found


def advance(conn: Connection[Any], conversion: Conversion, step: str) -> None:
    """Record that a step is done; inside of a transaction, if and only if that commits."""
    conn.execute(
        "UPDATE equitie_private.partition_conversions SET step = %s, updated_at = clock_timestamp()"
        " WHERE conversion_id = %s",
        (step, conversion.conversion_id),
    )
    conversion.step = step


def note(conn: Connection[Any], conversion: Conversion, **facts: Any) -> None:
    """Record facts that later steps need."""
    conn.execute(
        "UPDATE equitie_private.partition_conversions SET facts = facts || %s::jsonb, updated_at = clock_timestamp()"
        " WHERE conversion_id = %s",
        (json.dumps(facts), conversion.conversion_id),
    )
    conversion.facts.update(facts)


def close(conn: Connection[Any], conversion: Conversion, state: Literal["done", "abandoned"]) -> None:
    """Record that a conversion has ended."""
    conn.execute(
        "UPDATE equitie_private.partition_conversions SET state = %s, updated_at = clock_timestamp(),"
        " finished_at = clock_timestamp() WHERE conversion_id = %s",
        (state, conversion.conversion_id),
    )
    conversion.state = state
