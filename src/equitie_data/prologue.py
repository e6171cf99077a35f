"""What every transaction begins with: who acts, under which role, with which rights and time limit.

The prologue is made here and nowhere else. It is one SELECT of transaction-local settings, so it rides in the
same trip as the statement it precedes, and nothing of it is left when the transaction ends. Every identity
setting is written every time; a leftover of the connection's last user has nowhere to hide. What the library must
know of the transaction (its id, how far a replica is) comes back as further columns of the same SELECT.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import TYPE_CHECKING, Final, Literal

import attrs

if TYPE_CHECKING:
    from equitie_data.context import Actor

__all__ = ["IdempotencyClaim", "Prologue", "prologue_for"]

_BEGIN: Final = {
    # One snapshot for all statements of a read.
    "read": b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
    "write": b"BEGIN READ WRITE",
}
_TEXT_OID: Final = 25
# Supabase's auth.uid(), auth.role() and auth.email() look here before they look into the claims: an older form of the
# same. Left over on a session, one of them would name somebody else.
_CLEARED: Final = tuple(
    f"pg_catalog.set_config('request.jwt.claim.{claim}', '', true)" for claim in ("sub", "role", "email")
)
_FACTS: Final = {
    "xid": "pg_catalog.pg_current_xact_id()::pg_catalog.text AS xid, pg_catalog.pg_backend_pid() AS pid",
    "incarnation": (
        "(SELECT c.system_identifier FROM pg_catalog.pg_control_system() AS c) AS system_identifier, "
        "pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8) AS timeline, "
        # As numbers: how a time is written depends on the session.
        "extract(epoch FROM pg_catalog.pg_postmaster_start_time()) AS started_at, "
        "(SELECT extract(epoch FROM w.stats_reset) FROM pg_catalog.pg_stat_wal AS w) AS statistics_reset_at"
    ),
    "replayed": "pg_catalog.pg_last_wal_replay_lsn() AS replayed",
}


@attrs.frozen
class IdempotencyClaim:
    """A key to take in the transaction.

    Attributes:
        key: The key.
        claimant: Whose it is.
        operation: What the caller calls the operation.
    """

    key: str
    claimant: str
    operation: str | None = None


@attrs.frozen
class Prologue:
    """The statement that opens a transaction, ready for the wire.

    Attributes:
        begin: The BEGIN that precedes it when the transaction holds more than one statement.
        query: Its text, with ``$n`` placeholders.
        params: Its parameters, as text.
        types: The parameters' types.
        position: What the node must have replayed, in bytes; its result says how far it is.
        formats: Text, all of them.
    """

    begin: bytes
    query: bytes
    params: tuple[bytes | None, ...]
    types: tuple[int, ...]
    position: int | None = None
    formats: None = None


@cache
def _query(kind: str, actor_kind: str, timed: bool, idle_timed: bool, claims: bool, facts: tuple[str, ...]) -> bytes:
    place = itertools.count(4)
    settings = [
        "pg_catalog.set_config('request.jwt.claims', $1, true)",
        "pg_catalog.set_config('equitie.context', $2, true)",
        *_CLEARED,
    ]
    looked_up = "equitie_private.database_role($3::pg_catalog.uuid)"
    settings.append(f"pg_catalog.set_config('role', {looked_up if actor_kind == 'user' else '$3'}, true)")
    if kind == "read":
        settings.append("pg_catalog.set_config('transaction_read_only', 'on', true)")
    if timed:
        settings.append(f"pg_catalog.set_config('statement_timeout', ${next(place)}, true)")
    if idle_timed:
        settings.append(f"pg_catalog.set_config('idle_in_transaction_session_timeout', ${next(place)}, true)")
    if claims:
        # First, while the login role still is itself.
        arguments = f"${next(place)}, ${next(place)}, ${next(place)}"
        settings.insert(0, f"equitie_private.claim_idempotency_key({arguments})")
    return f"SELECT {', '.join([*settings, *(_FACTS[fact] for fact in facts)])}".encode()


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % max(round(seconds * 1000), 1 if seconds else 0)


def prologue_for(
    actor: Actor,
    kind: Literal["read", "write"],
    *,
    statement_timeout: float | None = None,
    idle_timeout: float | None = None,
    service_role: str | None = "service_role",
    claim: IdempotencyClaim | None = None,
    facts: tuple[str, ...] = (),
    position: int | None = None,
) -> Prologue:
    """Return the prologue of a transaction.

    Args:
        actor: Who acts.
        kind: Reads are made read-only on the server.
        statement_timeout: Seconds a statement may take; 0 for no limit, ``None`` for the connection's own.
        idle_timeout: Seconds the transaction may be idle; as above.
        service_role: The database role of the service; ``None`` for the login role itself.
        claim: An idempotency key to take.
        facts: What else its result shall say: ``"xid"``, ``"incarnation"``, ``"replayed"``.
        position: What the node must have replayed, in bytes.
    """
    if position is not None:
        facts = (*facts, "replayed")
    query = _query(kind, actor.kind, statement_timeout is not None, idle_timeout is not None, claim is not None, facts)
    role = (service_role or "none") if actor.user_id is None else actor.user_text
    params: tuple[bytes | None, ...] = (actor.claims_bytes, actor.context_bytes, role.encode())
    if statement_timeout is not None:
        params += (_milliseconds(statement_timeout),)
    if idle_timeout is not None:
        params += (_milliseconds(idle_timeout),)
    if claim is not None:
        operation = None if claim.operation is None else claim.operation.encode()
        params += (claim.key.encode(), claim.claimant.encode(), operation)
    return Prologue(_BEGIN[kind], query, params, (_TEXT_OID,) * len(params), position)
