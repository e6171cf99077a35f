"""`AsyncDatabase` as its users' type checkers see it; like `api.py`, this is read and never run."""

from __future__ import annotations

import datetime as dt
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from psycopg import AsyncConnection, Connection, sql
from psycopg.rows import dict_row, scalar_row, tuple_row
from typing_extensions import assert_type

from equitie_data import AsyncDatabase, AuditAction, PerformanceMonitor, Settings
from equitie_data.transaction_row import TransactionRow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from equitie_data.audit_events import AuditRecord


async def portfolio_value(connection: AsyncConnection[Any], investor_id: int) -> Decimal:
    cursor = await connection.execute(
        "SELECT sum(amount) FROM transactions_clean WHERE investor_id = %s", [investor_id]
    )
    row = await cursor.fetchone()
    return Decimal(0 if row is None else row[0])


async def settle(connection: AsyncConnection[Any]) -> None:
    await connection.execute("UPDATE transactions_clean SET status = 'completed' WHERE transaction_id = 7")


def settle_blocking(connection: Connection[Any]) -> None:
    connection.execute("UPDATE transactions_clean SET status = 'completed' WHERE transaction_id = 7")


async def databases(settings: Settings) -> None:
    assert_type(AsyncDatabase("postgresql:///platform"), AsyncDatabase)
    assert_type(AsyncDatabase(settings), AsyncDatabase)
    assert_type(AsyncDatabase.from_env(), AsyncDatabase)
    assert_type(AsyncDatabase.embedded(), AsyncDatabase)
    async with AsyncDatabase.from_env() as database:
        assert_type(database, AsyncDatabase)
        assert_type(database.settings, Settings)
        assert_type(database.monitor, PerformanceMonitor)
    assert_type(await AsyncDatabase(settings).open(), AsyncDatabase)
    AsyncDatabase(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def reads(database: AsyncDatabase) -> None:
    assert_type(await database.execute_read(lambda connection: portfolio_value(connection, 7)), Decimal)
    assert_type(await database.execute_read(settle), None)
    statement = "SELECT deal_id, amount FROM transactions_clean WHERE investor_id = %s"
    assert_type(await database.execute_read(statement, [7]), list[tuple[Any, ...]])
    assert_type(await database.execute_read(statement, (7,), row_factory=tuple_row), list[tuple[Any, ...]])
    assert_type(await database.execute_read(statement, (7,), row_factory=dict_row), list[dict[str, Any]])
    assert_type(await database.execute_read(statement, (7,), row_factory=scalar_row), list[Any])
    composed = sql.SQL("SELECT * FROM {}").format(sql.Identifier("deals_clean"))
    assert_type(await database.execute_read(composed), list[tuple[Any, ...]])
    await database.execute_read("SELECT 1", name="one", consistency="eventual", timeout=math.inf, retry=False)
    await database.execute_read("SELECT 1", consistency="weak")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await database.execute_read(settle_blocking)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]


async def writes(database: AsyncDatabase) -> None:
    assert_type(await database.execute_write(settle), None)
    await database.execute_write(settle, name="settle", idempotency_key="request 7", timeout=5.0, retry=False)
    await database.execute_write(settle, consistency="eventual")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


async def an_operation_is_any_async_callable(
    database: AsyncDatabase, operation: Callable[[AsyncConnection[Any]], Awaitable[dict[int, Decimal]]]
) -> None:
    assert_type(await database.execute_read(operation), dict[int, Decimal])
    assert_type(await database.execute_write(operation), dict[int, Decimal])


async def transactions(database: AsyncDatabase) -> None:
    assert_type(await database.transactions.get(7), TransactionRow | None)
    assert_type(await database.transactions.get_many([7]), dict[int, TransactionRow])
    assert_type(await database.transactions.correct_date(7, dt.date(2024, 11, 5)), TransactionRow)


async def audit(database: AsyncDatabase) -> None:
    database.audit.log(AuditAction.EXPORT, "investor", 7)
    await database.audit.flush(timeout=5.0)
    records: list[AuditRecord] = await database.audit.query(entity_type="investor", limit=10)
    assert_type(records[0].action, str)
    await database.audit.query(limit="10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @database.audit.with_audit(AuditAction.APPROVE, "deal")
    async def approve(deal_id: int) -> bool:
        return bool(deal_id)

    assert_type(await approve(7), bool)
