"""The month report says what an aggregate says: in every snapshot, to everybody, whatever was written and refreshed."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equitie_data import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.migration.conftest import Platform

REPORT = "SELECT * FROM public.month_report(%s, %s)"
AGGREGATE = (
    "SELECT date_trunc('month', transaction_date)::date, transaction_type, status, currency, count(*), sum(amount),"
    " sum(gross_capital), sum(net_capital), sum(admin_fee) FROM public.transactions_clean"
    " WHERE transaction_date >= date_trunc('month', %s::date)"
    " AND transaction_date < date_trunc('month', %s::date) + interval '1 month'"
    " GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4"
)
REFRESH = "SELECT equitie_private.refresh_transaction_months()"
MOVE = "UPDATE transactions_clean SET transaction_date = %s WHERE transaction_date BETWEEN %s AND '2013-12-31'"
# One statement has one snapshot in every isolation level; a function that takes its own would show here.
BOTH = (
    "SELECT (SELECT array_agg(r::text ORDER BY r::text) FROM public.month_report('2013-01-01', '2013-12-31') AS r),"
    " (SELECT array_agg(a::text ORDER BY a::text) FROM (" + AGGREGATE % ("'2013-01-01'", "'2013-12-31'") + ") AS a)"
)
EVER = ("1000-01-01", "9006-12-31")
INSERT = (
    "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount, currency, status, gross_capital)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s)"
)
UPSERT = f"{INSERT} ON CONFLICT (transaction_id, transaction_date) DO UPDATE SET amount = 7"
MONTHS = ("2013-01", "2013-02", "2013-03", "2013-05")
"""Months of the model: the first three get partitions, rows of the last stay in the default partition."""


@pytest.fixture
def months(platform: Platform) -> Platform:
    platform.owner.execute(
        "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', '2013-01-01', '2013-03-31')"
    )
    platform.owner.execute(REFRESH)
    return platform


@pytest.fixture
def connect(owner_dsn: str) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    with contextlib.ExitStack() as stack:
        # A wait for a lock is a failure here, and not a test that hangs.
        yield lambda: stack.enter_context(psycopg.connect(owner_dsn, autocommit=True, options="-c lock_timeout=3s"))


def report_and_aggregate(
    connection: psycopg.Connection[Any], first: str = EVER[0], last: str = EVER[1]
) -> tuple[list[Any], list[Any]]:
    """Both, in the snapshot of the transaction that is open."""
    return (
        connection.execute(REPORT, (first, last)).fetchall(),
        connection.execute(AGGREGATE, (first, last)).fetchall(),
    )


def check(platform: Platform, first: str = EVER[0], last: str = EVER[1]) -> list[Any]:
    """The report is the aggregate, for the owner and for people who see all, some or nothing."""
    with platform.owner.transaction():
        platform.owner.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        report, aggregate = report_and_aggregate(platform.owner, first, last)
    assert [tuple(map(str, row)) for row in report] == [tuple(map(str, row)) for row in aggregate]
    for person in ("analyst", "investor_a", "nobody known", None):
        with platform.acting(person) as connection:
            seen, own = report_and_aggregate(connection, first, last)
            assert seen == own, person
            if person in ("analyst", None):
                assert seen == report
    return report


def insert(platform: Platform, connection: psycopg.Connection[Any], day: str, amount: Any = 1) -> None:
    connection.execute(
        INSERT, (platform.ids["deal_a"], platform.ids["investor_a"], day, amount, "USD", "completed", None)
    )


def noted(platform: Platform) -> list[str]:
    return [str(month) for (month,) in platform.rows("SELECT month FROM equitie_private.transaction_month_changes")]


# --- one after the other ------------------------------------------------------------------------------------------

days = st.builds("{}-{:02}".format, st.sampled_from(MONTHS), st.integers(1, 28))
amounts = st.decimals(-(10**6), 10**6, places=2).map(str)
currencies = st.sampled_from(["USD", "JPY"])
statuses = st.sampled_from(["pending", "completed"])
rows = st.tuples(st.sampled_from("ab"), days, amounts, currencies, statuses, st.none() | amounts | st.just("NaN"))
operations = st.one_of(
    st.tuples(st.just("insert"), st.lists(rows, min_size=1, max_size=4)),
    st.tuples(st.just("upsert"), st.lists(rows, min_size=1, max_size=2)),
    st.tuples(st.just("move"), days, days),
    st.tuples(st.just("change"), days, amounts, currencies, statuses),
    st.tuples(st.just("delete"), days),
    st.tuples(st.just("delete investor"), st.sampled_from("ab")),
    st.tuples(st.just("undo"), days),
    st.tuples(st.just("insert into partition"), st.integers(1, 3), amounts),
    st.tuples(st.just("truncate partition"), st.integers(1, 3)),
    st.just(("truncate",)),
    st.tuples(st.just("detach and attach"), st.integers(1, 3), st.booleans()),
    st.just(("refresh",)),
    st.just(("refresh",)),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(operations, min_size=1, max_size=10))
def test_the_report_is_the_aggregate_after_any_history(months: Platform, history: list[tuple[Any, ...]]) -> None:
    owner = months.owner
    with contextlib.suppress(psycopg.Rollback), owner.transaction(force_rollback=True):
        owner.execute("TRUNCATE transactions_clean")
        for name, *arguments in history:
            with owner.transaction():
                perform(months, name, *arguments)
            report, aggregate = report_and_aggregate(owner)
            assert [tuple(map(str, row)) for row in report] == [tuple(map(str, row)) for row in aggregate], name
            # A partial range cuts nothing: months are whole.
            report, aggregate = report_and_aggregate(owner, "2013-01-20", "2013-02-03")
            assert [tuple(map(str, row)) for row in report] == [tuple(map(str, row)) for row in aggregate], name


def perform(platform: Platform, name: str, *arguments: Any) -> None:
    owner = platform.owner
    if name in ("insert", "upsert"):
        for who, *values in arguments[0]:
            columns = [platform.ids[f"deal_{who}"], ensure_investor(platform, who), *values]
            owner.execute(INSERT if name == "insert" else UPSERT, columns)
    elif name == "move":
        owner.execute(MOVE, arguments)
    elif name == "change":
        day, amount, currency, status = arguments
        owner.execute(
            "UPDATE transactions_clean SET amount = %s, currency = %s, status = %s WHERE transaction_date <= %s",
            (amount, currency, status, day),
        )
    elif name == "delete":
        owner.execute("DELETE FROM transactions_clean WHERE transaction_date < %s", arguments)
    elif name == "delete investor":
        owner.execute("DELETE FROM investors_clean WHERE full_name = 'model ' || %s", arguments)
    elif name == "undo":
        with owner.transaction(force_rollback=True):
            owner.execute("DELETE FROM transactions_clean WHERE transaction_date < %s", arguments)
            owner.execute(REFRESH)
    elif name == "insert into partition":
        month, amount = arguments
        owner.execute(
            f"INSERT INTO equitie_part.transactions_clean_2013_0{month}"
            " (transaction_id, deal_id, investor_id, transaction_date, amount) VALUES (%s, %s, %s, %s, %s)",
            (
                random.randrange(1, 10**14),
                platform.ids["deal_a"],
                ensure_investor(platform, "a"),
                f"2013-0{month}-11",
                amount,
            ),
        )
    elif name == "truncate partition":
        owner.execute(f"TRUNCATE equitie_part.transactions_clean_2013_0{arguments[0]}")
    elif name == "truncate":
        owner.execute("TRUNCATE transactions_clean")
    elif name == "detach and attach":
        month, attach = arguments
        partition = f"equitie_part.transactions_clean_2013_0{month}"
        attached = platform.one("SELECT relispartition FROM pg_class WHERE oid = %s::regclass", partition)
        if attached:
            owner.execute(f"ALTER TABLE transactions_clean DETACH PARTITION {partition}")
        if attach or not attached:
            owner.execute(f"DELETE FROM {partition} WHERE amount > 0")
            owner.execute("DELETE FROM equitie_part.transactions_clean_default")
            bounds = f"FROM ('2013-0{month}-01') TO ('2013-0{month + 1}-01')"
            owner.execute(f"ALTER TABLE transactions_clean ATTACH PARTITION {partition} FOR VALUES {bounds}")
    else:
        owner.execute(REFRESH)


def ensure_investor(platform: Platform, letter: str) -> int:
    name = f"model {letter}"
    found = platform.rows("SELECT investor_id FROM investors_clean WHERE full_name = %s", name)
    if found:
        return int(found[0][0])
    return int(platform.one("INSERT INTO investors_clean (full_name) VALUES (%s) RETURNING investor_id", name))


def test_money_of_two_currencies_is_never_added(months: Platform) -> None:
    for currency, amount in (("USD", "0.10"), ("USD", "0.20"), ("JPY", "1000000000000000000000.01")):
        months.owner.execute(
            INSERT,
            (months.ids["deal_a"], months.ids["investor_a"], "2013-02-01", amount, currency, "completed", None),
        )
    for _ in range(2):
        report = check(months, "2013-01-01", "2013-12-31")
        assert [(row[3], row[4], str(row[5])) for row in report] == [
            ("JPY", 1, "1000000000000000000000.01"),
            ("USD", 2, "0.30"),
        ]
        months.owner.execute(REFRESH)


def test_a_refresh_counts_what_was_touched_and_nothing_else(months: Platform) -> None:
    assert months.one(REFRESH) == 0
    insert(months, months.owner, "2013-01-05")
    insert(months, months.owner, "2013-03-05")
    insert(months, months.owner, "2013-05-05")
    months.owner.execute(
        "UPDATE transactions_clean SET transaction_date = '2013-02-01' WHERE transaction_date = '2013-03-05'"
    )
    assert sorted(noted(months)) == ["2013-01-01", "2013-02-01", "2013-03-01", "2013-03-01", "2013-05-01"]
    assert months.one(REFRESH) == 3  # May has no partition of its own and is counted whenever it is asked for
    assert noted(months) == []
    assert months.one(REFRESH) == 0
    check(months)


def test_kept_months_are_reported_without_a_look_at_their_transactions(months: Platform) -> None:
    insert(months, months.owner, "2013-01-05")
    insert(months, months.owner, "2013-02-05")
    months.owner.execute(REFRESH)
    insert(months, months.owner, "2013-02-06")

    def read(first: str, last: str) -> set[str]:
        with months.owner.transaction():
            assert len(months.owner.execute(REPORT, (first, last)).fetchall()) == 1
            return {
                str(name)
                for (name,) in months.owner.execute(
                    "SELECT c.relname FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation"
                    " WHERE l.pid = pg_backend_pid() AND c.relname LIKE 'transactions_clean_2%' AND c.relkind = 'r'"
                )
            }

    assert read("2013-01-01", "2013-01-31") == set()
    assert read("2013-02-01", "2013-02-28") == {"transactions_clean_2013_02"}


def test_a_thousand_writes_of_one_transaction_leave_one_note(months: Platform) -> None:
    with months.owner.transaction():
        for day in range(1, 21):
            insert(months, months.owner, f"2013-01-{day:02}")
        with months.owner.transaction(force_rollback=True):
            insert(months, months.owner, "2013-02-01")
        insert(months, months.owner, "2013-02-02")
    assert sorted(noted(months)) == ["2013-01-01", "2013-02-01"]


def test_months_made_later_are_noted_and_kept_as_well(months: Platform) -> None:
    insert(months, months.owner, "2013-05-05")
    check(months)
    months.owner.execute(
        "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', '2013-05-01', '2013-05-31')"
    )
    check(months)
    assert months.one(REFRESH) == 1
    check(months)
    months.owner.execute("UPDATE equitie_part.transactions_clean_2013_05 SET amount = 9")
    assert noted(months) == ["2013-05-01"]
    check(months)


def test_a_session_in_replica_mode_is_noted(months: Platform) -> None:
    months.owner.execute("SET session_replication_role = replica")
    months.owner.execute(
        "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount)"
        " VALUES (7, %s, %s, '2013-01-05', 1)",
        (months.ids["deal_a"], months.ids["investor_a"]),
    )
    months.owner.execute("RESET session_replication_role")
    assert noted(months) == ["2013-01-01"]
    check(months)


def test_a_partition_whose_writes_go_unnoticed_is_not_kept_and_is_named(months: Platform, owner_dsn: str) -> None:
    months.owner.execute("SELECT equitie_private.watch_transaction_months('public.transactions_clean')")
    assert not migrate.verify(owner_dsn)
    partition = "equitie_part.transactions_clean_2013_01"
    months.owner.execute(f"ALTER TABLE {partition} DISABLE TRIGGER month_update")
    insert(months, months.owner, "2013-01-05")
    months.owner.execute(REFRESH)
    months.owner.execute(f"UPDATE {partition} SET amount = 9")
    check(months)
    assert f"{partition} lacks the trigger month_update" in str(migrate.verify(owner_dsn))


def test_a_partition_that_is_detached_takes_its_totals_along(months: Platform) -> None:
    partition = "equitie_part.transactions_clean_2013_01"
    bounds = "FOR VALUES FROM ('2013-01-01') TO ('2013-02-01')"
    insert(months, months.owner, "2013-01-05")
    insert(months, months.owner, "2013-02-05")
    months.owner.execute(REFRESH)
    months.owner.execute(f"ALTER TABLE transactions_clean DETACH PARTITION {partition}")
    assert [str(row[0]) for row in check(months, "2013-01-01", "2013-03-01")] == ["2013-02-01"]
    # The same rows come back as they went, or another table in their place: only the first is known.
    months.owner.execute(f"ALTER TABLE transactions_clean ATTACH PARTITION {partition} {bounds}")
    assert len(check(months, "2013-01-01", "2013-03-01")) == 2
    months.owner.execute(
        f"ALTER TABLE transactions_clean DETACH PARTITION {partition};"
        f"CREATE TABLE equitie_part.another PARTITION OF transactions_clean {bounds}"
    )
    insert(months, months.owner, "2013-01-06", 7)
    months.owner.execute("DELETE FROM equitie_private.transaction_month_changes")
    assert [int(row[5]) for row in check(months, "2013-01-01", "2013-01-31")] == [7]
    months.owner.execute("SELECT equitie_private.watch_transaction_months('equitie_part.another')")
    assert months.one(REFRESH) == 1
    assert [int(row[5]) for row in check(months, "2013-01-01", "2013-01-31")] == [7]


def test_a_partition_whose_bounds_have_changed_is_counted_anew(months: Platform) -> None:
    partition = "equitie_part.transactions_clean_2013_01"
    insert(months, months.owner, "2013-01-25")
    months.owner.execute(REFRESH)
    months.owner.execute(
        f"ALTER TABLE transactions_clean DETACH PARTITION {partition};"
        f"ALTER TABLE transactions_clean ATTACH PARTITION {partition} FOR VALUES FROM ('2013-01-10') TO ('2013-02-01')"
    )
    insert(months, months.owner, "2013-01-05")
    months.owner.execute("DELETE FROM equitie_private.transaction_month_changes")
    check(months)
    months.owner.execute(REFRESH)
    assert [row[4] for row in check(months, "2013-01-01", "2013-01-31")] == [2]


def test_a_range_of_many_months_keeps_its_whole_months_with_rows(months: Platform) -> None:
    # As an online conversion leaves it: everything up to the middle of some month in one partition.
    months.owner.execute("DROP TABLE equitie_part.transactions_clean_2013_01, equitie_part.transactions_clean_2013_02")
    months.owner.execute(
        "CREATE TABLE equitie_part.by_hand PARTITION OF transactions_clean"
        " FOR VALUES FROM (MINVALUE) TO ('2013-02-15');"
        "CREATE TABLE equitie_part.by_hand_2 PARTITION OF transactions_clean"
        " FOR VALUES FROM ('2013-02-15') TO ('2013-03-01');"
        "SELECT equitie_private.watch_transaction_months('public.transactions_clean')"
    )
    for day in ("1999-12-31", "2000-02-29", "2013-01-31", "2013-02-14", "2013-02-15"):
        insert(months, months.owner, day)
    months.owner.execute(REFRESH)
    kept = months.rows(
        "SELECT month::text FROM equitie_private.transaction_months WHERE month < '2013-04-01' ORDER BY 1"
    )
    assert [month for (month,) in kept] == ["1999-12-01", "2000-02-01", "2013-01-01", "2013-03-01"]
    check(months)
    insert(months, months.owner, "2000-02-01")
    insert(months, months.owner, "2005-02-01")
    check(months)
    assert months.one(REFRESH) == 2
    check(months)


# --- at the same time ---------------------------------------------------------------------------------------------


def test_a_write_that_a_refresh_could_not_see_is_not_lost(
    months: Platform, connect: Callable[[], psycopg.Connection[Any]]
) -> None:
    writer = connect()
    insert(months, months.owner, "2013-01-05")
    with writer.transaction():
        insert(months, writer, "2013-01-06", 100)
        assert months.one(REFRESH) == 1
        check(months)
        assert noted(months) == []
    check(months)
    assert noted(months) == ["2013-01-01"]
    assert months.one(REFRESH) == 1
    check(months)


def test_no_writer_waits_for_another_or_for_a_refresh(
    months: Platform, connect: Callable[[], psycopg.Connection[Any]]
) -> None:
    first, second, refresher = connect(), connect(), connect()
    insert(months, months.owner, "2013-01-05")
    with refresher.transaction(), first.transaction():
        assert refresher.execute(REFRESH).fetchone() == (1,)
        insert(months, first, "2013-01-06")
        insert(months, first, "2013-02-06")
        with second.transaction():
            # In the other order, so that locks on months would be a deadlock.
            insert(months, second, "2013-02-07")
            insert(months, second, "2013-01-07")
            second.execute("UPDATE transactions_clean SET amount = 5 WHERE transaction_date = '2013-01-05'")
        # A second refresh has nothing to wait for: the first one is counting what it would count.
        assert months.one(REFRESH) == 0
    check(months)
    assert months.one(REFRESH) == 2
    check(months)


@pytest.mark.parametrize("refreshes_first", [True, False])
def test_an_old_snapshot_sees_the_old_report(
    months: Platform, connect: Callable[[], psycopg.Connection[Any]], refreshes_first: bool
) -> None:
    reader = connect()
    insert(months, months.owner, "2013-01-05")
    if refreshes_first:
        months.owner.execute(REFRESH)
    with reader.transaction():
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        before, aggregate = report_and_aggregate(reader)
        assert before == aggregate
        insert(months, months.owner, "2013-01-06")
        assert report_and_aggregate(reader) == (before, before)
        months.owner.execute(REFRESH)
        assert report_and_aggregate(reader) == (before, before)
    assert check(months) != before


def test_a_refresh_in_an_old_snapshot_takes_no_note_it_has_not_counted(
    months: Platform, connect: Callable[[], psycopg.Connection[Any]]
) -> None:
    old = connect()
    insert(months, months.owner, "2013-01-05")
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT 1 FROM investors_clean").fetchall()
    insert(months, months.owner, "2013-01-06")
    assert old.execute(REFRESH).fetchone() == (1,)
    old.execute("COMMIT")
    check(months)
    assert noted(months) == ["2013-01-01"]
    # And one that another refresh has overtaken gives up.
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT 1 FROM investors_clean").fetchall()
    assert months.one(REFRESH) == 1
    with pytest.raises(psycopg.errors.SerializationFailure):
        old.execute(REFRESH)
    old.execute("ROLLBACK")
    check(months)


def test_every_snapshot_is_exact_while_writers_and_refreshes_run(
    months: Platform, connect: Callable[[], psycopg.Connection[Any]]
) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def writing(connection: psycopg.Connection[Any], own: int) -> None:
        rng = random.Random(own)
        for _ in range(100):
            with connection.transaction(force_rollback=rng.random() < 0.2):
                for _ in range(rng.randint(1, 3)):
                    day = f"{rng.choice(MONTHS)}-{rng.randint(1, 28):02}"
                    row = (months.ids["deal_a"], months.ids["investor_a"], day, rng.randint(-50, 50), "USD", "pending")
                    connection.execute(INSERT, (*row, own))
                if rng.random() < 0.3:
                    # Its own rows alone: two that take the same rows in different orders may deadlock by right.
                    connection.execute(
                        "UPDATE transactions_clean SET transaction_date = %s, amount = amount + 1"
                        " WHERE transaction_date BETWEEN '2013-01-01' AND '2013-03-31' AND gross_capital = %s",
                        (f"{rng.choice(MONTHS)}-15", own),
                    )

    def refreshing(connection: psycopg.Connection[Any]) -> None:
        while not stop.is_set():
            connection.execute(REFRESH)

    def attempt(work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    writers = [threading.Thread(target=attempt, args=(writing, connect(), own)) for own in range(3)]
    others = [threading.Thread(target=attempt, args=(refreshing, connect())) for _ in range(2)]
    compared = 0
    reader = connect()
    for thread in (*writers, *others):
        thread.start()
    try:
        while any(thread.is_alive() for thread in writers):
            with reader.transaction():
                reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                report, aggregate = report_and_aggregate(reader)
            assert report == aggregate
            both = reader.execute(BOTH).fetchone()
            assert both is not None
            assert both[0] == both[1]
            compared += 1
    finally:
        stop.set()
        for thread in (*writers, *others):
            thread.join()
    assert failures == []
    assert compared > 0
    check(months)
    months.owner.execute(REFRESH)
    assert noted(months) == []
    check(months)


# --- for whom -----------------------------------------------------------------------------------------------------


def test_everybody_is_told_of_the_rows_they_may_read(months: Platform) -> None:
    insert(months, months.owner, "2013-01-05", 11)
    months.owner.execute(
        INSERT, (months.ids["deal_b"], months.ids["investor_b"], "2013-01-06", 22, "USD", "completed", None)
    )
    for _ in range(2):
        told: dict[str | None, list[int]] = {}
        for person in ("investor_a", "investor_b", "viewer", "analyst", "superadmin", None):
            with months.acting(person) as connection:
                told[person] = [int(row[5]) for row in connection.execute(REPORT, ("2013-01-01", "2013-01-01"))]
        assert told == {
            "investor_a": [11],
            "investor_b": [22],
            "viewer": [],
            "analyst": [33],
            "superadmin": [33],
            None: [33],
        }
        months.owner.execute(REFRESH)


def test_the_totals_of_everybody_are_closed_to_investors(months: Platform) -> None:
    for table in ("transaction_months", "transaction_month_totals", "transaction_month_changes"):
        for person in ("investor_a", "inactive_admin"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), months.acting(person) as connection:
                connection.execute(f"SELECT FROM equitie_private.{table}")
        for person in ("admin", None):
            for statement in (f"DELETE FROM equitie_private.{table}", f"TRUNCATE equitie_private.{table}"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege), months.acting(person) as connection:
                    connection.execute(statement)
    with pytest.raises(psycopg.errors.InsufficientPrivilege), months.acting("inactive_admin") as connection:
        connection.execute(REPORT, EVER)
    for person in ("investor_a", "admin"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), months.acting(person) as connection:
            connection.execute(REFRESH)


@pytest.mark.parametrize(
    "policy",
    [
        "CREATE POLICY usd ON transactions_clean AS RESTRICTIVE FOR SELECT TO equitie_staff USING (currency = 'USD')",
        "ALTER POLICY transactions_select_staff ON transactions_clean USING (currency = 'USD')",
        "DROP POLICY transactions_select_staff ON transactions_clean",
    ],
)
def test_staff_whom_a_policy_binds_are_told_of_what_it_leaves(months: Platform, policy: str) -> None:
    for currency in ("USD", "JPY"):
        months.owner.execute(
            INSERT, (months.ids["deal_a"], months.ids["investor_a"], "2013-01-05", 1, currency, "completed", None)
        )
    months.owner.execute(REFRESH)
    months.owner.execute(policy)
    with months.acting("analyst") as connection:
        report, aggregate = report_and_aggregate(connection, "2013-01-01", "2013-01-31")
    assert report == aggregate
    assert {row[3] for row in report} <= {"USD"}


@pytest.mark.parametrize(("first", "last"), [(None, "2013-01-01"), ("2013-01-01", None)])
def test_a_range_without_an_end_is_refused(months: Platform, first: str | None, last: str | None) -> None:
    with pytest.raises(psycopg.errors.NullValueNotAllowed, match="must be dates"):
        months.owner.execute(REPORT, (first, last))


@pytest.mark.parametrize(
    ("first", "last", "months_seen"),
    [
        ("-infinity", "infinity", {"2013-01-01", "2013-02-01"}),
        ("2013-01-31", "2013-01-31", {"2013-01-01"}),
        ("2013-02-01", "infinity", {"2013-02-01"}),
        ("2013-02-01", "2013-01-01", set()),
        ("infinity", "infinity", set()),
    ],
)
def test_a_range_covers_whole_months_and_may_be_open(
    months: Platform, first: str, last: str, months_seen: set[str]
) -> None:
    months.owner.execute("DELETE FROM transactions_clean")
    insert(months, months.owner, "2013-01-05")
    insert(months, months.owner, "2013-02-05")
    for _ in range(2):
        assert {str(row[0]) for row in months.owner.execute(REPORT, (first, last))} == months_seen
        months.owner.execute(REFRESH)
