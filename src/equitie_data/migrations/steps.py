"""Migrations outside of transactions: every statement is a step, recorded when it is done, and a run resumes there."""

from __future__ import annotations

import datetime as dt
import time
from typing import TYPE_CHECKING, Any

import psycopg

from equitie_data.errors import MigrationError
from equitie_data.migrations.concurrent import CONCURRENT_STATEMENT_TIMEOUT, Waits, run_outside
from equitie_data.migrations.failures import StatementFailedError
from equitie_data.migrations.history import read_history, record_event
from equitie_data.migrations.session import retried, timeouts
from equitie_data.migrations.shapes import shape_of
from equitie_data.migrations.statements import checksum

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from equitie_data.migrations.files import Migration
    from equitie_data.migrations.statements import Statement

__all__ = ["matching_steps", "run_steps"]


def matching_steps(migration: Migration, recorded: tuple[str, ...]) -> int:
    """Return how many of the statements that were done are, in order, those the file now begins with.

    Args:
        migration: The file as it is now.
        recorded: Checksums of the statements that were done, in order.
    """
    count = 0
    for statement, done in zip(migration.statements, recorded, strict=False):
        if checksum(statement.text) != done:
            break
        count += 1
    return count


def run_steps(
    conn: Connection[Any], migration: Migration, lock_timeout: float, on_step: Callable[[int, int, float], None] | None
) -> None:
    """Do the steps of a migration that are not done yet, and record each of them.

    Args:
        conn: The owner's session, outside of a transaction.
        migration: One that is not transactional.
        lock_timeout: Seconds a statement may wait for a lock that stands in others' way.
        on_step: Called after each step with its number, their count, and the seconds it took.

    Raises:
        StatementFailedError: A step failed; those before it are done.
        MigrationError: A step that was done is not in the file any more, or something is in the way.
    """
    # Behind a transaction pooler the advisory lock would be nobody's, and so would the timeouts.
    if conn.execute("SELECT pg_catalog.pg_backend_pid()").fetchone() != (conn.info.backend_pid,):
        raise MigrationError(
            f"A pooler stands between this run and the server, and {migration.label} needs a session of its own: name"
            " the server itself in MIGRATION_DATABASE_URL."
        )
    recorded = read_history(conn, migration.directory).steps.get(migration.version, ())
    done = matching_steps(migration, recorded)
    if done < len(recorded):
        raise MigrationError(
            f"Step {done + 1} of {migration.label} is done, but was another statement than the file now has: restore"
            f" it, or have `python -m equitie_data.migrate repair {migration.label}` say what it would do."
        )
    for number, statement in enumerate(migration.statements[done:], start=done + 1):
        started = time.monotonic()
        try:
            _run_step(conn, migration, number, statement, lock_timeout)
        except psycopg.Error as error:
            raise StatementFailedError(statement, error) from error
        if on_step:
            on_step(number, len(migration.statements), time.monotonic() - started)


def _run_step(
    conn: Connection[Any], migration: Migration, number: int, statement: Statement, lock_timeout: float
) -> None:
    started_at = dt.datetime.now(dt.timezone.utc)
    started = time.monotonic()

    def record() -> None:
        record_event(
            conn,
            migration,
            "step",
            started_at=started_at,
            seconds=time.monotonic() - started,
            step=number,
            sha256=checksum(statement.text),
        )

    def together() -> None:
        with conn.transaction():
            conn.execute(statement.text)
            record()

    shape = shape_of(statement.text)
    if shape is None:
        with timeouts(conn, lock=lock_timeout, statement=migration.statement_timeout or 0):
            retried(together)
    else:
        bound = migration.statement_timeout or CONCURRENT_STATEMENT_TIMEOUT
        run_outside(conn, shape, statement.text, Waits(lock_timeout, bound))
        record()
