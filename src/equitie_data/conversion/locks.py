"""Short transactions that give way: a lock that cannot be had at once is asked for again later."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import psycopg

from equitie_data.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

__all__ = ["Patience", "await_earlier_transactions", "briefly"]

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds
_POLL = 0.05  # seconds
_GIVE_WAY = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)

# Whoever waits behind us waits as long as we do, so the answer to "who is in the way" is worth a query only at the end.
_IN_THE_WAY = """
SELECT DISTINCT l.pid
FROM pg_catalog.pg_locks AS l
WHERE
  l.locktype = 'relation'
  AND l.granted
  AND l.pid <> pg_backend_pid()
  AND l.relation IN (
    SELECT to_regclass('public.transactions_clean')
    UNION ALL
    SELECT t.relid FROM pg_partition_tree(to_regclass('public.transactions_clean')) AS t
    UNION ALL
    SELECT k.confrelid
    FROM pg_catalog.pg_constraint AS k
    WHERE k.contype = 'f' AND k.conrelid = to_regclass('public.transactions_clean')
  )
ORDER BY l.pid
"""

# Every transaction of this database holds a lock on its own virtual id. Unlike pg_stat_activity.backend_xmin, that can
# be seen without any privilege.
_RUNNING = """
SELECT l.virtualtransaction, l.pid
FROM pg_catalog.pg_locks AS l
INNER JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
WHERE
  l.locktype = 'virtualxid'
  AND l.granted
  AND l.pid <> pg_backend_pid()
  AND a.datname = current_database()
  -- It reads no rows for anybody, and may take hours.
  AND a.backend_type <> 'autovacuum worker'
"""


@attrs.frozen(kw_only=True)
class Patience:
    """How to meet the locks of others.

    Attributes:
        lock_timeout: Seconds to wait for a lock before giving way; whoever queues up behind waits no longer than that.
        wait: Seconds to go on trying.
    """

    lock_timeout: float = 0.1
    wait: float = 600.0


def briefly(conn: Connection[Any], patience: Patience, work: Callable[[], T], what: str) -> T:
    """Do something in one short transaction, again and again until it gets its locks.

    Args:
        conn: The owner's session, outside of a transaction.
        patience: How long to wait.
        work: What to do; it may be done and rolled back several times.
        what: What that is, for the message.

    Raises:
        ConversionError: The locks were not to be had.
    """
    deadline = time.monotonic() + patience.wait
    pause = _FIRST_PAUSE
    while True:
        try:
            with _lock_timeout(conn, patience.lock_timeout), conn.transaction():
                return work()
        except _GIVE_WAY as error:
            if time.monotonic() >= deadline:
                pids = [str(pid) for (pid,) in conn.execute(_IN_THE_WAY)]
                whose = f" (held by server process {', '.join(pids[:5])})" if pids else ""
                raise ConversionError(
                    f"{what} needs a lock on public.transactions_clean or a table it refers to, which was not free for"
                    f" {patience.lock_timeout:g} s at any moment of {patience.wait:g} s{whose}: end what holds it, or"
                    " wait for a quieter hour, and run the same command again."
                ) from error
        time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
        pause = min(pause * 2, _LONGEST_PAUSE)


@contextmanager
def _lock_timeout(conn: Connection[Any], seconds: float) -> Iterator[None]:
    # Outside of the transaction, which would take it back with itself.
    conn.execute("SELECT pg_catalog.set_config('lock_timeout', %s, false)", (f"{max(1, round(seconds * 1000))}ms",))
    try:
        yield
    finally:
        if not conn.closed:
            conn.execute("SELECT pg_catalog.set_config('lock_timeout', '0', false)")


def await_earlier_transactions(conn: Connection[Any], patience: Patience) -> None:
    """Wait until every transaction that runs now has ended.

    A transaction that keeps one snapshot would not see rows that were copied after it was taken, and would find the
    copy empty where the original was not. CREATE INDEX CONCURRENTLY waits for the same reason.

    Raises:
        ConversionError: One of them did not end in time.
    """
    deadline = time.monotonic() + patience.wait
    earlier = dict(conn.execute(_RUNNING).fetchall())
    while earlier:
        running = dict(conn.execute(_RUNNING).fetchall())
        earlier = {vxid: pid for vxid, pid in earlier.items() if vxid in running}
        if not earlier:
            return
        if time.monotonic() >= deadline:
            raise ConversionError(
                f"A transaction that began before the rows were copied is still open after {patience.wait:g} s (server"
                f" process {', '.join(str(pid) for pid in sorted(earlier.values())[:5])}): end it, and run the same"
                " command again."
            )
        time.sleep(_POLL)
