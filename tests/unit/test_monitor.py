from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs
import psycopg
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.alerts import Alert, AlertBook, SlidingRate, Thresholds
from equitie_data.context import Actor, as_service, current_actor
from equitie_data.errors import CommitOutcomeUnknown, ConfigurationError, UnavailableError
from equitie_data.fingerprint import OTHER, fingerprint_of, normalise
from equitie_data.hooks import Hook, OperationStarted, StatementEnded
from equitie_data.latency import LatencySketch
from equitie_data.monitor import PerformanceMonitor
from equitie_data.query_history import QueryCounts, QueryHistory

if TYPE_CHECKING:
    from collections.abc import Callable

ACTOR = Actor(kind="user", user_id=UUID(int=7))
NOON = 1_764_590_400.0  # a full hour


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


class FakeStore:
    """Stands for the database: the JSON that every function got."""

    def __init__(self) -> None:
        self.got: list[tuple[str, list[dict[str, Any]]]] = []
        self.errors: list[BaseException] = []
        self.names: list[str] = []
        self.during: Callable[[], object] = lambda: None

    def execute_write(self, operation: Any, *, name: str, **_: object) -> None:
        assert current_actor().reason == "performance monitor"
        self.names.append(name)
        self.during()
        if self.errors:
            raise self.errors.pop(0)
        operation(self)

    def execute(self, sql: str, params: list[Any]) -> None:
        json.dumps(params[0].obj, allow_nan=False)
        self.got.append((sql, params[0].obj))

    def rows(self, what: str) -> list[dict[str, Any]]:
        return [row for sql, rows in self.got if what in sql for row in rows]


def ended(sql: str = "SELECT a FROM t WHERE id = %s", seconds: float = 0.01, **changes: Any) -> StatementEnded:
    event = StatementEnded(
        sql=sql,
        kind="read",
        name=None,
        node="db",
        node_role="primary",
        seconds=seconds,
        rows=1,
        sqlstate=None,
        error=None,
        actor=ACTOR,
    )
    return attrs.evolve(event, **changes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def monitor(clock: Clock, store: FakeStore) -> PerformanceMonitor:
    return PerformanceMonitor(execute_write=store.execute_write, clock=clock)


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


def alerts_of(monitor: PerformanceMonitor) -> list[tuple[str, str, str]]:
    return [(a["alert_type"], a["severity"], a["state"]) for a in monitor.get_dashboard_data()["alerts"]]


# --- counting


def test_it_is_a_hook_and_ignores_other_events(monitor: PerformanceMonitor) -> None:
    assert isinstance(monitor, Hook)
    monitor.on_event(
        OperationStarted(
            name=None, kind="read", node="db", node_role="primary", attempt=1, checkout_seconds=0.0, actor=ACTOR
        )
    )
    assert monitor.stats().tracked == 0


def test_the_dashboard_needs_no_database(clock: Clock) -> None:
    monitor = PerformanceMonitor(clock=clock, pool_stats=lambda: {"db": {"in_use": 2}, "replica": {"in_use": 1}})
    clock.now += 10
    for seconds in (0.01, 0.02, 0.03, 2.0):
        monitor.on_event(ended(seconds=seconds))
    monitor.on_event(
        ended("UPDATE t SET a = 1", rows=None, sqlstate="40001", error="SerializationFailure", kind="write")
    )
    found = monitor.get_dashboard_data("5m")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schema_version"] == 1
    assert found["window"] == "5m"
    assert found["queries"]["count"] == 5
    assert found["queries"]["qps"] == 0.5
    assert found["queries"]["mean_ms"] == pytest.approx(414)
    assert found["queries"]["p50_ms"] == pytest.approx(20, rel=0.01)
    assert found["queries"]["p99_ms"] == pytest.approx(2000, rel=0.01)
    assert found["queries"]["slow"] == {"MEDIUM": 1, "HIGH": 0, "CRITICAL": 0}
    assert found["queries"]["top_slow"][0]["query"] == "select a from t where id = ?"
    assert found["queries"]["top_frequent"][0]["count"] == 4
    assert [entry["query"] for entry in found["queries"]["top_errors"]] == ["update t set a = ?"]
    assert found["errors"]["rate"] == 0.2
    assert found["errors"]["by_sqlstate"] == {"40001": 1}
    assert found["errors"]["recent"][0]["error"] == "SerializationFailure"
    assert found["health"]["active_connections"] == 3
    assert found["cache"] == {"hits": 0, "misses": 0, "hit_rate": None}
    assert monitor.flush()


def test_an_empty_dashboard_has_no_figures_and_no_error(clock: Clock) -> None:
    found = PerformanceMonitor(clock=clock).get_dashboard_data()
    assert found["queries"]["count"] == 0
    assert found["queries"]["mean_ms"] is None
    assert found["queries"]["p95_ms"] is None
    assert found["errors"]["rate"] is None


def test_pool_stats_that_fail_do_not_fail_the_dashboard(clock: Clock) -> None:
    def fail() -> dict[str, Any]:
        raise OSError("secret path")

    health = PerformanceMonitor(clock=clock, pool_stats=fail).get_dashboard_data()["health"]
    assert health == {"pool": {"error": "OSError"}, "active_connections": None}


@pytest.mark.parametrize("window", ["", "1", "0m", "1d", "25h", "h", "1.5h", "-1h"])
def test_a_window_that_is_none_is_refused(monitor: PerformanceMonitor, window: str) -> None:
    with pytest.raises(ValueError, match="window"):
        monitor.get_dashboard_data(window)


def test_a_window_holds_its_minutes_and_no_others(monitor: PerformanceMonitor, clock: Clock) -> None:
    for hours_ago, calls in [(30, 1), (5, 2), (0.5, 4), (0, 8)]:
        clock.now = NOON - hours_ago * 3600
        for _ in range(calls):
            monitor.on_event(ended())
        monitor.get_dashboard_data()  # time passes with reports in between
    assert monitor.get_dashboard_data("5m")["queries"]["count"] == 8
    assert monitor.get_dashboard_data("1h")["queries"]["count"] == 12
    assert monitor.get_dashboard_data("24h")["queries"]["count"] == 14
    clock.now += 40 * 60
    assert monitor.get_dashboard_data("1h")["queries"]["count"] == 8


def test_track_query_knows_the_platforms_call(monitor: PerformanceMonitor) -> None:
    monitor.track_query("SELECT 'kanarie'", 12.5, 3)
    monitor.track_query("SELECT 'kanarie'", 12.5, 3, False, None)
    monitor.track_query("SELECT 'kanarie'", 12.5, 3, cache_hit=True)
    monitor.track_query("insert into t values ('kanarie')", 1, 1, error=psycopg.errors.UniqueViolation("kanarie"))
    monitor.track_query("insert into t values ('kanarie')", 1, 1, error="duplicate key (name)=(kanarie)")
    monitor.track_query("insert into t values ('kanarie')", 1, 1, error="57014")
    monitor.track_query("insert into t values ('kanarie')", 1, 1, error="TimeoutError")
    found = monitor.get_dashboard_data()
    assert found["queries"]["count"] == 6
    assert found["cache"] == {"hits": 1, "misses": 1, "hit_rate": 0.5}
    assert found["errors"]["by_sqlstate"] == {"23505": 1, "57014": 1, "TimeoutError": 1, "unknown": 1}
    assert {entry["kind"] for entry in found["queries"]["top_errors"]} == {"write"}
    assert "kanarie" not in json.dumps(found)


def test_no_value_reaches_anything_that_is_kept(clock: Clock, store: FakeStore) -> None:
    told: list[Alert] = []
    monitor = PerformanceMonitor(execute_write=store.execute_write, clock=clock, alert_sinks=[told.append])
    sql = "SELECT * FROM t WHERE a = 'kanarie' AND b = $$kanarie$$ AND c = E'\\'kanarie' -- kanarie\n AND d = 'kanarie"
    monitor.start()
    with structlog.testing.capture_logs() as logged:
        monitor.on_event(ended(sql, 6.0, sqlstate="42601", error="SyntaxError"))
        monitor.track_system_metric("pool", 1.0, metadata={"password": "kanarie", "url": "redis://x:kanarie@h"})
        found = monitor.get_dashboard_data()
        monitor.close()
    assert told
    assert len(store.got) == 4
    assert "kanarie" not in repr((found, told, store.got, logged, monitor.analyze_query_patterns()))


def test_operations_are_counted_apart_from_statements(monitor: PerformanceMonitor) -> None:
    @monitor.with_performance_tracking("portfolio")
    def portfolio(fail: bool) -> int:
        if fail:
            raise LookupError
        return 1

    @monitor.with_performance_tracking("quote")
    async def quote() -> int:
        await asyncio.sleep(0)
        return 2

    assert portfolio(False) == 1
    with pytest.raises(LookupError):
        portfolio(True)
    assert asyncio.run(quote()) == 2
    found = monitor.get_dashboard_data()
    assert found["queries"]["count"] == 0
    assert [(entry["query"], entry["count"], entry["errors"]) for entry in found["operations"]] == [
        ("portfolio", 2, 1),
        ("quote", 1, 0),
    ]


def test_system_metrics(monitor: PerformanceMonitor, store: FakeStore) -> None:
    monitor.track_system_metric("pool.size", 3, "connections", {"node": "db"})
    monitor.track_system_metric("pool.size", 4, "connections")
    monitor.track_system_metric("broken", float("nan"))
    assert monitor.get_dashboard_data()["metrics"]["pool.size"]["metric_value"] == 4.0
    monitor.flush()
    assert [row["metric_value"] for row in store.rows("record_system_metrics")] == [3.0, 4.0]
    assert monitor.stats().dropped == 1


@pytest.fixture
def interrupted_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread runs in the middle of every addition: without the lock, counts are lost for certain."""
    add = QueryCounts.add

    def interrupted(counts: QueryCounts, seconds: float, rows: int | None) -> None:
        calls = counts.calls
        time.sleep(0)
        add(counts, seconds, rows)
        counts.calls = calls + 1

    monkeypatch.setattr(QueryCounts, "add", interrupted)


@pytest.mark.usefixtures("interrupted_additions")
def test_sixteen_threads_are_counted_exactly(store: FakeStore) -> None:
    monitor = PerformanceMonitor(execute_write=store.execute_write, flush_interval=0.001)
    monitor.start()

    def work(number: int) -> None:
        for call in range(500):
            failed = call % 10 == 0
            monitor.on_event(
                ended(f"SELECT c{number % 4} FROM t", 0.001 * (call % 7), rows=2, error="OSError" if failed else None)
            )
            monitor.track_cache_lookup(hit=call % 2 == 0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = monitor.get_dashboard_data()
    monitor.close()
    assert found["queries"]["count"] == monitor.stats().tracked == monitor.stats().flushed == 8000
    assert found["queries"]["errors"] == 800
    assert found["cache"]["hits"] == found["cache"]["misses"] == 4000
    rows = store.rows("record_query_stats")
    assert sum(row["calls"] for row in rows) == 8000
    assert sum(row["errors"] for row in rows) == 800
    assert sum(row["rows"] for row in rows) == 16_000
    assert sum(sum(row["buckets"].values()) for row in rows) == 8000
    assert len({row["fingerprint"] for row in rows}) == 4


# --- bounds


def test_too_many_fingerprints_are_counted_as_other(clock: Clock, store: FakeStore) -> None:
    monitor = PerformanceMonitor(execute_write=store.execute_write, clock=clock, max_fingerprints=10)
    for number in range(25):
        monitor.on_event(ended(f"SELECT c{number} FROM t"))
    assert monitor.stats().overflowed == 15
    monitor.flush()
    rows = {row["fingerprint"]: row["calls"] for row in store.rows("record_query_stats")}
    assert len(rows) == 11
    assert rows[OTHER] == 15
    assert sum(rows.values()) == 25


def test_fingerprints_nobody_uses_any_more_make_room(clock: Clock) -> None:
    monitor = PerformanceMonitor(clock=clock, max_fingerprints=10)
    for number in range(10):
        monitor.on_event(ended(f"SELECT c{number} FROM t"))
    clock.now += 26 * 3600
    monitor.flush()
    monitor.on_event(ended("SELECT fresh FROM t"))
    monitor.flush()
    monitor.on_event(ended("SELECT fresh FROM t"))
    assert monitor.stats().overflowed == 0
    assert monitor.analyze_query_patterns()["frequent"][0]["query"] == "select fresh from t"


def test_counts_nobody_takes_are_bounded(clock: Clock) -> None:
    monitor = PerformanceMonitor(clock=clock, max_fingerprints=10)
    for number in range(1000):
        clock.now += 60
        monitor.on_event(ended(f"SELECT c{number % 7} FROM t"))
    assert len(monitor._watch._current) <= 1000
    assert monitor.stats().tracked == 1000


def test_history_is_exact_in_sum_and_bounded_in_statements() -> None:
    history = QueryHistory()
    for minute in range(200):
        for number in range(300):
            counts = QueryCounts()
            counts.add(0.001 * (number + 1), 1)
            history.add(minute, (f"f{number}", "read"), counts)
        history.advance(minute)
    found = history.since(0)
    assert sum(each.calls for each in found.values()) == 200 * 300
    old = history._minutes[150]
    assert len(old) <= 401
    assert old["f299", "read"].calls == 1
    assert old[OTHER, "read"].calls == 300 - (len(old) - 1)
    assert len(history._minutes) == 60


# --- storing


def test_a_flush_stores_minute_deltas(monitor: PerformanceMonitor, clock: Clock, store: FakeStore) -> None:
    monitor.on_event(ended(seconds=0.5))
    clock.now += 60
    monitor.on_event(ended(seconds=4.0))
    assert monitor.flush()
    first, second = store.rows("record_query_stats")
    assert (first["minute"], second["minute"]) == ("2025-12-01T12:00:00+00:00", "2025-12-01T12:01:00+00:00")
    assert first["fingerprint"] == fingerprint_of(normalise(first["query_text"]))
    assert first["operation"] == "read"
    assert (first["calls"], first["total_ms"], first["max_ms"]) == (1, 500.0, 500.0)
    assert (second["over_1s"], second["over_3s"], second["over_5s"]) == (1, 1, 0)
    quantile = LatencySketch.from_json(second["buckets"]).quantile(0.5)
    assert quantile == pytest.approx(4.0, rel=0.01)
    store.got.clear()
    assert monitor.flush()
    assert store.rows("record_query_stats") == []
    monitor.on_event(ended(seconds=0.5))
    monitor.flush()
    assert [row["calls"] for row in store.rows("record_query_stats")] == [1]
    assert store.names == ["equitie.monitor.flush"] * 2


def test_the_monitors_own_statements_are_not_tracked(monitor: PerformanceMonitor, store: FakeStore) -> None:
    store.during = lambda: monitor.on_event(ended("SELECT equitie_private.record_query_stats(%s)"))
    monitor.on_event(ended())
    monitor.flush()
    monitor.on_event(ended())
    assert monitor.stats().tracked == 2


def test_a_failed_flush_keeps_everything(monitor: PerformanceMonitor, store: FakeStore) -> None:
    monitor.on_event(ended(seconds=6.0))
    monitor.track_system_metric("a", 1)
    store.errors = [UnavailableError("away"), psycopg.OperationalError("away")]
    with structlog.testing.capture_logs() as logged:
        assert not monitor.flush()
        monitor.on_event(ended(seconds=0.1))
        assert not monitor.flush()
    assert [entry["event"] for entry in logged] == ["monitor.flush_failed"] * 2
    assert monitor.flush()
    assert [row["calls"] for row in store.rows("record_query_stats")] == [2]
    assert len(store.rows("record_system_metrics")) == 1
    assert len(store.rows("raise_alerts")) == 1
    assert len(store.rows("query_metrics")) == 1
    stats = monitor.stats()
    assert (stats.flushed, stats.failed_flushes, stats.dropped) == (2, 2, 0)


@pytest.mark.parametrize("error", [CommitOutcomeUnknown("lost"), psycopg.DataError("odd")])
def test_what_may_be_stored_already_is_not_sent_again(
    monitor: PerformanceMonitor, store: FakeStore, error: Exception
) -> None:
    monitor.on_event(ended())
    store.errors = [error]
    with structlog.testing.capture_logs():
        assert not monitor.flush()
    assert monitor.flush()
    assert store.got == []
    assert (monitor.stats().failed_flushes, monitor.stats().dropped, monitor.stats().flushed) == (1, 1, 0)


def test_a_long_outage_is_bounded_and_what_it_costs_is_counted(clock: Clock, store: FakeStore) -> None:
    monitor = PerformanceMonitor(
        execute_write=store.execute_write, clock=clock, max_fingerprints=5, max_pending=3, samples_per_flush=2
    )
    store.errors = [UnavailableError("away") for _ in range(40)]
    with structlog.testing.capture_logs():
        for minute in range(40):
            clock.now += 60
            for number in range(4):
                monitor.on_event(ended(f"SELECT c{number} FROM t", 2.0))
            monitor.track_system_metric("a", minute)
            assert not monitor.flush()
    assert len(monitor._unsaved) <= 10
    assert monitor.flush()
    stats = monitor.stats()
    assert stats.tracked == 160
    stored = sum(row["calls"] for row in store.rows("record_query_stats"))
    assert stats.flushed == stored
    lost_metrics = 40 - len(store.rows("record_system_metrics"))
    lost_alerts = stats.alerts_fired - len(store.rows("raise_alerts"))
    assert stats.dropped == (160 - stored) + lost_metrics + lost_alerts
    assert len(store.rows("query_metrics")) == 2
    assert stats.samples_skipped == 158


def test_the_thread_flushes_by_itself_and_close_stores_the_rest(store: FakeStore) -> None:
    monitor = PerformanceMonitor(execute_write=store.execute_write, flush_interval=0.01)
    monitor.on_event(ended())
    monitor.start()
    wait_until(lambda: monitor.stats().flushed == 1)
    thread = monitor._thread
    monitor.on_event(ended())
    monitor.close()
    monitor.close()
    assert monitor.stats().flushed == 2
    assert thread is not None
    assert not thread.is_alive()


def test_no_thread_starts_before_start(monitor: PerformanceMonitor) -> None:
    before = threading.active_count()
    monitor.on_event(ended(seconds=9.0))
    assert threading.active_count() == before


def test_a_forked_child_starts_empty_and_with_a_thread_of_its_own(store: FakeStore) -> None:
    monitor = PerformanceMonitor(execute_write=store.execute_write, flush_interval=0.01)
    monitor.start()
    thread = monitor._thread
    assert thread is not None
    monitor._stop.set()  # a real fork would not have brought the parent's thread along
    monitor._wake.set()
    thread.join()
    monitor.on_event(ended("SELECT parent FROM t"))
    monitor.after_fork()
    monitor.on_event(ended("SELECT child FROM t"))
    wait_until(lambda: monitor.stats().flushed == 1)
    monitor.close()
    assert {row["query_text"] for row in store.rows("record_query_stats")} == {"select child from t"}


# --- alerts


@pytest.mark.parametrize(
    ("seconds", "severity"),
    [(1.0, None), (1.000001, "MEDIUM"), (3.0, "MEDIUM"), (3.01, "HIGH"), (5.0, "HIGH"), (5.01, "CRITICAL")],
)
def test_slow_is_strictly_more_than_the_threshold(
    monitor: PerformanceMonitor, store: FakeStore, seconds: float, severity: str | None
) -> None:
    monitor.on_event(ended("SELECT a FROM t WHERE b = 'kanarie'", seconds))
    assert alerts_of(monitor) == ([] if severity is None else [("SLOW_QUERY", severity, "firing")])
    monitor.flush()
    raised = store.rows("raise_alerts")
    assert [row["severity"] for row in raised] == ([] if severity is None else [severity])
    for row in raised:
        assert row["subject"] == row["details"]["fingerprint"]
        assert row["details"]["query"] == "select a from t where b = ?"


def test_an_open_alert_fires_again_only_if_it_gets_worse_or_has_cleared(
    monitor: PerformanceMonitor, clock: Clock, store: FakeStore
) -> None:
    for seconds in (2.0, 2.0, 4.0, 2.0, 6.0, 9.0):
        monitor.on_event(ended(seconds=seconds))
    assert monitor.stats().alerts_fired == 3
    assert monitor.stats().alerts_repeated == 3
    assert alerts_of(monitor) == [("SLOW_QUERY", "CRITICAL", "firing")]
    clock.now += 299
    monitor.on_event(ended(seconds=2.0))
    assert monitor.stats().alerts_fired == 3
    clock.now += 301
    monitor.on_event(ended(seconds=2.0))
    assert monitor.stats().alerts_fired == 4
    assert alerts_of(monitor) == [("SLOW_QUERY", "MEDIUM", "firing"), ("SLOW_QUERY", "CRITICAL", "resolved")]
    clock.now += 301
    monitor.flush()
    assert alerts_of(monitor)[0] == ("SLOW_QUERY", "MEDIUM", "resolved")
    kinds = ["raise" if "raise_alerts" in sql else "resolve" for sql, _ in store.got if "alerts" in sql]
    assert kinds == ["raise", "resolve", "raise", "resolve"]


def test_each_statement_has_an_alert_of_its_own(monitor: PerformanceMonitor) -> None:
    monitor.on_event(ended("SELECT a FROM t WHERE b = 1", 2.0))
    monitor.on_event(ended("SELECT a FROM t WHERE b = 2", 2.0))
    monitor.on_event(ended("SELECT b FROM t", 2.0))
    assert monitor.stats().alerts_fired == 2


def test_the_error_rate_alerts_above_five_percent(monitor: PerformanceMonitor) -> None:
    for number in range(40):
        monitor.on_event(ended(error="OSError" if number >= 38 else None))
    assert alerts_of(monitor) == []  # exactly 5 %
    monitor.on_event(ended(error="OSError"))
    assert alerts_of(monitor) == [("ERROR_RATE", "HIGH", "firing")]


def test_the_error_rate_of_fewer_than_twenty_statements_is_none(monitor: PerformanceMonitor) -> None:
    for _ in range(19):
        monitor.on_event(ended(error="OSError"))
    assert alerts_of(monitor) == []
    monitor.on_event(ended(error="OSError"))
    assert alerts_of(monitor) == [("ERROR_RATE", "HIGH", "firing")]


def test_the_error_rate_clears_only_well_below_and_may_fire_again(monitor: PerformanceMonitor, clock: Clock) -> None:
    for number in range(20):
        monitor.on_event(ended(error="OSError" if number < 2 else None))
    monitor.on_event(ended(error="OSError"))
    for _ in range(3 * 20 - 21):
        monitor.on_event(ended())
    assert alerts_of(monitor) == [("ERROR_RATE", "HIGH", "firing")]  # 5 %: no longer above, not yet clear
    for _ in range(15):
        monitor.on_event(ended())
    assert alerts_of(monitor) == [("ERROR_RATE", "HIGH", "resolved")]  # 4 %
    for _ in range(3):
        monitor.on_event(ended(error="OSError"))
    assert alerts_of(monitor)[0] == ("ERROR_RATE", "HIGH", "firing")
    assert monitor.stats().alerts_fired == 2
    clock.now += 301
    assert alerts_of(monitor)[0] == ("ERROR_RATE", "HIGH", "resolved")  # the window is empty


def test_errors_that_are_the_callers_business_are_shown_but_do_not_alert(clock: Clock) -> None:
    monitor = PerformanceMonitor(clock=clock, thresholds=Thresholds(errors_ignored=("23",)))
    for _ in range(30):
        monitor.on_event(ended(sqlstate="23505", error="UniqueViolation"))
    found = monitor.get_dashboard_data()
    assert found["alerts"] == []
    assert found["errors"]["by_sqlstate"] == {"23505": 30}


def test_the_cache_alerts_below_seventy_percent_of_at_least_a_hundred(monitor: PerformanceMonitor) -> None:
    for number in range(99):
        monitor.track_cache_lookup(hit=number < 60)
    assert alerts_of(monitor) == []
    monitor.track_cache_lookup(hit=False)
    assert alerts_of(monitor) == [("CACHE_MISS", "MEDIUM", "firing")]
    for _ in range(59):
        monitor.track_cache_lookup(hit=True)
    assert alerts_of(monitor)[0][2] == "firing"  # 74.8 %
    for _ in range(2):
        monitor.track_cache_lookup(hit=True)
    assert alerts_of(monitor)[0][2] == "resolved"


def test_exactly_seventy_percent_is_enough(monitor: PerformanceMonitor) -> None:
    for number in range(100):
        monitor.track_cache_lookup(hit=number < 70)
    assert alerts_of(monitor) == []


def test_a_critical_alert_is_told_at_once_and_others_with_the_flush(store: FakeStore) -> None:
    told: list[Alert] = []
    threads: set[str] = set()

    def sink(alert: Alert) -> None:
        threads.add(threading.current_thread().name)
        told.append(alert)

    monitor = PerformanceMonitor(execute_write=store.execute_write, flush_interval=3600.0, alert_sinks=[sink])
    monitor.start()
    monitor.on_event(ended("SELECT a FROM t", 2.0))
    monitor.on_event(ended("SELECT b FROM t", 6.0))
    wait_until(lambda: len(store.rows("raise_alerts")) == 2)
    monitor.close()
    assert [alert.severity for alert in told] == ["MEDIUM", "CRITICAL"]
    assert told[0].alert_id.startswith("slow_query:")
    assert threads == {"equitie-monitor"}


def test_a_sink_that_raises_is_counted_and_does_not_silence_the_others() -> None:
    told: list[Alert] = []

    def broken(alert: Alert) -> None:
        raise OSError

    monitor = PerformanceMonitor(alert_sinks=[broken, told.append], flush_interval=3600.0)
    with structlog.testing.capture_logs() as logged:
        monitor.start()
        monitor.on_event(ended(seconds=6.0))
        monitor.close()
    assert len(told) == 1
    assert monitor.stats().sink_errors == 1
    assert [entry["event"] for entry in logged] == ["monitor.alert_sink_failed"]


def test_a_sink_that_hangs_blocks_no_statement_and_no_memory() -> None:
    release, entered = threading.Event(), threading.Event()

    def hang(alert: Alert) -> None:
        entered.set()
        release.wait()

    monitor = PerformanceMonitor(alert_sinks=[hang], max_pending=5, flush_interval=3600.0)
    monitor.start()
    monitor.on_event(ended("SELECT first FROM t", 6.0))
    entered.wait()
    for number in range(20):
        monitor.on_event(ended(f"SELECT c{number} FROM t", 6.0))
    assert monitor.stats().alerts_fired == 21
    assert monitor.stats().sink_errors == 15
    release.set()
    monitor.close()


def test_thresholds_may_be_chosen(clock: Clock) -> None:
    monitor = PerformanceMonitor(clock=clock, thresholds=Thresholds(slow_medium=0.1, slow_high=0.2, slow_critical=0.3))
    monitor.on_event(ended(seconds=0.25))
    assert alerts_of(monitor) == [("SLOW_QUERY", "HIGH", "firing")]
    assert monitor.get_dashboard_data()["queries"]["slow"] == {"MEDIUM": 0, "HIGH": 1, "CRITICAL": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"slow_medium": 3.0},
        {"slow_medium": 0.0},
        {"error_rate_clear": 0.06},
        {"cache_hit_rate_clear": 0.6},
        {"error_rate_window": 0.0},
        {"cache_lookups": 0},
    ],
)
def test_thresholds_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Thresholds(**wrong)


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError):
        PerformanceMonitor(flush_interval=0.0)


_events = st.lists(st.tuples(st.floats(min_value=0, max_value=100), st.booleans()), max_size=60).map(
    lambda events: sorted(events, key=lambda event: event[0])
)


@given(_events)
def test_a_sliding_rate_counts_what_its_window_holds(events: list[tuple[float, bool]]) -> None:
    rate = SlidingRate(30.0)  # slices of one second
    for now, matches in events:
        rate.add(now, matches=matches)
        inside = [each for each in events[: events.index((now, matches)) + 1] if int(each[0]) > int(now) - 30]
        assert rate.total >= len(inside)
    if events:
        last = int(events[-1][0])
        inside = [each for each in events if int(each[0]) > last - 30]
        assert (rate.total, rate.matching) == (len(inside), sum(each[1] for each in inside))
        rate.expire(events[-1][0] + 31)
        assert (rate.total, rate.matching) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from(["fire", "clear"]), st.sampled_from("ab")), max_size=40))
def test_between_two_firings_of_one_alert_it_has_cleared(steps: list[tuple[str, str]]) -> None:
    book = AlertBook()
    is_open: set[str] = set()
    for now, (step, subject) in enumerate(steps):
        if step == "fire":
            alert = book.fire("SLOW_QUERY", "HIGH", rule="r", subject=subject, message="m", details={}, now=float(now))
            assert (alert is not None) == (subject not in is_open)
            is_open.add(subject)
        elif subject in is_open:
            book.clear("r", subject, float(now))
            is_open.remove(subject)
        assert book.is_open("r", subject) == (subject in is_open)


def test_a_monitor_runs_without_an_actor_and_leaves_the_callers_alone(
    monitor: PerformanceMonitor, store: FakeStore
) -> None:
    with as_service("caller"):
        monitor.on_event(ended())
        monitor.flush()
        assert current_actor().reason == "caller"
    assert store.rows("record_query_stats")
