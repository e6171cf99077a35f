"""Replicas that freeze, lag, die, come back and take over: no call fails for it, and nobody reads his own past."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from tests.faults.application import Listener, crash_and_recover, settings, wait_until
from tests.faults.ledger import Discrepancies, Ledger, Load, Transfer
from tests.faults.replication import Cluster, ask, frozen, replay_paused
from typing_extensions import Self

from equitie_data import Database, as_service
from equitie_data.context import resume_session, session_token
from equitie_data.errors import CommitOutcomeUnknown, UnavailableError
from equitie_data.hooks import NodeEjected, NodeReadmitted, OperationEnded
from equitie_data.provision import APPLICATION_ROLE, DATABASE
from equitie_data.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from equitie_data.embedded import EmbeddedServer

pytestmark = pytest.mark.faults

T = TypeVar("T")

PORT = "SELECT current_setting('port')::int"
VALUE = "SELECT value FROM ledger.sessions WHERE session_id = 1"
COUNT_UP = "UPDATE ledger.sessions SET value = value + 1 WHERE session_id = 1 RETURNING value"


@pytest.fixture(scope="module")
def standing(server: EmbeddedServer) -> Iterator[Cluster]:
    """For tests after which every server is what it was."""
    cluster = Cluster(server.bin_dir)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(standing: Cluster) -> Cluster:
    for each in (standing.primary, *standing.replicas):
        if not each.is_running:
            each.start()
    Ledger(standing.primary.dsn(DATABASE))
    standing.await_replay()
    return standing


@pytest.fixture
def doomed(server: EmbeddedServer) -> Iterator[Cluster]:
    """For tests that promote a replica: a commit waits for one, so that none that was acknowledged is lost with it."""
    cluster = Cluster(server.bin_dir, synchronous=True)
    yield cluster
    cluster.close()


@pytest.fixture
def database(cluster: Cluster, listener: Listener) -> Iterator[Database]:
    with Database(cluster.settings(), hooks=[listener]) as database, as_service("replicas"):
        wait_until(lambda: replicas_read(database) == {replica.port for replica in cluster.replicas})
        yield database


def replicas_read(database: Database) -> set[int]:
    return {database.execute_read(PORT, consistency="eventual")[0][0] for _ in range(10)}


def in_another_session(work: Callable[[], T]) -> T:
    """Run something in a thread of its own, which knows nothing of this one's session."""

    def session() -> T:
        with as_service("another session"):
            return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(session).result()


class Readers:
    """Threads that read from any replica until the block ends, and what they got."""

    def __init__(self, database: Database, statement: str = PORT) -> None:
        self.errors: list[BaseException] = []
        self.reads = 0
        self._database = database
        self._statement = statement
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(4)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads), "a read hangs"

    def _run(self) -> None:
        with as_service("reader"):
            while not self._stopping.is_set():
                try:
                    self._database.execute_read(self._statement, consistency="eventual", timeout=20)
                except BaseException as error:  # noqa: BLE001 - the test reports it
                    self.errors.append(error)
                self.reads += 1

    def await_reads(self, count: int) -> None:
        wanted = self.reads + count
        wait_until(lambda: self.reads >= wanted)


# --- what a replica may do without anybody noticing ---------------------------------------------------------------


def test_a_frozen_replica_fails_no_read_and_is_passed_over(
    cluster: Cluster, database: Database, listener: Listener
) -> None:
    sleepy, other = cluster.replicas
    with Readers(database) as readers:
        readers.await_reads(50)
        with frozen(sleepy):
            wait_until(lambda: any(event.node.endswith(f":{sleepy.port}") for event in listener.of(NodeEjected)))
            readers.await_reads(200)
            assert replicas_read(database) == {other.port}
        wait_until(lambda: any(event.node.endswith(f":{sleepy.port}") for event in listener.of(NodeReadmitted)))
        readers.await_reads(50)
    assert readers.errors == []
    assert replicas_read(database) == {sleepy.port, other.port}
    assert [event.error for event in listener.of(OperationEnded) if event.error] == []


def test_a_frozen_replica_is_not_waited_for_in_mid_transaction(cluster: Cluster, database: Database) -> None:
    """A callable's second statement meets a server that has gone silent: the whole read runs elsewhere."""
    nodes: list[int] = []

    def operation(connection: Connection[Any]) -> int:
        nodes.append(connection.execute(PORT).fetchone()[0])  # type: ignore[index]
        if len(nodes) > 1:
            return nodes[-1]
        held = frozen(next(replica for replica in cluster.replicas if replica.port == nodes[0]))
        held.__enter__()
        try:
            return int(connection.execute(PORT).fetchone()[0])  # type: ignore[index]
        finally:
            held.__exit__(None, None, None)

    assert database.execute_read(operation, consistency="eventual", timeout=20) == nodes[1]
    assert nodes[1] != nodes[0]


def test_writes_are_read_back_though_replicas_lag(cluster: Cluster, database: Database) -> None:
    with replay_paused(*cluster.replicas):
        assert database.execute_write(COUNT_UP) == [(1,)]
        token = session_token()
        assert token is not None
        assert [database.execute_read(VALUE) for _ in range(6)] == [[(1,)]] * 6
        assert [database.execute_read(VALUE, consistency="strong") for _ in range(2)] == [[(1,)]] * 2
        # The replicas are behind and are read by those to whom it makes no difference.
        assert [database.execute_read(VALUE, consistency="eventual") for _ in range(6)] == [[(0,)]] * 6
        assert in_another_session(lambda: [database.execute_read(VALUE) for _ in range(6)]) == [[(0,)]] * 6

        def resumed() -> list[Any]:
            resume_session(token)
            return [database.execute_read(VALUE) for _ in range(6)]

        assert in_another_session(resumed) == [[(1,)]] * 6
    cluster.await_replay()
    replicas = {replica.port for replica in cluster.replicas}
    # One that was found behind is not asked again for a moment.
    wait_until(lambda: {database.execute_read(PORT)[0][0] for _ in range(10)} == replicas)
    assert database.execute_read(VALUE) == [(1,)]


def test_of_two_replicas_the_one_that_has_caught_up_is_read(cluster: Cluster, database: Database) -> None:
    behind, ahead = cluster.replicas
    with replay_paused(behind):
        assert database.execute_write(COUNT_UP) == [(1,)]
        position = ask(cluster.primary, "SELECT pg_current_wal_insert_lsn()")[0]
        wait_until(lambda: ask(ahead, "SELECT pg_last_wal_replay_lsn() >= %s", position) == [(True,)])
        wait_until(lambda: {database.execute_read(PORT)[0][0] for _ in range(6)} == {ahead.port})
        assert [database.execute_read(VALUE) for _ in range(6)] == [[(1,)]] * 6


def test_a_replica_too_far_behind_is_not_read_at_all(cluster: Cluster, listener: Listener) -> None:
    behind, ahead = cluster.replicas
    with Database(cluster.settings(max_replica_lag_bytes=100_000), hooks=[listener]) as database, as_service("lag"):
        wait_until(lambda: len(replicas_read(database)) == 2)
        with replay_paused(behind):
            ask(cluster.primary, "CREATE TABLE ledger.bulk AS SELECT repeat('x', 100) FROM generate_series(1, 10000)")
            wait_until(lambda: replicas_read(database) == {ahead.port})
        wait_until(lambda: len(replicas_read(database)) == 2)


def test_a_replica_that_restarts_behind_its_own_past_is_known_to_be_behind(
    cluster: Cluster, database: Database
) -> None:
    """A standby that crashed replays again what it had replayed before, and takes reads meanwhile."""
    for each in (cluster.primary, *cluster.replicas):
        ask(each, "CHECKPOINT")
    cluster.await_replay()
    assert database.execute_write(COUNT_UP) == [(1,)]
    cluster.await_replay()
    wait_until(lambda: {database.execute_read(PORT)[0][0] for _ in range(10)} == {r.port for r in cluster.replicas})
    token = session_token()
    try:
        for replica in cluster.replicas:
            ask(replica, "ALTER SYSTEM SET recovery_min_apply_delay = '1h'")
            crash_and_recover(replica)
        for replica in cluster.replicas:
            assert ask(replica, VALUE) == [(0,)], "the replica is not behind: this proves nothing"

        def resumed() -> list[Any]:
            resume_session(token)
            return [database.execute_read(VALUE) for _ in range(10)]

        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            assert in_another_session(resumed) == [[(1,)]] * 10
    finally:
        for replica in cluster.replicas:
            ask(replica, "ALTER SYSTEM RESET recovery_min_apply_delay")
            ask(replica, "SELECT pg_reload_conf()")


def test_sessions_read_their_writes_while_replicas_freeze_lag_and_die(cluster: Cluster, listener: Listener) -> None:
    ledger = Ledger(cluster.primary.dsn(DATABASE))
    cluster.await_replay()
    one, two = cluster.replicas
    with Database(cluster.settings(), hooks=[listener]) as database, Load(ledger, database) as load:
        for _ in range(2):
            load.await_acknowledged(30)
            with replay_paused(one):
                load.await_acknowledged(100)
            with frozen(two):
                load.await_acknowledged(100)
            two.kill()
            load.await_acknowledged(100)
            two.start()
            with replay_paused(one, two):
                load.await_acknowledged(50)
    assert load.compare() == Discrepancies()
    assert load.failed_reads == 0
    assert {transfer.told for transfer in load.transfers} == {"acknowledged"}
    assert {event.error for event in listener.of(OperationEnded)} == {None}


# --- a replica that takes over ------------------------------------------------------------------------------------


def most_advanced(cluster: Cluster) -> EmbeddedServer:
    """The replica to promote: the one that has received most of what was acknowledged."""
    return max(
        cluster.replicas,
        key=lambda each: ask(each, "SELECT coalesce(pg_last_wal_receive_lsn(), '0/0') - '0/0'::pg_lsn")[0][0],
    )


def test_a_promoted_replica_takes_the_writes_without_a_restart_of_the_application(
    doomed: Cluster, listener: Listener
) -> None:
    ledger = Ledger(doomed.primary.dsn(DATABASE))
    doomed.await_replay()
    with Database(doomed.settings(), hooks=[listener]) as database, Load(ledger, database, timeout=30) as load:
        load.await_acknowledged(100)
        doomed.primary.kill()
        new = most_advanced(doomed)
        new.promote()
        ledger.owner_dsn = new.dsn(DATABASE)
        load.await_acknowledged(200)
    assert load.compare() == Discrepancies()
    assert {transfer.told for transfer in load.transfers} <= {"acknowledged", "unknown"}
    assert len(load.told("unknown")) <= 8
    with Database(doomed.settings()) as database, as_service("afterwards"):
        assert database.execute_write(PORT, timeout=20) == [(new.port,)]


def test_a_primary_that_was_left_behind_by_a_promotion_is_never_written_to_again(doomed: Cluster) -> None:
    """Split brain: the old primary comes back as one, on the timeline that was given up."""
    ask(doomed.primary, "ALTER SYSTEM RESET synchronous_standby_names")  # it would take writes alone
    ledger = Ledger(doomed.primary.dsn(DATABASE))
    doomed.await_replay()
    with Database(doomed.settings()) as database, as_service("split brain"):
        assert database.execute_write(COUNT_UP) == [(1,)]
        doomed.await_replay()
        doomed.primary.kill()
        new = most_advanced(doomed)
        new.promote()
        assert database.execute_write(COUNT_UP, timeout=30) == [(2,)]
        doomed.primary.start()
        assert ask(doomed.primary, "SELECT pg_is_in_recovery()") == [(False,)]
        for value in range(3, 43):
            assert database.execute_write(COUNT_UP, timeout=30) == [(value,)]
            assert database.execute_read(VALUE) == [(value,)]
            time.sleep(0.02)
    with Database(doomed.settings()) as database, as_service("a fresh application"):
        assert database.execute_write(COUNT_UP, timeout=30) == [(43,)]
        assert database.execute_read(VALUE) == [(43,)]
    assert ask(doomed.primary, VALUE) == [(1,)]
    ledger.owner_dsn = new.dsn(DATABASE)
    assert ledger.ask(VALUE) == [(43,)]


@pytest.mark.parametrize("lost_by", ["a cut", "a cancel"])
@pytest.mark.parametrize("key", [None, "key"])
def test_a_commit_that_no_replica_has_is_not_acknowledged(doomed: Cluster, key: str | None, lost_by: str) -> None:
    """Whatever ends the wait for a replica commits the transaction here alone, where it can still be lost."""
    ledger = Ledger(doomed.primary.dsn(DATABASE))
    doomed.await_replay()
    transfer = Transfer(1, 1, 2, 5, key=key)
    one, two = doomed.replicas
    waiting_for_one = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND usename = %s"

    def write(database: Database) -> None:
        with as_service("waits for a replica"):
            transfer.make(database, timeout=4)

    with TcpProxy(doomed.app_dsn) as proxy, Database(settings(proxy.dsn)) as database:
        with frozen(one), frozen(two), ThreadPoolExecutor(1) as thread:
            writing = thread.submit(write, database)
            wait_until(lambda: ledger.ask(waiting_for_one, [APPLICATION_ROLE]))
            if lost_by == "a cut":
                proxy.cut()
            else:
                ledger.ask(f"SELECT pg_cancel_backend(pid) FROM ({waiting_for_one}) AS one", [APPLICATION_ROLE])
            with pytest.raises(CommitOutcomeUnknown):
                writing.result(30)
            if key is not None:  # it is here, and asking again must not make it more than that
                with pytest.raises(CommitOutcomeUnknown):
                    write(database)
            doomed.primary.kill()
        new = most_advanced(doomed)
        new.promote()
        ledger.owner_dsn = new.dsn(DATABASE)
        assert ledger.compare([transfer]) == Discrepancies()


# --- servers that are not what they were taken for ----------------------------------------------------------------


def test_roles_that_were_mixed_up_in_the_settings_are_found_out(cluster: Cluster) -> None:
    one, two = cluster.replicas
    mixed = settings(
        cluster.dsn_of(one),
        replicas=[cluster.app_dsn, cluster.dsn_of(two)],
        health_check_interval=0.3,
    )
    with Database(mixed) as database, as_service("mixed up"):
        assert database.execute_write(COUNT_UP, timeout=20) == [(1,)]
        assert database.execute_write(PORT, timeout=20) == [(cluster.primary.port,)]
        assert database.execute_read(VALUE) == [(1,)]
        wait_until(lambda: replicas_read(database) == {one.port, two.port})


def test_a_write_that_only_a_standby_could_take_is_refused_in_time(cluster: Cluster) -> None:
    with Database(settings(cluster.dsn_of(cluster.replicas[0]))) as database, as_service("standby"):
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="standby"):
            database.execute_write(COUNT_UP, timeout=2)
        assert time.monotonic() - started < 2 + 10
    assert ask(cluster.primary, VALUE) == [(0,)]


@pytest.mark.parametrize("order", [1, -1], ids=["primary first", "primary last"])
def test_several_hosts_in_one_dsn_find_the_one_that_takes_writes(cluster: Cluster, order: int) -> None:
    servers = [cluster.primary, *cluster.replicas][::order]
    hosts = ",".join(f"127.0.0.1:{each.port}" for each in servers)
    dsn = cluster.app_dsn.replace(f"127.0.0.1:{cluster.primary.port}", hosts)
    with Database(settings(dsn)) as database, as_service("several hosts"):
        assert database.execute_write(PORT) == [(cluster.primary.port,)]
        assert database.execute_read(PORT, consistency="strong") == [(cluster.primary.port,)]
