"""The statement that decides about ids: which copy is taken, which agree with it, which lose, and what id it gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from psycopg import sql

from equitie_data.legacy.composing import joined, name, raw, text
from equitie_data.legacy.details import COMPARABLE
from equitie_data.legacy.kinds import KINDS, TRANSACTION_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from equitie_data.legacy.kinds import Kind
    from equitie_data.legacy.sources import Source
    from equitie_data.legacy.staging import Stage

__all__ = ["decide"]

_STAMPS: Final = ("created_at", "updated_at")
_DISAGREE: Final = "another copy of this id has other content, and was taken"
_DISPLACED: Final = "an old table held this id with other content, which was taken"
_STANDS: Final = "the clean table holds this id with other content, which was kept"

# As equitie_private.compose_transaction_id() makes them: the day in front, a number of the column's sequence behind.
_COMPOSED_ID: Final = sql.SQL(
    "(date_part('year', f.transaction_date) * 10000 + date_part('month', f.transaction_date) * 100"
    " + date_part('day', f.transaction_date))::bigint * 100000000"
    " + (-(nextval(pg_get_serial_sequence('public.transactions_clean', 'transaction_id')) + 1)) % 100000000"
)


def decide(stage: Stage, kind: str, after: int, last: int) -> sql.Composed:
    """Return the statement that decides about a range of ids; it yields counts by source, and conflicts."""
    spec = KINDS[kind]
    sources = stage.sources_of(kind)
    policy = {
        "fail": sql.SQL("NULL::timestamptz"),
        "first": sql.SQL("coalesce(g.updated_at, g.created_at)"),
        "latest": sql.SQL("coalesce(g.updated_at, g.created_at)"),
    }[stage.on_conflict]
    direction = sql.SQL("DESC NULLS LAST" if stage.on_conflict == "latest" else "ASC NULLS LAST")
    classes = _classes(stage, kind)
    windows = [
        sql.SQL("w{n} AS (PARTITION BY s.legacy_id, s.source IN ({m}) ORDER BY s.source, s.place)").format(
            n=raw(str(number)),
            m=_numbers(members),
        )
        for number, (members, _) in enumerate(classes)
    ]
    differs = [
        sql.SQL("(s.source IN ({m}) AND {row} IS DISTINCT FROM first_value({row}) OVER w{n})").format(
            m=_numbers(members),
            row=_row(stage, "s", columns),
            n=raw(str(number)),
        )
        for number, (members, columns) in enumerate(classes)
    ]
    agrees = [
        sql.SQL("NOT (o.source IN ({m}) AND w.source IN ({m}) AND {left} IS DISTINCT FROM {right})").format(
            m=_numbers(members), left=_row(stage, "o", columns), right=_row(stage, "w", columns)
        )
        for members, columns in classes
    ]
    originals = joined(
        [
            sql.SQL(
                "SELECT {number} AS source, x.ctid AS place, to_jsonb(x) AS original FROM ONLY {table} AS x"
                " WHERE x.ctid = ANY (ARRAY(SELECT l.place FROM losers AS l WHERE l.source = {number}))"
            ).format(number=sql.Literal(source.number), table=source.identifier)
            for source in sources
        ],
        " UNION ALL ",
    )
    return sql.SQL(
        """
        WITH copies AS (
          SELECT s.*, {money} {differs} AS differs
          FROM {staging} AS s
          WHERE s.kind = {kind} AND s.legacy_id > {after} AND s.legacy_id <= {last}
          {windows}
        ),
        grouped AS (
          SELECT c.*, bool_or(c.differs) OVER (PARTITION BY c.legacy_id) AS conflict
          FROM copies AS c
        ),
        ordered AS MATERIALIZED (
          SELECT
            g.*,
            row_number() OVER (
              PARTITION BY g.legacy_id
              ORDER BY CASE WHEN g.conflict THEN {policy} END {direction}, g.source, g.place
            ) AS place_in_line
          FROM grouped AS g
        ),
        first_choice AS MATERIALIZED (
          SELECT
            o.*, {standing_key} AS standing_id, {standing_other} AS standing_other,
            {standing_differs} AS standing_differs,
            {standing_stamp} AS standing_stamp
          FROM ordered AS o
          {standing_joins}
          WHERE o.place_in_line = 1
        ),
        decided AS MATERIALIZED (
          SELECT
            f.legacy_id, f.source, f.place, f.amount, f.standing_id,
            f.standing_id IS NOT NULL AND f.standing_differs AS standing_differs,
            CASE
              WHEN f.standing_id IS NULL THEN 'inserted'
              WHEN f.standing_differs AND {legacy_wins} THEN 'replaced'
              ELSE 'existing'
            END AS outcome,
            {new_id} AS new_id
          FROM first_choice AS f
        ),
        judged AS MATERIALIZED (
          SELECT
            o.source, o.place, o.legacy_id, o.amount, o.conflict,
            CASE
              WHEN d.outcome = 'existing' AND d.standing_differs THEN 'stands'
              WHEN o.place_in_line = 1 THEN d.outcome
              WHEN NOT o.conflict THEN 'duplicate'
              WHEN {agrees} THEN 'duplicate'
              ELSE 'loser'
            END AS verdict,
            o.place_in_line = 1 AND d.standing_differs AS against_standing
          FROM ordered AS o
          JOIN decided AS d ON d.legacy_id = o.legacy_id
          JOIN first_choice AS w ON w.legacy_id = o.legacy_id
        ),
        losers AS (
          SELECT j.* FROM judged AS j WHERE j.verdict IN ('loser', 'stands')
        ),
        originals AS (
          {originals}
        ),
        listed AS (
          INSERT INTO equitie_private.legacy_rejects
            (run_id, source, kind, legacy_id, outcome, reason, amount, original)
          SELECT
            {run_id}, l.source, {kind}, l.legacy_id::text, 'loser',
            CASE l.verdict WHEN 'stands' THEN {stands} ELSE {disagree} END, l.amount, x.original
          FROM losers AS l
          JOIN originals AS x ON x.source = l.source AND x.place = l.place
        ),
        displaced AS (
          INSERT INTO equitie_private.legacy_rejects (run_id, kind, legacy_id, outcome, reason, original)
          SELECT {run_id}, {kind}, d.standing_id::text, 'displaced', {displaced_by}, to_jsonb(t)
          FROM decided AS d
          JOIN {clean} AS t ON t.{key} = d.standing_id
          WHERE d.outcome = 'replaced'
        ),
        noted AS (
          INSERT INTO equitie_private.legacy_ids (kind, legacy_id, new_id, run_id, source, place, outcome)
          SELECT {kind}, d.legacy_id, d.new_id, {run_id}, d.source, d.place, d.outcome
          FROM decided AS d
        )
        SELECT
          j.source, j.verdict, count(*), coalesce(sum(j.amount), 0),
          (array_agg(DISTINCT j.legacy_id ORDER BY j.legacy_id) FILTER (
            WHERE (j.conflict AND j.verdict = 'loser') OR j.against_standing OR j.verdict = 'stands'
          ))[1:5]
        FROM judged AS j
        GROUP BY j.source, j.verdict
        """
    ).format(
        differs=sql.SQL("({})").format(joined(differs, " OR ")) if differs else sql.SQL("false"),
        money=sql.SQL("") if stage.is_transactions else sql.SQL("NULL::numeric AS amount,"),
        windows=sql.SQL("WINDOW {}").format(joined(windows)) if windows else sql.SQL(""),
        staging=stage.table,
        kind=text(kind),
        after=sql.Literal(after),
        last=sql.Literal(last),
        policy=policy,
        direction=direction,
        agrees=joined(agrees, " AND ") if agrees else sql.SQL("true"),
        originals=originals,
        run_id=sql.Literal(stage.run_id),
        stands=text(_STANDS),
        disagree=text(_DISAGREE),
        displaced_by=text(_DISPLACED),
        clean=stage.clean,
        key=name(spec.key),
        **_standing(stage, spec, sources),
    )


def _standing(stage: Stage, spec: Kind, sources: Sequence[Source]) -> dict[str, sql.Composable]:
    """Compose how the clean table's own row of an id is found and compared."""
    given = [
        sql.SQL("WHEN {} THEN {} IS DISTINCT FROM {}").format(
            sql.Literal(source.number), *_standing_rows(stage, source, _clean_columns(stage, source))
        )
        for source in sources
    ]
    pieces: dict[str, sql.Composable] = {
        "standing_differs": sql.SQL("CASE o.source {} END").format(joined(given, " ")),
        "standing_stamp": sql.SQL("t.updated_at"),
        "legacy_wins": {
            "fail": sql.SQL("false"),
            "first": sql.SQL("coalesce(f.updated_at, f.created_at) < f.standing_stamp"),
            "latest": sql.SQL("coalesce(f.updated_at, f.created_at) > f.standing_stamp"),
        }[stage.on_conflict],
    }
    if not stage.is_transactions:
        pieces |= {
            "standing_key": sql.SQL("t.{}::bigint").format(name(spec.key)),
            "standing_other": sql.SQL("false"),
            "standing_joins": sql.SQL(
                "LEFT JOIN LATERAL (SELECT c.* FROM {} AS c WHERE c.{} = o.legacy_id LIMIT 1) AS t ON true"
            ).format(stage.clean, name(spec.key)),
            "new_id": sql.SQL("f.legacy_id"),
        }
        return pieces
    earlier = TRANSACTION_KINDS[: TRANSACTION_KINDS.index(spec.name)]
    taken: sql.Composable = sql.SQL("f.standing_other")
    if earlier:
        taken = sql.SQL(
            "(f.standing_other OR EXISTS (SELECT FROM equitie_private.legacy_ids AS e WHERE e.kind IN ({})"
            " AND e.legacy_id = f.legacy_id AND e.new_id = e.legacy_id))"
        ).format(joined(map(text, earlier)))
    pieces |= {
        "standing_key": sql.SQL("CASE WHEN t.transaction_type = o.kind THEN t.transaction_id END"),
        "standing_other": sql.SQL("coalesce(t.transaction_type <> o.kind, false)"),
        # An old id is small, so a clean row that has it is a stray: its entry says on which day it stands.
        "standing_joins": sql.SQL(
            "LEFT JOIN LATERAL (SELECT c.* FROM equitie_private.stray_transactions AS y"
            " JOIN public.transactions_clean AS c"
            " ON c.transaction_id = y.transaction_id AND c.transaction_date = y.transaction_date"
            " WHERE y.transaction_id = o.legacy_id LIMIT 1) AS t ON true\n"
            "LEFT JOIN LATERAL (SELECT x.new_id FROM equitie_private.legacy_ids AS x"
            " WHERE x.kind = 'primary' AND x.legacy_id = o.parent_ref LIMIT 1) AS pm ON true"
        ),
        "new_id": sql.SQL(
            "CASE WHEN f.legacy_id > 0 AND equitie_private.transaction_day(f.legacy_id) IS NULL AND NOT {}"
            " THEN f.legacy_id ELSE {} END"
        ).format(taken, _COMPOSED_ID),
    }
    return pieces


def _standing_rows(stage: Stage, source: Source, columns: Sequence[str]) -> tuple[sql.Composable, sql.Composable]:
    left: list[sql.Composable] = [sql.SQL("o.{}").format(name(column)) for column in columns]
    right: list[sql.Composable] = [sql.SQL("t.{}").format(name(column)) for column in columns]
    if "parent_ref" in stage.readings[source.number].given:
        left.append(sql.SQL("coalesce(pm.new_id, o.parent_ref)"))
        right.append(sql.SQL("t.parent_transaction_id"))
    # Types as in the staging table: bigint for references, text for char(3).
    casts = {
        f.column: "bigint" if f.refers_to else "text" for f in source.spec.fields if f.refers_to or f.type == "text"
    }
    right = [
        sql.SQL("{}::{}").format(value, raw(casts[column])) if column in casts else value
        for column, value in zip([*columns, ""], right, strict=False)
    ]
    return sql.SQL("ROW({})").format(joined(left)), sql.SQL("ROW({})").format(joined(right))


def _clean_columns(stage: Stage, source: Source) -> list[str]:
    given = stage.readings[source.number].given
    return [column for column in stage.columns if column in given and column not in _STAMPS]


def compared(stage: Stage, source: Source) -> list[str]:
    """Return the staged columns a source says something about, but for its timestamps."""
    given = stage.readings[source.number].given
    carried = {column.name for column in source.carried}
    columns = [column for column in stage.columns if column in given and column not in _STAMPS]
    columns += ["parent_ref"] if "parent_ref" in given else []
    return columns + [staged for column, staged in stage.details.staged.items() if column in carried]


def _classes(stage: Stage, kind: str) -> list[tuple[tuple[int, ...], list[str]]]:
    """Group the compared columns by the sources that have them: copies are compared on what both have."""
    holders: dict[str, list[int]] = {}
    for source in stage.sources_of(kind):
        for column in compared(stage, source):
            holders.setdefault(column, []).append(source.number)
    classes: dict[tuple[int, ...], list[str]] = {}
    for column, numbers in holders.items():
        classes.setdefault(tuple(numbers), []).append(column)
    return list(classes.items())


def _row(stage: Stage, alias: str, columns: Iterable[str]) -> sql.Composed:
    types = {staged: stage.details.columns[column] for column, staged in stage.details.staged.items()}
    values = []
    for column in columns:
        value: sql.Composable = name(alias, column)
        if types.get(column, "text") not in COMPARABLE:
            value = sql.SQL("{}::text").format(value)
        values.append(value)
    return sql.SQL("ROW({})").format(joined(values))


def _numbers(numbers: Iterable[int]) -> sql.Composed:
    return joined(map(sql.Literal, numbers))
