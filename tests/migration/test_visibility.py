"""What test_access_matrix.py does not ask: partitions, functions, the login role by itself, what an investor sees."""

from __future__ import annotations

import contextlib
import datetime as dt
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import psycopg
import pytest

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from tests.migration.conftest import Platform

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

PEOPLE = ("nobody known", "viewer", "inactive_admin", "investor_a", "analyst", "auditor", "superadmin", None)
INSERT_STATISTICS = (
    "INSERT INTO query_stats (minute, worker, fingerprint, query_text, operation) VALUES (now(), 'w', 'f', 'q', 'read')"
)


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


@pytest.mark.parametrize("person", PEOPLE)
def test_a_partition_cannot_be_read_directly(platform: Platform, person: str | None) -> None:
    month = f"equitie_part.transactions_clean_{dt.datetime.now(dt.timezone.utc):%Y_%m}"
    for partition in (month, "equitie_part.transactions_clean_default", "equitie_part.audit_logs_default"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
            conn.execute(f"SELECT FROM {partition}")


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


@contextlib.contextmanager
def claiming(platform: Platform, user: uuid.UUID, role: str = "none") -> Iterator[psycopg.Connection[Any]]:
    """Be the owner, or take on a role, with somebody's claims and past all triggers that can be got past."""
    with platform.owner.transaction():
        platform.owner.execute(
            "SELECT set_config('request.jwt.claims', %s, true),"
            " set_config('session_replication_role', 'replica', true), set_config('role', %s, true)",
            (f'{{"sub": "{user}"}}', role),
        )
        yield platform.owner


OWN_PROFILE = "nobody changes the role, links or activity of their own profile"


@pytest.mark.parametrize("role", ["none", "service_role"])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE user_profiles SET role = 'superadmin' WHERE user_id = '{user}'",
        "UPDATE user_profiles SET investor_id = {investor_b} WHERE user_id = '{user}'",
        "UPDATE user_profiles SET company_id = {company} WHERE user_id = '{user}'",
        "UPDATE user_profiles SET is_active = false WHERE user_id = '{user}'",
        "UPDATE user_profiles SET user_id = '{user}' WHERE role = 'superadmin'",
        "UPDATE user_profiles SET user_id = gen_random_uuid() WHERE user_id = '{user}'",
        "DELETE FROM user_profiles WHERE user_id = '{user}'",
        "INSERT INTO user_profiles VALUES ('{user}', 'x', 'admin') ON CONFLICT (user_id) DO UPDATE SET role = 'admin'",
    ],
)
def test_nobody_changes_their_own_profile_under_whatever_role(platform: Platform, role: str, change: str) -> None:
    # As a function of the owner's would, or an application that keeps the claims while it acts as the service.
    user = platform.user_id_of("investor_a")
    refused = pytest.raises(psycopg.errors.InsufficientPrivilege, match=OWN_PROFILE)
    with refused, claiming(platform, user, role) as conn:
        conn.execute(change.format(user=user, **platform.ids))


def test_what_is_no_right_may_be_changed_and_a_first_profile_made_by_oneself(platform: Platform) -> None:
    user, newcomer = platform.user_id_of("investor_a"), platform.user_id_of("newcomer")
    with claiming(platform, user) as conn:
        conn.execute("UPDATE user_profiles SET email = 'new' WHERE user_id = %s", (user,))
        conn.execute("UPDATE user_profiles SET role = role WHERE user_id = %s", (user,))
    insert = "INSERT INTO user_profiles (user_id, email, role, investor_id) VALUES (%s, 'x', %s, %s)"
    for role, investor in (("investor", None), ("viewer", platform.ids["investor_a"])):
        refused = pytest.raises(psycopg.errors.InsufficientPrivilege, match=OWN_PROFILE)
        with refused, claiming(platform, newcomer) as conn:
            conn.execute(insert, (newcomer, role, investor))
    with claiming(platform, newcomer) as conn:
        conn.execute(insert, (newcomer, "viewer", None))


@pytest.mark.parametrize("person", ["admin", "superadmin"])
def test_an_admin_does_not_raise_themself_by_an_upsert(platform: Platform, person: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
        conn.execute(
            "INSERT INTO user_profiles (user_id, email, role) VALUES (%s, 'x', 'viewer')"
            " ON CONFLICT (user_id) DO UPDATE SET role = 'superadmin'",
            (platform.user_id_of(person),),
        )


def test_who_appoints_whom_is_in_the_audit_log(platform: Platform) -> None:
    mark = platform.mark()
    with platform.acting("admin") as conn:
        conn.execute("UPDATE user_profiles SET role = 'manager' WHERE user_id = %s", (platform.user_id_of("viewer"),))
    assert platform.events_after(mark, "user_id", "action", "entity_id", "changes") == [
        (
            platform.user_id_of("admin"),
            "UPDATE",
            str(platform.user_id_of("viewer")),
            {"before": {"role": "viewer", "updated_at": ANY}, "after": {"role": "manager", "updated_at": ANY}},
        )
    ]
