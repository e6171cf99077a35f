"""Where the conversion puts things, and what it calls them."""

from __future__ import annotations

import datetime as dt

__all__ = [
    "ATTIC",
    "BOUNDARY",
    "FLAT_KEY",
    "FORMER",
    "LEGACY",
    "LEGACY_KEY",
    "SCRATCH",
    "TABLE",
    "TWIN",
    "add_months",
    "month_partition",
]

TABLE = "public.transactions_clean"
"""The table the conversion is about, under whatever shape it has."""

SCRATCH = "equitie_conversion"
"""Schema of what the conversion needs while it runs. Nobody is granted anything there; it is gone afterwards."""

TWIN = f"{SCRATCH}.transactions_clean"
"""The table that is to take the place of `TABLE`. In a schema of its own, all its indexes and sequences can bear
their final names from the start, and move in with it."""

ATTIC = "equitie_conversion_former"
"""Schema of what was replaced, until it is dropped."""

FORMER = f"{ATTIC}.transactions_clean"
"""The table that was replaced."""

LEGACY = "equitie_part.transactions_clean_legacy"
"""The former flat table as a partition."""

LEGACY_KEY = "transactions_clean_legacy_pkey"
FLAT_KEY = "transactions_clean_flat_pkey"
BOUNDARY = "transactions_clean_boundary"
"""CHECK that lets a table be attached without being scanned."""


def add_months(day: dt.date, months: int) -> dt.date:
    """Return the first day of the month that comes ``months`` after the one of ``day``."""
    number = day.year * 12 + day.month - 1 + months
    return dt.date(number // 12, number % 12 + 1, 1)


def month_partition(month: dt.date) -> str:
    """Return what `ensure_month_partitions` calls the partition of a month, without the schema."""
    return f"transactions_clean_{month:%Y_%m}"
