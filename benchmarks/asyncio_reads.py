"""Identity-scoped reads by many tasks: `AsyncDatabase` against asyncpg's pool and psycopg's, doing the same work.

Every way reads the same rows of one investor under row-level security: role and claims are set for the transaction,
then the query runs. asyncpg and psycopg do it in a transaction of separate statements, as their documentation has it.

Run it: ``python benchmarks/asyncio_reads.py [--rounds N]``.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]
import psycopg_pool

from equitie_data import AsyncDatabase, Database, acting_as
from measuring import median_ratio, print_table, save
from read_path import NEWEST, prepare

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

TASKS = 50
CALLS_PER_TASK = 8
CONNECTIONS = 5
OURS, ASYNCPG, PSYCOPG = "AsyncDatabase.execute_read", "asyncpg pool, five statements", "psycopg pool, five statements"


async def timed(way: Callable[[], Awaitable[Any]]) -> float:
    """Return microseconds per call of many tasks at once."""

    async def work() -> None:
        for _ in range(CALLS_PER_TASK):
            await way()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(TASKS)))
    return (time.perf_counter() - started) / (TASKS * CALLS_PER_TASK) * 1e6


async def measure(dsn: str, user: str, investor: int, rounds: int) -> dict[str, list[float]]:
    """Time every way in turn."""
    claims = f'{{"sub": "{user}", "role": "authenticated"}}'
    numbered = NEWEST.replace("%s", "$1")
    async with (
        AsyncDatabase(dsn) as database,
        psycopg_pool.AsyncConnectionPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, open=False) as pool,
        asyncpg.create_pool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS) as other,
    ):

        async def ours() -> Any:
            return await database.execute_read(NEWEST, [investor])

        async def by_psycopg() -> Any:
            async with pool.connection() as conn:
                await conn.execute("SET LOCAL ROLE authenticated")
                await conn.execute("SELECT set_config('request.jwt.claims', %s, true)", [claims])
                return await (await conn.execute(NEWEST, [investor])).fetchall()

        async def by_asyncpg() -> Any:
            async with other.acquire() as conn, conn.transaction(readonly=True):
                await conn.execute("SET LOCAL ROLE authenticated")
                await conn.execute("SELECT set_config('request.jwt.claims', $1, true)", claims)
                return await conn.fetch(numbered, investor)

        ways = {OURS: ours, ASYNCPG: by_asyncpg, PSYCOPG: by_psycopg}
        figures: dict[str, list[float]] = {name: [] for name in ways}
        with acting_as(user):
            answers = {name: sorted(map(tuple, await way())) for name, way in ways.items()}
            assert all(answer == answers[OURS] for answer in answers.values()), "the contestants disagree"
            for number in range(rounds + 1):
                for name, way in ways.items():
                    figure = await timed(way)
                    if number:  # the first round warms up
                        figures[name].append(figure)
    return figures


def main() -> None:
    """Measure on loopback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with Database.embedded(max_size=5) as embedded:
        assert embedded.owner_dsn is not None
        user, investor, _ = prepare(embedded, embedded.owner_dsn)
        figures = asyncio.run(measure(embedded.settings.dsn, user, investor, rounds))
    print_table(f"{TASKS} tasks on {CONNECTIONS} connections, loopback", figures, PSYCOPG)
    print(f"  against asyncpg: {median_ratio(figures, OURS, ASYNCPG):.2f}")
    save("asyncio_reads", {"loopback_us": figures})


if __name__ == "__main__":
    main()
