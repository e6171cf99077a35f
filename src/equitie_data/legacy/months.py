"""Partitions for old transactions: one for each month, or one for all of them where there are few."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg import sql

from equitie_data import _sql
from equitie_data.csv_import import month_ranges
from equitie_data.legacy.composing import name

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from equitie_data.legacy.staging import Stage

__all__ = ["Months", "ensure", "survey"]

# An empty partition takes some 100 kB, for its indexes: at this many rows a month they stop mattering.
_WORTH_A_MONTH: Final = 5_000
_MONTHS_AHEAD: Final = 12


@attrs.frozen(kw_only=True)
class Months:
    """What was made.

    Attributes:
        created: Partitions that were made.
        together: The partition that holds all old months, if one does.
        older_than_retention: Rows from before seven years ago.
    """

    created: int
    together: str | None
    older_than_retention: int


def ensure(conn: Connection[Any], stage: Stage, policy: str, transaction: Callable[[], Any]) -> Months:
    """Make the partitions for what is about to be inserted.

    Args:
        conn: The owner's session.
        stage: The transactions.
        policy: ``auto``, ``each`` or ``one``.
        transaction: Begins a transaction of its own, or a part of the surrounding one.
    """
    found = _months(conn, stage)
    old = sum(row[2] for row in found)
    # What lies further ahead waits in the default partition: a mistyped year must not make months.
    horizon = _add_months(_month(dt.datetime.now(dt.timezone.utc).date()), _MONTHS_AHEAD)
    wanted = {row[0]: row[1] for row in found if row[0] <= horizon}
    bounds = conn.execute(_sql.query("legacy_month_bounds")).fetchall()
    open_months = [m for m in wanted if not any(a <= m and _add_months(m, 1) <= b for a, b in bounds)]
    if not open_months:
        return Months(created=0, together=None, older_than_retention=old)
    first, last = min(open_months), _add_months(max(open_months), 1)
    rows = sum(wanted[month] for month in open_months)
    span = (last.year - first.year) * 12 + last.month - first.month
    one = policy == "one" or (policy == "auto" and rows < span * _WORTH_A_MONTH)
    overlaps = any(a < last and b > first for a, b in bounds)
    if one and not overlaps and not _default_has_rows(conn, first, last):
        with transaction():
            return Months(created=1, together=_attach(conn, first, last), older_than_retention=old)
    created = 0
    for begin, end in month_ranges(open_months):
        with transaction():
            row = conn.execute(_sql.query("import_ensure_partitions"), {"first": begin, "last": end}).fetchone()
            created += int(row[0]) if row else 0
    return Months(created=created, together=None, older_than_retention=old)


def survey(conn: Connection[Any], stage: Stage) -> Months:
    """Say how much is older than what is kept, for a plan; makes nothing."""
    return Months(created=0, together=None, older_than_retention=sum(row[2] for row in _months(conn, stage)))


def _months(conn: Connection[Any], stage: Stage) -> list[tuple[Any, ...]]:
    """Return every month that rows are to be inserted into, its rows, and those older than seven years."""
    return conn.execute(
        sql.SQL(
            "SELECT date_trunc('month', s.transaction_date)::date, count(*),"
            " count(*) FILTER (WHERE s.transaction_date < current_date - interval '7 years')"
            " FROM equitie_private.legacy_ids AS m"
            " JOIN {} AS s"
            " ON s.kind = m.kind AND s.legacy_id = m.legacy_id AND s.source = m.source AND s.place = m.place"
            " WHERE m.outcome IN ('inserted', 'replaced')"
            " AND m.kind IN ('primary', 'subnominee', 'secondary', 'advisory')"
            " GROUP BY 1 ORDER BY 1"
        ).format(stage.table)
    ).fetchall()


def _default_has_rows(conn: Connection[Any], first: dt.date, last: dt.date) -> bool:
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM equitie_part.transactions_clean_default AS d"
        " WHERE d.transaction_date >= %s AND d.transaction_date < %s)",
        (first, last),
    ).fetchone()
    return row == (True,)


def _attach(conn: Connection[Any], first: dt.date, last: dt.date) -> str:
    """Make one partition from the first month to before the last, as `ensure_month_partitions` makes a month."""
    table = f"transactions_clean_before_{last:%Y_%m}"
    partition = name("equitie_part", table)
    statements = [
        sql.SQL("CREATE TABLE {} (LIKE public.transactions_clean INCLUDING ALL EXCLUDING IDENTITY)").format(partition),
        sql.SQL("REVOKE ALL ON {} FROM PUBLIC, anon, authenticated, equitie_staff, service_role").format(partition),
        sql.SQL("ALTER TABLE public.transactions_clean ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})").format(
            partition, sql.Literal(first.isoformat()), sql.Literal(last.isoformat())
        ),
        sql.SQL("COMMENT ON TABLE {} IS {}").format(
            partition, sql.Literal(f"Rows of public.transactions_clean from {first} to before {last}.")
        ),
        sql.SQL(
            "SELECT equitie_private.copy_statement_triggers("
            "'equitie_part.transactions_clean_default'::regclass, {}::regclass)"
        ).format(sql.Literal(f"equitie_part.{table}")),
    ]
    for statement in statements:
        conn.execute(statement)
    return f"equitie_part.{table}"


def _month(day: dt.date) -> dt.date:
    return day.replace(day=1)


def _add_months(month: dt.date, count: int) -> dt.date:
    years, zero_based = divmod(month.month - 1 + count, 12)
    return month.replace(year=month.year + years, month=zero_based + 1)
