"""A platform database on a server of our own: migrated, with a login role for the application."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from psycopg import sql

from equitie_data.connect import connect
from equitie_data.migrate import grant, migrate

if TYPE_CHECKING:
    from equitie_data.embedded import EmbeddedServer

__all__ = ["APPLICATION_ROLE", "DATABASE", "provision"]

APPLICATION_ROLE = "equitie_app"
DATABASE = "equitie"


def provision(server: EmbeddedServer, dbname: str = DATABASE) -> str:
    """Bring a database on the server to the current schema, creating it where it is missing.

    Args:
        server: A running server.
        dbname: The database's name.

    Returns:
        The DSN of the application's login role, whose password is new every time.
    """
    password = secrets.token_urlsafe(24)
    with connect(server.dsn()) as connection:
        exists = "SELECT 1 FROM pg_catalog.pg_database WHERE datname = %s"
        if connection.execute(exists, [dbname]).fetchone() is None:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(dbname)))
        role = sql.Identifier(APPLICATION_ROLE)
        exists = "SELECT 1 FROM pg_catalog.pg_roles WHERE rolname = %s"
        verb = "CREATE" if connection.execute(exists, [APPLICATION_ROLE]).fetchone() is None else "ALTER"
        connection.execute(
            sql.SQL("{} ROLE {} LOGIN NOINHERIT PASSWORD {}").format(sql.SQL(verb), role, sql.Literal(password))
        )
    owner_dsn = server.dsn(dbname)
    migrate(owner_dsn)
    grant(owner_dsn, APPLICATION_ROLE)
    return server.dsn(dbname, user=APPLICATION_ROLE, password=password)
