"""What is wrong with a migrated database: asked of the catalogs, and of the queries beside each migration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from equitie_data.errors import ChecksumDriftError, HistoryTooNewError
from equitie_data.migrations.concurrent import find_index
from equitie_data.migrations.history import read_history
from equitie_data.migrations.pending import pending_of
from equitie_data.migrations.shapes import IndexBuild, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration

__all__ = ["invalid_indexes", "verify_directories"]

_INVALID = (
    "SELECT i.indexrelid::regclass::text FROM pg_catalog.pg_index AS i"
    " INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid"
    " WHERE NOT i.indisvalid AND c.relnamespace::regnamespace::text IN ('public', 'equitie_private', 'equitie_part')"
    " ORDER BY 1"
)
_SCHEMA_OF = (
    "SELECT quote_ident(n.nspname) FROM pg_catalog.pg_class AS c"
    " INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)"
)


def verify_directories(conn: Connection[Any], directories: Sequence[MigrationDirectory]) -> tuple[str, ...]:
    """Return what is wrong, one sentence each; see `equitie_data.migrate.verify`."""
    problems: list[str] = []
    told: set[str] = set()
    for directory in directories:
        history = read_history(conn, directory.name)
        try:
            lacking = pending_of(directory, history.applied)
        except (HistoryTooNewError, ChecksumDriftError) as error:
            return (*problems, str(error))
        for migration in lacking:
            steps = history.steps.get(migration.version, ())
            partly = f": {len(steps)} of its {len(migration.statements)} steps are done" if steps else ""
            problems.append(f"Migration {migration.label} is not applied{partly}.")
        for migration in directory.migrations:
            for step, index in invalid_indexes(conn, migration):
                told.add(index)
                problems.append(
                    f"The index {index}, made by step {step} of {migration.label}, is INVALID: no query uses it, every"
                    f" write pays for it. `python -m equitie_data.migrate repair {migration.label}` mends it."
                )
        with conn.transaction():
            conn.execute("SET TRANSACTION READ ONLY")
            for migration in directory.migrations:
                if migration.version in history.applied:
                    for statement in directory.verifications.get(migration.label, ()):
                        problems += [row[0] for row in conn.execute(statement.text)]
    problems += [
        f"The index {index} is INVALID: no query uses it, every write pays for it. `REINDEX INDEX CONCURRENTLY` mends"
        " it."
        for (index,) in conn.execute(_INVALID)
        if index not in told
    ]
    return tuple(problems)


def invalid_indexes(conn: Connection[Any], migration: Migration) -> Iterator[tuple[int, str]]:
    """Find the indexes that a migration's steps built and that are invalid.

    Yields:
        The step's number and the index.
    """
    if migration.transactional:
        return
    for step, statement in enumerate(migration.statements, start=1):
        shape = shape_of(statement.text)
        if not isinstance(shape, IndexBuild):
            continue
        schema = conn.execute(_SCHEMA_OF, (shape.table,)).fetchone()
        index = None if schema is None else find_index(conn, f"{schema[0]}.{shape.name}")
        if index is not None and not index.valid:
            yield step, index.name
