"""The transaction an operation runs in: what may be attached to it, and how it must be left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq import TransactionStatus

from equitie_data.errors import OperationEndedTransactionError, SwallowedErrorError, TransactionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from equitie_data.wire import PrologueCarrier

__all__ = ["WriteTransaction", "check_transaction_open"]


class WriteTransaction:
    """The write in progress, as subscribers see it; implements `context.Transaction`."""

    __slots__ = ("actions", "connection", "local")

    def __init__(self, connection: Connection[Any]) -> None:
        self.connection = connection
        self.local: dict[Any, Any] = {}
        self.actions: list[Callable[[Connection[Any]], None]] = []

    def before_commit(self, action: Callable[[Connection[Any]], None]) -> None:
        """Run ``action`` on the same connection just before COMMIT."""
        self.actions.append(action)


def check_transaction_open(connection: PrologueCarrier) -> None:
    """Make sure that an operation left its transaction as it must be: open and whole.

    Raises:
        SwallowedErrorError: A statement failed and the operation went on.
        OperationEndedTransactionError: The operation ran COMMIT or ROLLBACK.
        TransactionError: A statement is still running.
        psycopg.OperationalError: The connection is gone.
    """
    status = connection.pgconn.transaction_status
    if connection.pending is not None or status == TransactionStatus.INTRANS:
        return
    if status == TransactionStatus.INERROR:
        raise SwallowedErrorError(
            "The operation caught a database error and went on: the transaction was rolled back and nothing was "
            "written; let the error out, or run the risky part in `with conn.transaction():`."
        )
    if status == TransactionStatus.IDLE:
        raise OperationEndedTransactionError(
            "The operation ran COMMIT or ROLLBACK itself: the library ends the transaction; what the operation "
            "committed is committed."
        )
    if status == TransactionStatus.UNKNOWN:
        raise psycopg.OperationalError("the connection was lost during the operation")
    raise TransactionError(
        "The operation returned while a statement was still running (an unfinished COPY or stream): the transaction "
        "was rolled back; finish or close it first."
    )
