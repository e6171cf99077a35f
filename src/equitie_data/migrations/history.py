"""The history table ``equitie_migrations.history``: one row per event, never cleared."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import psycopg

from equitie_data import _sql
from equitie_data.migrations.files import OURS, Phase, label_of
from equitie_data.migrations.statements import split_statements

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable

    from psycopg import Connection

    from equitie_data.migrations.files import Migration

__all__ = [
    "Applied",
    "Event",
    "History",
    "State",
    "ensure_history",
    "package_version",
    "read_events",
    "read_history",
    "record_event",
]

State: TypeAlias = Literal["applied", "baselined", "failed", "repaired", "rolled_back", "step"]

# As JSON, so that one query reads the layout of every release, older and newer ones.
_READ = "SELECT to_jsonb(h), h.finished_at FROM equitie_migrations.history AS h ORDER BY h.event_id"


@attrs.frozen(kw_only=True)
class Event:
    """One row of the history.

    Attributes:
        directory: Directory of the migration.
        version: Its number.
        name: Its name.
        sha256: Checksum of its text, or of the statement where ``step`` is set.
        state: What happened to it.
        finished_at: When.
        seconds: How long it took.
        step: Which of its statements, if it is about one.
        phase: Which half of a release it belongs to.
        compatible_since: Last migration of the oldest release that works with it.
    """

    directory: str
    version: int
    name: str
    sha256: str
    state: str
    finished_at: dt.datetime
    seconds: float
    step: int | None
    phase: Phase
    compatible_since: int


@attrs.frozen(kw_only=True)
class Applied:
    """A migration that a database has.

    Attributes:
        version: Its number.
        name: Its name.
        sha256: Checksum of its text.
        state: ``applied``, or ``baselined`` when it was found there.
        finished_at: When it was done.
        seconds: How long it took.
        compatible_since: Last migration of the oldest release that works with it.
        directory: Directory of the migration.
    """

    version: int
    name: str
    sha256: str
    state: str
    finished_at: dt.datetime
    seconds: float
    compatible_since: int
    directory: str = OURS

    @property
    def label(self) -> str:
        """Number and name, as the file has them."""
        return label_of(self.directory, self.version, self.name)


@attrs.frozen
class History:
    """What the events of one directory come to.

    Attributes:
        applied: The migrations the database has, by number.
        steps: Checksums of the statements that are done, by the number of a migration that is not, in order.
        events: All of them, in order.
    """

    applied: dict[int, Applied]
    steps: dict[int, tuple[str, ...]]
    events: tuple[Event, ...]

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """Sum up the events of one directory."""
        applied: dict[int, Applied] = {}
        steps: dict[int, tuple[str, ...]] = {}
        kept = tuple(events)
        for event in kept:
            number = event.version
            if event.state == "step":
                steps[number] = (*steps.get(number, ())[: (event.step or 1) - 1], event.sha256)
            elif event.state == "repaired" and event.step is not None:
                steps[number] = steps.get(number, ())[: event.step]
            elif event.state == "rolled_back":
                applied.pop(number, None)
                steps.pop(number, None)
            elif event.state in {"applied", "baselined"} or (event.state == "repaired" and number in applied):
                before = applied.get(number) if event.state == "repaired" else None
                steps.pop(number, None)
                applied[number] = Applied(
                    version=number,
                    name=event.name,
                    sha256=event.sha256,
                    state=before.state if before else event.state,
                    finished_at=before.finished_at if before else event.finished_at,
                    seconds=before.seconds if before else event.seconds,
                    compatible_since=event.compatible_since,
                    directory=event.directory,
                )
        return cls(applied, steps, kept)


def package_version() -> str:
    """Return the version of this package, or ``unknown`` when it runs without being installed."""
    try:
        return version("equitie-data")
    except PackageNotFoundError:
        return "unknown"


def ensure_history(conn: Connection[Any]) -> None:
    """Create the history table where it is missing, and bring an older one to this release's layout."""
    found = conn.execute(
        "SELECT to_regclass('equitie_migrations.history') IS NOT NULL, EXISTS (SELECT FROM pg_catalog.pg_attribute AS a"
        " WHERE a.attrelid = to_regclass('equitie_migrations.history') AND a.attname = 'directory')"
    ).fetchone()
    if found == (True, True):
        return
    with conn.transaction():
        for statement in split_statements(_sql.query("create_history")):
            conn.execute(statement.text)


def read_history(conn: Connection[Any], directory: str = OURS) -> History:
    """Return the history of one directory; an empty one where nothing was ever migrated."""
    try:
        return read_events(conn).get(directory, History({}, {}, ()))
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return History({}, {}, ())


def read_events(conn: Connection[Any]) -> dict[str, History]:
    """Return the history of every directory that has one, by name.

    Raises:
        psycopg.Error: There is no history, or this login may not read it.
    """
    events: dict[str, list[Event]] = {}
    for row, finished_at in conn.execute(_READ):
        event = _event(row, finished_at)
        events.setdefault(event.directory, []).append(event)
    return {name: History.of(each) for name, each in events.items()}


def _event(row: dict[str, Any], finished_at: dt.datetime) -> Event:
    return Event(
        directory=row.get("directory", OURS),
        version=row["version"],
        name=row["name"],
        sha256=row["sha256"],
        state=row["state"],
        finished_at=finished_at,
        seconds=row["duration_ms"] / 1000,
        step=row.get("step"),
        phase="post" if row.get("phase") == "post" else "pre",
        compatible_since=row.get("compatible_since", 0),
    )


def record_event(
    conn: Connection[Any],
    migration: Migration,
    state: State,
    *,
    started_at: dt.datetime,
    seconds: float,
    error: str | None = None,
    step: int | None = None,
    sha256: str | None = None,
) -> None:
    """Append one event.

    Args:
        conn: The owner's session.
        migration: What it is about.
        state: What happened.
        started_at: When it began.
        seconds: How long it took.
        error: Why it failed.
        step: Which of its statements, counted from 1.
        sha256: Checksum of that statement; of the migration if left out.
    """
    conn.execute(
        "INSERT INTO equitie_migrations.history"
        " (directory, version, name, sha256, state, phase, compatible_since, step, started_at, duration_ms,"
        " package_version, error) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            migration.directory,
            migration.version,
            migration.name,
            sha256 or migration.sha256,
            state,
            migration.phase,
            migration.compatible_since,
            step,
            started_at,
            seconds * 1000,
            package_version(),
            error,
        ),
    )
