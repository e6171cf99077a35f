"""What an identity-scoped indexed read costs, against the ways to do without the library.

Every contestant reads the same rows of one investor. Those marked "no identity" read as the table's owner with an
explicit filter: nobody acts, nothing is protected. All others switch the role and set the claims in the same
transaction, under row-level security.

Two reads are timed, because what the library adds is the same for both and what the server does is not: an investor's
transactions of one month (about nine rows of one partition), and the newest twenty of 400 days (fourteen partitions,
where the query itself is most of the time on either side).

Run it: ``python benchmarks/read_path.py [--rounds N]``.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any
from uuid import uuid4

import psycopg
import psycopg_pool
import sqlalchemy

from equitie_data import Database, acting_as, as_service
from equitie_data.csv_import import import_csv
from equitie_data.sample import csv_stream
from equitie_data.tcp_proxy import TcpProxy
from measuring import interleave, median_ratio, print_aim, print_table, save

ROWS = 100_000
COLUMNS = "SELECT transaction_id, transaction_date, amount FROM public.transactions_clean WHERE investor_id = %s"
NEWEST = f"{COLUMNS} AND transaction_date >= current_date - 400 ORDER BY transaction_date DESC LIMIT 20"
# A month in which many an investor has some nine transactions, and one of those investors.
BUSY_MONTH = """
SELECT t.investor_id, date_trunc('month', t.transaction_date)::date
FROM public.transactions_clean AS t
GROUP BY 1, 2
HAVING count(*) = 9
ORDER BY 2 DESC, 1
LIMIT 1
"""
BARE = "psycopg pool.connection(): no identity"
BARE_AUTOCOMMIT = "psycopg, same connection, autocommit: no identity"
FIVE = "psycopg, five separate statements"
SQLALCHEMY = "SQLAlchemy Core 2, the same SET LOCALs"
STATEMENT = "execute_read, statement form"
CALLABLE = "execute_read, callable form"


def contestants(
    stack: contextlib.ExitStack, database: Database, owner_dsn: str, app_dsn: str, user: str, query: str, investor: int
) -> dict[str, Any]:
    """Return the contestants, each a callable that returns the rows."""
    claims = f'{{"sub": "{user}", "role": "authenticated"}}'
    pool = stack.enter_context(psycopg_pool.ConnectionPool(owner_dsn, min_size=1, max_size=5, open=True))
    single = stack.enter_context(psycopg.connect(owner_dsn, autocommit=True))
    app = stack.enter_context(psycopg_pool.ConnectionPool(app_dsn, min_size=1, max_size=5, open=True))
    url = sqlalchemy.URL.create("postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, pool_size=5, creator=lambda: psycopg.connect(app_dsn))
    stack.callback(engine.dispose)
    text, role, claim = (
        sqlalchemy.text(query.replace("%s", ":investor")),
        sqlalchemy.text("SET LOCAL ROLE authenticated"),
        sqlalchemy.text("SELECT set_config('request.jwt.claims', :claims, true)"),
    )

    def bare() -> Any:
        with pool.connection() as conn:
            return conn.execute(query, [investor]).fetchall()

    def bare_autocommit() -> Any:
        return single.execute(query, [investor]).fetchall()

    def five() -> Any:
        with app.connection() as conn:  # sends BEGIN and COMMIT
            conn.execute("SET LOCAL ROLE authenticated")
            conn.execute("SELECT set_config('request.jwt.claims', %s, true)", [claims])
            return conn.execute(query, [investor]).fetchall()

    def core() -> Any:
        with engine.begin() as conn:
            conn.execute(role)
            conn.execute(claim, {"claims": claims})
            return conn.execute(text, {"investor": investor}).fetchall()

    def statement() -> Any:
        return database.execute_read(query, [investor])

    def operation(conn: psycopg.Connection[Any]) -> Any:
        return conn.execute(query, [investor]).fetchall()

    def in_callable() -> Any:
        return database.execute_read(operation)

    return {
        BARE: bare,
        BARE_AUTOCOMMIT: bare_autocommit,
        FIVE: five,
        SQLALCHEMY: core,
        STATEMENT: statement,
        CALLABLE: in_callable,
    }


def prepare(database: Database, owner_dsn: str) -> tuple[str, int, str]:
    """Load the data and return a user, their investor, and the query of one month."""
    user = str(uuid4())
    with as_service("benchmark"):
        import_csv(database, csv_stream(ROWS))
        investor, month = database.execute_read(BUSY_MONTH)[0]
        database.execute_write(
            "INSERT INTO public.user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, 'investor', %s)",
            [user, f"{user}@bench.example", investor],
        )
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("VACUUM ANALYZE")
    span = f"transaction_date >= '{month}' AND transaction_date < '{month}'::date + interval '1 month'"
    return user, investor, f"{COLUMNS} AND {span}"


def main() -> None:
    """Measure on loopback, then over a link with a delay of 1 ms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    with contextlib.ExitStack() as outer:
        embedded = outer.enter_context(Database.embedded(max_size=5))
        owner_dsn, app_dsn = embedded.owner_dsn, embedded.settings.dsn
        assert owner_dsn is not None
        user, investor, of_month = prepare(embedded, owner_dsn)
        figures: dict[str, Any] = {}
        for title, query in (("one month", of_month), ("newest 20 of 400 days", NEWEST)):
            with contextlib.ExitStack() as stack, acting_as(user):
                ways = contestants(stack, embedded, owner_dsn, app_dsn, user, query, investor)
                answers = {name: sorted(map(tuple, way())) for name, way in ways.items()}
                assert all(answer == answers[BARE] for answer in answers.values()), "the contestants disagree"
                loopback = figures[title] = interleave(ways, rounds=rounds, calls=40)
            print_table(f"{title}, {len(answers[BARE])} rows, loopback", loopback, BARE)
            print_aim("statement form / pool.connection()", median_ratio(loopback, STATEMENT, BARE), 1.30)
            print_aim("statement form / five statements", median_ratio(loopback, STATEMENT, FIVE), 0.50)

        proxy = outer.enter_context(TcpProxy(app_dsn, delay=0.0005))
        with contextlib.ExitStack() as stack, acting_as(user):
            remote = stack.enter_context(Database(proxy.dsn_for(app_dsn)))
            ways = contestants(
                stack, remote, proxy.dsn_for(owner_dsn), proxy.dsn_for(app_dsn), user, of_month, investor
            )
            link = interleave(ways, rounds=max(rounds // 4, 5), calls=5)
            trips = {}
            for name, way in ways.items():
                before = proxy.round_trips
                for _ in range(10):
                    way()
                trips[name] = (proxy.round_trips - before) / 10
        print_table("one month, through a proxy with 1 ms of delay", link, BARE_AUTOCOMMIT)
        print("  round trips: " + ", ".join(f"{name.split(':')[0]} {count:g}" for name, count in trips.items()))
        print_aim("statement form / bare autocommit query", median_ratio(link, STATEMENT, BARE_AUTOCOMMIT), 1.15)
        save("read_path", {"loopback_us": figures, "link_us": link, "round_trips": trips})


if __name__ == "__main__":
    main()
