"""The platform's real state, taken over, looked at through its old names, and given back."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from tests.legacy.inspection import NAMES, contents, fingerprint

from equitie_data import legacy
from equitie_data.errors import LegacyError

if TYPE_CHECKING:
    from collections.abc import Iterator

SUBNOMINEE = 'public."transactions.transaction.subnominee"'
CLEAN = ("companies_clean", "deals_clean", "investors_clean", "transactions_clean")


def value(conn: psycopg.Connection[Any], query: str, *params: Any) -> Any:
    row = conn.execute(query.encode(), params).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


def backup_of(schema: str, name: str) -> str:
    return name if schema == "public" else f"{schema}.{name}"


def test_a_plan_says_what_migrate_does_and_changes_nothing(real_state: psycopg.Connection[Any], owner_dsn: str) -> None:
    before = fingerprint(real_state)
    planned = legacy.plan(owner_dsn)
    assert fingerprint(real_state) == before
    assert [value(real_state, f"SELECT count(*) FROM {table}") for table in CLEAN] == [0, 0, 0, 0]
    assert value(real_state, "SELECT count(*) FROM equitie_private.legacy_runs") == 0
    done = legacy.migrate(owner_dsn)
    assert planned.counts == done.counts
    assert planned.renumbered == done.renumbered
    assert [table.carried for table in planned.tables] == [table.carried for table in done.tables]


def test_the_real_state_arrives_whole(real_state: psycopg.Connection[Any], owner_dsn: str) -> None:
    originals = {(schema, name): contents(real_state, schema, name) for schema, name in NAMES}
    seen = {(schema, name): contents(real_state, schema, name, "to_jsonb(t.*)") for schema, name in NAMES}
    report = legacy.migrate(owner_dsn)

    assert dict(
        real_state.execute("SELECT transaction_type, count(*) FROM transactions_clean GROUP BY 1").fetchall()
    ) == {"primary": 301, "subnominee": 53, "secondary": 14}
    assert [value(real_state, f"SELECT count(*) FROM {table}") for table in CLEAN[:3]] == [98, 29, 202]
    assert {kind: ends["read"][0] for kind, ends in report.counts.items() if ends["read"][0]} == {
        "company": 196, "deal": 58, "investor": 404, "primary": 903, "subnominee": 53, "secondary": 14
    }  # fmt: skip
    assert report.rows("primary", "duplicate") == 602
    assert report.rejected == report.left_out == {}
    assert report.renumbered == {"subnominee": 53, "secondary": 14}

    # The originals are untouched, to the byte, and nobody may look at them.
    assert report.backup_schema is not None
    for (schema, name), rows in originals.items():
        assert contents(real_state, report.backup_schema, backup_of(schema, name)) == rows
    assert value(
        real_state, "SELECT count(*) FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a"
        " WHERE n.nspname = %s AND a.grantee <> n.nspowner", report.backup_schema,
    ) == 0  # fmt: skip
    assert value(real_state, "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'sync_%%'") == 0
    assert value(real_state, "SELECT count(*) FROM pg_proc WHERE proname LIKE 'sync_%%'") == 0

    # And every old name shows what it showed: all columns, in their order, with their values.
    for (schema, name), rows in seen.items():
        shown = contents(real_state, schema, name, "to_jsonb(t.*)")
        assert [json.loads(row[1:-1].replace('""', '"').strip('"')) for row in shown] == [
            json.loads(row[1:-1].replace('""', '"').strip('"')) for row in rows
        ], name
        columns = "SELECT array_agg(column_name ORDER BY ordinal_position) FROM information_schema.columns"
        where = " WHERE table_schema = %s AND table_name = %s"
        assert value(real_state, columns + where, schema, name) == value(
            real_state, columns + where, report.backup_schema, backup_of(schema, name)
        )

    # What refers to a primary refers to the same one.
    assert value(
        real_state,
        "SELECT count(*) FROM transactions_clean s"
        " JOIN transactions_clean p ON p.transaction_id = s.parent_transaction_id"
        " AND p.transaction_type = 'primary' AND p.deal_id = s.deal_id WHERE s.transaction_type <> 'primary'",
    ) == 67  # fmt: skip
    money = value(real_state, f'SELECT sum(amount) FROM {report.backup_schema}."transactions.transaction.primary"')
    assert value(real_state, "SELECT sum(amount) FROM transactions_clean WHERE transaction_type = 'primary'") == money

    storage = report.storage
    assert storage is not None
    assert storage.saved_clean >= 0.61
    assert storage.saved_clean_rows >= 0.61
    assert storage.saved > 0.5
    assert report.together is not None

    checked = legacy.verify(owner_dsn)
    assert checked.problems == ()
    assert sum(source.in_clean for source in checked.sources) == sum(len(rows) for rows in originals.values())
    assert legacy.migrate(owner_dsn) == report


def test_new_rows_do_not_meet_old_ids(real_state: psycopg.Connection[Any], owner_dsn: str) -> None:
    legacy.migrate(owner_dsn)
    assert value(real_state, "INSERT INTO companies_clean (company_name) VALUES ('New') RETURNING company_id") == 99
    assert value(real_state, "INSERT INTO deals_clean (deal_name) VALUES ('New') RETURNING deal_id") == 30
    assert value(real_state, "INSERT INTO investors_clean (full_name) VALUES ('New') RETURNING investor_id") == 203


def test_rolling_back_gives_the_old_tables_back_as_they_were(
    real_state: psycopg.Connection[Any], owner_dsn: str
) -> None:
    before = fingerprint(real_state)
    legacy.migrate(owner_dsn)
    done = legacy.rollback(owner_dsn)
    assert fingerprint(real_state) == before
    assert sum(done.removed.values()) == 98 + 29 + 202 + 301 + 53 + 14
    assert [value(real_state, f"SELECT count(*) FROM {table}") for table in CLEAN] == [0, 0, 0, 0]
    assert value(real_state, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'backup%%'") == 0
    assert value(
        real_state,
        "SELECT count(*) FROM pg_class WHERE relname LIKE 'legacy\\_%%\\_details' OR relname LIKE '%%staging%%'",
    ) == 0  # fmt: skip
    # The sync triggers work again.
    real_state.execute(
        "UPDATE public.\"transactions.transaction.primary\" SET status = 'failed' WHERE transaction_id = 5"
    )
    assert value(real_state, "SELECT status FROM core.transactions WHERE transaction_id = 5") == "failed"
    # And it can be taken over again.
    assert legacy.migrate(owner_dsn).rows("primary") == 301


def test_a_rollback_that_would_lose_something_is_refused(real_state: psycopg.Connection[Any], owner_dsn: str) -> None:
    before = fingerprint(real_state)
    legacy.migrate(owner_dsn)
    real_state.execute("UPDATE transactions_clean SET status = 'failed' WHERE transaction_id IN (1, 2)")
    real_state.execute(
        'UPDATE public."transactions.transaction.primary" SET nominee = NOT nominee WHERE transaction_id = 3'
    )
    real_state.execute("INSERT INTO companies_clean (company_name) VALUES ('New')")
    real_state.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES (1, 1, current_date, 5)"
    )
    with pytest.raises(
        LegacyError, match=r"5 rows were changed.*1 in companies_clean.*1 in legacy_transaction_details"
    ):
        legacy.rollback(owner_dsn)
    done = legacy.rollback(owner_dsn, discard_new=True)
    assert done.discarded == {"companies_clean": 1, "legacy_transaction_details": 1, "transactions_clean": 3}
    # What others added stays, with what it refers to.
    assert done.kept == {"company": 2, "deal": 1, "investor": 1} or done.kept["deal"] == 1
    assert value(real_state, "SELECT count(*) FROM transactions_clean") == 1
    assert fingerprint(real_state) == before


def test_verify_finds_a_row_that_was_lost_and_knows_one_that_was_changed(
    real_state: psycopg.Connection[Any], owner_dsn: str
) -> None:
    legacy.migrate(owner_dsn)
    real_state.execute("UPDATE transactions_clean SET amount = 1 WHERE transaction_id = 7")
    real_state.execute("DELETE FROM transactions_clean WHERE transaction_id = 8")
    checked = legacy.verify(owner_dsn)
    assert checked.problems == ()
    assert [source.changed_since for source in checked.sources][6:9] == [2, 2, 2]
    with real_state.transaction():
        (partition,) = value(
            real_state, "SELECT array_agg(tableoid::regclass::text) FROM transactions_clean WHERE transaction_id = 9"
        )
        real_state.execute(f"ALTER TABLE {partition} DISABLE TRIGGER USER")
        real_state.execute("ALTER TABLE transactions_clean DISABLE TRIGGER USER")
        real_state.execute("DELETE FROM transactions_clean WHERE transaction_id = 9")
        real_state.execute(f"ALTER TABLE {partition} ENABLE TRIGGER USER")
        real_state.execute("ALTER TABLE transactions_clean ENABLE TRIGGER USER")
    found = legacy.verify(owner_dsn)
    assert len(found.problems) == 3
    assert found.problems[0] == (
        '1 rows of public."transactions.transaction.primary" are in no clean table and are not listed.'
    )
    assert sum(read - there for read, there in found.amounts.values()) > 0


def test_verify_finds_a_backup_that_was_altered(real_state: psycopg.Connection[Any], owner_dsn: str) -> None:
    report = legacy.migrate(owner_dsn)
    real_state.execute(f"UPDATE {report.backup_schema}.\"deals.deal\" SET deal_name = 'Another' WHERE deal_id = 3")
    problems = legacy.verify(owner_dsn).problems
    assert problems[0] == ('The original of public."deals.deal" in the backup is not what was taken over any more.')
    real_state.execute(f"DROP SCHEMA {report.backup_schema} CASCADE")
    with pytest.raises(LegacyError, match=r"backup .* is gone"):
        legacy.verify(owner_dsn)
    with pytest.raises(LegacyError, match=r"backup .* is gone"):
        legacy.rollback(owner_dsn)


@pytest.fixture
def as_person(real_state: psycopg.Connection[Any], owner_dsn: str, app_dsn: str) -> Iterator[Any]:
    """A way to speak as investor 5, as an analyst, as an admin, or as the service, after the takeover."""
    legacy.migrate(owner_dsn)
    users = {}
    for person, role, investor in (("five", "investor", 5), ("analyst", "analyst", None), ("admin", "admin", None)):
        users[person] = value(
            real_state,
            "INSERT INTO user_profiles (user_id, email, role, investor_id) VALUES (gen_random_uuid(), %s, %s, %s)"
            " RETURNING user_id::text",
            person, role, investor,
        )  # fmt: skip
    with psycopg.connect(app_dsn) as conn:

        def speak(person: str | None) -> psycopg.Connection[Any]:
            conn.rollback()
            claims = json.dumps({"sub": users[person]}) if person in users else ""
            role = "service_role"
            if person in users:
                role = value(conn, "SELECT equitie_private.database_role(%s)", users[person])
            elif person == "anon":
                role = "anon"
            conn.execute(
                "SELECT set_config('request.jwt.claims', %s, true), set_config('role', %s, true)", (claims, role)
            )
            return conn

        yield speak


def test_the_policies_hold_through_the_old_names(real_state: psycopg.Connection[Any], as_person: Any) -> None:
    own = value(
        real_state, "SELECT count(*) FROM transactions_clean WHERE investor_id = 5 AND transaction_type = 'primary'"
    )
    assert 0 < own < 301
    five = as_person("five")
    for name in ('public."transactions.transaction.primary"', "public.transactions"):
        assert value(five, f"SELECT count(*) FROM {name}") == own
        assert value(five, f"SELECT min(investor_id) = 5 AND max(investor_id) = 5 FROM {name}")
        assert value(five, f"SELECT count(term_sheet) FROM {name}") == own
    assert value(five, 'SELECT count(*) FROM public."investors.investor"') == 1
    assert value(five, "SELECT count(*) FROM equitie_private.legacy_transaction_details") == value(
        real_state, "SELECT count(*) FROM transactions_clean WHERE investor_id = 5"
    )
    assert value(as_person("analyst"), "SELECT count(*) FROM public.transactions") == 301
    for _schema, name in NAMES:
        if _schema == "public":
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                as_person("anon").execute(sql.SQL("SELECT FROM {}").format(sql.Identifier("public", name)))
    for person in ("five", "analyst"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            as_person(person).execute(
                "INSERT INTO public.transactions (deal_id, investor_id, transaction_date, amount)"
                " VALUES (1, 5, current_date, 1)"
            )
    # What came with a transaction follows it to its new investor.
    real_state.execute("UPDATE transactions_clean SET investor_id = 6 WHERE investor_id = 5")
    assert value(as_person("five"), "SELECT count(*) FROM equitie_private.legacy_transaction_details") == 0


def test_old_code_writes_through_the_old_names(real_state: psycopg.Connection[Any], as_person: Any) -> None:
    service = as_person(None)
    new_id = value(
        service,
        'INSERT INTO public."transactions.transaction.primary"'
        " (deal_id, investor_id, transaction_date, amount, gross_capital, nominee, term_sheet)"
        " VALUES (3, 5, '2024-11-05', 100, 120, true, 'new.pdf') RETURNING transaction_id",
    )
    assert str(new_id).startswith("20241105")
    for name in ('public."transactions.transaction.primary"', "public.transactions"):
        assert value(
            service,
            "SELECT amount, gross_capital, status, currency, nominee, term_sheet"
            f" FROM {name} WHERE transaction_id = %s",
            new_id,
        ) == (100, 120, "completed", "USD", True, "new.pdf")
    service.execute(
        "UPDATE public.transactions SET amount = amount + 1, status = 'cancelled', term_sheet = 'other.pdf'"
        " WHERE transaction_id = %s", (new_id,),
    )  # fmt: skip
    assert value(service, "SELECT amount, status FROM public.transactions_clean WHERE transaction_id = %s", new_id) == (
        Decimal(101), "cancelled",
    )  # fmt: skip
    # An update of one column leaves alone what new code made of another.
    service.execute("UPDATE public.transactions_clean SET amount = 55 WHERE transaction_id = %s", (new_id,))
    service.execute("UPDATE public.transactions SET nominee = false WHERE transaction_id = %s", (new_id,))
    assert value(service, "SELECT amount FROM public.transactions_clean WHERE transaction_id = %s", new_id) == 55

    sub_id = value(
        service,
        'INSERT INTO public."transactions.transaction.subnominee"'
        " (sub_nominee_investor_link, transaction, gross_capital_subnominee, subnominee_share_of_ticket)"
        " VALUES ('investor number 9', %s, 25, 0.25) RETURNING subnominee_id",
        new_id,
    )
    assert value(
        service,
        "SELECT investor_id, deal_id, transaction_date::text, amount, transaction_type, parent_transaction_id"
        " FROM public.transactions_clean WHERE transaction_id = %s",
        sub_id,
    ) == (9, 3, "2024-11-05", Decimal(25), "subnominee", new_id)
    sale = value(
        service,
        'INSERT INTO public."transactions.transaction.secondary"'
        " (seller_name, buyer_name, transaction, number_of_unit_sold, price_per_unit_sold, secondary_transaction_date)"
        " VALUES ('Investor Number 5', 'Investor Number 6', %s, 10, 2.5, '2025-01-01') RETURNING id",
        new_id,
    )
    assert value(
        service, "SELECT investor_id, amount, units FROM public.transactions_clean WHERE transaction_id = %s", sale
    ) == (6, Decimal("25.0"), 10)
    service.execute(
        'UPDATE public."transactions.transaction.secondary" SET number_of_unit_sold = 20 WHERE id = %s', (sale,)
    )
    assert value(service, "SELECT amount FROM public.transactions_clean WHERE transaction_id = %s", sale) == 50
    # A row with another id than before is found, and changed, by its old one.
    service.execute(
        'UPDATE public."transactions.transaction.subnominee" SET gross_capital_subnominee = 77 WHERE subnominee_id = 4'
    )
    assert value(
        service,
        'SELECT gross_capital_subnominee FROM public."transactions.transaction.subnominee" WHERE subnominee_id = 4',
    ) == 77  # fmt: skip
    assert value(service, "SELECT amount FROM public.transactions_clean WHERE transaction_id = 4") != 77
    service.execute('DELETE FROM public."transactions.transaction.subnominee" WHERE subnominee_id = 4')
    assert value(service, "SELECT count(*) FROM public.transactions_clean WHERE transaction_type = 'subnominee'") == 53
    assert value(service, "SELECT count(*) FROM public.transactions_clean WHERE transaction_id = 4") == 1

    company = value(
        service, "INSERT INTO public.\"companies.company\" (company_name) VALUES ('Newest') RETURNING company_id"
    )
    assert value(service, "SELECT company_name FROM public.companies_clean WHERE company_id = %s", company) == "Newest"
    service.execute("UPDATE public.\"investors.investor\" SET phone = '1' WHERE id = 5")
    assert value(service, "SELECT phone FROM public.investors_clean WHERE investor_id = 5") == "1"
    service.execute('DELETE FROM public."companies.company" WHERE company_id = %s', (company,))
    assert value(service, "SELECT count(*) FROM public.companies_clean WHERE company_id = %s", company) == 0


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        (
            "UPDATE public.transactions SET notes = 'x' WHERE transaction_id = 1",
            "nothing can be written there any more",
        ),
        (
            "UPDATE public.transactions SET transaction_id = 9999 WHERE transaction_id = 1",
            "id of a row cannot be changed",
        ),
        (
            "UPDATE public.transactions SET transaction_type = 'advisory' WHERE transaction_id = 1",
            "of type primary are",
        ),
        ("UPDATE public.transactions SET status = 'lost' WHERE transaction_id = 1", "status is none of"),
        (
            f"INSERT INTO {SUBNOMINEE} (sub_nominee_investor_link, transaction) VALUES ('Nobody', 1)",
            "sub_nominee_investor_link is the name of no investor",
        ),
        (
            f"INSERT INTO {SUBNOMINEE} (sub_nominee_investor_link, transaction) VALUES ('5', 99999)",
            "orphan",
        ),
    ],
)
def test_what_has_no_place_is_refused(as_person: Any, statement: str, says: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match=says):
        as_person(None).execute(statement.encode())


def test_an_admin_writes_through_the_old_names_too(as_person: Any) -> None:
    admin = as_person("admin")
    admin.execute("UPDATE public.transactions SET status = 'failed', transfer_due = 3 WHERE transaction_id = 2")
    assert value(admin, "SELECT status, transfer_due FROM public.transactions WHERE transaction_id = 2") == (
        "failed",
        3,
    )
    new_id = value(
        admin,
        "INSERT INTO public.transactions (deal_id, investor_id, transaction_date, amount, nominee)"
        " VALUES (1, 2, '2025-02-03', 9, true) RETURNING transaction_id",
    )
    assert value(admin, "SELECT amount, nominee FROM public.transactions WHERE transaction_id = %s", new_id) == (
        9,
        True,
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        admin.execute("DELETE FROM public.transactions WHERE transaction_id = 2")
