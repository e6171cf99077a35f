"""Before and after a deployment: the release before works on the new schema until the second half is applied."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data import Database, as_service, migrate
from equitie_data.errors import ChecksumDriftError, HistoryTooNewError, MigrationError, NotMigratedError
from equitie_data.migrations import directories
from equitie_data.testing import APP_ROLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from equitie_data.migrations.files import Migration

    Release = Callable[..., tuple[Migration, ...]]

SHIPPED = directories.ours().migrations
LAST = SHIPPED[-1].version
EXPAND = f"{LAST + 1:04d}_add_reference"
CONTRACT = f"{LAST + 2:04d}_require_reference"
# The next release wants every transaction to have a reference, and gives the old ones a default until then.
NEXT = {
    EXPAND: "ALTER TABLE public.transactions_clean ADD COLUMN reference text;",
    CONTRACT: "-- equitie: phase=post\nALTER TABLE public.transactions_clean ADD CHECK (reference IS NOT NULL);",
}


def test_the_halves_of_a_release_are_applied_one_after_the_other(empty_dsn: str, release: Release) -> None:
    release({"0001_a": "SELECT 1;", "0002_b": "SELECT 1;", "0003_c": "-- equitie: phase=post\nSELECT 1;"})
    planned = migrate.plan(empty_dsn, before_deployment=True)
    assert [each.version for each in planned] == [1, 2]
    report = migrate.migrate(empty_dsn, before_deployment=True)
    assert [each.version for each in report.applied] == [1, 2]
    assert report.left_for_after == ("0003_c",)
    assert [each.phase for each in migrate.status(empty_dsn)] == ["pre", "pre", "post"]
    assert migrate.main(["--dsn", empty_dsn, "status", "--before-deploy"]) == 0
    assert migrate.main(["--dsn", empty_dsn, "status"]) == 1
    assert [each.version for each in migrate.migrate(empty_dsn).applied] == [3]


def test_the_command_line_says_what_is_left(
    empty_dsn: str, release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    release({"0001_a": "SELECT 1;", "0002_b": "-- Why.\n-- equitie: phase=post\nSELECT 1;"})
    assert migrate.main(["--dsn", empty_dsn, "up", "--before-deploy"]) == 0
    told = capsys.readouterr().out
    assert "1 left for after the deployment" in told
    migrate.main(["--dsn", empty_dsn, "status"])
    assert "after the deployment" in capsys.readouterr().out
    migrate.main(["--dsn", empty_dsn, "plan"])
    assert "0002_b (1 statement, after the deployment)" in capsys.readouterr().out


def test_what_follows_an_earlier_releases_second_half_is_not_applied_over_it(empty_dsn: str, release: Release) -> None:
    release({"0001_a": "SELECT 1;", "0002_b": "-- equitie: phase=post\nSELECT 1;", "0003_c": "SELECT 1;"})
    for call in (migrate.migrate, migrate.plan):
        with pytest.raises(MigrationError, match=r"0003_c comes after 0002_b.*up --to 0002_b"):
            call(empty_dsn, before_deployment=True)
    assert {each.state for each in migrate.status(empty_dsn)} == {"pending"}
    migrate.migrate(empty_dsn, to="0002_b")
    assert [each.version for each in migrate.migrate(empty_dsn, before_deployment=True).applied] == [3]


def test_a_release_may_start_before_its_second_half_and_the_one_before_goes_on(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    old = {"0001_a": "SELECT 1;"}
    new = {**old, "0002_b": "SELECT 2;", "0003_c": "-- equitie: phase=post\nSELECT 3;"}
    release(old)
    migrate.migrate(empty_dsn)
    release(new)
    with pytest.raises(NotMigratedError, match=r"lacks 1 migration that equitie_data .* needs, from 0002_b"):
        migrate.check_current(owner)
    migrate.migrate(empty_dsn, before_deployment=True)
    migrate.check_current(owner)
    release(old)
    migrate.check_current(owner)
    # It may work there, but not migrate: what it knows is not what is there.
    with pytest.raises(HistoryTooNewError, match="0002_b"):
        migrate.migrate(empty_dsn)
    release(new)
    migrate.migrate(empty_dsn)
    migrate.check_current(owner)
    release(old)
    with pytest.raises(HistoryTooNewError, match=r"0003_c, which equitie_data .* cannot work with"):
        migrate.check_current(owner)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("", True),
        ("-- equitie: compatible_since=0002\n", True),
        ("-- equitie: compatible_since=0003\n", False),
        ("-- equitie: phase=post\n", False),
        ("-- equitie: phase=post; compatible_since=0001\n", True),
    ],
)
def test_a_file_says_which_releases_work_with_it(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release, *, header: str, accepted: bool
) -> None:
    old = {"0001_a": "SELECT 1;", "0002_b": "SELECT 1;"}
    release({**old, "0003_c": f"{header}SELECT 1;"})
    migrate.migrate(empty_dsn)
    release(old)
    if accepted:
        migrate.check_current(owner)
    else:
        with pytest.raises(HistoryTooNewError, match="0003_c"):
            migrate.check_current(owner)


def test_a_drift_is_found_on_a_newer_schema_too(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    release({"0001_a": "SELECT 1;", "0002_b": "SELECT 1;"})
    migrate.migrate(empty_dsn)
    release({"0001_a": "SELECT 2;"})
    with pytest.raises(ChecksumDriftError):
        migrate.check_current(owner)


def test_the_first_layout_of_the_history_is_read_and_brought_up_to_date(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    release({"0001_a": "SELECT 1;"})
    migrate.migrate(empty_dsn)
    before = layout(owner)
    owner.execute(
        "ALTER TABLE equitie_migrations.history DROP COLUMN directory, DROP COLUMN phase, DROP COLUMN step,"
        " DROP COLUMN compatible_since, DROP CONSTRAINT chk_history_state,"
        " ADD CONSTRAINT chk_history_state CHECK (state IN ('applied', 'failed'))"
    )
    migrate.check_current(owner)
    assert migrate.migrate(empty_dsn).current == "0001_a"
    release({"0001_a": "SELECT 1;", "0002_b": "-- equitie: phase=post\nSELECT 1;"})
    migrate.migrate(empty_dsn)
    assert layout(owner) == before
    assert owner.execute("SELECT directory, phase, compatible_since FROM equitie_migrations.history").fetchall() == [
        ("equitie_data", "pre", 0),
        ("equitie_data", "post", 2),
    ]


def layout(conn: psycopg.Connection[Any]) -> list[Any]:
    return conn.execute(
        "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, -1), a.attnotnull,"
        " pg_catalog.col_description(a.attrelid, a.attnum)"
        " FROM pg_attribute AS a WHERE a.attrelid = 'equitie_migrations.history'::regclass AND a.attnum > 0"
        " AND NOT a.attisdropped UNION ALL SELECT conname::text, pg_get_constraintdef(oid), true, '' FROM pg_constraint"
        " WHERE conrelid = 'equitie_migrations.history'::regclass AND contype <> 'n' ORDER BY 1"
    ).fetchall()


def test_this_releases_code_works_on_the_next_ones_schema_before_its_second_half(
    owner_dsn: str, app_dsn: str, release: Release
) -> None:
    release(NEXT, real=LAST)
    report = migrate.migrate(owner_dsn, before_deployment=True)
    assert [each.version for each in report.applied] == [LAST + 1]
    assert report.left_for_after == (CONTRACT,)

    release({}, real=LAST)  # the code that is still running
    with Database(app_dsn) as db, as_service("a test"):
        write(db)
        assert db.execute_read("SELECT count(*) FROM transactions_clean") == [(1,)]
        assert db.execute_read("SELECT count(*) FROM audit_logs WHERE entity_type = 'transactions_clean'") == [(1,)]

    release(NEXT, real=LAST)
    with psycopg.connect(owner_dsn) as conn:
        conn.execute("UPDATE transactions_clean SET reference = 'old'")
    migrate.migrate(owner_dsn)
    with Database(app_dsn):
        pass
    release({}, real=LAST)
    with pytest.raises(HistoryTooNewError, match=CONTRACT):
        Database(app_dsn).open()


def write(db: Database) -> None:
    db.execute_write("INSERT INTO deals_clean (deal_id, deal_name) VALUES (1, 'd')")
    db.execute_write("INSERT INTO investors_clean (investor_id, full_name) VALUES (1, 'i')")
    db.execute_write(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES (1, 1, %s, 1)",
        [dt.datetime.now(dt.timezone.utc).date()],
    )


def test_the_logins_of_before_stay(owner_dsn: str, release: Release) -> None:
    release(NEXT, real=LAST)
    migrate.migrate(owner_dsn)
    migrate.grant(owner_dsn, APP_ROLE)
