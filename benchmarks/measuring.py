"""What the benchmarks share: contestants in turn, medians, ratios, raw figures kept."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RESULTS = Path(__file__).parent / "results"


def interleave(contestants: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int) -> dict[str, list[float]]:
    """Time every contestant in every round, so that the machine's moods hit all alike.

    Args:
        contestants: What to time, by name.
        rounds: How often each is timed.
        calls: Calls per timing.

    Returns:
        Microseconds per call of every round, by name.
    """
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for function in contestants.values():
        for _ in range(20):
            function()
    names = list(contestants)
    for number in range(rounds):
        # Another order each round: whoever follows a slow one would otherwise always do so.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            function = contestants[name]
            started = time.perf_counter()
            for _ in range(calls):
                function()
            figures[name].append((time.perf_counter() - started) / calls * 1e6)
    return figures


def median_ratio(figures: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of the ratio of two contestants in the same round."""
    return statistics.median(a / b for a, b in zip(figures[name], figures[base], strict=True))


def print_table(title: str, figures: Mapping[str, list[float]], base: str) -> None:
    """Print medians, minima, and ratios to one of them."""
    print(f"\n{title}")
    print(f"  {'':<44}{'median us':>10}{'min us':>10}{'ratio':>8}")
    for name, values in figures.items():
        ratio = median_ratio(figures, name, base)
        print(f"  {name:<44}{statistics.median(values):>10.1f}{min(values):>10.1f}{ratio:>8.2f}")


def print_aim(what: str, measured: float, aim: float) -> None:
    """Print a measured ratio beside what it aims at."""
    print(f"  {'met ' if measured <= aim else 'LOST'}  {what}: {measured:.2f} (aim <= {aim:.2f})")


def save(name: str, results: Any) -> None:
    """Keep the raw figures under ``benchmarks/results``."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    print(f"\nraw figures: benchmarks/results/{path.name}")
