"""What a row of investments must be: every record of a file comes out staged or rejected.

Nothing here knows a file or a database. `RowReader` turns a record into a `StagedRow` (trimmed, checked, in one
normal form) or a `Rejection` (with its reason).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from equitie_data.errors import ImportFileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from equitie_data.csv_file import Record

__all__ = [
    "FIELDS",
    "REQUIRED_FIELDS",
    "Rejection",
    "RowReader",
    "StagedRow",
    "map_columns",
    "scaled",
    "unscaled",
]

REQUIRED_FIELDS: Final = ("company", "investor", "date", "amount")
FIELDS: Final = (*REQUIRED_FIELDS, "email", "deal", "type", "status", "currency", "units", "unit_price")

TYPES: Final = frozenset({"primary", "secondary", "advisory", "subnominee"})
STATUSES: Final = frozenset({"pending", "completed", "cancelled", "failed"})
CURRENCIES: Final = frozenset({"USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD"})

NAME_CHARACTERS: Final = 1_000
# A unique index refuses keys above 2,704 bytes, and one such name would fail the whole import.
NAME_BYTES: Final = 2_500
EMAIL_CHARACTERS: Final = 254  # RFC 5321, 4.5.3.1.3, less the angle brackets
FIRST_YEAR: Final = 1900
LAST_YEAR: Final = 2200
INTEGER_DIGITS: Final = 18
FRACTION_DIGITS: Final = 10

_SCALE = 10**FRACTION_DIGITS
_LISTED_COLUMNS = 30
_NUMBER_CHARACTERS = 64
_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_NUMBER = re.compile(r"(-?)0*([0-9]+)(?:\.([0-9]+))?")
_EMAIL = re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+")


class StagedRow(NamedTuple):
    """A row that may be imported, in its normal form.

    Attributes:
        row_hash: 32 hex digits over all fields: equal for the same values whatever the columns are called.
        deal_key: ``CSV-`` and 20 hex digits: the same for the rows of one deal; the ``deal_code`` when it is new.
        company: Name, trimmed.
        investor: Name, trimmed.
        email: Address in lower case; empty when there is none.
        deal: Code or name of the deal; ``None`` when company, date and amount identify it.
        date: ISO 8601.
        amount: Plain digits without needless zeros.
        type: One of the schema's transaction types.
        status: One of the schema's transaction statuses.
        currency: One of the schema's currencies.
        units: A number as ``amount``, or ``None``.
        unit_price: A number as ``amount``, or ``None``.
    """

    row_hash: str
    deal_key: str
    company: str
    investor: str
    email: str
    deal: str | None
    date: str
    amount: str
    type: str
    status: str
    currency: str
    units: str | None
    unit_price: str | None


class Rejection(NamedTuple):
    """A row that cannot be imported.

    Attributes:
        reason: Why, without any value of the row.
        amount: Its amount as far as that could be read (see `scaled`), else 0.
    """

    reason: str
    amount: int


class _Number(NamedTuple):
    text: str
    amount: int
    problem: str | None


def scaled(number: str) -> int:
    """Return plain digits with at most ten decimals as an integer of 1e-10: such sums are exact and fast."""
    whole, _, fraction = number.partition(".")
    magnitude = int(whole.lstrip("-")) * _SCALE + int(fraction[:FRACTION_DIGITS].ljust(FRACTION_DIGITS, "0"))
    return -magnitude if whole.startswith("-") else magnitude


def unscaled(amount: int) -> str:
    """Return the plain digits of an integer of 1e-10, without needless zeros."""
    whole, fraction = divmod(abs(amount), _SCALE)
    digits = f"{whole}.{fraction:0{FRACTION_DIGITS}d}".rstrip("0").rstrip(".")
    return f"-{digits}" if amount < 0 else digits


@lru_cache(maxsize=16_384)
def _parse_number(text: str) -> _Number:
    match = _NUMBER.fullmatch(text)
    if not match:
        return _Number("", 0, "is not a plain number")
    sign, whole, fraction = match.group(1), match.group(2), (match.group(3) or "").rstrip("0")
    if len(whole) > INTEGER_DIGITS or len(fraction) > FRACTION_DIGITS:
        return _Number("", 0, "has too many digits")
    number = f"{whole}.{fraction}" if fraction else whole
    amount = scaled(number)
    if sign and amount:
        return _Number("", -amount, "is negative")
    return _Number(number, amount, None)


def _read_number(text: str) -> _Number:
    # Checked before the cache, which would otherwise keep texts of any length.
    return _parse_number(text) if len(text) <= _NUMBER_CHARACTERS else _Number("", 0, "has too many digits")


@lru_cache(maxsize=16_384)
def _date_problem(text: str) -> str | None:
    match = _DATE.fullmatch(text)
    if not match:
        return "date is not YYYY-MM-DD"
    year, month, day = map(int, match.groups())
    if not FIRST_YEAR <= year <= LAST_YEAR:
        return f"date is not between {FIRST_YEAR} and {LAST_YEAR}"
    try:
        dt.date(year, month, day)
    except ValueError:
        return "date does not exist"
    return None


def _is_too_long(name: str) -> bool:
    return len(name) > NAME_CHARACTERS or (len(name) * 4 > NAME_BYTES and len(name.encode()) > NAME_BYTES)


def _fingerprint(*values: str | None) -> str:
    """Hash values with their lengths, so that no two different rows run together into the same text."""
    text = "".join(["-" if value is None else f"{len(value)}:{value}" for value in values])
    return hashlib.sha256(text.encode()).hexdigest()


class RowReader:
    """Checks and normalises records.

    Args:
        positions: Field to the index of its column (see `map_columns`).
        width: How many columns a record must have.
    """

    def __init__(self, positions: Mapping[str, int], width: int) -> None:
        self._width = width
        self._company, self._investor, self._date, self._amount = (positions[field] for field in REQUIRED_FIELDS)
        self._email = positions.get("email")
        self._deal = positions.get("deal")
        self._type = positions.get("type")
        self._status = positions.get("status")
        self._currency = positions.get("currency")
        self._units = positions.get("units")
        self._unit_price = positions.get("unit_price")

    def read(self, record: Record) -> StagedRow | Rejection:
        """Return the record's normal form, or why it has none.

        Names are trimmed of Unicode white space and otherwise kept as they are. An empty optional field means its
        default: type ``primary``, status ``completed``, currency ``USD``, no e-mail, deal, units or unit price.
        """
        _, cells, problem = record
        if problem is not None:
            return Rejection(problem, 0)
        if len(cells) != self._width:
            return Rejection("wrong number of columns", 0)
        number = _read_number(cells[self._amount].strip())
        problem, row = self._read_cells(cells, number)
        return Rejection(problem, number.amount) if row is None else row

    def _read_cells(self, cells: list[str], number: _Number) -> tuple[str, None] | tuple[str, StagedRow]:
        company = cells[self._company].strip()
        if not company:
            return "company is empty", None
        if _is_too_long(company):
            return "company is too long", None
        investor = cells[self._investor].strip()
        if not investor:
            return "investor is empty", None
        if _is_too_long(investor):
            return "investor is too long", None
        date = cells[self._date].strip()
        if not date:
            return "date is empty", None
        problem = _date_problem(date) if len(date) == 10 else "date is not YYYY-MM-DD"
        if problem is not None:
            return problem, None
        if number.problem is not None:
            return ("amount is empty" if not cells[self._amount].strip() else f"amount {number.problem}"), None
        if number.amount == 0:
            return "amount is zero", None

        email = "" if self._email is None else cells[self._email].strip().lower()
        if email and (len(email) > EMAIL_CHARACTERS or not _EMAIL.fullmatch(email)):
            return "email is not an address", None
        deal = None if self._deal is None else cells[self._deal].strip() or None
        if deal is not None and _is_too_long(deal):
            return "deal is too long", None
        kind = "primary" if self._type is None else cells[self._type].strip().lower() or "primary"
        if kind not in TYPES:
            return "type is unknown", None
        status = "completed" if self._status is None else cells[self._status].strip().lower() or "completed"
        if status not in STATUSES:
            return "status is unknown", None
        currency = "USD" if self._currency is None else cells[self._currency].strip().upper() or "USD"
        if currency not in CURRENCIES:
            return "currency is unknown", None
        units, problem = self._read_optional_number(cells, self._units, "units")
        if problem is not None:
            return problem, None
        unit_price, problem = self._read_optional_number(cells, self._unit_price, "unit_price")
        if problem is not None:
            return problem, None

        amount = number.text
        fields = (company, investor, email, deal, date, amount, kind, status, currency, units, unit_price)
        deal_key = _fingerprint("round", company, date, amount) if deal is None else _fingerprint("deal", company, deal)
        return "", StagedRow(_fingerprint(*fields)[:32], f"CSV-{deal_key[:20]}", *fields)

    @staticmethod
    def _read_optional_number(cells: list[str], position: int | None, field: str) -> tuple[str | None, str | None]:
        text = "" if position is None else cells[position].strip()
        if not text:
            return None, None
        number = _read_number(text)
        return (number.text, None) if number.problem is None else (None, f"{field} {number.problem}")


def map_columns(
    header: Sequence[str], columns: Mapping[str, str] | Iterable[tuple[str, str]], *, name: str
) -> dict[str, int]:
    """Return the index of each field's column.

    A column that is called like a field is that field, unless ``columns`` says otherwise.

    Args:
        header: The file's column names.
        columns: Column name to field, as a mapping or as pairs.
        name: What to call the file in an error.

    Raises:
        ImportFileError: A field or column is unknown or used twice, or a required field has no column.
    """
    names = [column.strip() for column in header]
    pairs = [
        (column.strip(), field.strip())
        for column, field in (columns.items() if isinstance(columns, Mapping) else columns)
    ]
    positions: dict[str, int] = {}
    taken: set[str] = set()

    def claim(column: str, field: str) -> str | None:
        if field not in FIELDS:
            return f"there is no field {field!r} for column {column!r}; the fields are {', '.join(FIELDS)}"
        if column not in names:
            return f"there is no column {column!r} for field {field!r}"
        if names.count(column) > 1:
            return f"column {column!r} stands in the header {names.count(column)} times"
        if column in taken:
            return f"column {column!r} is mapped twice"
        if field in positions:
            return f"field {field!r} is mapped twice"
        taken.add(column)
        positions[field] = names.index(column)
        return None

    problems = [claim(column, field) for column, field in pairs]
    problems.extend(
        claim(field, field) for field in FIELDS if field in names and field not in positions and field not in taken
    )
    missing = [field for field in REQUIRED_FIELDS if field not in positions]
    found = [problem for problem in problems if problem]
    if missing and not found:
        found = [f"no column is mapped to {', '.join(missing)} (--map COLUMN=FIELD)"]
    if found:
        listed = ", ".join(repr(column[:60]) for column in names[:_LISTED_COLUMNS])
        more = f" and {len(names) - _LISTED_COLUMNS} more" if len(names) > _LISTED_COLUMNS else ""
        hint = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
        split = f" (fields must be separated by commas, these seem to be by {hint!r})" if hint else ""
        raise ImportFileError(f"{name}: {'; '.join(found)}; the file's columns are {listed}{more}{split}.")
    return positions
