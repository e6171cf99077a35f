"""What the tests look at: contents and definitions of the old tables, wherever they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

if TYPE_CHECKING:
    import psycopg

__all__ = ["NAMES", "contents", "definitions", "fingerprint"]

NAMES = (
    ("public", "companies.company"),
    ("core", "companies"),
    ("public", "deals.deal"),
    ("core", "deals"),
    ("public", "investors.investor"),
    ("core", "investors"),
    ("public", "transactions.transaction.primary"),
    ("public", "transactions"),
    ("core", "transactions"),
    ("public", "transactions.transaction.subnominee"),
    ("public", "transactions.transaction.secondary"),
    ("public", "transactions.transaction.advisory"),
)

# Everything about a schema's tables that a dump would hold, but for the rows.
DEFINITIONS = """
SELECT 'column', c.relname, a.attname, a.attnum::text, format_type(a.atttypid, a.atttypmod),
  a.attnotnull::text, pg_get_expr(d.adbin, d.adrelid)
FROM pg_class AS c
JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_attrdef AS d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.oid = ANY (%(oids)s)
UNION ALL
SELECT 'index', c.relname, i.relname, pg_get_indexdef(i.oid), i.oid::text, i.relfilenode::text, ''
FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid JOIN pg_class AS c ON c.oid = x.indrelid
WHERE c.oid = ANY (%(oids)s)
UNION ALL
SELECT 'constraint', c.relname, k.conname, pg_get_constraintdef(k.oid), k.convalidated::text, '', ''
FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid WHERE c.oid = ANY (%(oids)s)
UNION ALL
SELECT 'trigger', c.relname, t.tgname, pg_get_triggerdef(t.oid), t.tgenabled::text, p.prosrc,
  coalesce(obj_description(p.oid, 'pg_proc'), '') || coalesce(p.proacl::text, '')
FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid JOIN pg_proc AS p ON p.oid = t.tgfoid
WHERE c.oid = ANY (%(oids)s) AND NOT t.tgisinternal
UNION ALL
SELECT 'table', c.relnamespace::regnamespace::text, c.relname, c.relfilenode::text, c.oid::text,
  coalesce(c.relacl::text, ''), coalesce(obj_description(c.oid, 'pg_class'), '')
FROM pg_class AS c WHERE c.oid = ANY (%(oids)s)
ORDER BY 1, 2, 3, 4
"""


def definitions(conn: psycopg.Connection[Any]) -> list[Any]:
    """Everything about the old tables but their rows, down to the files they are in."""
    oids = [
        row[0]
        for row in conn.execute(
            "SELECT c.oid FROM pg_class AS c WHERE c.relkind = 'r' AND (c.relnamespace::regnamespace::text, c.relname)"
            " IN (SELECT * FROM unnest(%s::text[], %s::text[]))",
            ([schema for schema, _ in NAMES], [name for _, name in NAMES]),
        )
    ]
    return conn.execute(DEFINITIONS, {"oids": oids}).fetchall()


def contents(conn: psycopg.Connection[Any], schema: str, name: str, columns: str = "t.*") -> list[str]:
    """The rows of a table or view, as text, in an order of their own."""
    rows = conn.execute(
        sql.SQL("SELECT (SELECT r FROM (SELECT {}) AS r)::text FROM {} AS t").format(
            sql.SQL(columns),
            sql.Identifier(schema, name),
        )
    )
    return sorted(row[0] for row in rows)


def fingerprint(conn: psycopg.Connection[Any]) -> dict[str, Any]:
    """Rows and definitions of every old table that is there."""
    found: dict[str, Any] = {"definitions": definitions(conn)}
    for schema, name in NAMES:
        there = conn.execute(
            "SELECT to_regclass(%s) IS NOT NULL", (sql.Identifier(schema, name).as_string(conn),)
        ).fetchone()
        if there == (True,):
            found[f"{schema}.{name}"] = contents(conn, schema, name)
    return found
