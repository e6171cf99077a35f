"""A server restarts under fifty idle connections; then fifty threads want to read at once.

Every thread calls until it is served. Counted are the calls that failed, and the time until all threads are served,
from the moment the server takes connections again. A pool that keeps its dead connections fails a call for each of
them; one that checks them asks the server, or sleeps, for each.

Run it: ``python benchmarks/restart_storm.py [--rounds N]``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import psycopg_pool
import sqlalchemy

import plots
from equitie_data import Database, Settings
from equitie_data.embedded import EmbeddedServer
from equitie_data.provision import DATABASE, provision
from measuring import print_aim, save

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECTIONS = 50
GIVE_UP = 60.0  # seconds
OURS = "execute_read"
PLAIN = "psycopg_pool"
CHECKED = "psycopg_pool, check=check_connection"
PRE_PING = "SQLAlchemy, pool_pre_ping"


class Storm(NamedTuple):
    """What one contestant went through.

    Attributes:
        failed: Calls that raised.
        seconds: Until every thread was served.
    """

    failed: int
    seconds: float


def everybody_at_once(call: Callable[[], Any]) -> Storm:
    """Let each of fifty threads call until it is served."""
    failures = [0] * CONNECTIONS
    done = [0.0] * CONNECTIONS
    ready = threading.Barrier(CONNECTIONS + 1)

    def work(number: int) -> None:
        ready.wait()
        while not done[number]:
            try:
                call()
            except (psycopg.Error, sqlalchemy.exc.SQLAlchemyError):
                failures[number] += 1
                if time.perf_counter() - started > GIVE_UP:
                    return
            else:
                done[number] = time.perf_counter()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    ready.wait()
    for thread in threads:
        thread.join()
    return Storm(sum(failures), (max(done) if all(done) else started + GIVE_UP) - started)


def fill(hold: Callable[[threading.Barrier], Any]) -> None:
    """Have all fifty connections made, by holding them at the same time."""
    together = threading.Barrier(CONNECTIONS)
    threads = [threading.Thread(target=hold, args=(together,)) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def with_library(stack: contextlib.ExitStack, dsn: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return a call, and what holds a connection until all are held."""
    settings = Settings(
        dsn=dsn,
        default_actor="service",
        service_role=None,
        min_size=CONNECTIONS,
        max_size=CONNECTIONS,
        enable_performance_monitoring=False,
        enable_audit_logging=False,
    )
    database = stack.enter_context(Database(settings))

    def hold(together: threading.Barrier) -> None:
        def operation(conn: psycopg.Connection[Any]) -> None:
            conn.execute("SELECT 1")
            together.wait()

        database.execute_read(operation)

    return lambda: database.execute_read("SELECT 1"), hold


def with_psycopg(
    stack: contextlib.ExitStack, dsn: str, *, check: Any = None
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """As `with_library`, for psycopg's pool."""
    pool = stack.enter_context(
        psycopg_pool.ConnectionPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, check=check, timeout=30, open=True)
    )

    def call() -> Any:
        with pool.connection() as conn:
            return conn.execute("SELECT 1").fetchall()

    def hold(together: threading.Barrier) -> None:
        with pool.connection() as conn:
            conn.execute("SELECT 1")
            together.wait()

    return call, hold


def with_sqlalchemy(stack: contextlib.ExitStack, dsn: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """As `with_library`, for SQLAlchemy's pool."""
    url = sqlalchemy.make_url(dsn).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, pool_size=CONNECTIONS, max_overflow=0, pool_timeout=30, pool_pre_ping=True)
    stack.callback(engine.dispose)
    text = sqlalchemy.text("SELECT 1")

    def call() -> Any:
        with engine.connect() as conn:
            return conn.execute(text).fetchall()

    def hold(together: threading.Barrier) -> None:
        with engine.connect() as conn:
            conn.execute(text)
            together.wait()

    return call, hold


CONTESTANTS: dict[str, Callable[[contextlib.ExitStack, str], tuple[Callable[[], Any], Callable[[Any], Any]]]] = {
    OURS: with_library,
    PLAIN: with_psycopg,
    CHECKED: lambda stack, dsn: with_psycopg(stack, dsn, check=psycopg_pool.ConnectionPool.check_connection),
    PRE_PING: with_sqlalchemy,
}


def idle_connections(dsn: str) -> int:
    """Count the database's other sessions."""
    with psycopg.connect(dsn, autocommit=True) as owner:
        row = owner.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
    assert row is not None
    return int(row[0])


def main() -> None:
    """Restart the server once for each contestant, in several rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # a line for every connection that died
    storms: dict[str, list[Storm]] = {name: [] for name in CONTESTANTS}
    names = list(CONTESTANTS)
    with EmbeddedServer(settings={"max_connections": "200"}) as server:
        provision(server)
        dsn = server.dsn(DATABASE)
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                with contextlib.ExitStack() as stack:
                    call, hold = CONTESTANTS[name](stack, dsn)
                    fill(hold)
                    assert idle_connections(dsn) >= CONNECTIONS, f"{name} has not opened its connections"
                    server.restart()
                    storms[name].append(everybody_at_once(call))
    print(f"\n{CONNECTIONS} idle connections, server restarted, {CONNECTIONS} threads call until served")
    print(f"  {'':<44}{'failed calls':>14}{'seconds':>10}")
    for name, mine in storms.items():
        failed, seconds = (statistics.median(column) for column in zip(*mine, strict=True))
        print(f"  {name:<44}{failed:>14.0f}{seconds:>10.3f}")
    print_aim("failed calls, the worst round", max(storm.failed for storm in storms[OURS]), 0)
    for peer in names[1:]:
        pairs = zip(storms[OURS], storms[peer], strict=True)
        measured = statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)
        print_aim(f"time until all are served / {peer}", measured, 1.0)
    save("restart_storm", {name: [storm._asdict() for storm in mine] for name, mine in storms.items()})
    seconds_of = {name: [storm.seconds for storm in mine] for name, mine in storms.items()}
    plots.bars("restart_storm_seconds", "Restart: until all are served", "seconds", seconds_of)
    failed_of = {name: [float(storm.failed) for storm in mine] for name, mine in storms.items()}
    plots.bars("restart_storm_failures", "Restart: failed calls", "calls", failed_of)


if __name__ == "__main__":
    main()
