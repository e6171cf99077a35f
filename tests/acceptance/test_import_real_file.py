from __future__ import annotations

import threading
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data.csv_import import ImportReport, import_csv

if TYPE_CHECKING:
    from equitie_data import Database

FILE = Path(__file__).parents[3] / "shared" / "data" / "crunchbase_investments_2013.csv.gz"
COLUMNS = {"company_name": "company", "investor_name": "investor", "funded_when": "date", "amount_usd": "amount"}

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not FILE.exists(),
        reason="THE REAL FILE IS MISSING: nothing was imported. Put crunchbase_investments_2013.csv.gz into "
        "../shared/data, beside the repository",
    ),
]


def one(dsn: str, statement: str) -> tuple[Any, ...]:
    with psycopg.connect(dsn) as connection:
        (row,) = connection.execute(statement).fetchall()
        return tuple(row)


def state(dsn: str) -> tuple[Any, ...]:
    return one(
        dsn,
        """
        SELECT
          (SELECT count(*) FROM transactions_clean),
          (SELECT sum(amount) FROM transactions_clean),
          (SELECT count(*) FROM companies_clean),
          (SELECT count(*) FROM investors_clean),
          (SELECT count(*) FROM deals_clean),
          (SELECT count(*) FROM equitie_private.imported_rows),
          (SELECT count(*) FROM equitie_part.transactions_clean_default)
        """,
    )


def test_the_real_file_adds_up_and_is_imported_once(database: Database, owner_dsn: str, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.csv"
    first = import_csv(database, FILE, columns=COLUMNS, rejects=rejects)
    assert (first.read, first.inserted, first.duplicates, first.rejected) == (80_245, 72_549, 140, 7_556)
    assert first.amount_inserted == Decimal(929_332_232_181)
    assert first.amount_read == first.amount_inserted + first.amount_duplicates + first.amount_rejected
    assert first.rejected_by_reason == {
        "amount is empty": 7_447,
        "date is empty": 97,
        "investor is empty": 10,
        "company is empty": 2,
    }
    assert (first.companies_created, first.investors_created, first.deals_created) == (18_247, 15_262, 28_160)
    expected = (72_549, Decimal(929_332_232_181), 18_247, 15_262, 28_160, 72_549, 0)
    assert state(owner_dsn) == expected
    assert rejects.read_text(encoding="utf-8").count("\n") == 1 + 7_556
    audited = "SELECT count(*) FROM audit_logs WHERE action = 'CREATE' AND reason = 'csv import'"
    assert one(owner_dsn, audited) == (72_549 + 18_247 + 15_262 + 28_160,)

    second = import_csv(database, FILE, columns=COLUMNS)
    assert (second.read, second.inserted, second.duplicates, second.rejected) == (80_245, 0, 72_689, 7_556)
    assert second.partitions_created == 0
    assert state(owner_dsn) == expected
    assert one(owner_dsn, audited) == (72_549 + 18_247 + 15_262 + 28_160,)


def test_two_imports_of_the_real_file_at_once(database: Database, owner_dsn: str) -> None:
    reports: list[ImportReport] = []
    threads = [
        threading.Thread(target=lambda: reports.append(import_csv(database, FILE, columns=COLUMNS))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.inserted for report in reports) == [0, 72_549]
    assert state(owner_dsn) == (72_549, Decimal(929_332_232_181), 18_247, 15_262, 28_160, 72_549, 0)
