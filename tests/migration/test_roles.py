"""Owners who are no superusers, logins of any name, and platforms that grant everything by default."""

from __future__ import annotations

import contextlib
import secrets
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql

from equitie_data import migrate
from equitie_data.embedded import EmbeddedServer
from equitie_data.errors import MigrationError
from equitie_data.migrations.directories import ours

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.migration.conftest import Platform

PASSWORD = "for-a-second"
ROLES = ("anon", "authenticated", "equitie_staff", "service_role")


@pytest.fixture(scope="module")
def blank_server(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A server of its own: roles belong to the whole cluster, and these tests begin without them."""
    with EmbeddedServer(bin_dir=server.bin_dir) as running:
        yield running


@pytest.fixture
def superuser(blank_server: EmbeddedServer) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(blank_server.dsn(), autocommit=True) as conn:
        yield conn


@pytest.fixture
def owned_database(blank_server: EmbeddedServer, superuser: psycopg.Connection[Any]) -> Iterator[tuple[str, str]]:
    """A database whose owner may create roles, and nothing else; and no role of ours in the cluster."""
    owner, database = f"owner_{secrets.token_hex(4)}", f"db_{secrets.token_hex(4)}"
    superuser.execute(sql.SQL("CREATE ROLE {} LOGIN CREATEROLE PASSWORD {}").format(sql.Identifier(owner), PASSWORD))
    superuser.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(database), sql.Identifier(owner)))
    yield owner, blank_server.dsn(database, owner, PASSWORD)
    superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(database)))
    for name in (*ROLES, owner):
        if superuser.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,)).fetchone():
            superuser.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            superuser.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@contextlib.contextmanager
def login(superuser: psycopg.Connection[Any], name: str, attributes: str = "LOGIN NOINHERIT") -> Iterator[str]:
    superuser.execute(
        sql.SQL("CREATE ROLE {} {} PASSWORD {}").format(sql.Identifier(name), sql.SQL(attributes), PASSWORD)
    )
    try:
        yield name
    finally:
        databases = superuser.execute("SELECT datname FROM pg_database WHERE datallowconn").fetchall()
        for (database,) in databases:
            with psycopg.connect(
                superuser.info.dsn, dbname=database, password=superuser.info.password, autocommit=True
            ) as conn:
                conn.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        superuser.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def attributes_of(conn: psycopg.Connection[Any]) -> dict[str, tuple[bool, ...]]:
    rows = conn.execute(
        "SELECT rolname, rolcanlogin, rolinherit, rolsuper, rolcreaterole, rolbypassrls FROM pg_roles"
        " WHERE rolname = ANY (%s)",
        (list(ROLES),),
    )
    return {row[0]: row[1:] for row in rows}


def test_an_owner_who_is_no_superuser_migrates_and_grants(
    owned_database: tuple[str, str], superuser: psycopg.Connection[Any]
) -> None:
    _, dsn = owned_database
    assert len(migrate.migrate(dsn).applied) == len(ours().migrations)
    assert migrate.verify(dsn) == ()
    # Without BYPASSRLS, which this owner may not give.
    assert attributes_of(superuser) == dict.fromkeys(ROLES, (False,) * 5)

    with login(superuser, "plain_app"):
        migrate.grant(dsn, "plain_app")
        migrate.grant(dsn, "plain_app")
        with (
            psycopg.connect(dsn, autocommit=True) as owner,
            psycopg.connect(dsn, user="plain_app", password=PASSWORD, autocommit=True) as app,
        ):
            migrate.check_current(app)
            with app.transaction():
                app.execute("SELECT set_config('role', 'service_role', true)")
                app.execute("INSERT INTO companies_clean (company_name) VALUES ('Acme')")
                app.execute("UPDATE companies_clean SET founding_year = 1")
                assert app.execute("SELECT count(*) FROM companies_clean").fetchone() == (1,)
                app.execute(
                    "SELECT equitie_private.ensure_month_partitions('transactions_clean', '2013-01-01', '2013-01-01')"
                )
                app.execute("SELECT equitie_private.record_query_stats('[]')")
                app.execute("DELETE FROM companies_clean")
            assert owner.execute("SELECT count(*), count(DISTINCT actor_type) FROM audit_logs").fetchone() == (3, 1)
            with app.transaction():
                app.execute("SELECT set_config('role', equitie_private.database_role(gen_random_uuid()), true)")
                assert app.execute("SELECT count(*) FROM transactions_clean").fetchone() == (0,)


def test_an_owner_who_may_not_create_roles_is_told_what_is_missing(
    owned_database: tuple[str, str], superuser: psycopg.Connection[Any]
) -> None:
    owner, dsn = owned_database
    superuser.execute(sql.SQL("ALTER ROLE {} NOCREATEROLE").format(sql.Identifier(owner)))
    with pytest.raises(MigrationError, match=r'role "anon" does not exist .* CREATEROLE') as caught:
        migrate.migrate(dsn)
    assert "\n" not in str(caught.value)

    # With roles that a superuser made beforehand, CREATEROLE is not needed; granting them is another matter.
    for name in ROLES:
        superuser.execute(sql.SQL("CREATE ROLE {} NOLOGIN NOINHERIT").format(sql.Identifier(name)))
    assert migrate.migrate(dsn).current == ours().migrations[-1].label
    with login(superuser, "plain_app"):
        with pytest.raises(MigrationError, match="GRANT anon, authenticated, equitie_staff, service_role TO"):
            migrate.grant(dsn, "plain_app")
        for name in ROLES:
            superuser.execute(sql.SQL("GRANT {} TO plain_app").format(sql.Identifier(name)))
        if superuser.info.server_version < 160000:
            migrate.grant(dsn, "plain_app")


def test_a_stranger_to_the_database_is_refused(
    owned_database: tuple[str, str], superuser: psycopg.Connection[Any]
) -> None:
    _, dsn = owned_database
    with login(superuser, "stranger"), pytest.raises(MigrationError, match='"stranger" may not create schemas'):
        migrate.migrate(psycopg.conninfo.make_conninfo(dsn, user="stranger", password=PASSWORD))


def test_a_superuser_gives_the_service_bypassrls(
    blank_server: EmbeddedServer, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute("CREATE DATABASE by_superuser")
    try:
        migrate.migrate(blank_server.dsn("by_superuser"))
        expected = dict.fromkeys(ROLES, (False,) * 5)
        expected["service_role"] = (False, False, False, False, True)
        assert attributes_of(superuser) == expected
    finally:
        superuser.execute("DROP DATABASE by_superuser WITH (FORCE)")
        for name in ROLES:
            superuser.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_databases_of_one_cluster_are_migrated_at_once(
    blank_server: EmbeddedServer, superuser: psycopg.Connection[Any]
) -> None:
    names = [f"at_once_{number}" for number in range(4)]
    for name in names:
        superuser.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    reports: list[Any] = []

    def go(name: str) -> None:
        try:
            reports.append(migrate.migrate(blank_server.dsn(name)).current)
        except Exception as error:  # noqa: BLE001 - reported by the assertion
            reports.append(error)

    try:
        threads = [threading.Thread(target=go, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reports == [ours().migrations[-1].label] * 4
    finally:
        for name in names:
            superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
        for name in ROLES:
            superuser.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))


@pytest.mark.parametrize("name", ["weird-Role", 'quo"te', "with space", "%s", "ünïcode", "select", "a.b", "'"])
def test_a_login_may_have_any_name(platform: Platform, owner_dsn: str, name: str) -> None:
    with login(platform.owner, name):
        migrate.grant(owner_dsn, name)
        with psycopg.connect(owner_dsn, user=name, password=PASSWORD, autocommit=True) as app:
            migrate.check_current(app)
            for target in ROLES:
                with app.transaction():
                    app.execute("SELECT set_config('role', %s, true)", (target,))
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                app.execute("SELECT FROM companies_clean")


@pytest.mark.parametrize("attributes", ["LOGIN INHERIT", "LOGIN NOINHERIT"])
def test_a_login_inherits_nothing_whatever_its_attribute(platform: Platform, owner_dsn: str, attributes: str) -> None:
    with login(platform.owner, "heir", attributes):
        migrate.grant(owner_dsn, "heir")
        assert (
            platform.rows(
                "SELECT rolname FROM pg_roles WHERE pg_has_role('heir'::name, oid, 'USAGE') AND rolname = ANY (%s)",
                list(ROLES),
            )
            == []
        )


def test_an_inheritance_by_another_way_is_refused(platform: Platform, owner_dsn: str) -> None:
    with login(platform.owner, "go_between", "NOLOGIN INHERIT"), login(platform.owner, "heir", "LOGIN INHERIT"):
        platform.owner.execute("GRANT service_role TO go_between; GRANT go_between TO heir")
        if platform.owner.info.server_version < 160000:
            # There, the attribute of the login decides, and grant sets it.
            migrate.grant(owner_dsn, "heir")
        else:
            with pytest.raises(MigrationError, match='"heir" inherits the privileges of service_role'):
                migrate.grant(owner_dsn, "heir")


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [("LOGIN SUPERUSER", "a superuser"), ("LOGIN BYPASSRLS", "exempt from row-level security")],
)
def test_a_login_no_policy_would_bind_is_refused(
    platform: Platform, owner_dsn: str, attributes: str, reason: str
) -> None:
    with login(platform.owner, "mighty", attributes), pytest.raises(MigrationError, match=reason):
        migrate.grant(owner_dsn, "mighty")


def test_the_owner_and_the_database_roles_are_no_logins(owner_dsn: str) -> None:
    for name in ("service_role", "anon"):
        with pytest.raises(MigrationError, match="one of the database roles"):
            migrate.grant(owner_dsn, name)
    with pytest.raises(MigrationError, match='no role "nobody-here"'):
        migrate.grant(owner_dsn, "nobody-here")


def test_granting_needs_a_migrated_database(empty_dsn: str) -> None:
    with pytest.raises(MigrationError, match="not migrated"):
        migrate.grant(empty_dsn, "anybody")


def acl(conn: psycopg.Connection[Any]) -> set[tuple[str, str, str]]:
    rows = conn.execute(
        "SELECT c.oid::regclass::text, a.grantee::regrole::text, a.privilege_type"
        " FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) AS a"
        " WHERE c.relnamespace::regnamespace::text IN ('public', 'equitie_private', 'equitie_part')"
        " AND a.grantee <> c.relowner"
        " UNION ALL"
        " SELECT p.oid::regprocedure::text, a.grantee::regrole::text, a.privilege_type"
        " FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) AS a"
        " WHERE p.pronamespace = 'equitie_private'::regnamespace AND a.grantee <> p.proowner"
    )
    # What a login was granted is not the migrations' doing.
    return {row for row in rows.fetchall() if row[1] != "equitie_test_app"}


def test_default_privileges_of_a_platform_open_nothing(empty_dsn: str, platform: Platform) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as owner:
        for where in ("", "IN SCHEMA public"):
            for kind in ("TABLES", "SEQUENCES", "FUNCTIONS"):
                owner.execute(
                    f"ALTER DEFAULT PRIVILEGES {where} GRANT ALL ON {kind} TO anon, authenticated, service_role"
                )
        migrate.migrate(empty_dsn)
        owner.execute(
            "SELECT equitie_private.ensure_month_partitions('transactions_clean', '2013-01-01', '2013-01-01')"
        )
        found = acl(owner)
        assert found == acl(platform.owner)
        assert not any(grantee in {"anon", "-"} for _, grantee, _ in found)


def test_an_owner_who_is_no_superuser_adopts_and_takes_back(owned_database: tuple[str, str]) -> None:
    _, dsn = owned_database
    migrate.migrate(dsn, to=9)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute("DROP SCHEMA equitie_migrations CASCADE")
    report = migrate.baseline(dsn)
    assert report.differences == ()
    assert len(report.recorded) == 9
    migrate.down(dsn, "0009")
    assert migrate.migrate(dsn).current == ours().migrations[-1].label
    assert migrate.verify(dsn) == ()
