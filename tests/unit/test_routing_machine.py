"""Routing against a model of a cluster: whatever its nodes do, no read sees its session's past and no dead node."""

from __future__ import annotations

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from equitie_data.context import WalPosition
from equitie_data.routing import (
    NodeReport,
    ReadChoice,
    ReplicaHealth,
    ReplicaView,
    choose_primary,
    choose_replica,
)

MAX_LAG = 10.0
MAX_LAG_BYTES = 8


@attrs.define
class Node:
    """A replica as it really is."""

    timeline: int = 1
    replayed: int = 0
    local: bool = True
    view: ReplicaView = attrs.field(factory=lambda: ReplicaView(ReplicaHealth()))


class Routing(RuleBasedStateMachine):
    """A primary that writes, replicas that replay when they like, probes that see them now and then.

    The node that takes over always has what the session was told is written, as with synchronous replication; what
    else was written can be lost with the old primary, and replicas can have replayed more of that than the new one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.timeline = 1
        self.forks: list[int] = []
        """How far the log of each timeline that has ended goes in the one after it."""
        self.written = 0
        self.position: WalPosition | None = None
        self.turn = 0
        self.now = 1_000.0

    @initialize(locals_=st.lists(st.sampled_from([True, True, False]), max_size=4), turn=st.integers(0, 1 << 16))
    def set_up(self, locals_: list[bool], turn: int) -> None:
        self.nodes = [Node(local=local) for local in locals_]
        self.turn = turn
        for index in range(len(self.nodes)):
            self.probe(index, 0.0)

    # --- what the cluster does ------------------------------------------------------------------------------------

    @rule(size=st.integers(1, 5))
    def write_in_this_session(self, size: int) -> None:
        self.written += size
        self.position = WalPosition(self.timeline, self.written)

    @rule(size=st.integers(1, 5))
    def write_elsewhere(self, size: int) -> None:
        self.written += size

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        node = self.nodes[data.draw(st.integers(0, len(self.nodes) - 1))]
        missing = self.written - node.replayed
        if node.timeline == self.timeline and missing > 0:
            node.replayed += data.draw(st.sampled_from([missing, missing - 1]) | st.integers(0, missing))

    @rule()
    def replay_everything(self) -> None:
        for node in self.nodes:
            if node.timeline == self.timeline:
                node.replayed = max(node.replayed, self.written)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def follow_the_promoted_one(self, data: st.DataObject) -> None:
        node = self.nodes[data.draw(st.integers(0, len(self.nodes) - 1))]
        node.replayed = min([node.replayed, *self.forks[node.timeline - 1 :]])  # pg_rewind
        node.timeline = self.timeline

    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        """The primary dies and another node takes over; the others are on the old timeline still."""
        self.written = data.draw(st.integers(0 if self.position is None else self.position.lsn, self.written))
        self.forks.append(self.written)
        self.timeline += 1

    # --- what the library learns of it ----------------------------------------------------------------------------

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), age=st.floats(0, 3 * MAX_LAG))
    def look(self, data: st.DataObject, age: float) -> None:
        self.probe(data.draw(st.integers(0, len(self.nodes) - 1)), age)

    def probe(self, index: int, age: float) -> None:
        node = self.nodes[index]
        behind = max(self.written - node.replayed, 0)
        health = ReplicaHealth(lag_seconds=age if behind else 0.0, lag_bytes=behind, timeline=node.timeline)
        node.view = ReplicaView(health, node.replayed, local=node.local)

    @rule()
    def look_at_all(self) -> None:
        for index in range(len(self.nodes)):
            self.probe(index, 0.0)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), seconds=st.integers(0, 60))
    def fail(self, data: st.DataObject, seconds: int) -> None:
        node = self.nodes[data.draw(st.integers(0, len(self.nodes) - 1))]
        self.now += seconds
        before = node.view.health
        after = before.failed(self.now)
        assert after.ejected
        assert 1.0 <= after.probe_at - self.now <= 30.0
        if before.ejected and before.failures:
            assert after.failed(self.now).probe_at >= after.probe_at
        node.view = attrs.evolve(node.view, health=after)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def find_it_behind(self, data: st.DataObject) -> None:
        node = self.nodes[data.draw(st.integers(0, len(self.nodes) - 1))]
        node.view = attrs.evolve(node.view, may_ask=False)

    # --- what is asked of it --------------------------------------------------------------------------------------

    def choose(self, consistency: str, turn: int) -> ReadChoice:
        return choose_replica(
            consistency,  # type: ignore[arg-type]
            [node.view for node in self.nodes],
            turn=turn,
            position=self.position,
            max_lag=MAX_LAG,
            max_lag_bytes=MAX_LAG_BYTES,
        )

    def fit(self) -> set[int]:
        fit = {
            index
            for index, node in enumerate(self.nodes)
            if not node.view.health.ejected
            and node.view.health.lag_seconds <= MAX_LAG
            and node.view.health.lag_bytes <= MAX_LAG_BYTES
        }
        return {index for index in fit if self.nodes[index].local} or fit

    @rule()
    def read_the_primary(self) -> None:
        assert self.choose("strong", self.turn) == ReadChoice(None)

    @rule()
    def read_anywhere(self) -> None:
        """Each fit replica once in as many turns, and the primary only where there is none."""
        fit = self.fit()
        if not fit:
            assert self.choose("eventual", self.turn) == ReadChoice(None, degraded=bool(self.nodes))
            return
        chosen = [self.choose("eventual", self.turn + offset) for offset in range(len(fit))]
        self.turn += len(fit)
        assert sorted(choice.index for choice in chosen if choice.index is not None) == sorted(fit)
        assert not any(choice.degraded for choice in chosen)

    @rule()
    def read_this_session(self) -> None:
        choice = self.choose("session", self.turn)
        self.turn += 1
        fit = self.fit()
        views = {index: self.nodes[index].view for index in fit}
        position = self.position
        known = {
            index
            for index, view in views.items()
            if position is not None and view.replayed >= position.lsn and view.health.timeline >= position.timeline
        }
        if choice.index is None:
            assert choice.degraded == (bool(self.nodes) and not fit)
            assert not known
            for view in views.values():
                assert position is not None, "without a write of its own, a session may be read anywhere"
                assert view.health.timeline < position.timeline or not view.may_ask
            return
        assert choice.index in fit
        if position is None:
            return
        node = self.nodes[choice.index]
        # What the library believes without asking must be true.
        has_it = node.replayed >= position.lsn and node.timeline >= position.timeline
        assert has_it or choice.index not in known
        # Those that have to prove it take their turns too: the library would never learn that they can.
        worth = known | {
            index for index, view in views.items() if view.may_ask and view.health.timeline >= position.timeline
        }
        turns = range(self.turn, self.turn + len(worth))
        assert {self.choose("session", turn).index for turn in turns} == worth
        assert choice.index in known or node.view.may_ask

    @invariant()
    def a_view_is_never_ahead(self) -> None:
        for node in self.nodes:
            if node.view.health.timeline == node.timeline:
                assert node.view.replayed <= node.replayed


TestRouting = Routing.TestCase
TestRouting.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


REPORTS = st.lists(
    st.none() | st.builds(NodeReport, st.booleans(), st.integers(1, 4), st.integers(0, 100)), min_size=1, max_size=5
)


@given(reports=REPORTS, data=st.data())
def test_the_primary_is_the_one_the_last_promotion_made(reports: list[NodeReport | None], data: st.DataObject) -> None:
    current = data.draw(st.integers(0, len(reports) - 1))
    chosen = choose_primary(current, reports)
    primaries = {
        index: report.timeline for index, report in enumerate(reports) if report is not None and not report.in_recovery
    }
    if not primaries:
        assert chosen == current, "nobody else takes writes, so the one that did may come back"
        return
    assert primaries.get(chosen) == max(primaries.values())
    if primaries.get(current) == max(primaries.values()):
        assert chosen == current, "no change without a promotion"
    assert choose_primary(chosen, reports) == chosen


@given(failures=st.integers(1, 60))
def test_pauses_between_probes_double_up_to_half_a_minute(failures: int) -> None:
    health = ReplicaHealth()
    pauses = []
    for _ in range(failures):
        health = health.failed(100.0)
        pauses.append(health.probe_at - 100.0)
    assert pauses == [min(2.0**number, 30.0) for number in range(failures)]
