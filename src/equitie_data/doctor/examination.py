"""One check of a deployment, from the application's login and deeper from the owner's."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from psycopg import errors

from equitie_data.connect import connect, target_of
from equitie_data.credentials import with_password
from equitie_data.doctor.baseline import check_baseline
from equitie_data.doctor.findings import Finding, Report, Severity, finding
from equitie_data.doctor.objects import check_objects
from equitie_data.doctor.roles import check_database_roles, check_login, check_session_defaults
from equitie_data.doctor.server import Link, check_link, check_passwords, check_server, check_timeouts, server_settings
from equitie_data.errors import ChecksumDriftError, HistoryTooNewError, MigrationError, NotMigratedError
from equitie_data.migrate import check_current, verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from equitie_data.settings import Settings

__all__ = ["examine"]

_SYSTEM = "SELECT c.system_identifier::text, pg_catalog.pg_is_in_recovery() FROM pg_catalog.pg_control_system() AS c"
_RANK = list(Severity)
_UNFIT = frozenset({"login-superuser", "login-is-database-role"})


def examine(settings: Settings, owner_dsn: str | None = None) -> Report:
    """Check a deployment. Changes nothing.

    Args:
        settings: How the application connects, its replicas included.
        owner_dsn: The database as its owner, or as a superuser, to look deeper.

    Raises:
        UnavailableError: The primary cannot be reached, or not with the owner's connection string.
    """
    found: list[Finding] = []
    skipped: list[str] = []
    with _session(settings.dsn, settings) as conn:
        login = conn.info.user
        system = conn.execute(_SYSTEM).fetchone()
        found += check_login(conn)
        # Who is a superuser has privileges without having been granted any.
        unfit = any(each.code in _UNFIT for each in found)
        found += check_database_roles(conn)
        found += check_session_defaults(conn)
        stale = list(_check_migrations(conn))
        found += stale
        if stale:
            skipped.append("policies, privileges and functions: the schema is not this release's")
        else:
            found += check_baseline(conn, None if unfit else login)
        found += check_objects(conn)
        found += _check_node(conn, settings.dsn, timeouts=True)
    for replica in settings.replicas:
        with _session(replica.dsn, settings) as conn:
            found += _check_node(conn, replica.dsn, timeouts=False)
            found += _check_replica(conn, replica.dsn, None if system is None else system[0])
    if owner_dsn is None:
        skipped.append("audit triggers and partitions: give the owner's connection string with --owner-dsn")
    else:
        found += _as_owner(owner_dsn, login, skipped)
    ordered = sorted(set(found), key=lambda each: (_RANK.index(each.severity), each.code, each.subject))
    return Report(target=target_of(settings.dsn), findings=tuple(ordered), skipped=tuple(skipped))


@contextlib.contextmanager
def _session(dsn: str, settings: Settings) -> Iterator[Connection[Any]]:
    """Connect as the pool does, for one transaction that cannot write and sees names written in full."""
    parameters = {**settings.connection_parameters(), "application_name": "equitie_data.doctor"}
    with connect(with_password(dsn, settings.password), **parameters) as conn, conn.transaction():
        conn.execute("SET TRANSACTION READ ONLY")
        conn.execute("SELECT pg_catalog.set_config('search_path', '', true)")
        yield conn


def _check_migrations(conn: Connection[Any]) -> Iterator[Finding]:
    try:
        with conn.transaction():
            check_current(conn)
    except (NotMigratedError, HistoryTooNewError, ChecksumDriftError) as error:
        yield finding("migrations", "migrations", str(error), "python -m equitie_data migrate")
    except errors.InsufficientPrivilege:
        what = "The login may not read the history of migrations."
        yield finding("migrations", "migrations", what, "python -m equitie_data migrate grant ROLE")


def _check_node(conn: Connection[Any], dsn: str, *, timeouts: bool) -> Iterator[Finding]:
    link = Link.of(conn, dsn)
    settings = server_settings(conn)
    host = f"{link.host}:{conn.info.port}"
    yield from check_link(link)
    yield from check_server(settings, host)
    if timeouts:
        yield from check_timeouts(settings)


def _check_replica(conn: Connection[Any], dsn: str, system: str | None) -> Iterator[Finding]:
    row = conn.execute(_SYSTEM).fetchone()
    target = target_of(dsn).rpartition("@")[2]
    fix = "Take it out of READ_REPLICA_URLS, or name a standby of the primary there."
    if row is None or row[0] != system:
        yield finding("replica-differs", target, f"{target} is no copy of the primary.", fix)
    elif not row[1]:
        yield finding("replica-differs", target, f"{target} is no standby: it takes writes.", fix)


def _as_owner(dsn: str, login: str, skipped: list[str]) -> Iterator[Finding]:
    try:
        for problem in verify(dsn):
            yield finding("altered", problem, problem, "python -m equitie_data migrate verify")
    except MigrationError as error:
        skipped.append(f"audit triggers and partitions: {error}")
    with connect(dsn, application_name="equitie_data.doctor") as conn:
        try:
            with conn.transaction():
                conn.execute("SET TRANSACTION READ ONLY")
                yield from check_passwords(conn, login, f"{conn.info.host}:{conn.info.port}")
        except errors.InsufficientPrivilege:
            skipped.append("kept passwords and host rules: only a superuser may look")
