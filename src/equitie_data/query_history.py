"""What statements cost, by minute for an hour and by hour for a day, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from equitie_data.fingerprint import OTHER
from equitie_data.latency import LatencySketch, bucket_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["QueryCounts", "QueryHistory", "QueryKey"]

QueryKey: TypeAlias = "tuple[str, str]"
"""Fingerprint and kind."""

_MINUTES = 60
_HOURS = 24
# Of a minute that is over, the statements that lead by any of these are kept; the rest adds up under OTHER.
_LEADERS = 100


class QueryCounts:
    """The calls of one statement within one span of time.

    Attributes:
        calls: How many, failed ones included.
        errors: How many failed.
        rows: Rows returned or changed.
        hits: Of look-ups in a cache, how many found something.
        seconds: Of all calls together.
        longest: Seconds of the longest call.
        over: Calls that took longer than 1, 3 and 5 seconds.
        slow: Calls above the monitor's thresholds MEDIUM, HIGH and CRITICAL; a critical one counts only there.
        codes: Failures by SQLSTATE, or by the error's class where the server gave none.
        latency: The distribution of the calls' durations.
    """

    __slots__ = ("calls", "codes", "errors", "hits", "latency", "longest", "over", "rows", "seconds", "slow")

    def __init__(self) -> None:
        self.calls = 0
        self.errors = 0
        self.rows = 0
        self.hits = 0
        self.seconds = 0.0
        self.longest = 0.0
        self.over = (0, 0, 0)
        self.slow = (0, 0, 0)
        self.codes: dict[str, int] | None = None
        self.latency = LatencySketch()

    def add(self, seconds: float, rows: int | None) -> None:
        """Count one call."""
        self.calls += 1
        self.seconds += seconds
        if rows:
            self.rows += rows
        if seconds > self.longest:  # noqa: PLR1730 - half the price of max()
            self.longest = seconds
        if seconds > 1:
            one, three, five = self.over
            self.over = (one + 1, three + (seconds > 3), five + (seconds > 5))
        buckets = self.latency.buckets
        bucket = bucket_of(seconds)
        buckets[bucket] = buckets.get(bucket, 0) + 1

    def add_error(self, code: str) -> None:
        """Count the call just added as failed."""
        self.errors += 1
        if self.codes is None:
            self.codes = {}
        self.codes[code] = self.codes.get(code, 0) + 1

    def merge(self, other: QueryCounts) -> None:
        """Add what another span counted."""
        self.calls += other.calls
        self.errors += other.errors
        self.rows += other.rows
        self.hits += other.hits
        self.seconds += other.seconds
        self.longest = max(self.longest, other.longest)
        self.over = _sum(self.over, other.over)
        self.slow = _sum(self.slow, other.slow)
        if other.codes:
            codes = self.codes = self.codes or {}
            for code, errors in other.codes.items():
                codes[code] = codes.get(code, 0) + errors
        self.latency.merge(other.latency)

    def to_json(self) -> dict[str, Any]:
        """The counts as columns of `public.query_stats`."""
        return {
            "calls": self.calls,
            "errors": self.errors,
            "rows": self.rows,
            "total_ms": self.seconds * 1000,
            "max_ms": self.longest * 1000,
            "over_1s": self.over[0],
            "over_3s": self.over[1],
            "over_5s": self.over[2],
            "buckets": self.latency.to_json(),
        }


def _sum(left: tuple[int, int, int], right: tuple[int, int, int]) -> tuple[int, int, int]:
    return (left[0] + right[0], left[1] + right[1], left[2] + right[2])


class QueryHistory:
    """Counts of the last 60 minutes by minute, and of the 24 hours before by hour.

    Totals are exact. Of a minute that is over it keeps the hundred statements that lead by time, by longest run, by
    calls and by errors; the others add up under `OTHER`. It takes no lock: whoever shares one between threads holds
    theirs.
    """

    def __init__(self) -> None:
        self._minutes: dict[int, dict[QueryKey, QueryCounts]] = {}
        self._hours: dict[int, dict[QueryKey, QueryCounts]] = {}
        self._trimmed_to = 0
        self._current = 0

    def add(self, minute: int, key: QueryKey, counts: QueryCounts) -> None:
        """Add counts to a minute, given as minutes since the epoch."""
        _add(self._minutes.setdefault(minute, {}), key, counts)

    def advance(self, minute: int) -> None:
        """Let the given minute be the current one: shorten those that are over, and forget what is too old."""
        self._current = max(self._current, minute)
        # The minute before may still be written to: what was counted in it is handed over every few seconds.
        for old in [each for each in self._minutes if self._trimmed_to <= each < minute - 1]:
            self._minutes[old] = _leaders(self._minutes[old])
        self._trimmed_to = max(self._trimmed_to, minute - 1)
        for old in [each for each in self._minutes if each <= minute - _MINUTES]:
            hour = self._hours.setdefault(old // 60, {})
            for key, counts in self._minutes.pop(old).items():
                _add(hour, key, counts)
            self._hours[old // 60] = _leaders(hour)
        for old in [each for each in self._hours if each <= minute // 60 - _HOURS]:
            del self._hours[old]

    def since(self, minute: int) -> dict[QueryKey, QueryCounts]:
        """Everything counted since a minute, by statement; beyond the last hour, since the beginning of its hour."""
        found: dict[QueryKey, QueryCounts] = {}
        spans = [self._hours[hour] for hour in self._hours_since(minute)]
        spans += [counts for each, counts in self._minutes.items() if each >= minute]
        for span in spans:
            for key, counts in span.items():
                _add(found, key, counts)
        return found

    def oldest(self, minute: int) -> int | None:
        """The first minute of what `since` would add up; None when there is nothing."""
        found = [hour * 60 for hour in self._hours_since(minute)]
        found += [each for each in self._minutes if each >= minute]
        return min(found, default=None)

    def _hours_since(self, minute: int) -> list[int]:
        if minute >= self._current - _MINUTES:
            return []
        return [hour for hour in self._hours if hour >= minute // 60]

    def fingerprints(self) -> set[str]:
        """Every fingerprint that is mentioned."""
        return {key[0] for spans in (self._minutes, self._hours) for span in spans.values() for key in span}


def _add(span: dict[QueryKey, QueryCounts], key: QueryKey, counts: QueryCounts) -> None:
    known = span.get(key)
    if known is None:
        known = span[key] = QueryCounts()
    known.merge(counts)


def _leaders(span: Mapping[QueryKey, QueryCounts]) -> dict[QueryKey, QueryCounts]:
    if len(span) <= _LEADERS:
        return dict(span)
    orders: Iterable[Callable[[QueryKey], float]] = (
        lambda key: span[key].seconds,
        lambda key: span[key].longest,
        lambda key: span[key].calls,
        lambda key: span[key].errors,
    )
    kept = {key for order in orders for key in sorted(span, key=order, reverse=True)[:_LEADERS]}
    leaders = {key: counts for key, counts in span.items() if key in kept}
    for key, counts in span.items():
        if key not in kept:
            _add(leaders, (OTHER, key[1]), counts)
    return leaders
