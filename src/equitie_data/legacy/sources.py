"""The old tables as they are found: their columns, which of them hold something, and where each of them goes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg import sql
from psycopg.rows import dict_row

from equitie_data import _sql
from equitie_data.legacy.kinds import KINDS, SOURCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from psycopg import Connection

    from equitie_data.legacy.kinds import Field, Kind

__all__ = ["SYNC_FUNCTIONS", "Column", "Inventory", "Source", "read_inventory", "read_source"]

SYNC_FUNCTIONS: Final = ["sync_transaction_to_new", "sync_deal_to_new", "sync_investor_to_new", "sync_company_to_new"]
_NUMBERS: Final = {"smallint", "integer", "bigint", "numeric", "real", "double precision", "money"}


@attrs.frozen
class Column:
    """A column of an old table.

    Attributes:
        name: Its name.
        type: Its type without modifiers.
        category: The type's category in ``pg_type``.
        filled: How many rows hold something in it.
    """

    name: str
    type: str
    category: str
    filled: int

    @property
    def is_number(self) -> bool:
        """Whether the type itself is a number's."""
        return self.type in _NUMBERS

    @property
    def is_text(self) -> bool:
        """Whether the type is one of the strings."""
        return self.category == "S"


# With a __dict__, for the cached properties: statements ask for them a thousand times.
@attrs.frozen(kw_only=True, slots=False)
class Source:
    """An old table, and what its columns are for.

    Attributes:
        number: Its place among the sources; of copies that agree, the lowest one's is taken.
        schema: Schema it stands in.
        name: Its name, dots included.
        kind: Kind of its rows.
        rows: How many it has.
        bytes: What it takes with indexes and TOAST.
        columns: Its columns, in order.
        twins: Columns that repeat the id in every row.
        kept: Columns without a clean one that the user keeps.
        dropped: Columns without a clean one that stay in the backup alone.
    """

    number: int
    schema: str
    name: str
    kind: str
    rows: int
    bytes: int
    columns: tuple[Column, ...]
    twins: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The table as SQL writes it."""
        return ".".join(part if part.isidentifier() else f'"{part}"' for part in (self.schema, self.name))

    @property
    def spec(self) -> Kind:
        """What its kind of row becomes."""
        return KINDS[self.kind]

    @property
    def identifier(self) -> sql.Identifier:
        """The table, for composed SQL."""
        return sql.Identifier(self.schema, self.name)

    @functools.cached_property
    def key(self) -> Column | None:
        """The column that holds the id."""
        return next(iter(self.present(self.spec.key_names)), None)

    @functools.cached_property
    def parent(self) -> Column | None:
        """The column that holds the primary transaction a row belongs to."""
        return next((c for c in self.present(self.spec.parent_names) if c is not self.key), None)

    @functools.cached_property
    def type_column(self) -> Column | None:
        """The column that says which kind a transaction is."""
        return next(iter(self.present(("transaction_type",))), None) if self.kind == "primary" else None

    def present(self, names: Iterable[str]) -> list[Column]:
        """Return the columns of these names that there are; those that hold something first."""
        found = [self._by_name[name] for name in names if name in self._by_name]
        return sorted(found, key=lambda column: not column.filled)

    def filling(self, field: Field) -> list[Column]:
        """Return the columns that fill a clean one, best first."""
        return self._filling[field.column]

    def home_of(self, column: Column) -> str | None:
        """Return the clean column that gives a legacy column back as it was, if there is one."""
        return self._homes.get(column.name)

    @functools.cached_property
    def _by_name(self) -> dict[str, Column]:
        return {column.name: column for column in self.columns}

    @functools.cached_property
    def _filling(self) -> dict[str, list[Column]]:
        taken = {column.name for column in (self.key, self.parent) if column is not None}
        return {
            field.column: [column for column in self.present(field.names) if column.name not in taken]
            for field in self.spec.fields
        }

    @functools.cached_property
    def _homes(self) -> dict[str, str]:
        homes: dict[str, str] = {}
        for field in reversed(self.spec.fields):
            filling = self.filling(field)
            if filling and (field.refers_to is None or filling[0].is_number):
                homes[filling[0].name] = field.column
        for column, home in (
            (self.type_column, "transaction_type"),
            (self.parent, "parent_transaction_id"),
            (self.key, self.spec.key),
        ):
            if column is not None:
                homes[column.name] = home
        return homes

    @functools.cached_property
    def carried(self) -> tuple[Column, ...]:
        """Columns that go on beside the clean row."""
        known = {*self.spec.carried, *(name for field in self.spec.fields for name in field.names)}
        return tuple(
            column
            for column in self.columns
            if self.home_of(column) is None
            and column.name not in self.twins
            and column.name not in self.dropped
            and (column.name in self.kept or (column.name in known and (column.filled > 0 or not self.rows)))
        )

    @property
    def empty(self) -> tuple[str, ...]:
        """Columns that hold nothing in any row and have no clean one."""
        return tuple(
            column.name
            for column in self.columns
            if self.rows and not column.filled and self.home_of(column) is None and column.name not in self.kept
        )

    @property
    def homeless(self) -> tuple[str, ...]:
        """Columns with content for which nobody has decided where it goes."""
        decided = {column.name for column in self.carried} | set(self.dropped) | set(self.twins)
        return tuple(
            column.name
            for column in self.columns
            if column.filled and self.home_of(column) is None and column.name not in decided
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a later session needs to read this source the same way."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Source:
        """Read what `to_dict` wrote."""
        members = dict(stored)
        members["columns"] = tuple(Column(**column) for column in members["columns"])
        for name in ("twins", "kept", "dropped"):
            members[name] = tuple(members[name])
        return cls(**members)


@attrs.frozen(kw_only=True)
class Inventory:
    """What was found.

    Attributes:
        sources: The old tables.
        oids: Their object ids, in the same order.
        views: Names that are views already.
        unknown: Tables with dots in their names that the library does not know.
        problems: What has to be settled before the tables can be taken over, a sentence each.
        lost_grants: Roles that lose privileges: table and role.
    """

    sources: tuple[Source, ...]
    oids: tuple[int, ...]
    views: tuple[str, ...]
    unknown: tuple[str, ...]
    problems: tuple[str, ...]
    lost_grants: tuple[tuple[str, str], ...]


def read_inventory(
    conn: Connection[Any],
    *,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    on_table: Callable[[str], object] = lambda _name: None,
) -> Inventory:
    """Look for the old tables, count what their columns hold, and decide where each column goes."""
    wanted = {(schema, name): kind for schema, name, kind in SOURCES}
    with conn.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(
            _sql.query("legacy_tables"),
            {"schemas": [schema for schema, _ in wanted], "names": [name for _, name in wanted]},
        ).fetchall()
    by_name = {(row["schema"], row["name"]): row for row in found}
    problems: list[str] = []
    sources: list[Source] = []
    oids: list[int] = []
    views: list[str] = []
    for (schema, name), kind in wanted.items():
        row = by_name.pop((schema, name), None)
        if row is None:
            continue
        shown = Source(number=0, schema=schema, name=name, kind=kind, rows=0, bytes=0, columns=()).label
        if row["relkind"] == "v":
            views.append(shown)
            continue
        if row["relkind"] != "r":
            problems.append(f"{shown} is no plain table: make it one, or move it out of the way.")
            continue
        if not row["owned"]:
            problems.append(
                f"{shown} belongs to {row['owner']}: connect as that role, or as a member of it, to take it over."
            )
            continue
        on_table(shown)
        source = read_source(conn, row, kind, len(sources) + 1, keep=keep, drop=drop)
        problems += problems_of(source)
        sources.append(source)
        oids.append(row["oid"])
    known = {column.name for source in sources for column in source.columns}
    problems += [
        f"No old table has a column {name}: --keep and --drop take the names that `legacy inspect` prints."
        for name in sorted({*map(bare, keep), *map(bare, drop)} - known)
    ]
    parameters = {"oids": oids, "functions": SYNC_FUNCTIONS}
    problems += [
        f"{what} depends on the old tables and would go on with the backup: drop it, or point it to the clean tables."
        for (what,) in conn.execute(_sql.query("legacy_dependents"), parameters)
    ]
    return Inventory(
        sources=tuple(sources),
        oids=tuple(oids),
        views=tuple(views),
        unknown=tuple(f'{row["schema"]}."{row["name"]}"' for row in by_name.values() if row["relkind"] == "r"),
        problems=tuple(problems),
        lost_grants=tuple((row[0], row[1]) for row in conn.execute(_sql.query("legacy_grants"), {"oids": oids})),
    )


def bare(name: str) -> str:
    """Return the column of ``TABLE:COLUMN`` or ``COLUMN``."""
    return name.rpartition(":")[2]


def read_source(
    conn: Connection[Any],
    table: Mapping[str, Any],
    kind: str,
    number: int,
    *,
    keep: Sequence[str],
    drop: Sequence[str],
) -> Source:
    """Read one table's columns and count what is in them, in one scan."""
    described = conn.execute(_sql.query("legacy_columns"), {"oid": table["oid"]}).fetchall()
    counts = sql.SQL(", ").join(
        [sql.SQL("count(*)"), *(sql.SQL("count(s.{})").format(sql.Identifier(name)) for name, *_ in described)]
    )
    identifier = sql.Identifier(table["schema"], table["name"])
    # Without parameters a % in a column's name is no placeholder.
    (rows, *filled) = one(conn, sql.SQL("SELECT {} FROM ONLY {} AS s").format(counts, identifier))

    def chosen(names: Sequence[str]) -> tuple[str, ...]:
        here = {name for name in names if ":" not in name}
        here |= {bare(name) for name in names if name.startswith(f"{table['name']}:")}
        return tuple(name for name, *_ in described if name in here)

    source = Source(
        number=number,
        schema=table["schema"],
        name=table["name"],
        kind=kind,
        rows=rows,
        bytes=table["bytes"],
        columns=tuple(
            Column(name, type_, category, count)
            for (name, type_, _declared, category), count in zip(described, filled, strict=True)
        ),
        kept=chosen(keep),
        dropped=chosen(drop),
    )
    return attrs.evolve(source, twins=_twins(conn, source))


def _twins(conn: Connection[Any], source: Source) -> tuple[str, ...]:
    """Return the columns that were proven to repeat the id."""
    key = source.key
    if key is None:
        return ()
    twins = []
    for column in source.present(source.spec.key_names):
        if column is key or source.home_of(column) is not None:
            continue
        (differing,) = one(
            conn,
            sql.SQL("SELECT count(*) FROM ONLY {} AS s WHERE s.{}::text IS DISTINCT FROM s.{}::text").format(
                source.identifier, sql.Identifier(key.name), sql.Identifier(column.name)
            ),
        )
        if not differing:
            twins.append(column.name)
    return tuple(twins)


def problems_of(source: Source) -> list[str]:
    """Return what keeps a table from being taken over."""
    problems = []
    if source.key is None:
        problems.append(f"{source.label} has no id: one of {', '.join(source.spec.key_names)} has to be there.")
    for field in source.spec.fields:
        fallback = field.parent or field.default is not None or field.product is not None
        if field.required and not fallback and not source.filling(field) and source.rows:
            problems.append(
                f"{source.label} has nothing to fill {field.column} with: "
                f"a column {' or '.join(field.names)} is missing."
            )
    if source.spec.parent_required and source.parent is None and source.rows:
        problems.append(
            f"{source.label} does not say which primary transaction a row belongs to: "
            f"a column {' or '.join(source.spec.parent_names)} is missing."
        )
    problems += [
        f"{source.label} has content in {name}, which no clean column takes: --keep {name} carries it along, "
        f"--drop {name} leaves it in the backup alone."
        for name in source.homeless
    ]
    return problems


def one(conn: Connection[Any], statement: sql.Composed) -> tuple[Any, ...]:
    """Return the only row of a statement without parameters."""
    row = conn.execute(statement).fetchone()
    assert row is not None  # noqa: S101 - an aggregate without GROUP BY has a row
    return tuple(row)
