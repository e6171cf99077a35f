"""How a row of an old table is read: SQL that turns it into clean values, or into the reason why it cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
from psycopg import sql

from equitie_data.legacy.composing import joined, name, raw, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equitie_data.legacy.kinds import Field
    from equitie_data.legacy.sources import Column, Source

__all__ = ["Reading", "read_row", "whole"]

_FIRST_DAY: Final = "1000-01-01"
_LAST_DAY: Final = "9006-12-31"


@attrs.frozen
class Reading:
    """The pieces of a statement that reads an old table.

    Attributes:
        read: Value by alias, over the legacy row ``s``: what stands there.
        joins: Joins that look references up, over ``r``, which is what was read.
        reason: Why the row is rejected; NULL when it is not.
        notes: Array of what was left out of a row that is taken.
        values: Clean value by column.
        kind: Kind of the row.
        given: Fields that the table says something about.
    """

    read: dict[str, sql.Composable]
    joins: sql.Composable
    reason: sql.Composable
    notes: sql.Composable
    values: dict[str, sql.Composable]
    kind: sql.Composable
    given: frozenset[str]


def read_row(source: Source, *, looked_up: bool) -> Reading:
    """Compose the reading of a source.

    Args:
        source: The table, or a view that stands in for it.
        looked_up: Whether ids are old ones, to be looked up in ``legacy_ids``; otherwise they are the clean tables'.
    """
    reader = _Reader(source, looked_up)
    for field in source.spec.fields:
        reader.add(field)
    return reader.finish()


def written(column: Column) -> sql.Composable:
    """Return a column's text, NULL when there is nothing in it."""
    return sql.SQL("nullif(btrim(s.{}::text), '')").format(name(column.name))


def numeric(column: Column) -> sql.Composable:
    """Return a column's number, NULL when it cannot be read."""
    if column.is_number:
        return sql.SQL("s.{}::numeric").format(name(column.name))
    return sql.SQL("equitie_private.legacy_numeric(s.{}::text)").format(name(column.name))


def whole(column: Column) -> sql.Composable:
    """Return a column's whole number that fits a bigint, NULL otherwise."""
    if column.type in {"smallint", "integer", "bigint"}:
        return sql.SQL("s.{}::bigint").format(name(column.name))
    number = numeric(column)
    return sql.SQL("CASE WHEN {n} = trunc({n}) AND abs({n}) < 9e18 THEN ({n})::bigint END").format(n=number)


def date(column: Column) -> sql.Composable:
    """Return a column's day, NULL when it cannot be read."""
    if column.type == "date":
        return sql.SQL("s.{}").format(name(column.name))
    if column.type == "timestamp without time zone":
        return sql.SQL("s.{}::date").format(name(column.name))
    if column.type == "timestamp with time zone":
        return sql.SQL("(s.{} AT TIME ZONE 'UTC')::date").format(name(column.name))
    return sql.SQL("equitie_private.legacy_date(s.{}::text)").format(name(column.name))


def moment(column: Column) -> sql.Composable:
    """Return a column's time, NULL when it cannot be read."""
    if column.type == "timestamp with time zone":
        return sql.SQL("s.{}").format(name(column.name))
    if column.type in {"timestamp without time zone", "date"}:
        return sql.SQL("s.{}::timestamp AT TIME ZONE 'UTC'").format(name(column.name))
    return sql.SQL("equitie_private.legacy_timestamp(s.{}::text)").format(name(column.name))


_CONVERSIONS: Final = {"text": written, "integer": numeric, "numeric": numeric, "date": date, "timestamptz": moment}
_NULLS: Final = {
    "text": "text",
    "integer": "numeric",
    "numeric": "numeric",
    "date": "date",
    "timestamptz": "timestamptz",
}


def first_of(values: Sequence[sql.Composable], type_: str) -> sql.Composable:
    """Return the first value that is not NULL."""
    if not values:
        return sql.SQL("NULL::{}").format(raw(type_))
    return values[0] if len(values) == 1 else sql.SQL("coalesce({})").format(joined(values))


_PARENTS: Final = sql.SQL("LEFT JOIN pg_temp.legacy_parents AS p ON p.legacy_id = r.parent_ref")
_PARENTS_NOW: Final = sql.SQL(
    "LEFT JOIN LATERAL (SELECT g.transaction_id AS legacy_id, g.deal_id, g.transaction_date, g.status, g.currency"
    " FROM public.get_transaction(r.parent_ref) AS g WHERE g.transaction_type = 'primary') AS p ON true"
)


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


class _Reader:
    def __init__(self, source: Source, looked_up: bool) -> None:
        self._source = source
        self._looked_up = looked_up
        self._spec = source.spec
        self._read: dict[str, sql.Composable] = {}
        self._joins: list[sql.Composable] = []
        self._reasons: list[tuple[sql.Composable, str]] = []
        self._notes: list[tuple[sql.Composable, str]] = []
        self._values: dict[str, sql.Composable] = {}
        self._given: set[str] = set()
        self._add_key()
        self._add_kind()
        self._add_parent()
        self._add_resolved()

    def finish(self) -> Reading:
        reasons = [sql.SQL("WHEN {} THEN {}").format(check, text(why)) for check, why in self._reasons]
        notes = [sql.SQL("CASE WHEN {} THEN {} END").format(check, text(why)) for check, why in self._notes]
        return Reading(
            read=self._read,
            joins=joined(self._joins, "\n"),
            reason=sql.SQL("CASE {} END").format(joined(reasons, "\n")) if reasons else sql.SQL("NULL::text"),
            notes=sql.SQL("array_remove(ARRAY[{}]::text[], NULL)").format(joined(notes)),
            values=self._values,
            kind=sql.SQL("r.kind"),
            given=frozenset(self._given),
        )

    def add(self, field: Field) -> None:
        """Take a field in."""
        columns = self._source.filling(field)
        if columns or field.parent or field.product:
            self._given.add(field.column)
        if field.refers_to is not None:
            self._add_reference(field, columns)
        else:
            self._add_value(field, columns)

    def _add_key(self) -> None:
        key = self._source.key
        if key is None:
            self._read["legacy_id"] = sql.SQL("NULL::bigint")
            return
        self._read["legacy_id"] = whole(key)
        self._read["written_id"] = written(key)
        if self._looked_up:
            self._reasons += [
                (sql.SQL("r.written_id IS NULL"), f"it has no {key.name}"),
                (sql.SQL("r.legacy_id IS NULL"), f"{key.name} is no whole number"),
            ]
            if not self._spec.is_transaction:
                outside = sql.SQL("r.legacy_id NOT BETWEEN 1 AND 2147483647")
                self._reasons.append((outside, f"{key.name} is not between 1 and 2147483647"))

    def _add_kind(self) -> None:
        column = self._source.type_column
        if column is None:
            self._read["kind"] = text(self._spec.name)
            return
        self._read["kind"] = sql.SQL("coalesce(lower({}), 'primary')").format(written(column))
        kinds = sql.SQL("r.kind NOT IN ('primary', 'secondary', 'advisory', 'subnominee')")
        self._reasons.append((kinds, f"{column.name} is none of primary, secondary, advisory, subnominee"))

    def _add_parent(self) -> None:
        parent = self._source.parent
        if not self._spec.is_transaction:
            return
        self._read["parent_ref"] = whole(parent) if parent else sql.SQL("NULL::bigint")
        self._values["parent_ref"] = sql.SQL("r.parent_ref")
        if parent:
            self._given.add("parent_ref")
            if not parent.is_number:
                self._read["parent_written"] = written(parent)
                unread = sql.SQL("r.parent_ref IS NULL AND r.parent_written IS NOT NULL")
                self._reasons.append((unread, f"{parent.name} is no whole number"))
        if self._spec.parent_required:
            self._joins.append(_PARENTS if self._looked_up else _PARENTS_NOW)
            self._reasons += [
                (sql.SQL("r.parent_ref IS NULL"), "it names no primary transaction"),
                (sql.SQL("p.legacy_id IS NULL"), "orphan: the primary transaction it belongs to is not there"),
            ]

    def _add_resolved(self) -> None:
        """Check names that are carried along: they must be somebody's."""
        columns = [c for c in self._source.present(self._spec.resolved) if c.filled or not self._source.rows]
        if columns:
            field = columns[0].name
            self._look_up(field, columns, "investor")
            self._refuse_unknown(field, "investor", columns[0].name)

    def _add_reference(self, field: Field, columns: list[Column]) -> None:
        kind = field.refers_to
        assert kind is not None  # noqa: S101 - the caller looked
        value = self._look_up(field.column, columns, kind)
        given = sql.SQL("(r.{} IS NOT NULL OR r.{} IS NOT NULL)").format(
            name(f"i_{field.column}"), name(f"n_{field.column}")
        )
        if field.parent:
            value = sql.SQL("CASE WHEN {} THEN {} ELSE p.{} END").format(given, value, name(field.column))
        self._values[field.column] = value
        shown = columns[0].name if columns else field.column
        if field.required:
            missing = sql.SQL("NOT {}").format(given)
            if field.parent:
                missing = sql.SQL("{} AND p.{} IS NULL").format(missing, name(field.column))
            self._reasons.append((missing, f"it has no {shown}"))
            self._refuse_unknown(field.column, kind, shown)
        else:
            unknown = sql.SQL("{} AND {} IS NULL").format(given, value)
            self._notes.append((unknown, f"orphan: {shown} refers to {_article(kind)} that is not there"))

    def _look_up(self, field: str, columns: list[Column], kind: str) -> sql.Composable:
        """Read an id or a name, and join what it stands for."""
        numbers, names = [], []
        for column in columns:
            here = written(column)
            if column.is_number:
                numbers.append(sql.SQL("WHEN {} IS NOT NULL THEN {}").format(here, whole(column)))
                names.append(
                    sql.SQL("WHEN {} IS NOT NULL THEN CASE WHEN {} IS NULL THEN '' END").format(here, whole(column))
                )
            else:
                is_id = sql.SQL("{} ~ '^\\d{{1,18}}$'").format(here)
                numbers.append(
                    sql.SQL("WHEN {} IS NOT NULL THEN CASE WHEN {} THEN {}::bigint END").format(here, is_id, here)
                )
                names.append(
                    sql.SQL(
                        "WHEN {} IS NOT NULL THEN CASE WHEN NOT {} THEN equitie_private.legacy_name({}) END"
                    ).format(here, is_id, here)
                )
        number_alias, name_alias = name(f"i_{field}"), name(f"n_{field}")
        self._read[f"i_{field}"] = (
            sql.SQL("CASE {} END").format(joined(numbers, " ")) if numbers else sql.SQL("NULL::bigint")
        )
        self._read[f"n_{field}"] = sql.SQL("CASE {} END").format(joined(names, " ")) if names else sql.SQL("NULL::text")
        by_id, by_name = name(f"by_id_{field}"), name(f"by_name_{field}")
        if self._looked_up:
            self._joins.append(
                sql.SQL(
                    "LEFT JOIN equitie_private.legacy_ids AS {by} ON {by}.kind = {kind} AND {by}.legacy_id = r.{number}"
                ).format(by=by_id, kind=sql.Literal(kind), number=number_alias)
            )
            found = sql.SQL("{}.new_id").format(by_id)
        else:
            found = sql.SQL("r.{}").format(number_alias)
        if any(not column.is_number for column in columns):
            self._joins.append(
                sql.SQL("LEFT JOIN {labels} AS {by} ON {by}.kind = {kind} AND {by}.label = r.{name}").format(
                    labels=name("pg_temp", "legacy_labels") if self._looked_up else name("labels"),
                    by=by_name,
                    kind=sql.Literal(kind),
                    name=name_alias,
                )
            )
            return sql.SQL("coalesce({}, {}.id)").format(found, by_name)
        return found

    def _refuse_unknown(self, field: str, kind: str, shown: str) -> None:
        number, label = name(f"i_{field}"), name(f"n_{field}")
        by_id, by_name = name(f"by_id_{field}"), name(f"by_name_{field}")
        if self._looked_up:
            unknown = sql.SQL("r.{} IS NOT NULL AND {}.new_id IS NULL").format(number, by_id)
            self._reasons.append((unknown, f"orphan: {shown} refers to {_article(kind)} that is not there"))
        columns = self._source.present(next((f.names for f in self._spec.fields if f.column == field), (field,)))
        if any(not column.is_number for column in columns):
            several = sql.SQL("r.{} IS NOT NULL AND {}.label IS NOT NULL AND {}.id IS NULL").format(
                label, by_name, by_name
            )
            nobody = sql.SQL("r.{} IS NOT NULL AND {}.label IS NULL").format(label, by_name)
            self._reasons += [
                (several, f"{shown} is the name of more than one {kind}"),
                (nobody, f"orphan: {shown} is the name of no {kind}"),
            ]
        else:
            self._reasons.append((sql.SQL("r.{} IS NOT NULL").format(label), f"{shown} is no whole number"))

    def _add_value(self, field: Field, columns: list[Column]) -> None:
        convert = _CONVERSIONS[field.type]
        alias = f"v_{field.column}"
        self._read[alias] = first_of([convert(column) for column in columns], _NULLS[field.type])
        value: sql.Composable = sql.SQL("r.{}").format(name(alias))
        spell = [c for c in columns if field.type != "text" and not self._is_native(field, c)]
        if spell:
            unread = [
                sql.SQL("{} IS NOT NULL AND {} IS NULL").format(written(column), convert(column)) for column in spell
            ]
            self._read[f"b_{field.column}"] = joined(unread, " OR ")
            value = self._refuse(field, sql.SQL("r.{}").format(name(f"b_{field.column}")), "cannot be read", value)
        if field.case is not None:
            value = sql.SQL("{}({})").format(raw(field.case), value)
        if field.allowed:
            outside = sql.SQL("{} NOT IN ({})").format(value, joined(sql.Literal(each) for each in field.allowed))
            value = self._refuse(field, outside, f"is none of {', '.join(field.allowed)}", value)
        if field.type == "numeric" and columns:
            infinite = sql.SQL("{} IN ('NaN', 'Infinity', '-Infinity')").format(value)
            value = self._refuse(field, infinite, "is not finite", value)
        if field.type == "integer" and columns:
            outside = sql.SQL("({v} <> trunc({v}) OR abs({v}) > 2147483647)").format(v=value)
            value = self._refuse(field, outside, "is no whole number of this size", value)
            value = sql.SQL("({})::integer").format(value)
        if field.product is not None:
            value = sql.SQL("coalesce({}, {} * {})").format(value, *(self._values[f] for f in field.product))
        if field.parent:
            value = sql.SQL("coalesce({}, p.{})").format(value, name(field.column))
        if field.default is not None:
            value = sql.SQL("coalesce({}, {})").format(value, text(field.default))
        if field.required and field.default is None:
            shown = columns[0].name if columns else field.column
            self._reasons.append((sql.SQL("{} IS NULL").format(value), f"it has no {shown}"))
        if field.column == "transaction_date":
            outside = sql.SQL("{} NOT BETWEEN {} AND {}").format(value, sql.Literal(_FIRST_DAY), sql.Literal(_LAST_DAY))
            self._reasons.append((outside, f"{field.column} is not between {_FIRST_DAY} and {_LAST_DAY}"))
        self._values[field.column] = value

    @staticmethod
    def _is_native(field: Field, column: Column) -> bool:
        if field.type in {"numeric", "integer"}:
            return column.is_number
        return column.type in {"date", "timestamp without time zone", "timestamp with time zone"}

    def _refuse(self, field: Field, check: sql.Composable, why: str, value: sql.Composable) -> sql.Composable:
        """Reject the row if money hangs on it or it cannot be without; otherwise leave the value out and note it."""
        sentence = f"{field.column} {why}"
        if self._spec.is_transaction or field.required:
            self._reasons.append((check, sentence))
            return value
        self._notes.append((check, sentence))
        return sql.SQL("CASE WHEN NOT coalesce({}, false) THEN {} END").format(check, value)
