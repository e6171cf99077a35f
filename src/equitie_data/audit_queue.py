"""The queue of audit events that belong to no transaction: bounded, written in batches, never silently shortened.

A batch that failed is kept and tried again first. If its COMMIT was sent and the outcome is unknown, it may be in the
log already; so every batch takes an advisory lock named after its first event until its transaction ends, and the
second attempt waits for that lock, looks which of the events' ids (`metadata.equitie_event_id`) are stored, and writes
the rest. The usual flush pays one statement; only the one after an unknown outcome pays for the look-up.
"""

from __future__ import annotations

import atexit
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from equitie_data._log import get_logger
from equitie_data.audit_events import EVENT_ID_KEY
from equitie_data.context import as_service
from equitie_data.errors import CommitOutcomeUnknown, NotOpenError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from equitie_data.audit_events import AuditEvent

__all__ = ["AuditQueue", "AuditStats", "record"]

_log = get_logger(__name__)

_LONGEST_PAUSE = 60.0  # seconds between two attempts of a flush that keeps failing
_CLOCK_SLACK = 60.0  # seconds

_RECORD = "SELECT equitie_private.record_audit_events(%s)"
_RECORD_LOCKED = "SELECT pg_catalog.pg_advisory_xact_lock(%s), equitie_private.record_audit_events(%s)"
_LOCK = "SELECT pg_catalog.pg_advisory_xact_lock(%s)"
# The server stores its own time for an event from a clock ahead of it: hence the second bound, as old as the batch.
_STORED = f"""
SELECT metadata ->> '{EVENT_ID_KEY}'
FROM public.audit_logs
WHERE "timestamp" >= least(%s, pg_catalog.statement_timestamp() - pg_catalog.make_interval(secs => %s))
  AND source = 'sdk'
  AND metadata ->> '{EVENT_ID_KEY}' = ANY (%s)
"""


def record(connection: psycopg.Connection[Any], events: Sequence[AuditEvent]) -> object:
    """Write events within the connection's transaction; what it returns, an asyncio connection's user awaits."""
    return connection.execute(_RECORD, [_as_parameter(events)])


def _as_parameter(events: Sequence[AuditEvent]) -> Jsonb:
    return Jsonb([event.to_json() for event in events])


@attrs.frozen(kw_only=True)
class AuditStats:
    """What an `AuditLogger` did since it was made.

    Attributes:
        queued: events waiting, those being written included.
        oldest_queued_seconds: how long the oldest of them has waited; 0 when none does.
        flushed: events the background queue wrote.
        failed_flushes: attempts to write a batch that failed; the batch was kept.
        dropped: events the server refused for their content, each logged as ``audit.event_refused``.
        sent_in_transactions: events written with a transaction of the application; a rollback took some of them along.
    """

    queued: int
    oldest_queued_seconds: float
    flushed: int
    failed_flushes: int
    dropped: int
    sent_in_transactions: int = 0


class _Batch:
    """Events that are written together or not at all; it stays the same one until they are."""

    __slots__ = ("events", "first_attempt", "outcome_unknown")

    def __init__(self, events: list[AuditEvent]) -> None:
        self.events = events
        self.first_attempt = time.monotonic()
        self.outcome_unknown = False

    @property
    def lock_key(self) -> int:
        return int.from_bytes(self.events[0].event_id.bytes[:8], "big", signed=True)

    def store(self, connection: psycopg.Connection[Any]) -> None:
        events = self.events
        if self.outcome_unknown:
            # A statement of its own: the look-up's snapshot must be taken after the lost transaction has ended.
            connection.execute(_LOCK, [self.lock_key])
            earliest = min(event.timestamp for event in events)
            age = time.monotonic() - self.first_attempt + _CLOCK_SLACK
            with connection.cursor(row_factory=tuple_row) as cursor:
                cursor.execute(_STORED, [earliest, age, [str(event.event_id) for event in events]])
                stored = {row[0] for row in cursor}
            events = [event for event in events if str(event.event_id) not in stored]
        if events:
            connection.execute(_RECORD_LOCKED, [self.lock_key, _as_parameter(events)])


class AuditQueue:
    """Events waiting to be written, and the thread that writes them.

    Args:
        execute_write: `Database.execute_write`, or anything that takes the same arguments.
        batch_size: events written at once.
        flush_interval: seconds an event waits at most for its batch to fill.
        capacity: events that may wait; beyond it `add` writes a batch itself.
    """

    def __init__(
        self, *, execute_write: Callable[..., Any], batch_size: int, flush_interval: float, capacity: int
    ) -> None:
        if batch_size < 1 or capacity < batch_size or flush_interval <= 0:
            raise ValueError("An audit queue needs 1 <= batch_size <= capacity and a flush_interval above 0 seconds.")
        self._execute_write = execute_write
        self._batch_size = batch_size
        self._flush_interval = flush_interval
        self._capacity = capacity
        self._running = False
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._events: deque[AuditEvent] = deque()
        self._batch: _Batch | None = None
        self._thread: threading.Thread | None = None
        self._failures_in_a_row = 0
        self._flushed = self._failed_flushes = self._dropped = 0

    def start(self) -> None:
        """Start the background thread; called by `Database.open`. Starting twice does nothing."""
        with self._lock:
            self._closed = False
            if not self._running:
                self._running = True
                atexit.register(self._close_at_exit)
            self._start_thread()

    def _start_thread(self) -> None:
        if self._thread is None:
            # Its own event: one that was left behind at a deadline must not take the new start for its own.
            stop = self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(stop, self._wake), name="equitie-audit-flush", daemon=True
            )
            self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop the thread and write what is queued. Closing twice does nothing.

        Args:
            timeout: seconds for all of it.

        Raises:
            UnavailableError: the time was up first.
            Exception: what the last attempt to write raised. Either way the events stay queued, and `flush` or another
                `close` tries again.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closed = True
            self._running = False
            thread, self._thread = self._thread, None
            self._stop.set()
            self._wake.set()
        atexit.unregister(self._close_at_exit)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        self.flush(deadline)

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except Exception as error:  # noqa: BLE001 - the interpreter is going down; all that is left is to say so
            _log.error("audit.lost_at_exit", events=self.stats().queued, error=type(error).__name__)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the parent writes what was queued, the child's thread starts when needed."""
        self._reset()

    def add(self, event: AuditEvent) -> None:
        """Queue an event; when there is no room, first write a batch in the caller's time.

        Raises:
            NotOpenError: the queue is closed.
            Exception: there is no room, and writing failed; the event was not queued.
        """
        full_batch = False
        while True:
            with self._lock:
                if self._closed:
                    raise NotOpenError(
                        "The audit logger is closed: log before the database is closed, or open it again."
                    )
                if self._queued() < self._capacity:
                    self._events.append(event)
                    if self._running:
                        self._start_thread()  # a forked child has none until here
                    full_batch = self._queued() >= self._batch_size
                    break
            self._make_room()
        if full_batch:
            self._wake.set()

    def _queued(self) -> int:
        return len(self._events) + (len(self._batch.events) if self._batch else 0)

    def _make_room(self) -> None:
        with self._flush_lock:
            with self._lock:
                full = self._queued() >= self._capacity
            if full:
                self._write_batch(None)

    def flush(self, deadline: float | None) -> None:
        """Write what is queued now.

        Args:
            deadline: when to give up, by the monotonic clock in seconds; None for the database's own limits.

        Raises:
            UnavailableError: the time was up first.
            Exception: what writing raised; the events stay queued.
        """
        if not self._flush_lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise self._out_of_time()
        try:
            with self._lock:
                # Only what is there now: others may add faster than one thread can write.
                left = self._queued()
            while left > 0:
                if deadline is not None and time.monotonic() >= deadline:
                    raise self._out_of_time()
                left -= self._write_batch(deadline)
                with self._lock:
                    left = min(left, self._queued())
        finally:
            self._flush_lock.release()

    def _out_of_time(self) -> UnavailableError:
        queued = self.stats().queued
        return UnavailableError(
            f"The audit log could not be written in time: {queued} events are still queued; call flush() again."
        )

    def _write_batch(self, deadline: float | None) -> int:
        """Write one batch, under the flush lock; return how many events left the queue."""
        with self._lock:
            if self._batch is None and self._events:
                size = min(self._batch_size, len(self._events))
                self._batch = _Batch([self._events.popleft() for _ in range(size)])
            batch = self._batch
        if batch is None:
            return 0
        options = {} if deadline is None else {"timeout": max(0.001, deadline - time.monotonic())}
        try:
            with as_service("audit log"):
                self._execute_write(batch.store, name="equitie.audit.flush", **options)
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            return self._set_aside(batch, error)
        except BaseException as error:
            # An interrupt may have hit between COMMIT and its reply.
            if isinstance(error, CommitOutcomeUnknown) or not isinstance(error, Exception):
                batch.outcome_unknown = True
            with self._lock:
                self._failed_flushes += 1
                self._failures_in_a_row += 1
            raise
        with self._lock:
            self._batch = None
            self._flushed += len(batch.events)
            self._failures_in_a_row = 0
        return len(batch.events)

    def _set_aside(self, batch: _Batch, error: psycopg.Error) -> int:
        """Halve a batch the server refuses for its content until the one event it refuses is alone.

        Without this, one event would keep every later one out of the log.
        """
        with self._lock:
            if len(batch.events) > 1:
                half = len(batch.events) // 2
                self._batch = _Batch(batch.events[:half])
                self._events.extendleft(reversed(batch.events[half:]))
                return 0
            self._batch = None
            self._dropped += 1
        event = batch.events[0]
        _log.error(
            "audit.event_refused",
            event_id=str(event.event_id),
            action=event.action.value,
            entity_type=event.entity_type,
            sqlstate=error.sqlstate,
            error=type(error).__name__,
        )
        return 1

    def _run(self, stop: threading.Event, wake: threading.Event) -> None:
        while not stop.is_set():
            if self._failures_in_a_row:
                pause = min(_LONGEST_PAUSE, self._flush_interval * 2.0 ** min(self._failures_in_a_row - 1, 10))
                # A full batch must not cut the pause short; and many processes must not come back at the same moment.
                stop.wait(pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
            else:
                wake.wait(self._flush_interval)
                wake.clear()
            if stop.is_set():
                return
            try:
                self.flush(None)
            except Exception as error:  # noqa: BLE001 - counted, kept and tried again
                _log.warning("audit.flush_failed", queued=self.stats().queued, error=type(error).__name__)

    def stats(self) -> AuditStats:
        """Counters and gauges, as of now."""
        with self._lock:
            oldest = self._batch.events[0] if self._batch else (self._events[0] if self._events else None)
            return AuditStats(
                queued=self._queued(),
                oldest_queued_seconds=0.0 if oldest is None else time.monotonic() - oldest.queued_at,
                flushed=self._flushed,
                failed_flushes=self._failed_flushes,
                dropped=self._dropped,
            )
