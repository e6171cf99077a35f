"""How the application reaches its servers, and what these write down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg.conninfo import conninfo_to_dict

from equitie_data._sql import query
from equitie_data.doctor.findings import Finding, finding, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from psycopg import Connection

__all__ = ["Link", "check_link", "check_passwords", "check_server", "check_timeouts", "server_settings"]

_OLDEST: Final = 150000
_OLD_TLS: Final = frozenset({"TLSv1", "TLSv1.0", "TLSv1.1"})
_SETTINGS: Final = (
    "auto_explain.log_min_duration idle_in_transaction_session_timeout log_error_verbosity log_min_duration_sample"
    " log_min_duration_statement log_min_messages log_parameter_max_length log_parameter_max_length_on_error"
    " log_statement log_transaction_sample_rate password_encryption pgaudit.log pgaudit.log_parameter"
    " server_version_num ssl ssl_min_protocol_version statement_timeout"
).split()


@attrs.frozen(kw_only=True)
class Link:
    """The way to a server.

    Attributes:
        host: Where it leads.
        local: Whether it never leaves the machine.
        encrypted: Whether it is TLS.
        sslmode: What the client demands of the server.
    """

    host: str
    local: bool
    encrypted: bool
    sslmode: str

    @classmethod
    def of(cls, conn: Connection[Any], dsn: str) -> Link:
        """Describe the way a connection takes."""
        parts = conninfo_to_dict(dsn)
        # The address counts, and not the name: a name can be somebody else's tomorrow.
        address = conn.info.hostaddr
        options = {option.keyword: option.val for option in conn.pgconn.info}
        sslmode = options.get(b"sslmode") or b"prefer"
        return cls(
            host=str(parts.get("host") or parts.get("hostaddr") or conn.info.host),
            local=conn.info.host.startswith("/") or not address or address == "::1" or address.startswith("127."),
            encrypted=bool(conn.pgconn.ssl_in_use),
            sslmode=sslmode.decode(),
        )


def check_link(link: Link) -> Iterator[Finding]:
    """Yield what is wrong with the way to a server."""
    if link.local:
        return
    fix = "Add sslmode=verify-full and sslrootcert=FILE to the connection string."
    if not link.encrypted:
        yield finding("tls-off", link.host, f"The connection to {link.host} is not encrypted.", fix)
    elif link.sslmode != "verify-full":
        what = f"The connection to {link.host} is encrypted, but sslmode={link.sslmode} does not verify the server."
        yield finding("tls-not-verified", link.host, what, fix)


def server_settings(conn: Connection[Any]) -> dict[str, str]:
    """Return the settings that the checks look at, as far as the server has them."""
    return dict(conn.execute(query("doctor_settings"), {"names": _SETTINGS}).fetchall())


def check_server(settings: Mapping[str, str], host: str) -> Iterator[Finding]:
    """Yield what is wrong with a server's settings."""
    if int(settings.get("server_version_num", _OLDEST)) < _OLDEST:
        major = int(settings["server_version_num"]) // 10_000
        yield finding("server-too-old", host, f"{host} is PostgreSQL {major}.", "Upgrade the server.")
    if settings.get("ssl") == "on" and settings.get("ssl_min_protocol_version") in _OLD_TLS:
        version = settings["ssl_min_protocol_version"]
        what = f"{host} takes connections with {version}."
        yield finding("tls-old", host, what, "ALTER SYSTEM SET ssl_min_protocol_version = 'TLSv1.2';")
    if settings.get("password_encryption", "scram-sha-256") != "scram-sha-256":
        what = f"{host} keeps new passwords as {settings['password_encryption']}."
        fix = "ALTER SYSTEM SET password_encryption = 'scram-sha-256';"
        yield finding("password-encryption", host, what, fix)
    yield from _check_log(settings, host)


def _check_log(settings: Mapping[str, str], host: str) -> Iterator[Finding]:
    def at_least(name: str, limit: int) -> bool:
        return int(settings.get(name, "-1")) >= limit

    logs_statements = (
        settings.get("log_statement") in ("mod", "all")
        or at_least("log_min_duration_statement", 0)
        or at_least("log_min_duration_sample", 0)
        or float(settings.get("log_transaction_sample_rate", "0")) > 0
    )
    if logs_statements and settings.get("log_parameter_max_length", "0") != "0":
        what = f"{host} writes the statements it logs with their parameters."
        yield finding("log-parameters", host, what, "ALTER SYSTEM SET log_parameter_max_length = 0;")
    if settings.get("log_parameter_max_length_on_error", "0") != "0":
        what = f"{host} writes the parameters of statements that fail into its log."
        yield finding("log-parameters", host, what, "ALTER SYSTEM SET log_parameter_max_length_on_error = 0;")
    if settings.get("pgaudit.log_parameter") == "on" and settings.get("pgaudit.log", "none") != "none":
        what = f"{host} writes the parameters of audited statements into its log."
        yield finding("log-parameters", host, what, "ALTER SYSTEM SET pgaudit.log_parameter = off;")
    if at_least("auto_explain.log_min_duration", 0):
        what = f"{host} writes the plans of slow statements into its log."
        yield finding("log-plans", host, what, "ALTER SYSTEM SET auto_explain.log_min_duration = -1;")
    logs_errors = settings.get("log_min_messages", "warning") not in ("log", "fatal", "panic")
    if logs_errors and settings.get("log_error_verbosity", "terse") != "terse":
        what = f"{host} writes the details of errors into its log."
        yield finding("log-details", host, what, "ALTER SYSTEM SET log_error_verbosity = 'terse';")


def check_timeouts(settings: Mapping[str, str]) -> Iterator[Finding]:
    """Yield limits that the application's sessions lack, by a connection that was opened as the pool opens its own."""
    for code, name, attribute in (
        ("statement-timeout", "statement_timeout", "EQUITIE_STATEMENT_TIMEOUT"),
        ("idle-timeout", "idle_in_transaction_session_timeout", "EQUITIE_IDLE_IN_TRANSACTION_TIMEOUT"),
    ):
        if settings.get(name, "0") == "0":
            what = f"The application's sessions have no {name}."
            yield finding(code, name, what, f"Set {attribute} to a number of seconds above 0.")


def check_passwords(conn: Connection[Any], login: str, host: str) -> Iterator[Finding]:
    """Yield passwords and host rules that are not safe; for a superuser's connection."""
    for role, kept_as in conn.execute(query("doctor_passwords"), {"login": login}):
        if kept_as == "md5":
            what = f"The password of {quoted(role)} is kept as MD5."
            yield finding(
                "password-kept-as-md5", role, what, f"\\password {quoted(role)} in psql, with a new password."
            )
    for line, kind, address, method in conn.execute(query("doctor_host_rules"), {}):
        what = f"Line {line} of pg_hba.conf on {host} lets {kind} connections of {address or 'anybody'} in by {method}."
        yield finding("host-rule", f"line {line}", what, "Write hostssl and scram-sha-256 into that line, and reload.")
