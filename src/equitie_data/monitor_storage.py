"""What the monitor writes to `query_stats`, `query_metrics`, `system_metrics` and `performance_alerts`."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
from psycopg.types.json import Jsonb

if TYPE_CHECKING:
    import psycopg

__all__ = ["AlertChange", "Measurements"]

AlertChange: TypeAlias = "tuple[Literal['raise', 'resolve'], dict[str, Any]]"

_ROWS_AT_ONCE = 500  # statistics of so many statements are about 300 kB of JSON

_STATEMENTS = "SELECT equitie_private.record_query_stats(%s)"
_METRICS = "SELECT equitie_private.record_system_metrics(%s)"
_RAISE = "SELECT equitie_private.raise_alerts(%s)"
# Only what was open by then: another process may have found the same trouble again since.
_RESOLVE = """
UPDATE public.performance_alerts AS p
SET resolved_at = e.resolved_at
FROM pg_catalog.jsonb_to_recordset(%s) AS e (rule text, subject text, resolved_at timestamptz)
WHERE p.rule = e.rule
  AND p.subject = e.subject
  AND p.resolved_at IS NULL
  AND p.last_raised_at <= e.resolved_at
"""
_SAMPLES = """
INSERT INTO public.query_metrics (
  query_text, execution_time, rows_returned, "timestamp", user_id, api_endpoint, cache_hit, error
)
SELECT e.query_text, e.execution_time, e.rows_returned, e."timestamp", e.user_id, e.api_endpoint, false, e.error
FROM pg_catalog.jsonb_to_recordset(%s) AS e (
  query_text text, execution_time double precision, rows_returned bigint, "timestamp" timestamptz, user_id uuid,
  api_endpoint text, error text
)
"""


@attrs.frozen(kw_only=True)
class Measurements:
    """What one flush writes; each entry is keyed like the columns of its table.

    Attributes:
        statements: Minute counts for `query_stats`.
        samples: Single slow or failed statements for `query_metrics`.
        metrics: For `system_metrics`.
        alerts: Alerts raised and resolved, in the order it happened.
    """

    statements: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    alerts: list[AlertChange]

    def __bool__(self) -> bool:
        return bool(self.statements or self.samples or self.metrics or self.alerts)

    def store(self, connection: psycopg.Connection[Any]) -> None:
        """Write everything within the connection's transaction, as the service."""
        for start in range(0, len(self.statements), _ROWS_AT_ONCE):
            connection.execute(_STATEMENTS, [Jsonb(self.statements[start : start + _ROWS_AT_ONCE])])
        if self.metrics:
            connection.execute(_METRICS, [Jsonb(self.metrics)])
        if self.samples:
            connection.execute(_SAMPLES, [Jsonb(self.samples)])
        for change, group in groupby(self.alerts, key=lambda alert: alert[0]):
            connection.execute(_RAISE if change == "raise" else _RESOLVE, [Jsonb([entry for _, entry in group])])
