"""What became of a transaction whose COMMIT was not answered: decisions only, no I/O.

A transaction id is evidence only within one *incarnation* of the server. After a promotion, and after a crash of
the same server, ids that were never flushed are given out again, and `pg_xact_status` then reports somebody
else's fate (measured; see docs/explanation/exactly-once.md).
"""

from __future__ import annotations

import enum
from typing import Literal, TypeAlias

import attrs

__all__ = ["Incarnation", "Outcome", "TransactionStatus", "judge"]

TransactionStatus: TypeAlias = Literal["committed", "aborted", "in progress", "in the future"]


class Outcome(enum.Enum):
    """What became of the transaction."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


@attrs.frozen
class Incarnation:
    """One unbroken life of a server's transaction ids.

    Attributes:
        system_identifier: Of the cluster; survives promotion.
        timeline: Changes with a promotion.
        started_at: When the postmaster started.
        statistics_reset_at: Changes with a crash restart, which leaves the postmaster's start as it was.
    """

    system_identifier: str
    timeline: str
    started_at: str
    statistics_reset_at: str


def judge(before: Incarnation, now: Incarnation, status: TransactionStatus | None) -> Outcome | None:
    """Return what became of a transaction; ``None`` where asking again may tell.

    Args:
        before: The incarnation it ran in.
        now: The incarnation its status was asked of, after its backend was fenced.
        status: What `pg_xact_status` said; ``None`` when it said nothing, because the id is too old.
    """
    if status is None:
        return Outcome.UNKNOWN
    if status == "in progress":
        return None  # the fence has not finished
    if before == now:
        return {"committed": Outcome.COMMITTED, "aborted": Outcome.ABORTED}.get(status)
    # Another incarnation: a reused id can look committed. An aborted one, or one that this incarnation has not got to,
    # did not survive.
    return Outcome.UNKNOWN if status == "committed" else Outcome.ABORTED
