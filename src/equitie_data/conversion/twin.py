"""The table that is to take the place of another: built beside it, exchanged with it, all references bound anew."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from equitie_data.conversion.definition import run
from equitie_data.conversion.layout import ATTIC, FORMER, SCRATCH, TABLE, TWIN, add_months, month_partition
from equitie_data.conversion.locks import Patience, briefly
from equitie_data.errors import ConversionError

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from equitie_data.conversion.definition import Definition

__all__ = [
    "access",
    "add_foreign_keys",
    "bind_anew",
    "change_places",
    "create_flat",
    "create_partitioned",
    "drop_leftovers",
    "hand_on_numbers",
    "involved",
    "move_in",
    "triggers",
    "unbind",
]

_REFERENCED = re.compile(r" REFERENCES (\S+?)\(")
_COMMENT = "What an investor put into a deal, and when."
_ROLES = "PUBLIC, anon, authenticated, equitie_staff, service_role"

_REVOKE_ALL = f"""
DO $revoke$
DECLARE
  command text;
BEGIN
  FOR command IN
    SELECT DISTINCT
      format(
        'REVOKE ALL ON %s %s FROM %s',
        CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
        c.oid::regclass,
        CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
      )
    FROM pg_catalog.pg_class AS c
    CROSS JOIN LATERAL aclexplode(c.relacl) AS a
    WHERE
      c.oid IN ('{TWIN}'::regclass, pg_get_serial_sequence('{TWIN}', 'transaction_id')::regclass)
      AND a.grantee <> c.relowner
  LOOP
    EXECUTE command;
  END LOOP;
END
$revoke$
"""


def create_flat(conn: Connection[Any], definition: Definition) -> None:
    """Create the twin as a plain table with its key and nothing else."""
    run(
        conn,
        *_structure(definition, ""),
        f"ALTER TABLE {TWIN} ADD CONSTRAINT transactions_clean_pkey PRIMARY KEY (transaction_id)",
        f"COMMENT ON TABLE {TWIN} IS '{_COMMENT}'",
    )


def create_partitioned(
    conn: Connection[Any], definition: Definition, months: list[dt.date], *, indexed: bool, wide: bool
) -> None:
    """Create the twin partitioned by month, as migration 0004 does.

    Args:
        conn: The owner's session, in a transaction.
        definition: The table it is a twin of.
        months: First days of the months it gets.
        indexed: Whether it gets its indexes at once, and not after its rows.
        wide: Whether its ids must be made 64 bits wide.
    """
    run(
        conn,
        *_structure(definition, " PARTITION BY RANGE (transaction_date)", wide=wide),
        f"ALTER TABLE {TWIN} ADD CONSTRAINT transactions_clean_pkey PRIMARY KEY (transaction_id, transaction_date)",
        *(definition.statements("index") if indexed else ()),
        f"COMMENT ON TABLE {TWIN} IS '{_COMMENT} Partitioned by month of transaction_date.'",
    )
    _create_partition(
        conn,
        definition,
        "transactions_clean_default",
        "DEFAULT",
        f"Rows of {TABLE} whose month has no partition yet; ensure_month_partitions moves them.",
    )
    for month in months:
        end = add_months(month, 1)
        _create_partition(
            conn,
            definition,
            month_partition(month),
            f"FOR VALUES FROM ('{month}') TO ('{end}')",
            f"Rows of {TABLE} from {month} to before {end}.",
        )


def _create_partition(conn: Connection[Any], definition: Definition, name: str, bounds: str, comment: str) -> None:
    """Create a partition as `ensure_month_partitions` would; beside the one of the same name while there is one."""
    there = conn.execute(
        "SELECT EXISTS (SELECT FROM pg_partition_tree(to_regclass(%s)) AS t WHERE t.relid = n.oid)"
        " FROM to_regclass(%s) AS n (oid) WHERE n.oid IS NOT NULL",
        (TABLE, f"equitie_part.{name}"),
    ).fetchone()
    if there == (False,):
        raise ConversionError(
            f"The table equitie_part.{name} exists, but is not a partition of {TABLE}: attach it, or rename or drop it;"
            " then run the same command again."
        )
    taken = there == (True,)
    table = f"{SCRATCH if taken else 'equitie_part'}.{name}"
    run(
        conn,
        *(
            [f"CREATE TABLE {table} PARTITION OF {TWIN} DEFAULT"]
            if bounds == "DEFAULT"
            else [
                f"CREATE TABLE {table} (LIKE {TWIN} INCLUDING ALL EXCLUDING IDENTITY)",
                f"ALTER TABLE {TWIN} ATTACH PARTITION {table} {bounds}",
            ]
        ),
        f"REVOKE ALL ON TABLE {table} FROM {_ROLES}",
        f"COMMENT ON TABLE {table} IS '{comment}'",
        # Statement triggers of ours stand on every partition too: one on the parent is silent about a write that names
        # the partition.
        *(piece.on(table) for piece in definition.of("own statement trigger")),
    )


def _structure(definition: Definition, partitioning: str, *, wide: bool = False) -> list[str]:
    return [
        f"CREATE SCHEMA IF NOT EXISTS {SCRATCH}",
        f"COMMENT ON SCHEMA {SCRATCH} IS 'Made by python -m equitie_data partition; gone when the conversion is done.'",
        (
            f"CREATE TABLE {TWIN} (LIKE {TABLE}"
            " INCLUDING ALL EXCLUDING INDEXES EXCLUDING IDENTITY EXCLUDING STATISTICS)"
            f"{partitioning}"
        ),
        f"ALTER TABLE {TWIN} DROP CONSTRAINT IF EXISTS transactions_clean_boundary",
        *(
            f"ALTER TABLE {TWIN} ALTER COLUMN {column} TYPE bigint"
            for column in ("transaction_id", "parent_transaction_id")
            if wide and definition.type_of(column) == "integer"
        ),
        *(
            f"ALTER TABLE {TWIN} ALTER COLUMN {column} SET NOT NULL"
            for column in ("transaction_id", "transaction_date")
        ),
        # A serial's default is another way to say the same, and its sequence belongs to the other table.
        f"ALTER TABLE {TWIN} ALTER COLUMN transaction_id DROP DEFAULT",
        *definition.statements("sequence"),
        *definition.statements("column setting", "replica identity", "statistics"),
    ]


def access(definition: Definition) -> list[str]:
    """Return what makes the twin as accessible as the table, and no more, whatever default privileges there are."""
    return [
        _REVOKE_ALL,
        f"REVOKE ALL ON TABLE {TWIN} FROM PUBLIC",
        *(f'REVOKE ALL ON SEQUENCE {SCRATCH}."{piece.name}" FROM PUBLIC' for piece in definition.of("sequence")),
        *definition.statements("row security", "policy", "grant", "sequence grant"),
    ]


def triggers(definition: Definition) -> list[str]:
    """Return what gives the twin the table's triggers. Not before its rows are copied: they are no new rows."""
    return definition.statements("row trigger", "own statement trigger", "statement trigger")


def add_foreign_keys(
    conn: Connection[Any],
    definition: Definition,
    leaves: Sequence[str],
    patience: Patience,
    repair: Callable[[Callable[[], Any]], None],
    *,
    parent: str | None = None,
) -> None:
    """Give tables that hold rows already their foreign keys, without a long lock on the tables they refer to.

    PostgreSQL 15 refuses NOT VALID on a partitioned table; but a partitioned table adopts valid ones of its partitions.

    Args:
        conn: The owner's session.
        definition: The table whose foreign keys they are.
        leaves: The tables.
        patience: How to meet the locks of others.
        repair: What to run a validation with; it may be tried several times.
        parent: The partitioned table of which they are partitions.
    """
    for piece in definition.of("foreign key"):
        for leaf in leaves:
            state = _constraint(conn, leaf, piece.name)
            if state is None:
                _briefly_run(conn, patience, f"{piece.on(leaf)} NOT VALID", f"The foreign key {piece.name}")
            if not state:
                repair(functools.partial(run, conn, f'ALTER TABLE {leaf} VALIDATE CONSTRAINT "{piece.name}"'))
        if parent and _constraint(conn, parent, piece.name) is None:
            _briefly_run(conn, patience, piece.on(parent), f"The foreign key {piece.name}")


def _briefly_run(conn: Connection[Any], patience: Patience, statement: str, what: str) -> None:
    briefly(conn, patience, lambda: run(conn, statement), what)


def _constraint(conn: Connection[Any], table: str, name: str) -> bool | None:
    row = conn.execute(
        "SELECT k.convalidated FROM pg_catalog.pg_constraint AS k WHERE k.conrelid = %s::regclass AND k.conname = %s",
        (table, name),
    ).fetchone()
    return None if row is None else bool(row[0])


def involved(definition: Definition, *, referenced: bool) -> list[str]:
    """Return the tables and views that an exchange alters besides the table itself.

    Args:
        definition: The table's.
        referenced: Whether foreign keys of partitions become those of their parent, or the other way round: that
            changes the tables they refer to.
    """
    found = [piece.name for piece in definition.of("view")]
    found += [piece.name.rsplit(" on ", 1)[1] for piece in definition.of("policy of another table")]
    found += [piece.name.rsplit(" of ", 1)[1] for piece in definition.of("inbound key", "inbound key by id")]
    if referenced:
        found += [_REFERENCED.findall(piece.statement)[-1] for piece in definition.of("foreign key")]
    return sorted({name for name in found if name != TABLE})


def unbind(definition: Definition) -> list[str]:
    """Return what takes away, before an exchange, what would stand in its way; `bind_anew` brings it back."""
    return [
        *(
            "ALTER TABLE {1} DROP CONSTRAINT {0}".format(*piece.name.split(" of ", 1))
            for piece in definition.of("inbound key", "inbound key by id")
        ),
        *(f"DROP FUNCTION {piece.name}" for piece in definition.of("function of the row type")),
        *(f'ALTER PUBLICATION "{piece.name}" DROP TABLE {TABLE}' for piece in definition.of("publication")),
    ]


def hand_on_numbers(definition: Definition) -> list[str]:
    """Return what lets the twin's sequence go on where the table's stands."""
    return [
        f"SELECT pg_catalog.setval(pg_get_serial_sequence('{TWIN}', 'transaction_id')::regclass,"
        f' s.last_value, s.is_called) FROM public."{piece.name}" AS s'
        for piece in definition.of("sequence")
    ]


def change_places(conn: Connection[Any], definition: Definition) -> list[str]:
    """Return what gives the twin the table's name and place, numbers included, and keeps the table out of the way."""
    both = conn.execute(
        "SELECT b.relname FROM pg_partition_tree(to_regclass(%s)) AS t"
        " INNER JOIN pg_catalog.pg_class AS b ON b.oid = t.relid AND b.relnamespace = to_regnamespace(%s) AND t.isleaf"
        " WHERE t.parentrelid IS NOT NULL ORDER BY b.relname",
        (TWIN, SCRATCH),
    ).fetchall()
    return [
        *hand_on_numbers(definition),
        f"CREATE SCHEMA IF NOT EXISTS {ATTIC}",
        *(f"ALTER STATISTICS {piece.name} SET SCHEMA {ATTIC}" for piece in definition.of("statistics")),
        f"ALTER TABLE {TABLE} SET SCHEMA {ATTIC}",
        *(f'ALTER TABLE equitie_part."{name}" SET SCHEMA {ATTIC}' for (name,) in both),
        *(f'ALTER TABLE {SCRATCH}."{name}" SET SCHEMA equitie_part' for (name,) in both),
        *move_in(definition),
    ]


def move_in(definition: Definition) -> list[str]:
    """Return what gives the twin the table's name, which must be free."""
    return [
        f"ALTER TABLE {TWIN} SET SCHEMA public",
        *(
            f"ALTER STATISTICS {SCRATCH}.{name} SET SCHEMA {schema}"
            for schema, name in (piece.name.rsplit(".", 1) for piece in definition.of("statistics"))
        ),
    ]


def bind_anew(definition: Definition, *, by_id: bool) -> list[str]:
    """Return what makes others refer to the table that has the name now.

    Args:
        definition: The table that had it.
        by_id: Whether foreign keys that name the id alone can be had: not on a partitioned table.
    """
    return [
        *definition.statements("view", "function", "function of the row type", "policy of another table"),
        *definition.statements("inbound key"),
        *(definition.statements("inbound key by id") if by_id else ()),
        *definition.statements("publication"),
    ]


def drop_leftovers(conn: Connection[Any], patience: Patience) -> None:
    """Drop what a conversion leaves behind, in short steps: what is dropped locks the tables it refers to."""
    what = "Dropping what is not needed any more"
    while True:
        row = conn.execute(
            "SELECT t.relid::regclass::text FROM unnest(%s::text[]) AS r (name)"
            " CROSS JOIN LATERAL pg_partition_tree(to_regclass(r.name)) AS t"
            " WHERE t.isleaf AND t.parentrelid IS NOT NULL LIMIT 1",
            ([FORMER, TWIN],),
        ).fetchone()
        if row is None:
            break
        _briefly_run(conn, patience, f"DROP TABLE {row[0]}", what)
    for statement in (
        f"DROP TABLE IF EXISTS {FORMER}",
        f"DROP TABLE IF EXISTS {TWIN}",
        f"DROP SCHEMA IF EXISTS {ATTIC}",
        f"DROP SCHEMA IF EXISTS {SCRATCH} CASCADE",
    ):
        _briefly_run(conn, patience, statement, what)
