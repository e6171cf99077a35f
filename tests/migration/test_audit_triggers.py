"""A change is in the audit log if and only if it committed, by whatever path it came."""

from __future__ import annotations

import datetime as dt
import json
import random
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.migration.conftest import Platform

TODAY = dt.datetime.now(dt.timezone.utc).date()
# Too long for an index entry, and not to be compressed into one.
LONG = random.Random(0).randbytes(50_000).hex()
NEXT_MONTH = (TODAY.replace(day=1) + dt.timedelta(days=32)).replace(day=1)


def test_an_insert_keeps_the_whole_row_after(platform: Platform) -> None:
    mark = platform.mark()
    key = platform.one(
        "INSERT INTO companies_clean (company_name, founding_year) VALUES ('New', 1999) RETURNING company_id"
    )

    ((action, entity_type, entity_id, changes, source),) = platform.events_after(
        mark, "action", "entity_type", "entity_id", "changes", "source"
    )
    assert (action, entity_type, entity_id, source) == ("CREATE", "companies_clean", str(key), "trigger")
    assert changes == {"after": platform.one("SELECT to_jsonb(c) FROM companies_clean c WHERE company_id = %s", key)}


def test_an_update_keeps_the_columns_that_changed_on_both_sides(platform: Platform) -> None:
    mark = platform.mark()
    key = platform.ids["investor_a"]
    before = platform.one("SELECT updated_at FROM investors_clean WHERE investor_id = %s", key)
    platform.owner.execute("UPDATE investors_clean SET phone = '1', nationality = NULL WHERE investor_id = %s", (key,))

    ((action, changes, was_updated, is_updated),) = platform.events_after(
        mark,
        "action",
        "changes #- '{before,updated_at}' #- '{after,updated_at}'",
        "(changes #>> '{before,updated_at}')::timestamptz",
        "(changes #>> '{after,updated_at}')::timestamptz",
    )
    assert action == "UPDATE"
    assert changes == {"before": {"phone": None}, "after": {"phone": "1"}}
    assert before == was_updated < is_updated


@pytest.mark.parametrize(
    "assignment", ["phone = phone", "updated_at = now() + interval '1 s'", "full_name = full_name"]
)
def test_an_update_that_changes_nothing_leaves_no_event(platform: Platform, assignment: str) -> None:
    mark = platform.mark()
    platform.owner.execute(f"UPDATE investors_clean SET {assignment}")
    assert platform.events_after(mark, "action", "changes") == []


def test_an_update_that_changes_nothing_keeps_updated_at(platform: Platform) -> None:
    before = platform.rows("SELECT investor_id, updated_at FROM investors_clean ORDER BY 1")
    platform.owner.execute("UPDATE investors_clean SET phone = phone")
    assert platform.rows("SELECT investor_id, updated_at FROM investors_clean ORDER BY 1") == before


def test_a_delete_keeps_the_whole_row_before(platform: Platform) -> None:
    row = platform.one(
        "SELECT to_jsonb(t) FROM transactions_clean t WHERE transaction_id = %s", platform.ids["transaction_a0"]
    )
    mark = platform.mark()
    platform.owner.execute(
        "DELETE FROM transactions_clean WHERE transaction_id = %s", (platform.ids["transaction_a0"],)
    )
    ((action, entity_id, changes),) = platform.events_after(mark, "action", "entity_id", "changes")
    assert (action, entity_id, changes) == ("DELETE", str(platform.ids["transaction_a0"]), {"before": row})


def test_many_rows_of_one_statement_are_paired_rightly(
    platform: Platform, add_transactions: Callable[[Platform, int], None]
) -> None:
    add_transactions(platform, 500)
    # A plan that was cached for single rows must pair many as well.
    for _ in range(7):
        platform.owner.execute("UPDATE transactions_clean SET units = coalesce(units, 0) + 1 WHERE amount = 1")
    mark = platform.mark()
    platform.owner.execute(
        "UPDATE transactions_clean SET amount = amount * 10, transaction_id = transaction_id % 100000000 + 1"
    )

    events = platform.events_after(mark, "entity_id", "changes")
    assert len(events) == 506
    for entity_id, changes in events:
        assert changes["before"]["transaction_id"] == int(entity_id)
        assert changes["after"]["transaction_id"] == int(entity_id) % 100_000_000 + 1
        assert changes["after"]["amount"] == 10 * changes["before"]["amount"]


def test_an_upsert_is_a_create_or_an_update(platform: Platform) -> None:
    mark = platform.mark()
    platform.owner.execute(
        "INSERT INTO companies_clean (company_name, founding_year) VALUES ('Acme', 1950), ('Other', 1960)"
        " ON CONFLICT (company_name) DO UPDATE SET founding_year = excluded.founding_year"
    )
    events = dict(platform.events_after(mark, "action", "changes"))
    assert set(events) == {"CREATE", "UPDATE"}
    assert events["CREATE"]["after"]["company_name"] == "Other"
    assert events["UPDATE"]["after"]["founding_year"] == 1950


def test_merge_inserts_updates_and_deletes(platform: Platform) -> None:
    platform.owner.execute("INSERT INTO companies_clean (company_name) VALUES ('Gone')")
    mark = platform.mark()
    platform.owner.execute(
        "MERGE INTO companies_clean AS c"
        " USING (VALUES ('Acme', 1950), ('Gone', NULL), ('Other', 1960)) AS s (name, year)"
        " ON c.company_name = s.name"
        " WHEN MATCHED AND s.year IS NULL THEN DELETE"
        " WHEN MATCHED THEN UPDATE SET founding_year = s.year"
        " WHEN NOT MATCHED THEN INSERT (company_name, founding_year) VALUES (s.name, s.year)"
    )
    assert sorted(row[0] for row in platform.events_after(mark, "action")) == ["CREATE", "DELETE", "UPDATE"]


def test_copy_is_recorded(platform: Platform) -> None:
    mark = platform.mark()
    with (
        platform.owner.cursor() as cursor,
        cursor.copy("COPY transactions_clean (deal_id, investor_id, transaction_date, amount) FROM STDIN") as copy,
    ):
        for number in range(20):
            copy.write_row(
                (platform.ids["deal_a"], platform.ids["investor_a"], TODAY + dt.timedelta(days=number * 9), number)
            )
    amounts = [row[0]["after"]["amount"] for row in platform.events_after(mark, "changes")]
    assert amounts == list(range(20))


def test_a_cascade_is_recorded(platform: Platform) -> None:
    mark = platform.mark()
    platform.owner.execute("DELETE FROM deals_clean WHERE deal_id = %s", (platform.ids["deal_a"],))
    events = sorted(platform.events_after(mark, "entity_type", "action", "entity_id"))
    assert events == sorted(
        [("deals_clean", "DELETE", str(platform.ids["deal_a"]))]
        + [("transactions_clean", "DELETE", str(platform.ids[f"transaction_a{number}"])) for number in range(3)]
    )


def test_set_null_of_a_foreign_key_is_recorded(platform: Platform) -> None:
    mark = platform.mark()
    platform.owner.execute("DELETE FROM investors_clean WHERE investor_id = %s", (platform.ids["investor_b"],))
    ((changes,),) = platform.rows(
        "SELECT changes FROM audit_logs WHERE audit_id > %s AND entity_type = 'user_profiles'", mark
    )
    assert changes["before"]["investor_id"] == platform.ids["investor_b"]
    assert changes["after"]["investor_id"] is None


def test_a_move_to_another_month_is_one_update(platform: Platform) -> None:
    key = platform.ids["transaction_a0"]
    mark = platform.mark()
    platform.owner.execute(
        "UPDATE transactions_clean SET transaction_date = %s WHERE transaction_id = %s", (NEXT_MONTH, key)
    )
    ((action, entity_id, changes),) = platform.events_after(mark, "action", "entity_id", "changes")
    assert (action, entity_id) == ("UPDATE", str(key))
    assert changes["before"]["transaction_date"] == TODAY.isoformat()
    assert changes["after"]["transaction_date"] == NEXT_MONTH.isoformat()


def test_many_rows_that_move_between_months_are_paired_rightly(
    platform: Platform, add_transactions: Callable[[Platform, int], None]
) -> None:
    add_transactions(platform, 200)
    mark = platform.mark()
    platform.owner.execute(
        "UPDATE transactions_clean SET transaction_date = transaction_date + 31, amount = amount + 1000"
    )
    events = platform.events_after(mark, "action", "changes")
    assert [action for action, _ in events] == ["UPDATE"] * 206
    for _, changes in events:
        before, after = changes["before"], changes["after"]
        assert after["amount"] == before["amount"] + 1000
        moved = dt.date.fromisoformat(after["transaction_date"]) - dt.date.fromisoformat(before["transaction_date"])
        assert moved.days == 31


@pytest.mark.parametrize("operation", ["insert", "update", "delete"])
def test_a_write_that_names_a_partition_is_recorded_once(platform: Platform, operation: str) -> None:
    partition = f"equitie_part.transactions_clean_{TODAY:%Y_%m}"
    key = platform.ids["transaction_a0"]
    mark = platform.mark()
    if operation == "insert":
        platform.owner.execute(
            f"INSERT INTO {partition} (transaction_id, deal_id, investor_id, transaction_date, amount)"
            " VALUES (1000000, %s, %s, %s, 5)",
            (platform.ids["deal_a"], platform.ids["investor_a"], TODAY),
        )
    elif operation == "update":
        platform.owner.execute(f"UPDATE {partition} SET amount = 7 WHERE transaction_id = %s", (key,))
    else:
        platform.owner.execute(f"DELETE FROM {partition} WHERE transaction_id = %s", (key,))
    ((action, entity_type),) = platform.events_after(mark, "action", "entity_type")
    assert (action, entity_type) == (
        {"insert": "CREATE", "update": "UPDATE", "delete": "DELETE"}[operation],
        "transactions_clean",
    )


@pytest.mark.parametrize("target", ["public.transactions_clean", "a partition"])
def test_truncate_records_every_row_once(platform: Platform, target: str) -> None:
    partition = f"equitie_part.transactions_clean_{TODAY:%Y_%m}"
    table = partition if target == "a partition" else target
    expected = platform.rows(f"SELECT transaction_id::text, to_jsonb(t) FROM {table} t ORDER BY transaction_id")
    mark = platform.mark()
    platform.owner.execute(f"TRUNCATE {table}")
    events = platform.events_after(mark, "entity_id", "changes", "action", "metadata")
    assert sorted((entity_id, changes["before"]) for entity_id, changes, *_ in events) == expected
    assert {(action, json.dumps(metadata)) for *_, action, metadata in events} == {
        ("DELETE", '{"operation": "TRUNCATE"}')
    }


def test_truncate_of_a_plain_table_records_every_row(platform: Platform) -> None:
    mark = platform.mark()
    platform.owner.execute("TRUNCATE companies_clean CASCADE")
    found = platform.rows(
        "SELECT entity_type, count(*) FROM audit_logs WHERE audit_id > %s GROUP BY 1 ORDER BY 1", mark
    )
    assert found == [("companies_clean", 1), ("deals_clean", 2), ("transactions_clean", 6), ("user_profiles", 9)]


def test_truncate_of_the_parent_records_a_partition_without_triggers(platform: Platform) -> None:
    partition = f"equitie_part.transactions_clean_{TODAY:%Y_%m}"
    platform.owner.execute(f"DROP TRIGGER audit_truncate ON {partition}")
    mark = platform.mark()
    platform.owner.execute("TRUNCATE transactions_clean")
    assert len(platform.events_after(mark, "audit_id")) == 6


def test_a_rollback_leaves_no_event(platform: Platform) -> None:
    mark = platform.mark()
    with platform.owner.transaction(force_rollback=True):
        platform.owner.execute("UPDATE transactions_clean SET amount = amount + 1")
        assert len(platform.events_after(mark, "audit_id")) == 6
    with platform.owner.transaction(), platform.owner.transaction(force_rollback=True):
        platform.owner.execute("DELETE FROM transactions_clean")
    assert platform.events_after(mark, "audit_id") == []


def test_a_session_in_replica_mode_does_not_write_unseen(platform: Platform) -> None:
    mark = platform.mark()
    with platform.owner.transaction():
        platform.owner.execute("SET LOCAL session_replication_role = 'replica'")
        platform.owner.execute("UPDATE transactions_clean SET amount = amount + 1")
    assert len(platform.events_after(mark, "audit_id")) == 6


def test_the_event_says_who_acted(platform: Platform) -> None:
    mark = platform.mark()
    with platform.acting(
        "admin", ip_address="203.0.113.9", user_agent="web/1", session_id="s", request_id="r", tenant_id="t"
    ) as conn:
        conn.execute("UPDATE companies_clean SET founding_year = 1900")
    ((actor_type, user_id, ip, agent, session, request, tenant, reason, login, xid),) = platform.events_after(
        mark, "actor_type", "user_id", "host(ip_address)", "user_agent", "session_id", "request_id", "tenant_id",
        "reason", "session_role", "transaction_xid::text::bigint",
    )  # fmt: skip
    assert (actor_type, user_id, ip, agent) == ("user", platform.user_id_of("admin"), "203.0.113.9", "web/1")
    assert (session, request, tenant, reason) == ("s", "r", "t", None)
    assert login == "equitie_test_app"
    assert xid > 0


def test_the_service_and_the_owner_are_told_apart(platform: Platform) -> None:
    mark = platform.mark()
    with platform.acting(None) as conn:
        conn.execute("UPDATE companies_clean SET founding_year = 1901")
    platform.owner.execute("UPDATE companies_clean SET founding_year = 1902")
    assert platform.events_after(mark, "actor_type", "reason", "user_id") == [
        ("service", "a test", None),
        ("database", None, None),
    ]


def test_nobody_becomes_the_service_by_saying_so(platform: Platform) -> None:
    mark = platform.mark()
    with platform.acting("admin", actor="service", reason="I say so") as conn:
        conn.execute("UPDATE companies_clean SET founding_year = 1903")
    assert platform.events_after(mark, "actor_type") == [("user",)]


@pytest.mark.parametrize(
    ("claims", "context", "malformed"),
    [
        ("{", "{}", ["request.jwt.claims"]),
        ("", "no json", ["equitie.context"]),
        ("", "[" * 100_000, ["equitie.context"]),
        ('{"sub": "not a uuid"}', '{"request_id": "r"}', ["user_id"]),
        ("", '{"ip_address": "somewhere", "request_id": "r"}', ["ip_address"]),
        ("", '{"user_agent": "\\u0000"}', ["equitie.context"]),
        ("[]", "7", None),
        ("", json.dumps({"request_id": LONG, "user_agent": "u" * 100_000}), None),
    ],
)
def test_a_malformed_context_costs_neither_the_write_nor_its_event(
    platform: Platform, claims: str, context: str, malformed: list[str] | None
) -> None:
    mark = platform.mark()
    with platform.app.transaction():
        platform.app.execute(
            "SELECT set_config('request.jwt.claims', %s, true), set_config('equitie.context', %s, true),"
            " set_config('role', 'service_role', true)",
            (claims, context),
        )
        platform.app.execute("UPDATE companies_clean SET founding_year = 1904")
    ((metadata, user_id, request_id),) = platform.events_after(mark, "metadata", "user_id", "request_id")
    assert metadata == (None if malformed is None else {"malformed": malformed})
    assert user_id is None
    assert request_id in {None, "r", LONG[:256]}


def test_changes_do_not_depend_on_the_session(platform: Platform) -> None:
    platform.owner.execute("SET TimeZone = 'Pacific/Chatham'")
    platform.owner.execute("SET DateStyle = 'SQL, DMY'")
    mark = platform.mark()
    platform.owner.execute("UPDATE investors_clean SET join_date = '2020-02-01', phone = 'x'")
    for (changes,) in platform.events_after(mark, "changes"):
        assert changes["after"]["join_date"] == "2020-02-01"
        assert changes["after"]["updated_at"].endswith("+00:00")


def test_the_log_can_be_folded_back_into_the_rows(
    platform: Platform, add_transactions: Callable[[Platform, int], None]
) -> None:
    add_transactions(platform, 50)
    platform.owner.execute(
        "UPDATE transactions_clean SET amount = amount / 3, transaction_date = transaction_date + 40"
    )
    platform.owner.execute("DELETE FROM transactions_clean WHERE transaction_id %% 3 = 0".replace("%%", "%"))
    platform.owner.execute("UPDATE transactions_clean SET status = 'completed', units = 1.50")

    state: dict[str, dict[str, Any]] = {}
    for entity_id, action, changes in platform.rows(
        "SELECT entity_id, action, changes FROM audit_logs WHERE entity_type = 'transactions_clean' ORDER BY audit_id"
    ):
        if action == "DELETE":
            assert state.pop(entity_id) == changes["before"]
        else:
            state.setdefault(entity_id, {}).update(changes["after"])
    platform.owner.execute("SET TimeZone = 'UTC'")
    rows = {
        row[0]: row[1] for row in platform.rows("SELECT transaction_id::text, to_jsonb(t) FROM transactions_clean t")
    }
    assert state == rows


@pytest.mark.parametrize("table", ["public.audit_logs", "equitie_part.audit_logs_default", "a month"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET action = 'x'", "DELETE FROM {}", "TRUNCATE {}"])
def test_the_log_is_append_only_even_for_its_owner(platform: Platform, table: str, statement: str) -> None:
    name = f"equitie_part.audit_logs_{TODAY:%Y_%m}" if table == "a month" else table
    if "default" in name:
        platform.owner.execute(
            'INSERT INTO audit_logs ("timestamp", source, actor_type, action, entity_type)'
            " VALUES ('2001-01-01', 'sdk', 'database', 'READ', 'x')"
        )
    platform.owner.execute("SET session_replication_role = 'replica'")
    before = platform.one("SELECT count(*) FROM audit_logs")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        platform.owner.execute(statement.format(name))
    assert platform.one("SELECT count(*) FROM audit_logs") == before


def test_a_column_added_later_is_recorded_before_and_after_tracking_again(platform: Platform) -> None:
    platform.owner.execute("ALTER TABLE companies_clean ADD COLUMN motto text, ADD COLUMN place point")
    mark = platform.mark()
    platform.owner.execute("UPDATE companies_clean SET motto = 'onwards', place = '(1,2)'")
    ((changes,),) = platform.events_after(mark, "changes")
    assert changes["after"]["motto"] == "onwards"

    platform.owner.execute("SELECT equitie_private.track('companies_clean')")
    mark = platform.mark()
    platform.owner.execute("UPDATE companies_clean SET motto = motto, place = '(1,2)'")
    platform.owner.execute("UPDATE companies_clean SET place = '(1,3)'")
    ((changes,),) = platform.events_after(mark, "changes")
    assert set(changes["after"]) == {"place", "updated_at"}


def test_a_table_without_primary_key_is_refused(platform: Platform) -> None:
    platform.owner.execute("CREATE TABLE public.keyless (a int)")
    with pytest.raises(psycopg.errors.InvalidTableDefinition, match="no primary key"):
        platform.owner.execute("SELECT equitie_private.track('public.keyless')")


def test_a_table_with_a_composite_key_and_odd_names_can_be_tracked(platform: Platform) -> None:
    platform.owner.execute(
        'CREATE TABLE public."Odd %s name" ("it\'s" int, "b%%" text, "select" json, PRIMARY KEY ("b%%", "it\'s"))'
    )
    platform.owner.execute("SELECT equitie_private.track('public.\"Odd %s name\"')")
    mark = platform.mark()
    platform.owner.execute("INSERT INTO public.\"Odd %s name\" VALUES (1, 'x', '{\"a\":1}')")
    platform.owner.execute('UPDATE public."Odd %s name" SET "select" = \'{"a": 1}\'')
    platform.owner.execute('UPDATE public."Odd %s name" SET "select" = \'{"a": 2}\'')
    platform.owner.execute('TRUNCATE public."Odd %s name"')
    events = platform.events_after(mark, "action", "entity_type", "entity_id")
    assert events == [(action, "Odd %s name", "x:1") for action in ("CREATE", "UPDATE", "DELETE")]


def record(conn: psycopg.Connection[Any], *events: dict[str, Any]) -> int:
    row = conn.execute("SELECT equitie_private.record_audit_events(%s)", (json.dumps(events),)).fetchone()
    assert row is not None
    return int(row[0])


EXPORT = {"action": "EXPORT", "entity_type": "investor", "entity_id": "7", "metadata": {"format": "csv"}}


def test_a_user_records_events_only_as_themself(platform: Platform) -> None:
    mark = platform.mark()
    with platform.acting("investor_a") as conn:
        assert record(conn, {**EXPORT, "user_id": str(platform.user_id_of("admin")), "reason": "x"}, EXPORT) == 2
    assert (
        platform.events_after(mark, "actor_type", "user_id", "source", "reason", "metadata")
        == [("user", platform.user_id_of("investor_a"), "sdk", None, {"format": "csv"})] * 2
    )


def test_the_service_records_events_for_users_and_itself(platform: Platform) -> None:
    mark = platform.mark()
    login = {
        "action": "LOGIN",
        "entity_type": "user",
        "user_id": str(platform.user_id_of("viewer")),
        "ip_address": "2001:db8::1",
    }
    with platform.acting(None) as conn:
        record(conn, login, {**EXPORT, "reason": "nightly"}, EXPORT, {**EXPORT, "actor_type": "user"})
    assert platform.events_after(mark, "actor_type", "user_id", "reason", "host(ip_address)") == [
        ("user", platform.user_id_of("viewer"), None, "2001:db8::1"),
        ("service", None, "nightly", None),
        ("service", None, "a test", None),
        ("user", None, "a test", None),
    ]


def test_one_malformed_event_costs_its_field_and_no_event(platform: Platform) -> None:
    mark = platform.mark()
    user = str(platform.user_id_of("viewer"))
    with platform.acting(None) as conn:
        record(
            conn,
            {**EXPORT, "user_id": user, "ip_address": "not one"},
            {**EXPORT, "user_id": "nobody", "ip_address": "203.0.113.1", "metadata": None},
            {**EXPORT, "user_id": user, "ip_address": "203.0.113.2"},
        )
    assert platform.events_after(mark, "user_id::text", "host(ip_address)", "metadata") == [
        (user, None, {"format": "csv", "malformed": ["ip_address"]}),
        (None, "203.0.113.1", {"malformed": ["user_id"]}),
        (user, "203.0.113.2", {"format": "csv"}),
    ]


def test_no_event_lies_in_the_future(platform: Platform) -> None:
    mark = platform.mark()
    with platform.acting(None) as conn:
        record(conn, {**EXPORT, "timestamp": "2999-01-01T00:00:00Z"}, {**EXPORT, "timestamp": "2001-02-03T00:00:00Z"})
    assert platform.events_after(mark, '"timestamp" <= clock_timestamp()', "date_part('year', \"timestamp\")::int") == [
        (True, TODAY.year),
        (True, 2001),
    ]


@pytest.mark.parametrize("events", ["{}", "null", "7"])
def test_events_must_be_an_array(platform: Platform, events: str) -> None:
    with (
        pytest.raises(psycopg.errors.InvalidParameterValue, match="JSON array"),
        platform.acting(None) as conn,
    ):
        conn.execute("SELECT equitie_private.record_audit_events(%s)", (events,))
