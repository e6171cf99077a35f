"""One connection, or one clear sentence why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from equitie_data.credentials import AskingDsn, ask_password
from equitie_data.errors import ConfigurationError, UnavailableError
from equitie_data.redaction import DEFAULT, on_one_line

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["connect", "explain_connection_failure", "target_of"]

_CONNECT_TIMEOUT = 5  # seconds

# What libpq says, and what to do about it. Its messages are English in psycopg's binary wheel.
_ADVICE = (
    ("does not match host name", "the server's certificate is for another host: connect by a name that is in it"),
    ("certificate verify failed", "no authority in sslrootcert has signed the server's certificate"),
    ("root certificate file", "sslrootcert names no file that can be read, and sslmode wants the server verified"),
    ("no encryption", "the server takes encrypted connections only: ask for TLS with sslmode=verify-full"),
    ("password authentication failed", "the password or the user is wrong"),
    ("no password supplied", "the server wants a password: put it into the DSN or PGPASSWORD"),
    ("no pg_hba.conf entry", "the server does not admit this user from here: see its pg_hba.conf"),
    ("does not exist", "the database or the role does not exist"),
    ("Connection refused", "nothing listens there: check host and port, and that the server runs"),
    ("No such file or directory", "no server listens on that socket: check host and port"),
    ("could not translate host name", "the host name cannot be resolved"),
    ("failed to resolve host", "the host name cannot be resolved"),
    ("timeout expired", "the server does not answer: check host, port and firewall"),
    ("too many clients", "the server has no free connection: raise max_connections or shrink the pools"),
    ("starting up", "the server is starting: try again in a moment"),
    ("shutting down", "the server is shutting down"),
    ("unsupported startup parameter", "a pooler in between refuses a startup parameter"),
    ("server does not support SSL", "the DSN asks for TLS, which the server does not offer"),
)


def target_of(dsn: str) -> str:
    """Return what a DSN points to, without secrets: ``user@host:port/database``."""
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return "an unreadable DSN"
    host = parts.get("host") or parts.get("hostaddr") or "the local socket"
    port = f":{parts['port']}" if parts.get("port") else ""
    user = f"{parts['user']}@" if parts.get("user") else ""
    database = f"/{parts['dbname']}" if parts.get("dbname") else ""
    return f"{user}{host}{port}{database}"


def explain_connection_failure(dsn: str, error: BaseException) -> str:
    """Return one sentence on why a connection could not be made, without secrets."""
    text = str(error)
    for pattern, advice in _ADVICE:
        if pattern in text:
            return f"Cannot connect to {target_of(dsn)}: {advice}."
    # What follows "failed:" or "FATAL:" is the server's or the system's reason; the rest is libpq's framing.
    last = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    reason = last.rsplit("FATAL:", 1)[-1].rsplit("failed:", 1)[-1].strip().rstrip(".")
    # The server may be anybody's: what it says must not steer a terminal.
    return f"Cannot connect to {target_of(dsn)}: {on_one_line(DEFAULT.text(reason))}."


def connect(dsn: str, **parameters: Any) -> Connection[Any]:
    """Open one autocommit connection.

    Args:
        dsn: Where to; an `AskingDsn` is asked for its password.
        parameters: Connection parameters that take precedence.

    Raises:
        ConfigurationError: The DSN cannot be read.
        UnavailableError: There is no connection to be had; the message says why.
    """
    if isinstance(dsn, AskingDsn):
        parameters["password"] = ask_password(dsn, dsn.password)
    try:
        return psycopg.connect(dsn, **{"connect_timeout": _CONNECT_TIMEOUT, "autocommit": True, **parameters})
    except psycopg.OperationalError as error:
        raise UnavailableError(explain_connection_failure(dsn, error)) from None
    except psycopg.ProgrammingError:
        pass
    # Not within the handler: libpq's message, which an error's context would carry along, quotes the string.
    raise ConfigurationError(
        "The DSN is not a PostgreSQL connection string: write it as postgresql://user:password@host:5432/database."
    )
