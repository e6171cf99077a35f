"""Statements that copy old rows: read a table into a staging table, decide about every id, insert what was decided.

All of them work on a range of blocks or ids, so that a run in batches needs the memory of one batch, and each says in
one row what became of how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
from psycopg import sql

from equitie_data.legacy.composing import joined, name, raw
from equitie_data.legacy.details import Details, details_of
from equitie_data.legacy.kinds import TRANSACTION_KINDS
from equitie_data.legacy.reading import Reading, read_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from equitie_data.legacy.kinds import Kind
    from equitie_data.legacy.sources import Source

__all__ = ["Stage", "stage_of"]

_TYPES: Final = {
    "text": "text",
    "integer": "integer",
    "numeric": "numeric",
    "date": "date",
    "timestamptz": "timestamptz",
}


@attrs.frozen(kw_only=True)
class Stage:
    """One clean table, the old tables that fill it, and the staging table in between.

    Attributes:
        kinds: Kinds of rows of the clean table.
        sources: The old tables of these kinds.
        details: The table beside the clean one.
        readings: How each source is read, by number.
        run_id: The run.
        on_conflict: ``fail``, ``latest`` or ``first``.
    """

    kinds: tuple[Kind, ...]
    sources: tuple[Source, ...]
    details: Details
    readings: dict[int, Reading]
    run_id: int
    on_conflict: str

    @property
    def table(self) -> sql.Identifier:
        """The staging table."""
        return name("equitie_private", f"legacy_staging_{self.details.kind}")

    @property
    def clean(self) -> sql.Identifier:
        """The clean table."""
        return name("public", self.kinds[0].table)

    @property
    def is_transactions(self) -> bool:
        """Whether the clean table is that of the transactions."""
        return self.details.is_transactions

    @property
    def columns(self) -> list[str]:
        """The clean columns that are filled, without the id."""
        return [field.column for field in self.kinds[0].fields]

    def sources_of(self, kind: str) -> list[Source]:
        """Return the sources that may hold rows of a kind."""
        return [s for s in self.sources if s.kind == kind or (s.type_column is not None and kind in TRANSACTION_KINDS)]

    def create(self) -> list[sql.Composed]:
        """Return the statements that make the staging table."""
        columns = [
            sql.SQL("{} {}").format(
                name(field.column),
                raw("bigint" if field.refers_to else _TYPES[field.type]),
            )
            for field in self.kinds[0].fields
        ]
        columns += [
            sql.SQL("{} {}").format(name(staged), raw(self.details.columns[column]))
            for column, staged in self.details.staged.items()
        ]
        return [
            # Unlogged: what a crash of the server empties is copied again, see `Copying`.
            sql.SQL(
                "CREATE UNLOGGED TABLE {}"
                " (source integer, place tid, kind text, legacy_id bigint, parent_ref bigint, {})"
            ).format(self.table, joined(columns)),
            sql.SQL("COMMENT ON TABLE {} IS 'Old rows on their way into a clean table.'").format(self.table),
            sql.SQL("REVOKE ALL ON {} FROM PUBLIC, anon, authenticated, equitie_staff, service_role").format(
                self.table
            ),
        ]

    def index(self) -> list[sql.Composed]:
        """Return the statements that make the staging table quick to look into."""
        return [
            sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} (kind, legacy_id)").format(
                name(f"idx_legacy_staging_{self.details.kind}"), self.table
            ),
            sql.SQL("ANALYZE {}").format(self.table),
        ]

    def drop(self) -> sql.Composed:
        """Return the statement that removes the staging table."""
        return sql.SQL("DROP TABLE IF EXISTS {}").format(self.table)

    def read(self, source: Source, first: int, last: int | None) -> sql.Composed:
        """Return the statement that stages a range of blocks; it yields counts by kind."""
        reading = self.readings[source.number]
        carried = {column.name: column for column in source.carried}
        read = [sql.SQL("{} AS {}").format(value, name(alias)) for alias, value in reading.read.items()]
        columns = [*self.columns, *self.details.staged.values()]
        values = [sql.SQL("{} AS {}").format(reading.values[column], name(column)) for column in self.columns]
        for column, staged in self.details.staged.items():
            type_ = raw(self.details.columns[column])
            if column in carried:
                values.append(sql.SQL("(r.original).{}::{} AS {}").format(name(column), type_, name(staged)))
            else:
                values.append(sql.SQL("NULL::{} AS {}").format(type_, name(staged)))
        block_range = sql.SQL("s.ctid >= {}").format(_tid(first))
        if last is not None:
            block_range = sql.SQL("{} AND s.ctid < {}").format(block_range, _tid(last))
        amount = reading.values.get("amount", sql.SQL("NULL::numeric"))
        return sql.SQL(
            """
            WITH read AS MATERIALIZED (
              SELECT s.ctid AS place, s AS original, hashtextextended(s::text, 0) AS checksum, {read}
              FROM ONLY {table} AS s
              WHERE {block_range}
            ),
            judged AS MATERIALIZED (
              SELECT
                r.place, r.original, r.checksum, {kind} AS kind, r.legacy_id, {written_id} AS written_id,
                {parent_ref} AS parent_ref, {reason} AS reason, {notes} AS notes, {money} AS money, {values}
              FROM read AS r
              {joins}
            ),
            rejected AS (
              INSERT INTO equitie_private.legacy_rejects
                (run_id, source, kind, legacy_id, outcome, reason, amount, original)
              SELECT {run_id}, {number}, j.kind, j.written_id, 'rejected', j.reason, j.money, to_jsonb(j.original)
              FROM judged AS j
              WHERE j.reason IS NOT NULL
            ),
            noted AS (
              INSERT INTO equitie_private.legacy_rejects (run_id, source, kind, legacy_id, outcome, reason, original)
              SELECT {run_id}, {number}, j.kind, j.written_id, 'value left out', n.note, to_jsonb(j.original)
              FROM judged AS j
              CROSS JOIN LATERAL unnest(j.notes) AS n (note)
              WHERE j.reason IS NULL
            ),
            staged AS (
              INSERT INTO {staging} (source, place, kind, legacy_id, parent_ref, {columns})
              SELECT {number}, j.place, j.kind, j.legacy_id, j.parent_ref, {columns}
              FROM judged AS j
              WHERE j.reason IS NULL
            )
            SELECT
              j.kind, count(*), coalesce(sum(j.money), 0), coalesce(sum(j.checksum), 0)::numeric,
              count(j.reason), coalesce(sum(j.money) FILTER (WHERE j.reason IS NOT NULL), 0)
            FROM judged AS j
            GROUP BY j.kind
            """
        ).format(
            read=joined(read),
            table=source.identifier,
            block_range=block_range,
            kind=reading.kind,
            written_id=sql.SQL("r.written_id") if "written_id" in reading.read else sql.SQL("NULL::text"),
            parent_ref=reading.values.get("parent_ref", sql.SQL("NULL::bigint")),
            reason=reading.reason,
            notes=reading.notes,
            money=_finite(amount),
            values=joined(values),
            joins=reading.joins,
            run_id=sql.Literal(self.run_id),
            number=sql.Literal(source.number),
            staging=self.table,
            columns=joined(map(name, columns)),
        )

    def totals(self, source: Source, table: sql.Identifier) -> sql.Composed:
        """Return the statement that counts, sums and hashes a whole table."""
        del source
        return sql.SQL(
            "SELECT count(*), coalesce(sum(hashtextextended(s::text, 0)), 0)::numeric FROM ONLY {} AS s"
        ).format(table)

    def parents_in(self, source: Source, table: sql.Identifier, columns: Sequence[str]) -> sql.Composed:
        """Return the statement that finds, in an original, what rows may take over from their primary transaction."""
        reading = self.readings[source.number]
        return sql.SQL(
            """
            INSERT INTO pg_temp.legacy_parents (legacy_id, {columns})
            SELECT m.legacy_id, {values}
            FROM (SELECT s.ctid AS place, {read} FROM ONLY {table} AS s) AS r
            JOIN equitie_private.legacy_ids AS m
              ON m.kind = 'primary' AND m.legacy_id = r.legacy_id AND m.source = {number} AND m.place = r.place
            {joins}
            """
        ).format(
            columns=joined(map(name, columns)),
            values=joined(reading.values[column] for column in columns),
            read=joined(sql.SQL("{} AS {}").format(value, name(alias)) for alias, value in reading.read.items()),
            table=table,
            number=sql.Literal(source.number),
            joins=reading.joins,
        )

    def next_ids(self, kind: str, after: int, size: int) -> sql.Composed:
        """Return the statement that finds the last id of the next batch to decide; NULL when there is none."""
        return sql.SQL(
            "SELECT max(b.legacy_id) FROM (SELECT s.legacy_id FROM {} AS s WHERE s.kind = {} AND s.legacy_id > {}"
            " ORDER BY s.legacy_id LIMIT {}) AS b"
        ).format(self.table, sql.Literal(kind), sql.Literal(after), sql.Literal(size))

    def filled(self, column: str, kind: str) -> tuple[sql.Composable, str | None]:
        """Return a staged column of the chosen copy, or of the best other one if its table lacks the column.

        Returns:
            The value, and the name of the lateral join it needs.
        """
        sources = self.sources_of(kind)
        having = tuple(
            source.number
            for source in sources
            if column in self.readings[source.number].given
            or column in {self.details.staged[c.name] for c in source.carried}
        )
        if not having or len(having) == len(sources):
            return sql.SQL("s.{}").format(name(column)), None
        join = "c_" + "_".join(map(str, having))
        return (
            sql.SQL("CASE WHEN s.source IN ({}) OR {}.source IS NULL THEN s.{} ELSE {}.{} END").format(
                _numbers(having), name(join), name(column), name(join), name(column)
            ),
            join,
        )


def stage_of(kinds: Sequence[Kind], sources: Sequence[Source], *, run_id: int, on_conflict: str) -> Stage:
    """Put together what a clean table is filled from."""
    names = {kind.name for kind in kinds}
    own = tuple(source for source in sources if source.kind in names)
    return Stage(
        kinds=tuple(kinds),
        sources=own,
        details=details_of(kinds, own),
        readings={source.number: read_row(source, looked_up=True) for source in own},
        run_id=run_id,
        on_conflict=on_conflict,
    )


def _tid(block: int) -> sql.Composed:
    return sql.SQL("{}::tid").format(sql.Literal(f"({block},0)"))


def _numbers(numbers: Iterable[int]) -> sql.Composed:
    return joined(map(sql.Literal, numbers))


def _finite(amount: sql.Composable) -> sql.Composed:
    return sql.SQL("CASE WHEN {a} NOT IN ('NaN', 'Infinity', '-Infinity') THEN {a} END").format(a=amount)
