"""Who may do what, written from the platform's own words and from nothing in sql/: the model the database is held to.

Investors read their own transactions, the deals they have one in, and their own row, of which they edit four columns.
A viewer with a link reads the same and edits nothing. Companies are everybody's to read. Staff read all of that; admins
write it, but neither keys nor times. The audit log and the monitor's tables are read by auditors and admins and written
by nobody. Everybody reads their own profile, admins all of them; nobody writes their own. Admins appoint everybody who
is no admin, superadmins admins too. The application itself, as the service, does what no person may: it deletes, and
it keeps the books of imports. Whoever is inactive, or nobody at all, may do nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

__all__ = ["DENIED", "READ", "ROLES", "Outcome", "Person", "Row", "deletes", "inserts", "selects", "updates"]

DENIED: Literal["denied"] = "denied"
Outcome: TypeAlias = "int | str"  # rows, or that it is denied

ROLES = ("viewer", "investor", "analyst", "manager", "auditor", "admin", "superadmin")
STAFF = frozenset({"analyst", "manager", "auditor", "admin", "superadmin"})
ADMINS = frozenset({"admin", "superadmin"})
AUDITORS = ADMINS | {"auditor"}

# Sums of everybody's transactions: for those who see them all.
TOTALS = frozenset({"transaction_months", "transaction_month_totals", "transaction_month_changes"})
MONITORING = frozenset({"query_stats", "query_metrics", "system_metrics", "performance_alerts"})
BUSINESS = {
    "companies_clean": "company_id",
    "deals_clean": "deal_id",
    "investors_clean": "investor_id",
    "transactions_clean": "transaction_id",
}
BOOKS = frozenset({"import_runs", "imported_rows"})
# Every other table is read through functions, or by its owner alone.
READ = {*BUSINESS, "user_profiles", "audit_logs", "stray_transactions", *MONITORING, *TOTALS, *BOOKS}
TIMES = frozenset({"created_at", "updated_at"})
OWN_COLUMNS = frozenset({"full_name", "phone", "nationality", "country_of_residence"})
PROFILE_COLUMNS = frozenset({"email", "role", "investor_id", "company_id", "is_active"})
ALERT_COLUMNS = frozenset({"acknowledged_at", "acknowledged_by", "resolved_at"})


@attrs.frozen
class Person:
    """Somebody who acts: a user with or without a profile, nobody, or the service.

    Attributes:
        user: The login; ``None`` for nobody and for the service.
        role: What the profile says; ``None`` without one.
        active: Whether the profile is active.
        investor: The investor the profile is linked to.
        is_service: Whether it is the application itself.
    """

    user: UUID | None = None
    role: str | None = None
    active: bool = True
    investor: int | None = None
    is_service: bool = False

    @property
    def may_nothing(self) -> bool:
        return not self.is_service and (self.user is None or not self.active)

    @property
    def is_staff(self) -> bool:
        return not self.may_nothing and self.role in STAFF

    @property
    def is_admin(self) -> bool:
        return self.is_staff and self.role in ADMINS

    def appoints(self, role: str | None) -> bool:
        """Whether a profile of this role is theirs to write."""
        return self.is_admin and (role not in ADMINS or self.role == "superadmin")


@attrs.frozen
class Row:
    """A row of a table, with what the rules ask about it.

    Attributes:
        table: The table, without its schema.
        key: A condition that finds the row and no other.
        investor: The investor it belongs to.
        investors: The investors who have a transaction in it, for a deal.
        profile: Whose it is, for a profile.
    """

    table: str
    key: str
    investor: int | None = None
    investors: frozenset[int] = frozenset()
    profile: Person | None = None


def selects(actor: Person, row: Row) -> Outcome:
    """Return whether somebody sees a row, or that they may not even ask."""
    table = row.table
    if actor.may_nothing or table not in READ:
        return DENIED
    if actor.is_service:
        return 1
    if table in BOOKS:
        return DENIED
    if table in TOTALS:
        return 1 if actor.is_staff else DENIED
    if table == "audit_logs" or table in MONITORING:
        return int(actor.role in AUDITORS) if actor.is_staff else DENIED
    if table == "user_profiles":
        assert row.profile is not None
        return int(row.profile.user == actor.user or actor.is_admin)
    if actor.is_staff or table == "companies_clean":
        return 1
    if table == "deals_clean":
        return int(actor.investor in row.investors)
    return int(actor.investor is not None and actor.investor == row.investor)


def updates(actor: Person, row: Row, column: str, value: str | None = None) -> Outcome:
    """Return how many rows an UPDATE of one column of one row changes.

    Args:
        actor: Who asks.
        row: What is to be changed.
        column: Which column.
        value: What a profile's role is to become; ``None`` leaves the value as it is.
    """
    table = row.table
    if actor.may_nothing:
        return DENIED
    if actor.is_service:
        writable = (
            table in BUSINESS
            or table in {"user_profiles", "import_runs"}
            or (table == "performance_alerts" and column in ALERT_COLUMNS)
        )
        return 1 if writable else DENIED
    if table == "user_profiles":
        if not actor.is_staff or column not in PROFILE_COLUMNS:
            return DENIED
        assert row.profile is not None
        if row.profile.user == actor.user or not actor.appoints(row.profile.role):
            return 0
        return 1 if value is None or actor.appoints(value) else DENIED
    if actor.is_staff:
        if table not in BUSINESS or column == BUSINESS[table] or column in TIMES:
            return DENIED
        return int(actor.is_admin)
    if table == "investors_clean" and column in OWN_COLUMNS:
        return int(actor.role == "investor" and actor.investor is not None and actor.investor == row.investor)
    return DENIED


def inserts(actor: Person, table: str, columns: Sequence[str], profile: Person | None = None) -> Outcome:
    """Return whether somebody may add a row that names these columns.

    Args:
        actor: Who asks.
        table: Where.
        columns: The columns that are named.
        profile: The profile that is added.
    """
    if actor.may_nothing:
        return DENIED
    if actor.is_service:
        tables = {*BUSINESS, "user_profiles", *BOOKS, *MONITORING} - {"query_stats"}
        return 1 if table in tables else DENIED
    if not actor.is_admin:
        return DENIED
    if table == "user_profiles":
        assert profile is not None
        named = set(columns) <= PROFILE_COLUMNS | {"user_id"}
        return 1 if named and profile.user != actor.user and actor.appoints(profile.role) else DENIED
    if table in BUSINESS:
        return DENIED if {BUSINESS[table], *TIMES} & set(columns) else 1
    return DENIED


def deletes(actor: Person, row: Row) -> Outcome:
    """Return how many rows a DELETE of one row removes."""
    return 1 if actor.is_service and (row.table in BUSINESS or row.table == "user_profiles") else DENIED
