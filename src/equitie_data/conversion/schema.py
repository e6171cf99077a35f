"""What migration 0004 brings besides the partitioned table, and its record in the history."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from equitie_data.conversion.definition import run
from equitie_data.errors import ConversionError
from equitie_data.migrations.directories import ours
from equitie_data.migrations.history import read_history, record_event

if TYPE_CHECKING:
    import datetime as dt

    from psycopg import Connection

    from equitie_data.conversion.steps import Job
    from equitie_data.migrations.files import Migration

__all__ = [
    "create_functions",
    "create_indexes",
    "drop_functions",
    "is_recorded",
    "partitioning",
    "record",
    "require_earlier",
]

_VERSION = 4
_ABOUT_FUNCTIONS = re.compile(r"(?:CREATE|COMMENT ON|REVOKE ALL ON|GRANT EXECUTE ON) FUNCTION ")
_INDEX = re.compile(r"CREATE INDEX (?P<name>\w+)\s+ON public\.transactions_clean")
_LEADING_COMMENTS = re.compile(r"(?:\s+|--[^\n]*\n)*")


def partitioning() -> Migration:
    """Return migration 0004."""
    return next(migration for migration in ours().migrations if migration.version == _VERSION)


def is_recorded(conn: Connection[Any]) -> bool:
    """Return whether the history says that the table was partitioned, by the migration or by a conversion."""
    return _VERSION in read_history(conn).applied


def require_earlier(conn: Connection[Any]) -> None:
    """Make sure that the migrations before 0004 are there.

    Raises:
        ConversionError: They are not.
    """
    applied = read_history(conn).applied
    missing = [
        migration.label
        for migration in ours().migrations
        if migration.version < _VERSION and migration.version not in applied
    ]
    if missing:
        raise ConversionError(
            f"The database lacks migration {missing[0]}: apply it with `python -m equitie_data.migrate --to 3`, or,"
            " where the platform's tables are there already, with `python -m equitie_data.migrate baseline --to 3`;"
            " then convert."
        )


def create_functions(conn: Connection[Any]) -> None:
    """Create the functions of migration 0004, word for word, where they are missing."""
    if conn.execute("SELECT to_regproc('equitie_private.ensure_month_partitions')").fetchone() != (None,):
        return
    with conn.transaction():
        run(conn, *(text for text in map(_bare, _texts()) if _ABOUT_FUNCTIONS.match(text)))


def drop_functions(conn: Connection[Any]) -> None:
    """Drop them again, unless they are the migration's: it creates them itself."""
    if not is_recorded(conn):
        run(
            conn,
            "DROP FUNCTION IF EXISTS equitie_private.ensure_month_partitions(regclass, date, date)",
            "DROP FUNCTION IF EXISTS equitie_private.month_partition_bounds(regclass)",
        )


def create_indexes(conn: Connection[Any]) -> None:
    """Create the indexes of migration 0004 that the table lacks, while it is written.

    An index that an earlier run left invalid is dropped first: ``IF NOT EXISTS`` would take it for a good one.
    """
    for text in map(_bare, _texts()):
        match = _INDEX.match(text)
        if match:
            build_index(conn, f"public.{match['name']}", text.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1))


def build_index(conn: Connection[Any], name: str, statement: str) -> None:
    """Build an index concurrently, unless it is there and valid.

    Args:
        conn: The owner's session, outside of a transaction.
        name: The index, with its schema.
        statement: The ``CREATE INDEX CONCURRENTLY``.
    """
    row = conn.execute(
        "SELECT i.indisvalid FROM pg_catalog.pg_index AS i WHERE i.indexrelid = to_regclass(%s)", (name,)
    ).fetchone()
    if row == (True,):
        return
    if row is not None:
        run(conn, f"DROP INDEX CONCURRENTLY {name}")
    run(conn, statement)


def record(job: Job) -> None:
    """Record migration 0004 as applied, unless it is; in the transaction that makes it true."""
    if not is_recorded(job.conn):
        began: dt.datetime = job.conversion.started_at
        seconds = (datetime.now(timezone.utc) - began).total_seconds()
        record_event(job.conn, partitioning(), "applied", started_at=began, seconds=seconds)


def _texts() -> list[str]:
    return [statement.text for statement in partitioning().statements]


def _bare(text: str) -> str:
    return text[_LEADING_COMMENTS.match(text).end() :]  # type: ignore[union-attr]
