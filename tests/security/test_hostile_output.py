"""What values do to those who read them: spreadsheets, logs, traces, terminals."""

from __future__ import annotations

import csv
import io
import logging
import sys
from typing import TYPE_CHECKING

import psycopg
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from equitie_data import AuditAction, Database, EquitieDataError, as_service
from equitie_data._log import get_logger
from equitie_data.cli import describe, resolve_dsn
from equitie_data.csv_import import ImportReport, import_csv
from equitie_data.errors import MigrationError
from equitie_data.integrations.structlog import StructlogHook
from equitie_data.redaction import Redaction, on_one_line

if TYPE_CHECKING:
    from pathlib import Path

FORMULAS = ("=1+1", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201", "'=1")


def test_a_rejected_cell_is_no_formula_in_a_spreadsheet(database: Database, tmp_path: Path) -> None:
    source = io.StringIO(newline="")
    writer = csv.writer(source)
    writer.writerow(["company", "investor", "date", "amount"])
    for formula in FORMULAS:
        writer.writerow([formula, formula, "no date", "=cmd|' /C calc'!A0"])
    rejects = tmp_path / "rejects.csv"
    with as_service("a test"):
        report = import_csv(database, io.BytesIO(source.getvalue().encode()), rejects=rejects)
    assert report.rejected == len(FORMULAS)
    with rejects.open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    dangerous = [cell for cell in cells if cell[:1] in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20" and cell]
    assert dangerous == []
    assert rejects.stat().st_mode & 0o777 == 0o600


HOSTILE = {
    "NUL": b"company,investor,date,amount\nAc\0me,Ada,2024-01-05,1\n",
    "a giant field": b"company,investor,date,amount\n" + b"x" * 5_000_000 + b",Ada,2024-01-05,1\n",
    "a giant header": b"x" * 5_000_000 + b"\n",
    "an open quote": b'company,investor,date,amount\n"Acme,Ada,2024-01-05,1\n' + b"row,row,row,row\n" * 10_000,
    "no UTF-8": b"company,investor,date,amount\n\xff\xfe,Ada,2024-01-05,1\n",
    "many columns": b"company,investor,date,amount" + b",x" * 50_000 + b"\n",
    "a lone surrogate": b"company,investor,date,amount\n\xed\xa0\x80,Ada,2024-01-05,1\n",
    "quotes": b'company,investor,date,amount\n""",""a"" ;",Ada,2024-01-05,1\n',
    "an amount of a million digits": b"company,investor,date,amount\nAcme,Ada,2024-01-05," + b"9" * 1_000_000 + b"\n",
    "an amount with an exponent": b"company,investor,date,amount\nAcme,Ada,2024-01-05,1e999999999\n",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused_or_rejected_in_a_sentence(database: Database, what: str) -> None:
    def load() -> ImportReport | EquitieDataError:
        try:
            return import_csv(database, io.BytesIO(HOSTILE[what]))
        except EquitieDataError as error:
            return error

    with as_service("a test"):
        outcome = load()
    if isinstance(outcome, EquitieDataError):
        assert "\n" not in str(outcome)
        assert len(str(outcome)) < 2_000
    else:
        assert outcome.read == outcome.inserted + outcome.duplicates + outcome.rejected
        assert outcome.read < 10


# --- lines and terminals ------------------------------------------------------------------------------------------

STEERING = "x\r\nevent='forged' level=critical\x1b[2J\x1b]0;owned\x07\u2028\u202e\x00\x9b31m"


def test_a_line_break_in_a_value_makes_no_second_line_of_a_log(app_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    written = io.StringIO()
    structlog.configure(
        # The least protective renderer there is.
        processors=[lambda _, __, event: " ".join(f"{key}={value}" for key, value in event.items())],
        logger_factory=structlog.PrintLoggerFactory(written),
    )
    with Database(app_dsn, hooks=[StructlogHook()]) as database:
        with as_service(STEERING.replace("\x00", ""), request_id=STEERING, user_agent=STEERING, tenant_id=STEERING):
            database.execute_read("SELECT 1", name=STEERING.replace("\x00", ""))
            database.audit.log(AuditAction.READ, "x", metadata={"agent": STEERING})
        database.audit.flush()
        with as_service("reading"):
            record = database.audit.query(entity_type="x")[0]
    for text in (record.request_id, record.user_agent, record.tenant_id, record.reason):
        assert text is not None
        assert text == on_one_line(text)
    lines = written.getvalue().splitlines()
    assert len(lines) > 3
    assert all(line.startswith(("name=", "event=", "sql=", "kind=", "node=")) or "event=" in line for line in lines)
    assert not any(line.startswith("event='forged'") for line in lines)
    assert not set(written.getvalue()) & set("\x1b\x07\u2028\u202e\x9b")
    structlog.reset_defaults()
    with caplog.at_level(logging.INFO, "equitie_data.attack"):
        get_logger("equitie_data.attack").warning("one", value=STEERING)
    assert not set(caplog.text) & set("\x1b\u2028\u202e")


def test_spans_have_one_line(app_dsn: str) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from equitie_data.integrations.opentelemetry import OpenTelemetryHook

    spans, tracers = InMemorySpanExporter(), TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    hook = OpenTelemetryHook(tracers.get_tracer("t"), redaction=Redaction(patterns=("owned",)))
    with Database(app_dsn, hooks=[hook]) as database, as_service("a test"):
        database.execute_read("SELECT 1", name=STEERING.replace("\x00", ""))
    names = [span.name for span in spans.get_finished_spans()]
    assert any("forged" in name for name in names)
    assert all(name == on_one_line(name) and "owned" not in name for name in names)


@given(st.text())
def test_what_is_on_one_line_stays_there(text: str) -> None:
    shown = on_one_line(text)
    assert shown.splitlines() in ([], [shown])
    assert "\x1b" not in shown
    shown.encode()
    if text.isascii() and text.isprintable():
        assert shown == text


def test_errors_of_the_command_line_quote_no_value_and_steer_no_terminal(app_dsn: str) -> None:
    with psycopg.connect(app_dsn, autocommit=True) as app:
        for statement, value in (("SELECT %s::text::integer", "hunter2"), ("SELECT %s::text::uuid", "hunter2")):
            with pytest.raises(psycopg.Error) as caught:
                app.execute(statement, [value])
            assert "hunter2" not in describe(caught.value)
            assert "SQLSTATE 22P02" in describe(caught.value)
        with pytest.raises(psycopg.Error) as caught:
            app.execute(sql.SQL("SELECT {}").format(sql.Identifier("\x1b[2Jgone\nerror: forged")))
        assert describe(caught.value) == on_one_line(describe(caught.value))
    assert "hunter2" not in describe(MigrationError("postgresql://u:hunter2@h/d is wrong"))


def test_a_password_that_is_typed_as_an_argument_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dsn = "postgresql://u:hunter2@h/d"
    assert resolve_dsn(dsn, "DATABASE_URL", environ={}) == dsn
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert resolve_dsn(dsn, "DATABASE_URL", environ={}) == dsn
    warning = capsys.readouterr().err
    assert warning.startswith("warning: everybody on this machine can read the password in --dsn")
    assert "hunter2" not in warning
    for harmless in ("postgresql://u@h/d", "no dsn at all"):
        resolve_dsn(harmless, "DATABASE_URL", environ={})
    assert resolve_dsn(None, "DATABASE_URL", environ={"DATABASE_URL": dsn}) == dsn
    assert capsys.readouterr().err == ""


def test_a_login_is_not_in_what_a_database_shows_of_itself(app_dsn: str) -> None:
    password = str(conninfo_to_dict(app_dsn)["password"])
    with Database(app_dsn) as database:
        shown = f"{database!r} {database.settings!r} {database.pool.primary!r} {database.pool.get_stats()!r}"
    assert password not in shown
