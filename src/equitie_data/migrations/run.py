"""Applying migrations: one run at a time, each migration as a whole or step by step, retried when it met a lock."""

from __future__ import annotations

import datetime as dt
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import psycopg

from equitie_data.errors import MigrationError
from equitie_data.migrations.directories import directory_of
from equitie_data.migrations.failures import StatementFailedError
from equitie_data.migrations.files import label_of
from equitie_data.migrations.history import ensure_history, read_history, record_event
from equitie_data.migrations.pending import before_deployment, pending_of
from equitie_data.migrations.session import cause_of, retried, timeouts, turn
from equitie_data.migrations.steps import run_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration

__all__ = ["AppliedMigration", "MigrationReport", "Run", "apply_pending", "require_create", "wanted_of"]


@attrs.frozen(kw_only=True)
class AppliedMigration:
    """A migration that this run applied.

    Attributes:
        version: Its number.
        name: Its name.
        seconds: How long it took, with all attempts.
        attempts: How often it was tried: more than once when it met locks of running transactions.
        directory: Its directory.
    """

    version: int
    name: str
    seconds: float
    attempts: int
    directory: str


@attrs.frozen(kw_only=True)
class MigrationReport:
    """What a run did.

    Attributes:
        applied: The migrations it applied, in order.
        current: The library's last migration that the database has, number and name; ``None`` for none.
        server_version: Version of the server.
        seconds: How long the run took, waiting included.
        left_for_after: Labels of the pending migrations that come after the deployment.
    """

    applied: tuple[AppliedMigration, ...]
    current: str | None
    server_version: str
    seconds: float
    left_for_after: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Run:
    """How migrations are to be applied.

    Attributes:
        to: The last one to apply; all for the empty string.
        before_deployment: Whether to leave those for later that code of the release before cannot work with.
        lock_timeout: Seconds a statement may wait for a lock.
        wait: Seconds to wait for another run.
        on_begin: Called before each migration.
        on_step: Called after each step of one, with its number, their count, and the seconds it took.
        on_end: Called after each migration.
    """

    to: str = ""
    before_deployment: bool = False
    lock_timeout: float
    wait: float
    on_begin: Callable[[Migration], None] | None = None
    on_step: Callable[[int, int, float], None] | None = None
    on_end: Callable[[AppliedMigration], None] | None = None


def wanted_of(directories: Sequence[MigrationDirectory], to: str) -> dict[str, tuple[Migration, ...]]:
    """Return the migrations of each directory up to a place, by the directory's name.

    Directories behind that of the place are left out: what they have rests on all of those before them.

    Raises:
        MigrationError: There is no such place.
    """
    last, place = directory_of(to, directories) if to else (directories[-1], "")
    wanted: dict[str, tuple[Migration, ...]] = {}
    for directory in directories:
        wanted[directory.name] = directory.up_to(place if directory is last else "")
        if directory is last:
            break
    return wanted


def apply_pending(conn: Connection[Any], directories: Sequence[MigrationDirectory], run: Run) -> MigrationReport:
    """Apply what a database lacks; see `equitie_data.migrate.migrate`."""
    started = time.monotonic()
    wanted = wanted_of(directories, run.to)
    applied: list[AppliedMigration] = []
    with turn(conn, run.wait):
        require_create(conn)
        ensure_history(conn)
        # All of them are looked at before the first statement: a drift in the last directory stops the run as well.
        lacking = {each.name: pending_of(each, read_history(conn, each.name).applied) for each in directories}
        chosen: list[Migration] = []
        left: list[str] = []
        for name, migrations in wanted.items():
            pending = tuple(migration for migration in migrations if migration in lacking[name])
            now = before_deployment(pending) if run.before_deployment else pending
            left += [migration.label for migration in pending if migration not in now]
            chosen += now
        for migration in chosen:
            if run.on_begin:
                run.on_begin(migration)
            done = _apply(conn, migration, run)
            applied.append(done)
            if run.on_end:
                run.on_end(done)
        history = read_history(conn).applied
    last = max(history, default=None)
    return MigrationReport(
        applied=tuple(applied),
        current=None if last is None else label_of(directories[0].name, last, history[last].name),
        server_version=conn.info.parameter_status("server_version") or "",
        seconds=round(time.monotonic() - started, 3),
        left_for_after=tuple(left),
    )


def require_create(conn: Connection[Any]) -> None:
    """Raise where the role may not create schemas, with which everything begins."""
    row = conn.execute(
        "SELECT current_user, current_database(), has_database_privilege(current_database(), 'CREATE')"
    ).fetchone()
    if row is not None and not row[2]:
        raise MigrationError(
            f'"{row[0]}" may not create schemas in the database "{row[1]}": migrate as its owner'
            " (MIGRATION_DATABASE_URL), or grant CREATE on the database."
        )


def _apply(conn: Connection[Any], migration: Migration, run: Run) -> AppliedMigration:
    started_at = dt.datetime.now(dt.timezone.utc)
    started = time.monotonic()
    lock_timeout = run.lock_timeout if migration.lock_timeout is None else migration.lock_timeout
    attempts = 0

    def as_a_whole() -> None:
        nonlocal attempts
        attempts += 1
        with conn.transaction():
            _apply_once(conn, migration, started_at, started)

    try:
        if migration.transactional:
            with timeouts(conn, lock=lock_timeout, statement=migration.statement_timeout or 0):
                retried(as_a_whole)
        else:
            attempts = 1
            run_steps(conn, migration, lock_timeout, run.on_step)
            record_event(conn, migration, "applied", started_at=started_at, seconds=time.monotonic() - started)
    except StatementFailedError as error:
        _record_failure(conn, migration, error, started_at, started)
        left = "Nothing of it was applied" if migration.transactional else "The next run goes on with that statement"
        times = f" {attempts} times" if attempts > 1 else ""
        raise MigrationError(error.describe(migration, f"failed{times}", left)) from error.error
    except psycopg.Error as error:
        raise MigrationError(
            f"Migration {migration.label} could not be begun or committed: {cause_of(error)};"
            " `python -m equitie_data.migrate status` says whether it is there."
        ) from error
    return AppliedMigration(
        version=migration.version,
        name=migration.name,
        seconds=round(time.monotonic() - started, 3),
        attempts=attempts,
        directory=migration.directory,
    )


def _apply_once(conn: Connection[Any], migration: Migration, started_at: dt.datetime, started: float) -> None:
    # Behind a transaction pooler the advisory lock is nobody's; this lock and this look hold there too.
    conn.execute("LOCK TABLE equitie_migrations.history IN SHARE ROW EXCLUSIVE MODE")
    if migration.version in read_history(conn, migration.directory).applied:
        return
    for statement in migration.statements:
        try:
            conn.execute(statement.text)
        except psycopg.Error as error:
            raise StatementFailedError(statement, error) from error
    record_event(conn, migration, "applied", started_at=started_at, seconds=time.monotonic() - started)


def _record_failure(
    conn: Connection[Any], migration: Migration, error: StatementFailedError, started_at: dt.datetime, started: float
) -> None:
    # On a full disk or a lost connection this fails as well; the caller hears of the first error either way.
    with suppress(psycopg.Error):
        record_event(
            conn,
            migration,
            "failed",
            started_at=started_at,
            seconds=time.monotonic() - started,
            error=f"line {error.line}: {cause_of(error.error)}",
        )
