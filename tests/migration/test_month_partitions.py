"""Months are there before their rows, a late row is never lost, and moving it to its month is no change of it."""

from __future__ import annotations

import datetime as dt
import threading
from typing import TYPE_CHECKING

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.migration.conftest import Platform

ENSURE = "SELECT equitie_private.ensure_month_partitions(%s, %s, %s)"
TRANSACTIONS = "public.transactions_clean"


def months(platform: Platform, table: str = TRANSACTIONS) -> dict[str, tuple[str, str]]:
    return {
        name: (first, last)
        for name, first, last in platform.rows(
            "SELECT partition::text, from_key::text, to_key::text FROM equitie_private.month_partition_bounds(%s)"
            " WHERE NOT is_default",
            table,
        )
    }


@pytest.mark.parametrize("table", ["transactions_clean", "audit_logs"])
def test_a_migrated_database_has_this_month_and_the_next_twelve(platform: Platform, table: str) -> None:
    first = platform.one("SELECT date_trunc('month', current_date)::date")
    expected = []
    for _ in range(13):
        expected.append(f"equitie_part.{table}_{first:%Y_%m}")
        first = (first + dt.timedelta(days=32)).replace(day=1)
    assert sorted(months(platform, f"public.{table}")) == expected


def test_missing_months_are_made_once(platform: Platform) -> None:
    with platform.acting(None) as conn:
        assert conn.execute(ENSURE, (TRANSACTIONS, "2013-01-31", "2013-03-01")).fetchone() == (3,)
        assert conn.execute(ENSURE, (TRANSACTIONS, "2013-01-01", "2013-04-30")).fetchone() == (1,)
        assert conn.execute(ENSURE, (TRANSACTIONS, "2013-01-01", "2013-04-30")).fetchone() == (0,)
    assert months(platform)["equitie_part.transactions_clean_2013_02"] == (
        "2013-02-01 00:00:00+00",
        "2013-03-01 00:00:00+00",
    )
    assert platform.one("SELECT obj_description('equitie_part.transactions_clean_2013_02'::regclass)")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spans=st.lists(
        st.tuples(st.dates(dt.date(1990, 1, 1), dt.date(1993, 12, 31)), st.integers(0, 200)), min_size=1, max_size=4
    )
)
def test_whatever_is_asked_for_is_covered_without_gap_or_overlap(
    platform: Platform, spans: list[tuple[dt.date, int]]
) -> None:
    with platform.owner.transaction(force_rollback=True):
        wanted = set()
        for first, days in spans:
            last = first + dt.timedelta(days=days)
            platform.owner.execute(ENSURE, (TRANSACTIONS, first, last))
            wanted |= {f"{first + dt.timedelta(days=day):%Y_%m}" for day in range(days + 1)}
        made = {name[-7:]: bounds for name, bounds in months(platform).items() if name[-7:] < "2000"}
        assert set(made) == wanted
        for month, (first_day, next_month) in made.items():
            start = dt.date(int(month[:4]), int(month[5:]), 1)
            assert first_day[:10] == start.isoformat()
            assert next_month[:10] == (start + dt.timedelta(days=32)).replace(day=1).isoformat()


def test_an_empty_span_makes_nothing(platform: Platform) -> None:
    assert platform.one(ENSURE, TRANSACTIONS, "2013-03-01", "2013-02-01") == 0


def test_late_rows_move_to_their_month_without_a_change(platform: Platform) -> None:
    for day in ("2013-01-31", "2013-02-01", "2013-02-28", "2013-03-01"):
        platform.owner.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES (%s, %s, %s, 1)",
            (platform.ids["deal_a"], platform.ids["investor_a"], day),
        )
    before = platform.rows("SELECT to_jsonb(t) FROM transactions_clean t ORDER BY transaction_id")
    assert platform.one("SELECT count(*) FROM equitie_part.transactions_clean_default") == 4
    mark = platform.mark()

    assert platform.one(ENSURE, TRANSACTIONS, "2013-02-10", "2013-02-10") == 1

    assert platform.one("SELECT count(*) FROM equitie_part.transactions_clean_default") == 2
    assert platform.one("SELECT count(*) FROM equitie_part.transactions_clean_2013_02") == 2
    assert platform.rows("SELECT to_jsonb(t) FROM transactions_clean t ORDER BY transaction_id") == before
    assert platform.events_after(mark, "action") == []
    # The default partition is audited again, and so is the new one.
    platform.owner.execute("DELETE FROM equitie_part.transactions_clean_default")
    platform.owner.execute("DELETE FROM equitie_part.transactions_clean_2013_02")
    assert platform.events_after(mark, "action") == [("DELETE",)] * 4


def test_late_audit_events_move_although_the_log_is_append_only(platform: Platform) -> None:
    platform.owner.execute(
        'INSERT INTO audit_logs ("timestamp", source, actor_type, action, entity_type)'
        " VALUES ('2013-02-10 12:00+00', 'sdk', 'database', 'READ', 'x'),"
        "  ('2013-02-28 23:59:59.999999+00', 'sdk', 'database', 'READ', 'x'),"
        "  ('2013-03-01 00:00+00', 'sdk', 'database', 'READ', 'x')"
    )
    platform.owner.execute("SET TimeZone = 'America/Los_Angeles'")
    assert platform.one(ENSURE, "public.audit_logs", "2013-02-10", "2013-02-10") == 1
    assert platform.one("SELECT count(*) FROM equitie_part.audit_logs_2013_02") == 2
    for table in ("audit_logs_2013_02", "audit_logs_default"):
        for statement in (
            "DELETE FROM equitie_part.{}",
            "TRUNCATE equitie_part.{}",
            "UPDATE equitie_part.{} SET action = ''",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
                platform.owner.execute(statement.format(table))


def test_a_new_month_has_everything_its_parent_has(platform: Platform) -> None:
    platform.owner.execute(ENSURE, (TRANSACTIONS, "2013-02-01", "2013-02-01"))
    partition = "equitie_part.transactions_clean_2013_02"
    triggers = "SELECT tgname, tgenabled FROM pg_trigger WHERE tgrelid = %s::regclass AND NOT tgisinternal ORDER BY 1"
    assert platform.rows(triggers, partition) == platform.rows(triggers, TRANSACTIONS)
    assert {
        ("audit_delete", "A"),
        ("audit_insert", "A"),
        ("audit_truncate", "A"),
        ("audit_update", "A"),
        ("claim_changed_transaction_id", "O"),
        ("claim_transaction_id", "O"),
        ("compose_transaction_id", "O"),
        ("release_transaction_id", "O"),
        ("release_transaction_ids", "O"),
        ("set_updated_at", "O"),
        ("z_move_transaction", "O"),
    } <= set(platform.rows(triggers, partition))
    assert platform.one(
        "SELECT count(*) FROM pg_index WHERE indrelid = %s::regclass AND indisvalid", partition
    ) == platform.one("SELECT count(*) FROM pg_index WHERE indrelid = 'transactions_clean'::regclass")
    foreign_keys = (
        "SELECT conname FROM pg_constraint WHERE conrelid = %s::regclass AND contype IN ('c', 'f') ORDER BY 1"
    )
    assert platform.rows(foreign_keys, partition) == platform.rows(foreign_keys, TRANSACTIONS)
    assert (
        platform.one(
            "SELECT count(*) FROM pg_class c, aclexplode(c.relacl) a"
            " WHERE c.oid = %s::regclass AND a.grantee <> c.relowner",
            partition,
        )
        == 0
    )


def test_two_callers_at_once_make_every_month_once(platform: Platform, owner_dsn: str) -> None:
    made: list[int] = []
    barrier = threading.Barrier(4)

    def ensure() -> None:
        with psycopg.connect(owner_dsn, autocommit=True) as conn:
            barrier.wait()
            row = conn.execute(ENSURE, (TRANSACTIONS, "2013-01-01", "2013-06-30")).fetchone()
            assert row is not None
            made.append(row[0])

    threads = [threading.Thread(target=ensure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [0, 0, 0, 6]


def test_a_month_is_made_while_the_table_is_being_read(platform: Platform, owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn) as reader:
        # With its date written out: a query that cannot be pruned when it is planned locks the default partition.
        reader.execute(f"SELECT count(*) FROM transactions_clean WHERE transaction_date = '{dt.date.today()}'")  # noqa: DTZ011
        platform.owner.execute("SET lock_timeout = '2s'")
        assert platform.one(ENSURE, TRANSACTIONS, "2013-02-01", "2013-02-01") == 1


@pytest.mark.parametrize(
    ("first", "last"), [("2013-02-10", "2013-03-01"), ("2013-02-27", "2013-04-01"), ("2013-02-10", "2013-02-11")]
)
def test_a_partition_made_by_hand_that_cuts_a_month_is_named(platform: Platform, first: str, last: str) -> None:
    platform.owner.execute(
        f"CREATE TABLE equitie_part.by_hand PARTITION OF transactions_clean FOR VALUES FROM ('{first}') TO ('{last}')"
    )
    with pytest.raises(
        psycopg.errors.InvalidObjectDefinition, match=r"partition equitie_part\.by_hand .* 2013-02-01 to 2013-03-01"
    ):
        platform.owner.execute(ENSURE, (TRANSACTIONS, "2013-02-01", "2013-02-01"))


@pytest.mark.parametrize("bounds", ["FROM ('2013-01-01') TO ('2014-01-01')", "FROM (MINVALUE) TO ('2013-03-01')"])
def test_a_larger_range_made_by_hand_covers_its_months(platform: Platform, bounds: str) -> None:
    platform.owner.execute(f"CREATE TABLE equitie_part.by_hand PARTITION OF transactions_clean FOR VALUES {bounds}")
    assert platform.one(ENSURE, TRANSACTIONS, "2013-01-01", "2013-02-28") == 0


def test_a_table_in_the_way_is_named(platform: Platform) -> None:
    platform.owner.execute("CREATE TABLE equitie_part.transactions_clean_2013_02 (a int)")
    with pytest.raises(psycopg.errors.DuplicateTable, match="is not a partition of"):
        platform.owner.execute(ENSURE, (TRANSACTIONS, "2013-02-01", "2013-02-01"))


@pytest.mark.parametrize(
    ("first", "last"),
    [(None, "2013-01-01"), ("2013-01-01", None), ("-infinity", "2013-01-01"), ("0001-01-01", "2013-01-01")],
)
def test_a_span_that_cannot_be_meant_is_refused(platform: Platform, first: str | None, last: str | None) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        platform.owner.execute(ENSURE, (TRANSACTIONS, first, last))


def test_only_our_tables_are_accepted(platform: Platform) -> None:
    platform.owner.execute("CREATE TABLE public.foreign_months (d date) PARTITION BY RANGE (d)")
    platform.owner.execute("CREATE TABLE public.foreign_months_default PARTITION OF foreign_months DEFAULT")
    for table in ("public.foreign_months", "public.companies_clean", "equitie_part.transactions_clean_default"):
        with pytest.raises(psycopg.errors.WrongObjectType, match="not one of the tables"):
            platform.owner.execute(ENSURE, (table, "2013-02-01", "2013-02-01"))


def test_a_partitioned_table_of_somebody_else_is_refused_whoever_asks(platform: Platform) -> None:
    platform.owner.execute(
        "CREATE TABLE public.foreign_months (d date) PARTITION BY RANGE (d);"
        "CREATE TABLE equitie_part.foreign_months_default PARTITION OF public.foreign_months DEFAULT;"
        "ALTER TABLE public.foreign_months OWNER TO service_role"
    )
    with pytest.raises(psycopg.errors.WrongObjectType, match="not one of the tables"), platform.acting(None) as conn:
        conn.execute(ENSURE, ("public.foreign_months", "2013-02-01", "2013-02-01"))


def test_ids_stay_unique_over_months(platform: Platform, add_transactions: Callable[[Platform, int], None]) -> None:
    add_transactions(platform, 100)
    assert platform.one("SELECT count(*) = count(DISTINCT transaction_id) FROM transactions_clean")
