"""What every transaction begins with: who acts, under which role, with which rights and time limit.

The prologue is made here and nowhere else. It is one SELECT of transaction-local settings, so it rides in the
same trip as the statement it precedes, and nothing of it is left when the transaction ends. Every identity
setting is written every time; a leftover of the connection's last user has nowhere to hide.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final, Literal

import attrs

if TYPE_CHECKING:
    from equitie_data.context import Actor

__all__ = ["Prologue", "prologue_for"]

_BEGIN: Final = {
    # One snapshot for all statements of a read.
    "read": b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    "write": b"BEGIN READ WRITE",
}
_TEXT_OID: Final = 25


@attrs.frozen
class Prologue:
    """The statement that opens a transaction, ready for the wire.

    Attributes:
        begin: The BEGIN that precedes it when the transaction holds more than one statement.
        query: Its text, with ``$n`` placeholders.
        params: Its parameters, as text.
        types: The parameters' types.
        formats: Text, all of them.
    """

    begin: bytes
    query: bytes
    params: tuple[bytes, ...]
    types: tuple[int, ...]
    formats: None = None


@cache
def _statement(actor_kind: Literal["user", "service"], kind: Literal["read", "write"], timed: bool) -> bytes:
    role = "equitie_private.database_role($3::pg_catalog.uuid)" if actor_kind == "user" else "$3"
    settings = [
        "pg_catalog.set_config('request.jwt.claims', $1, true)",
        "pg_catalog.set_config('equitie.context', $2, true)",
        f"pg_catalog.set_config('role', {role}, true)",
    ]
    if kind == "read":
        settings.append("pg_catalog.set_config('transaction_read_only', 'on', true)")
    if timed:
        settings.append("pg_catalog.set_config('statement_timeout', $4, true)")
    return f"SELECT {', '.join(settings)}".encode()


def prologue_for(actor: Actor, kind: Literal["read", "write"], statement_timeout: float | None) -> Prologue:
    """Return the prologue of a transaction.

    Args:
        actor: Who acts.
        kind: Reads are made read-only on the server.
        statement_timeout: Seconds a statement may take; 0 for no limit, ``None`` for the connection's own.
    """
    query = _statement(actor.kind, kind, statement_timeout is not None)
    role = "service_role" if actor.user_id is None else str(actor.user_id)
    params = [actor.claims.encode(), actor.context.encode(), role.encode()]
    if statement_timeout is not None:
        params.append(str(max(round(statement_timeout * 1000), 1 if statement_timeout else 0)).encode())
    return Prologue(_BEGIN[kind], query, tuple(params), (_TEXT_OID,) * len(params))
