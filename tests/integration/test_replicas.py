"""Reads on real streaming replicas: shared, protected, never failed by one that dies."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from equitie_data import Database, Settings, as_service
from equitie_data.embedded import EmbeddedServer
from equitie_data.hooks import NodeEjected, NodeReadmitted, OperationEnded
from equitie_data.provision import provision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PORT = "SELECT current_setting('port')::int"


class Cluster:
    """A primary with two replicas."""

    def __init__(self, primary: EmbeddedServer, replicas: list[EmbeddedServer], app_dsn: str) -> None:
        self.primary = primary
        self.replicas = replicas
        self.settings = Settings(
            dsn=app_dsn,
            replicas=[app_dsn.replace(f":{primary.port}/", f":{replica.port}/") for replica in replicas],
            max_size=3,
            health_check_interval=0.2,
        )

    def await_replay(self) -> None:
        import psycopg

        with psycopg.connect(self.primary.dsn()) as primary:
            position = primary.execute("SELECT pg_current_wal_lsn()").fetchone()
        for replica in self.replicas:
            with psycopg.connect(replica.dsn(), autocommit=True) as connection:
                wait_until(
                    lambda c=connection: (
                        c.execute("SELECT pg_last_wal_replay_lsn() >= %s", position).fetchone() == (True,)
                    )
                )


class Listener:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: object) -> None:
        self.events.append(event)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with EmbeddedServer() as primary:
        app_dsn = provision(primary)
        with primary.replica() as one, primary.replica() as two:
            yield Cluster(primary, [one, two], app_dsn)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def database(cluster: Cluster, listener: Listener) -> Iterator[Database]:
    for replica in cluster.replicas:
        if not replica.is_running:
            replica.start()
    cluster.await_replay()
    with Database(cluster.settings, hooks=[listener]) as database, as_service("test"):
        yield database


def test_reads_go_round_the_replicas_and_writes_to_the_primary(cluster: Cluster, database: Database) -> None:
    seen = Counter(database.execute_read(PORT, consistency="eventual")[0][0] for _ in range(40))
    assert seen == {replica.port: 20 for replica in cluster.replicas}
    assert database.execute_read(PORT, consistency="strong") == [(cluster.primary.port,)]

    def session() -> None:
        with as_service("session"):
            in_session()

    def in_session() -> None:
        assert database.execute_read(PORT)[0][0] != cluster.primary.port
        assert database.execute_write(PORT) == [(cluster.primary.port,)]
        database.execute_write("INSERT INTO public.companies_clean (company_name) VALUES ('mine')")
        query = "SELECT count(*) FROM public.companies_clean WHERE company_name = 'mine'"
        assert database.execute_read(query) == [(1,)]
        database.execute_write("DELETE FROM public.companies_clean WHERE company_name = 'mine'")
        assert database.execute_read(query) == [(0,)]

    with ThreadPoolExecutor(1) as fresh_context:
        fresh_context.submit(session).result()


def test_a_replica_that_dies_costs_no_failed_read_and_comes_back(
    cluster: Cluster, database: Database, listener: Listener
) -> None:
    for _ in range(10):
        database.execute_read(PORT, consistency="eventual")
    dead, alive = cluster.replicas
    dead.kill()
    for _ in range(60):
        database.execute_read(PORT, consistency="eventual")
    wait_until(lambda: any(isinstance(event, NodeEjected) for event in listener.events))
    assert {database.execute_read(PORT, consistency="eventual")[0][0] for _ in range(20)} == {alive.port}
    assert [event.node for event in listener.events if isinstance(event, NodeEjected)] == [f"127.0.0.1:{dead.port}"]
    dead.start()
    wait_until(lambda: any(isinstance(event, NodeReadmitted) for event in listener.events))
    assert {database.execute_read(PORT, consistency="eventual")[0][0] for _ in range(10)} == {dead.port, alive.port}
    assert all(event.error is None for event in listener.events if isinstance(event, OperationEnded))


def test_without_any_replica_the_primary_serves_the_reads(cluster: Cluster, database: Database) -> None:
    for replica in cluster.replicas:
        replica.kill()
    for _ in range(20):
        assert database.execute_read(PORT, consistency="eventual") == [(cluster.primary.port,)]
    stats = database.pool.get_stats()
    assert sorted(node["healthy"] for node in stats.values()) == [False, False, True]


def test_a_replica_refuses_writes_too(database: Database) -> None:
    from equitie_data.errors import ReadOnlyError

    with pytest.raises(ReadOnlyError):
        database.execute_read("INSERT INTO public.companies_clean (company_name) VALUES ('no')", consistency="eventual")
