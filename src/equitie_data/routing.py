"""Which node an operation goes to: decisions only, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from equitie_data.context import WalPosition

__all__ = [
    "Consistency",
    "NodeReport",
    "ReadChoice",
    "ReplicaHealth",
    "ReplicaView",
    "choose_primary",
    "choose_replica",
]

Consistency: TypeAlias = Literal["session", "eventual", "strong"]

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0


@attrs.frozen
class ReplicaHealth:
    """What is known of a replica; a new value for every change, so that readers need no lock.

    Attributes:
        ejected: Whether it gets no reads.
        failures: Failed probes and reads since it was last well.
        probe_at: The monotonic time, in seconds, from which it may be probed again.
        lag_seconds: How old the last transaction it replayed was when probed; 0 when it had replayed everything.
        lag_bytes: How much write-ahead log it was behind the primary.
        timeline: The timeline it follows, as far as it says; 0 when not known.
    """

    ejected: bool = False
    failures: int = 0
    probe_at: float = 0.0
    lag_seconds: float = 0.0
    lag_bytes: int = 0
    timeline: int = 0

    def failed(self, now: float) -> ReplicaHealth:
        """Return its health after a failure: ejected, to be probed after a pause that doubles up to 30 s."""
        pause = min(_FIRST_PAUSE * 2**self.failures, _LONGEST_PAUSE)
        return attrs.evolve(self, ejected=True, failures=min(self.failures + 1, 16), probe_at=now + pause)


@attrs.frozen
class ReplicaView:
    """A replica as the router sees it.

    Attributes:
        health: What is known of it.
        replayed: The last offset it was seen to have replayed, in bytes; it can only be further by now.
        may_ask: Whether it is worth asking how far it is: not right after it was found behind.
        local: Whether it stands in this process's region.
    """

    health: ReplicaHealth
    replayed: int = 0
    may_ask: bool = True
    local: bool = True


@attrs.frozen
class ReadChoice:
    """Where a read goes.

    Attributes:
        index: Of the replica; ``None`` for the primary.
        degraded: Whether the primary stands in because no replica is fit.
    """

    index: int | None
    degraded: bool = False


def choose_replica(
    consistency: Consistency,
    replicas: Sequence[ReplicaView],
    *,
    turn: int,
    position: WalPosition | None,
    max_lag: float,
    max_lag_bytes: int,
) -> ReadChoice:
    """Choose the node of a read: round robin over the fit replicas, this region's first.

    A replica that is not known to have replayed what the session must see may be chosen too: it has to prove it.

    Args:
        consistency: What the caller asked for.
        replicas: Every replica.
        turn: The round-robin turn.
        position: What the session must see.
        max_lag: The lag, in seconds, past which a replica is passed over.
        max_lag_bytes: The lag, in bytes, past which a replica is passed over.
    """
    if consistency == "strong" or not replicas:
        return ReadChoice(None)
    fit = [
        index
        for index, replica in enumerate(replicas)
        if not replica.health.ejected
        and replica.health.lag_seconds <= max_lag
        and replica.health.lag_bytes <= max_lag_bytes
    ]
    fit = [index for index in fit if replicas[index].local] or fit
    if not fit:
        return ReadChoice(None, degraded=True)
    if consistency == "eventual" or position is None:
        return ReadChoice(fit[turn % len(fit)])
    # The offset proves something only on the session's timeline or a later one.
    candidates = [index for index in fit if replicas[index].health.timeline >= position.timeline]
    caught_up = {index for index in candidates if replicas[index].replayed >= position.lsn}
    # Those of which it is not known take their turns too, and are asked: knowledge would otherwise never come.
    worth = [index for index in candidates if index in caught_up or replicas[index].may_ask]
    if not worth:
        return ReadChoice(None)
    return ReadChoice(worth[turn % len(worth)])


@attrs.frozen
class NodeReport:
    """What a node said of itself when probed.

    Attributes:
        in_recovery: Whether it is a standby.
        timeline: The timeline it is on, or follows.
        position: The offset it has written, or replayed, in bytes.
        replay_age: The age of the last transaction it replayed, in seconds.
        system: The cluster's identifier.
    """

    in_recovery: bool
    timeline: int
    position: int
    replay_age: float = 0.0
    system: int = 0


def choose_primary(current: int, reports: Iterable[NodeReport | None]) -> int:
    """Choose the node that takes writes: the one out of recovery on the highest timeline.

    The current one stays unless another is ahead of it by a promotion: a node that merely does not answer may come
    back, and one that was promoted by mistake on the same timeline cannot exist.

    Args:
        current: The index of the node that is taken for the primary.
        reports: Every node's report, ``None`` where it did not answer.
    """
    known = list(reports)
    best, mine = current, known[current]
    timeline = mine.timeline if mine is not None and not mine.in_recovery else -1
    for index, report in enumerate(known):
        if report is not None and not report.in_recovery and report.timeline > timeline:
            best, timeline = index, report.timeline
    return best
