"""The switch: the originals move into the backup, views take their names, and the books are written."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from equitie_data import _sql
from equitie_data.errors import LegacyError
from equitie_data.legacy import backup
from equitie_data.legacy.composing import name, raw
from equitie_data.legacy.copying import has_details
from equitie_data.legacy.report import LegacyReport, Storage, counts_of, table_reports
from equitie_data.legacy.views import View, shown_kinds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from equitie_data.legacy.copying import Copying
    from equitie_data.legacy.months import Months
    from equitie_data.legacy.sources import Source

__all__ = ["check_unchanged", "report_of", "sizes", "switch", "views_of"]

_CLEAN: Final = ("public.companies_clean", "public.deals_clean", "public.investors_clean", "public.transactions_clean")
_BESIDE: Final = (
    "equitie_private.stray_transactions",
    "equitie_private.legacy_transaction_details",
    "equitie_private.legacy_company_details",
    "equitie_private.legacy_deal_details",
    "equitie_private.legacy_investor_details",
)
_BOOKS: Final = ("equitie_private.legacy_ids", "equitie_private.legacy_rejects")


def check_unchanged(conn: Connection[Any], copying: Copying) -> None:
    """Compare the old tables with what was read of them, now that nobody can write."""
    total = copying.ledger.total(["read:"])
    for source in copying.sources:
        conn.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(source.identifier))
    for source in copying.sources:
        row = conn.execute(
            sql.SQL(
                "SELECT count(*), coalesce(sum(hashtextextended(s::text, 0)), 0)::numeric FROM ONLY {} AS s"
            ).format(source.identifier)
        ).fetchone()
        assert row is not None  # noqa: S101 - an aggregate
        read = total.of(bucket="read", source=source.number)[0]
        if (row[0], int(row[1])) != (read, total.checksums.get(source.number, 0)):
            raise LegacyError(
                f"{source.label} was written to although it is read-only while it is taken over ({read:,} rows were "
                f"read, {row[0]:,} are there now, or some have changed); what was copied was removed. Find who did it, "
                "then run it again."
            )


def switch(
    conn: Connection[Any],
    copying: Copying,
    made: Months,
    *,
    lost_grants: Sequence[tuple[str, str]],
    before: dict[str, Any],
    started: float,
) -> LegacyReport:
    """Put the views in the old tables' places."""
    sources = copying.sources
    for table in [*(name(*clean.split(".")) for clean in _CLEAN), *(source.identifier for source in sources)]:
        mode = "SHARE ROW EXCLUSIVE" if table in [name(*clean.split(".")) for clean in _CLEAN] else "ACCESS EXCLUSIVE"
        conn.execute(sql.SQL("LOCK TABLE {} IN {} MODE").format(table, raw(mode)))
    backup.unblock_writes(conn, sources)
    schema = backup.free_backup_name(conn)
    views = views_of(conn, copying)
    restoration = backup.move_away(conn, sources, schema)
    for view in views:
        for statement in view.create():
            conn.execute(statement)
    for stage in copying.stages.values():
        if has_details(stage):
            conn.execute("SELECT equitie_private.track(%s::regclass)", (f"equitie_private.{stage.details.table}",))
    if has_details(copying.stages["transaction"]):
        _follow_details(conn)
    for stage in copying.stages.values():
        if not stage.is_transactions:
            conn.execute(
                sql.SQL(
                    "SELECT setval(pg_get_serial_sequence({table}, {key}), m.highest)"
                    " FROM (SELECT max(c.{column}) AS highest"
                    " FROM {clean} AS c) AS m, pg_catalog.pg_sequences AS q WHERE m.highest IS NOT NULL"
                    " AND format('%I.%I', q.schemaname, q.sequencename) = pg_get_serial_sequence({table}, {key})"
                    " AND m.highest > coalesce(q.last_value, 0)"
                ).format(
                    table=sql.Literal(f"public.{stage.kinds[0].table}"),
                    key=sql.Literal(stage.kinds[0].key),
                    column=name(stage.kinds[0].key),
                    clean=stage.clean,
                )
            )
    report = report_of(
        conn, copying, "switched", lost_grants=lost_grants, made=made, schema=schema, before=before, started=started
    )
    copying.clear()
    conn.execute(
        "UPDATE equitie_private.legacy_runs"
        " SET state = 'switched', switched_at = clock_timestamp(), backup_schema = %s,"
        " restoration = %s, report = %s, audit_mark = (SELECT coalesce(max(a.audit_id), 0) FROM public.audit_logs AS a)"
        " WHERE run_id = %s",
        (schema, Jsonb(restoration), Jsonb(report.to_dict()), copying.run_id),
    )
    return report


def _follow_details(conn: Connection[Any]) -> None:
    conn.execute(
        "CREATE INDEX idx_legacy_transaction_details_legacy"
        " ON equitie_private.legacy_transaction_details (equitie_legacy_id) WHERE equitie_legacy_id IS NOT NULL"
    )
    conn.execute(
        "CREATE TRIGGER follow_legacy_details BEFORE UPDATE ON public.transactions_clean FOR EACH ROW"
        " WHEN (OLD.investor_id <> NEW.investor_id OR OLD.transaction_id <> NEW.transaction_id)"
        " EXECUTE FUNCTION equitie_private.follow_legacy_details()"
    )


def views_of(conn: Connection[Any], copying: Copying) -> list[View]:
    """Return the views that stand in for the old tables."""
    remapped = {
        row[0]
        for row in conn.execute(
            "SELECT DISTINCT m.kind FROM equitie_private.legacy_ids AS m WHERE m.new_id <> m.legacy_id"
            " AND m.outcome <> 'merged'"
        )
    }
    total = copying.ledger.total(["read:"])
    views = []
    for source in copying.sources:
        stage = copying.stages["transaction" if source.spec.is_transaction else source.kind]
        found = {kind for number, kind, bucket in total.counted if number == source.number and bucket == "read"}
        kinds = shown_kinds(source, found)
        views.append(
            View(
                source=source,
                details=stage.details,
                kinds=kinds,
                remapped=bool(remapped & set(kinds)) and source.spec.is_transaction,
                has_details=has_details(stage),
            )
        )
    return views


def sizes(conn: Connection[Any], sources: Sequence[Source]) -> dict[str, Any]:
    """Measure everything that a report compares."""
    names = [*_CLEAN, *_BESIDE, *_BOOKS, "public.audit_logs"]
    with conn.cursor(row_factory=dict_row) as cursor:
        found = {row["name"]: row for row in cursor.execute(_sql.query("legacy_storage"), {"names": names})}
    rows = {each: _row_bytes(conn, name(*each.split("."))) for each in (_CLEAN[3], *_BESIDE[:2]) if each in found}
    return {
        "bytes": {each: row["bytes"] for each, row in found.items()},
        "rows": rows,
        "empty_partitions": found[_CLEAN[3]]["empty_partitions"],
        "empty_bytes": found[_CLEAN[3]]["empty_bytes"],
        "old_rows": sum(_row_bytes(conn, source.identifier) for source in sources if source.spec.is_transaction),
    }


def _row_bytes(conn: Connection[Any], table: sql.Identifier) -> int:
    row = conn.execute(
        sql.SQL("SELECT coalesce(sum(pg_column_size(t.*)), 0)::bigint FROM {} AS t").format(table)
    ).fetchone()
    return int(row[0]) if row else 0


def _storage(conn: Connection[Any], sources: Sequence[Source], before: dict[str, Any]) -> Storage:
    after = sizes(conn, ())

    def grown(figure: str, *names: str) -> int:
        return sum(after[figure].get(each, 0) - before[figure].get(each, 0) for each in names)

    return Storage(
        transactions_before=sum(source.bytes for source in sources if source.spec.is_transaction),
        transactions_after=grown("bytes", _CLEAN[3], *_BESIDE[:2]),
        carried_after=grown("bytes", _BESIDE[1]),
        rows_before=before["old_rows"],
        rows_after=grown("rows", _CLEAN[3], *_BESIDE[:2]),
        carried_rows_after=grown("rows", _BESIDE[1]),
        empty_partitions=after["empty_partitions"],
        empty_partitions_bytes=after["empty_bytes"],
        others_before=sum(source.bytes for source in sources if not source.spec.is_transaction),
        others_after=grown("bytes", *_CLEAN[:3], *_BESIDE[2:]),
        audit_log=grown("bytes", "public.audit_logs"),
        bookkeeping=grown("bytes", *_BOOKS),
    )


def report_of(
    conn: Connection[Any],
    copying: Copying,
    state: str,
    *,
    lost_grants: Sequence[tuple[str, str]],
    made: Months,
    schema: str | None,
    before: dict[str, Any] | None,
    started: float,
) -> LegacyReport:
    """Put the reconciliation together, as far as the run is."""
    total = copying.ledger.total()
    rejected: dict[str, dict[str, int]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for kind, is_left_out, reason, rows in conn.execute(_sql.query("legacy_reasons"), {"run_id": copying.run_id}):
        (left_out if is_left_out else rejected).setdefault(kind, {})[reason] = rows
    return LegacyReport(
        run_id=copying.run_id,
        state=state,
        tables=table_reports(copying.sources, total),
        counts=counts_of(total),
        rejected=rejected,
        left_out=left_out,
        renumbered=dict(conn.execute(_sql.query("legacy_renumbered"), {"run_id": copying.run_id}).fetchall()),
        partitions_created=made.created,
        together=made.together,
        older_than_retention=made.older_than_retention,
        storage=None if before is None else _storage(conn, copying.sources, before),
        backup_schema=schema,
        views=tuple(source.label for source in copying.sources) if schema else (),
        lost_grants=tuple(lost_grants),
        seconds=round(time.perf_counter() - started, 3),
    )
