"""The owner's session: how it is set up, how it takes its turn, and how it meets locks."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg

from equitie_data.connect import connect, target_of
from equitie_data.errors import EquitieDataError, MigrationError, MigrationLockTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

__all__ = ["cause_of", "open_owner", "retried", "timeouts", "turn"]

T = TypeVar("T")

_OLDEST_SERVER = 150000
_ADVISORY_LOCK = int.from_bytes(b"equitie\x01", "big")
_POLL = (0.05, 1.0)  # seconds between two attempts to get the advisory lock: first, longest
_ATTEMPTS = 8
_BACKOFF = (0.2, 10.0)  # seconds before the second attempt, longest
_RETRIED = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)


@contextmanager
def open_owner(dsn: str) -> Iterator[Connection[Any]]:
    """Connect for migrations: autocommit, on a primary of a supported version, without the role's timeouts.

    Raises:
        UnavailableError: The server cannot be reached.
        MigrationError: The server is too old, or a read replica; or the connection is lost.
    """
    conn = connect(dsn, application_name="equitie_data.migrate")
    try:
        with conn:
            if conn.info.server_version < _OLDEST_SERVER:
                raise MigrationError(
                    f"{target_of(dsn)} runs PostgreSQL {conn.info.parameter_status('server_version')}:"
                    " equitie_data needs 15 or newer."
                )
            if conn.execute("SELECT pg_catalog.pg_is_in_recovery()").fetchone() == (True,):
                raise MigrationError(f"{target_of(dsn)} is a read replica: name the primary in MIGRATION_DATABASE_URL.")
            # An empty search_path: a migration that forgot a schema fails here, and not only at somebody else's.
            conn.execute(
                "SELECT"
                " pg_catalog.set_config('statement_timeout', '0', false),"
                " pg_catalog.set_config('idle_in_transaction_session_timeout', '0', false),"
                " pg_catalog.set_config('default_transaction_read_only', 'off', false),"
                " pg_catalog.set_config('default_transaction_isolation', 'read committed', false),"
                " pg_catalog.set_config('client_min_messages', 'warning', false),"
                " pg_catalog.set_config('search_path', '', false)"
            )
            yield conn
    except psycopg.Error as error:
        if isinstance(error, EquitieDataError):
            raise
        raise MigrationError(f"{target_of(dsn)}: {cause_of(error)}.") from None


@contextmanager
def turn(conn: Connection[Any], wait: float) -> Iterator[None]:
    """Be the only run on this database for the length of a `with` block.

    Args:
        conn: The owner's session.
        wait: Seconds to wait for another run.

    Raises:
        MigrationLockTimeoutError: The other run did not end in time.
    """
    _take_turn(conn, wait)
    try:
        yield
    finally:
        # The end of the session releases it too; an error of this statement must not hide the one on its way.
        with suppress(psycopg.Error):
            conn.execute("SELECT pg_catalog.pg_advisory_unlock(%s)", (_ADVISORY_LOCK,))


def _take_turn(conn: Connection[Any], wait: float) -> None:
    # Polled: a session that blocks in pg_advisory_lock() holds a snapshot, for which the holder's CREATE INDEX
    # CONCURRENTLY waits: a deadlock that leaves an invalid index.
    deadline = time.monotonic() + wait
    pause, longest = _POLL
    while conn.execute("SELECT pg_catalog.pg_try_advisory_lock(%s)", (_ADVISORY_LOCK,)).fetchone() != (True,):
        if time.monotonic() >= deadline:
            holder = conn.execute(
                "SELECT l.pid FROM pg_catalog.pg_locks AS l WHERE l.locktype = 'advisory' AND l.granted"
                " AND l.database = (SELECT d.oid FROM pg_catalog.pg_database AS d WHERE d.datname = current_database())"
                " AND (l.classid::bigint << 32) | l.objid::bigint = %s",
                (_ADVISORY_LOCK,),
            ).fetchone()
            whose = f" (server process {holder[0]})" if holder else ""
            raise MigrationLockTimeoutError(
                f"Another run{whose} was still migrating this database after {wait:g} s: let it finish, then run again."
            )
        time.sleep(min(pause * random.uniform(0.5, 1.5), max(deadline - time.monotonic(), 0)))  # noqa: S311 - jitter
        pause = min(pause * 2, longest)


@contextmanager
def timeouts(conn: Connection[Any], *, lock: float, statement: float) -> Iterator[None]:
    """Bound the waits of a `with` block; 0 is no bound.

    Args:
        conn: The owner's session, outside of a transaction.
        lock: Seconds a statement may wait for a lock.
        statement: Seconds a statement may take.
    """
    # On their own: in one string with what fails, they would be rolled back with it.
    _set_timeouts(conn, lock, statement)
    try:
        yield
    finally:
        with suppress(psycopg.Error):
            _set_timeouts(conn, 0, 0)


def _set_timeouts(conn: Connection[Any], lock: float, statement: float) -> None:
    conn.execute(
        "SELECT pg_catalog.set_config('lock_timeout', %s, false),"
        " pg_catalog.set_config('statement_timeout', %s, false)",
        (f"{round(lock * 1000)}ms", f"{round(statement * 1000)}ms"),
    )


def retried(action: Callable[[], T]) -> T:
    """Do something until it meets no lock of others any more, with growing, jittered pauses in between.

    Args:
        action: What to do, as a whole or not at all. What it raises may also stand behind an error of ours, as its
            cause.

    Returns:
        What it returned.
    """
    pause, longest = _BACKOFF
    for _ in range(_ATTEMPTS - 1):
        try:
            return action()
        except Exception as error:
            if not isinstance(error, _RETRIED) and not isinstance(error.__cause__, _RETRIED):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
        pause = min(pause * 2, longest)
    return action()


def cause_of(error: psycopg.Error) -> str:
    """Return what the server said, in one line and without the row's values, which stand in its DETAIL."""
    if error.diag.message_primary:
        return f"{error.diag.message_primary} (SQLSTATE {error.sqlstate})"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
