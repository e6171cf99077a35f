"""Rules every object of the migrations keeps, and objects the platform knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

if TYPE_CHECKING:
    from tests.migration.conftest import Platform

OURS = "('public', 'equitie_private', 'equitie_migrations', 'auth')"


def test_every_table_is_commented(platform: Platform) -> None:
    assert platform.rows(
        "SELECT c.oid::regclass::text FROM pg_class c"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} AND c.relkind IN ('r', 'p', 'm', 'v')"
        " AND obj_description(c.oid, 'pg_class') IS NULL"
    ) == []  # fmt: skip


def test_every_column_is_commented(platform: Platform) -> None:
    assert platform.rows(
        "SELECT c.oid::regclass::text, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} AND c.relkind IN ('r', 'p', 'm', 'v')"
        " AND a.attnum > 0 AND NOT a.attisdropped AND col_description(c.oid, a.attnum) IS NULL"
    ) == []  # fmt: skip


def test_every_function_is_commented_and_pins_its_search_path(platform: Platform) -> None:
    functions = platform.rows(
        "SELECT p.oid::regprocedure::text, obj_description(p.oid, 'pg_proc') IS NOT NULL,"
        " coalesce('search_path=pg_catalog, pg_temp' = ANY (p.proconfig), false) OR p.prokind = 'a'"
        # A procedure that commits cannot have settings of its own; it runs as its caller.
        " OR (p.prokind = 'p' AND NOT p.prosecdef)"
        f" FROM pg_proc p WHERE p.pronamespace::regnamespace::text IN {OURS}"
    )
    assert len(functions) > 25
    assert [name for name, commented, pinned in functions if not (commented and pinned)] == []


def test_no_private_function_is_open_to_everybody_or_to_anon(platform: Platform) -> None:
    assert platform.rows(
        "SELECT p.oid::regprocedure::text FROM pg_proc p"
        " CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a"
        " WHERE p.pronamespace = 'equitie_private'::regnamespace AND a.grantee IN (0, 'anon'::regrole)"
    ) == []  # fmt: skip


def test_every_foreign_key_column_leads_an_index(platform: Platform) -> None:
    foreign_keys = platform.rows("SELECT count(*) FROM pg_constraint WHERE contype = 'f'")[0][0]
    assert foreign_keys > 8
    assert platform.rows(
        "SELECT c.conrelid::regclass::text, c.conname FROM pg_constraint c WHERE c.contype = 'f' AND NOT EXISTS ("
        "  SELECT FROM pg_index i WHERE i.indrelid = c.conrelid AND i.indisvalid AND i.indpred IS NULL"
        "  AND (i.indkey::smallint[])[0:cardinality(c.conkey) - 1] = c.conkey)"
    ) == []  # fmt: skip


def test_every_table_has_a_primary_key(platform: Platform) -> None:
    assert platform.rows(
        "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relkind IN ('r', 'p')"
        f" AND c.relnamespace::regnamespace::text IN {OURS}"
        " AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)"
    ) == []  # fmt: skip


def test_every_public_table_has_row_level_security_and_one_policy_per_role_and_action(platform: Platform) -> None:
    assert platform.rows(
        "SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')"
        " AND NOT c.relrowsecurity"
    ) == []  # fmt: skip
    actions = "CASE p.polcmd WHEN '*' THEN 'rawd' ELSE p.polcmd::text END"
    assert platform.rows(
        "SELECT p.polrelid::regclass::text, r.role::regrole::text, a.action, array_agg(p.polname) FROM pg_policy p"
        " CROSS JOIN LATERAL unnest(p.polroles) AS r (role)"
        f" CROSS JOIN LATERAL regexp_split_to_table({actions}, '') AS a (action)"
        " GROUP BY 1, 2, 3 HAVING count(*) > 1"
    ) == []  # fmt: skip
    assert platform.rows("SELECT polname FROM pg_policy WHERE 0 = ANY (polroles)") == []


def test_the_platforms_names_exist(platform: Platform) -> None:
    indexes = dict(platform.rows("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"))
    assert "(investor_id, transaction_date DESC)" in indexes["idx_transactions_investor_date"]
    assert "(deal_id, transaction_type)" in indexes["idx_transactions_deal_type"]
    assert "(transaction_type, transaction_date)" in indexes["idx_transactions_type_date"]
    assert "cancelled" in indexes["idx_transactions_active"]
    assert "failed" in indexes["idx_transactions_active"]
    assert "USING brin (transaction_date)" in indexes["idx_transactions_date_brin"]
    assert "(transaction_date DESC)" in indexes["idx_transactions_date"]
    constraints = dict(
        platform.rows("SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conparentid = 0")
    )
    for name, column in (("deal", "deal_id"), ("investor", "investor_id")):
        assert constraints[f"fk_transactions_{name}"].startswith(f"FOREIGN KEY ({column})")
        assert constraints[f"fk_transactions_{name}"].endswith("ON UPDATE CASCADE ON DELETE CASCADE")


@pytest.mark.parametrize(
    ("table", "column", "accepted"),
    [
        ("companies_clean", "company_type", "startup growth mature holding spv"),
        ("deals_clean", "deal_type", "primary secondary direct fund advisory"),
        ("deals_clean", "deal_category", "INVESTMENT ADVISORY SPECIAL"),
        ("deals_clean", "deal_status", "sourcing due_diligence closing active exited cancelled"),
        ("investors_clean", "investor_type", "individual institutional family_office fund corporate"),
        ("investors_clean", "investor_status", "ACTIVE INACTIVE SUSPENDED PENDING"),
        ("investors_clean", "kyc_status", "pending verified rejected expired"),
        ("transactions_clean", "transaction_type", "primary secondary advisory subnominee"),
        ("transactions_clean", "status", "pending completed cancelled failed"),
        ("transactions_clean", "currency", "USD EUR GBP JPY CHF CAD AUD"),
        ("user_profiles", "role", "viewer investor analyst manager auditor admin superadmin"),
    ],
)
def test_enumerations(platform: Platform, table: str, column: str, accepted: str) -> None:
    for value in accepted.split():
        platform.owner.execute(f"UPDATE {table} SET {column} = %s", (value,))
    for value in ("nonsense", ""):
        with pytest.raises((psycopg.errors.CheckViolation, psycopg.errors.StringDataRightTruncation)):
            platform.owner.execute(f"UPDATE {table} SET {column} = %s", (value,))


@pytest.mark.parametrize("amount", ["NaN", "Infinity", "-Infinity"])
def test_an_amount_is_finite(platform: Platform, amount: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="chk_transactions_amount_finite"):
        platform.owner.execute("UPDATE transactions_clean SET amount = %s::numeric", (amount,))


def test_a_company_with_deals_is_not_deleted_but_a_partner_is(platform: Platform) -> None:
    platform.owner.execute(
        "INSERT INTO companies_clean (company_id, company_name) VALUES (100, 'Partner');"
        "UPDATE deals_clean SET partner_company_id = 100, holding_entity = 100"
    )
    # PostgreSQL 18 has an error of its own for RESTRICT, 23001; before, it was 23503 as for any foreign key.
    with pytest.raises(psycopg.IntegrityError, match="fk_deals_underlying_company"):
        platform.owner.execute("DELETE FROM companies_clean WHERE company_id = %s", (platform.ids["company"],))
    platform.owner.execute("DELETE FROM companies_clean WHERE company_id = 100")
    assert platform.rows("SELECT DISTINCT partner_company_id, holding_entity FROM deals_clean") == [(None, None)]


def test_keys_follow_their_referenced_row(platform: Platform) -> None:
    platform.owner.execute("UPDATE deals_clean SET deal_id = 500 WHERE deal_id = %s", (platform.ids["deal_a"],))
    assert platform.one("SELECT count(*) FROM transactions_clean WHERE deal_id = 500") == 3


def test_auth_functions_read_the_claims(platform: Platform) -> None:
    with platform.acting("investor_a") as conn:
        assert conn.execute("SELECT auth.uid(), auth.role(), auth.jwt() ->> 'role'").fetchone() == (
            platform.user_id_of("investor_a"),
            "authenticated",
            "authenticated",
        )
    assert platform.app.execute("SELECT current_setting('request.jwt.claims', true)").fetchone() == ("",)
    assert platform.rows("SELECT auth.uid(), auth.role(), auth.jwt()") == [(None, None, None)]
