"""Taking a run back: what it copied is removed, and after the switch the old tables get their names again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg import sql

from equitie_data import _sql
from equitie_data.errors import LegacyError
from equitie_data.legacy import backup
from equitie_data.legacy.composing import joined, name
from equitie_data.legacy.copying import has_details
from equitie_data.legacy.inserting import delete_inserted, next_decided
from equitie_data.legacy.kinds import KINDS
from equitie_data.legacy.session import REASON
from equitie_data.legacy.sources import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from equitie_data.legacy.copying import Copying
    from equitie_data.legacy.ledger import Run
    from equitie_data.legacy.views import View

__all__ = ["RollbackReport", "others_changes", "restore", "undo_copy"]

_FIRST: Final = -(2**63)


@attrs.frozen(kw_only=True)
class RollbackReport:
    """What a rollback did.

    Attributes:
        run_id: The run.
        restored: Old tables that have their names again.
        removed: Rows that were taken out of the clean tables, by kind.
        kept: Rows that stay in the clean tables because rows of others refer to them, by kind.
        discarded: Changes since the takeover that the old tables know nothing of, by table.
    """

    run_id: int
    restored: tuple[str, ...]
    removed: dict[str, int]
    kept: dict[str, int]
    discarded: dict[str, int]


def others_changes(conn: Connection[Any], run: Run) -> dict[str, int]:
    """Count what others changed: since the switch in the clean tables, before it in rows of this run.

    Returns:
        Rows by table; nothing where nothing changed.
    """
    query = "legacy_changes_since" if run.state == "switched" else "legacy_changes_of_rows"
    parameters = {"mark": run.audit_mark, "reason": REASON, "run_id": run.run_id}
    return dict(conn.execute(_sql.query(query), parameters).fetchall())


def undo_copy(
    conn: Connection[Any],
    run: Run,
    copying: Copying,
    *,
    finish: bool,
    state: str = "undone",
    discard: bool = False,
    on_progress: Callable[[str, int], object] = lambda _step, _rows: None,
) -> RollbackReport:
    """Remove what an unfinished run has copied, batch by batch.

    Args:
        conn: The owner's session.
        run: The run.
        copying: Its copy phase.
        finish: Whether the run ends with it; otherwise it begins anew.
        state: What the run becomes.
        discard: Whether rows of the run that others have changed since are removed too.
        on_progress: Told the rows of every batch.

    Raises:
        LegacyError: Others have changed rows of the run.
    """
    changes = others_changes(conn, run)
    if changes and not discard and run.state != "undoing":
        raise LegacyError(
            f"Rows that were copied have been changed by others since ({said(changes)}), so they were not removed: "
            "`legacy rollback --discard-new` removes them, `legacy migrate` goes on with them."
        )
    with conn.transaction():
        conn.execute("UPDATE equitie_private.legacy_runs SET state = 'undoing' WHERE run_id = %s", (run.run_id,))
        # First, so that they refer to their own again and not to rows that are about to go.
        _restore_displaced(conn, run)
    removed = {}
    for kind in reversed(KINDS):
        removed[kind] = _remove(conn, copying, kind, conn.transaction, on_progress)
    with conn.transaction():
        kept = _kept(conn, run)
        _drop_tables(conn, copying)
        _forget(conn, run, rejects=not finish)
        if finish:
            backup.unblock_writes(conn, copying.sources)
            conn.execute(
                "UPDATE equitie_private.legacy_runs SET state = %s, rolled_back_at = clock_timestamp()"
                " WHERE run_id = %s",
                (state, run.run_id),
            )
        else:
            conn.execute("UPDATE equitie_private.legacy_runs SET state = 'copying' WHERE run_id = %s", (run.run_id,))
    return RollbackReport(run_id=run.run_id, restored=(), removed=removed, kept=kept, discarded=changes)


def restore(
    conn: Connection[Any], run: Run, copying: Copying, views: Sequence[View], *, discard: bool
) -> RollbackReport:
    """Give the old tables their names again, in one transaction, and take the run's rows out of the clean tables.

    Raises:
        LegacyError: Others have changed something since, or the backup is gone.
    """
    restoration = run.restoration
    assert restoration is not None  # noqa: S101 - written with the switch
    with conn.transaction():
        if conn.execute("SELECT to_regnamespace(%s)::text", (restoration["schema"],)).fetchone() == (None,):
            raise LegacyError(
                f"The backup {restoration['schema']} is gone: there is nothing to restore the old tables from."
            )
        for view in views:
            conn.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(view.source.identifier))
        for table in sorted({KINDS[kind].table for kind in KINDS}):
            conn.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(name("public", table)))
        changes = others_changes(conn, run)
        if changes and not discard:
            raise LegacyError(
                f"{sum(changes.values()):,} rows were changed since the takeover, of which the old tables know nothing "
                f"({said(changes)}): --discard-new rolls back all the same."
            )
        for view in views:
            for statement in view.drop():
                conn.execute(statement)
        conn.execute("DROP TRIGGER IF EXISTS follow_legacy_details ON public.transactions_clean")
        _restore_displaced(conn, run)
        removed = {
            kind: _remove(conn, copying, kind, conn.transaction, lambda _step, _rows: None) for kind in reversed(KINDS)
        }
        kept = _kept(conn, run)
        _drop_tables(conn, copying)
        backup.put_back(conn, restoration, copying.sources)
        _forget(conn, run, rejects=True)
        conn.execute(
            "UPDATE equitie_private.legacy_runs SET state = 'rolled back', rolled_back_at = clock_timestamp()"
            " WHERE run_id = %s",
            (run.run_id,),
        )
    return RollbackReport(
        run_id=run.run_id,
        restored=tuple(source.label for source in copying.sources),
        removed=removed,
        kept=kept,
        discarded=changes,
    )


def said(changes: dict[str, int]) -> str:
    """Return changes as a sentence has them."""
    return ", ".join(f"{rows:,} in {table}" for table, rows in sorted(changes.items()))


def _remove(
    conn: Connection[Any],
    copying: Copying,
    kind: str,
    transaction: Callable[[], Any],
    on_progress: Callable[[str, int], object],
) -> int:
    stage = copying.stages["transaction" if KINDS[kind].is_transaction else kind]
    after, removed = _FIRST, 0
    while True:
        row = conn.execute(next_decided(stage, kind, after, copying.batch_rows)).fetchone()
        if row is None or row[0] is None:
            return removed
        with transaction():
            deleted = conn.execute(delete_inserted(kind, after, row[0])).rowcount
        removed += deleted
        on_progress(f"remove:{kind}", deleted)
        after = row[0]


def _kept(conn: Connection[Any], run: Run) -> dict[str, int]:
    kept = {}
    for kind in ("company", "deal", "investor"):
        spec = KINDS[kind]
        row = conn.execute(
            sql.SQL(
                "SELECT count(*) FROM equitie_private.legacy_ids AS m JOIN public.{} AS t ON t.{} = m.new_id"
                " WHERE m.kind = {} AND m.run_id = {} AND m.outcome = 'inserted'"
            ).format(name(spec.table), name(spec.key), sql.Literal(kind), sql.Literal(run.run_id))
        ).fetchone()
        kept[kind] = int(row[0]) if row else 0
    return kept


def _restore_displaced(conn: Connection[Any], run: Run) -> None:
    """Give clean rows that took over an old table's values their own again."""
    tables: dict[str, list[str]] = {}
    for kind in KINDS.values():
        tables.setdefault(kind.table, []).append(kind.name)
    for table, kinds in tables.items():
        spec = KINDS[kinds[0]]
        columns = [field.column for field in spec.fields]
        columns += ["parent_transaction_id"] if spec.is_transaction else []
        conn.execute(
            sql.SQL(
                "UPDATE {clean} AS t SET {assigned} FROM equitie_private.legacy_rejects AS r"
                " CROSS JOIN LATERAL jsonb_populate_record(NULL::{clean}, r.original) AS o"
                " WHERE r.run_id = {run} AND r.outcome = 'displaced' AND r.kind = ANY ({kinds}) AND t.{key} = o.{key}"
            ).format(
                clean=name("public", table),
                assigned=joined(sql.SQL("{c} = o.{c}").format(c=name(column)) for column in columns),
                run=sql.Literal(run.run_id),
                kinds=sql.Literal(kinds),
                key=name(spec.key),
            )
        )


def _drop_tables(conn: Connection[Any], copying: Copying) -> None:
    copying.clear()
    for stage in copying.stages.values():
        if has_details(stage):
            conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(stage.details.identifier))
            conn.execute(
                sql.SQL("DROP FUNCTION IF EXISTS {}()").format(
                    name("equitie_private", f"audit_equitie_private_{stage.details.table}")
                )
            )


def _forget(conn: Connection[Any], run: Run, *, rejects: bool) -> None:
    conn.execute("DELETE FROM equitie_private.legacy_ids WHERE run_id = %s", (run.run_id,))
    conn.execute(
        "DELETE FROM equitie_private.legacy_steps WHERE run_id = %s AND step <> 'before'",
        (run.run_id,),
    )
    if rejects:
        conn.execute("DELETE FROM equitie_private.legacy_rejects WHERE run_id = %s", (run.run_id,))


def sources_of(run: Run) -> tuple[Source, ...]:
    """Return the old tables of a run."""
    return tuple(Source.from_dict(source) for source in run.sources)
