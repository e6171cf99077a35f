"""The pytest plugin in a suite of its own, run as its users run it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from equitie_data import as_service

if TYPE_CHECKING:
    from equitie_data import Database

SUITE = """
    import re
    import psycopg
    import pytest
    from pytest_postgresql import factories

    pytest_plugins = ["equitie_data.testing"]

    @pytest.fixture(scope="session")
    def equitie_load():
        def load(owner_dsn, app_role):
            with psycopg.connect(owner_dsn) as connection:
                connection.execute("CREATE TABLE seed AS SELECT 1 AS id")
                connection.execute(f"GRANT SELECT, INSERT ON seed TO {app_role}")
        return load

    postgresql = factories.postgresql("equitie_noproc")
"""


@pytest.fixture(autouse=True)
def suite(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(SUITE)
    # Only what the plugin brings: no ordering, no other plugin's report.
    pytester.makeini("[pytest]\naddopts = -p no:randomly\nfilterwarnings = error\n")


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-s", *arguments, timeout=100)


def test_every_test_gets_a_clean_copy(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import psycopg, pytest

        @pytest.mark.parametrize("attempt", range(3))
        def test_clean(equitie_owner_dsn, attempt):
            with psycopg.connect(equitie_owner_dsn) as connection:
                assert connection.execute("SELECT id FROM seed").fetchall() == [(1,)]
                connection.execute("INSERT INTO seed VALUES (2)")
                connection.execute("CREATE TABLE litter (id int)")

        def test_empty(equitie_empty_dsn):
            with psycopg.connect(equitie_empty_dsn) as connection:
                assert connection.execute("SELECT to_regclass('seed')").fetchone() == (None,)
    """)
    run(pytester).assert_outcomes(passed=4)


def test_the_login_role_owns_and_inherits_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import psycopg, pytest
        from equitie_data.testing import APP_ROLE

        def test_login(equitie_dsn, equitie_owner_dsn):
            with psycopg.connect(equitie_dsn) as app, psycopg.connect(equitie_owner_dsn) as owner:
                assert app.info.dbname == owner.info.dbname
                assert app.info.user == APP_ROLE
                assert app.execute("SELECT id FROM seed").fetchall() == [(1,)]
                attributes = "rolsuper, rolinherit, rolcreatedb, rolcreaterole, rolbypassrls, rolreplication"
                row = owner.execute(f"SELECT {attributes} FROM pg_roles WHERE rolname = %s", [APP_ROLE]).fetchone()
                assert not any(row)
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    app.execute("DROP TABLE seed")
    """)
    run(pytester).assert_outcomes(passed=1)


def test_connections_a_test_forgot_do_not_hinder_the_next(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import psycopg, pytest
        forgotten = []

        @pytest.mark.parametrize("attempt", range(2))
        def test_forgetful(equitie_owner_dsn, equitie_empty_dsn, attempt):
            for dsn in (equitie_owner_dsn, equitie_empty_dsn):
                forgotten.append(psycopg.connect(dsn))
                forgotten[-1].execute("SELECT 1")

        def test_databases_are_dropped(equitie_server):
            with psycopg.connect(equitie_server.dsn()) as connection:
                names = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'test\\\\_%'").fetchall()
            for connection in forgotten:
                connection.close()
            assert names == []
    """)
    run(pytester).assert_outcomes(passed=3)


def test_pytest_postgresql_builds_on_the_template(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_connection(postgresql):
            assert postgresql.execute("SELECT id FROM seed").fetchall() == [(1,)]
            postgresql.execute("DELETE FROM seed")
            postgresql.commit()

        def test_connection_again(postgresql):
            assert postgresql.execute("SELECT id FROM seed").fetchall() == [(1,)]
    """)
    run(pytester).assert_outcomes(passed=2)


def test_the_server_ends_with_the_run_and_its_password_is_not_printed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_failing(equitie_owner_dsn, equitie_server):
            print("DIRECTORY", equitie_server.data_dir)
            print("PASSWORD", equitie_server.dsn().split(":")[2].split("@")[0])
            assert equitie_owner_dsn == equitie_server
    """)
    result = run(pytester, "--showlocals")
    result.assert_outcomes(failed=1)
    output = result.stdout.str()
    [directory] = re.findall(r"DIRECTORY (.*)", output)
    [password] = re.findall(r"PASSWORD (.*)", output)
    assert output.count(password) == 1
    assert not Path(directory).exists()


def test_a_load_that_fails_is_reported_and_leaves_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.fixture(scope="session")
        def equitie_load():
            def load(owner_dsn, app_role):
                raise LookupError("no seed")
            return load

        def test_one(equitie_dsn): ...
        def test_other(equitie_dsn): ...
    """)
    result = run(pytester)
    result.assert_outcomes(errors=2)
    assert "no seed" in result.stdout.str()


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_workers_do_not_clash(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import psycopg, pytest

        @pytest.mark.parametrize("attempt", range(8))
        def test_clean(equitie_owner_dsn, attempt):
            with psycopg.connect(equitie_owner_dsn) as connection:
                connection.execute("CREATE TABLE litter (id int)")
    """)
    run(pytester, "-n", "2").assert_outcomes(passed=8)


def test_the_extras_modules_are_imported_by_the_plugin_only(pytester: pytest.Pytester) -> None:
    script = pytester.makepyfile(
        probe="""
        import sys
        import equitie_data, equitie_data.embedded
        assert not [name for name in sys.modules if name.startswith(("pytest", "_pytest"))]
        """
    )
    assert pytester.run(sys.executable, script).ret == 0


def test_a_migrated_database_is_open_as_the_login_role(app_dsn: str, owner_dsn: str) -> None:
    with psycopg.connect(app_dsn) as app, psycopg.connect(owner_dsn) as owner:
        assert app.info.dbname == owner.info.dbname
        assert owner.execute("SELECT to_regclass('public.transactions_clean')").fetchone() != (None,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute("DROP TABLE public.transactions_clean")


def test_an_open_database_acts_as_the_login_role(database: Database) -> None:
    with as_service("a test of the plugin"):
        assert database.execute_read("SELECT session_user::text") == [("equitie_test_app",)]
