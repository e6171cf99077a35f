"""Putting the history and the database together again after a failure or an edited file: said first, then done."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data.errors import MigrationError
from equitie_data.migrations.concurrent import CONCURRENT_STATEMENT_TIMEOUT, Waits, run_outside
from equitie_data.migrations.directories import directory_of
from equitie_data.migrations.history import ensure_history, read_history, record_event
from equitie_data.migrations.pending import refuse_unknown
from equitie_data.migrations.session import turn
from equitie_data.migrations.shapes import Detach, shape_of
from equitie_data.migrations.steps import matching_steps
from equitie_data.migrations.verify import invalid_indexes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration
    from equitie_data.migrations.statements import Statement

__all__ = ["Repair", "repair", "repairs_of"]

_IS_PENDING = (
    "SELECT h.inhdetachpending FROM pg_catalog.pg_inherits AS h"
    " WHERE h.inhparent = to_regclass(%s) AND h.inhrelid = to_regclass(%s)"
)


@attrs.frozen
class Repair:
    """One thing to put right.

    Attributes:
        sentence: What will be done.
        action: Does it.
    """

    sentence: str
    action: Callable[[], None]


def repairs_of(
    conn: Connection[Any], directories: Sequence[MigrationDirectory], label: str, lock_timeout: float
) -> tuple[Repair, ...]:
    """Return what there is to put right about a migration.

    Args:
        conn: The owner's session.
        directories: Those there are.
        label: The migration by its whole name.
        lock_timeout: Seconds a statement may wait for a lock.

    Raises:
        MigrationError: There is no migration of exactly that name.
        HistoryTooNewError: A newer release has migrated the database.
    """
    directory, _ = directory_of(label, directories)
    migration = next((each for each in directory.migrations if each.label == label), None)
    if migration is None:
        raise MigrationError(
            f"There is no migration {label}: name the one to repair in full, as"
            " `python -m equitie_data.migrate status` lists it."
        )
    history = read_history(conn, directory.name)
    refuse_unknown(directory, history.applied)
    found: list[Repair] = []
    there = history.applied.get(migration.version)
    if there is not None and (there.sha256, there.name) != (migration.sha256, migration.name):
        found.append(
            Repair(
                f"Migration {label} was applied as {there.name}, checksum {there.sha256[:12]}; its file is another now,"
                f" checksum {migration.sha256[:12]}. The history will say that the database has the file as it is now."
                " Nothing in it is run: what it does otherwise than before, the database does not have.",
                lambda: _record(conn, migration),
            )
        )
    recorded = history.steps.get(migration.version, ())
    matching = matching_steps(migration, recorded)
    if matching < len(recorded):
        found.append(
            Repair(
                f"Of the {len(recorded)} steps of {label} that are done, the file still begins with {matching}. The"
                f" history will count those alone, and `up` will run the file's from step {matching + 1} on.",
                lambda: _record(conn, migration, matching),
            )
        )
    waits = Waits(lock_timeout, migration.statement_timeout or CONCURRENT_STATEMENT_TIMEOUT)
    for step, index in invalid_indexes(conn, migration):
        found.append(
            Repair(
                f"The index {index} of step {step} is INVALID. It will be built anew, without stopping anybody.",
                _doing_again(conn, migration.statements[step - 1], waits),
            )
        )
    for step, statement in enumerate(migration.statements, start=1):
        shape = shape_of(statement.text)
        if isinstance(shape, Detach) and conn.execute(_IS_PENDING, (shape.parent, shape.partition)).fetchone() == (
            True,
        ):
            found.append(
                Repair(
                    f"The partition {shape.partition} of step {step} is half detached. That will be finished.",
                    _doing_again(conn, statement, waits),
                )
            )
    return tuple(found)


def repair(
    conn: Connection[Any],
    directories: Sequence[MigrationDirectory],
    label: str,
    *,
    lock_timeout: float,
    wait: float,
    on_repair: Callable[[str], None] | None,
) -> tuple[str, ...]:
    """Put right what there is to put right; see `equitie_data.migrate.repair`."""
    with turn(conn, wait):
        ensure_history(conn)
        repairs = repairs_of(conn, directories, label, lock_timeout)
        for each in repairs:
            if on_repair:
                on_repair(each.sentence)
            each.action()
    return tuple(each.sentence for each in repairs)


def _doing_again(conn: Connection[Any], statement: Statement, waits: Waits) -> Callable[[], None]:
    def do() -> None:
        shape = shape_of(statement.text)
        assert shape is not None  # noqa: S101 - the caller has looked
        run_outside(conn, shape, statement.text, waits)

    return do


def _record(conn: Connection[Any], migration: Migration, step: int | None = None) -> None:
    record_event(conn, migration, "repaired", started_at=dt.datetime.now(dt.timezone.utc), seconds=0.0, step=step)
