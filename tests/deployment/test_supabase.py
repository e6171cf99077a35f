"""What our migrations do on a Supabase project, and what they leave alone."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from tests.deployment.supabase import THEIR_SCHEMAS

from equitie_data import Database, acting_as, as_service, migrate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deployment.conftest import Deployment

OURS = ["public", "equitie_private", "equitie_part", "equitie_migrations"]
# Who holds what on our objects, whoever their owner is and however it came to be.
HOLDINGS = """
SELECT c.oid::regclass::text, coalesce(r.rolname, 'PUBLIC'), a.privilege_type
FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) AS a LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE c.relnamespace::regnamespace::text = ANY (%(ours)s) AND a.grantee <> c.relowner
UNION ALL
SELECT c.attrelid::regclass || '.' || c.attname, coalesce(r.rolname, 'PUBLIC'), a.privilege_type
FROM pg_attribute c CROSS JOIN LATERAL aclexplode(c.attacl) AS a LEFT JOIN pg_roles r ON r.oid = a.grantee
INNER JOIN pg_class t ON t.oid = c.attrelid
WHERE t.relnamespace::regnamespace::text = ANY (%(ours)s) AND a.grantee <> t.relowner
UNION ALL
SELECT p.oid::regprocedure::text, coalesce(r.rolname, 'PUBLIC'), a.privilege_type
FROM pg_proc p CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
LEFT JOIN pg_roles r ON r.oid = a.grantee
WHERE p.pronamespace::regnamespace::text = ANY (%(ours)s) AND a.grantee <> p.proowner
"""
NOT_HELD_ELSEWHERE = {"postgres", "supabase_admin", "equitie_backend", "equitie_test_app"}


@contextlib.contextmanager
def owner_of(deployment: Deployment) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(deployment.owner_dsn, autocommit=True) as conn:
        yield conn


def holdings(dsn: str) -> set[tuple[str, str, str]]:
    with psycopg.connect(dsn) as conn:
        rows = conn.execute(HOLDINGS, {"ours": OURS}).fetchall()
    return {(name, grantee, privilege) for name, grantee, privilege in rows if grantee not in NOT_HELD_ELSEWHERE}


def add_person(conn: psycopg.Connection[Any], role: str) -> tuple[UUID, int]:
    """Make an investor with one transaction, and somebody of this role who is linked to them."""
    user = uuid4()
    row = conn.execute(
        "WITH i AS (INSERT INTO investors_clean (full_name) VALUES ('Ada') RETURNING investor_id),"
        " d AS (INSERT INTO deals_clean (deal_name) VALUES ('Round') RETURNING deal_id)"
        " SELECT investor_id, deal_id FROM i, d"
    ).fetchone()
    assert row is not None
    conn.execute(
        "INSERT INTO transactions_clean (investor_id, deal_id, transaction_date, amount)"
        " VALUES (%s, %s, current_date, 5)",
        row,
    )
    conn.execute(
        "INSERT INTO user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, %s, %s)",
        (user, f"{user}@example.com", role, row[0]),
    )
    return user, row[0]


def test_the_imitation_is_no_superusers_and_refuses_to_create_in_auth(supabase: Deployment) -> None:
    with owner_of(supabase) as conn:
        assert conn.execute("SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user").fetchall() == [
            (False, True)
        ]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("CREATE FUNCTION auth.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'")


def test_everything_is_applied_and_verified(supabase: Deployment) -> None:
    assert migrate.verify(supabase.owner_dsn) == ()
    assert migrate.migrate(supabase.owner_dsn).applied == ()


def test_nothing_of_theirs_is_changed(supabase: Deployment) -> None:
    assert supabase.project is not None
    assert len(supabase.before) > 60
    assert {row[1] for row in supabase.before if row[0] == "schema"} == set(THEIR_SCHEMAS)
    after = supabase.project.fingerprint()
    assert [row for row in after if row not in supabase.before] == []
    assert [row for row in supabase.before if row not in after] == []


def test_default_privileges_opened_nothing_now_or_later(supabase: Deployment, owner_dsn: str) -> None:
    expected = holdings(owner_dsn)
    assert ("companies_clean", "authenticated", "SELECT") in expected
    with owner_of(supabase) as conn:
        # The imitation does what it imitates: without our doing, an object of public would be open.
        conn.execute("CREATE TABLE public.theirs (a int)")
        opened = holdings(supabase.owner_dsn)
        assert ("theirs", "anon", "DELETE") in opened
        conn.execute("DROP TABLE public.theirs")
        assert holdings(supabase.owner_dsn) == expected
        # What the library makes later: partitions, and the functions of tables that are tracked.
        conn.execute(
            "SELECT equitie_private.ensure_month_partitions('transactions_clean', '2013-01-01', '2013-02-01');"
            "SELECT equitie_private.ensure_month_partitions('audit_logs', '2013-01-01', '2013-02-01');"
            "SELECT equitie_private.track('public.deals_clean')"
        )
        conn.execute("CALL equitie_private.maintain()")
    assert holdings(supabase.owner_dsn) == expected
    assert not any(grantee in {"anon", "PUBLIC"} for _, grantee, _ in expected)


def test_auth_functions_stay_theirs_and_name_the_acting_user(supabase: Deployment) -> None:
    with psycopg.connect(supabase.admin_dsn) as admin:
        owners = admin.execute(
            "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'auth'::regnamespace"
        ).fetchall()
        assert owners == [("supabase_auth_admin",)]
    with owner_of(supabase) as conn:
        user, _ = add_person(conn, "investor")
    with Database(supabase.app_dsn) as database, acting_as(user):
        assert database.execute_read(
            "SELECT auth.uid(), auth.role(), auth.jwt() ->> 'sub', equitie_private.current_user_id()"
        ) == [(user, "authenticated", str(user), user)]


def test_a_policy_written_for_supabase_works_beside_ours(supabase: Deployment) -> None:
    with owner_of(supabase) as conn:
        ada, _ = add_person(conn, "investor")
        grace, _ = add_person(conn, "investor")
        conn.execute(
            "CREATE TABLE public.notes (owner uuid, words text);"
            "ALTER TABLE public.notes ENABLE ROW LEVEL SECURITY;"
            "CREATE POLICY own_notes ON public.notes TO authenticated USING (owner = (SELECT auth.uid()))"
        )
        conn.execute("INSERT INTO public.notes VALUES (%s, 'of Ada'), (%s, 'of Grace')", (ada, grace))
    try:
        with Database(supabase.app_dsn) as database:
            for user, words in ((ada, "of Ada"), (grace, "of Grace")):
                with acting_as(user):
                    assert database.execute_read("SELECT words FROM public.notes") == [(words,)]
            with as_service("a test"):
                assert database.execute_read("SELECT count(*) FROM public.notes") == [(2,)]
    finally:
        with owner_of(supabase) as conn:
            conn.execute("DROP TABLE public.notes")


def test_requests_of_the_rest_api_see_what_their_policies_say(supabase: Deployment) -> None:
    assert supabase.project is not None
    with owner_of(supabase) as conn:
        ada, investor = add_person(conn, "investor")
        admin, linked = add_person(conn, "admin")
    with psycopg.connect(supabase.project.authenticator_dsn, autocommit=True) as api:

        def ask(role: str, user: UUID | None, statement: str) -> Any:
            claims = json.dumps({"sub": str(user), "role": role}) if user else ""
            with api.transaction():
                api.execute(
                    "SELECT set_config('role', %s, true), set_config('request.jwt.claims', %s, true)", (role, claims)
                )
                return api.execute(statement).fetchall()

        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask("anon", None, "SELECT FROM transactions_clean")
        investors = "SELECT investor_id FROM transactions_clean"
        assert ask("authenticated", ada, investors) == [(investor,)]
        # Staff who come this way are no staff: nobody chose their database role.
        assert ask("authenticated", admin, investors) == [(linked,)]
        for statement in ("SELECT FROM audit_logs", "UPDATE user_profiles SET role = 'superadmin' RETURNING 1"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                ask("authenticated", admin, statement)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask("authenticated", ada, "SELECT equitie_private.database_role(gen_random_uuid())")
        # The same as a person of ours sees it, by way of the API's own key.
        assert len(ask("service_role", None, "SELECT FROM transactions_clean")) >= 2


def test_settings_that_others_left_behind_do_not_change_who_our_policies_see(supabase: Deployment) -> None:
    with owner_of(supabase) as conn:
        ada, investor = add_person(conn, "investor")
        grace, _ = add_person(conn, "investor")
    with psycopg.connect(supabase.app_dsn, autocommit=True) as conn:
        # auth.uid() reads this older setting first; who left it there would be everybody after them.
        conn.execute("SELECT set_config('request.jwt.claim.sub', %s, false)", (str(grace),))
        with conn.transaction():
            conn.execute(
                "SELECT set_config('request.jwt.claims', %s, true), set_config('role', 'authenticated', true)",
                (json.dumps({"sub": str(ada)}),),
            )
            assert conn.execute("SELECT DISTINCT investor_id FROM transactions_clean").fetchall() == [(investor,)]


def test_files_in_storage_are_seen_as_before(supabase: Deployment) -> None:
    user = uuid4()
    with psycopg.connect(supabase.admin_dsn, autocommit=True) as admin:
        admin.execute("INSERT INTO storage.objects (id, owner_id, name) VALUES (%s, %s, 'f')", (uuid4(), user))
    with Database(supabase.app_dsn) as database:
        for who, seen in ((user, 1), (uuid4(), 0)):
            with acting_as(who):
                assert database.execute_read("SELECT count(*) FROM storage.objects") == [(seen,)]
