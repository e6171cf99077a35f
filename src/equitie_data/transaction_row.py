"""A row of ``transactions_clean`` as a value, and the statements that read one by its id."""

from __future__ import annotations

import datetime as dt
import functools
import operator
from decimal import Decimal  # noqa: TC003 - attrs resolves the annotations of its classes
from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg.rows import args_row

from equitie_data.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BY_ID", "CORRECT_DATE", "IDS", "PLACE", "ROWS", "TransactionRow", "by_id_in_month", "checked_id", "places"]

IDS: Final = range(1, 2**63)
"""What can be an id at all."""


@attrs.frozen
class TransactionRow:
    """A row of ``transactions_clean``. Its repr names the transaction, and nothing of what it is about.

    Attributes:
        transaction_id: Key; stays when the date is corrected.
        deal_id: The deal.
        investor_id: The investor.
        transaction_date: Day of the transaction.
        transaction_type: primary, secondary, advisory or subnominee.
        status: pending, completed, cancelled or failed.
        units: Units bought.
        unit_price: Price of one unit, in ``currency``.
        gross_capital: Capital before fees, in ``currency``.
        net_capital: Capital after fees, in ``currency``.
        amount: Amount, in ``currency``.
        currency: ISO 4217 code.
        admin_fee: Administration fee, in ``currency``.
        management_fee_percent: Management fee.
        performance_fee_percent: Performance fee.
        structuring_fee_percent: Structuring fee.
        premium_fee_percent: Premium fee.
        parent_transaction_id: Transaction this one derives from.
        created_at: When the row was made.
        updated_at: When the row last changed.
    """

    transaction_id: int
    deal_id: int = attrs.field(repr=False)
    investor_id: int = attrs.field(repr=False)
    transaction_date: dt.date
    transaction_type: str = attrs.field(repr=False)
    status: str = attrs.field(repr=False)
    units: Decimal | None = attrs.field(repr=False)
    unit_price: Decimal | None = attrs.field(repr=False)
    gross_capital: Decimal | None = attrs.field(repr=False)
    net_capital: Decimal | None = attrs.field(repr=False)
    amount: Decimal = attrs.field(repr=False)
    currency: str = attrs.field(repr=False)
    admin_fee: Decimal | None = attrs.field(repr=False)
    management_fee_percent: Decimal | None = attrs.field(repr=False)
    performance_fee_percent: Decimal | None = attrs.field(repr=False)
    structuring_fee_percent: Decimal | None = attrs.field(repr=False)
    premium_fee_percent: Decimal | None = attrs.field(repr=False)
    parent_transaction_id: int | None = attrs.field(repr=False)
    created_at: dt.datetime = attrs.field(repr=False)
    updated_at: dt.datetime = attrs.field(repr=False)


_COLUMNS: Final = ", ".join(f"t.{field.name}" for field in attrs.fields(TransactionRow))
BY_ID: Final = f"SELECT {_COLUMNS} FROM public.get_transaction(%s) AS t".encode()
CORRECT_DATE: Final = (
    "UPDATE public.transactions_clean AS t SET transaction_date = %s "
    f"WHERE t.transaction_id = %s AND t.transaction_date = %s RETURNING {_COLUMNS}"
).encode()
PLACE: Final = b"SELECT t.transaction_date FROM public.get_transaction(%s) AS t"
ROWS: Final = args_row(TransactionRow)


@functools.lru_cache(maxsize=256)
def by_id_in_month(year: int, month: int) -> bytes:
    """Return the statement that looks for an id in one month.

    Args:
        year: The month's year.
        month: From 1 to 12.
    """
    # The month stands in the text: prepared, the statement has one plan for one partition. With the date as a
    # parameter every call would be planned anew, which takes longer than the lookup, or lock every partition.
    first = dt.date(year, month, 1)
    last = (first + dt.timedelta(days=31)).replace(day=1) - dt.timedelta(days=1)
    return (
        f"SELECT {_COLUMNS} FROM public.transactions_clean AS t "
        f"WHERE t.transaction_id = %s AND t.transaction_date BETWEEN '{first}' AND '{last}'"
    ).encode()


def checked_id(transaction_id: int) -> int:
    """Return an id as an integer.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        return operator.index(transaction_id)
    except TypeError:
        raise ConfigurationError("A transaction id must be an integer.") from None


def places(days: Mapping[int, dt.date]) -> dict[str, Any]:
    """Return the parameters of the query ``transactions_at_places``.

    Args:
        days: The day each id is looked for on.
    """
    return {"ids": list(days), "days": list(days.values()), "distinct_days": sorted(set(days.values()))}
