"""Which replica a read goes to, and which node takes writes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from equitie_data.context import WalPosition
from equitie_data.routing import NodeReport, ReplicaHealth, ReplicaView, choose_primary, choose_replica

health = st.builds(
    ReplicaHealth,
    ejected=st.booleans(),
    lag_seconds=st.floats(0, 60),
    lag_bytes=st.integers(0, 1000),
    timeline=st.integers(1, 3),
)
views = st.lists(st.builds(ReplicaView, health, st.integers(0, 100), st.booleans()), max_size=6)
positions = st.none() | st.builds(WalPosition, st.integers(1, 3), st.integers(0, 100))
consistencies: Any = st.sampled_from(["session", "eventual", "strong"])


@given(consistencies, views, st.integers(0, 10_000), positions)
def test_a_chosen_replica_is_fit_and_shows_what_the_session_must_see(
    consistency: Any, replicas: list[ReplicaView], turn: int, position: WalPosition | None
) -> None:
    choice = choose_replica(consistency, replicas, turn=turn, position=position, max_lag=10.0, max_lag_bytes=500)
    fit = [r for r in replicas if not r.health.ejected and r.health.lag_seconds <= 10 and r.health.lag_bytes <= 500]
    if choice.index is None:
        assert choice.degraded == (consistency != "strong" and bool(replicas) and not fit)
        must_check = consistency == "session" and position is not None
        assert consistency == "strong" or not fit or must_check
        return
    chosen = replicas[choice.index]
    assert chosen in fit
    assert chosen.local or not any(replica.local for replica in fit)
    assert consistency != "strong"
    if consistency == "session" and position is not None:
        assert chosen.health.timeline >= position.timeline
        assert chosen.may_ask or chosen.replayed >= position.lsn


@given(st.integers(1, 5), st.integers(0, 1_000))
def test_healthy_replicas_share_the_reads_evenly(count: int, start: int) -> None:
    replicas = [ReplicaView(ReplicaHealth()) for _ in range(count)]
    first = Counter(
        choose_replica("eventual", replicas, turn=turn, position=None, max_lag=1.0, max_lag_bytes=1).index
        for turn in range(start, start + 10 * count)
    )
    assert set(first.values()) == {10}


def test_probe_pauses_double_up_to_thirty_seconds() -> None:
    state, pauses = ReplicaHealth(), []
    for _ in range(7):
        state = state.failed(100.0)
        assert state.ejected
        pauses.append(state.probe_at - 100.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


reports = st.lists(
    st.none() | st.builds(NodeReport, st.booleans(), st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=5
)


@given(reports, st.data())
def test_writes_move_only_to_a_node_that_was_promoted_past_the_current_one(
    found: list[NodeReport | None], data: st.DataObject
) -> None:
    current = data.draw(st.integers(0, len(found) - 1))
    chosen = choose_primary(current, found)
    if chosen != current:
        report, mine = found[chosen], found[current]
        assert report is not None
        assert not report.in_recovery
        assert mine is None or mine.in_recovery or report.timeline > mine.timeline
    else:
        mine = found[current]
        writable = [report for report in found if report is not None and not report.in_recovery]
        assert not writable or (mine is not None and not mine.in_recovery)
