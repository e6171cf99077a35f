"""How the partitioned tables stand, read only, and whether somebody has to do something about it."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, Final

import attrs

from equitie_data.maintenance.catalog import read_policies, read_state, utc_now
from equitie_data.maintenance.period import add_months, month_of
from equitie_data.maintenance.plan import is_covered, overdue, plan_table
from equitie_data.maintenance.run import strangers
from equitie_data.maintenance.session import open_session

if TYPE_CHECKING:
    from psycopg import Connection

    from equitie_data.maintenance.plan import TablePlan, TableState

__all__ = ["MaintenanceStatus", "PartitionStatus", "status"]

_RUN_EVERY: Final = dt.timedelta(days=2)


@attrs.frozen(kw_only=True)
class PartitionStatus:
    """One partitioned table.

    Attributes:
        table: The table.
        partitions: How many partitions it has, without the default one.
        next_gap: First month from the current one on that has no partition.
        late_rows: Rows in the default partition.
        late_since: When the first of them was made, as far as the table knows.
        outside_rows: Those of them whose months maintenance does not make.
        detach_pending: Partitions whose detaching was interrupted.
        expired: Expired partitions that are to be retired.
        held: Expired partitions that legal holds keep.
        retired: Retired partitions in equitie_part, by state.
    """

    table: str
    partitions: int
    next_gap: dt.date
    late_rows: int
    late_since: dt.datetime | None
    outside_rows: int
    detach_pending: tuple[str, ...]
    expired: tuple[str, ...]
    held: tuple[str, ...]
    retired: dict[str, int]


@attrs.frozen(kw_only=True)
class MaintenanceStatus:
    """All of them, and the last run.

    Attributes:
        tables: The tables, by name.
        last_run: When the last run began; ``None`` if there was none.
        last_outcome: How it ended.
        holds: How many legal holds are in force.
        overdue: What ought to have been done by now.
        notes: What a person should know, although nothing is wrong.
    """

    tables: tuple[PartitionStatus, ...]
    last_run: dt.datetime | None
    last_outcome: str | None
    holds: int
    overdue: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the status as JSON's types."""
        return attrs.asdict(self, value_serializer=_as_text)


def status(dsn: str) -> MaintenanceStatus:
    """Read how the tables stand; waits for nobody and changes nothing.

    Args:
        dsn: The database, as the owner of its tables.

    Raises:
        MaintenanceError: The role is not the owner, or the connection was lost.
        UnavailableError: The server cannot be reached.
    """
    with open_session(dsn) as conn, conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return _read(conn)


def _read(conn: Connection[Any]) -> MaintenanceStatus:
    now = utc_now(conn)
    tables: list[PartitionStatus] = []
    late: list[str] = []
    notes: list[str] = []
    for policy in read_policies(conn):
        state = read_state(conn, policy, now.date())
        plan = plan_table(state, now, archiving=False, drop_after=dt.timedelta(0))
        tables.append(_describe(state, plan, now))
        late += overdue(state, plan, now)
        notes += plan.notes()
    notes += strangers(conn)
    last = conn.execute(
        "SELECT r.started_at, r.outcome FROM equitie_private.maintenance_runs AS r ORDER BY r.run_id DESC LIMIT 1"
    ).fetchone()
    if last is None:
        late.append("Maintenance has never run on this database.")
    elif now - last[0] > _RUN_EVERY:
        late.append(f"The last maintenance run began on {last[0]:%Y-%m-%d}: it should run every day.")
    elif last[1] == "failed":
        late.append("The last maintenance run failed: see its report, or run it again.")
    for name, error in conn.execute(
        "SELECT t.name, t.last_error FROM equitie_private.maintenance_tasks AS t"
        " WHERE t.last_error IS NOT NULL ORDER BY t.name"
    ):
        late.append(f"The task {name!r} failed the last time: {error}.")
    holds = conn.execute("SELECT count(*) FROM equitie_private.legal_holds WHERE released_at IS NULL").fetchone()
    return MaintenanceStatus(
        tables=tuple(tables),
        last_run=None if last is None else last[0],
        last_outcome=None if last is None else last[1],
        holds=0 if holds is None else holds[0],
        overdue=tuple(late),
        notes=tuple(notes),
    )


def _describe(state: TableState, plan: TablePlan, now: dt.datetime) -> PartitionStatus:
    gap = month_of(now.date())
    while is_covered(gap, state.partitions):
        gap = add_months(gap, 1)
        if gap == dt.date.max:
            break
    known = [each.since for each in state.late if each.since is not None]
    retired: dict[str, int] = {}
    for each in state.retired:
        retired[each.state] = retired.get(each.state, 0) + 1
    return PartitionStatus(
        table=state.parent,
        partitions=len(state.partitions),
        next_gap=gap,
        late_rows=sum(each.rows for each in state.late),
        late_since=min(known, default=None),
        outside_rows=sum(each.rows for each in plan.outside),
        detach_pending=plan.finalize,
        expired=tuple(each.name for each in plan.retire),
        held=tuple(each.name for each in plan.held if each.name),
        retired=retired,
    )


def _as_text(_instance: Any, _field: Any, value: Any) -> Any:
    return value.isoformat() if isinstance(value, (dt.date, dt.datetime)) else value
