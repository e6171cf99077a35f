"""What is to be done, and what is overdue, decided from the state alone."""

from __future__ import annotations

import datetime as dt
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data.errors import ConfigurationError
from equitie_data.maintenance.period import Period, add_months, month_of, parse_period
from equitie_data.maintenance.plan import (
    LateMonth,
    Limits,
    Partition,
    RetiredPartition,
    TablePlan,
    TableState,
    in_window,
    is_covered,
    months_between,
    overdue,
    plan_table,
)

NOW = dt.datetime(2026, 11, 22, 20, 0, tzinfo=dt.timezone.utc)
THIS_MONTH = dt.date(2026, 11, 1)
CUTOFF = dt.date(2019, 11, 22)


def at(day: dt.date) -> dt.datetime:
    return dt.datetime(day.year, day.month, day.day, tzinfo=dt.timezone.utc)


def month(text: str, *, months: int = 1, **values: object) -> Partition:
    first = dt.date.fromisoformat(f"{text}-01")
    return Partition(
        name=f"equitie_part.t_{text.replace('-', '_')}",
        start=at(first),
        end=at(add_months(first, months)),
        **values,  # type: ignore[arg-type]
    )


def ahead(months: int = 12) -> tuple[Partition, ...]:
    return tuple(month(f"{each:%Y-%m}") for each in months_between(THIS_MONTH, add_months(THIS_MONTH, months)))


def state(*partitions: Partition, **values: object) -> TableState:
    settings: dict[str, object] = {"months_ahead": 12, "cutoff": CUTOFF, "default_partition": "equitie_part.t_default"}
    settings |= values
    return TableState(parent="public.t", partitions=partitions, **settings)  # type: ignore[arg-type]


def plan(of: TableState, **values: object) -> TablePlan:
    settings: dict[str, object] = {"archiving": True, "drop_after": dt.timedelta(days=30)}
    return plan_table(of, NOW, **{**settings, **values})  # type: ignore[arg-type]


def late(text: str, rows: int = 1) -> LateMonth:
    return LateMonth(month=dt.date.fromisoformat(f"{text}-01"), rows=rows, since=NOW)


def test_nothing_is_to_be_done_where_all_is_well() -> None:
    settled = state(*ahead(), month("2019-11"))
    assert plan(settled).is_empty
    assert list(overdue(settled, plan(settled), NOW)) == []
    assert list(plan(settled).notes()) == []


def test_months_ahead_are_made_and_only_the_near_ones_are_overdue() -> None:
    empty = state(*ahead(2))
    assert plan(empty).make == tuple(months_between(dt.date(2027, 2, 1), dt.date(2027, 11, 1)))
    assert list(overdue(empty, plan(empty), NOW)) == []
    gap = state(*ahead(0), *ahead()[2:])
    assert plan(gap).make == (dt.date(2026, 12, 1),)
    (sentence,) = overdue(gap, plan(gap), NOW)
    assert sentence == "public.t has no partition for 2026-12: its rows go to equitie_part.t_default."


def test_late_months_inside_the_window_are_made_and_others_reported() -> None:
    odd = state(
        *ahead(),
        late=(
            late("1013-01"),
            late("2019-10", 2),
            late("2019-11"),
            late("2024-05"),
            late("2027-11"),
            late("2027-12"),
            late("2099-01", 5),
            LateMonth(month=None, rows=1),
        ),
    )
    decided = plan(odd)
    assert decided.make == (dt.date(2019, 11, 1), dt.date(2024, 5, 1))
    assert [each.rows for each in decided.outside] == [1, 2, 1, 5, 1]
    (note,) = decided.notes()
    assert "10 rows of public.t wait in the default partition (1013-01, 2019-10, 2027-12, ...)" in note
    assert "the first since 2026-11-22" in note
    assert "from 2019-11 to 2027-11" in note
    (sentence,) = overdue(odd, decided, NOW)
    assert sentence.startswith("2 rows of 2019-11, 2024-05 still wait")


def test_a_month_with_many_rows_is_drained_and_the_fullest_comes_first() -> None:
    full = state(
        *ahead(), late=(late("2024-01", 2000), late("2024-02", 9000), late("2024-03", 10), late("2024-04", 3000))
    )
    decided = plan(full, limits=Limits(rows=1000, months=2))
    assert decided.drain == ((dt.date(2024, 2, 1), dt.date(2024, 4, 1)), (dt.date(2024, 1, 1),))
    assert decided.make == (dt.date(2024, 3, 1),)


def test_a_default_partition_too_large_to_be_read_under_the_lock_is_rebuilt_for_any_month() -> None:
    large = state(*ahead(11), late=(late("2099-01", 10**6),), default_bytes=10**9)
    assert plan(large).make == ()
    assert plan(large).drain == ((dt.date(2027, 11, 1),),)


@pytest.mark.parametrize(
    "bounds", [("2027-03-10", "2027-04-01"), ("2027-03-01", "2027-03-31"), ("2027-03-10", "2027-03-11")]
)
def test_a_month_that_is_covered_in_part_is_named(bounds: tuple[str, str]) -> None:
    start, end = (at(dt.date.fromisoformat(day)) for day in bounds)
    by_hand = Partition(name="equitie_part.by_hand", start=start, end=end)
    cut = state(*(each for each in ahead() if not is_covered(dt.date(2027, 3, 1), [each])), by_hand)
    assert plan(cut).blocked == ((dt.date(2027, 3, 1), ("equitie_part.by_hand",)),)
    assert plan(cut).make == ()
    (sentence,) = overdue(cut, plan(cut), NOW)
    assert "covered in part by equitie_part.by_hand" in sentence


def test_larger_partitions_made_by_hand_cover_their_months() -> None:
    year = month("2027-01", months=12)
    everything_before = Partition(name="equitie_part.old", start=None, end=at(THIS_MONTH))
    odd = state(*ahead(1), year, everything_before, late=())
    assert plan(odd).is_empty


def test_partitions_made_by_hand_cover_a_month_together() -> None:
    first, middle, after = (at(dt.date(2027, 3, 1)), at(dt.date(2027, 3, 15)), at(dt.date(2027, 4, 1)))
    halves = (Partition(name="a", start=first, end=middle), Partition(name="b", start=middle, end=after))
    rest = [each for each in ahead() if not is_covered(dt.date(2027, 3, 1), [each])]
    assert plan(state(*rest, *halves)).is_empty
    assert plan(state(*rest, *halves)).blocked == ()


def test_a_partition_expires_with_its_upper_bound() -> None:
    kept = state(*ahead(), month("2019-10"), month("2019-11"), month("2018-01", months=24))
    assert [each.name for each in plan(kept).retire] == ["equitie_part.t_2019_10"]
    on_the_day = state(*ahead(), month("2019-11"), cutoff=dt.date(2019, 12, 1))
    assert [each.name for each in plan(on_the_day).retire] == ["equitie_part.t_2019_11"]
    assert plan(state(*ahead(), month("1990-01"), cutoff=None)).retire == ()


def test_what_is_held_is_neither_retired_nor_dropped() -> None:
    old = RetiredPartition(
        retired_id=1,
        name="t_2019_01",
        table="retired_t_2019_01",
        state="archived",
        detached_at=NOW - dt.timedelta(days=31),
        holds=(7,),
    )
    held = state(*ahead(), month("2019-02", holds=(3, 4)), retired=(old,))
    assert plan(held).is_empty
    assert list(plan(held).notes()) == [
        "equitie_part.t_2019_02 has expired and is kept by legal hold 3, 4.",
        "equitie_part.retired_t_2019_01 has expired and is kept by legal hold 7.",
    ]
    assert list(overdue(held, plan(held), NOW)) == []


def test_a_retired_partition_is_archived_and_dropped_in_its_time() -> None:
    def retired(number: int, is_now: str, days: int) -> RetiredPartition:
        return RetiredPartition(
            retired_id=number,
            name="t",
            table=f"retired_{number}",
            state=is_now,
            detached_at=NOW - dt.timedelta(days=days),
        )

    standing = state(
        *ahead(),
        retired=(
            retired(1, "detached", 90),
            retired(2, "settled", 1),
            retired(3, "archived", 29),
            retired(4, "archived", 30),
        ),
    )
    decided = plan(standing)
    assert [each.retired_id for each in decided.archive] == [1, 2]
    assert [each.retired_id for each in decided.drop] == [4]
    assert [each.retired_id for each in decided.waiting] == [3]
    without = plan(standing, archiving=False)
    assert (without.archive, without.drop) == ((), ())
    (note,) = without.notes()
    assert note.startswith("2 retired partitions of public.t wait in equitie_part to be archived: pass --archive-dir.")


def test_an_interrupted_detach_is_finished_and_not_retired_twice() -> None:
    pending = state(*ahead(), month("2019-01", detach_pending=True))
    assert plan(pending).finalize == ("equitie_part.t_2019_01",)
    assert plan(pending).retire == ()
    (sentence,) = overdue(pending, plan(pending), NOW)
    assert "interrupted" in sentence


def test_retirement_is_overdue_a_month_after_its_day() -> None:
    early = state(*ahead(), month("2019-10"))
    assert list(overdue(early, plan(early), NOW)) == []
    old = state(*ahead(), month("2019-09"), month("2019-08"))
    (sentence,) = overdue(old, plan(old), NOW)
    assert sentence.startswith("2 expired partitions of public.t, the oldest equitie_part.t_2019_08, are not retired")


# What must hold whatever stands ------------------------------------------------------------------------------------

days = st.dates(dt.date(2017, 1, 1), dt.date(2029, 12, 31))
months = days.map(month_of)


@st.composite
def states(draw: st.DrawFn) -> TableState:
    bounds = sorted(draw(st.sets(st.one_of(months, days), max_size=14)))
    partitions = []
    for start, end in itertools.pairwise(bounds):
        kind = draw(st.sampled_from(["partition", "partition", "held", "gap"]))
        if kind != "gap" and (end - start).days > 0:
            holds = (1,) if kind == "held" else ()
            partitions.append(Partition(name=f"p_{start}", start=at(start), end=at(end), holds=holds))
    free = [each for each in draw(st.sets(months, max_size=6)) if not is_covered(each, partitions)]
    return state(
        *partitions,
        months_ahead=draw(st.integers(1, 24)),
        cutoff=draw(st.none() | st.dates(dt.date(2017, 1, 1), dt.date(2025, 12, 31))),
        late=tuple(LateMonth(month=each, rows=draw(st.integers(1, 5000))) for each in sorted(free)),
        default_bytes=draw(st.sampled_from([0, 10**9])),
    )


@given(states())
def test_every_month_is_made_once_and_only_where_nothing_stands(given_state: TableState) -> None:
    decided = plan(given_state)
    made = [*decided.make, *(each for group in decided.drain for each in group)]
    assert len(made) == len(set(made))
    assert not any(partition.touches(each) for partition in given_state.partitions for each in made)
    first, last = decided.window
    for each in months_between(THIS_MONTH, last):
        covered = is_covered(each, given_state.partitions)
        assert covered + (each in made) + (each in dict(decided.blocked)) == 1
    for waiting in given_state.late:
        assert waiting.month is not None
        inside = in_window(waiting.month, first, last)
        assert inside == (waiting.month in made or waiting.month in dict(decided.blocked))
        assert inside != (waiting in decided.outside)
    assert all(in_window(each, first, last) or THIS_MONTH <= each <= last for each in made)


@given(states())
def test_exactly_what_has_expired_and_is_free_is_retired(given_state: TableState) -> None:
    decided = plan(given_state)
    for partition in given_state.partitions:
        assert partition.end is not None
        expired = given_state.cutoff is not None and partition.end <= at(given_state.cutoff)
        assert (partition in decided.retire) == (expired and not partition.holds)
        assert (partition in decided.held) == (expired and bool(partition.holds))
    assert list(decided.retire) == sorted(decided.retire, key=lambda each: each.end or NOW)


@given(states())
def test_after_the_plan_is_done_nothing_is_left_to_do(given_state: TableState) -> None:
    decided = plan(given_state)
    made = [*decided.make, *(each for group in decided.drain for each in group)]
    after = state(
        *(each for each in given_state.partitions if each not in decided.retire),
        *(month(f"{each:%Y-%m}") for each in made),
        months_ahead=given_state.months_ahead,
        cutoff=given_state.cutoff,
        late=tuple(each for each in given_state.late if each.month not in made),
    )
    assert plan(after).is_empty
    assert plan(after).blocked == decided.blocked
    assert not any("still" in each or "no partition" in each for each in overdue(after, plan(after), NOW))


# Periods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "period", "written"),
    [
        ("7y", Period(months=84), "7 years"),
        ("18m", Period(months=18), "1 year 6 months"),
        ("4w", Period(days=28), "28 days"),
        ("730d", Period(days=730), "730 days"),
        ("1 Year", Period(months=12), "1 year"),
        ("0d", Period(), "0 days"),
    ],
)
def test_periods_are_read(text: str, period: Period, written: str) -> None:
    assert parse_period(text) == period
    assert str(period) == written


@pytest.mark.parametrize("text", ["", "7", "y", "-7y", "7 y 3 m", "7h", "1.5y", "999999d"])
def test_other_periods_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no period"):
        parse_period(text)


@pytest.mark.parametrize(
    ("day", "period", "before"),
    [
        ("2026-11-22", Period(months=84), "2019-11-22"),
        ("2024-02-29", Period(months=12), "2023-02-28"),
        ("2026-03-31", Period(months=1), "2026-02-28"),
        ("2026-01-01", Period(days=730), "2024-01-02"),
        ("0003-01-01", Period(months=84), "0001-01-01"),
    ],
)
def test_a_period_goes_back_as_in_postgresql(day: str, period: Period, before: str) -> None:
    assert period.before(dt.date.fromisoformat(day)) == dt.date.fromisoformat(before)


@given(st.dates(), st.integers(-2000, 2000))
def test_months_are_added_within_the_calendar(day: dt.date, count: int) -> None:
    moved = add_months(day, count)
    assert dt.date.min <= moved <= dt.date.max
    if dt.date.min < moved < dt.date.max:
        assert (moved.year - day.year) * 12 + moved.month - day.month == count
        assert moved.day in {day.day, 28, 29, 30}
