"""What the performance monitor costs a statement, and what an audit event costs its caller; no database needed.

Prints microseconds a call, the best of several rounds, next to what other ways of measuring a statement cost in the
same run: a Counter in the standard library (the least anybody could do) and, where they are installed, a Prometheus
histogram and an OpenTelemetry span. Exits with 1 if the monitor costs more than the 5 us it is allowed.

Usage: python benchmarks/monitor_overhead.py [--calls N] [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import threading
import time
import tracemalloc
from collections import Counter
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs

from equitie_data.audit import AuditLogger
from equitie_data.context import Actor, acting_as
from equitie_data.fingerprint import Fingerprints, normalise
from equitie_data.hooks import StatementEnded
from equitie_data.latency import LatencySketch
from equitie_data.monitor import PerformanceMonitor

if TYPE_CHECKING:
    from collections.abc import Callable

BUDGET = 5.0  # microseconds a statement, monitoring on
ACTOR = Actor(kind="user", user_id=UUID(int=7))
SQL = [
    f"SELECT t.transaction_id, t.amount, t.c{number} FROM public.transactions_clean AS t"
    " WHERE t.investor_id = %s AND t.transaction_date >= %s AND t.status IN ('pending', 'completed')"
    " ORDER BY t.transaction_date DESC LIMIT 50"
    for number in range(200)
]


def events(**changes: Any) -> list[StatementEnded]:
    """A thousand statements of 200 kinds, between 0.1 and 100 ms."""
    facts: dict[str, Any] = {
        "kind": "read",
        "name": "transactions.recent",
        "node": "db:5432",
        "node_role": "primary",
        "rows": 50,
        "sqlstate": None,
        "error": None,
        "actor": ACTOR,
    }
    # A text of its own for each, as the wire decodes it: its hash is not cached.
    return [
        StatementEnded(
            sql=SQL[number % 200].encode().decode(), seconds=1e-4 * (1 + number * 7919 % 1000), **{**facts, **changes}
        )
        for number in range(1000)
    ]


def best(call: Callable[[Any], object], inputs: list[Any], calls: int, rounds: int) -> float:
    """Microseconds a call, the quickest round."""
    quickest = float("inf")
    gc.disable()
    for _ in range(rounds):
        done = 0
        started = time.perf_counter()
        while done < calls:
            for each in inputs:
                call(each)
            done += len(inputs)
        quickest = min(quickest, (time.perf_counter() - started) / done)
    gc.enable()
    return quickest * 1e6


def under_load(monitor: PerformanceMonitor, threads: int, calls: int) -> float:
    """Wall microseconds a call while many threads share one monitor."""
    inputs = events()

    def work() -> None:
        for _ in range(calls // len(inputs) // threads + 1):
            for event in inputs:
                monitor.on_event(event)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done = (calls // len(inputs) // threads + 1) * len(inputs) * threads
    return (time.perf_counter() - started) / done * 1e6


def memory_of_fingerprints(count: int) -> float:
    """Megabytes a monitor holds after that many different statements."""
    tracemalloc.start()
    monitor = PerformanceMonitor(max_fingerprints=count)
    before = tracemalloc.get_traced_memory()[0]
    [event] = events()[:1]
    for number in range(count):
        monitor.track_query(event.sql.replace("c0", f"c{number}"), 1.0 + number % 100, 1)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held / 1e6


def peers() -> dict[str, Callable[[StatementEnded], object]]:
    """Other ways to measure a statement, as far as they are installed."""
    counter: Counter[str] = Counter()

    def count(event: StatementEnded) -> None:
        counter[event.sql] += 1

    found: dict[str, Callable[[StatementEnded], object]] = {"collections.Counter": count}
    try:
        prometheus: Any = importlib.import_module("prometheus_client")
    except ImportError:
        pass
    else:
        histogram = prometheus.Histogram("statement_seconds", "A statement.", ["kind"], registry=None)
        found["prometheus_client Histogram"] = lambda event: histogram.labels(event.kind).observe(event.seconds)
    try:
        tracing: Any = importlib.import_module("opentelemetry.sdk.trace")
    except ImportError:
        pass
    else:
        tracer = tracing.TracerProvider().get_tracer("benchmark")

        def span(event: StatementEnded) -> None:
            tracer.start_span(event.kind, attributes={"db.query.text": event.sql}).end()

        found["opentelemetry span"] = span
    return found


def measure(calls: int, rounds: int) -> dict[str, float]:
    """Every figure, in microseconds unless its name says otherwise."""
    found: dict[str, float] = {}
    plain = events()
    monitor = PerformanceMonitor(execute_write=lambda *_, **__: None)
    monitor.start()
    found["monitor, a statement"] = best(monitor.on_event, plain, calls, rounds)
    found["monitor, a failed statement"] = best(
        monitor.on_event, events(sqlstate="40001", error="SerializationFailure"), calls, rounds
    )
    slow = [attrs.evolve(event, seconds=2.0) for event in plain]
    found["monitor, a slow statement"] = best(monitor.on_event, slow, calls, rounds)
    found["monitor, 16 threads (wall)"] = min(under_load(monitor, 16, calls) for _ in range(rounds))
    monitor.close()
    for name, call in peers().items():
        found[f"peer: {name}"] = best(call, plain, calls, rounds)
    sketch = LatencySketch()
    found["latency sketch, add"] = best(sketch.add, [event.seconds for event in plain], calls, rounds)
    fingerprints = Fingerprints()
    texts = [event.sql for event in plain]
    found["fingerprint, remembered text"] = best(fingerprints.of, texts, calls, rounds)
    found["fingerprint, new text"] = best(normalise, texts, max(1, calls // 100), rounds)
    found["fingerprint, longest text"] = best(normalise, ["a = 1, " * 585], max(1, calls // 10_000), rounds)

    audit = AuditLogger(execute_write=lambda *_, **__: None, execute_read=lambda *_, **__: None)
    audit.start()
    with acting_as(UUID(int=7)):
        changes = {
            "before": {"amount": "1.00", "status": "pending"},
            "after": {"amount": "2.00", "status": "completed"},
        }
        found["audit, log() of a small change"] = best(
            lambda number: audit.log("UPDATE", "deal", number, changes=changes), list(range(100)), calls // 10, rounds
        )
    audit.close()
    found["monitor, MB for 5,000 kinds of statement"] = memory_of_fingerprints(5000)
    return found


def main() -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.calls, arguments.rounds)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, figure in found.items():
            print(f"{figure:10.2f}  {name}")
    within = found["monitor, a statement"] <= BUDGET
    if not within:
        print(f"the monitor costs more than {BUDGET} us a statement", file=sys.stderr)
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
