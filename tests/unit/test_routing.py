"""Which replica a read goes to."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from equitie_data.routing import ReplicaHealth, read_order

health = st.builds(ReplicaHealth, ejected=st.booleans(), lag_seconds=st.floats(0, 60))


@given(
    st.lists(health, max_size=6),
    st.integers(0, 10_000),
    st.sampled_from(["session", "eventual", "strong"]),
    st.booleans(),
)
def test_only_healthy_replicas_that_keep_up_are_chosen(
    replicas: list[ReplicaHealth], turn: int, consistency: str, wrote: bool
) -> None:
    order = read_order(consistency, replicas, turn=turn, wrote=wrote, max_lag=10.0)  # type: ignore[arg-type]
    assert len(set(order)) == len(order)
    usable = {i for i, replica in enumerate(replicas) if not replica.ejected and replica.lag_seconds <= 10.0}
    must_be_primary = consistency == "strong" or (consistency == "session" and wrote)
    assert set(order) == (set() if must_be_primary else usable)


@given(st.integers(1, 5), st.integers(0, 1_000))
def test_healthy_replicas_share_the_reads_evenly(count: int, start: int) -> None:
    replicas = [ReplicaHealth() for _ in range(count)]
    first = Counter(
        read_order("eventual", replicas, turn=turn, wrote=False, max_lag=1.0)[0]
        for turn in range(start, start + 10 * count)
    )
    assert set(first.values()) == {10}


def test_probe_pauses_double_up_to_thirty_seconds_and_a_good_probe_readmits() -> None:
    state, pauses = ReplicaHealth(), []
    for _ in range(7):
        state = state.failed(100.0)
        assert state.ejected
        pauses.append(state.probe_at - 100.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert state.probed(0.5) == ReplicaHealth(lag_seconds=0.5)
