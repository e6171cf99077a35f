"""What the platform asks of its transactions all day, timed on the flat table, the partitioned one and the library.

Two times are taken of every call: on the clock, and on the processor (of the server's process and of ours together,
where Linux tells). On a machine with neighbours the first says how long one waits, the second what the call costs.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_DNS, UUID, uuid5

import attrs
import psycopg

from equitie_data import acting_as, as_service

if TYPE_CHECKING:
    from collections.abc import Callable

    from equitie_data import Database

__all__ = ["PATTERNS", "Pattern", "drawn_parameters", "percentiles", "timings"]

Connection = psycopg.Connection[Any]
Values = dict[str, Any]

_TURN = 50
_UNCOUNTED = 10
_STAFF = uuid5(NAMESPACE_DNS, "staff.example")
_SHOWN = (
    "SELECT t.transaction_id, t.deal_id, t.investor_id, t.transaction_date, t.amount, t.currency, t.status FROM {} AS t"
)
_MONTH = (
    "SELECT date_trunc('month', t.transaction_date)::date, t.transaction_type, t.status, t.currency, count(*),"
    " sum(t.amount), sum(t.gross_capital), sum(t.net_capital), sum(t.admin_fee) FROM {} AS t"
    " WHERE t.transaction_date >= date_trunc('month', %s::date)"
    " AND t.transaction_date < date_trunc('month', %s::date) + interval '1 month' GROUP BY 1, 2, 3, 4"
)


@attrs.frozen
class Pattern:
    """A query of the platform.

    Attributes:
        name: What it is called.
        query: Its text; ``{}`` stands for the table.
        parameters: What its parameters are, of ``deal``, ``investor``, ``type``, ``day``, ``later`` (a quarter),
            ``earlier`` (a year) and ``id``.
        flat_query: What asks the same of the flat table, where that is another text.
        of_investors: Whether investors ask it, too.
    """

    name: str
    query: str
    parameters: tuple[str, ...]
    flat_query: str | None = None
    of_investors: bool = False


PATTERNS = (
    Pattern(
        "investor history, newest 50",
        f"{_SHOWN} WHERE t.investor_id = %s ORDER BY t.transaction_date DESC LIMIT 50",
        ("investor",),
        of_investors=True,
    ),
    Pattern(
        "investor, newest 50 of a quarter",
        f"{_SHOWN} WHERE t.investor_id = %s AND t.transaction_date >= %s AND t.transaction_date < %s"
        " ORDER BY t.transaction_date DESC LIMIT 50",
        ("investor", "day", "later"),
        of_investors=True,
    ),
    Pattern(
        "deal by type, any 50",
        f"{_SHOWN} WHERE t.deal_id = %s AND t.transaction_type = %s LIMIT 50",
        ("deal", "type"),
    ),
    Pattern(
        "deal by type, newest 50 of a year",
        f"{_SHOWN} WHERE t.deal_id = %s AND t.transaction_type = %s AND t.transaction_date > %s"
        " AND t.transaction_date <= %s ORDER BY t.transaction_date DESC LIMIT 50",
        ("deal", "type", "earlier", "day"),
    ),
    Pattern(
        "deal by type, newest 50 ever",
        f"{_SHOWN} WHERE t.deal_id = %s AND t.transaction_type = %s ORDER BY t.transaction_date DESC LIMIT 50",
        ("deal", "type"),
    ),
    Pattern(
        "type by date, first 50",
        f"{_SHOWN} WHERE t.transaction_type = %s AND t.transaction_date >= %s AND t.transaction_date < %s"
        " ORDER BY t.transaction_date LIMIT 50",
        ("type", "day", "later"),
    ),
    Pattern(
        "active only, an investor in a deal",
        "SELECT t.currency, count(*), sum(t.amount) FROM {} AS t"
        " WHERE t.deal_id = %s AND t.investor_id = %s AND t.status NOT IN ('cancelled', 'failed') GROUP BY t.currency",
        ("deal", "investor"),
        of_investors=True,
    ),
    Pattern("newest 50 of everybody", f"{_SHOWN} ORDER BY t.transaction_date DESC LIMIT 50", ()),
    Pattern(
        "one transaction by its id",
        _SHOWN.replace("{}", "public.get_transaction(%s)"),
        ("id",),
        flat_query=f"{_SHOWN} WHERE t.transaction_id = %s",
        of_investors=True,
    ),
    Pattern("report of one month", "SELECT * FROM public.month_report(%s, %s)", ("day", "day"), flat_query=_MONTH),
)


def drawn_parameters(owner: Connection, pattern: Pattern, count: int) -> list[Values]:
    """Draw values from the table's own rows: who is in it more often is asked for more often.

    The investors get a login, and one member of staff gets another.
    """
    rows = owner.execute(
        "SELECT t.deal_id, t.investor_id, t.transaction_type, t.transaction_date, t.transaction_id"
        " FROM public.transactions_clean AS t TABLESAMPLE SYSTEM (2) LIMIT 200000"
    ).fetchall()
    drawn = []
    for deal, investor, kind, day, key in random.Random(pattern.name).choices(rows, k=count):
        span = {"later": day + dt.timedelta(days=91), "earlier": day - dt.timedelta(days=365)}
        drawn.append({"deal": deal, "investor": investor, "type": kind, "day": day, "id": key, **span})
    people = [(_login(investor), "investor", investor) for investor in {each["investor"] for each in drawn}]
    for user, role, investor in [*people, (_STAFF, "analyst", None)]:
        owner.execute(
            "INSERT INTO public.user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            [user, f"{user}@example.com", role, investor],
        )
    owner.execute("ANALYZE public.user_profiles")
    return drawn


def timings(
    owner: Connection, dsn: str, database: Database, pattern: Pattern, drawn: list[Values]
) -> dict[str, list[tuple[float, float | None]]]:
    """Return the milliseconds of every call, on the clock and on the processor, by contestant.

    All ask with the same parameters: once unmeasured, then in turns of fifty. A turn begins with calls that are not
    counted, because a prepared statement under row-level security is planned anew for another role.

    Args:
        owner: A connection of the tables' owner.
        dsn: The owner's connection string, for another one.
        database: The library; its pool has one connection.
        pattern: The query.
        drawn: Its parameters.
    """
    partitioned = pattern.query.format("public.transactions_clean")
    flat = (pattern.flat_query or pattern.query).format("public.transactions_flat")

    def library(who: Callable[[Values], UUID]) -> Callable[[Values, list[Any]], Any]:
        def read(values: Values, given: list[Any]) -> Any:
            with acting_as(who(values)):
                return database.execute_read(partitioned, given)

        return read

    with as_service("benchmark"):
        ((backend,),) = database.execute_read("SELECT pg_backend_pid()")
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        asking: dict[str, tuple[int, Callable[[Values, list[Any]], Any]]] = {
            "flat, owner": (other.info.backend_pid, lambda _, given: other.execute(flat, given).fetchall()),
            "partitioned, owner": (
                owner.info.backend_pid,
                lambda _, given: owner.execute(partitioned, given).fetchall(),
            ),
            "library, staff": (backend, library(lambda _: _STAFF)),
        }
        if pattern.of_investors:
            asking["library, investor"] = (backend, library(lambda values: _login(values["investor"])))
        figures: dict[str, list[tuple[float, float | None]]] = {name: [] for name in asking}
        for measured in (False, True):
            for turn in range(0, len(drawn), _TURN):
                for name, (process, ask) in asking.items():
                    for number, values in enumerate([*drawn[turn : turn + _UNCOUNTED], *drawn[turn : turn + _TURN]]):
                        given = [values[parameter] for parameter in pattern.parameters]
                        busy, started = _processor(process), time.perf_counter()
                        ask(values, given)
                        passed, spent = time.perf_counter() - started, _processor(process)
                        if measured and number >= _UNCOUNTED:
                            used = None if busy is None or spent is None else (spent - busy) * 1e3
                            figures[name].append((passed * 1e3, used))
    return figures


def percentiles(values: list[float]) -> tuple[float, float]:
    """Return the median and the value that one in a hundred exceeds."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, round(len(ordered) * 0.99))]


def _login(investor: int) -> UUID:
    return uuid5(NAMESPACE_DNS, f"investor-{investor}.example")


def _processor(process: int) -> float | None:
    """Seconds a server process and this thread have spent on a processor."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text("ascii").split()[0]) / 1e9 + time.thread_time()
    except OSError:
        return None
