"""Legal holds: what must not be retired or dropped, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import psycopg

from equitie_data.errors import MaintenanceError
from equitie_data.maintenance.session import reason_of

if TYPE_CHECKING:
    import datetime as dt

    from psycopg import Connection

__all__ = ["LegalHold", "list_holds", "place_hold", "release_hold"]


@attrs.frozen(kw_only=True)
class LegalHold:
    """One hold.

    Attributes:
        hold_id: Its key; ``None`` until it is placed.
        reason: Why, such as the number of a case.
        placed_by: By whose order.
        table: The table it is about, with its schema; ``None`` for all.
        first_day: The first day it is about; ``None``: from the beginning.
        last_day: The last day; ``None``: without end.
        investor_id: Only partitions with rows of this investor; tables that cannot tell are kept as a whole.
        deal_id: The same for a deal.
        placed_at: When.
        released_by: Who ended it; ``None`` while it is in force.
        released_at: When.
    """

    hold_id: int | None = None
    reason: str
    placed_by: str
    table: str | None = None
    first_day: dt.date | None = None
    last_day: dt.date | None = None
    investor_id: int | None = None
    deal_id: int | None = None
    placed_at: dt.datetime | None = None
    released_by: str | None = None
    released_at: dt.datetime | None = None

    def describe_scope(self) -> str:
        """Return what it keeps, in words."""
        what = [self.table or "every table"]
        if self.investor_id is not None:
            what.append(f"with rows of investor {self.investor_id}")
        if self.deal_id is not None:
            what.append(f"with rows of deal {self.deal_id}")
        if self.first_day is not None:
            what.append(f"from {self.first_day}")
        if self.last_day is not None:
            what.append(f"to {self.last_day}")
        return ", ".join(what)


def place_hold(conn: Connection[Any], hold: LegalHold) -> int:
    """Place a hold and return its key; it is in force at once.

    Raises:
        MaintenanceError: It would keep nothing, or contradicts itself.
    """
    try:
        row = conn.execute(
            "SELECT equitie_private.place_legal_hold(%s, %s, %s, %s, %s, %s, %s)",
            [
                hold.reason,
                hold.placed_by,
                hold.table,
                hold.first_day,
                hold.last_day,
                hold.investor_id,
                hold.deal_id,
            ],
        ).fetchone()
    except (psycopg.errors.InvalidParameterValue, psycopg.errors.CheckViolation) as error:
        raise MaintenanceError(f"The hold was not placed: {reason_of(error)}.") from error
    if row is None:
        raise AssertionError("a function returns a row")
    return int(row[0])


def release_hold(conn: Connection[Any], hold_id: int, released_by: str) -> None:
    """End a hold.

    Raises:
        MaintenanceError: There is none in force with this key.
    """
    row = conn.execute("SELECT equitie_private.release_legal_hold(%s, %s)", [hold_id, released_by]).fetchone()
    if row != (True,):
        raise MaintenanceError(f"There is no legal hold {hold_id} in force.")


def list_holds(conn: Connection[Any], *, released: bool = False) -> tuple[LegalHold, ...]:
    """Return the holds in force, or all that ever were."""
    rows = conn.execute(
        "SELECT h.hold_id, h.reason, h.placed_by, h.parent, h.first_day, h.last_day, h.investor_id, h.deal_id,"
        " h.placed_at, h.released_by, h.released_at"
        " FROM equitie_private.legal_holds AS h WHERE %s OR h.released_at IS NULL ORDER BY h.hold_id",
        [released],
    )
    names = [field.name for field in attrs.fields(LegalHold)]
    return tuple(LegalHold(**dict(zip(names, row, strict=True))) for row in rows)
