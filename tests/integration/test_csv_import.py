from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equitie_data import _sql, acting_as, as_service, csv_import, csv_rejects
from equitie_data.csv_file import CsvFile
from equitie_data.csv_import import ImportReport, import_csv, main, month_ranges
from equitie_data.csv_rows import scaled
from equitie_data.errors import ImportFileError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from equitie_data import Database

HEADER = "company,investor,email,deal,date,amount,type,status,currency,units,unit_price"
TABLES = ("companies_clean", "deals_clean", "investors_clean", "transactions_clean")


def line(
    company: str = "Acme",
    investor: str = "Ada",
    *,
    email: str = "",
    deal: str = "",
    date: str = "2013-02-01",
    amount: object = 100,
    rest: str = ",,,,",
) -> str:
    return f"{company},{investor},{email},{deal},{date},{amount},{rest}"


def content(*lines: str, header: str = HEADER) -> bytes:
    return "\n".join([header, *lines, ""]).encode()


def load(database: Database, *lines: str, **options: Any) -> ImportReport:
    return import_csv(database, io.BytesIO(content(*lines)), **options)


def counts(report: ImportReport) -> tuple[int, int, int, int]:
    return report.read, report.inserted, report.duplicates, report.rejected


class Owner:
    """The owner's view of the database: what is really there, past every policy."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn

    def __call__(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            cursor = connection.execute(statement, params or None)
            return cursor.fetchall() if cursor.description else []

    def state(self) -> dict[str, int]:
        tables = [f"public.{table}" for table in (*TABLES, "audit_logs")]
        tables += ["equitie_private.import_runs", "equitie_private.imported_rows"]
        return {table: self(f"SELECT count(*) FROM {table}")[0][0] for table in tables}

    def key(self, statement: str, *params: object) -> int:
        return int(self(statement, *params)[0][0])

    def company(self, name: str) -> int:
        return self.key("INSERT INTO companies_clean (company_name) VALUES (%s) RETURNING company_id", name)

    def deal(self, name: str, company_id: int | None, code: str | None = None) -> int:
        return self.key(
            "INSERT INTO deals_clean (deal_name, underlying_company_id, deal_code) "
            "VALUES (%s, %s, %s) RETURNING deal_id",
            name,
            company_id,
            code,
        )

    def investor(self, name: str, email: str | None = None) -> int:
        return self.key(
            "INSERT INTO investors_clean (full_name, primary_email) VALUES (%s, %s) RETURNING investor_id", name, email
        )


@pytest.fixture
def owner(owner_dsn: str) -> Owner:
    return Owner(owner_dsn)


# What becomes of a row


def test_rows_become_transactions_with_their_parents(database: Database, owner: Owner) -> None:
    report = load(
        database,
        line(amount="8500000.50"),
        line(investor="Bob", amount="8500000.50"),
        line("Other", "Bob", email="BOB@x.org", deal="Seed", rest="secondary,pending,EUR,10,1.25"),
    )
    assert counts(report) == (3, 3, 0, 0)
    assert report.amount_inserted == Decimal("17000101.00")
    assert (report.companies_created, report.deals_created, report.investors_created) == (2, 2, 2)
    round_of_acme = ("Acme, 2013-02-01, 8500000.5", "active", "2013-02-01")
    defaults = ("primary", "completed", "USD", None, None)
    given_values = ("secondary", "pending", "EUR", Decimal(10), Decimal("1.25"))
    # "Bob" without an e-mail is the only Bob there is: the one the file's e-mail makes.
    assert owner(
        """
        SELECT company_name, deal_name, deal_status, deal_date::text, full_name, primary_email,
               transaction_date::text, amount, transaction_type, status, currency, units, unit_price
        FROM transactions_clean
        JOIN deals_clean USING (deal_id)
        JOIN investors_clean USING (investor_id)
        JOIN companies_clean ON company_id = underlying_company_id
        ORDER BY company_name, full_name
        """
    ) == [
        ("Acme", *round_of_acme, "Ada", None, "2013-02-01", Decimal("8500000.5"), *defaults),
        ("Acme", *round_of_acme, "Bob", "bob@x.org", "2013-02-01", Decimal("8500000.5"), *defaults),
        ("Other", "Seed", "active", "2013-02-01", "Bob", "bob@x.org", "2013-02-01", Decimal(100), *given_values),
    ]


def test_importing_again_changes_nothing(database: Database, owner: Owner) -> None:
    lines = (line(), line(investor="Bob", email="b@x.org"), line(deal="Seed"), line(company=""))
    first = load(database, *lines)
    before = {table: owner(f"SELECT * FROM {table} ORDER BY 1") for table in TABLES}
    second = load(database, *lines)
    assert counts(first) == (4, 3, 0, 1)
    assert counts(second) == (4, 0, 3, 1)
    assert second.amount_duplicates == first.amount_inserted
    assert (second.companies_created, second.deals_created, second.investors_created) == (0, 0, 0)
    assert second.partitions_created == 0
    assert {table: owner(f"SELECT * FROM {table} ORDER BY 1") for table in TABLES} == before


def test_the_same_values_under_other_names_and_in_another_order_are_known(database: Database) -> None:
    load(database, line())
    again = import_csv(
        database,
        io.BytesIO(b"sum;x,when,who,what\n100.00,2013-02-01, Ada ,Acme\n"),
        columns={"sum;x": "amount", "when": "date", "who": "investor", "what": "company"},
    )
    assert counts(again) == (1, 0, 1, 0)


def test_copies_in_the_file_are_duplicates(database: Database) -> None:
    report = load(database, line(), line(amount="100.0"), line(), line(investor="Bob"))
    assert counts(report) == (4, 2, 2, 0)
    assert report.amount_duplicates == 200


def test_rows_of_one_transaction_named_differently_are_one(database: Database, owner: Owner) -> None:
    company = owner.company("Acme")
    owner.deal("Seed", company, "S-1")
    report = load(
        database,
        line(deal="S-1", email="ada@x.org"),
        line(deal="Seed", rest=",pending,,,"),
        line(deal="Seed"),
        line(deal="S-1", email="ada@x.org"),
    )
    assert counts(report) == (4, 1, 3, 0)
    assert owner("SELECT status FROM transactions_clean") == [("completed",)]


def test_a_transaction_that_stands_already_is_a_duplicate(database: Database, owner: Owner) -> None:
    deal, investor = owner.deal("Seed", owner.company("Acme")), owner.investor("Ada")
    statement = (
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount, units, status) "
        "VALUES (%s, %s, '2013-02-01', 100, %s, 'pending')"
    )
    owner(statement, deal, investor, None)
    owner(statement, deal, investor, 7)
    report = load(
        database,
        line(deal="Seed"),
        line(deal="Seed"),
        line(deal="Seed", rest=",,,7.0,"),
        line(deal="Seed", rest=",,,8,"),
        line(deal="Seed", rest=",,EUR,,"),
        line(deal="Seed", date="2013-02-02"),
    )
    assert counts(report) == (6, 3, 3, 0)
    assert report.amount_duplicates == 300


def test_a_known_row_stays_known_when_its_transaction_is_gone(database: Database, owner: Owner) -> None:
    load(database, line())
    owner("DELETE FROM transactions_clean")
    assert counts(load(database, line())) == (1, 0, 1, 0)


# Deals


def test_a_deal_is_found_by_code_then_by_name(database: Database, owner: Owner) -> None:
    acme = owner.company("Acme")
    by_code = owner.deal("Whatever", acme, "A-1")
    by_name = owner.deal("Seed", acme)
    unowned = owner.deal("Old", None, "A-2")
    owner.deal("Seed", owner.company("Other"))
    report = load(
        database,
        line(deal="A-1", amount=1),
        line(deal="Seed", amount=2),
        line(deal="A-2", amount=3),
        line(deal="New", amount=4),
    )
    assert report.deals_created == 1
    assert report.companies_created == 0
    found = dict(owner("SELECT amount::int, deal_id FROM transactions_clean"))
    assert (found[1], found[2], found[3]) == (by_code, by_name, unowned)


def test_a_deal_is_found_again_after_it_was_renamed(database: Database, owner: Owner) -> None:
    load(database, line(deal="Seed"), line(amount=5))
    owner("UPDATE deals_clean SET deal_name = 'Renamed'")
    owner("UPDATE companies_clean SET company_name = 'Acme Inc'")
    report = load(database, line(investor="Bob", deal="Seed"), line(investor="Bob", amount=5))
    assert (report.inserted, report.deals_created, report.companies_created) == (2, 0, 0)


def test_a_deal_that_cannot_be_told_rejects_its_rows(database: Database, owner: Owner) -> None:
    acme = owner.company("Acme")
    owner.deal("Seed", acme)
    owner.deal("Seed", acme)
    owner.deal("Theirs", owner.company("Other"), "O-1")
    report = load(
        database,
        line(investor="Nobody", deal="Seed"),
        line(investor="Nobody", deal="Seed"),
        line(deal="O-1"),
        line("New", "New", deal="O-1"),
        line(deal="Good"),
    )
    assert counts(report) == (5, 1, 0, 4)
    assert report.rejected_by_reason == {"deal is ambiguous": 2, "deal belongs to another company": 2}
    assert (report.companies_created, report.deals_created, report.investors_created) == (0, 1, 1)


# Investors


def test_an_email_decides_who_it_is(database: Database, owner: Owner) -> None:
    ada = owner.investor("Ada", "Ada@X.org")
    namesake = owner.investor("Ada", "other@x.org")
    report = load(
        database,
        line(email="ada@x.ORG", amount=1),
        line(email="other@x.org", amount=2),
        line(email="third@x.org", amount=3),
    )
    assert counts(report) == (3, 3, 0, 0)
    assert report.investors_created == 1
    found = dict(owner("SELECT amount::int, investor_id FROM transactions_clean"))
    assert (found[1], found[2]) == (ada, namesake)
    assert owner("SELECT full_name, primary_email FROM investors_clean WHERE investor_id = %s", found[3]) == [
        ("Ada", "third@x.org")
    ]


def test_money_never_goes_to_an_investor_of_another_name(database: Database, owner: Owner) -> None:
    owner.investor("Ada", "ada@x.org")
    owner.investor("Eve", "shared@x.org")
    owner.investor("Eve", "Shared@x.org")
    report = load(
        database,
        line(investor="Bob", email="ada@x.org"),
        line(investor="ada", email="ada@x.org"),
        line(investor="Eve", email="shared@x.org"),
        line(investor="One", email="new@x.org"),
        line("Known", "Two", email="new@x.org", deal="Theirs"),
        line("Known", "Good"),
    )
    assert counts(report) == (6, 1, 0, 5)
    assert report.rejected_by_reason == {
        "email belongs to another investor": 2,
        "email belongs to several investors": 1,
        "email stands with several names": 2,
    }
    assert (report.companies_created, report.deals_created, report.investors_created) == (1, 1, 1)


def test_a_name_alone_must_be_unambiguous(database: Database, owner: Owner) -> None:
    known = owner.investor("Known")
    owner.investor("Twin")
    owner.investor("Twin", "twin@x.org")
    owner.investor("Half", "half@x.org")
    report = load(
        database,
        line(investor="Known", amount=1),
        line(investor="Twin", amount=2),
        line(investor="Half", amount=3),
        line(investor="Half", email="other-half@x.org", amount=4),
        line(investor="New", amount=5),
        line(investor="New", amount=6),
    )
    assert report.rejected_by_reason == {"investor is ambiguous": 2}
    assert report.investors_created == 2
    found = dict(owner("SELECT amount::int, investor_id FROM transactions_clean"))
    assert set(found) == {1, 4, 5, 6}
    assert found[1] == known
    assert found[5] == found[6]


def test_the_order_of_rows_decides_nothing(database: Database, owner: Owner) -> None:
    lines = [
        line(investor="Ada", amount=1),
        line(investor="Ada", email="ada@x.org", amount=2),
        line(investor="Bob", email="b1@x.org", amount=3),
        line(investor="Bob", email="b2@x.org", amount=4),
        line(investor="Bob", amount=5),
    ]
    outcomes = set()
    for arrangement in itertools.islice(itertools.permutations(lines), 0, None, 17):
        trial = Trial(database)
        report = load(trial, *arrangement)  # type: ignore[arg-type]
        outcomes.add((counts(report), report.investors_created, tuple(trial.transactions)))
    assert len(outcomes) == 1
    assert owner.state()["public.transactions_clean"] == 0


# Properties


class _RollBack(Exception):  # noqa: N818 - not an error
    pass


class Trial:
    """A database whose imports are looked at and then rolled back, so that one database serves many examples."""

    LOOK = """
        SELECT amount::int, full_name, primary_email
        FROM transactions_clean
        JOIN investors_clean USING (investor_id)
        ORDER BY amount, full_name, primary_email
        """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.transactions: list[tuple[Any, ...]] = []

    def execute_write(self, operation: Callable[[Any], Any], *, name: str, **options: Any) -> Any:
        if name != "csv import":
            return self._database.execute_write(operation, name=name, **options)
        results = []

        def and_undo(connection: psycopg.Connection[Any]) -> None:
            results.append(operation(connection))
            self.transactions = connection.execute(self.LOOK).fetchall()
            raise _RollBack

        with pytest.raises(_RollBack):
            self._database.execute_write(and_undo, name=name, **options)
        return results[0]


_lines = st.builds(
    line,
    st.sampled_from(["Acme", " Acme", "Other", ""]),
    st.sampled_from(["Ada", "Bob", "Ada ", ""]),
    email=st.sampled_from(["", "", "a@x.org", "A@x.org", "b@x.org", "nobody"]),
    deal=st.sampled_from(["", "", "Seed", "K-1"]),
    date=st.sampled_from(["2013-02-01", "2013-03-31", "2013-02-30", ""]),
    amount=st.sampled_from([1, "1.0", 2, "0.25", -1, "x"]),
    rest=st.sampled_from([",,,,", ",,,,", ",pending,,,", ",,EUR,,", ",,,1,", ",,,"]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(_lines, max_size=12), random=st.randoms(use_true_random=False))
def test_every_row_lands_in_one_bucket_in_whatever_order(
    database: Database, lines: list[str], random: Any, tmp_path: Path
) -> None:
    trial = Trial(database)
    rejects = tmp_path / "rejects.csv"
    report = load(trial, *lines, rejects=rejects)  # type: ignore[arg-type]
    assert report.read == len(lines) == report.inserted + report.duplicates + report.rejected
    assert report.amount_read == report.amount_inserted + report.amount_duplicates + report.amount_rejected
    assert len(trial.transactions) == report.inserted
    assert sum(report.rejected_by_reason.values()) == report.rejected
    with rejects.open(newline="") as file:
        rejected = list(csv.reader(file))[1:]
    numbers = [int(cells[0]) for cells in rejected]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == report.rejected
    found = trial.transactions

    shuffled = random.sample(lines, len(lines))
    again = load(trial, *shuffled)  # type: ignore[arg-type]
    assert (counts(again), again.rejected_by_reason) == (counts(report), report.rejected_by_reason)
    assert trial.transactions == found


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(_lines, max_size=10))
def test_an_import_of_what_was_imported_inserts_nothing(database: Database, lines: list[str]) -> None:
    first, second = load(database, *lines), load(database, *lines)
    assert second.inserted == second.companies_created == second.deals_created == second.investors_created == 0
    assert second.rejected >= first.rejected - first.duplicates
    assert second.read == second.duplicates + second.rejected


# Partitions


def test_only_months_with_rows_get_partitions(database: Database, owner: Owner) -> None:
    report = load(database, line(date="1911-01-31"), line(date="1911-03-01"), line(date="1911-04-01"))
    assert report.partitions_created == 3
    names = owner(
        "SELECT c.relname FROM pg_class AS c WHERE relnamespace = 'equitie_part'::regnamespace "
        "AND relkind = 'r' AND relname LIKE 'transactions_clean_1911%' ORDER BY 1"
    )
    assert names == [("transactions_clean_1911_01",), ("transactions_clean_1911_03",), ("transactions_clean_1911_04",)]
    assert owner("SELECT count(*) FROM equitie_part.transactions_clean_default") == [(0,)]


def test_rows_older_than_the_retention_are_imported_and_counted(database: Database, owner: Owner) -> None:
    ((first_day,),) = owner("SELECT equitie_private.retention_start('public.transactions_clean')")
    before = first_day - dt.timedelta(days=1)
    report = load(database, line(date=f"{before}"), line(date="1911-03-01"), line(date=f"{first_day}"))
    assert (report.inserted, report.past_retention) == (3, 2)
    assert json.loads(report.to_json())["past_retention"] == 2
    assert "2 rows are older than the retention" in report.to_table()
    again = load(database, line(date=f"{first_day}", amount="2"), line(date="1911-03-01"))
    assert (again.inserted, again.duplicates, again.past_retention) == (1, 1, 0)
    assert "retention" not in again.to_table()
    owner("UPDATE equitie_private.retention_policies SET keep = NULL RETURNING 1")
    assert load(database, line(date="1911-05-01")).past_retention == 0


def test_duplicates_and_rejects_make_no_partition(database: Database, owner: Owner) -> None:
    owner.investor("Twin")
    owner.investor("Twin")
    assert load(database, line(investor="Twin", date="1911-01-31")).partitions_created == 0


def test_months_are_joined_up_to_a_year() -> None:
    import datetime as dt

    def month(year: int, number: int) -> dt.date:
        return dt.date(year, number, 1)

    months = [month(2013, 1), month(2013, 3), *(month(2014, n) for n in range(1, 13)), month(2015, 1), month(2200, 12)]
    assert list(month_ranges(months)) == [
        (month(2013, 1), month(2013, 1)),
        (month(2013, 3), month(2013, 3)),
        (month(2014, 1), month(2014, 12)),
        (month(2015, 1), month(2015, 1)),
        (month(2200, 12), month(2200, 12)),
    ]
    assert list(month_ranges([])) == []


# All or nothing


def test_a_failure_at_any_query_leaves_nothing(
    database: Database, owner: Owner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = (line(date="1911-01-31"), line(investor="Bob", email="bob@x.org"), line(company=""))
    seen: list[str] = []
    real = _sql.query

    def recording(name: str) -> Any:
        seen.append(name)
        return real(name)

    monkeypatch.setattr(_sql, "query", recording)
    rejects = tmp_path / "rejects.csv"
    load(Trial(database), *lines, rejects=rejects)  # type: ignore[arg-type]
    rejects.unlink()
    assert len(set(seen)) > 20
    before = owner.state()
    for broken in dict.fromkeys(seen):

        def failing(name: str, broken: str = broken) -> Any:
            return "SELECT 1 / 0" if name == broken else real(name)

        monkeypatch.setattr(_sql, "query", failing)
        with pytest.raises(psycopg.Error):
            load(database, *lines, rejects=rejects)
        assert owner.state() == before, broken
        assert list(tmp_path.iterdir()) == [], broken
    monkeypatch.setattr(_sql, "query", real)
    assert load(database, *lines).inserted == 2


def test_a_file_that_breaks_off_leaves_nothing(database: Database, owner: Owner, tmp_path: Path) -> None:
    whole = gzip.compress(content(*(line(investor=f"Investor {n}") for n in range(20_000))))
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    before = owner.state()
    with pytest.raises(ImportFileError, match=r"cut\.csv\.gz: its gzip data is damaged or cut off after line \d+"):
        import_csv(database, path, rejects=tmp_path / "rejects.csv")
    assert owner.state() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["cut.csv.gz"]


@pytest.mark.parametrize(
    "body",
    [
        "IF NEW.amount = 2 THEN RETURN NULL; END IF; RETURN NEW;",
        "NEW.amount := NEW.amount + 1; RETURN NEW;",
    ],
    ids=["drops a row", "changes an amount"],
)
def test_rows_that_do_not_add_up_are_not_committed(database: Database, owner: Owner, body: str) -> None:
    owner(f"CREATE FUNCTION public.meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
    owner("CREATE TRIGGER meddle BEFORE INSERT ON transactions_clean FOR EACH ROW EXECUTE FUNCTION public.meddle()")
    before = owner.state()
    with pytest.raises(ImportFileError, match=r"do not add up: read 2 \(3\), inserted .* nothing was written"):
        load(database, line(amount=1), line(amount=2))
    assert owner.state() == before


def test_money_has_to_add_up_as_well_as_rows() -> None:
    run = csv_import._Run(None, None, CsvFile(io.BytesIO(), "in.csv"))  # type: ignore[arg-type]
    run.buckets["read"].add(2, scaled("3"))
    run.buckets["inserted"].add(2, scaled("2.9999999999"))
    with pytest.raises(ImportFileError, match=r"read 2 \(3\), inserted 2 \(2\.9999999999\)"):
        run._check_balance()
    run.buckets["inserted"].amount += 1
    run._check_balance()


def test_two_imports_at_once_insert_every_row_once(database: Database, owner: Owner) -> None:
    lines = [line(f"Company {n % 50}", f"Investor {n % 70}", amount=n + 1) for n in range(2_000)]
    start = threading.Barrier(3)
    reports: list[ImportReport] = []

    def run() -> None:
        start.wait()
        reports.append(load(database, *lines))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.inserted for report in reports) == [0, 0, 2_000]
    assert owner("SELECT count(*), count(DISTINCT amount) FROM transactions_clean") == [(2_000, 2_000)]
    assert owner("SELECT count(*) FROM companies_clean") == [(50,)]
    assert owner("SELECT count(*) FROM investors_clean") == [(70,)]


def test_a_company_made_elsewhere_meanwhile_is_used(database: Database, owner: Owner, owner_dsn: str) -> None:
    # The other session holds the uncommitted name until the import waits for it.
    with psycopg.connect(owner_dsn) as other:
        other.execute("INSERT INTO companies_clean (company_name) VALUES ('Acme')")
        reports: list[ImportReport] = []
        thread = threading.Thread(target=lambda: reports.append(load(database, line())))
        thread.start()
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'companies_clean'"
        while owner(waiting) == [(0,)]:
            assert thread.is_alive()
    thread.join()
    assert (reports[0].inserted, reports[0].companies_created) == (1, 0)
    assert owner("SELECT count(*) FROM companies_clean") == [(1,)]


# Who, and what is recorded


def test_the_run_is_recorded_with_its_reconciliation(database: Database, owner: Owner, tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "investments.csv"
    path.write_bytes(content(line(), line(), line(company=""), line(amount="1.5", date="")))
    with as_service("monthly load"):
        report = import_csv(database, path)
    assert owner(
        "SELECT run_id, source, source_sha256, actor, read, inserted, duplicates, rejected, amount_read, "
        "amount_inserted, amount_duplicates, amount_rejected, rejected_reasons, finished_at >= started_at "
        "FROM equitie_private.import_runs"
    ) == [
        (
            report.run_id,
            "investments.csv",
            hashlib.sha256(path.read_bytes()).digest(),
            "service: monthly load",
            *(4, 1, 1, 2),
            *(Decimal("301.5"), Decimal(100), Decimal(100), Decimal("101.5")),
            {"company is empty": 1, "date is empty": 1},
            True,
        )
    ]
    assert owner("SELECT run_id, transaction_id FROM equitie_private.imported_rows") == [
        (report.run_id, *owner("SELECT transaction_id FROM transactions_clean")[0])
    ]
    assert owner("SELECT DISTINCT reason FROM audit_logs WHERE entity_type = 'transactions_clean'") == [
        ("monthly load",)
    ]


def test_every_new_row_is_audited(database: Database, owner: Owner) -> None:
    load(database, line(), line(investor="Bob"))
    assert dict(owner("SELECT entity_type, count(*) FROM audit_logs WHERE action = 'CREATE' GROUP BY 1")) == {
        "companies_clean": 1,
        "deals_clean": 1,
        "investors_clean": 2,
        "transactions_clean": 2,
    }


def test_a_user_may_not_import(database: Database, owner: Owner) -> None:
    user = "00000000-0000-0000-0000-00000000000a"
    owner("INSERT INTO user_profiles (user_id, email, role) VALUES (%s, 'a@x.org', 'superadmin')", user)
    before = owner.state()
    with acting_as(user), pytest.raises(psycopg.errors.InsufficientPrivilege):
        load(database, line())
    assert owner.state() == before


# The rejects file


def cells_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_rejected_rows_are_written_with_line_reason_and_all_columns(
    database: Database, owner: Owner, tmp_path: Path
) -> None:
    owner.investor("Twin")
    owner.investor("Twin")
    path = tmp_path / "out" / "rejects.csv"
    path.parent.mkdir()
    path.write_text("from an earlier run")
    body = (
        "company,note,investor,date,amount\n"
        'Acme,"a ""note"",\nof two lines",Twin,2013-02-01,100\n'
        "Acme,kept,Ada,2013-02-01,100\n"
        "Acme,x,,2013-02-01,100\n"
        'Acme,"x"y,Ada,2013-02-01,100\n'
        "Acme,a\0b,Ada,2013-02-01,100\n"
        "Acme,x,Ada,2013-02-01\n"
        "Acme,x,Twin,2013-02-01,100\n"
    )
    report = import_csv(database, io.BytesIO(body.encode()), rejects=path)
    assert counts(report) == (7, 1, 0, 6)
    assert cells_of(path) == [
        ["line", "reason", "company", "note", "investor", "date", "amount"],
        ["2", "investor is ambiguous", "Acme", 'a "note",\nof two lines', "Twin", "2013-02-01", "100"],
        ["5", "investor is empty", "Acme", "x", "", "2013-02-01", "100"],
        ["6", "quotes do not match", 'Acme,"x"y,Ada,2013-02-01,100'],
        ["7", "holds a NUL character", "Acme", "a\u2400b", "Ada", "2013-02-01", "100"],
        ["8", "wrong number of columns", "Acme", "x", "Ada", "2013-02-01"],
        ["9", "investor is ambiguous", "Acme", "x", "Twin", "2013-02-01", "100"],
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["rejects.csv"]


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\tx", "'\tx"),
        ("'=1", "''=1"),
        ("'t Hooft", "'t Hooft"),
        ("plain=", "plain="),
        ("", ""),
    ],
)
def test_cells_are_no_formulas_and_can_be_recovered(cell: str, written: str) -> None:
    assert csv_rejects._cell(cell) == written


def test_no_rejects_give_a_header_alone(database: Database, tmp_path: Path) -> None:
    load(database, line(), rejects=tmp_path / "rejects.csv")
    assert cells_of(tmp_path / "rejects.csv") == [["line", "reason", *HEADER.split(",")]]


def test_a_rejects_file_that_cannot_be_written_stops_the_import(
    database: Database, owner: Owner, tmp_path: Path
) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(content(line()))
    for rejects, message in [
        (source, "would replace the file that is imported"),
        (tmp_path, "it is a directory"),
        (tmp_path / "none" / "rejects.csv", "No such file or directory"),
    ]:
        with pytest.raises(ImportFileError, match=message):
            import_csv(database, source, rejects=rejects)
    assert owner.state()["public.transactions_clean"] == 0
    assert source.read_bytes() == content(line())


def test_a_failed_import_leaves_an_old_rejects_file_alone(database: Database, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.csv"
    rejects.write_text("old")
    with pytest.raises(ImportFileError):
        import_csv(database, io.BytesIO(content(line()) + b"\xff\n"), rejects=rejects)
    assert rejects.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rejects.csv"]


# Files that are none


def test_a_missing_file_or_a_directory_is_one_clear_error(database: Database, tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match=r"none\.csv: cannot be read: No such file or directory\.$"):
        import_csv(database, tmp_path / "none.csv")
    with pytest.raises(ImportFileError, match=r"cannot be read: Is a directory\.$"):
        import_csv(database, str(tmp_path))


@pytest.mark.parametrize("raw", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_header_is_empty(database: Database, raw: bytes) -> None:
    with pytest.raises(ImportFileError, match="is empty"):
        import_csv(database, io.BytesIO(raw))


def test_a_header_alone_is_an_import_of_nothing(database: Database, owner: Owner) -> None:
    report = load(database)
    assert counts(report) == (0, 0, 0, 0)
    assert owner("SELECT read, finished_at IS NOT NULL FROM equitie_private.import_runs") == [(0, True)]


def test_progress_counts_the_bytes_of_the_source(database: Database) -> None:
    class Counter:
        total = 0

        def advance(self, count: int) -> None:
            self.total += count

    raw = gzip.compress(content(*(line(amount=n) for n in range(1, 500))))
    counter = Counter()
    assert import_csv(database, io.BytesIO(raw), progress=counter).inserted == 499
    assert counter.total == len(raw)


# The command


def test_the_command_prints_a_table_that_balances(
    app_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(content(line(), line(), line(amount="9" * 18), line(amount="0.5", company="")))
    assert main([str(path), "--dsn", app_dsn, "--rejects", str(tmp_path / "rejects.csv")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    table = [row.split() for row in out.splitlines()]
    assert table[1:5] == [
        ["read", "4", "1,000,000,000,000,000,199.5"],
        ["inserted", "2", "1,000,000,000,000,000,099.0"],
        ["duplicates", "1", "100.0"],
        ["rejected", "1", "0.5"],
    ]
    assert table[5] == ["company", "is", "empty", "1"]
    assert "made: 1 companies, 1 investors, 2 deals" in out
    assert cells_of(tmp_path / "rejects.csv")[1][:2] == ["5", "company is empty"]


def test_the_command_reads_gzip_from_standard_input_and_prints_exact_json(app_dsn: str) -> None:
    raw = gzip.compress(content(line(amount="123456789012345678.25"), header=HEADER.replace("date", "funded_when")))
    done = subprocess.run(
        [sys.executable, "-m", "equitie_data", "import", "-", "--map", "funded_when=date", "--json"],
        input=raw,
        capture_output=True,
        env={**os.environ, "DATABASE_URL": app_dsn},
        check=True,
    )
    assert done.stderr == b""
    report = json.loads(done.stdout, parse_float=Decimal)
    assert (report["read"], report["inserted"], report["duplicates"], report["rejected"]) == (1, 1, 0, 0)
    assert report["amount_inserted"] == report["amount_read"] == Decimal("123456789012345678.25")
    assert report["amount_rejected"] == 0
    assert isinstance(report["amount_rejected"], int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "none.csv: cannot be read: No such file or directory."),
        (["in.csv", "--map", "who=investor"], "there is no column 'who' for field 'investor'"),
        (["in.csv", "--map", "company=firm"], "there is no field 'firm' for column 'company'"),
        (["in.csv", "--map", "company=deal", "--map", "company=company"], "column 'company' is mapped twice"),
    ],
)
def test_the_command_fails_with_one_line(
    app_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "in.csv").write_bytes(content(line()))
    assert main([str(tmp_path / arguments[0]), *arguments[1:], "--dsn", app_dsn]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["in.csv", "--map", "company"], ["in.csv", "--nonsense"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: python -m equitie_data import" in capsys.readouterr().err


# Memory


MEMORY_PROGRAM = """
import io, sys
from equitie_data import Database
from equitie_data.csv_import import import_csv

class Rows(io.RawIOBase):
    def __init__(self, rows):
        self.rest, self.next, self.rows = b"company,investor,date,amount\\n", 0, rows
    def read(self, size=-1):
        if not self.rest and self.next < self.rows:
            batch = range(self.next, min(self.next + 1000, self.rows))
            self.next = batch.stop
            self.rest = "".join(
                f"Company {n % 5000},Investor {n % 7000},2013-{n % 12 + 1:02}-{n % 28 + 1:02},{n // 3 + 1}.50\\n"
                for n in batch
            ).encode()
        piece, self.rest = self.rest[:size], self.rest[size:]
        return piece

with Database(sys.argv[1]) as database:
    report = import_csv(database, Rows(int(sys.argv[2])), rejects=sys.argv[3])
print(report.read, report.inserted + report.duplicates)
# Not getrusage: what it calls this process's maximum may be that of the process that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")  # noqa: PTH110
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(60_000),
        pytest.param(250_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_memory_stays_flat_whatever_the_length(app_dsn: str, rows: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, app_dsn, str(rows), str(tmp_path / "rejects.csv")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (read, written), (kilobytes,) = (map(int, each.split()) for each in done.stdout.splitlines())
    assert read == written == rows
    assert kilobytes < 150_000
