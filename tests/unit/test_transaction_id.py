"""Ids carry their day, and the arithmetic of it loses nothing."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.errors import ConfigurationError
from equitie_data.transaction_id import FIRST_DAY, LAST_DAY, NUMBERS, compose, day_of, number_of

days = st.dates(FIRST_DAY, LAST_DAY)
numbers = st.integers(0, NUMBERS - 1)


@given(days, numbers)
def test_an_id_carries_its_day_and_its_number(day: dt.date, number: int) -> None:
    transaction_id = compose(day, number)
    assert str(transaction_id) == f"{day:%Y%m%d}".zfill(8) + f"{number:08}"
    assert (day_of(transaction_id), number_of(transaction_id)) == (day, number)


@given(days, numbers)
def test_an_id_stays_exact_where_numbers_are_floats(day: dt.date, number: int) -> None:
    assert int(float(compose(day, number))) == compose(day, number) < 2**53


@given(st.tuples(days, numbers), st.tuples(days, numbers))
def test_ids_are_ordered_like_their_days(one: tuple[dt.date, int], other: tuple[dt.date, int]) -> None:
    assert (compose(*one) < compose(*other)) == (one < other)


@given(st.integers(-(2**64), 2**64))
def test_any_other_integer_carries_no_day(transaction_id: int) -> None:
    day = day_of(transaction_id)
    if day is None:
        assert number_of(transaction_id) is None
    else:
        assert compose(day, transaction_id % NUMBERS) == transaction_id


@pytest.mark.parametrize("digits", ["00000000", "09991231", "20240230", "20241301", "20240001", "20240100", "90070101"])
def test_what_looks_like_a_day_and_is_none(digits: str) -> None:
    assert day_of(int(digits) * NUMBERS + 5) is None


@pytest.mark.parametrize(
    ("day", "number"),
    [
        (FIRST_DAY - dt.timedelta(days=1), 0),
        (LAST_DAY + dt.timedelta(days=1), 0),
        (dt.datetime(2024, 11, 5), 0),  # noqa: DTZ001 - that it is no date is the point
        (FIRST_DAY, -1),
        (FIRST_DAY, NUMBERS),
    ],
)
def test_what_is_out_of_range_is_refused(day: dt.date, number: int) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        compose(day, number)
