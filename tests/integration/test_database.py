"""Opening, verifying and closing a database; the default database; what bad input says."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import equitie_data
from equitie_data import Database, Settings, UnavailableError, as_service
from equitie_data.errors import ConfigurationError, HistoryTooNewError, NotMigratedError

if TYPE_CHECKING:
    from collections.abc import Iterator


def changed(dsn: str, **parts: object) -> str:
    return make_conninfo("", **{**conninfo_to_dict(dsn), **parts})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"password": "wr0ng-s3cret"}, "the password or the user is wrong"),
        ({"port": 1}, "nothing listens there"),
        ({"dbname": "nowhere"}, "the database or the role does not exist"),
        ({"host": "no-such-host.invalid"}, "the host name cannot be resolved"),
    ],
)
def test_an_unreachable_database_says_why_in_one_sentence(app_dsn: str, parts: dict[str, object], message: str) -> None:
    with pytest.raises(UnavailableError, match=message) as caught, Database(changed(app_dsn, **parts)):
        pass
    text = str(caught.value)
    assert "\n" not in text
    assert str(conninfo_to_dict(app_dsn)["password"]) not in text
    assert "s3cret" not in text
    assert isinstance(caught.value, psycopg.OperationalError)


def test_a_database_that_is_not_migrated_says_how_to(empty_dsn: str) -> None:
    with pytest.raises(NotMigratedError, match=r"python -m equitie_data\.migrate"), Database(empty_dsn):
        pass


def test_a_newer_history_is_refused(app_dsn: str, owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn) as owner:
        copied = "sha256, state, started_at, finished_at, duration_ms, applied_by, server_version, package_version"
        owner.execute(
            f"INSERT INTO equitie_migrations.history (version, name, compatible_since, {copied}) "
            f"SELECT 9999, 'from_the_future', 9999, {copied} FROM equitie_migrations.history "
            "ORDER BY version DESC LIMIT 1"
        )
    with pytest.raises(HistoryTooNewError), Database(app_dsn):
        pass


def test_a_login_role_without_the_grant_says_what_is_missing(owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("DROP ROLE IF EXISTS equitie_stranger")
        owner.execute("CREATE ROLE equitie_stranger LOGIN PASSWORD 'x'")
        try:
            with (
                pytest.raises((NotMigratedError, ConfigurationError), match=r"grant|migrate"),
                Database(changed(owner_dsn, user="equitie_stranger", password="x")) as database,
                as_service("test"),
            ):
                database.execute_read("SELECT 1")
        finally:
            owner.execute("DROP ROLE equitie_stranger")


def test_an_embedded_database_is_migrated_kept_and_least_privileged() -> None:
    # Not pytest's tmp_path: as root the server runs under another account, which may not enter it.
    directory = Path(tempfile.mkdtemp(prefix="equitie-kept-"))
    directory.chmod(0o711)
    with Database.embedded(directory / "data") as database, as_service("test"):
        assert database.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('kept')") == 1
        rights = database.execute_read(
            "SELECT rolsuper, rolinherit, rolbypassrls, rolcreaterole FROM pg_roles WHERE rolname = session_user"
        )
        assert rights == [(False, False, False, False)]
        assert "***" in repr(database.settings)
        assert str(conninfo_to_dict(database.settings.dsn)["password"]) not in repr(database.settings) + repr(database)
    with Database.embedded(directory / "data") as database, as_service("test"):
        assert database.execute_read("SELECT company_name FROM public.companies_clean") == [("kept",)]


@pytest.fixture
def default_database(app_dsn: str) -> Iterator[Database]:
    database = equitie_data.configure(Settings(dsn=app_dsn, max_size=3))
    yield database
    database.close()


def test_module_level_functions_use_the_default_database(default_database: Database) -> None:
    assert equitie_data.get_database() is default_database
    assert equitie_data.get_connection_pool() is default_database.pool
    assert equitie_data.get_audit_logger() is default_database.audit
    assert equitie_data.get_performance_monitor() is default_database.monitor
    with as_service("test"):
        assert equitie_data.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('x')") == 1
        assert equitie_data.execute_read("SELECT company_name FROM public.companies_clean") == [("x",)]


def test_the_default_database_comes_from_the_environment_on_first_use(app_dsn: str) -> None:
    code = (
        "import equitie_data as e\n"
        "with e.as_service('test'): print(e.execute_read('SELECT 40 + %s', [2]))\n"
        "print(e.get_database().settings.max_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"DATABASE_URL": app_dsn, "EQUITIE_MAX_SIZE": "2", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[(42,)]\n2\n", "")


def test_closing_twice_and_opening_twice_are_harmless(app_dsn: str) -> None:
    database = Database(app_dsn)
    with as_service("test"):
        for _ in range(2):
            database.open()
            database.open()
            assert database.execute_read("SELECT 1") == [(1,)]
            database.close()
            database.close()


def test_wrong_types_are_refused_at_the_door() -> None:
    with pytest.raises(ConfigurationError, match="connection string or Settings"):
        Database(42)  # type: ignore[arg-type]
