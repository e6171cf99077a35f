"""What an idempotent write returned comes back the same, or is not stored at all."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.results import NotStorable, dumps, loads

text = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]))
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.uuids()
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.datetimes(timezones=st.just(dt.timezone.utc))
    | st.datetimes(timezones=st.just(ZoneInfo("Europe/Berlin")))
    | st.timedeltas()
    | st.binary()
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(text | st.just("$"), inner),
    max_leaves=20,
)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right) and str(left) == str(right)


@given(values)
def test_every_value_comes_back_the_same(value: Any) -> None:
    assert same(loads(dumps(value)), value)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, object(), {1: 2}, {1, 2}, "\x00", [lambda: None], "x" * 1_000_001, True + 0j],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_come_back_the_same_is_refused(value: Any) -> None:
    with pytest.raises(NotStorable):
        dumps(value)


def test_a_subclass_is_not_taken_for_its_base() -> None:
    class Money(Decimal):
        pass

    with pytest.raises(NotStorable):
        dumps(Money(1))
    assert loads(dumps((Decimal("1.50"), UUID(int=1)))) == (Decimal("1.50"), UUID(int=1))
