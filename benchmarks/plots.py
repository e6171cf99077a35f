"""Figures of the benchmarks, as PNG files under ``benchmarks/results``."""

from __future__ import annotations

import importlib
import statistics
from typing import TYPE_CHECKING, Any

from measuring import RESULTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MISSING = "PLOTS ARE MISSING: nothing was drawn. To get them: pip install matplotlib"


def _figure(title: str, ylabel: str, height: float = 4.0) -> tuple[Any, Any] | None:
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        print(MISSING)
        return None
    figure = figure_module.Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    return figure, axes


def _write(figure: Any, name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    print(f"plot: benchmarks/results/{name}.png")


def bars(name: str, title: str, xlabel: str, figures: Mapping[str, Sequence[float]]) -> None:
    """Draw the median of each contestant as a bar, with a line from its lowest to its highest value.

    Args:
        name: The file's name, without its ending.
        title: What was measured.
        xlabel: In which unit.
        figures: The values of every round, by contestant.
    """
    made = _figure(title, "", 1.5 + 0.4 * len(figures))
    if made is None:
        return
    figure, axes = made
    middles = [statistics.median(values) for values in figures.values()]
    below = [middle - min(values) for middle, values in zip(middles, figures.values(), strict=True)]
    above = [max(values) - middle for middle, values in zip(middles, figures.values(), strict=True)]
    ours = ["tab:blue" if contestant.startswith("execute_") else "tab:gray" for contestant in figures]
    axes.barh(list(figures), middles, xerr=[below, above], color=ours)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    _write(figure, name)


def lines(
    name: str, title: str, xlabel: str, ylabel: str, points: Mapping[str, Mapping[int, float]], *, log: bool = False
) -> None:
    """Draw one line a contestant.

    Args:
        name: The file's name, without its ending.
        title: What was measured.
        xlabel: What the keys are.
        ylabel: What the values are.
        points: Values by key, by contestant.
        log: Whether the values are drawn on a logarithmic scale.
    """
    made = _figure(title, ylabel)
    if made is None:
        return
    figure, axes = made
    for contestant, values in points.items():
        ours = contestant.startswith("execute_")
        axes.plot(list(values), list(values.values()), marker="o", label=contestant, linewidth=2.5 if ours else 1.2)
    axes.set_xlabel(xlabel)
    axes.set_xscale("log")
    axes.set_xticks(sorted({key for values in points.values() for key in values}))
    axes.xaxis.set_major_formatter("{x:g}")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend()
    _write(figure, name)
