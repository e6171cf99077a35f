"""Drains a default partition that is too full for one short step, without anybody waiting.

The rows are copied in small batches while a trigger mirrors what changes; then, in one swap of catalogs, the copies
take the default partition's place. See docs/explanation/partitions.md.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import psycopg

from equitie_data.errors import MaintenanceError
from equitie_data.maintenance.session import Busy, Locking, patiently

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Sequence

    from psycopg import Connection

__all__ = ["DrainedElsewhereError", "drain_months", "finish_former_drain"]

_BATCH: Final = 500  # rows
_BATCH_SECONDS: Final = 0.02
"""Who changes a row that is being copied waits for its batch: so batches are made to take this long."""
_LARGEST_BATCH: Final = 5000


class DrainedElsewhereError(Exception):
    """Somebody moved rows past the mirror, such as an import that made a month; what was begun was removed."""


def drain_months(
    conn: Connection[Any],
    parent: str,
    months: Sequence[dt.date],
    locking: Locking,
    boundary: Callable[[str], None],
) -> int:
    """Make months out of a full default partition.

    Args:
        conn: The owner's session.
        parent: The table.
        months: The months' first days.
        locking: How long to wait for locks.
        boundary: Called at every moment the work may be interrupted.

    Returns:
        How many rows were copied: those of the months, and those that stay in the default partition.

    Raises:
        Busy: The locks could not be had, or older transactions did not end; what was begun was removed.
        DrainedElsewhereError: Plan again.
        MaintenanceError: The copies differ; the table was left as it was.
    """
    drain, _tries = patiently(
        conn,
        locking,
        "SELECT equitie_private.begin_drain(%s::regclass, %s, %s)",
        [parent, list(months), locking.milliseconds],
    )
    boundary("drain begun")
    return _complete(conn, int(drain), locking, boundary)


def finish_former_drain(conn: Connection[Any], drain: int, locking: Locking, boundary: Callable[[str], None]) -> int:
    """Finish what a former run began, or remove it where that cannot be done.

    Returns:
        How many rows were copied.

    Raises:
        Busy: As in `drain_months`; so are the others.
        DrainedElsewhereError: As above.
        MaintenanceError: As above.
    """
    row = conn.execute(
        "SELECT d.state, d.rows_copied FROM equitie_private.partition_drains AS d WHERE d.drain_id = %s", [drain]
    ).fetchone()
    if row is None:
        return 0
    if row[0] != "swapped":
        return _complete(conn, drain, locking, boundary)
    _check_and_drop(conn, drain, locking, boundary)
    return int(row[1])


def _complete(conn: Connection[Any], drain: int, locking: Locking, boundary: Callable[[str], None]) -> int:
    try:
        copied = _copy_and_swap(conn, drain, locking, boundary)
    except psycopg.errors.ObjectNotInPrerequisiteState as error:
        _drop(conn, drain, locking)
        raise DrainedElsewhereError from error
    except (Busy, MaintenanceError, psycopg.Error):
        if not conn.closed:
            _drop(conn, drain, locking)
        raise
    _check_and_drop(conn, drain, locking, boundary)
    return copied


def _copy_and_swap(conn: Connection[Any], drain: int, locking: Locking, boundary: Callable[[str], None]) -> int:
    _copy(conn, drain, locking, boundary)
    boundary("drain copied")
    _wait_for_older_snapshots(conn, drain, locking)
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        row = conn.execute("SELECT equitie_private.drain_differences(%s)", [drain]).fetchone()
    if row != (0,):
        raise MaintenanceError(
            "The copies of a drain differ from the default partition; nothing was changed. Look for triggers on the "
            "default partition that change rows after they were written."
        )
    boundary("drain verified")
    patiently(conn, locking, "SELECT equitie_private.finish_drain(%s, %s)", [drain, locking.milliseconds])
    boundary("drain swapped")
    counted = conn.execute(
        "SELECT d.rows_copied FROM equitie_private.partition_drains AS d WHERE d.drain_id = %s", [drain]
    ).fetchone()
    return 0 if counted is None else int(counted[0])


def _copy(conn: Connection[Any], drain: int, locking: Locking, boundary: Callable[[str], None]) -> None:
    batch = _BATCH
    while True:
        started = time.monotonic()
        copied, tries = patiently(
            conn,
            locking,
            "SELECT equitie_private.copy_drain(%s, %s, %s)",
            [drain, batch, locking.milliseconds],
        )
        if not copied:
            return
        if tries == 1:
            taken = max(time.monotonic() - started, 1e-4)
            batch = max(50, min(_LARGEST_BATCH, int(batch * min(max(_BATCH_SECONDS / taken, 0.5), 1.5))))
        boundary("drain copying")


def _wait_for_older_snapshots(conn: Connection[Any], drain: int, locking: Locking) -> None:
    """Wait until no transaction is left that would see the months, once they are there, without all of their rows."""
    query = "SELECT o.pid, o.virtual_transaction, o.since FROM equitie_private.drain_obstacles(%s) AS o"
    older = {(pid, virtual) for pid, virtual, _ in conn.execute(query, [drain])}
    deadline = time.monotonic() + locking.patience
    pause = 0.02
    while older:
        if time.monotonic() >= deadline:
            pid = min(older)[0]
            raise Busy(f"server process {pid} has had a transaction open since before the rows were copied")
        time.sleep(pause)
        pause = min(pause * 2, 1.0)
        # Only those that were there at first: whoever came later sees the copies.
        older &= {(pid, virtual) for pid, virtual, _ in conn.execute(query, [drain])}


def _check_and_drop(conn: Connection[Any], drain: int, locking: Locking, boundary: Callable[[str], None]) -> None:
    row = conn.execute("SELECT equitie_private.undrained_rows(%s)", [drain]).fetchone()
    if row != (0,):
        raise MaintenanceError(
            f"{row[0] if row else '?'} rows of the former default partition are in no partition now, and nobody has "
            f"deleted them: they are kept in equitie_part.drained_{drain}; compare before you drop it."
        )
    _name_indexes(conn, drain)
    _drop(conn, drain, locking)
    boundary("drain dropped")


def _drop(conn: Connection[Any], drain: int, locking: Locking) -> None:
    # What cannot be dropped now is dropped by the next run: it finds the drain where this one leaves it.
    with contextlib.suppress(Busy):
        patiently(conn, locking, "SELECT equitie_private.drop_drain(%s, %s)", [drain, locking.milliseconds])


def _name_indexes(conn: Connection[Any], drain: int) -> None:
    """Call the months' indexes as those of other months are called; nobody waits for that."""
    rows = conn.execute(
        "SELECT format('ALTER INDEX equitie_part.%%I RENAME TO %%I', c.relname, n.name)"
        " FROM pg_catalog.pg_class AS c"
        " INNER JOIN pg_catalog.pg_index AS x ON x.indexrelid = c.oid"
        " INNER JOIN pg_catalog.pg_class AS t ON t.oid = x.indrelid"
        " CROSS JOIN LATERAL (SELECT left(regexp_replace(c.relname, %s, t.relname || '_'), 63) AS name) AS n"
        " WHERE c.relnamespace = 'equitie_part'::regnamespace AND t.relispartition AND c.relname ~ %s"
        " AND to_regclass(format('equitie_part.%%I', n.name)) IS NULL",
        [f"^drain_{drain}_(default|[0-9]{{4}}_[0-9]{{2}})_", f"^drain_{drain}_"],
    ).fetchall()
    for (statement,) in rows:
        with contextlib.suppress(psycopg.errors.LockNotAvailable, psycopg.errors.DuplicateTable):
            conn.execute(statement)
