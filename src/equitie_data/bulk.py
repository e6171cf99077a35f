"""Bulk loading: transactions streamed through COPY on several connections, every batch exactly once.

The unit is the batch: one COPY in one transaction of `execute_write`, under an idempotency key made of the load's key
and the batch's number. So a load has all that a single write has: it runs as the service, audit triggers and all, is
tried again after a failure that left nothing behind, and a COMMIT whose reply is lost is resolved.

Batches are copied side by side, but committed in the order of the source. So what a load that broke off has left is
always a beginning of the source, and the same call again recognises it batch by batch before it adds to it. Without
that order, whoever deletes a bad row from the file and calls again would load rows twice that a later batch had brought
in already.

What a load is not is all or nothing: ten million rows in one transaction would hold back vacuum and every standby for
minutes, and start over after a failure in the last row. `import_csv` is for what must be all or nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import attrs
from psycopg import sql

from equitie_data import _sql
from equitie_data.context import as_service, current_actor
from equitie_data.copy_rows import COLUMNS, batches
from equitie_data.csv_import import month_ranges
from equitie_data.database import Database
from equitie_data.errors import BulkLoadError, ConfigurationError, NoActorError

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future

    from psycopg import Connection

    from equitie_data.copy_rows import Batch
    from equitie_data.csv_import import SupportsAdvance

__all__ = ["COLUMNS", "LoadReport", "load_transactions"]

_KEY_LIMIT: Final = 200  # characters; the number of the batch is put behind it
_TABLE: Final = sql.Identifier("public", "transactions_clean")
_STAGE: Final = sql.Identifier("pg_temp", "bulk_rows")


@attrs.frozen(kw_only=True)
class LoadReport:
    """What became of the rows of a source; ``rows`` is the sum of ``loaded`` and ``skipped``.

    Attributes:
        rows: Rows of the source.
        loaded: Rows this call has loaded.
        skipped: Rows that an earlier call with the same key had loaded.
        batches: In how many transactions.
        partitions_created: Month partitions that were made.
        seconds: How long it took.
    """

    rows: int
    loaded: int
    skipped: int
    batches: int
    partitions_created: int
    seconds: float


class _Outcome(NamedTuple):
    rows: int
    loaded: bool


def load_transactions(
    database: Database | str,
    rows: Iterable[Sequence[object] | bytes],
    *,
    key: str,
    columns: Sequence[str] | None = None,
    streams: int = 2,
    batch_rows: int = 20_000,
    batch_timeout: float = 300.0,
    progress: SupportsAdvance | None = None,
) -> LoadReport:
    """Load transactions, every batch of them exactly once.

    Runs as the acting service, or as the service "bulk load" when nobody acts. Missing month partitions are made
    before the rows that need them are sent. Rows are read as they are needed; memory holds a few batches.

    Args:
        database: An open database, or the connection string of one to open for the load.
        rows: Sequences of typed values (int and Decimal, date, str), or lines in COPY's text format as `bytes`, such
            as iterating over a binary file gives.
        key: Names this load. After a failure, call again with the same key, the same rows in the same order and the
            same ``batch_rows``: what is there already is skipped. That is known as long as idempotency keys are kept.
        columns: What the values of a row are, by the names of ``transactions_clean``; `COLUMNS` when left out. A
            column that is not among them gets its default, the transaction's id included.
        streams: Batches that are loaded at a time, each on a connection of its own.
        batch_rows: Rows of a batch, which is a transaction.
        batch_timeout: Seconds a batch may take, retries included.
        progress: Told how many rows were loaded or skipped.

    Raises:
        BulkLoadError: A row is malformed, or the key was used for other rows. Batches before it are loaded.
        ConfigurationError: The key, the number of streams or the actor cannot be used; nothing was loaded.
        psycopg.Error: The server refused a batch, of which nothing was loaded; batches before it are.
    """
    if not key or len(key) > _KEY_LIMIT:
        raise ConfigurationError(f"key must be text of 1 to {_KEY_LIMIT} characters: name the load by its source.")
    if batch_rows < 1:
        raise ConfigurationError("batch_rows must be at least 1.")
    with contextlib.ExitStack() as stack:
        if isinstance(database, str):
            database = stack.enter_context(Database(database))
        if not 1 <= streams <= database.settings.max_size:
            raise ConfigurationError(
                f"streams must be from 1 to {database.settings.max_size}, the size of the pool: each stream has a "
                "connection of its own."
            )
        try:
            actor = current_actor()
        except NoActorError:
            actor = stack.enter_context(as_service("bulk load"))
        if actor.kind != "service":
            raise ConfigurationError("A bulk load is the service's: wrap it in `with as_service(reason):`.")
        return _Load(database, key, tuple(columns or COLUMNS), batch_timeout, progress).run(rows, streams, batch_rows)


@attrs.define(eq=False)
class _Load:
    database: Database
    key: str
    columns: tuple[str, ...]
    timeout: float
    progress: SupportsAdvance | None
    months: set[dt.date] = attrs.field(factory=set)
    partitions_created: int = 0
    staged: bool = False

    def run(self, rows: Iterable[Sequence[object] | bytes], streams: int, batch_rows: int) -> LoadReport:
        """Load everything."""
        started = time.perf_counter()
        loaded = skipped = number = 0
        # PostgreSQL refuses COPY to whoever is under policies, as the service is where BYPASSRLS could not be given.
        ((self.staged,),) = self.database.execute_read(_sql.query("bulk_under_policies"), consistency="strong")
        running: deque[Future[_Outcome]] = deque()
        executor = ThreadPoolExecutor(streams, thread_name_prefix="equitie-bulk")

        def settle() -> None:
            nonlocal loaded, skipped
            outcome = running.popleft().result()
            loaded += outcome.rows * outcome.loaded
            skipped += outcome.rows * (not outcome.loaded)
            if self.progress is not None:
                self.progress.advance(outcome.rows)

        try:
            for batch in batches(rows, self.columns, batch_rows):
                self._ensure_partitions(batch)
                if len(running) > streams:
                    settle()
                previous = running[-1] if running else None
                # A context each: the actor has to reach the thread, and two threads cannot be in one context.
                running.append(executor.submit(contextvars.copy_context().run, self._load, batch, previous))
                number += 1
            while running:
                settle()
        finally:
            # After a failure, what is under way is waited for and the rest given up.
            executor.shutdown(wait=True, cancel_futures=True)
        return LoadReport(
            rows=loaded + skipped,
            loaded=loaded,
            skipped=skipped,
            batches=number,
            partitions_created=self.partitions_created,
            seconds=time.perf_counter() - started,
        )

    def _ensure_partitions(self, batch: Batch) -> None:
        missing = [month for month in batch.months if month not in self.months]
        for first, last in month_ranges(missing):
            ((made,),) = self.database.execute_write(
                _sql.query("import_ensure_partitions"), {"first": first, "last": last}, timeout=self.timeout
            )
            self.partitions_created += made
        self.months.update(missing)

    def _load(self, batch: Batch, previous: Future[_Outcome] | None) -> _Outcome:
        ran = False
        digest = hashlib.sha256(f"{self.columns}\n".encode() + batch.block).hexdigest()

        def operation(connection: Connection[Any]) -> tuple[int, str]:
            nonlocal ran
            ran = True
            copied = self._copy(connection, batch)
            if copied != batch.rows:
                raise BulkLoadError(
                    f"{copied:,} of the {batch.rows:,} rows of batch {batch.number} arrived, and none was kept: look "
                    "for a trigger on transactions_clean that drops rows."
                )
            # Submitted before and run by as many threads, so it is never waited for in vain.
            if previous is not None and previous.exception() is not None:
                raise BulkLoadError(f"Batch {batch.number} was given up, because the one before it failed.")
            return copied, digest

        known = self.database.execute_write(
            operation, name="bulk load", idempotency_key=f"{self.key}:{batch.number}", timeout=self.timeout
        )
        if known != (batch.rows, digest):
            raise BulkLoadError(
                f"Batch {batch.number} was loaded with this key already, with other rows: call with the same rows in "
                "the same order, the same columns and batch_rows, or use a new key for a new load."
            )
        return _Outcome(batch.rows, ran)

    def _copy(self, connection: Connection[Any], batch: Batch) -> int:
        columns = sql.SQL(", ").join(map(sql.Identifier, self.columns))
        target = _STAGE if self.staged else _TABLE
        with connection.cursor() as cursor:
            if self.staged:
                cursor.execute(
                    sql.SQL("CREATE TEMPORARY TABLE bulk_rows ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA").format(
                        columns, _TABLE
                    )
                )
            with cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN").format(target, columns)) as copy:
                copy.write(batch.block)
            if self.staged:
                cursor.execute(
                    sql.SQL("INSERT INTO {table} ({columns}) SELECT {columns} FROM {stage}").format(
                        table=_TABLE, columns=columns, stage=_STAGE
                    )
                )
            return cursor.rowcount
