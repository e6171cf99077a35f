"""The rows are copied to a table with a partition for every month, which then takes the name of the old one.

The same for a flat table, and for one whose former rows are one big partition: that cannot give off months bit by bit,
because the narrower bound it would get must be proven before it is attached again, and cannot be while the rows are
still there to be seen.
"""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from equitie_data.conversion.attach import validate_constraints
from equitie_data.conversion.definition import run
from equitie_data.conversion.layout import TABLE, add_months
from equitie_data.conversion.schema import create_functions, create_indexes, record
from equitie_data.conversion.steps import EXCHANGE, MIRROR, create_twin, exchange, tidy
from equitie_data.conversion.twin import access, bind_anew, change_places, create_partitioned, triggers, unbind

if TYPE_CHECKING:
    from equitie_data.conversion.definition import Definition
    from equitie_data.conversion.steps import Job, Step

__all__ = ["COPY", "SPLIT"]

_YEARS = 10  # as migration 0004: older rows wait in the default partition, since every partition costs locks
_MONTHS_AHEAD = 12


def _twin(job: Job) -> None:
    months = []
    month, last = _span(job)
    while month <= last:
        months.append(month)
        month = add_months(month, 1)
    create_twin(job, lambda definition: create_partitioned(job.conn, definition, months, indexed=False, wide=True))


def _span(job: Job) -> tuple[dt.date, dt.date]:
    """Return the first and the last month that get partitions; those the table has already are among them."""
    today = dt.date.today()  # noqa: DTZ011 - months are not that exact
    (oldest,) = run(job.conn, f"SELECT min(transaction_date) FROM {TABLE} WHERE isfinite(transaction_date)").fetchone()
    first = max(min(oldest or today, today), dt.date(today.year - _YEARS, today.month, 1)).replace(day=1)
    (end,) = run(
        job.conn,
        "SELECT max(b.to_key)::date FROM equitie_private.month_partition_bounds"
        f"('{TABLE}') AS b WHERE isfinite(b.to_key)",
    ).fetchone()
    ahead = add_months(today, _MONTHS_AHEAD)
    return first, max(ahead, add_months(end, -1)) if end else ahead


def _exchange(job: Job) -> None:
    def compose(definition: Definition) -> list[str]:
        return [
            *unbind(definition),
            *access(definition),
            *triggers(definition),
            *change_places(job.conn, definition),
            *bind_anew(definition, by_id=False),
        ]

    exchange(job, compose, before=lambda: record(job))


_LAST: tuple[Step, ...] = (("twin", _twin), *MIRROR, (EXCHANGE, _exchange), ("tidy", tidy))

COPY: tuple[Step, ...] = (
    ("functions", lambda job: create_functions(job.conn)),
    ("missing indexes", lambda job: create_indexes(job.conn)),
    ("constraints", validate_constraints),
    *_LAST,
)
"""The steps of copying a flat table, in order."""

SPLIT: tuple[Step, ...] = _LAST
"""The steps of splitting an attached one, in order."""
