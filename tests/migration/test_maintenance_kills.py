"""A run may be killed at any moment: nothing is lost or doubled, and the next run finishes the job."""

from __future__ import annotations

import datetime as dt
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from equitie_data.maintenance import archive, maintain
from equitie_data.maintenance.period import add_months, month_of

if TYPE_CHECKING:
    from tests.migration.conftest import Platform

TODAY = dt.datetime.now(dt.timezone.utc).date()
EXPIRED = month_of(add_months(TODAY, -120))
LATE = month_of(add_months(TODAY, -48))
NOW_OR_NEVER = dt.timedelta(0)

RUN = """
import datetime, os, pathlib, signal, sys
from equitie_data.maintenance import run
from equitie_data.maintenance.plan import Limits
from equitie_data.maintenance.session import open_session, take_turn

dsn, directory, moment = sys.argv[1:]

def boundary(at):
    if at == moment:
        os.kill(os.getpid(), signal.SIGKILL)

if moment == "archive half written":
    run.Progress.advance = lambda self, count: os.kill(os.getpid(), signal.SIGKILL)
options = run.Options(
    archive_dir=pathlib.Path(directory),
    drop_after=datetime.timedelta(0),
    limits=Limits(rows=0, bytes=0, months=2),
    boundary=boundary,
)
with open_session(dsn) as conn, take_turn(conn, 30):
    run._Run(conn, options).run()
"""

MOMENTS = (
    "run begun",
    "drain begun",
    "drain copying",
    "drain copied",
    "drain verified",
    "drain swapped",
    "drain dropped",
    "drain done",
    "detach done",
    "retired partition released",
    "retired partition settled",
    "archive half written",
    "archive written",
    "archive recorded",
    "drop done",
)


def add_work(platform: Platform, number: int) -> tuple[dt.date, dt.date]:
    """An expired month, and late rows of two months; returns the first day of each kind."""
    expired, late = add_months(EXPIRED, number), add_months(LATE, 2 * number)
    platform.owner.execute(
        "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)", [expired, expired]
    )
    for day in (expired, late, add_months(late, 1)):
        platform.owner.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT %s, %s, %s::date + g %% 28, g FROM generate_series(1, 40) AS g",
            [platform.ids["deal_a"], platform.ids["investor_a"], day],
        )
    return expired, late


def rows_of(platform: Platform, expired: dt.date) -> tuple[int, int]:
    """How many rows of an expired month there are: to be seen in the table, and retired."""
    visible = platform.one(
        "SELECT count(*) FROM transactions_clean WHERE date_trunc('month', transaction_date) = %s", expired
    )
    entry = platform.rows(
        "SELECT state, table_name, archive_file FROM equitie_private.retired_partitions"
        " WHERE from_key AT TIME ZONE 'UTC' = %s",
        expired,
    )
    if not entry:
        return visible, 0
    state, table, file = entry[0]
    if state == "dropped":
        return visible, archive.verify_archive(Path(file)).rows
    return visible, platform.one(f"SELECT count(*) FROM equitie_part.{table}")


@pytest.mark.parametrize("turn", [0, 1])
def test_a_run_that_is_killed_at_any_moment_loses_nothing(
    platform: Platform, owner_dsn: str, tmp_path: Path, turn: int
) -> None:
    maintain(owner_dsn)
    # Each moment once, half of them on each server: what a kill leaves behind does not depend on the version.
    quarter = 2 * (platform.owner.info.server_version // 10_000 % 2) + turn
    for number, moment in enumerate(MOMENTS):
        if number % 4 != quarter:
            continue
        expired, late = add_work(platform, number)
        done = subprocess.run(
            [sys.executable, "-c", RUN, owner_dsn, str(tmp_path), moment], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, f"{moment}: {done.stderr}"

        seen, retired = rows_of(platform, expired)
        assert sorted([seen, retired]) == [0, 40], moment
        assert late_rows(platform, late) == (80, 2 * 820), moment
        # The application goes on: late rows come, and are changed and deleted, whatever the dead run has left behind.
        platform.owner.execute(
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES (%s, %s, %s, 1000)",
            [platform.ids["deal_a"], platform.ids["investor_a"], late],
        )
        platform.owner.execute(
            "UPDATE transactions_clean SET amount = amount + 1 WHERE amount = 40 AND transaction_date >= %s", [late]
        )
        platform.owner.execute("DELETE FROM transactions_clean WHERE amount = 39 AND transaction_date >= %s", [late])

        report = maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER, wait=30)
        assert (report.failures, report.overdue, report.not_done) == ((), (), ()), moment
        assert rows_of(platform, expired) == (0, 40), moment
        assert late_rows(platform, late) == (79, 2 * 820 + 1000 + 2 - 78), moment
        assert leftovers(platform, tmp_path) == [], moment
    assert maintain(owner_dsn, archive_dir=tmp_path, drop_after=NOW_OR_NEVER).steps == ()
    outcomes = platform.rows("SELECT outcome FROM equitie_private.maintenance_runs")
    assert ("running",) not in outcomes
    assert platform.one("SELECT count(*) - count(DISTINCT transaction_id) FROM transactions_clean") == 0


def late_rows(platform: Platform, late: dt.date) -> tuple[int, int]:
    (row,) = platform.rows(
        "SELECT count(*), sum(amount)::bigint FROM transactions_clean"
        " WHERE transaction_date >= %s AND transaction_date < %s",
        late,
        add_months(late, 2),
    )
    return row[0], row[1]


def leftovers(platform: Platform, directory: Path) -> list[Any]:
    """What only a run in progress may have."""
    tables = platform.rows(
        "SELECT oid::regclass::text FROM pg_class WHERE relnamespace = 'equitie_part'::regnamespace AND relkind = 'r'"
        " AND NOT relispartition"
    )
    functions = platform.rows("SELECT oid::regprocedure::text FROM pg_proc WHERE proname LIKE 'mirror%%'")
    triggers = platform.rows("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'mirror%%'")
    default = platform.rows("SELECT transaction_id FROM ONLY equitie_part.transactions_clean_default")
    return [*tables, *functions, *triggers, *default, *directory.glob(".*")]
