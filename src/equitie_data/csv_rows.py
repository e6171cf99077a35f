"""CSV files of investments, read row by row in flat memory; every row comes out staged or rejected.

Nothing here knows a database. Bytes become physical lines, lines become records, and `RowReader` turns a record
into a `StagedRow` (trimmed, checked, in one normal form) or a `Rejection` (with its reason). Every buffer is
bounded: a line, a record or a field of any length costs an error and not the memory.
"""

from __future__ import annotations

import codecs
import csv
import datetime as dt
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, cast

import attrs

from equitie_data.errors import ImportFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "FIELDS",
    "REQUIRED_FIELDS",
    "CsvFile",
    "Record",
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
RECORD_CHARACTERS: Final = 131_072  # as csv.field_size_limit(): one bound for the field and for the row it stands in
FIRST_YEAR: Final = 1900
LAST_YEAR: Final = 2200
INTEGER_DIGITS: Final = 18
FRACTION_DIGITS: Final = 10

_CHUNK_BYTES = 65_536
_SCALE = 10**FRACTION_DIGITS
# Strict UTF-8 never decodes to a surrogate, so this one can stand for NUL, which csv refuses before Python 3.11.
_NUL_MARK = "\udc00"
_LISTED_COLUMNS = 30
_NUMBER_CHARACTERS = 64
_DATE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_NUMBER = re.compile(r"(-?)0*([0-9]+)(?:\.([0-9]+))?")
_EMAIL = re.compile(r"[^\s@]+@[^\s@]+\.[^\s@]+")


class Record(NamedTuple):
    """One record of the file.

    Attributes:
        line: The physical line it starts in, from 1.
        cells: Its fields as they stand in the file, NUL characters shown as U+2400.
        problem: Why it cannot even be split into fields; ``None`` when it can.
    """

    line: int
    cells: list[str]
    problem: str | None


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


@attrs.define(eq=False)
class CsvFile:
    """A CSV file, plain or gzip, from any binary stream; only read forwards.

    Attributes:
        stream: Where the bytes come from; needs `read` alone.
        name: What to call it in errors.
        on_bytes: Told how many bytes were read from ``stream``, for progress.
        line: The physical line read last, from 1.
    """

    stream: BinaryIO
    name: str
    on_bytes: Callable[[int], object] = attrs.field(default=lambda _count: None)
    line: int = 0
    _digest: hashlib._Hash = attrs.field(factory=hashlib.sha256, init=False)
    _head: bytes = attrs.field(default=b"", init=False)
    _offset: int = attrs.field(default=0, init=False)
    _record_characters: int = attrs.field(default=0, init=False)
    _last_line: str = attrs.field(default="", init=False)
    _nul_seen: bool = attrs.field(default=False, init=False)
    _exhausted: bool = attrs.field(default=False, init=False)

    def records(self) -> Iterator[Record]:
        """Yield the file's records, the header first; empty lines are none.

        Raises:
            ImportFileError: The file is empty, cut off, unreadable, not UTF-8, or a record is out of bounds.
        """
        reader = csv.reader(self._lines(), strict=True)
        while True:
            start = self.line + 1
            self._record_characters = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield self._broken_record(start)
                continue
            if not cells:
                continue
            if self._nul_seen and any(_NUL_MARK in cell for cell in cells):
                cells = [cell.replace(_NUL_MARK, "\u2400") for cell in cells]
                yield Record(start, cells, "holds a NUL character")
                continue
            yield Record(start, cells, None)

    def sha256(self) -> bytes:
        """Return the digest of the bytes read so far, as they came: of the whole file once `records` has ended."""
        return self._digest.digest()

    def _broken_record(self, start: int) -> Record:
        """Keep a record whose quotes are wrong if it is one line, otherwise give up.

        Over several lines nobody can say which of them it swallowed: the next quote may have closed it.
        """
        if self._exhausted:
            raise self._error(f"ends inside the quoted field of the row in line {start}; is the file cut off?")
        if self.line > start:
            raise self._error(
                f"the row in line {start} goes on to line {self.line} and its quotes do not match there; "
                "is a closing quote missing?"
            )
        text = self._last_line.rstrip("\r\n").replace(_NUL_MARK, "\u2400")
        return Record(start, [text], "quotes do not match")

    def _lines(self) -> Iterator[str]:
        first = True
        for block in self._blocks():
            text = self._decode(block)
            if first:
                first = False
                text = text.removeprefix("\ufeff")
            if "\0" in text:
                self._nul_seen = True
                text = text.replace("\0", _NUL_MARK)
            # newline="" splits at LF, CR and CRLF and keeps them, as csv wants its lines.
            for line in io.StringIO(text, newline=""):
                self.line += 1
                self._record_characters += len(line)
                if self._record_characters > RECORD_CHARACTERS:
                    raise self._error(
                        f"line {self.line}: a row is longer than {RECORD_CHARACTERS:,} characters; "
                        "is a closing quote or a line break missing?"
                    )
                self._last_line = line
                yield line
        self._exhausted = True

    def _blocks(self) -> Iterator[bytes]:
        """Yield the file in pieces that end where a line ends."""
        read = self._open()
        rest = b""
        while chunk := self._read(read):
            buffer = rest + chunk
            # A lone CR ends a line too, but the last byte may be the first half of a CRLF.
            cut = buffer.rfind(b"\n") + 1 or buffer.rfind(b"\r", 0, -1) + 1
            if cut:
                yield buffer[:cut]
                self._offset += cut
            elif len(buffer) > 4 * RECORD_CHARACTERS:
                raise self._error(
                    f"line {self.line + 1} is longer than {RECORD_CHARACTERS:,} characters; this is no CSV file, "
                    "or its line breaks are missing"
                )
            rest = buffer[cut:]
        if rest:
            yield rest
        elif not self._offset:
            raise self._error("is empty: a header with the column names is the least it must have")

    def _open(self) -> Callable[[int], bytes]:
        head = b""
        while len(head) < 4 and (more := self._read(self.stream.read, 4 - len(head))):
            head += more
        self._head = head
        if head.startswith(b"PK\x03\x04"):
            raise self._error("is a ZIP archive or a spreadsheet; save it as CSV")
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise self._error("is UTF-16; save it as UTF-8")
        if head.startswith(b"\x1f\x8b"):
            return gzip.GzipFile(fileobj=cast("BinaryIO", _Reader(self.read_raw)), mode="rb").read
        return self.read_raw

    def read_raw(self, size: int = -1) -> bytes:
        """Return the next bytes of the stream, digested and counted."""
        size = min(size, _CHUNK_BYTES) if size > 0 else _CHUNK_BYTES
        head, self._head = self._head[:size], self._head[size:]
        chunk = head or self.stream.read(size)
        self._digest.update(chunk)
        self.on_bytes(len(chunk))
        return chunk

    def _read(self, read: Callable[[int], bytes], size: int = _CHUNK_BYTES) -> bytes:
        try:
            return read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._error(f"its gzip data is damaged or cut off after line {self.line}") from error
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror or type(error).__name__}") from error

    def _decode(self, block: bytes) -> str:
        try:
            return block.decode()
        except UnicodeDecodeError as error:
            line = self.line + 1 + block.count(b"\n", 0, error.start)
            raise self._error(
                f"line {line}: byte {self._offset + error.start + 1} is not UTF-8; save the file as UTF-8"
            ) from None

    def _error(self, what: str) -> ImportFileError:
        return ImportFileError(f"{self.name}: {what}.")


@attrs.frozen
class _Reader:
    """The least of a file that `gzip.GzipFile` needs."""

    read: Callable[[int], bytes]
