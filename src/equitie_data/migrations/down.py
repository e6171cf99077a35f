"""Taking back the newest migration, where nothing is lost by it."""

from __future__ import annotations

import datetime as dt
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg

from equitie_data.errors import MigrationError
from equitie_data.migrations.directories import directory_of
from equitie_data.migrations.failures import StatementFailedError
from equitie_data.migrations.history import History, ensure_history, read_events, record_event
from equitie_data.migrations.pending import refuse_drift, refuse_unknown
from equitie_data.migrations.session import cause_of, retried, timeouts, turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration

__all__ = ["newest_with_down", "roll_back"]


def newest_with_down(
    conn: Connection[Any], directories: Sequence[MigrationDirectory], place: str
) -> tuple[Migration, Migration]:
    """Return a migration and the file that takes it back, if it may be taken back now.

    Args:
        conn: The owner's session.
        directories: Those there are.
        place: The migration's number, name or label.

    Raises:
        MigrationError: It is not applied, not the newest, or cannot be taken back without loss.
    """
    directory, rest = directory_of(place, directories)
    migration = directory.up_to(rest)[-1]
    try:
        histories = read_events(conn)
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        histories = {}
    history = histories.get(directory.name, History({}, {}, ()))
    refuse_unknown(directory, history.applied)
    refuse_drift(directory, history.applied)
    if migration.version not in history.applied:
        raise MigrationError(f"Migration {migration.label} is not applied, so there is nothing to take back.")
    newest = history.applied[max(history.applied)]
    if newest.version != migration.version:
        raise MigrationError(
            f"Migration {migration.label} is not the newest: {newest.label} was applied after it and may rest on it."
        )
    resting = [name for name, each in histories.items() if name != directory.name and each.applied]
    if directory.is_ours and resting:
        raise MigrationError(
            f"Migration {migration.label} may be what those of {', '.join(sorted(resting))} rest on: take those back"
            " first."
        )
    down = directory.downs.get(migration.label)
    if down is None:
        raise MigrationError(
            f"Migration {migration.label} cannot be taken back without loss: restore a backup, or write a new"
            " migration that puts right what is wrong."
        )
    return migration, down


def roll_back(
    conn: Connection[Any],
    directories: Sequence[MigrationDirectory],
    place: str,
    *,
    lock_timeout: float,
    wait: float,
) -> tuple[str, ...]:
    """Take back the newest migration; see `equitie_data.migrate.down`."""
    with turn(conn, wait):
        migration, down = newest_with_down(conn, directories, place)
        ensure_history(conn)
        started_at = dt.datetime.now(dt.timezone.utc)
        started = time.monotonic()

        def as_a_whole() -> None:
            with conn.transaction():
                conn.execute("LOCK TABLE equitie_migrations.history IN SHARE ROW EXCLUSIVE MODE")
                newest_with_down(conn, directories, place)
                for statement in down.statements:
                    try:
                        conn.execute(statement.text)
                    except psycopg.Error as error:
                        raise StatementFailedError(statement, error) from error
                seconds = time.monotonic() - started
                record_event(conn, migration, "rolled_back", started_at=started_at, seconds=seconds)

        lock = lock_timeout if down.lock_timeout is None else down.lock_timeout
        try:
            with timeouts(conn, lock=lock, statement=down.statement_timeout or 0):
                retried(as_a_whole)
        except StatementFailedError as error:
            with suppress(psycopg.Error):
                record_event(
                    conn,
                    migration,
                    "failed",
                    started_at=started_at,
                    seconds=time.monotonic() - started,
                    error=f"taking it back, line {error.line}: {cause_of(error.error)}",
                )
            raise MigrationError(error.describe(down, "was not taken back", "It is there as before")) from error.error
    return tuple(statement.text for statement in down.statements)
