"""The pool's statements as OpenTelemetry spans and durations; needs the extra ``otel``.

Names and attributes are those of the stable semantic conventions for database client calls. A span covers what
instrumentation by cursor patching misses: COPY, streams, server-side cursors and statements in a pipeline, each with
its own duration, its error and its SQLSTATE.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from equitie_data.fingerprint import normalise
from equitie_data.hooks import StatementEnded
from equitie_data.redaction import DEFAULT, Redaction, on_one_line

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter
    from opentelemetry.trace import Tracer

__all__ = ["OpenTelemetryHook"]

_normal_form = lru_cache(maxsize=5_000)(normalise)
_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


class OpenTelemetryHook:
    """Records a span and a duration for every statement.

    Args:
        tracer: Where spans go; the global provider's when left out.
        meter: Where durations go; the global provider's when left out.
        query_text: Whether spans hold the statement, without its values.
        redaction: What must not be written down.
    """

    event_types = (StatementEnded,)

    def __init__(
        self,
        tracer: Tracer | None = None,
        meter: Meter | None = None,
        *,
        query_text: bool = True,
        redaction: Redaction = DEFAULT,
    ) -> None:
        self._tracer = trace.get_tracer("equitie_data") if tracer is None else tracer
        self._query_text = query_text
        self._redaction = redaction
        self._durations = (metrics.get_meter("equitie_data") if meter is None else meter).create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )

    def on_event(self, event: Any, /) -> None:
        """Record one statement."""
        ended = time.time_ns()
        normal = _normal_form(event.sql)
        operation = normal.split(None, 1)[0].upper() if normal.strip() else ""
        host, _, port = event.node.rpartition(":")
        shared: dict[str, Any] = {"db.system.name": "postgresql", "db.operation.name": operation}
        if host and port.isdigit():
            shared |= {"server.address": host, "server.port": int(port)}
        else:
            shared["server.address"] = event.node
        if event.error is not None:
            shared["error.type"] = event.sqlstate or event.error
        if event.sqlstate is not None:
            shared["db.response.status_code"] = event.sqlstate
        self._durations.record(event.seconds, shared)
        own = {"db.query.text": normal} if self._query_text else {}
        if event.rows is not None and event.kind == "read":
            own["db.response.returned_rows"] = event.rows
        span = self._tracer.start_span(
            f"{operation} {self._named(event.name)}" if event.name else operation or "statement",
            kind=SpanKind.CLIENT,
            attributes={**shared, **own},
            start_time=ended - round(event.seconds * 1e9),
        )
        if event.error is not None:
            span.set_status(Status(StatusCode.ERROR, event.error))
        span.end(end_time=ended)

    def _named(self, name: str) -> str:
        return on_one_line(self._redaction.text(name))
