"""Which migrations a database lacks, and whether it may be touched or used at all. Decisions, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equitie_data.errors import ChecksumDriftError, HistoryTooNewError, MigrationError
from equitie_data.migrations.history import package_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration
    from equitie_data.migrations.history import Applied

__all__ = ["before_deployment", "pending_of", "refuse_drift", "refuse_incompatible", "refuse_unknown"]


def pending_of(directory: MigrationDirectory, applied: Mapping[int, Applied]) -> tuple[Migration, ...]:
    """Return the migrations that are still to be applied, in order.

    Raises:
        HistoryTooNewError: The history names a migration this release does not know.
        ChecksumDriftError: A migration is not the one that was applied.
    """
    refuse_unknown(directory, applied)
    refuse_drift(directory, applied)
    return tuple(migration for migration in directory.migrations if migration.version not in applied)


def refuse_unknown(directory: MigrationDirectory, applied: Mapping[int, Applied]) -> None:
    """Raise where the history names a migration that the directory does not have."""
    if unknown := _unknown(directory, applied):
        raise HistoryTooNewError(
            f"The database has migration {unknown[-1].label}, which {_release_of(directory)} does not know: a newer"
            " release migrated it, so run that release or a newer one."
        )


def refuse_incompatible(directory: MigrationDirectory, applied: Mapping[int, Applied]) -> None:
    """Raise where the history names a migration that this release cannot work with.

    Migrations of a newer release that came before its deployment are no reason: the release before it goes on working
    until the half after the deployment is applied.
    """
    for there in _unknown(directory, applied):
        if there.compatible_since > directory.schema_number:
            raise HistoryTooNewError(
                f"The database has migration {there.label}, which {_release_of(directory)} cannot work with: a newer"
                " release migrated it, so run that release or a newer one."
            )


def refuse_drift(directory: MigrationDirectory, applied: Mapping[int, Applied]) -> None:
    """Raise where a migration is not the one that was applied."""
    for migration in directory.migrations:
        there = applied.get(migration.version)
        if there is not None and (there.sha256, there.name) != (migration.sha256, migration.name):
            raise ChecksumDriftError(
                f"Migration {migration.label} is not the one this database has ({there.name}, checksum"
                f" {there.sha256[:12]}, not {migration.sha256[:12]}): a migration that was applied must not change,"
                " so restore its file and put the change into a new one."
            )


def before_deployment(pending: tuple[Migration, ...]) -> tuple[Migration, ...]:
    """Return those of the pending migrations that come before the deployment.

    Raises:
        MigrationError: One of them follows the other half of an earlier release, which it may rest on.
    """
    left: Migration | None = None
    for migration in pending:
        if migration.phase == "post":
            left = left or migration
        elif left is not None:
            raise MigrationError(
                f"Migration {migration.label} comes after {left.label}, which an earlier release left for after its"
                f" deployment: once no release older than that one runs, apply it with `up --to {left.label}`, then"
                " this release's."
            )
    return tuple(migration for migration in pending if migration.phase == "pre")


def _unknown(directory: MigrationDirectory, applied: Mapping[int, Applied]) -> list[Applied]:
    known = {migration.version for migration in directory.migrations}
    return [applied[number] for number in sorted(applied) if number not in known]


def _release_of(directory: MigrationDirectory) -> str:
    return f"equitie_data {package_version()}" if directory.is_ours else f"this release of {directory.name}"
