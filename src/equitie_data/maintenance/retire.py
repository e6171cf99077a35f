"""Retires partitions: detach, count, archive, and drop when the grace period is over; each step can be the last one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from equitie_data.errors import ArchiveError, MaintenanceError
from equitie_data.maintenance.archive import Manifest, describe_source, verify_archive, write_archive
from equitie_data.maintenance.session import Locking, patiently, reason_of

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable

    from psycopg import Connection

    from equitie_data.cli import Progress
    from equitie_data.maintenance.catalog import Policy
    from equitie_data.maintenance.plan import Partition, RetiredPartition

__all__ = ["archive_retired", "detach_partition", "drop_retired", "settle_retired"]


def detach_partition(
    conn: Connection[Any], parent: str, partition: Partition, cutoff: dt.date, locking: Locking
) -> int:
    """Take an expired partition out of its table, and return how often it was tried.

    Raises:
        Busy: The locks could not be had.
        MaintenanceError: It is held or referred to.
    """
    try:
        return patiently(
            conn,
            locking,
            "SELECT equitie_private.detach_month(%s, %s::regclass, %s, %s)",
            [parent, partition.name, cutoff, locking.milliseconds],
        )[1]
    except (psycopg.errors.ForeignKeyViolation, psycopg.errors.ObjectNotInPrerequisiteState) as error:
        raise MaintenanceError(f"{reason_of(error)}.") from error


def settle_retired(
    conn: Connection[Any], retired_id: int, locking: Locking, boundary: Callable[[str], None]
) -> tuple[int, int]:
    """See that nothing changes a retired partition any more, and count it.

    Returns:
        Its rows, and how often it was tried.

    Raises:
        Busy: The locks on the tables it refers to could not be had.
    """
    _, tries = patiently(
        conn, locking, "SELECT equitie_private.release_retired(%s, %s)", [retired_id, locking.milliseconds]
    )
    boundary("retired partition released")
    rows, more = patiently(conn, locking, "SELECT equitie_private.settle_retired(%s)", [retired_id])
    boundary("retired partition settled")
    return int(rows), tries + more - 1


def archive_retired(
    conn: Connection[Any],
    policy: Policy,
    retired_id: int,
    directory: Path,
    *,
    boundary: Callable[[str], None],
    progress: Progress | None = None,
) -> Path:
    """Write a retired partition to an archive, read it back, and note where it is.

    Raises:
        ArchiveError: It could not be written, or does not hold what it should.
    """
    expected, table = _expected_manifest(conn, policy, retired_id)
    archive = write_archive(conn, table, expected, directory, progress)
    boundary("archive written")
    conn.execute(
        "SELECT equitie_private.record_archive(%s, %s, %s, %s)",
        [retired_id, str(archive.path), archive.manifest.sha256, archive.manifest.bytes],
    )
    boundary("archive recorded")
    return archive.path


def drop_retired(conn: Connection[Any], retired: RetiredPartition, directory: Path, locking: Locking) -> int:
    """Drop an archived partition, once its archive has been read again; return how often it was tried.

    Raises:
        ArchiveError: The archive is gone or damaged; nothing was dropped.
        Busy: The lock could not be had.
        MaintenanceError: It is held, or no longer what its archive says.
    """
    row = conn.execute(
        "SELECT r.archive_sha256 FROM equitie_private.retired_partitions AS r WHERE r.retired_id = %s",
        [retired.retired_id],
    ).fetchone()
    recorded = Path(retired.archive_file or "")
    # Archives may have been moved as a whole; their names stay.
    path = recorded if recorded.is_file() else directory / recorded.name
    manifest = verify_archive(path)
    if row is None or manifest.sha256 != row[0]:
        raise ArchiveError(f"The archive {path} is another one than was written of {retired.name}: it was not dropped.")
    try:
        return patiently(
            conn,
            locking,
            "SELECT equitie_private.drop_retired(%s, %s)",
            [retired.retired_id, locking.milliseconds],
        )[1]
    except psycopg.errors.ObjectNotInPrerequisiteState as error:
        raise MaintenanceError(f"{reason_of(error)}.") from error


def _expected_manifest(conn: Connection[Any], policy: Policy, retired_id: int) -> tuple[Manifest, str]:
    row = conn.execute(
        "SELECT r.parent, r.partition_name, r.table_name, r.row_count, r.amount::text, r.measures,"
        " CASE WHEN isfinite(r.from_key) THEN r.from_key::text END, r.to_key::text"
        " FROM equitie_private.retired_partitions AS r WHERE r.retired_id = %s",
        [retired_id],
    ).fetchone()
    if row is None:
        raise MaintenanceError(f"There is no retired partition {retired_id}.")
    parent, partition, table, rows, amount, measures, start, end = row
    system, database, server = describe_source(conn)
    try:
        package = version("equitie-data")
    except PackageNotFoundError:
        package = "unknown"
    manifest = Manifest(
        parent=parent,
        partition=partition,
        start=start,
        end=end,
        columns=(),
        rows=rows,
        amount_column=policy.amount_column,
        amount=amount,
        measures=measures,
        system_identifier=system,
        database=database,
        retired_id=retired_id,
        server_version=server,
        package_version=package,
    )
    return manifest, table
