"""What the migrations make, made again beside the database itself: in a transaction that is rolled back.

There is no second database on a customer's server to compare with, and a catalog written down beforehand would have to
be the server version's own. So the migrations run once more, with the names of their schemas replaced, on the very
server in question; nobody else sees them, and they lock nothing that anybody uses.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import psycopg

from equitie_data.errors import MigrationError
from equitie_data.migrations.catalog import SCHEMAS, read_catalog
from equitie_data.migrations.session import cause_of
from equitie_data.migrations.shapes import Detach, IndexBuild, IndexDrop, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection
    from typing_extensions import LiteralString

    from equitie_data.migrations.catalog import Catalog
    from equitie_data.migrations.files import Migration
    from equitie_data.migrations.statements import Statement

__all__ = ["reference_catalogs"]

_STAND_INS = {schema: f"equitie_reference_{schema.removeprefix('equitie_')}" for schema in SCHEMAS}
# As a whole word in lower case: PUBLIC, everybody, is another thing.
_SCHEMA = re.compile(rf"\b(?:{'|'.join(SCHEMAS)})\b")
_STAND_IN = re.compile("|".join(_STAND_INS.values()))
_BACK = {stand_in: schema for schema, stand_in in _STAND_INS.items()}


def reference_catalogs(conn: Connection[Any], migrations: Sequence[Migration]) -> tuple[Catalog, ...]:
    """Return what each of the migrations, after those before it, makes of an empty database.

    Args:
        conn: The owner's session, outside of a transaction.
        migrations: The library's own, from the first on.

    Raises:
        MigrationError: One of them cannot be run here, such as for lack of a privilege.
    """
    catalogs: list[Catalog] = []
    with _scratch(conn):
        for migration in migrations:
            for statement in migration.statements:
                try:
                    _run(conn, migration, statement)
                except psycopg.Error as error:
                    raise MigrationError(
                        f"What {migration.label} makes cannot be tried out on this database: {cause_of(error)}."
                    ) from error
            catalogs.append(read_catalog(conn, tuple(_STAND_INS.values()), _renamed_back))
    return tuple(catalogs)


@contextmanager
def _scratch(conn: Connection[Any]) -> Iterator[None]:
    with conn.transaction(force_rollback=True):
        # The rest of them the first migration makes itself.
        conn.execute(_literal(f"CREATE SCHEMA {_STAND_INS['public']}"))
        yield


def _run(conn: Connection[Any], migration: Migration, statement: Statement) -> None:
    shape = None if migration.transactional else shape_of(statement.text)
    text: str | None = statement.text
    if isinstance(shape, IndexBuild):
        text = shape.statement(concurrently=False)
    elif isinstance(shape, IndexDrop):
        text = f"DROP INDEX IF EXISTS {shape.name}"
    elif isinstance(shape, Detach):
        text = f"ALTER TABLE {shape.parent} DETACH PARTITION {shape.partition}"
    elif shape is not None:
        text = None  # what moves rows or rebuilds indexes leaves the catalogs as they are
    if text is not None:
        conn.execute(_literal(_SCHEMA.sub(lambda found: _STAND_INS[found.group()], text)))


def _renamed_back(text: str) -> str:
    return _STAND_IN.sub(lambda found: _BACK[found.group()], text)


def _literal(text: str) -> LiteralString:
    return cast("LiteralString", text)  # a migration's own text
