"""Whether a database is where a release needs it, asked by the application's login when it opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg

from equitie_data.errors import NotMigratedError
from equitie_data.migrations.directories import named, ours, registered
from equitie_data.migrations.history import package_version, read_events
from equitie_data.migrations.pending import refuse_drift, refuse_incompatible

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import ModuleType

    from psycopg import Connection

__all__ = ["check_current"]

_HOW_TO_MIGRATE = "run `python -m equitie_data.migrate` as the owner"


def check_current(
    conn: Connection[Any], directories: Mapping[str, str | os.PathLike[str] | ModuleType] | None = None
) -> None:
    """Check, with one query the application's login may run, that a database is where this release needs it.

    A release goes on working while the next one is being deployed: migrations of that one which come before its
    deployment are accepted, and its own that come after its deployment may be missing.

    Args:
        conn: An autocommit connection.
        directories: Directories of applications, by their names, that the database must have too. Those registered
            by entry points are looked at if the database has any of theirs.

    Raises:
        NotMigratedError: Migrations are missing, or there is no history that this login may read.
        HistoryTooNewError: The database was migrated by a newer release, which this one cannot work beside.
        ChecksumDriftError: A migration is not the one that was applied.
    """
    try:
        histories = read_events(conn)
    except psycopg.errors.InsufficientPrivilege:
        raise NotMigratedError(
            "This login may not read equitie_migrations.history: run `python -m equitie_data.migrate grant ROLE` with"
            " its name, as the owner."
        ) from None
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        raise NotMigratedError(f"The database is not migrated: {_HOW_TO_MIGRATE}.") from None
    given = [named(name, place) for name, place in (directories or {}).items()]
    names = {directory.name for directory in given}
    present = [each for each in registered() if each.name in histories and each.name not in names]
    for directory in (ours(), *present, *given):
        applied = histories[directory.name].applied if directory.name in histories else {}
        refuse_incompatible(directory, applied)
        refuse_drift(directory, applied)
        lacking = [each for each in directory.migrations if each.version not in applied and each.phase == "pre"]
        if lacking:
            who = f"equitie_data {package_version()}" if directory.is_ours else directory.name
            raise NotMigratedError(
                f"The database lacks {len(lacking)} migration{'s'[: len(lacking) > 1]} that {who} needs, from"
                f" {lacking[0].label} on: {_HOW_TO_MIGRATE}."
            )
