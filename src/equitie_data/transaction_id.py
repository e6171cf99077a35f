"""Transaction ids and the days they carry: ``YYYYMMDD`` and a number of eight digits, as in 2024110500000123.

The arithmetic of migration 0010, for programs that have an id and want its day without asking the database. Why ids
look like this and what keeps them unique is in docs/explanation/transaction-ids.md.
"""

from __future__ import annotations

import datetime as dt
from typing import Final

from equitie_data.errors import ConfigurationError

__all__ = ["FIRST_DAY", "LAST_DAY", "NUMBERS", "compose", "day_of", "number_of"]

NUMBERS: Final = 100_000_000
"""How many ids one day has room for."""
FIRST_DAY: Final = dt.date(1000, 1, 1)
"""The first day a transaction may have: from there on, days have eight digits."""
LAST_DAY: Final = dt.date(9006, 12, 31)
"""The last day: its ids are below 2**53, so that a number in JSON keeps every digit of them."""

_YEARS: Final = range(FIRST_DAY.year, LAST_DAY.year + 1)


def day_of(transaction_id: int) -> dt.date | None:
    """Return the day an id carries, or ``None`` for one that carries none.

    It is the day the transaction was made for. Where it stands now may be another one: its date may have been
    corrected since.

    Args:
        transaction_id: Any integer.
    """
    year, month_and_day = divmod(transaction_id // NUMBERS, 10_000)
    if year not in _YEARS:
        return None
    try:
        return dt.date(year, *divmod(month_and_day, 100))
    except ValueError:
        return None


def number_of(transaction_id: int) -> int | None:
    """Return the number an id has among those of its day, or ``None`` for an id that carries no day.

    Args:
        transaction_id: Any integer.
    """
    return None if day_of(transaction_id) is None else transaction_id % NUMBERS


def compose(day: dt.date, number: int = 0) -> int:
    """Return the id of a number on a day.

    The database makes ids; this is for ranges of them: those from one day to another are the ones from
    ``compose(first)`` to ``compose(last, NUMBERS - 1)``.

    Args:
        day: From `FIRST_DAY` to `LAST_DAY`.
        number: From 0 to 99,999,999.

    Raises:
        ConfigurationError: One of them is out of range.
    """
    if isinstance(day, dt.datetime) or not FIRST_DAY <= day <= LAST_DAY:
        raise ConfigurationError(f"The day of a transaction id must be a date from {FIRST_DAY} to {LAST_DAY}.")
    if not 0 <= number < NUMBERS:
        raise ConfigurationError(f"The number of a transaction id must be from 0 to {NUMBERS - 1}.")
    return (day.year * 10_000 + day.month * 100 + day.day) * NUMBERS + number
