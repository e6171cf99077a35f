"""When measurements become alerts, and which alerts are open: each fires once, and again only after it cleared."""

from __future__ import annotations

from collections import deque
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs

from equitie_data.errors import ConfigurationError

if TYPE_CHECKING:
    from equitie_data.redaction import JsonValue

__all__ = ["Alert", "AlertBook", "AlertType", "Severity", "SlidingRate", "Thresholds"]

AlertType: TypeAlias = Literal["SLOW_QUERY", "HIGH_LOAD", "ERROR_RATE", "CACHE_MISS"]
Severity: TypeAlias = Literal["LOW", "MEDIUM", "HIGH", "CRITICAL"]

_RANK: dict[Severity, int] = {"LOW": 0, "MEDIUM": 1, "HIGH": 2, "CRITICAL": 3}


@attrs.frozen(kw_only=True)
class Thresholds:
    """What is too much. Every limit is strict: a statement of exactly one second is not slow.

    Attributes:
        slow_medium: Seconds above which a statement is slow, severity MEDIUM.
        slow_high: The same, HIGH.
        slow_critical: The same, CRITICAL.
        slow_clear_after: Seconds without a slow run after which a statement's alert clears.
        error_rate: Share of failed statements above which the error rate alerts.
        error_rate_clear: Share at or below which that alert clears.
        error_rate_window: Seconds the share is taken over, sliding.
        error_rate_statements: Statements the window must hold before it can alert.
        errors_ignored: SQLSTATEs, or beginnings of some, that are the caller's business and do not count as failed
            here: ``("23",)`` leaves out violated constraints.
        cache_hit_rate: Share of hits below which the cache alerts.
        cache_hit_rate_clear: Share at or above which that alert clears.
        cache_window: Seconds the share is taken over, sliding.
        cache_lookups: Look-ups the window must hold before it can alert.

    Raises:
        ConfigurationError: The limits contradict each other.
    """

    slow_medium: float = 1.0
    slow_high: float = 3.0
    slow_critical: float = 5.0
    slow_clear_after: float = 300.0
    error_rate: float = 0.05
    error_rate_clear: float = 0.04
    error_rate_window: float = 300.0
    error_rate_statements: int = 20
    errors_ignored: tuple[str, ...] = ()
    cache_hit_rate: float = 0.70
    cache_hit_rate_clear: float = 0.75
    cache_window: float = 900.0
    cache_lookups: int = 100

    def __attrs_post_init__(self) -> None:
        if not 0 < self.slow_medium < self.slow_high < self.slow_critical:
            raise ConfigurationError("Thresholds: 0 < slow_medium < slow_high < slow_critical must hold.")
        if not 0 <= self.error_rate_clear <= self.error_rate < 1:
            raise ConfigurationError("Thresholds: 0 <= error_rate_clear <= error_rate < 1 must hold.")
        if not 0 < self.cache_hit_rate <= self.cache_hit_rate_clear <= 1:
            raise ConfigurationError("Thresholds: 0 < cache_hit_rate <= cache_hit_rate_clear <= 1 must hold.")
        if min(self.error_rate_window, self.cache_window, self.slow_clear_after) <= 0:
            raise ConfigurationError("Thresholds: windows and slow_clear_after must be longer than 0 seconds.")
        if min(self.error_rate_statements, self.cache_lookups) < 1:
            raise ConfigurationError("Thresholds: error_rate_statements and cache_lookups must be 1 or more.")


@attrs.frozen(kw_only=True)
class Alert:
    """Something is wrong.

    Attributes:
        alert_type: The platform's name for its kind.
        severity: How wrong.
        rule: The rule that fired.
        subject: What it fired about: a fingerprint, or empty for the whole database.
        message: One sentence for a person, without any value.
        details: The figures behind it.
        fired_at: When.
    """

    alert_type: AlertType
    severity: Severity
    rule: str
    subject: str
    message: str
    details: dict[str, JsonValue]
    fired_at: datetime

    @property
    def alert_id(self) -> str:
        """Rule and subject; two alerts of one id are the same trouble."""
        return f"{self.rule}:{self.subject}"

    def to_json(self) -> dict[str, Any]:
        """The alert as `equitie_private.raise_alerts` takes it."""
        return {
            "alert_type": self.alert_type,
            "severity": self.severity,
            "rule": self.rule,
            "subject": self.subject,
            "message": self.message,
            "details": self.details,
            "timestamp": self.fired_at.isoformat(),
        }


class _Firing:
    __slots__ = ("alert", "last_seen", "resolved_at")

    def __init__(self, alert: Alert, now: float) -> None:
        self.alert = alert
        self.last_seen = now
        self.resolved_at: float | None = None


class AlertBook:
    """Which alerts are open, and which were lately.

    It takes no lock: whoever shares one between threads holds theirs. Times are seconds since the epoch.

    Args:
        remembered: How many alerts `recent` goes back to.
    """

    def __init__(self, remembered: int = 1000) -> None:
        self._open: dict[tuple[str, str], _Firing] = {}
        self._recent: deque[_Firing] = deque(maxlen=remembered)
        self.fired = 0
        self.repeated = 0
        """How often an open alert would have fired again."""

    def fire(
        self,
        alert_type: AlertType,
        severity: Severity,
        *,
        rule: str,
        subject: str = "",
        message: str,
        details: dict[str, JsonValue],
        now: float,
    ) -> Alert | None:
        """Open an alert, or raise the severity of an open one.

        Returns:
            The alert to tell people about; None if they have been told already.
        """
        known = self._open.get((rule, subject))
        if known is not None:
            known.last_seen = now
            if _RANK[severity] <= _RANK[known.alert.severity]:
                self.repeated += 1
                return None
        alert = Alert(
            alert_type=alert_type,
            severity=severity,
            rule=rule,
            subject=subject,
            message=message,
            details=details,
            fired_at=_moment(now),
        )
        if known is None:
            known = self._open[rule, subject] = _Firing(alert, now)
            self._recent.append(known)
        else:
            known.alert = alert
        self.fired += 1
        return alert

    def is_open(self, rule: str, subject: str = "") -> bool:
        """Whether this alert has fired and not cleared."""
        return (rule, subject) in self._open

    def last_seen(self, rule: str, subject: str) -> float | None:
        """When an open alert had its last cause; None if it is not open."""
        known = self._open.get((rule, subject))
        return None if known is None else known.last_seen

    def clear(self, rule: str, subject: str, now: float) -> None:
        """Close an alert; it may fire again from here on."""
        self._open.pop((rule, subject)).resolved_at = now

    def idle(self, rule: str, before: float) -> list[str]:
        """The subjects of a rule's open alerts that had no cause since then."""
        return [key[1] for key, known in self._open.items() if key[0] == rule and known.last_seen < before]

    def recent(self) -> list[dict[str, Any]]:
        """The remembered alerts as JSON, newest first."""
        return [
            {
                **known.alert.to_json(),
                "alert_id": known.alert.alert_id,
                "state": "firing" if known.resolved_at is None else "resolved",
                "resolved_at": None if known.resolved_at is None else _moment(known.resolved_at).isoformat(),
            }
            for known in reversed(self._recent)
        ]


class SlidingRate:
    """How many of the events of the last so many seconds were of one kind.

    In thirty slices: what it answers covers the window to within a thirtieth.

    Args:
        window: Seconds.
    """

    __slots__ = ("_slice_seconds", "_slices", "matching", "total")

    _SLICES = 30

    def __init__(self, window: float) -> None:
        self._slice_seconds = window / self._SLICES
        self._slices: deque[list[int]] = deque()
        self.total = 0
        self.matching = 0

    def add(self, now: float, *, matches: bool) -> None:
        """Count one event."""
        current = int(now / self._slice_seconds)
        slices = self._slices
        if not slices or slices[-1][0] < current:
            self._expire(current)
            slices.append([current, 0, 0])
        newest = slices[-1]
        newest[1] += 1
        self.total += 1
        if matches:
            newest[2] += 1
            self.matching += 1

    def expire(self, now: float) -> None:
        """Forget what has left the window; `add` does so by itself."""
        self._expire(int(now / self._slice_seconds))

    def _expire(self, current: int) -> None:
        slices = self._slices
        while slices and slices[0][0] <= current - self._SLICES:
            _, total, matching = slices.popleft()
            self.total -= total
            self.matching -= matching


def _moment(now: float) -> datetime:
    return datetime.fromtimestamp(now, timezone.utc)
