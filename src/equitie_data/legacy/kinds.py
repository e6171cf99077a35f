"""What the old tables hold, by kind of row, and which clean column takes it.

A clean column is filled from the first of its legacy columns that a table has; where a row has nothing there, from
the next. ``parent`` takes the value over from the primary transaction the row refers to.
"""

from __future__ import annotations

from typing import Final

import attrs

__all__ = ["KINDS", "SOURCES", "TRANSACTION_KINDS", "Field", "Kind"]


@attrs.frozen
class Field:
    """One clean column and what may fill it.

    Attributes:
        column: Name in the clean table.
        type: ``text``, ``integer``, ``numeric``, ``date`` or ``timestamptz``.
        legacy: Names it may have in the old tables, best first.
        required: Whether a row without it is rejected.
        allowed: Values it may have.
        case: ``lower`` or ``upper``: how its values are written.
        default: What an empty one becomes.
        refers_to: Kind whose id, or name, it holds.
        parent: Whether an empty one is taken from the primary transaction.
        product: Two fields whose product it is when it is empty.
    """

    column: str
    type: str = "text"
    legacy: tuple[str, ...] = ()
    required: bool = False
    allowed: tuple[str, ...] = ()
    case: str | None = None
    default: str | None = None
    refers_to: str | None = None
    parent: bool = False
    product: tuple[str, str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Legacy columns in the order they are tried."""
        return self.legacy or (self.column,)


@attrs.frozen(kw_only=True)
class Kind:
    """One kind of row.

    Attributes:
        name: As in ``legacy_ids.kind``.
        plural: As people say it.
        table: The clean table, in ``public``.
        key: Its id column.
        key_names: Names the id may have in the old tables.
        fields: Its other columns.
        unique: A column, besides the id, that no two rows may share.
        label: Column that names a row, for references by name.
        carried: Known legacy columns without a clean one, which go on beside the row.
        parent_names: Legacy columns that hold the primary transaction a row belongs to.
        resolved: Legacy columns with names of investors that must be known.
    """

    name: str
    plural: str
    table: str
    key: str
    key_names: tuple[str, ...]
    fields: tuple[Field, ...]
    unique: str | None = None
    label: str | None = None
    carried: tuple[str, ...] = ()
    parent_names: tuple[str, ...] = ()
    parent_required: bool = False
    resolved: tuple[str, ...] = ()

    @property
    def is_transaction(self) -> bool:
        """Whether its rows stand in ``transactions_clean``."""
        return self.table == "transactions_clean"


_STAMPS: Final = (Field("created_at", "timestamptz"), Field("updated_at", "timestamptz"))
_PERCENTS: Final = tuple(
    Field(f"{fee}_fee_percent", "numeric") for fee in ("management", "performance", "structuring", "premium")
)

_COMPANY: Final = Kind(
    name="company",
    plural="companies",
    table="companies_clean",
    key="company_id",
    key_names=("company_id", "id"),
    unique="company_name",
    label="company_name",
    fields=(
        Field("company_name", legacy=("company_name", "name"), required=True),
        Field("company_type", allowed=("startup", "growth", "mature", "holding", "spv"), case="lower"),
        Field("company_sector", legacy=("company_sector", "sector")),
        Field("country_incorporation", legacy=("country_incorporation", "country")),
        Field("company_website", legacy=("company_website", "website")),
        Field("funding_round_stage"),
        Field("founding_year", "integer"),
        Field("latest_valuation_mil", "numeric"),
        *_STAMPS,
    ),
)

_DEAL: Final = Kind(
    name="deal",
    plural="deals",
    table="deals_clean",
    key="deal_id",
    key_names=("deal_id", "id"),
    unique="deal_code",
    label="deal_name",
    fields=(
        Field("deal_code"),
        Field("deal_name", legacy=("deal_name", "name"), required=True),
        Field("deal_type", allowed=("primary", "secondary", "direct", "fund", "advisory"), case="lower"),
        Field("deal_category", allowed=("INVESTMENT", "ADVISORY", "SPECIAL"), case="upper"),
        Field(
            "deal_status",
            required=True,
            default="sourcing",
            case="lower",
            allowed=("sourcing", "due_diligence", "closing", "active", "exited", "cancelled"),
        ),
        Field("underlying_company_id", legacy=("underlying_company_id", "underlying_company"), refers_to="company"),
        Field("partner_company_id", legacy=("partner_company_id", "partner_company"), refers_to="company"),
        Field("holding_entity", refers_to="company"),
        Field("deal_date", "date"),
        Field("closing_date", "date", legacy=("closing_date", "deal_closing_date")),
        Field("exit_date", "date"),
        Field("initial_unit_price", "numeric"),
        Field("gross_capital", "numeric"),
        Field("initial_net_capital", "numeric"),
        Field("deal_currency", case="upper", allowed=("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD")),
        *_PERCENTS,
        *_STAMPS,
    ),
)

_INVESTOR: Final = Kind(
    name="investor",
    plural="investors",
    table="investors_clean",
    key="investor_id",
    key_names=("investor_id", "id"),
    unique="primary_email",
    label="full_name",
    fields=(
        Field("full_name", legacy=("full_name", "name"), required=True),
        Field("primary_email", legacy=("primary_email", "email")),
        Field(
            "investor_type",
            case="lower",
            allowed=("individual", "institutional", "family_office", "fund", "corporate"),
        ),
        Field(
            "investor_status",
            required=True,
            default="PENDING",
            case="upper",
            allowed=("ACTIVE", "INACTIVE", "SUSPENDED", "PENDING"),
        ),
        Field(
            "kyc_status",
            required=True,
            default="pending",
            case="lower",
            allowed=("pending", "verified", "rejected", "expired"),
        ),
        Field("nationality"),
        Field("country_of_residence"),
        Field("phone"),
        Field("join_date", "date"),
        *_STAMPS,
    ),
)


def _status(*, parent: bool = False) -> Field:
    # Nothing said is "completed", as in the CSV import: what the old tables list has happened.
    return Field(
        "status",
        required=True,
        default="completed",
        case="lower",
        parent=parent,
        allowed=("pending", "completed", "cancelled", "failed"),
    )


def _currency(*, parent: bool = False) -> Field:
    return Field(
        "currency",
        legacy=("currency", "transaction_currency"),
        required=True,
        default="USD",
        case="upper",
        parent=parent,
        allowed=("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD"),
    )


_PRIMARY: Final = Kind(
    name="primary",
    plural="primary transactions",
    table="transactions_clean",
    key="transaction_id",
    key_names=("transaction_id", "id"),
    parent_names=("parent_transaction_id",),
    carried=(
        "nominee",
        "term_sheet",
        "closing_agreement",
        "transfer_due",
        "initial_amount_received",
        "management_fee_discount_percent",
        "performance_fee_discount_percent",
        "structuring_fee_discount_percent",
        "premium_fee_discount_percent",
        "admin_fee_discount_percent",
    ),
    fields=(
        Field("deal_id", legacy=("deal_id", "deal"), required=True, refers_to="deal"),
        Field("investor_id", legacy=("investor_id", "investor"), required=True, refers_to="investor"),
        Field("transaction_date", "date", required=True),
        _status(),
        Field("units", "numeric"),
        Field("unit_price", "numeric"),
        Field("gross_capital", "numeric"),
        Field("net_capital", "numeric", legacy=("net_capital", "initial_net_capital")),
        Field("amount", "numeric", legacy=("amount", "gross_capital"), required=True),
        _currency(),
        Field("admin_fee", "numeric"),
        *_PERCENTS,
        *_STAMPS,
    ),
)

_SUBNOMINEE: Final = Kind(
    name="subnominee",
    plural="subnominee transactions",
    table="transactions_clean",
    key="transaction_id",
    key_names=("subnominee_id", "transaction_id", "id"),
    parent_names=("transaction", "parent_transaction_id"),
    parent_required=True,
    carried=(
        "gross_capital_nominee",
        "initial_net_capital_nominee",
        "subnominee_share_of_ticket",
        *_PRIMARY.carried,
    ),
    fields=(
        Field("deal_id", legacy=("deal_id", "deal_link"), required=True, refers_to="deal", parent=True),
        Field(
            "investor_id",
            legacy=("sub_nominee_investor_link", "investor_id"),
            required=True,
            refers_to="investor",
        ),
        Field("transaction_date", "date", required=True, parent=True),
        _status(parent=True),
        Field("units", "numeric"),
        Field("unit_price", "numeric"),
        Field("gross_capital", "numeric", legacy=("gross_capital_subnominee", "gross_capital")),
        Field("net_capital", "numeric", legacy=("net_capital", "initial_net_capital_subnominee")),
        Field("amount", "numeric", legacy=("amount", "gross_capital_subnominee", "gross_capital"), required=True),
        _currency(parent=True),
        Field("admin_fee", "numeric"),
        *_PERCENTS,
        *_STAMPS,
    ),
)

# The row is the buyer's: it is they who put money in. The seller stands in the primary transaction it refers to.
_SECONDARY: Final = Kind(
    name="secondary",
    plural="secondary transactions",
    table="transactions_clean",
    key="transaction_id",
    key_names=("secondary_id", "transaction_id", "id"),
    parent_names=("transaction", "parent_transaction_id"),
    parent_required=True,
    resolved=("seller_investor_id", "seller_name"),
    carried=(
        "deal_name_link",
        "seller_investor_id",
        "seller_name",
        "subnominee_seller",
        "unit_price",
        "initial_net_capital",
        *_PRIMARY.carried,
    ),
    fields=(
        Field("deal_id", legacy=("deal_id",), required=True, refers_to="deal", parent=True),
        Field(
            "investor_id",
            legacy=("buyer_investor_id", "buyer_name", "investor_id"),
            required=True,
            refers_to="investor",
        ),
        Field("transaction_date", "date", legacy=("secondary_transaction_date", "transaction_date"), required=True),
        _status(),
        Field("units", "numeric", legacy=("number_of_unit_sold", "units")),
        Field("unit_price", "numeric", legacy=("price_per_unit_sold",)),
        Field("gross_capital", "numeric"),
        Field("net_capital", "numeric"),
        Field("amount", "numeric", required=True, product=("units", "unit_price")),
        _currency(parent=True),
        Field("admin_fee", "numeric"),
        *_PERCENTS,
        *_STAMPS,
    ),
)

_ADVISORY: Final = Kind(
    name="advisory",
    plural="advisory transactions",
    table="transactions_clean",
    key="transaction_id",
    key_names=("advisory_id", "transaction_id", "id"),
    parent_names=("parent_transaction_id",),
    carried=_PRIMARY.carried,
    fields=(
        Field("deal_id", legacy=("advisory_deal", "deal_link", "deal_id"), required=True, refers_to="deal"),
        Field("investor_id", legacy=("investor_id", "holding_entity"), required=True, refers_to="investor"),
        Field("transaction_date", "date", legacy=("transaction_date", "created_at"), required=True),
        _status(),
        Field("units", "numeric", legacy=("number_of_shares", "units")),
        Field("unit_price", "numeric", legacy=("granted_share_price", "unit_price")),
        Field("gross_capital", "numeric"),
        Field("net_capital", "numeric"),
        Field(
            "amount",
            "numeric",
            legacy=("amount", "advisory_cash_revenue"),
            required=True,
            product=("units", "unit_price"),
        ),
        _currency(),
        Field("admin_fee", "numeric"),
        *_PERCENTS,
        *_STAMPS,
    ),
)

KINDS: Final = {kind.name: kind for kind in (_COMPANY, _DEAL, _INVESTOR, _PRIMARY, _SUBNOMINEE, _SECONDARY, _ADVISORY)}
"""Every kind, in the order in which they are taken over: what is referred to comes first."""

TRANSACTION_KINDS: Final = tuple(name for name, kind in KINDS.items() if kind.is_transaction)

SOURCES: Final = (
    ("public", "companies.company", "company"),
    ("core", "companies", "company"),
    ("public", "deals.deal", "deal"),
    ("core", "deals", "deal"),
    ("public", "investors.investor", "investor"),
    ("core", "investors", "investor"),
    ("public", "transactions.transaction.primary", "primary"),
    ("public", "transactions", "primary"),
    ("core", "transactions", "primary"),
    ("public", "transactions.transaction.subnominee", "subnominee"),
    ("public", "transactions.transaction.secondary", "secondary"),
    ("public", "transactions.transaction.advisory", "advisory"),
)
"""Schema, table and kind of what the platform had. Of copies that agree, the first one's is taken."""
