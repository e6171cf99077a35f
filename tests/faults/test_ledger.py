"""Eight sessions transfer money while one kind of fault after the other strikes; then the books are opened.

Whatever happens: what was acknowledged is there once, what was refused is not there, what is unknown is one or the
other, the balances follow from the transfers, and no session ever reads its own past.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from tests.faults.application import crash_and_recover, settings
from tests.faults.ledger import Discrepancies, Load
from tests.faults.tasks import InTasks

from equitie_data import Database
from equitie_data.hooks import CommitResolved, Retried
from equitie_data.provision import APPLICATION_ROLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faults.application import Listener
    from tests.faults.ledger import Ledger

    from equitie_data.embedded import EmbeddedServer
    from equitie_data.tcp_proxy import Fault, TcpProxy

pytestmark = pytest.mark.faults

# One at work, if there is one.
A_BACKEND = f"""
    SELECT pid
    FROM pg_stat_activity
    WHERE usename = '{APPLICATION_ROLE}'
    ORDER BY state = 'idle', random()
    LIMIT 1
"""


class World:
    """What a fault may lay hands on."""

    def __init__(self, primary: EmbeddedServer, proxy: TcpProxy, ledger: Ledger, listener: Listener) -> None:
        self.primary = primary
        self.proxy = proxy
        self.ledger = ledger
        self.listener = listener

    def await_strike(self, fault: Fault) -> None:
        assert fault.struck.wait(20), "nothing came by that the fault could strike"


@pytest.fixture
def world(primary: EmbeddedServer, proxy: TcpProxy, ledger: Ledger, listener: Listener) -> Iterator[World]:
    yield World(primary, proxy, ledger, listener)
    if not primary.is_running:
        primary.start()
    ledger.ask(f"ALTER ROLE {APPLICATION_ROLE} CONNECTION LIMIT -1")


# --- faults -------------------------------------------------------------------------------------------------------


def terminate_a_backend(world: World) -> None:
    world.ledger.ask(f"SELECT pg_terminate_backend(pid, 5000) FROM ({A_BACKEND}) AS one")


def cut_every_connection(world: World) -> None:
    world.proxy.cut()


def lose_the_reply_to_a_commit(world: World) -> None:
    world.await_strike(world.proxy.cut_reply_to(b"COMMIT"))


def lose_the_reply_to_a_statement(world: World) -> None:
    world.await_strike(world.proxy.cut_reply_to(b"WITH moved"))


def lose_a_commit(world: World) -> None:
    world.await_strike(world.proxy.cut_before(b"COMMIT"))


def lose_a_commit_and_leave_the_server_waiting(world: World) -> None:
    world.await_strike(world.proxy.cut_before(b"COMMIT", half_open=True))


def stop_answering_for_a_second(world: World) -> None:
    world.proxy.go_deaf()
    time.sleep(1)
    world.proxy.hear()


def take_the_network_away(world: World) -> None:
    world.proxy.stop()
    time.sleep(0.5)
    world.proxy.start()


def restart_the_server(world: World) -> None:
    world.primary.restart()


def kill_the_server(world: World) -> None:
    crash_and_recover(world.primary)


def kill_a_backend(world: World) -> None:
    """The server then ends every other backend and recovers, without a new main process."""
    while not (found := world.ledger.ask(A_BACKEND)):
        time.sleep(0.01)
    os.kill(found[0][0], signal.SIGKILL)


def fill_the_disk(world: World) -> None:
    world.ledger.fill_disk("at a statement")
    time.sleep(0.2)
    world.ledger.fill_disk("at commit")
    time.sleep(0.2)
    world.ledger.fill_disk("never")


def admit_no_new_connection(world: World) -> None:
    world.ledger.ask(f"ALTER ROLE {APPLICATION_ROLE} CONNECTION LIMIT 1")
    for _ in range(3):
        terminate_a_backend(world)
    time.sleep(0.5)
    world.ledger.ask(f"ALTER ROLE {APPLICATION_ROLE} CONNECTION LIMIT -1")


# Fault, how often, and what it may do to callers: nothing; leave a commit unresolved; refuse a call.
UNHARMED: frozenset[str] = frozenset()
FAULTS: list[tuple[Callable[[World], None], int, frozenset[str]]] = [
    (terminate_a_backend, 25, UNHARMED),
    (cut_every_connection, 10, UNHARMED),
    (lose_the_reply_to_a_commit, 15, UNHARMED),
    (lose_the_reply_to_a_statement, 15, UNHARMED),
    (lose_a_commit, 15, UNHARMED),
    (lose_a_commit_and_leave_the_server_waiting, 10, UNHARMED),
    (stop_answering_for_a_second, 2, UNHARMED),
    (take_the_network_away, 3, UNHARMED),
    (restart_the_server, 3, frozenset({"unknown"})),
    (kill_the_server, 3, frozenset({"unknown"})),
    (kill_a_backend, 3, frozenset({"unknown"})),
    (fill_the_disk, 4, frozenset({"refused"})),
    (admit_no_new_connection, 3, UNHARMED),
]


@pytest.mark.parametrize(("strike", "times", "harm"), FAULTS, ids=[strike.__name__ for strike, _, _ in FAULTS])
def test_the_books_balance(
    world: World, application: Database, strike: Callable[[World], None], times: int, harm: frozenset[str]
) -> None:
    with Load(world.ledger, application) as load:
        for _ in range(times):
            load.await_acknowledged(10)
            strike(world)
        load.await_acknowledged(20)
    assert load.compare() == Discrepancies()
    assert {transfer.told for transfer in load.transfers} <= {"acknowledged", *harm}
    assert len(load.told("acknowledged")) > 10 * times
    if "refused" in harm:
        assert {transfer.reason.split(":")[0] for transfer in load.told("refused")} == {"DiskFull"}
    elif strike is not stop_answering_for_a_second:
        assert world.listener.of(Retried) or world.listener.of(CommitResolved)


def test_a_keyed_transfer_is_there_exactly_once_whatever_happens(world: World, ledger: Ledger, proxy: TcpProxy) -> None:
    """Every fault in turn, and calls that give up early: repeated with its key, each transfer ends acknowledged."""
    with Database(settings(proxy.dsn, write_attempts=2)) as database, Load(ledger, database, timeout=10.0) as load:
        for strike, _, _ in FAULTS:
            load.await_acknowledged(10)
            strike(world)
        load.await_acknowledged(20)
    assert load.compare() == Discrepancies()
    keyed = [transfer for transfer in load.transfers if transfer.key is not None]
    assert keyed
    assert {transfer.told for transfer in keyed} == {"acknowledged"}


def test_the_books_balance_under_tasks(world: World, ledger: Ledger, proxy: TcpProxy, listener: Listener) -> None:
    """Every fault in turn, while the sessions' calls are tasks of one event loop."""
    with InTasks(settings(proxy.dsn), listener) as database, Load(ledger, database) as load:
        for strike, times, _ in FAULTS:
            for _ in range(min(times, 5)):
                load.await_acknowledged(10)
                strike(world)
        load.await_acknowledged(20)
    assert load.compare() == Discrepancies()
    assert {transfer.told for transfer in load.transfers} <= {"acknowledged", "refused", "unknown"}
    assert {transfer.reason.split(":")[0] for transfer in load.told("refused")} <= {"DiskFull"}
    assert world.listener.of(CommitResolved)


def test_the_books_tell_a_lost_and_a_doubled_transfer(ledger: Ledger, application: Database, service: None) -> None:
    """The comparison itself: it sees what it is there to see."""
    from tests.faults.ledger import BALANCE, Transfer

    good, lost, doubled, refused = (Transfer(1, 1, 2, 5, as_statement=bool(place % 2)) for place in range(4))
    for transfer in (good, lost, doubled, refused):
        transfer.make(application, timeout=10)
    assert ledger.compare([good, lost, doubled, refused]) == Discrepancies()
    ledger.ask("DELETE FROM ledger.transfers WHERE transfer_id = %s", [lost.transfer_id])
    ledger.ask(
        "INSERT INTO ledger.transfers SELECT * FROM ledger.transfers WHERE transfer_id = %s", [doubled.transfer_id]
    )
    refused.told = "refused"
    found = ledger.compare([good, lost, doubled, refused])
    assert found == Discrepancies(lost=[lost], doubled=[doubled], refused_but_there=[refused])
    ledger.ask("UPDATE ledger.accounts SET balance = balance + 1 WHERE account_id = 3")
    ledger.ask("UPDATE ledger.sessions SET value = 9 WHERE session_id = 2")
    found = ledger.compare([lost, doubled, refused])
    assert found.out_of_nowhere == [good.transfer_id]
    assert found.wrong_balances == {3: BALANCE + 1}
    assert found.wrong_counters == {2: 9}
