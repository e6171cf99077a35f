"""Adopting a database that has the tables but no history: compared with what the migrations make, then recorded."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data.errors import MigrationError
from equitie_data.migrations.catalog import Difference, differences, read_catalog
from equitie_data.migrations.directories import directory_of
from equitie_data.migrations.history import ensure_history, read_history, record_event
from equitie_data.migrations.pending import pending_of
from equitie_data.migrations.reference import reference_catalogs
from equitie_data.migrations.run import require_create
from equitie_data.migrations.session import turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration

__all__ = ["BaselineReport", "baseline"]

_CLEAN_TABLES = ("companies_clean", "deals_clean", "investors_clean", "transactions_clean", "user_profiles")


@attrs.frozen(kw_only=True)
class BaselineReport:
    """What a database was found to be.

    Attributes:
        place: Label of the last migration it was compared with.
        recorded: Labels of the migrations that are now recorded as ``baselined``; none while a difference remains.
        differences: What is otherwise than the migrations would have made it.
        accepted: Of what is there beside that, what the caller accepts.
    """

    place: str
    recorded: tuple[str, ...]
    differences: tuple[Difference, ...]
    accepted: tuple[Difference, ...] = ()


def baseline(
    conn: Connection[Any], directories: Sequence[MigrationDirectory], *, to: str, accept_extra: bool, wait: float
) -> BaselineReport:
    """Record the migrations a database has without having run them; see `equitie_data.migrate.baseline`."""
    directory, place = directory_of(to, directories) if to else (directories[0], "")
    with turn(conn, wait):
        require_create(conn)
        history = read_history(conn, directory.name)
        lacking = pending_of(directory, history.applied)
        partly = [migration.label for migration in lacking if migration.version in history.steps]
        if partly:
            raise MigrationError(f"Migration {partly[0]} is half applied: finish it with `up` first.")
        if not lacking:
            raise MigrationError(f"There is nothing to adopt: every migration of {directory.name} is recorded already.")
        if directory.is_ours:
            wanted, found = _compared(conn, directory, place, lacking)
        else:
            if not place:
                raise MigrationError(f"Name the last migration the database has: --to {directory.name}/0001.")
            wanted = directory.up_to(place)
            found = _verified(conn, directory, [migration for migration in wanted if migration in lacking])
        accepted = tuple(each for each in found if each.extra and accept_extra)
        remaining = tuple(each for each in found if each not in accepted)
        recorded: list[str] = []
        if not remaining:
            ensure_history(conn)
            with conn.transaction():
                for migration in wanted:
                    if migration in lacking:
                        now = dt.datetime.now(dt.timezone.utc)
                        record_event(conn, migration, "baselined", started_at=now, seconds=0.0)
                        recorded.append(migration.label)
    return BaselineReport(place=wanted[-1].label, recorded=tuple(recorded), differences=remaining, accepted=accepted)


def _compared(
    conn: Connection[Any], directory: MigrationDirectory, place: str, lacking: tuple[Migration, ...]
) -> tuple[tuple[Migration, ...], tuple[Difference, ...]]:
    """Compare with what the migrations make, up to a place or to the one that fits best."""
    actual = read_catalog(conn)
    if not any(thing.name == f"public.{name}" for thing in actual.objects for name in _CLEAN_TABLES):
        raise MigrationError(
            f"There is nothing to adopt: the schema public has none of the tables {', '.join(_CLEAN_TABLES)}."
            " `python -m equitie_data.migrate` makes them."
        )
    wanted = directory.up_to(place)
    catalogs = reference_catalogs(conn, wanted)
    candidates = [
        (wanted[: count + 1], differences(catalog, actual))
        for count, catalog in enumerate(catalogs)
        # With a place, that one; otherwise every one that would record something.
        if (wanted[count] == wanted[-1] if place else wanted[count] in lacking)
    ]
    # Of those that fit equally well, the last.
    return min(reversed(candidates), key=lambda candidate: len(candidate[1]))


def _verified(
    conn: Connection[Any], directory: MigrationDirectory, wanted: Sequence[Migration]
) -> tuple[Difference, ...]:
    """Ask the queries that an application has beside its migrations: what they make nobody else knows."""
    found: list[Difference] = []
    for migration in wanted:
        queries = directory.verifications.get(migration.label)
        if queries is None:
            raise MigrationError(
                f"Migration {migration.label} cannot be adopted unseen: put queries that find what is missing into"
                f" {migration.path.removesuffix('.sql')}.verify.sql."
            )
        with conn.transaction():
            conn.execute("SET TRANSACTION READ ONLY")
            for query in queries:
                found += [Difference(sentence=row[0]) for row in conn.execute(query.text)]
    return tuple(found)
