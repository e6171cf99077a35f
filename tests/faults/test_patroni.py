"""Failover by Patroni under a load of writes: what was acknowledged is there once, and the application goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from tests.faults.application import settings
from tests.faults.ledger import Discrepancies, Ledger, Load
from tests.faults.patroni_cluster import PatroniCluster, missing_parts

from equitie_data import Database, as_service
from equitie_data.embedded import find_server
from equitie_data.provision import DATABASE, provision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data.embedded import EmbeddedServer

pytestmark = [pytest.mark.faults, pytest.mark.ha]


@pytest.fixture(scope="module")
def patroni() -> Iterator[PatroniCluster]:
    """On one version of PostgreSQL, for time's sake: it is the library and Patroni that have to agree."""
    missing = missing_parts()
    if missing:
        pytest.skip(f"failover by Patroni is NOT tested, for want of {' and '.join(missing)}")
    with PatroniCluster(find_server().bin_dir) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def app_dsn(patroni: PatroniCluster) -> str:
    """The application's DSN names all three nodes and does not say which of them takes writes."""
    dsn = provision(cast("EmbeddedServer", patroni))
    return dsn.replace("?target_session_attrs=read-write", "")


@pytest.fixture
def ledger(patroni: PatroniCluster, app_dsn: str) -> Ledger:
    for member in patroni.members:
        if member.process is None:
            patroni.start(member)
    patroni.await_health()
    return Ledger(patroni.dsn(DATABASE))


def check(load: Load) -> None:
    assert load.compare() == Discrepancies()
    assert load.told("refused") == []
    # Nobody but those whose COMMIT was on its way may be left in doubt, and nobody who gave a key.
    assert len(load.told("unknown")) <= 8
    assert all(transfer.key is None for transfer in load.told("unknown"))


def test_a_switchover(patroni: PatroniCluster, ledger: Ledger, app_dsn: str) -> None:
    before = patroni.await_leader()
    with Database(settings(app_dsn)) as database, Load(ledger, database, timeout=40) as load:
        load.await_acknowledged(100)
        patroni.switch_over()
        load.await_acknowledged(200, seconds=60)
    assert patroni.await_leader() is not before
    check(load)


def test_the_leader_s_postgres_is_killed(patroni: PatroniCluster, ledger: Ledger, app_dsn: str) -> None:
    with Database(settings(app_dsn)) as database, Load(ledger, database, timeout=40) as load:
        load.await_acknowledged(100)
        patroni.kill_postgres(patroni.await_leader())
        load.await_acknowledged(200, seconds=60)
    check(load)


def test_the_leader_s_node_is_killed(patroni: PatroniCluster, ledger: Ledger, app_dsn: str) -> None:
    """The longest outage there is: Patroni lets the dead leader's lease of 20 s run out."""
    before = patroni.await_leader()
    with Database(settings(app_dsn)) as database, Load(ledger, database, timeout=40) as load:
        load.await_acknowledged(100)
        patroni.kill(before)
        load.await_acknowledged(200, seconds=60)
        after = patroni.await_leader()
        assert after is not before
        patroni.start(before)  # it comes back as a replica, and nobody takes it for the leader
        patroni.await_health()
        load.await_acknowledged(50)
    check(load)
    with Database(settings(app_dsn)) as database, as_service("afterwards"):
        assert database.execute_write("SELECT current_setting('port')::int") == [(after.port,)]
