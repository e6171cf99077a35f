"""What policies cost: the platform's queries under row-level security, against the owner with an explicit filter.

Both sides keep one connection each, with the identity set for its session, so that nothing but the policies differs:
what it costs to say who acts is `read_path`'s question. Investors follow Zipf's law, so the first of them has every
ninth transaction. Both sides' answers are compared before anything is timed.

Run it: ``python benchmarks/row_level_security.py [--rows N] [--rounds N]``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import psycopg

from equitie_data import migrate
from equitie_data.embedded import EmbeddedServer
from measuring import interleave, median_ratio, print_aim, save
from transactions_sample import COLUMNS, INVESTORS, PARENTS, first_day, last_day, lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AIM = 1.30
# By rank: the largest, the hundredth, and one in the middle.
RANKS = {"top investor": 1, "100th investor": 100, "median investor": 2_500}
RECENT = "transaction_date >= current_date - 60"
DEALS_OF = "deal_id IN (SELECT t.deal_id FROM public.transactions_clean AS t WHERE {mine})"

# What the owner has to add to a query, where an investor's policies do.
OF_AN_INVESTOR = {
    "newest 20": "SELECT * FROM public.transactions_clean {where} ORDER BY transaction_date DESC LIMIT 20",
    "count and sum": "SELECT count(*), sum(amount) FROM public.transactions_clean {where}",
    "two months": f"SELECT count(*), sum(amount) FROM public.transactions_clean {{where}} {{and}} {RECENT}",
    "one deal's rows": "SELECT count(*), sum(amount) FROM public.transactions_clean {where} {and} deal_id = 7",
    "by type and date": (
        "SELECT count(*), sum(amount) FROM public.transactions_clean {where} {and} transaction_type = 'secondary'"
        f" AND {RECENT}"
    ),
    "own row": "SELECT * FROM public.investors_clean {where}",
    "deals": "SELECT deal_id, deal_name FROM public.deals_clean {deals} ORDER BY 1",
    "one deal": "SELECT deal_id, deal_name FROM public.deals_clean {deals} {and} deal_id = 7",
}
OF_STAFF = {
    "newest 50": "SELECT * FROM public.transactions_clean ORDER BY transaction_date DESC, transaction_id LIMIT 50",
    "an investor's newest 20": (
        "SELECT * FROM public.transactions_clean WHERE investor_id = 100 ORDER BY transaction_date DESC,"
        " transaction_id LIMIT 20"
    ),
    "a deal by type": (
        "SELECT count(*), sum(amount) FROM public.transactions_clean WHERE deal_id = 7 AND transaction_type = 'primary'"
    ),
    "type by date": (
        f"SELECT count(*), sum(amount) FROM public.transactions_clean WHERE transaction_type = 'secondary' AND {RECENT}"
    ),
    "active in a deal": (
        "SELECT count(*) FROM public.transactions_clean WHERE deal_id = 7 AND investor_id = 100"
        " AND status NOT IN ('cancelled', 'failed')"
    ),
    "deals": "SELECT deal_id, deal_name FROM public.deals_clean ORDER BY 1",
}
DEAL_IDS = "current_deal_ids()"
# Whose deals they are is worked out whole, also for one of them; and by a function that the owner's query is not.
BEYOND_THE_AIM = {"one deal", DEAL_IDS}
DISTINCT = "SELECT DISTINCT deal_id FROM public.transactions_clean WHERE investor_id = %s ORDER BY 1"
FOUND = "SELECT d FROM equitie_private.current_deal_ids() AS d ORDER BY 1"


def user_of(rank: int) -> str:
    """Return the login of an investor, or of the analyst for rank 0."""
    return f"00000000-0000-4000-8000-{rank:012d}"


def fill(owner: psycopg.Connection[Any], rows: int) -> None:
    """Load transactions, an analyst, and a login for every investor."""
    owner.execute(
        "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)", [first_day(), last_day()]
    )
    owner.execute(PARENTS.encode())
    owner.execute(
        "INSERT INTO public.user_profiles (user_id, email, role, investor_id)"
        " SELECT ('00000000-0000-4000-8000-' || lpad(g::text, 12, '0'))::uuid, g || '@bench.example',"
        "  CASE g WHEN 0 THEN 'analyst' ELSE 'investor' END, nullif(g, 0)"
        " FROM generate_series(0, %s) AS g",
        [INVESTORS],
    )
    # Half of the load would be the audit trail's, which nothing here reads.
    owner.execute("ALTER TABLE public.transactions_clean DISABLE TRIGGER audit_insert")
    with owner.cursor().copy(f"COPY public.transactions_clean ({', '.join(COLUMNS)}) FROM STDIN".encode()) as copy:
        for line in lines(rows, seed=1):
            copy.write(line)
    owner.execute("ALTER TABLE public.transactions_clean ENABLE ALWAYS TRIGGER audit_insert")
    owner.execute("VACUUM ANALYZE")


@contextlib.contextmanager
def session(dsn: str, user: str | None) -> Iterator[psycopg.Connection[Any]]:
    """Connect as the owner, or as the role that a user's transactions run as."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("SET max_parallel_workers_per_gather = 0; SET jit = off")
        if user is not None:
            conn.execute(
                "SELECT set_config('request.jwt.claims', %s, false),"
                " set_config('role', equitie_private.database_role(%s::uuid), false)",
                [json.dumps({"sub": user}), user],
            )
        yield conn


def measure(
    owner: psycopg.Connection[Any], other: psycopg.Connection[Any], plain: str, filtered: str, rounds: int
) -> dict[str, list[float]]:
    """Time a query under policies against the owner's with a filter; return microseconds of every round."""

    def ask(conn: psycopg.Connection[Any], query: str) -> Callable[[], list[Any]]:
        encoded = query.encode()
        return lambda: conn.execute(encoded).fetchall()

    ways = {"policies": ask(other, plain), "filter": ask(owner, filtered)}
    answers = {name: sorted(way()) if "LIMIT" not in plain else len(way()) for name, way in ways.items()}
    assert answers["policies"] == answers["filter"], plain
    started = time.perf_counter()
    ways["filter"]()
    calls = max(1, min(20, round(0.02 / (time.perf_counter() - started))))
    return interleave(ways, rounds=rounds, calls=calls)


def report(title: str, results: dict[str, dict[str, list[float]]]) -> None:
    """Print a line for each query, and the worst of those that have an aim."""
    print(f"\n{title}")
    print(f"  {'':<28}{'policies us':>12}{'filter us':>12}{'ratio':>8}")
    ratios = {}
    for name, figures in results.items():
        ratios[name] = median_ratio(figures, "policies", "filter")
        medians = {way: sorted(values)[len(values) // 2] for way, values in figures.items()}
        print(f"  {name:<28}{medians['policies']:>12.0f}{medians['filter']:>12.0f}{ratios[name]:>8.2f}")
    worst = max(ratios.keys() - BEYOND_THE_AIM, key=lambda name: ratios[name])
    print_aim(f"{title}, {worst}", ratios[worst], AIM)


def of_investor(
    owner: psycopg.Connection[Any], acting: psycopg.Connection[Any], rank: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Measure an investor's queries, and how their deals are found."""
    mine = f"investor_id = {rank}"
    with_filter = {"deals": f"WHERE {DEALS_OF.format(mine=mine)}", "where": f"WHERE {mine}", "and": "AND"}
    without = {"deals": "", "where": "", "and": "WHERE"}
    results = {
        query: measure(owner, acting, text.format(**without), text.format(**with_filter), rounds)
        for query, text in OF_AN_INVESTOR.items()
    }
    results[DEAL_IDS] = interleave(
        {
            "policies": lambda: acting.execute(FOUND).fetchall(),
            "filter": lambda: owner.execute(DISTINCT, [rank]).fetchall(),
        },
        rounds=rounds,
        calls=1,
    )
    return results


def main() -> None:
    """Load, then measure investors of three sizes and staff."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    settings = {"shared_buffers": "2GB", "max_wal_size": "8GB", "max_locks_per_transaction": "256"}
    saved: dict[str, Any] = {"rows": arguments.rows}
    with contextlib.ExitStack() as stack:
        dsn = stack.enter_context(EmbeddedServer(settings=settings)).dsn()
        migrate.migrate(dsn)
        owner = stack.enter_context(session(dsn, None))
        started = time.perf_counter()
        fill(owner, arguments.rows)
        print(f"{arguments.rows:,} transactions loaded in {time.perf_counter() - started:.0f} s", flush=True)
        for name, rank in RANKS.items():
            with session(dsn, user_of(rank)) as acting:
                results = of_investor(owner, acting, rank, arguments.rounds)
            row = owner.execute(
                "SELECT count(*) FROM public.transactions_clean WHERE investor_id = %s", [rank]
            ).fetchone()
            assert row is not None
            report(f"{name}, {row[0]:,} transactions", results)
            saved[name] = results
        with session(dsn, user_of(0)) as acting:
            results = {query: measure(owner, acting, text, text, arguments.rounds) for query, text in OF_STAFF.items()}
        report("staff", results)
        saved["staff"] = results
    save("row_level_security", saved)


if __name__ == "__main__":
    main()
