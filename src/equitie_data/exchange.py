"""Statements on a libpq pipeline, sent and answered by generators that psycopg drives.

With `wire` the only module that relies on psycopg's internals, which is why the project pins psycopg's minor version.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from psycopg import errors, generators, pq
from psycopg._preparing import Prepare

from equitie_data.context import WalPosition

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg._queries import PostgresQuery
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

    from equitie_data.prologue import Prologue
    from equitie_data.wire import PrologueCarrier

__all__ = ["exchange", "is_script", "is_stale", "position_of", "remember_prepared", "send_statement", "watched"]

_SYNC: Final = pq.ExecStatus.PIPELINE_SYNC
_FATAL: Final = pq.ExecStatus.FATAL_ERROR
_BAD: Final = pq.ConnStatus.BAD


def is_stale(connection: PrologueCarrier) -> bool:
    """Return whether the server has closed an idle connection, without a round trip.

    A FIN or a pending FATAL makes the socket readable. One read may take the FATAL's text alone and still report
    a good connection, so it goes on until nothing is left.
    """
    pgconn = connection.pgconn
    if pgconn.status == _BAD:
        return True
    readable = connection.readable or connection.open_eye()
    while readable(0):
        try:
            pgconn.consume_input()
            pgconn.is_busy()  # lets libpq digest what was read: a NOTIFY or a notice is no reason to drop it
        except errors.OperationalError:
            return True
        if pgconn.status == _BAD:
            return True
    return False


def send_statement(connection: PrologueCarrier, query: Prologue | PostgresQuery, wanted: Prepare, name: bytes) -> int:
    """Queue one statement on a libpq pipeline and return how many results it will give."""
    pgconn = connection.pgconn
    if wanted is Prepare.NO:
        pgconn.send_query_params(query.query, query.params, param_types=query.types, param_formats=query.formats)
        return 1
    if wanted is Prepare.SHOULD:
        pgconn.send_prepare(name, query.query, param_types=query.types)
    pgconn.send_query_prepared(name, query.params, param_formats=query.formats)
    return 2 if wanted is Prepare.SHOULD else 1


def remember_prepared(connection: PrologueCarrier, query: Any, wanted: Prepare, name: bytes, result: PGresult) -> None:
    """Tell psycopg's cache of prepared statements, once it is certain that the server has this one."""
    prepared = connection._prepared
    key = prepared.maybe_add_to_cache(query, wanted, name)
    if key is not None:
        prepared.validate(key, wanted, name, [result])


def exchange(connection: PrologueCarrier, opening: int, *, syncs: int = 1) -> PQGen[list[PGresult]]:
    """Flush a libpq pipeline, return every result up to its last sync, and leave pipeline mode.

    The first ``opening`` results are the prologue's; an error among them is marked as such.
    """
    pgconn = connection.pgconn
    connection.prologue_failed = False
    pgconn.pipeline_sync()
    yield from generators.send(pgconn)
    results: list[PGresult] = []
    while syncs:
        for result in (yield from generators.fetch_many(pgconn)):
            syncs -= result.status == _SYNC
            results.append(result)
    pgconn.exit_pipeline_mode()
    for place, result in enumerate(results):
        if result.status == _FATAL:
            connection.prologue_failed = place < opening
            raise errors.error_from_result(result, encoding=pgconn._encoding)
    return results


def is_script(query: PostgresQuery) -> bool:
    """Whether the text may hold several statements, which only the simple protocol takes."""
    return not query.params and b";" in query.query.rstrip(b"; \t\r\n")


def position_of(result: PGresult, system: int) -> WalPosition | None:
    """Return the place in the log that a result names, if it names one."""
    file, lsn = result.get_value(0, 0), result.get_value(0, 1)
    if file is None or lsn is None:
        return None
    # The first eight hexadecimal digits of a segment's name are its timeline (PostgreSQL, "WAL Internals").
    return WalPosition(int(file[:8], 16), WalPosition.parse_lsn(lsn.decode()), system)


def watched(generator: PQGen[Any], watch: Callable[[float], None], wanted: Any = None) -> PQGen[Any]:
    """Drive a generator, telling ``watch`` whenever psycopg's wait ran out without news from the server.

    Args:
        generator: What to drive.
        watch: What to tell; it raises to give up.
        wanted: What the generator waits for, if it was begun already.
    """
    quiet_since: float | None = None
    try:
        wanted = wanted or next(generator)
        while True:
            ready = yield wanted
            if ready:
                quiet_since = None
            else:
                now = time.monotonic()
                quiet_since = quiet_since or now
                watch(now - quiet_since)
            wanted = generator.send(ready)
    except StopIteration as stop:
        return stop.value
