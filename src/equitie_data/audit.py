"""The audit log as the application writes and reads it: who did what to which entity.

Data changes are recorded by triggers, whoever makes them; `AuditLogger` adds what a trigger cannot see: reads, logins,
exports, approvals, the intention behind a change. Two ways lead to the same table:

* Inside an `execute_write` operation an event belongs to that transaction: it is written on the same connection before
  COMMIT, a rollback takes it along, and if it cannot be written, nothing is committed.
* Anywhere else it is queued and written in batches by a background thread. The queue is bounded. When it is full, `log`
  writes a batch itself, in the caller's time, and raises if that fails: no event is ever discarded for lack of room.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, cast

import attrs
from psycopg.rows import tuple_row

from equitie_data._log import get_logger
from equitie_data.audit_events import AuditAction, AuditEvent, AuditRecord
from equitie_data.audit_queue import AuditQueue, AuditStats, record
from equitie_data.context import bind, current_actor, current_transaction
from equitie_data.redaction import DEFAULT, Redaction

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    import psycopg

    from equitie_data.context import Transaction

__all__ = ["AuditAction", "AuditEvent", "AuditLogger", "AuditRecord", "AuditStats"]

P = ParamSpec("P")
R = TypeVar("R")
EntityId: TypeAlias = "str | int | UUID"

_log = get_logger(__name__)

_QUERY = """
SELECT audit_id, "timestamp", source, actor_type, user_id, tenant_id, action, entity_type, entity_id, changes,
       metadata, pg_catalog.host(ip_address), user_agent, session_id, request_id, reason, session_role,
       transaction_xid::text::bigint
FROM public.audit_logs
"""
# As the table's constraint says; refused here, an error comes before the transaction has gone far, not at its end.
_LONGEST_ENTITY_TYPE = 128
_LONGEST_ENTITY_ID = 512


class AuditLogger:
    """Writes audit events, with the transaction they belong to or in batches, and reads the log.

    Args:
        execute_write: `Database.execute_write`, or anything that takes the same arguments.
        execute_read: `Database.execute_read`, or anything that takes the same arguments.
        batch_size: events written at once.
        flush_interval: seconds an event waits at most for its batch to fill.
        capacity: events that may wait; beyond it `log` writes a batch itself.
        secret_names: field names masked besides those of ``redaction``.
        redaction: what must not be written down (see `equitie_data.redaction`).
        enabled: whether events are recorded at all; their form is checked either way.
    """

    def __init__(
        self,
        *,
        execute_write: Callable[..., Any],
        execute_read: Callable[..., Any],
        batch_size: int = 100,
        flush_interval: float = 5.0,
        capacity: int = 10_000,
        secret_names: Collection[str] = (),
        redaction: Redaction = DEFAULT,
        enabled: bool = True,
    ) -> None:
        self._enabled = enabled
        self._queue = AuditQueue(
            execute_write=execute_write, batch_size=batch_size, flush_interval=flush_interval, capacity=capacity
        )
        self._execute_read = execute_read
        self._batch_size = batch_size
        self._redaction = redaction.and_secret(secret_names) if secret_names else redaction
        self._lock = threading.Lock()
        self._sent_in_transactions = 0

    # --- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the background thread; called by `Database.open`. Starting twice does nothing."""
        self._queue.start()

    def close(self, timeout: float = 5.0) -> None:
        """Stop the thread and write what is queued. Closing twice does nothing.

        Args:
            timeout: seconds for all of it.

        Raises:
            UnavailableError: the time was up first.
            Exception: what the last attempt to write raised. Either way the events stay queued, and `flush` or another
                `close` tries again.
        """
        self._queue.close(timeout)

    def after_fork(self) -> None:
        """Begin anew in a forked child: the parent writes what was queued, the child's thread starts when needed."""
        self._lock = threading.Lock()
        self._sent_in_transactions = 0
        self._queue.after_fork()

    def stats(self) -> AuditStats:
        """Counters and gauges, as of now."""
        with self._lock:
            sent = self._sent_in_transactions
        return attrs.evolve(self._queue.stats(), sent_in_transactions=sent)

    # --- writing -------------------------------------------------------------------------------------------

    def set_context(  # noqa: PLR0917 - the platform's old signature
        self,
        user_id: UUID | str | None = None,
        ip_address: str | None = None,
        user_agent: str | None = None,
        session_id: str | None = None,
        request_id: str | None = None,
        tenant_id: str | None = None,
    ) -> None:
        """Bind the actor to this thread's or task's context; `equitie_data.context.bind` under its old name."""
        bind(
            user_id=user_id,
            ip_address=ip_address,
            user_agent=user_agent,
            session_id=session_id,
            request_id=request_id,
            tenant_id=tenant_id,
        )

    def log(
        self,
        action: AuditAction | str,
        entity_type: str,
        entity_id: EntityId | None = None,
        *,
        changes: Mapping[str, object] | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        """Record that the current actor did something.

        Args:
            action: what was done.
            entity_type: to what kind of thing.
            entity_id: to which one; None when it is not about a single one.
            changes: what it changed; `log_change` finds that out by itself.
            metadata: whatever else is worth knowing. Secrets in both are masked, huge values cut.

        Raises:
            NoActorError: nobody is acting.
            NotOpenError: the logger is closed.
            ValueError: the action is unknown, or the entity's type or id is empty or too long.
            Exception: inside a write, what writing raised; outside, only if the queue is full and cannot be written.
        """
        event = self._event(action, entity_type, entity_id, changes, metadata)
        if not self._enabled:
            return
        transaction = current_transaction()
        if transaction is None:
            self._queue.add(event)
        else:
            self._add_to(transaction, event)

    def log_change(
        self,
        entity_type: str,
        entity_id: EntityId | None,
        before: Mapping[str, object] | None,
        after: Mapping[str, object] | None,
        *,
        action: AuditAction | str = AuditAction.UPDATE,
        metadata: Mapping[str, object] | None = None,
    ) -> bool:
        """Record the keys in which two states differ, with both values.

        Args:
            entity_type: what kind of thing changed.
            entity_id: which one.
            before: its state before; None if it did not exist.
            after: its state after; None if it is gone.
            action: what was done.
            metadata: whatever else is worth knowing.

        Returns:
            False if the states are equal; nothing is recorded then.
        """
        old, new = dict(before or {}), dict(after or {})
        changed = [key for key in {**old, **new} if not (key in old and key in new and _same(old[key], new[key]))]
        if not changed:
            return False
        changes = {
            "before": {key: old[key] for key in changed if key in old},
            "after": {key: new[key] for key in changed if key in new},
        }
        self.log(action, entity_type, entity_id, changes=changes, metadata=metadata)
        return True

    def with_audit(
        self,
        action: AuditAction | str,
        entity_type: str,
        entity_id: Callable[..., EntityId | None] | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a function, or a coroutine function, whose calls are audited.

        After success one event is recorded. After an exception one with the metadata ``{"outcome": "failed", "error":
        <class name>}`` is, outside any transaction, so that the rollback does not take it along. Who acts is checked
        before the function runs.

        Args:
            action: what the function does.
            entity_type: to what kind of thing.
            entity_id: called with the function's own arguments, says to which one.
        """
        action = AuditAction(action)

        def failed(identity: EntityId | None, error: Exception) -> None:
            try:
                failure = {"outcome": "failed", "error": type(error).__name__}
                self._queue.add(self._event(action, entity_type, identity, None, failure))
            except Exception as unlogged:  # noqa: BLE001 - the function's own error is what the caller must see
                _log.error("audit.failure_not_recorded", entity_type=entity_type, error=type(unlogged).__name__)

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            if inspect.iscoroutinefunction(function):

                @functools.wraps(function)
                async def audited_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                    current_actor()
                    identity = entity_id(*args, **kwargs) if entity_id else None
                    try:
                        result = await function(*args, **kwargs)
                    except Exception as error:
                        failed(identity, error)
                        raise
                    self.log(action, entity_type, identity)
                    return result

                return cast("Callable[P, R]", audited_coroutine)

            @functools.wraps(function)
            def audited(*args: P.args, **kwargs: P.kwargs) -> R:
                current_actor()
                identity = entity_id(*args, **kwargs) if entity_id else None
                try:
                    result = function(*args, **kwargs)
                except Exception as error:
                    failed(identity, error)
                    raise
                self.log(action, entity_type, identity)
                return result

            return audited

        return decorate

    def _event(
        self,
        action: AuditAction | str,
        entity_type: str,
        entity_id: EntityId | None,
        changes: Mapping[str, object] | None,
        metadata: Mapping[str, object] | None,
    ) -> AuditEvent:
        identity = None if entity_id is None else str(entity_id)
        if not 0 < len(entity_type) <= _LONGEST_ENTITY_TYPE or "\x00" in entity_type:
            raise ValueError(f"An audit event needs an entity_type of 1 to {_LONGEST_ENTITY_TYPE} characters.")
        if identity is not None and (len(identity) > _LONGEST_ENTITY_ID or "\x00" in identity):
            raise ValueError(f"An audit event's entity_id has at most {_LONGEST_ENTITY_ID} characters.")
        return AuditEvent(
            action=AuditAction(action),
            entity_type=entity_type,
            entity_id=identity,
            changes=None if changes is None else self._redaction.mapping(changes),
            metadata=self._redaction.mapping(metadata or {}),
            actor=current_actor(),
        )

    # --- with a transaction --------------------------------------------------------------------------------

    def _add_to(self, transaction: Transaction, event: AuditEvent) -> None:
        if _in_savepoint(transaction.connection):
            # Written at once, so that rolling back to the savepoint takes it along.
            self._send(transaction.connection, [event])
            return
        waiting: list[AuditEvent] | None = transaction.local.get(self)
        if waiting is None:
            waiting = transaction.local[self] = []
            transaction.before_commit(functools.partial(self._send_waiting, waiting))
        waiting.append(event)
        if len(waiting) >= self._batch_size:
            self._send_waiting(waiting, transaction.connection)

    def _send_waiting(self, waiting: list[AuditEvent], connection: psycopg.Connection[Any]) -> None:
        for start in range(0, len(waiting), self._batch_size):
            self._send(connection, waiting[start : start + self._batch_size])
        waiting.clear()

    def _send(self, connection: psycopg.Connection[Any], events: Sequence[AuditEvent]) -> None:
        record(connection, events)
        with self._lock:
            self._sent_in_transactions += len(events)

    def flush(self, timeout: float | None = None) -> None:
        """Write everything recorded so far: what belongs to the running transaction on its connection, the rest now.

        Args:
            timeout: seconds; None for the database's own limits.

        Raises:
            UnavailableError: the time was up first.
            Exception: what writing raised; the events stay queued.
        """
        transaction = current_transaction()
        if transaction is not None and self in transaction.local:
            self._send_waiting(transaction.local[self], transaction.connection)
        self._queue.flush(None if timeout is None else time.monotonic() + timeout)

    # --- reading -------------------------------------------------------------------------------------------

    def query(
        self,
        *,
        user_id: UUID | str | None = None,
        action: AuditAction | str | None = None,
        entity_type: str | None = None,
        entity_id: EntityId | None = None,
        request_id: str | None = None,
        source: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 100,
        before_id: int | None = None,
    ) -> list[AuditRecord]:
        """The newest records that match, as far as the current actor may see them.

        Events still queued are not among them; `flush` first to see them. Row-level security decides who reads what:
        admins and auditors everything, others nothing.

        Args:
            user_id: who acted.
            action: what was done.
            entity_type: to what kind of thing.
            entity_id: to which one.
            request_id: in which request.
            source: ``"trigger"`` or ``"sdk"``.
            since: not earlier than this.
            until: earlier than this.
            limit: at most so many, 1 or more.
            before_id: only records older than this one: the last `audit_id` of the page before.

        Returns:
            Newest first, by `audit_id`.

        Raises:
            NoActorError: nobody is acting.
            ValueError: the limit is below 1.
            psycopg.Error: the query failed.
        """
        if limit < 1:
            raise ValueError("query() needs a limit of 1 or more.")
        filters: list[tuple[str, object]] = [
            ("user_id = %s::uuid", None if user_id is None else str(user_id)),
            ("action = %s", None if action is None else str(action)),
            ("entity_type = %s", entity_type),
            ("entity_id = %s", None if entity_id is None else str(entity_id)),
            ("request_id = %s", request_id),
            ("source = %s", source),
            ('"timestamp" >= %s', since),
            ('"timestamp" < %s', until),
            ("audit_id < %s", before_id),
        ]
        chosen = [(condition, value) for condition, value in filters if value is not None]
        where = "WHERE " + "\n  AND ".join(condition for condition, _ in chosen) if chosen else ""
        rows = self._execute_read(
            _QUERY + where + "\nORDER BY audit_id DESC\nLIMIT %s",
            [*(value for _, value in chosen), limit],
            name="equitie.audit.query",
            row_factory=tuple_row,
        )
        return [AuditRecord.from_row(row) for row in rows]


def _in_savepoint(connection: psycopg.Connection[Any]) -> bool:
    # psycopg counts the `connection.transaction()` blocks, and offers no public view of it.
    return bool(getattr(connection, "_num_transactions", 0))


def _same(old: object, new: object) -> bool:
    if old is new:
        return True
    with suppress(Exception):  # an array compares to an array, a signalling NaN to nothing
        return bool(old == new) or bool(old != old and new != new)  # noqa: PLR0124 - two NaNs are no change
    return False
