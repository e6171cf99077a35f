"""One node: its pool of connections, its health, and what it counts."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg_pool
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from equitie_data.connect import connect, explain_connection_failure, target_of
from equitie_data.errors import CheckoutTimeoutError, NotOpenError, UnavailableError
from equitie_data.routing import ReplicaHealth
from equitie_data.wire import NodeConnection, is_stale

if TYPE_CHECKING:
    from equitie_data.hooks import NodeRole
    from equitie_data.settings import Settings

__all__ = ["Node"]

_RECONNECT_TIMEOUT = 30.0
_UNREACHABLE_AFTER = 2.0  # seconds a read waits on a replica that has no connection at all

# Lag is 0 when everything received was replayed: the time since the last replayed commit grows on an idle primary.
_PROBE = """
SELECT pg_catalog.pg_is_in_recovery(),
       CASE
           WHEN NOT pg_catalog.pg_is_in_recovery() THEN 0
           WHEN pg_catalog.pg_last_wal_receive_lsn() = pg_catalog.pg_last_wal_replay_lsn() THEN 0
           ELSE COALESCE(EXTRACT(EPOCH FROM pg_catalog.now() - pg_catalog.pg_last_xact_replay_timestamp()), 0)
       END::double precision
"""


class Node:
    """A PostgreSQL server that operations can go to.

    Args:
        dsn: Where it is.
        role: What it is taken for.
        settings: How to connect.
        region: Where it stands, if that is known.
    """

    def __init__(self, dsn: str, role: NodeRole, settings: Settings, region: str | None = None) -> None:
        self.dsn = dsn
        self.role = role
        self.region = region
        self.name = _name_of(dsn)
        self.health = ReplicaHealth()
        self.reachable = True
        self._settings = settings
        self._prepare_threshold = 5
        self._lock = threading.Lock()
        self._in_use = 0
        self._checkouts = 0
        self._discarded = 0
        parameters = settings.connection_parameters()
        options = conninfo_to_dict(dsn).get("options")
        if options:
            parameters["options"] = f"{parameters['options']} {options}"
        self._pool: ConnectionPool[NodeConnection[Any]] = ConnectionPool(
            dsn,
            connection_class=NodeConnection,
            kwargs=parameters,
            min_size=settings.min_size,
            max_size=settings.max_size,
            timeout=settings.checkout_timeout,
            max_idle=settings.max_idle,
            max_lifetime=settings.max_lifetime,
            reconnect_timeout=_RECONNECT_TIMEOUT,
            name=f"equitie {role} {self.name}",
            open=False,
        )

    def __repr__(self) -> str:
        return f"<Node {self.role} {self.name}>"

    def open(self) -> None:
        """Start filling the pool; does not wait for it."""
        self._pool.open(wait=False)

    def close(self, timeout: float) -> None:
        """Close every idle connection, and those in use when they come back."""
        self._pool.close(timeout)

    def checkout(self, timeout: float) -> NodeConnection[Any]:
        """Borrow a connection whose server has not closed it.

        Args:
            timeout: Seconds to wait for one.

        Raises:
            CheckoutTimeoutError: All connections stayed in use.
            UnavailableError: The node has no connection to give.
            NotOpenError: The pool is closed.
        """
        deadline = time.monotonic() + timeout
        while True:
            connection = self._borrow(deadline)
            if not is_stale(connection.pgconn):
                with self._lock:
                    self._in_use += 1
                    self._checkouts += 1
                return connection
            self._drop(connection)

    def checkin(self, connection: NodeConnection[Any]) -> None:
        """Give a connection back; one that is not idle is closed and replaced."""
        with self._lock:
            self._in_use -= 1
        connection.observer = None
        connection.pending = None
        connection.prepare_threshold = self._prepare_threshold
        if connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            self._pool.putconn(connection)
        else:
            self._drop(connection)

    def _drop(self, connection: NodeConnection[Any]) -> None:
        self._discarded += 1
        connection.close()
        self._pool.putconn(connection)

    def _borrow(self, deadline: float) -> NodeConnection[Any]:
        # A replica without a single connection is given up early, so that the read can go elsewhere.
        patience = deadline if self.role == "primary" else min(deadline, time.monotonic() + _UNREACHABLE_AFTER)
        while True:
            try:
                return self._pool.getconn(max(patience - time.monotonic(), 0.001))
            except psycopg_pool.PoolTimeout:
                busy = self._in_use > 0
                if busy and patience < deadline:
                    patience = deadline
                    continue
                raise self._no_connection(busy) from None
            except psycopg_pool.PoolClosed:
                raise NotOpenError(
                    f"The pool of {self.name} is closed: use the database inside its `with` block, or call open()."
                ) from None

    def _no_connection(self, busy: bool) -> UnavailableError:
        if busy:
            return CheckoutTimeoutError(
                f"All {self._settings.max_size} connections to {self.role} {self.name} stayed in use until the "
                "deadline: shorten transactions, or raise max_size within the server's max_connections."
            )
        try:
            connect(self.dsn, connect_timeout=2).close()
        except UnavailableError as error:
            return error
        return UnavailableError(f"The {self.role} {self.name} gave no connection before the deadline: try again.")

    def probe(self) -> tuple[bool, float]:
        """Ask the node about itself on a connection of its own.

        Returns:
            Whether it is in recovery, and its replay lag in seconds.

        Raises:
            UnavailableError: It does not answer.
        """
        try:
            with connect(self.dsn, connect_timeout=2, options="-c statement_timeout=2000") as connection:
                row = connection.execute(_PROBE).fetchone()
        except psycopg.Error as error:
            if isinstance(error, UnavailableError):
                raise
            raise UnavailableError(explain_connection_failure(self.dsn, error)) from None
        assert row is not None  # noqa: S101 - a SELECT without FROM always returns a row
        return bool(row[0]), float(row[1])

    def stats(self) -> dict[str, Any]:
        """Return counters since the start and gauges of now; times are seconds."""
        stats = self._pool.get_stats()
        return {
            "role": self.role,
            "region": self.region,
            "healthy": self.reachable and not self.health.ejected,
            "lag_seconds": self.health.lag_seconds,
            "size": stats.get("pool_size", 0),
            "max_size": self._settings.max_size,
            "in_use": self._in_use,
            "idle": stats.get("pool_available", 0),
            "waiting": stats.get("requests_waiting", 0),
            "checkouts": self._checkouts,
            "discarded": self._discarded,
        }


def _name_of(dsn: str) -> str:
    return target_of(dsn).rsplit("@", 1)[-1].split("/", 1)[0]
