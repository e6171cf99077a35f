"""Adopting a database without a history: every difference is named, most with the statement that ends it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data import migrate
from equitie_data.errors import MigrationError
from equitie_data.migrations import directories
from equitie_data.migrations.catalog import differences, read_catalog
from equitie_data.migrations.session import open_owner
from equitie_data.migrations.statements import split_statements

if TYPE_CHECKING:
    from collections.abc import Callable

    from equitie_data.migrations.files import Migration

    Release = Callable[..., tuple[Migration, ...]]

SHIPPED = directories.ours().migrations
LAST = SHIPPED[-1]
A_MONTH = "equitie_part.transactions_clean_2001_01"


def forget(dsn: str) -> psycopg.Connection[Any]:
    """Take the history away, as in a database that somebody made by hand."""
    conn = psycopg.connect(dsn, autocommit=True)
    conn.execute("DROP SCHEMA equitie_migrations CASCADE")
    return conn


def sentences(report: migrate.BaselineReport) -> list[str]:
    return [difference.sentence for difference in report.differences]


def test_a_database_like_a_migrated_one_is_adopted(owner_dsn: str) -> None:
    with forget(owner_dsn) as owner:
        report = migrate.baseline(owner_dsn)
        assert report.differences == ()
        assert report.place == LAST.label
        assert report.recorded == tuple(migration.label for migration in SHIPPED)
        assert {entry.state for entry in migrate.status(owner_dsn)} == {"baselined"}
        migrate.check_current(owner)
    assert migrate.migrate(owner_dsn).applied == ()
    assert migrate.verify(owner_dsn) == ()
    with pytest.raises(MigrationError, match="nothing to adopt: every migration"):
        migrate.baseline(owner_dsn)


@pytest.mark.parametrize("place", [2, 3, 9])
def test_it_is_adopted_where_it_stands_and_goes_on_from_there(empty_dsn: str, owner_dsn: str, place: int) -> None:
    migrate.migrate(empty_dsn, to=place)
    with forget(empty_dsn) as owner:
        owner.execute("INSERT INTO companies_clean (company_name) VALUES ('c')")
        report = migrate.baseline(empty_dsn)
        assert report.place == SHIPPED[place - 1].label
        assert len(report.recorded) == place
        applied = migrate.migrate(empty_dsn).applied
        assert [each.version for each in applied] == [migration.version for migration in SHIPPED[place:]]
        assert owner.execute("SELECT count(*) FROM companies_clean").fetchone() == (1,)
    assert migrate.verify(empty_dsn) == ()


def test_a_wrong_place_is_told_apart(owner_dsn: str, empty_dsn: str) -> None:
    with forget(owner_dsn):
        told = sentences(migrate.baseline(owner_dsn, to=3))
    assert any("is a partitioned table, and should be a table" in sentence for sentence in told)
    migrate.migrate(empty_dsn, to=3)
    with forget(empty_dsn):
        told = sentences(migrate.baseline(empty_dsn, to=LAST.version))
    assert "The table public.audit_logs is missing." in told
    assert not any("audit_logs." in sentence for sentence in told), "what belongs to a missing table needs no saying"


# One of everything the catalogs know; each with a part of what is said about it.
BROKEN = [
    (
        "ALTER TABLE companies_clean ALTER COLUMN founding_year TYPE smallint",
        "has the type smallint, and should have the",
    ),
    ("ALTER TABLE companies_clean ALTER COLUMN company_name DROP NOT NULL", "has the nullability nullable, and should"),
    (
        "ALTER TABLE companies_clean ALTER COLUMN created_at DROP DEFAULT",
        "no default, and should have the default now()",
    ),
    ("ALTER TABLE deals_clean ALTER COLUMN deal_status SET DEFAULT 'active'", "the default 'active'::text, and should"),
    (
        "ALTER TABLE companies_clean DROP COLUMN company_website",
        "column public.companies_clean.company_website is missing",
    ),
    ("ALTER TABLE deals_clean DROP CONSTRAINT chk_deals_type", "chk_deals_type of public.deals_clean is missing"),
    (
        (
            "ALTER TABLE deals_clean DROP CONSTRAINT fk_deals_partner_company, ADD CONSTRAINT fk_deals_partner_company"
            " FOREIGN KEY (partner_company_id) REFERENCES companies_clean ON DELETE CASCADE"
        ),
        "fk_deals_partner_company of public.deals_clean has another definition",
    ),
    (
        (
            "ALTER TABLE deals_clean DROP CONSTRAINT chk_deals_currency, ADD CONSTRAINT chk_deals_currency"
            " CHECK (deal_currency ~ '^[A-Z]{3}$') NOT VALID"
        ),
        "has the validity not validated",
    ),
    ("DROP INDEX idx_deals_partner_company", "The index public.idx_deals_partner_company is missing"),
    (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_deals_holding_entity'::regclass",
        "validity INVALID",
    ),
    ("COMMENT ON TABLE companies_clean IS NULL", "has no comment; it should have: Companies"),
    ("COMMENT ON COLUMN deals_clean.deal_code IS 'x'", "has another comment; it should have: Short code"),
    ("COMMENT ON FUNCTION equitie_private.app_role() IS NULL", "equitie_private.app_role() has no comment"),
    ("DROP TRIGGER set_updated_at ON companies_clean", "trigger set_updated_at of public.companies_clean is missing"),
    ("ALTER TABLE deals_clean DISABLE TRIGGER set_updated_at", "has the firing disabled, and should have the firing"),
    ("ALTER TABLE investors_clean DISABLE ROW LEVEL SECURITY", "has the row-level security off, and should have"),
    (
        "DROP POLICY companies_select_staff ON companies_clean",
        "companies_select_staff of public.companies_clean is missing",
    ),
    (
        "ALTER POLICY investors_select_authenticated ON investors_clean USING (true)",
        "select_authenticated of public.inv",
    ),
    ("GRANT DELETE ON companies_clean TO anon", "has the privileges of anon DELETE, and should have no privileges"),
    ("REVOKE SELECT ON deals_clean FROM authenticated", "has no privileges of authenticated, and should have"),
    ("GRANT UPDATE (primary_email) ON investors_clean TO authenticated", "primary_email has the privileges of auth"),
    ("GRANT EXECUTE ON FUNCTION equitie_private.database_role(uuid) TO PUBLIC", "has the privileges of PUBLIC EXECUTE"),
    ("GRANT USAGE ON SCHEMA equitie_part TO anon", "The schema equitie_part has the privileges of anon USAGE"),
    (
        "CREATE OR REPLACE FUNCTION equitie_private.is_admin() RETURNS boolean LANGUAGE sql AS 'SELECT true'",
        "equitie_private.is_admin() has another definition than the migrations give it",
    ),
    ("DROP FUNCTION equitie_private.inet_or_null(text)", "equitie_private.inet_or_null(candidate text) is missing"),
    (f"DROP TRIGGER audit_insert ON {A_MONTH}", f"The partition {A_MONTH} lacks the trigger audit_insert"),
    (f"GRANT SELECT ON {A_MONTH} TO anon", f"The partition {A_MONTH} has the privileges of anon SELECT"),
    ("GRANT SELECT ON equitie_part.audit_logs_default TO anon", "audit_logs_default has the privileges of anon SELECT"),
]

ADDED = [
    ("ALTER TABLE companies_clean ADD COLUMN motto text", "The column public.companies_clean.motto is made by no migr"),
    (
        "CREATE INDEX mine ON deals_clean (deal_date)",
        "The index public.mine of public.deals_clean is made by no migration.",
    ),
    (
        "ALTER TABLE deals_clean ADD CONSTRAINT mine CHECK (deal_id > 0)",
        "The constraint mine of public.deals_clean is m",
    ),
    (
        f"CREATE INDEX other ON {A_MONTH} (amount)",
        f"The partition {A_MONTH} has the index equitie_part.other of its own.",
    ),
    ("CREATE TABLE equitie_private.mine (a int)", "The table equitie_private.mine is made by no migration."),
]


@pytest.fixture
def with_a_month(owner_dsn: str) -> str:
    """The owner's DSN of a database that has the month the tests break."""
    with psycopg.connect(owner_dsn) as conn:
        conn.execute("SELECT equitie_private.ensure_month_partitions('transactions_clean', '2001-01-01', '2001-01-01')")
    return owner_dsn


def run_all(dsn: str, script: str) -> None:
    with open_owner(dsn) as session:
        for statement in split_statements(script):
            session.execute(statement.text)


@pytest.mark.parametrize(("break_it", "said"), BROKEN, ids=[f"{number:02}" for number in range(len(BROKEN))])
def test_what_differs_is_said_and_ended_by_what_is_offered(with_a_month: str, break_it: str, said: str) -> None:
    with open_owner(with_a_month) as session:
        # What the reference is, another test proves.
        expected = read_catalog(session)
    with psycopg.connect(with_a_month, autocommit=True) as owner:
        owner.execute(break_it)
    with open_owner(with_a_month) as session:
        found = differences(expected, read_catalog(session))
        assert [difference for difference in found if said in difference.sentence], found
        for difference in found:
            assert difference.sql is not None, difference.sentence
            run_all(with_a_month, difference.sql)
        assert differences(expected, read_catalog(session)) == ()


def test_nothing_is_recorded_while_anything_differs(with_a_month: str) -> None:
    with forget(with_a_month) as owner:
        for break_it, _ in BROKEN:
            owner.execute(break_it)
        report = migrate.baseline(with_a_month, to=LAST.version, accept_extra=True)
        assert report.recorded == ()
        assert len(report.differences) >= len(BROKEN)
        assert owner.execute("SELECT to_regnamespace('equitie_migrations')").fetchone() == (None,)
        for difference in report.differences:
            run_all(with_a_month, difference.sql or "")
        assert migrate.baseline(with_a_month, to=LAST.version).recorded != ()


def test_what_is_there_beside_it_is_said_and_may_be_accepted(with_a_month: str) -> None:
    with forget(with_a_month) as owner:
        for add_it, _ in ADDED:
            owner.execute(add_it)
        told = sentences(migrate.baseline(with_a_month, to=LAST.version))
        assert len(told) == len(ADDED)
        for _, said in ADDED:
            assert any(said in sentence for sentence in told), (said, told)
        # Not so a policy: it can only widen what is seen.
        owner.execute("CREATE POLICY mine ON deals_clean USING (true)")
        report = migrate.baseline(with_a_month, to=LAST.version, accept_extra=True)
        assert sentences(report) == ["The policy mine of public.deals_clean is made by no migration."]
        owner.execute("DROP POLICY mine ON deals_clean")
        report = migrate.baseline(with_a_month, to=LAST.version, accept_extra=True)
        assert len(report.recorded) == len(SHIPPED)
        assert len(report.accepted) == len(ADDED)


def test_what_others_have_in_public_is_theirs(owner_dsn: str) -> None:
    with forget(owner_dsn) as owner:
        owner.execute(
            "CREATE TABLE public.theirs (a int); CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'"
        )
        owner.execute("CREATE VIEW public.theirs_too AS SELECT * FROM public.deals_clean")
        assert migrate.baseline(owner_dsn).differences == ()


def test_a_table_of_somebody_else_is_told(owner_dsn: str, server: Any) -> None:
    with forget(owner_dsn) as owner:
        owner.execute("CREATE ROLE somebody")
        try:
            owner.execute("ALTER TABLE companies_clean OWNER TO somebody")
            told = sentences(migrate.baseline(owner_dsn, to=LAST.version))
            assert (
                "The table public.companies_clean has the owner somebody, and should have the owner the migrating role."
                in told
            )
        finally:
            owner.execute("ALTER TABLE companies_clean OWNER TO postgres; DROP OWNED BY somebody; DROP ROLE somebody")


def test_the_platforms_own_tables_are_adopted_step_by_step(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    """As an operator would: schemas by `up`, tables by what `baseline --sql` prints, the rest by `up`."""
    owner.execute(
        "CREATE TABLE companies_clean (company_id int GENERATED BY DEFAULT AS IDENTITY,"
        " company_name text NOT NULL, company_type text, company_sector text, country_incorporation text,"
        " company_website text, funding_round_stage text, founding_year int, latest_valuation_mil numeric,"
        " created_at timestamptz DEFAULT now(), updated_at timestamptz DEFAULT now(),"
        " CONSTRAINT companies_clean_pkey PRIMARY KEY (company_id));"
        "INSERT INTO companies_clean (company_name) VALUES ('Acme')"
    )
    migrate.migrate(empty_dsn, to=1)
    for statement in SHIPPED[1].statements:
        if not statement.text.startswith(("CREATE TABLE public.companies_clean", "CREATE TRIGGER")) and (
            "companies_clean" not in statement.text or statement.text.startswith("CREATE TABLE")
        ):
            owner.execute(statement.text)
    report = migrate.baseline(empty_dsn, to=2)
    assert "The constraint companies_clean_company_name_key of public.companies_clean is missing." in sentences(report)
    for difference in report.differences:
        run_all(empty_dsn, difference.sql or "")
    assert migrate.baseline(empty_dsn, to=2).recorded == (SHIPPED[1].label,)
    migrate.migrate(empty_dsn)
    assert owner.execute("SELECT company_name FROM companies_clean").fetchall() == [("Acme",)]
    assert migrate.verify(empty_dsn) == ()


def test_an_empty_database_is_nothing_to_adopt(empty_dsn: str) -> None:
    with pytest.raises(MigrationError, match="none of the tables"):
        migrate.baseline(empty_dsn)


def test_a_half_applied_migration_is_finished_first(empty_dsn: str, release: Release) -> None:
    release({"0001_a": "-- equitie: transaction=false\nSELECT 1;\nSELECT 1/0;"})
    with pytest.raises(MigrationError):
        migrate.migrate(empty_dsn)
    with pytest.raises(MigrationError, match="half applied"):
        migrate.baseline(empty_dsn)


def test_statements_outside_of_transactions_are_tried_out_too(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    steps = [
        "CREATE TABLE public.companies_clean (a int, day date) PARTITION BY RANGE (day)",
        "CREATE TABLE public.part PARTITION OF public.companies_clean DEFAULT",
        "CREATE TABLE public.other (LIKE public.companies_clean)",
        "CREATE INDEX CONCURRENTLY idx_companies_a ON public.companies_clean (a)",
        "CREATE INDEX gone ON public.other (a)",
        "DROP INDEX CONCURRENTLY public.gone",
        "REINDEX TABLE CONCURRENTLY public.other",
        "VACUUM public.other",
    ]
    release({"0001_a": "-- equitie: transaction=false\nCREATE SCHEMA equitie_private;\n" + ";\n".join(steps) + ";"})
    migrate.migrate(empty_dsn)
    owner.execute("DROP SCHEMA equitie_migrations CASCADE")
    assert migrate.baseline(empty_dsn).recorded == ("0001_a",)
    owner.execute("DROP SCHEMA equitie_migrations CASCADE; DROP INDEX idx_companies_a")
    assert sentences(migrate.baseline(empty_dsn)) == ["The index public.idx_companies_a is missing."]


def test_the_command_line_says_it_in_80_columns(owner_dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    with forget(owner_dsn) as owner:
        owner.execute("DROP INDEX idx_deals_partner_company; COMMENT ON TABLE deals_clean IS 'another'")
    command = ["--dsn", owner_dsn, "baseline"]
    assert migrate.main(command) == 1
    told = capsys.readouterr().out
    assert "2 differences: nothing was recorded." in told
    assert all(len(line) <= 80 for line in told.splitlines())
    assert migrate.main([*command, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["differences"]) == 2
    assert migrate.main([*command, "--sql"]) == 1
    script = capsys.readouterr().out
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(script)
    assert migrate.main(command) == 0
    assert f"{len(SHIPPED)} migrations recorded as there." in capsys.readouterr().out
