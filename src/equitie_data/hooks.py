"""What the pool tells its subscribers: frozen events, delivered to every `Hook`.

Audit, monitor, logging and tracing are all subscribers. An event never holds a parameter value. An error a hook
raises is counted and dropped: watching a query must not break it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from equitie_data.context import Actor

__all__ = [
    "CommitResolved",
    "Event",
    "Hook",
    "Hooks",
    "Leaked",
    "NodeEjected",
    "NodeReadmitted",
    "OperationEnded",
    "OperationStarted",
    "PrimaryChanged",
    "Retried",
    "StatementEnded",
]

Kind: TypeAlias = Literal["read", "write"]
NodeRole: TypeAlias = Literal["primary", "replica"]


@attrs.frozen(kw_only=True)
class OperationStarted:
    """A call of `execute_read` or `execute_write` has chosen its node and got a connection.

    Attributes:
        name: What the caller named it.
        kind: Read or write.
        node: The node it goes to.
        node_role: The node's role.
        attempt: 1 for the first.
        checkout_seconds: How long it waited for the connection.
        actor: Who acts.
    """

    name: str | None
    kind: Kind
    node: str
    node_role: NodeRole
    attempt: int
    checkout_seconds: float
    actor: Actor


@attrs.frozen(kw_only=True)
class StatementEnded:
    """One statement has run.

    Attributes:
        sql: The statement as the caller wrote it, with placeholders; never its parameters.
        kind: Read or write, by the call it ran in.
        name: What the caller named the call.
        node: The node it ran on.
        node_role: The node's role.
        seconds: From the statement's start to its result, without the wait for a connection.
        rows: Rows returned or changed; ``None`` when it failed.
        sqlstate: The error's code, if it failed on the server.
        error: The error's class name, if it failed.
        actor: Who acted.
    """

    sql: str
    kind: Kind
    name: str | None
    node: str
    node_role: NodeRole
    seconds: float
    rows: int | None
    sqlstate: str | None
    error: str | None
    actor: Actor


@attrs.frozen(kw_only=True)
class OperationEnded:
    """A call of `execute_read` or `execute_write` is over, retries included.

    Attributes:
        name: What the caller named it.
        kind: Read or write.
        node: The node of the last attempt; ``None`` when none was reached.
        attempts: How many attempts it took.
        seconds: The whole call.
        sqlstate: Of the error it ended with.
        error: Class name of the error it ended with.
        actor: Who acted.
    """

    name: str | None
    kind: Kind
    node: str | None
    attempts: int
    seconds: float
    sqlstate: str | None
    error: str | None
    actor: Actor


@attrs.frozen(kw_only=True)
class Retried:
    """An attempt failed and the call goes on.

    Attributes:
        name: What the caller named it.
        kind: Read or write.
        node: Where the attempt failed.
        attempt: The attempt that failed, from 1.
        wait_seconds: The pause before the next one.
        sqlstate: The failure's code, if the server gave one.
        reason: Why it may be retried.
    """

    name: str | None
    kind: Kind
    node: str | None
    attempt: int
    wait_seconds: float
    sqlstate: str | None
    reason: str


@attrs.frozen(kw_only=True)
class CommitResolved:
    """The reply to a COMMIT was lost, and what became of it was established.

    Attributes:
        name: What the caller named it.
        node: Where the transaction ran.
        outcome: What became of it.
        seconds: How long finding out took.
    """

    name: str | None
    node: str
    outcome: Literal["committed", "aborted", "unknown"]
    seconds: float


@attrs.frozen(kw_only=True)
class NodeEjected:
    """A node gets no more reads until a probe finds it well.

    Attributes:
        node: Which.
        reason: Why.
    """

    node: str
    reason: str


@attrs.frozen(kw_only=True)
class NodeReadmitted:
    """An ejected node takes reads again.

    Attributes:
        node: Which.
    """

    node: str


@attrs.frozen(kw_only=True)
class PrimaryChanged:
    """Another node takes the writes now.

    Attributes:
        before: Which node did.
        now: Which node does.
    """

    before: str
    now: str


@attrs.frozen(kw_only=True)
class Leaked:
    """A connection has been held for longer than `Settings.leak_threshold`.

    Attributes:
        node: Whose connection.
        name: What the caller named the call.
        thread: The holder's thread.
        seconds: For how long.
        site: Where the holder is now, as ``file:line``.
    """

    node: str
    name: str | None
    thread: str
    seconds: float
    site: str


Event: TypeAlias = (
    OperationStarted
    | StatementEnded
    | OperationEnded
    | Retried
    | CommitResolved
    | NodeEjected
    | NodeReadmitted
    | PrimaryChanged
    | Leaked
)


_EVENT_TYPES: Final = get_args(Event)


@runtime_checkable
class Hook(Protocol):
    """A subscriber.

    One that has an attribute ``event_types``, a collection of event classes, hears of those alone; the others are not
    even built if nobody wants them.
    """

    def on_event(self, event: Any, /) -> None:
        """Take one event; called in the thread the event happened in, so be quick and do no I/O."""


class Hooks:
    """The subscribers of one database.

    Attributes:
        active: Whether there are any; without one the quiet path builds no event.
        errors: How often a subscriber raised.
    """

    __slots__ = ("_by_type", "_hooks", "active", "errors")

    def __init__(self, hooks: Iterable[Hook] = ()) -> None:
        self.errors = 0
        self._set(tuple(hooks))

    def _set(self, hooks: tuple[Hook, ...]) -> None:
        self._hooks = hooks
        self.active = bool(hooks)
        self._by_type = {
            kind: tuple(hook for hook in hooks if kind in getattr(hook, "event_types", _EVENT_TYPES))
            for kind in _EVENT_TYPES
        }

    def add(self, hook: Hook) -> None:
        """Subscribe."""
        self._set((*self._hooks, hook))

    def remove(self, hook: Hook) -> None:
        """Unsubscribe; a hook that is not subscribed is ignored."""
        self._set(tuple(each for each in self._hooks if each is not hook))

    def want(self, kind: type) -> bool:
        """Whether anybody hears of events of this class."""
        return bool(self._by_type[kind])

    def emit(self, event: Event) -> None:
        """Deliver to every hook; what a hook raises is counted in `errors` and dropped."""
        for hook in self._by_type[type(event)]:
            try:
                hook.on_event(event)
            except Exception:  # noqa: BLE001 - a watcher must never break what it watches
                self.errors += 1
