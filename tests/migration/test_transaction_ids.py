"""At most one transaction has an id, whoever writes, at any isolation level, and the id alone finds it."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import random
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data import migrate
from equitie_data.errors import MigrationError
from equitie_data.transaction_id import compose, day_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.migration.conftest import Platform

DAY = dt.date(2013, 2, 5)
SAME_MONTH = dt.date(2013, 2, 20)
NEXT_MONTH = dt.date(2013, 3, 7)
NO_PARTITION = dt.date(2031, 7, 1)
LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
REFUSED = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.CheckViolation,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.ObjectNotInPrerequisiteState,
)
INSERT = (
    "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount)"
    " VALUES (%s, 1, 1, %s, 1)"
)
GENERATED = (
    "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES (1, 1, %s, 1)"
    " RETURNING transaction_id"
)
MOVE = "UPDATE transactions_clean SET transaction_date = %s WHERE transaction_id = %s"
IDENTITY = "public.transactions_clean_transaction_id_seq"

PROBLEMS = """
SELECT 'the id ' || t.transaction_id || ' stands ' || count(*) || ' times'
FROM transactions_clean AS t
GROUP BY t.transaction_id
HAVING count(*) > 1
UNION ALL
SELECT 'the entry of ' || coalesce(t.transaction_id, s.transaction_id) || ' is wrong'
FROM (
  SELECT * FROM transactions_clean AS t
  WHERE equitie_private.transaction_day(t.transaction_id) IS DISTINCT FROM t.transaction_date
) AS t
FULL JOIN equitie_private.stray_transactions AS s
  ON (s.transaction_id, s.transaction_date, s.investor_id) = (t.transaction_id, t.transaction_date, t.investor_id)
WHERE t.transaction_id IS NULL OR s.transaction_id IS NULL OR s.reserved_by IS NOT NULL
"""


@pytest.fixture
def owner(owner_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection on a database with two months, one deal and two investors."""
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO deals_clean (deal_name) VALUES ('d');"
            "INSERT INTO investors_clean (full_name) VALUES ('i'), ('j');"
            f"SELECT equitie_private.ensure_month_partitions('public.transactions_clean', '{DAY}', '{NEXT_MONTH}')"
        )
        yield connection
        assert connection.execute(PROBLEMS).fetchall() == []


def dates(connection: psycopg.Connection[Any], transaction_id: int) -> list[dt.date]:
    """Where an id stands, without its help."""
    query = "SELECT transaction_date FROM transactions_clean WHERE transaction_id + 0 = %s ORDER BY 1"
    return [row[0] for row in connection.execute(query, (transaction_id,))]


def looked_up(connection: psycopg.Connection[Any], transaction_id: int) -> list[dt.date]:
    query = "SELECT transaction_date FROM get_transaction(%s)"
    return [row[0] for row in connection.execute(query, (transaction_id,))]


def entries(connection: psycopg.Connection[Any]) -> list[tuple[int, dt.date]]:
    query = "SELECT transaction_id, transaction_date FROM equitie_private.stray_transactions ORDER BY 1"
    return connection.execute(query).fetchall()


def made(connection: psycopg.Connection[Any], day: dt.date = DAY) -> int:
    row = connection.execute(GENERATED, (day,)).fetchone()
    assert row is not None
    return int(row[0])


# --- ids --------------------------------------------------------------------------------------------------------------


def test_a_new_id_carries_the_day_and_the_next_number(owner: psycopg.Connection[Any]) -> None:
    assert [made(owner, day) for day in (DAY, NEXT_MONTH, NO_PARTITION)] == [
        compose(DAY, 0),
        compose(NEXT_MONTH, 1),
        compose(NO_PARTITION, 2),
    ]
    assert entries(owner) == []


def test_numbers_begin_again_after_the_last(owner: psycopg.Connection[Any]) -> None:
    owner.execute("SELECT setval(%s, -99999999)", (IDENTITY,))
    assert [made(owner), made(owner), made(owner)] == [compose(DAY, n) for n in (99_999_999, 0, 1)]


def test_copy_makes_ids_and_takes_given_ones(owner: psycopg.Connection[Any]) -> None:
    columns = "(deal_id, investor_id, transaction_date, amount)"
    with owner.cursor().copy(f"COPY transactions_clean {columns} FROM STDIN") as copy:
        for day in (DAY, NEXT_MONTH, NO_PARTITION):
            copy.write_row((1, 1, day, 1))
    given = "(transaction_id, deal_id, investor_id, transaction_date, amount)"
    with owner.cursor().copy(f"COPY transactions_clean {given} FROM STDIN") as copy:
        copy.write_row((7, 1, 1, DAY, 1))
        copy.write_row((compose(DAY, 8), 1, 1, DAY, 1))
    assert entries(owner) == [(7, DAY)]
    assert looked_up(owner, 7) == [DAY]


def test_a_date_out_of_range_is_refused(owner: psycopg.Connection[Any]) -> None:
    made(owner)
    for day in ("0999-12-31", "9007-01-01", "infinity", "-infinity", "0202-03-04", "0044-03-15 BC"):
        for statement, params in (
            (GENERATED, (day,)),
            ("UPDATE transactions_clean SET transaction_date = %s", (day,)),
            (INSERT, (7, day)),
        ):
            with pytest.raises(psycopg.errors.CheckViolation, match="chk_transactions_date"):
                owner.execute(statement, params)


def test_the_first_and_the_last_day(owner: psycopg.Connection[Any]) -> None:
    for edge in (dt.date(1000, 1, 1), dt.date(9006, 12, 31), dt.date(2024, 2, 29)):
        assert day_of(made(owner, edge)) == edge
        assert looked_up(owner, made(owner, edge)) == [edge]


def test_what_is_missing_is_named(owner: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation, match='"transaction_date"'):
        owner.execute(GENERATED, (None,))
    for transaction_id in (0, -(2**63) + 1):
        with pytest.raises(psycopg.errors.CheckViolation, match=r"chk_transactions_(id|date)"):
            owner.execute(INSERT, (transaction_id, DAY if transaction_id == 0 else "infinity"))


def test_sql_and_python_agree_on_every_id(owner: psycopg.Connection[Any]) -> None:
    generator = random.Random(7)
    ids = [generator.randrange(1, 2**63) for _ in range(500)]
    ids += [generator.randrange(9_990_000, 90_080_000) * 10**8 + generator.randrange(10**8) for _ in range(5000)]
    ids += [compose(dt.date(1000, 1, 1) + dt.timedelta(days=generator.randrange(2_900_000))) for _ in range(2000)]
    rows = owner.execute(
        "SELECT i, equitie_private.transaction_day(i) FROM unnest(%s::bigint[]) AS i", (ids,)
    ).fetchall()
    assert [(i, day) for i, day in rows if day != day_of(i)] == []
    assert sum(day is not None for _, day in rows) > 2000


# --- one row for an id ------------------------------------------------------------------------------------------------


def test_an_id_of_another_day_is_refused_with_a_hint(owner: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="carries another day") as refused:
        owner.execute(INSERT, (compose(DAY, 5), NEXT_MONTH))
    assert "Leave the id out" in (refused.value.diag.message_hint or "")


def test_an_id_without_a_day_stands_once(owner: psycopg.Connection[Any]) -> None:
    for transaction_id, first in itertools.product((7, 20_130_230 * 10**8 + 1), (DAY, NEXT_MONTH, NO_PARTITION)):
        owner.execute(INSERT, (transaction_id, first))
        for second in (DAY, SAME_MONTH, NEXT_MONTH, NO_PARTITION):
            with pytest.raises(psycopg.errors.UniqueViolation):
                owner.execute(INSERT, (transaction_id, second))
        assert dates(owner, transaction_id) == looked_up(owner, transaction_id) == [first]
        owner.execute("DELETE FROM transactions_clean")


@pytest.mark.parametrize("way", ["parent", "partition", "default partition", "copy", "merge", "on conflict", "update"])
def test_no_way_in_gives_an_id_twice(owner: psycopg.Connection[Any], way: str) -> None:
    moved, legacy = made(owner), 7
    owner.execute(MOVE, (NEXT_MONTH, moved))
    owner.execute(INSERT, (legacy, NEXT_MONTH))
    other = made(owner, SAME_MONTH)
    row = "(transaction_id, deal_id, investor_id, transaction_date, amount)"
    values = f"{row} VALUES (%s, 1, 1, %s, 1)"
    for transaction_id, day in ((moved, DAY), (legacy, DAY), (legacy, NO_PARTITION), (moved, NO_PARTITION)):
        target = {
            "partition": f"equitie_part.transactions_clean_{day:%Y_%m}",
            "default partition": "equitie_part.transactions_clean_default",
        }.get(way, "transactions_clean")
        if target.endswith("_2031_07"):
            target = "equitie_part.transactions_clean_default"
        statement = {
            "merge": (
                "MERGE INTO transactions_clean AS t USING (SELECT %s::bigint AS i, %s::date AS d) AS s"
                " ON t.transaction_id = s.i AND t.transaction_date = s.d WHEN NOT MATCHED THEN"
                f" INSERT {row} VALUES (s.i, 1, 1, s.d, 1)"
            ),
            "on conflict": f"INSERT INTO {target} {values} ON CONFLICT (transaction_id, transaction_date) DO NOTHING",
            "update": (
                "UPDATE transactions_clean SET transaction_id = %s, transaction_date = %s"
                f" WHERE transaction_id = {other}"
            ),
        }.get(way, f"INSERT INTO {target} {values}")
        refused = pytest.raises((psycopg.errors.UniqueViolation, psycopg.errors.CheckViolation))
        if way == "copy":
            with refused, owner.cursor().copy(f"COPY transactions_clean {row} FROM STDIN") as copy:
                copy.write_row((transaction_id, 1, 1, day, 1))
        else:
            with refused:
                owner.execute(statement, (transaction_id, day))
    assert dates(owner, moved) == dates(owner, legacy) == [NEXT_MONTH]


def test_a_partition_made_by_hand_is_guarded_too(owner: psycopg.Connection[Any]) -> None:
    owner.execute(INSERT, (7, DAY))
    owner.execute(
        "CREATE TABLE equitie_part.by_hand PARTITION OF transactions_clean"
        " FOR VALUES FROM ('2031-07-01') TO ('2031-08-01')"
    )
    with pytest.raises(psycopg.errors.UniqueViolation):
        owner.execute(INSERT.replace("transactions_clean", "equitie_part.by_hand"), (7, NO_PARTITION))


# --- moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [SAME_MONTH, NEXT_MONTH, NO_PARTITION])
def test_a_corrected_date_keeps_the_id_and_is_found(owner: psycopg.Connection[Any], there: dt.date) -> None:
    transaction_id = made(owner)
    owner.execute(MOVE, (there, transaction_id))
    assert entries(owner) == [(transaction_id, there)]
    assert dates(owner, transaction_id) == looked_up(owner, transaction_id) == [there]
    with pytest.raises(psycopg.errors.UniqueViolation, match="stands on another date"):
        owner.execute(INSERT, (transaction_id, DAY))

    owner.execute(MOVE, (dt.date(2013, 2, 11), transaction_id))
    assert looked_up(owner, transaction_id) == [dt.date(2013, 2, 11)]
    owner.execute(MOVE, (DAY, transaction_id))
    assert entries(owner) == []
    assert looked_up(owner, transaction_id) == [DAY]
    with pytest.raises(psycopg.errors.UniqueViolation):
        owner.execute(INSERT, (transaction_id, NEXT_MONTH) if there == DAY else (transaction_id, DAY))


def test_many_rows_move_in_one_statement(owner: psycopg.Connection[Any]) -> None:
    owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT 1, 1, %s::date + g %% 50, g FROM generate_series(1, 300) AS g",
        (DAY,),
    )
    owner.execute("UPDATE transactions_clean SET transaction_date = transaction_date + 11")
    assert len(entries(owner)) == 300
    owner.execute("UPDATE transactions_clean SET transaction_date = transaction_date - 11")
    assert entries(owner) == []


def test_rows_that_swap_their_dates_in_one_statement(owner: psycopg.Connection[Any]) -> None:
    one, other = made(owner, DAY), made(owner, NEXT_MONTH)
    owner.execute(
        "UPDATE transactions_clean SET transaction_date = CASE transaction_id WHEN %s THEN %s::date ELSE %s::date END",
        (one, NEXT_MONTH, DAY),
    )
    assert (looked_up(owner, one), looked_up(owner, other)) == ([NEXT_MONTH], [DAY])


def test_an_id_may_be_changed_and_the_old_one_is_free(owner: psycopg.Connection[Any]) -> None:
    change = "UPDATE transactions_clean SET transaction_id = %s, transaction_date = %s WHERE transaction_id = %s"
    owner.execute(INSERT, (7, DAY))
    owner.execute(change, (compose(NEXT_MONTH, 9), NEXT_MONTH, 7))
    assert entries(owner) == []
    owner.execute(INSERT, (7, NO_PARTITION))
    owner.execute(change, (8, SAME_MONTH, compose(NEXT_MONTH, 9)))
    assert entries(owner) == [(7, NO_PARTITION), (8, SAME_MONTH)]
    with pytest.raises(psycopg.errors.CheckViolation, match="carries another day"):
        owner.execute(change, (compose(DAY, 5), SAME_MONTH, 8))
    with pytest.raises(psycopg.errors.UniqueViolation):
        owner.execute(change, (7, SAME_MONTH, 8))


def test_a_move_that_is_rolled_back_leaves_nothing(owner: psycopg.Connection[Any]) -> None:
    transaction_id = made(owner)
    with owner.transaction(force_rollback=True):
        owner.execute(MOVE, (NEXT_MONTH, transaction_id))
    with owner.transaction():
        with owner.transaction(force_rollback=True):
            owner.execute(MOVE, (NEXT_MONTH, transaction_id))
        owner.execute(INSERT, (7, DAY))
    assert entries(owner) == [(7, DAY)]
    assert looked_up(owner, transaction_id) == [DAY]


def test_entries_follow_deletes_investors_and_truncates(owner: psycopg.Connection[Any]) -> None:
    def fill() -> None:
        for transaction_id, day in ((7, DAY), (8, NEXT_MONTH), (9, NO_PARTITION)):
            owner.execute(INSERT, (transaction_id, day))
        made(owner)

    fill()
    owner.execute("UPDATE transactions_clean SET investor_id = 2 WHERE transaction_id = 8")
    owner.execute("UPDATE investors_clean SET investor_id = 20 WHERE investor_id = 2")
    assert owner.execute(PROBLEMS).fetchall() == []
    owner.execute("DELETE FROM investors_clean WHERE investor_id = 20")
    assert entries(owner) == [(7, DAY), (9, NO_PARTITION)]
    owner.execute(f"TRUNCATE equitie_part.transactions_clean_{DAY:%Y_%m}")
    assert entries(owner) == [(9, NO_PARTITION)]
    owner.execute("TRUNCATE equitie_part.transactions_clean_default")
    assert entries(owner) == []
    owner.execute("TRUNCATE transactions_clean")
    fill()
    owner.execute("DELETE FROM deals_clean")
    assert entries(owner) == []
    owner.execute("INSERT INTO deals_clean (deal_id, deal_name) VALUES (1, 'd')")
    fill()
    owner.execute("TRUNCATE deals_clean CASCADE")
    assert entries(owner) == []


def test_late_rows_keep_their_entries_when_their_month_is_made(owner: psycopg.Connection[Any]) -> None:
    owner.execute(INSERT, (9, NO_PARTITION))
    late = made(owner, NO_PARTITION)
    owner.execute(
        "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)", (NO_PARTITION,) * 2
    )
    assert entries(owner) == [(9, NO_PARTITION)]
    assert looked_up(owner, 9) == looked_up(owner, late) == [NO_PARTITION]
    with pytest.raises(psycopg.errors.UniqueViolation):
        owner.execute(INSERT, (9, DAY))
    owner.execute(f"TRUNCATE equitie_part.transactions_clean_{NO_PARTITION:%Y_%m}")
    assert entries(owner) == []


# --- partitions and archives ------------------------------------------------------------------------------------------


def test_a_detached_partition_takes_its_entries_along_and_brings_them_back(owner: psycopg.Connection[Any]) -> None:
    moved = made(owner, NEXT_MONTH)
    owner.execute(MOVE, (DAY, moved))
    owner.execute(INSERT, (7, DAY))
    stays = made(owner)
    partition = f"equitie_part.transactions_clean_{DAY:%Y_%m}"
    with owner.transaction():
        owner.execute(f"ALTER TABLE transactions_clean DETACH PARTITION {partition}")
        assert owner.execute("SELECT equitie_private.forget_strays(%s)", (partition,)).fetchone() == (2,)
    assert entries(owner) == []
    attach = (
        f"ALTER TABLE transactions_clean ATTACH PARTITION {partition} FOR VALUES FROM ('2013-02-01') TO ('2013-03-01')"
    )

    for taken, day in ((moved, NEXT_MONTH), (7, NO_PARTITION)):
        owner.execute(INSERT, (taken, day))
        with pytest.raises(psycopg.errors.UniqueViolation, match="stand on"):
            owner.execute("SELECT equitie_private.remember_strays(%s)", (partition,))
        owner.execute("DELETE FROM transactions_clean WHERE transaction_id = %s", (taken,))

    with owner.transaction():
        assert owner.execute("SELECT equitie_private.remember_strays(%s)", (partition,)).fetchone() == (2,)
        owner.execute(attach)
    assert entries(owner) == [(7, DAY), (moved, DAY)]
    assert looked_up(owner, moved) == looked_up(owner, stays) == [DAY]


def test_a_partition_whose_own_ids_have_left_it_is_not_attached(owner: psycopg.Connection[Any]) -> None:
    transaction_id = made(owner)
    partition = f"equitie_part.transactions_clean_{DAY:%Y_%m}"
    owner.execute(f"CREATE TABLE equitie_part.archive AS SELECT * FROM {partition}")
    owner.execute(MOVE, (NEXT_MONTH, transaction_id))
    with pytest.raises(psycopg.errors.UniqueViolation, match="stand on other dates"):
        owner.execute("SELECT equitie_private.remember_strays('equitie_part.archive')")


def test_strays_are_remembered_at_read_committed_only(owner: psycopg.Connection[Any]) -> None:
    owner.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="READ COMMITTED"):
        owner.execute("SELECT equitie_private.remember_strays('equitie_part.transactions_clean_default')")


RESERVE = "SELECT equitie_private.reserve_stray(%s, %s, 1)"


def test_a_moved_row_is_restored_on_the_day_it_stood(platform: Platform, owner: psycopg.Connection[Any]) -> None:
    transaction_id = compose(DAY, 5)
    with platform.acting(None) as service:
        assert service.execute(RESERVE, (7, DAY)).fetchone() == (False,)
        assert service.execute(RESERVE, (transaction_id, DAY)).fetchone() == (False,)
        assert service.execute(RESERVE, (transaction_id, NEXT_MONTH)).fetchone() == (True,)
    with pytest.raises(psycopg.errors.UniqueViolation):
        owner.execute(INSERT, (transaction_id, DAY))
    with pytest.raises(psycopg.errors.UniqueViolation):
        owner.execute(RESERVE, (transaction_id, NO_PARTITION))
    assert looked_up(owner, transaction_id) == []
    with platform.acting(None) as service:
        service.execute(INSERT, (transaction_id, NEXT_MONTH))
    assert looked_up(owner, transaction_id) == [NEXT_MONTH]


def test_a_reservation_counts_from_its_commit_on(owner: psycopg.Connection[Any]) -> None:
    transaction_id = compose(DAY, 5)
    with owner.transaction(force_rollback=True):
        owner.execute(RESERVE, (transaction_id, NEXT_MONTH))
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="not committed yet"), owner.transaction():
            owner.execute(INSERT, (transaction_id, NEXT_MONTH))
    owner.execute(INSERT, (transaction_id, DAY))
    owner.execute(RESERVE, (transaction_id, NEXT_MONTH))
    with pytest.raises(psycopg.errors.UniqueViolation, match="own day already"):
        owner.execute(INSERT, (transaction_id, NEXT_MONTH))
    assert owner.execute("SELECT equitie_private.cancel_stray_reservation(%s)", (transaction_id,)).fetchone() == (True,)
    assert owner.execute("SELECT equitie_private.cancel_stray_reservation(%s)", (transaction_id,)).fetchone() == (
        False,
    )


# --- races ------------------------------------------------------------------------------------------------------------


class Session:
    """A connection whose statements may wait for another's."""

    def __init__(self, dsn: str, level: str, watcher: psycopg.Connection[Any]) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.watcher = watcher
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.connection.execute(f"BEGIN ISOLATION LEVEL {level}")
        self.connection.execute("SELECT count(*) FROM deals_clean")  # the snapshot, where there is one

    def execute(self, query: str, params: tuple[Any, ...]) -> None:
        """Run a statement, at the latest until it waits for a lock."""

        def run() -> None:
            try:
                self.connection.execute(query, params)
            except REFUSED as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()
        waiting = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        while self.thread.is_alive():
            if self.watcher.execute(waiting, (self.connection.info.backend_pid,)).fetchone() == (True,):
                return
            time.sleep(0.005)

    def end(self, how: str) -> bool:
        """Commit or roll back once the statement is through; return whether it committed."""
        assert self.thread is not None
        self.thread.join(30)
        assert not self.thread.is_alive()
        try:
            self.connection.execute(how)
        except REFUSED as error:
            self.error = error
        self.connection.close()
        return how == "COMMIT" and self.error is None


Statement = tuple[str, tuple[Any, ...]]

DELETE = "DELETE FROM transactions_clean WHERE transaction_id = %s"
RENAME = "UPDATE transactions_clean SET transaction_id = %s WHERE transaction_id = %s"
# What stands before, and what two do at once, to an id of DAY.
RACES: dict[str, Callable[[int], tuple[list[Statement], Statement, Statement]]] = {
    "a moved id is made again": lambda native: (
        [(INSERT, (native, DAY))],
        (MOVE, (NEXT_MONTH, native)),
        (INSERT, (native, DAY)),
    ),
    "an id moves within its month and is made again": lambda native: (
        [(INSERT, (native, DAY))],
        (MOVE, (SAME_MONTH, native)),
        (INSERT, (native, DAY)),
    ),
    "a moved id's number is drawn again": lambda native: (
        [(INSERT, (native, DAY)), ("SELECT setval(%s, %s, false)", (IDENTITY, -1 - native % 10**8))],
        (MOVE, (NEXT_MONTH, native)),
        (GENERATED, (DAY,)),
    ),
    "two make the same id on two days": lambda _: ([], (INSERT, (7, DAY)), (INSERT, (7, NEXT_MONTH))),
    "two make the same id on one day": lambda _: ([], (INSERT, (7, DAY)), (INSERT, (7, DAY))),
    "an id comes home and is made there": lambda native: (
        [(INSERT, (native, DAY)), (MOVE, (NEXT_MONTH, native))],
        (MOVE, (DAY, native)),
        (INSERT, (native, DAY)),
    ),
    "a stray is deleted and made elsewhere": lambda _: (
        [(INSERT, (7, DAY))],
        (DELETE, (7,)),
        (INSERT, (7, NEXT_MONTH)),
    ),
    "a stray is deleted and made at home": lambda native: (
        [(INSERT, (native, DAY)), (MOVE, (NEXT_MONTH, native))],
        (DELETE, (native,)),
        (INSERT, (native, DAY)),
    ),
    "two move the same row": lambda native: (
        [(INSERT, (native, DAY))],
        (MOVE, (NEXT_MONTH, native)),
        (MOVE, (NO_PARTITION, native)),
    ),
    "two give their rows the same id": lambda _: (
        [(INSERT, (8, DAY)), (INSERT, (9, NEXT_MONTH))],
        (RENAME, (7, 8)),
        (RENAME, (7, 9)),
    ),
}


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("race", RACES)
def test_two_at_once_never_make_two_of_one(
    owner: psycopg.Connection[Any], owner_dsn: str, race: str, ending: str
) -> None:
    ways = itertools.product(LEVELS, LEVELS, ("the first ends late", "the first ends early"))
    for turn, (one_level, other_level, order) in enumerate(ways):
        # Numbers beyond those that have left their day, so that the filter has to notice as well.
        before, one, other = RACES[race](compose(DAY, 1000 * turn + 500))
        for statement in before:
            owner.execute(*statement)
        first, second = Session(owner_dsn, one_level, owner), Session(owner_dsn, other_level, owner)
        first.execute(*one)
        if order == "the first ends early":
            # The second session has its snapshot, which does not show what the first one wrote.
            first.end(ending)
            second.execute(*other)
        else:
            second.execute(*other)
            first.end(ending)
        second.end("COMMIT")
        assert owner.execute(PROBLEMS).fetchall() == [], (one_level, other_level, order)
        owner.execute("DELETE FROM transactions_clean")


def test_a_restore_waits_for_whoever_is_making_the_id(owner: psycopg.Connection[Any], owner_dsn: str) -> None:
    for turn, (level, ending) in enumerate(itertools.product(LEVELS, ("COMMIT", "ROLLBACK"))):
        native = compose(DAY, 1000 * turn + 500)
        maker = Session(owner_dsn, level, owner)
        maker.execute(INSERT, (native, DAY))
        owner.execute(RESERVE, (native, NEXT_MONTH))
        restorer = Session(owner_dsn, "READ COMMITTED", owner)
        restorer.execute(INSERT, (native, NEXT_MONTH))
        committed = maker.end(ending)
        assert committed is (ending == "COMMIT")
        assert restorer.end("COMMIT") is not committed
        owner.execute("SELECT equitie_private.cancel_stray_reservation(%s)", (native,))
        assert dates(owner, native) == [DAY if committed else NEXT_MONTH]


def test_a_reservation_that_is_being_given_up_does_not_count(owner: psycopg.Connection[Any], owner_dsn: str) -> None:
    for turn, (level, ending) in enumerate(itertools.product(LEVELS, ("COMMIT", "ROLLBACK"))):
        native = compose(DAY, 1000 * turn + 500)
        owner.execute(RESERVE, (native, NEXT_MONTH))
        canceller = Session(owner_dsn, "READ COMMITTED", owner)
        canceller.execute("SELECT equitie_private.cancel_stray_reservation(%s)", (native,))
        restorer = Session(owner_dsn, level, owner)
        restorer.execute(INSERT, (native, NEXT_MONTH))
        cancelled = canceller.end(ending)
        assert restorer.end("COMMIT") is not cancelled
        assert owner.execute(PROBLEMS).fetchall() == []


@pytest.mark.parametrize("level", LEVELS)
def test_an_old_snapshot_does_not_hide_a_move(owner: psycopg.Connection[Any], owner_dsn: str, level: str) -> None:
    transaction_id = made(owner)
    late = Session(owner_dsn, level, owner)
    owner.execute(MOVE, (NEXT_MONTH, transaction_id))
    late.execute(INSERT, (transaction_id, DAY))
    assert not late.end("COMMIT")


def test_a_storm_of_writers_leaves_every_id_once(owner: psycopg.Connection[Any], owner_dsn: str) -> None:
    days = [DAY, SAME_MONTH, NEXT_MONTH, NO_PARTITION]
    committed = [0] * 4
    barrier = threading.Barrier(len(committed))

    def choose(generator: random.Random, numbers: range) -> tuple[str, tuple[Any, ...]]:
        day = generator.choice(days)
        transaction_id = generator.choice(
            [compose(generator.choice(days[:2]), generator.choice(numbers)), generator.randrange(1, 4)]
        )
        return generator.choice([
            (INSERT, (transaction_id, day_of(transaction_id) or day)),
            (INSERT, (transaction_id, day)),
            (GENERATED, (generator.choice(days[:2]),)),
            (MOVE, (day, transaction_id)),
            (MOVE, (day_of(transaction_id) or day, transaction_id)),
            ("DELETE FROM transactions_clean WHERE transaction_id = %s", (transaction_id,)),
            (
                "UPDATE transactions_clean SET transaction_id = %s, transaction_date = %s WHERE transaction_id = %s",
                (transaction_id, day, compose(day, numbers[0])),
            ),
        ])  # fmt: skip

    def write(number: int) -> None:
        generator = random.Random(number)
        with psycopg.connect(owner_dsn, autocommit=True) as connection:
            for turn in range(25):
                # Each turn has numbers with which no id has left its day yet, and the sequence gives them out often.
                numbers = range(turn * 1000 + 500, turn * 1000 + 503)
                barrier.wait(60)
                for _ in range(12):
                    connection.execute("SELECT setval(%s, %s)", (IDENTITY, -generator.choice(numbers)))
                    level = generator.choice(LEVELS)
                    with contextlib.suppress(*REFUSED), connection.transaction():
                        connection.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
                        for _ in range(generator.randrange(1, 3)):
                            connection.execute(*choose(generator, numbers))
                        committed[number] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(committed))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(committed) > 30
    assert owner.execute(PROBLEMS).fetchall() == []


# --- what keeps it cheap ----------------------------------------------------------------------------------------------


def test_only_numbers_below_the_highest_that_left_its_day_are_looked_for(owner: psycopg.Connection[Any]) -> None:
    blocks = "SELECT last_value FROM equitie_private.displaced_number_blocks"
    assert owner.execute(blocks).fetchone() == (0,)
    owner.execute(INSERT, (compose(DAY, 41_999), DAY))
    assert owner.execute(blocks).fetchone() == (0,)
    with owner.transaction(force_rollback=True):
        owner.execute(MOVE, (SAME_MONTH, compose(DAY, 41_999)))
    assert owner.execute(blocks).fetchone() == (42,)
    owner.execute(INSERT, (compose(DAY, 42_000), DAY))
    owner.execute(MOVE, (SAME_MONTH, compose(DAY, 42_000)))
    assert owner.execute(blocks).fetchone() == (43,)
    owner.execute(RESERVE, (compose(DAY, 99_999_999), NEXT_MONTH))
    assert owner.execute(blocks).fetchone() == (100_000,)
    owner.execute("SELECT equitie_private.cancel_stray_reservation(%s)", (compose(DAY, 99_999_999),))


def locks(connection: psycopg.Connection[Any]) -> set[str]:
    return {
        row[0]
        for row in connection.execute(
            "SELECT relation::regclass::text FROM pg_locks AS l INNER JOIN pg_class AS c ON c.oid = l.relation"
            " WHERE pid = pg_backend_pid() AND relkind = 'r' AND relation::regclass::text LIKE '%%part.%%'"
        )
    }


def test_a_lookup_locks_one_partition_however_often_it_ran(owner: psycopg.Connection[Any]) -> None:
    native, moved = made(owner), made(owner)
    owner.execute(MOVE, (NEXT_MONTH, moved))
    for _ in range(12):
        with owner.transaction():
            assert looked_up(owner, native) == [DAY]
            assert locks(owner) == {f"equitie_part.transactions_clean_{DAY:%Y_%m}"}
        with owner.transaction():
            assert looked_up(owner, moved) == [NEXT_MONTH]
            assert len(locks(owner)) == 2
        with owner.transaction():
            assert looked_up(owner, 7) == []
            assert locks(owner) == set()


# --- who sees what ----------------------------------------------------------------------------------------------------


def test_everybody_finds_what_they_may_see(platform: Platform) -> None:
    mine, others = platform.ids["transaction_a0"], platform.ids["transaction_b0"]
    platform.owner.execute(MOVE, (NEXT_MONTH, platform.ids["transaction_a1"]))
    platform.owner.execute(MOVE, (NEXT_MONTH, platform.ids["transaction_b1"]))
    found = {}
    for person in ("investor_a", "investor_b", "analyst", "admin", "viewer", None):
        with platform.acting(person) as conn:
            names = [f"transaction_{letter}{number}" for letter in "ab" for number in (0, 1)]
            found[person] = [name[-2:] for name in names if looked_up(conn, platform.ids[name])]
            seen = conn.execute("SELECT count(*) FROM equitie_private.stray_transactions").fetchone()
            assert seen == (sum(name.endswith("1") for name in found[person]),)
    assert found == {
        "investor_a": ["a0", "a1"],
        "investor_b": ["b0", "b1"],
        "analyst": ["a0", "a1", "b0", "b1"],
        "admin": ["a0", "a1", "b0", "b1"],
        "viewer": [],
        None: ["a0", "a1", "b0", "b1"],
    }
    assert mine != others
    with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting("inactive_admin") as conn:
        looked_up(conn, mine)


@pytest.mark.parametrize("person", ["admin", None])
def test_whoever_may_write_needs_no_privilege_on_the_entries(platform: Platform, person: str | None) -> None:
    with platform.acting(person) as conn:
        row = conn.execute(GENERATED, (DAY,)).fetchone()
        assert row is not None
        conn.execute(MOVE, (NEXT_MONTH, row[0]))
        assert looked_up(conn, row[0]) == [NEXT_MONTH]
    for statement in (
        "INSERT INTO equitie_private.stray_transactions VALUES (1, '2013-01-01', 1)",
        "DELETE FROM equitie_private.stray_transactions",
        "SELECT nextval('equitie_private.displaced_number_blocks')",
        "SELECT setval('equitie_private.displaced_number_blocks', 0)",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
            conn.execute(statement)


# --- the migration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def released(empty_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A database of the release before, with a deal and an investor."""
    migrate.migrate(empty_dsn, to=9)
    with psycopg.connect(empty_dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO deals_clean (deal_name) VALUES ('d'); INSERT INTO investors_clean (full_name) VALUES ('i')"
        )
        yield connection


def test_rows_that_were_there_keep_their_ids_and_become_strays(
    released: psycopg.Connection[Any], empty_dsn: str
) -> None:
    released.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT 1, 1, %s::date + g, g FROM generate_series(1, 200) AS g",
        (DAY,),
    )
    looks_native, looks_moved = compose(DAY, 1), compose(SAME_MONTH, 5_123)
    released.execute(INSERT, (looks_native, DAY))
    released.execute(INSERT, (looks_moved, DAY))
    before = released.execute("SELECT to_jsonb(t) FROM transactions_clean AS t ORDER BY transaction_id").fetchall()
    migrate.migrate(empty_dsn, to=10)
    assert (
        released.execute("SELECT to_jsonb(t) FROM transactions_clean AS t ORDER BY transaction_id").fetchall() == before
    )
    assert len(entries(released)) == 201
    assert released.execute(PROBLEMS).fetchall() == []
    assert looked_up(released, 200) == [DAY + dt.timedelta(days=200)]
    assert looked_up(released, looks_native) == looked_up(released, looks_moved) == [DAY]
    assert released.execute("SELECT last_value FROM equitie_private.displaced_number_blocks").fetchone() == (6,)
    assert made(released, SAME_MONTH) == compose(SAME_MONTH, 0)
    released.execute("SELECT setval(%s, %s, false)", (IDENTITY, -5_124))
    with pytest.raises(psycopg.errors.UniqueViolation):
        made(released, SAME_MONTH)
    migrate.migrate(empty_dsn)
    assert migrate.verify(empty_dsn) == ()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([(1, "infinity")], r"1 transactions have a date outside .* \(the first: infinity\)"),
        ([(1, "0202-03-04"), (2, "9999-12-31")], r"2 transactions have a date outside .* \(the first: 0202-03-04\)"),
        ([(0, "2024-01-01"), (-5, "2024-01-01")], r"2 transactions have an id that is not positive \(the first: -5\)"),
        ([(5, "2024-01-01"), (5, "2026-11-01")], r"1 transaction ids stand for more than one .* \(the first: 5\)"),
    ],
)
def test_rows_that_cannot_be_taken_over_are_named_and_nothing_changes(
    released: psycopg.Connection[Any], empty_dsn: str, rows: list[tuple[int, str]], complaint: str
) -> None:
    for row in rows:
        released.execute(INSERT, row)
    with pytest.raises(MigrationError, match=complaint):
        migrate.migrate(empty_dsn)
    assert released.execute("SELECT to_regclass('equitie_private.stray_transactions')").fetchone() == (None,)
    released.execute("DELETE FROM transactions_clean")
    migrate.migrate(empty_dsn)
    assert migrate.verify(empty_dsn) == ()


BROKEN: dict[str, tuple[Callable[[psycopg.Connection[Any]], object], str]] = {
    "a trigger is off": (
        lambda owner: owner.execute(
            "ALTER TABLE equitie_part.transactions_clean_default DISABLE TRIGGER claim_transaction_id"
        ),
        "lacks the trigger claim_transaction_id",
    ),
    "another trigger runs later": (
        lambda owner: owner.execute(
            "CREATE TRIGGER zz BEFORE UPDATE ON transactions_clean FOR EACH ROW"
            " EXECUTE FUNCTION equitie_private.set_updated_at()"
        ),
        "trigger zz .* runs after z_move_transaction",
    ),
    "an entry is gone": (
        lambda owner: owner.execute("DELETE FROM equitie_private.stray_transactions WHERE transaction_id = 7"),
        r"1 transactions have no entry .* \(the first: 7\)",
    ),
    "an entry is wrong": (
        lambda owner: owner.execute("UPDATE equitie_private.stray_transactions SET investor_id = 2"),
        r"2 transactions have no entry",
    ),
    "a native has an entry": (
        lambda owner: owner.execute(
            "INSERT INTO equitie_private.stray_transactions SELECT transaction_id, transaction_date, investor_id"
            " FROM transactions_clean WHERE transaction_id > 10 AND transaction_date = '2013-02-05'"
        ),
        r"1 transactions have no entry",
    ),
    "an entry is left over": (
        lambda owner: owner.execute("INSERT INTO equitie_private.stray_transactions VALUES (99, '2013-02-05', 1)"),
        r"1 entries of .* \(the first: 99\)",
    ),
    "the filter is behind": (
        lambda owner: owner.execute("SELECT setval('equitie_private.displaced_number_blocks', 0)"),
        "is behind the ids that left their day",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_verify_finds_what_is_broken(owner_dsn: str, owner: psycopg.Connection[Any], case: str) -> None:
    owner.execute(INSERT, (7, DAY))
    made(owner)
    moved = made(owner)
    owner.execute(MOVE, (NEXT_MONTH, moved))
    assert migrate.verify(owner_dsn) == ()
    damage, complaint = BROKEN[case]
    damage(owner)
    problems = migrate.verify(owner_dsn)
    assert len(problems) >= 1
    assert any(re.search(complaint, str(problem)) for problem in problems), problems
    owner.execute("TRUNCATE equitie_private.stray_transactions; DELETE FROM transactions_clean")
