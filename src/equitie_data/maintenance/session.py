"""The owner's connection that maintains: one run at a time, short locks, patience."""

from __future__ import annotations

import json
import random
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import attrs
import psycopg

from equitie_data import _sql
from equitie_data.connect import connect, target_of
from equitie_data.errors import EquitieDataError, MaintenanceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

__all__ = ["Busy", "Locking", "open_session", "patiently", "reason_of", "take_turn"]

_TURN: Final = "pg_catalog.hashtextextended('equitie_data maintain', 0)"
_POLL: Final = (0.1, 1.0)
_PAUSE: Final = (0.05, 1.0)
_RETRIED: Final = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)


class Busy(Exception):  # noqa: N818 - the state a table is in, not a mistake
    """A lock could not be had for as long as the patience lasts; the message says who is in the way."""


@attrs.frozen(kw_only=True)
class Locking:
    """How much others may be made to wait, and how often it is tried.

    Attributes:
        timeout: Seconds that one try waits for all its locks together; nobody behind it waits longer than that and
            the few milliseconds a change of catalogs takes.
        patience: Seconds until a step is given up.
    """

    timeout: float = 0.05
    patience: float = 60.0

    @property
    def milliseconds(self) -> int:
        """The timeout as PostgreSQL takes it."""
        return max(1, round(self.timeout * 1000))


@contextmanager
def open_session(dsn: str) -> Iterator[Connection[Any]]:
    """Connect as the owner: autocommit, UTC, without timeouts of the role's.

    Raises:
        UnavailableError: The server cannot be reached.
        MaintenanceError: It is a read replica, is not migrated, or the role does not own the tables; or the
            connection is lost.
    """
    conn = connect(dsn, application_name="equitie_data.maintain")
    try:
        with conn:
            if conn.execute("SELECT pg_catalog.pg_is_in_recovery()").fetchone() == (True,):
                raise MaintenanceError(
                    f"{target_of(dsn)} is a read replica: name the primary in MIGRATION_DATABASE_URL."
                )
            conn.execute(
                "SELECT pg_catalog.set_config(s.name, s.value, false) FROM (VALUES"
                " ('statement_timeout', '0'), ('idle_in_transaction_session_timeout', '0'), ('lock_timeout', '2s'),"
                " ('default_transaction_read_only', 'off'), ('default_transaction_isolation', 'read committed'),"
                " ('client_min_messages', 'warning'), ('search_path', ''), ('TimeZone', 'UTC'),"
                " ('DateStyle', 'ISO, YMD'), ('IntervalStyle', 'iso_8601'), ('extra_float_digits', '1'),"
                " ('bytea_output', 'hex'), ('equitie.context', %s)) AS s (name, value)",
                (json.dumps({"actor": "service", "reason": "maintenance"}),),
            )
            _require_owner(conn, dsn)
            yield conn
    except psycopg.Error as error:
        if isinstance(error, EquitieDataError):
            raise
        raise MaintenanceError(f"{target_of(dsn)}: {reason_of(error)}.") from error


def _require_owner(conn: Connection[Any], dsn: str) -> None:
    if conn.execute("SELECT to_regclass('equitie_private.retention_policies') IS NULL").fetchone() == (True,):
        raise MaintenanceError(
            f"{target_of(dsn)} lacks the tables of maintenance: run `python -m equitie_data migrate` first."
        )
    try:
        policies = conn.execute(_sql.query("maintenance_policies")).fetchall()
    except psycopg.errors.InsufficientPrivilege:
        raise MaintenanceError(
            f"{target_of(dsn)}: this role is not the owner: maintain as the tables' owner (MIGRATION_DATABASE_URL)."
        ) from None
    for parent, *_, owner, is_owner in policies:
        if owner is None:
            raise MaintenanceError(f"The retention policy of {parent} names no table: correct it, or delete it.")
        if not is_owner:
            raise MaintenanceError(f'{parent} belongs to "{owner}": maintain as this role (MIGRATION_DATABASE_URL).')


@contextmanager
def take_turn(conn: Connection[Any], wait: float) -> Iterator[None]:
    """Be the only run on this database.

    Args:
        conn: The session that maintains.
        wait: Seconds to wait for another run.

    Raises:
        MaintenanceError: Another run is still at work then.
    """
    deadline = time.monotonic() + wait
    pause, longest = _POLL
    # Polled: who blocks in pg_advisory_lock() holds a snapshot, which the other run may be waiting for.
    while conn.execute(f"SELECT pg_catalog.pg_try_advisory_lock({_TURN})").fetchone() != (True,):
        if time.monotonic() >= deadline:
            holder = conn.execute(
                "SELECT l.pid FROM pg_catalog.pg_locks AS l WHERE l.locktype = 'advisory' AND l.granted"
                " AND l.database = (SELECT d.oid FROM pg_catalog.pg_database AS d WHERE d.datname = current_database())"
                f" AND (l.classid::bigint << 32) | l.objid::bigint = {_TURN}"
            ).fetchone()
            whose = f" (server process {holder[0]})" if holder else ""
            raise MaintenanceError(
                f"Another run{whose} is maintaining this database: let it finish, or pass a longer --wait."
            )
        time.sleep(min(pause * random.uniform(0.5, 1.5), max(deadline - time.monotonic(), 0)))  # noqa: S311 - jitter
        pause = min(pause * 2, longest)
    try:
        yield
    finally:
        # The end of the session releases it too; an error of this statement must not hide the one on its way.
        with suppress(psycopg.Error):
            conn.execute(f"SELECT pg_catalog.pg_advisory_unlock({_TURN})")


def patiently(conn: Connection[Any], locking: Locking, query: Any, params: Sequence[Any]) -> tuple[Any, int]:
    """Run one short locked step, again and again until its locks can be had.

    Returns:
        The first value of the only row, and the number of tries.

    Raises:
        Busy: The patience is over.
    """
    deadline = time.monotonic() + locking.patience
    pause, longest = _PAUSE
    tries = 0
    while True:
        tries += 1
        try:
            cursor = conn.execute(query, params)
            row = cursor.fetchone() if cursor.description else None
        except _RETRIED as error:
            if time.monotonic() >= deadline:
                raise Busy(f"{_in_the_way(conn)}, after {tries} tries in {locking.patience:g} s") from error
        else:
            return (None if row is None else row[0]), tries
        # Rare at first, for whoever is in the way may be gone at once; then rarer, to leave the others in peace.
        time.sleep(min(pause * random.uniform(0.5, 1.5), max(deadline - time.monotonic(), 0.01)))  # noqa: S311 - jitter
        pause = min(pause * 1.5, longest)


def _in_the_way(conn: Connection[Any]) -> str:
    """Say who has had its transaction open for longest among those that hold locks on the tables."""
    row = conn.execute(
        "SELECT a.pid, a.application_name, extract(epoch FROM clock_timestamp() - a.xact_start)"
        " FROM pg_catalog.pg_locks AS l"
        " INNER JOIN pg_catalog.pg_class AS c ON c.oid = l.relation"
        " INNER JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid"
        " WHERE l.granted AND a.datname = current_database() AND a.pid <> pg_backend_pid()"
        " AND c.relnamespace IN ('public'::regnamespace, 'equitie_part'::regnamespace) AND c.relkind IN ('r', 'p')"
        " ORDER BY a.xact_start NULLS LAST LIMIT 1"
    ).fetchone()
    if row is None:
        return "the tables are in use"
    name = f' ("{row[1]}")' if row[1] else ""
    since = f" for {row[2]:.0f} s" if row[2] is not None and row[2] >= 1 else ""
    return f"the tables are in use, by server process {row[0]}{name}{since}"


def reason_of(error: psycopg.Error) -> str:
    """Return the server's sentence without a full stop, or what psycopg says of a lost connection."""
    if error.diag.message_primary:
        hint = f" ({error.diag.message_hint.rstrip('.')})" if error.diag.message_hint else ""
        return f"{error.diag.message_primary}{hint}"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
