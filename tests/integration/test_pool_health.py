"""Who holds connections, how the pool grows and rests, and the mode without identity."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from equitie_data import Database, Settings, acting_as, as_service
from equitie_data.errors import CheckoutTimeoutError, NotOpenError, ReadOnlyError
from equitie_data.hooks import Leaked

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

WHO = "SELECT current_user, current_setting('role')"


class Listener:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: object) -> None:
        self.events.append(event)


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_connection_held_too_long_is_reported_once_with_its_holder(app_dsn: str) -> None:
    listener, release = Listener(), threading.Event()

    def hold(conn: Connection[Any]) -> None:
        conn.execute("SELECT 1")
        release.wait(20)

    with Database(Settings(dsn=app_dsn, leak_threshold=0.2), hooks=[listener]) as database, as_service("test"):
        holder = threading.Thread(target=_as_service, args=(database, hold, "slow report"), name="holder")
        holder.start()
        wait_until(lambda: any(isinstance(event, Leaked) for event in listener.events))
        time.sleep(1.2)  # another look of the watch
        release.set()
        holder.join()
    (leak,) = (event for event in listener.events if isinstance(event, Leaked))
    assert leak.name == "slow report"
    assert leak.site.startswith("test_pool_health.py:")
    assert leak.seconds > 0.2


def _as_service(database: Database, operation: Callable[[Connection[Any]], Any], name: str | None = None) -> Any:
    with as_service("test"):
        return database.execute_read(operation, name=name)


def test_a_full_pool_says_who_holds_it(app_dsn: str) -> None:
    release, held = threading.Event(), threading.Event()

    def hold(conn: Connection[Any]) -> None:
        conn.execute("SELECT 1")
        held.set()
        release.wait(20)

    settings = Settings(dsn=app_dsn, max_size=1, checkout_timeout=0.3)
    with Database(settings) as database, as_service("test"):
        holder = threading.Thread(target=_as_service, args=(database, hold, "month end"), name="month-end-thread")
        holder.start()
        held.wait(10)
        with pytest.raises(
            CheckoutTimeoutError, match=r"month-end-thread in 'month end' for 0\.\d s at test_pool_health"
        ):
            database.execute_read("SELECT 1")
        release.set()
        holder.join()


def test_a_burst_on_a_cold_pool_is_served_by_as_many_connections_as_it_may_have(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, min_size=1, max_size=8)) as database, ThreadPoolExecutor(8) as threads:
        together = threading.Barrier(8, timeout=20)

        def meet(conn: Connection[Any]) -> int:
            pid = conn.execute("SELECT pg_backend_pid()").fetchone()[0]  # type: ignore[index]
            together.wait()
            return int(pid)

        pids = set(threads.map(lambda _: _as_service(database, meet), range(8)))
    assert len(pids) == 8


def test_idle_connections_are_given_up_down_to_the_minimum(app_dsn: str) -> None:
    settings = Settings(dsn=app_dsn, min_size=1, max_size=4, max_idle=0.3)
    with Database(settings) as database, ThreadPoolExecutor(4) as threads:
        together = threading.Barrier(4, timeout=20)
        list(threads.map(lambda _: _as_service(database, lambda conn: together.wait()), range(4)))
        assert database.pool.primary.stats()["size"] == 4
        wait_until(lambda: database.pool.primary.stats()["size"] == 1)
        assert _as_service(database, lambda conn: conn.execute("SELECT 1").fetchone()) == (1,)


def test_closing_lets_calls_under_way_finish_and_refuses_new_ones(app_dsn: str) -> None:
    started = threading.Event()

    def slow(conn: Connection[Any]) -> str:
        started.set()
        conn.execute("SELECT pg_sleep(0.5)")
        return "finished"

    database = Database(app_dsn).open()
    with ThreadPoolExecutor(1) as threads:
        under_way = threads.submit(_as_service, database, slow)
        started.wait(10)
        database.close()
        assert under_way.result() == "finished"
    with as_service("test"), pytest.raises(NotOpenError):
        database.execute_read("SELECT 1")


def test_without_identity_nothing_is_switched_and_reads_stay_read_only(owner_dsn: str) -> None:
    settings = Settings(dsn=owner_dsn, default_actor="service", service_role=None)
    with Database(settings) as database:
        assert database.execute_read(WHO) == [("postgres", "none")]
        assert database.execute_read(lambda conn: conn.execute(WHO).fetchone()) == ("postgres", "none")
        with pytest.raises(ReadOnlyError):
            database.execute_read("INSERT INTO public.companies_clean (company_name) VALUES ('x')")
        assert database.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('x')") == 1
        assert database.execute_write(lambda conn: conn.execute(WHO).fetchone()) == ("postgres", "none")
        with acting_as(uuid4()):
            assert database.execute_read(WHO) == [("authenticated", "authenticated")]
        with pytest.raises(psycopg.errors.QueryCanceled):
            database.execute_read("SELECT pg_sleep(20)", timeout=0.2)
    with psycopg.connect(owner_dsn) as owner:
        row = owner.execute("SELECT actor_type FROM public.audit_logs WHERE entity_type = 'companies_clean'").fetchone()
    assert row is not None


def test_a_call_inside_an_operation_has_no_more_time_than_the_operation(app_dsn: str) -> None:
    with Database(Settings(dsn=app_dsn, max_size=2)) as database, as_service("test"):

        def outer(conn: Connection[Any]) -> None:
            conn.execute("SELECT 1")

            def inner(other: Connection[Any]) -> None:
                other.execute("SELECT 1")
                database.execute_read("SELECT 1")  # the pool has no third connection

            database.execute_read(inner, timeout=60)

        started = time.monotonic()
        with pytest.raises(CheckoutTimeoutError):
            database.execute_read(outer, timeout=1.0)
        assert time.monotonic() - started < 10  # not the 30 s of a checkout, nor the 60 s of the inner call
