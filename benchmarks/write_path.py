"""What an identity-scoped write of one row costs, against the ways to do the same without the library.

Every contestant inserts a transaction as an administrator, under row-level security and audited by the same triggers:
BEGIN, the role and the claims in one SELECT, INSERT ... RETURNING, COMMIT. The library also has the server look up the
role, and takes down what a lost COMMIT could be resolved by; the others do neither.

The server does not flush (``fsync=off``), so that what is compared is not drowned in the disk's time. On loopback all
of it is kept on one processor where the system allows that (see ``overhead``), and everybody's connections are new:
those that have imported a file are slower at everything.

Run it: ``python benchmarks/write_path.py [--rounds N]``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import psycopg_pool
import sqlalchemy

import plots
from equitie_data import Database, Settings, acting_as, as_service
from equitie_data.csv_import import import_csv
from equitie_data.sample import csv_stream
from equitie_data.tcp_proxy import TcpProxy
from measuring import interleave, median_ratio, print_aim, print_table, save
from overhead import one_processor

if TYPE_CHECKING:
    from collections.abc import Callable

INSERT = (
    "INSERT INTO public.transactions_clean (deal_id, investor_id, transaction_date, amount) "
    "VALUES (1, 1, current_date, %s) RETURNING transaction_id"
)
NAMED_INSERT = INSERT.replace("%s", ":amount")
IDENTITY = (
    "SELECT set_config('role', 'equitie_staff', true), set_config('request.jwt.claims', {claims}, true), "
    "set_config('equitie.context', {context}, true)"
)
POOL = "psycopg pool, the same statements"
SQLALCHEMY = "SQLAlchemy Core 2, the same statements"
STATEMENT = "execute_write, SQL"
CALLABLE = "execute_write, callable"
KEYED = "execute_write, callable, idempotency key"
WATCHED = "execute_write, SQL, monitoring on"


def contestants(stack: contextlib.ExitStack, app_dsn: str, user: str) -> dict[str, Callable[[], Any]]:
    """Return the contestants, each a callable that inserts a row and returns its key."""
    # The others measure nothing, so neither does the library but for one row.
    watched = stack.enter_context(Database(app_dsn))
    database = stack.enter_context(Database(Settings(dsn=app_dsn, enable_performance_monitoring=False)))
    claims = json.dumps({"sub": user, "role": "authenticated"})
    context = json.dumps({"actor": "user", "user_id": user})
    identity = IDENTITY.format(claims="%s", context="%s")
    pool = stack.enter_context(psycopg_pool.ConnectionPool(app_dsn, min_size=1, max_size=5, open=True))
    url = sqlalchemy.URL.create("postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, pool_size=5, creator=lambda: psycopg.connect(app_dsn))
    stack.callback(engine.dispose)
    insert, named_identity = (
        sqlalchemy.text(NAMED_INSERT),
        sqlalchemy.text(IDENTITY.format(claims=":claims", context=":context")),
    )
    request = uuid4()
    keys = (f"{request} {number}" for number in itertools.count())

    def plain() -> Any:
        with pool.connection() as conn:  # sends BEGIN and COMMIT
            conn.execute(identity, [claims, context])
            return conn.execute(INSERT, [100]).fetchall()

    def core() -> Any:
        with engine.begin() as conn:
            conn.execute(named_identity, {"claims": claims, "context": context})
            return conn.execute(insert, {"amount": 100}).fetchall()

    def statement() -> Any:
        return database.execute_write(INSERT, [100])

    def watched_statement() -> Any:
        return watched.execute_write(INSERT, [100])

    def operation(conn: psycopg.Connection[Any]) -> Any:
        return conn.execute(INSERT, [100]).fetchall()

    def in_callable() -> Any:
        return database.execute_write(operation)

    def keyed() -> Any:
        return database.execute_write(operation, idempotency_key=next(keys))

    return {
        POOL: plain,
        SQLALCHEMY: core,
        STATEMENT: statement,
        WATCHED: watched_statement,
        CALLABLE: in_callable,
        KEYED: keyed,
    }


def prepare(database: Database) -> str:
    """Load some deals and investors and return an administrator."""
    user = str(uuid4())
    with as_service("benchmark"):
        import_csv(database, csv_stream(2_000))
        database.execute_write(
            "INSERT INTO public.user_profiles (user_id, email, role) VALUES (%s, %s, 'admin')",
            [user, f"{user}@bench.example"],
        )
    return user


def check(owner_dsn: str, user: str, ways: dict[str, Callable[[], Any]]) -> None:
    """Make sure that every contestant writes one row, audited as the same person's."""
    query = (
        "SELECT count(*), (SELECT count(*) FROM public.audit_logs WHERE user_id = %s) "
        "FROM public.transactions_clean WHERE amount = 100"
    )
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        for name, way in ways.items():
            before = owner.execute(query, [user]).fetchone()
            assert len(way()) == 1
            after = owner.execute(query, [user]).fetchone()
            assert before is not None
            assert after == (before[0] + 1, before[1] + 1), f"{name} does something else"


def trips_of(proxy: TcpProxy, way: Callable[[], Any]) -> float:
    """Return the round trips of a call; the median, since health probes take the same way now and then."""
    counts = []
    for _ in range(11):
        before = proxy.round_trips
        way()
        counts.append(proxy.round_trips - before)
    return statistics.median(counts)


def main() -> None:
    """Measure on loopback, then over a link with a delay of 1 ms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    one_processor(wanted=True)
    with contextlib.ExitStack() as outer:
        embedded = outer.enter_context(Database.embedded(max_size=5))
        owner_dsn, app_dsn = embedded.owner_dsn, embedded.settings.dsn
        assert owner_dsn is not None
        user = prepare(embedded)
        with contextlib.ExitStack() as stack, acting_as(user):
            ways = contestants(stack, app_dsn, user)
            check(owner_dsn, user, ways)
            loopback = interleave(ways, rounds=rounds, calls=20)
        print_table("loopback", loopback, POOL)
        print_aim("statement / psycopg pool", median_ratio(loopback, STATEMENT, POOL), 1.10)
        print_aim("callable / psycopg pool", median_ratio(loopback, CALLABLE, POOL), 1.10)
        print_aim("statement / SQLAlchemy Core", median_ratio(loopback, STATEMENT, SQLALCHEMY), 0.80)

        one_processor(wanted=False)
        proxy = outer.enter_context(TcpProxy(app_dsn, delay=0.0005))
        with contextlib.ExitStack() as stack, acting_as(user):
            ways = contestants(stack, proxy.dsn_for(app_dsn), user)
            check(owner_dsn, user, ways)
            link = interleave(ways, rounds=max(rounds // 4, 5), calls=5)
            trips = {name: trips_of(proxy, way) for name, way in ways.items()}
        print_table("through a proxy with 1 ms of delay", link, POOL)
        print("  round trips: " + ", ".join(f"{name} {count:g}" for name, count in trips.items()))
        print_aim("statement / psycopg pool", median_ratio(link, STATEMENT, POOL), 0.40)
        print_aim("callable / psycopg pool", median_ratio(link, CALLABLE, POOL), 0.60)
        save("write_path", {"loopback_us": loopback, "link_us": link, "round_trips": trips})
    plots.bars("write_path_loopback", "A write of one row, loopback", "microseconds a call", loopback)
    plots.bars("write_path_link", "A write of one row, 1 ms of delay", "microseconds a call", link)


if __name__ == "__main__":
    main()
