"""The public API as its users' type checkers see it.

Nothing here runs: mypy and basedpyright read it, each with its own ignores, and an ignore that is no longer needed
is an error too. So a signature that gets wider or narrower by accident is noticed.
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from psycopg import Connection, sql
from psycopg.rows import class_row, dict_row, scalar_row, tuple_row
from typing_extensions import assert_type

import equitie_data
from equitie_data import (
    Actor,
    AuditAction,
    AuditLogger,
    Database,
    EquitieDataError,
    PerformanceMonitor,
    Settings,
    acting_as,
    as_service,
    configure,
    current_actor,
    get_audit_logger,
    get_database,
    get_performance_monitor,
)
from equitie_data.hooks import Hook, StatementEnded
from equitie_data.transaction_row import TransactionRow

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Holding:
    deal_id: int
    amount: Decimal


def portfolio_value(connection: Connection[Any], investor_id: int) -> Decimal:
    row = connection.execute("SELECT sum(amount) FROM transactions_clean WHERE investor_id = %s", [investor_id])
    return Decimal(next(row)[0])


def settle(connection: Connection[Any]) -> None:
    connection.execute("UPDATE transactions_clean SET status = 'completed' WHERE transaction_id = 7")


def databases(settings: Settings) -> None:
    assert_type(Database("postgresql:///platform"), Database)
    assert_type(Database(settings), Database)
    # All but the connection string has a default, and both checkers know it.
    assert_type(Settings(dsn="postgresql:///platform"), Settings)
    assert_type(Settings(dsn="postgresql:///platform", min_size=1, max_size=5, call_timeout=math.inf), Settings)
    assert_type(Settings.from_env(), Settings)
    assert_type(Database.from_env(), Database)
    assert_type(Database.from_env({"DATABASE_URL": "postgresql:///platform"}), Database)
    assert_type(Database.embedded(), Database)
    with Database.from_env() as database:
        assert_type(database, Database)
        assert_type(database.settings, Settings)
        assert_type(database.audit, AuditLogger)
        assert_type(database.monitor, PerformanceMonitor)
    assert_type(Database(settings).open(), Database)
    Database(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Database()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def reads(database: Database) -> None:
    # A callable's own type comes back.
    assert_type(database.execute_read(lambda connection: portfolio_value(connection, 7)), Decimal)
    assert_type(database.execute_read(settle), None)
    # A statement gives tuples, or whatever its row factory makes.
    statement = "SELECT deal_id, amount FROM transactions_clean WHERE investor_id = %s"
    assert_type(database.execute_read(statement, [7]), list[tuple[Any, ...]])
    assert_type(database.execute_read(statement, {"investor": 7}), list[tuple[Any, ...]])
    assert_type(database.execute_read(statement, (7,), row_factory=tuple_row), list[tuple[Any, ...]])
    assert_type(database.execute_read(statement, (7,), row_factory=dict_row), list[dict[str, Any]])
    assert_type(database.execute_read(statement, (7,), row_factory=scalar_row), list[Any])
    assert_type(database.execute_read(statement, (7,), row_factory=class_row(Holding)), list[Holding])
    composed = sql.SQL("SELECT * FROM {}").format(sql.Identifier("deals_clean"))
    assert_type(database.execute_read(composed), list[tuple[Any, ...]])
    # Every option, and what it refuses.
    database.execute_read("SELECT 1", name="one", consistency="eventual", timeout=0.5, retry=False)
    database.execute_read("SELECT 1", consistency="strong", timeout=math.inf)
    database.execute_read("SELECT 1", consistency="session")
    database.execute_read("SELECT 1", consistency="weak")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    database.execute_read("SELECT 1", timeout="1 s")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    database.execute_read(7)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    database.execute_read()  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    database.execute_read(lambda: 1)  # type: ignore[misc, arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]


def a_value_in_the_sql_is_refused(database: Database, name: str) -> None:
    # By checkers that know LiteralString; mypy takes it for str.
    database.execute_read("SELECT * FROM investors_clean WHERE full_name = '" + name + "'")  # pyright: ignore[reportArgumentType, reportCallIssue]


def writes(database: Database) -> None:
    assert_type(database.execute_write(settle), None)
    assert_type(database.execute_write(lambda connection: connection.pgconn.backend_pid), int)
    # The rows of RETURNING, or the row count.
    update = "UPDATE deals_clean SET deal_status = 'exited' WHERE deal_id = %s"
    assert_type(database.execute_write(update, [7]), Any)
    assert_type(database.execute_write(update, [7], row_factory=class_row(Holding)), list[Holding])
    database.execute_write(settle, name="settle", idempotency_key="request 7", timeout=5.0, retry=False)
    database.execute_write(settle, consistency="eventual")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    database.execute_write(settle, idempotency_key=7)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def identity(user_id: UUID) -> None:
    with acting_as(user_id, ip_address="203.0.113.9", user_agent="web/1.4", session_id="s", request_id="r") as actor:
        assert_type(actor, Actor)
        assert_type(actor.user_id, UUID | None)
        assert_type(actor.reason, str | None)
    with acting_as("7b0e6b36-7d7c-4c0f-9c12-4d3cf9f1a001", tenant_id="t"):
        assert_type(current_actor(), Actor)
    with as_service("nightly revaluation", request_id="r"):
        pass
    as_service()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    acting_as(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    current_actor().user_id = user_id  # type: ignore[misc]


def audit(database: Database, investor_id: int) -> None:
    database.audit.log(AuditAction.EXPORT, "investor", investor_id, metadata={"format": "csv"})
    database.audit.log_change("deal", 7, before={"deal_status": "closing"}, after={"deal_status": "active"})
    database.audit.set_context(
        user_id="7b0e6b36-7d7c-4c0f-9c12-4d3cf9f1a001", ip_address="203.0.113.9", user_agent="web/1.4"
    )
    database.audit.flush()

    # A decorated function keeps its signature.
    @database.audit.with_audit(AuditAction.APPROVE, "deal")
    def approve(deal_id: int, *, note: str = "") -> bool:
        return bool(deal_id and note)

    assert_type(approve(7, note="fine"), bool)
    approve("7")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def the_default_database(settings: Settings, database: Database) -> None:
    assert_type(configure(settings), Database)
    assert_type(configure(database), Database)
    assert_type(get_database(), Database)
    assert_type(get_audit_logger(), AuditLogger)
    assert_type(get_performance_monitor(), PerformanceMonitor)
    assert_type(equitie_data.execute_read("SELECT 1"), list[tuple[Any, ...]])
    assert_type(equitie_data.execute_read("SELECT 1 AS one", row_factory=dict_row), list[dict[str, Any]])
    assert_type(equitie_data.execute_read(lambda connection: portfolio_value(connection, 7)), Decimal)
    assert_type(equitie_data.execute_write(settle), None)
    assert_type(equitie_data.execute_write("DELETE FROM deals_clean"), Any)


class SlowStatements:
    def __init__(self) -> None:
        self.names: list[str | None] = []

    def on_event(self, event: object, /) -> None:
        if isinstance(event, StatementEnded) and event.seconds > 1.0:
            assert_type(event.sqlstate, str | None)
            self.names.append(event.name)


def hooks() -> None:
    hook: Hook = SlowStatements()
    Database("postgresql:///platform", hooks=[hook])
    Database("postgresql:///platform", hooks=[print])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


def an_operation_is_any_callable(
    database: Database, operation: Callable[[Connection[Any]], dict[int, Decimal]]
) -> None:
    assert_type(database.execute_read(operation), dict[int, Decimal])
    assert_type(database.execute_write(operation), dict[int, Decimal])


def transactions(database: Database) -> None:
    assert_type(database.transactions.get(7), TransactionRow | None)
    assert_type(database.transactions.get_many(range(7), consistency="eventual"), dict[int, TransactionRow])
    assert_type(database.transactions.correct_date(7, dt.date(2024, 11, 5)), TransactionRow)
    database.transactions.get("7")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def errors(database: Database) -> str:
    try:
        database.execute_write(settle)
    except equitie_data.CommitOutcomeUnknown as error:
        return str(error)
    except EquitieDataError as error:
        return str(error)
    return ""
