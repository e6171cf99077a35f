"""Seven years of transactions as the platform's largest customer would have them: lines of COPY, in no order."""

from __future__ import annotations

import datetime as dt
import random
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

INVESTORS = 5_000
DEALS = 500
YEARS = 7
COLUMNS = (
    "deal_id",
    "investor_id",
    "transaction_date",
    "amount",
    "currency",
    "transaction_type",
    "status",
    "gross_capital",
    "net_capital",
)
PARENTS = f"""
INSERT INTO public.deals_clean (deal_name) SELECT 'Deal ' || g FROM generate_series(1, {DEALS}) AS g;
INSERT INTO public.investors_clean (full_name) SELECT 'Investor ' || g FROM generate_series(1, {INVESTORS}) AS g;
"""

_CHUNK = 50_000
_CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD")
_TYPES = ("primary", "subnominee", "secondary", "advisory")
_STATUSES = ("completed", "pending", "cancelled", "failed")


def last_day() -> dt.date:
    """Yesterday, wherever it is run."""
    return dt.date.today() - dt.timedelta(days=1)  # noqa: DTZ011 - a calendar day


def first_day() -> dt.date:
    """Seven years before."""
    return last_day() - dt.timedelta(days=365 * YEARS - 1)


def lines(rows: int, seed: int) -> Iterator[bytes]:
    """Yield transactions as lines in COPY's text format.

    The n-th investor takes part 1/n as often as the first (Zipf's law); deals and days are spread evenly.

    Args:
        rows: How many.
        seed: The same seed gives the same rows for the same day.
    """
    rng = random.Random(seed)
    investors = range(1, INVESTORS + 1)
    shares = list(accumulate(1 / rank for rank in investors))
    days = [(first_day() + dt.timedelta(days=number)).isoformat() for number in range(365 * YEARS)]
    for begin in range(0, rows, _CHUNK):
        count = min(_CHUNK, rows - begin)
        drawn = zip(
            rng.choices(range(1, DEALS + 1), k=count),
            rng.choices(investors, cum_weights=shares, k=count),
            rng.choices(days, k=count),
            rng.choices(range(1, 10**8), k=count),
            rng.choices(_CURRENCIES, (80, 8, 5, 2, 2, 2, 1), k=count),
            rng.choices(_TYPES, (83, 10, 5, 2), k=count),
            rng.choices(_STATUSES, (88, 6, 4, 2), k=count),
            strict=True,
        )
        for deal, investor, day, cents, currency, kind, status in drawn:
            gross = f"{cents // 100}.{cents % 100:02}"
            line = f"{deal}\t{investor}\t{day}\t{gross}\t{currency}\t{kind}\t{status}\t{gross}\t{cents // 102}\n"
            yield line.encode()
