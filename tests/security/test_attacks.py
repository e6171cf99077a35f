"""SQL of an attacker's choice in a user's transaction, and what errors tell: bounded by the login role."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data import ConfigurationError, acting_as

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.security.world import World

BEYOND_THE_LOGIN = {
    "a partition": "SELECT * FROM equitie_part.transactions_clean_default",
    "a partition of the log": "SELECT * FROM equitie_part.audit_logs_default",
    "the keys": "SELECT * FROM equitie_private.idempotency_keys",
    "passwords": "SELECT rolpassword FROM pg_catalog.pg_authid",
    "files": "SELECT pg_catalog.pg_read_file('/etc/passwd')",
    "programs": "COPY (SELECT 1) TO PROGRAM 'true'",
    "a superuser": "SET SESSION AUTHORIZATION postgres",
    "the owner": "SET ROLE postgres",
    "a new role": "CREATE ROLE mine SUPERUSER",
    "a role of one's own": "GRANT service_role TO PUBLIC",
    "a table": "CREATE TABLE public.mine (a integer)",
    "a function": "CREATE FUNCTION public.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "an extension": "CREATE EXTENSION plpython3u",
    "a policy": "ALTER TABLE public.transactions_clean DISABLE ROW LEVEL SECURITY",
    "a policy of one's own": "CREATE POLICY mine ON public.transactions_clean USING (true)",
    "the triggers": "ALTER TABLE public.deals_clean DISABLE TRIGGER ALL",
    "the triggers by a setting": "SET session_replication_role = 'replica'",
    "the log": "DELETE FROM public.audit_logs",
    "the log's rows": "UPDATE public.audit_logs SET action = 'READ'",
    "all the log": "TRUNCATE public.audit_logs",
    "all transactions": "TRUNCATE public.transactions_clean",
    "a subscription": "CREATE SUBSCRIPTION mine CONNECTION 'host=evil' PUBLICATION p WITH (connect = false)",
    "the server's settings": "SET log_statement = 'all'",
    "other sessions": "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity"
    " WHERE usename = 'postgres' AND pid <> pg_catalog.pg_backend_pid()",
    "large objects of the server": "SELECT pg_catalog.lo_import('/etc/passwd')",
}


@pytest.mark.parametrize("what", BEYOND_THE_LOGIN)
def test_sql_of_an_attackers_choice_does_not_reach_beyond_the_login(world: World, what: str) -> None:
    for becoming in ("RESET ROLE", "SET ROLE service_role", "SET ROLE equitie_staff", "SELECT 1"):

        def attack(connection: psycopg.Connection[Any], becoming: str = becoming) -> Any:
            connection.execute(becoming)
            return connection.execute(BEYOND_THE_LOGIN[what]).rowcount

        with pytest.raises(psycopg.Error) as caught:
            world.run("ada", attack)
        assert caught.value.sqlstate in ("42501", "0A000", "42704", "55000", "58P01"), caught.value


def test_reset_role_reaches_the_login_which_may_read_nothing(world: World) -> None:
    def reset(connection: psycopg.Connection[Any]) -> Any:
        connection.execute("RESET ROLE")
        assert connection.execute("SELECT current_user = session_user").fetchone() == (True,)
        readable = connection.execute(
            "SELECT c.oid::regclass::text FROM pg_catalog.pg_class AS c WHERE c.relkind IN ('r', 'p', 'v', 'm')"
            " AND c.relnamespace::regnamespace::text NOT LIKE 'pg\\_%'"
            " AND c.relnamespace <> 'information_schema'::regnamespace"
            " AND pg_catalog.has_table_privilege(c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE')"
        ).fetchall()
        assert readable == [("equitie_migrations.history",)]
        return connection.execute("SELECT count(*) FROM public.transactions_clean").fetchone()

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        world.run("ada", reset)


def test_what_set_role_and_forged_claims_reach_is_what_the_login_could_have_had_anyway(world: World) -> None:
    def forged(role: str, who: str) -> Callable[[psycopg.Connection[Any]], Any]:
        def attack(connection: psycopg.Connection[Any]) -> Any:
            connection.execute("SELECT set_config('role', %s, true)", [role])
            connection.execute(
                "SELECT set_config('request.jwt.claims', %s, true)", [json.dumps({"sub": str(world.users[who])})]
            )
            return connection.execute("SELECT sum(amount) FROM public.transactions_clean").fetchone()[0]  # type: ignore[index]

        return attack

    # Claims alone make another investor of one: the application's word is what the database goes by.
    assert world.run("ada", "SELECT sum(amount) FROM public.transactions_clean") == [(111,)]
    assert world.run("ada", forged("authenticated", "bob")) == 222
    # An admin's claims under an investor's database role are nobody's.
    assert world.run("ada", forged("authenticated", "root")) is None
    assert world.run("ada", forged("equitie_staff", "root")) == 333
    # It ends with the transaction.
    assert world.run("ada", "SELECT sum(amount) FROM public.transactions_clean") == [(111,)]


def test_roles_in_claims_are_not_believed(world: World) -> None:
    forged = json.dumps(
        {
            "sub": str(world.users["ada"]),
            "role": "service_role",
            "app_metadata": {"role": "superadmin"},
            "user_metadata": {"role": "superadmin", "is_admin": True},
        }
    )

    def attack(connection: psycopg.Connection[Any]) -> Any:
        connection.execute("SELECT set_config('request.jwt.claims', %s, true)", [forged])
        return connection.execute(
            "SELECT equitie_private.app_role(), equitie_private.is_admin(), count(*) FROM public.transactions_clean"
        ).fetchone()

    assert world.run("ada", attack) == ("investor", False, 1)


@pytest.mark.parametrize("claims", ["{", "[]", "null", '"x"', '{"sub": "nobody"}', '{"sub": {}}', "{}", "", "\u2028"])
def test_claims_that_are_none_let_nobody_see_anything(world: World, claims: str) -> None:
    def attack(connection: psycopg.Connection[Any]) -> Any:
        connection.execute("SELECT set_config('request.jwt.claims', %s, true)", [claims])
        return connection.execute("SELECT count(*) FROM public.transactions_clean").fetchone()

    with contextlib.suppress(psycopg.DataError):
        assert world.run("ada", attack) == (0,)


TELLING = "RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS $$ BEGIN RAISE NOTICE 'amount %', $1; RETURN true; END $$"
LEAKY = {
    "a function that tells": (
        f"CREATE FUNCTION pg_temp.tell(numeric) {TELLING}",
        "SELECT count(*) FROM public.transactions_clean WHERE pg_temp.tell(amount)",
    ),
    "a function in an index's place": (
        f"CREATE FUNCTION pg_temp.tell(integer) {TELLING}",
        "SELECT count(*) FROM public.transactions_clean WHERE pg_temp.tell(amount::integer) AND amount::integer > 0",
    ),
    "an operator of one's own": (
        (
            f"CREATE FUNCTION pg_temp.tell(numeric, numeric) {TELLING};"
            "CREATE OPERATOR pg_temp.=== (FUNCTION = pg_temp.tell, LEFTARG = numeric, RIGHTARG = numeric)"
        ),
        "SELECT count(*) FROM public.transactions_clean WHERE amount OPERATOR(pg_temp.===) 0",
    ),
    "a division": ("SELECT 1", "SELECT count(*) FROM public.transactions_clean WHERE 1 / (amount - 222) < 5"),
    "a cast": (
        "SELECT 1",
        "SELECT count(*) FROM public.investors_clean WHERE full_name = 'ada' OR full_name::integer = 0",
    ),
}


@pytest.mark.parametrize("what", LEAKY)
def test_a_condition_sees_no_row_that_its_user_may_not(world: World, what: str) -> None:
    prepare, statement = LEAKY[what]
    told: list[str] = []

    def attack(connection: psycopg.Connection[Any]) -> Any:
        connection.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
        connection.execute(prepare.encode())
        return connection.execute(statement.encode()).fetchone()

    assert world.run("ada", attack) == (1,)
    assert all("222" not in each and "bob" not in each for each in told)
    if "tell" in prepare:
        assert told, "the function was not called at all"


TEMPORARY = {
    "a type": (
        "CREATE FUNCTION pg_temp.evil(pg_catalog.{type}) RETURNS boolean LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE NOTICE 'evil ran as %', current_user; RETURN true; END $$;"
        " CREATE DOMAIN pg_temp.{type} AS pg_catalog.{type} CHECK (pg_temp.evil(VALUE))"
    ),
    "a table": "CREATE TEMPORARY TABLE user_profiles (user_id uuid, role text, is_active boolean, investor_id integer);"
    " INSERT INTO pg_temp.user_profiles SELECT (current_setting('request.jwt.claims')::pg_catalog.jsonb ->> 'sub')::"
    "pg_catalog.uuid, 'superadmin', true, 1",
    "a function": "CREATE FUNCTION pg_temp.current_setting(text, boolean) RETURNS text LANGUAGE sql AS"
    ' $$ SELECT \'{{"sub": "{root}"}}\' $$',
    "an operator": (
        "CREATE FUNCTION pg_temp.evil(uuid, uuid) RETURNS boolean LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE NOTICE 'evil ran as %', current_user; RETURN true; END $$;"
        " CREATE OPERATOR pg_temp.= (FUNCTION = pg_temp.evil, LEFTARG = uuid, RIGHTARG = uuid)"
    ),
}


@pytest.mark.parametrize(
    ("what", "type_name"),
    [("a type", name) for name in ("jsonb", "uuid", "text", "name", "date", "regclass")]
    + [(what, "jsonb") for what in TEMPORARY if what != "a type"],
)
def test_temporary_objects_stand_in_for_nothing_a_definer_function_uses(
    world: World, what: str, type_name: str
) -> None:
    told: list[str] = []

    def attack(connection: psycopg.Connection[Any]) -> Any:
        connection.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
        make = TEMPORARY[what].format(type=type_name, root=world.users["root"])
        connection.execute(make.encode())
        connection.execute("SET LOCAL search_path = pg_temp, public")
        facts = connection.execute(
            "SELECT equitie_private.app_role(), equitie_private.is_admin(), equitie_private.can_audit(),"
            " equitie_private.current_investor_id(), (SELECT count(*) FROM public.transactions_clean)"
        ).fetchone()
        # A write, whose triggers are definer functions, too.
        connection.execute("UPDATE public.investors_clean SET phone = '1'")
        return facts

    assert world.run("ada", attack) == ("investor", False, False, world.investors["ada"], 1)
    assert told == []


def test_the_attack_by_a_type_is_a_real_one(world: World) -> None:
    # What an empty search_path, which looks like the safest of all, would let happen.
    told: list[str] = []

    def attack(connection: psycopg.Connection[Any]) -> None:
        connection.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
        connection.execute(TEMPORARY["a type"].format(type="jsonb").encode())
        connection.execute("SELECT equitie_private.current_investor_id()")

    world.owner.execute("ALTER FUNCTION equitie_private.current_investor_id() SET search_path = ''")
    world.run("ada", attack)
    assert told == ["evil ran as postgres"]


def test_every_function_of_ours_looks_among_temporary_objects_last(world: World) -> None:
    rows = world.owner.execute(
        "SELECT p.oid::regprocedure::text FROM pg_catalog.pg_proc AS p"
        " WHERE p.pronamespace::regnamespace::text IN ('public', 'equitie_private', 'equitie_migrations')"
        " AND p.prosecdef AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (p.proconfig), false)"
    ).fetchall()
    assert rows == []


# --- errors and oracles ---------------------------------------------------------------------------------------------

PROBES = {
    "an investor's e-mail": (
        "INSERT INTO public.investors_clean (full_name, primary_email) VALUES ('x', %s)",
        "bob@example.com",
        "nobody@example.com",
    ),
    "an investor's id": (
        (
            "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT min(deal_id), %s, current_date, 1 FROM public.deals_clean"
        ),
        "bob's id",
        2_000_000_000,
    ),
    "a deal's code": (
        "INSERT INTO public.deals_clean (deal_name, deal_code) VALUES ('x', %s)",
        "CODE",
        "NO CODE",
    ),
    "a company's name": ("INSERT INTO public.companies_clean (company_name) VALUES (%s)", "Acme", "Nobody"),
}


@pytest.mark.parametrize("person", ["ada", "ann"])
@pytest.mark.parametrize("what", PROBES)
def test_errors_do_not_tell_whether_a_row_is_there(world: World, person: str, what: str) -> None:
    # Neither investors nor staff who only read: the policy refuses the row before any index or foreign key is asked.
    world.owner.execute("INSERT INTO public.companies_clean (company_name) VALUES ('Acme')")
    world.owner.execute("UPDATE public.deals_clean SET deal_code = 'CODE'")
    statement, there, nowhere = PROBES[what]
    said = []
    for value in (world.investors["bob"] if there == "bob's id" else there, nowhere):
        with pytest.raises(psycopg.Error) as caught:
            world.run(person, statement, [value])
        said.append((caught.value.sqlstate, str(caught.value)))
    assert said[0] == said[1]
    assert said[0][0] == "42501"


def test_an_update_of_ones_own_row_cannot_probe_others(world: World) -> None:
    for column in ("primary_email", "investor_id", "kyc_status"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            world.run("ada", f"UPDATE public.investors_clean SET {column} = {column}")


def test_anothers_key_tells_that_it_is_taken_and_nothing_else(world: World) -> None:
    with acting_as(world.users["bob"]):
        world.database.execute_write("SELECT 'private'", idempotency_key="k-1")
    with acting_as(world.users["ada"]), pytest.raises(ConfigurationError, match="another actor") as caught:
        world.database.execute_write("SELECT 1", idempotency_key="k-1")
    assert "'private'" not in f"{caught.value} {caught.value.__cause__} {caught.value.__context__}"


def test_explain_shows_no_row_of_others(world: World) -> None:
    plan = world.run("ada", "EXPLAIN (ANALYZE, VERBOSE) SELECT * FROM public.transactions_clean")
    assert "222" not in str(plan)
    for view in ("pg_catalog.pg_stats", "pg_catalog.pg_stats_ext"):
        seen = world.run("ada", f"SELECT count(*) FROM {view} WHERE schemaname IN ('public', 'equitie_part')")
        assert seen == [(0,)], "statistics hold the most common values"
