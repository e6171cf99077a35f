"""Failover by Patroni under a load of writes: what was acknowledged is there once, and the application goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
from tests.faults.application import settings
from tests.faults.ledger import SESSIONS, Discrepancies, Ledger, Load
from tests.faults.patroni_cluster import PatroniCluster, missing_parts

from equitie_data import Database
from equitie_data.embedded import find_server
from equitie_data.provision import DATABASE, provision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data.embedded import EmbeddedServer

pytestmark = [pytest.mark.faults, pytest.mark.ha]


TIMEOUT = 60.0  # seconds; a node's death takes Patroni 20 s to notice, on a machine that has nothing else to do


@pytest.fixture
def patroni() -> Iterator[PatroniCluster]:
    """On one version of PostgreSQL, for time's sake: it is the library and Patroni that have to agree."""
    missing = missing_parts()
    if missing:
        pytest.skip(f"failover by Patroni is NOT tested, for want of {' and '.join(missing)}")
    with PatroniCluster(find_server().bin_dir) as cluster:
        yield cluster


@pytest.mark.timeout(300)
def test_no_failover_loses_or_doubles_a_write_or_needs_a_restart_of_the_application(patroni: PatroniCluster) -> None:
    """In one test, because the cluster takes longer to start than any of its failovers but one."""
    dsn = provision(cast("EmbeddedServer", patroni))
    # The application's DSN names all three nodes and does not say which of them takes writes.
    with Database(settings(dsn.replace("?target_session_attrs=read-write", ""))) as database:
        for befall in (switch_over, kill_the_leader_s_postgres, kill_the_leader_s_node):
            ledger = Ledger(patroni.dsn(DATABASE))
            with Load(ledger, database, timeout=TIMEOUT) as load:
                load.await_acknowledged(100)
                befall(patroni, load)
                load.await_acknowledged(100, seconds=TIMEOUT)
            assert load.compare() == Discrepancies(), befall.__name__
            assert load.told("refused") == [], befall.__name__
            # Only those whose COMMIT was on its way may be left in doubt, and nobody who gave a key.
            in_doubt = load.told("unknown")
            assert len(in_doubt) <= SESSIONS, befall.__name__
            assert [transfer for transfer in in_doubt if transfer.key] == [], befall.__name__
            patroni.await_health()


def switch_over(patroni: PatroniCluster, load: Load) -> None:
    before = patroni.await_leader()
    patroni.switch_over()
    assert patroni.await_leader(other_than=before) is not before


def kill_the_leader_s_postgres(patroni: PatroniCluster, load: Load) -> None:
    patroni.kill_postgres(patroni.await_leader())


def kill_the_leader_s_node(patroni: PatroniCluster, load: Load) -> None:
    """The longest outage there is: Patroni lets the dead leader's lease of 20 s run out."""
    before = patroni.await_leader()
    patroni.kill(before)
    load.await_acknowledged(100, seconds=TIMEOUT)
    after = patroni.await_leader()
    assert after is not before
    patroni.start(before)  # it comes back as a replica, and nobody takes it for the leader
    patroni.await_health()
    assert patroni.await_leader() is after
