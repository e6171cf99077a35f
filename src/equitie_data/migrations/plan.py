"""What a run would do: which migrations, in which steps, behind which locks on tables of which size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from equitie_data.migrations.history import read_history
from equitie_data.migrations.locks import MODES, locks_of, runs_code
from equitie_data.migrations.pending import before_deployment, pending_of
from equitie_data.migrations.run import wanted_of
from equitie_data.migrations.steps import matching_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from equitie_data.migrations.directories import MigrationDirectory
    from equitie_data.migrations.files import Migration, Phase

__all__ = ["ExpectedLock", "PlannedMigration", "plan"]

_ORDER = list(MODES)
_SIZE = (
    "SELECT t.oid::regclass::text, s.bytes, s.rows FROM ("
    "  SELECT coalesce(i.indrelid, c.oid) AS oid FROM pg_catalog.pg_class AS c"
    "  LEFT JOIN pg_catalog.pg_index AS i ON i.indexrelid = c.oid WHERE c.oid = to_regclass(%s)"
    ") AS t CROSS JOIN LATERAL ("
    "  SELECT coalesce(sum(pg_catalog.pg_total_relation_size(m.oid)), 0)::bigint AS bytes,"
    "    coalesce(sum(greatest(m.reltuples, 0)), 0)::bigint AS rows"
    "  FROM pg_catalog.pg_class AS m WHERE m.oid = t.oid"
    "  OR m.oid IN (SELECT p.relid FROM pg_catalog.pg_partition_tree(t.oid) AS p)"
    ") AS s"
)


@attrs.frozen(kw_only=True)
class ExpectedLock:
    """The strongest lock a migration takes on a table that exists, as far as its text tells.

    Attributes:
        table: The table.
        mode: PostgreSQL's name of the lock.
        stops: Whom it stands in the way of.
        bytes: Size of the table with its indexes and partitions.
        rows: How many rows it has, by the planner's estimate.
    """

    table: str
    mode: str
    stops: str
    bytes: int
    rows: int


@attrs.frozen(kw_only=True)
class PlannedMigration:
    """A migration that a run would apply.

    Attributes:
        directory: Its directory.
        version: Its number.
        name: Its name.
        summary: What it is for.
        phase: ``pre`` or ``post``: before or after the deployment.
        transactional: Whether it is one transaction; otherwise each statement is a step.
        steps_done: How many steps an earlier run did.
        statements: Its statements.
        locks: What it locks of the tables there are now.
        code: How many of its statements run code, whose locks nobody can tell from here.
    """

    directory: str
    version: int
    name: str
    summary: str
    phase: Phase
    transactional: bool
    steps_done: int
    statements: tuple[str, ...]
    locks: tuple[ExpectedLock, ...]
    code: int


def plan(
    conn: Connection[Any], directories: Sequence[MigrationDirectory], *, to: str = "", before: bool = False
) -> tuple[PlannedMigration, ...]:
    """Return what a run would apply, in order; see `equitie_data.migrate.plan`."""
    wanted = wanted_of(directories, to)
    planned: list[PlannedMigration] = []
    histories = {each.name: read_history(conn, each.name) for each in directories}
    lacking = {each.name: pending_of(each, histories[each.name].applied) for each in directories}
    for name, migrations in wanted.items():
        pending = tuple(migration for migration in migrations if migration in lacking[name])
        for migration in before_deployment(pending) if before else pending:
            recorded = histories[name].steps.get(migration.version, ())
            planned.append(_planned(conn, migration, matching_steps(migration, recorded)))
    return tuple(planned)


def _planned(conn: Connection[Any], migration: Migration, done: int) -> PlannedMigration:
    strongest: dict[str, ExpectedLock] = {}
    code = 0
    for statement in migration.statements[done:]:
        code += runs_code(statement.text)
        for lock in locks_of(statement.text):
            row = conn.execute(_SIZE, (lock.relation,)).fetchone()
            if row is None:
                continue  # not there yet, so nobody can be using it
            table, size, rows = row
            known = strongest.get(table)
            if known is None or _ORDER.index(known.mode) < _ORDER.index(lock.mode):
                strongest[table] = ExpectedLock(
                    table=table, mode=lock.mode, stops=MODES[lock.mode], bytes=size, rows=rows
                )
    return PlannedMigration(
        directory=migration.directory,
        version=migration.version,
        name=migration.name,
        summary=migration.summary,
        phase=migration.phase,
        transactional=migration.transactional,
        steps_done=done,
        statements=tuple(statement.text for statement in migration.statements),
        locks=tuple(sorted(strongest.values(), key=lambda lock: (-_ORDER.index(lock.mode), lock.table))),
        code=code,
    )
