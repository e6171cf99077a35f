"""``python -m equitie_data import``: a CSV file of investments into the clean tables, in one transaction.

Rows are parsed and checked one by one (`csv_file`, `csv_rows`), copied into a temporary table, and from there on
treated as sets by the queries ``import_*.sql``, in this order:

1. rows an earlier import brought in are duplicates;
2. rows whose deal or investor cannot be told are rejected;
3. missing month partitions are made, on another connection, because attaching one waits for everybody who has
   touched the table, this transaction included;
4. rows whose transaction stands already are duplicates;
5. companies, deals and investors that are missing are made, then the transactions.

What is a duplicate is known before anything is made, so importing a file again leaves no orphan behind. Every row
that was read ends as inserted, duplicate or rejected; the import checks that, in rows and in money, before it
commits.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import math
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol

import attrs
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from equitie_data import _sql
from equitie_data.cli import Progress, run_cli
from equitie_data.context import as_service, current_actor
from equitie_data.csv_file import CsvFile
from equitie_data.csv_rejects import RejectsFile
from equitie_data.csv_rows import FIELDS, Rejection, RowReader, map_columns, scaled, unscaled
from equitie_data.database import Database
from equitie_data.errors import ImportFileError, NoActorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from psycopg import Connection

    from equitie_data.csv_file import Record

__all__ = ["ImportReport", "SupportsAdvance", "import_csv", "main"]

_BUCKETS: Final = ("read", "inserted", "duplicates", "rejected")
# One transaction per so many months: every new partition holds its locks until the end of it.
_MONTHS_AT_ONCE: Final = 12
_NOT_STAGED: Final = (None,) * 13


class SupportsAdvance(Protocol):
    """What shows progress, such as `equitie_data.cli.Progress`."""

    def advance(self, count: int, /) -> object:
        """Take note of ``count`` more bytes."""


@attrs.frozen(kw_only=True)
class ImportReport:
    """What became of the rows of a file; ``read`` is the sum of the other three, in rows and in money.

    Amounts are control totals: exact sums over all currencies. A rejected row counts as far as its amount could be
    read.

    Attributes:
        run_id: Key of the run in ``equitie_private.import_runs``.
        read: Records of the file, without its header and empty lines.
        inserted: Rows that became transactions.
        duplicates: Rows that stand earlier in the file, came with an earlier import, or whose transaction stood.
        rejected: Rows that cannot be imported.
        amount_read: Money of the rows read; so are the next three.
        amount_inserted: As above.
        amount_duplicates: As above.
        amount_rejected: As above.
        rejected_by_reason: Reason to number of rows; reasons hold no value of the file.
        companies_created: Companies that were made.
        investors_created: Investors that were made.
        deals_created: Deals that were made.
        partitions_created: Month partitions that were made.
        past_retention: Inserted rows of months that the next maintenance run retires, because they are too old.
        seconds: How long it took.
    """

    run_id: int
    read: int
    inserted: int
    duplicates: int
    rejected: int
    amount_read: Decimal
    amount_inserted: Decimal
    amount_duplicates: Decimal
    amount_rejected: Decimal
    rejected_by_reason: Mapping[str, int]
    companies_created: int
    investors_created: int
    deals_created: int
    partitions_created: int
    past_retention: int
    seconds: float

    def to_json(self) -> str:
        """Return the report as one JSON object; amounts are numbers with all their digits, never rounded."""
        members = []
        for name, value in attrs.asdict(self, recurse=False).items():
            text = f"{value:f}" if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False)
            members.append(f"{json.dumps(name)}: {text}")
        return "{" + ", ".join(members) + "}"

    def to_table(self) -> str:
        """Return the reconciliation as lines of at most 80 characters."""
        amounts = [getattr(self, f"amount_{bucket}") for bucket in _BUCKETS]
        decimals = max(max(0, -int(amount.as_tuple().exponent)) for amount in amounts)
        table = [("", "rows", "amount")]
        for bucket, amount in zip(_BUCKETS, amounts, strict=True):
            table.append((bucket, f"{getattr(self, bucket):,}", f"{amount:,.{decimals}f}"))
        for reason, rows in sorted(self.rejected_by_reason.items(), key=lambda item: (-item[1], item[0])):
            table.append((f"  {reason}", f"{rows:,}", ""))
        widths = [max(len(line[column]) for line in table) for column in range(3)]
        lines = [f"{label:<{widths[0]}}  {rows:>{widths[1]}}  {amount:>{widths[2]}}" for label, rows, amount in table]
        created = (
            f"made: {self.companies_created:,} companies, {self.investors_created:,} investors, "
            f"{self.deals_created:,} deals, {self.partitions_created:,} months"
        )
        old = [f"{self.past_retention:,} rows are older than the retention: maintenance will retire them"]
        ending = [created, *(old if self.past_retention else []), f"run {self.run_id}, {self.seconds:.1f} s"]
        return "\n".join([*(line.rstrip() for line in lines), *ending])


def import_csv(
    database: Database,
    source: Path | str | BinaryIO,
    *,
    columns: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    rejects: Path | str | None = None,
    progress: SupportsAdvance | None = None,
) -> ImportReport:
    """Import a CSV file of investments; all of it or, when anything fails, nothing.

    The file is UTF-8 with a header, comma separated, plain or gzip, of any length. Fields are company, investor,
    date (YYYY-MM-DD) and amount (greater than zero), and optionally email, deal, type, status, currency, units and
    unit_price. Runs as the acting service, or as the service "csv import" when nobody acts; it needs a second
    connection of the pool for new partitions.

    Args:
        database: An open database.
        source: A path, or a binary stream that is read to its end.
        columns: Column to field, for columns that are not called like their field.
        rejects: Where to write the rejected rows: line, reason and the columns as read. Replaced if it exists, once
            the import has committed. A cell a spreadsheet could take for a formula gets a leading apostrophe.
        progress: Told how many bytes of the source were read.

    Raises:
        ImportFileError: The file or the rejects file cannot be used, or the rows do not add up; nothing was written.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stream, name = stack.enter_context(_opened(source))
        file = CsvFile(stream, name, progress.advance if progress else lambda _count: None)
        records = file.records()
        header = next(records, None)
        if header is None:
            raise ImportFileError(f"{name}: is empty: a header with the column names is the least it must have.")
        if header.problem is not None:
            raise ImportFileError(f"{name}: line {header.line}: the header {header.problem}.")
        reader = RowReader(map_columns(header.cells, columns, name=name), len(header.cells))
        rejects_file = None if rejects is None else stack.enter_context(RejectsFile(Path(rejects), source))
        try:
            actor = current_actor()
        except NoActorError:
            actor = stack.enter_context(as_service("csv import"))

        def operation(connection: Connection[Any]) -> ImportReport:
            run = _Run(connection, database, file)
            run.stage(records, reader, keep_originals=rejects_file is not None)
            report = run.settle(f"{actor.kind}: {actor.user_id or actor.reason}", started)
            if rejects_file is not None:
                rejects_file.write(header.cells, run.rejected_rows())
            return report

        # Not to be retried: the stream is spent. A lost COMMIT reply is still resolved by execute_write.
        report = database.execute_write(operation, retry=False, timeout=math.inf, name="csv import")
        if rejects_file is not None:
            rejects_file.publish()
    return report


@attrs.define
class _Bucket:
    """Rows and their money, in units of 1e-10."""

    rows: int = 0
    amount: int = 0

    def add(self, rows: int, amount: int) -> None:
        self.rows += rows
        self.amount += amount


@attrs.define(eq=False)
class _Run:
    """One import inside its transaction."""

    connection: Connection[Any]
    database: Database
    file: CsvFile
    buckets: dict[str, _Bucket] = attrs.field(factory=lambda: {bucket: _Bucket() for bucket in _BUCKETS})
    reasons: dict[str, int] = attrs.field(factory=dict)

    def stage(self, records: Iterator[Record], reader: RowReader, *, keep_originals: bool) -> None:
        """Copy the file's rows into the staging table."""
        read, rejected, reasons = self.buckets["read"], self.buckets["rejected"], self.reasons
        self._execute("import_create_rows")
        with self.connection.cursor() as cursor, cursor.copy(_sql.query("import_copy_rows")) as copy:
            for record in records:
                row = reader.read(record)
                if isinstance(row, Rejection):
                    read.add(1, row.amount)
                    rejected.add(1, row.amount)
                    reasons[row.reason] = reasons.get(row.reason, 0) + 1
                    if keep_originals:
                        copy.write_row((record.line, *_NOT_STAGED, row.reason, record.cells))
                else:
                    read.add(1, scaled(row.amount))
                    copy.write_row((record.line, *row, None, record.cells if keep_originals else None))
        # Temporary tables are not seen by autovacuum: without this the joins are planned for an empty table.
        self._execute("import_analyze_rows")

    def settle(self, actor: str, started: float) -> ImportReport:
        """Resolve the staged rows, write them, and account for every one of them."""
        self._execute("import_configure")
        self._execute("import_lock")
        source = {"source": Path(self.file.name).name, "source_sha256": self.file.sha256(), "actor": actor}
        (run_id,) = self._row("import_start_run", source)
        self._add("duplicates", self._row("import_count_known"))
        self._execute("import_create_pending")
        self._execute("import_analyze_pending")
        self._execute("import_create_deals")
        self._execute("import_create_investors")
        self._execute("import_analyze_parents")
        self._execute("import_create_rejects")
        for reason, rows, amount in self._rows("import_count_rejects"):
            self._add("rejected", (rows, amount))
            self.reasons[reason] = self.reasons.get(reason, 0) + rows
        self._execute("import_drop_rejects")
        made = self._insert(run_id)
        self._check_balance()
        report = self._report(run_id, made, started)
        self._execute("import_finish_run", self._counts(report))
        return report

    def rejected_rows(self) -> Iterator[tuple[int, str, Sequence[str]]]:
        """Yield line, reason and fields of the rejected rows, in the order of the file."""
        with self.connection.cursor() as cursor, cursor.copy(_sql.query("import_copy_rejected")) as copy:
            copy.set_types(["int8", "text", "text[]"])
            for line, reason, cells in copy.rows():  # noqa: UP028 - typed, unlike the rows
                yield line, reason, cells

    def _insert(self, run_id: int) -> dict[str, int]:
        """Write the pending rows and what they need; return how much was made of each kind."""
        months = [month for (month,) in self._rows("import_months")]
        if not months:
            return dict.fromkeys(("companies", "investors", "deals", "partitions", "expired"), 0)
        partitions = sum(self._ensure_partitions(first, last) for first, last in month_ranges(months))
        span = {"first": months[0], "last": _last_day(months[-1])}
        self._add("duplicates", self._row("import_drop_standing", span))
        companies = self._execute("import_insert_companies")
        deals = self._execute("import_insert_deals")
        self._execute("import_resolve_deals")
        (investors,) = self._row("import_insert_investors")
        if self._row("import_count_unresolved") != (0,):
            raise ImportFileError(
                f"{self.file.name}: another session made the same investors or deals while they were imported; "
                "nothing was written, run the import again."
            )
        self._execute("import_create_transactions")
        self._execute("import_analyze_transactions")
        self._add("duplicates", self._row("import_count_copies"))
        (expired,) = self._row("import_count_expired")
        self._add("inserted", self._row("import_insert_transactions", {"run_id": run_id}))
        return {
            "companies": companies,
            "investors": investors,
            "deals": deals,
            "partitions": partitions,
            "expired": expired,
        }

    def _ensure_partitions(self, first: dt.date, last: dt.date) -> int:
        # A call of its own inside the operation runs on another connection and commits at once.
        (row,) = self.database.execute_write(
            lambda connection: connection.execute(
                _sql.query("import_ensure_partitions"), {"first": first, "last": last}
            ).fetchall(),
            name="csv import partitions",
        )
        return int(row[0])

    def _check_balance(self) -> None:
        ends = [self.buckets[bucket] for bucket in _BUCKETS[1:]]
        read = self.buckets["read"]
        if (read.rows, read.amount) == (sum(end.rows for end in ends), sum(end.amount for end in ends)):
            return
        counts = ", ".join(f"{bucket} {end.rows:,} ({unscaled(end.amount)})" for bucket, end in self.buckets.items())
        raise ImportFileError(
            f"{self.file.name}: the rows do not add up: {counts}; nothing was written. "
            "Look for a trigger on transactions_clean that drops or changes rows."
        )

    def _report(self, run_id: int, made: Mapping[str, int], started: float) -> ImportReport:
        amounts = {bucket: Decimal(unscaled(counted.amount)) for bucket, counted in self.buckets.items()}
        return ImportReport(
            run_id=run_id,
            read=self.buckets["read"].rows,
            inserted=self.buckets["inserted"].rows,
            duplicates=self.buckets["duplicates"].rows,
            rejected=self.buckets["rejected"].rows,
            amount_read=amounts["read"],
            amount_inserted=amounts["inserted"],
            amount_duplicates=amounts["duplicates"],
            amount_rejected=amounts["rejected"],
            rejected_by_reason=dict(self.reasons),
            companies_created=made["companies"],
            investors_created=made["investors"],
            deals_created=made["deals"],
            partitions_created=made["partitions"],
            past_retention=made["expired"],
            seconds=time.perf_counter() - started,
        )

    @staticmethod
    def _counts(report: ImportReport) -> dict[str, Any]:
        counts = {name: getattr(report, name) for bucket in _BUCKETS for name in (bucket, f"amount_{bucket}")}
        return {"run_id": report.run_id, "rejected_reasons": Jsonb(dict(report.rejected_by_reason)), **counts}

    def _add(self, bucket: str, counted: tuple[Any, ...]) -> None:
        rows, amount = counted
        self.buckets[bucket].add(rows, scaled(amount))

    def _execute(self, query: str, params: Mapping[str, Any] | None = None) -> int:
        return self.connection.execute(_sql.query(query), params).rowcount

    def _rows(self, query: str, params: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        with self.connection.cursor(row_factory=tuple_row) as cursor:
            return cursor.execute(_sql.query(query), params).fetchall()

    def _row(self, query: str, params: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        (row,) = self._rows(query, params)
        return row


def month_ranges(months: Iterable[dt.date]) -> Iterator[tuple[dt.date, dt.date]]:
    """Join months that follow each other, up to a year's worth, so that no month without rows gets a partition.

    Args:
        months: First days of months, ascending.
    """
    run: list[dt.date] = []
    for month in months:
        if run and (len(run) == _MONTHS_AT_ONCE or month != _last_day(run[-1]) + dt.timedelta(days=1)):
            yield run[0], run[-1]
            run = []
        run.append(month)
    if run:
        yield run[0], run[-1]


def _last_day(month: dt.date) -> dt.date:
    return (month + dt.timedelta(days=31)).replace(day=1) - dt.timedelta(days=1)


@contextlib.contextmanager
def _opened(source: Path | str | BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    if not isinstance(source, (str, Path)):
        given = getattr(source, "name", None)
        yield source, given if isinstance(given, str) else "the stream"
        return
    try:
        stream = Path(source).open("rb")  # noqa: SIM115 - closed below; errors of the block must not be caught here
    except OSError as error:
        raise ImportFileError(f"{source}: cannot be read: {error.strerror or type(error).__name__}.") from error
    with stream:
        yield stream, str(source)


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m equitie_data import``.

    Returns:
        The exit code: 0 when the file was imported, with or without rejected rows.
    """
    parser = argparse.ArgumentParser(
        prog="python -m equitie_data import",
        description="Import a CSV file of investments, all of it or nothing; importing it again changes nothing.",
        epilog=f"Fields: {', '.join(FIELDS)}; the first four are required. "
        "A column that is called like a field needs no --map.",
    )
    parser.add_argument("file", metavar="FILE", help="CSV in UTF-8 with a header, plain or gzip; - is standard input")
    parser.add_argument(
        "--map",
        metavar="COLUMN=FIELD",
        action="append",
        default=[],
        dest="columns",
        type=_column_and_field,
        help="take FIELD from COLUMN; may be given several times",
    )
    parser.add_argument(
        "--rejects", metavar="FILE", type=Path, help="write the rejected rows, with line and reason, here"
    )
    parser.add_argument("--json", action="store_true", help="print the reconciliation as JSON")
    parser.add_argument("--dsn", help="the database (default: the environment, see DATABASE_URL)")
    arguments = parser.parse_args(argv)
    return run_cli(lambda: _run_command(arguments))


def _run_command(arguments: argparse.Namespace) -> int:
    source: Path | BinaryIO = sys.stdin.buffer if arguments.file == "-" else Path(arguments.file)
    total = source.stat().st_size if isinstance(source, Path) and source.is_file() else None
    with (
        Database(arguments.dsn) if arguments.dsn else Database.from_env() as database,
        as_service("csv import"),
        Progress("import", total, "bytes") as progress,
    ):
        report = import_csv(database, source, columns=arguments.columns, rejects=arguments.rejects, progress=progress)
    sys.stdout.write((report.to_json() if arguments.json else report.to_table()) + "\n")
    return 0


def _column_and_field(text: str) -> tuple[str, str]:
    column, equals, field = text.rpartition("=")
    if not equals or not column.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=FIELD")
    return column, field
