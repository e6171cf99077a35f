"""Measurements as people look at them: the figures of a dashboard, and which statements to mend first."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from equitie_data.query_history import QueryCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from equitie_data.query_history import QueryKey

__all__ = ["CACHE", "STATEMENTS", "Kind", "patterns", "seconds_of_window", "summary", "top", "total_of"]

Kind: TypeAlias = Literal["read", "write", "operation", "cache"]

CACHE: QueryKey = ("cache", "cache")
"""Look-ups in a cache are counted under this key."""

STATEMENTS: tuple[Kind, Kind] = ("read", "write")
"""The kinds that are statements of the database."""

_UNITS = {"s": 1, "m": 60, "h": 3600}
_LONGEST_WINDOW = 24 * 3600


def seconds_of_window(window: str) -> int:
    """The length of a window written like ``"90s"``, ``"5m"`` or ``"24h"``.

    Raises:
        ValueError: It is not written so, or is longer than 24 hours.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smh])", window)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= _LONGEST_WINDOW:
        raise ValueError('A window is a number and s, m or h, at most 24 hours: "5m", "1h", "24h".')
    return seconds


def total_of(counts: Mapping[QueryKey, QueryCounts], *kinds: Kind) -> QueryCounts:
    """Everything of some kinds added up."""
    total = QueryCounts()
    for key, each in counts.items():
        if key[1] in kinds:
            total.merge(each)
    return total


def summary(counts: QueryCounts) -> dict[str, Any]:
    """The figures of one statement, or of all; milliseconds."""
    p50, p95, p99 = counts.latency.quantiles((0.5, 0.95, 0.99))
    return {
        "count": counts.calls,
        "errors": counts.errors,
        "rows": counts.rows,
        "total_ms": _milliseconds(counts.seconds),
        "mean_ms": _milliseconds(counts.seconds / counts.calls) if counts.calls else None,
        "p50_ms": _milliseconds(p50),
        "p95_ms": _milliseconds(p95),
        "p99_ms": _milliseconds(p99),
        "max_ms": _milliseconds(counts.longest),
        "slow": dict(zip(("MEDIUM", "HIGH", "CRITICAL"), counts.slow, strict=True)),
    }


def top(
    counts: Mapping[QueryKey, QueryCounts],
    texts: Mapping[str, str],
    kinds: Iterable[Kind],
    *,
    by: Callable[[QueryCounts], float],
    limit: int,
) -> list[dict[str, Any]]:
    """The statements of some kinds that lead by a figure, those without any of it left out."""
    wanted = frozenset(kinds)
    ranked = sorted(
        ((by(each), key) for key, each in counts.items() if key[1] in wanted and by(each) > 0), reverse=True
    )
    return [
        {
            "fingerprint": key[0],
            "query": texts.get(key[0], key[0]),
            "kind": key[1],
            **summary(counts[key]),
            "error_rate": counts[key].errors / counts[key].calls,
        }
        for _, key in ranked[:limit]
    ]


def patterns(counts: Mapping[QueryKey, QueryCounts], texts: Mapping[str, str], limit: int) -> dict[str, Any]:
    """The statements that lead by mean duration, by calls, by time in all, and by failures."""
    orders: dict[str, Callable[[QueryCounts], float]] = {
        "slow": lambda each: each.seconds / each.calls if each.calls else 0.0,
        "frequent": lambda each: each.calls,
        "costly": lambda each: each.seconds,
        "error_prone": lambda each: each.errors,
    }
    return {name: top(counts, texts, STATEMENTS, by=by, limit=limit) for name, by in orders.items()}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
