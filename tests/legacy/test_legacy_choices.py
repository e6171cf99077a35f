"""What the user decides, what is refused until they have, and clean tables that hold rows already."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql
from tests.legacy.inspection import NAMES, fingerprint
from tests.legacy.legacy_platform import World, build

from equitie_data import legacy, migrate
from equitie_data.__main__ import main
from equitie_data.embedded import EmbeddedServer
from equitie_data.errors import LegacyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMALL = World(investors=6, deals=3, companies=4, primary=12, subnominee=3, secondary=2, lived=False)
PRIMARY = 'public."transactions.transaction.primary"'


@pytest.fixture
def small(owner: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    build(owner, SMALL)
    return owner


def value(conn: psycopg.Connection[Any], query: str, *params: Any) -> Any:
    row = conn.execute(query.encode(), params).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


def test_content_without_a_home_is_decided_about(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    small.execute(f'ALTER TABLE {PRIMARY} ADD COLUMN "100%% sure" text, ADD COLUMN "odd "" name" json, ADD unused int')
    small.execute(f'ALTER TABLE {PRIMARY} RENAME COLUMN "100%% sure" TO "100% sure"')
    small.execute(
        f"""UPDATE {PRIMARY} SET "100% sure" = 'yes', "odd "" name" = '{{"a": 1}}' WHERE transaction_id = 4"""
    )
    assert [problem.partition(",")[0] for problem in legacy.inspect(owner_dsn).problems] == [
        f"{PRIMARY} has content in 100% sure",
        f'{PRIMARY} has content in odd " name',
    ]
    for function in (legacy.plan, legacy.migrate):
        with pytest.raises(LegacyError, match=r"has content in 100% sure.*\(1 more"):
            function(owner_dsn)
    with pytest.raises(LegacyError, match="No old table has a column wrong"):
        legacy.plan(owner_dsn, legacy.Options(keep=("wrong", "100% sure"), drop=('odd " name',)))
    report = legacy.migrate(
        owner_dsn,
        legacy.Options(keep=("transactions.transaction.primary:100% sure",), drop=('odd " name',)),
    )
    table = next(table for table in report.tables if table.table == PRIMARY)
    assert "100% sure" in table.carried
    assert table.backup_only == ('odd " name',)
    assert "unused" in table.empty
    shown = f'SELECT "100% sure", "odd "" name", unused FROM {PRIMARY} WHERE transaction_id = 4'
    assert small.execute(shown.encode()).fetchone() == ("yes", None, None)
    assert (
        value(small, f'SELECT count("odd "" name") FROM {report.backup_schema}."transactions.transaction.primary"') == 1
    )
    assert legacy.verify(owner_dsn).problems == ()


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("CREATE VIEW public.report AS SELECT amount FROM public.transactions", "the view public.report"),
        (
            f"CREATE TABLE public.note (id int REFERENCES {PRIMARY})",
            "the foreign key note_id_fkey of public.note",
        ),
        (
            """CREATE TABLE public.other (id int);
            CREATE TRIGGER t AFTER INSERT ON public.other FOR EACH ROW EXECUTE FUNCTION public.sync_deal_to_new()""",
            "the trigger t of public.other",
        ),
        ("CREATE TABLE public.child () INHERITS (public.transactions)", "public.child, which inherits"),
    ],
)
def test_what_depends_on_the_old_tables_is_named(
    small: psycopg.Connection[Any], owner_dsn: str, statement: str, named: str
) -> None:
    small.execute(statement.encode())
    with pytest.raises(LegacyError, match=named):
        legacy.migrate(owner_dsn)
    assert fingerprint(small)["public.transactions"]


def test_any_table_may_be_missing(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    for schema, name in NAMES:
        if name in {"core.companies", "transactions.transaction.advisory"} or schema == "core":
            small.execute(sql.SQL("DROP TABLE {} CASCADE").format(sql.Identifier(schema, name)))
    small.execute(f"DROP TRIGGER sync_transaction_to_new ON {PRIMARY}")
    small.execute(
        "INSERT INTO companies_clean (company_id, company_name)"
        ' SELECT company_id, company_name FROM "companies.company";'
        "INSERT INTO deals_clean (deal_id, deal_name, deal_status)"
        ' SELECT deal_id, deal_name, deal_status FROM "deals.deal";'
        'DROP TABLE "companies.company" CASCADE;'
        'DROP TABLE "deals.deal" CASCADE;'
        "DROP TABLE public.transactions"
    )
    report = legacy.migrate(owner_dsn)
    assert {kind: report.rows(kind) for kind in report.counts} == {
        "investor": 6, "primary": 12, "subnominee": 3, "secondary": 2
    }  # fmt: skip
    assert legacy.verify(owner_dsn).problems == ()
    legacy.rollback(owner_dsn)
    assert value(small, "SELECT count(*) FROM deals_clean") == 3


def test_nothing_to_take_over_and_a_database_that_is_not_migrated(owner_dsn: str, empty_dsn: str) -> None:
    with pytest.raises(LegacyError, match="nothing to take over: none of the old tables is there"):
        legacy.migrate(owner_dsn)
    with pytest.raises(LegacyError, match=r"no clean tables.*run `python -m equitie_data migrate` first"):
        legacy.migrate(empty_dsn)
    with pytest.raises(LegacyError, match="nothing to roll back"):
        legacy.rollback(owner_dsn)
    with pytest.raises(LegacyError, match="No takeover is in force"):
        legacy.verify(owner_dsn)


@pytest.fixture
def standing(small: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """Clean tables with rows: the same, others under the same id, and ids that belong to something else."""
    small.execute(
        'INSERT INTO companies_clean OVERRIDING USER VALUE SELECT * FROM "companies.company" WHERE company_id = 99;'
        'INSERT INTO companies_clean SELECT * FROM "companies.company";'
        'INSERT INTO deals_clean SELECT * FROM "deals.deal" WHERE deal_id < 3;'
        "INSERT INTO investors_clean (investor_id, full_name, investor_status, updated_at)"
        " VALUES (2, 'Somebody Else', 'ACTIVE', '2020-01-01'), (50, 'Extra', 'ACTIVE', '2020-01-01');"
        "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount, updated_at)"
        " VALUES (5, 1, 50, '2023-01-01', 1, '2020-01-01');"
        "INSERT INTO transactions_clean"
        " (transaction_id, deal_id, investor_id, transaction_date, amount, transaction_type)"
        " VALUES (7, 1, 50, '2023-01-01', 1, 'advisory')"
    )
    return small


def test_standing_rows_are_never_overwritten_unasked(standing: psycopg.Connection[Any], owner_dsn: str) -> None:
    before = value(standing, "SELECT json_agg(t ORDER BY t.transaction_id)::text FROM transactions_clean AS t")
    with pytest.raises(LegacyError, match=r"investors 2"):
        legacy.migrate(owner_dsn)
    assert value(standing, "SELECT json_agg(t ORDER BY t.transaction_id)::text FROM transactions_clean AS t") == before
    assert legacy.inspect(owner_dsn).problems == ()


@pytest.mark.parametrize("rule", ["first", "latest"])
def test_standing_rows_follow_the_rule_and_come_back(
    standing: psycopg.Connection[Any], owner_dsn: str, rule: str
) -> None:
    everything = (
        "SELECT json_build_array((SELECT json_agg(t ORDER BY t.transaction_id) FROM transactions_clean AS t),"
        " (SELECT json_agg(i ORDER BY i.investor_id) FROM investors_clean AS i),"
        " (SELECT json_agg(d ORDER BY d.deal_id) FROM deals_clean AS d))::text"
    )
    before = json.loads(value(standing, everything))
    report = legacy.migrate(owner_dsn, legacy.Options(on_conflict=rule))
    assert report.rows("deal", "existing") == 2
    assert report.rows("company", "existing") == 4
    # What stood was changed in 2020, the old rows later.
    taken = rule == "latest"
    assert value(standing, "SELECT full_name FROM investors_clean WHERE investor_id = 2") == (
        "Investor Number 2" if taken else "Somebody Else"
    )
    assert (value(standing, "SELECT amount FROM transactions_clean WHERE transaction_id = 5") != 1) == taken
    assert report.rows("primary", "replaced") == int(taken)
    # An id of another kind of row is never merged with.
    assert value(standing, "SELECT transaction_type, amount FROM transactions_clean WHERE transaction_id = 7") == (
        "advisory", 1
    )  # fmt: skip
    assert report.renumbered["primary"] == 1
    assert value(standing, f"SELECT count(*) FROM {PRIMARY} WHERE transaction_id = 7 AND amount > 1") == 1
    assert legacy.verify(owner_dsn).problems == ()
    legacy.rollback(owner_dsn)
    after = json.loads(value(standing, everything))
    for rows in (*before, *after):
        for row in rows:
            del row["updated_at"]
    assert after == before


def test_names_that_must_be_unique(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    small.execute(
        "UPDATE \"companies.company\" SET company_name = 'Company 1', founding_year = NULL WHERE company_id = 3;"
        "UPDATE core.companies SET company_name = 'Company 1', founding_year = NULL WHERE company_id = 3;"
        "UPDATE \"investors.investor\" SET primary_email = 'investor1@example.com' WHERE id IN (1, 4);"
        "UPDATE core.investors SET primary_email = 'investor1@example.com' WHERE id IN (1, 4)"
    )
    deals = value(small, 'SELECT count(*) FROM "deals.deal" WHERE 3 IN (underlying_company_id, holding_entity)')
    with pytest.raises(LegacyError, match=r"companies 3"):
        legacy.migrate(owner_dsn)
    report = legacy.migrate(owner_dsn, legacy.Options(on_conflict="first"))
    assert report.rows("company") == 3
    assert report.left_out["investor"] == {"its primary_email is that of another investor": 1}
    assert value(small, "SELECT count(*), count(primary_email) FROM investors_clean") == (6, 5)
    # What referred to the company refers to the one that stands for it.
    assert deals > 0
    assert value(small, "SELECT count(*) FROM deals_clean WHERE 1 IN (underlying_company_id, holding_entity)") >= deals
    assert legacy.verify(owner_dsn).problems == ()


def test_roles_that_lose_their_privileges_are_named(small: psycopg.Connection[Any], owner_dsn: str) -> None:
    small.execute("GRANT SELECT ON public.transactions TO pg_monitor, service_role")
    assert legacy.inspect(owner_dsn).lost_grants == (("public.transactions", "pg_monitor"),)


def test_the_command_line(
    small: psycopg.Connection[Any], owner_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        code = main(["legacy", *arguments, "--dsn", owner_dsn])
        out = capsys.readouterr()
        assert max(map(len, out.out.splitlines()), default=0) <= 80 or "--json" in arguments, out.out
        return code, out.out + out.err

    small.execute(f"UPDATE {PRIMARY} SET status = 'pending' WHERE transaction_id = 3")
    small.execute("UPDATE core.transactions SET investor_id = 999 WHERE transaction_id = 4")
    small.execute("UPDATE public.transactions SET status = 'lost' WHERE transaction_id = 5")
    assert run("inspect")[0] == 0
    code, out = run("inspect", "--json")
    assert (code, len(json.loads(out)["tables"])) == (0, 12)
    rejects = tmp_path / "rejects.jsonl"
    code, out = run("plan", "--rejects", str(rejects))
    assert code == 0
    assert "rejected: 1 primary: orphan: investor_id refers to an investor that is not" in out
    assert [json.loads(line)["reason"] for line in rejects.read_text().splitlines()] == [
        "status is none of pending, completed, cancelled, failed",
        "orphan: investor_id refers to an investor that is not there",
    ]
    code, out = run("migrate", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["counts"]["primary"]["rejected"]["rows"] == 2
    assert report["orphans"] == 1
    assert run("migrate")[0] == 0
    assert run("plan")[0] == 1
    assert run("verify")[0] == 0
    code, out = run("verify", "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    small.execute("INSERT INTO companies_clean (company_name) VALUES ('New')")
    code, out = run("rollback")
    assert (code, "--discard-new" in out) == (1, True)
    code, out = run("rollback", "--discard-new", "--json")
    assert (code, json.loads(out)["discarded"]) == (0, {"companies_clean": 1})
    with pytest.raises(SystemExit, match="2"):
        main(["legacy", "migrate", "--on-conflict", "guess"])


@pytest.fixture
def owned_dsn(server: EmbeddedServer) -> Iterator[str]:
    """A database of its own, on a server of its own, whose owner may create roles and nothing else."""
    with EmbeddedServer(bin_dir=server.bin_dir) as running:
        with psycopg.connect(running.dsn(), autocommit=True) as conn:
            conn.execute("CREATE ROLE landlord LOGIN CREATEROLE PASSWORD 'for-a-second'")
            conn.execute("CREATE DATABASE owned OWNER landlord")
        yield running.dsn("owned", "landlord", "for-a-second")


def test_an_owner_who_is_no_superuser(owned_dsn: str) -> None:
    migrate.migrate(owned_dsn)
    with psycopg.connect(owned_dsn, autocommit=True) as conn:
        build(conn, SMALL)
        before = fingerprint(conn)
        for in_batches in (False, True):
            report = legacy.migrate(owned_dsn, in_batches=in_batches)
            assert report.rows("primary") == 12
            assert legacy.verify(owned_dsn).problems == ()
            legacy.rollback(owned_dsn)
            assert fingerprint(conn) == before
