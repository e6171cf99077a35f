"""Many threads on ten connections: throughput, and how long a call takes at the median and at its worst.

Two groups read the same row by its key. One applies nobody's identity, as an application without row-level security
has it. The other acts as somebody in every transaction: BEGIN, role and claims, the query, the end.

Run it: ``python benchmarks/pool_contention.py [--rounds N] [--seconds S]``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import psycopg_pool
import sqlalchemy

import plots
from equitie_data import Database, Settings, acting_as, as_service
from measuring import print_aim, save

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS = 10
THREADS = (1, 10, 50, 200)
QUERY = "SELECT company_id, company_name FROM public.companies_clean WHERE company_id = %s"
NAMED_QUERY = QUERY.replace("%s", ":company")
IDENTITY = "SELECT set_config('role', 'equitie_staff', true), set_config('request.jwt.claims', {claims}, true)"
GROUPS = ("no identity", "identity")
OURS = "execute_read"
PSYCOPG = "psycopg pool.connection()"
SQLALCHEMY = "SQLAlchemy QueuePool"


class Run(NamedTuple):
    """One contestant's turn.

    Attributes:
        threads: How many called.
        per_second: Calls a second, all threads together.
        p50: The median call, in microseconds.
        p99: One call in a hundred took longer, in microseconds.
    """

    threads: int
    per_second: float
    p50: float
    p99: float


def run(call: Callable[[], Any], threads: int, seconds: float) -> Run:
    """Let many threads call for so many seconds."""
    durations: list[list[float]] = [[] for _ in range(threads)]
    ready, stop = threading.Barrier(threads + 1), threading.Event()

    def work(mine: list[float]) -> None:
        ready.wait()
        while not stop.is_set():
            started = time.perf_counter()
            call()
            mine.append(time.perf_counter() - started)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in durations]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - started
    ordered = sorted(duration for mine in durations for duration in mine)
    assert len(ordered) >= threads
    p50, p99 = (ordered[int(len(ordered) * share)] * 1e6 for share in (0.5, 0.99))
    return Run(threads, len(ordered) / elapsed, p50, p99)


def contestants(
    stack: contextlib.ExitStack, owner_dsn: str, app_dsn: str, user: str
) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the contestants of each group, each a callable that returns the row."""
    claims = json.dumps({"sub": user, "role": "authenticated"})
    identity, named_identity = IDENTITY.format(claims="%s"), sqlalchemy.text(IDENTITY.format(claims=":claims"))
    text = sqlalchemy.text(NAMED_QUERY)

    def database(dsn: str, **settings: Any) -> Database:
        settings |= {"min_size": CONNECTIONS, "max_size": CONNECTIONS}
        settings |= {"enable_performance_monitoring": False, "enable_audit_logging": False}
        return stack.enter_context(Database(Settings(dsn=dsn, **settings)))

    def pool(dsn: str) -> psycopg_pool.ConnectionPool[Any]:
        made: psycopg_pool.ConnectionPool[Any] = psycopg_pool.ConnectionPool(
            dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, timeout=30, open=True
        )
        return stack.enter_context(made)

    def engine(dsn: str) -> sqlalchemy.Engine:
        url = sqlalchemy.make_url(dsn).set(drivername="postgresql+psycopg")
        made = sqlalchemy.create_engine(url, pool_size=CONNECTIONS, max_overflow=0, pool_timeout=30)
        stack.callback(made.dispose)
        return made

    bare_database, bare_pool, bare_engine = (
        database(owner_dsn, default_actor="service", service_role=None),
        pool(owner_dsn),
        engine(owner_dsn),
    )
    app_database, app_pool, app_engine = database(app_dsn), pool(app_dsn), engine(app_dsn)

    def bare_ours() -> Any:
        return bare_database.execute_read(QUERY, [1])

    def bare_psycopg() -> Any:
        with bare_pool.connection() as conn:
            return conn.execute(QUERY, [1]).fetchall()

    def bare_sqlalchemy() -> Any:
        with bare_engine.connect() as conn:
            return conn.execute(text, {"company": 1}).fetchall()

    def ours() -> Any:
        with acting_as(user):
            return app_database.execute_read(QUERY, [1])

    def psycopg() -> Any:
        with app_pool.connection() as conn:  # sends BEGIN and COMMIT
            conn.execute(identity, [claims])
            return conn.execute(QUERY, [1]).fetchall()

    def core() -> Any:
        with app_engine.begin() as conn:
            conn.execute(named_identity, {"claims": claims})
            return conn.execute(text, {"company": 1}).fetchall()

    return {
        GROUPS[0]: {OURS: bare_ours, PSYCOPG: bare_psycopg, SQLALCHEMY: bare_sqlalchemy},
        GROUPS[1]: {OURS: ours, PSYCOPG: psycopg, SQLALCHEMY: core},
    }


def prepare(database: Database) -> str:
    """Add the row, and return somebody who may read it."""
    user = str(uuid4())
    with as_service("benchmark"):
        database.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('Fjord Energy')")
        database.execute_write(
            "INSERT INTO public.user_profiles (user_id, email, role) VALUES (%s, %s, 'analyst')",
            [user, f"{user}@bench.example"],
        )
    return user


def ratio(runs: dict[str, list[Run]], threads: int, attribute: str) -> float:
    """Return the median over rounds of our figure by psycopg's."""
    ours, theirs = (
        [float(getattr(each, attribute)) for each in runs[name] if each.threads == threads] for name in (OURS, PSYCOPG)
    )
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def report(group: str, runs: dict[str, list[Run]]) -> None:
    """Print medians over rounds, aims, and draw them."""
    print(f"\n{group}, {CONNECTIONS} connections")
    print(f"  {'':<28}{'threads':>8}{'calls/s':>10}{'p50 us':>10}{'p99 us':>10}")
    middles: dict[str, dict[str, dict[int, float]]] = {"per_second": {}, "p99": {}}
    for threads in THREADS:
        for name, all_runs in runs.items():
            mine = [each for each in all_runs if each.threads == threads]
            per_second, p50, p99 = (statistics.median(column) for column in list(zip(*mine, strict=True))[1:])
            print(f"  {name:<28}{threads:>8}{per_second:>10.0f}{p50:>10.0f}{p99:>10.0f}")
            middles["per_second"].setdefault(name, {})[threads] = per_second
            middles["p99"].setdefault(name, {})[threads] = p99
    for threads in THREADS:
        print_aim(f"{threads} threads: time per call / psycopg", 1 / ratio(runs, threads, "per_second"), 1.0)
    for threads in THREADS[1:]:
        print_aim(f"{threads} threads: p99 / psycopg", ratio(runs, threads, "p99"), 1.0)
    name = f"pool_contention_{group.replace(' ', '_')}"
    title = f"{CONNECTIONS} connections, {group}"
    plots.lines(f"{name}_throughput", title, "threads", "calls a second", middles["per_second"])
    plots.lines(f"{name}_p99", title, "threads", "p99, microseconds", middles["p99"], log=True)


def main() -> None:
    """Give each contestant its turn at each number of threads, several times over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7)
    arguments = parser.parse_args()
    results: dict[str, dict[str, list[Run]]] = {}
    with contextlib.ExitStack() as stack:
        embedded = stack.enter_context(Database.embedded())
        user = prepare(embedded)
        assert embedded.owner_dsn is not None
        groups = contestants(stack, embedded.owner_dsn, embedded.settings.dsn, user)
        for group, ways in groups.items():
            for name, way in ways.items():
                assert list(map(tuple, way())) == [(1, "Fjord Energy")], f"{name} reads something else"
            runs: dict[str, list[Run]] = {name: [] for name in ways}
            names = list(ways)
            for number in range(arguments.rounds):
                for threads in THREADS:
                    for name in names[number % len(names) :] + names[: number % len(names)]:
                        runs[name].append(run(ways[name], threads, arguments.seconds))
            report(group, runs)
            results[group] = runs
    fields = Run._fields
    figures = {
        group: {name: [dict(zip(fields, each, strict=True)) for each in all_runs] for name, all_runs in runs.items()}
        for group, runs in results.items()
    }
    save("pool_contention", figures)


if __name__ == "__main__":
    main()
