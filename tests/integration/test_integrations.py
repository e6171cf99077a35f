"""Events as log events and as spans: every kind of statement, with its duration and error, never with a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
import structlog

from equitie_data import Database, acting_as, as_service
from equitie_data.hooks import Leaked, NodeEjected, Retried

if TYPE_CHECKING:
    from psycopg import Connection

otel = pytest.importorskip("opentelemetry.sdk.trace", reason="pip install 'equitie-data[otel]' opentelemetry-sdk")

ADD = "INSERT INTO public.companies_clean (company_name) VALUES (%s)"


def test_events_become_log_events_without_values(app_dsn: str) -> None:
    from equitie_data.integrations.structlog import StructlogHook

    user, secret = uuid4(), f"secret-{uuid4()}"
    with structlog.testing.capture_logs() as logs:
        hook = StructlogHook()
        with Database(app_dsn, hooks=[hook]) as database:
            with acting_as(user):
                database.execute_read("SELECT %s::text", [secret], name="look")
            with as_service("test"), pytest.raises(psycopg.errors.DivisionByZero):
                database.execute_write("SELECT 1 / 0")
        hook.on_event(NodeEjected(node="a", reason="r"))
        hook.on_event(Leaked(node="a", name=None, thread="1", seconds=31.0, site="x.py:1"))
        hook.on_event(Retried(name=None, kind="read", node="a", attempt=1, wait_seconds=0.1, sqlstate=None, reason="r"))
        hook.on_event(object())
    structlog.reset_defaults()
    ours = [log for log in logs if log["event"] == "equitie_data.statement_ended" and log["name"] == "look"]
    assert [(log["log_level"], log["actor"], log["rows"]) for log in ours] == [("debug", str(user), 1)]
    failed = [log for log in logs if log.get("sqlstate") == "22012"]
    assert {log["event"] for log in failed} == {"equitie_data.statement_ended", "equitie_data.operation_ended"}
    assert {log["actor"] for log in failed} == {"service"}
    assert [log["log_level"] for log in logs[-3:]] == ["warning"] * 3
    assert secret not in repr(logs)


def test_every_kind_of_statement_becomes_a_span_with_its_own_duration(app_dsn: str) -> None:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import StatusCode

    from equitie_data.integrations.opentelemetry import OpenTelemetryHook

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    hook = OpenTelemetryHook(tracers.get_tracer("test"), meters.get_meter("test"))
    secret = f"secret-{uuid4()}"

    def operation(conn: Connection[Any]) -> None:
        conn.execute("SELECT pg_sleep(0.05), %s::text", [secret])
        with conn.cursor().copy("COPY public.companies_clean (company_name) FROM STDIN") as copy:
            copy.write_row((secret,))
        list(conn.cursor().stream("SELECT generate_series(1, 3)"))
        with conn.cursor(name="c") as cursor:
            cursor.execute("SELECT 1").fetchall()

    with Database(app_dsn) as database, as_service("test"):
        database.hooks.remove(database.monitor)
        database.hooks.add(hook)
        database.execute_write(operation, name="mixed")
        with pytest.raises(psycopg.errors.UniqueViolation):
            database.execute_write(ADD, [secret])
        database.hooks.remove(hook)
        port = int(database.pool.primary.name.rsplit(":", 1)[1])
    found = spans.get_finished_spans()
    assert [span.name for span in found] == ["SELECT mixed", "COPY mixed", "SELECT mixed", "DECLARE mixed", "INSERT"]
    assert found[0].end_time - found[0].start_time >= 50_000_000
    for span in found:
        assert span.attributes["db.system.name"] == "postgresql"
        assert span.attributes["server.port"] == port
    failed = found[-1]
    assert failed.attributes["db.response.status_code"] == failed.attributes["error.type"] == "23505"
    assert failed.status.status_code is StatusCode.ERROR
    assert secret not in repr([(span.name, dict(span.attributes or {})) for span in found])
    (metric,) = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.unit) == ("db.client.operation.duration", "s")
    assert sum(point.count for point in metric.data.data_points) == 5
