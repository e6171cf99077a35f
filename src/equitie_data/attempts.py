"""How a call is carried out: on which node, in which trips, how often, and what its failures lead to.

A thin executor: which node, whether to retry and what became of a commit are decided in `routing`, `retry` and
`commit`. The first attempt is made bare; tenacity comes in only after it failed, because entering it costs as much as
a fast query.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import psycopg
import tenacity
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.rows import tuple_row

from equitie_data.call import Call, call_variable
from equitie_data.commit import Outcome
from equitie_data.context import transaction_variable
from equitie_data.errors import CheckoutTimeoutError
from equitie_data.resolve import CONFIRM, fence, resolve_commit
from equitie_data.retry import Action, Decision, Phase
from equitie_data.routing import choose_replica
from equitie_data.transaction import WriteTransaction, check_transaction_open

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from equitie_data.budget import RetryBudget
    from equitie_data.context import Actor
    from equitie_data.health import HealthWatch
    from equitie_data.hooks import Hooks
    from equitie_data.nodes import Node
    from equitie_data.prologue import Prologue
    from equitie_data.resolve import Evidence
    from equitie_data.settings import Settings
    from equitie_data.wire import NodeConnection, NodeCursor

__all__ = ["Attempts"]

_OPEN = (TransactionStatus.INTRANS, TransactionStatus.INERROR)
_FIRST_OUTCOME = "SELECT result, created_at FROM equitie_private.idempotent_result(%s, %s)"


class Attempts:
    """Carries out calls over the nodes that `ConnectionPools` keeps."""

    settings: Settings
    hooks: Hooks
    primary: Node
    replicas: list[Node]
    _nodes: list[Node]
    _health: HealthWatch
    _stand_in: threading.BoundedSemaphore
    _budget: RetryBudget
    _turns: Iterator[int]
    _default_actor: Actor | None
    _opened: bool

    def _run(self, call: Call) -> Any:
        try:
            try:
                result = self._attempt(call)
            except psycopg.Error as failure:
                result = self._recover(call, failure)
        except BaseException as error:
            if self.hooks.active:
                call.end(self.hooks, error)
            raise
        self._budget.earn()
        if self.hooks.active:
            call.end(self.hooks, None)
        return result

    def _attempt(self, call: Call) -> Any:
        call.begin_attempt()
        node, needs_seat = self._route(call)
        call.node = node
        before = time.monotonic()
        connection: NodeConnection[Any] | None = None
        seated = False
        try:
            wait = min(self.settings.checkout_timeout, max(call.deadline - before, 0.001))
            if needs_seat:
                seated = self._stand_in.acquire(timeout=wait)
                if not seated:
                    raise CheckoutTimeoutError(
                        "No replica is fit to be read, and the primary serves no more reads in their place than half "
                        "its connections: bring the replicas back, or try again."
                    )
            connection = node.checkout(wait, call.name)
            call.connection, call.phase = connection, Phase.STATEMENT
            if call.wanted is not None and node.role == "replica" and not node.shows(call.wanted.lsn, connection):
                call.position = call.wanted  # it must prove it, in the read's own trip
            connection.watch, call.suspect = call.quiet, self._health.suspect
            if self.hooks.active:
                connection.observer = call.start(self.hooks, node, time.monotonic() - before)
            if call.decision is not None and call.decision.unprepared:
                connection.unprepared, connection.prepare_threshold = True, None
            return self._run_on(call, node, connection)
        except psycopg.Error as error:
            if connection is None or error.sqlstate != "EQ001":
                self._fail(call, node, connection, error)
                raise
            try:
                return self._first_outcome(call, connection)
            except psycopg.Error as failure:
                self._fail(call, node, connection, failure)
                raise
        finally:
            if connection is not None and call.position is not None and connection.opening is not None:
                node.note_replayed(connection.replayed, behind=connection.behind)
            if seated:
                self._stand_in.release()
            if connection is not None:
                self._give_back(call, node, connection)

    def _fail(self, call: Call, node: Node, connection: NodeConnection[Any] | None, error: psycopg.Error) -> None:
        """Take down what a failed attempt means, while the connection still shows how it ended."""
        if connection is not None:
            call.note_claim(connection, error)
        call.judge(error)
        self._suspect(call, node)
        if connection is not None and call.decision is not None and call.decision.discard:
            connection.close()

    def _run_on(self, call: Call, node: Node, connection: NodeConnection[Any]) -> Any:
        one_trip = call.one_trip(node)
        if one_trip and call.actor is self._default_actor and call.needs_no_prologue:
            # Nobody's identity to switch to, and the connection is read-only unless a transaction says otherwise.
            return _rows(call, _cursor(call, connection).execute(call.operation, call.params))
        prologue = call.prologue(connection, one_trip=one_trip)
        if one_trip:
            return self._run_alone(call, connection, prologue)
        connection.pending = prologue
        if callable(call.operation):
            call.result = self._run_operation(call, connection)
        else:
            call.result = _rows(call, _cursor(call, connection).execute(call.operation, call.params))
        if connection.begun:
            self._commit(call, connection)
        return call.result

    def _run_alone(self, call: Call, connection: NodeConnection[Any], prologue: Prologue) -> Any:
        """Run one statement as a whole transaction, in one trip."""
        cursor = _cursor(call, connection)
        want_position = call.kind == "write" and bool(self.replicas)
        if call.kind == "write":
            call.phase = Phase.COMMIT  # the commit is part of the statement's own trip
            call.backend_pid = None if self.settings.pooler == "transaction" else connection.pgconn.backend_pid
        with connection.lock:
            position = connection.wait(
                cursor.execute_alone_gen(prologue, call.operation, call.params, want_position=want_position)
            )
        call.note_position(position)
        return _rows(call, cursor)

    def _run_operation(self, call: Call, connection: NodeConnection[Any]) -> Any:
        transaction = WriteTransaction(connection)
        if call.claim is not None:
            connection.flush_prologue()  # the operation must not run if the key is taken
            call.note_claim(connection)
        outer_call = call_variable.set(call)
        outer_transaction = transaction_variable.set(transaction) if call.kind == "write" else None
        connection.in_operation = True
        try:
            result = call.operation(connection)
            check_transaction_open(connection)
            for action in transaction.actions:
                action(connection)
                check_transaction_open(connection)
        finally:
            connection.in_operation = False
            call_variable.reset(outer_call)
            if outer_transaction is not None:
                transaction_variable.reset(outer_transaction)
        return result

    def _commit(self, call: Call, connection: NodeConnection[Any]) -> None:
        with connection.lock:
            if call.kind == "read":
                connection.wait(connection.send_commit_gen())
                return
            call.secure_evidence(connection)
            call.phase = Phase.COMMIT
            call.note_position(connection.wait(connection.commit_gen(call.kept(), want_position=bool(self.replicas))))

    def _give_back(self, call: Call, node: Node, connection: NodeConnection[Any]) -> None:  # noqa: ARG002 - for asyncio
        self._roll_back(connection)
        node.checkin(connection)

    def _roll_back(self, connection: NodeConnection[Any] | None) -> None:
        """Roll back what is still open, so that the connection can go back."""
        if connection is None or connection.pgconn.transaction_status not in _OPEN:
            return
        try:
            with connection.lock:
                connection.wait(connection.command_gen(b"ROLLBACK"))
        except psycopg.Error:
            connection.close()

    # --- after a failure ------------------------------------------------------------------------------------------

    def _recover(self, call: Call, first: psycopg.Error) -> Any:
        """Go on after a first failure, or raise what it means."""
        pending = [first]

        def attempt() -> Any:
            try:
                if pending:
                    raise pending.pop()
                call.attempt += 1
                return self._attempt(call)
            except psycopg.Error:
                if call.decision is not None and call.decision.action is Action.RESOLVE and self._resolve(call):
                    return call.result
                raise

        def announce(state: tenacity.RetryCallState) -> None:
            if self.hooks.active:
                error = None if state.outcome is None else state.outcome.exception()
                call.again(self.hooks, error, float(state.upcoming_sleep))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(call.may_go_on),
            stop=lambda state: call.exhausted(state.attempt_number) or not self._may_spend(call),
            wait=lambda state: call.pause(state.attempt_number),
            before_sleep=announce,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except psycopg.Error as error:
            translated = call.translated(error)
            if translated is error:
                raise
            raise translated from error

    def _may_spend(self, call: Call) -> bool:
        """Whether the retry budget allows another attempt; waiting for a node to come back is free."""
        waits = call.decision is not None and call.decision.until_deadline
        return waits or self._budget.spend()

    def _resolve(self, call: Call) -> bool:
        """Find out what became of a commit whose reply was lost.

        Returns:
            Whether it is committed, and its result known. Otherwise ``call.decision`` says how to go on.
        """
        started = time.monotonic()
        call.in_doubt = True
        outcome = Outcome.UNKNOWN
        if call.evidence is not None:
            outcome = self._outcome_of(call, call.evidence)
            call.resolved(self.hooks, outcome.value, time.monotonic() - started)
        elif call.backend_pid is not None:
            fence(self.primary.dsn, call.backend_pid)
        if outcome is Outcome.COMMITTED:
            call.in_doubt = False
            return True
        if outcome is Outcome.ABORTED:
            call.in_doubt = False
            call.decision = Decision(Action.FAIL_OVER, "the transaction was aborted", until_deadline=True)
        elif call.claim is not None:
            # Running it again with the same key is the answer: the key waits for the old transaction to end, and
            # tells whether it committed.
            call.decision = Decision(Action.FAIL_OVER, "the reply to COMMIT was lost", until_deadline=True)
        return False

    def _outcome_of(self, call: Call, evidence: Evidence) -> Outcome:
        return resolve_commit(lambda: self.primary.dsn, evidence, call.deadline)

    def _first_outcome(self, call: Call, connection: NodeConnection[Any] | None) -> Any:
        """Return what the first run of an idempotent write returned."""
        assert connection is not None  # noqa: S101 - whoever was refused the key had a connection
        assert call.claim is not None  # noqa: S101 - and asked for it
        # From here on nothing is written that could be doubled: every failure can be tried again.
        call.phase, was_in_doubt, call.in_doubt = Phase.STATEMENT, call.in_doubt, True
        self._roll_back(connection)
        connection.execute(CONFIRM)
        call.in_doubt, call.committed = False, True
        if was_in_doubt:
            call.resolved(self.hooks, "committed", 0.0)
        row = connection.execute(_FIRST_OUTCOME, [call.claim.key, call.claim.claimant]).fetchone()
        return call.first_outcome(row)

    def _suspect(self, call: Call, node: Node) -> None:
        reason = call.ejects
        if reason is None:
            return
        if node.role == "replica":
            self._health.eject(node, reason)
        else:
            self._health.suspect()

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _route(self, call: Call) -> tuple[Node, bool]:
        """Return the node for an attempt, and whether it stands in for replicas."""
        if call.kind == "write" or call.use_primary or not self.replicas:
            return self.primary, False
        replicas = self.replicas
        position = call.must_see(self.primary.system)
        choice = choose_replica(
            call.consistency,
            [node.view for node in replicas],
            turn=next(self._turns),
            position=position,
            max_lag=self.settings.max_replica_lag,
            max_lag_bytes=self.settings.max_replica_lag_bytes,
        )
        call.wanted = position
        return (self.primary, choice.degraded) if choice.index is None else (replicas[choice.index], False)

    def _promote(self, node: Node) -> None:
        """Send the writes to another node from now on."""
        self.replicas = [each for each in self._nodes if each is not node]
        self.primary = node


def _cursor(call: Call, connection: NodeConnection[Any]) -> NodeCursor[Any]:
    return cast("NodeCursor[Any]", connection.cursor(row_factory=call.row_factory or tuple_row))


def _rows(call: Call, cursor: NodeCursor[Any]) -> Any:
    # Not `cursor.description`, which is built anew for every look at it.
    if cursor.pgresult is not None and cursor.pgresult.status == ExecStatus.TUPLES_OK:
        return cursor.fetchall()
    return [] if call.kind == "read" else cursor.rowcount
