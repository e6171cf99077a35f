"""What the database's statements cost, what is wrong with them, and telling those who must know.

The monitor is a subscriber (`equitie_data.hooks`): it takes every statement's end in the thread that ran it, adds a few
numbers up under a lock, and returns. Writing to the database and calling alert sinks is a background thread's work. A
statement's text is read once and then remembered, and only its normal form is kept, never a value.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import re
import socket
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import psycopg

from equitie_data._log import get_logger
from equitie_data.alerts import Alert, Thresholds
from equitie_data.context import as_service
from equitie_data.errors import CommitOutcomeUnknown, ConfigurationError
from equitie_data.fingerprint import OTHER
from equitie_data.hooks import StatementEnded
from equitie_data.monitor_stats import MonitorStats
from equitie_data.monitor_storage import Measurements
from equitie_data.query_history import QueryCounts, QueryHistory
from equitie_data.query_report import STATEMENTS, patterns, seconds_of_window, summary, top, total_of
from equitie_data.query_watch import MinuteKey, QueryWatch, moment, names_of
from equitie_data.redaction import DEFAULT, Redaction

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from equitie_data.query_report import Kind

__all__ = ["Alert", "MonitorStats", "PerformanceMonitor", "Thresholds"]

P = ParamSpec("P")
R = TypeVar("R")

_log = get_logger(__name__)

_SCHEMA_VERSION = 1
_WRITES = re.compile(r"\s*(?:insert|update|delete|merge|copy|truncate|call|create|alter|drop)\b", re.IGNORECASE)
# The monitor's own statements run in the context of its flush: measuring them would make work out of no work.
_unwatched: ContextVar[bool] = ContextVar("equitie_data.unwatched", default=False)


class PerformanceMonitor:
    """Counts statements, finds slow ones, raises alerts, and stores it all by the minute.

    Args:
        execute_write: `Database.execute_write`, or anything that takes the same arguments; None to store nothing.
        pool_stats: Returns the pools' gauges for the dashboard.
        thresholds: When to raise an alert.
        flush_interval: Seconds between two flushes, give or take a fifth so that many processes spread.
        alert_sinks: Called with every `Alert`, on the monitor's thread: at once for a critical one, else with a flush.
        max_fingerprints: Different statements told apart; also the most minute counts that wait to be stored.
        max_pending: Metrics, alert changes and alerts for the sinks that wait, each.
        samples_per_flush: Slow or failed statements that are also stored singly.
        redaction: What must not be written down (see `equitie_data.redaction`).
        clock: Seconds since the epoch.
    """

    event_types = (StatementEnded,)

    def __init__(
        self,
        *,
        execute_write: Callable[..., Any] | None = None,
        pool_stats: Callable[[], Mapping[str, Any]] | None = None,
        thresholds: Thresholds = Thresholds(),  # noqa: B008 - frozen
        flush_interval: float = 10.0,
        alert_sinks: Sequence[Callable[[Alert], object]] = (),
        max_fingerprints: int = 5000,
        max_pending: int = 10_000,
        samples_per_flush: int = 100,
        redaction: Redaction = DEFAULT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if flush_interval <= 0 or min(max_fingerprints, max_pending) < 1 or samples_per_flush < 0:
            raise ConfigurationError("PerformanceMonitor: its interval and sizes must be above 0.")
        self._execute_write = execute_write
        self._pool_stats = pool_stats
        self._flush_interval = flush_interval
        self._sinks = tuple(alert_sinks)
        self._max_fingerprints = max_fingerprints
        self._redaction = redaction
        self._clock = clock
        self._running = False
        self._new_watch = functools.partial(
            QueryWatch,
            thresholds=thresholds,
            stores=execute_write is not None,
            tells=bool(alert_sinks),
            max_fingerprints=max_fingerprints,
            max_pending=max_pending,
            samples_per_flush=samples_per_flush,
            redaction=redaction,
            clock=clock,
            hurry=self._hurry,
        )
        self._reset()

    def _hurry(self) -> None:
        self._wake.set()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._history_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._started = self._clock()
        self._watch = self._new_watch()
        self._history = QueryHistory()
        self._unsaved: dict[MinuteKey, QueryCounts] = {}
        self._flushed = self._failed_flushes = self._sink_errors = 0

    # --- life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the background thread; called by `Database.open`. Starting twice does nothing."""
        self._running = True
        self._start_thread()

    def _start_thread(self) -> None:
        # Also called by the first event in a forked child, whose parent had the thread.
        with self._lock:
            if self._thread is None and self._running:
                # Its own event: one that was left behind at a deadline must not take the new start for its own.
                stop = self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(stop, self._wake), name="equitie-monitor", daemon=True
                )
                self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop the thread, tell the sinks, and store what is there. Closing twice does nothing.

        Args:
            timeout: Seconds for all of it.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            was_running, self._running = self._running, False
            thread, self._thread = self._thread, None
            self._stop.set()
            self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        if was_running:
            self._tell_sinks()
            self.flush(timeout=max(0.001, deadline - time.monotonic()))

    def after_fork(self) -> None:
        """Begin anew in a forked child: the parent keeps what was counted, the child's thread starts when needed."""
        self._reset()

    def stats(self) -> MonitorStats:
        """Counters, as of now."""
        counters = self._watch.counters()
        with self._lock:
            counters["sink_errors"] += self._sink_errors
            return MonitorStats(flushed=self._flushed, failed_flushes=self._failed_flushes, **counters)

    # --- recording ----------------------------------------------------------------------------------------

    def on_event(self, event: object, /) -> None:
        """Take an event of the pool; counts statements, and ignores everything else."""
        if type(event) is StatementEnded and not _unwatched.get():
            if self._thread is None and self._running:
                self._start_thread()
            self._watch.record(
                event.sql,
                event.kind,
                event.seconds,
                event.rows,
                event.sqlstate,
                event.error,
                event.name,
                event.actor.user_id,
            )

    def track_query(
        self,
        query_text: str,
        execution_time_ms: float,
        rows_returned: int | None = None,
        cache_hit: bool | None = None,
        error: BaseException | str | None = None,
    ) -> None:
        """Count a statement that ran elsewhere, or an answer that came from a cache.

        Args:
            query_text: The statement; its values are not kept.
            execution_time_ms: How long it took, milliseconds.
            rows_returned: Rows it returned or changed.
            cache_hit: Whether a cache had the answer; None if no cache was asked. A hit counts as a look-up, not as a
                statement; a miss counts as both.
            error: What it failed with: the exception, its class name, or a SQLSTATE. Any other text counts as a failure
                without a name, because a message may hold values.
        """
        if cache_hit is not None:
            self.track_cache_lookup(hit=cache_hit)
            if cache_hit:
                return
        sqlstate, name = names_of(error)
        kind: Kind = "write" if _WRITES.match(query_text) else "read"
        self._watch.record(query_text, kind, execution_time_ms / 1000, rows_returned, sqlstate, name, None, None)

    def track_cache_lookup(self, *, hit: bool) -> None:
        """Count a look-up in a cache."""
        self._watch.record_lookup(hit=hit)

    def track_system_metric(
        self, name: str, value: float, unit: str | None = None, metadata: Mapping[str, object] | None = None
    ) -> None:
        """Record a measurement that is not of one statement.

        Args:
            name: Dotted name.
            value: Its value; one that is not finite is counted as dropped.
            unit: Its unit.
            metadata: Labels; secrets are masked.
        """
        self._watch.record_metric(name, value, unit, metadata)

    def with_performance_tracking(self, name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a function, or a coroutine function, whose calls are timed and counted as operation `name`."""

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def tracked_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                    started = time.perf_counter()
                    try:
                        result = await function(*args, **kwargs)
                    except Exception as error:
                        self._record_operation(name, started, error)
                        raise
                    self._record_operation(name, started, None)
                    return result

                return cast("Callable[P, R]", tracked_coroutine)

            @functools.wraps(function)
            def tracked(*args: P.args, **kwargs: P.kwargs) -> R:
                started = time.perf_counter()
                try:
                    result = function(*args, **kwargs)
                except Exception as error:
                    self._record_operation(name, started, error)
                    raise
                self._record_operation(name, started, None)
                return result

            return tracked

        return decorate

    def _record_operation(self, name: str, started: float, error: Exception | None) -> None:
        seconds = time.perf_counter() - started
        code = None if error is None else getattr(error, "sqlstate", None) or type(error).__name__
        self._watch.record_operation(name, seconds, code)

    # --- background ---------------------------------------------------------------------------------------

    def _run(self, stop: threading.Event, wake: threading.Event) -> None:
        due = 0.0
        while not stop.is_set():
            now = time.monotonic()
            if now >= due:
                due = now + self._flush_interval * random.uniform(0.8, 1.2)  # noqa: S311 - jitter
            wake.wait(max(0.0, due - time.monotonic()))
            wake.clear()
            if stop.is_set():
                return
            self._tell_sinks()
            self.flush()

    def _tell_sinks(self) -> None:
        while (alert := self._watch.next_untold()) is not None:
            for sink in self._sinks:
                try:
                    sink(alert)
                except Exception as error:  # noqa: BLE001 - one sink's trouble is not the others'
                    with self._lock:
                        self._sink_errors += 1
                    _log.warning("monitor.alert_sink_failed", alert=alert.alert_id, error=type(error).__name__)

    def flush(self, timeout: float | None = None) -> bool:
        """Store what was measured so far.

        Args:
            timeout: Seconds; None for the database's own limits.

        Returns:
            False if that failed: it is counted and logged, what was measured is kept and tried again.
        """
        with self._flush_lock:
            self._watch.clear_idle(self._clock())
            with self._history_lock:
                self._take_counts()
                counts, self._unsaved = self._unsaved, {}
                self._watch.forget_unused(lambda: self._history.fingerprints() | {key[1] for key in counts})
            if self._execute_write is None:
                return True
            texts = self._watch.texts()
            samples, metrics, alerts = self._watch.take_waiting()
            measured = Measurements(
                # In one order, whoever flushes: two processes must not wait for each other's rows.
                statements=[self._row(key, counts[key], texts) for key in sorted(counts)],
                samples=samples,
                metrics=metrics,
                alerts=alerts,
            )
            return not measured or self._store(self._execute_write, measured, counts, timeout)

    def _store(
        self,
        execute_write: Callable[..., Any],
        measured: Measurements,
        counts: dict[MinuteKey, QueryCounts],
        timeout: float | None,
    ) -> bool:
        calls = sum(each.calls for each in counts.values())
        options = {} if timeout is None else {"timeout": timeout}
        token = _unwatched.set(True)
        try:
            with as_service("performance monitor"):
                execute_write(measured.store, name="equitie.monitor.flush", **options)
        except Exception as error:  # noqa: BLE001 - monitoring never breaks what it watches
            # Sent again, an unknown outcome might count everything twice, and nobody could tell; content the server
            # refused it would refuse for ever.
            lost = isinstance(error, (CommitOutcomeUnknown, psycopg.DataError, psycopg.IntegrityError))
            if lost:
                singles = len(measured.samples) + len(measured.metrics) + len(measured.alerts)
                self._watch.count_dropped(calls + singles)
            else:
                with self._history_lock:
                    newer, self._unsaved = self._unsaved, {}
                    for key, each in [*counts.items(), *newer.items()]:
                        self._add_unsaved(key, each)
                self._watch.give_back(measured.samples, measured.metrics, measured.alerts)
            with self._lock:
                self._failed_flushes += 1
            _log.warning("monitor.flush_failed", error=type(error).__name__, lost=lost)
            return False
        finally:
            _unwatched.reset(token)
        with self._lock:
            self._flushed += calls
        return True

    def _take_counts(self) -> None:
        """Hand the query path's counts over to the history, under its lock."""
        for (minute, fingerprint, kind), counts in self._watch.take_counts().items():
            self._history.add(minute, (fingerprint, kind), counts)
            if self._execute_write is not None and kind in STATEMENTS:
                self._add_unsaved((minute, fingerprint, kind), counts)
        self._history.advance(int(self._clock() // 60))

    def _add_unsaved(self, key: MinuteKey, counts: QueryCounts) -> None:
        known = self._unsaved.get(key)
        if known is None and len(self._unsaved) >= self._max_fingerprints:
            key = (key[0], OTHER, key[2])
            known = self._unsaved.get(key)
            if known is None and len(self._unsaved) >= 2 * self._max_fingerprints:
                self._watch.count_dropped(counts.calls)
                return
        if known is None:
            known = self._unsaved[key] = QueryCounts()
        known.merge(counts)

    def _row(self, key: MinuteKey, counts: QueryCounts, texts: Mapping[str, str]) -> dict[str, Any]:
        minute, fingerprint, kind = key
        return {
            "minute": moment(minute * 60),
            "worker": self._worker,
            "fingerprint": fingerprint,
            "query_text": texts.get(fingerprint, fingerprint),
            "operation": kind,
            **counts.to_json(),
        }

    # --- reporting ----------------------------------------------------------------------------------------

    def analyze_query_patterns(self, window: str = "1h", limit: int = 10) -> dict[str, Any]:
        """Which statements to mend first.

        Args:
            window: How far back, at most ``"24h"``; beyond the last hour by whole hours.
            limit: How many of each.

        Returns:
            ``slow`` by mean duration, ``frequent`` by calls, ``costly`` by time in all, ``error_prone`` by failures;
            each a list of normalised statements with their figures.
        """
        counts, texts, _, _ = self._measured(window)
        return patterns(counts, texts, limit)

    def get_dashboard_data(self, window: str = "1h") -> dict[str, Any]:
        """Everything a dashboard shows, of this process; works without a database.

        Args:
            window: How far back, at most ``"24h"``; beyond the last hour by whole hours.

        Returns:
            A dictionary `json.dumps` takes: ``queries``, ``operations``, ``health``, ``alerts``, ``cache``, ``errors``
            and ``metrics``, durations in milliseconds. ``schema_version`` rises when something in it changes or goes.

        Raises:
            ValueError: The window is not written like ``"5m"`` or ``"1h"``.
        """
        counts, texts, since, now = self._measured(window)
        total = total_of(counts, *STATEMENTS)
        cache = total_of(counts, "cache")
        leading = patterns(counts, texts, limit=10)
        self._watch.clear_idle(now)
        alerts, errors, metrics = self._watch.recent()
        return {
            "schema_version": _SCHEMA_VERSION,
            "generated_at": moment(now),
            "window": window,
            "since": moment(since),
            "queries": {
                **summary(total),
                "qps": round(total.calls / max(1.0, now - since), 3),
                "top_slow": leading["slow"],
                "top_frequent": leading["frequent"],
                "top_errors": leading["error_prone"],
            },
            "operations": top(counts, texts, ("operation",), by=lambda each: each.calls, limit=10),
            "health": self._health(),
            "alerts": alerts,
            "cache": {
                "hits": cache.hits,
                "misses": cache.calls - cache.hits,
                "hit_rate": cache.hits / cache.calls if cache.calls else None,
            },
            "errors": {
                "rate": total.errors / total.calls if total.calls else None,
                "by_sqlstate": dict(sorted((total.codes or {}).items())),
                "recent": errors,
            },
            "metrics": metrics,
        }

    def _measured(self, window: str) -> tuple[dict[tuple[str, str], QueryCounts], Mapping[str, str], float, float]:
        now = self._clock()
        first = int((now - seconds_of_window(window)) // 60)
        with self._history_lock:
            self._take_counts()
            counts = self._history.since(first)
            oldest = self._history.oldest(first)
        texts = self._watch.texts()
        since = max(self._started, 60.0 * (first if oldest is None else oldest))
        return counts, texts, min(since, now), now

    def _health(self) -> dict[str, Any]:
        if self._pool_stats is None:
            return {"pool": None, "active_connections": None}
        try:
            pool = self._pool_stats()
        except Exception as error:  # noqa: BLE001 - a dashboard that fails with what it shows is of no use
            return {"pool": {"error": type(error).__name__}, "active_connections": None}
        nodes = [node for node in pool.values() if isinstance(node, dict)]
        shown = self._redaction.value(pool)
        return {"pool": shown, "active_connections": sum(int(node.get("in_use", 0)) for node in nodes)}
