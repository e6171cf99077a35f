"""Statements that bring decided rows into the clean tables, and take them out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import sql

from equitie_data.legacy.composing import joined, name, text
from equitie_data.legacy.kinds import KINDS

if TYPE_CHECKING:
    from equitie_data.legacy.kinds import Kind
    from equitie_data.legacy.staging import Stage

__all__ = ["count_inserted", "delete_inserted", "insert", "next_decided", "replace"]


def next_decided(stage: Stage, kind: str, after: int, size: int) -> sql.Composed:
    """Return the statement that finds the last id of the next batch to insert; NULL when there is none."""
    del stage
    return sql.SQL(
        "SELECT max(b.legacy_id) FROM (SELECT m.legacy_id FROM equitie_private.legacy_ids AS m"
        " WHERE m.kind = {} AND m.source IS NOT NULL AND m.legacy_id > {} ORDER BY m.legacy_id LIMIT {}) AS b"
    ).format(sql.Literal(kind), sql.Literal(after), sql.Literal(size))


def insert(stage: Stage, kind: str, after: int, last: int) -> sql.Composed:
    """Return the statement that inserts a range of decided ids and their details; it yields rows and money."""
    spec = KINDS[kind]
    chosen, columns = _chosen(stage, spec, after, last)
    key = name(spec.key)
    extra: list[sql.Composable] = []
    if stage.is_transactions:
        extra = [name("transaction_type"), name("parent_transaction_id")]
    return sql.SQL(
        """
        WITH chosen AS MATERIALIZED (
          {chosen}
        ),
        inserted AS (
          INSERT INTO {clean} ({key}, {columns})
          SELECT c.new_id, {columns}
          FROM chosen AS c
          WHERE c.outcome = 'inserted'
          ORDER BY c.new_id
          RETURNING {amount} AS amount
        ){details}
        SELECT count(*), coalesce(sum(i.amount), 0) FROM inserted AS i
        """
    ).format(
        chosen=chosen,
        clean=stage.clean,
        key=key,
        columns=joined([*map(name, columns), *extra]),
        amount=name("amount") if stage.is_transactions else sql.SQL("0::numeric"),
        details=_details(stage),
    )


def replace(stage: Stage, kind: str) -> sql.Composed:
    """Return the statement that has clean rows take over the values of newer or older copies."""
    spec = KINDS[kind]
    chosen, columns = _chosen(stage, spec, None, None)
    columns = [*columns, "parent_transaction_id"] if stage.is_transactions else columns
    return sql.SQL(
        """
        WITH chosen AS MATERIALIZED (
          {chosen}
        ),
        replaced AS (
          UPDATE {clean} AS t
          SET {values}
          FROM chosen AS c
          WHERE c.outcome = 'replaced' AND t.{key} = c.new_id
          RETURNING {amount} AS amount
        )
        SELECT count(*), coalesce(sum(r.amount), 0) FROM replaced AS r
        """
    ).format(
        chosen=chosen,
        clean=stage.clean,
        values=joined(sql.SQL("{} = c.{}").format(name(column), name(column)) for column in columns),
        key=name(spec.key),
        amount=sql.SQL("t.amount") if stage.is_transactions else sql.SQL("0::numeric"),
    )


def _chosen(stage: Stage, spec: Kind, after: int | None, last: int | None) -> tuple[sql.Composable, list[str]]:
    values: list[sql.Composable] = []
    joins: dict[str, list[str]] = {}
    columns = list(stage.columns)
    for column in [*columns, *stage.details.staged.values()]:
        value, join = stage.filled(column, spec.name)
        if column in {"created_at", "updated_at"}:
            value = sql.SQL("coalesce({}, now())").format(value)
        values.append(sql.SQL("{} AS {}").format(value, name(column)))
        if join is not None:
            joins[join] = join.removeprefix("c_").split("_")
    laterals: list[sql.Composable] = [
        sql.SQL(
            "LEFT JOIN LATERAL (SELECT x.* FROM {staging} AS x WHERE x.kind = s.kind AND x.legacy_id = s.legacy_id"
            " AND x.source IN ({members}) ORDER BY x.source, x.place LIMIT 1) AS {join}"
            " ON s.source NOT IN ({members})"
        ).format(
            staging=stage.table,
            members=joined(sql.Literal(int(member)) for member in members),
            join=name(join),
        )
        for join, members in joins.items()
    ]
    if stage.is_transactions:
        values += [
            sql.SQL("{} AS transaction_type").format(text(spec.name)),
            sql.SQL("coalesce(pm.new_id, s.parent_ref) AS parent_transaction_id"),
        ]
        laterals.append(
            sql.SQL("LEFT JOIN equitie_private.legacy_ids AS pm ON pm.kind = 'primary' AND pm.legacy_id = s.parent_ref")
        )
    bounds: sql.Composable = sql.SQL("m.outcome = 'replaced'")
    if after is not None:
        bounds = sql.SQL("m.legacy_id > {} AND m.legacy_id <= {}").format(sql.Literal(after), sql.Literal(last))
    return (
        sql.SQL(
            """
            SELECT m.new_id, m.outcome, m.legacy_id, {values}
            FROM equitie_private.legacy_ids AS m
            JOIN {staging} AS s
              ON s.kind = m.kind AND s.legacy_id = m.legacy_id AND s.source = m.source AND s.place = m.place
            {laterals}
            WHERE m.kind = {kind} AND m.outcome <> 'merged' AND {bounds}
            """
        ).format(
            values=joined(values),
            staging=stage.table,
            laterals=joined(laterals, "\n"),
            kind=text(spec.name),
            bounds=bounds,
        ),
        columns,
    )


def _details(stage: Stage) -> sql.Composable:
    details = stage.details
    if not details.columns and not details.is_transactions:
        return sql.SQL("")
    own: list[sql.Composable] = [name(details.own_key)]
    values: list[sql.Composable] = [sql.SQL("c.new_id")]
    worth = [sql.SQL("c.{}").format(name(staged)) for staged in details.staged.values()]
    needed = sql.SQL("num_nonnulls({}) > 0").format(joined(worth)) if worth else sql.SQL("false")
    if details.is_transactions:
        own += [name("equitie_investor_id"), name("equitie_legacy_id")]
        values += [sql.SQL("c.investor_id"), sql.SQL("CASE WHEN c.legacy_id <> c.new_id THEN c.legacy_id END")]
        needed = sql.SQL("({} OR c.legacy_id <> c.new_id)").format(needed)
    return sql.SQL(
        """,
        detailed AS (
          INSERT INTO {table} ({columns})
          SELECT {values}
          FROM chosen AS c
          WHERE {needed}
        )"""
    ).format(
        table=details.identifier,
        columns=joined([*own, *map(name, details.columns)]),
        values=joined([*values, *worth]),
        needed=needed,
    )


def count_inserted(stage: Stage, kind: str) -> sql.Composed:
    """Return the statement that counts the rows of a run that stand in the clean table, and their money."""
    spec = KINDS[kind]
    return sql.SQL(
        "SELECT count(*), coalesce(sum({}), 0)::numeric FROM equitie_private.legacy_ids AS m"
        " JOIN {} AS t ON t.{} = m.new_id WHERE m.kind = {} AND m.run_id = {} AND m.outcome = 'inserted'"
    ).format(
        sql.SQL("t.amount") if stage.is_transactions else sql.SQL("0"),
        stage.clean,
        name(spec.key),
        text(kind),
        sql.Literal(stage.run_id),
    )


def delete_inserted(kind: str, after: int, last: int) -> sql.Composed:
    """Return the statement that deletes a range of the rows a run has inserted.

    Companies, deals and investors that rows of others refer to stay: their foreign keys would take those rows along.
    """
    spec = KINDS[kind]
    day: sql.Composable = sql.SQL("")
    if spec.is_transaction:
        # By id alone every partition would be asked: a small id has an entry that names its day, others carry it.
        day = sql.SQL(
            " AND t.transaction_date = coalesce((SELECT y.transaction_date FROM equitie_private.stray_transactions AS y"
            " WHERE y.transaction_id = m.new_id), equitie_private.transaction_day(m.new_id))"
        )
    elif kind == "company":
        day = sql.SQL(
            " AND NOT EXISTS (SELECT FROM public.deals_clean AS u WHERE t.company_id IN"
            " (u.underlying_company_id, u.partner_company_id, u.holding_entity))"
        )
    else:
        day = sql.SQL(" AND NOT EXISTS (SELECT FROM public.transactions_clean AS u WHERE u.{c} = t.{c})").format(
            c=name(spec.key)
        )
    if kind in {"company", "investor"}:
        day = sql.SQL("{} AND NOT EXISTS (SELECT FROM public.user_profiles AS v WHERE v.{c} = t.{c})").format(
            day, c=name(spec.key)
        )
    return sql.SQL(
        "DELETE FROM public.{} AS t USING equitie_private.legacy_ids AS m"
        " WHERE m.kind = {} AND m.outcome = 'inserted' AND m.legacy_id > {} AND m.legacy_id <= {} AND t.{} = m.new_id{}"
    ).format(name(spec.table), text(kind), sql.Literal(after), sql.Literal(last), name(spec.key), day)
