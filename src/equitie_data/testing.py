"""A pytest plugin for suites of applications that embed the library: a real, migrated PostgreSQL for every test.

Switch it on with `pytest_plugins = ["equitie_data.testing"]` in the top-level `conftest.py`, or with
`-p equitie_data.testing`. It needs the extra `testing`. Per test process (so per worker of pytest-xdist) it starts one
embedded server and migrates one template database; a test then gets its own copy of it, made in milliseconds.

The fixtures, all of which a suite may override:

- `equitie_server` (session): the running `EmbeddedServer`.
- `equitie_load` (session): what fills the template; override it to add seed data to the migrated database.
- `equitie_noproc` (session): the template as an executor of pytest-postgresql, for `factories.postgresql`.
- `equitie_empty_dsn`: a fresh empty database, as its owner.
- `equitie_owner_dsn`: a fresh copy of the template, as its owner.
- `equitie_dsn`: the same copy, as the application's login role.
- `equitie_database`: an open `Database` on `equitie_dsn`.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from pytest_postgresql.executors import NoopExecutor
from pytest_postgresql.janitor import DatabaseJanitor

from equitie_data.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from equitie_data import Database

__all__ = ["APP_ROLE", "DatabaseTemplate", "fresh_database"]

APP_ROLE = "equitie_test_app"
"""The login role tests act under: it inherits nothing, as `python -m equitie_data.migrate grant` demands."""


class DatabaseTemplate:
    """A loaded template database on a running server, and the copies made of it.

    Args:
        server: A running server.
        load: Fills the template, given its owner's DSN and the name of the login role, which exists already.
    """

    def __init__(self, server: EmbeddedServer, load: Callable[[str, str], None]) -> None:
        self._server = server
        self._app_password = secrets.token_urlsafe(16)
        self.executor = _executor(server)
        self._janitor = _janitor(server, self.executor.template_dbname, as_template=True)
        self._load = load

    @contextlib.contextmanager
    def loaded(self) -> Iterator[DatabaseTemplate]:
        """Keep the template in existence for the length of a `with` block."""
        with psycopg.connect(self._server.dsn(), autocommit=True) as connection:
            _create_login(connection, self._app_password)
        with self._janitor:
            self._load(self._server.dsn(self.executor.template_dbname), APP_ROLE)
            yield self

    @contextlib.contextmanager
    def copy(self) -> Iterator[str]:
        """Make a copy for the length of a `with` block, and yield its name."""
        with fresh_database(self._server, template=self.executor.template_dbname) as name:
            yield name

    def app_dsn(self, dbname: str) -> str:
        """Write the DSN of a copy for the login role."""
        return self._server.dsn(dbname, APP_ROLE, self._app_password)


@contextlib.contextmanager
def fresh_database(server: EmbeddedServer, template: str | None = None) -> Iterator[str]:
    """Create a database for the length of a `with` block; connections that are left at its end are terminated.

    Args:
        server: A running server.
        template: The database to copy; PostgreSQL's own template when None.

    Yields:
        The database's name.
    """
    name = f"test_{secrets.token_hex(6)}"
    with _janitor(server, name, template=template):
        yield name
        _disconnect_everybody(server, name)


@pytest.fixture(scope="session")
def equitie_server() -> Iterator[EmbeddedServer]:
    """A running server; override it to choose its settings or its version."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture(scope="session")
def equitie_load() -> Callable[[str, str], None]:
    """Fill the template database; override it to add rows that every test finds."""
    from equitie_data import migrate  # noqa: PLC0415 - a suite that overrides this fixture needs no migrations

    def load(owner_dsn: str, app_role: str) -> None:
        migrate.migrate(owner_dsn)
        migrate.grant(owner_dsn, app_role)

    return load


@pytest.fixture(scope="session")
def equitie_template(
    equitie_server: EmbeddedServer, equitie_load: Callable[[str, str], None]
) -> Iterator[DatabaseTemplate]:
    """The template database, loaded once per session."""
    with DatabaseTemplate(equitie_server, equitie_load).loaded() as template:
        yield template


@pytest.fixture(scope="session")
def equitie_noproc(equitie_template: DatabaseTemplate) -> NoopExecutor:
    """The template for pytest-postgresql: what `factories.postgresql("equitie_noproc")` makes connects to a copy."""
    return equitie_template.executor


@pytest.fixture
def equitie_empty_dsn(equitie_server: EmbeddedServer) -> Iterator[str]:
    """The owner's DSN of a fresh empty database, for tests of migrations."""
    with fresh_database(equitie_server) as name:
        yield equitie_server.dsn(name)


@pytest.fixture
def equitie_owner_dsn(equitie_server: EmbeddedServer, equitie_template: DatabaseTemplate) -> Iterator[str]:
    """The DSN of a fresh copy of the template, as the database's owner."""
    with equitie_template.copy() as name:
        yield equitie_server.dsn(name)


@pytest.fixture
def equitie_dsn(equitie_owner_dsn: str, equitie_template: DatabaseTemplate) -> str:
    """The DSN of the same copy, as the application's login role."""
    return equitie_template.app_dsn(str(conninfo_to_dict(equitie_owner_dsn)["dbname"]))


@pytest.fixture
def equitie_database(equitie_dsn: str) -> Iterator[Database]:
    """An open `Database` on the copy, closed after the test."""
    from equitie_data import Database  # noqa: PLC0415 - only who uses this fixture pays for the import

    with Database(equitie_dsn) as database:
        yield database


def _executor(server: EmbeddedServer) -> NoopExecutor:
    login = conninfo_to_dict(server.dsn())
    return NoopExecutor(
        host="127.0.0.1",
        port=server.port,
        user=str(login["user"]),
        password=str(login["password"]),
        options="",
        dbname="equitie_tests",
    )


def _janitor(
    server: EmbeddedServer, dbname: str, *, template: str | None = None, as_template: bool = False
) -> DatabaseJanitor:
    login = _executor(server)
    return DatabaseJanitor(
        user=login.user,
        host=login.host,
        port=login.port,
        password=login.password,
        dbname=dbname,
        template_dbname=template,
        as_template=as_template,
    )


def _disconnect_everybody(server: EmbeddedServer, dbname: str) -> None:
    # DROP DATABASE sleeps for 100 ms when it meets a backend that is still on its way out (procarray.c,
    # CountOtherDBBackends), which would be most of what a copy costs.
    statement = "SELECT count(pg_terminate_backend(pid)) FROM pg_catalog.pg_stat_activity WHERE datname = %s"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        for _ in range(1_000):
            if connection.execute(statement, [dbname]).fetchone() == (0,):
                return
            time.sleep(0.001)


def _create_login(connection: psycopg.Connection, password: str) -> None:
    role = sql.Identifier(APP_ROLE)
    if connection.execute("SELECT FROM pg_catalog.pg_roles WHERE rolname = %s", [APP_ROLE]).fetchone() is None:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN NOINHERIT").format(role))
    connection.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(password)))
