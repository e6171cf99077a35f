"""A transaction's prologue in the same trip as its first statement.

psycopg's own pipeline mode would do it, for about 100 us of client time a call; sending the same libpq pipeline
from inside a cursor costs 3 us (measured; see docs/explanation/round-trips.md). The generators here do no I/O
themselves: psycopg drives them, blocking or awaiting, so one source serves its blocking and its asyncio classes.

With `exchange` the only module that relies on psycopg's internals, which is why the project pins psycopg's minor
version.
"""

from __future__ import annotations

import select
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from psycopg import Connection, Cursor, ServerCursor, errors, generators, pq, waiting
from psycopg.adapt import Transformer

from equitie_data.commit import Incarnation
from equitie_data.context import WalPosition
from equitie_data.errors import OperationEndedTransactionError, SwallowedErrorError
from equitie_data.exchange import exchange, is_script, position_of, remember_prepared, send_statement, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from psycopg import Copy, Pipeline, Transaction
    from psycopg._queries import PostgresQuery
    from psycopg.abc import Params, PQGen, Query
    from psycopg.pq.abc import PGconn, PGresult
    from psycopg.rows import Row as RowType

    from equitie_data.prologue import Prologue

__all__ = ["NodeConnection", "NodeCursor", "StatementObserver"]

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_FOR_NEWS: Final = waiting.Wait.R
_NEWS: Final = waiting.Ready.R
_FIRST_WAIT: Final = 100  # milliseconds; as long as each of psycopg's

_INCARNATION: Final = (b"system_identifier", b"timeline", b"started_at", b"statistics_reset_at")
_STORE: Final = b"SELECT equitie_private.store_idempotent_result($1, $2)"
_POSITION: Final = (
    b"SELECT pg_catalog.pg_walfile_name(p.lsn), p.lsn FROM pg_catalog.pg_current_wal_insert_lsn() AS p (lsn)"
)


class StatementObserver(Protocol):
    """What a connection calls after every statement."""

    def __call__(self, sql: str, seconds: float, rows: int | None, error: BaseException | None) -> None:
        """Take the statement's text, its duration, its row count and its error."""


class PrologueCarrier:
    """The part of a node's connection that blocking and asyncio share."""

    pgconn: PGconn
    _prepared: Any
    _pipeline: Any

    pending: Prologue | None = None
    """The prologue that the next statement takes along; ``None`` once it was sent."""
    observer: StatementObserver | None = None
    """Who hears of every statement."""
    prologue_failed = False
    """Whether the last error was the prologue's own."""
    opening: PGresult | None = None
    """What the last prologue returned."""
    unreplicated = False
    """Whether the server gave up waiting for its synchronous replicas: what it committed stands on it alone."""
    system = 0
    """The identifier of the cluster it belongs to, as far as it is known."""
    first_used_at = 0.0
    """The monotonic time of its first checkout: since then its server has not restarted."""
    replayed = 0
    """How far the replica was when the last prologue asked, in bytes."""
    behind = False
    """Whether the replica has not replayed what the session must see."""
    commit_sent = False
    """Whether a COMMIT was sent whose reply nobody has read yet."""
    incarnation: Incarnation | None = None
    """The life of the server that this connection belongs to; read with its first write."""
    watch: Callable[[float], None] | None = None
    """Called every 0.1 s of waiting for the server, with the seconds waited; raises to give up."""
    unprepared = False
    """Whether this attempt must use no prepared statement."""
    in_operation = False
    """Whether an operation is running, which must leave the transaction to the library."""
    readable: Callable[[int], list[Any]] | None = None
    """Waits so many milliseconds for news from the server; made once, because making it costs as much as using it."""

    def open_eye(self) -> Callable[[int], list[Any]]:
        """Make `readable`."""
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        self.readable = poll.poll
        return poll.poll

    @property
    def begun(self) -> bool:
        """Whether the transaction was opened: an operation that runs no statement opens none."""
        return self.pending is None

    def send_prologue_gen(self) -> PQGen[None]:
        """Open the transaction in a trip of its own, for what cannot take the prologue along."""
        prologue, self.pending = self.pending, None
        if prologue is None:
            return
        self.pgconn.enter_pipeline_mode()
        self.pgconn.send_query_params(prologue.begin, None)
        wanted, name = self._prepared.get(prologue, prepare=True)
        opening = 1 + send_statement(self, prologue, wanted, name)
        results = yield from exchange(self, opening)
        remember_prepared(self, prologue, wanted, name, results[-2])
        self.note_opening(prologue, results[-2])

    def note_notice(self, notice: errors.Diagnostic) -> None:
        """Take a notice of the server; by its origin, because its text may be in any language."""
        if notice.source_function == "SyncRepWaitForLSN":
            self.unreplicated = True

    def check_replicated(self) -> None:
        """Refuse to take a commit for done that the replicas have not got.

        Raises:
            psycopg.OperationalError: They have not; whoever catches it must find out.
        """
        if self.unreplicated:
            self.unreplicated = False
            raise errors.OperationalError("the commit was not replicated")

    def note_opening(self, prologue: Prologue, result: PGresult) -> None:
        """Keep what a prologue returned, and refuse to go on where the replica is behind.

        Raises:
            psycopg.OperationalError: The replica has not replayed what the session must see.
        """
        self.opening = result
        if prologue.position is not None:
            replayed = self.opening_value(b"replayed")
            self.replayed = 0 if replayed is None else WalPosition.parse_lsn(replayed)
            if self.replayed < prologue.position:
                self.behind = True
                raise errors.OperationalError("the replica has not replayed what this session wrote")

    def opening_value(self, column: bytes) -> str | None:
        """Return one column of what the last prologue returned."""
        result = self.opening
        if result is None:
            return None
        for place in range(result.nfields - 1, -1, -1):  # what is asked for stands at the end
            if result.fname(place) == column:
                value = result.get_value(0, place)
                return None if value is None else value.decode()
        return None

    def read_incarnation(self) -> None:
        """Take the server's incarnation from what the last prologue returned."""
        values = [self.opening_value(column) or "" for column in _INCARNATION]
        self.incarnation = Incarnation(*values)

    def send_commit_gen(self) -> PQGen[None]:
        """Send COMMIT without waiting for its reply; only for reads, whose commit cannot fail them."""
        self.pgconn.send_query(b"COMMIT")
        self.commit_sent = True
        yield from generators.send(self.pgconn)

    def drain_gen(self) -> PQGen[None]:
        """Read the reply to a COMMIT that was not waited for."""
        yield from generators.fetch_many(self.pgconn)
        self.commit_sent = False

    def commit_gen(self, keep: tuple[str, str | None] | None, *, want_position: bool) -> PQGen[WalPosition | None]:
        """Commit a write, in one trip with what goes before and after it.

        Args:
            keep: An idempotency key this transaction has claimed, and the result to keep for it.
            want_position: Whether to ask for the place in the log where the commit stands.

        Returns:
            That place.

        Raises:
            SwallowedErrorError: The server rolled back instead.
        """
        pgconn = self.pgconn
        self.prologue_failed = False
        pgconn.enter_pipeline_mode()
        if keep is not None:
            key, result = keep
            pgconn.send_query_params(_STORE, [key.encode(), None if result is None else result.encode()])
        pgconn.send_query_params(b"COMMIT", None)
        if want_position:
            pgconn.send_query_params(_POSITION, None)
        results = yield from exchange(self, 0)
        commit = results[0 if keep is None else 1]
        if commit.command_status != b"COMMIT":
            raise SwallowedErrorError(
                "The server rolled the transaction back instead of committing it, because a statement in it had "
                "failed: nothing was written; let the error out of the operation."
            )
        self.check_replicated()
        if not want_position:
            return None
        return position_of(results[-2], self.system)

    def command_gen(self, command: bytes) -> PQGen[Any]:
        """Run a command that takes no parameters and returns no rows."""
        return self._exec_command(command)  # type: ignore[attr-defined,no-any-return]

    def refuse_to_end(self) -> None:
        """Refuse COMMIT and ROLLBACK by method while an operation is running.

        Raises:
            OperationEndedTransactionError: Always, during an operation.
        """
        if self.in_operation:
            raise OperationEndedTransactionError(
                "The operation called commit() or rollback() on its connection: the library commits when the "
                "operation returns and rolls back when it raises; use conn.transaction() for a part of it."
            )


class PrologueRider:
    """The part of a node's cursor that blocking and asyncio share."""

    _conn: Any
    _tx: Any
    _query: Any
    _last_query: Any
    _pgconn: PGconn
    rowcount: int

    def _execute_gen(
        self, query: Query, params: Params | None = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> PQGen[None]:
        connection = self._conn
        if connection.observer is None and connection.pending is None:
            return super()._execute_gen(query, params, prepare=prepare, binary=binary)  # type: ignore[misc,no-any-return]
        return self._execute_observed_gen(query, params, prepare, binary)

    def _execute_observed_gen(
        self, query: Query, params: Params | None, prepare: bool | None, binary: bool | None
    ) -> PQGen[None]:
        connection = self._conn
        started = time.perf_counter()  # not `observed()`: the context would cost as much as all the rest of this
        try:
            if connection.pending is not None and not connection._pipeline and not binary:
                parsed = self._parse(query, params)
                if not is_script(parsed):
                    prologue, connection.pending = connection.pending, None
                    yield from self._execute_after_gen(prologue, parsed, begin=True, prepare=prepare)
                    self._report(started)
                    return
            yield from super()._execute_gen(query, params, prepare=prepare, binary=binary)  # type: ignore[misc]
        except BaseException as error:
            self._report(started, error)
            raise
        self._report(started)

    def execute_alone_gen(
        self, prologue: Prologue, query: Query, params: Params | None, *, want_position: bool = False
    ) -> PQGen[WalPosition | None]:
        """Run the prologue and one statement as a whole transaction, in one trip.

        Everything up to the sync is one implicit transaction: it commits with the statement, and an error leaves
        nothing open (PostgreSQL, "Pipelining" in the protocol's chapter on message flow).
        """
        started = time.perf_counter()
        try:
            parsed = self._parse(query, params)
            position = yield from self._execute_after_gen(
                prologue, parsed, begin=False, prepare=None, want_position=want_position
            )
        except BaseException as error:
            self._report(started, error)
            raise
        self._report(started)
        return position

    def _parse(self, query: Query, params: Params | None) -> PostgresQuery:
        self._reset()  # type: ignore[attr-defined]
        self._tx = Transformer(cast("Cursor[Any]", self))
        return self._convert_query(query, params)  # type: ignore[attr-defined,no-any-return]

    def _execute_after_gen(
        self,
        prologue: Prologue,
        parsed: PostgresQuery,
        *,
        begin: bool,
        prepare: bool | None,
        want_position: bool = False,
    ) -> PQGen[WalPosition | None]:
        connection, pgconn = self._conn, self._pgconn
        prepared = connection._prepared
        self._query = parsed
        pgconn.enter_pipeline_mode()
        if begin:
            pgconn.send_query_params(prologue.begin, None)
        opening, opening_name = prepared.get(prologue, prepare=True)
        before = begin + send_statement(connection, prologue, opening, opening_name)
        wanted, name = prepared.get(parsed, prepare)
        here = before + send_statement(connection, parsed, wanted, name)
        if want_position:
            # After a sync of its own: what it returns must not be older than the commit.
            pgconn.pipeline_sync()
            pgconn.send_query_params(_POSITION, None)
        results = yield from exchange(connection, before, syncs=1 + want_position)
        result = results[here - 1]
        self._check_results([result])  # type: ignore[attr-defined]
        remember_prepared(connection, prologue, opening, opening_name, results[before - 1])
        remember_prepared(connection, parsed, wanted, name, result)
        connection.note_opening(prologue, results[before - 1])
        self._set_results([result])  # type: ignore[attr-defined]
        connection.check_replicated()
        if prepared._to_flush:
            yield from prepared.maintain_gen(connection)
        return position_of(results[-2], connection.system) if want_position else None

    @contextmanager
    def observed(self, count_rows: Callable[[], int] | None = None) -> Iterator[None]:
        """Report the statement that runs inside to the connection's observer.

        Args:
            count_rows: Says how many rows it had, where the cursor does not know.
        """
        started = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self._report(started, error)
            raise
        self._report(started, count_rows=count_rows)

    def _report(
        self, started: float, error: BaseException | None = None, count_rows: Callable[[], int] | None = None
    ) -> None:
        observer: StatementObserver | None = self._conn.observer
        if observer is None:
            return
        rows = None if error is not None else max(self.rowcount, 0) if count_rows is None else count_rows()
        observer(self._statement(), time.perf_counter() - started, rows, error)

    def _statement(self) -> str:
        return "" if self._query is None else bytes(self._query.query).decode("utf-8", "replace")


class NodeCursor(PrologueRider, Cursor["RowType"]):
    """A cursor that takes its connection's pending prologue along, and reports what it ran."""

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        """Run a statement for every set of parameters; reported as one."""
        self._conn.flush_prologue()  # it opens a pipeline of its own
        with self.observed():
            super().executemany(*args, **kwargs)

    @contextmanager
    def copy(self, *args: Any, **kwargs: Any) -> Iterator[Copy]:
        """Run COPY; its duration counts to the end of the block."""
        with self.observed(), super().copy(*args, **kwargs) as copy:
            yield copy

    def stream(self, *args: Any, **kwargs: Any) -> Generator[RowType, None, None]:
        """Run a query row by row; its duration counts to the last row taken."""
        taken = 0
        with self.observed(lambda: taken):
            for row in super().stream(*args, **kwargs):
                taken += 1
                yield row


class NodeServerCursor(PrologueRider, ServerCursor["RowType"]):
    """A server-side cursor that reports its declaration."""

    def _declare_gen(self, *args: Any, **kwargs: Any) -> PQGen[None]:
        with self.observed():
            yield from super()._declare_gen(*args, **kwargs)


class NodeConnection(PrologueCarrier, Connection["RowType"]):
    """A connection of a node's pool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_notice_handler(self.note_notice)
        self.cursor_factory = NodeCursor
        self.server_cursor_factory = NodeServerCursor

    def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """Drive a generator, under the eye of `watch`.

        Nearly every answer comes within the first wait, so that one is made here, for half of what psycopg's wait
        costs with a generator of ours in between.
        """
        watch = self.watch
        if watch is None:
            return super().wait(gen, *args, **kwargs)
        try:
            wanted = next(gen)
            if wanted == _FOR_NEWS and (self.readable or self.open_eye())(_FIRST_WAIT):
                wanted = gen.send(_NEWS)
        except StopIteration as stop:
            return stop.value
        except KeyboardInterrupt:
            if self.pgconn.transaction_status == _ACTIVE:
                self._try_cancel(timeout=5.0)
                with suppress(errors.QueryCanceled):
                    super().wait(watched(gen, watch, _FOR_NEWS))
            raise
        return super().wait(watched(gen, watch, wanted), *args, **kwargs)

    def _start_query(self) -> PQGen[None]:
        yield from self.send_prologue_gen()
        yield from super()._start_query()

    def flush_prologue(self) -> None:
        """Open the transaction now, for what cannot take the prologue along."""
        if self.pending is not None:
            with self.lock:
                self.wait(self.send_prologue_gen())

    @contextmanager
    def transaction(self, *args: Any, **kwargs: Any) -> Iterator[Transaction]:
        """Open a savepoint: the transaction itself is the library's."""
        self.flush_prologue()
        with super().transaction(*args, **kwargs) as transaction:
            yield transaction

    @contextmanager
    def pipeline(self) -> Iterator[Pipeline]:
        """Enter pipeline mode, the prologue first."""
        self.flush_prologue()
        with super().pipeline() as pipeline:
            yield pipeline

    def commit(self) -> None:
        """Refused during an operation."""
        self.refuse_to_end()
        super().commit()

    def rollback(self) -> None:
        """Refused during an operation."""
        self.refuse_to_end()
        super().rollback()
