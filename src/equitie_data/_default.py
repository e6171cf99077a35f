"""The default database of the process, and the module-level functions that use it."""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING, Any

from equitie_data.database import Database

if TYPE_CHECKING:
    from equitie_data.audit import AuditLogger
    from equitie_data.monitor import PerformanceMonitor
    from equitie_data.pool import ConnectionPools
    from equitie_data.settings import Settings

_default: Database | None = None
_lock = threading.Lock()


def configure(database_or_settings: Database | Settings | str) -> Database:
    """Choose the default database and open it; the one before is closed.

    Args:
        database_or_settings: A database, or what to make one of.
    """
    global _default
    database = database_or_settings if isinstance(database_or_settings, Database) else Database(database_or_settings)
    with _lock:
        database.open()
        previous, _default = _default, database
    if previous is not None and previous is not database:
        previous.close()
    return database


def get_database() -> Database:
    """Return the default database, made from the environment and opened on first use."""
    global _default  # noqa: PLW0603 - as in configure
    if _default is None:
        with _lock:
            if _default is None:
                _default = Database.from_env().open()
    return _default


def get_connection_pool() -> ConnectionPools:
    """Return the default database's pools."""
    return get_database().pool


def get_audit_logger() -> AuditLogger:
    """Return the default database's audit logger."""
    return get_database().audit


def get_performance_monitor() -> PerformanceMonitor:
    """Return the default database's performance monitor."""
    return get_database().monitor


if TYPE_CHECKING:

    def _typed() -> Database: ...

    execute_read = _typed().execute_read
    execute_write = _typed().execute_write
else:

    def execute_read(*args: Any, **kwargs: Any) -> Any:
        """Read from the default database (see `ConnectionPools.execute_read`)."""
        return get_database().execute_read(*args, **kwargs)

    def execute_write(*args: Any, **kwargs: Any) -> Any:
        """Write to the default database (see `ConnectionPools.execute_write`)."""
        return get_database().execute_write(*args, **kwargs)


def _close_at_exit() -> None:
    if _default is not None:
        _default.close()


def _after_fork() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it
    _lock = threading.Lock()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
