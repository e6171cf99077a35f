from __future__ import annotations

import csv
import gzip
import io
import re
import tracemalloc
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from equitie_data.csv_file import RECORD_CHARACTERS, CsvFile, Record
from equitie_data.csv_rows import (
    FIELDS,
    Rejection,
    RowReader,
    StagedRow,
    map_columns,
    scaled,
    unscaled,
)
from equitie_data.errors import ImportFileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HEADER = "company,investor,date,amount\n"
GOOD = "Acme,Ada,2013-02-01,100\n"


class Trickle(io.RawIOBase):
    """A stream of generated chunks that only reads forwards and counts what it gave."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""
        self.given = 0

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = chunk
        piece = self._rest if size < 0 else self._rest[:size]
        self._rest = self._rest[len(piece) :]
        self.given += len(piece)
        return piece


def records(content: bytes | str) -> list[Record]:
    raw = content.encode() if isinstance(content, str) else content
    return list(CsvFile(io.BytesIO(raw), "in.csv").records())


def read(*cells: str, fields: Sequence[str] = FIELDS) -> StagedRow | Rejection:
    positions = {field: index for index, field in enumerate(fields)}
    return RowReader(positions, len(fields)).read(Record(2, list(cells), None))


def row(**values: str) -> StagedRow | Rejection:
    cells = {"company": "Acme", "investor": "Ada", "date": "2013-02-01", "amount": "100"} | values
    return read(*(cells.get(field, "") for field in FIELDS))


def accepted(**values: str) -> StagedRow:
    result = row(**values)
    assert isinstance(result, StagedRow), result
    return result


def reason(**values: str) -> str:
    result = row(**values)
    assert isinstance(result, Rejection), result
    return result.reason


# Rows


def test_defaults_and_normal_form() -> None:
    staged = accepted(company="\u2003 Acme \u00a0", amount="00100.500", email=" Ada@X.ORG ")
    assert staged.company == "Acme"
    assert staged.amount == "100.5"
    assert staged.email == "ada@x.org"
    assert (staged.type, staged.status, staged.currency) == ("primary", "completed", "USD")
    assert (staged.deal, staged.units, staged.unit_price) == (None, None, None)


def test_enumerations_are_read_in_any_case() -> None:
    staged = accepted(type="Secondary", status="PENDING", currency="eur")
    assert (staged.type, staged.status, staged.currency) == ("secondary", "pending", "EUR")


def test_names_keep_their_case_and_inner_space() -> None:
    assert accepted(company="ACME  Corp").company == "ACME  Corp"
    assert accepted(company="ACME").row_hash != accepted(company="Acme").row_hash


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"company": " \u2003"}, "company is empty"),
        ({"investor": ""}, "investor is empty"),
        ({"company": "x" * 1_001}, "company is too long"),
        ({"investor": "\U0001f680" * 700}, "investor is too long"),
        ({"deal": "x" * 1_001}, "deal is too long"),
        ({"date": ""}, "date is empty"),
        ({"date": "2013-02-30"}, "date does not exist"),
        ({"date": "2013-2-3"}, "date is not YYYY-MM-DD"),
        ({"date": "20130203"}, "date is not YYYY-MM-DD"),
        ({"date": "2013-W05-1"}, "date is not YYYY-MM-DD"),
        ({"date": "03/02/2013"}, "date is not YYYY-MM-DD"),
        ({"date": "2013-02-01T00:00"}, "date is not YYYY-MM-DD"),
        ({"date": "\uff12\uff10\uff11\uff13-02-01"}, "date is not YYYY-MM-DD"),
        ({"date": "1899-12-31"}, "date is not between 1900 and 2200"),
        ({"date": "2201-01-01"}, "date is not between 1900 and 2200"),
        ({"amount": " "}, "amount is empty"),
        ({"amount": "NaN"}, "amount is not a plain number"),
        ({"amount": "Infinity"}, "amount is not a plain number"),
        ({"amount": "1e9"}, "amount is not a plain number"),
        ({"amount": "1,000"}, "amount is not a plain number"),
        ({"amount": "1 000"}, "amount is not a plain number"),
        ({"amount": "1_000"}, "amount is not a plain number"),
        ({"amount": "$100"}, "amount is not a plain number"),
        ({"amount": "+100"}, "amount is not a plain number"),
        ({"amount": ".5"}, "amount is not a plain number"),
        ({"amount": "5."}, "amount is not a plain number"),
        ({"amount": "\u0661\u0662"}, "amount is not a plain number"),
        ({"amount": "0"}, "amount is zero"),
        ({"amount": "-0.00"}, "amount is zero"),
        ({"amount": "-5"}, "amount is negative"),
        ({"amount": "1" * 19}, "amount has too many digits"),
        ({"amount": "0.00000000001"}, "amount has too many digits"),
        ({"amount": "1" * 100_000}, "amount has too many digits"),
        ({"currency": "XYZ"}, "currency is unknown"),
        ({"type": "gift"}, "type is unknown"),
        ({"status": "done"}, "status is unknown"),
        ({"email": "ada"}, "email is not an address"),
        ({"email": "ada@x"}, "email is not an address"),
        ({"email": "a da@x.org"}, "email is not an address"),
        ({"email": f"{'a' * 250}@x.org"}, "email is not an address"),
        ({"units": "many"}, "units is not a plain number"),
        ({"units": "-1"}, "units is negative"),
        ({"unit_price": "1e3"}, "unit_price is not a plain number"),
    ],
)
def test_rejections(values: dict[str, str], expected: str) -> None:
    assert reason(**values) == expected


@pytest.mark.parametrize("day", ["1900-01-01", "2200-12-31", "2012-02-29"])
def test_days_at_the_bounds_are_accepted(day: str) -> None:
    assert accepted(date=day).date == day


def test_a_row_of_another_width_is_rejected() -> None:
    assert read("Acme", "Ada", "2013-02-01", fields=FIELDS[:4]) == Rejection("wrong number of columns", 0)
    assert read("Acme", "Ada", "2013-02-01", "1", "2", fields=FIELDS[:4]) == Rejection("wrong number of columns", 0)


def test_a_rejected_row_counts_with_the_amount_it_has() -> None:
    assert row(company="", amount="12.5") == Rejection("company is empty", scaled("12.5"))
    assert row(amount="-3") == Rejection("amount is negative", scaled("-3"))
    assert row(date="never", amount="much") == Rejection("date is not YYYY-MM-DD", 0)


def test_the_hash_depends_on_values_alone() -> None:
    by_default = read("Acme", "Ada", "2013-02-01", "100", fields=FIELDS[:4])
    reordered = read("100.00", " Ada", "2013-02-01", "Acme ", fields=("amount", "investor", "date", "company"))
    spelled_out = row(type="PRIMARY", status="completed", currency="usd")
    assert by_default == reordered == spelled_out


def test_neighbouring_fields_never_run_together() -> None:
    assert accepted(company="ab", investor="c").row_hash != accepted(company="a", investor="bc").row_hash
    assert accepted(units="1").row_hash != accepted(unit_price="1").row_hash
    assert accepted(company="1:a", investor="b").row_hash != accepted(company="1", investor=":ab").row_hash


@given(st.data())
def test_rows_hash_alike_only_when_every_field_is_equal(data: st.DataObject) -> None:
    pieces = st.text(alphabet="a1:-", min_size=1, max_size=4)
    first, second = (
        {field: data.draw(pieces) for field in ("company", "investor", "deal")}
        | {"units": data.draw(st.sampled_from(["", "1", "11"])), "unit_price": data.draw(st.sampled_from(["", "1"]))}
        for _ in range(2)
    )
    one, other = accepted(**first), accepted(**second)
    assert (one.row_hash == other.row_hash) == (one[2:] == other[2:])


def test_the_deal_key_is_that_of_the_round_or_of_the_deal_named() -> None:
    assert accepted().deal_key == accepted(investor="Bob", units="3", currency="EUR").deal_key
    assert accepted().deal_key != accepted(amount="101").deal_key
    assert accepted().deal_key != accepted(date="2013-02-02").deal_key
    named = accepted(deal="Series A")
    assert named.deal_key == accepted(deal="Series A", amount="7", date="2014-01-01").deal_key
    assert named.deal_key != accepted(deal="Series A", company="Other").deal_key
    assert re.fullmatch("CSV-[0-9a-f]{20}", named.deal_key)


def test_hashes_and_keys_stay_what_they_are() -> None:
    # Stored in databases: a release that computed others would import every known row again.
    staged = accepted(deal="Series A", email="ada@x.org", units="10", unit_price="10")
    assert staged.row_hash == "8e56c5d80f31533d57f37d3ae5bc24d0"
    assert staged.deal_key == "CSV-7efa3632147aa2556f17"
    assert accepted().deal_key == "CSV-07f1457b3b21fd175f57"


@given(st.decimals(min_value=-(10**18) + 1, max_value=10**18 - 1, allow_nan=False, allow_infinity=False, places=10))
def test_scaling_is_exact(number: Decimal) -> None:
    text = unscaled(scaled(f"{number:f}"))
    assert Decimal(text) == number
    assert not re.search(r"\.\d*0$|\.$", text)


@given(st.lists(st.text(max_size=12) | st.sampled_from(["2013-02-01", "5", "-5", "USD", "a@b.c", ""]), max_size=12))
@example(["Acme", "Ada", "2013-02-01", "1", "", "", "", "", "", "", ""])
def test_every_row_lands_in_one_bucket_with_its_money(cells: list[str]) -> None:
    result = read(*cells)
    if isinstance(result, StagedRow):
        assert scaled(result.amount) == scaled(cells[3].strip()) > 0
        assert result.company == cells[0].strip() != ""
        assert result.investor == cells[1].strip() != ""
    else:
        assert result.reason
        readable = len(cells) == len(FIELDS) and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,10})?", cells[3].strip())
        assert result.amount == (scaled(cells[3].strip()) if readable else 0)


# Files


def test_records_know_the_physical_line_they_start_in() -> None:
    content = HEADER + '"Ac\nme",Ada,2013-02-01,1\n\n' + GOOD + '"a\r\nb","c\n",x,y\n' + GOOD
    assert [record.line for record in records(content)] == [1, 2, 5, 6, 9]
    assert records(content)[1].cells[0] == "Ac\nme"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "open"])
def test_line_ends_of_every_system(newline: str, last: bool) -> None:
    lines = ["company,investor"] + ["Acme,Ada"] * 20_000
    content = newline.join(lines) + (newline if last else "")
    found = records(content)
    assert len(found) == 20_001
    assert found[-1] == Record(20_001, ["Acme", "Ada"], None)


def test_a_byte_order_mark_is_no_part_of_the_first_column() -> None:
    assert records(b"\xef\xbb\xbf" + HEADER.encode())[0].cells[0] == "company"


@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), min_size=2, max_size=4),
        max_size=6,
    )
)
def test_what_csv_writes_is_read_back(rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    assert [record.cells for record in records(text.getvalue() or "\n")] == rows


@pytest.mark.parametrize("size", [1, 2, 3, 5, 65_536])
def test_chunk_borders_change_nothing(size: int) -> None:
    content = (HEADER + 'Ac\u00e9,"A\r\nda",2013-02-01,1\r\n' * 3).encode()
    for raw in (content, gzip.compress(content, mtime=0)):
        stream = Trickle(raw[at : at + size] for at in range(0, len(raw), size))
        assert list(CsvFile(stream, "in.csv").records()) == records(content)  # type: ignore[arg-type]


def test_gzip_is_recognised_by_its_content_and_may_have_several_members() -> None:
    packed = gzip.compress(HEADER.encode()) + gzip.compress(GOOD.encode())
    assert records(packed) == records(HEADER + GOOD)


def test_digest_and_progress_are_of_the_bytes_as_they_came() -> None:
    import hashlib

    packed = gzip.compress((HEADER + GOOD * 50_000).encode())
    counts: list[int] = []
    file = CsvFile(io.BytesIO(packed), "in.csv.gz", counts.append)
    assert sum(1 for _ in file.records()) == 50_001
    assert sum(counts) == len(packed)
    assert file.sha256() == hashlib.sha256(packed).digest()


def test_a_nul_character_rejects_its_row_alone() -> None:
    _, bad, good = records(HEADER + "Ac\0me,Ada,2013-02-01,1\n" + GOOD)
    assert bad == Record(2, ["Ac\u2400me", "Ada", "2013-02-01", "1"], "holds a NUL character")
    assert good.problem is None


def test_wrong_quotes_within_one_line_reject_it() -> None:
    _, bad, good = records(HEADER + '"Acme" Inc,Ada,2013-02-01,1\n' + GOOD)
    assert bad == Record(2, ['"Acme" Inc,Ada,2013-02-01,1'], "quotes do not match")
    assert good == Record(3, ["Acme", "Ada", "2013-02-01", "100"], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "in.csv: is empty"),
        (gzip.compress(b"", mtime=0), "in.csv: is empty"),
        (HEADER.encode() + b"Acme,\xff,2013-02-01,1\n", "line 2: byte 35 is not UTF-8"),
        ("company\n".encode("utf-16"), "is UTF-16"),
        (b"PK\x03\x04" + b"\0" * 99, "ZIP archive or a spreadsheet"),
        (gzip.compress((HEADER + GOOD * 999).encode(), mtime=0)[:-9], "gzip data is damaged or cut off"),
        (gzip.compress(HEADER.encode(), mtime=0) + b"trailing", "gzip data is damaged or cut off"),
        ((HEADER + '"Acme,Ada,2013-02-01,1\n').encode(), "ends inside the quoted field of the row in line 2"),
        ((HEADER + '"Acme,Ada\n"Bob" x,y\n').encode(), "row in line 2 goes on to line 3"),
        ((HEADER + "x" * (RECORD_CHARACTERS + 1)).encode(), "line 2: a row is longer than 131,072 characters"),
        ((HEADER + '"' + "x\n" * RECORD_CHARACTERS).encode(), "a row is longer than 131,072 characters"),
    ],
)
def test_a_broken_file_is_one_clear_error(content: bytes, message: str) -> None:
    with pytest.raises(ImportFileError, match=re.escape(message)) as caught:
        records(content)
    assert str(caught.value).startswith("in.csv: ")
    assert "\n" not in str(caught.value)


def test_an_endless_line_is_given_up_early() -> None:
    stream = Trickle(b"x" * 65_536 for _ in range(1_600))
    with pytest.raises(ImportFileError, match="line 1 is longer than 131,072 characters"):
        list(CsvFile(stream, "in.csv").records())  # type: ignore[arg-type]
    assert stream.given < 1_000_000


def test_a_gzip_bomb_is_given_up_early() -> None:
    bomb = gzip.compress(b"x" * 30_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(ImportFileError, match="longer than 131,072 characters"):
            records(bomb)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_memory_stays_flat_over_many_rows() -> None:
    def content() -> Iterable[bytes]:
        yield HEADER.encode()
        for start in range(0, 60_000, 500):
            lines = [f"Company {n},Investor {n},2013-02-01,{n + 1}.25\n" for n in range(start, start + 500)]
            yield "".join(lines).encode()

    file = CsvFile(Trickle(content()), "in.csv")  # type: ignore[arg-type]
    found = file.records()
    reader = RowReader(map_columns(next(found).cells, {}, name="in.csv"), 4)
    tracemalloc.start()
    try:
        assert sum(isinstance(reader.read(record), StagedRow) for record in found) == 60_000
        # The bounded caches of numbers and dates are the most of it.
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()


def test_a_read_error_names_the_file() -> None:
    class Broken(io.RawIOBase):
        def read(self, _size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(ImportFileError, match=r"^in\.csv: cannot be read: Input/output error\.$"):
        list(CsvFile(Broken(), "in.csv").records())  # type: ignore[arg-type]


# Columns


def test_columns_called_like_fields_need_no_mapping() -> None:
    header = ["amount", "note", "date", " company ", "investor"]
    assert map_columns(header, {}, name="in.csv") == {"company": 3, "investor": 4, "date": 2, "amount": 0}


def test_a_mapping_overrides_the_name() -> None:
    header = ["company", "buyer", "investor", "date", "amount"]
    assert map_columns(header, {"buyer": "investor"}, name="in.csv")["investor"] == 1
    header = ["company", "investor", "date", "funded", "amount"]
    positions = map_columns(header, {"date": "deal", "funded": "date"}, name="in.csv")
    assert (positions["deal"], positions["date"]) == (2, 3)


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        ("company,investor,date,amount", [("company", "firm")], "there is no field 'firm' for column 'company'"),
        ("company,investor,date,amount", [("firm", "company")], "there is no column 'firm' for field 'company'"),
        ("a,investor,date,amount", [("a", "company"), ("a", "deal")], "column 'a' is mapped twice"),
        ("a,b,investor,date,amount", [("a", "company"), ("b", "company")], "field 'company' is mapped twice"),
        ("company,investor,date,date,amount", [], "column 'date' stands in the header 2 times"),
        ("company,investor", [], "no column is mapped to date, amount (--map COLUMN=FIELD)"),
        ("company;investor;date;amount", [], "these seem to be by ';'"),
    ],
)
def test_a_wrong_mapping_is_one_error_that_lists_the_columns(
    header: str, columns: list[tuple[str, str]], message: str
) -> None:
    names = header.split(",")
    with pytest.raises(ImportFileError) as caught:
        map_columns(names, columns, name="in.csv")
    assert message in str(caught.value)
    assert "the file's columns are " + ", ".join(map(repr, names)) in str(caught.value)


def test_a_header_of_garbage_stays_a_short_message() -> None:
    with pytest.raises(ImportFileError) as caught:
        map_columns(["x" * 9_999] * 9_999, {}, name="in.csv")
    assert len(str(caught.value)) < 2_500
