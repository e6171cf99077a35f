"""The flat table becomes a partition as it is; only rows of later months go elsewhere."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

from equitie_data.conversion.definition import run
from equitie_data.conversion.layout import BOUNDARY, LEGACY, LEGACY_KEY, TABLE, TWIN, add_months
from equitie_data.conversion.schema import build_index, create_functions, create_indexes, record
from equitie_data.conversion.steps import EXCHANGE, create_twin, exchange, tidy
from equitie_data.conversion.twin import (
    access,
    add_foreign_keys,
    bind_anew,
    create_partitioned,
    hand_on_numbers,
    move_in,
    triggers,
    unbind,
)
from equitie_data.errors import ConversionError

if TYPE_CHECKING:
    from equitie_data.conversion.definition import Definition
    from equitie_data.conversion.steps import Job, Step

__all__ = ["ATTACH", "validate_constraints"]

_MONTHS_AHEAD = 12


def _functions(job: Job) -> None:
    create_functions(job.conn)


def _indexes(job: Job) -> None:
    create_indexes(job.conn)


def validate_constraints(job: Job) -> None:
    """Validate what was added NOT VALID, and make sure that the key's columns hold no NULL."""
    unproven = job.conn.execute(
        "SELECT quote_ident(k.conname) FROM pg_catalog.pg_constraint AS k"
        " WHERE k.conrelid = %s::regclass AND NOT k.convalidated AND k.contype IN ('c', 'f') AND k.conname <> %s",
        (TABLE, BOUNDARY),
    ).fetchall()
    for (name,) in unproven:
        run(job.conn, f"ALTER TABLE {TABLE} VALIDATE CONSTRAINT {name}")
    nullable = job.conn.execute(
        "SELECT a.attname FROM pg_catalog.pg_attribute AS a"
        " WHERE a.attrelid = %s::regclass AND a.attname = 'transaction_date' AND NOT a.attnotnull",
        (TABLE,),
    ).fetchone()
    if nullable:
        # SET NOT NULL alone would read the whole table under its lock; a valid CHECK spares it that.
        check = "conversion_has_date"
        job.briefly(
            "A constraint",
            f"ALTER TABLE {TABLE} DROP CONSTRAINT IF EXISTS {check}",
            f"ALTER TABLE {TABLE} ADD CONSTRAINT {check} CHECK (transaction_date IS NOT NULL) NOT VALID",
        )
        run(job.conn, f"ALTER TABLE {TABLE} VALIDATE CONSTRAINT {check}")
        job.briefly("A constraint", f"ALTER TABLE {TABLE} ALTER COLUMN transaction_date SET NOT NULL")
        job.briefly("A constraint", f"ALTER TABLE {TABLE} DROP CONSTRAINT {check}")


def _key(job: Job) -> None:
    build_index(
        job.conn,
        f"public.{LEGACY_KEY}",
        f"CREATE UNIQUE INDEX CONCURRENTLY {LEGACY_KEY} ON {TABLE} (transaction_id, transaction_date)",
    )


def _twin(job: Job) -> None:
    boundary = dt.date.fromisoformat(job.fact("boundary"))
    # As far ahead as migration 0004 goes, and at least as many months as are needed for a year from the boundary on.
    last = max(add_months(dt.date.today(), _MONTHS_AHEAD), boundary)  # noqa: DTZ011 - months are not that exact
    months = []
    while boundary <= last:
        months.append(boundary)
        boundary = add_months(boundary, 1)
    create_twin(job, lambda definition: create_partitioned(job.conn, definition, months, indexed=True, wide=False))
    add_foreign_keys(job.conn, job.definition(), (), job.patience, lambda validate: validate(), parent=TWIN)


def _boundary(job: Job) -> None:
    boundary = dt.date.fromisoformat(job.fact("boundary"))
    if add_months(dt.date.today(), 1) >= boundary:  # noqa: DTZ011
        raise ConversionError(
            f"The conversion was prepared for dates before {boundary}, which is too near by now: run `partition undo`,"
            " then `partition convert` again."
        )
    # Last of all: from here to the exchange a row of a later date is refused, because it could not be of the partition.
    job.briefly(
        "A constraint",
        f"ALTER TABLE {TABLE} DROP CONSTRAINT IF EXISTS {BOUNDARY}",
        f"ALTER TABLE {TABLE} ADD CONSTRAINT {BOUNDARY}"
        f" CHECK (transaction_date IS NOT NULL AND transaction_date < '{boundary}') NOT VALID",
    )
    run(job.conn, f"ALTER TABLE {TABLE} VALIDATE CONSTRAINT {BOUNDARY}")


def _exchange(job: Job) -> None:
    boundary = job.fact("boundary")

    def compose(definition: Definition) -> list[str]:
        return [
            *unbind(definition),
            *_become_partition(definition),
            *access(definition),
            *triggers(definition),
            *move_in(definition),
            f"ALTER TABLE {TABLE} ATTACH PARTITION {LEGACY} FOR VALUES FROM (MINVALUE) TO ('{boundary}')",
            (
                f"COMMENT ON TABLE {LEGACY} IS 'Rows of {TABLE} from before {boundary}, as they were before it was"
                " partitioned; python -m equitie_data partition split moves them to their months.'"
            ),
            f"ALTER TABLE {LEGACY} DROP CONSTRAINT {BOUNDARY}",
            *bind_anew(definition, by_id=False),
        ]

    exchange(job, compose, before=lambda: record(job), referenced=True)


def _become_partition(definition: Definition) -> list[str]:
    """Return what takes from the flat table what only its parent may have, and puts it among the partitions."""
    return [
        *(f'DROP TRIGGER "{piece.name}" ON {TABLE}' for piece in definition.of("row trigger", "statement trigger")),
        *(f'DROP POLICY "{piece.name}" ON {TABLE}' for piece in definition.of("policy")),
        f"ALTER TABLE {TABLE} DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY",
        *hand_on_numbers(definition),
        f"ALTER TABLE {TABLE} ALTER COLUMN transaction_id DROP IDENTITY IF EXISTS",
        f"ALTER TABLE {TABLE} ALTER COLUMN transaction_id DROP DEFAULT",
        *(f'DROP SEQUENCE IF EXISTS public."{piece.name}"' for piece in definition.of("sequence")),
        *(
            f'ALTER TABLE {TABLE} DROP CONSTRAINT "{piece.name}"'
            for piece in definition.of("key")
            if piece.statement.startswith("PRIMARY KEY")
        ),
        f"ALTER TABLE {TABLE} ADD CONSTRAINT {LEGACY_KEY} PRIMARY KEY USING INDEX {LEGACY_KEY}",
        *(f"ALTER STATISTICS {piece.name} SET SCHEMA equitie_part" for piece in definition.of("statistics")),
        _REVOKE_FROM_LEGACY,
        f"ALTER TABLE {TABLE} RENAME TO transactions_clean_legacy",
        "ALTER TABLE public.transactions_clean_legacy SET SCHEMA equitie_part",
    ]


_REVOKE_FROM_LEGACY = f"""
DO $revoke$
DECLARE
  grantee text;
BEGIN
  FOR grantee IN
    SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
    FROM pg_catalog.pg_class AS c
    CROSS JOIN LATERAL (
      SELECT x.grantee FROM aclexplode(c.relacl) AS x
      UNION
      SELECT x.grantee
      FROM pg_catalog.pg_attribute AS b
      CROSS JOIN LATERAL aclexplode(b.attacl) AS x
      WHERE b.attrelid = c.oid
    ) AS a
    WHERE c.oid = '{TABLE}'::regclass AND a.grantee <> c.relowner
  LOOP
    -- Privileges on columns go with those on the table.
    EXECUTE format('REVOKE ALL ON TABLE {TABLE} FROM %s', grantee);
  END LOOP;
END
$revoke$
"""


ATTACH: tuple[Step, ...] = (
    ("functions", _functions),
    ("indexes", _indexes),
    ("constraints", validate_constraints),
    ("key", _key),
    ("twin", _twin),
    ("boundary", _boundary),
    (EXCHANGE, _exchange),
    ("tidy", tidy),
)
"""The steps of attaching, in order."""
