"""Migrations of applications, beside the library's: a history and a numbering of their own, the same guarantees."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from typing import TYPE_CHECKING, Any

import pytest

from equitie_data import migrate
from equitie_data.errors import ChecksumDriftError, HistoryTooNewError, MigrationError, NotMigratedError
from equitie_data.migrations import directories

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import psycopg

    from equitie_data.migrations.files import Migration

    Release = Callable[..., tuple[Migration, ...]]


@pytest.fixture
def billing(tmp_path: Path) -> Path:
    directory = tmp_path / "billing"
    directory.mkdir()
    (directory / "0001_create_invoices.sql").write_text(
        "-- Invoices.\nCREATE TABLE public.invoices (invoice_id int, deal_id int REFERENCES public.deals_clean);\n"
    )
    (directory / "0001_create_invoices.verify.sql").write_text(
        "SELECT 'public.invoices is missing.' WHERE to_regclass('public.invoices') IS NULL;\n"
    )
    (directory / "0002_index_invoices.sql").write_text(
        "-- Find a deal's invoices.\n-- equitie: transaction=false\n"
        "CREATE INDEX CONCURRENTLY idx_invoices_deal ON public.invoices (deal_id);\n"
    )
    (directory / "0002_index_invoices.down.sql").write_text("DROP INDEX public.idx_invoices_deal;\n")
    return directory


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Register entry points, as installing a package would."""

    def register(**values: str) -> None:
        points = EntryPoints([EntryPoint(name, value, directories.ENTRY_POINTS) for name, value in values.items()])
        monkeypatch.setattr(directories, "entry_points", lambda group: points.select(group=group))
        directories.registered.cache_clear()

    yield register
    directories.registered.cache_clear()


def labels(reported: Any) -> list[str]:
    return [f"{each.directory}/{each.version:04d}" for each in reported]


def test_they_run_after_the_librarys_with_numbers_of_their_own(
    empty_dsn: str, owner: psycopg.Connection[Any], billing: Path
) -> None:
    given = {"billing": billing}
    report = migrate.migrate(empty_dsn, directories=given)
    ours = [f"equitie_data/{each.version:04d}" for each in directories.ours().migrations]
    assert labels(report.applied) == [*ours, "billing/0001", "billing/0002"]
    assert report.current == directories.ours().migrations[-1].label
    assert migrate.migrate(empty_dsn, directories=given).applied == ()
    assert migrate.migrate(empty_dsn).applied == ()  # a run that does not know of them leaves them alone
    assert migrate.verify(empty_dsn, directories=given) == ()
    assert [each.label for each in migrate.status(empty_dsn, directories=given)][-1] == "billing/0002_index_invoices"
    migrate.check_current(owner, given)


def test_a_place_in_one_stops_before_the_others(empty_dsn: str, billing: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "0001_a.sql").write_text("CREATE TABLE public.other (a int);\n")
    given = {"billing": billing, "other": other}
    assert labels(migrate.migrate(empty_dsn, to=2, directories=given).applied) == [
        "equitie_data/0001",
        "equitie_data/0002",
    ]
    assert labels(migrate.migrate(empty_dsn, to="billing/1", directories=given).applied)[-1] == "billing/0001"
    assert labels(migrate.pending(empty_dsn, directories=given)) == ["billing/0002", "other/0001"]
    with pytest.raises(MigrationError, match="no directory of migrations frob"):
        migrate.migrate(empty_dsn, to="frob/0001", directories=given)
    with pytest.raises(MigrationError, match="no migration frob"):
        migrate.migrate(empty_dsn, to="billing/frob", directories=given)


def test_drift_and_a_newer_history_stop_the_run_before_anything(
    empty_dsn: str, owner: psycopg.Connection[Any], billing: Path, release: Release
) -> None:
    given = {"billing": billing}
    migrate.migrate(empty_dsn, directories=given)
    release({"9999_later": "CREATE TABLE public.later (a int);"}, real=9998)
    first = billing / "0001_create_invoices.sql"
    text = first.read_text()
    first.write_text(f"{text}-- edited\n")
    with pytest.raises(ChecksumDriftError, match="billing/0001_create_invoices is not the one"):
        migrate.migrate(empty_dsn, directories=given)
    release({}, real=9998)
    with pytest.raises(ChecksumDriftError):
        migrate.check_current(owner, given)
    first.write_text(text)
    for file in billing.glob("0002*"):
        file.unlink()
    with pytest.raises(HistoryTooNewError, match="billing/0002_index_invoices, which this release of billing"):
        migrate.migrate(empty_dsn, directories=given)
    assert owner.execute("SELECT to_regclass('public.later')").fetchone() == (None,)


def test_check_current_asks_for_them_where_it_is_told_to(
    empty_dsn: str, owner: psycopg.Connection[Any], billing: Path
) -> None:
    migrate.migrate(empty_dsn)
    migrate.check_current(owner)
    with pytest.raises(NotMigratedError, match="lacks 2 migrations that billing needs, from billing/0001"):
        migrate.check_current(owner, {"billing": billing})


def test_an_installed_application_registers_its_own(
    empty_dsn: str,
    owner: psycopg.Connection[Any],
    billing: Path,
    registered: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (billing / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(billing.parent))
    registered(invoices="billing")
    migrate.migrate(empty_dsn, to=directories.ours().migrations[-1].label)
    # A database that has none of them is somebody else's; one that has some must have all.
    migrate.check_current(owner)
    assert labels(migrate.migrate(empty_dsn, to="invoices/0001").applied) == ["invoices/0001"]
    with pytest.raises(NotMigratedError, match="lacks 1 migration that invoices needs"):
        migrate.check_current(owner)
    assert labels(migrate.migrate(empty_dsn).applied) == ["invoices/0002"]
    migrate.check_current(owner)


def test_an_entry_point_that_cannot_be_loaded_is_named(empty_dsn: str, registered: Callable[..., None]) -> None:
    registered(invoices="no_such_package")
    with pytest.raises(MigrationError, match="entry point invoices = no_such_package"):
        migrate.status(empty_dsn)


def test_taking_back_minds_what_rests_on_it(empty_dsn: str, billing: Path, release: Release) -> None:
    release(
        {
            "0001_a": "CREATE TABLE public.deals_clean (deal_id int PRIMARY KEY);",
            "0001_a.down": "DROP TABLE public.deals_clean;",
        }
    )
    given = {"billing": billing}
    migrate.migrate(empty_dsn, directories=given)
    with pytest.raises(MigrationError, match="those of billing rest on"):
        migrate.down(empty_dsn, "0001")
    with pytest.raises(MigrationError, match="not the newest: billing/0002_index_invoices"):
        migrate.down(empty_dsn, "billing/0001", directories=given)
    assert migrate.down(empty_dsn, "billing/index_invoices", directories=given) == (
        "DROP INDEX public.idx_invoices_deal",
    )
    with pytest.raises(MigrationError, match="billing/0001_create_invoices cannot be taken back without loss"):
        migrate.down(empty_dsn, "billing/0001", directories=given)


def test_an_application_adopts_what_its_queries_find_whole(
    empty_dsn: str, owner: psycopg.Connection[Any], billing: Path
) -> None:
    given = {"billing": billing}
    migrate.migrate(empty_dsn)
    with pytest.raises(MigrationError, match="Name the last migration"):
        migrate.baseline(empty_dsn, to="billing/", directories=given)
    missing = migrate.baseline(empty_dsn, to="billing/0001", directories=given)
    assert [each.sentence for each in missing.differences] == ["public.invoices is missing."]
    owner.execute("CREATE TABLE public.invoices (invoice_id int, deal_id int)")
    with pytest.raises(MigrationError, match="0002_index_invoices cannot be adopted unseen"):
        migrate.baseline(empty_dsn, to="billing/0002", directories=given)
    report = migrate.baseline(empty_dsn, to="billing/0001", directories=given)
    assert report.recorded == ("billing/0001_create_invoices",)
    assert labels(migrate.migrate(empty_dsn, directories=given).applied) == ["billing/0002"]


def test_the_command_line_takes_directories(empty_dsn: str, billing: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "equitie_data.migrate", "--dsn", empty_dsn, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    option = ["--directory", f"billing={billing}"]
    done = run(*option, "up")
    assert (done.returncode, done.stderr) == (0, "")
    assert "billing/0002_index_invoices, step by step" in done.stdout
    assert "step 1 of 1" in done.stdout
    told = run("status", *option)
    assert told.returncode == 0
    assert "billing/0001_create_invoices" in told.stdout
    assert all(len(line) <= 80 for line in (done.stdout + told.stdout).splitlines())
    assert json.loads(run("status", "--json", *option).stdout)[-1]["directory"] == "billing"
    for wrong in ("billing", "=x", "billing="):
        assert run("status", "--directory", wrong).returncode == 2
    for wrong, message in (
        ("Billing=.", "no name for a directory"),
        ("equitie_data=.", "no name for a directory"),
        ("billing=/no/such/place", "is not there"),
        (f"billing={billing.parent}", "has no file"),
    ):
        failed = run("status", "--directory", wrong)
        assert (failed.returncode, message in failed.stderr) == (1, True)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"0001_a": "SELECT 1;", "0001_b": "SELECT 1;"}, "the same number"),
        ({"0001_a.down": "SELECT 1;"}, "belongs to no migration"),
        ({"0001_a": "SELECT 1;", "0002_b.verify": "SELECT 1;"}, "belongs to no migration"),
        ({"0001_a": "SELECT 1;", "0001_a.up": "SELECT 1;"}, "belongs to no migration"),
        ({"0001_a": "SELECT 1;", "0001_a.verify": "SELECT 'x;"}, "not closed"),
        ({"0001_a": "SELECT 1;", "0001_a.down": "-- equitie: transaction=false\nSELECT 1;"}, "goes as a whole"),
        ({"create": "SELECT 1;"}, "no name for a migration"),
    ],
)
def test_a_directory_that_makes_no_sense_is_refused(texts: dict[str, str], message: str) -> None:
    with pytest.raises(MigrationError, match=message):
        directories.read_directory("billing", texts, "somewhere")
