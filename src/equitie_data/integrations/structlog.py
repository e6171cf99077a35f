"""The pool's events as structured log events.

Statements are logged at debug, what a tired on-call engineer wants to know at warning. Never a parameter, and of a
statement only its normal form, because an application may have written values into it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import attrs

from equitie_data._log import get_logger
from equitie_data.fingerprint import normalise
from equitie_data.hooks import (
    CommitResolved,
    Leaked,
    NodeEjected,
    NodeReadmitted,
    OperationEnded,
    OperationStarted,
    PrimaryChanged,
    Retried,
    StatementEnded,
)
from equitie_data.redaction import DEFAULT, Redaction

__all__ = ["StructlogHook"]

_normal_form = lru_cache(maxsize=5_000)(normalise)

_LEVELS: Final = {
    OperationStarted: ("debug", "equitie_data.operation_started"),
    StatementEnded: ("debug", "equitie_data.statement_ended"),
    OperationEnded: ("debug", "equitie_data.operation_ended"),
    Retried: ("warning", "equitie_data.retried"),
    CommitResolved: ("warning", "equitie_data.commit_resolved"),
    NodeEjected: ("warning", "equitie_data.node_ejected"),
    NodeReadmitted: ("info", "equitie_data.node_readmitted"),
    PrimaryChanged: ("warning", "equitie_data.primary_changed"),
    Leaked: ("warning", "equitie_data.connection_held"),
}


class StructlogHook:
    """Logs every event of the pool, through structlog if the application has configured it, else through `logging`.

    Args:
        logger: A structlog logger of the application's own, to log to instead.
        redaction: What must not be written down; ``user_id`` among its ``hashed_names`` hashes who acted.
    """

    def __init__(self, logger: object | None = None, *, redaction: Redaction = DEFAULT) -> None:
        self._logger = get_logger(__name__, redaction) if logger is None else logger
        self._redaction = redaction

    def on_event(self, event: object, /) -> None:
        """Log one event."""
        known = _LEVELS.get(type(event))
        if known is None:
            return
        level, name = known
        fields = attrs.asdict(event, recurse=False)  # type: ignore[arg-type]
        actor = fields.pop("actor", None)
        if "sql" in fields:
            fields["sql"] = _normal_form(fields["sql"])
        fields = {field: self._redaction.log_field(field, value) for field, value in fields.items()}
        if actor is not None:
            fields["actor"] = actor.kind
            if actor.user_id is not None:
                fields["actor"] = self._redaction.log_field("user_id", actor.user_id)
        getattr(self._logger, level)(name, **fields)
