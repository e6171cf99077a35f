"""The pool's events as structured log events.

Statements are logged at debug, what a tired on-call engineer wants to know at warning. Never a parameter.
"""

from __future__ import annotations

from typing import Final

import attrs

from equitie_data._log import get_logger
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

__all__ = ["StructlogHook"]

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
    """

    def __init__(self, logger: object | None = None) -> None:
        self._logger = get_logger(__name__) if logger is None else logger

    def on_event(self, event: object, /) -> None:
        """Log one event."""
        known = _LEVELS.get(type(event))
        if known is None:
            return
        level, name = known
        fields = attrs.asdict(event, recurse=False)  # type: ignore[arg-type]
        actor = fields.pop("actor", None)
        if actor is not None:
            fields["actor"] = actor.kind if actor.user_id is None else str(actor.user_id)
        getattr(self._logger, level)(name, **fields)
