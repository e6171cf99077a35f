"""Directories of migrations: the library's own, and those that applications have beside it."""

from __future__ import annotations

import functools
import itertools
import re
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data import _sql
from equitie_data.errors import MigrationError
from equitie_data.migrations.files import OURS, parse_migration
from equitie_data.migrations.statements import split_statements

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from equitie_data.migrations.files import Migration
    from equitie_data.migrations.statements import Statement

__all__ = [
    "ENTRY_POINTS",
    "MigrationDirectory",
    "directory_of",
    "named",
    "ours",
    "read_directory",
    "registered",
    "resolve",
]

ENTRY_POINTS = "equitie_data.migrations"
"""Group of the entry points by which an installed application registers its directory."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


@attrs.frozen
class MigrationDirectory:
    """One directory of migrations, with a history and a numbering of its own.

    Attributes:
        name: What the history knows it by.
        migrations: Its migrations, in order.
        verifications: The queries of each ``NNNN_name.verify.sql``, by the migration's label: they find problems, one
            a row.
        downs: Each ``NNNN_name.down.sql``, by the label of the migration that it takes back.
    """

    name: str
    migrations: tuple[Migration, ...]
    verifications: Mapping[str, tuple[Statement, ...]] = attrs.field(factory=dict)
    downs: Mapping[str, Migration] = attrs.field(factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it is the library's own."""
        return self.name == OURS

    @property
    def schema_number(self) -> int:
        """The number of its last migration: what the history compares releases by."""
        return max((migration.version for migration in self.migrations), default=0)

    def up_to(self, place: str) -> tuple[Migration, ...]:
        """Return the migrations up to one, given by number, name or label; all of them for the empty string.

        Raises:
            MigrationError: There is none of that name.
        """
        if not place:
            return self.migrations
        for count, migration in enumerate(self.migrations, start=1):
            if place in {migration.name, migration.label, str(migration.version), f"{migration.version:04d}"}:
                return self.migrations[:count]
            if migration.label == f"{self.name}/{place}":
                return self.migrations[:count]
        raise MigrationError(f"There is no migration {place}: `python -m equitie_data.migrate status` lists them.")


def read_directory(name: str, texts: Mapping[str, str], where: str) -> MigrationDirectory:
    """Read the files of a directory.

    Args:
        name: What the history is to know it by.
        texts: What they hold, by their names without ``.sql``.
        where: Path of the directory, for messages.

    Raises:
        MigrationError: A file cannot be read, belongs to no migration, or two have the same number.
    """
    found = sorted(
        (parse_migration(each, text, directory=name, where=where) for each, text in texts.items() if "." not in each),
        key=lambda migration: (migration.version, migration.name),
    )
    for earlier, later in itertools.pairwise(found):
        if earlier.version == later.version:
            raise MigrationError(f"{earlier.path} and {later.path} have the same number: renumber one.")
    labels = {migration.path.removeprefix(f"{where}/").removesuffix(".sql"): migration.label for migration in found}
    verifications: dict[str, tuple[Statement, ...]] = {}
    downs: dict[str, Migration] = {}
    for each, text in texts.items():
        base, dot, kind = each.partition(".")
        if not dot:
            continue
        if base not in labels or kind not in {"verify", "down"}:
            raise MigrationError(f"{where}/{each}.sql belongs to no migration of that directory.")
        if kind == "down":
            down = parse_migration(each, text, directory=name, where=where)
            if not down.transactional:
                raise MigrationError(f"{down.path} has transaction=false: what is taken back goes as a whole.")
            downs[labels[base]] = down
        else:
            try:
                verifications[labels[base]] = split_statements(text)
            except ValueError as error:
                raise MigrationError(f"{where}/{each}.sql cannot be read: {error}.") from None
    return MigrationDirectory(name, tuple(found), verifications, downs)


@functools.cache
def ours() -> MigrationDirectory:
    """Return this release's own migrations."""
    return read_directory(OURS, _sql.migration_texts(), "sql/migrations")


@functools.cache
def registered() -> tuple[MigrationDirectory, ...]:
    """Return the directories that installed applications register by entry points, in the order of their names.

    Raises:
        MigrationError: One of them cannot be loaded.
    """
    found: list[MigrationDirectory] = []
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            target = entry.load()
        except Exception as error:  # whatever importing somebody's module may raise
            raise MigrationError(
                f"The migrations of the entry point {entry.name} = {entry.value} cannot be loaded: {error}."
            ) from error
        found.append(named(entry.name, target))
    return tuple(found)


def named(name: str, place: str | os.PathLike[str] | ModuleType) -> MigrationDirectory:
    """Read a directory of an application.

    Args:
        name: What the history is to know it by: lower case letters, digits and underscores.
        place: Its path, or the package that holds the files.

    Raises:
        MigrationError: The name is not one, or there are no such files.
    """
    if _NAME.fullmatch(name) is None or name == OURS:
        raise MigrationError(f'"{name}" is no name for a directory of migrations: take a word such as billing.')
    # A path, or what importlib.resources has instead of one: both can be asked the same.
    where: Any = files(place) if isinstance(place, ModuleType) else Path(place)
    if not where.is_dir():
        raise MigrationError(f"{where}, the directory of the migrations {name}, is not there.")
    texts = {
        entry.name.removesuffix(".sql"): entry.read_text("utf-8")
        for entry in where.iterdir()
        if entry.name.endswith(".sql")
    }
    if not texts:
        raise MigrationError(f"{where}, the directory of the migrations {name}, has no file that ends in .sql.")
    return read_directory(name, texts, str(where))


def resolve(
    directories: Mapping[str, str | os.PathLike[str] | ModuleType] | None = None,
) -> tuple[MigrationDirectory, ...]:
    """Return every directory a run is about: the library's own, the registered ones, the given ones.

    Args:
        directories: Directories of applications by their names, in the order in which they are to run; one of the name
            of a registered one stands in for it.
    """
    given = [named(name, place) for name, place in (directories or {}).items()]
    names = {directory.name for directory in given}
    return (ours(), *(each for each in registered() if each.name not in names), *given)


def directory_of(label: str, directories: Sequence[MigrationDirectory]) -> tuple[MigrationDirectory, str]:
    """Split what a user calls a migration into its directory and the rest.

    Args:
        label: Number, name or both; before it, with a slash, the directory, unless it is the library's.
        directories: Those there are.

    Raises:
        MigrationError: There is no such directory.
    """
    name, slash, rest = label.rpartition("/")
    for directory in directories:
        if directory.name == (name if slash else OURS):
            return directory, rest
    raise MigrationError(f"There is no directory of migrations {name}: name it with --directory {name}=PATH.")
