"""Counting statements as they end, and judging them: in memory, under one lock, for microseconds."""

from __future__ import annotations

import builtins
import math
import re
import threading
from collections import deque
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from psycopg import errors

from equitie_data.alerts import Alert, AlertBook, SlidingRate, Thresholds
from equitie_data.fingerprint import OTHER, Fingerprints
from equitie_data.query_history import QueryCounts
from equitie_data.query_report import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from uuid import UUID

    from equitie_data.monitor_storage import AlertChange
    from equitie_data.redaction import Redaction

__all__ = ["MinuteKey", "QueryWatch", "moment", "names_of"]

MinuteKey: TypeAlias = "tuple[int, str, str]"
"""Minutes since the epoch, fingerprint, kind."""

# A SQLSTATE, or what can only be the name of an exception: any other word might be somebody's name.
_SQLSTATE = re.compile(r"[0-9A-Z]{5}")
_ERROR_NAME = re.compile(r"(?:[a-z_][a-z0-9_]*\.){0,8}[A-Z][A-Za-z0-9]{0,70}(?:Error|Exception|Failure|Timeout)")

_SLOW, _ERRORS, _CACHE_MISSES = "slow_query", "error_rate", "cache_hit_rate"


class QueryWatch:
    """What the query path touches of the monitor.

    Args:
        thresholds: When to raise an alert.
        stores: Whether what is counted will be stored; if not, nothing is queued for it.
        tells: Whether anybody is to be told of alerts.
        max_fingerprints: Different statements told apart.
        max_pending: Metrics, alert changes and untold alerts that wait, each.
        samples_per_flush: Slow or failed statements kept singly until they are taken.
        redaction: What must not be written down.
        clock: Seconds since the epoch.
        hurry: Called when an alert is critical.
    """

    def __init__(
        self,
        *,
        thresholds: Thresholds,
        stores: bool,
        tells: bool,
        max_fingerprints: int,
        max_pending: int,
        samples_per_flush: int,
        redaction: Redaction,
        clock: Callable[[], float],
        hurry: Callable[[], object],
    ) -> None:
        self._thresholds = thresholds
        self._stores = stores
        self._tells = tells
        self._max_fingerprints = max_fingerprints
        self._max_pending = max_pending
        self._samples_per_flush = samples_per_flush
        self._redaction = redaction
        self._clock = clock
        self._hurry = hurry
        self._lock = threading.Lock()
        self._fingerprints = Fingerprints(max_fingerprints)
        self._current: dict[MinuteKey, QueryCounts] = {}
        self._error_rate = SlidingRate(thresholds.error_rate_window)
        self._hit_rate = SlidingRate(thresholds.cache_window)
        self._alerts = AlertBook()
        self._alert_changes: deque[AlertChange] = deque()
        self._untold: deque[Alert] = deque()
        self._samples: deque[dict[str, Any]] = deque()
        self._metrics: deque[dict[str, Any]] = deque()
        self._latest_metrics: dict[str, dict[str, Any]] = {}
        self._recent_errors: deque[dict[str, Any]] = deque(maxlen=50)
        self._tracked = self._overflowed = self._dropped = self._samples_skipped = self._untellable = 0

    # --- recording ----------------------------------------------------------------------------------------

    def record_operation(self, name: str, seconds: float, code: str | None) -> None:
        """Count a call of a function under its name; `code` says what it failed with."""
        with self._lock:
            counts = self._counts(int(self._clock() // 60), name, "operation")
            counts.add(seconds, None)
            if code is not None:
                counts.add_error(code)

    def record_lookup(self, *, hit: bool) -> None:
        """Count a look-up in a cache."""
        now = self._clock()
        with self._lock:
            counts = self._counts(int(now // 60), *CACHE)
            counts.calls += 1
            counts.hits += hit
            self._hit_rate.add(now, matches=hit)
            self._judge_cache(now)

    def record_metric(self, name: str, value: float, unit: str | None, metadata: Mapping[str, object] | None) -> None:
        """Keep a measurement until it is taken; one that is not finite is dropped."""
        value = float(value)
        metric: dict[str, Any] = {
            "metric_name": self._redaction.text(name),
            "metric_value": value,
            "metric_unit": None if unit is None else self._redaction.text(unit),
            "timestamp": moment(self._clock()),
            "metadata": None if metadata is None else self._redaction.mapping(metadata),
        }
        with self._lock:
            if not math.isfinite(value):
                self._dropped += 1
                return
            if name in self._latest_metrics or len(self._latest_metrics) < self._max_fingerprints:
                self._latest_metrics[name] = metric
            if self._stores:
                self._append(self._metrics, metric)

    def record(  # noqa: PLR0917 - called once a statement, and keywords cost
        self,
        sql: str,
        kind: str,
        seconds: float,
        rows: int | None,
        sqlstate: str | None,
        error: str | None,
        name: str | None,
        user_id: UUID | None,
    ) -> None:
        """Count one statement; `name` is its operation's, for the sample that is kept of a slow or failed one."""
        now = self._clock()
        failed = error is not None or sqlstate is not None
        with self._lock:
            self._tracked += 1
            fingerprint = self._fingerprints.of(sql)
            counts = self._counts(int(now // 60), fingerprint, kind)
            counts.add(seconds, rows)
            blamed = failed
            if failed:
                code = sqlstate or error or "unknown"
                counts.add_error(code)
                blamed = not code.startswith(self._thresholds.errors_ignored or ("\0",))
            self._error_rate.add(now, matches=blamed)
            if blamed or self._alerts.is_open(_ERRORS):
                self._judge_errors(now)
            slow = seconds > self._thresholds.slow_medium
            if slow:
                self._judge_slow(fingerprint, kind, seconds, rows, counts, now)
            if slow or failed:
                self._sample(fingerprint, seconds, rows, sqlstate, error, name, user_id, now)

    def _counts(self, minute: int, fingerprint: str, kind: str) -> QueryCounts:
        key = (minute, fingerprint, kind)
        counts = self._current.get(key)
        if counts is None:
            if len(self._current) >= 2 * self._max_fingerprints:
                # Nobody has taken the counts for a long time: no thread runs.
                key = (minute, OTHER, kind)
                counts = self._current.get(key)
            if counts is None:
                counts = self._current[key] = QueryCounts()
        if key[1] == OTHER:
            self._overflowed += 1
        return counts

    def _sample(  # noqa: PLR0917 - as in record
        self,
        fingerprint: str,
        seconds: float,
        rows: int | None,
        sqlstate: str | None,
        error: str | None,
        name: str | None,
        user_id: UUID | None,
        now: float,
    ) -> None:
        text = self._fingerprints.texts.get(fingerprint, fingerprint)
        if sqlstate is not None or error is not None:
            failure = {
                "at": moment(now),
                "fingerprint": fingerprint,
                "query": text,
                "sqlstate": sqlstate,
                "error": error,
            }
            self._recent_errors.append(failure)
        if not self._stores:
            return
        if len(self._samples) >= self._samples_per_flush:
            self._samples_skipped += 1
            return
        self._samples.append(
            {
                "query_text": text,
                "execution_time": seconds * 1000,
                "rows_returned": rows,
                "timestamp": moment(now),
                "user_id": None if user_id is None else str(self._pseudonym(user_id)),
                "api_endpoint": None if name is None else self._redaction.text(name),
                "error": error or sqlstate,
            }
        )

    def _pseudonym(self, user_id: UUID) -> UUID:
        return self._redaction.hashed_uuid(user_id) if self._redaction.is_hashed("user_id") else user_id

    def _append(self, queue: deque[Any], entry: object) -> None:
        if len(queue) >= self._max_pending:
            queue.popleft()
            self._dropped += 1
        queue.append(entry)

    # --- judging, under the lock ----------------------------------------------------------------------------

    def _judge_slow(  # noqa: PLR0917 - as in record
        self, fingerprint: str, kind: str, seconds: float, rows: int | None, counts: QueryCounts, now: float
    ) -> None:
        limits = self._thresholds
        medium, high, critical = counts.slow
        if seconds > limits.slow_critical:
            severity, limit, counts.slow = "CRITICAL", limits.slow_critical, (medium, high, critical + 1)
        elif seconds > limits.slow_high:
            severity, limit, counts.slow = "HIGH", limits.slow_high, (medium, high + 1, critical)
        else:
            severity, limit, counts.slow = "MEDIUM", limits.slow_medium, (medium + 1, high, critical)
        last_seen = self._alerts.last_seen(_SLOW, fingerprint)
        if last_seen is not None and now - last_seen > limits.slow_clear_after:
            self._clear(_SLOW, fingerprint, now)
        self._tell(
            self._alerts.fire(
                "SLOW_QUERY",
                cast("Any", severity),
                rule=_SLOW,
                subject=fingerprint,
                message=f"A {kind} took {seconds:.3f} s, more than {limit:g} s.",
                details={
                    "fingerprint": fingerprint,
                    "query": self._fingerprints.texts.get(fingerprint, fingerprint),
                    "seconds": seconds,
                    "threshold_seconds": limit,
                    "rows": rows,
                },
                now=now,
            )
        )

    def _judge_errors(self, now: float) -> None:
        limits, rate = self._thresholds, self._error_rate
        if self._alerts.is_open(_ERRORS):
            if rate.matching <= limits.error_rate_clear * rate.total:
                self._clear(_ERRORS, "", now)
        elif rate.total >= limits.error_rate_statements and rate.matching > limits.error_rate * rate.total:
            share = rate.matching / rate.total
            self._tell(
                self._alerts.fire(
                    "ERROR_RATE",
                    "HIGH",
                    rule=_ERRORS,
                    message=f"{share:.1%} of statements failed, more than {limits.error_rate:.0%}.",
                    details={
                        "statements": rate.total,
                        "errors": rate.matching,
                        "window_seconds": limits.error_rate_window,
                    },
                    now=now,
                )
            )

    def _judge_cache(self, now: float) -> None:
        limits, rate = self._thresholds, self._hit_rate
        if self._alerts.is_open(_CACHE_MISSES):
            if rate.matching >= limits.cache_hit_rate_clear * rate.total:
                self._clear(_CACHE_MISSES, "", now)
        elif rate.total >= limits.cache_lookups and rate.matching < limits.cache_hit_rate * rate.total:
            share = rate.matching / rate.total
            self._tell(
                self._alerts.fire(
                    "CACHE_MISS",
                    "MEDIUM",
                    rule=_CACHE_MISSES,
                    message=f"The cache answered {share:.1%} of look-ups, less than {limits.cache_hit_rate:.0%}.",
                    details={"lookups": rate.total, "hits": rate.matching, "window_seconds": limits.cache_window},
                    now=now,
                )
            )

    def _tell(self, alert: Alert | None) -> None:
        if alert is None:
            return
        if self._stores:
            self._append(self._alert_changes, ("raise", alert.to_json()))
        if self._tells:
            if len(self._untold) >= self._max_pending:
                self._untellable += 1
            else:
                self._untold.append(alert)
        if alert.severity == "CRITICAL":
            self._hurry()

    def _clear(self, rule: str, subject: str, now: float) -> None:
        self._alerts.clear(rule, subject, now)
        if self._stores:
            resolved = {"rule": rule, "subject": subject, "resolved_at": moment(now)}
            self._append(self._alert_changes, ("resolve", resolved))

    # --- handing over -------------------------------------------------------------------------------------

    def clear_idle(self, now: float) -> None:
        """Close the alerts whose cause is gone."""
        with self._lock:
            for subject in self._alerts.idle(_SLOW, now - self._thresholds.slow_clear_after):
                self._clear(_SLOW, subject, now)
            self._error_rate.expire(now)
            if self._alerts.is_open(_ERRORS):
                self._judge_errors(now)
            self._hit_rate.expire(now)
            if self._alerts.is_open(_CACHE_MISSES):
                self._judge_cache(now)

    def take_counts(self) -> dict[MinuteKey, QueryCounts]:
        """Hand over what was counted since the last time."""
        with self._lock:
            current, self._current = self._current, {}
        return current

    def take_waiting(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[AlertChange]]:
        """Hand over the samples, the metrics and the alert changes that wait to be stored."""
        with self._lock:
            return _emptied(self._samples), _emptied(self._metrics), _emptied(self._alert_changes)

    def give_back(
        self, samples: list[dict[str, Any]], metrics: list[dict[str, Any]], alerts: list[AlertChange]
    ) -> None:
        """Take back what could not be stored, as far as there is room; the oldest goes first."""
        with self._lock:
            for queue, kept, limit in (
                (self._samples, samples, self._samples_per_flush),
                (self._metrics, metrics, self._max_pending),
                (self._alert_changes, alerts, self._max_pending),
            ):
                room = max(0, limit - len(queue))
                self._dropped += max(0, len(kept) - room)
                cast("deque[Any]", queue).extendleft(reversed(kept[-room:] if room else []))

    def next_untold(self) -> Alert | None:
        """Hand over one alert for the sinks."""
        with self._lock:
            return self._untold.popleft() if self._untold else None

    def count_dropped(self, entries: int) -> None:
        """Note that entries were lost elsewhere."""
        with self._lock:
            self._dropped += entries

    def texts(self) -> dict[str, str]:
        """The normalised statements by fingerprint."""
        with self._lock:
            return self._fingerprints.texts.copy()

    def forget_unused(self, used: Callable[[], set[str]]) -> None:
        """Make room for new fingerprints, if there is none left, by forgetting those nobody uses."""
        if len(self._fingerprints.texts) >= self._max_fingerprints:
            keep = used()
            with self._lock:
                self._fingerprints.keep_only(keep | {key[1] for key in self._current})

    def recent(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """The latest alerts, the latest errors, both newest first, and every metric's latest value."""
        with self._lock:
            return self._alerts.recent()[:100], list(reversed(self._recent_errors)), dict(self._latest_metrics)

    def counters(self) -> dict[str, int]:
        """The watch's part of `MonitorStats`."""
        with self._lock:
            return {
                "tracked": self._tracked,
                "dropped": self._dropped,
                "overflowed": self._overflowed,
                "samples_skipped": self._samples_skipped,
                "alerts_fired": self._alerts.fired,
                "alerts_repeated": self._alerts.repeated,
                "sink_errors": self._untellable,
            }


def _emptied(queue: deque[Any]) -> list[Any]:
    entries = list(queue)
    queue.clear()
    return entries


def moment(seconds: float) -> str:
    """Seconds since the epoch as text, ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def names_of(error: BaseException | str | None) -> tuple[str | None, str | None]:
    """An error's SQLSTATE and class name; of a text, only what looks like one of them."""
    if error is None:
        return None, None
    if isinstance(error, BaseException):
        return getattr(error, "sqlstate", None), type(error).__name__
    if _SQLSTATE.fullmatch(error):
        return error, None
    known = _ERROR_NAME.fullmatch(error) or hasattr(errors, error) or isinstance(getattr(builtins, error, None), type)
    return None, error if known else "unknown"
