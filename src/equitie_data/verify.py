"""The first look at a database, before its pools are opened: can it be used, and what stands in between?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from equitie_data._log import get_logger
from equitie_data.connect import connect
from equitie_data.errors import UnavailableError

if TYPE_CHECKING:
    from equitie_data.settings import Settings

__all__ = ["verified"]

log = get_logger(__name__)


def verified(settings: Settings) -> Settings:
    """Make sure that the database can be used; blocks.

    Args:
        settings: How to get there.

    Returns:
        The same, with ``pooler`` settled.

    Raises:
        UnavailableError: The primary cannot be reached; the message says why.
        NotMigratedError: Run ``python -m equitie_data.migrate`` first.
        HistoryTooNewError: A newer release has migrated it.
    """
    # Imported here, so that `python -m equitie_data.migrate` does not find itself imported already.
    from equitie_data.migrate import check_current  # noqa: PLC0415

    pooled = attrs.evolve(settings, pooler="transaction")
    try:
        connection = connect(settings.dsn, **settings.connection_parameters())
    except UnavailableError as error:
        if settings.pooler != "auto" or "startup parameter" not in str(error):
            raise
        # Only a pooler refuses start-up options; the library can do without.
        settings = pooled
        connection = connect(settings.dsn, **settings.connection_parameters())
    with connection:
        check_current(connection)
        if settings.pooler == "auto":
            # A pooler in between tells the client a process id of its own.
            told = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
            direct = told == (connection.info.backend_pid,)
            settings = attrs.evolve(settings, pooler="none") if direct else pooled
            if not direct:
                log.info("equitie_data.pooler_found", mode=settings.pooler)
    return settings
