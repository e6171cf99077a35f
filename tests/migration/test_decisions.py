"""Nothing is in our schemas about whose access nobody has decided: docs/reference/database.md is the list of decisions.

Whoever adds a table, function or column privilege adds it to that page; this test says what is missing. That tables and
callable functions have the privileges the page says is compared in tests/acceptance/test_docs.py, what rows they show
in test_access_matrix.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from equitie_data import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.migration.conftest import Platform

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/database.md").read_text(encoding="utf-8")
OURS = ["public", "equitie_private", "equitie_part", "equitie_migrations"]
ROLES = ("anon", "authenticated", "equitie_staff", "service_role")
# The history of migrations is made before there are roles; its one reader sees all of it.
WITHOUT_ROW_LEVEL_SECURITY = {"equitie_migrations.history"}


def table(first: str) -> Iterator[list[str]]:
    """The rows of the page's table whose first column is called so."""
    inside = False
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if inside and line.startswith("|") and not set(cells[0]) <= {"-", ":"}:
            yield cells
        elif not line.startswith("|"):
            inside = False
        inside = inside or (line.startswith("|") and cells[0] == first)


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


RELATIONS = {code(row[0])[0] for row in table("relation") if "." in row[0]}
CALLABLE = {code(row[0])[0] for row in table("function")}
CLOSED = {name for row in table("of the owner, for") for name in code(row[1])}


def test_the_page_was_read() -> None:
    assert {"public.transactions_clean", "equitie_private.query_stats_hourly"} <= RELATIONS
    assert "equitie_private.database_role(uuid)" in CALLABLE
    assert {"track", "set_updated_at"} <= CLOSED
    assert not CLOSED & {re.sub(r"^.*\.|\(.*$", "", name) for name in CALLABLE}, "decided twice"


def test_every_schema_is_described(platform: Platform) -> None:
    assert platform.rows(
        "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
        " AND nspname <> ALL (%s)",
        [code(row[0])[0] for row in table("schema")],
    ) == []  # fmt: skip


def test_every_relation_is_described_or_a_partition_of_one_that_is(platform: Platform) -> None:
    found = platform.rows(
        "SELECT n.nspname, c.relname, c.relkind::text, c.relispartition, pg_partition_root(c.oid)::regclass::text"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = ANY (%s) AND c.relkind NOT IN ('i', 'I', 'S', 't')",
        OURS,
    )
    names = {name.removeprefix("public.") for name in RELATIONS}
    undecided = [
        f"{schema}.{name} ({kind})"
        for schema, name, kind, partition, root in found
        if (root not in names if partition and schema == "equitie_part" else f"{schema}.{name}" not in RELATIONS)
    ]
    assert undecided == []
    assert {f"{schema}.{name}" for schema, name, *_ in found} >= RELATIONS
    assert sum(partition for *_, partition, _ in found) > 20


def test_nobody_holds_anything_on_a_partition_or_on_a_sequence_but_those_described(platform: Platform) -> None:
    found = platform.rows(
        "SELECT n.nspname || '.' || c.relname, a.grantee::regrole::text, a.privilege_type FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL aclexplode(c.relacl) AS a"
        " WHERE (n.nspname = 'equitie_part' OR c.relkind = 'S') AND n.nspname = ANY (%s) AND a.grantee <> c.relowner",
        OURS,
    )
    assert set(found) == {
        (code(row[0])[0], role, "SELECT") for row in table("sequence of its own") for role in row[1].split(", ")
    }
    # All others belong to an identity column.
    own = platform.rows(
        "SELECT n.nspname || '.' || s.relname FROM pg_class s JOIN pg_namespace n ON n.oid = s.relnamespace"
        " WHERE s.relkind = 'S' AND n.nspname = ANY (%s) AND NOT EXISTS ("
        "  SELECT FROM pg_depend d WHERE d.objid = s.oid AND d.classid = 'pg_class'::regclass AND d.deptype = 'i')",
        OURS,
    )
    assert [name for (name,) in own] == [code(row[0])[0] for row in table("sequence of its own")]


def test_every_function_is_described(platform: Platform) -> None:
    found = platform.rows(
        "SELECT p.oid::regprocedure::text, n.nspname || '.' || p.proname, p.proname::text FROM pg_proc p"
        " JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = ANY (%s)",
        OURS,
    )
    signatures = {name.removeprefix("public.") for name in CALLABLE}
    assert [signature for signature, _, name in found if signature not in signatures and name not in CLOSED] == []
    assert {name for *_, name in found} >= CLOSED
    assert platform.rows(
        "SELECT p.oid::regprocedure::text, r FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace,"
        " unnest(%s::text[]) AS r"
        " WHERE n.nspname = ANY (%s) AND p.proname = ANY (%s) AND has_function_privilege(r, p.oid, 'EXECUTE')",
        list(ROLES), OURS, list(CLOSED),
    ) == []  # fmt: skip


def test_there_are_no_types_but_those_of_relations(platform: Platform) -> None:
    assert platform.rows(
        "SELECT t.oid::regtype::text FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid"
        " WHERE t.typnamespace::regnamespace::text = ANY (%s) AND t.typelem = 0 AND coalesce(c.relkind, 'c') = 'c'",
        OURS,
    ) == []  # fmt: skip


def test_row_level_security_is_on_everywhere(platform: Platform) -> None:
    found = platform.rows(
        "SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = ANY (%s) AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND NOT c.relrowsecurity",
        OURS,
    )
    assert {name for (name,) in found} == WITHOUT_ROW_LEVEL_SECURITY
    views = platform.rows(
        "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relkind = 'v'"
        " AND c.relnamespace::regnamespace::text = ANY (%s)"
        " AND NOT coalesce('security_invoker=true' = ANY (c.reloptions), false)",
        OURS,
    )
    assert views == []


@pytest.mark.parametrize("role", ROLES)
def test_privileges_on_columns_are_those_described(platform: Platform, role: str) -> None:
    described: dict[tuple[str, str], set[str]] = {}
    for relation, of, actions, columns in table("relation with columns"):
        name = code(relation)[0]
        every = {column for (column,) in platform.rows(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped", name
        )}  # fmt: skip
        assert set(code(columns)) <= every, name
        named = every - set(code(columns)) if columns.startswith("all but") else set(code(columns))
        if of == role:
            described |= {(name, action): named for action in actions.split(", ")}
    found: dict[tuple[str, str], set[str]] = {}
    for name, action, column in platform.rows(
        "SELECT n.nspname || '.' || c.relname, p, a.attname::text FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid,"
        " unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS p"
        " WHERE n.nspname = ANY (%s) AND c.relkind IN ('r', 'p', 'v', 'm') AND a.attnum > 0 AND NOT a.attisdropped"
        " AND has_column_privilege(%s, c.oid, a.attnum, p) AND NOT has_table_privilege(%s, c.oid, p)",
        OURS, role, role,
    ):  # fmt: skip
        found.setdefault((name, action), set()).add(column)
    assert found == described


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("ALTER TABLE public.user_profiles DISABLE TRIGGER refuse_own_profile_update", "people could change their own"),
        ("DROP TRIGGER refuse_own_profile_insert ON public.user_profiles", "refuse_own_profile_insert"),
        ("GRANT SELECT ON equitie_private.import_runs TO anon", "anon holds SELECT on equitie_private.import_runs"),
        ("GRANT SELECT ON equitie_part.audit_logs_default TO service_role", "equitie_part.audit_logs_default: revoke"),
        ("GRANT EXECUTE ON FUNCTION equitie_private.track(regclass) TO PUBLIC", "PUBLIC may execute"),
        ("GRANT USAGE ON SEQUENCE public.deals_clean_deal_id_seq TO equitie_staff", "on the sequence"),
        ("GRANT UPDATE (kyc_status) ON public.investors_clean TO authenticated", "the column kyc_status of"),
        ("GRANT SELECT (email) ON public.user_profiles TO anon", "anon may SELECT the column email"),
        ("GRANT UPDATE ON public.user_profiles TO equitie_staff", "every column of public.user_profiles"),
    ],
)
def test_verify_finds_what_was_opened(platform: Platform, owner_dsn: str, change: str, found: str) -> None:
    assert migrate.verify(owner_dsn) == ()
    platform.owner.execute(change)
    problems = migrate.verify(owner_dsn)
    assert any(found in problem for problem in problems), problems
