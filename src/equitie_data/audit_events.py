"""What the audit log is made of: actions, events on their way to it, records read from it."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equitie_data.context import Actor
    from equitie_data.redaction import JsonValue

__all__ = ["EVENT_ID_KEY", "AuditAction", "AuditEvent", "AuditRecord"]

EVENT_ID_KEY = "equitie_event_id"
"""The key of an event's metadata under which its id is stored."""


class AuditAction(str, Enum):
    """What was done."""

    CREATE = "CREATE"
    READ = "READ"
    UPDATE = "UPDATE"
    DELETE = "DELETE"
    LOGIN = "LOGIN"
    LOGOUT = "LOGOUT"
    EXPORT = "EXPORT"
    IMPORT = "IMPORT"
    APPROVE = "APPROVE"
    REJECT = "REJECT"
    ARCHIVE = "ARCHIVE"
    RESTORE = "RESTORE"

    __str__ = str.__str__


@attrs.frozen(kw_only=True)
class AuditEvent:
    """One event on its way to the log; its secrets are masked already.

    Attributes:
        event_id: names the event, whatever becomes of the attempts to store it.
        timestamp: when it happened, by this machine's clock.
        action: what was done.
        entity_type: to what kind of thing; a table's name or the application's own word.
        entity_id: to which one.
        changes: what it changed.
        metadata: whatever else is worth knowing.
        actor: who did it.
        queued_at: the monotonic clock, in seconds, when it was queued.
    """

    event_id: UUID = attrs.field(factory=uuid4)
    timestamp: datetime = attrs.field(factory=lambda: datetime.now(timezone.utc))
    action: AuditAction
    entity_type: str
    entity_id: str | None
    changes: dict[str, JsonValue] | None
    metadata: dict[str, JsonValue]
    actor: Actor
    queued_at: float = attrs.field(factory=time.monotonic, eq=False, repr=False)

    def to_json(self) -> dict[str, JsonValue]:
        """The event as `equitie_private.record_audit_events` takes it."""
        actor = self.actor
        return {
            "timestamp": self.timestamp.isoformat(),
            "action": self.action.value,
            "entity_type": self.entity_type,
            "entity_id": self.entity_id,
            "changes": cast("JsonValue", self.changes),
            "metadata": {**self.metadata, EVENT_ID_KEY: str(self.event_id)},
            "actor_type": actor.kind,
            "user_id": None if actor.user_id is None else str(actor.user_id),
            "reason": actor.reason,
            "tenant_id": actor.tenant_id,
            "ip_address": actor.ip_address,
            "user_agent": actor.user_agent,
            "session_id": actor.session_id,
            "request_id": actor.request_id,
        }


@attrs.frozen(kw_only=True)
class AuditRecord:
    """One row of the audit log.

    Attributes:
        audit_id: the log's own number; newer is higher.
        timestamp: when it happened.
        source: ``"trigger"`` (the database saw the change) or ``"sdk"`` (the application said so).
        actor_type: ``"user"``, ``"service"`` or ``"database"`` (a change made without this library).
        user_id: the user, if a user acted.
        tenant_id: the tenant the request belonged to.
        action: an `AuditAction`'s value.
        entity_type: the kind of thing; for a trigger the table.
        entity_id: which one.
        changes: ``{"before": {...}, "after": {...}}``, changed keys only.
        metadata: what the application added.
        event_id: the SDK event's own id; None for a trigger's.
        ip_address: the client's address.
        user_agent: the client's program.
        session_id: the web session.
        request_id: the request.
        reason: why the service acted.
        session_role: the database login the row was written under.
        transaction_xid: the transaction that wrote it.
    """

    audit_id: int
    timestamp: datetime
    source: str
    actor_type: str
    user_id: UUID | None
    tenant_id: str | None
    action: str
    entity_type: str
    entity_id: str | None
    changes: dict[str, Any] | None
    metadata: dict[str, Any]
    event_id: UUID | None
    ip_address: str | None
    user_agent: str | None
    session_id: str | None
    request_id: str | None
    reason: str | None
    session_role: str | None
    transaction_xid: int | None

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> AuditRecord:
        """The record of a row of the log's columns, in the table's order."""
        names = [field.name for field in attrs.fields(cls) if field.name != "event_id"]
        values = dict(zip(names, row, strict=True))
        metadata = dict(values["metadata"] or {})
        event_id = metadata.pop(EVENT_ID_KEY, None)
        values["metadata"] = metadata
        return cls(**values, event_id=None if event_id is None else UUID(event_id))
