"""What the wrapper itself costs a statement: `execute_read` where nobody's identity is applied, against psycopg.

Everybody reads the same row by its key on the same server, in autocommit mode, so that each call is one trip and the
rest is the client's own time. With identity the work is another one: see ``read_path``.

Whether the two processes of a connection run on one processor or on two costs or saves several times what is measured
here. So all of it is kept on one processor where the system allows that, and everything is opened anew several times.

Run it: ``python benchmarks/overhead.py [--sets N]``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from typing import TYPE_CHECKING, Any

import psycopg_pool
import sqlalchemy

import plots
from equitie_data import Database, Settings, as_service
from measuring import interleave, median_ratio, print_aim, print_table, save

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
QUERY = "SELECT company_id, company_name FROM public.companies_clean WHERE company_id = %s"
BARE = "psycopg getconn, execute, putconn"
POOL = "psycopg pool.connection(), autocommit"
DEFAULT = "psycopg pool.connection(), as it comes"
SQLALCHEMY = "SQLAlchemy Core 2, autocommit"
STATEMENT = "execute_read, SQL"
WATCHED = "execute_read, SQL, monitoring on"
CALLABLE = "execute_read, callable (BEGIN and COMMIT)"


def contestants(stack: contextlib.ExitStack, dsn: str) -> dict[str, Callable[[], Any]]:
    """Return the contestants, each a callable that returns the row."""

    def opened(*, autocommit: bool) -> psycopg_pool.ConnectionPool[psycopg.Connection[Any]]:
        kwargs = {"autocommit": autocommit}
        return stack.enter_context(psycopg_pool.ConnectionPool(dsn, min_size=1, max_size=5, kwargs=kwargs, open=True))

    def database(*, monitoring: bool) -> Database:
        settings = Settings(
            dsn=dsn, default_actor="service", service_role=None, enable_performance_monitoring=monitoring
        )
        return stack.enter_context(Database(settings))

    bare_pool, pool, default_pool = opened(autocommit=True), opened(autocommit=True), opened(autocommit=False)
    quiet, watched = database(monitoring=False), database(monitoring=True)
    url = sqlalchemy.make_url(dsn).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", pool_size=5)
    stack.callback(engine.dispose)
    text = sqlalchemy.text(QUERY.replace("%s", ":company"))

    def getconn() -> Any:
        conn = bare_pool.getconn()
        try:
            return conn.execute(QUERY, [1]).fetchall()
        finally:
            bare_pool.putconn(conn)

    def connection() -> Any:
        with pool.connection() as conn:
            return conn.execute(QUERY, [1]).fetchall()

    def as_it_comes() -> Any:
        with default_pool.connection() as conn:
            return conn.execute(QUERY, [1]).fetchall()

    def core() -> Any:
        with engine.connect() as conn:
            return conn.execute(text, {"company": 1}).fetchall()

    def statement() -> Any:
        return quiet.execute_read(QUERY, [1])

    def watched_statement() -> Any:
        return watched.execute_read(QUERY, [1])

    def operation(conn: psycopg.Connection[Any]) -> Any:
        return conn.execute(QUERY, [1]).fetchall()

    def in_callable() -> Any:
        return quiet.execute_read(operation)

    return {
        BARE: getconn,
        POOL: connection,
        DEFAULT: as_it_comes,
        SQLALCHEMY: core,
        STATEMENT: statement,
        WATCHED: watched_statement,
        CALLABLE: in_callable,
    }


def one_processor(*, wanted: bool) -> None:
    """Keep this thread, and the threads and servers it starts from now on, on one processor, or let it go."""
    if PROCESSORS:
        os.sched_setaffinity(0, {max(PROCESSORS)} if wanted else PROCESSORS)


def main() -> None:
    """Measure on loopback, where a trip is cheapest and the client's time counts most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=10)
    sets = parser.parse_args().sets
    one_processor(wanted=True)
    figures: dict[str, list[float]] = {}
    with Database.embedded() as embedded:
        with as_service("benchmark"):
            embedded.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('Fjord Energy')")
        assert embedded.owner_dsn is not None
        for _ in range(sets):
            with contextlib.ExitStack() as stack:
                ways = contestants(stack, embedded.owner_dsn)
                answers = {name: list(map(tuple, way())) for name, way in ways.items()}
                assert set(map(str, answers.values())) == {"[(1, 'Fjord Energy')]"}, f"they disagree: {answers}"
                for name, values in interleave(ways, rounds=7, calls=100).items():
                    figures.setdefault(name, []).extend(values)
    print_table("one row by its key, loopback", figures, BARE)
    print_aim("statement / pool.connection() as it comes", median_ratio(figures, STATEMENT, DEFAULT), 0.85)
    print(f"        statement / pool.connection() in autocommit mode: {median_ratio(figures, STATEMENT, POOL):.2f}")
    over = statistics.median(ours - bare for ours, bare in zip(figures[STATEMENT], figures[BARE], strict=True))
    print_aim("microseconds over getconn, execute, putconn", over, 10.0)
    watching = statistics.median(w - s for w, s in zip(figures[WATCHED], figures[STATEMENT], strict=True))
    print(f"        monitoring adds {watching:.1f} us")
    save("overhead", {"loopback_us": figures})
    plots.bars("overhead", "One row by its key, loopback", "microseconds a call", figures)


if __name__ == "__main__":
    main()
