"""A second copy of the rows that cannot differ from the first, while the first is being written.

Rows are copied while a trigger notes the keys of every change. What was noted is applied until little is left; then,
in one moment without writers, the rest of it, and from that moment on the trigger writes every change to both. So the
copy was made by transactions that are over when the tables are exchanged, and whatever the snapshot of a transaction
shows of the one table, it shows of the other: not even a REPEATABLE READ transaction can tell.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs
import psycopg

from equitie_data.conversion.definition import run
from equitie_data.conversion.layout import SCRATCH, TABLE, TWIN
from equitie_data.conversion.locks import Patience, await_earlier_transactions, briefly
from equitie_data.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

__all__ = ["Mirror", "stop_mirroring"]

_FEW = 200  # changes that may be left for the moment without writers, and
_SOON = 0.05  # seconds that applying what is left may take
_ROUNDS = 50
_ATTEMPTS = 20
_PAUSE = 0.02  # seconds more after each attempt
_MEANWHILE = (
    psycopg.errors.ForeignKeyViolation,
    psycopg.errors.SerializationFailure,
    psycopg.errors.LockNotAvailable,
)

_NOTE_CHANGES = f"""
CREATE OR REPLACE FUNCTION {SCRATCH}.mirror_change() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    INSERT INTO {SCRATCH}.changed (transaction_id, transaction_date) VALUES (OLD.transaction_id, OLD.transaction_date);
  END IF;
  IF TG_OP <> 'DELETE' THEN
    INSERT INTO {SCRATCH}.changed (transaction_id, transaction_date) VALUES (NEW.transaction_id, NEW.transaction_date);
  END IF;
  RETURN NULL;
END
$body$
"""

_MIRROR_CHANGES = """
CREATE OR REPLACE FUNCTION {scratch}.mirror_change() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
  IF TG_OP = 'INSERT' THEN
    INSERT INTO {twin} ({columns}) OVERRIDING SYSTEM VALUE VALUES ({values});
    RETURN NULL;
  ELSIF TG_OP = 'UPDATE' THEN
    UPDATE {twin} AS t
    SET ({columns}) = ROW ({values})
    WHERE t.transaction_id = OLD.transaction_id AND t.transaction_date = OLD.transaction_date;
  ELSE
    DELETE FROM {twin} AS t
    WHERE t.transaction_id = OLD.transaction_id AND t.transaction_date = OLD.transaction_date;
    IF NOT FOUND AND current_setting('transaction_isolation') = 'read committed' THEN
      -- The foreign key of the copy has deleted it before that of the original did.
      RETURN NULL;
    END IF;
  END IF;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'could not serialize access: the transaction''s snapshot is older than the copy of this row'
      USING
        ERRCODE = 'serialization_failure',
        HINT = 'Run the transaction again.';
  END IF;
  RETURN NULL;
END
$body$
"""

_REFUSE_TRUNCATE = f"""
CREATE OR REPLACE FUNCTION {SCRATCH}.refuse_truncate() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $body$
BEGIN
  RAISE EXCEPTION 'public.transactions_clean is being converted: TRUNCATE would leave its copy as it is'
    USING
      ERRCODE = 'object_in_use',
      HINT = 'Delete the rows, or wait for the end of the conversion.';
END
$body$
"""


@attrs.frozen
class Mirror:
    """The rows of `TABLE`, kept in `TWIN` as well.

    Attributes:
        conn: The owner's session.
        columns: What is copied.
        patience: How to meet the locks of others.
    """

    conn: Connection[Any]
    columns: tuple[str, ...]
    patience: Patience

    def capture(self) -> None:
        """Have every change from now on noted."""

        def work() -> None:
            run(
                self.conn,
                f"CREATE TABLE IF NOT EXISTS {SCRATCH}.changed"
                " (transaction_id bigint NOT NULL, transaction_date date NOT NULL)",
                _NOTE_CHANGES,
                _REFUSE_TRUNCATE,
                f"REVOKE ALL ON FUNCTION {SCRATCH}.mirror_change(), {SCRATCH}.refuse_truncate() FROM PUBLIC",
                f"CREATE OR REPLACE TRIGGER conversion_mirror AFTER INSERT OR UPDATE OR DELETE ON {TABLE}"
                f" FOR EACH ROW EXECUTE FUNCTION {SCRATCH}.mirror_change()",
                f"CREATE OR REPLACE TRIGGER conversion_truncate BEFORE TRUNCATE ON {TABLE}"
                f" FOR EACH STATEMENT EXECUTE FUNCTION {SCRATCH}.refuse_truncate()",
                # ALWAYS: a session in replica mode would otherwise write unseen.
                f"ALTER TABLE {TABLE} ENABLE ALWAYS TRIGGER conversion_mirror",
                f"ALTER TABLE {TABLE} ENABLE ALWAYS TRIGGER conversion_truncate",
            )

        briefly(self.conn, self.patience, work, "Watching the table's changes")

    def copy_batch(self, after: int | None, size: int) -> tuple[int, int | None]:
        """Copy the next rows, by id.

        Args:
            after: Id after which to go on; ``None`` for the first rows.
            size: How many rows at most.

        Returns:
            How many were copied, and the last id among them.
        """
        start = "true" if after is None else f"s.transaction_id > {after}"
        names = ", ".join(f'"{column}"' for column in self.columns)
        row = run(
            self.conn,
            f"WITH batch AS (SELECT {names} FROM {TABLE} AS s WHERE {start}"
            f" ORDER BY s.transaction_id LIMIT {size}),"
            f" copied AS (INSERT INTO {TWIN} ({names}) OVERRIDING SYSTEM VALUE SELECT {names} FROM batch)"
            " SELECT count(*), max(transaction_id) FROM batch",
        ).fetchone()
        return int(row[0]), row[1]

    def catch_up(self, advanced: Callable[[int], None] | None = None) -> None:
        """Apply the changes that were noted until few are left."""
        for _ in range(_ROUNDS):
            began = time.monotonic()
            applied = self.retried(self._apply_snapshot)
            if advanced:
                advanced(applied)
            if applied <= _FEW or time.monotonic() - began <= _SOON:
                return
        raise ConversionError(
            "The table is written faster than the changes can be copied: run the same command again in a quieter hour."
        )

    def follow(self) -> None:
        """Apply the rest of what was noted, and have every later change written to both by its own transaction."""

        def work() -> None:
            run(self.conn, f"LOCK TABLE {TABLE} IN SHARE ROW EXCLUSIVE MODE")
            self._apply()
            # Sessions that wait for the lock look for new functions once they have it.
            run(self.conn, self._follow_function(), f"REVOKE ALL ON FUNCTION {SCRATCH}.mirror_change() FROM PUBLIC")

        self.retried(lambda: briefly(self.conn, self.patience, work, "Keeping both copies alike"))

    def settle(self) -> None:
        """Wait until no transaction is left whose snapshot is older than the copy."""
        await_earlier_transactions(self.conn, self.patience)

    def verify(self) -> int:
        """Compare every value of every row in one snapshot, and say how many rows there are.

        Raises:
            ConversionError: They differ.
        """
        with self.conn.transaction():
            run(self.conn, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            wanted = self._fingerprint(TABLE)
            found = self._fingerprint(TWIN)
        if wanted != found:
            raise ConversionError(
                f"The copy differs from the table: {found[0]:,} rows instead of {wanted[0]:,}, or others. Nothing was"
                " exchanged; run `partition undo`, then convert again, and report this."
            )
        return int(wanted[0])

    def _fingerprint(self, table: str) -> tuple[Any, ...]:
        # The sum does not depend on the order of the rows, and a row that is there twice counts twice.
        names = ", ".join(f'r."{column}"' for column in self.columns)
        row = run(
            self.conn,
            f"SELECT count(*), sum(r.amount), sum(hashtextextended(ROW ({names})::text, 0)::numeric) FROM {table} AS r",
        ).fetchone()
        return tuple(row)

    def retried(self, action: Callable[[], Any]) -> Any:
        """Do something until it meets no change that is being made meanwhile."""
        # A deal that is deleted meanwhile takes its rows along in the source, while those of the copy meet the foreign
        # key, or wait for its outcome.
        for attempt in range(1, _ATTEMPTS):
            try:
                return action()
            except _MEANWHILE:
                time.sleep(_PAUSE * attempt)
        return action()

    def _apply_snapshot(self) -> int:
        with self.conn.transaction():
            # What is deleted from the list and what is read from the source are of one moment: a change that is not
            # in the one is not in the other.
            run(
                self.conn,
                "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
                # Shorter than the server takes to look for deadlocks, which it might resolve at a writer's expense.
                f"SET LOCAL lock_timeout = '{round(self.patience.lock_timeout * 1000)}ms'",
            )
            return self._apply()

    def _apply(self) -> int:
        run(
            self.conn,
            "CREATE TEMPORARY TABLE IF NOT EXISTS conversion_keys"
            " (transaction_id bigint NOT NULL, transaction_date date NOT NULL) ON COMMIT DELETE ROWS",
        )
        keys = run(
            self.conn,
            f"WITH gone AS (DELETE FROM {SCRATCH}.changed RETURNING transaction_id, transaction_date)"
            " INSERT INTO pg_temp.conversion_keys (transaction_id, transaction_date) SELECT DISTINCT * FROM gone",
        ).rowcount
        if not keys:
            return 0
        run(
            self.conn,
            "ANALYZE pg_temp.conversion_keys",
            # By the keys, a partition each: the planner does not know that it need not look into the others, and would
            # read both tables as a whole.
            "SET LOCAL enable_hashjoin = off",
            "SET LOCAL enable_mergejoin = off",
            "SET LOCAL enable_seqscan = off",
        )
        names = ", ".join(f'"{column}"' for column in self.columns)
        values = ", ".join(f's."{column}"' for column in self.columns)
        same = "{0}.transaction_id = k.transaction_id AND {0}.transaction_date = k.transaction_date"
        run(
            self.conn,
            f"DELETE FROM {TWIN} AS t USING pg_temp.conversion_keys AS k WHERE {same.format('t')}",
            f"INSERT INTO {TWIN} ({names}) OVERRIDING SYSTEM VALUE SELECT {values}"
            f" FROM pg_temp.conversion_keys AS k INNER JOIN {TABLE} AS s ON {same.format('s')}",
        )
        return int(keys)

    def _follow_function(self) -> str:
        return _MIRROR_CHANGES.format(
            scratch=SCRATCH,
            twin=TWIN,
            columns=", ".join(f'"{column}"' for column in self.columns),
            values=", ".join(f'NEW."{column}"' for column in self.columns),
        )


def stop_mirroring() -> list[str]:
    """Return the statements that take the conversion's triggers off the table."""
    return [
        f"DROP TRIGGER IF EXISTS conversion_mirror ON {TABLE}",
        f"DROP TRIGGER IF EXISTS conversion_truncate ON {TABLE}",
    ]
