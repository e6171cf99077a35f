"""What stands there, what is in the way, and which conversion fits."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from equitie_data.conversion.definition import Definition, read_definition, run
from equitie_data.conversion.layout import FORMER, LEGACY, TABLE, TWIN, add_months
from equitie_data.errors import ConversionError

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["Shape", "Survey", "free_bytes", "survey"]

Shape: TypeAlias = Literal["flat", "attached", "partitioned"]

_FAR = 12  # months ahead up to which dates are taken for meant
_ROOM = 1.1  # times the table's size that a copy may need

_TABLE = """
SELECT
  c.relkind,
  pg_get_userbyid(c.relowner),
  pg_get_userbyid(c.relowner) = current_user,
  c.relispartition,
  EXISTS (SELECT FROM pg_catalog.pg_inherits AS i WHERE i.inhparent = c.oid AND c.relkind = 'r'),
  greatest((SELECT sum(l.reltuples) FROM pg_catalog.pg_class AS l WHERE l.oid IN (
    SELECT c.oid UNION SELECT t.relid FROM pg_partition_tree(c.oid) AS t
  ) AND l.relkind = 'r' AND l.reltuples > 0), 0)::bigint,
  coalesce((SELECT sum(pg_total_relation_size(l.oid)) FROM pg_catalog.pg_class AS l WHERE l.oid IN (
    SELECT c.oid UNION SELECT t.relid FROM pg_partition_tree(c.oid) AS t
  ) AND l.relkind = 'r'), 0)::bigint,
  c.relforcerowsecurity,
  c.relreplident
FROM pg_catalog.pg_class AS c
WHERE c.oid = to_regclass(%s)
"""

_INDEXES_IN_THE_WAY = """
SELECT c.relname, i.indisvalid
FROM pg_catalog.pg_index AS i
INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid
WHERE
  i.indrelid = %s::regclass
  AND c.relname <> ALL (%s)
  AND (
    NOT i.indisvalid
    OR (
      (i.indisunique OR i.indisexclusion)
      AND NOT i.indisprimary
      AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = i.indrelid AND a.attname = 'transaction_date' AND a.attnum = ANY (i.indkey)
      )
    )
  )
ORDER BY c.relname
"""

_LEAF_PUBLICATIONS = """
SELECT p.pubname
FROM pg_catalog.pg_publication AS p
INNER JOIN pg_catalog.pg_publication_tables AS t ON t.pubname = p.pubname
WHERE t.schemaname = 'public' AND t.tablename = 'transactions_clean' AND NOT p.pubviaroot
ORDER BY p.pubname
"""

_OWN_TRIGGERS_WITH_TABLES = """
SELECT t.tgname
FROM pg_catalog.pg_trigger AS t
WHERE
  t.tgrelid = %s::regclass
  AND t.tgtype & 1 = 1
  AND (t.tgoldtable IS NOT NULL OR t.tgnewtable IS NOT NULL)
ORDER BY t.tgname
"""

_NARROW_VIEWS = """
SELECT DISTINCT r.ev_class::regclass::text
FROM pg_catalog.pg_depend AS d
INNER JOIN pg_catalog.pg_rewrite AS r ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.oid = d.objid
INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE
  d.refclassid = 'pg_catalog.pg_class'::regclass
  AND d.refobjid = %s::regclass
  AND a.attname IN ('transaction_id', 'parent_transaction_id')
  AND a.atttypid = 'pg_catalog.int4'::regtype
ORDER BY 1
"""


@attrs.frozen(kw_only=True)
class Survey:
    """What stands there.

    Attributes:
        shape: ``flat``; ``attached``: partitioned, with the former flat table as one of its partitions;
            ``partitioned``: by month throughout.
        rows: About how many rows there are, by the statistics.
        size: Bytes of the table, its partitions and indexes.
        partitions: How many partitions there are.
        boundary: Date from which on rows would not be of the attached partition, or are not.
        method: ``attach`` or ``copy``: how a flat table would be converted.
        reason: Why.
        obstacles: What must be dealt with before, a sentence each.
        remarks: What to know before, a sentence each.
        free: Bytes free on the server's disk; ``None`` where that cannot be seen from here.
    """

    shape: Shape
    rows: int
    size: int
    partitions: int
    boundary: dt.date | None
    method: Literal["attach", "copy"]
    reason: str
    obstacles: tuple[str, ...]
    remarks: tuple[str, ...]
    free: int | None


def survey(
    conn: Connection[Any],
    *,
    copy: bool = False,
    boundary: dt.date | None = None,
    drop_inbound_keys: bool = False,
) -> Survey:
    """Look at the table, and choose how to convert it.

    Args:
        conn: The owner's session.
        copy: Whether a copy is asked for.
        boundary: Where the attached partition is to end, if that is asked for.
        drop_inbound_keys: Whether foreign keys that name the id alone may go.

    Raises:
        ConversionError: There is no such table.
    """
    row = conn.execute(_TABLE, (TABLE,)).fetchone()
    if row is None:
        raise ConversionError(f"There is no {TABLE} in this database: migrate or import first.")
    kind, owner, is_owner, is_partition, has_children, rows, size, forced, identity = row
    definition = read_definition(conn)
    shape = _shape(conn, kind)
    (partitions,) = run(
        conn, f"SELECT count(*) FROM pg_partition_tree('{TABLE}'::regclass) AS t WHERE t.isleaf"
    ).fetchone()
    obstacles: list[str] = []
    remarks: list[str] = []
    if not is_owner:
        obstacles.append(f'{TABLE} belongs to "{owner}": connect as that role.')
    elif forced:
        obstacles.append(
            f"Row-level security of {TABLE} is FORCEd, which hides rows from its owner too: ALTER TABLE {TABLE}"
            " NO FORCE ROW LEVEL SECURITY for the time of the conversion."
        )
    elif shape == "flat":
        obstacles += _flat_obstacles(conn, kind, is_partition=is_partition, has_children=has_children)
    if obstacles:
        # What follows looks at the rows, and expects to be allowed to.
        return Survey(
            shape=shape, rows=rows, size=size, partitions=partitions if shape != "flat" else 0, boundary=None,
            method="attach", reason="", obstacles=tuple(obstacles), remarks=(), free=None,
        )  # fmt: skip
    obstacles += _obstacles(definition, flat=shape == "flat", drop_inbound_keys=drop_inbound_keys)
    if identity == "i":
        obstacles.append(
            f"{TABLE} replicates by an index of its own (REPLICA IDENTITY USING INDEX): set it to DEFAULT or FULL."
        )
    free = free_bytes(conn)
    if shape != "flat":
        return Survey(
            shape=shape, rows=rows, size=size, partitions=partitions, boundary=_attached_until(conn), method="copy",
            reason="", obstacles=tuple(obstacles), remarks=tuple(remarks), free=free,
        )  # fmt: skip

    obstacles += _index_obstacles(conn)
    narrow = definition.type_of("transaction_id") != "bigint"
    method: Literal["attach", "copy"] = "copy" if copy or narrow else "attach"
    if copy:
        reason = "asked for; every row goes to its month at once"
    elif narrow:
        reason = f"transaction_id is {definition.type_of('transaction_id')}, and ids that carry their day need bigint"
    else:
        reason = "no row is copied, so it takes the same moment for any size, and no disk"
    if narrow:
        obstacles += [
            f"The view {name} shows ids as integers, and they become bigint: drop it, convert, and create it again."
            for (name,) in conn.execute(_NARROW_VIEWS, (TABLE,))
        ]
    chosen = None
    if method == "attach":
        chosen, problem = _boundary(conn, boundary)
        obstacles += problem
        remarks.append(
            f"Between the last two steps, for about {max(rows / 8e6, 0.1):.1f} s, rows dated {chosen} or later are"
            " refused."
        )
    elif free is not None and free < size * _ROOM:
        obstacles.append(
            f"The copy may need {_bytes(int(size * _ROOM))}, but {_bytes(free)} are free on the server's disk: make"
            " room, or attach instead."
        )
    elif free is None:
        remarks.append(
            f"The copy may need {_bytes(int(size * _ROOM))} of disk, which cannot be checked from here: see that they"
            " are free."
        )
    remarks.append("ON CONFLICT (transaction_id) stops working: a partitioned table's key holds the date as well.")
    return Survey(
        shape=shape, rows=rows, size=size, partitions=0, boundary=chosen, method=method, reason=reason,
        obstacles=tuple(obstacles), remarks=tuple(remarks), free=free,
    )  # fmt: skip


def _shape(conn: Connection[Any], kind: str) -> Shape:
    if kind != "p":
        return "flat"
    return "attached" if _attached_until(conn) else "partitioned"


def _attached_until(conn: Connection[Any]) -> dt.date | None:
    row = conn.execute(
        "SELECT substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \\(''([^'']+)''\\)')::date"
        " FROM pg_catalog.pg_inherits AS i INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid"
        " WHERE i.inhparent = to_regclass(%s) AND i.inhrelid = to_regclass(%s)",
        (TABLE, LEGACY),
    ).fetchone()
    return row[0] if row else None


def _flat_obstacles(conn: Connection[Any], kind: str, *, is_partition: bool, has_children: bool) -> list[str]:
    if kind != "r" or is_partition or has_children:
        return [f"{TABLE} is no plain table of its own (a view, a partition, or inherited from)."]
    found = []
    columns = dict(
        conn.execute(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_catalog.pg_attribute AS a"
            " WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped",
            (TABLE,),
        ).fetchall()
    )
    for column, types in (
        ("transaction_id", {"bigint", "integer"}),
        ("transaction_date", {"date"}),
        ("amount", {"numeric"}),
    ):
        if columns.get(column) is None or columns[column].split("(")[0] not in types:
            found.append(f"{TABLE}.{column} is {columns.get(column) or 'missing'}, not {' or '.join(sorted(types))}.")
    key = conn.execute(
        "SELECT array_agg(a.attname ORDER BY a.attname)::text[] FROM pg_catalog.pg_index AS i"
        " INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)"
        " WHERE i.indrelid = %s::regclass AND i.indisprimary",
        (TABLE,),
    ).fetchone()
    if key is None or key[0] != ["transaction_id"]:
        found.append(f"The primary key of {TABLE} is not transaction_id alone.")
    if found:
        return found
    (missing,) = run(conn, f"SELECT EXISTS (SELECT FROM {TABLE} WHERE transaction_date IS NULL)").fetchone()
    if missing:
        found.append(f"{TABLE} has rows without a transaction_date: give them one.")
    taken = conn.execute(
        "SELECT r.name FROM unnest(%s::text[]) AS r (name) WHERE to_regclass(r.name) IS NOT NULL",
        ([FORMER, LEGACY, TWIN],),
    ).fetchall()
    found += [f"{name} exists, which the conversion needs for itself: rename or drop it." for (name,) in taken]
    return found


def _obstacles(definition: Definition, *, flat: bool, drop_inbound_keys: bool) -> list[str]:
    found = [
        f"{piece.name} {piece.statement}: drop it, convert, and create it again." for piece in definition.of("obstacle")
    ]
    if flat and not drop_inbound_keys:
        found += [
            f"The foreign key {piece.name} names the id alone, which a partitioned table cannot be asked for: let it"
            " name transaction_date too, or let it go with --drop-inbound-keys (undo brings it back)."
            for piece in definition.of("inbound key by id")
        ]
    return found


def _index_obstacles(conn: Connection[Any]) -> list[str]:
    found = [
        f"The index {name} is invalid: drop it, or REINDEX INDEX CONCURRENTLY it."
        if not valid
        else f"The unique index {name} does not hold transaction_date, as those of partitioned tables must: drop it."
        for name, valid in conn.execute(_INDEXES_IN_THE_WAY, (TABLE, ["transactions_clean_legacy_pkey"]))
    ]
    found += [
        f"The publication {name} would publish partitions under their own names: ALTER PUBLICATION {name} SET"
        " (publish_via_partition_root = true) first, which changes nothing for flat tables."
        for (name,) in conn.execute(_LEAF_PUBLICATIONS)
    ]
    found += [
        f"The row trigger {name} has transition tables, which those of partitions must not: make it a statement"
        " trigger."
        for (name,) in conn.execute(_OWN_TRIGGERS_WITH_TABLES, (TABLE,))
    ]
    return found


def _boundary(conn: Connection[Any], asked: dt.date | None) -> tuple[dt.date, list[str]]:
    # A month and more from now: what is inserted until the exchange must not lie behind it.
    today = dt.date.today()  # noqa: DTZ011 - months are not that exact
    (newest,) = run(conn, f"SELECT max(transaction_date)::text FROM {TABLE}").fetchone()
    far = add_months(today, _FAR)
    (late,) = run(conn, f"SELECT count(*) FROM {TABLE} WHERE transaction_date >= '{asked or far}'").fetchone()
    if asked is not None:
        problem = []
        if asked.day != 1 or asked < add_months(today, 2):
            problem.append(f"The boundary must be the first day of a month, {add_months(today, 2)} or later.")
        if late:
            problem.append(f"{late:,} rows are dated {asked} or later: choose a later boundary.")
        return asked, problem
    if late:
        return add_months(today, 2), [
            (
                f"{late:,} rows are dated {far} or later (the last {newest}): correct them, or say with --boundary"
                " where the one partition is to end, or convert with --copy, which minds no date."
            )
        ]
    last = max(today, dt.date.fromisoformat(newest)) if newest else today
    return add_months(last, 2), []


def free_bytes(conn: Connection[Any]) -> int | None:
    """Return how many bytes are free where the server keeps its data; ``None`` where that cannot be seen from here."""
    if not (conn.info.host or "").startswith(("/", "localhost", "127.")):
        return None
    row = conn.execute(
        "SELECT current_setting('data_directory') WHERE pg_has_role('pg_read_all_settings', 'USAGE')"
    ).fetchone()
    try:
        if row is None or not (Path(row[0]) / "PG_VERSION").exists():
            return None
        disk = os.statvfs(row[0])
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
