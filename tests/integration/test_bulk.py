"""Bulk loading: every row once, whatever breaks; as the service, audited, with its partitions made before."""

from __future__ import annotations

import datetime as dt
import io
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equitie_data import Database, acting_as, as_service
from equitie_data.bulk import COLUMNS, LoadReport, load_transactions
from equitie_data.copy_rows import batches
from equitie_data.errors import BulkLoadError, ConfigurationError
from equitie_data.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = tuple[Any, ...]

FIRST = dt.date(2013, 1, 1)
USER = "6f1ed002-ab5a-4d5b-8d5c-9d1a2b3c4d5e"


@pytest.fixture
def owner(owner_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(owner_dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO deals_clean (deal_id, deal_name) VALUES (1, 'd'), (2, 'e');"
            "INSERT INTO investors_clean (investor_id, full_name) VALUES (1, 'i'), (2, 'j')"
        )
        yield connection


def rows(count: int) -> list[Row]:
    """Rows over some months, in no order, each with an amount of its own."""
    return [(1 + number % 2, 2, day(number), number, "USD", "primary", "pending") for number in range(1, count + 1)]


def day(number: int) -> dt.date:
    return FIRST + dt.timedelta(days=number * 37 % 100)


def amounts(owner: psycopg.Connection[Any]) -> list[int]:
    return [int(amount) for (amount,) in owner.execute("SELECT amount FROM transactions_clean ORDER BY amount")]


def counts(report: LoadReport) -> tuple[int, int, int]:
    return report.rows, report.loaded, report.skipped


class Sawn:
    """Rows whose source breaks off after so many."""

    def __init__(self, source: list[Row], after: int) -> None:
        self.source, self.after = source, after

    def __iter__(self) -> Iterator[Row]:
        yield from self.source[: self.after]
        raise OSError("the source broke off")


@pytest.mark.parametrize("streams", [1, 3])
def test_rows_are_loaded_audited_and_their_partitions_made(
    owner: psycopg.Connection[Any], database: Database, streams: int
) -> None:
    with as_service("nightly load"):
        report = load_transactions(database, rows(100), key="a", streams=streams, batch_rows=7)
    assert counts(report) == (100, 100, 0)
    assert (report.batches, report.partitions_created) == (15, 4)
    assert amounts(owner) == list(range(1, 101))
    assert owner.execute("SELECT count(*) FROM ONLY equitie_part.transactions_clean_default").fetchone() == (0,)
    assert owner.execute(
        "SELECT count(*), count(DISTINCT entity_id), min(actor_type), min(reason) FROM audit_logs"
        " WHERE entity_type = 'transactions_clean'"
    ).fetchone() == (100, 100, "service", "nightly load")


def test_values_arrive_as_they_were(owner: psycopg.Connection[Any], database: Database) -> None:
    columns = ("amount", "deal_id", "investor_id", "transaction_date", "units", "created_at", "parent_transaction_id")
    moment = dt.datetime(2013, 2, 3, 4, 5, 6, 789, tzinfo=dt.timezone(dt.timedelta(hours=-3)))
    row = (Decimal("-12345678901234567890.0100"), 1, 2, FIRST, None, moment, 2013010100000009)
    load_transactions(database, [row], key="a", columns=columns)
    found = owner.execute(f"SELECT {', '.join(columns)} FROM transactions_clean").fetchone()
    assert found == row
    assert str(found[0]) == "-12345678901234567890.0100"


def test_lines_of_a_file_are_loaded_as_typed_rows_are(owner: psycopg.Connection[Any], database: Database) -> None:
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows(50)).encode()
    report = load_transactions(database, io.BytesIO(text.rstrip(b"\n")), key="a", batch_rows=20)
    assert counts(report) == (50, 50, 0)
    assert amounts(owner) == list(range(1, 51))
    # It is the same load, so the rows that came as lines are known when they come as values.
    assert counts(load_transactions(database, rows(50), key="a", batch_rows=20)) == (50, 0, 50)


def test_a_load_that_broke_off_is_finished_by_the_same_call(owner: psycopg.Connection[Any], database: Database) -> None:
    with pytest.raises(OSError, match="broke off"):
        load_transactions(database, Sawn(rows(100), 55), key="a", batch_rows=10)
    left = len(amounts(owner))
    assert left % 10 == 0
    assert amounts(owner) == list(range(1, left + 1))
    assert counts(load_transactions(database, rows(100), key="a", batch_rows=10)) == (100, 100 - left, left)
    assert amounts(owner) == list(range(1, 101))
    assert counts(load_transactions(database, rows(100), key="a", batch_rows=10)) == (100, 0, 100)
    assert amounts(owner) == list(range(1, 101))


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_a_batch_the_server_refuses_ends_the_load_there(
    owner: psycopg.Connection[Any], database: Database, streams: int
) -> None:
    wrong = rows(60)
    wrong[25] = (1, 999, FIRST, 26, "USD", "primary", "pending")
    # The others are quicker: without an order of commits they would be there first.
    delay_rows_of(owner, investor=999)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        load_transactions(database, wrong, key="a", batch_rows=10, streams=streams)
    assert amounts(owner) == list(range(1, 21))
    # Whoever takes the row out moves all that follow; no later batch has brought them in before.
    assert counts(load_transactions(database, wrong[:25] + wrong[26:], key="a", batch_rows=10)) == (59, 39, 20)
    assert amounts(owner) == [amount for amount in range(1, 61) if amount != 26]


def delay_rows_of(owner: psycopg.Connection[Any], *, investor: int) -> None:
    owner.execute(
        "CREATE FUNCTION public.delay() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(0.3); RETURN NEW; END';"
        "CREATE TRIGGER delay BEFORE INSERT ON transactions_clean FOR EACH ROW"
        f" WHEN (NEW.investor_id = {investor}) EXECUTE FUNCTION public.delay()"
    )


def test_rows_behind_a_batch_that_is_known_with_other_rows_are_not_loaded(
    owner: psycopg.Connection[Any], database: Database
) -> None:
    load_transactions(database, rows(20), key="a", batch_rows=10)
    with pytest.raises(BulkLoadError, match="with other rows"):
        load_transactions(database, [rows(30)[29], *rows(29)], key="a", batch_rows=10, streams=3)
    assert amounts(owner) == list(range(1, 21))


@pytest.mark.parametrize("change", ["another row", "another order", "another size of batches", "other columns"])
def test_a_key_is_good_for_one_load_only(owner: psycopg.Connection[Any], database: Database, change: str) -> None:
    load_transactions(database, rows(20), key="a", batch_rows=10)
    other, columns, size = rows(20), COLUMNS, 10
    if change == "another row":
        other[15] = (*other[15][:3], 999, *other[15][4:])
    elif change == "another order":
        other.reverse()
    elif change == "another size of batches":
        size = 5
    else:
        columns = ("investor_id", "deal_id", *COLUMNS[2:])
    with pytest.raises(BulkLoadError, match="with other rows"):
        load_transactions(database, other, key="a", columns=columns, batch_rows=size)
    assert amounts(owner) == list(range(1, 21))
    assert counts(load_transactions(database, other, key="b", columns=columns, batch_rows=size)) == (20, 20, 0)


def test_a_trigger_that_drops_rows_is_noticed(owner: psycopg.Connection[Any], database: Database) -> None:
    owner.execute(
        "CREATE FUNCTION public.drop_some() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN IF NEW.amount = 7 THEN RETURN NULL; END IF; RETURN NEW; END';"
        "CREATE TRIGGER drop_some BEFORE INSERT ON transactions_clean FOR EACH ROW EXECUTE FUNCTION public.drop_some()"
    )
    with pytest.raises(BulkLoadError, match="9 of the 10 rows of batch 0 arrived"):
        load_transactions(database, rows(10), key="a")
    assert amounts(owner) == []


def test_a_connection_that_is_lost_under_a_batch_costs_nothing(
    owner: psycopg.Connection[Any], database: Database
) -> None:
    owner.execute(
        "CREATE SEQUENCE public.attempts; GRANT USAGE ON SEQUENCE public.attempts TO PUBLIC;"
        "CREATE FUNCTION public.fail_once() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN IF nextval(''public.attempts'') = 2 THEN PERFORM pg_terminate_backend(pg_backend_pid());"
        " PERFORM pg_sleep(10); END IF; RETURN NULL; END';"
        "ALTER FUNCTION public.fail_once() SECURITY DEFINER;"
        "CREATE TRIGGER z AFTER INSERT ON transactions_clean FOR EACH STATEMENT EXECUTE FUNCTION public.fail_once()"
    )
    report = load_transactions(database, rows(40), key="a", batch_rows=10)
    assert counts(report) == (40, 40, 0)
    assert amounts(owner) == list(range(1, 41))
    assert owner.execute("SELECT nextval('public.attempts')").fetchone() == (6,)


def test_a_service_under_policies_loads_as_well(owner: psycopg.Connection[Any], database: Database) -> None:
    # service_role belongs to every database of the server, so no test takes BYPASSRLS from it. A role that has its
    # privileges and policies, but not that attribute, is what it is where BYPASSRLS could not be given.
    owner.execute(
        "CREATE ROLE bulk_service; GRANT service_role TO bulk_service; GRANT bulk_service TO equitie_test_app"
    )
    try:
        with Database(Settings(dsn=database.settings.dsn, service_role="bulk_service")) as bound:
            report = load_transactions(bound, rows(30), key="a", batch_rows=10)
        assert counts(report) == (30, 30, 0)
        assert amounts(owner) == list(range(1, 31))
    finally:
        owner.execute("DROP OWNED BY bulk_service; DROP ROLE bulk_service")


def test_a_connection_string_will_do(owner: psycopg.Connection[Any], app_dsn: str) -> None:
    assert counts(load_transactions(app_dsn, rows(3), key="a")) == (3, 3, 0)
    reasons = "SELECT DISTINCT reason FROM audit_logs WHERE entity_type = 'transactions_clean'"
    assert owner.execute(reasons).fetchall() == [("bulk load",)]


def test_a_user_does_not_load_in_bulk(owner: psycopg.Connection[Any], database: Database) -> None:
    with acting_as(USER), pytest.raises(ConfigurationError, match="as_service"):
        load_transactions(database, rows(3), key="a")


@pytest.mark.parametrize(
    "arguments", [{"key": ""}, {"key": "k" * 201}, {"streams": 0}, {"streams": 99}, {"batch_rows": 0}], ids=str
)
def test_settings_that_cannot_be_meant_are_refused(database: Database, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        load_transactions(database, rows(3), **{"key": "a", **arguments})


def test_progress_counts_rows(owner: psycopg.Connection[Any], database: Database) -> None:
    class Counter:
        rows = 0

        def advance(self, count: int, /) -> None:
            self.rows += count

    counter = Counter()
    load_transactions(database, rows(45), key="a", batch_rows=10, progress=counter)
    assert counter.rows == 45
    assert counts(load_transactions(database, [], key="b")) == (0, 0, 0)


values = st.tuples(
    st.integers(1, 2),
    st.integers(1, 2),
    st.dates(FIRST, FIRST + dt.timedelta(days=70)),
    st.integers(-(10**12), 10**12) | st.decimals(-(10**9), 10**9, places=4),
    st.sampled_from(["USD", "JPY"]),
    st.sampled_from(["primary", "secondary"]),
    st.sampled_from(["pending", "failed"]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=st.lists(values, max_size=40), size=st.integers(1, 15), cut=st.integers(0, 40))
def test_a_source_that_breaks_off_anywhere_is_loaded_once(
    owner: psycopg.Connection[Any], database: Database, source: list[Row], size: int, cut: int
) -> None:
    owner.execute("DELETE FROM transactions_clean; DELETE FROM equitie_private.idempotency_keys")
    with pytest.raises(OSError, match="broke off"):
        load_transactions(database, Sawn(source, cut), key="a", batch_rows=size)
    load_transactions(database, source, key="a", batch_rows=size)
    found = owner.execute(f"SELECT {', '.join(COLUMNS)} FROM transactions_clean").fetchall()
    assert sorted(map(str, found)) == sorted(str((*row[:3], Decimal(row[3]), *row[4:])) for row in source)
    assert [batch.rows for batch in batches(source, COLUMNS, size)] == [
        min(size, len(source) - begin) for begin in range(0, len(source), size)
    ]
