"""What a `PerformanceMonitor` counts about itself."""

from __future__ import annotations

import attrs

__all__ = ["MonitorStats"]


@attrs.frozen(kw_only=True)
class MonitorStats:
    """What a `PerformanceMonitor` did since it was made.

    Attributes:
        tracked: Calls counted.
        flushed: Calls whose counts are stored.
        failed_flushes: Attempts to store that failed; what they would have stored was kept.
        dropped: Calls, metrics, alerts and samples that will not be stored, for lack of room or of an answer.
        overflowed: Calls counted under ``other``, because there were too many different statements.
        samples_skipped: Slow or failed statements not stored singly, beyond the limit of one flush; they are counted.
        alerts_fired: Alerts fired.
        alerts_repeated: Alerts not fired again because they were open.
        sink_errors: Alerts a sink raised on, or that found the sinks' queue full.
    """

    tracked: int
    flushed: int
    failed_flushes: int
    dropped: int
    overflowed: int
    samples_skipped: int
    alerts_fired: int
    alerts_repeated: int
    sink_errors: int
