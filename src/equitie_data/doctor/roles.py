"""Who the login and the four database roles are, and what they have by way of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from equitie_data._sql import query
from equitie_data.doctor.findings import Finding, finding, quoted
from equitie_data.migrations.grant import DATABASE_ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

__all__ = ["check_database_roles", "check_login", "check_session_defaults"]

_ROLES: Final = {"roles": list(DATABASE_ROLES)}
_READS_STATEMENTS: Final = frozenset({"pg_read_all_stats", "pg_monitor"})
_IDENTITY: Final = ("role", "session_authorization", "session_replication_role", "row_security", "equitie.context")


def check_login(conn: Connection[Any]) -> Iterator[Finding]:
    """Yield what is wrong with the role that the application logs in as."""
    row = conn.execute(query("doctor_login")).fetchone()
    assert row is not None  # noqa: S101 - whoever asks has a role
    login, superuser, bypasses, *attributes, inherits, expires = row
    name = quoted(login)
    if login in DATABASE_ROLES:
        yield finding(
            "login-is-database-role",
            login,
            f"The application logs in as {name}, one of the four database roles.",
            "CREATE ROLE app LOGIN NOINHERIT; then `python -m equitie_data migrate grant app`.",
        )
        return
    if superuser:
        # A superuser owns, inherits and may grant everything: no more need be said.
        yield finding("login-superuser", login, f"The login {name} is a superuser.", f"ALTER ROLE {name} NOSUPERUSER;")
        return
    if bypasses:
        what = f"The login {name} bypasses row-level security."
        yield finding("login-bypasses-policies", login, what, f"ALTER ROLE {name} NOBYPASSRLS;")
    for has, attribute in zip(attributes, ("CREATEROLE", "CREATEDB", "REPLICATION"), strict=True):
        if has:
            yield finding(
                "login-attribute", login, f"The login {name} has {attribute}.", f"ALTER ROLE {name} NO{attribute};"
            )
    if expires:
        yield finding(
            "login-expires",
            login,
            f"The password of {name} expires within 14 days, or has expired.",
            f"ALTER ROLE {name} VALID UNTIL 'infinity';",
        )
    yield from _check_memberships(conn, name, inherits=inherits)
    for owner, described in conn.execute(query("doctor_ownership"), {"roles": []}):
        yield finding(
            "login-owns",
            described,
            f"The login {name} owns {described}.",
            f"REASSIGN OWNED BY {quoted(owner)} TO the_owner_of_the_schema;",
        )


def _check_memberships(conn: Connection[Any], name: str, *, inherits: bool) -> Iterator[Finding]:
    missing = set(DATABASE_ROLES)
    for role, inherited, may_set, may_grant, direct in conn.execute(query("doctor_memberships"), {}):
        other = quoted(role)
        way = "" if direct else ", by way of another role"
        if role in DATABASE_ROLES:
            if may_set or not direct:
                missing.discard(role)
            if may_grant:
                what = f"The login {name} may grant {other} to others."
                yield finding("login-may-grant", role, what, f"REVOKE ADMIN OPTION FOR {other} FROM {name};")
            if inherited:
                fix = f"GRANT {other} TO {name} WITH INHERIT FALSE, SET TRUE;"
                if conn.info.server_version < 160000:
                    fix = f"ALTER ROLE {name} NOINHERIT;"
                yield finding("login-inherits", role, f"The login {name} inherits the rights of {other}{way}.", fix)
        else:
            verb = "inherits" if inherited and inherits else "is a member of"
            yield finding(
                "login-membership-extra", role, f"The login {name} {verb} {other}{way}.", f"REVOKE {other} FROM {name};"
            )
    for role in sorted(missing):
        yield finding(
            "login-membership-missing",
            role,
            f"The login {name} may not SET ROLE {quoted(role)}.",
            f"python -m equitie_data migrate grant {name}",
        )


def check_database_roles(conn: Connection[Any]) -> Iterator[Finding]:
    """Yield what is wrong with the roles that transactions run as."""
    for role, can_login, attributes, bypasses, member_of in conn.execute(query("doctor_database_roles"), _ROLES):
        name = quoted(role)
        if can_login:
            yield finding("role-can-login", role, f"{name} can log in.", f"ALTER ROLE {name} NOLOGIN;")
        if attributes:
            yield finding(
                "role-attribute",
                role,
                f"{name} is a superuser, or may make roles or databases, or replicate.",
                f"ALTER ROLE {name} NOSUPERUSER NOCREATEROLE NOCREATEDB NOREPLICATION;",
            )
        if bypasses and role != "service_role":
            what = f"{name} bypasses row-level security."
            yield finding("role-bypasses-policies", role, what, f"ALTER ROLE {name} NOBYPASSRLS;")
        for other in member_of:
            code = "statements-visible" if other in _READS_STATEMENTS else "role-member"
            what = f"{name} is a member of {quoted(other)}."
            yield finding(code, f"{role} in {other}", what, f"REVOKE {quoted(other)} FROM {name};")
    login = conn.execute("SELECT session_user::text").fetchone()
    for owner, described in conn.execute(query("doctor_ownership"), _ROLES):
        if login is not None and owner != login[0]:
            yield finding(
                "role-owns",
                described,
                f"{quoted(owner)} owns {described}.",
                f"REASSIGN OWNED BY {quoted(owner)} TO the_owner_of_the_schema;",
            )


def check_session_defaults(conn: Connection[Any]) -> Iterator[Finding]:
    """Yield settings that give a session an identity before anybody acts."""
    for role, database, name in conn.execute(query("doctor_role_settings"), {}):
        if name in _IDENTITY or name.startswith("request.jwt.claim"):
            target = f"ROLE {quoted(role)}" if role else "ROLE ALL"
            where = f" IN DATABASE {quoted(database)}" if database and role else ""
            if database and not role:
                target = f"DATABASE {quoted(database)}"
            yield finding(
                "session-default",
                name,
                f"Sessions of {target}{where} begin with a value for {name}.",
                f"ALTER {target}{where} RESET {'.'.join(map(quoted, name.split('.')))};",
            )
