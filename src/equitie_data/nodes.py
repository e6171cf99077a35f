"""One node: its pool of connections, its health, and what it counts."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg_pool
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

from equitie_data.connect import connect, explain_connection_failure, target_of
from equitie_data.context import WalPosition
from equitie_data.credentials import ask_password, with_password
from equitie_data.errors import CheckoutTimeoutError, NotOpenError, UnavailableError
from equitie_data.exchange import is_stale
from equitie_data.routing import NodeReport, ReplicaHealth, ReplicaView
from equitie_data.wire import NodeConnection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from equitie_data.hooks import NodeRole
    from equitie_data.settings import Settings

__all__ = ["Holder", "Node"]

_RECONNECT_TIMEOUT = 30.0
_UNREACHABLE_AFTER = 2.0  # seconds to wait for a node that has no connection at all
_ASK_AGAIN_AFTER = 0.1  # seconds after which a replica that was behind may have caught up
_PINGS = 3
_PREPARE_AFTER = 5  # psycopg's default: executions before a statement is prepared
_OURS = ("equitie_data", "psycopg", "psycopg_pool", "tenacity", "threading", "concurrent", "asyncio")

# The timeline of a primary is in the name of the segment it writes; a standby knows the one it follows by the
# control file, which may lag behind but never runs ahead.
_PROBE = """
SELECT r.in_recovery,
       CASE
           WHEN r.in_recovery THEN (
               SELECT pg_catalog.lpad(pg_catalog.to_hex(greatest(c.timeline_id, v.min_recovery_end_timeline)), 8, '0')
               FROM pg_catalog.pg_control_checkpoint() AS c, pg_catalog.pg_control_recovery() AS v
           )
           ELSE pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8)
       END,
       CASE
           WHEN r.in_recovery THEN pg_catalog.pg_last_wal_replay_lsn()
           ELSE pg_catalog.pg_current_wal_insert_lsn()
       END::text,
       coalesce(extract(epoch FROM pg_catalog.now() - pg_catalog.pg_last_xact_replay_timestamp()), 0)::double precision,
       (SELECT s.system_identifier FROM pg_catalog.pg_control_system() AS s)
FROM (SELECT pg_catalog.pg_is_in_recovery()) AS r (in_recovery)
"""


class Holder:
    """Who has a connection.

    Attributes:
        thread: The thread's identifier.
        since: The monotonic time of the checkout, in seconds.
        name: What the call is named.
        reported: Whether it was reported as held too long.
    """

    __slots__ = ("name", "reported", "since", "thread")

    def __init__(self, since: float, name: str | None) -> None:
        self.thread = threading.get_ident()
        self.since = since
        self.name = name
        self.reported = False

    def __str__(self) -> str:
        call = f" in {self.name!r}" if self.name else ""
        return f"{self.who}{call} for {time.monotonic() - self.since:.1f} s at {self.site()}"

    @property
    def who(self) -> str:
        """The thread's name."""
        return next((thread.name for thread in threading.enumerate() if thread.ident == self.thread), "a thread")

    def site(self) -> str:
        """Return where the holder is now: the innermost line that is not ours, as ``file:line``."""
        for frame in self.frames():
            module = str(frame.f_globals.get("__name__", ""))
            if module.split(".", 1)[0] not in _OURS:
                return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        return "an unknown place"

    def frames(self) -> Iterator[FrameType]:
        """Yield what the holder's thread is in the middle of, from the inside."""
        frame = sys._current_frames().get(self.thread)  # noqa: SLF001 - documented, and only asked when something is wrong
        while frame is not None:
            yield frame
            frame = frame.f_back


class Node:
    """A PostgreSQL server that operations can go to.

    Idle connections are kept in a stack before psycopg's pool: the one used last is the one used next, while its
    server process is still warm, and a read's COMMIT can be on its way back while the connection rests. The pool
    below makes connections, limits their number and age, and serves those who wait.

    Args:
        dsn: Where it is.
        role: What it is taken for.
        settings: How to connect.
        region: Where it stands, if that is known.
    """

    def __init__(self, dsn: str, role: NodeRole, settings: Settings, region: str | None = None) -> None:
        self.dsn = with_password(_with_session_attributes(dsn, role), settings.password)
        self.role: NodeRole = role
        self.region = region
        self.name = _name_of(dsn)
        self.health = ReplicaHealth()
        self.reachable = True
        self.system = 0
        """The identifier of its cluster; 0 until it was probed."""
        self.replayed = 0
        """The last offset it was seen to have replayed, in bytes."""
        self.round_trip = math.inf
        """Seconds a trip to it takes at best; infinite until measured."""
        self._ask_from = self._replayed_at = 0.0
        self._settings = settings
        self._prepare_after = None if settings.pooler == "transaction" else _PREPARE_AFTER
        self._lock = threading.Lock()
        self._rested: deque[tuple[NodeConnection[Any], float]] = deque()
        self._waiting = 0
        self._holders: dict[NodeConnection[Any], Holder] = {}
        self._checkouts = 0
        self._discarded = 0
        self._draining = False
        parameters = settings.connection_parameters()
        options = conninfo_to_dict(dsn).get("options")
        if options:
            parameters["options"] = f"{parameters.get('options', '')} {options}".strip()
        self._parameters = parameters
        self._pool: ConnectionPool[NodeConnection[Any]] = ConnectionPool(
            self.dsn,
            connection_class=NodeConnection,
            kwargs=parameters if settings.password is None else self._parameters_now,
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

    def _parameters_now(self) -> dict[str, Any]:
        """Return what the next connection is opened with; its password is asked for now."""
        assert self._settings.password is not None  # noqa: S101 - otherwise nobody asks
        return {**self._parameters, "password": ask_password(self.dsn, self._settings.password)}

    @property
    def view(self) -> ReplicaView:
        """The node as the router sees it."""
        region = self._settings.region
        return ReplicaView(
            self.health,
            self.replayed,
            may_ask=self._ask_from <= time.monotonic(),
            local=region is None or self.region == region,
        )

    def know_replayed(self, offset: int) -> None:
        """Note how far the replica has replayed, as of now."""
        self.replayed, self._replayed_at = offset, time.monotonic()

    def shows(self, offset: int, connection: NodeConnection[Any]) -> bool:
        """Whether a connection is known to show everything up to an offset.

        What was seen holds for connections that were there by then: a server that restarted may show less than it did
        before, but its connections of before are gone.
        """
        return self.replayed >= offset and connection.first_used_at <= self._replayed_at

    def note_replayed(self, offset: int, *, behind: bool) -> None:
        """Note how far a read found the replica; one that was behind is not asked again for a moment."""
        self.know_replayed(offset)
        if behind:
            self._ask_from = time.monotonic() + _ASK_AGAIN_AFTER

    # --- life -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start filling the pool; does not wait for it."""
        self._pool.open(wait=False)

    def close(self, timeout: float) -> None:
        """Let calls under way finish, then close every connection.

        Args:
            timeout: Seconds to wait for them; connections still in use then close when they come back.
        """
        deadline = time.monotonic() + timeout
        while self._holders and time.monotonic() < deadline:
            time.sleep(0.01)
        self._draining = True
        self.sweep(math.inf)
        self._pool.close(timeout)

    # --- connections ----------------------------------------------------------------------------------------------

    def checkout(self, timeout: float, name: str | None = None) -> NodeConnection[Any]:
        """Borrow a connection whose server has not closed it.

        Args:
            timeout: Seconds to wait for one.
            name: What the call is named.

        Raises:
            CheckoutTimeoutError: All connections stayed in use.
            UnavailableError: The node has no connection to give.
            NotOpenError: The pool is closed.
        """
        deadline = time.monotonic() + timeout
        # Everything that rests may be stale; more than that in a row is no longer an accident.
        for _ in range(2 * self._settings.max_size + 1):
            connection = self._take(deadline)
            try:
                alive = self._is_alive(connection)
            except BaseException:
                self._drop(connection)  # interrupted while it belonged to nobody
                raise
            if not alive:
                self._drop(connection)
            elif self._is_standby(connection):
                self._drop(connection)
                raise UnavailableError(f"The primary {self.name} has become a standby: another node takes the writes.")
            else:
                now = time.monotonic()
                connection.system = self.system
                if not connection.first_used_at:
                    connection.first_used_at = now
                self._holders[connection] = Holder(now, name)
                self._checkouts += 1
                return connection
        raise UnavailableError(f"The {self.role} {self.name} closes every connection at once: see its log.")

    def checkin(self, connection: NodeConnection[Any]) -> None:
        """Give a connection back; one that is not idle is closed and replaced."""
        del self._holders[connection]
        connection.observer = connection.watch = connection.pending = connection.opening = None
        if connection.behind:
            connection.behind = False
        if connection.unprepared:
            connection.unprepared, connection.prepare_threshold = False, self._prepare_after
        if not connection.commit_sent and connection.pgconn.transaction_status != TransactionStatus.IDLE:
            self._drop(connection)
            return
        now = time.monotonic()
        expired = getattr(connection, "_expire_at", math.inf) <= now
        with self._lock:
            rests = not self._waiting and not expired and not self._draining
            if rests:
                self._rested.append((connection, now))
        if not rests:
            self._to_pool(connection)

    def sweep(self, idle: float) -> None:
        """Hand connections that rested for ``idle`` seconds back to the pool, which closes those it can spare."""
        limit = math.inf if math.isinf(idle) else time.monotonic() - idle
        while True:
            with self._lock:
                if not self._rested or self._rested[0][1] > limit:
                    return
                connection, _ = self._rested.popleft()
            self._to_pool(connection)

    def _take(self, deadline: float) -> NodeConnection[Any]:
        with self._lock:
            if self._rested:
                return self._rested.pop()[0]
            # From here on whoever gives a connection back gives it to the pool, which serves those who wait in turn.
            self._waiting += 1
            # Asking the pool for its size costs more than a checkout; where every place is taken there is no need to.
            crowded = self._waiting > 1 and len(self._holders) < self._settings.max_size
        try:
            if crowded:
                self._grow()
            return self._from_pool(deadline)
        finally:
            with self._lock:
                self._waiting -= 1

    def _from_pool(self, deadline: float) -> NodeConnection[Any]:
        # In slices: a node without a single connection is given up early, so that the call can go elsewhere, and so is
        # one that has lost its role meanwhile.
        role = self.role
        while True:
            now = time.monotonic()
            try:
                return self._pool.getconn(max(min(deadline - now, _UNREACHABLE_AFTER), 0.001))
            except psycopg_pool.PoolTimeout:
                if self.role != role:
                    raise UnavailableError(f"{self.name} is no longer the {role}: another node is.") from None
                if not self._holders or time.monotonic() >= deadline:
                    raise self._no_connection() from None
            except psycopg_pool.PoolClosed:
                raise NotOpenError(
                    f"The pool of {self.name} is closed: use the database inside its `with` block, or call open()."
                ) from None

    def _grow(self) -> None:
        """Have the pool open as many connections at once as are wanted; left alone it opens one after the other.

        `resize` opens the difference to the minimum before, whatever is open already, so the room is counted here;
        one place stays free for the connection that the pool may be opening by itself.
        """
        with self._lock:
            room = self._settings.max_size - self._pool.get_stats()["pool_size"] - 1
            more = min(self._waiting, room)
            if more > 0:
                self._pool.resize(self._pool.min_size + more, self._settings.max_size)

    def settle(self) -> None:
        """Let the pool shrink again after a burst."""
        if self._pool.min_size > self._settings.min_size and not self._waiting:
            self._pool.resize(self._settings.min_size, self._settings.max_size)

    def _is_alive(self, connection: NodeConnection[Any]) -> bool:
        if connection.commit_sent:
            try:
                connection.wait(connection.drain_gen())
            except psycopg.Error:
                return False
        return not is_stale(connection)

    def _is_standby(self, connection: NodeConnection[Any]) -> bool:
        """Whether the primary came back as a standby; the server reports it by itself, at no cost.

        A pooler repeats what its server said when it first connected there, so it is not believed.
        """
        if self.role == "replica" or self._settings.pooler == "transaction":
            return False
        return connection.pgconn.parameter_status(b"in_hot_standby") == b"on"

    def _to_pool(self, connection: NodeConnection[Any]) -> None:
        if connection.commit_sent and not self._is_alive(connection):
            connection.close()
        self._pool.putconn(connection)

    def _drop(self, connection: NodeConnection[Any]) -> None:
        self._discarded += 1
        connection.commit_sent = False
        connection.close()
        self._pool.putconn(connection)

    def _no_connection(self) -> UnavailableError:
        if self._holders:
            oldest = "; ".join(map(str, self.oldest_holders(3)))
            return CheckoutTimeoutError(
                f"All {self._settings.max_size} connections to {self.role} {self.name} stayed in use until the "
                f"deadline: shorten transactions, or raise max_size. Held longest: {oldest}."
            )
        try:
            connect(self.dsn, connect_timeout=2).close()
        except UnavailableError as error:
            return error
        return UnavailableError(f"The {self.role} {self.name} gave no connection before the deadline: try again.")

    def oldest_holders(self, count: int) -> list[Holder]:
        """Return who has had a connection longest."""
        return sorted(self._holders.copy().values(), key=lambda holder: holder.since)[:count]

    def held_longer_than(self, seconds: float) -> Iterator[Holder]:
        """Yield holders over a limit, each once."""
        limit = time.monotonic() - seconds
        for holder in list(self._holders.values()):
            if holder.since < limit and not holder.reported:
                holder.reported = True
                yield holder

    # --- probing --------------------------------------------------------------------------------------------------

    def probe(self) -> NodeReport:
        """Ask the node about itself on a connection of its own, measuring the way there.

        Raises:
            UnavailableError: It does not answer.
        """
        try:
            with connect(self.dsn, connect_timeout=2, tcp_user_timeout=2000) as connection:
                row = connection.execute(_PROBE).fetchone()
                trips = []
                for _ in range(_PINGS):
                    started = time.perf_counter()
                    connection.execute("")
                    trips.append(time.perf_counter() - started)
        except psycopg.Error as error:
            if isinstance(error, UnavailableError):
                raise
            raise UnavailableError(explain_connection_failure(self.dsn, error)) from None
        assert row is not None  # noqa: S101 - a SELECT of one row
        self.round_trip = min(trips)
        return NodeReport(bool(row[0]), int(row[1], 16), WalPosition.parse_lsn(row[2]), float(row[3]), int(row[4]))

    def stats(self) -> dict[str, Any]:
        """Return counters since the start and gauges of now; times are seconds."""
        stats = self._pool.get_stats()
        return {
            "role": self.role,
            "region": self.region,
            "healthy": self.reachable and not self.health.ejected,
            "lag_seconds": self.health.lag_seconds,
            "lag_bytes": self.health.lag_bytes,
            "round_trip_seconds": None if math.isinf(self.round_trip) else self.round_trip,
            "size": stats.get("pool_size", 0),
            "max_size": self._settings.max_size,
            "in_use": len(self._holders),
            "idle": stats.get("pool_available", 0) + len(self._rested),
            "waiting": self._waiting,
            "checkouts": self._checkouts,
            "discarded": self._discarded,
        }


def _name_of(dsn: str) -> str:
    return target_of(dsn).rsplit("@", 1)[-1].split("/", 1)[0]


def _with_session_attributes(dsn: str, role: NodeRole) -> str:
    """Have libpq find the right one of several hosts, unless the DSN says how."""
    parts = conninfo_to_dict(dsn)
    several = "," in str(parts.get("host") or "") or "," in str(parts.get("hostaddr") or "")
    if not several or parts.get("target_session_attrs"):
        return dsn
    return make_conninfo(dsn, target_session_attrs="read-write" if role == "primary" else "prefer-standby")
