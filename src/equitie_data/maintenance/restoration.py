"""Puts an archive's rows back, exactly once: as the partition they were, under a legal hold."""

from __future__ import annotations

import contextlib
import datetime as dt
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import attrs
import psycopg
from psycopg import sql

from equitie_data.errors import ArchiveError, MaintenanceError
from equitie_data.maintenance.archive import Column, Manifest, copy_statement, csv_blocks, verify_archive
from equitie_data.maintenance.holds import LegalHold, place_hold, release_hold
from equitie_data.maintenance.session import Busy, Locking, open_session, patiently, reason_of, take_turn

if TYPE_CHECKING:
    from pathlib import Path

    from psycopg import Connection

    from equitie_data.cli import Progress

__all__ = ["RestoreReport", "restore"]

_LATE_ROWS: Final = 1000
_COLUMNS: Final = """
SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)
FROM pg_catalog.pg_attribute AS a
WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""


@attrs.frozen(kw_only=True)
class RestoreReport:
    """What was put back.

    Attributes:
        table: The table.
        partition: The partition, with its schema.
        rows: Its rows.
        amount: Their sum, of the column the archive names.
        late_rows: Rows of the same range that waited in the default partition, and are in the partition now.
        hold_id: The legal hold that keeps the next run from retiring it again; ``None`` if none was wanted.
        loaded: Whether the archive was loaded; the table of before was still there otherwise.
    """

    table: str
    partition: str
    rows: int
    amount: str | None
    late_rows: int
    hold_id: int | None
    loaded: bool


def restore(
    dsn: str,
    archive: Path,
    *,
    hold_reason: str | None,
    placed_by: str,
    lock_timeout: float = 0.05,
    patience: float = 60.0,
    wait: float = 10.0,
    progress: Progress | None = None,
) -> RestoreReport:
    """Put an archive's rows back as the partition they were.

    Args:
        dsn: The database, as the owner of its tables.
        archive: The archive's file; its manifest stands beside it.
        hold_reason: Why the rows are kept from now on. ``None``: no hold, and the next run retires them again.
        placed_by: By whose order.
        lock_timeout: Seconds that one try waits for its locks.
        patience: Seconds until it is given up.
        wait: Seconds to wait for a maintenance run to end.
        progress: Told how many bytes were loaded.

    Raises:
        ArchiveError: The archive is not what its manifest says. Nothing was restored.
        MaintenanceError: The rows are there already, or rows they refer to are not. Nothing was restored.
    """
    manifest = verify_archive(archive)
    locking = Locking(timeout=lock_timeout, patience=patience)
    with open_session(dsn) as conn, take_turn(conn, wait):
        work = _Restoration(conn, archive, manifest, locking)
        try:
            return work.run(hold_reason, placed_by, progress)
        except Busy as busy:
            raise MaintenanceError(f"{archive.name} was not restored: {busy}.") from busy


@attrs.define(eq=False)
class _Restoration:
    conn: Connection[Any]
    archive: Path
    manifest: Manifest
    locking: Locking

    def run(self, hold_reason: str | None, placed_by: str, progress: Progress | None) -> RestoreReport:
        manifest, conn = self.manifest, self.conn
        self._require_room()
        kept = self._kept_table()
        table = f"restoring_{manifest.partition}"[:63] if kept is None else kept
        if kept is None:
            self._load(table, progress)
        attached = False
        try:
            self._require_same_rows(table)
            self._constrain(table)
            strays = self._remember_strays(table)
            hold = None
            try:
                # Before the rows are back, so that no run can find them without it.
                if hold_reason is not None:
                    hold = place_hold(conn, self._hold(hold_reason, placed_by))
                late, _ = patiently(
                    conn,
                    self.locking,
                    "SELECT equitie_private.attach_restored(%s, %s::regclass, %s, %s, %s, %s, %s, %s, %s)",
                    [
                        manifest.parent,
                        self._qualified(table),
                        manifest.partition,
                        manifest.start or "-infinity",
                        manifest.end,
                        _LATE_ROWS,
                        self.locking.milliseconds,
                        manifest.sha256,
                        str(self.archive),
                    ],
                )
                attached = True
            finally:
                if not attached and hold is not None:
                    release_hold(conn, hold, "the restoration that failed")
                if strays and not attached:
                    conn.execute("SELECT equitie_private.forget_strays(%s::regclass)", [self._qualified(table)])
        except psycopg.errors.UniqueViolation as error:
            raise MaintenanceError(
                f"{self.archive.name} was not restored: some of its rows are in {manifest.parent} already "
                f"({reason_of(error)})."
            ) from error
        except psycopg.errors.ForeignKeyViolation as error:
            raise MaintenanceError(
                f"{self.archive.name} was not restored: rows that its rows refer to are gone ({reason_of(error)}). "
                "Bring those back first."
            ) from error
        finally:
            if not attached and not conn.closed:
                self._clean_up(table, loaded=kept is None)
        return RestoreReport(
            table=manifest.parent,
            partition=self._qualified(manifest.partition),
            rows=manifest.rows,
            amount=manifest.amount,
            late_rows=int(late),
            hold_id=hold,
            loaded=kept is None,
        )

    def _require_room(self) -> None:
        """See that no partition stands where the restored one is to be."""
        manifest = self.manifest
        overlapping = self.conn.execute(
            "SELECT b.partition::text FROM equitie_private.month_partition_bounds(%s::regclass) AS b"
            " WHERE NOT b.is_default AND b.from_key < %s::timestamptz"
            " AND b.to_key > coalesce(%s::timestamptz, '-infinity')",
            [manifest.parent, manifest.end, manifest.start],
        ).fetchone()
        if overlapping is not None:
            counted = self.conn.execute(
                sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(*overlapping[0].replace('"', "").split(".")))
            ).fetchone()
            raise MaintenanceError(
                f"{self.archive.name} was not restored: {overlapping[0]}, with {counted[0] if counted else '?'} rows, "
                f"is the partition of {manifest.parent} for these days already."
            )

    def _kept_table(self) -> str | None:
        """Return the table the archive was made of, if it is there still."""
        row = self.conn.execute(
            "SELECT r.table_name FROM equitie_private.retired_partitions AS r"
            " WHERE r.parent = %s AND r.archive_sha256 = %s AND r.state = 'archived'"
            " AND to_regclass(format('equitie_part.%%I', r.table_name)) IS NOT NULL",
            [self.manifest.parent, self.manifest.sha256],
        ).fetchone()
        return None if row is None else str(row[0])

    def _load(self, table: str, progress: Progress | None) -> None:
        manifest, conn = self.manifest, self.conn
        here = dict(conn.execute(_COLUMNS, [manifest.parent]).fetchall())
        for column in manifest.columns:
            if here.get(column.name) != column.type:
                found = f"is {here[column.name]} there" if column.name in here else "does not exist there"
                raise MaintenanceError(
                    f"{self.archive.name} does not fit into {manifest.parent}: its column {column.name} "
                    f"({column.type}) {found}. Load the CSV into a table of your own."
                )
        target = sql.Identifier("equitie_part", table)
        with conn.transaction():
            # What a restoration that was killed has left; never a partition, which has another name.
            conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(target))
            conn.execute(
                sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL EXCLUDING IDENTITY)").format(
                    target, sql.Identifier(*manifest.parent.split("."))
                )
            )
            conn.execute(
                sql.SQL("REVOKE ALL ON TABLE {} FROM PUBLIC, anon, authenticated, equitie_staff, service_role").format(
                    target
                )
            )
            columns: tuple[Column, ...] = manifest.columns
            with conn.cursor() as cursor, cursor.copy(copy_statement("FROM STDIN", target, columns)) as copy:
                for block in csv_blocks(self.archive):
                    copy.write(block)
                    if progress is not None:
                        progress.advance(len(block))

    def _require_same_rows(self, table: str) -> None:
        row = self.conn.execute(
            "SELECT m.row_count, m.amount::text FROM equitie_private.measure_partition(%s, %s::regclass) AS m",
            [self.manifest.parent, self._qualified(table)],
        ).fetchone()
        wanted = None if self.manifest.amount is None else Decimal(self.manifest.amount)
        found = None if row is None or row[1] is None else Decimal(row[1])
        if row is None or row[0] != self.manifest.rows or found != wanted:
            raise ArchiveError(
                f"{self.archive.name} was not restored: {row[0] if row else 'no'} rows arrived instead of "
                f"{self.manifest.rows}, or another sum."
            )

    def _constrain(self, table: str) -> None:
        """Give the rows the constraints of a partition, checked without holding anybody up."""
        manifest = self.manifest
        patiently(
            self.conn,
            self.locking,
            "SELECT equitie_private.prepare_restored(%s::regclass, %s::regclass, %s, %s, %s)",
            [
                manifest.parent,
                self._qualified(table),
                manifest.start or "-infinity",
                manifest.end,
                self.locking.milliseconds,
            ],
        )
        constraints = self.conn.execute(
            "SELECT k.conname FROM pg_catalog.pg_constraint AS k"
            " WHERE k.conrelid = %s::regclass AND NOT k.convalidated",
            [self._qualified(table)],
        ).fetchall()
        for (name,) in constraints:
            patiently(
                self.conn,
                self.locking,
                sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(
                    sql.Identifier("equitie_part", table), sql.Identifier(name)
                ),
                [],
            )

    def _remember_strays(self, table: str) -> int:
        if self.manifest.parent != "public.transactions_clean":
            return 0
        with self.conn.transaction():
            self.conn.execute(
                "SELECT pg_catalog.set_config('lock_timeout', %s, true)", [f"{self.locking.milliseconds}ms"]
            )
            row = self.conn.execute(
                "SELECT equitie_private.remember_strays(%s::regclass)", [self._qualified(table)]
            ).fetchone()
        return 0 if row is None else int(row[0])

    def _hold(self, reason: str, placed_by: str) -> LegalHold:
        start, end = self.manifest.start, self.manifest.end
        return LegalHold(
            reason=reason,
            placed_by=placed_by,
            table=self.manifest.parent,
            first_day=None if start is None else dt.date.fromisoformat(start[:10]),
            last_day=dt.date.fromisoformat(end[:10]) - dt.timedelta(days=1),
        )

    def _clean_up(self, table: str, *, loaded: bool) -> None:
        """Leave things as they were; what fails here is found by the next try."""
        with contextlib.suppress(psycopg.Error, Busy):
            if loaded:
                patiently(
                    self.conn,
                    self.locking,
                    sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier("equitie_part", table)),
                    [],
                )
            else:
                row = self.conn.execute(
                    "SELECT r.retired_id FROM equitie_private.retired_partitions AS r WHERE r.table_name = %s", [table]
                ).fetchone()
                patiently(
                    self.conn,
                    self.locking,
                    "SELECT equitie_private.release_retired(%s, %s)",
                    [row and row[0], self.locking.milliseconds],
                )

    @staticmethod
    def _qualified(table: str) -> str:
        return f'equitie_part."{table}"'
