"""Transactions as lines of COPY: typed rows are written out, lines that are such already are read for their date.

No I/O. What a row may hold is decided by type alone: money is never a float, a date never a time. Whether the deal
exists and the status is known is the database's business, which refuses the row together with its batch.
"""

from __future__ import annotations

import datetime as dt
import itertools
from decimal import Decimal
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import attrs

from equitie_data.errors import BulkLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["COLUMNS", "Batch", "batches"]

COLUMNS: Final = ("deal_id", "investor_id", "transaction_date", "amount", "currency", "transaction_type", "status")
"""What the values of a row are when the caller does not say."""

_NULL: Final = "\\N"
_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


class _WrongTypeError(Exception):
    """The value cannot stand in its column; says what could."""


def _whole(value: Any) -> str:
    if type(value) is not int:
        raise _WrongTypeError("an int")
    return str(value)


def _number(value: Any) -> str:
    if type(value) is int or (type(value) is Decimal and value.is_finite()):
        return str(value)
    raise _WrongTypeError("an int or a finite Decimal")


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise _WrongTypeError("text without NUL")
    # Nearly every value is a code and has nothing to escape.
    return value if value.isalnum() else value.translate(_ESCAPES)


def _day(value: Any) -> str:
    if type(value) is not dt.date:
        raise _WrongTypeError("a date without a time")
    return value.isoformat()


def _moment(value: Any) -> str:
    if not isinstance(value, dt.datetime) or value.tzinfo is None:
        raise _WrongTypeError("a datetime with a time zone")
    return value.isoformat()


def _or_null(write: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: _NULL if value is None else write(value)


_WITHOUT_DEFAULT: Final[dict[str, Callable[[Any], str]]] = {
    "deal_id": _whole,
    "investor_id": _whole,
    "transaction_date": _day,
    "amount": _number,
}
_WRITE: Final[dict[str, Callable[[Any], str]]] = {
    **_WITHOUT_DEFAULT,
    "transaction_id": _whole,
    "transaction_type": _text,
    "status": _text,
    "currency": _text,
    "units": _or_null(_number),
    "unit_price": _or_null(_number),
    "gross_capital": _or_null(_number),
    "net_capital": _or_null(_number),
    "admin_fee": _or_null(_number),
    "management_fee_percent": _or_null(_number),
    "performance_fee_percent": _or_null(_number),
    "structuring_fee_percent": _or_null(_number),
    "premium_fee_percent": _or_null(_number),
    "parent_transaction_id": _or_null(_whole),
    "created_at": _moment,
    "updated_at": _moment,
}


@attrs.frozen
class Batch:
    """Rows that are loaded together, in the order of their dates.

    Attributes:
        number: Place in the source, from 0.
        rows: How many.
        block: The rows as COPY takes them in its text format.
        months: First days of the months they fall into, ascending.
    """

    number: int
    rows: int
    block: bytes = attrs.field(repr=False)
    months: tuple[dt.date, ...]


def batches(source: Iterable[Sequence[object] | bytes], columns: Sequence[str], batch_rows: int) -> Iterator[Batch]:
    """Yield the rows of a source in batches.

    Args:
        source: Rows as sequences of typed values, or as lines in COPY's text format, such as a binary file yields.
        columns: What the values of a row are.
        batch_rows: How many rows a batch has; the last one may have fewer.

    Raises:
        BulkLoadError: A column cannot be loaded, or a row is not one.
    """
    _check_columns(columns)
    rows = iter(source)
    for number in itertools.count():
        held = list(itertools.islice(rows, batch_rows))
        if not held:
            return
        lines = list(_lines(held, columns, number * batch_rows + 1))
        # Rows of one month next to each other keep COPY in one partition and in the same pages of its indexes.
        lines.sort(key=itemgetter(0))
        months = sorted({day[:7] for day, _ in lines})
        yield Batch(
            number,
            len(lines),
            "".join([line for _, line in lines]).encode(),
            tuple(dt.date(int(month[:4]), int(month[5:]), 1) for month in months),
        )


def _check_columns(columns: Sequence[str]) -> None:
    unknown = [name for name in columns if name not in _WRITE]
    if unknown:
        raise BulkLoadError(f"transactions_clean has no column {unknown[0]!r}; nothing was loaded.")
    if len(set(columns)) < len(columns):
        raise BulkLoadError("A column is named twice; nothing was loaded.")
    missing = [name for name in _WITHOUT_DEFAULT if name not in columns]
    if missing:
        raise BulkLoadError(f"The rows lack {', '.join(missing)}, which every transaction has; nothing was loaded.")


def _lines(rows: list[Sequence[object] | bytes], columns: Sequence[str], first: int) -> Iterator[tuple[str, str]]:
    """Yield the day and the line of every row; ``first`` is the number of the first one, for errors."""
    writers = [_WRITE[name] for name in columns]
    place = columns.index("transaction_date")
    known: set[str] = set()
    for number, row in enumerate(rows, first):
        if isinstance(row, bytes):
            line = _decoded(row, number)
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(columns):
                raise BulkLoadError(f"Row {number} has {len(cells)} columns instead of {len(columns)}.")
            day = cells[place]
            if day not in known:
                _check_day(day, number)
                known.add(day)
            yield day, line
            continue
        if len(row) != len(columns):
            raise BulkLoadError(f"Row {number} has {len(row)} columns instead of {len(columns)}.")
        try:
            written = [write(value) for write, value in zip(writers, row)]  # noqa: B905 - their lengths are equal
        except _WrongTypeError:
            raise _wrong_type(row, columns, number) from None
        yield written[place], "\t".join(written) + "\n"


def _decoded(row: bytes, number: int) -> str:
    try:
        line = row.decode()
    except UnicodeDecodeError:
        raise BulkLoadError(f"Row {number} is not UTF-8.") from None
    return line if line.endswith("\n") else line + "\n"


def _check_day(day: str, number: int) -> None:
    try:
        valid = len(day) == len("YYYY-MM-DD") and bool(dt.date.fromisoformat(day))
    except ValueError:
        valid = False
    if not valid:
        raise BulkLoadError(f"Row {number}: transaction_date is not a day written as YYYY-MM-DD.")


def _wrong_type(row: Sequence[object], columns: Sequence[str], number: int) -> BulkLoadError:
    for name, value in zip(columns, row, strict=True):
        try:
            _WRITE[name](value)
        except _WrongTypeError as wanted:
            return BulkLoadError(f"Row {number}: {name} must be {wanted}, not {type(value).__name__}.")
    return BulkLoadError(f"Row {number} changed while it was read.")
