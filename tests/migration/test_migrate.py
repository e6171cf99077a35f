"""The runner: as a whole or not at all, once, one at a time, and never over a change nobody announced."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest

from equitie_data import migrate
from equitie_data.errors import (
    ChecksumDriftError,
    HistoryTooNewError,
    MigrationError,
    MigrationLockTimeoutError,
    NotMigratedError,
    UnavailableError,
)
from equitie_data.migrations import directories, operations, session

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.migration.conftest import Platform

    from equitie_data.migrations.files import Migration

SHIPPED = directories.ours().migrations
LAST = SHIPPED[-1]
A_MONTH = "transactions_clean FOR VALUES FROM ('2001-01-01') TO ('2001-02-01')"


def value(conn: psycopg.Connection[Any], query: str) -> Any:
    row = conn.execute(query).fetchone()
    assert row is not None
    return row[0]


def history(conn: psycopg.Connection[Any]) -> list[tuple[int, str]]:
    return conn.execute("SELECT version, state FROM equitie_migrations.history ORDER BY event_id").fetchall()


def run(*arguments: str, dsn: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "equitie_data.migrate", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "DATABASE_URL": dsn, "MIGRATION_DATABASE_URL": "", **environment},
    )


def test_an_empty_database_gets_every_migration_and_a_second_run_none(
    empty_dsn: str, owner: psycopg.Connection[Any]
) -> None:
    report = migrate.migrate(empty_dsn)
    assert [entry.version for entry in report.applied] == [migration.version for migration in SHIPPED]
    assert report.current == LAST.label
    assert {entry.attempts for entry in report.applied} == {1}

    again = migrate.migrate(empty_dsn)
    assert again.applied == ()
    assert again.current == LAST.label
    assert history(owner) == [(migration.version, "applied") for migration in SHIPPED]
    assert migrate.verify(empty_dsn) == ()
    migrate.check_current(owner)


def test_it_stops_where_it_is_told_and_goes_on_from_there(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    assert [entry.version for entry in migrate.migrate(empty_dsn, to=2).applied] == [1, 2]
    with pytest.raises(NotMigratedError, match=r"lacks \d+ migrations .* from 0003_"):
        migrate.check_current(owner)
    assert [entry.version for entry in migrate.migrate(empty_dsn, to="partition_transactions_table").applied] == [3, 4]
    assert [migration.version for migration in migrate.pending(empty_dsn)] == [
        migration.version for migration in SHIPPED[4:]
    ]
    migrate.migrate(empty_dsn)
    with pytest.raises(MigrationError, match="no migration frobnicate"):
        migrate.migrate(empty_dsn, to="frobnicate")


def test_rows_ids_and_the_sequence_survive_partitioning(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    migrate.migrate(empty_dsn, to=3)
    owner.execute(
        "INSERT INTO deals_clean (deal_name) VALUES ('d'); INSERT INTO investors_clean (full_name) VALUES ('i')"
    )
    owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT 1, 1, d, 1 FROM generate_series(current_date - 400, current_date + 500, interval '7 days') AS d"
    )
    owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount) VALUES"
        " (1, 1, '0202-03-04', 2), (1, 1, 'infinity', 3)"
    )
    before = owner.execute("SELECT to_jsonb(t) FROM transactions_clean t ORDER BY transaction_id").fetchall()
    newest = value(owner, "SELECT max(transaction_id) FROM transactions_clean")

    migrate.migrate(empty_dsn, to=4)

    assert owner.execute("SELECT to_jsonb(t) FROM transactions_clean t ORDER BY transaction_id").fetchall() == before
    # The mistyped year, infinity, and what lies more than a year ahead wait in the default partition.
    late = value(
        owner,
        "SELECT count(*) FROM transactions_clean"
        " WHERE transaction_date >= date_trunc('month', current_date) + interval '13 months'",
    )
    assert value(owner, "SELECT count(*) FROM equitie_part.transactions_clean_default") == late + 1
    inserted = value(
        owner,
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " VALUES (1, 1, current_date, 1) RETURNING transaction_id",
    )
    assert inserted == newest + 1


def test_a_view_of_others_stops_the_partitioning_and_is_named(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    migrate.migrate(empty_dsn, to=3)
    owner.execute("CREATE VIEW public.reporting AS SELECT sum(amount) FROM transactions_clean")
    with pytest.raises(MigrationError, match=r"0004_partition_transactions_table failed .*depend"):
        migrate.migrate(empty_dsn)
    assert value(owner, "SELECT relkind FROM pg_class WHERE oid = 'transactions_clean'::regclass") == "r"
    owner.execute("DROP VIEW public.reporting")
    assert migrate.migrate(empty_dsn).current == LAST.label


def test_old_duplicate_indexes_are_gone(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    migrate.migrate(empty_dsn, to=2)
    for column in ("deal", "investor"):
        owner.execute(f"CREATE INDEX idx_transactions_clean_{column} ON transactions_clean ({column}_id)")
    migrate.migrate(empty_dsn, to=3)
    assert (
        owner.execute("SELECT indexname FROM pg_indexes WHERE indexname LIKE 'idx_transactions_clean%'").fetchall()
        == []
    )


def test_two_runs_at_once_share_the_work(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    command = [sys.executable, "-m", "equitie_data.migrate", "--dsn", empty_dsn, "--json"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outcomes = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    assert [(error, code) for _, error, code in outcomes] == [("", 0)] * 3
    applied = [entry["version"] for output, *_ in outcomes for entry in json.loads(output)["applied"]]
    assert sorted(applied) == [migration.version for migration in SHIPPED]
    assert history(owner) == [(migration.version, "applied") for migration in SHIPPED]


def test_a_run_that_waits_too_long_names_the_one_it_waits_for(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    owner.execute("SELECT pg_advisory_lock(%s)", (session._ADVISORY_LOCK,))
    with pytest.raises(MigrationLockTimeoutError, match=f"server process {owner.info.backend_pid}"):
        migrate.migrate(empty_dsn, wait=0.2)


def test_the_history_holds_where_the_advisory_lock_does_not(
    empty_dsn: str, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As behind a transaction pooler: every run believes that it is alone.
    monkeypatch.setattr(session, "_take_turn", lambda _conn, _wait: None)
    migrate.migrate(empty_dsn, to=1)
    errors: list[BaseException] = []

    def go() -> None:
        try:
            migrate.migrate(empty_dsn)
        except BaseException as error:  # noqa: BLE001 - reported by the assertion
            errors.append(error)

    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(history(owner)) == [(migration.version, "applied") for migration in SHIPPED]


def test_a_changed_file_is_drift(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Callable[..., tuple[Migration, ...]]
) -> None:
    release({"0001_a": "CREATE TABLE public.a (a int);"})
    migrate.migrate(empty_dsn)
    release({"0001_a": "CREATE TABLE public.a (a bigint);", "0002_b": "CREATE TABLE public.b (b int);"})
    for call in (migrate.migrate, migrate.pending):
        with pytest.raises(ChecksumDriftError, match="0001_a is not the one"):
            call(empty_dsn)
    with pytest.raises(ChecksumDriftError):
        migrate.check_current(owner)
    assert [entry.state for entry in migrate.status(empty_dsn)] == ["changed", "pending"]
    assert "0001_a is not the one" in migrate.verify(empty_dsn)[0]
    assert value(owner, "SELECT to_regclass('public.b')") is None


def test_a_database_of_a_newer_release_is_left_alone(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Callable[..., tuple[Migration, ...]]
) -> None:
    release({"0001_a": "SELECT 1;", "0002_from_tomorrow": "-- equitie: compatible_since=0002\nSELECT 1;"})
    migrate.migrate(empty_dsn)
    release({"0001_a": "SELECT 1;"})
    for call in (migrate.migrate, migrate.pending, migrate.plan):
        with pytest.raises(HistoryTooNewError, match="0002_from_tomorrow"):
            call(empty_dsn)
    with pytest.raises(HistoryTooNewError):
        migrate.check_current(owner)
    assert [entry.state for entry in migrate.status(empty_dsn)] == ["applied", "unknown"]


@pytest.mark.parametrize(
    ("statement", "line", "reason"),
    [
        ("SELECT *\nFROM public.nowhere;", 6, "does not exist"),
        ("CREATE TABLE public.b (a int);", 5, "already exists"),
        ("SELEC 1;", 5, "syntax error"),
        ("DO $$\nBEGIN\n  PERFORM 1;\n  PERFORM 1 / 0;\nEND\n$$;", 8, "division by zero"),
        ("CREATE FUNCTION public.f() RETURNS int\nLANGUAGE sql\nAS $$\n  SELECT nothing\n$$;", 8, "does not exist"),
        ("SELECT '%', 'done' LIKE '%x%';\nSELECT 1/0;", 6, "division by zero"),
    ],
)
def test_a_migration_that_fails_leaves_nothing_and_is_named_with_its_line(
    empty_dsn: str,
    owner: psycopg.Connection[Any],
    release: Callable[..., tuple[Migration, ...]],
    *,
    statement: str,
    line: int,
    reason: str,
) -> None:
    texts = {
        "0001_a": "CREATE TABLE public.a (a int);",
        "0002_b": f"-- What.\nCREATE TABLE public.b (\n  a int\n);\n{statement}\n",
    }
    release(texts)
    with pytest.raises(MigrationError) as caught:
        migrate.migrate(empty_dsn)
    message = str(caught.value)
    assert f"sql/migrations/0002_b.sql, line {line})" in message
    assert reason in message
    assert "Nothing of it was applied" in message
    assert "\n" not in message
    assert value(owner, "SELECT to_regclass('public.b')") is None
    assert history(owner) == [(1, "applied"), (2, "failed")]
    assert reason in value(owner, "SELECT error FROM equitie_migrations.history WHERE state = 'failed'")

    release({**texts, "0002_b": "CREATE TABLE public.b (a int);"})
    assert migrate.migrate(empty_dsn).current == "0002_b"
    assert history(owner) == [(1, "applied"), (2, "failed"), (2, "applied")]


def test_a_migration_outside_a_transaction_is_resumed(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Callable[..., tuple[Migration, ...]]
) -> None:
    text = (
        "-- equitie: transaction=false\n"
        "CREATE TABLE IF NOT EXISTS public.a (a int);\n"
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_a ON public.a (a);\n"
        "SELECT a FROM public.b;\n"
    )
    release({"0001_a": text})
    with pytest.raises(MigrationError, match=r"line 4.*goes on with that statement"):
        migrate.migrate(empty_dsn)
    assert value(owner, "SELECT to_regclass('public.idx_a')") is not None
    owner.execute("CREATE TABLE public.b (a int)")
    assert migrate.migrate(empty_dsn).current == "0001_a"


def test_a_lock_that_is_held_is_waited_for_by_trying_again(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Callable[..., tuple[Migration, ...]]
) -> None:
    owner.execute("CREATE TABLE public.busy (a int)")
    release({"0001_a": "ALTER TABLE public.busy ADD COLUMN b int;"})
    holding = psycopg.connect(empty_dsn)
    holding.execute("SELECT FROM public.busy")
    releaser = threading.Timer(0.6, holding.close)
    releaser.start()
    try:
        report = migrate.migrate(empty_dsn, lock_timeout=0.1)
    finally:
        releaser.join()
    assert report.applied[0].attempts > 1


def test_a_lock_that_stays_held_is_an_error_after_some_attempts(
    empty_dsn: str,
    owner: psycopg.Connection[Any],
    release: Callable[..., tuple[Migration, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "_ATTEMPTS", 2)
    owner.execute("CREATE TABLE public.busy (a int)")
    release({"0001_a": "ALTER TABLE public.busy ADD COLUMN b int;"})
    with psycopg.connect(empty_dsn) as holding:
        holding.execute("SELECT FROM public.busy")
        with pytest.raises(MigrationError, match=r"failed 2 times .*lock timeout"):
            migrate.migrate(empty_dsn, lock_timeout=0.05)


def test_timeouts_of_the_role_do_not_cut_a_migration_short(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Callable[..., tuple[Migration, ...]]
) -> None:
    owner.execute(
        f"ALTER DATABASE {owner.info.dbname} SET statement_timeout = '50ms';"
        f"ALTER DATABASE {owner.info.dbname} SET default_transaction_read_only = on"
    )
    release({"0001_a": "SELECT pg_sleep(0.2); CREATE TABLE public.a (a int);"})
    assert migrate.migrate(empty_dsn).current == "0001_a"


def test_a_lost_connection_is_one_sentence_and_leaves_nothing(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Callable[..., tuple[Migration, ...]]
) -> None:
    release({"0001_a": "CREATE TABLE public.a (a int); SELECT pg_terminate_backend(pg_backend_pid());"})
    with pytest.raises(MigrationError, match="0001_a failed") as caught:
        migrate.migrate(empty_dsn)
    assert "\n" not in str(caught.value)
    assert value(owner, "SELECT to_regclass('public.a')") is None
    assert history(owner) == []


def test_a_migrated_database_is_needed(owner: psycopg.Connection[Any]) -> None:
    with pytest.raises(NotMigratedError, match=r"python -m equitie_data\.migrate"):
        migrate.check_current(owner)


def test_a_login_that_was_not_granted_anything_is_told_so(platform: Platform, owner_dsn: str) -> None:
    platform.owner.execute("CREATE ROLE ungranted LOGIN")
    try:
        with psycopg.connect(owner_dsn, autocommit=True) as conn:
            conn.execute("SET ROLE ungranted")
            with pytest.raises(NotMigratedError, match="migrate grant"):
                migrate.check_current(conn)
    finally:
        platform.owner.execute("DROP ROLE ungranted")


def test_the_applications_login_may_check(platform: Platform) -> None:
    migrate.check_current(platform.app)


@pytest.mark.parametrize(
    ("break_it", "finding"),
    [
        ("ALTER TABLE companies_clean DISABLE TRIGGER audit_update", "companies_clean lacks the trigger audit_update"),
        ("ALTER TABLE deals_clean ENABLE TRIGGER audit_insert", "deals_clean lacks the trigger audit_insert"),
        ("DROP TRIGGER audit_delete ON equitie_part.transactions_clean_default", "lacks the trigger audit_delete"),
        (f"CREATE TABLE equitie_part.x PARTITION OF {A_MONTH}", "equitie_part.x lacks"),
        (f"CREATE TABLE public.x PARTITION OF {A_MONTH}", "stands outside equitie_part"),
        ("ALTER TABLE audit_logs DISABLE TRIGGER refuse_change", "audit_logs can be changed"),
        ("ALTER TABLE companies_clean ADD COLUMN motto text", "column motto of public.companies_clean is not known"),
        ("ALTER TABLE investors_clean DISABLE ROW LEVEL SECURITY", "investors_clean is off"),
        ("ALTER TABLE query_stats DISABLE ROW LEVEL SECURITY", "query_stats is off"),
        ("GRANT SELECT ON investors_clean TO anon", "anon holds SELECT on public.investors_clean"),
        ("GRANT SELECT ON investors_clean TO PUBLIC", "PUBLIC holds SELECT on public.investors_clean"),
        ("GRANT DELETE ON audit_logs TO service_role", "service_role may change public.audit_logs"),
        ("GRANT USAGE ON SCHEMA equitie_part TO authenticated", "authenticated holds a privilege on the schema"),
        ("GRANT SELECT ON equitie_part.transactions_clean_default TO anon", "anon holds SELECT on the partition"),
        ("CREATE POLICY own ON investors_clean FOR SELECT TO authenticated USING (true)", "policy own"),
        ("DROP INDEX idx_transactions_investor_date", "idx_transactions_investor_date is missing"),
        ("ALTER TABLE transactions_clean DROP CONSTRAINT fk_transactions_deal", "fk_transactions_deal of public"),
        ("GRANT SELECT ON equitie_private.query_stats_hourly TO equitie_staff", "equitie_staff may read"),
    ],
)  # fmt: skip
def test_verify_finds_what_was_altered(platform: Platform, owner_dsn: str, break_it: str, finding: str) -> None:
    assert migrate.verify(owner_dsn) == ()
    platform.owner.execute(break_it)
    found = migrate.verify(owner_dsn)
    assert any(finding in problem for problem in found), found


def test_the_command_line_migrates_and_says_so_in_80_columns(empty_dsn: str) -> None:
    done = run(dsn=empty_dsn)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(SHIPPED)} migrations applied" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    again = run("up", dsn="postgresql://nowhere.invalid/", MIGRATION_DATABASE_URL=empty_dsn)
    assert again.returncode == 0
    assert f"Nothing to do: the database is at {LAST.label}." in again.stdout

    for command in ("status", "plan", "verify"):
        told = run(command, dsn=empty_dsn)
        assert (told.returncode, told.stderr) == (0, "")
        assert all(len(line) <= 80 for line in told.stdout.splitlines())
        json.loads(run(command, "--json", dsn=empty_dsn).stdout)


def test_the_command_line_plans_without_changing_anything(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    planned = run("plan", "--sql", dsn=empty_dsn)
    assert planned.returncode == 0
    assert "CREATE TABLE public.companies_clean" in planned.stdout
    status = run("status", dsn=empty_dsn)
    assert (status.returncode, status.stderr) == (1, "")
    assert f"0 applied, {len(SHIPPED)} pending" in status.stdout
    assert value(owner, "SELECT to_regnamespace('equitie_migrations')") is None


@pytest.mark.parametrize("arguments", [["--lock-timeout", "0"], ["--wait", "nan"], ["frobnicate"], ["grant"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        migrate.main(["--dsn", "postgresql://nowhere.invalid/", *arguments])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_options_stand_before_or_after_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def fake(dsn: str, **options: Any) -> migrate.MigrationReport:
        seen.append({"dsn": dsn, **options})
        return migrate.MigrationReport(applied=(), current=None, server_version="18", seconds=0.0)

    monkeypatch.setattr(operations, "migrate", fake)
    for arguments in (
        ["--dsn", "d", "--json", "--lock-timeout", "3", "--to", "2"],
        ["--dsn", "d", "--json", "--lock-timeout", "3", "--to", "2", "up"],
        ["up", "--dsn", "d", "--json", "--lock-timeout", "3", "--to", "2"],
    ):
        assert migrate.main(arguments) == 0
    expected = {"to": "2", "before_deployment": False, "directories": {}, "lock_timeout": 3.0, "wait": 600.0}
    assert seen == [{"dsn": "d", **expected}] * 3
    assert json.loads(capsys.readouterr().out.split("}\n{")[0] + "}")["current"] is None


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://postgres:secret-pw@127.0.0.1:1/x",
        "postgresql://postgres:secret-pw@nowhere.invalid/x",
        "postgresql://postgres:secret-pw@127.0.0.1:notaport/x",
        "rubbish secret-pw",
        "",
    ],
)
def test_a_wrong_dsn_is_one_line_without_secrets(dsn: str) -> None:
    failed = run(dsn=dsn)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: ")
    assert "secret-pw" not in failed.stderr + failed.stdout


def test_a_wrong_password_is_one_line(server: Any) -> None:
    failed = run(dsn=server.dsn("postgres", "postgres", "secret-pw"))
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "password" in failed.stderr
    assert "secret-pw" not in failed.stderr + failed.stdout


def test_a_failing_migration_is_one_line_on_the_command_line(
    empty_dsn: str,
    release: Callable[..., tuple[Migration, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    release({"0001_a": "SELECT 1 / 0;"})
    assert migrate.main(["--dsn", empty_dsn]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: Migration 0001_a failed")
    assert "Traceback" not in captured.out


def test_a_replica_is_refused(server: Any, tmp_path: Any) -> None:
    with server.replica() as replica, pytest.raises(MigrationError, match="read replica"):
        migrate.migrate(replica.dsn())


def test_an_old_server_is_refused(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_OLDEST_SERVER", 990000)
    with pytest.raises(MigrationError, match="15 or newer"):
        migrate.migrate(empty_dsn)


def test_a_database_that_is_not_there_is_named(server: Any) -> None:
    with pytest.raises(UnavailableError, match="does not exist"):
        migrate.status(server.dsn("no_such_database"))


def test_a_migration_is_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        SHIPPED[0].name = "x"  # type: ignore[misc]
    assert directories.ours() is directories.ours()


def test_status_says_when(empty_dsn: str) -> None:
    migrate.migrate(empty_dsn, to=1)
    first, second, *_ = migrate.status(empty_dsn)
    assert first.applied_at is not None
    age = dt.datetime.now(dt.timezone.utc) - dt.datetime.fromisoformat(first.applied_at)
    assert abs(age) < dt.timedelta(hours=1)
    assert second.applied_at is None
