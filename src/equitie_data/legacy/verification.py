"""`verify` and `rollback`: where does every old row stand, today and from the originals; and the way back."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg import sql

from equitie_data.errors import LegacyError
from equitie_data.legacy.composing import joined, name, raw, text
from equitie_data.legacy.copying import has_details
from equitie_data.legacy.ledger import standing_run
from equitie_data.legacy.run import copying_of
from equitie_data.legacy.session import REASON, open_session
from equitie_data.legacy.switching import views_of
from equitie_data.legacy.undoing import RollbackReport, restore, undo_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    from equitie_data.legacy.copying import Copying
    from equitie_data.legacy.ledger import Run
    from equitie_data.legacy.sources import Source
    from equitie_data.legacy.staging import Stage

__all__ = ["LegacyVerification", "SourceVerification", "rollback", "verify"]

_WAIT: Final = 60.0  # seconds
_STAMPS: Final = ("created_at", "updated_at")


@attrs.frozen(kw_only=True)
class SourceVerification:
    """Where the rows of one old table stand.

    Attributes:
        table: Its name.
        rows: Rows of the original.
        in_clean: Rows whose values stand in a clean table, once for all copies that agree.
        changed_since: Rows that stand there with values that were changed, or that were deleted, since; the audit log
            has the change.
        listed: Rows that are listed as rejected, or as the loser against another copy.
        missing: Rows that are nowhere.
    """

    table: str
    rows: int
    in_clean: int
    changed_since: int
    listed: int
    missing: int


@attrs.frozen(kw_only=True)
class LegacyVerification:
    """What `verify` found.

    Attributes:
        run_id: The run.
        backup_schema: Where the originals are.
        sources: The old tables.
        amounts: Kind to money read from the originals, and money that is accounted for.
        problems: What is wrong, a sentence each; nothing when every row is accounted for.
    """

    run_id: int
    backup_schema: str | None
    sources: tuple[SourceVerification, ...]
    amounts: dict[str, tuple[Decimal, Decimal]]
    problems: tuple[str, ...]


def verify(dsn: str, *, on_table: Callable[[str], object] = lambda _table: None) -> LegacyVerification:
    """Look for every row of the originals: it stands in a clean table, as itself or as a copy, or it is listed.

    Reads the originals again, in the backup, and compares them with the clean tables as they are now. Changes nothing.

    Args:
        dsn: The database, as its owner.
        on_table: Told each table before it is read.

    Raises:
        LegacyError: No takeover is in force, or the backup is gone.
    """
    with open_session(dsn, _WAIT) as conn:
        run = standing_run(conn)
        if run is None or run.state != "switched":
            raise LegacyError(
                "No takeover is in force: "
                + ("`legacy migrate` was broken off, run it again." if run else "run `legacy migrate` first.")
            )
        assert run.backup_schema is not None  # noqa: S101 - written with the switch
        if conn.execute("SELECT to_regnamespace(%s)::text", (run.backup_schema,)).fetchone() == (None,):
            raise LegacyError(f"The backup {run.backup_schema} is gone: there is nothing left to compare with.")
        with conn.transaction():
            # Temporary tables are what a reading of the originals needs; a READ ONLY transaction may fill those too.
            copying = copying_of(conn, run)
            copying.make_lookups({source.number: moved for source, moved in _moved(run, copying)})
            conn.execute("SET TRANSACTION READ ONLY")
            return _verify(conn, run, copying, on_table)


def rollback(dsn: str, *, discard_new: bool = False, wait: float = _WAIT) -> RollbackReport:
    """Give the old tables their names again, as they were, and take their rows out of the clean tables.

    Args:
        dsn: The database, as its owner.
        discard_new: Whether to do it although rows were changed since, of which the old tables know nothing.
        wait: Seconds to wait for another run.

    Raises:
        LegacyError: There is nothing to roll back, or rows were changed since; the message says how many.
    """
    with open_session(dsn, wait) as conn:
        run = standing_run(conn)
        if run is None:
            raise LegacyError("There is nothing to roll back: no takeover is under way or in force.")
        copying = copying_of(conn, run)
        if run.state != "switched":
            return undo_copy(conn, run, copying, finish=True, state="rolled back", discard=discard_new)
        return restore(conn, run, copying, views_of(conn, copying), discard=discard_new)


def _verify(conn: Connection[Any], run: Run, copying: Copying, on_table: Callable[[str], object]) -> LegacyVerification:
    problems: list[str] = []
    found = []
    amounts: dict[str, tuple[Decimal, Decimal]] = {}
    for source, moved in _moved(run, copying):
        on_table(source.label)
        stage = copying.stages["transaction" if source.spec.is_transaction else source.kind]
        checksum = conn.execute(stage.totals(source, moved)).fetchone()
        read = copying.ledger.total(["read:"])
        rows = read.of(bucket="read", source=source.number)[0]
        if checksum is None or (checksum[0], int(checksum[1])) != (rows, read.checksums.get(source.number, 0)):
            problems.append(f"The original of {source.label} in the backup is not what was taken over any more.")
        counted = conn.execute(_accounting(stage, source, moved)).fetchall()
        by = {"in_clean": 0, "changed_since": 0, "listed": 0, "missing": 0}
        for kind, where, count, money in counted:
            by[where] += count
            had, accounted = amounts.get(kind, (Decimal(0), Decimal(0)))
            amounts[kind] = (had + money, accounted + (money if where != "missing" else 0))
        if by["missing"]:
            problems.append(f"{by['missing']:,} rows of {source.label} are in no clean table and are not listed.")
        found.append(SourceVerification(table=source.label, rows=sum(by.values()), **by))
    return LegacyVerification(
        run_id=run.run_id,
        backup_schema=run.backup_schema,
        sources=tuple(found),
        amounts=amounts,
        problems=tuple(problems),
    )


def _moved(run: Run, copying: Copying) -> Iterator[tuple[Source, sql.Identifier]]:
    assert run.restoration is not None  # noqa: S101 - written with the switch
    names = {table["source"]: table["backup"] for table in run.restoration["tables"]}
    for source in copying.sources:
        yield source, name(run.restoration["schema"], names[source.number])


def _accounting(stage: Stage, source: Source, moved: sql.Identifier) -> sql.Composed:
    """Compose the statement that says where every row of an original stands."""
    reading = stage.readings[source.number]
    spec = source.spec
    columns = [c for c in stage.columns if c in reading.given and c not in _STAMPS]
    casts = {f.column: "bigint" if f.refers_to else "text" for f in spec.fields if f.refers_to or f.type == "text"}
    own: list[sql.Composable] = [sql.SQL("j.{}").format(name(column)) for column in columns]
    clean: list[sql.Composable] = [
        sql.SQL("t.{}{}").format(name(column), raw(f"::{casts[column]}" if column in casts else ""))
        for column in columns
    ]
    if spec.unique in columns:
        # Where another row has the same code or address, this one goes without.
        place = columns.index(spec.unique)
        own[place] = sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(clean[place], own[place])
    if stage.is_transactions and "parent_ref" in reading.given:
        own.append(sql.SQL("coalesce(pm.new_id, j.parent_ref)"))
        clean.append(sql.SQL("t.parent_transaction_id"))
    carried = {column.name for column in source.carried}
    details: sql.Composable = sql.SQL("")
    if has_details(stage):
        details = sql.SQL("LEFT JOIN {} AS d ON d.{} = m.new_id").format(
            stage.details.identifier, name(stage.details.own_key)
        )
        for column in stage.details.columns:
            if column in carried:
                own.append(sql.SQL("(j.original).{}::text").format(name(column)))
                clean.append(sql.SQL("d.{}::text").format(name(column)))
    values = [sql.SQL("{} AS {}").format(reading.values[column], name(column)) for column in columns]
    amount = reading.values.get("amount", sql.SQL("0::numeric"))
    return sql.SQL(
        """
        WITH read AS MATERIALIZED (
          SELECT s AS original, {read} FROM ONLY {table} AS s
        ),
        judged AS MATERIALIZED (
          SELECT
            r.original, {kind} AS kind, r.legacy_id, {parent_ref} AS parent_ref, {reason} AS reason,
            CASE WHEN {amount} NOT IN ('NaN', 'Infinity', '-Infinity') THEN {amount} ELSE 0 END AS money, {values}
          FROM read AS r
          {joins}
        ),
        placed AS MATERIALIZED (
          SELECT
            j.kind, j.money, j.original,
            CASE
              WHEN j.reason IS NOT NULL OR m.new_id IS NULL THEN NULL
              WHEN m.outcome = 'merged' AND {same_name} THEN 'in_clean'
              WHEN t.{key} IS NOT NULL AND ROW({own}) IS NOT DISTINCT FROM ROW({clean}) THEN 'in_clean'
            END AS found,
            m.new_id
          FROM judged AS j
          LEFT JOIN equitie_private.legacy_ids AS m ON m.kind = j.kind AND m.legacy_id = j.legacy_id
          LEFT JOIN {clean_table} AS t ON t.{key} = m.new_id{same_type}
          LEFT JOIN equitie_private.legacy_ids AS pm ON pm.kind = 'primary' AND pm.legacy_id = j.parent_ref
          {details}
        ),
        lost AS (
          SELECT
            p.kind, p.money, p.new_id, to_jsonb(p.original) AS original,
            row_number() OVER (PARTITION BY to_jsonb(p.original)) AS copy
          FROM placed AS p
          WHERE p.found IS NULL
        ),
        listed AS (
          SELECT r.original, count(*) AS copies
          FROM equitie_private.legacy_rejects AS r
          WHERE r.run_id = {run_id} AND r.source = {number} AND r.outcome IN ('rejected', 'loser')
          GROUP BY r.original
        ),
        accounted AS (
          SELECT p.kind, p.found AS place, p.money FROM placed AS p WHERE p.found IS NOT NULL
          UNION ALL
          SELECT
            l.kind,
            CASE
              WHEN l.copy <= coalesce(k.copies, 0) THEN 'listed'
              WHEN l.new_id IS NOT NULL AND EXISTS (
                SELECT FROM public.audit_logs AS a
                WHERE
                  a.entity_type IN ({entity}, {details_entity})
                  AND a.entity_id = l.new_id::text
                  AND a.source = 'trigger'
                  AND a.action IN ('UPDATE', 'DELETE', 'CREATE')
                  AND a.reason IS DISTINCT FROM {reason_said}
              ) THEN 'changed_since'
              ELSE 'missing'
            END,
            l.money
          FROM lost AS l
          LEFT JOIN listed AS k ON k.original = l.original
        )
        SELECT a.kind, a.place, count(*), coalesce(sum(a.money), 0) FROM accounted AS a GROUP BY 1, 2
        """
    ).format(
        read=joined(sql.SQL("{} AS {}").format(value, name(alias)) for alias, value in reading.read.items()),
        table=moved,
        kind=reading.kind,
        parent_ref=reading.values.get("parent_ref", sql.SQL("NULL::bigint")),
        reason=reading.reason,
        amount=amount,
        values=joined(values),
        joins=reading.joins,
        same_name=sql.SQL("t.{u} = j.{u}").format(u=name(spec.unique))
        if spec.unique is not None and spec.unique in columns
        else sql.SQL("false"),
        key=name(spec.key),
        own=joined(own),
        clean=joined(clean),
        clean_table=stage.clean,
        same_type=sql.SQL(" AND t.transaction_type = j.kind") if spec.is_transaction else sql.SQL(""),
        details=details,
        run_id=sql.Literal(stage.run_id),
        number=sql.Literal(source.number),
        entity=text(spec.table),
        details_entity=text(stage.details.table),
        reason_said=text(REASON),
    )
