"""The pools, the audit logger and the performance monitor put together; opened, verified and closed as one."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import TYPE_CHECKING, Any

from equitie_data._log import get_logger
from equitie_data.alerts import Thresholds
from equitie_data.audit import AuditLogger
from equitie_data.errors import ConfigurationError
from equitie_data.hooks import Hooks
from equitie_data.monitor import PerformanceMonitor
from equitie_data.pool import ConnectionPools
from equitie_data.redaction import DEFAULT
from equitie_data.settings import Settings
from equitie_data.transactions import Transactions
from equitie_data.verify import explain_no_primary, verified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from equitie_data.alerts import Alert
    from equitie_data.embedded import EmbeddedServer
    from equitie_data.hooks import Hook
    from equitie_data.redaction import Redaction

__all__ = ["Database"]

log = get_logger(__name__)


class Database:
    """A PostgreSQL database of the platform.

    Use it as a context manager, or call `open` and `close`.

    Args:
        dsn_or_settings: The primary's connection string, or everything that can be set.
        hooks: Subscribers to what happens (see `equitie_data.hooks`).
        redaction: What must not be written down, beyond what is built in; the audit log and the monitor obey it.
        thresholds: When the monitor raises an alert.
        alert_sinks: Called with every `Alert`, on the monitor's thread.

    Attributes:
        settings: What it was made with.
        pool: The pools of its nodes.
        audit: The application's own audit events, and the audit log read back.
        monitor: What its statements cost.
        transactions: Transactions by their ids.
        owner_dsn: The owner's connection string, of an embedded database; ``None`` for all others.
    """

    def __init__(
        self,
        dsn_or_settings: str | Settings,
        *,
        hooks: Iterable[Hook] = (),
        redaction: Redaction | None = None,
        thresholds: Thresholds | None = None,
        alert_sinks: Iterable[Callable[[Alert], object]] = (),
    ) -> None:
        if isinstance(dsn_or_settings, Settings):
            self.settings = dsn_or_settings
        elif isinstance(dsn_or_settings, str):
            self.settings = Settings(dsn=dsn_or_settings)
        else:
            raise ConfigurationError("Database takes a connection string or Settings.")
        self.hooks = Hooks(hooks)
        self.redaction = DEFAULT if redaction is None else redaction
        self._thresholds = Thresholds() if thresholds is None else thresholds
        self._alert_sinks = tuple(alert_sinks)
        self.owner_dsn: str | None = None
        self._server: EmbeddedServer | None = None
        self._opened = False
        self._assemble()
        _databases.add(self)

    def _assemble(self) -> None:
        settings = self.settings
        self.pool = ConnectionPools(settings, self.hooks)
        self.execute_read = self.pool.execute_read
        self.execute_write = self.pool.execute_write
        self.transactions = Transactions(self.pool.execute_read, self.pool.execute_write)
        self.audit = AuditLogger(
            execute_write=self.pool.execute_write,
            execute_read=self.pool.execute_read,
            enabled=settings.enable_audit_logging,
            redaction=self.redaction,
        )
        self.monitor = PerformanceMonitor(
            execute_write=self.pool.execute_write,
            pool_stats=self.pool.get_stats,
            thresholds=self._thresholds,
            alert_sinks=self._alert_sinks,
            redaction=self.redaction,
        )

    def __repr__(self) -> str:
        return f"<Database {self.pool.primary.name} {'open' if self._opened else 'closed'}>"

    @classmethod
    def from_env(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        hooks: Iterable[Hook] = (),
        redaction: Redaction | None = None,
        thresholds: Thresholds | None = None,
        alert_sinks: Iterable[Callable[[Alert], object]] = (),
    ) -> Self:
        """Make a database from environment variables (see `Settings.from_env`).

        Args:
            environ: The variables; those of the process when left out.
            hooks: As in `Database`; so are the other arguments.
            redaction: As in `Database`.
            thresholds: As in `Database`.
            alert_sinks: As in `Database`.

        Raises:
            ConfigurationError: A variable is wrong, unknown or missing.
        """
        return cls(
            Settings.from_env(environ),
            hooks=hooks,
            redaction=redaction,
            thresholds=thresholds,
            alert_sinks=alert_sinks,
        )

    @classmethod
    def embedded(
        cls,
        data_dir: Path | str | None = None,
        *,
        hooks: Iterable[Hook] = (),
        redaction: Redaction | None = None,
        thresholds: Thresholds | None = None,
        alert_sinks: Iterable[Callable[[Alert], object]] = (),
        **settings: Any,
    ) -> Self:
        """Make a database on a PostgreSQL server of its own, migrated and with a login role that owns nothing.

        The server starts now and stops when the database is closed.

        Args:
            data_dir: Where its data is kept; a temporary directory when left out.
            hooks: As in `Database`; so are the next three.
            redaction: As in `Database`.
            thresholds: As in `Database`.
            alert_sinks: As in `Database`.
            settings: Attributes of `Settings` other than ``dsn``.

        Raises:
            EmbeddedServerError: No server binaries were found, or the server does not start.
        """
        from equitie_data.embedded import EmbeddedServer  # noqa: PLC0415 - only where a server is wanted
        from equitie_data.provision import DATABASE, provision  # noqa: PLC0415 - as above

        server = EmbeddedServer(data_dir)
        server.start()
        try:
            database = cls(
                Settings(dsn=provision(server), **settings),
                hooks=hooks,
                redaction=redaction,
                thresholds=thresholds,
                alert_sinks=alert_sinks,
            )
            database.owner_dsn = server.dsn(DATABASE)
        except BaseException:
            server.stop()
            raise
        database._server = server
        return database

    def open(self) -> Self:
        """Verify that the database can be used, then open the pools.

        Raises:
            UnavailableError: The primary cannot be reached; the message says why.
            NotMigratedError: Run ``python -m equitie_data.migrate`` first.
            HistoryTooNewError: A newer release has migrated it.
        """
        if self._opened:
            return self
        self.settings = verified(self.settings)
        self.pool.configure(self.settings)
        self.pool.open()
        if not self.pool.primary.reachable:
            # Some node answered, and none of them takes writes.
            self.pool.shutdown()
            self._assemble()
            raise explain_no_primary(self.settings)
        self._opened = True
        if self.settings.enable_performance_monitoring:
            self.hooks.add(self.monitor)
            self.monitor.start()
        if self.settings.enable_audit_logging:
            self.audit.start()
        return self

    def close(self, timeout: float = 5.0) -> None:
        """Write out what audit and monitor hold, and close every connection.

        A closed database can be opened again, unless it was an embedded one.

        Args:
            timeout: Seconds for each of the steps.
        """
        if self._opened:
            self._opened = False
            with contextlib.ExitStack() as steps:  # each of them is taken, whatever another raises
                steps.callback(self._assemble)
                steps.callback(self.pool.shutdown, timeout)
                steps.callback(self.hooks.remove, self.monitor)
                steps.callback(self.monitor.close, timeout)
                steps.callback(self.audit.close, timeout)
        if self._server is not None:
            self._server.stop()

    def __enter__(self) -> Self:
        try:
            return self.open()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def after_fork(self) -> None:
        """Start afresh in a forked child, at the next call: the parent's connections and threads are not ours."""
        self._server = None  # the parent stops it
        self.pool.after_fork()
        self.monitor.after_fork()
        self.audit.after_fork()


_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _after_fork() -> None:
    for database in list(_databases):
        database.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
