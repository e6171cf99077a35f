"""Who sees and may change what, through the privileges and policies alone."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import psycopg
import pytest

if TYPE_CHECKING:
    from tests.migration.conftest import Platform

DENIED = "denied"
TABLES = (
    "companies_clean",
    "deals_clean",
    "investors_clean",
    "transactions_clean",
    "user_profiles",
    "audit_logs",
    "query_stats",
)
MONITORING = ("query_stats", "query_metrics", "system_metrics", "performance_alerts")

INSERT_STATISTICS = (
    "INSERT INTO query_stats (minute, worker, fingerprint, query_text, operation) VALUES (now(), 'w', 'f', 'q', 'read')"
)

# Rows of TABLES that each person sees, of 1 company, 2 deals, 2 investors, 6 transactions, 9 profiles.
SEES: dict[str, tuple[int | str, ...]] = {
    "nobody known": (1, 0, 0, 0, 0, DENIED, DENIED),
    "viewer": (1, 0, 0, 0, 1, DENIED, DENIED),
    "inactive_admin": (DENIED,) * 7,
    "investor_a": (1, 1, 1, 3, 1, DENIED, DENIED),
    "investor_b": (1, 1, 1, 3, 1, DENIED, DENIED),
    "analyst": (1, 2, 2, 6, 1, 0, 0),
    "manager": (1, 2, 2, 6, 1, 0, 0),
    "auditor": (1, 2, 2, 6, 1, 20, 1),
    "admin": (1, 2, 2, 6, 9, 20, 1),
    "superadmin": (1, 2, 2, 6, 9, 20, 1),
}


def count(platform: Platform, person: str | None, table: str) -> int | str:
    try:
        with platform.acting(person) as conn:
            row = conn.execute(f"SELECT count(*) FROM public.{table}").fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return DENIED
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("person", SEES)
def test_what_a_person_sees(platform: Platform, person: str) -> None:
    platform.owner.execute(INSERT_STATISTICS)
    assert tuple(count(platform, person, table) for table in TABLES) == SEES[person]


def test_the_service_sees_everything(platform: Platform) -> None:
    assert tuple(count(platform, None, table) for table in TABLES) == (1, 2, 2, 6, 9, 20, 0)


def test_an_investor_sees_only_their_own_rows(platform: Platform) -> None:
    with platform.acting("investor_a") as conn:
        assert conn.execute("SELECT DISTINCT investor_id FROM transactions_clean").fetchall() == [
            (platform.ids["investor_a"],)
        ]
        assert conn.execute("SELECT deal_id FROM deals_clean").fetchall() == [(platform.ids["deal_a"],)]
        assert conn.execute("SELECT investor_id FROM investors_clean").fetchall() == [(platform.ids["investor_a"],)]
        assert conn.execute("SELECT user_id FROM user_profiles").fetchall() == [(platform.user_id_of("investor_a"),)]


def test_a_deactivated_investor_sees_nothing_even_as_authenticated(platform: Platform) -> None:
    platform.owner.execute("UPDATE user_profiles SET is_active = false WHERE role = 'investor'")
    with platform.acting("nobody known") as conn:
        conn.execute(
            "SELECT set_config('request.jwt.claims', %s, true)", (f'{{"sub": "{platform.user_id_of("investor_a")}"}}',)
        )
        assert conn.execute("SELECT count(*) FROM transactions_clean").fetchone() == (0,)
        assert conn.execute("SELECT count(*) FROM deals_clean").fetchone() == (0,)


@pytest.mark.parametrize("person", [*SEES, None])
def test_a_partition_cannot_be_read_directly(platform: Platform, person: str | None) -> None:
    month = f"equitie_part.transactions_clean_{dt.datetime.now(dt.timezone.utc):%Y_%m}"
    for partition in (month, "equitie_part.transactions_clean_default", "equitie_part.audit_logs_default"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
            conn.execute(f"SELECT FROM {partition}")


def attempt(platform: Platform, person: str | None, statement: str) -> int | str:
    """Run a statement as somebody; return how many rows it wrote, or that it was denied. Nothing stays."""
    try:
        with platform.acting(person) as conn, conn.transaction(force_rollback=True):
            return conn.execute(statement).rowcount
    except psycopg.errors.InsufficientPrivilege:
        return DENIED


WRITES = {
    "insert a company": "INSERT INTO companies_clean (company_name) VALUES ('New')",
    "update companies": "UPDATE companies_clean SET founding_year = 1999",
    "delete companies": "DELETE FROM companies_clean WHERE company_id < 0",
    "insert a transaction": "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
    " VALUES (1, 1, '2020-01-01', 1)",
    "update transactions": "UPDATE transactions_clean SET amount = 7",
    "delete transactions": "DELETE FROM transactions_clean",
    "truncate transactions": "TRUNCATE transactions_clean",
    "update deals": "UPDATE deals_clean SET deal_status = 'active'",
    "update phones": "UPDATE investors_clean SET phone = '1'",
    "update kyc": "UPDATE investors_clean SET kyc_status = 'verified'",
    "update statuses": "UPDATE investors_clean SET investor_status = 'ACTIVE'",
    "update emails": "UPDATE investors_clean SET primary_email = NULL",
    "become admin": "UPDATE user_profiles SET role = 'admin'",
    "insert a profile": "INSERT INTO user_profiles (user_id, email) VALUES (gen_random_uuid(), 'x')",
    "insert an event": "INSERT INTO audit_logs (source, actor_type, action, entity_type)"
    " VALUES ('sdk', 'user', 'READ', 'x')",
    "update the log": "UPDATE audit_logs SET action = 'x'",
    "delete the log": "DELETE FROM audit_logs",
    "insert statistics": INSERT_STATISTICS,
    "delete statistics": "DELETE FROM query_metrics",
}  # fmt: skip
ADMIN = {
    "insert a company": 1,
    "update companies": 1,
    "insert a transaction": 1,
    "update transactions": 6,
    "update deals": 2,
    "update phones": 2,
    "update kyc": 2,
    "update statuses": 2,
    "update emails": 2,
}
READING_STAFF = {name: DENIED if name.startswith("insert") else 0 for name in ADMIN}
MAY_WRITE: dict[str | None, dict[str, int | str]] = {
    "nobody known": {"update phones": 0},
    "inactive_admin": {},
    "investor_a": {"update phones": 1},
    "analyst": dict(READING_STAFF),
    "auditor": dict(READING_STAFF),
    "admin": dict(ADMIN),
    "superadmin": dict(ADMIN),
    None: {
        **ADMIN,
        "delete companies": 0,
        "delete transactions": 6,
        "become admin": 9,
        "insert a profile": 1,
    },
}


@pytest.mark.parametrize("person", MAY_WRITE)
def test_what_a_person_may_write(platform: Platform, person: str | None) -> None:
    outcomes = {name: attempt(platform, person, statement) for name, statement in WRITES.items()}
    assert outcomes == {name: MAY_WRITE[person].get(name, DENIED) for name in WRITES}


def test_an_investor_cannot_reach_another_one(platform: Platform) -> None:
    with platform.acting("investor_a") as conn:
        written = conn.execute(
            "UPDATE investors_clean SET phone = '1' WHERE investor_id = %s", (platform.ids["investor_b"],)
        )
        assert written.rowcount == 0


def test_the_login_role_can_do_nothing_by_itself(platform: Platform) -> None:
    for table in (*TABLES, *MONITORING, "equitie_private.import_runs"):
        name = table if "." in table else f"public.{table}"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            platform.app.execute(f"SELECT FROM {name}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        platform.app.execute("SELECT equitie_private.record_audit_events('[]')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        platform.app.execute("CREATE TABLE public.mine (a int)")


@pytest.mark.parametrize("person", ["investor_a", "admin", "inactive_admin"])
def test_functions_of_the_service_are_closed_to_users(platform: Platform, person: str) -> None:
    for call in (
        "database_role(gen_random_uuid())",
        "ensure_month_partitions('public.transactions_clean', current_date, current_date)",
        "track('public.companies_clean')",
        "record_query_stats('[]')",
        "record_system_metrics('[]')",
        "raise_alerts('[]')",
        "refresh_query_stats_hourly()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
            conn.execute(f"SELECT equitie_private.{call}")


def test_a_user_cannot_take_on_a_role_that_was_not_chosen_for_them(platform: Platform) -> None:
    # What keeps users apart is that the application's statements run after the prologue; another login's would not.
    with platform.acting("investor_a") as conn:
        assert conn.execute("SELECT current_user").fetchone() == ("authenticated",)
    with platform.acting("auditor") as conn:
        assert conn.execute("SELECT current_user").fetchone() == ("equitie_staff",)
    with platform.acting("inactive_admin") as conn:
        assert conn.execute("SELECT current_user").fetchone() == ("anon",)


def test_database_role_of_nobody_is_anon(platform: Platform) -> None:
    assert platform.one("SELECT equitie_private.database_role(NULL)") == "anon"


def test_an_investors_query_uses_the_index_and_asks_once_who_they_are(platform: Platform) -> None:
    platform.owner.execute("INSERT INTO investors_clean (full_name) SELECT 'i' || g FROM generate_series(1, 300) AS g")
    platform.owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT %s, i.investor_id, date_trunc('month', current_date)::date + g %% 28, g"
        " FROM investors_clean AS i CROSS JOIN generate_series(1, 30) AS g",
        (platform.ids["deal_a"],),
    )
    platform.owner.execute("ANALYZE transactions_clean")
    with platform.acting("investor_a") as conn:
        plan = "\n".join(row[0] for row in conn.execute("EXPLAIN SELECT sum(amount) FROM transactions_clean"))
    assert "InitPlan" in plan
    assert "investor_id = " in plan
    month = f"{dt.datetime.now(dt.timezone.utc):%Y_%m}"
    assert f"Index Scan on transactions_clean_{month}_investor_id_transaction_date_idx" in plan, plan
    with platform.acting("admin") as conn:
        plan = "\n".join(
            row[0]
            for row in conn.execute("EXPLAIN SELECT * FROM transactions_clean ORDER BY transaction_date DESC LIMIT 5")
        )
    assert "->  Sort" not in plan, plan


def test_the_hourly_view_is_read_by_auditors_and_the_service_only(platform: Platform) -> None:
    platform.owner.execute(INSERT_STATISTICS)
    with platform.acting(None) as conn:
        conn.execute("SELECT equitie_private.refresh_query_stats_hourly()")
    query = "SELECT count(*) FROM equitie_private.query_stats_by_hour('-infinity')"
    for person, seen in (("auditor", 1), ("analyst", 0), (None, 1)):
        with platform.acting(person) as conn:
            assert conn.execute(query).fetchone() == (seen,)
    for person in ("investor_a", "inactive_admin"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
            conn.execute(query)
    with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(None) as conn:
        conn.execute("SELECT FROM equitie_private.query_stats_hourly")
