"""No borrower of a connection ever runs as the one before: 100,000 checkouts here, a million in `nox -s leaks`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from tests.security.storm import IDENTITY, KINDS, TAMPERING, Storm, acting, people

from equitie_data import Database, call
from equitie_data.aio import AsyncDatabase
from equitie_data.errors import EquitieDataError
from equitie_data.settings import Settings

if TYPE_CHECKING:
    from equitie_data.embedded import EmbeddedServer

NIGHTLY = int(os.environ.get("LEAK_CHECKOUTS", "0"))
"""Checkouts of a nightly run, on every server."""


def settings_for(dsn: str) -> Settings:
    # Fewer connections than threads: every connection goes from hand to hand.
    return Settings(dsn=dsn, min_size=4, max_size=4, enable_audit_logging=False, enable_performance_monitoring=False)


def storm_on(database: Database, owner_dsn: str, app_dsn: str) -> Storm:
    return Storm(database, people(owner_dsn, 300), str(conninfo_to_dict(app_dsn)["user"]), seed=20_241_105)


@pytest.mark.timeout(600 + NIGHTLY // 100)  # shared machines are slow
def test_no_checkout_runs_as_somebody_else(server: EmbeddedServer, owner_dsn: str, app_dsn: str) -> None:
    wanted = NIGHTLY or (100_000 if server.major >= 18 else 10_000)
    with Database(settings_for(app_dsn)) as database:
        report = storm_on(database, owner_dsn, app_dsn).run(wanted)
        checkouts = database.pool.get_stats()[database.pool.primary.name]["checkouts"]
    print(f"{checkouts:,} checkouts, {len(report.leaks)} leaks; {report.outcomes}")  # noqa: T201 - nightly's output
    assert report.leaks == []
    assert checkouts >= report.calls >= wanted - 8
    assert set(report.kinds) == set(KINDS)
    # The storm was one: every kind of end was met, and nothing but those.
    assert {"DivisionByZero", "QueryCanceled", "SwallowedErrorError", "ZeroDivisionError"} <= set(report.outcomes)


def test_no_task_runs_as_somebody_else(owner_dsn: str, app_dsn: str) -> None:
    persons, login = people(owner_dsn, 100), str(conninfo_to_dict(app_dsn)["user"])
    leaks: list[Any] = []
    cancelled = 0

    async def work(database: AsyncDatabase, number: int) -> None:
        nonlocal cancelled
        chance = random.Random(number)
        for turn in range(250):
            person = chance.choice(persons)
            with acting(person, f"{number}-{turn}") as actor:
                expected = (person.database_role, login, actor.claims, actor.context)

                async def tamper(connection: Any, expected: Any = expected) -> None:
                    cursor = await connection.execute(IDENTITY)
                    if (seen := await cursor.fetchone()) != expected:
                        leaks.append((seen, expected))
                    await connection.execute(chance.choice(TAMPERING))

                if turn % 25 == 7:
                    with contextlib.suppress(psycopg.Error, EquitieDataError):
                        await database.execute_write(tamper)
                elif turn % 25 == 11:
                    task = asyncio.ensure_future(database.execute_read("SELECT pg_sleep(1)"))
                    await asyncio.sleep(chance.random() / 100)
                    task.cancel()
                    cancelled += 1
                    await asyncio.wait({task})
                else:
                    with contextlib.suppress(EquitieDataError):
                        if (seen := await database.execute_read(IDENTITY)) != [expected]:
                            leaks.append((seen, expected))

    async def main() -> int:
        async with AsyncDatabase(settings_for(app_dsn)) as database:
            await asyncio.gather(*(work(database, number) for number in range(8)))
            return int(database.pool.get_stats()[database.pool.primary.name]["checkouts"])

    assert asyncio.run(main()) > 1_500
    assert cancelled == 80
    assert leaks == []


@pytest.mark.parametrize(
    "forgotten",
    [
        b"pg_catalog.set_config('request.jwt.claims', $1, true)",
        b"pg_catalog.set_config('equitie.context', $2, true)",
        b"true)",
    ],
    ids=["claims", "context", "local"],
)
def test_a_prologue_that_forgets_something_is_found_out(
    owner_dsn: str, app_dsn: str, monkeypatch: pytest.MonkeyPatch, forgotten: bytes
) -> None:
    real = call.prologue_for

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        prologue = real(*args, **kwargs)
        assert forgotten in prologue.query
        instead = b"false)" if forgotten == b"true)" else b"$1::text" if b"$1" in forgotten else b"$2::text"
        return attrs.evolve(prologue, query=prologue.query.replace(forgotten, instead, 1))

    monkeypatch.setattr(call, "prologue_for", forgetful)
    with Database(settings_for(app_dsn)) as database:
        storm = storm_on(database, owner_dsn, app_dsn)
        report = storm.run(800)
        if forgotten == b"true)":
            # What is set for the session is overwritten by the next prologue all the same: that is the second lock.
            assert report.leaks == []
        else:
            assert report.leaks


def test_a_role_that_is_not_switched_is_found_out(
    owner_dsn: str, app_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = call.prologue_for

    def stale(*args: Any, **kwargs: Any) -> Any:
        prologue = real(*args, **kwargs)
        return attrs.evolve(prologue, query=prologue.query.replace(b"set_config('role'", b"set_config('equitie.role'"))

    monkeypatch.setattr(call, "prologue_for", stale)
    with Database(settings_for(app_dsn)) as database:
        assert storm_on(database, owner_dsn, app_dsn).run(400).leaks
