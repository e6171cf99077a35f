"""An id finds its transaction, wherever it was moved, for whoever may see it: `Database.transactions`."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import attrs
import psycopg
import pytest

from equitie_data import AsyncDatabase, ConfigurationError, Database, acting_as, as_service
from equitie_data.errors import TransactionNotFoundError
from equitie_data.transaction_id import compose
from equitie_data.transaction_row import TransactionRow, by_id_in_month
from equitie_data.transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DAY = dt.date(2013, 2, 5)
SAME_MONTH = dt.date(2013, 2, 20)
NEXT_MONTH = dt.date(2013, 3, 7)
NO_PARTITION = dt.date(2031, 7, 1)


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


@pytest.fixture
def add(owner: psycopg.Connection[Any]) -> Callable[..., int]:
    """Insert a transaction and return its id."""

    def insert(day: dt.date = DAY, *, investor: int = 1, transaction_id: int | None = None) -> int:
        row = owner.execute(
            "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount)"
            " VALUES (coalesce(%s, nextval('public.transactions_clean_transaction_id_seq')), 1, %s, %s, 12.50)"
            " RETURNING transaction_id",
            (transaction_id, investor, day),
        ).fetchone()
        assert row is not None
        return int(row[0])

    return insert


@pytest.fixture
def person(owner: psycopg.Connection[Any]) -> Callable[..., UUID]:
    """Make a login and return its id."""

    def insert(role: str, investor: int | None = None) -> UUID:
        user = uuid4()
        owner.execute(
            "INSERT INTO user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, %s, %s)",
            (user, f"{user}@example.com", role, investor),
        )
        return user

    return insert


def test_a_row_has_the_columns_of_the_table(owner: psycopg.Connection[Any]) -> None:
    columns = owner.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'transactions_clean'::regclass AND attnum > 0"
        " ORDER BY attnum"
    ).fetchall()
    assert [field.name for field in attrs.fields(TransactionRow)] == [name for (name,) in columns]


def test_an_id_finds_its_transaction(database: Database, add: Callable[..., int]) -> None:
    native, legacy, late = add(), add(transaction_id=7), add(NO_PARTITION)
    with as_service("test"):
        for transaction_id, day in ((native, DAY), (legacy, DAY), (late, NO_PARTITION)):
            for _ in range(7):  # as prepared statements too
                row = database.transactions.get(transaction_id)
                assert row is not None
                assert (row.transaction_id, row.transaction_date, row.amount) == (transaction_id, day, Decimal("12.50"))
        for nowhere in (8, native + 1, compose(DAY, 99), compose(NO_PARTITION, 99), 0, -1, 2**63, -(2**70)):
            assert database.transactions.get(nowhere) is None


def test_what_is_no_id_is_refused(database: Database) -> None:
    with as_service("test"):
        for wrong in ("7", 7.0, None):
            with pytest.raises(ConfigurationError, match="must be an integer"):
                database.transactions.get(wrong)  # type: ignore[arg-type]
            with pytest.raises(ConfigurationError, match="must be an integer"):
                database.transactions.get_many([1, wrong])  # type: ignore[list-item]


def test_a_repr_says_nothing_of_what_the_transaction_is_about(database: Database, add: Callable[..., int]) -> None:
    with as_service("test"):
        row = database.transactions.get(add())
    assert repr(row) == f"TransactionRow(transaction_id={compose(DAY)}, transaction_date={DAY!r})"


def test_everybody_finds_their_own(database: Database, add: Callable[..., int], person: Callable[..., UUID]) -> None:
    mine, others = add(), add(investor=2)
    with as_service("test"):
        moved = [database.transactions.correct_date(add(investor=each), NEXT_MONTH).transaction_id for each in (1, 2)]
    for user, seen in (
        (person("investor", 1), [mine, moved[0]]),
        (person("investor", 2), [others, moved[1]]),
        (person("analyst"), [mine, others, *moved]),
        (person("viewer"), []),
    ):
        with acting_as(user):
            assert [each for each in (mine, others, *moved) if database.transactions.get(each)] == seen
            assert list(database.transactions.get_many([mine, others, *moved])) == seen


def test_many_are_found_in_the_order_asked_for(database: Database, add: Callable[..., int]) -> None:
    ids = [add(DAY + dt.timedelta(days=number)) for number in range(0, 60, 7)]
    with as_service("test"):
        database.transactions.correct_date(ids[3], NO_PARTITION)
        wanted = [ids[5], 99, ids[3], add(transaction_id=7), -1, ids[5], ids[0], compose(DAY, 5000)]
        found = database.transactions.get_many(iter(wanted))
        assert list(found) == [ids[5], ids[3], 7, ids[0]]
        assert all(row.transaction_id == each for each, row in found.items())
        assert found[ids[3]].transaction_date == NO_PARTITION
        assert found[7] == database.transactions.get(7)
        assert database.transactions.get_many([]) == database.transactions.get_many([99, -1]) == {}


def test_ten_thousand_at_once(database: Database, owner: psycopg.Connection[Any]) -> None:
    ids = owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT 1, 1, %s::date + g %% 50, g FROM generate_series(1, 10000) AS g RETURNING transaction_id",
        (DAY,),
    ).fetchall()
    with as_service("test"):
        found = database.transactions.get_many(each for (each,) in ids)
    assert list(found) == [each for (each,) in ids]


# --- correcting a date ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transaction_id", [None, 7])
def test_a_corrected_transaction_keeps_its_id(
    database: Database, owner: psycopg.Connection[Any], add: Callable[..., int], transaction_id: int | None
) -> None:
    transaction_id = add(transaction_id=transaction_id)
    with as_service("test"):
        for day in (SAME_MONTH, NEXT_MONTH, NO_PARTITION, NO_PARTITION, DAY, NEXT_MONTH):
            before = database.transactions.get(transaction_id)
            after = database.transactions.correct_date(transaction_id, day)
            assert before is not None
            assert after == database.transactions.get(transaction_id)
            assert attrs.evolve(after, transaction_date=before.transaction_date, updated_at=before.updated_at) == before
            assert after.transaction_date == day
    changes = owner.execute(
        "SELECT changes -> 'after' ->> 'transaction_date' FROM audit_logs WHERE action = 'UPDATE' ORDER BY audit_id"
    ).fetchall()
    assert [day for (day,) in changes] == [str(day) for day in (SAME_MONTH, NEXT_MONTH, NO_PARTITION, DAY, NEXT_MONTH)]


def test_an_idempotency_key_corrects_once(database: Database, add: Callable[..., int]) -> None:
    transaction_id = add()
    with as_service("test"):
        first = database.transactions.correct_date(transaction_id, NEXT_MONTH, idempotency_key="a")
        database.transactions.correct_date(transaction_id, SAME_MONTH)
        assert database.transactions.correct_date(transaction_id, NEXT_MONTH, idempotency_key="a") == first
        row = database.transactions.get(transaction_id)
    assert row is not None
    assert row.transaction_date == SAME_MONTH


def test_what_cannot_be_corrected(database: Database, add: Callable[..., int], person: Callable[..., UUID]) -> None:
    transaction_id = add()
    with as_service("test"):
        for nothing in (99, compose(DAY, 99), 0, 2**63):
            with pytest.raises(TransactionNotFoundError, match="who is acting"):
                database.transactions.correct_date(nothing, NEXT_MONTH)
        for wrong in (dt.datetime(2013, 3, 7, tzinfo=dt.timezone.utc), "2013-03-07", None):
            with pytest.raises(ConfigurationError, match=r"must be a datetime\.date"):
                database.transactions.correct_date(transaction_id, wrong)  # type: ignore[arg-type]
        with pytest.raises(psycopg.errors.CheckViolation, match="chk_transactions_date"):
            database.transactions.correct_date(transaction_id, dt.date(9999, 1, 1))
    # An analyst sees it and may not change it; an investor may change no transaction at all.
    for user, error in (
        (person("analyst"), TransactionNotFoundError),
        (person("investor", 1), psycopg.errors.InsufficientPrivilege),
    ):
        with acting_as(user):
            with pytest.raises(error):
                database.transactions.correct_date(transaction_id, NEXT_MONTH)
            assert database.transactions.get(transaction_id) is not None
    with acting_as(person("admin")):
        assert database.transactions.correct_date(transaction_id, NEXT_MONTH).transaction_date == NEXT_MONTH


def test_it_is_found_at_every_moment_while_it_is_being_moved(database: Database, add: Callable[..., int]) -> None:
    transaction_id = add()
    days = [DAY, SAME_MONTH, NEXT_MONTH, NO_PARTITION]
    running, missed, errors = threading.Event(), [], []
    running.set()

    def move(first: int) -> None:
        try:
            with as_service("test"):
                for turn in range(30):
                    database.transactions.correct_date(transaction_id, days[(first + turn) % 4])
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    def look() -> None:
        with as_service("test"):
            while running.is_set():
                if database.transactions.get(transaction_id) is None:
                    missed.append("get")
                if not database.transactions.get_many([transaction_id]):
                    missed.append("get_many")

    movers = [threading.Thread(target=move, args=(first,)) for first in (0, 2)]
    looker = threading.Thread(target=look)
    for thread in (*movers, looker):
        thread.start()
    for thread in movers:
        thread.join()
    running.clear()
    looker.join()
    assert errors == []
    assert missed == []


# --- what keeps it cheap ----------------------------------------------------------------------------------------------


def partitions_locked(connection: psycopg.Connection[Any]) -> set[str]:
    query = (
        "SELECT c.relname FROM pg_locks AS l INNER JOIN pg_class AS c ON c.oid = l.relation"
        " WHERE l.pid = pg_backend_pid() AND c.relkind = 'r' AND c.relispartition"
        " AND c.relname LIKE 'transactions_clean%'"
    )
    return {name.removeprefix("transactions_clean_") for (name,) in connection.execute(query, prepare=False)}


def test_nothing_locks_more_than_the_months_it_reads(owner: psycopg.Connection[Any], add: Callable[..., int]) -> None:
    native, legacy = add(), add(NO_PARTITION, transaction_id=7)

    def run(operation: Any, params: Any = None, *, row_factory: Any = None, **_: Any) -> Any:
        if callable(operation):
            return operation(owner)
        return owner.cursor(row_factory=row_factory).execute(operation, params).fetchall()

    transactions = Transactions(run, run)
    reads: list[tuple[Callable[[], Any], set[str]]] = [
        (lambda: transactions.get(native), {"2013_02"}),
        (lambda: transactions.get(legacy), {"default"}),
        (lambda: transactions.get_many([native, compose(NEXT_MONTH, 5)]), {"2013_02", "2013_03"}),
    ]
    # Often enough for psycopg to prepare the statements, and for the server to settle on plans for them.
    for call, locked in reads * 20:
        with owner.transaction():
            assert call()
            assert partitions_locked(owner) == locked
    plans = dict(owner.execute("SELECT statement, generic_plans FROM pg_prepared_statements", prepare=False).fetchall())
    assert plans[by_id_in_month(DAY.year, DAY.month).decode().replace("%s", "$1")] > 0

    for _ in range(10):
        for day, locked in ((SAME_MONTH, {"2013_02"}), (NEXT_MONTH, {"2013_02", "2013_03"})):
            with owner.transaction(force_rollback=True):
                transactions.correct_date(native, day)
                assert partitions_locked(owner) == locked


# --- asyncio ----------------------------------------------------------------------------------------------------------


def test_the_same_awaited(app_dsn: str, add: Callable[..., int]) -> None:
    native, legacy = add(), add(transaction_id=7)

    async def use() -> None:
        async with AsyncDatabase(app_dsn) as database:
            with as_service("test"):
                corrected = await database.transactions.correct_date(native, NEXT_MONTH)
                assert (corrected.transaction_id, corrected.transaction_date) == (native, NEXT_MONTH)
                assert await database.transactions.get(native) == corrected
                assert list(await database.transactions.get_many([legacy, 99, native])) == [legacy, native]
                assert await database.transactions.get(99) is None
                with pytest.raises(TransactionNotFoundError):
                    await database.transactions.correct_date(99, NEXT_MONTH)

    asyncio.run(use())
