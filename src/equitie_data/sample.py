"""A generated set of investments, for the demo and for benchmarks."""

from __future__ import annotations

import datetime as dt
import io
import random
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["COLUMNS", "csv_stream", "investments"]

COLUMNS = ("company", "investor", "date", "amount")
_YEARS = 7
_INVESTORS = 2_000
_COMPANIES = 400
_ROUNDS_PER_COMPANY = 10
_FIRST = ("Amber", "Boreal", "Cobalt", "Delta", "Ember", "Fjord", "Granite", "Harbor", "Indigo", "Juniper")
_LAST = ("Analytics", "Biologics", "Capital", "Dynamics", "Energy", "Foods", "Grid", "Health", "Instruments", "Labs")


def investments(
    rows: int, *, until: dt.date | None = None, seed: int = 20_260_101
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (company, investor, date, amount) tuples of text.

    Investors follow Zipf's law (the n-th takes part 1/n as often as the first), as investors do; rounds fall on any
    day of seven years. No investor takes part in a round twice.

    Args:
        rows: How many.
        until: The last day; yesterday when left out.
        seed: The same seed gives the same rows for the same day.
    """
    rng = random.Random(seed)  # noqa: S311 - sample data
    last_day = until or dt.date.today() - dt.timedelta(days=1)  # noqa: DTZ011 - a calendar day, wherever it is run
    span = _YEARS * 365
    weights = list(accumulate(1 / rank for rank in range(1, _INVESTORS + 1)))
    companies = [
        f"{rng.choice(_FIRST)} {rng.choice(_LAST)} {number:03d}" for number in range(max(_COMPANIES, rows // 250))
    ]
    rounds: list[tuple[str, str, str]] = []
    for company in companies:
        for _ in range(_ROUNDS_PER_COMPANY):
            day = last_day - dt.timedelta(days=rng.randrange(span))
            rounds.append((company, day.isoformat(), str(rng.randrange(1, 2_000) * 50_000)))
    seen: set[tuple[int, int]] = set()
    while len(seen) < rows:
        which = rng.randrange(len(rounds))
        investor = rng.choices(range(_INVESTORS), cum_weights=weights)[0]
        if (which, investor) not in seen:
            seen.add((which, investor))
            company, date, amount = rounds[which]
            yield company, f"Investor {investor + 1:04d}", date, amount


def csv_stream(rows: int) -> io.BytesIO:
    """Return the same as a CSV file in memory."""
    text = "".join(f"{','.join(row)}\n" for row in investments(rows))
    return io.BytesIO(f"{','.join(COLUMNS)}\n{text}".encode())
