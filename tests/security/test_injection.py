"""SQL in every string the API and the command line take: it stays a string."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from equitie_data import AuditAction, ConfigurationError, Database, EquitieDataError, acting_as, as_service, migrate
from equitie_data.__main__ import main
from equitie_data.redaction import on_one_line
from equitie_data.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.security.world import World

PAYLOADS = (
    "'; DROP TABLE public.companies_clean; --",
    "' OR '1'='1",
    '"; DROP TABLE public.companies_clean; --',
    "x' UNION SELECT rolname FROM pg_roles --",
    "$1; SELECT 1",
    "%s %(name)s %% {} {0}",
    "\\'; DROP TABLE public.companies_clean; --",
    "'||(SELECT version())||'",
    "/* */ -- $$",
    "public.companies_clean",
    "\ufeff\u2028' --",
    "E'\\\\x27'",
)
TABLES = ("companies_clean", "investors_clean", "deals_clean", "transactions_clean", "user_profiles", "audit_logs")


def test_no_string_of_the_api_is_taken_for_sql(world: World) -> None:
    database = world.database
    for payload in PAYLOADS:
        stored = on_stored(payload)
        facts = dict.fromkeys(("user_agent", "session_id", "request_id", "tenant_id"), payload)
        with as_service(payload, **facts):
            assert database.execute_read("SELECT %s::text", [payload], name=payload) == [(payload,)]
            for _ in range(2):  # the second takes the result that was kept for the key
                assert database.execute_write("SELECT %s::text", [payload], idempotency_key=payload) == [(payload,)]
            database.audit.log(AuditAction.READ, payload, payload, metadata={payload: payload})
            database.audit.flush()
            found = database.audit.query(entity_type=payload, entity_id=payload, request_id=stored, source="sdk")
            assert [(each.entity_type, each.entity_id, each.reason) for each in found] == [(payload, payload, stored)]
            assert (found[0].user_agent, found[0].session_id, found[0].tenant_id) == (stored,) * 3
            assert database.audit.query(action=payload) == []
            assert database.audit.query(source=payload) == []
            database.monitor.track_query(payload, 5_000.0, error=payload)
            database.monitor.track_system_metric(payload, 1.0, payload, {payload: payload})
            assert database.monitor.flush()
        with pytest.raises(ConfigurationError), acting_as(payload):
            pass
        with pytest.raises(ConfigurationError), acting_as(uuid4(), ip_address=payload):
            pass
        with pytest.raises(ValueError), as_service("a test"):
            database.audit.log(payload, "x")
        with as_service("a test"), pytest.raises(psycopg.errors.InvalidTextRepresentation):
            database.audit.query(user_id=payload)
    assert all(world.one(f"SELECT count(*) FROM public.{table}") >= 0 for table in TABLES)
    assert world.one("SELECT count(*) FROM public.investors_clean") == 2


def on_stored(text: str) -> str:
    """What an actor keeps of a text: what steers a reader is replaced."""
    return "".join("\ufffd" if on_one_line(each) != each else each for each in text)


@pytest.mark.parametrize("role", [*PAYLOADS, "", "no\x00body", "a" * 200, "PUBLIC", "equitie_app\x1b[2J"])
def test_the_role_to_grant_to_is_a_name_and_nothing_else(
    owner_dsn: str, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    with pytest.raises(EquitieDataError):
        migrate.grant(owner_dsn, role)
    if not role.startswith("-"):
        assert main(["migrate", "grant", role, "--dsn", owner_dsn]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert "\x1b" not in captured.err + captured.out
    with psycopg.connect(owner_dsn) as owner:
        assert owner.execute("SELECT count(*) FROM public.companies_clean").fetchone() == (0,)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_column_of_a_file_is_a_column_and_nothing_else(
    app_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], payload: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", app_dsn)
    file = tmp_path / "investments.csv"
    with file.open("w", encoding="utf-8", newline="") as target:
        writer = csv.writer(target)
        writer.writerow([payload, "investor", "date", "amount"])
        writer.writerow([payload, payload, "2024-01-05", "100"])
    name = payload.replace("=", "")
    code = main(["import", str(file), "--map", f"{payload}=company"])
    assert code in (0, 1, 2)
    assert main(["import", str(file), "--map", f"company={name}"]) in (1, 2)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    with psycopg.connect(app_dsn) as app:
        app.execute("SET ROLE service_role")
        found = [row[0] for row in app.execute("SELECT company_name FROM public.companies_clean")]
    assert found in ([], [payload.strip().strip("\ufeff")], [payload.strip()]), out


@pytest.mark.parametrize("payload", PAYLOADS)
def test_settings_are_values_and_nothing_else(app_dsn: str, payload: str) -> None:
    settings = Settings(dsn=app_dsn, application_name=payload[:60], min_size=1, max_size=1)
    with Database(settings) as database, as_service("a test"):
        assert database.execute_read("SELECT count(*) FROM public.companies_clean") == [(0,)]
    wrong = Settings(dsn=app_dsn, service_role=payload, min_size=1, max_size=1)
    with Database(wrong) as database, as_service("a test"), pytest.raises((psycopg.Error, EquitieDataError)):
        database.execute_read("SELECT 1")


def test_a_database_of_any_name_is_read(owner_dsn: str) -> None:
    name = "odd \"name'%s; --"
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            odd = psycopg.conninfo.make_conninfo(owner_dsn, dbname=name)
            assert migrate.migrate(odd).applied
            assert migrate.verify(odd) == ()
        finally:
            owner.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
