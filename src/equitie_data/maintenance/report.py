"""What a run did, what it could not do, and what is overdue."""

from __future__ import annotations

import json
from typing import Any

import attrs

__all__ = ["MaintenanceReport", "MaintenanceStep"]


@attrs.frozen(kw_only=True)
class MaintenanceStep:
    """One thing that was done; in a dry run, that would be done.

    Attributes:
        kind: finalize, month, drain, detach, archive, drop, analyze or task.
        table: The partitioned table; empty for a task.
        subject: The partition, months, file or task.
        rows: How many rows it was about; ``None`` where that means nothing.
        seconds: How long it took, waiting included.
        tries: How often it was tried: more than once when it met locks.
    """

    kind: str
    table: str
    subject: str
    rows: int | None = None
    seconds: float = 0.0
    tries: int = 1

    def __str__(self) -> str:
        rows = "" if self.rows is None else f"  {self.rows:,} rows"
        again = f", {self.tries} tries" if self.tries > 1 else ""
        return f"{self.kind:<9}{self.subject}{rows}  ({self.seconds:.2f} s{again})"


@attrs.frozen(kw_only=True)
class MaintenanceReport:
    """What a run did.

    Attributes:
        run_id: Key in ``equitie_private.maintenance_runs``; ``None`` for a dry run.
        steps: What was done, in order; in a dry run, what would be.
        not_done: What could not be done this time, because the tables were in use; the next run tries again.
        failures: What went wrong.
        overdue: What ought to have been done by now.
        notes: What a person should know, although nothing is wrong.
        seconds: How long it took.
    """

    run_id: int | None
    steps: tuple[MaintenanceStep, ...]
    not_done: tuple[str, ...]
    failures: tuple[str, ...]
    overdue: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def needs_attention(self) -> bool:
        """Whether something went wrong or is overdue: the exit code of the command."""
        return bool(self.failures or self.overdue)

    @property
    def outcome(self) -> str:
        """How ``equitie_private.maintenance_runs`` calls it."""
        if self.failures:
            return "failed"
        return "incomplete" if self.not_done or self.overdue else "done"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        return {**attrs.asdict(self), "outcome": self.outcome}

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
