"""Statements that run outside of transactions, done so that a run killed at any moment is finished by the next one.

What PostgreSQL leaves behind of such a statement when it fails is an INVALID index, which ``IF NOT EXISTS`` accepts, or
a pending detachment, which stands in the way of the next: both are looked for before anything is done.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

import attrs
import psycopg
from psycopg import sql

from equitie_data.errors import MigrationError
from equitie_data.migrations.session import retried, timeouts
from equitie_data.migrations.shapes import Detach, IndexBuild, IndexDrop, Reindex

if TYPE_CHECKING:
    from psycopg import Connection
    from typing_extensions import LiteralString

    from equitie_data.migrations.shapes import Shape

__all__ = ["CONCURRENT_STATEMENT_TIMEOUT", "Waits", "drop_index", "find_index", "run_outside"]

CONCURRENT_STATEMENT_TIMEOUT = 12 * 3600.0  # seconds
_NAME_BYTES = 63

_FIND_RELATION = (
    "SELECT quote_ident(n.nspname), quote_ident(c.relname), c.relkind = 'p' FROM pg_catalog.pg_class AS c"
    " INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)"
)
_FIND_INDEX = (
    "SELECT i.indexrelid::regclass::text, i.indrelid::regclass::text, i.indisvalid AND i.indisready AND i.indislive,"
    " i.indisunique, pg_catalog.pg_get_indexdef(i.indexrelid), c.relkind = 'I'"
    " FROM pg_catalog.pg_index AS i INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid"
    " WHERE i.indexrelid = to_regclass(%s)"
)
# Leaves and partitioned partitions of a table that have no index attached to one of the table's.
_PARTITIONS_WITHOUT = (
    "SELECT quote_ident(n.nspname), quote_ident(c.relname), c.relname, c.relkind = 'p' FROM pg_catalog.pg_inherits AS h"
    " INNER JOIN pg_catalog.pg_class AS c ON c.oid = h.inhrelid"
    " INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE h.inhparent = to_regclass(%(table)s) AND NOT EXISTS ("
    "  SELECT FROM pg_catalog.pg_index AS i INNER JOIN pg_catalog.pg_inherits AS a ON a.inhrelid = i.indexrelid"
    "  WHERE i.indrelid = c.oid AND a.inhparent = to_regclass(%(index)s) AND i.indisvalid"
    ") ORDER BY 1, 2"
)
_IS_PARTITION = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_inherits AS h WHERE h.inhparent = to_regclass(%(table)s)"
    " AND h.inhrelid = to_regclass(%(partition)s))"
)
_LEFT_BY_REINDEX = (
    "SELECT i.indexrelid::regclass::text FROM pg_catalog.pg_index AS i"
    " INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid"
    " WHERE NOT i.indisvalid AND c.relname ~ '_cc(new|old)[0-9]*$' AND i.indrelid = ("
    "  SELECT coalesce(max(o.indrelid), to_regclass(%(name)s)::oid) FROM pg_catalog.pg_index AS o"
    "  WHERE o.indexrelid = to_regclass(%(name)s))"
)


@attrs.frozen
class Index:
    """An index as the catalogs have it.

    Attributes:
        name: Its name, qualified and quoted.
        table: Its table, likewise.
        valid: Whether queries may use it.
        unique: Whether it is a unique index.
        definition: How PostgreSQL would write it.
        partitioned: Whether it is the index of a partitioned table, made up of its partitions'.
    """

    name: str
    table: str
    valid: bool
    unique: bool
    definition: str
    partitioned: bool


@attrs.frozen
class Waits:
    """How long a statement may wait and take.

    Attributes:
        lock: Seconds to wait for a lock that stands in others' way.
        statement: Seconds a statement may take that stands in nobody's way.
    """

    lock: float
    statement: float


def run_outside(conn: Connection[Any], shape: Shape, text: LiteralString, waits: Waits) -> None:
    """Do what one statement says, or the rest of it where an earlier run was cut off.

    Args:
        conn: The owner's session, outside of a transaction.
        shape: What the statement is.
        text: The statement.
        waits: How long it may wait.
    """
    if isinstance(shape, IndexBuild):
        _build(conn, shape, text, waits)
    elif isinstance(shape, IndexDrop):
        index = find_index(conn, shape.name)
        if index is not None:
            drop_index(conn, index, waits)
    elif isinstance(shape, Reindex):
        for (left,) in conn.execute(_LEFT_BY_REINDEX, {"name": shape.name}).fetchall():
            _run_unhurried(conn, f"DROP INDEX CONCURRENTLY {left}", waits)
        _run_unhurried(conn, text, waits)
    elif isinstance(shape, Detach):
        _detach(conn, shape, text, waits)
    else:
        with timeouts(conn, lock=waits.lock, statement=waits.statement):
            conn.execute(text)


def find_index(conn: Connection[Any], name: str) -> Index | None:
    """Return an index by its name as SQL has it; ``None`` where there is none."""
    row = conn.execute(_FIND_INDEX, (name,)).fetchone()
    return None if row is None else Index(*row)


def drop_index(conn: Connection[Any], index: Index, waits: Waits) -> None:
    """Drop an index without standing in the way of readers and writers."""
    if not index.partitioned:
        _run_unhurried(conn, f"DROP INDEX CONCURRENTLY {index.name}", waits)
        return

    # PostgreSQL drops an index of a partitioned table only in one go, with a lock on the table.
    def drop() -> None:
        conn.execute(_literal(f"DROP INDEX {index.name}"))

    with timeouts(conn, lock=waits.lock, statement=0):
        retried(drop)


def _run_unhurried(conn: Connection[Any], statement: str, waits: Waits) -> None:
    # Without a lock timeout: what these statements wait for, old transactions, they wait for without standing in
    # anybody's way; cut off, they leave an INVALID index.
    def run() -> None:
        conn.execute(_literal(statement))

    with timeouts(conn, lock=0, statement=waits.statement):
        retried(run)


def _build(conn: Connection[Any], build: IndexBuild, text: LiteralString, waits: Waits) -> None:
    table = conn.execute(_FIND_RELATION, (build.table,)).fetchone()
    if table is None:
        conn.execute(text)  # fails, in PostgreSQL's own words
        return
    schema, _, partitioned = table
    (_build_on_partitions if partitioned else _build_on_table)(conn, attrs.evolve(build, schema=schema), waits)


def _build_on_table(conn: Connection[Any], build: IndexBuild, waits: Waits) -> None:
    def run() -> None:
        # Looked for before every attempt: one that failed may have left it, INVALID.
        there = find_index(conn, build.qualified)
        if there is not None:
            _refuse_another(conn, build, there)
            if there.valid:
                return
            conn.execute(_literal(f"DROP INDEX CONCURRENTLY {there.name}"))
        conn.execute(_literal(build.statement(concurrently=True)))

    with timeouts(conn, lock=0, statement=waits.statement):
        retried(run)


def _build_on_partitions(conn: Connection[Any], build: IndexBuild, waits: Waits) -> None:
    """Build an index on each partition in turn, attaching it to the table's, which is valid with the last one.

    The table's index comes first: a partition attached meanwhile gets its own from it.
    """

    def run_locking(statement: str) -> None:
        with timeouts(conn, lock=waits.lock, statement=0):
            retried(lambda: conn.execute(_literal(statement)))

    there = find_index(conn, build.qualified)
    if there is None:
        run_locking(build.statement(concurrently=False, only=True))
    else:
        _refuse_another(conn, build, there)
    names = {"table": build.table, "index": build.qualified}
    while missing := conn.execute(_PARTITIONS_WITHOUT, names).fetchall():
        for schema, partition, plain_name, partitioned in missing:
            below = attrs.evolve(
                build, name=_partition_index(conn, plain_name, build), schema=schema, table=f"{schema}.{partition}"
            )
            try:
                (_build_on_partitions if partitioned else _build_on_table)(conn, below, waits)
                run_locking(f"ALTER INDEX {build.qualified} ATTACH PARTITION {below.qualified}")
            except psycopg.Error:
                # Dropped or detached meanwhile, it needs no index any more.
                if conn.execute(_IS_PARTITION, {**names, "partition": below.table}).fetchone() != (False,):
                    raise


def _partition_index(conn: Connection[Any], partition: str, build: IndexBuild) -> str:
    """Name the index of a partition after both, so that the next run finds what this one left."""
    index = build.name[1:-1].replace('""', '"') if build.name.startswith('"') else build.name.lower()
    name = f"{partition}_{index.removeprefix('idx_')}"
    if len(name.encode()) > _NAME_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[: _NAME_BYTES - 9].decode(errors='ignore')}_{digest}"
    return sql.Identifier(name).as_string(conn)


def _refuse_another(conn: Connection[Any], build: IndexBuild, there: Index) -> None:
    """Raise where the index that is there is not the one that is to be built."""
    same = conn.execute("SELECT to_regclass(%s) = to_regclass(%s)", (build.table, there.table)).fetchone() == (True,)
    if same and ((not there.valid and not there.partitioned) or _as_written(there) == _as_built(conn, build)):
        return
    raise MigrationError(
        f"There is an index {there.name} already, which is not the one that is to be built: it is"
        f" {there.definition}. Rename or drop it, then run again."
    )


def _as_written(index: Index) -> tuple[bool, str]:
    return index.unique, _after_table(index.definition)


def _as_built(conn: Connection[Any], build: IndexBuild) -> tuple[bool, str]:
    """Build the index on an empty copy of the table that is rolled back, to see how PostgreSQL writes it."""
    with conn.transaction(force_rollback=True):
        conn.execute(_literal(f"CREATE TEMPORARY TABLE equitie_probe (LIKE {build.table})"))
        probe = attrs.evolve(build, name="equitie_probe_index", table="pg_temp.equitie_probe")
        conn.execute(_literal(probe.statement(concurrently=False)))
        built = find_index(conn, "pg_temp.equitie_probe_index")
    assert built is not None  # noqa: S101 - it was made two lines above
    return _as_written(built)


def _after_table(definition: str) -> str:
    return definition[definition.index(" USING ") :]


def _detach(conn: Connection[Any], detach: Detach, text: LiteralString, waits: Waits) -> None:
    def pending() -> bool | None:
        row = conn.execute(
            "SELECT h.inhdetachpending FROM pg_catalog.pg_inherits AS h"
            " WHERE h.inhparent = to_regclass(%s) AND h.inhrelid = to_regclass(%s)",
            (detach.parent, detach.partition),
        ).fetchone()
        return None if row is None else bool(row[0])

    state = pending()
    if state is None:
        if conn.execute("SELECT to_regclass(%s)", (detach.partition,)).fetchone() == (None,):
            conn.execute(text)  # fails, in PostgreSQL's own words
        return
    if not state:
        with timeouts(conn, lock=0, statement=waits.statement):
            conn.execute(text)
        return

    # Cut off between its two halves. The second one takes a lock on the partition that its readers stand behind.
    def finalize() -> None:
        conn.execute(_literal(f"ALTER TABLE {detach.parent} DETACH PARTITION {detach.partition} FINALIZE"))

    with timeouts(conn, lock=waits.lock, statement=0):
        retried(finalize)


def _literal(statement: str) -> LiteralString:
    # Made of a migration's own text and of names that the server quoted.
    return cast("LiteralString", statement)
