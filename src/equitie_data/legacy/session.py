"""The session a takeover works in: the owner's, on a database that is migrated, with pinned styles."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, Final

from equitie_data.errors import LegacyError
from equitie_data.migrations.session import open_owner, turn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

__all__ = ["REASON", "open_session"]

REASON: Final = "legacy migration"
"""What the audit log says about every change of a takeover."""

# Rows are compared and hashed by their text, and amounts of memory hold for one statement on one batch.
_SETTINGS: Final = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "iso_8601",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "work_mem": "64MB",
    "maintenance_work_mem": "256MB",
    "jit": "off",
    "equitie.context": json.dumps({"actor": "service", "reason": REASON}),
}


@contextlib.contextmanager
def open_session(dsn: str, wait: float) -> Iterator[Connection[Any]]:
    """Connect as the owner of a migrated database, and be the only one who migrates it.

    Args:
        dsn: The database, as its owner.
        wait: Seconds to wait for another run.

    Raises:
        LegacyError: The database is not migrated.
    """
    with open_owner(dsn) as conn:
        present = conn.execute(
            "SELECT to_regclass('public.transactions_clean') IS NOT NULL"
            " AND to_regclass('equitie_private.legacy_runs') IS NOT NULL"
        ).fetchone()
        if present != (True,):
            raise LegacyError(
                "The database has no clean tables to take the old ones over into: run "
                "`python -m equitie_data migrate` first."
            )
        for name, value in _SETTINGS.items():
            conn.execute("SELECT pg_catalog.set_config(%s, %s, false)", (name, value))
        with turn(conn, wait):
            yield conn
