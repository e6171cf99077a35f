"""Moving the old tables out of the way as they are, and putting them back as they were."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, Final

from psycopg import sql
from psycopg.rows import dict_row

from equitie_data import _sql
from equitie_data.errors import LegacyError
from equitie_data.legacy.composing import name, raw
from equitie_data.legacy.sources import SYNC_FUNCTIONS, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

__all__ = ["block_writes", "free_backup_name", "move_away", "put_back", "unblock_writes"]

_BLOCK: Final = "equitie_legacy_read_only"
_ENABLED: Final = {"O": "ENABLE", "D": "DISABLE", "R": "ENABLE REPLICA", "A": "ENABLE ALWAYS"}


def block_writes(conn: Connection[Any], sources: Sequence[Source]) -> None:
    """Have every write to the old tables refused, until the views are there or the run is undone."""
    for source in sources:
        conn.execute(
            sql.SQL(
                "CREATE TRIGGER {} BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {}"
                " FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.refuse_legacy_write()"
            ).format(name(_BLOCK), source.identifier)
        )
        # ALWAYS: replication and restores would otherwise write on.
        conn.execute(sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(source.identifier, name(_BLOCK)))


def unblock_writes(conn: Connection[Any], sources: Sequence[Source]) -> None:
    """Take the refusal away."""
    for source in sources:
        conn.execute(sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(name(_BLOCK), source.identifier))


def free_backup_name(conn: Connection[Any]) -> str:
    """Return the name of a schema for today's backup that does not exist."""
    today = dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d")
    taken = {
        row[0]
        for row in conn.execute("SELECT n.nspname FROM pg_catalog.pg_namespace AS n WHERE n.nspname LIKE 'backup%'")
    }
    candidates = [f"backup_{today}", *(f"backup_{today}_{number}" for number in range(2, 100))]
    free = next((candidate for candidate in candidates if candidate not in taken), None)
    if free is None:
        raise LegacyError(f"There are a hundred backups of today: drop those you do not need, {candidates[0]} and on.")
    return free


def backup_name(source: Source) -> str:
    """Return what a table is called in the backup: tables outside of public get their schema in front."""
    return source.name if source.schema == "public" else f"{source.schema}.{source.name}"


def move_away(conn: Connection[Any], sources: Sequence[Source], schema: str) -> dict[str, Any]:
    """Drop the sync triggers and move the tables into the backup schema.

    Returns:
        What `put_back` needs.
    """
    oids = {source.number: oid_of(conn, source.identifier) for source in sources}
    parameters = {"oids": list(oids.values()), "functions": SYNC_FUNCTIONS}
    with conn.cursor(row_factory=dict_row) as cursor:
        triggers = cursor.execute(_sql.query("legacy_sync_triggers"), parameters).fetchall()
        functions = cursor.execute(_sql.query("legacy_sync_functions"), parameters).fetchall()
    numbers = {oid: number for number, oid in oids.items()}
    by_number = {source.number: source for source in sources}
    restoration: dict[str, Any] = {"schema": schema, "tables": [], "triggers": [], "functions": []}
    for trigger in triggers:
        source = by_number[numbers[trigger["oid"]]]
        conn.execute(sql.SQL("DROP TRIGGER {} ON {}").format(name(trigger["name"]), source.identifier))
        restoration["triggers"].append(
            {key: trigger[key] for key in ("name", "enabled", "definition", "comment")} | {"source": source.number}
        )
    for function in functions:
        # Names and signatures come from the catalog, quoted by the server.
        conn.execute(f"DROP FUNCTION {function['signature']}".encode())
        restoration["functions"].append(function)
    conn.execute(sql.SQL("CREATE SCHEMA {}").format(name(schema)))
    conn.execute(
        sql.SQL("COMMENT ON SCHEMA {} IS 'The old tables, untouched, as `legacy migrate` found them.'").format(
            name(schema)
        )
    )
    conn.execute(sql.SQL("REVOKE ALL ON SCHEMA {} FROM PUBLIC").format(name(schema)))
    for source in sources:
        renamed = _free_names(conn, source, schema)
        target = backup_name(source)
        if target != source.name:
            conn.execute(sql.SQL("ALTER TABLE {} RENAME TO {}").format(source.identifier, name(target)))
        conn.execute(sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(name(source.schema, target), name(schema)))
        restoration["tables"].append(
            {
                "source": source.number,
                "schema": source.schema,
                "name": source.name,
                "backup": target,
                "renamed": renamed,
            }
        )
    return restoration


def _free_names(conn: Connection[Any], source: Source, schema: str) -> list[list[str]]:
    """Rename indexes and sequences of a table whose names the backup has already; names are one schema's alone."""
    renamed = []
    for kind, old, wanted in conn.execute(
        _sql.query("legacy_taken_names"),
        {"table": oid_of(conn, source.identifier), "backup": schema, "prefix": f"{source.schema}."},
    ).fetchall():
        conn.execute(sql.SQL("ALTER {} {} RENAME TO {}").format(raw(kind), name(source.schema, old), name(wanted)))
        renamed.append([kind, old, wanted])
    return renamed


def put_back(conn: Connection[Any], restoration: dict[str, Any], sources: Sequence[Source]) -> None:
    """Undo `move_away`; the names must be free."""
    schema = restoration["schema"]
    by_number = {source.number: source for source in sources}
    for table in restoration["tables"]:
        moved = name(schema, table["backup"])
        conn.execute(sql.SQL("ALTER TABLE {} SET SCHEMA {}").format(moved, name(table["schema"])))
        if table["backup"] != table["name"]:
            conn.execute(
                sql.SQL("ALTER TABLE {} RENAME TO {}").format(
                    name(table["schema"], table["backup"]), name(table["name"])
                )
            )
        for kind, old, new in table["renamed"]:
            conn.execute(sql.SQL("ALTER {} {} RENAME TO {}").format(raw(kind), name(table["schema"], new), name(old)))
    for function in restoration["functions"]:
        # As pg_get_functiondef wrote it. Sent as bytes: it is no template.
        conn.execute(function["definition"].encode())
        if function["granted"]:
            conn.execute(f"REVOKE ALL ON FUNCTION {function['signature']} FROM PUBLIC".encode())
            for grant in function["grants"]:
                conn.execute(grant.encode())
        if function["comment"] is not None:
            conn.execute(
                sql.SQL("COMMENT ON FUNCTION {} IS {}").format(
                    raw(function["signature"]), sql.Literal(function["comment"])
                )
            )
    for trigger in restoration["triggers"]:
        table = by_number[trigger["source"]].identifier
        conn.execute(trigger["definition"].encode())
        conn.execute(
            sql.SQL("ALTER TABLE {} {} TRIGGER {}").format(
                table, raw(_ENABLED[trigger["enabled"]]), name(trigger["name"])
            )
        )
        if trigger["comment"] is not None:
            conn.execute(
                sql.SQL("COMMENT ON TRIGGER {} ON {} IS {}").format(
                    name(trigger["name"]), table, sql.Literal(trigger["comment"])
                )
            )
    # No CASCADE: what somebody else has put there stops the rollback and is named.
    conn.execute(sql.SQL("DROP SCHEMA {}").format(name(schema)))


def oid_of(conn: Connection[Any], identifier: sql.Identifier) -> int:
    """Return a table's object id."""
    row = conn.execute(sql.SQL("SELECT {}::regclass::oid").format(sql.Literal(identifier.as_string(conn)))).fetchone()
    assert row is not None  # noqa: S101 - a cast that fails raises
    return int(row[0])
