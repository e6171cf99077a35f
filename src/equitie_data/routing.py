"""Which node an operation goes to: decisions only, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Consistency", "ReplicaHealth", "read_order"]

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
        lag_seconds: How far its replay was behind when last probed.
    """

    ejected: bool = False
    failures: int = 0
    probe_at: float = 0.0
    lag_seconds: float = 0.0

    def failed(self, now: float) -> ReplicaHealth:
        """Return its health after a failure: ejected, to be probed after a pause that doubles up to 30 s."""
        pause = min(_FIRST_PAUSE * 2**self.failures, _LONGEST_PAUSE)
        return attrs.evolve(self, ejected=True, failures=min(self.failures + 1, 16), probe_at=now + pause)

    def probed(self, lag_seconds: float) -> ReplicaHealth:
        """Return its health after a good probe."""
        return ReplicaHealth(lag_seconds=lag_seconds)


def read_order(
    consistency: Consistency,
    replicas: Sequence[ReplicaHealth],
    *,
    turn: int,
    wrote: bool,
    max_lag: float,
) -> list[int]:
    """Return the replicas a read may use, first choice first; empty means the primary.

    Args:
        consistency: What the caller asked for.
        replicas: The health of each replica.
        turn: The round-robin turn; it only chooses where the round starts.
        wrote: Whether this context has written and must see it.
        max_lag: The lag, in seconds, past which a replica is passed over.
    """
    if consistency == "strong" or (consistency == "session" and wrote):
        return []
    count = len(replicas)
    return [
        index
        for index in ((turn + offset) % count for offset in range(count))
        if not replicas[index].ejected and replicas[index].lag_seconds <= max_lag
    ]
