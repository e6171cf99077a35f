"""One call of `execute_read` or `execute_write` over all its attempts: its state, its verdicts, its events.

No I/O: the blocking executor in `pool` and the asyncio one share it.
"""

from __future__ import annotations

import math
import random
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import uuid4

import psycopg
from psycopg.pq import TransactionStatus

from equitie_data.context import WalPosition, position_in, remember_position
from equitie_data.errors import (
    CheckoutTimeoutError,
    CommitOutcomeUnknown,
    ConfigurationError,
    EquitieDataError,
    ReadOnlyError,
    ResultLostError,
    UnavailableError,
)
from equitie_data.hooks import CommitResolved, OperationEnded, OperationStarted, Retried, StatementEnded
from equitie_data.prologue import IdempotencyClaim, Prologue, prologue_for
from equitie_data.resolve import Evidence
from equitie_data.results import NotStorable, dumps, loads
from equitie_data.retry import Action, Decision, Failure, Phase, decide

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.abc import Params

    from equitie_data.context import Actor
    from equitie_data.hooks import Hooks, Kind
    from equitie_data.nodes import Node
    from equitie_data.routing import Consistency
    from equitie_data.settings import Settings
    from equitie_data.wire import PrologueCarrier, StatementObserver

__all__ = ["Call", "call_variable"]

_KEY_LIMIT: Final = 255  # characters
_GRACE: Final = 2.0  # seconds a client waits beyond the server's own time limit
_SUSPICIOUS_AFTER: Final = 1.0  # seconds of silence after which a replica is probed
_ONE_TRIP_FROM: Final = 0.0002  # seconds a trip must take for a write to be worth a marker instead of a second trip

call_variable: ContextVar[Call | None] = ContextVar("equitie_data.call", default=None)


class Call:
    """What was asked for, how far the current attempt has come, and what its failure means."""

    # What most calls never change is set on the class: a call is made for every statement.
    attempt = 1
    backend_pid: int | None = None
    claim: IdempotencyClaim | None = None
    committed = False
    connection: PrologueCarrier | None = None
    decision: Decision | None = None
    evidence: Evidence | None = None
    in_doubt = False
    node: Node | None = None
    phase = Phase.CHECKOUT
    position: WalPosition | None = None
    result: Any = None
    suspect: Callable[[Node], None] | None = None
    """Whom to tell of a replica that is silent."""
    suspected = False
    use_primary = False
    wanted: WalPosition | None = None

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
        idempotency_key: str | None = None,
    ) -> None:
        if idempotency_key is not None and not (
            isinstance(idempotency_key, str)
            and 0 < len(idempotency_key) <= _KEY_LIMIT
            and "\x00" not in idempotency_key
        ):
            raise ConfigurationError(
                "idempotency_key must be text of 1 to 255 characters: name the write by its request."
            )
        if idempotency_key is not None and idempotency_key.startswith("auto:"):
            raise ConfigurationError('idempotency_key must not begin with "auto:": the library names its own so.')
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
        outer = call_variable.get()
        if outer is not None:
            # A call inside an operation has no more time than the operation.
            self.deadline = min(self.deadline, outer.deadline)
        self.idempotency_key = idempotency_key
        # An explicit timeout bounds the statement as well; without a limit, neither is bounded.
        self.statement_timeout = None if timeout is None else (0.0 if math.isinf(timeout) else timeout)
        if outer is not None and outer.statement_timeout:
            own = settings.statement_timeout if self.statement_timeout is None else self.statement_timeout
            left = max(outer.deadline - self.started, 0.001)
            self.statement_timeout = min(own, left) if own else left

    def begin_attempt(self) -> None:
        """Forget what the attempt before had reached."""
        self.phase, self.suspected = Phase.CHECKOUT, False
        self.connection = self.evidence = self.backend_pid = self.position = self.wanted = None

    # --- the transaction ------------------------------------------------------------------------------------------

    def one_trip(self, node: Node) -> bool:
        """Whether a statement and its commit go in one trip.

        A read always does. A write in one trip has no transaction id to ask about when its reply is lost, so it
        leaves a marker, which costs more than a second trip where trips are short; and its result cannot be kept.
        """
        if callable(self.operation):
            return False
        if self.kind == "read":
            return True
        plain = self.idempotency_key is None and self.settings.default_actor is None
        return plain and node.round_trip > _ONE_TRIP_FROM

    @property
    def needs_no_prologue(self) -> bool:
        """Whether a read of the default actor has nothing to set and nothing to ask."""
        return (
            self.settings.service_role is None
            and self.settings.pooler != "transaction"
            and self.statement_timeout is None
            and self.position is None
        )

    def prologue(self, connection: PrologueCarrier, *, one_trip: bool) -> Prologue:
        """Return what this attempt's transaction begins with."""
        timeout, idle_timeout = self.statement_timeout, None
        if self.settings.pooler == "transaction":
            # What start-up options do elsewhere has to be said in every transaction.
            timeout = self.settings.statement_timeout if timeout is None else timeout
            idle_timeout = self.settings.idle_in_transaction_timeout
        if self.kind == "read":
            return prologue_for(
                self.actor,
                "read",
                statement_timeout=timeout,
                idle_timeout=idle_timeout,
                service_role=self.settings.service_role,
                position=None if self.position is None else self.position.lsn,
            )
        if self.claim is None and (self.idempotency_key is not None or one_trip):
            key = self.idempotency_key or f"auto:{uuid4().hex}"
            claimant = self.actor.user_text or "service"
            self.claim = IdempotencyClaim(key, claimant, self.name)
        facts: tuple[str, ...] = ()
        if not one_trip:
            known = connection.incarnation is not None and self.settings.pooler != "transaction"
            facts = ("xid",) if known else ("xid", "incarnation")
            if not known:
                connection.incarnation = None
        return prologue_for(
            self.actor,
            "write",
            statement_timeout=timeout,
            idle_timeout=idle_timeout,
            service_role=self.settings.service_role,
            claim=self.claim,
            facts=facts,
        )

    def secure_evidence(self, connection: PrologueCarrier) -> None:
        """Take down, before COMMIT is sent, what a lost reply could be resolved by."""
        if connection.incarnation is None:
            connection.read_incarnation()
        xid, pid = connection.opening_value(b"xid"), connection.opening_value(b"pid")
        if xid is not None and pid is not None and connection.incarnation is not None:
            self.evidence = Evidence(xid, int(pid), connection.incarnation)

    def note_claim(self, connection: PrologueCarrier, error: psycopg.Error | None = None) -> None:
        """Note that this attempt was given the key, if it was: then no earlier attempt has committed or can."""
        claimed = connection.opening is not None or (
            error is not None and error.sqlstate is not None and not connection.prologue_failed
        )
        if self.claim is not None and claimed:
            self.in_doubt = False

    def kept(self) -> tuple[str, str | None] | None:
        """Return the key this write was given and its result as JSON, if it can be written so."""
        if self.idempotency_key is None:
            return None
        try:
            return self.idempotency_key, dumps(self.result)
        except NotStorable:
            return self.idempotency_key, None

    def first_outcome(self, row: tuple[str | None, Any] | None) -> Any:
        """Return what the first run of an idempotent write returned.

        Raises:
            ResultLostError: That could not be kept.
        """
        if row is not None and row[0] is not None:
            return loads(row[0])
        if self.idempotency_key is None:
            raise ResultLostError(
                "The write is committed, but the connection was lost before its result arrived: do not run it again; "
                "with an idempotency_key the result would have been kept."
            )
        raise ResultLostError(
            "The write with this idempotency key is committed already, but what it returned could not be kept: let "
            "operations return plain values."
        )

    def note_position(self, position: WalPosition | None) -> None:
        """Have this context's reads see the write."""
        if position is not None:
            remember_position(position)

    def must_see(self, system: int) -> WalPosition | None:
        """Return the place in a cluster's log up to which this read must see everything."""
        return position_in(system) if self.consistency == "session" else None

    def quiet(self, seconds: float) -> None:
        """Hear that the server has been silent for so long.

        Raises:
            psycopg.OperationalError: Waiting has become pointless.
        """
        node, connection = self.node, self.connection
        assert node is not None  # noqa: S101 - an attempt that waits has both
        assert connection is not None  # noqa: S101
        if node.role == "replica" and seconds > _SUSPICIOUS_AFTER:
            if node.health.ejected:
                connection.pgconn.finish()  # whatever it may still say is not for the next borrower
                raise psycopg.OperationalError("the replica stopped answering")
            if not self.suspected and self.suspect is not None:
                self.suspected = True
                self.suspect(node)
        timeout = self.settings.statement_timeout if self.statement_timeout is None else self.statement_timeout
        if timeout and seconds > timeout + _GRACE:
            connection.pgconn.finish()
            raise psycopg.OperationalError("the server stopped answering")

    # --- verdicts -------------------------------------------------------------------------------------------------

    def judge(self, error: psycopg.Error) -> None:
        """Decide on a failure, while the connection still shows how it ended."""
        connection, node = self.connection, self.node
        on_replica = node is not None and node.role == "replica"
        if connection is None:
            # No connection was had, and nothing sent. A node that is away may come back, or another take its place;
            # one whose connections are all in use was waited for already.
            away = isinstance(error, UnavailableError) and not isinstance(error, CheckoutTimeoutError)
            action = Action.FAIL_OVER if away or (on_replica and isinstance(error, UnavailableError)) else Action.RAISE
            self.decision = Decision(action, "no connection", until_deadline=away)
            return
        if connection.behind:
            # No failure: the primary shows what the replica does not yet.
            self.decision = Decision(Action.PRIMARY, "replica behind this session's writes", until_deadline=True)
            self.use_primary = True
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
                on_fresh_connection=connection.first_used_at >= self.started,
            )
        )
        if self.decision.action is Action.PRIMARY:
            self.use_primary = True

    @property
    def ejects(self) -> str | None:
        """Why the failed attempt's node is to be suspected; ``None`` if it is not."""
        decision = self.decision
        if decision is None or self.node is None or decision.action is Action.PRIMARY:
            return None
        if not (decision.until_deadline or decision.wrong_role):
            return None
        return decision.reason

    def may_go_on(self, error: BaseException) -> bool:
        """Whether another attempt is allowed at all; tenacity asks after every failure."""
        if self.decision is None or not isinstance(error, psycopg.Error):
            return False
        if self.decision.action is Action.PRIMARY:
            return True
        return self.retry and self.decision.action not in (Action.RAISE, Action.RESOLVE)

    def exhausted(self, attempts: int) -> bool:
        """Whether so many attempts were enough, or the deadline has passed."""
        decision = self.decision
        if decision is None or time.monotonic() >= self.deadline:
            return True
        if decision.until_deadline:
            return False
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
        if self.in_doubt:
            return self._unknown()
        if self.committed:
            return ResultLostError(
                "The write with this idempotency key is committed already, but what it returned could not be read "
                "before the deadline: call again with the same key."
            )
        if isinstance(error, EquitieDataError):
            return error
        if error.sqlstate == "25006" and self.kind == "read":
            return ReadOnlyError("A read tried to write and the server refused: use execute_write for it.")
        if error.sqlstate == "42501" and self.connection is not None and self.connection.prologue_failed:
            return ConfigurationError(
                "The login role may not act for anybody: let the owner run `python -m equitie_data.migrate grant ROLE`."
            )
        if error.sqlstate == "EQ002":
            return ConfigurationError("The idempotency key was used by another actor: keys must be unique.")
        if error.sqlstate == "EQ003":
            return ConfigurationError("The idempotency key was used by an operation of another name: use a new one.")
        node = "the primary" if self.node is None else f"{self.node.role} {self.node.name}"
        action = Action.RAISE if self.decision is None else self.decision.action
        reason = "" if self.decision is None else self.decision.reason
        if action in (Action.FAIL_OVER, Action.PRIMARY):
            times = f"{self.attempt} times" if self.attempt > 1 else "once"
            return UnavailableError(
                f"The call to {node} failed {times}, at last because of this: {reason}. Nothing was committed; "
                "try again."
            )
        return error

    def _unknown(self) -> CommitOutcomeUnknown:
        node = "the primary" if self.node is None else self.node.name
        advice = (
            "run it again with the same idempotency_key, which returns its result if it is there"
            if self.idempotency_key is not None
            else "look for what it would have written before you run it again; with an idempotency_key it could simply "
            "be run again"
        )
        return CommitOutcomeUnknown(
            f"The connection to {node} was lost while it committed, and what became of the write could not be "
            f"established: {advice}."
        )

    # --- events ---------------------------------------------------------------------------------------------------

    def start(self, hooks: Hooks, node: Node, waited: float) -> StatementObserver:
        """Announce an attempt and return the observer of its statements."""
        kind, name, actor, node_name, node_role = self.kind, self.name, self.actor, node.name, node.role
        if hooks.want(OperationStarted):
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

    def resolved(self, hooks: Hooks, outcome: Literal["committed", "aborted", "unknown"], seconds: float) -> None:
        """Announce what became of a commit."""
        if hooks.active:
            node = "" if self.node is None else self.node.name
            hooks.emit(CommitResolved(name=self.name, node=node, outcome=outcome, seconds=seconds))

    def end(self, hooks: Hooks, error: BaseException | None) -> None:
        """Announce the end of the call."""
        if not hooks.want(OperationEnded):
            return
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
