"""What an old row held beyond the clean columns: a narrow table beside each clean one, made only when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
from psycopg import sql

from equitie_data.legacy.composing import joined, name, raw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equitie_data.legacy.kinds import Kind
    from equitie_data.legacy.sources import Source

__all__ = ["COMPARABLE", "Details", "details_of"]

COMPARABLE: Final = frozenset({
    "bigint", "boolean", "character", "character varying", "date", "double precision", "integer", "money", "numeric",
    "real", "smallint", "text", "timestamp with time zone", "timestamp without time zone", "uuid",
})  # fmt: skip
"""Types whose values are compared as they are; others by their text."""


@attrs.frozen(kw_only=True)
class Details:
    """The table beside a clean one.

    Attributes:
        table: Its name in ``equitie_private``.
        kind: Name of what it goes with: ``company``, ``deal``, ``investor`` or ``transaction``.
        key: Its key, which is the clean table's id.
        clean: The clean table, in ``public``.
        columns: Type by legacy column.
        staged: Name in the staging table by legacy column.
    """

    table: str
    kind: str
    key: str
    clean: str
    columns: dict[str, str]
    staged: dict[str, str]

    @property
    def identifier(self) -> sql.Identifier:
        """The table, for composed SQL."""
        return name("equitie_private", self.table)

    @property
    def is_transactions(self) -> bool:
        """Whether it goes with transactions."""
        return self.kind == "transaction"

    def create(self) -> list[sql.Composed]:
        """Return the statements that make it, with the privileges and policies of what it goes with."""
        columns = [sql.SQL("{} {}").format(name(each), raw(type_)) for each, type_ in self.columns.items()]
        own: list[sql.Composable]
        mine: sql.Composable
        if self.is_transactions:
            # Not a foreign key: one to a partitioned table would need the date too.
            own = [
                sql.SQL("equitie_transaction_id bigint PRIMARY KEY"),
                sql.SQL("equitie_investor_id integer NOT NULL"),
                sql.SQL("equitie_legacy_id bigint"),
            ]
            mine = sql.SQL("equitie_investor_id = (SELECT equitie_private.current_investor_id())")
        else:
            own = [
                sql.SQL("{} integer PRIMARY KEY REFERENCES public.{} ON DELETE CASCADE ON UPDATE CASCADE").format(
                    name(self.own_key), name(self.clean)
                )
            ]
            mine = sql.SQL("EXISTS (SELECT FROM public.{} AS c WHERE c.{} = {})").format(
                name(self.clean), name(self.key), name(self.own_key)
            )
        table = self.identifier
        admin = sql.SQL("(SELECT equitie_private.is_admin())")
        roles = sql.SQL("PUBLIC, anon, authenticated, equitie_staff, service_role")
        policies = [
            ("select_authenticated", "SELECT TO authenticated", sql.SQL("USING ({})").format(mine)),
            ("select_staff", "SELECT TO equitie_staff", sql.SQL("USING (true)")),
            ("insert_staff", "INSERT TO equitie_staff", sql.SQL("WITH CHECK ({})").format(admin)),
            ("update_staff", "UPDATE TO equitie_staff", sql.SQL("USING ({a}) WITH CHECK ({a})").format(a=admin)),
            ("all_service", "ALL TO service_role", sql.SQL("USING (true) WITH CHECK (true)")),
        ]
        return [
            sql.SQL("CREATE TABLE {} ({})").format(table, joined([*own, *columns])),
            sql.SQL("COMMENT ON TABLE {} IS {}").format(
                table,
                sql.Literal(f"What the old tables held about rows of public.{self.clean} beyond its columns."),
            ),
            sql.SQL("REVOKE ALL ON {} FROM {}").format(table, roles),
            sql.SQL("GRANT SELECT ON {} TO authenticated, equitie_staff, service_role").format(table),
            sql.SQL("GRANT INSERT, UPDATE ON {} TO equitie_staff, service_role").format(table),
            sql.SQL("GRANT DELETE ON {} TO service_role").format(table),
            sql.SQL("ALTER TABLE {} ENABLE ROW LEVEL SECURITY").format(table),
            *(
                sql.SQL("CREATE POLICY {} ON {} FOR {} {}").format(
                    name(f"{self.table}_{suffix}"),
                    table,
                    raw(action),
                    rule,
                )
                for suffix, action, rule in policies
            ),
        ]

    @property
    def own_key(self) -> str:
        """Its key column. A prefix keeps it apart from old columns."""
        return f"equitie_{self.key}"


def details_of(kinds: Sequence[Kind], sources: Sequence[Source]) -> Details:
    """Return the table beside the clean table of these kinds."""
    first = kinds[0]
    columns: dict[str, str] = {}
    names = {kind.name for kind in kinds}
    for source in sources:
        if source.kind in names:
            for column in source.carried:
                known = columns.setdefault(column.name, column.type)
                if known != column.type:
                    columns[column.name] = "text"
    kind = "transaction" if first.is_transaction else first.name
    return Details(
        table=f"legacy_{kind}_details",
        kind=kind,
        key=first.key,
        clean=first.table,
        columns=columns,
        staged={column: f"detail_{number}" for number, column in enumerate(columns, start=1)},
    )
