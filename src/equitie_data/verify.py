"""The first look at a database, before anything is done with it: can it be used, and what stands in between?"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data._log import get_logger
from equitie_data.connect import connect, target_of
from equitie_data.credentials import with_password
from equitie_data.errors import UnavailableError

if TYPE_CHECKING:
    from psycopg import Connection

    from equitie_data.settings import Settings

__all__ = ["explain_no_primary", "verified"]

log = get_logger(__name__)


def verified(settings: Settings) -> Settings:
    """Make sure that the database can be used.

    Args:
        settings: How to get there.

    Returns:
        The same, with ``pooler`` settled.

    Raises:
        UnavailableError: No node can be reached; the message says why the primary cannot.
        NotMigratedError: Run ``python -m equitie_data.migrate`` first.
        HistoryTooNewError: A newer release has migrated it.
    """
    # Imported here, so that `python -m equitie_data.migrate` does not find itself imported already.
    from equitie_data.migrate import check_current  # noqa: PLC0415

    connection, settled = _first_connection(settings)
    with connection:
        check_current(connection)
        if settled.pooler == "auto":
            # A pooler in between tells the client a process id of its own.
            told = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
            direct = told == (connection.info.backend_pid,)
            settled = attrs.evolve(settled, pooler="none" if direct else "transaction")
    if settings.pooler == "auto" and settled.pooler == "transaction":
        log.info("equitie_data.pooler_found", mode=settled.pooler)
    return settled


def explain_no_primary(settings: Settings) -> UnavailableError:
    """Say why nothing can be written, where some node answered and none of them takes writes."""
    try:
        connect(with_password(settings.dsn, settings.password)).close()
    except UnavailableError as error:
        return error
    return UnavailableError(f"{target_of(settings.dsn)} takes no writes, and no other node does.")


def _first_connection(settings: Settings) -> tuple[Connection[Any], Settings]:
    """Connect to the primary, or else to a replica: after a failover the writes may go there."""
    try:
        return _connect(settings.dsn, settings)
    except UnavailableError:
        for replica in settings.replicas:
            with contextlib.suppress(UnavailableError):
                return _connect(replica.dsn, settings)
        raise


def _connect(dsn: str, settings: Settings) -> tuple[Connection[Any], Settings]:
    dsn = with_password(dsn, settings.password)
    try:
        return connect(dsn, **settings.connection_parameters()), settings
    except UnavailableError as error:
        if settings.pooler != "auto" or "startup parameter" not in str(error):
            raise
    # Only a pooler refuses start-up options; the library can do without.
    settings = attrs.evolve(settings, pooler="transaction")
    return connect(dsn, **settings.connection_parameters()), settings
