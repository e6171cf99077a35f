"""What a run has done so far: written in the transaction of every batch, so that a killed run goes on where it was."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg.types.json import Jsonb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from psycopg import Connection

__all__ = ["BUCKETS", "Ledger", "Options", "Run", "Tally", "standing_run"]

BUCKETS: Final = ("read", "inserted", "replaced", "existing", "duplicate", "loser", "rejected")
"""What is counted; the first is the sum of the others."""

_START: Final = -(2**63)


@attrs.frozen(kw_only=True)
class Options:
    """What the user decided.

    Attributes:
        on_conflict: ``fail``; ``latest`` or ``first``: of copies that differ, the one that changed last, or did not.
        keep: Columns to carry along, ``COLUMN`` or ``TABLE:COLUMN``.
        drop: Columns to leave in the backup alone.
        months: ``auto``, ``each`` (a partition for every month) or ``one`` (one partition for all old months).
    """

    on_conflict: str = "fail"
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    months: str = "auto"


@attrs.frozen(kw_only=True)
class Run:
    """A row of ``legacy_runs``."""

    run_id: int
    state: str
    in_batches: bool
    options: Options
    sources: list[dict[str, Any]]
    backup_schema: str | None
    audit_mark: int
    restoration: dict[str, Any] | None
    report: dict[str, Any] | None


def standing_run(conn: Connection[Any]) -> Run | None:
    """Return the run that is under way or in force."""
    row = conn.execute(
        "SELECT run_id, state, in_batches, options, sources, backup_schema, audit_mark, restoration, report"
        " FROM equitie_private.legacy_runs WHERE state IN ('copying', 'undoing', 'switched')"
    ).fetchone()
    if row is None:
        return None
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row[3].items()
    }
    return Run(
        run_id=row[0],
        state=row[1],
        in_batches=row[2],
        options=Options(**options),
        sources=row[4],
        backup_schema=row[5],
        audit_mark=row[6],
        restoration=row[7],
        report=row[8],
    )


@attrs.define
class Tally:
    """Rows and money by source, kind and bucket; and a checksum of what was read, by source."""

    counted: dict[tuple[int, str, str], tuple[int, Decimal]] = attrs.field(factory=dict)
    checksums: dict[int, int] = attrs.field(factory=dict)

    def add(self, source: int, kind: str, bucket: str, rows: int, amount: Decimal | int) -> None:
        """Count rows and money."""
        had, had_amount = self.counted.get((source, kind, bucket), (0, Decimal(0)))
        self.counted[source, kind, bucket] = (had + rows, had_amount + amount)

    def add_checksum(self, source: int, checksum: Decimal | int) -> None:
        """Add to the checksum of a source; the order of rows does not matter."""
        self.checksums[source] = self.checksums.get(source, 0) + int(checksum)

    def include(self, other: Tally) -> None:
        """Add everything another tally holds."""
        for (source, kind, bucket), (rows, amount) in other.counted.items():
            self.add(source, kind, bucket, rows, amount)
        for source, checksum in other.checksums.items():
            self.add_checksum(source, checksum)

    def of(self, *, bucket: str, kind: str | None = None, source: int | None = None) -> tuple[int, Decimal]:
        """Return rows and money of a bucket, of one kind or source or of all."""
        rows, amount = 0, Decimal(0)
        for (each_source, each_kind, each_bucket), (count, money) in self.counted.items():
            if each_bucket == bucket and kind in (None, each_kind) and source in (None, each_source):
                rows += count
                amount += money
        return rows, amount

    @property
    def kinds(self) -> set[str]:
        """Kinds of which anything was counted."""
        return {kind for _, kind, _ in self.counted}

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it: money as text, with all its digits."""
        return {
            "counted": [[*key, rows, str(amount)] for key, (rows, amount) in self.counted.items()],
            "checksums": [[source, str(checksum)] for source, checksum in self.checksums.items()],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Tally:
        """Read what `to_json` wrote."""
        tally = cls()
        for source, kind, bucket, rows, amount in stored.get("counted", []):
            tally.add(source, kind, bucket, rows, Decimal(amount))
        for source, checksum in stored.get("checksums", []):
            tally.add_checksum(source, int(checksum))
        return tally


@attrs.define
class Step:
    """How far one step is."""

    position: int = _START
    done: bool = False
    tally: Tally = attrs.field(factory=Tally)


class Ledger:
    """The steps of one run.

    Args:
        conn: The owner's session.
        run_id: The run.
    """

    def __init__(self, conn: Connection[Any], run_id: int) -> None:
        self._conn = conn
        self._run_id = run_id

    def step(self, name: str) -> Step:
        """Return how far a step is."""
        row = self._conn.execute(
            "SELECT position, done, counts FROM equitie_private.legacy_steps WHERE run_id = %s AND step = %s",
            (self._run_id, name),
        ).fetchone()
        return Step() if row is None else Step(row[0], row[1], Tally.from_json(row[2]))

    def record(self, name: str, step: Step) -> None:
        """Write how far a step is, in the transaction that got it there."""
        self._conn.execute(
            "INSERT INTO equitie_private.legacy_steps (run_id, step, position, done, counts)"
            " VALUES (%s, %s, %s, %s, %s)"
            " ON CONFLICT (run_id, step) DO UPDATE"
            " SET position = excluded.position, done = excluded.done, counts = excluded.counts",
            (self._run_id, name, step.position, step.done, Jsonb(step.tally.to_json())),
        )

    def total(self, prefixes: Iterable[str] = ("read:", "decide:", "settle:")) -> Tally:
        """Return the sum of the steps' tallies."""
        total = Tally()
        for step, counts in self._conn.execute(
            "SELECT step, counts FROM equitie_private.legacy_steps WHERE run_id = %s", (self._run_id,)
        ).fetchall():
            if step.startswith(tuple(prefixes)):
                total.include(Tally.from_json(counts))
        return total

    def forget(self) -> None:
        """Remove every step."""
        self._conn.execute("DELETE FROM equitie_private.legacy_steps WHERE run_id = %s", (self._run_id,))
