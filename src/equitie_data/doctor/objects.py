"""What an application made next to the library's schema, and what would open it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from equitie_data._sql import query
from equitie_data.doctor.baseline import our_tables
from equitie_data.doctor.findings import Finding, finding, quoted
from equitie_data.migrations.grant import DATABASE_ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

__all__ = ["check_objects"]

# A hosting platform's own, for it to answer for; and the server's.
_ELSEWHERE: Final = (
    "auth cron extensions graphql graphql_public information_schema net pgbouncer pgmq pgsodium pgsodium_masks"
    " realtime storage supabase_functions supabase_migrations vault"
).split()
_KINDS: Final = {"r": "table", "p": "table", "m": "materialized view", "v": "view", "f": "foreign table"}


def check_objects(conn: Connection[Any]) -> Iterator[Finding]:
    """Yield relations, functions and default privileges that let somebody past the policies."""
    about: dict[str, Any] = {"roles": list(DATABASE_ROLES), "elsewhere": _ELSEWHERE}
    for partition, grantee, privileges in conn.execute(query("doctor_partition_grants"), {}):
        who = quoted(grantee)
        yield finding(
            "partition-granted",
            f"{partition} to {grantee}",
            f"{who} has {privileges} on the partition {partition}.",
            f"REVOKE ALL ON {partition} FROM {who};",
        )
    ours = set(our_tables())
    for name, kind, reached_by in conn.execute(query("doctor_open_relations"), about):
        # The service is meant to see everything; of the library's own, the baseline says more.
        reached = [role for role in reached_by if role != "service_role"]
        if reached and name not in ours:
            who = ", ".join(map(quoted, reached))
            what = f"The {_KINDS[kind]} {name} can be reached by {who} without a policy."
            yield finding("relation-open", name, what, _closing(kind, name, who))
    for (name,) in conn.execute(query("doctor_definer_functions"), about):
        what = f"{name} runs as its owner, with its caller's search path."
        yield finding("definer-search-path", name, what, f"ALTER FUNCTION {name} SET search_path = '';")
    for owner, schema, kind, grantee in conn.execute(query("doctor_default_privileges"), about):
        where = f" IN SCHEMA {quoted(schema)}" if schema else ""
        yield finding(
            "default-privileges",
            f"{kind.lower()} of {owner}{f' in {schema}' if schema else ''} to {grantee}",
            f"{kind.capitalize()} that {quoted(owner)} makes{where.lower()} are open to {quoted(grantee)}.",
            f"ALTER DEFAULT PRIVILEGES FOR ROLE {quoted(owner)}{where} REVOKE ALL ON {kind} FROM {quoted(grantee)};",
        )
    yield from _check_owners(conn)


def _closing(kind: str, name: str, who: str) -> str:
    if kind in "rp":
        return f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY;"
    if kind == "v":
        return f"ALTER VIEW {name} SET (security_invoker = true);"
    return f"REVOKE ALL ON {name} FROM {who};"


def _check_owners(conn: Connection[Any]) -> Iterator[Finding]:
    rows = conn.execute(query("doctor_owners"), {"ours": our_tables()}).fetchall()
    for owner, example, count in rows[1:]:
        what = f"{owner} owns {count} of the library's objects, {example} among them; {rows[0][0]} owns the others."
        yield finding("owners-differ", owner, what, f"REASSIGN OWNED BY {owner} TO {rows[0][0]};")
