"""Rows become lines of COPY, or an error that names the row and its column and no value."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.copy_rows import COLUMNS, batches
from equitie_data.errors import BulkLoadError

DAY = dt.date(2024, 2, 29)
ROW = (1, 2, DAY, Decimal("1.50"), "USD", "primary", "pending")
LINE = b"1\t2\t2024-02-29\t1.50\tUSD\tprimary\tpending\n"


def changed(column: str, value: Any) -> tuple[Any, ...]:
    return tuple(value if name == column else old for name, old in zip(COLUMNS, ROW, strict=True))


def test_a_typed_row_and_its_line_are_the_same() -> None:
    for source in ([ROW], [list(ROW)], [LINE], [LINE.rstrip(b"\n")]):
        (batch,) = batches(source, COLUMNS, 10)
        assert (batch.number, batch.rows, batch.block, batch.months) == (0, 1, LINE, (dt.date(2024, 2, 1),))


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("amount", 1.5, "an int or a finite Decimal, not float"),
        ("amount", "1.50", "an int or a finite Decimal, not str"),
        ("amount", True, "an int or a finite Decimal, not bool"),
        ("amount", Decimal("NaN"), "finite"),
        ("amount", Decimal("-Infinity"), "finite"),
        ("amount", None, "not NoneType"),
        ("deal_id", "7", "an int, not str"),
        ("deal_id", True, "an int, not bool"),
        ("transaction_date", dt.datetime(2024, 2, 29, tzinfo=dt.timezone.utc), "a date without a time"),
        ("transaction_date", "2024-02-29", "a date without a time, not str"),
        ("status", None, "text without NUL, not NoneType"),
        ("status", "pend\0ing", "text without NUL"),
    ],
)
def test_a_value_of_another_type_is_refused(column: str, value: Any, wanted: str) -> None:
    with pytest.raises(BulkLoadError, match=f"^Row 3: {column} must be .*{wanted}"):
        list(batches([ROW, ROW, changed(column, value)], COLUMNS, 2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW[:-1], "Row 1 has 6 columns instead of 7"),
        ((*ROW, 1), "Row 1 has 8 columns instead of 7"),
        (LINE.replace(b"\tprimary", b""), "Row 1 has 6 columns instead of 7"),
        (b"\\.\n", "Row 1 has 1 columns instead of 7"),
        (b"", "Row 1 has 1 columns instead of 7"),
        (LINE.replace(b"2024-02-29", b"2023-02-29"), "Row 1: transaction_date is not a day"),
        (LINE.replace(b"2024-02-29", b"29.02.2024"), "Row 1: transaction_date is not a day"),
        (LINE.replace(b"2024-02-29", b"20240229"), "Row 1: transaction_date is not a day"),
        (LINE.replace(b"2024-02-29", b"infinity"), "Row 1: transaction_date is not a day"),
        (LINE.replace(b"USD", b"\xff"), "Row 1 is not UTF-8"),
    ],
)
def test_a_row_that_is_none_is_refused(row: Any, message: str) -> None:
    with pytest.raises(BulkLoadError, match=message):
        list(batches([row], COLUMNS, 2))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((*COLUMNS, "amuont"), "no column 'amuont'"),
        ((*COLUMNS, "amount"), "named twice"),
        (("deal_id", "transaction_date", "units"), "lack investor_id, amount"),
    ],
)
def test_columns_that_cannot_be_loaded_are_refused(columns: tuple[str, ...], message: str) -> None:
    with pytest.raises(BulkLoadError, match=message):
        list(batches([], columns, 2))


def test_text_is_escaped_as_copy_wants_it() -> None:
    (batch,) = batches([changed("status", "a\tb\nc\rd\\e\\N")], COLUMNS, 1)
    assert batch.block.endswith(b"\ta\\tb\\nc\\rd\\\\e\\\\N\n")


@given(st.lists(st.dates(dt.date(1000, 1, 1)), max_size=30), st.integers(1, 10))
def test_batches_hold_every_row_once_in_order_of_the_date(days: list[dt.date], size: int) -> None:
    source = [(number, 1, day, 1, "USD", "primary", "pending") for number, day in enumerate(days)]
    made = list(batches(source, COLUMNS, size))
    assert [batch.number for batch in made] == list(range(len(made)))
    for batch in made:
        expected = source[batch.number * size : (batch.number + 1) * size]
        cells = [line.split("\t") for line in batch.block.decode().splitlines()]
        assert [cell[2] for cell in cells] == sorted(str(row[2]) for row in expected)
        assert {int(cell[0]) for cell in cells} == {row[0] for row in expected}
        assert len(cells) == batch.rows == len(expected)
        assert list(batch.months) == sorted({row[2].replace(day=1) for row in expected})
