"""Periods of the calendar as people write them: 7y, 18m, 730d."""

from __future__ import annotations

import calendar
import datetime as dt
import re
from typing import Final

import attrs

from equitie_data.errors import ConfigurationError

__all__ = ["Period", "add_months", "month_of", "parse_period"]

_WRITTEN: Final = re.compile(r"(\d{1,5})\s*(y|m|w|d)[a-z]*", re.IGNORECASE)


@attrs.frozen
class Period:
    """Months and days, which a calendar does not turn into each other.

    Attributes:
        months: Months; a year is twelve.
        days: Days.
    """

    months: int = 0
    days: int = 0

    def before(self, day: dt.date) -> dt.date:
        """Return the day that lies this long before ``day``, as PostgreSQL counts it."""
        return add_months(day, -self.months) - dt.timedelta(days=self.days)

    def __str__(self) -> str:
        years, months = divmod(self.months, 12)
        parts = [(years, "year"), (months, "month"), (self.days, "day")]
        return " ".join(f"{count} {unit}{'s' if count != 1 else ''}" for count, unit in parts if count) or "0 days"


def parse_period(text: str) -> Period:
    """Read a period: a number followed by y, m (months), w or d.

    Raises:
        ConfigurationError: It is none.
    """
    written = _WRITTEN.fullmatch(text.strip())
    if written is None:
        raise ConfigurationError(f"{text!r} is no period: write years as 7y, months as 18m, weeks as 4w, days as 730d.")
    count, unit = int(written[1]), written[2].lower()
    if unit in "ym":
        return Period(months=count * (12 if unit == "y" else 1))
    return Period(days=count * (7 if unit == "w" else 1))


def month_of(day: dt.date) -> dt.date:
    """Return the first day of a day's month."""
    return dt.date(day.year, day.month, 1)


def add_months(day: dt.date, months: int) -> dt.date:
    """Return the same day so many months on, or the last one of that month; at most the calendar's ends."""
    number = day.year * 12 + day.month - 1 + months
    if number < 12:
        return dt.date.min
    if number >= 12 * 10_000:
        return dt.date.max
    year, month = divmod(number, 12)
    return dt.date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))
