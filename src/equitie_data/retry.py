"""Whether a failed attempt may be run again, and when: decisions only, no I/O.

A failure is judged by its SQLSTATE, by whether the connection survived, and by the phase the attempt had reached,
never by its exception class: psycopg's `OperationalError` holds statement timeouts and wrong passwords as well
as lost connections, while a read-only failover arrives as `InternalError`.
"""

from __future__ import annotations

import enum
from typing import Final, Literal

import attrs

__all__ = ["UNTIL_FRESH", "Action", "Decision", "Failure", "Phase", "decide"]

UNTIL_FRESH = 200
"""Attempts that end with a new connection, since each takes one that was in the pool away: more than a pool holds."""


class Phase(enum.Enum):
    """How far an attempt had come when it failed."""

    CHECKOUT = "checkout"
    """No connection yet: nothing was sent."""
    STATEMENT = "statement"
    """Statements were sent, COMMIT was not."""
    COMMIT = "commit"
    """COMMIT was sent, alone or in the same trip as the statement; its reply did not arrive."""


class Action(enum.Enum):
    """What to do about a failure."""

    RAISE = "raise"
    RETRY = "retry"
    """Again, after a pause."""
    FAIL_OVER = "fail over"
    """Again, at once, on a fresh connection; a read takes the next node."""
    PRIMARY = "primary"
    """Again, at once, on the primary."""
    RESOLVE = "resolve"
    """First find out whether the transaction committed."""


@attrs.frozen(kw_only=True)
class Failure:
    """What is known of a failed attempt.

    Attributes:
        kind: Read or write.
        phase: How far it had come.
        sqlstate: The server's code; ``None`` when the server said nothing.
        connection_lost: Whether the connection is unusable.
        on_replica: Whether it ran on a replica.
        stale_plan: Whether the server refused a cached plan (0A000 with that message).
        in_prologue: Whether the prologue itself failed, so that nothing of the operation ran.
        on_fresh_connection: Whether nobody had used the connection before this call.
    """

    kind: Literal["read", "write"]
    phase: Phase
    sqlstate: str | None = None
    connection_lost: bool = False
    on_replica: bool = False
    stale_plan: bool = False
    in_prologue: bool = False
    on_fresh_connection: bool = False


@attrs.frozen
class Decision:
    """A verdict.

    Attributes:
        action: What to do.
        reason: Why, for events and messages.
        discard: Whether the connection must not go back to the pool.
        limit: The most attempts in all for this reason; ``None`` leaves it to the policy.
        wrong_role: The node is not what it was taken for (a primary that became a standby).
        until_deadline: Only the call's deadline ends the attempts: something is on its way back.
        unprepared: The next attempt must use no prepared statement; other connections hold the same stale ones.
    """

    action: Action
    reason: str
    discard: bool = False
    limit: int | None = None
    wrong_role: bool = False
    until_deadline: bool = False
    unprepared: bool = False


_CONNECTION_STATES: Final = frozenset({"08000", "08001", "08003", "08006", "57P01", "57P02", "57P05"})
_BUSY_STATES: Final = {"57P03": "the server is starting or stopping", "53300": "the server has no free connection"}
_CONFLICT_STATES: Final = {"40001": "serialization failure", "40P01": "deadlock"}
_STALE_STATEMENT_STATES: Final = frozenset({"26000", "42P05"})
_AMBIGUOUS_STATES: Final = frozenset({"40003", "08007"})


_READ_ONLY_PRIMARY: Final = Decision(
    Action.RETRY, "the primary has become read-only", discard=True, wrong_role=True, until_deadline=True
)


def decide(failure: Failure) -> Decision:
    """Judge a failure.

    The table is PostgreSQL's appendix "Error Codes" read for one question: is it certain that the attempt left
    nothing behind, and could another one succeed?
    """
    state = failure.sqlstate
    if state in _CONFLICT_STATES:
        # Definite aborts, even at COMMIT. Repeating one on the same replica only raises its lag.
        if failure.on_replica:
            return Decision(Action.PRIMARY, f"{_CONFLICT_STATES[state]} on a replica", until_deadline=True)
        return Decision(Action.RETRY, _CONFLICT_STATES[state])
    if failure.in_prologue and state == "42501":
        if failure.on_fresh_connection:
            return Decision(Action.RAISE, "the login may not act for anybody", discard=True)
        # An earlier operation's SET ROLE outlived its transaction, maybe on several connections: the first that is new
        # tells whether the login itself is at fault.
        return Decision(Action.FAIL_OVER, "the connection's role was changed", discard=True, limit=UNTIL_FRESH)
    if failure.phase is Phase.COMMIT and failure.kind == "write":
        return _decide_commit(failure)
    if state in _AMBIGUOUS_STATES:
        action = Action.FAIL_OVER if failure.kind == "read" else Action.RESOLVE
        return Decision(action, "statement completion unknown", discard=True)
    if state in _BUSY_STATES:
        return Decision(Action.RETRY, _BUSY_STATES[state], discard=True, until_deadline=True)
    class_08 = state is not None and state.startswith("08")  # a pooler's words for a server that went away
    if state in _CONNECTION_STATES or (failure.connection_lost and (state is None or class_08)):
        return Decision(Action.FAIL_OVER, "connection lost", discard=True, until_deadline=True)
    if failure.stale_plan or state in _STALE_STATEMENT_STATES:
        return Decision(Action.FAIL_OVER, "stale prepared statement", discard=True, limit=2, unprepared=True)
    if state == "25006" and failure.kind == "write":
        return _READ_ONLY_PRIMARY
    return Decision(Action.RAISE, "not transient", discard=failure.connection_lost)


def _decide_commit(failure: Failure) -> Decision:
    if failure.sqlstate is None or failure.sqlstate in _CONNECTION_STATES | _AMBIGUOUS_STATES:
        return Decision(Action.RESOLVE, "the reply to COMMIT was lost", discard=True)
    if failure.connection_lost:
        return Decision(Action.RESOLVE, "the connection was lost during COMMIT", discard=True)
    if failure.stale_plan or failure.sqlstate in _STALE_STATEMENT_STATES:
        return Decision(Action.FAIL_OVER, "stale prepared statement", discard=True, limit=2, unprepared=True)
    if failure.sqlstate == "25006":
        return _READ_ONLY_PRIMARY
    return Decision(Action.RAISE, "the server refused the transaction")
