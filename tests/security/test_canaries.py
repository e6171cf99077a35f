"""Where a value goes: something unmistakable is planted in every input, and every output is searched for it.

`ALLOWED` is the whole list of places where a value may stand. Whatever is found elsewhere is a leak; and an entry of
the list that nothing is found at any more is out of date.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import re
import traceback
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import structlog
from psycopg.conninfo import conninfo_to_dict

from equitie_data import Actor, AuditAction, Database, acting_as, as_service
from equitie_data.__main__ import main
from equitie_data.alerts import Thresholds
from equitie_data.embedded import EmbeddedServer
from equitie_data.hooks import StatementEnded
from equitie_data.integrations.opentelemetry import OpenTelemetryHook
from equitie_data.integrations.structlog import StructlogHook
from equitie_data.provision import APPLICATION_ROLE, DATABASE, provision
from equitie_data.redaction import Redaction
from equitie_data.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USER = "6f1e0e8a-0000-4000-8000-0000000ca4a7"
INVESTOR_USER = "6f1e0e8a-0000-4000-8000-0000000ca4a8"

ALLOWED = {
    # Parameters: in the tables they were written to, in the record of what changed, and where the application said so.
    ("parameter of a write", "public.companies_clean.company_name"),
    ("parameter of a write", "public.audit_logs.changes"),
    ("copied row", "public.companies_clean.company_name"),
    ("copied row", "public.audit_logs.changes"),
    ("idempotency key", "equitie_private.idempotency_keys.key"),
    ("result kept for a key", "equitie_private.idempotency_keys.result"),
    ("result kept for a key", "public.companies_clean.company_name"),
    ("result kept for a key", "public.audit_logs.changes"),
    # The application's own words about a call and about who acts.
    ("name of a call", "events"),
    ("name of a call", "library's log"),
    ("name of a call", "spans"),
    ("name of a call", "public.query_metrics.api_endpoint"),
    ("name of a call", "equitie_private.idempotency_keys.name"),
    ("tenant", "public.audit_logs.tenant_id"),
    ("tenant", "events"),
    ("tenant", "repr of an actor"),
    ("user agent", "public.audit_logs.user_agent"),
    ("session", "public.audit_logs.session_id"),
    ("request", "public.audit_logs.request_id"),
    ("request", "events"),
    ("request", "repr of an actor"),
    ("reason", "public.audit_logs.reason"),
    ("reason", "events"),
    ("reason", "repr of an actor"),
    # SQL with values pasted into it: the object that subscribers in this very process are given.
    ("literal in SQL", "events"),
    ("literal in SQL that fails", "events"),
    # What the application told the audit log and the monitor, in fields that are no secrets.
    ("audited metadata", "public.audit_logs.metadata"),
    ("metric's label", "public.system_metrics.metadata"),
    ("metric's label", "dashboard"),
    # The file that was imported, and the file of what was rejected, which its owner alone may read.
    ("cell of a row", "public.investors_clean.full_name"),
    ("cell of a row", "public.audit_logs.changes"),
    ("cell of a rejected row", "rejects file"),
    # The caller's own statement failed, and psycopg's error of it passes through unchanged.
    ("duplicate e-mail", "errors of the caller's statements"),
    ("duplicate e-mail", "public.investors_clean.primary_email"),
    ("duplicate e-mail", "public.audit_logs.changes"),
    ("parameter that does not fit", "errors of the caller's statements"),
    ("cell of a COPY that fails", "errors of the caller's statements"),
    ("error of an operation", "errors of the caller's statements"),
    # Pickled settings hold what they were made with: they are handed to processes that need it.
    ("password of a DSN", "pickled settings"),
}


class Canaries:
    """Unmistakable values, made as they are asked for."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def __call__(self, kind: str) -> str:
        return self.values.setdefault(kind, f"canary{len(self.values):03d}x{abs(hash(kind)) % 10**12:012d}")


class Outputs:
    """Everything that was written anywhere."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}

    def add(self, place: str, *values: object) -> None:
        self.texts.setdefault(place, []).extend(str(value) for value in values)

    def sightings(self, canaries: Canaries) -> set[tuple[str, str]]:
        found = set()
        for place, texts in self.texts.items():
            whole = "\n".join(texts)
            found |= {(kind, place) for kind, value in canaries.values.items() if value in whole}
        return found


class Recorder:
    """Takes down every event, whole."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def on_event(self, event: object, /) -> None:
        self._outputs.add("events", repr(event))


def chain(error: BaseException) -> str:
    """Everything an error says, with what hangs on it and how it is printed."""
    texts, waiting, seen = [], [error], set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        texts += [str(each), repr(each), repr(each.args), *traceback.format_exception(each)]
        waiting += [each.__cause__, each.__context__]  # type: ignore[list-item]
    return "\n".join(texts)


@pytest.fixture(scope="module")
def default_server(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A server with nothing set: what it logs is what users of an embedded one get."""
    with EmbeddedServer(bin_dir=server.bin_dir, settings={"shared_preload_libraries": "pg_stat_statements"}) as running:
        yield running


@pytest.fixture
def everything(
    default_server: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> tuple[Canaries, Outputs]:
    """Plant a canary in every input, and gather every output."""
    canary, outputs = Canaries(), Outputs()
    dsn = provision(default_server)
    owner_dsn = default_server.dsn(DATABASE)
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements SCHEMA equitie_private")
        password = canary("password of a DSN")
        owner.execute(f"ALTER ROLE {APPLICATION_ROLE} PASSWORD '{password}'")
        # Set by this test and not by the library: what the statement above leaves behind is not looked at.
        owner.execute("SELECT equitie_private.pg_stat_statements_reset()")
    dsn = dsn.replace(str(conninfo_to_dict(dsn)["password"]), password)
    monkeypatch.setenv("UNRELATED_TOKEN", canary("variable of the environment"))
    monkeypatch.setenv("DATABASE_URL", dsn)
    monkeypatch.delenv("MIGRATION_DATABASE_URL", raising=False)

    logged = io.StringIO()
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(logged)
    )
    spans, reader, hooks = telemetry(outputs)
    with caplog.at_level(logging.DEBUG):
        settings = Settings(dsn=dsn, min_size=1, max_size=3)
        database = Database(
            settings,
            hooks=[*hooks, Recorder(outputs), StructlogHook()],
            redaction=Redaction(patterns=(r"\bPAT-\w+",), hashed_names=("passport_id",), salt=b"s" * 16),
            # Every statement is slow: every one is stored singly, and alerts.
            thresholds=Thresholds(slow_medium=1e-9, slow_high=2e-9, slow_critical=3e-9, error_rate_statements=1),
            alert_sinks=[lambda alert: outputs.add("alerts", repr(alert), alert.to_json())],
        )
        with database:
            use(database, canary, outputs)
            database.audit.flush()
            database.monitor.flush()
            outputs.add("dashboard", json.dumps(database.monitor.get_dashboard_data(), default=str))
            outputs.add("dashboard", database.monitor.analyze_query_patterns(), database.monitor.stats())
            outputs.add("repr of everything", repr(database), repr(settings), repr(database.pool.get_stats()))
            outputs.add("repr of everything", repr(database.pool.primary), repr(database.audit.stats()))
            outputs.add("pickled settings", pickle.dumps(settings))
            outputs.add("activity", activity(owner_dsn))
        use_command_line(canary, outputs, tmp_path, capfd)
        use_what_fails(dsn, canary, outputs)
    outputs.add("library's log", logged.getvalue(), caplog.text, *(repr(vars(record)) for record in caplog.records))
    outputs.add("spans", *(span.to_json() for span in spans.get_finished_spans()))
    outputs.add("metrics", reader.get_metrics_data().to_json())
    outputs.add("standard output", *capfd.readouterr())
    outputs.add("server's log", *(log.read_text("utf-8") for log in default_server.data_dir.glob("server.log*")))
    for place, text in rows(owner_dsn):
        outputs.add(place, text)
    return canary, outputs


def telemetry(outputs: Outputs) -> tuple[Any, Any, list[Any]]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    return spans, reader, [OpenTelemetryHook(tracers.get_tracer("t"), meters.get_meter("m"))]


def activity(owner_dsn: str) -> str:
    """What the server shows of sessions and statements, to those who may see it."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        seen = owner.execute("SELECT to_jsonb(a)::text FROM pg_catalog.pg_stat_activity AS a").fetchall()
        seen += owner.execute("SELECT query FROM equitie_private.pg_stat_statements").fetchall()
    return "\n".join(row[0] for row in seen)


def rows(owner_dsn: str) -> Iterator[tuple[str, str]]:
    """Every value of every column of every table, as text."""
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        tables = owner.execute(
            "SELECT n.nspname, c.relname FROM pg_catalog.pg_class AS c"
            " INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition"
            " AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"
        ).fetchall()
        for schema, table in tables:
            for column, text in owner.execute(
                f'SELECT e.key, string_agg(e.value, chr(10)) FROM "{schema}"."{table}" AS t,'
                " LATERAL jsonb_each_text(to_jsonb(t)) AS e GROUP BY e.key"
            ).fetchall():
                yield f"{schema}.{table}.{column}", text or ""


def use(database: Database, canary: Canaries, outputs: Outputs) -> None:
    """Everything the API takes, with a canary in it."""
    context = {
        "tenant_id": canary("tenant"),
        "user_agent": canary("user agent"),
        "session_id": canary("session"),
        "request_id": canary("request"),
    }
    add = "INSERT INTO public.companies_clean (company_name) VALUES (%s) RETURNING company_name"
    with as_service(canary("reason"), **context) as actor:
        outputs.add("repr of an actor", repr(attrs_of(actor)))
        database.execute_read("SELECT %s::text", [canary("parameter of a read")], name=canary("name of a call"))
        database.execute_read(f"SELECT '{canary('literal in SQL')}'")
        database.execute_write(add, [canary("parameter of a write")], name=canary("name of a call"))
        database.execute_write(
            lambda conn: conn.execute(add, [canary("result kept for a key")]).fetchone()[0],  # type: ignore[index]
            idempotency_key=canary("idempotency key"),
            name=canary("name of a call"),
        )
        database.execute_write(lambda conn: copy(conn, canary("copied row")))
        database.execute_write(
            "INSERT INTO public.investors_clean (full_name, primary_email) VALUES ('x', %s)",
            [canary("duplicate e-mail")],
        )
        for kind, operation in {
            "duplicate e-mail": lambda conn: conn.execute(
                "INSERT INTO public.investors_clean (full_name, primary_email) VALUES ('y', %s)",
                [canary("duplicate e-mail")],
            ),
            "parameter that does not fit": lambda conn: conn.execute(
                "SELECT %s::text::integer", [canary("parameter that does not fit")]
            ),
            "literal in SQL that fails": lambda conn: conn.execute(
                f"SELECT 1 / 0, '{canary('literal in SQL that fails')}'"
            ),
            "cell of a COPY that fails": lambda conn: copy(conn, canary("cell of a COPY that fails"), "company_id"),
            "error of an operation": lambda conn: fail(canary("error of an operation")),
        }.items():
            with pytest.raises(Exception) as caught:
                database.execute_write(operation, name=canary("name of a call"))
            assert kind
            outputs.add("errors of the caller's statements", chain(caught.value))
        database.audit.log(
            AuditAction.READ,
            "investor",
            1,
            metadata={
                "why": canary("audited metadata"),
                "api_key": canary("secret in metadata"),
                "passport_id": canary("hashed field"),
                "note": f"Bearer {canary('bearer token in a note')}, postgresql://u:{canary('password in a note')}@h/d,"
                f" PAT-{canary('pattern of our own')}",
            },
        )
        database.audit.log_change(
            "login", 1, {"password": canary("password before")}, {"password": canary("password after")}
        )
        monitor = database.monitor
        monitor.track_query(f"SELECT '{canary('literal in a tracked query')}'", 5_000, error=canary("tracked error"))
        monitor.track_system_metric(
            "queue", 1.0, "n", {"label": canary("metric's label"), "secret": canary("secret in a metric")}
        )
        with contextlib.suppress(ValueError):
            monitor.with_performance_tracking("job")(fail)(canary("error of a tracked function"))


def attrs_of(actor: Actor) -> Actor:
    return actor


def copy(connection: Any, value: str, column: str = "company_name") -> None:
    with connection.cursor() as cursor, cursor.copy(f"COPY public.companies_clean ({column}) FROM STDIN") as stream:
        stream.write_row([value])


def fail(message: str) -> None:
    raise ValueError(message)


def use_command_line(canary: Canaries, outputs: Outputs, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, rejects = directory / "investments.csv", directory / "rejects.csv"
    file.write_text(
        "company,investor,date,amount\n"
        f"Acme,{canary('cell of a row')},2024-01-05,100\n"
        f"Acme,{canary('cell of a rejected row')},not a date,{canary('cell of a rejected row')}\n",
        encoding="utf-8",
    )
    capfd.readouterr()
    assert main(["import", str(file), "--rejects", str(rejects)]) == 0
    assert main(["import", str(file), "--json"]) == 0
    bad = directory / "bad.csv"
    bad.write_text(f"company,investor,date,amount\nAcme,\0{canary('cell of a file that is refused')}\n", "utf-8")
    main(["import", str(bad)])
    main(["doctor"])
    main(["migrate", "status", "--dsn", f"postgresql://u:{canary('password of a wrong DSN')}@127.0.0.1:1/x"])
    main(["migrate", "status", "--dsn", f"no dsn {canary('password of an unreadable DSN')}"])
    outputs.add("command line", *capfd.readouterr())
    outputs.add("rejects file", rejects.read_text("utf-8"))


def use_what_fails(dsn: str, canary: Canaries, outputs: Outputs) -> None:
    """The library's own errors."""
    wrong = dsn.replace(str(conninfo_to_dict(dsn)["password"]), canary("wrong password"))
    for make in (
        lambda: Database(wrong).open(),
        lambda: Settings(dsn=f"host=x port=y password={canary('password of a refused DSN')} nonsense"),
        lambda: Settings(dsn=f"postgresql://u:{canary('password of a refused URL')}@h:port/x?nonsense=1"),
        lambda: Settings.from_env({"DATABASE_URL": dsn, "EQUITIE_PASSWORD": canary("one password too many")}),
        lambda: Settings.from_env({"DATABASE_URL": dsn, "READ_REPLICA_URLS": f"x {canary('refused replica')}"}),
        lambda: acting_as(canary("user that is no UUID")).__enter__(),
        lambda: acting_as(USER, ip_address=canary("address that is none")).__enter__(),
        lambda: Actor.from_jwt(canary("forged token"), audience="a", key="k" * 40),
    ):
        with pytest.raises(Exception) as caught:
            make()
        outputs.add("library's errors", messages(caught.value))
        with contextlib.suppress(Exception):
            outputs.add("pickled errors", pickle.dumps(caught.value))


def messages(error: BaseException) -> str:
    """What an error and all that hangs on it say; without the lines of source that a traceback shows."""
    texts, each = [], error
    while each is not None:
        texts += [str(each), repr(each), repr(each.args)]
        each = each.__cause__ or each.__context__  # type: ignore[assignment]
    return "\n".join(texts)


def test_values_are_where_they_may_be_and_nowhere_else(everything: tuple[Canaries, Outputs]) -> None:
    canaries, outputs = everything
    found = outputs.sightings(canaries)
    assert (sorted(found - ALLOWED), sorted(ALLOWED - found)) == ([], []), "found elsewhere; and found nowhere"
    # The search can find: every output that is made in any case is there, and says something.
    for place in ("server's log", "library's log", "spans", "metrics", "dashboard", "alerts", "activity", "events"):
        assert len("".join(outputs.texts[place])) > 200, place
    assert "public.query_metrics.query_text" in outputs.texts


def test_hashes_of_one_value_are_equal_and_reveal_nothing() -> None:
    policy = Redaction(hashed_names=("passport_id", "user_id"), salt=b"0123456789abcdef")
    first = policy.mapping({"passportId": "X-1", "again": {"PASSPORT_ID": "X-1"}, "other": {"passport_id": "X-2"}})
    assert first["passportId"] == first["again"]["PASSPORT_ID"]  # type: ignore[index,call-overload]
    assert first["passportId"] != first["other"]["passport_id"]  # type: ignore[index,call-overload]
    assert re.fullmatch("[0-9a-f]{32}", str(first["passportId"]))
    another = Redaction(hashed_names=("passport_id",), salt=b"another-salt-of-16")
    assert another.mapping({"passport_id": "X-1"})["passport_id"] != first["passportId"]
    assert b"0123456789abcdef".decode() not in repr(policy)


def test_events_hold_sql_and_never_parameters() -> None:
    assert "params" not in StatementEnded.__annotations__
