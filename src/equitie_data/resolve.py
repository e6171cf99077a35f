"""What became of a transaction whose COMMIT was not answered: asks the server, on a connection of its own.

First the old backend is fenced, because a transaction still waiting there could commit after it was asked about.
Then the server is asked for the transaction's status, and `commit.judge` weighs the answer against the server's
incarnation. Before a commit is confirmed, one of our own goes after it: with synchronous replication, the old one may
stand on the primary alone, because the fence ended its wait for the replicas.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import attrs
import psycopg

from equitie_data.commit import Incarnation, Outcome, TransactionStatus, judge
from equitie_data.connect import connect
from equitie_data.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

__all__ = ["CONFIRM", "Evidence", "fence", "resolve_commit"]

_PAUSE = 0.25  # seconds between two tries

# Only a backend that still works on this very transaction: its process id may be somebody else's by now.
_FENCE = """
SELECT pg_catalog.pg_terminate_backend(a.pid, 2000)
FROM pg_catalog.pg_stat_activity AS a
WHERE a.pid = %s AND a.backend_xid = (%s::pg_catalog.xid8)::pg_catalog.xid
"""
# Without a transaction id the login role is all that narrows it down: at worst another call of this application is
# run again.
_FENCE_BY_PID = """
SELECT pg_catalog.pg_terminate_backend(a.pid, 2000)
FROM pg_catalog.pg_stat_activity AS a
WHERE a.pid = %s AND a.usename = session_user AND a.pid <> pg_catalog.pg_backend_pid()
"""
_INCARNATION = """
SELECT (SELECT c.system_identifier::text FROM pg_catalog.pg_control_system() AS c),
       pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8),
       extract(epoch FROM pg_catalog.pg_postmaster_start_time())::text,
       (SELECT extract(epoch FROM w.stats_reset)::text FROM pg_catalog.pg_stat_wal AS w)
WHERE NOT pg_catalog.pg_is_in_recovery()
"""
CONFIRM: Final = "SELECT pg_catalog.pg_logical_emit_message(true, 'equitie_data', '')"
"""Commits something of no meaning: once that is acknowledged, so is everything that was committed before it."""
_STATUS = "SELECT pg_catalog.pg_xact_status(%s::pg_catalog.xid8)"


@attrs.frozen
class Evidence:
    """What is known of the transaction.

    Attributes:
        xid: Its id.
        backend_pid: The server process it ran in.
        incarnation: The life of the server it ran in.
    """

    xid: str
    backend_pid: int
    incarnation: Incarnation


def resolve_commit(primary_dsn: Callable[[], str], evidence: Evidence, deadline: float) -> Outcome:
    """Find out what became of a transaction.

    Args:
        primary_dsn: Returns the DSN of the node that takes writes now; it may change while this waits.
        evidence: What is known of the transaction.
        deadline: The monotonic time, in seconds, until which to try; one try is made in any case.
    """
    while True:
        try:
            outcome = _ask(primary_dsn(), evidence, deadline)
        except (UnavailableError, psycopg.Error):
            outcome = None
        if outcome is not None:
            return outcome
        if time.monotonic() + _PAUSE >= deadline:
            return Outcome.UNKNOWN
        time.sleep(_PAUSE)


def fence(dsn: str, backend_pid: int) -> None:
    """End the backend of a lost connection, so that nothing it was sent can still happen; as far as possible."""
    try:
        with connect(dsn, connect_timeout=2, tcp_user_timeout=5000) as conn:
            conn.execute(_FENCE_BY_PID, [backend_pid])
    except (UnavailableError, psycopg.Error):
        return


def _ask(dsn: str, evidence: Evidence, deadline: float) -> Outcome | None:
    with connect(dsn, connect_timeout=2, tcp_user_timeout=5000) as conn:
        conn.execute(_FENCE, [evidence.backend_pid, evidence.xid])
        row = conn.execute(_INCARNATION).fetchone()
        if row is None:
            return None  # a standby, which knows no fate that is not replayed yet
        try:
            answer = conn.execute(_STATUS, [evidence.xid]).fetchone()
        except psycopg.errors.InvalidParameterValue:
            status: TransactionStatus | None = "in the future"  # this incarnation has not got that far
        else:
            status = None if answer is None else answer[0]
        outcome = judge(evidence.incarnation, Incarnation(*(value or "" for value in row)), status)
        return None if outcome is Outcome.COMMITTED and not _is_confirmed(conn, deadline) else outcome


def _is_confirmed(conn: Connection[Any], deadline: float) -> bool:
    """Whether a commit of our own was acknowledged, by the replicas too where they have to."""
    warnings: list[str | None] = []
    conn.add_notice_handler(lambda notice: warnings.append(notice.sqlstate))

    def give_up() -> None:
        with contextlib.suppress(psycopg.Error):
            conn.cancel_safe(timeout=2.0)

    # No time limit of the server's ends a wait for replicas; a cancel does, with a warning.
    timer = threading.Timer(max(deadline - time.monotonic(), 0.1), give_up)
    timer.start()
    try:
        conn.execute(CONFIRM)
    finally:
        timer.cancel()
    return not warnings
