"""The copy phase: every old row is read, judged, decided about and inserted, batch by batch, and the books are checked.

Nothing is inserted before everything has been decided and adds up. A batch and the note that it is done are one
transaction, so a run that was killed goes on after its last batch.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import attrs
from psycopg import sql
from psycopg.types.json import Jsonb

from equitie_data.errors import LegacyError
from equitie_data.legacy import deciding, inserting, months
from equitie_data.legacy.composing import joined, name, raw, text
from equitie_data.legacy.kinds import KINDS, TRANSACTION_KINDS
from equitie_data.legacy.ledger import BUCKETS, Ledger, Step, Tally
from equitie_data.legacy.reading import whole
from equitie_data.legacy.staging import stage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from psycopg import Connection

    from equitie_data.legacy.ledger import Options
    from equitie_data.legacy.sources import Source
    from equitie_data.legacy.staging import Stage

__all__ = ["Copying", "check_balance", "has_details"]

_PARENT_COLUMNS: Final = ("deal_id", "transaction_date", "status", "currency")


@attrs.define(eq=False)
class Copying:
    """One run's copy phase.

    Attributes:
        conn: The owner's session, autocommit; a surrounding transaction makes the whole phase one.
        run_id: The run.
        sources: The old tables.
        options: What the user decided.
        batch_rows: Rows per batch.
        on_progress: Told the step and the rows of every batch that is done.
    """

    conn: Connection[Any]
    run_id: int
    sources: tuple[Source, ...]
    options: Options
    batch_rows: int
    on_progress: Callable[[str, int], object]
    ledger: Ledger = attrs.field(init=False)
    stages: dict[str, Stage] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Put together what is filled from what."""
        self.ledger = Ledger(self.conn, self.run_id)
        groups = [[KINDS[kind]] for kind in ("company", "deal", "investor")]
        groups.append([KINDS[kind] for kind in TRANSACTION_KINDS])
        stages = [
            stage_of(kinds, self.sources, run_id=self.run_id, on_conflict=self.options.on_conflict) for kinds in groups
        ]
        self.stages = {stage.details.kind: stage for stage in stages}

    def set_up(self) -> None:
        """Make the staging tables, and the tables for what goes on beside the clean rows."""
        for stage in self.stages.values():
            for statement in [*stage.create(), *(stage.details.create() if has_details(stage) else ())]:
                self.conn.execute(statement)

    def decide_all(self, *, insert_entities: bool = True) -> Tally:
        """Read and judge every row; companies, deals and investors are inserted on the way, for what refers to them."""
        self._adopt_standing()
        for kind in ("company", "deal", "investor"):
            stage = self.stages[kind]
            for source in stage.sources:
                self._read(stage, source)
            self._index(stage)
            self._decide(stage, kind)
            self._settle_unique(stage, kind)
            self._refuse_conflicts()
            if insert_entities:
                self._insert(stage, kind)
            self._make_labels()
        stage = self.stages["transaction"]
        for source in stage.sources:
            if source.kind == "primary":
                self._read(stage, source)
        self._index(stage)
        self._decide(stage, "primary")
        self._make_parents(stage)
        for source in stage.sources:
            if source.kind != "primary":
                self._read(stage, source)
        for kind in TRANSACTION_KINDS[1:]:
            self._decide(stage, kind)
        self._refuse_conflicts()
        total = self.ledger.total()
        check_balance(total)
        return total

    def insert_transactions(self) -> months.Months:
        """Make the partitions that are missing, and insert what was decided."""
        stage = self.stages["transaction"]
        stored = self.conn.execute(
            "SELECT counts FROM equitie_private.legacy_steps WHERE run_id = %s AND step = 'months'", (self.run_id,)
        ).fetchone()
        if stored is not None:
            made = months.Months(**stored[0])
        else:
            made = months.ensure(self.conn, stage, self.options.months, self._transaction)
            self.conn.execute(
                "INSERT INTO equitie_private.legacy_steps (run_id, step, done, counts) VALUES (%s, 'months', true, %s)",
                (self.run_id, Jsonb(attrs.asdict(made))),
            )
            self.on_progress("months", 0)
        for kind in TRANSACTION_KINDS:
            self._insert(stage, kind)
        self._check_inserted()
        return made

    def clear(self) -> None:
        """Remove the staging tables."""
        for stage in self.stages.values():
            self.conn.execute(stage.drop())

    def staging_is_whole(self) -> bool:
        """Whether the staging tables hold what the ledger says: a crash of the server empties them."""
        for stage in self.stages.values():
            there = self.conn.execute(
                "SELECT to_regclass(%s)::text", (f"equitie_private.legacy_staging_{stage.details.kind}",)
            ).fetchone()
            if there != (f"equitie_private.legacy_staging_{stage.details.kind}",):
                return False
            staged = sum(
                tally.of(bucket="read", source=source.number)[0] - tally.of(bucket="rejected", source=source.number)[0]
                for source in stage.sources
                for tally in [self.ledger.step(f"read:{source.label}").tally]
            )
            if self._one(sql.SQL("SELECT count(*) FROM {}").format(stage.table)) != (staged,):
                return False
        return True

    def _transaction(self) -> Any:
        return self.conn.transaction()

    def _one(self, statement: sql.Composed) -> tuple[Any, ...]:
        row = self.conn.execute(statement).fetchone()
        assert row is not None  # noqa: S101 - an aggregate without GROUP BY has a row
        return tuple(row)

    def _adopt_standing(self) -> None:
        """Where an old table is missing, its ids are those of the clean table."""
        step = self.ledger.step("adopt")
        if step.done:
            return
        with self._transaction():
            for kind in ("company", "deal", "investor"):
                stage = self.stages[kind]
                if not stage.sources:
                    self.conn.execute(
                        sql.SQL(
                            "INSERT INTO equitie_private.legacy_ids (kind, legacy_id, new_id, run_id, outcome)"
                            " SELECT {}, c.{key}, c.{key}, {}, 'existing' FROM {} AS c"
                        ).format(sql.Literal(kind), sql.Literal(self.run_id), stage.clean, key=name(stage.kinds[0].key))
                    )
            self.ledger.record("adopt", Step(done=True))
        self.on_progress("adopt", 0)

    def _read(self, stage: Stage, source: Source) -> None:
        label = f"read:{source.label}"
        step = self.ledger.step(label)
        (blocks,) = self._one(
            sql.SQL("SELECT pg_relation_size({}::regclass) / current_setting('block_size')::bigint").format(
                sql.Literal(source.identifier.as_string(self.conn))
            )
        )
        per_batch = max(1, blocks * self.batch_rows // max(source.rows, 1))
        first = max(step.position, 0)
        while not step.done:
            last = first + per_batch
            with self._transaction():
                # The last batch has no end: a block more costs nothing, one less would lose its rows.
                counted = self.conn.execute(stage.read(source, first, last if last < blocks else None)).fetchall()
                rows = 0
                for kind, read, money, checksum, rejected, rejected_money in counted:
                    step.tally.add(source.number, kind, "read", read, money)
                    step.tally.add(source.number, kind, "rejected", rejected, rejected_money)
                    step.tally.add_checksum(source.number, checksum)
                    rows += read
                first = step.position = last
                step.done = last >= blocks
                self.ledger.record(label, step)
            self.on_progress(label, rows)

    def _index(self, stage: Stage) -> None:
        label = f"index:{stage.details.kind}"
        if not self.ledger.step(label).done:
            with self._transaction():
                for statement in stage.index():
                    self.conn.execute(statement)
                self.ledger.record(label, Step(done=True))
            self.on_progress(label, 0)

    def _decide(self, stage: Stage, kind: str) -> None:
        label = f"decide:{kind}"
        step = self.ledger.step(label)
        while not step.done:
            with self._transaction():
                (last,) = self._one(stage.next_ids(kind, step.position, self.batch_rows))
                rows = 0
                if last is None:
                    step.done = True
                    self.conn.execute("ANALYZE equitie_private.legacy_ids")
                else:
                    # A batch is joined to parts of itself, of which the planner expects next to nothing; what is
                    # looked up by index is a LATERAL join, which this leaves alone.
                    self.conn.execute("SET LOCAL enable_nestloop = off")
                    decided = self.conn.execute(deciding.decide(stage, kind, step.position, last)).fetchall()
                    self.conn.execute("SET LOCAL enable_nestloop = on")
                    for source, verdict, count, money, conflicts in decided:
                        step.tally.add(source, kind, "loser" if verdict == "stands" else verdict, count, money)
                        rows += count
                        for legacy_id in conflicts or ():
                            step.tally.add(int(legacy_id), kind, "conflict", 1, 0)
                    step.position = last
                self.ledger.record(label, step)
            self.on_progress(label, rows)

    def _settle_unique(self, stage: Stage, kind: str) -> None:
        """Have no two rows share a name, code or address that must be one row's alone."""
        spec = KINDS[kind]
        label = f"settle:{kind}"
        if spec.unique is None or self.ledger.step(label).done:
            return
        step = Step(done=True)
        order = {
            "fail": "s.legacy_id",
            "first": "coalesce(s.updated_at, s.created_at), s.legacy_id",
            "latest": "coalesce(s.updated_at, s.created_at) DESC, s.legacy_id",
        }[self.options.on_conflict]
        same = [c for c in stage.columns if c not in {"created_at", "updated_at"}]
        parameters = {
            "kind": sql.Literal(kind),
            "staging": stage.table,
            "unique": name(spec.unique),
            "clean": stage.clean,
            "key": name(spec.key),
            "order": raw(order),
            "left": joined(sql.SQL("s.{}").format(name(column)) for column in same),
            "right": joined(sql.SQL("first_value(s.{}) OVER w").format(name(column)) for column in same),
        }
        with self._transaction():
            shared = self.conn.execute(
                sql.SQL(
                    """
                    SELECT u.legacy_id, u.source, coalesce(u.standing, u.first_id), u.standing IS NULL AND u.same
                    FROM (
                      SELECT
                        s.legacy_id, s.source, row_number() OVER w AS line, first_value(m.new_id) OVER w AS first_id,
                        ROW({left}) IS NOT DISTINCT FROM ROW({right}) AS same,
                        (SELECT c.{key} FROM {clean} AS c WHERE c.{unique} = s.{unique} AND NOT EXISTS (
                          SELECT FROM equitie_private.legacy_ids AS o
                          WHERE o.kind = {kind} AND o.new_id = c.{key} AND o.outcome = 'replaced'
                        ) AND c.{key} <> m.new_id) AS standing
                      FROM equitie_private.legacy_ids AS m
                      JOIN {staging} AS s
                        ON s.legacy_id = m.legacy_id AND s.source = m.source AND s.place = m.place
                      WHERE m.kind = {kind} AND m.outcome IN ('inserted', 'replaced') AND s.{unique} IS NOT NULL
                      WINDOW w AS (PARTITION BY s.{unique} ORDER BY {order})
                    ) AS u
                    WHERE u.line > 1 OR u.standing IS NOT NULL
                    ORDER BY u.legacy_id
                    """
                ).format(**parameters)
            ).fetchall()
            for legacy_id, source, holder, same_content in shared:
                self._give_way(
                    stage,
                    kind,
                    step.tally,
                    legacy_id=legacy_id,
                    source=source,
                    holder=holder,
                    same_content=same_content,
                )
            self.ledger.record(label, step)
        self.on_progress(label, len(shared))

    def _give_way(
        self, stage: Stage, kind: str, tally: Tally, *, legacy_id: int, source: int, holder: int, same_content: bool
    ) -> None:
        spec = KINDS[kind]
        assert spec.unique is not None  # noqa: S101 - the caller looked
        merged = kind == "company"
        if not (merged and same_content):
            tally.add(legacy_id, kind, "conflict", 1, 0)
        parameters = {
            "run": sql.Literal(self.run_id),
            "kind": text(kind),
            "id": sql.Literal(legacy_id),
            "source": sql.Literal(source),
            "holder": sql.Literal(holder),
            "staging": stage.table,
            "unique": name(spec.unique),
            "outcome": text("loser" if merged else "value left out"),
            "reason": text(
                f"its {spec.unique} is that of another {kind}" + (", which stands for it" if merged else "")
            ),
            "table": next(s.identifier for s in stage.sources if s.number == source),
        }
        if not (merged and same_content):
            self.conn.execute(
                sql.SQL(
                    "INSERT INTO equitie_private.legacy_rejects"
                    " (run_id, source, kind, legacy_id, outcome, reason, original)"
                    " SELECT {run}, {source}, {kind}, {id}, {outcome}, {reason}, to_jsonb(x) FROM ONLY {table} AS x"
                    " JOIN equitie_private.legacy_ids AS m"
                    " ON m.place = x.ctid AND m.kind = {kind} AND m.legacy_id = {id}"
                ).format(**parameters)
            )
        if merged:
            tally.add(source, kind, "inserted", -1, 0)
            tally.add(source, kind, "duplicate" if same_content else "loser", 1, 0)
            statement = (
                "UPDATE equitie_private.legacy_ids SET outcome = 'merged', new_id = {holder}"
                " WHERE kind = {kind} AND legacy_id = {id}"
            )
        else:
            statement = "UPDATE {staging} SET {unique} = NULL WHERE kind = {kind} AND legacy_id = {id}"
        self.conn.execute(raw(statement).format(**parameters))

    def _refuse_conflicts(self) -> None:
        if self.options.on_conflict != "fail":
            return
        found = [(kind, legacy_id) for (legacy_id, kind, bucket) in self.ledger.total().counted if bucket == "conflict"]
        if not found:
            return
        by_kind = {kind: sorted(i for k, i in found if k == kind) for kind in KINDS}
        shown = "; ".join(
            f"{KINDS[kind].plural} {', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}"
            for kind, ids in by_kind.items()
            if ids
        )
        raise LegacyError(
            f"Copies of the same id, or of the same unique name, differ: {shown}. Nothing was taken over; mend them, "
            "or choose with --on-conflict latest or --on-conflict first (`legacy plan` lists them)."
        )

    def make_lookups(self, originals: Mapping[int, sql.Identifier]) -> None:
        """Make what a later reading of the originals looks things up in.

        Args:
            originals: Where each source stands now, by number.
        """
        self._make_labels()
        self.conn.execute("DROP TABLE IF EXISTS pg_temp.legacy_parents")
        self.conn.execute(
            "CREATE TEMPORARY TABLE legacy_parents"
            " (legacy_id bigint, deal_id bigint, transaction_date date, status text, currency text)"
        )
        stage = self.stages["transaction"]
        for source in stage.sources_of("primary"):
            if source.kind != "primary":
                continue
            self.conn.execute(stage.parents_in(source, originals[source.number], _PARENT_COLUMNS))
        self.conn.execute("ANALYZE pg_temp.legacy_parents")

    def _make_labels(self) -> None:
        """Names by which rows may refer to companies, deals and investors; NULL for the id of one that several have."""
        parts = [
            "SELECT 'company', c.company_name, c.company_id FROM public.companies_clean AS c",
            "SELECT 'deal', d.deal_name, d.deal_id FROM public.deals_clean AS d",
            "SELECT 'deal', d.deal_code, d.deal_id FROM public.deals_clean AS d WHERE d.deal_code IS NOT NULL",
            "SELECT 'investor', i.full_name, i.investor_id FROM public.investors_clean AS i",
        ]
        with self._transaction():
            self.conn.execute("DROP TABLE IF EXISTS pg_temp.legacy_labels")
            self.conn.execute(
                sql.SQL(
                    "CREATE TEMPORARY TABLE legacy_labels AS"
                    " SELECT n.kind, n.label, CASE WHEN count(DISTINCT n.id) = 1 THEN min(n.id) END AS id"
                    " FROM (SELECT l.kind, equitie_private.legacy_name(l.label) AS label, l.id"
                    " FROM ({}) AS l (kind, label, id)) AS n"
                    " WHERE n.label IS NOT NULL GROUP BY n.kind, n.label"
                ).format(joined(map(raw, parts), " UNION ALL "))
            )
            self.conn.execute("ANALYZE pg_temp.legacy_labels")

    def _make_parents(self, stage: Stage) -> None:
        """What rows that belong to a primary transaction may take over from it."""
        wanted: list[sql.Composable] = [
            sql.SQL("SELECT {} FROM ONLY {} AS s").format(whole(source.parent), source.identifier)
            for source in stage.sources
            if source.spec.parent_required and source.parent is not None
        ] or [sql.SQL("SELECT NULL::bigint")]
        columns = joined(map(name, _PARENT_COLUMNS))
        standing: sql.Composable = sql.SQL("")
        if not stage.sources_of("primary"):
            standing = sql.SQL(
                " UNION ALL SELECT t.transaction_id, {} FROM public.transactions_clean AS t"
                " WHERE t.transaction_type = 'primary' AND t.transaction_id IN (SELECT w.id FROM wanted AS w)"
            ).format(columns)
        with self._transaction():
            self.conn.execute("DROP TABLE IF EXISTS pg_temp.legacy_parents")
            self.conn.execute(
                sql.SQL(
                    "CREATE TEMPORARY TABLE legacy_parents AS WITH wanted (id) AS ({wanted})"
                    " SELECT m.legacy_id, {columns} FROM equitie_private.legacy_ids AS m"
                    " JOIN {staging} AS s ON s.kind = 'primary' AND s.legacy_id = m.legacy_id"
                    " AND s.source = m.source AND s.place = m.place"
                    " WHERE m.kind = 'primary' AND m.legacy_id IN (SELECT w.id FROM wanted AS w){standing}"
                ).format(
                    wanted=joined(wanted, " UNION "),
                    columns=joined(sql.SQL("s.{}").format(name(column)) for column in _PARENT_COLUMNS),
                    staging=stage.table,
                    standing=standing,
                )
            )
            self.conn.execute("ANALYZE pg_temp.legacy_parents")

    def _insert(self, stage: Stage, kind: str) -> None:
        label = f"insert:{kind}"
        step = self.ledger.step(label)
        while not step.done:
            with self._transaction():
                (last,) = self._one(inserting.next_decided(stage, kind, step.position, self.batch_rows))
                rows = 0
                if last is None:
                    replaced, money = self._one(inserting.replace(stage, kind))
                    step.tally.add(0, kind, "replaced", replaced, money)
                    step.done = True
                else:
                    rows, money = self._one(inserting.insert(stage, kind, step.position, last))
                    step.tally.add(0, kind, "inserted", rows, money)
                    step.position = last
                self.ledger.record(label, step)
            self.on_progress(label, rows)

    def _check_inserted(self) -> None:
        """Compare what stands in the clean tables with what was decided, in rows and in money."""
        decided = self.ledger.total()
        there = self.ledger.total(["insert:"])
        for stage in self.stages.values():
            for kind in (each.name for each in stage.kinds):
                standing = self._one(inserting.count_inserted(stage, kind))
                inserted = decided.of(bucket="inserted", kind=kind)
                _compare(kind, "inserted", inserted, standing)
                _compare(
                    kind, "replaced", decided.of(bucket="replaced", kind=kind), there.of(bucket="replaced", kind=kind)
                )


def _compare(kind: str, bucket: str, wanted: tuple[int, Decimal], found: tuple[Any, ...]) -> None:
    if wanted != found:
        raise LegacyError(
            f"{wanted[0]:,} {KINDS[kind].plural} over {wanted[1]} were to be {bucket}, but {found[0]:,} over "
            f"{found[1]} stand in the clean table: look for whoever, or whichever trigger, drops or changes rows there."
        )


def has_details(stage: Stage) -> bool:
    """Whether anything goes on beside the rows of a clean table; ids of transactions may."""
    return bool(stage.details.columns) or (stage.is_transactions and bool(stage.sources))


def check_balance(total: Tally, kinds: Iterable[str] = KINDS) -> None:
    """Check that what was read is what became of it, by kind, in rows and in money.

    Raises:
        LegacyError: It is not.
    """
    for kind in kinds:
        read = total.of(bucket="read", kind=kind)
        ends = [total.of(bucket=bucket, kind=kind) for bucket in BUCKETS[1:]]
        became = (sum(end[0] for end in ends), sum((end[1] for end in ends), Decimal(0)))
        if read != became:
            raise LegacyError(
                f"The books do not balance: {read[0]:,} {KINDS[kind].plural} over {read[1]} were read, but "
                f"{became[0]:,} over {became[1]} are accounted for. Nothing was taken over; please report this."
            )
