"""What the application's login role gets: the right to become the database roles, and nothing of its own."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from equitie_data.errors import MigrationError

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["DATABASE_ROLES", "grant_login"]

DATABASE_ROLES = ("anon", "authenticated", "equitie_staff", "service_role")

_LOGIN_FUNCTIONS = (
    "equitie_private.database_role(uuid)",
    "equitie_private.claim_idempotency_key(text, text, text)",
    "equitie_private.store_idempotent_result(text, text)",
    "equitie_private.idempotent_result(text, text)",
)
_FIRST_VERSION_WITH_GRANT_OPTIONS = 160000
_ATTEMPTS = 5


def grant_login(conn: Connection[Any], role: str) -> None:
    """Grant a login role what the library's transactions need; see `equitie_data.migrate.grant`."""
    _refuse_unfit(conn, role)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with conn.transaction():
                _grant_memberships(conn, role)
                _grant_objects(conn, role)
                _refuse_inheritance(conn, role)
        except psycopg.errors.InsufficientPrivilege as error:
            raise MigrationError(
                f'The owner may not grant this to "{role}": {error.diag.message_primary}. Have a superuser run'
                f" `GRANT {', '.join(DATABASE_ROLES)} TO {_quoted(conn, role)}` or give the owner their ADMIN OPTION."
            ) from None
        except psycopg.errors.InternalError_ as error:
            # Roles belong to the whole cluster: grants of two databases at once can meet in one catalogue row, which
            # PostgreSQL reports as XX000 "tuple concurrently updated" rather than waiting.
            if attempt == _ATTEMPTS or "concurrently" not in (error.diag.message_primary or ""):
                raise
            time.sleep(random.uniform(0.05, 0.2) * attempt)  # noqa: S311 - jitter
        else:
            return


def _quoted(conn: Connection[Any], role: str) -> str:
    return sql.Identifier(role).as_string(conn)


def _refuse_unfit(conn: Connection[Any], role: str) -> None:
    if role in DATABASE_ROLES:
        raise MigrationError(f'"{role}" is one of the database roles: name the login role of the application.')
    if conn.execute("SELECT to_regprocedure('equitie_private.database_role(uuid)')").fetchone() == (None,):
        raise MigrationError("The database is not migrated: run `python -m equitie_data.migrate` first.")
    found = conn.execute(
        "SELECT r.rolsuper, r.rolbypassrls, r.oid = ("
        "  SELECT c.relowner FROM pg_catalog.pg_class AS c WHERE c.oid = 'public.transactions_clean'::regclass"
        ") FROM pg_catalog.pg_roles AS r WHERE r.rolname = %s",
        (role,),
    ).fetchone()
    if found is None:
        raise MigrationError(
            f'There is no role "{role}": create it with `CREATE ROLE {_quoted(conn, role)} LOGIN NOINHERIT` and a'
            " password."
        )
    superuser, bypasses, owner = found
    if superuser or bypasses or owner:
        exempt = "exempt from row-level security"
        what = "a superuser" if superuser else exempt if bypasses else "the owner of the tables"
        raise MigrationError(
            f'"{role}" is {what}, so no policy would bind it: let the application log in as a role of its own.'
        )


def _grant_memberships(conn: Connection[Any], role: str) -> None:
    login = sql.Identifier(role)
    if conn.info.server_version >= _FIRST_VERSION_WITH_GRANT_OPTIONS:
        missing = [
            row[0]
            for row in conn.execute(
                "SELECT r.rolname FROM pg_catalog.pg_roles AS r WHERE r.rolname = ANY (%s) AND NOT EXISTS ("
                "  SELECT FROM pg_catalog.pg_auth_members AS m"
                "  WHERE m.roleid = r.oid AND m.member = %s::regrole AND m.set_option AND NOT m.inherit_option"
                ")",
                (list(DATABASE_ROLES), _quoted(conn, role)),
            )
        ]
        # Without inheritance, whatever the role's own attribute says: a statement outside a transaction of the
        # library must not get anything.
        for name in missing:
            conn.execute(sql.SQL("GRANT {} TO {} WITH INHERIT FALSE, SET TRUE").format(sql.Identifier(name), login))
        return
    if conn.execute("SELECT rolinherit FROM pg_catalog.pg_roles WHERE rolname = %s", (role,)).fetchone() == (True,):
        conn.execute(sql.SQL("ALTER ROLE {} NOINHERIT").format(login))
    for name in DATABASE_ROLES:
        if (
            conn.execute(
                "SELECT FROM pg_catalog.pg_auth_members WHERE roleid = %s::regrole AND member = %s::regrole",
                (name, _quoted(conn, role)),
            ).fetchone()
            is None
        ):
            conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(name), login))


def _refuse_inheritance(conn: Connection[Any], role: str) -> None:
    # A membership somebody else granted, or one by way of another role, may still hand privileges on.
    inherited = [
        row[0]
        for row in conn.execute(
            "SELECT r.rolname FROM pg_catalog.pg_roles AS r"
            " WHERE r.rolname = ANY (%s) AND pg_has_role(%s::name, r.oid, 'USAGE') ORDER BY 1",
            (list(DATABASE_ROLES), role),
        )
    ]
    if inherited:
        raise MigrationError(
            f'"{role}" inherits the privileges of {", ".join(inherited)}, so its statements could run as nobody in'
            " particular: revoke that membership where it was granted, then grant again."
        )


def _grant_objects(conn: Connection[Any], role: str) -> None:
    login = sql.Identifier(role)
    conn.execute(sql.SQL("GRANT USAGE ON SCHEMA equitie_private, equitie_migrations TO {}").format(login))
    conn.execute(sql.SQL("GRANT SELECT ON equitie_migrations.history TO {}").format(login))
    for function in _LOGIN_FUNCTIONS:
        conn.execute(sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(sql.SQL(function), login))
    if conn.execute("SELECT has_database_privilege(%s, current_database(), 'CONNECT')", (role,)).fetchone() == (False,):
        conn.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(sql.Identifier(conn.info.dbname), login))
