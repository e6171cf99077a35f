"""What `equitie_data.migrate` offers: each function is a run of its own, on a connection of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from equitie_data.migrations import baseline as adopting
from equitie_data.migrations import down as taking_back
from equitie_data.migrations import plan as planning
from equitie_data.migrations import repair as repairing
from equitie_data.migrations.directories import resolve
from equitie_data.migrations.files import OURS, label_of
from equitie_data.migrations.grant import grant_login
from equitie_data.migrations.history import read_history
from equitie_data.migrations.pending import pending_of
from equitie_data.migrations.run import Run, apply_pending
from equitie_data.migrations.session import open_owner
from equitie_data.migrations.verify import verify_directories

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import TypeAlias

    from equitie_data.migrations.baseline import BaselineReport
    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration, Phase
    from equitie_data.migrations.history import History
    from equitie_data.migrations.plan import PlannedMigration
    from equitie_data.migrations.run import AppliedMigration, MigrationReport

    Directories: TypeAlias = Mapping[str, str | os.PathLike[str] | ModuleType]

__all__ = [
    "LOCK_TIMEOUT",
    "WAIT",
    "MigrationStatus",
    "baseline",
    "down",
    "grant",
    "migrate",
    "pending",
    "plan",
    "repair",
    "status",
    "verify",
]

LOCK_TIMEOUT = 5.0
"""Seconds a statement may wait for a lock, unless the run or its file says otherwise."""

WAIT = 600.0
"""Seconds a run waits for another one, unless it says otherwise."""


@attrs.frozen(kw_only=True)
class MigrationStatus:
    """Where one migration stands in one database.

    Attributes:
        version: Its number.
        name: Its name.
        state: ``applied``, ``baselined`` (it was found there), ``pending``, ``changed`` (its file is not the one that
            was applied) or ``unknown`` (applied, but this release does not have it).
        applied_at: When it was applied, ISO 8601; ``None`` while it is pending.
        seconds: How long that took.
        directory: Its directory.
        phase: ``pre`` or ``post``: before or after the deployment; ``None`` if this release does not have it.
        steps_done: How many statements of a pending migration outside of transactions are done.
    """

    version: int
    name: str
    state: str
    applied_at: str | None = None
    seconds: float | None = None
    directory: str = OURS
    phase: Phase | None = None
    steps_done: int = 0

    @property
    def label(self) -> str:
        """Number and name, as the file has them; before them the directory, unless it is the library's own."""
        return label_of(self.directory, self.version, self.name)


def migrate(
    dsn: str,
    *,
    to: int | str | None = None,
    before_deployment: bool = False,
    directories: Directories | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    wait: float = WAIT,
    on_begin: Callable[[Migration], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_end: Callable[[AppliedMigration], None] | None = None,
) -> MigrationReport:
    """Apply the migrations a database lacks.

    Args:
        dsn: The database, as the role that owns its tables or is to own them. It needs CREATE on the database and,
            where the four database roles do not exist yet, CREATEROLE.
        to: Number or name of the last migration to apply, ``billing/0003`` for one of another directory; all of them
            by default.
        before_deployment: Whether to leave those for later that code of the release before cannot work with.
        directories: Directories of applications by their names: a path, or the package that holds the files. They run
            after the library's own and those registered by entry points.
        lock_timeout: Seconds a statement may wait for a lock of running transactions before the migration is rolled
            back and tried again.
        wait: Seconds to wait for another run of migrations.
        on_begin: Called before each migration.
        on_step: Called after each step of a migration outside of transactions, with its number, their count, and the
            seconds it took.
        on_end: Called after each migration.

    Raises:
        UnavailableError: The server cannot be reached.
        HistoryTooNewError: A newer release has migrated the database.
        ChecksumDriftError: A file is not the one that was applied.
        MigrationLockTimeoutError: Another run did not end within ``wait``.
        MigrationError: A migration failed. The message names file, line and cause, and says what of it is there.
    """
    known = resolve(directories)
    run = Run(
        to=_place(to),
        before_deployment=before_deployment,
        lock_timeout=lock_timeout,
        wait=wait,
        on_begin=on_begin,
        on_step=on_step,
        on_end=on_end,
    )
    with open_owner(dsn) as conn:
        return apply_pending(conn, known, run)


def status(dsn: str, *, directories: Directories | None = None) -> tuple[MigrationStatus, ...]:
    """Return where each migration stands, in order. Changes nothing."""
    known = resolve(directories)
    with open_owner(dsn) as conn:
        histories = {directory.name: read_history(conn, directory.name) for directory in known}
    return tuple(entry for directory in known for entry in _status_of(directory, histories[directory.name]))


def _status_of(directory: MigrationDirectory, history: History) -> list[MigrationStatus]:
    known = {migration.version: migration for migration in directory.migrations}
    found: list[MigrationStatus] = []
    for number in sorted(known.keys() | history.applied.keys()):
        there = history.applied.get(number)
        here = known.get(number)
        if there is None:
            assert here is not None  # noqa: S101 - the number comes from one of the two
            done = len(history.steps.get(number, ()))
            found.append(
                MigrationStatus(
                    version=number,
                    name=here.name,
                    state="pending",
                    directory=directory.name,
                    phase=here.phase,
                    steps_done=done,
                )
            )
            continue
        if here is None:
            state = "unknown"
        else:
            state = there.state if (here.sha256, here.name) == (there.sha256, there.name) else "changed"
        found.append(
            MigrationStatus(
                version=number,
                name=there.name,
                state=state,
                applied_at=there.finished_at.isoformat(timespec="seconds"),
                seconds=round(there.seconds, 3),
                directory=directory.name,
                phase=here.phase if here else None,
            )
        )
    return found


def pending(dsn: str, *, directories: Directories | None = None) -> tuple[Migration, ...]:
    """Return the migrations that `migrate` would apply. Changes nothing.

    Raises:
        HistoryTooNewError: A newer release has migrated the database.
        ChecksumDriftError: A file is not the one that was applied.
    """
    known = resolve(directories)
    with open_owner(dsn) as conn:
        return tuple(each for one in known for each in pending_of(one, read_history(conn, one.name).applied))


def plan(
    dsn: str,
    *,
    to: int | str | None = None,
    before_deployment: bool = False,
    directories: Directories | None = None,
) -> tuple[PlannedMigration, ...]:
    """Return what `migrate` would do: migrations, steps, locks, and sizes of the tables. Changes nothing.

    Raises:
        HistoryTooNewError: A newer release has migrated the database.
        ChecksumDriftError: A file is not the one that was applied.
    """
    known = resolve(directories)
    with open_owner(dsn) as conn:
        return planning.plan(conn, known, to=_place(to), before=before_deployment)


def verify(dsn: str, *, directories: Directories | None = None) -> tuple[str, ...]:
    """Return what is wrong with a migrated database, one sentence each; nothing when all is well. Changes nothing.

    Besides the history it looks at what somebody may have altered since: triggers of the audit trail, row-level
    security, privileges on partitions, indexes.

    Raises:
        MigrationError: The database cannot be asked.
    """
    known = resolve(directories)
    with open_owner(dsn) as conn:
        return verify_directories(conn, known)


def baseline(
    dsn: str,
    *,
    to: int | str | None = None,
    accept_extra: bool = False,
    directories: Directories | None = None,
    wait: float = WAIT,
) -> BaselineReport:
    """Adopt a database that has the tables, made by hand or by the platform, but no history.

    What is there is compared with what the migrations make: they are run again beside it, under other names, in a
    transaction that is rolled back. Only if nothing differs is anything recorded; later migrations then apply. Of an
    application's directory, the queries beside its migrations are asked instead.

    Args:
        dsn: The database, as the owner of the tables.
        to: The last migration the database has; the one that fits best by default.
        accept_extra: Whether columns, indexes, triggers and the like that no migration makes may stay.
        directories: Directories of applications, as `migrate` takes them.
        wait: Seconds to wait for another run.

    Returns:
        What was compared with what, what was recorded, and every difference.

    Raises:
        MigrationError: There is nothing to adopt.
    """
    known = resolve(directories)
    with open_owner(dsn) as conn:
        return adopting.baseline(conn, known, to=_place(to), accept_extra=accept_extra, wait=wait)


def repair(
    dsn: str,
    name: str,
    *,
    apply: bool = True,
    directories: Directories | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    wait: float = WAIT,
    on_repair: Callable[[str], None] | None = None,
) -> tuple[str, ...]:
    """Put right what a failed migration outside of transactions, or an edited file, left behind.

    Args:
        dsn: The database, as its owner.
        name: The migration in full, such as ``0016_add_an_index``.
        apply: Whether to do it; otherwise nothing is changed.
        directories: Directories of applications, as `migrate` takes them.
        lock_timeout: Seconds a statement may wait for a lock that stands in others' way.
        wait: Seconds to wait for another run.
        on_repair: Called with each sentence of what will be done, before it is.

    Returns:
        Those sentences; none if there is nothing to put right.

    Raises:
        MigrationError: There is no migration of exactly that name, or the repair failed.
    """
    known = resolve(directories)
    with open_owner(dsn) as conn:
        if not apply:
            return tuple(each.sentence for each in repairing.repairs_of(conn, known, name, lock_timeout))
        return repairing.repair(conn, known, name, lock_timeout=lock_timeout, wait=wait, on_repair=on_repair)


def down(
    dsn: str,
    name: str,
    *,
    apply: bool = True,
    directories: Directories | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    wait: float = WAIT,
) -> tuple[str, ...]:
    """Take back the newest migration, if nothing is lost by that.

    Args:
        dsn: The database, as its owner.
        name: The migration, by number, name or both.
        apply: Whether to do it; otherwise nothing is changed.
        directories: Directories of applications, as `migrate` takes them.
        lock_timeout: Seconds a statement may wait for a lock.
        wait: Seconds to wait for another run.

    Returns:
        The statements that take it back.

    Raises:
        MigrationError: It is not the newest one, or what it made holds something that would be lost.
    """
    known = resolve(directories)
    with open_owner(dsn) as conn:
        if apply:
            return taking_back.roll_back(conn, known, name, lock_timeout=lock_timeout, wait=wait)
        return tuple(statement.text for statement in taking_back.newest_with_down(conn, known, name)[1].statements)


def grant(dsn: str, role: str) -> None:
    """Let a login role act for users and the service, and nothing more.

    The role becomes a member of the database roles without inheriting them, may call the functions of the
    transaction prologue, and may read the history.

    Args:
        dsn: The database, as its owner.
        role: Name of the login role, as it is stored: no quotes.

    Raises:
        MigrationError: The role does not exist, may do too much already, or the owner may not grant this.
    """
    with open_owner(dsn) as conn:
        grant_login(conn, role)


def _place(to: int | str | None) -> str:
    return "" if to is None else str(to)
