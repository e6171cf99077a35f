"""The history table ``equitie_migrations.history``: one row per event, never cleared."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import psycopg

from equitie_data._migration_files import migrations
from equitie_data.errors import ChecksumDriftError, HistoryTooNewError, NotMigratedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from psycopg import Connection

    from equitie_data._migration_files import Migration

__all__ = ["Applied", "check_current", "compare", "ensure_history", "package_version", "read_applied", "record_event"]

State: TypeAlias = Literal["applied", "failed"]

_HOW_TO_MIGRATE = "run `python -m equitie_data.migrate` as the owner"

_CREATE = (
    "CREATE SCHEMA IF NOT EXISTS equitie_migrations",
    """
    CREATE TABLE IF NOT EXISTS equitie_migrations.history (
      event_id bigint GENERATED ALWAYS AS IDENTITY,
      version integer NOT NULL,
      name text NOT NULL,
      sha256 text NOT NULL,
      state text NOT NULL,
      started_at timestamptz NOT NULL,
      finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
      duration_ms double precision NOT NULL,
      applied_by text NOT NULL DEFAULT session_user,
      server_version text NOT NULL DEFAULT current_setting('server_version'),
      package_version text NOT NULL,
      error text,
      CONSTRAINT history_pkey PRIMARY KEY (event_id),
      CONSTRAINT chk_history_state CHECK (state IN ('applied', 'failed'))
    )
    """,
    "COMMENT ON SCHEMA equitie_migrations IS 'Which migrations this database has.'",
    "COMMENT ON TABLE equitie_migrations.history IS 'Migrations applied and failed, in order. Never cleared.'",
    "COMMENT ON COLUMN equitie_migrations.history.event_id IS 'Key.'",
    "COMMENT ON COLUMN equitie_migrations.history.version IS 'Number of the migration.'",
    "COMMENT ON COLUMN equitie_migrations.history.name IS 'Name of the migration.'",
    "COMMENT ON COLUMN equitie_migrations.history.sha256 IS 'Checksum of its text, newlines normalised.'",
    "COMMENT ON COLUMN equitie_migrations.history.state IS 'applied or failed.'",
    "COMMENT ON COLUMN equitie_migrations.history.started_at IS 'When it began.'",
    "COMMENT ON COLUMN equitie_migrations.history.finished_at IS 'When it ended.'",
    "COMMENT ON COLUMN equitie_migrations.history.duration_ms IS 'How long it took, milliseconds.'",
    "COMMENT ON COLUMN equitie_migrations.history.applied_by IS 'Database role that ran it.'",
    "COMMENT ON COLUMN equitie_migrations.history.server_version IS 'Version of the server.'",
    "COMMENT ON COLUMN equitie_migrations.history.package_version IS 'Version of equitie_data.'",
    "COMMENT ON COLUMN equitie_migrations.history.error IS 'Why it failed; NULL when it did not.'",
    "REVOKE ALL ON SCHEMA equitie_migrations FROM PUBLIC",
    "REVOKE ALL ON equitie_migrations.history FROM PUBLIC",
)

_READ = """
SELECT DISTINCT ON (version) version, name, sha256, finished_at, duration_ms
FROM equitie_migrations.history
WHERE state = 'applied'
ORDER BY version, event_id DESC
"""


@attrs.frozen
class Applied:
    """What the history says about a migration that was applied.

    Attributes:
        name: Its name.
        sha256: Checksum of its text.
        finished_at: When it was done.
        seconds: How long it took.
    """

    name: str
    sha256: str
    finished_at: datetime
    seconds: float


def package_version() -> str:
    """Return the version of this package, or ``unknown`` when it runs without being installed."""
    try:
        return version("equitie-data")
    except PackageNotFoundError:
        return "unknown"


def ensure_history(conn: Connection[Any]) -> None:
    """Create the history table where it is missing."""
    if conn.execute("SELECT to_regclass('equitie_migrations.history')").fetchone() != (None,):
        return
    with conn.transaction():
        for statement in _CREATE:
            conn.execute(statement)


def read_applied(conn: Connection[Any]) -> dict[int, Applied]:
    """Return the migrations that were applied, by number; nothing where there is no history."""
    try:
        rows = conn.execute(_READ).fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return {}
    return {number: Applied(name, sha256, at, ms / 1000) for number, name, sha256, at, ms in rows}


def record_event(
    conn: Connection[Any],
    migration: Migration,
    state: State,
    *,
    started_at: datetime,
    seconds: float,
    error: str | None,
) -> None:
    """Append one event."""
    conn.execute(
        "INSERT INTO equitie_migrations.history"
        " (version, name, sha256, state, started_at, duration_ms, package_version, error)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
        (
            migration.version,
            migration.name,
            migration.sha256,
            state,
            started_at,
            seconds * 1000,
            package_version(),
            error,
        ),
    )


def compare(applied: Mapping[int, Applied], known: tuple[Migration, ...]) -> tuple[Migration, ...]:
    """Return the migrations that are still to be applied.

    Raises:
        HistoryTooNewError: The history names a migration this release does not know.
        ChecksumDriftError: A migration is not the one that was applied.
    """
    unknown = sorted(set(applied) - {migration.version for migration in known})
    if unknown:
        number = unknown[-1]
        raise HistoryTooNewError(
            f"The database has migration {number:04d}_{applied[number].name}, which equitie_data {package_version()}"
            " does not know: a newer release migrated it, so run that release or a newer one."
        )
    for migration in known:
        there = applied.get(migration.version)
        if there is not None and (there.sha256, there.name) != (migration.sha256, migration.name):
            raise ChecksumDriftError(
                f"Migration {migration.label} is not the one this database has ({there.name}, checksum"
                f" {there.sha256[:12]}, not {migration.sha256[:12]}): a migration that was applied must not change,"
                " so restore its file and put the change into a new one."
            )
    return tuple(migration for migration in known if migration.version not in applied)


def check_current(conn: Connection[Any]) -> None:
    """Check, with one query the application's login may run, that a database is where this release needs it.

    Args:
        conn: An autocommit connection.

    Raises:
        NotMigratedError: Migrations are missing, or there is no history that this login may read.
        HistoryTooNewError: The database was migrated by a newer release.
        ChecksumDriftError: A migration is not the one that was applied.
    """
    try:
        applied = {row[0]: Applied(row[1], row[2], row[3], row[4] / 1000) for row in conn.execute(_READ).fetchall()}
    except psycopg.errors.InsufficientPrivilege:
        raise NotMigratedError(
            "This login may not read equitie_migrations.history: run `python -m equitie_data.migrate grant ROLE` with"
            " its name, as the owner."
        ) from None
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        raise NotMigratedError(f"The database is not migrated: {_HOW_TO_MIGRATE}.") from None
    pending = compare(applied, migrations())
    if pending:
        raise NotMigratedError(
            f"The database lacks {len(pending)} migration{'s'[: len(pending) > 1]} that equitie_data"
            f" {package_version()} needs, from {pending[0].label} on: {_HOW_TO_MIGRATE}."
        )
