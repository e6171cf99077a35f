"""Applying migrations: one run at a time, each migration as a whole, retried when it met a lock."""

from __future__ import annotations

import random
import re
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import attrs
import psycopg

from equitie_data._migration_files import migrations
from equitie_data._migration_history import compare, ensure_history, read_applied, record_event
from equitie_data.connect import connect, target_of
from equitie_data.errors import EquitieDataError, MigrationError, MigrationLockTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from equitie_data._migration_files import Migration, Statement

__all__ = ["AppliedMigration", "MigrationReport", "apply_pending", "open_owner"]

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
_DO_BLOCK_LINE = re.compile(r"PL/pgSQL function inline_code_block line (\d+)")


@attrs.frozen(kw_only=True)
class AppliedMigration:
    """A migration that this run applied.

    Attributes:
        version: Its number.
        name: Its name.
        seconds: How long it took, with all attempts.
        attempts: How often it was tried: more than once when it met locks of running transactions.
    """

    version: int
    name: str
    seconds: float
    attempts: int


@attrs.frozen(kw_only=True)
class MigrationReport:
    """What a run did.

    Attributes:
        applied: The migrations it applied, in order.
        current: The last migration the database has, number and name; ``None`` for none.
        server_version: Version of the server.
        seconds: How long the run took, waiting included.
    """

    applied: tuple[AppliedMigration, ...]
    current: str | None
    server_version: str
    seconds: float


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
        raise MigrationError(f"{target_of(dsn)}: {_reason(error)}.") from None


def apply_pending(
    conn: Connection[Any],
    wanted: tuple[Migration, ...],
    *,
    lock_timeout: float,
    wait: float,
    on_begin: Callable[[Migration], None] | None,
    on_end: Callable[[AppliedMigration], None] | None,
) -> MigrationReport:
    """Apply those of ``wanted`` the database lacks; see `equitie_data.migrate.migrate`."""
    started = time.monotonic()
    applied: list[AppliedMigration] = []
    _take_turn(conn, wait)
    try:
        _require_create(conn)
        ensure_history(conn)
        lacking = {migration.version for migration in compare(read_applied(conn), migrations())}
        for migration in wanted:
            if migration.version not in lacking:
                continue
            if on_begin:
                on_begin(migration)
            done = _apply(conn, migration, lock_timeout)
            applied.append(done)
            if on_end:
                on_end(done)
        history = read_applied(conn)
    finally:
        # The end of the session releases it too; an error of this statement must not hide the one on its way.
        with suppress(psycopg.Error):
            conn.execute("SELECT pg_catalog.pg_advisory_unlock(%s)", (_ADVISORY_LOCK,))
    last = max(history, default=None)
    return MigrationReport(
        applied=tuple(applied),
        current=None if last is None else f"{last:04d}_{history[last].name}",
        server_version=conn.info.parameter_status("server_version") or "",
        seconds=round(time.monotonic() - started, 3),
    )


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


def _require_create(conn: Connection[Any]) -> None:
    row = conn.execute(
        "SELECT current_user, current_database(), has_database_privilege(current_database(), 'CREATE')"
    ).fetchone()
    if row is not None and not row[2]:
        raise MigrationError(
            f'"{row[0]}" may not create schemas in the database "{row[1]}": migrate as its owner'
            " (MIGRATION_DATABASE_URL), or grant CREATE on the database."
        )


def _apply(conn: Connection[Any], migration: Migration, lock_timeout: float) -> AppliedMigration:
    started_at = datetime.now(timezone.utc)
    started = time.monotonic()
    pause, longest = _BACKOFF
    for attempt in range(1, _ATTEMPTS + 1):
        # On its own: in one string with what fails, it would be rolled back with it.
        conn.execute("SELECT pg_catalog.set_config('lock_timeout', %s, false)", (f"{round(lock_timeout * 1000)}ms",))
        try:
            if migration.transactional:
                with conn.transaction():
                    _apply_once(conn, migration, started_at, started)
            else:
                _apply_once(conn, migration, started_at, started)
        except (_StatementError, psycopg.Error) as error:
            cause = error.cause if isinstance(error, _StatementError) else error
            if isinstance(cause, _RETRIED) and attempt < _ATTEMPTS:
                time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
                pause = min(pause * 2, longest)
                continue
            if not isinstance(error, _StatementError):
                raise MigrationError(
                    f"Migration {migration.label} could not be begun or committed: {_reason(cause)};"
                    " `python -m equitie_data.migrate status` says whether it is there."
                ) from cause
            _record_failure(conn, migration, error, started_at, started)
            raise MigrationError(_describe(migration, error, attempt)) from cause
        return AppliedMigration(
            version=migration.version,
            name=migration.name,
            seconds=round(time.monotonic() - started, 3),
            attempts=attempt,
        )
    raise AssertionError("the last attempt returns or raises")


class _StatementError(Exception):
    def __init__(self, line: int, cause: psycopg.Error) -> None:
        super().__init__(line, cause)
        self.line = line
        self.cause = cause


def _apply_once(conn: Connection[Any], migration: Migration, started_at: datetime, started: float) -> None:
    if migration.transactional:
        # Behind a transaction pooler the advisory lock is nobody's; this lock and this look hold there too.
        conn.execute("LOCK TABLE equitie_migrations.history IN SHARE ROW EXCLUSIVE MODE")
        if migration.version in read_applied(conn):
            return
    for statement in migration.statements:
        try:
            conn.execute(statement.text)
        except psycopg.Error as error:
            raise _StatementError(_line_of(statement, error), error) from error
    record_event(conn, migration, "applied", started_at=started_at, seconds=time.monotonic() - started, error=None)


def _line_of(statement: Statement, error: psycopg.Error) -> int:
    if error.diag.statement_position:
        return statement.line + statement.text.count("\n", 0, int(error.diag.statement_position) - 1)
    inside = _DO_BLOCK_LINE.findall(error.diag.context or "")
    if inside and (body := statement.text.find("$")) >= 0:
        # PL/pgSQL counts from the line on which the body is opened.
        return statement.line + statement.text.count("\n", 0, body) + int(inside[-1]) - 1
    return statement.line


def _record_failure(
    conn: Connection[Any], migration: Migration, error: _StatementError, started_at: datetime, started: float
) -> None:
    # On a full disk or a lost connection this fails as well; the caller hears of the first error either way.
    with suppress(psycopg.Error):
        record_event(
            conn,
            migration,
            "failed",
            started_at=started_at,
            seconds=time.monotonic() - started,
            error=f"line {error.line}: {_reason(error.cause)}",
        )


def _describe(migration: Migration, error: _StatementError, attempts: int) -> str:
    where = f"sql/migrations/{migration.label}.sql, line {error.line}"
    tried = f" {attempts} times" if attempts > 1 else ""
    left = (
        "Nothing of it was applied"
        if migration.transactional
        else "The statements before that line are applied and will be passed over by the next run"
    )
    hint = f" {error.cause.diag.message_hint}" if error.cause.diag.message_hint else ""
    return f"Migration {migration.label} failed{tried} ({where}): {_reason(error.cause)}.{hint} {left}."


def _reason(error: psycopg.Error) -> str:
    if error.diag.message_primary:
        return f"{error.diag.message_primary} (SQLSTATE {error.sqlstate})"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
