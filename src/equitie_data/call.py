"""One call of `execute_read` or `execute_write` over all its attempts: its state, its verdicts, its events.

No I/O: the blocking executor in `pool` and the asyncio one share it.
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq import TransactionStatus

from equitie_data.errors import (
    CommitOutcomeUnknown,
    ConfigurationError,
    EquitieDataError,
    OperationEndedTransactionError,
    ReadOnlyError,
    SwallowedErrorError,
    TransactionError,
    UnavailableError,
)
from equitie_data.hooks import OperationEnded, OperationStarted, Retried, StatementEnded
from equitie_data.retry import Action, Decision, Failure, Phase, decide

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection
    from psycopg.abc import Params

    from equitie_data.context import Actor
    from equitie_data.hooks import Hooks, Kind
    from equitie_data.nodes import Node
    from equitie_data.routing import Consistency
    from equitie_data.settings import Settings
    from equitie_data.wire import PrologueCarrier, StatementObserver

__all__ = ["Call", "WriteTransaction", "check_transaction_open"]


class Call:
    """What was asked for, how far the current attempt has come, and what its failure means."""

    __slots__ = (
        "actor",
        "attempt",
        "connection",
        "consistency",
        "deadline",
        "decision",
        "kind",
        "name",
        "node",
        "operation",
        "params",
        "phase",
        "retry",
        "row_factory",
        "settings",
        "started",
        "statement_timeout",
        "use_primary",
    )

    def __init__(
        self,
        settings: Settings,
        actor: Actor,
        kind: Kind,
        operation: Any,
        params: Params | None,
        name: str | None,
        consistency: Consistency,
        timeout: float | None,
        row_factory: Any,
        retry: bool,
    ) -> None:
        if params is not None and callable(operation):
            raise ConfigurationError("params belong to SQL: a callable takes its own, for example through a lambda.")
        self.settings = settings
        self.actor = actor
        self.kind: Kind = kind
        self.operation = operation
        self.params = params
        self.name = name
        self.consistency: Consistency = consistency
        self.row_factory = row_factory
        self.retry = retry
        self.started = time.monotonic()
        self.deadline = self.started + (settings.call_timeout if timeout is None else timeout)
        # An explicit timeout bounds the statement as well; without a limit, neither is bounded.
        self.statement_timeout = None if timeout is None else (0.0 if math.isinf(timeout) else timeout)
        self.attempt = 1
        self.phase = Phase.CHECKOUT
        self.node: Node | None = None
        self.connection: PrologueCarrier | None = None
        self.decision: Decision | None = None
        self.use_primary = False

    # --- verdicts -------------------------------------------------------------------------------------------------

    def judge(self, error: psycopg.Error) -> None:
        """Decide on a failure, while the connection still shows how it ended."""
        connection, node = self.connection, self.node
        on_replica = node is not None and node.role == "replica"
        if connection is None:
            # No connection was had: a replica is passed over, the primary was waited for already.
            passed_over = on_replica and isinstance(error, UnavailableError)
            action = Action.FAIL_OVER if passed_over else Action.RAISE
            self.decision = Decision(action, "no connection")
            return
        status = connection.pgconn.transaction_status
        if isinstance(error, EquitieDataError) or status == TransactionStatus.INTRANS:
            self.decision = Decision(Action.RAISE, "not an error of this transaction")
            return
        self.decision = decide(
            Failure(
                kind=self.kind,
                phase=self.phase,
                sqlstate=error.sqlstate,
                connection_lost=status == TransactionStatus.UNKNOWN,
                on_replica=on_replica,
                stale_plan=error.sqlstate == "0A000" and "cached plan" in str(error),
                in_prologue=connection.prologue_failed,
            )
        )
        if self.decision.action is Action.PRIMARY:
            self.use_primary = True

    @property
    def ejects(self) -> str | None:
        """Why the replica of the failed attempt must get no more reads; ``None`` if it may."""
        if self.decision is None or self.node is None or self.node.role == "primary":
            return None
        lost = self.decision.action is Action.FAIL_OVER and not self.decision.unprepared
        return self.decision.reason if lost else None

    def may_go_on(self, error: BaseException) -> bool:
        """Whether another attempt is allowed at all; tenacity asks after every failure."""
        return (
            self.retry
            and isinstance(error, psycopg.Error)
            and self.decision is not None
            and self.decision.action not in (Action.RAISE, Action.RESOLVE)
        )

    def exhausted(self, attempts: int) -> bool:
        """Whether so many attempts were enough, or the deadline has passed."""
        decision = self.decision
        if decision is None or time.monotonic() >= self.deadline:
            return True
        limit = decision.limit
        if limit is None:
            limit = self.settings.read_attempts if self.kind == "read" else self.settings.write_attempts
            if decision.action is Action.FAIL_OVER:
                limit += len(self.settings.replicas)  # every node may fail once without using up the retries
        return attempts >= limit

    def pause(self, attempts: int) -> float:
        """Return the seconds to wait: full jitter, or none where the next attempt goes elsewhere anyway."""
        decision = self.decision
        elsewhere = decision is not None and decision.action is not Action.RETRY
        if elsewhere and attempts <= 1 + len(self.settings.replicas):
            return 0.0
        longest = min(self.settings.retry_pause * 2 ** (attempts - 1), self.settings.retry_pause_limit)
        return min(random.uniform(0, longest), max(self.deadline - time.monotonic(), 0.0))  # noqa: S311 - jitter

    def translated(self, error: psycopg.Error) -> Exception:
        """Turn what the library has to say about an error into one of its own; all others stay as they are."""
        if isinstance(error, EquitieDataError):
            return error
        if error.sqlstate == "25006" and self.kind == "read":
            return ReadOnlyError("A read tried to write and the server refused: use execute_write for it.")
        if error.sqlstate == "42501" and self.connection is not None and self.connection.prologue_failed:
            return ConfigurationError(
                "The login role may not act for anybody: let the owner run `python -m equitie_data.migrate grant ROLE`."
            )
        node = "the primary" if self.node is None else f"{self.node.role} {self.node.name}"
        action = Action.RAISE if self.decision is None else self.decision.action
        reason = "" if self.decision is None else self.decision.reason
        if action is Action.RESOLVE:
            return CommitOutcomeUnknown(
                f"The connection to {node} was lost while it committed, so the write may or may not be there: look "
                "for what it would have written before you run it again."
            )
        if action is Action.FAIL_OVER:
            times = f"{self.attempt} times" if self.attempt > 1 else "once"
            return UnavailableError(
                f"The call to {node} failed {times}, at last because of this: {reason}. Nothing was committed; "
                "try again."
            )
        return error

    # --- events ---------------------------------------------------------------------------------------------------

    def start(self, hooks: Hooks, node: Node, waited: float) -> StatementObserver:
        """Announce an attempt and return the observer of its statements."""
        kind, name, actor, node_name, node_role = self.kind, self.name, self.actor, node.name, node.role
        hooks.emit(
            OperationStarted(
                name=name,
                kind=kind,
                node=node_name,
                node_role=node_role,
                attempt=self.attempt,
                checkout_seconds=waited,
                actor=actor,
            )
        )

        def observe(sql: str, seconds: float, rows: int | None, error: BaseException | None) -> None:
            hooks.emit(
                StatementEnded(
                    sql=sql,
                    kind=kind,
                    name=name,
                    node=node_name,
                    node_role=node_role,
                    seconds=seconds,
                    rows=rows,
                    sqlstate=getattr(error, "sqlstate", None),
                    error=None if error is None else type(error).__name__,
                    actor=actor,
                )
            )

        return observe

    def end(self, hooks: Hooks, error: BaseException | None) -> None:
        """Announce the end of the call."""
        hooks.emit(
            OperationEnded(
                name=self.name,
                kind=self.kind,
                node=None if self.node is None else self.node.name,
                attempts=self.attempt,
                seconds=time.monotonic() - self.started,
                sqlstate=getattr(error, "sqlstate", None),
                error=None if error is None else type(error).__name__,
                actor=self.actor,
            )
        )

    def again(self, hooks: Hooks, error: BaseException | None, pause: float) -> None:
        """Announce another attempt."""
        hooks.emit(
            Retried(
                name=self.name,
                kind=self.kind,
                node=None if self.node is None else self.node.name,
                attempt=self.attempt,
                wait_seconds=pause,
                sqlstate=getattr(error, "sqlstate", None),
                reason="" if self.decision is None else self.decision.reason,
            )
        )


class WriteTransaction:
    """The write in progress, as subscribers see it; implements `context.Transaction`."""

    __slots__ = ("actions", "connection", "local")

    def __init__(self, connection: Connection[Any]) -> None:
        self.connection = connection
        self.local: dict[Any, Any] = {}
        self.actions: list[Callable[[Connection[Any]], None]] = []

    def before_commit(self, action: Callable[[Connection[Any]], None]) -> None:
        """Run ``action`` on the same connection just before COMMIT."""
        self.actions.append(action)


def check_transaction_open(connection: PrologueCarrier) -> None:
    """Make sure that an operation left its transaction as it must be: open and whole.

    Raises:
        SwallowedErrorError: A statement failed and the operation went on.
        OperationEndedTransactionError: The operation ran COMMIT or ROLLBACK.
        TransactionError: A statement is still running.
        psycopg.OperationalError: The connection is gone.
    """
    status = connection.pgconn.transaction_status
    if connection.pending is not None or status == TransactionStatus.INTRANS:
        return
    if status == TransactionStatus.INERROR:
        raise SwallowedErrorError(
            "The operation caught a database error and went on: the transaction was rolled back and nothing was "
            "written; let the error out, or run the risky part in `with conn.transaction():`."
        )
    if status == TransactionStatus.IDLE:
        raise OperationEndedTransactionError(
            "The operation ran COMMIT or ROLLBACK itself: the library ends the transaction; what the operation "
            "committed is committed."
        )
    if status == TransactionStatus.UNKNOWN:
        raise psycopg.OperationalError("the connection was lost during the operation")
    raise TransactionError(
        "The operation returned while a statement was still running (an unfinished COPY or stream): the transaction "
        "was rolled back; finish or close it first."
    )
