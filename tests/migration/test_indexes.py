"""Every index has a reason: no two serve the same, and each serves a query somebody asks."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data.embedded import EmbeddedServer
    from equitie_data.testing import DatabaseTemplate

SCHEMAS = "('public', 'equitie_private', 'equitie_migrations')"

# Indexes behind no constraint, on tables that are no partitions.
NAMED = f"""
SELECT c.relname FROM pg_index AS i
JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_class AS t ON t.oid = i.indrelid
WHERE t.relnamespace::regnamespace::text IN {SCHEMAS} AND NOT t.relispartition
  AND NOT EXISTS (SELECT FROM pg_constraint AS k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))
"""

# One whose columns another one begins with, alike in everything that decides about its use.
REDUNDANT = f"""
SELECT a.indexrelid::regclass::text, b.indexrelid::regclass::text FROM pg_index AS a
JOIN pg_index AS b ON b.indrelid = a.indrelid AND b.indexrelid <> a.indexrelid
JOIN pg_class AS ac ON ac.oid = a.indexrelid JOIN pg_class AS bc ON bc.oid = b.indexrelid
JOIN pg_class AS t ON t.oid = a.indrelid
WHERE t.relnamespace::regnamespace::text IN {SCHEMAS} AND NOT t.relispartition AND ac.relam = bc.relam
  AND NOT a.indisunique AND a.indexprs IS NULL AND b.indexprs IS NULL
  AND pg_get_expr(a.indpred, a.indrelid) IS NOT DISTINCT FROM pg_get_expr(b.indpred, b.indrelid)
  AND (b.indkey::smallint[])[0:a.indnkeyatts - 1] = (a.indkey::smallint[])[0:a.indnkeyatts - 1]
  AND (b.indclass::oid[])[0:a.indnkeyatts - 1] = (a.indclass::oid[])[0:a.indnkeyatts - 1]
  AND (b.indcollation::oid[])[0:a.indnkeyatts - 1] = (a.indcollation::oid[])[0:a.indnkeyatts - 1]
  AND a.indnkeyatts <= b.indnkeyatts AND (a.indnkeyatts < b.indnkeyatts OR b.indisunique OR a.indexrelid < b.indexrelid)
"""

# What each index is for: a query the platform or the library asks, as the planner sees it with rows in the tables.
TYPICAL = {
    "idx_transactions_investor_date": "SELECT * FROM transactions_clean WHERE investor_id = 7"
    " ORDER BY transaction_date DESC LIMIT 50",
    "idx_transactions_deal_type": "SELECT * FROM transactions_clean"
    " WHERE deal_id = 7 AND transaction_type = 'secondary'",
    "idx_transactions_type_date": "SELECT sum(amount) FROM transactions_clean WHERE transaction_type = 'advisory'"
    " AND transaction_date >= current_date - 90",
    "idx_transactions_active": "SELECT DISTINCT investor_id FROM transactions_clean WHERE deal_id = 7"
    " AND status NOT IN ('cancelled', 'failed')",
    "idx_transactions_inactive": "SELECT * FROM transactions_clean"
    " WHERE deal_id = 7 AND status IN ('cancelled', 'failed')",
    "idx_transactions_date": "SELECT * FROM transactions_clean ORDER BY transaction_date DESC LIMIT 50",
    "idx_transactions_parent": "SELECT * FROM transactions_clean WHERE parent_transaction_id = 7",
    "idx_deals_underlying_company": "SELECT * FROM deals_clean WHERE underlying_company_id = 7",
    "idx_deals_partner_company": "SELECT * FROM deals_clean WHERE partner_company_id = 7",
    "idx_deals_holding_entity": "SELECT * FROM deals_clean WHERE holding_entity = 7",
    "idx_user_profiles_investor": "SELECT * FROM user_profiles WHERE investor_id = 7",
    "idx_user_profiles_company": "SELECT * FROM user_profiles WHERE company_id = 7",
    "idx_audit_logs_entity": "SELECT * FROM audit_logs"
    " WHERE entity_type = 'deals_clean' AND entity_id = '7' ORDER BY audit_id",
    "idx_audit_logs_user": "SELECT * FROM audit_logs WHERE user_id = gen_random_uuid() ORDER BY audit_id DESC LIMIT 50",
    "idx_audit_logs_request": "SELECT * FROM audit_logs WHERE request_id = 'r'",
    "idx_query_stats_fingerprint": "SELECT * FROM query_stats"
    " WHERE fingerprint = 'f7' AND minute > now() - interval '1 hour'",
    "idx_system_metrics_name_timestamp": "SELECT * FROM system_metrics WHERE metric_name = 'm7'"
    ' ORDER BY "timestamp" DESC LIMIT 1',
    "idx_performance_alerts_open": "SELECT * FROM performance_alerts WHERE rule = 'r7' AND subject = 's'"
    " AND resolved_at IS NULL",
    "idx_performance_alerts_timestamp": 'SELECT * FROM performance_alerts ORDER BY "timestamp" DESC LIMIT 20',
}

# The same where a test has too few rows for the planner to want an index, or two serve: that it can be used is shown.
POSSIBLE = {
    "idx_transactions_date_brin": "SELECT sum(amount) FROM transactions_clean"
    " WHERE transaction_date BETWEEN current_date - 45 AND current_date - 40",
    "idx_audit_logs_timestamp_brin": "SELECT count(*) FROM audit_logs WHERE \"timestamp\" > now() - interval '1 hour'",
    "idx_query_metrics_timestamp_brin": "SELECT * FROM query_metrics WHERE \"timestamp\" > now() - interval '1 hour'",
    "idx_query_stats_hourly": "SELECT * FROM equitie_private.query_stats_hourly WHERE hour > now() - interval '1 day'",
    "idx_imported_rows_run": "SELECT * FROM equitie_private.imported_rows WHERE run_id = 7",
    "idx_idempotency_keys_created": "SELECT * FROM equitie_private.idempotency_keys"
    " WHERE created_at < now() - interval '8 days'",
    "idx_partition_drains_parent": "SELECT * FROM equitie_private.partition_drains WHERE parent = 'transactions_clean'"
    " AND state <> 'swapped'",
    "idx_legacy_rejects_run": "SELECT * FROM equitie_private.legacy_rejects WHERE run_id = 7 AND source = 1",
    "idx_legacy_runs_standing": "SELECT * FROM equitie_private.legacy_runs"
    " WHERE state IN ('copying', 'undoing', 'switched')",
}

ROWS = """
INSERT INTO companies_clean (company_id, company_name) SELECT g, 'c' || g FROM generate_series(1, 1000) AS g;
INSERT INTO deals_clean (deal_id, deal_name, underlying_company_id, partner_company_id, holding_entity)
  SELECT g, 'd' || g, g, 1 + g % 1000, 1 + g % 999 FROM generate_series(1, 1000) AS g;
INSERT INTO investors_clean (investor_id, full_name) SELECT g, 'i' || g FROM generate_series(1, 1000) AS g;
INSERT INTO user_profiles (user_id, email, role, investor_id, company_id)
  SELECT gen_random_uuid(), g::text, 'investor', g, g FROM generate_series(1, 1000) AS g;
INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, transaction_type, status, amount)
  SELECT 1 + g % 1000, 1 + g * 7 % 1000, current_date - g / 100,
    CASE WHEN g % 50 = 0 THEN 'advisory' WHEN g % 7 = 0 THEN 'secondary' ELSE 'primary' END,
    CASE WHEN g % 9 = 0 THEN 'cancelled' WHEN g % 11 = 0 THEN 'failed' ELSE 'completed' END, g
  FROM generate_series(1, 12000) AS g;
INSERT INTO query_stats (minute, worker, fingerprint, query_text, operation)
  SELECT now() - g * interval '1 minute', 'w' || w, 'f' || g % 100, 'SELECT ?', 'read'
  FROM generate_series(1, 1000) AS g, generate_series(1, 3) AS w;
INSERT INTO system_metrics (metric_name, metric_value, "timestamp")
  SELECT 'm' || g % 100, 1, now() - g * interval '1 minute' FROM generate_series(1, 3000) AS g;
INSERT INTO performance_alerts (alert_type, severity, rule, message, "timestamp", resolved_at)
  SELECT 'SLOW_QUERY', 'LOW', 'r' || g, 'm', now() - g * interval '1 minute', CASE WHEN g > 900 THEN now() END
  FROM generate_series(1, 2000) AS g;
ANALYZE;
"""


@attrs.frozen
class Planner:
    """A database with rows in it."""

    conn: psycopg.Connection[Any]

    def indexes_of(self, query: str) -> set[str]:
        """Return the indexes a query's plan uses; of a partition's, the one of the table."""
        row = self.conn.execute(f"EXPLAIN (FORMAT JSON) {query}").fetchone()  # type: ignore[call-overload]
        found = set(_names(row[0]))
        tops = self.conn.execute(
            "SELECT DISTINCT r.relname FROM pg_class AS c CROSS JOIN LATERAL"
            " (SELECT coalesce(pg_partition_root(c.oid), c.oid)::oid AS oid) AS o JOIN pg_class AS r ON r.oid = o.oid"
            " WHERE c.relname = ANY (%s)",
            [list(found)],
        )
        return {name for (name,) in tops}


def _names(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _names(each)
    elif isinstance(node, dict):
        if "Index Name" in node:
            yield node["Index Name"]
        for each in node.values():
            yield from _names(each)


@pytest.fixture(scope="module")
def planner(equitie_template: DatabaseTemplate, server: EmbeddedServer) -> Iterator[Planner]:
    with equitie_template.copy() as name, psycopg.connect(server.dsn(name), autocommit=True) as conn:
        today = dt.datetime.now(dt.timezone.utc).date()
        conn.execute(
            "SELECT equitie_private.ensure_month_partitions('transactions_clean', %s, %s)",
            [today - dt.timedelta(days=150), today],
        )
        conn.execute(ROWS)
        yield Planner(conn)


def test_no_index_serves_what_another_one_does(planner: Planner) -> None:
    assert planner.conn.execute(REDUNDANT).fetchall() == []
    with planner.conn.transaction(force_rollback=True):
        planner.conn.execute(
            "CREATE INDEX dup ON deals_clean (deal_code); CREATE INDEX dup2 ON transactions_clean (deal_id)"
        )
        assert {first for first, _ in planner.conn.execute(REDUNDANT)} == {"dup", "dup2"}


def test_every_named_index_has_a_query_it_is_for(planner: Planner) -> None:
    named = {name for (name,) in planner.conn.execute(NAMED)}
    assert named == set(TYPICAL) | set(POSSIBLE), "a new index needs a query here that shows what it is for"


@pytest.mark.parametrize("index", TYPICAL)
def test_the_planner_takes_the_index_for_what_it_is_for(planner: Planner, index: str) -> None:
    assert index in planner.indexes_of(TYPICAL[index])


@pytest.mark.parametrize("index", POSSIBLE)
def test_an_index_of_a_small_table_can_serve_what_it_is_for(planner: Planner, index: str) -> None:
    with planner.conn.transaction(force_rollback=True):
        planner.conn.execute("SET LOCAL enable_seqscan = off")
        if index == "idx_transactions_date_brin":
            # On a month of a few thousand rows the btree is as good; it is over millions that BRIN costs nothing.
            planner.conn.execute("DROP INDEX idx_transactions_date, idx_transactions_type_date")
        assert index in planner.indexes_of(POSSIBLE[index])


def test_every_named_index_says_what_it_is_for(planner: Planner) -> None:
    uncommented = planner.conn.execute(
        f"SELECT n.relname FROM ({NAMED}) AS n JOIN pg_class AS c ON c.relname = n.relname AND c.relkind IN ('i', 'I')"
        " WHERE obj_description(c.oid, 'pg_class') IS NULL"
    ).fetchall()
    assert uncommented == []
