"""What a takeover did, or would do: rows, money and bytes, so that anybody can check that they add up."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import attrs

from equitie_data.legacy.kinds import KINDS
from equitie_data.legacy.ledger import BUCKETS, Tally

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from equitie_data.legacy.sources import Source

__all__ = ["LegacyReport", "Storage", "TableReport", "counts_of", "lines_of", "size", "table_reports", "wrapped"]

_ORPHAN = "orphan: "


@attrs.frozen(kw_only=True)
class TableReport:
    """One old table.

    Attributes:
        table: Its name as SQL writes it.
        kind: Kind of its rows.
        rows: Rows it had.
        bytes: What it took, with indexes and TOAST.
        counts: Rows by what became of them.
        carried: Columns that go on beside the clean rows.
        empty: Columns that hold nothing in any row and are gone.
        repeated: Columns that only repeated the id.
        backup_only: Columns with content that stays in the backup alone, as the user asked.
    """

    table: str
    kind: str
    rows: int
    bytes: int
    counts: dict[str, int]
    carried: tuple[str, ...]
    empty: tuple[str, ...]
    repeated: tuple[str, ...]
    backup_only: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Storage:
    """Bytes, with indexes and TOAST, as ``pg_total_relation_size`` counts them.

    Attributes:
        transactions_before: The old tables of transactions.
        transactions_after: What the takeover added to ``transactions_clean``, to the entries of its ids, and beside it.
        carried_after: The part of it that stands beside ``transactions_clean``: columns that were carried along.
        rows_before: The rows of the old tables of transactions by themselves, without indexes and free space.
        rows_after: The same of what was added.
        carried_rows_after: The same of what was carried along.
        empty_partitions: Partitions of ``transactions_clean`` without a row.
        empty_partitions_bytes: What those take, for their indexes; they are no part of ``transactions_after``.
        others_before: The old tables of companies, deals and investors.
        others_after: What the takeover added to theirs.
        audit_log: What it added to the audit log.
        bookkeeping: Which row became which: ``legacy_ids`` and ``legacy_rejects``.
    """

    transactions_before: int
    transactions_after: int
    carried_after: int
    rows_before: int
    rows_after: int
    carried_rows_after: int
    empty_partitions: int
    empty_partitions_bytes: int
    others_before: int
    others_after: int
    audit_log: int
    bookkeeping: int

    @property
    def saved(self) -> float:
        """The share of the transactions' bytes that is saved, indexes and what is carried along included."""
        return saved(self.transactions_before, self.transactions_after)

    @property
    def saved_rows(self) -> float:
        """The share that is saved of the rows by themselves, what is carried along included."""
        return saved(self.rows_before, self.rows_after)

    @property
    def saved_clean(self) -> float:
        """The share that is saved with the clean columns alone, as when every other column is dropped; with indexes."""
        return saved(self.transactions_before, self.transactions_after - self.carried_after)

    @property
    def saved_clean_rows(self) -> float:
        """The same of the rows by themselves."""
        return saved(self.rows_before, self.rows_after - self.carried_rows_after)


@attrs.frozen(kw_only=True)
class LegacyReport:
    """The reconciliation.

    Attributes:
        run_id: The run; ``None`` for a plan.
        state: ``planned`` or ``switched``.
        tables: The old tables.
        counts: Kind to bucket to rows and money; ``read`` is the sum of the others.
        rejected: Kind to reason to rows that are in no clean table.
        left_out: Kind to note to values that were left out of rows that are.
        renumbered: Kind to rows whose id another row has.
        partitions_created: Partitions made for old months.
        together: The partition that holds all old months, if one does.
        older_than_retention: Rows from before the seven years that are kept.
        storage: Bytes; ``None`` for a plan.
        backup_schema: Where the originals are; ``None`` for a plan.
        views: Names that are views now.
        lost_grants: Roles that had privileges on an old table and have none on its view: table and role.
        seconds: How long it took.
    """

    run_id: int | None
    state: str
    tables: tuple[TableReport, ...]
    counts: dict[str, dict[str, tuple[int, Decimal]]]
    rejected: dict[str, dict[str, int]]
    left_out: dict[str, dict[str, int]]
    renumbered: dict[str, int]
    partitions_created: int
    together: str | None
    older_than_retention: int
    storage: Storage | None
    backup_schema: str | None
    views: tuple[str, ...]
    lost_grants: tuple[tuple[str, str], ...]
    seconds: float

    def rows(self, kind: str, bucket: str = "inserted") -> int:
        """Return the rows of a kind in a bucket."""
        return self.counts.get(kind, {}).get(bucket, (0, Decimal(0)))[0]

    @property
    def orphans(self) -> int:
        """Rows and values that refer to something that is not there."""
        reasons = [*self.rejected.values(), *self.left_out.values()]
        return sum(rows for by in reasons for reason, rows in by.items() if reason.startswith(_ORPHAN))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it: money as text, with all its digits."""
        found = attrs.asdict(self)
        found["counts"] = {
            kind: {bucket: {"rows": rows, "amount": str(amount)} for bucket, (rows, amount) in by.items()}
            for kind, by in self.counts.items()
        }
        found["orphans"] = self.orphans
        if self.storage is not None:
            shares = ("saved", "saved_rows", "saved_clean", "saved_clean_rows")
            found["storage"] |= {share: round(getattr(self.storage, share), 4) for share in shares}
        return found

    def to_json(self) -> str:
        """Return it as one JSON object."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> LegacyReport:
        """Read what `to_dict` wrote."""
        members = dict(stored)
        del members["orphans"]
        tables: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
            for table in members["tables"]
        ]
        members["tables"] = tuple(TableReport(**table) for table in tables)
        members["counts"] = {
            kind: {bucket: (end["rows"], Decimal(end["amount"])) for bucket, end in by.items()}
            for kind, by in members["counts"].items()
        }
        if members["storage"] is not None:
            members["storage"] = Storage(
                **{key: value for key, value in members["storage"].items() if not key.startswith("saved")}
            )
        members["views"] = tuple(members["views"])
        members["lost_grants"] = tuple((table, role) for table, role in members["lost_grants"])
        return cls(**members)


def table_reports(sources: Sequence[Source], total: Tally) -> tuple[TableReport, ...]:
    """Describe the old tables and what became of their rows."""
    return tuple(
        TableReport(
            table=source.label,
            kind=source.kind,
            rows=source.rows,
            bytes=source.bytes,
            counts={bucket: total.of(bucket=bucket, source=source.number)[0] for bucket in BUCKETS},
            carried=tuple(column.name for column in source.carried),
            empty=source.empty,
            repeated=source.twins,
            backup_only=tuple(
                column.name for column in source.columns if column.name in source.dropped and column.filled
            ),
        )
        for source in sources
    )


def counts_of(total: Tally) -> dict[str, dict[str, tuple[int, Decimal]]]:
    """Return rows and money by kind and bucket."""
    return {
        kind: {bucket: total.of(bucket=bucket, kind=kind) for bucket in BUCKETS}
        for kind in KINDS
        if kind in total.kinds
    }


def lines_of(report: LegacyReport) -> list[str]:
    """Return the report as lines of at most 80 characters."""
    lines = [f"{'old table':<46}{'rows':>14}{'size':>14}"]
    lines += [f"{table.table:<46.46}{table.rows:>14,}{size(table.bytes):>14}" for table in report.tables]
    lines += ["", f"{'':<12}{'read':>10}{'inserted':>10}{'standing':>10}{'copies':>10}{'losers':>9}{'rejected':>10}"]
    for kind, by in report.counts.items():
        rows = {bucket: end[0] for bucket, end in by.items()}
        taken = rows["inserted"] + rows["replaced"]
        lines.append(
            f"{kind:<12}{rows['read']:>10,}{taken:>10,}{rows['existing']:>10,}{rows['duplicate']:>10,}"
            f"{rows['loser']:>9,}{rows['rejected']:>10,}"
        )
        if KINDS[kind].is_transaction:
            money = {bucket: end[1] for bucket, end in by.items()}
            became = money["inserted"] + money["replaced"]
            lines.append(f"{'  amount':<12}{money['read']:>20,f} read, {became:>20,f} inserted")
    lines.append("")
    lines += _listed("rejected", report.rejected)
    lines += _listed("left out", report.left_out)
    for kind, count in report.renumbered.items():
        if count:
            lines.append(f"{kind}: {count:,} ids belong to another row already; the views show the old ones")
    lines += _column_lines(report.tables)
    for table, role in report.lost_grants:
        lines.append(f"{role} had privileges on {table}: grant them on the view if it needs them")
    if report.older_than_retention:
        lines.append(f"{report.older_than_retention:,} rows are older than the 7 years that are kept")
    lines += _storage_lines(report)
    return lines


def _listed(what: str, by_kind: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        line
        for kind, by in by_kind.items()
        for reason, rows in sorted(by.items(), key=lambda item: (-item[1], item[0]))
        for line in wrapped(f"{what}: {rows:,} {kind}: {reason}")
    ]


def _storage_lines(report: LegacyReport) -> list[str]:
    storage = report.storage
    if storage is None:
        return []
    figures = [
        ("transactions, rows by themselves", storage.rows_before, storage.rows_after, storage.saved_rows),
        (
            "  without what is carried along",
            storage.rows_before,
            storage.rows_after - storage.carried_rows_after,
            storage.saved_clean_rows,
        ),
        ("transactions, with indexes", storage.transactions_before, storage.transactions_after, storage.saved),
        (
            "  without what is carried along",
            storage.transactions_before,
            storage.transactions_after - storage.carried_after,
            storage.saved_clean,
        ),
        (
            "companies, deals, investors",
            storage.others_before,
            storage.others_after,
            saved(storage.others_before, storage.others_after),
        ),
    ]
    lines = ["", f"{'storage':<40}{'before':>14}{'after':>14}{'saved':>10}"]
    lines += [f"{what:<40}{size(before):>14}{size(after):>14}{share:>10.1%}" for what, before, after, share in figures]
    lines += wrapped(
        f"besides: audit log {size(storage.audit_log)}, bookkeeping {size(storage.bookkeeping)}, "
        f"{storage.empty_partitions} empty months {size(storage.empty_partitions_bytes)}"
    )
    lines.append(f"the originals are in {report.backup_schema}; drop it to have their space back")
    if report.together:
        lines.append(f"all old months are in {report.together}")
    return lines


def _column_lines(tables: Sequence[TableReport]) -> list[str]:
    """Say what became of columns without a clean one; copies with the same columns share a line."""
    by_columns: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for table in tables:
        for what, names in (
            ("carried along", table.carried),
            ("empty, so gone", table.empty),
            ("repeats the id, so gone", table.repeated),
            ("in the backup alone", table.backup_only),
        ):
            if names:
                by_columns.setdefault((what, names), []).append(table.table)
    return [
        line
        for (what, names), where in by_columns.items()
        for line in wrapped(f"{', '.join(where)}: {what}: {', '.join(names)}")
    ]


def wrapped(text: str) -> list[str]:
    """Return a sentence as lines of at most 80 characters."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > 80:
            lines.append(line)
            line = f"  {word}"
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def saved(before: int, after: int) -> float:
    """Return the share by which something became smaller; 0 where there was nothing."""
    return 1 - after / before if before else 0.0


def size(count: int) -> str:
    """Return a number of bytes as people read it."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1024 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit in {"B", "kB"} else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError
