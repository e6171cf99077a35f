"""What a maintenance run has to do, and what is overdue: decisions only, from the state as it was read.

The window of months that maintenance makes by itself reaches from the oldest month that is kept to the last one ahead.
A row dated 1013 or 2099 is a typing error more often than not; it waits in the default partition and is reported.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Final

import attrs

from equitie_data.maintenance.period import add_months, month_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "LateMonth",
    "Limits",
    "Partition",
    "RetiredPartition",
    "TablePlan",
    "TableState",
    "is_covered",
    "overdue",
    "plan_table",
]

_URGENT_MONTHS: Final = 2
"""So many months after the current one must be there; of the others, the next runs make sure."""
_RETIREMENT_GRACE: Final = dt.timedelta(days=31)
_SHOWN: Final = 3


@attrs.frozen(kw_only=True)
class Partition:
    """A partition that is not the default one.

    Attributes:
        name: With its schema.
        start: Its lower bound; ``None`` for MINVALUE.
        end: Its upper bound, exclusive; ``None`` for MAXVALUE.
        detach_pending: Whether a concurrent detach was interrupted.
        holds: Keys of the legal holds that keep it; looked up for expired partitions only.
    """

    name: str
    start: dt.datetime | None
    end: dt.datetime | None
    detach_pending: bool = False
    holds: tuple[int, ...] = ()

    def touches(self, month: dt.date) -> bool:
        """Whether some moment of the month belongs here."""
        first, after = _span(month)
        return (self.start is None or self.start < after) and (self.end is None or self.end > first)


@attrs.frozen(kw_only=True)
class LateMonth:
    """Rows of one month in the default partition.

    Attributes:
        month: Its first day; ``None`` for rows beyond the calendar, such as infinity.
        rows: How many they are.
        since: When the first of them was made, as far as the table knows.
    """

    month: dt.date | None
    rows: int
    since: dt.datetime | None = None


@attrs.frozen(kw_only=True)
class RetiredPartition:
    """A retired partition whose table is still there.

    Attributes:
        retired_id: Key in ``equitie_private.retired_partitions``.
        name: What it was called as a partition.
        table: What it is called now, in equitie_part.
        state: detached, settled or archived.
        detached_at: When it was detached.
        rows: How many rows it has; ``None`` until it was counted.
        archive_file: Its archive.
        holds: Keys of the legal holds that keep it.
    """

    retired_id: int
    name: str
    table: str
    state: str
    detached_at: dt.datetime
    rows: int | None = None
    archive_file: str | None = None
    holds: tuple[int, ...] = ()


@attrs.frozen(kw_only=True)
class TableState:
    """One partitioned table as it stands.

    Attributes:
        parent: The table, with its schema.
        months_ahead: How many months after the current one are wanted.
        cutoff: Partitions that end on this day or before it have expired; ``None`` to keep everything.
        partitions: Its partitions but the default one.
        late: What the default partition holds, by month.
        default_partition: Its name.
        default_bytes: Its size.
        drain_id: The drain that a former run has begun.
        retired: Its retired partitions that are not dropped yet.
    """

    parent: str
    months_ahead: int
    cutoff: dt.date | None
    partitions: tuple[Partition, ...]
    late: tuple[LateMonth, ...] = ()
    default_partition: str = ""
    default_bytes: int = 0
    drain_id: int | None = None
    retired: tuple[RetiredPartition, ...] = ()


@attrs.frozen(kw_only=True)
class Limits:
    """From when on the default partition is drained by copying, which makes nobody wait.

    Attributes:
        rows: More late rows of one month than this are copied; fewer are moved under the lock.
        bytes: A default partition larger than this is not read under the lock.
        months: So many months become partitions in one swap.
    """

    rows: int = 1000
    bytes: int = 4 * 2**20
    months: int = 3


@attrs.frozen(kw_only=True)
class TablePlan:
    """What is to be done for one table, in this order.

    Attributes:
        parent: The table.
        finalize: Partitions whose detaching is to be finished.
        make: Months to make in one short step each, with their late rows.
        drain: Groups of months to make by copying.
        retire: Partitions to detach.
        archive: Retired partitions to archive.
        drop: Retired partitions to drop.
        blocked: Months that cannot be made, each with the partitions that cover a part of it.
        outside: Late rows outside of the window of months.
        held: Expired partitions and retired ones that legal holds keep.
        waiting: Retired partitions that wait for an archive directory or for the end of the grace period.
        window: First and last month that maintenance makes by itself; the first is ``None`` without retention.
    """

    parent: str
    finalize: tuple[str, ...]
    make: tuple[dt.date, ...]
    drain: tuple[tuple[dt.date, ...], ...]
    retire: tuple[Partition, ...]
    archive: tuple[RetiredPartition, ...]
    drop: tuple[RetiredPartition, ...]
    blocked: tuple[tuple[dt.date, tuple[str, ...]], ...]
    outside: tuple[LateMonth, ...]
    held: tuple[Partition | RetiredPartition, ...]
    waiting: tuple[RetiredPartition, ...]
    window: tuple[dt.date | None, dt.date]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.finalize or self.make or self.drain or self.retire or self.archive or self.drop)

    def notes(self) -> Iterator[str]:
        """Yield sentences on what a person should know, although nothing is wrong."""
        if self.outside:
            yield _describe_outside(self)
        for kept in self.held:
            numbers = ", ".join(map(str, kept.holds))
            where = kept.name if isinstance(kept, Partition) else f"equitie_part.{kept.table}"
            yield f"{where} has expired and is kept by legal hold {numbers}."
        unarchived = [each for each in self.waiting if each.state != "archived"]
        if unarchived:
            yield (
                f"{_count(len(unarchived), 'retired partition')} of {self.parent} "
                f"{'waits' if len(unarchived) == 1 else 'wait'} in equitie_part to be archived: pass --archive-dir. "
                "Nothing is dropped before that."
            )


def plan_table(
    state: TableState,
    now: dt.datetime,
    *,
    archiving: bool,
    drop_after: dt.timedelta,
    limits: Limits = Limits(),
) -> TablePlan:
    """Decide what is to be done for one table.

    Args:
        state: The table as it stands.
        now: The time, UTC.
        archiving: Whether there is a directory for archives; without one nothing is archived or dropped.
        drop_after: How long a retired partition stays, from its detaching on.
        limits: When to copy instead of moving.
    """
    this_month = month_of(now.date())
    first = month_of(state.cutoff) if state.cutoff is not None else None
    last = add_months(this_month, state.months_ahead)
    late = {each.month: each for each in state.late if each.month is not None and in_window(each.month, first, last)}
    wanted = sorted({*months_between(this_month, last), *late})
    blocked: list[tuple[dt.date, tuple[str, ...]]] = []
    free: list[dt.date] = []
    for month in wanted:
        touching = [each for each in state.partitions if each.touches(month)]
        if not touching:
            free.append(month)
        elif not is_covered(month, touching):
            blocked.append((month, tuple(each.name for each in touching)))

    # Attaching reads the default partition under the lock, whatever month it is for.
    if state.default_bytes > limits.bytes:
        copied = free
    else:
        copied = [month for month in free if month in late and late[month].rows > limits.rows]
    # The fullest first: what remains to be copied by the next swaps shrinks fastest.
    copied = sorted(copied, key=lambda month: (-(late[month].rows if month in late else 0), month))
    groups = [tuple(sorted(copied[at : at + limits.months])) for at in range(0, len(copied), limits.months)]

    expired = [each for each in state.partitions if not each.detach_pending and _has_expired(each, state.cutoff)]
    standing = state.retired
    droppable = [
        each for each in standing if each.state == "archived" and archiving and now - each.detached_at >= drop_after
    ]
    archivable = [each for each in standing if each.state != "archived" and archiving]
    return TablePlan(
        parent=state.parent,
        finalize=tuple(each.name for each in state.partitions if each.detach_pending),
        make=tuple(month for month in free if month not in copied),
        drain=tuple(groups),
        retire=tuple(sorted((each for each in expired if not each.holds), key=_end)),
        archive=tuple(archivable),
        drop=tuple(each for each in droppable if not each.holds),
        blocked=tuple(blocked),
        outside=tuple(each for each in state.late if each.month is None or not in_window(each.month, first, last)),
        held=(*(each for each in expired if each.holds), *(each for each in droppable if each.holds)),
        waiting=tuple(each for each in standing if each not in droppable and each not in archivable),
        window=(first, last),
    )


def overdue(state: TableState, plan: TablePlan, now: dt.datetime) -> Iterator[str]:
    """Yield a sentence for everything that ought to have been done by now.

    Args:
        state: The table as it stands.
        plan: What is still to be done for it.
        now: The time, UTC.
    """
    this_month = month_of(now.date())
    urgent = add_months(this_month, min(state.months_ahead, _URGENT_MONTHS))
    missing = sorted({*plan.make, *(month for group in plan.drain for month in group)})
    gaps = [month for month in missing if this_month <= month <= urgent]
    if gaps:
        yield f"{state.parent} has no partition for {_months(gaps)}: its rows go to {state.default_partition}."
    late = {each.month: each.rows for each in state.late}
    undrained = [month for month in missing if late.get(month) and month not in gaps]
    if undrained:
        rows = sum(late[month] for month in undrained)
        yield f"{_count(rows, 'row')} of {_months(undrained)} still {_wait(rows)} in {state.default_partition}."
    for month, names in plan.blocked:
        yield (
            f"The month {month:%Y-%m} of {state.parent} is covered in part by {', '.join(names)}: detach it, "
            "or make its bounds those of the month."
        )
    for name in plan.finalize:
        yield f"The detaching of {name} from {state.parent} was interrupted: its rows are in no table's reach."
    if state.cutoff is not None:
        limit = _midnight(state.cutoff) - _RETIREMENT_GRACE
        old = [partition for partition in plan.retire if _end(partition) <= limit]
        if old:
            yield (
                f"{_count(len(old), 'expired partition')} of {state.parent}, the oldest {old[0].name}, "
                f"{'is' if len(old) == 1 else 'are'} not retired."
            )


def is_covered(month: dt.date, partitions: Iterable[Partition]) -> bool:
    """Whether every moment of the month belongs to one of the partitions."""
    reached, after = _span(month)
    for each in sorted(partitions, key=_start):
        if _start(each) > reached:
            break
        reached = max(reached, _end(each))
    return reached >= after


def in_window(month: dt.date, first: dt.date | None, last: dt.date) -> bool:
    """Whether maintenance makes this month by itself."""
    return (first is None or month >= first) and month <= last


def months_between(first: dt.date, last: dt.date) -> Iterator[dt.date]:
    """Yield the first days of months, both ends included."""
    while first <= last:
        yield first
        first = add_months(first, 1)


def _has_expired(partition: Partition, cutoff: dt.date | None) -> bool:
    return cutoff is not None and partition.end is not None and partition.end <= _midnight(cutoff)


def _span(month: dt.date) -> tuple[dt.datetime, dt.datetime]:
    return _midnight(month), _midnight(add_months(month, 1))


def _midnight(day: dt.date) -> dt.datetime:
    return dt.datetime(day.year, day.month, day.day, tzinfo=dt.timezone.utc)


def _start(partition: Partition) -> dt.datetime:
    return partition.start or dt.datetime.min.replace(tzinfo=dt.timezone.utc)


def _end(partition: Partition) -> dt.datetime:
    return partition.end or dt.datetime.max.replace(tzinfo=dt.timezone.utc)


def _describe_outside(plan: TablePlan) -> str:
    rows = sum(each.rows for each in plan.outside)
    named = [f"{each.month:%Y-%m}" if each.month else "no month of the calendar" for each in plan.outside]
    shown = ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "")
    known = [each.since for each in plan.outside if each.since is not None]
    since = f", the first since {min(known):%Y-%m-%d}" if known else ""
    first, last = plan.window
    window = f"up to {last:%Y-%m}" if first is None else f"from {first:%Y-%m} to {last:%Y-%m}"
    return (
        f"{_count(rows, 'row')} of {plan.parent} {_wait(rows)} in the default partition ({shown}){since}: months "
        f"{window} are made, so correct the dates if they are mistyped."
    )


def _months(months: Iterable[dt.date]) -> str:
    names = [f"{month:%Y-%m}" for month in months]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _wait(number: int) -> str:
    return "waits" if number == 1 else "wait"
