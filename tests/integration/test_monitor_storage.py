"""What the monitor measures of a real pool, and what it leaves in the database."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import structlog
from psycopg.rows import dict_row

from equitie_data import as_service
from equitie_data.alerts import Thresholds
from equitie_data.fingerprint import fingerprint_of, normalise
from equitie_data.latency import RELATIVE_ERROR, LatencySketch
from equitie_data.monitor import PerformanceMonitor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data import Database


@pytest.fixture
def owner(owner_dsn: str, database: Database) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    with psycopg.connect(owner_dsn, autocommit=True, row_factory=dict_row) as connection:
        yield connection


def test_statements_arrive_in_query_stats_without_their_values(
    database: Database, owner: psycopg.Connection[Any]
) -> None:
    with as_service("test"):
        for number in range(7):
            database.execute_read("SELECT %s::int, 'kanarie'", [number])
        database.execute_read(lambda connection: connection.execute("SELECT 'kanarie' AS in_operation").fetchall())
        database.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('kanarie')")
        with pytest.raises(psycopg.errors.UniqueViolation):
            database.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('kanarie')")
    assert database.monitor.flush()
    rows = {row["query_text"]: row for row in owner.execute("SELECT * FROM public.query_stats").fetchall()}
    assert set(rows) == {
        "select ?::int, ?",
        "select ? as in_operation",
        "insert into public.companies_clean(company_name) values (?)",
    }
    read = rows["select ?::int, ?"]
    assert (read["calls"], read["errors"], read["rows"], read["operation"]) == (7, 0, 7, "read")
    assert read["fingerprint"] == fingerprint_of(normalise("SELECT 1::int, 'other'"))
    assert 0 < read["max_ms"] <= read["total_ms"]
    write = rows["insert into public.companies_clean(company_name) values (?)"]
    assert (write["calls"], write["errors"], write["operation"]) == (2, 1, "write")
    samples = owner.execute("SELECT * FROM public.query_metrics").fetchall()
    assert [sample["error"] for sample in samples] == ["UniqueViolation"]
    assert "kanarie" not in repr((list(rows.values()), samples, database.monitor.get_dashboard_data()))


def test_flushing_measures_nothing_of_itself(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.execute_read("SELECT 1")
    for _ in range(3):
        assert database.monitor.flush()
    assert [row["query_text"] for row in owner.execute("SELECT * FROM public.query_stats").fetchall()] == ["select ?"]
    assert database.monitor.stats().tracked == database.monitor.stats().flushed == 1


def test_deltas_add_up_in_the_minute_and_the_sketches_merge_in_sql(
    database: Database, owner: psycopg.Connection[Any]
) -> None:
    monitor = PerformanceMonitor(execute_write=database.execute_write, clock=lambda: 1_764_590_400.0)
    expected = LatencySketch()
    for call in range(1, 201):
        monitor.track_query("SELECT a FROM t", call * 7.0, 1)
        expected.add(call * 0.007)
        if call % 50 == 0:
            assert monitor.flush()
    [row] = owner.execute("SELECT * FROM public.query_stats").fetchall()
    assert (row["calls"], row["rows"], row["over_1s"], row["over_3s"]) == (200, 200, 58, 0)
    assert row["total_ms"] == pytest.approx(sum(call * 7.0 for call in range(1, 201)))
    assert LatencySketch.from_json(row["buckets"]) == expected
    owner.execute("SELECT equitie_private.refresh_query_stats_hourly()")
    quantile = """
        SELECT 2 / 2.02 * power(1.02, b.key::int) / 1e6 AS seconds
        FROM equitie_private.query_stats_hourly AS h, jsonb_each_text(h.buckets) AS b,
          LATERAL (
            SELECT sum(c.value::bigint) AS passed FROM jsonb_each_text(h.buckets) AS c WHERE c.key::int <= b.key::int
          ) AS s
        WHERE s.passed >= 0.95 * h.calls
        ORDER BY b.key::int
        LIMIT 1
    """
    [p95] = owner.execute(quantile).fetchall()
    assert float(p95["seconds"]) == pytest.approx(190 * 0.007, rel=RELATIVE_ERROR + 1e-6)


def test_alerts_open_once_and_close_when_their_cause_is_gone(
    database: Database, owner: psycopg.Connection[Any]
) -> None:
    now = [1_764_590_400.0]
    monitor = PerformanceMonitor(execute_write=database.execute_write, clock=lambda: now[0])
    select = "SELECT alert_type, severity, rule, details, resolved_at, occurrences FROM public.performance_alerts"
    for milliseconds in (2000, 2000, 6000):
        monitor.track_query("SELECT a FROM t WHERE b = 'kanarie'", milliseconds, 1)
        assert monitor.flush()
    [alert] = owner.execute(select).fetchall()
    assert (alert["alert_type"], alert["severity"], alert["rule"]) == ("SLOW_QUERY", "CRITICAL", "slow_query")
    assert alert["details"]["query"] == "select a from t where b = ?"
    assert alert["resolved_at"] is None
    now[0] += 301
    assert monitor.flush()
    [alert] = owner.execute(select).fetchall()
    assert alert["resolved_at"] is not None
    monitor.track_query("SELECT a FROM t WHERE b = 'kanarie'", 2000, 1)
    assert monitor.flush()
    found = owner.execute(select + " ORDER BY alert_id").fetchall()
    assert [(each["severity"], each["resolved_at"] is None) for each in found] == [
        ("CRITICAL", False),
        ("MEDIUM", True),
    ]


def test_system_metrics_are_appended(database: Database, owner: psycopg.Connection[Any]) -> None:
    database.monitor.track_system_metric("pool.in_use", 3, "connections", {"node": "a", "password": "kanarie"})
    database.monitor.track_system_metric("bad", float("inf"))
    assert database.monitor.flush()
    [row] = owner.execute("SELECT * FROM public.system_metrics").fetchall()
    assert (row["metric_name"], row["metric_value"], row["metric_unit"]) == ("pool.in_use", 3.0, "connections")
    assert row["metadata"] == {"node": "a", "password": "***"}


def test_a_critical_statement_is_in_the_database_without_waiting_for_the_interval(
    database: Database, owner: psycopg.Connection[Any]
) -> None:
    thresholds = Thresholds(slow_medium=0.001, slow_high=0.002, slow_critical=0.003)
    monitor = PerformanceMonitor(execute_write=database.execute_write, flush_interval=3600.0, thresholds=thresholds)
    monitor.start()
    database.hooks.add(monitor)
    with as_service("test"):
        database.execute_read("SELECT pg_catalog.pg_sleep(0.01)")
    database.hooks.remove(monitor)
    pause = threading.Event()
    while not owner.execute("SELECT FROM public.performance_alerts WHERE severity = 'CRITICAL'").fetchall():
        pause.wait(0.01)
    monitor.close()


def test_an_outage_costs_no_count(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.execute_read("SELECT 1")
        owner.execute("ALTER FUNCTION equitie_private.record_query_stats(jsonb) RENAME TO away")
        with structlog.testing.capture_logs() as logged:
            assert not database.monitor.flush()
        assert [entry["error"] for entry in logged] == ["UndefinedFunction"]
        database.execute_read("SELECT 1")
        owner.execute("ALTER FUNCTION equitie_private.away(jsonb) RENAME TO record_query_stats")
        assert database.monitor.flush()
    [row] = owner.execute("SELECT * FROM public.query_stats").fetchall()
    assert row["calls"] == 2


def test_statements_of_many_threads_are_stored_exactly(database: Database, owner: psycopg.Connection[Any]) -> None:
    def work() -> None:
        with as_service("test"):
            for _ in range(50):
                database.execute_read("SELECT 1")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.monitor.flush()
    [row] = owner.execute("SELECT sum(calls)::int AS calls, sum(rows)::int AS rows FROM public.query_stats").fetchall()
    assert row == {"calls": 400, "rows": 400}


def test_the_dashboard_of_a_real_pool_is_json(database: Database) -> None:
    with as_service("test"):
        database.execute_read("SELECT 1")
        found = database.execute_read(lambda _: database.monitor.get_dashboard_data())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["health"]["active_connections"] == 1
    assert found["queries"]["count"] == 1


def test_closing_the_database_stores_what_was_counted(database: Database, owner: psycopg.Connection[Any]) -> None:
    with as_service("test"):
        database.execute_read("SELECT 1")
    database.close()
    assert [row["calls"] for row in owner.execute("SELECT calls FROM public.query_stats").fetchall()] == [1]
