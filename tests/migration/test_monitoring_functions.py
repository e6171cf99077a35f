"""Figures of many workers add up in the database."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.migration.conftest import Platform


def call(platform: Platform, function: str, events: list[dict[str, Any]]) -> int:
    with platform.acting(None) as conn:
        row = conn.execute(f"SELECT equitie_private.{function}(%s)", (json.dumps(events),)).fetchone()
    assert row is not None
    return int(row[0])


def statistics(minute: str, **figures: Any) -> dict[str, Any]:
    return {
        "minute": minute,
        "worker": "w",
        "fingerprint": "f",
        "query_text": "SELECT $1",
        "operation": "read",
        **figures,
    }


def test_statistics_of_one_minute_add_up(platform: Platform) -> None:
    first = statistics(
        "2026-01-01T10:00:07+00:00", calls=2, errors=1, rows=5, total_ms=10.5, max_ms=9, over_1s=1, over_3s=0,
        over_5s=0, buckets={"10": 1, "12": 1},
    )  # fmt: skip
    second = statistics(
        "2026-01-01T10:00:59+00:00", calls=3, rows=1, total_ms=1, max_ms=0.5, over_5s=2, buckets={"12": 2, "-3": 1}
    )
    other = statistics("2026-01-01T10:01:00+00:00", calls=1, operation="write")
    assert call(platform, "record_query_stats", [first, second, other]) == 2
    assert call(platform, "record_query_stats", [first]) == 1
    platform.owner.execute("SET TimeZone = 'UTC'")
    assert platform.rows(
        "SELECT minute::text, operation, calls, errors, rows, total_ms, max_ms, over_1s, over_3s, over_5s, buckets"
        " FROM query_stats ORDER BY minute"
    ) == [
        ("2026-01-01 10:00:00+00", "read", 7, 2, 11, 22.0, 9.0, 2, 0, 2, {"10": 2, "12": 4, "-3": 1}),
        ("2026-01-01 10:01:00+00", "write", 1, 0, 0, 0.0, 0.0, 0, 0, 0, {}),
    ]

    with platform.acting(None) as conn:
        conn.execute("SELECT equitie_private.refresh_query_stats_hourly()")
        hourly = conn.execute(
            "SELECT calls, buckets FROM equitie_private.query_stats_by_hour('2026-01-01') ORDER BY operation"
        ).fetchall()
    assert hourly == [(7, {"10": 2, "12": 4, "-3": 1}), (1, {})]


buckets = st.dictionaries(st.integers(-50, 50).map(str), st.integers(0, 10**12), max_size=8)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=buckets, b=buckets, c=buckets)
def test_sketches_add_up_bucket_by_bucket_in_any_order(
    platform: Platform, a: dict[str, int], b: dict[str, int], c: dict[str, int]
) -> None:
    expected = {key: a.get(key, 0) + b.get(key, 0) + c.get(key, 0) for key in a.keys() | b.keys() | c.keys()}
    add = "equitie_private.add_buckets"
    texts = [json.dumps(sketch) for sketch in (a, b, c)]
    assert platform.one(f"SELECT {add}({add}(%s, %s), %s)", *texts) == expected
    assert platform.one(f"SELECT {add}(%s, {add}(%s, %s))", *texts) == expected
    assert platform.one(
        "SELECT equitie_private.sum_buckets(%s::jsonb[])", [*texts, None]
    ) == expected  # fmt: skip


def test_system_metrics_are_appended(platform: Platform) -> None:
    metric = {"metric_name": "pool.size", "metric_value": 5, "metric_unit": "connections"}
    assert call(platform, "record_system_metrics", [metric, {**metric, "timestamp": "2026-01-01T00:00:00Z"}]) == 2
    assert (
        platform.rows('SELECT metric_name, metric_value, "timestamp" IS NOT NULL FROM system_metrics')
        == [("pool.size", 5.0, True)] * 2
    )


def alert(severity: str, subject: str | None = "f", **more: Any) -> dict[str, Any]:
    return {
        "alert_type": "SLOW_QUERY",
        "severity": severity,
        "rule": "slow",
        "subject": subject,
        "message": "m",
        **more,
    }


def test_an_open_alert_rises_and_is_not_repeated(platform: Platform) -> None:
    assert call(platform, "raise_alerts", [alert("MEDIUM"), alert("LOW"), alert("MEDIUM", None)]) == 2
    assert call(platform, "raise_alerts", [alert("CRITICAL", details={"p99": 5})]) == 0
    assert call(platform, "raise_alerts", [alert("HIGH")]) == 0
    assert platform.rows("SELECT subject, severity, occurrences FROM performance_alerts ORDER BY subject") == [
        ("", "MEDIUM", 1),
        ("f", "CRITICAL", 4),
    ]

    with platform.acting(None) as conn:
        conn.execute("UPDATE performance_alerts SET resolved_at = now() WHERE subject = 'f'")
    assert call(platform, "raise_alerts", [alert("LOW")]) == 1
    assert platform.one("SELECT count(*) FROM performance_alerts") == 3
