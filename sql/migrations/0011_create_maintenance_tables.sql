-- Months ahead, retention, legal holds and refreshes: what a maintenance run works on, and its short locked steps.
--
-- Every step that needs a strong lock is one function call and so one round trip: it looks whether the lock can be had,
-- waits for all of its locks together no longer than its budget, works on catalogs only, and is over. What takes long
-- (copying, counting, archiving) happens outside of these locks.

-- squawk-ignore-file ban-drop-table, renaming-table
-- Only functions drop or rename, and only what the bookkeeping here says may go.

-- Bookkeeping ---------------------------------------------------------------------------------------------------------

CREATE TABLE equitie_private.retention_policies (
  parent text,
  months_ahead integer NOT NULL DEFAULT 12,
  keep interval,
  amount_column text,
  analyzed_at timestamptz,
  analyzed_changes bigint NOT NULL DEFAULT 0,
  CONSTRAINT retention_policies_pkey PRIMARY KEY (parent),
  CONSTRAINT chk_retention_policies_months_ahead
    CHECK (months_ahead BETWEEN 1 AND 120),
  CONSTRAINT chk_retention_policies_keep
    CHECK (keep >= '1 month')
);

COMMENT ON TABLE equitie_private.retention_policies IS 'Tables partitioned by month that maintenance looks after. The owner adds others by a row.';
COMMENT ON COLUMN equitie_private.retention_policies.parent IS 'Key: the table, with its schema.';
COMMENT ON COLUMN equitie_private.retention_policies.months_ahead IS 'How many months after the current one have a partition.';
COMMENT ON COLUMN equitie_private.retention_policies.keep IS 'A partition is retired once its upper bound is older than this; NULL: never.';
COMMENT ON COLUMN equitie_private.retention_policies.amount_column IS 'Column whose sum is a control total of archives; NULL for none.';
COMMENT ON COLUMN equitie_private.retention_policies.analyzed_at IS 'When maintenance last had the parent analyzed.';
COMMENT ON COLUMN equitie_private.retention_policies.analyzed_changes IS 'Rows written to the partitions, as the server''s statistics had it then.';

INSERT INTO equitie_private.retention_policies (parent, months_ahead, keep, amount_column)
VALUES
  ('public.transactions_clean', 12, '7 years', 'amount'),
  ('public.audit_logs', 12, '730 days', NULL);

CREATE TABLE equitie_private.legal_holds (
  hold_id bigint GENERATED ALWAYS AS IDENTITY,
  parent text,
  first_day date,
  last_day date,
  investor_id integer,
  deal_id integer,
  reason text NOT NULL,
  placed_by text NOT NULL,
  placed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  released_by text,
  released_at timestamptz,
  CONSTRAINT legal_holds_pkey PRIMARY KEY (hold_id),
  CONSTRAINT chk_legal_holds_range
    CHECK (first_day <= last_day),
  CONSTRAINT chk_legal_holds_subject
    CHECK (investor_id IS NULL OR deal_id IS NULL),
  CONSTRAINT chk_legal_holds_reason
    CHECK (reason ~ '\S' AND placed_by ~ '\S'),
  CONSTRAINT chk_legal_holds_released
    CHECK ((released_by IS NULL) = (released_at IS NULL))
);

COMMENT ON TABLE equitie_private.legal_holds IS 'What must not be retired or dropped, why, and by whose order. Released holds stay as a record.';
COMMENT ON COLUMN equitie_private.legal_holds.hold_id IS 'Key.';
COMMENT ON COLUMN equitie_private.legal_holds.parent IS 'Table it is about; NULL for all of them.';
COMMENT ON COLUMN equitie_private.legal_holds.first_day IS 'First day it is about; NULL: from the beginning.';
COMMENT ON COLUMN equitie_private.legal_holds.last_day IS 'Last day it is about; NULL: without end.';
COMMENT ON COLUMN equitie_private.legal_holds.investor_id IS 'Keeps partitions with rows of this investor, and every partition of tables that cannot tell; not a foreign key: a hold outlives the investor.';
COMMENT ON COLUMN equitie_private.legal_holds.deal_id IS 'The same for a deal.';
COMMENT ON COLUMN equitie_private.legal_holds.reason IS 'Why, such as the number of a case.';
COMMENT ON COLUMN equitie_private.legal_holds.placed_by IS 'Who ordered it.';
COMMENT ON COLUMN equitie_private.legal_holds.placed_at IS 'When it was placed.';
COMMENT ON COLUMN equitie_private.legal_holds.released_by IS 'Who ended it; NULL while it is in force.';
COMMENT ON COLUMN equitie_private.legal_holds.released_at IS 'When it ended.';

CREATE TABLE equitie_private.retired_partitions (
  retired_id bigint GENERATED ALWAYS AS IDENTITY,
  parent text NOT NULL,
  partition_name text NOT NULL,
  table_name text NOT NULL,
  from_key timestamptz NOT NULL,
  to_key timestamptz NOT NULL,
  state text NOT NULL DEFAULT 'detached',
  detached_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  row_count bigint,
  amount numeric,
  measures jsonb,
  archive_file text,
  archive_sha256 text,
  archive_bytes bigint,
  archived_at timestamptz,
  ended_at timestamptz,
  CONSTRAINT retired_partitions_pkey PRIMARY KEY (retired_id),
  CONSTRAINT chk_retired_partitions_state
    CHECK (state IN ('detached', 'settled', 'archived', 'dropped', 'restored')),
  CONSTRAINT chk_retired_partitions_archive
    CHECK (state NOT IN ('archived', 'dropped') OR (archive_file IS NOT NULL AND archive_sha256 IS NOT NULL))
);

COMMENT ON TABLE equitie_private.retired_partitions IS 'Partitions that were retired, and where their rows are: in a table of equitie_part until it is dropped, in an archive from then on.';
COMMENT ON COLUMN equitie_private.retired_partitions.retired_id IS 'Key.';
COMMENT ON COLUMN equitie_private.retired_partitions.parent IS 'Table the partition belonged to.';
COMMENT ON COLUMN equitie_private.retired_partitions.partition_name IS 'Its name as a partition, without the schema.';
COMMENT ON COLUMN equitie_private.retired_partitions.table_name IS 'Its name since then, in equitie_part.';
COMMENT ON COLUMN equitie_private.retired_partitions.from_key IS 'Its lower bound; a date as midnight UTC.';
COMMENT ON COLUMN equitie_private.retired_partitions.to_key IS 'Its upper bound, exclusive.';
COMMENT ON COLUMN equitie_private.retired_partitions.state IS 'detached; settled: nothing writes to it any more, and it was counted; archived; dropped; restored.';
COMMENT ON COLUMN equitie_private.retired_partitions.detached_at IS 'When it left the table; the grace period counts from here.';
COMMENT ON COLUMN equitie_private.retired_partitions.row_count IS 'Its rows.';
COMMENT ON COLUMN equitie_private.retired_partitions.amount IS 'Sum of the policy''s amount column.';
COMMENT ON COLUMN equitie_private.retired_partitions.measures IS 'Smallest and largest key and date, ids that carry another day.';
COMMENT ON COLUMN equitie_private.retired_partitions.archive_file IS 'Its archive.';
COMMENT ON COLUMN equitie_private.retired_partitions.archive_sha256 IS 'SHA-256 of that file, hexadecimal.';
COMMENT ON COLUMN equitie_private.retired_partitions.archive_bytes IS 'Size of that file.';
COMMENT ON COLUMN equitie_private.retired_partitions.archived_at IS 'When the archive had been written and read back.';
COMMENT ON COLUMN equitie_private.retired_partitions.ended_at IS 'When the table was dropped or restored.';

CREATE TABLE equitie_private.partition_drains (
  drain_id bigint GENERATED ALWAYS AS IDENTITY,
  parent text NOT NULL,
  months date[] NOT NULL,
  state text NOT NULL DEFAULT 'copying',
  copied_to text[],
  rows_copied bigint NOT NULL DEFAULT 0,
  copied_xid xid8,
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  swapped_at timestamptz,
  CONSTRAINT partition_drains_pkey PRIMARY KEY (drain_id),
  CONSTRAINT chk_partition_drains_state
    CHECK (state IN ('copying', 'copied', 'swapped'))
);

CREATE UNIQUE INDEX idx_partition_drains_parent
ON equitie_private.partition_drains (parent);

CREATE TABLE equitie_private.drain_failures (
  failure_id bigint GENERATED ALWAYS AS IDENTITY,
  drain_id bigint NOT NULL,
  reason text NOT NULL,
  CONSTRAINT drain_failures_pkey PRIMARY KEY (failure_id)
);

COMMENT ON TABLE equitie_private.partition_drains IS 'Default partitions that are being rebuilt: their months as partitions of their own, the rest as a new default. Empty between runs.';
COMMENT ON COLUMN equitie_private.partition_drains.drain_id IS 'Key; the tables being built are called after it: equitie_part.drain_ID_YYYY_MM, drain_ID_default, drained_ID.';
COMMENT ON COLUMN equitie_private.partition_drains.parent IS 'Table whose default partition it is; one at a time.';
COMMENT ON COLUMN equitie_private.partition_drains.months IS 'First days of the months that get a partition.';
COMMENT ON COLUMN equitie_private.partition_drains.state IS 'copying; copied: every row is there, changes are mirrored; swapped: the old default partition is still to be dropped.';
COMMENT ON COLUMN equitie_private.partition_drains.copied_to IS 'Primary key up to which rows are copied.';
COMMENT ON COLUMN equitie_private.partition_drains.rows_copied IS 'Rows copied so far.';
COMMENT ON COLUMN equitie_private.partition_drains.copied_xid IS 'A transaction after the last copy: snapshots older than it do not see all copies.';
COMMENT ON COLUMN equitie_private.partition_drains.started_at IS 'When it began.';
COMMENT ON COLUMN equitie_private.partition_drains.swapped_at IS 'When the new partitions took the old one''s place.';
COMMENT ON INDEX equitie_private.idx_partition_drains_parent IS 'One drain at a time for each table.';
COMMENT ON TABLE equitie_private.drain_failures IS 'Drains whose copies can no longer be trusted; the next run starts them over.';
COMMENT ON COLUMN equitie_private.drain_failures.failure_id IS 'Key.';
COMMENT ON COLUMN equitie_private.drain_failures.drain_id IS 'The drain.';
COMMENT ON COLUMN equitie_private.drain_failures.reason IS 'What came in between; never a value.';

CREATE TABLE equitie_private.maintenance_runs (
  run_id bigint GENERATED ALWAYS AS IDENTITY,
  source text NOT NULL,
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  finished_at timestamptz,
  outcome text NOT NULL DEFAULT 'running',
  report jsonb,
  session_role text NOT NULL DEFAULT session_user,
  CONSTRAINT maintenance_runs_pkey PRIMARY KEY (run_id),
  CONSTRAINT chk_maintenance_runs_source
    CHECK (source IN ('sql', 'command')),
  CONSTRAINT chk_maintenance_runs_outcome
    CHECK (outcome IN ('running', 'done', 'incomplete', 'failed'))
);

COMMENT ON TABLE equitie_private.maintenance_runs IS 'Every maintenance run. One that says running and does not run was killed; the next one finishes its work.';
COMMENT ON COLUMN equitie_private.maintenance_runs.run_id IS 'Key.';
COMMENT ON COLUMN equitie_private.maintenance_runs.source IS 'sql: CALL equitie_private.maintain(). command: python -m equitie_data maintain.';
COMMENT ON COLUMN equitie_private.maintenance_runs.started_at IS 'When it began.';
COMMENT ON COLUMN equitie_private.maintenance_runs.finished_at IS 'When it ended.';
COMMENT ON COLUMN equitie_private.maintenance_runs.outcome IS 'done; incomplete: something could not be done this time; failed: something went wrong; running.';
COMMENT ON COLUMN equitie_private.maintenance_runs.report IS 'What it did, and what it could not do.';
COMMENT ON COLUMN equitie_private.maintenance_runs.session_role IS 'Database role that logged in.';

CREATE TABLE equitie_private.maintenance_tasks (
  name text,
  function text NOT NULL,
  every interval NOT NULL,
  last_run timestamptz,
  last_result bigint,
  last_seconds double precision,
  last_error text,
  CONSTRAINT maintenance_tasks_pkey PRIMARY KEY (name),
  CONSTRAINT chk_maintenance_tasks_every
    CHECK (every >= '0')
);

COMMENT ON TABLE equitie_private.maintenance_tasks IS 'What a maintenance run calls besides, each in a transaction of its own. The owner adds others by a row.';
COMMENT ON COLUMN equitie_private.maintenance_tasks.name IS 'Key: what it is called in reports.';
COMMENT ON COLUMN equitie_private.maintenance_tasks.function IS 'Function with schema and parentheses, without arguments, returning bigint. Runs as the owner.';
COMMENT ON COLUMN equitie_private.maintenance_tasks.every IS 'A run calls it when its last call is this long ago.';
COMMENT ON COLUMN equitie_private.maintenance_tasks.last_run IS 'When it was called last, successfully or not.';
COMMENT ON COLUMN equitie_private.maintenance_tasks.last_result IS 'What it returned.';
COMMENT ON COLUMN equitie_private.maintenance_tasks.last_seconds IS 'How long it took, seconds.';
COMMENT ON COLUMN equitie_private.maintenance_tasks.last_error IS 'Why it failed the last time; NULL when it did not.';

REVOKE ALL ON
  equitie_private.retention_policies,
  equitie_private.legal_holds,
  equitie_private.retired_partitions,
  equitie_private.partition_drains,
  equitie_private.drain_failures,
  equitie_private.maintenance_runs,
  equitie_private.maintenance_tasks
FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON SEQUENCE
  equitie_private.legal_holds_hold_id_seq,
  equitie_private.retired_partitions_retired_id_seq,
  equitie_private.partition_drains_drain_id_seq,
  equitie_private.drain_failures_failure_id_seq,
  equitie_private.maintenance_runs_run_id_seq
FROM PUBLIC, anon, authenticated, equitie_staff, service_role;

ALTER TABLE equitie_private.retention_policies ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.legal_holds ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.retired_partitions ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.partition_drains ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.drain_failures ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.maintenance_runs ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.maintenance_tasks ENABLE ROW LEVEL SECURITY;

-- What every step needs -----------------------------------------------------------------------------------------------

CREATE FUNCTION equitie_private.retention_start(parent text) RETURNS date
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
  SELECT date_trunc('month', (now() AT TIME ZONE 'UTC')::date - p.keep)::date
  FROM equitie_private.retention_policies AS p
  WHERE p.parent = retention_start.parent
$$;

COMMENT ON FUNCTION equitie_private.retention_start(text) IS 'First day of the oldest month that is kept; NULL where everything is.';

CREATE FUNCTION equitie_private.take_maintenance_turn() RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  -- The run holds this lock for its session. Behind a transaction pooler a session is nobody's: then this one counts.
  IF NOT pg_try_advisory_xact_lock(hashtextextended('equitie_data maintain', 0)) THEN
    RAISE EXCEPTION 'another maintenance run is at work on this database'
      USING ERRCODE = 'object_in_use';
  END IF;
END
$$;

COMMENT ON FUNCTION equitie_private.take_maintenance_turn() IS 'Fails with 55006 while another session maintains; otherwise holds the turn until the transaction ends.';

CREATE FUNCTION equitie_private.month_partitioning(
  parent regclass,
  OUT parent_schema name,
  OUT parent_name name,
  OUT key_column name,
  OUT default_partition regclass,
  OUT column_list text,
  OUT primary_key text[]
)
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
BEGIN
  -- "Ours" is a table of the current user, partitioned by one date or time, whose default partition stands in
  -- equitie_part. Without that, a caller could have the owner create tables under any parent.
  SELECT n.nspname, c.relname, a.attname, p.partdefid::regclass
  INTO parent_schema, parent_name, key_column, default_partition
  FROM pg_catalog.pg_partitioned_table AS p
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = p.partrelid
  INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = p.partattrs[0]
  INNER JOIN pg_catalog.pg_class AS d ON d.oid = p.partdefid
  WHERE
    p.partrelid = parent
    AND p.partstrat = 'r'
    AND p.partnatts = 1
    AND a.atttypid IN ('date'::regtype, 'timestamptz'::regtype)
    AND c.relowner = (SELECT r.oid FROM pg_catalog.pg_roles AS r WHERE r.rolname = current_user)
    AND d.relnamespace = 'equitie_part'::regnamespace;
  IF NOT FOUND THEN
    RAISE EXCEPTION '% is not one of the tables partitioned by month', parent
      USING ERRCODE = 'wrong_object_type';
  END IF;
  IF length(parent_name) > 55 THEN
    RAISE EXCEPTION 'the name of % is too long to name a month''s partition after it', parent
      USING ERRCODE = 'name_too_long';
  END IF;

  SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
  INTO STRICT column_list
  FROM pg_catalog.pg_attribute AS a
  WHERE
    a.attrelid = parent
    AND a.attnum > 0
    AND NOT a.attisdropped
    AND a.attgenerated = '';

  SELECT array_agg(a.attname ORDER BY array_position(x.indkey::smallint[], a.attnum))
  INTO primary_key
  FROM pg_catalog.pg_index AS x
  INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = x.indrelid AND a.attnum = ANY (x.indkey)
  WHERE x.indrelid = parent AND x.indisprimary;
END
$$;

COMMENT ON FUNCTION equitie_private.month_partitioning(regclass) IS 'How one of the tables partitioned by month is built; refuses any other.';

CREATE FUNCTION equitie_private.lock_partitions(parent regclass, members regclass[], peers_mode text, budget_ms integer)
RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  give_up_at timestamptz := clock_timestamp() + budget_ms * interval '1 millisecond';
  remaining integer;
  holder record;
  command text;
BEGIN
  -- Whoever waits for a lock makes all who come after wait too. So first a look: while somebody works on these tables
  -- who has been at it for a second, and will hardly be done within the budget, asking would only be a nuisance.
  SELECT l.pid, l.relation::regclass AS relation
  INTO holder
  FROM pg_catalog.pg_locks AS l
  INNER JOIN pg_catalog.pg_stat_activity AS a ON a.pid = l.pid
  WHERE
    l.locktype = 'relation'
    AND l.granted
    AND l.pid <> pg_backend_pid()
    AND l.database = (SELECT d.oid FROM pg_catalog.pg_database AS d WHERE d.datname = current_database())
    AND l.relation = ANY (members::oid[] || parent::oid)
    AND a.xact_start < clock_timestamp() - interval '1 second'
  ORDER BY a.xact_start
  LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION '% is in use by server process %', holder.relation, holder.pid
      USING ERRCODE = 'lock_not_available';
  END IF;

  FOR command IN
    SELECT format('LOCK TABLE %s IN %s MODE', p.peer, peers_mode)
    FROM (
      SELECT k.confrelid::regclass AS peer
      FROM pg_catalog.pg_constraint AS k
      WHERE k.conrelid = parent AND k.contype = 'f' AND k.confrelid <> parent
      UNION
      SELECT k.conrelid::regclass
      FROM pg_catalog.pg_constraint AS k
      WHERE k.confrelid = parent AND k.contype = 'f' AND k.conrelid <> parent
    ) AS p
    UNION ALL
    SELECT format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', m.member)
    -- The parent first: who waits there has not looked yet which partitions there are. One who waited at a partition
    -- would go on with the list of before, and not see the rows that were moved meanwhile.
    FROM unnest(array_prepend(parent, members)) AS m (member)
  LOOP
    remaining := ceil(extract(epoch FROM give_up_at - clock_timestamp()) * 1000);
    IF remaining <= 0 THEN
      RAISE EXCEPTION 'the locks on % could not be had within % ms', parent, budget_ms
        USING ERRCODE = 'lock_not_available';
    END IF;
    PERFORM set_config('lock_timeout', remaining::text, true);
    EXECUTE command;
  END LOOP;
  -- Others wait from here on. The disk need not be among what they wait for: whatever is committed later takes this
  -- commit along, and a crash that loses both leaves the state of before.
  PERFORM set_config('synchronous_commit', 'off', true);
END
$$;

COMMENT ON FUNCTION equitie_private.lock_partitions(regclass, regclass[], text, integer) IS 'Locks a partitioned table, some of its partitions and the tables tied to it by foreign keys, waiting for all of them together no longer than budget_ms; fails with 55P03.';

CREATE FUNCTION equitie_private.copy_statement_triggers(source regclass, target regclass) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  copied record;
BEGIN
  -- Statement triggers, unlike row triggers, do not reach a partition by themselves. The default partition has them all.
  FOR copied IN
    SELECT t.tgname, t.tgenabled, pg_catalog.pg_get_triggerdef(t.oid) AS definition
    FROM pg_catalog.pg_trigger AS t
    WHERE
      t.tgrelid = source
      AND NOT t.tgisinternal
      AND t.tgtype & 1 = 0
      AND t.tgname NOT LIKE 'mirror\_drain%'
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS x WHERE x.tgrelid = target AND x.tgname = t.tgname)
  LOOP
    EXECUTE replace(copied.definition, format(' ON %s ', source), format(' ON %s ', target));
    IF copied.tgenabled <> 'O' THEN
      EXECUTE format(
        'ALTER TABLE %s %s TRIGGER %I',
        target,
        CASE copied.tgenabled WHEN 'A' THEN 'ENABLE ALWAYS' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'DISABLE' END,
        copied.tgname
      );
    END IF;
  END LOOP;
END
$$;

COMMENT ON FUNCTION equitie_private.copy_statement_triggers(regclass, regclass) IS 'Gives a new partition the statement triggers of the default partition: audit, refusal of TRUNCATE.';

CREATE FUNCTION equitie_private.inbound_references(parent regclass, partition regclass, from_key text, to_key text)
RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
  key_column name := (SELECT m.key_column FROM equitie_private.month_partitioning(parent) AS m);
  foreign_key record;
  refers boolean;
  found text[] := '{}';
BEGIN
  FOR foreign_key IN
    SELECT
      k.conname,
      k.conrelid::regclass AS of_table,
      string_agg(format('r.%I = t.%I', a.attname, b.attname), ' AND ' ORDER BY u.place) AS condition
    FROM pg_catalog.pg_constraint AS k
    CROSS JOIN LATERAL unnest(k.conkey, k.confkey) WITH ORDINALITY AS u (referencing, referenced, place)
    INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = k.conrelid AND a.attnum = u.referencing
    INNER JOIN pg_catalog.pg_attribute AS b ON b.attrelid = k.confrelid AND b.attnum = u.referenced
    WHERE k.contype = 'f' AND k.confrelid = parent AND k.conparentid = 0
    GROUP BY k.oid, k.conname, k.conrelid
    ORDER BY k.conname
  LOOP
    EXECUTE format(
      'SELECT EXISTS (SELECT FROM %s AS r INNER JOIN ONLY %s AS t ON %s WHERE t.%I >= %L AND t.%I < %L)',
      foreign_key.of_table, partition, foreign_key.condition, key_column, from_key, key_column, to_key
    )
    INTO STRICT refers;
    IF refers THEN
      found := found || format('%s of %s', foreign_key.conname, foreign_key.of_table);
    END IF;
  END LOOP;
  RETURN nullif(array_to_string(found, ', '), '');
END
$$;

COMMENT ON FUNCTION equitie_private.inbound_references(regclass, regclass, text, text) IS 'Foreign keys by which rows of other tables refer to rows of a partition between two keys; NULL when there are none.';

CREATE FUNCTION equitie_private.refuse_referenced(parent regclass, partition regclass, from_key text, to_key text)
RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
  referring text := equitie_private.inbound_references(parent, partition, from_key, to_key);
BEGIN
  IF referring IS NOT NULL THEN
    RAISE EXCEPTION 'late rows in % cannot move to their month, because other rows refer to them: %', partition, referring
      USING
        ERRCODE = 'foreign_key_violation',
        HINT = 'Drop the foreign key, run maintenance, add it again.';
  END IF;
END
$$;

COMMENT ON FUNCTION equitie_private.refuse_referenced(regclass, regclass, text, text) IS 'Fails with 23503, naming the foreign keys, when other rows refer to rows of the default partition that are to move.';

CREATE FUNCTION equitie_private.break_drain(parent regclass, reason text) RETURNS void
LANGUAGE sql
SET search_path = ''
AS $$
  INSERT INTO equitie_private.drain_failures (drain_id, reason)
  SELECT d.drain_id, break_drain.reason
  FROM equitie_private.partition_drains AS d
  WHERE d.parent::regclass = break_drain.parent AND d.state <> 'swapped'
$$;

COMMENT ON FUNCTION equitie_private.break_drain(regclass, text) IS 'Notes that rows of a default partition changed past the trigger that mirrors them.';

CREATE FUNCTION equitie_private.move_late_rows(parent regclass, target regclass, from_key text, to_key text)
RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  built record;
  silence text[];
  restore text[];
  command text;
  inserted bigint;
  deleted bigint;
BEGIN
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent);
  -- A foreign key to these rows would be checked between the two steps of the move, or even cascade.
  PERFORM equitie_private.refuse_referenced(parent, built.default_partition, from_key, to_key);
  PERFORM equitie_private.break_drain(parent, 'late rows were moved to their month');

  EXECUTE format(
    'INSERT INTO %s (%s) SELECT %s FROM ONLY %s WHERE %I >= %L AND %I < %L',
    target, built.column_list, built.column_list, built.default_partition,
    built.key_column, from_key, built.key_column, to_key
  );
  GET DIAGNOSTICS inserted = ROW_COUNT;

  -- Moving a row to its month is no change of it: no audit event, and no refusal where the table is append-only.
  SELECT
    array_agg(format('ALTER TABLE %s DISABLE TRIGGER %I', built.default_partition, t.tgname)),
    array_agg(
      format(
        'ALTER TABLE %s ENABLE %s TRIGGER %I',
        built.default_partition,
        CASE t.tgenabled WHEN 'A' THEN 'ALWAYS' WHEN 'R' THEN 'REPLICA' ELSE '' END,
        t.tgname
      )
    )
  INTO silence, restore
  FROM pg_catalog.pg_trigger AS t
  WHERE
    t.tgrelid = built.default_partition
    AND NOT t.tgisinternal
    AND t.tgenabled <> 'D';
  FOREACH command IN ARRAY coalesce(silence, '{}') LOOP
    EXECUTE command;
  END LOOP;
  EXECUTE format(
    'DELETE FROM ONLY %s WHERE %I >= %L AND %I < %L',
    built.default_partition, built.key_column, from_key, built.key_column, to_key
  );
  GET DIAGNOSTICS deleted = ROW_COUNT;
  FOREACH command IN ARRAY coalesce(restore, '{}') LOOP
    EXECUTE command;
  END LOOP;
  IF inserted <> deleted THEN
    RAISE EXCEPTION 'of % late rows of %, % would have been removed from the default partition', inserted, parent, deleted
      USING ERRCODE = 'assert_failure';
  END IF;
  RETURN inserted;
END
$$;

COMMENT ON FUNCTION equitie_private.move_late_rows(regclass, regclass, text, text) IS 'Moves the rows between two keys from the default partition, which the caller has locked, to a table about to be attached; unaudited, because nothing changes.';

-- Months --------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION equitie_private.ensure_month_partitions(parent regclass, first date, last date)
RETURNS integer
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  built record;
  month date;
  next_month date;
  partition_name name;
  overlapping regclass;
  covered boolean;
  has_late_rows boolean;
  look_for_late_rows text;
  created integer := 0;
BEGIN
  IF first IS NULL OR last IS NULL OR NOT isfinite(first) OR NOT isfinite(last) THEN
    RAISE EXCEPTION 'first and last must be finite dates'
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  -- Each new partition takes about thirty entries of the lock table until the transaction ends; a server as installed
  -- has room for 600 partitions, but not for 1,200.
  IF last - first > 366 * 50 THEN
    RAISE EXCEPTION 'months from % to % were asked for, but one call makes at most fifty years', first, last
      USING
        ERRCODE = 'invalid_parameter_value',
        HINT = 'If no date is mistyped, call once for each few years, in transactions of their own.';
  END IF;

  -- Two callers at once: the second waits here, then finds the months made.
  PERFORM pg_advisory_xact_lock(hashtextextended('equitie_private.ensure_month_partitions', parent::oid::bigint));
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent);
  look_for_late_rows := format(
    'SELECT EXISTS (SELECT FROM ONLY %s WHERE %I >= $1 AND %I < $2)',
    built.default_partition, built.key_column, built.key_column
  );

  month := date_trunc('month', first);
  WHILE month <= last LOOP
    next_month := month + interval '1 month';
    partition_name := built.parent_name || to_char(month, '_YYYY_MM');

    SELECT b.partition, b.from_key <= month AND b.to_key >= next_month
    INTO overlapping, covered
    FROM equitie_private.month_partition_bounds(parent) AS b
    WHERE
      NOT b.is_default
      AND b.from_key < next_month
      AND b.to_key > month
    ORDER BY 2 DESC
    LIMIT 1;

    IF overlapping IS NOT NULL AND covered THEN
      -- There, whether as a month of its own or inside a larger range made by hand.
      month := next_month;
      CONTINUE;
    ELSIF overlapping IS NOT NULL THEN
      RAISE EXCEPTION 'partition % of % covers a part of the month from % to %', overlapping, parent, month, next_month
        USING
          ERRCODE = 'invalid_object_definition',
          HINT = 'Detach it, or split it along the month; then create the month again.';
    ELSIF to_regclass(format('equitie_part.%I', partition_name)) IS NOT NULL THEN
      RAISE EXCEPTION 'the table equitie_part.% exists, but is not a partition of %', partition_name, parent
        USING
          ERRCODE = 'duplicate_table',
          HINT = 'Attach it, or rename or drop it; then create the month again.';
    END IF;

    -- LIKE and ATTACH instead of PARTITION OF, which would wait for every reader of the parent.
    EXECUTE format(
      'CREATE TABLE equitie_part.%I (LIKE %s INCLUDING ALL EXCLUDING IDENTITY)', partition_name, parent
    );
    EXECUTE format(
      'REVOKE ALL ON TABLE equitie_part.%I FROM PUBLIC, anon, authenticated, equitie_staff, service_role', partition_name
    );

    -- Rows that move must not be missed by a statement that has listed the partitions before: it holds the parent.
    EXECUTE look_for_late_rows INTO STRICT has_late_rows USING month, next_month;
    IF has_late_rows THEN
      EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', parent);
    END IF;
    -- ATTACH needs this lock anyway; taken here, no late row can slip in between the move and the attachment.
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', built.default_partition);
    EXECUTE look_for_late_rows INTO STRICT has_late_rows USING month, next_month;
    IF has_late_rows THEN
      EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', parent);
      PERFORM equitie_private.move_late_rows(
        parent, format('equitie_part.%I', partition_name)::regclass, month::text, next_month::text
      );
    END IF;

    EXECUTE format(
      'ALTER TABLE %s ATTACH PARTITION equitie_part.%I FOR VALUES FROM (%L) TO (%L)',
      parent, partition_name, month, next_month
    );
    EXECUTE format(
      'COMMENT ON TABLE equitie_part.%I IS %L',
      partition_name, format('Rows of %I.%I from %s to before %s.', built.parent_schema, built.parent_name, month, next_month)
    );
    PERFORM equitie_private.copy_statement_triggers(
      built.default_partition, format('equitie_part.%I', partition_name)::regclass
    );

    created := created + 1;
    month := next_month;
  END LOOP;
  RETURN created;
END
$$;

CREATE FUNCTION equitie_private.attach_month(
  parent regclass, month_table regclass, from_key text, to_key text, late_rows integer, peers_mode text, budget_ms integer
)
RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  built record;
  waiting bigint;
  moved bigint := 0;
  bounds_check name;
BEGIN
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent);
  PERFORM equitie_private.lock_partitions(parent, ARRAY[built.default_partition, month_table], peers_mode, budget_ms);
  EXECUTE format(
    'SELECT count(*) FROM (SELECT FROM ONLY %s WHERE %I >= %L AND %I < %L LIMIT %s) AS t',
    built.default_partition, built.key_column, from_key, built.key_column, to_key, late_rows + 1
  )
  INTO STRICT waiting;
  IF waiting > late_rows THEN
    RAISE EXCEPTION 'more than % late rows from % to before % wait in %', late_rows, from_key, to_key, built.default_partition
      USING
        ERRCODE = 'program_limit_exceeded',
        HINT = 'python -m equitie_data maintain moves them without making anybody wait.';
  ELSIF waiting > 0 THEN
    moved := equitie_private.move_late_rows(parent, month_table, from_key, to_key);
  END IF;

  EXECUTE format(
    'ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)', parent, month_table, from_key, to_key
  );
  EXECUTE format(
    'COMMENT ON TABLE %s IS %L',
    month_table, format('Rows of %I.%I from %s to before %s.', built.parent_schema, built.parent_name, from_key, to_key)
  );
  PERFORM equitie_private.copy_statement_triggers(built.default_partition, month_table);
  RETURN moved;
END
$$;

CREATE FUNCTION equitie_private.make_month(parent regclass, month date, late_rows integer, budget_ms integer)
RETURNS bigint
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  built record;
  next_month date := month + interval '1 month';
  partition_name name;
  overlapping regclass;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  IF NOT pg_try_advisory_xact_lock(
    hashtextextended('equitie_private.ensure_month_partitions', parent::oid::bigint)
  ) THEN
    RAISE EXCEPTION 'months of % are being made by another session', parent
      USING ERRCODE = 'lock_not_available';
  END IF;
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent);
  partition_name := built.parent_name || to_char(month, '_YYYY_MM');

  SELECT b.partition
  INTO overlapping
  FROM equitie_private.month_partition_bounds(parent) AS b
  WHERE NOT b.is_default AND b.from_key < next_month AND b.to_key > month
  LIMIT 1;
  IF FOUND THEN
    -- Made since the run looked.
    RETURN 0;
  ELSIF to_regclass(format('equitie_part.%I', partition_name)) IS NOT NULL THEN
    RAISE EXCEPTION 'the table equitie_part.% exists, but is not a partition of %', partition_name, parent
      USING ERRCODE = 'duplicate_table';
  END IF;

  EXECUTE format(
    'CREATE TABLE equitie_part.%I (LIKE %s INCLUDING ALL EXCLUDING IDENTITY)', partition_name, parent
  );
  EXECUTE format(
    'REVOKE ALL ON TABLE equitie_part.%I FROM PUBLIC, anon, authenticated, equitie_staff, service_role', partition_name
  );
  RETURN equitie_private.attach_month(
    parent, format('equitie_part.%I', partition_name)::regclass, month::text, next_month::text, late_rows,
    'SHARE ROW EXCLUSIVE', budget_ms
  );
END
$$;

COMMENT ON FUNCTION equitie_private.attach_month(regclass, regclass, text, text, integer, text, integer) IS 'Attaches a table as the partition between two keys, with at most late_rows rows from the default partition, and says how many those were.';
COMMENT ON FUNCTION equitie_private.make_month(regclass, date, integer, integer) IS 'Makes one month''s partition with at most late_rows rows from the default partition, and says how many those were; waits for its locks no longer than budget_ms (55P03).';

-- Draining a default partition that is too full to be moved in one short step ------------------------------------------
-- Its rows are copied, in small transactions, to tables that are to become the months and the new default partition; a
-- row trigger mirrors what changes meanwhile. Once the copy is complete, and older snapshots are gone, the tables hold
-- exactly the default partition's rows for every snapshot there is; changing one for the others is a matter of catalogs.

CREATE FUNCTION equitie_private.begin_drain(parent regclass, months date[], budget_ms integer) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  built record;
  drain bigint;
  month date;
  piece text;
  pieces text[] := '{}';
  outside text;
  foreign_key record;
  choose_old text := '';
  choose_new text := '';
  same_key text;
  key_old text;
  key_new text;
  assignments text;
  new_values text;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent);
  IF built.primary_key IS NULL THEN
    RAISE EXCEPTION '% has no primary key: its default partition cannot be drained', parent
      USING ERRCODE = 'invalid_table_definition';
  END IF;
  PERFORM equitie_private.refuse_referenced(parent, built.default_partition, '-infinity', 'infinity');
  INSERT INTO equitie_private.partition_drains (parent, months)
  VALUES (format('%I.%I', built.parent_schema, built.parent_name), months)
  RETURNING drain_id INTO STRICT drain;

  SELECT
    string_agg(format('OLD.%I', k.name), ', ' ORDER BY k.place),
    string_agg(format('NEW.%I', k.name), ', ' ORDER BY k.place),
    string_agg(format('t.%I = OLD.%I', k.name, k.name), ' AND ' ORDER BY k.place)
  INTO STRICT key_old, key_new, same_key
  FROM unnest(built.primary_key) WITH ORDINALITY AS k (name, place);
  SELECT
    string_agg(format('NEW.%I', a.attname), ', ' ORDER BY a.attnum),
    string_agg(format('%I = excluded.%I', a.attname, a.attname), ', ' ORDER BY a.attnum)
  INTO STRICT new_values, assignments
  FROM pg_catalog.pg_attribute AS a
  WHERE a.attrelid = parent AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '';

  FOREACH month IN ARRAY months || NULL::date LOOP
    piece := format('equitie_part.drain_%s_%s', drain, coalesce(to_char(month, 'YYYY_MM'), 'default'));
    pieces := pieces || piece;
    EXECUTE format('CREATE TABLE %s (LIKE %s INCLUDING ALL EXCLUDING IDENTITY)', piece, parent);
    EXECUTE format('REVOKE ALL ON TABLE %s FROM PUBLIC, anon, authenticated, equitie_staff, service_role', piece);
    EXECUTE format('COMMENT ON TABLE %s IS %L', piece, format('Copies of rows of %s, while maintenance drains it.', built.default_partition));
    -- Saves ATTACH from reading the rows.
    IF month IS NOT NULL THEN
      EXECUTE format(
        'ALTER TABLE %s ADD CONSTRAINT drain_bounds CHECK (%I >= %L AND %I < %L)',
        piece, built.key_column, month, built.key_column, (month + interval '1 month')::date
      );
    ELSE
      SELECT string_agg(format('(%I < %L OR %I >= %L)', built.key_column, r.from_key, built.key_column, r.to_key), ' AND ')
      INTO outside
      FROM (
        SELECT b.from_key, b.to_key
        FROM equitie_private.month_partition_bounds(parent) AS b
        WHERE NOT b.is_default
        UNION ALL
        SELECT m.month, m.month + interval '1 month'
        FROM unnest(months) AS m (month)
      ) AS r
      WHERE isfinite(r.from_key) AND isfinite(r.to_key);
      EXECUTE format('ALTER TABLE %s ADD CONSTRAINT drain_bounds CHECK (%s)', piece, outside);
    END IF;

    choose_old := choose_old || CASE
      WHEN month IS NULL THEN format(E'        ELSE\n          DELETE FROM ONLY %s AS t WHERE %s;\n        END IF;\n', piece, same_key)
      ELSE format(
        E'        %s OLD.%I >= %L AND OLD.%I < %L THEN\n          DELETE FROM ONLY %s AS t WHERE %s;\n',
        CASE WHEN choose_old = '' THEN 'IF' ELSE 'ELSIF' END,
        built.key_column, month, built.key_column, (month + interval '1 month')::date, piece, same_key
      )
    END;
    choose_new := choose_new || CASE
      WHEN month IS NULL THEN E'        ELSE\n'
      ELSE format(
        E'        %s NEW.%I >= %L AND NEW.%I < %L THEN\n',
        CASE WHEN choose_new = '' THEN 'IF' ELSE 'ELSIF' END,
        built.key_column, month, built.key_column, (month + interval '1 month')::date
      )
    END || format(
      E'          INSERT INTO %s (%s) VALUES (%s)\n          ON CONFLICT (%s) DO UPDATE SET %s;\n%s',
      piece, built.column_list, new_values,
      (SELECT string_agg(quote_ident(k.name), ', ') FROM unnest(built.primary_key) AS k (name)), assignments,
      CASE WHEN month IS NULL THEN E'        END IF;\n' ELSE '' END
    );
  END LOOP;

  EXECUTE format(
    $generator$
CREATE FUNCTION equitie_private.mirror_drain_%1$s() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $body$
BEGIN
  IF TG_OP = 'TRUNCATE' THEN
    INSERT INTO equitie_private.drain_failures (drain_id, reason) VALUES (%1$s, 'the default partition was truncated');
    RETURN NULL;
  END IF;
  -- Whatever becomes of the copies, the write itself goes on: a failure only has the drain start over.
  BEGIN
    IF TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND ROW(%2$s) IS DISTINCT FROM ROW(%3$s)) THEN
%4$s
    END IF;
    IF TG_OP <> 'DELETE' THEN
%5$s
    END IF;
  EXCEPTION
    WHEN OTHERS THEN
      INSERT INTO equitie_private.drain_failures (drain_id, reason)
      VALUES (%1$s, 'a change could not be mirrored: SQLSTATE ' || SQLSTATE);
  END;
  RETURN NULL;
END
$body$
    $generator$,
    drain, key_old, key_new, choose_old, choose_new
  );
  EXECUTE format(
    'REVOKE ALL ON FUNCTION equitie_private.mirror_drain_%s() FROM PUBLIC, anon, authenticated, equitie_staff, service_role',
    drain
  );
  EXECUTE format(
    'COMMENT ON FUNCTION equitie_private.mirror_drain_%s() IS ''Row trigger: repeats changes of a default partition that is being drained. Dropped with the drain.''',
    drain
  );

  -- SHARE ROW EXCLUSIVE on the default partition is all a trigger needs, but the foreign keys' tables are locked too.
  PERFORM equitie_private.lock_partitions(parent, ARRAY[built.default_partition], 'SHARE ROW EXCLUSIVE', budget_ms);
  -- As they are on the parent, which then adopts them unread.
  FOR foreign_key IN
    SELECT k.conname, pg_catalog.pg_get_constraintdef(k.oid) AS definition
    FROM pg_catalog.pg_constraint AS k
    WHERE k.conrelid = parent AND k.contype = 'f' AND k.conparentid = 0
  LOOP
    FOREACH piece IN ARRAY pieces LOOP
      EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %I %s', piece, foreign_key.conname, foreign_key.definition);
    END LOOP;
  END LOOP;
  EXECUTE format(
    'CREATE TRIGGER mirror_drain_%s AFTER INSERT OR UPDATE OR DELETE ON %s'
    ' FOR EACH ROW EXECUTE FUNCTION equitie_private.mirror_drain_%s()',
    drain, built.default_partition, drain
  );
  EXECUTE format(
    'CREATE TRIGGER mirror_drain_%s_truncate BEFORE TRUNCATE ON %s'
    ' FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.mirror_drain_%s()',
    drain, built.default_partition, drain
  );
  EXECUTE format(
    'ALTER TABLE %s ENABLE ALWAYS TRIGGER mirror_drain_%s, ENABLE ALWAYS TRIGGER mirror_drain_%s_truncate',
    built.default_partition, drain, drain
  );
  RETURN drain;
END
$$;

CREATE FUNCTION equitie_private.copy_drain(drain bigint, batch integer, budget_ms integer) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  drained record;
  built record;
  batch_end text[];
  key_columns text;
  key_literals text;
  upper_literals text;
  copies text;
  copied bigint;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT drained FROM equitie_private.partition_drains AS d WHERE d.drain_id = drain;
  IF drained.state <> 'copying' THEN
    RETURN 0;
  ELSIF EXISTS (SELECT FROM equitie_private.drain_failures AS f WHERE f.drain_id = drain) THEN
    RAISE EXCEPTION 'the drain of % has to start over', drained.parent
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(drained.parent::regclass);
  -- A copy waits for whoever is changing the same row; it must be the copy that gives way.
  PERFORM set_config('lock_timeout', budget_ms::text, true);
  PERFORM set_config('synchronous_commit', 'off', true);

  SELECT
    string_agg(format('t.%I', k.name), ', ' ORDER BY k.place),
    string_agg(format('%L::%s', drained.copied_to[k.place], a.type), ', ' ORDER BY k.place)
  INTO STRICT key_columns, key_literals
  FROM unnest(built.primary_key) WITH ORDINALITY AS k (name, place)
  CROSS JOIN LATERAL (
    SELECT pg_catalog.format_type(a.atttypid, a.atttypmod) AS type
    FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = drained.parent::regclass AND a.attname = k.name
  ) AS a;

  -- The end of the batch is fixed by a read without locks: a row whose key is just being changed must not stretch it.
  EXECUTE format(
    'SELECT ARRAY[%s] FROM (SELECT %s FROM ONLY %s AS t %s ORDER BY %s LIMIT %s) AS t ORDER BY %s LIMIT 1',
    (SELECT string_agg(format('t.%I::text', k.name), ', ' ORDER BY k.place) FROM unnest(built.primary_key) WITH ORDINALITY AS k (name, place)),
    key_columns, built.default_partition,
    CASE WHEN drained.copied_to IS NULL THEN '' ELSE format('WHERE ROW(%s) > ROW(%s)', key_columns, key_literals) END,
    key_columns, batch,
    (SELECT string_agg(format('t.%I DESC', k.name), ', ' ORDER BY k.place) FROM unnest(built.primary_key) WITH ORDINALITY AS k (name, place))
  )
  INTO batch_end;

  IF batch_end IS NULL THEN
    UPDATE equitie_private.partition_drains AS d
    SET
      state = 'copied',
      copied_xid = pg_current_xact_id()
    WHERE d.drain_id = drain;
    RETURN 0;
  END IF;

  SELECT string_agg(format('%L::%s', batch_end[k.place], a.type), ', ' ORDER BY k.place)
  INTO STRICT upper_literals
  FROM unnest(built.primary_key) WITH ORDINALITY AS k (name, place)
  CROSS JOIN LATERAL (
    SELECT pg_catalog.format_type(a.atttypid, a.atttypmod) AS type
    FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = drained.parent::regclass AND a.attname = k.name
  ) AS a;

  SELECT string_agg(
    format(
      ', copy_%s AS (INSERT INTO equitie_part.drain_%s_%s (%s) SELECT %s FROM batch AS t WHERE %s ON CONFLICT DO NOTHING)',
      m.place, drain, coalesce(to_char(m.month, 'YYYY_MM'), 'default'), built.column_list, built.column_list,
      CASE
        WHEN m.month IS NULL THEN (
          SELECT string_agg(
            format('(t.%I < %L OR t.%I >= %L)', built.key_column, o.month, built.key_column, (o.month + interval '1 month')::date), ' AND '
          )
          FROM unnest(drained.months) AS o (month)
        )
        ELSE format('t.%I >= %L AND t.%I < %L', built.key_column, m.month, built.key_column, (m.month + interval '1 month')::date)
      END
    ),
    ''
  )
  INTO STRICT copies
  FROM unnest(drained.months || NULL::date) WITH ORDINALITY AS m (month, place);

  -- KEY SHARE: a row that is copied is not deleted until the copy is there to be deleted as well.
  EXECUTE format(
    'WITH batch AS MATERIALIZED ('
    ' SELECT %s FROM ONLY %s AS t WHERE ROW(%s) <= ROW(%s) %s FOR KEY SHARE'
    ')%s SELECT count(*) FROM batch',
    built.column_list, built.default_partition, key_columns, upper_literals,
    CASE WHEN drained.copied_to IS NULL THEN '' ELSE format('AND ROW(%s) > ROW(%s)', key_columns, key_literals) END,
    copies
  )
  INTO STRICT copied;

  UPDATE equitie_private.partition_drains AS d
  SET
    copied_to = batch_end,
    rows_copied = d.rows_copied + copied
  WHERE d.drain_id = drain;
  -- At least one: zero says that nothing is left.
  RETURN greatest(copied, 1);
END
$$;

CREATE FUNCTION equitie_private.drain_obstacles(drain bigint)
RETURNS TABLE (pid integer, virtual_transaction text, since timestamptz)
LANGUAGE sql STABLE
SET search_path = ''
AS $$
  SELECT a.pid, v.virtualtransaction, a.xact_start
  FROM equitie_private.partition_drains AS d
  CROSS JOIN pg_catalog.pg_stat_activity AS a
  INNER JOIN pg_catalog.pg_locks AS v ON v.pid = a.pid AND v.locktype = 'virtualxid' AND v.granted
  WHERE
    d.drain_id = drain
    AND a.pid <> pg_backend_pid()
    AND a.datname = current_database()
    AND a.backend_xmin IS NOT NULL
    AND age(a.backend_xmin) >= age(d.copied_xid::xid)
    AND a.backend_type NOT IN ('autovacuum worker', 'walsender')
  ORDER BY a.xact_start NULLS LAST
$$;

CREATE FUNCTION equitie_private.drain_differences(drain bigint) RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
  drained record;
  built record;
  pieces text;
  differences bigint;
BEGIN
  SELECT * INTO STRICT drained FROM equitie_private.partition_drains AS d WHERE d.drain_id = drain;
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(drained.parent::regclass);
  SELECT string_agg(
    format('SELECT %s FROM ONLY equitie_part.drain_%s_%s', built.column_list, drain, coalesce(to_char(m.month, 'YYYY_MM'), 'default')),
    ' UNION ALL '
  )
  INTO STRICT pieces
  FROM unnest(drained.months || NULL::date) AS m (month);
  -- Two hashes a row, summed: exact as far as 128 bits are, without sorting either side.
  EXECUTE format(
    'SELECT CASE WHEN a.n = b.n AND a.h IS NOT DISTINCT FROM b.h AND a.g IS NOT DISTINCT FROM b.g THEN 0 ELSE greatest(abs(a.n - b.n), 1) END FROM'
    ' (SELECT count(*) AS n, sum(hashtextextended(t::text, 1)) AS h, sum(hashtextextended(t::text, 2)) AS g FROM (SELECT %1$s FROM ONLY %2$s) AS t) AS a,'
    ' (SELECT count(*) AS n, sum(hashtextextended(t::text, 1)) AS h, sum(hashtextextended(t::text, 2)) AS g FROM (%3$s) AS t) AS b',
    built.column_list, built.default_partition, pieces
  )
  INTO STRICT differences;
  RETURN differences;
END
$$;

CREATE FUNCTION equitie_private.finish_drain(drain bigint, budget_ms integer) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  drained record;
  built record;
  parent regclass;
  default_name name;
  month date;
  piece regclass;
  pieces regclass[];
  mirrors integer;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT drained FROM equitie_private.partition_drains AS d WHERE d.drain_id = drain;
  parent := drained.parent::regclass;
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent);
  SELECT array_agg(format('equitie_part.drain_%s_%s', drain, coalesce(to_char(m.month, 'YYYY_MM'), 'default'))::regclass ORDER BY m.place)
  INTO STRICT pieces
  FROM unnest(drained.months || NULL::date) WITH ORDINALITY AS m (month, place);
  default_name := (SELECT c.relname FROM pg_catalog.pg_class AS c WHERE c.oid = built.default_partition);

  -- The pieces' foreign keys are merged with the parent's, which touches the triggers of the tables referred to.
  PERFORM equitie_private.lock_partitions(parent, built.default_partition || pieces, 'ACCESS EXCLUSIVE', budget_ms);
  SELECT count(*)
  INTO STRICT mirrors
  FROM pg_catalog.pg_trigger AS t
  WHERE
    t.tgrelid = built.default_partition
    AND t.tgname IN ('mirror_drain_' || drain, 'mirror_drain_' || drain || '_truncate')
    AND t.tgenabled = 'A';
  IF
    drained.state <> 'copied'
    OR mirrors <> 2
    OR EXISTS (SELECT FROM equitie_private.drain_failures AS f WHERE f.drain_id = drain)
  THEN
    RAISE EXCEPTION 'the drain of % has to start over', parent
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;

  PERFORM equitie_private.refuse_referenced(parent, built.default_partition, '-infinity', 'infinity');
  EXECUTE format('DROP TRIGGER mirror_drain_%s ON %s', drain, built.default_partition);
  EXECUTE format('DROP TRIGGER mirror_drain_%s_truncate ON %s', drain, built.default_partition);
  EXECUTE format('ALTER TABLE %s DETACH PARTITION %s', parent, built.default_partition);
  EXECUTE format('ALTER TABLE %s RENAME TO drained_%s', built.default_partition, drain);
  FOR month, piece IN
    SELECT p.month, p.piece
    FROM unnest(drained.months || NULL::date, pieces) WITH ORDINALITY AS p (month, piece, place)
    ORDER BY p.place
  LOOP
    IF month IS NOT NULL THEN
      EXECUTE format(
        'ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
        parent, piece, month, (month + interval '1 month')::date
      );
      EXECUTE format(
        'COMMENT ON TABLE %s IS %L',
        piece, format('Rows of %I.%I from %s to before %s.', built.parent_schema, built.parent_name, month, (month + interval '1 month')::date)
      );
    ELSE
      EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s DEFAULT', parent, piece);
      EXECUTE format(
        'COMMENT ON TABLE %s IS %L',
        piece, format('Rows of %I.%I whose month has no partition yet; maintenance moves them.', built.parent_schema, built.parent_name)
      );
    END IF;
    EXECUTE format('ALTER TABLE %s DROP CONSTRAINT drain_bounds', piece);
    PERFORM equitie_private.copy_statement_triggers(format('equitie_part.drained_%s', drain)::regclass, piece);
    EXECUTE format('ALTER TABLE %s RENAME TO %I', piece, coalesce(built.parent_name || to_char(month, '_YYYY_MM'), default_name));
  END LOOP;
  UPDATE equitie_private.partition_drains AS d
  SET
    state = 'swapped',
    swapped_at = clock_timestamp()
  WHERE d.drain_id = drain;
END
$$;

CREATE FUNCTION equitie_private.undrained_rows(drain bigint) RETURNS bigint
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
  drained record;
  built record;
  entity text;
  pieces text;
  missing bigint;
BEGIN
  SELECT * INTO STRICT drained FROM equitie_private.partition_drains AS d WHERE d.drain_id = drain;
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(drained.parent::regclass);
  entity := (
    SELECT string_agg(format('o.%I::text', k.name), ' || '':'' || ' ORDER BY k.place)
    FROM unnest(built.primary_key) WITH ORDINALITY AS k (name, place)
    WHERE k.name <> built.key_column
  );
  SELECT string_agg(
    format(
      'SELECT %s FROM ONLY equitie_part.%I', (SELECT string_agg(quote_ident(k.name), ', ') FROM unnest(built.primary_key) AS k (name)),
      CASE WHEN m.month IS NULL THEN c.relname ELSE built.parent_name || to_char(m.month, '_YYYY_MM') END
    ),
    ' UNION ALL '
  )
  INTO STRICT pieces
  FROM unnest(drained.months || NULL::date) AS m (month)
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = built.default_partition;
  -- A row that is gone from its place since the swap was deleted or moved by somebody, which the audit log has noted.
  EXECUTE format(
    'SELECT count(*) FROM ONLY equitie_part.drained_%s AS o'
    ' WHERE NOT EXISTS (SELECT FROM (%s) AS t WHERE %s)'
    ' AND NOT EXISTS (SELECT FROM public.audit_logs AS l WHERE l."timestamp" >= %L AND l.entity_type = %L AND l.entity_id = %s)',
    drain, pieces,
    (SELECT string_agg(format('t.%I = o.%I', k.name, k.name), ' AND ') FROM unnest(built.primary_key) AS k (name)),
    -- The clock of the event may be that of a statement before the swap.
    drained.started_at, built.parent_name, coalesce(entity, 'NULL')
  )
  INTO STRICT missing;
  RETURN missing;
END
$$;

CREATE FUNCTION equitie_private.drop_drain(drain bigint, budget_ms integer) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  drained record;
  parent regclass;
  default_partition regclass;
  doomed regclass[];
  leftover regclass;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT drained FROM equitie_private.partition_drains AS d WHERE d.drain_id = drain;
  parent := drained.parent::regclass;
  default_partition := (SELECT m.default_partition FROM equitie_private.month_partitioning(parent) AS m);
  -- Never a partition: what is attached holds rows, not copies.
  SELECT coalesce(array_agg(c.oid::regclass ORDER BY c.oid), '{}')
  INTO STRICT doomed
  FROM pg_catalog.pg_class AS c
  WHERE
    c.relnamespace = 'equitie_part'::regnamespace
    AND c.relkind = 'r'
    AND NOT c.relispartition
    AND (c.relname LIKE format('drain\_%s\_%%', drain) OR c.relname = format('drained_%s', drain));
  IF drained.state = 'swapped' THEN
    PERFORM equitie_private.lock_peers(parent, doomed, budget_ms);
  ELSE
    PERFORM equitie_private.lock_partitions(parent, default_partition || doomed, 'ACCESS EXCLUSIVE', budget_ms);
    EXECUTE format('DROP TRIGGER IF EXISTS mirror_drain_%s ON %s', drain, default_partition);
    EXECUTE format('DROP TRIGGER IF EXISTS mirror_drain_%s_truncate ON %s', drain, default_partition);
  END IF;
  FOREACH leftover IN ARRAY doomed LOOP
    EXECUTE format('DROP TABLE %s', leftover);
  END LOOP;
  EXECUTE format('DROP FUNCTION IF EXISTS equitie_private.mirror_drain_%s()', drain);
  DELETE FROM equitie_private.drain_failures AS f WHERE f.drain_id = drain;
  DELETE FROM equitie_private.partition_drains AS d WHERE d.drain_id = drain;
END
$$;

CREATE FUNCTION equitie_private.lock_peers(parent regclass, detached regclass[], budget_ms integer) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  give_up_at timestamptz := clock_timestamp() + budget_ms * interval '1 millisecond';
  command text;
  remaining integer;
BEGIN
  FOR command IN
    SELECT format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', p.peer)
    FROM (
      SELECT DISTINCT k.confrelid::regclass AS peer
      FROM pg_catalog.pg_constraint AS k
      WHERE k.conrelid = ANY (detached::oid[]) AND k.contype = 'f' AND k.confrelid <> parent
      UNION ALL
      SELECT d.detached
      FROM unnest(detached) AS d (detached)
    ) AS p
  LOOP
    remaining := ceil(extract(epoch FROM give_up_at - clock_timestamp()) * 1000);
    IF remaining <= 0 THEN
      RAISE EXCEPTION 'the locks on tables referred to by % could not be had within % ms', parent, budget_ms
        USING ERRCODE = 'lock_not_available';
    END IF;
    PERFORM set_config('lock_timeout', remaining::text, true);
    EXECUTE command;
  END LOOP;
  PERFORM set_config('synchronous_commit', 'off', true);
END
$$;

COMMENT ON FUNCTION equitie_private.begin_drain(regclass, date[], integer) IS 'Makes the tables that are to take a default partition''s place and the trigger that mirrors its changes into them.';
COMMENT ON FUNCTION equitie_private.copy_drain(bigint, integer, integer) IS 'Copies the next rows of a drain, and says how many; 0 when all are copied.';
COMMENT ON FUNCTION equitie_private.drain_obstacles(bigint) IS 'Sessions whose snapshot is older than the last copy: the swap has to wait for them.';
COMMENT ON FUNCTION equitie_private.drain_differences(bigint) IS '0 when the copies of a drain hold exactly the rows of the default partition, in the caller''s snapshot.';
COMMENT ON FUNCTION equitie_private.finish_drain(bigint, integer) IS 'Puts the copies of a drain in the default partition''s place.';
COMMENT ON FUNCTION equitie_private.undrained_rows(bigint) IS 'Rows of the old default partition that are in no partition, and that nobody has touched since: there must be none.';
COMMENT ON FUNCTION equitie_private.drop_drain(bigint, integer) IS 'Removes what a drain leaves: the old default partition, or the copies of a drain that was given up.';
COMMENT ON FUNCTION equitie_private.lock_peers(regclass, regclass[], integer) IS 'Locks detached tables and the tables they refer to, waiting for all of them together no longer than budget_ms.';

-- Holds ---------------------------------------------------------------------------------------------------------------

CREATE FUNCTION equitie_private.record_maintenance_event(action text, entity_type text, entity_id text, details jsonb)
RETURNS void
LANGUAGE sql
SET search_path = ''
AS $$
  INSERT INTO public.audit_logs (source, actor_type, user_id, action, entity_type, entity_id, metadata, reason)
  SELECT 'sdk', a.actor_type, a.user_id, action, entity_type, entity_id, details, coalesce(a.reason, 'maintenance')
  FROM equitie_private.audit_context() AS a
$$;

COMMENT ON FUNCTION equitie_private.record_maintenance_event(text, text, text, jsonb) IS 'Appends a step of retention to the audit log.';

CREATE FUNCTION equitie_private.place_legal_hold(
  reason text, placed_by text, parent text, first_day date, last_day date, investor_id integer, deal_id integer
)
RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  hold bigint;
BEGIN
  IF parent IS NOT NULL AND NOT EXISTS (
    SELECT FROM equitie_private.retention_policies AS p WHERE p.parent = place_legal_hold.parent
  ) THEN
    RAISE EXCEPTION '% has no retention policy: a hold on it would keep nothing', parent
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  INSERT INTO equitie_private.legal_holds (reason, placed_by, parent, first_day, last_day, investor_id, deal_id)
  VALUES (
    place_legal_hold.reason, place_legal_hold.placed_by, place_legal_hold.parent, place_legal_hold.first_day,
    place_legal_hold.last_day, place_legal_hold.investor_id, place_legal_hold.deal_id
  )
  RETURNING hold_id INTO STRICT hold;
  PERFORM equitie_private.record_maintenance_event(
    'CREATE', 'legal_holds', hold::text,
    jsonb_strip_nulls(jsonb_build_object(
      'reason', reason, 'placed_by', placed_by, 'table', parent, 'first_day', first_day, 'last_day', last_day,
      'investor_id', investor_id, 'deal_id', deal_id
    ))
  );
  RETURN hold;
END
$$;

CREATE FUNCTION equitie_private.release_legal_hold(hold bigint, released_by text) RETURNS boolean
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  UPDATE equitie_private.legal_holds AS h
  SET
    released_by = release_legal_hold.released_by,
    released_at = clock_timestamp()
  WHERE h.hold_id = hold AND h.released_at IS NULL;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM equitie_private.record_maintenance_event(
    'DELETE', 'legal_holds', hold::text, jsonb_build_object('released_by', released_by)
  );
  RETURN true;
END
$$;

CREATE FUNCTION equitie_private.holds_on(parent text, partition regclass, from_key timestamptz, to_key timestamptz)
RETURNS bigint[]
LANGUAGE plpgsql STABLE
SET search_path = ''
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  hold record;
  subject text;
  applies boolean;
  found bigint[] := '{}';
BEGIN
  FOR hold IN
    SELECT h.*
    FROM equitie_private.legal_holds AS h
    WHERE
      h.released_at IS NULL
      AND (h.parent IS NULL OR h.parent = holds_on.parent)
      AND (h.last_day IS NULL OR h.last_day >= holds_on.from_key)
      AND (h.first_day IS NULL OR h.first_day < holds_on.to_key)
    ORDER BY h.hold_id
  LOOP
    applies := true;
    subject := CASE WHEN hold.investor_id IS NOT NULL THEN 'investor_id' WHEN hold.deal_id IS NOT NULL THEN 'deal_id' END;
    -- A table without such a column cannot tell whose its rows are, so all of them stay.
    IF subject IS NOT NULL AND EXISTS (
      SELECT FROM pg_catalog.pg_attribute AS a
      WHERE a.attrelid = partition AND a.attname = subject AND NOT a.attisdropped
    ) THEN
      EXECUTE format('SELECT EXISTS (SELECT FROM ONLY %s WHERE %I = $1)', partition, subject)
      INTO STRICT applies
      USING coalesce(hold.investor_id, hold.deal_id);
    END IF;
    IF applies THEN
      found := found || hold.hold_id;
    END IF;
  END LOOP;
  RETURN found;
END
$$;

COMMENT ON FUNCTION equitie_private.place_legal_hold(text, text, text, date, date, integer, integer) IS 'Places a legal hold and returns its key. In force from its commit on; a retirement in progress is waited for.';
COMMENT ON FUNCTION equitie_private.release_legal_hold(bigint, text) IS 'Ends a legal hold; false when there is none in force with this key.';
COMMENT ON FUNCTION equitie_private.holds_on(text, regclass, timestamptz, timestamptz) IS 'Keys of the holds in force that keep a partition.';

-- Retiring ------------------------------------------------------------------------------------------------------------

CREATE FUNCTION equitie_private.measure_partition(parent text, partition regclass, OUT row_count bigint, OUT amount numeric, OUT measures jsonb)
LANGUAGE plpgsql STABLE
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  built record;
  amount_column text := (SELECT p.amount_column FROM equitie_private.retention_policies AS p WHERE p.parent = measure_partition.parent);
BEGIN
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent::regclass);
  EXECUTE format(
    'SELECT count(*), %s, jsonb_build_object(''first_key'', min(%I), ''last_key'', max(%I), ''first_id'', min(%I), ''last_id'', max(%I)) FROM ONLY %s',
    CASE WHEN amount_column IS NULL THEN 'NULL::numeric' ELSE format('coalesce(sum(%I), 0)', amount_column) END,
    built.key_column, built.key_column, built.primary_key[1], built.primary_key[1], partition
  )
  INTO STRICT row_count, amount, measures;
END
$$;

CREATE FUNCTION equitie_private.detach_month(parent text, partition regclass, cutoff date, budget_ms integer) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  built record;
  bounds record;
  held bigint[];
  referring text;
  measured record;
  partition_name name := (SELECT c.relname FROM pg_catalog.pg_class AS c WHERE c.oid = partition);
  retired_name name;
  retired bigint;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent::regclass);
  SELECT b.from_key, b.to_key
  INTO bounds
  FROM equitie_private.month_partition_bounds(parent::regclass) AS b
  WHERE b.partition = detach_month.partition AND NOT b.is_default;
  IF NOT FOUND OR bounds.to_key > cutoff THEN
    RAISE EXCEPTION '% is no partition of % that ended by %', partition, parent, cutoff
      USING ERRCODE = 'invalid_parameter_value';
  END IF;

  -- Who places a hold waits until this is over, and finds the partition gone or kept; it cannot come in between.
  PERFORM set_config('lock_timeout', budget_ms::text, true);
  LOCK TABLE equitie_private.legal_holds IN SHARE MODE;
  SELECT * INTO STRICT measured FROM equitie_private.measure_partition(parent, partition);
  retired_name := left('retired_' || partition_name, 63);
  IF to_regclass(format('equitie_part.%I', retired_name)) IS NOT NULL THEN
    retired_name := left('retired_' || partition_name, 40) || '_' || to_char(clock_timestamp(), 'YYYYMMDDHH24MISSUS');
  END IF;

  PERFORM equitie_private.lock_partitions(
    parent::regclass, ARRAY[built.default_partition, partition], 'SHARE ROW EXCLUSIVE', budget_ms
  );
  held := equitie_private.holds_on(parent, partition, bounds.from_key, bounds.to_key);
  IF held <> '{}' THEN
    RAISE EXCEPTION '% is kept by legal hold %', partition, array_to_string(held, ', ')
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  referring := equitie_private.inbound_references(parent::regclass, partition, bounds.from_key::text, bounds.to_key::text);
  IF referring IS NOT NULL THEN
    RAISE EXCEPTION '% cannot be retired, because other rows refer to its rows: %', partition, referring
      USING
        ERRCODE = 'foreign_key_violation',
        HINT = 'Delete the referring rows, or drop the foreign key; then run maintenance again.';
  END IF;

  EXECUTE format('ALTER TABLE %s DETACH PARTITION %s', parent::regclass, partition);
  EXECUTE format('ALTER TABLE %s RENAME TO %I', partition, retired_name);
  INSERT INTO equitie_private.retired_partitions (parent, partition_name, table_name, from_key, to_key)
  VALUES (detach_month.parent, partition_name, retired_name, bounds.from_key, bounds.to_key)
  RETURNING retired_id INTO STRICT retired;
  EXECUTE format(
    'COMMENT ON TABLE equitie_part.%I IS %L',
    retired_name, format('Retired partition of %s: see equitie_private.retired_partitions, %s.', parent, retired)
  );
  PERFORM equitie_private.record_maintenance_event(
    'ARCHIVE', built.parent_name, partition_name,
    measured.measures || jsonb_build_object(
      'step', 'detached', 'rows', measured.row_count, 'amount', measured.amount, 'from', bounds.from_key, 'to', bounds.to_key
    )
  );
  RETURN retired;
END
$$;

CREATE FUNCTION equitie_private.finalize_detach(parent text, partition regclass, cutoff date, budget_ms integer)
RETURNS boolean
LANGUAGE plpgsql
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  bounds record;
  partition_name name := (SELECT c.relname FROM pg_catalog.pg_class AS c WHERE c.oid = partition);
  retired_name name := left('retired_' || partition_name, 63);
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT b.from_key, b.to_key
  INTO STRICT bounds
  FROM equitie_private.month_partition_bounds(parent::regclass) AS b
  WHERE b.partition = finalize_detach.partition;
  -- It also waits for transactions that still see the partition's rows.
  PERFORM set_config('lock_timeout', budget_ms::text, true);
  EXECUTE format('ALTER TABLE %s DETACH PARTITION %s FINALIZE', parent::regclass, partition);
  IF cutoff IS NULL OR bounds.to_key > cutoff OR to_regclass(format('equitie_part.%I', retired_name)) IS NOT NULL THEN
    -- Whoever detached it had something else in mind than its age.
    RETURN false;
  END IF;
  EXECUTE format('ALTER TABLE %s RENAME TO %I', partition, retired_name);
  INSERT INTO equitie_private.retired_partitions (parent, partition_name, table_name, from_key, to_key)
  VALUES (finalize_detach.parent, partition_name, retired_name, bounds.from_key, bounds.to_key);
  PERFORM equitie_private.record_maintenance_event(
    'ARCHIVE', split_part(parent, '.', 2), partition_name,
    jsonb_build_object('step', 'detached', 'from', bounds.from_key, 'to', bounds.to_key)
  );
  RETURN true;
END
$$;

CREATE FUNCTION equitie_private.release_retired(retired bigint, budget_ms integer) RETURNS integer
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  entry record;
  released regclass;
  foreign_key name;
  dropped integer := 0;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT entry FROM equitie_private.retired_partitions AS r WHERE r.retired_id = retired;
  released := format('equitie_part.%I', entry.table_name)::regclass;
  -- Deleting an investor must not change a table that is to be what its archive says.
  IF EXISTS (SELECT FROM pg_catalog.pg_constraint AS k WHERE k.conrelid = released AND k.contype = 'f') THEN
    PERFORM equitie_private.lock_peers(entry.parent::regclass, ARRAY[released], budget_ms);
    FOR foreign_key IN
      SELECT k.conname FROM pg_catalog.pg_constraint AS k WHERE k.conrelid = released AND k.contype = 'f'
    LOOP
      EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', released, foreign_key);
      dropped := dropped + 1;
    END LOOP;
  END IF;
  RETURN dropped;
END
$$;

CREATE FUNCTION equitie_private.settle_retired(retired bigint) RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  entry record;
  settled regclass;
  measured record;
  strays bigint := 0;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT entry FROM equitie_private.retired_partitions AS r WHERE r.retired_id = retired;
  settled := format('equitie_part.%I', entry.table_name)::regclass;
  IF entry.state <> 'detached' THEN
    RETURN entry.row_count;
  ELSIF EXISTS (SELECT FROM pg_catalog.pg_constraint AS k WHERE k.conrelid = settled AND k.contype = 'f') THEN
    RAISE EXCEPTION '% can still be changed through its foreign keys', settled
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  IF entry.parent = 'public.transactions_clean' AND to_regprocedure('equitie_private.forget_strays(regclass)') IS NOT NULL THEN
    strays := equitie_private.forget_strays(settled);
  END IF;
  SELECT * INTO STRICT measured FROM equitie_private.measure_partition(entry.parent, settled);
  UPDATE equitie_private.retired_partitions AS r
  SET
    state = 'settled',
    row_count = measured.row_count,
    amount = measured.amount,
    measures = measured.measures || jsonb_build_object('strays', strays)
  WHERE r.retired_id = retired;
  PERFORM equitie_private.record_maintenance_event(
    'ARCHIVE', split_part(entry.parent, '.', 2), entry.partition_name,
    measured.measures || jsonb_build_object('step', 'settled', 'rows', measured.row_count, 'amount', measured.amount, 'strays', strays)
  );
  RETURN measured.row_count;
END
$$;

CREATE FUNCTION equitie_private.record_archive(retired bigint, file text, sha256 text, bytes bigint) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  entry record;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  UPDATE equitie_private.retired_partitions AS r
  SET
    state = 'archived',
    archive_file = record_archive.file,
    archive_sha256 = record_archive.sha256,
    archive_bytes = record_archive.bytes,
    archived_at = clock_timestamp()
  WHERE r.retired_id = retired AND r.state IN ('settled', 'archived')
  RETURNING r.* INTO STRICT entry;
  PERFORM equitie_private.record_maintenance_event(
    'ARCHIVE', split_part(entry.parent, '.', 2), entry.partition_name,
    entry.measures || jsonb_build_object(
      'step', 'archived', 'rows', entry.row_count, 'amount', entry.amount, 'file', file, 'sha256', sha256, 'bytes', bytes
    )
  );
END
$$;

CREATE FUNCTION equitie_private.drop_retired(retired bigint, budget_ms integer) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  entry record;
  doomed regclass;
  held bigint[];
  measured record;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  PERFORM set_config('lock_timeout', budget_ms::text, true);
  LOCK TABLE equitie_private.legal_holds IN SHARE MODE;
  SELECT * INTO STRICT entry FROM equitie_private.retired_partitions AS r WHERE r.retired_id = retired;
  IF entry.state <> 'archived' THEN
    RAISE EXCEPTION 'equitie_part.% is %, not archived: it is not dropped', entry.table_name, entry.state
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  doomed := format('equitie_part.%I', entry.table_name)::regclass;
  EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', doomed);
  held := equitie_private.holds_on(entry.parent, doomed, entry.from_key, entry.to_key);
  IF held <> '{}' THEN
    RAISE EXCEPTION '% is kept by legal hold %', doomed, array_to_string(held, ', ')
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  SELECT * INTO STRICT measured FROM equitie_private.measure_partition(entry.parent, doomed);
  IF
    (SELECT c.relispartition FROM pg_catalog.pg_class AS c WHERE c.oid = doomed)
    OR measured.row_count <> entry.row_count
    OR measured.amount IS DISTINCT FROM entry.amount
  THEN
    RAISE EXCEPTION '% is not what its archive says: % rows instead of %', doomed, measured.row_count, entry.row_count
      USING ERRCODE = 'object_not_in_prerequisite_state';
  END IF;
  EXECUTE format('DROP TABLE %s', doomed);
  UPDATE equitie_private.retired_partitions AS r
  SET
    state = 'dropped',
    ended_at = clock_timestamp()
  WHERE r.retired_id = retired;
  PERFORM equitie_private.record_maintenance_event(
    'DELETE', split_part(entry.parent, '.', 2), entry.partition_name,
    entry.measures || jsonb_build_object(
      'step', 'dropped', 'rows', entry.row_count, 'amount', entry.amount, 'file', entry.archive_file, 'sha256', entry.archive_sha256
    )
  );
END
$$;

COMMENT ON FUNCTION equitie_private.measure_partition(text, regclass) IS 'Rows, sum of the policy''s amount column, smallest and largest key and date.';
COMMENT ON FUNCTION equitie_private.detach_month(text, regclass, date, integer) IS 'Takes a partition that ended by the cutoff out of its table, unless it is held or referred to, and returns the key of its entry in retired_partitions.';
COMMENT ON FUNCTION equitie_private.finalize_detach(text, regclass, date, integer) IS 'Finishes an interrupted concurrent detach; one that has expired goes on to be archived, which true says.';
COMMENT ON FUNCTION equitie_private.release_retired(bigint, integer) IS 'Drops the foreign keys of a retired partition, so that nothing changes it any more.';
COMMENT ON FUNCTION equitie_private.settle_retired(bigint) IS 'Counts a retired partition and forgets its stray ids.';
COMMENT ON FUNCTION equitie_private.record_archive(bigint, text, text, bigint) IS 'Notes where a retired partition was archived, once the archive has been read back.';
COMMENT ON FUNCTION equitie_private.drop_retired(bigint, integer) IS 'Drops an archived partition that nothing holds and that is still what its archive says.';

-- Restoring -----------------------------------------------------------------------------------------------------------

CREATE FUNCTION equitie_private.prepare_restored(parent regclass, restored regclass, from_key text, to_key text, budget_ms integer)
RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  built record;
  foreign_key record;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT built FROM equitie_private.month_partitioning(parent);
  -- Each foreign key waits for the writers of the table it refers to.
  PERFORM set_config('lock_timeout', greatest(budget_ms / 2, 1)::text, true);
  EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS drain_bounds', restored);
  EXECUTE format(
    'ALTER TABLE %s ADD CONSTRAINT drain_bounds CHECK (%I >= %L AND %I < %L) NOT VALID',
    restored, built.key_column, from_key, built.key_column, to_key
  );
  FOR foreign_key IN
    SELECT k.conname, pg_catalog.pg_get_constraintdef(k.oid) AS definition
    FROM pg_catalog.pg_constraint AS k
    WHERE
      k.conrelid = parent
      AND k.contype = 'f'
      AND k.conparentid = 0
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint AS r WHERE r.conrelid = restored AND r.conname = k.conname)
  LOOP
    EXECUTE format(
      'ALTER TABLE %s ADD CONSTRAINT %I %s NOT VALID', restored, foreign_key.conname, foreign_key.definition
    );
  END LOOP;
END
$$;

CREATE FUNCTION equitie_private.record_restore(parent text, partition_name text, sha256 text, row_count bigint, amount numeric, file text)
RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  UPDATE equitie_private.retired_partitions AS r
  SET
    state = 'restored',
    ended_at = clock_timestamp()
  WHERE
    r.parent = record_restore.parent
    AND r.state IN ('detached', 'settled', 'archived', 'dropped')
    AND r.partition_name = record_restore.partition_name
    AND (record_restore.sha256 IS NULL OR r.archive_sha256 = record_restore.sha256);
  PERFORM equitie_private.record_maintenance_event(
    'RESTORE', split_part(parent, '.', 2), partition_name,
    jsonb_build_object('step', 'restored', 'rows', row_count, 'amount', amount, 'file', file, 'sha256', sha256)
  );
END
$$;

CREATE FUNCTION equitie_private.attach_restored(
  parent text, restored regclass, partition_name name, from_key text, to_key text, late_rows integer, budget_ms integer,
  sha256 text, file text
)
RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  moved bigint;
  measured record;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  SELECT * INTO STRICT measured FROM equitie_private.measure_partition(parent, restored);
  moved := equitie_private.attach_month(parent::regclass, restored, from_key, to_key, late_rows, 'ACCESS EXCLUSIVE', budget_ms);
  EXECUTE format('ALTER TABLE %s DROP CONSTRAINT drain_bounds', restored);
  EXECUTE format('ALTER TABLE %s RENAME TO %I', restored, partition_name);
  PERFORM equitie_private.record_restore(parent, partition_name, sha256, measured.row_count, measured.amount, file);
  RETURN moved;
END
$$;

COMMENT ON FUNCTION equitie_private.prepare_restored(regclass, regclass, text, text, integer) IS 'Gives a table with restored rows the constraints it needs as a partition, still to be validated.';
COMMENT ON FUNCTION equitie_private.attach_restored(text, regclass, name, text, text, integer, integer, text, text) IS 'Makes a table with restored rows a partition again, and notes that.';
COMMENT ON FUNCTION equitie_private.record_restore(text, text, text, bigint, numeric, text) IS 'Notes that a retired partition is back.';

-- Parents' statistics, and tasks ----------------------------------------------------------------------------------------

CREATE FUNCTION equitie_private.analyze_parent(parent text) RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  policy record;
  changes bigint;
  size double precision;
BEGIN
  SELECT * INTO STRICT policy FROM equitie_private.retention_policies AS p WHERE p.parent = analyze_parent.parent;
  SELECT
    coalesce(sum(s.n_tup_ins + s.n_tup_upd + s.n_tup_del), 0),
    coalesce(sum(greatest(c.reltuples, 0)), 0)
  INTO STRICT changes, size
  FROM pg_catalog.pg_inherits AS i
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid
  LEFT JOIN pg_catalog.pg_stat_all_tables AS s ON s.relid = i.inhrelid
  WHERE i.inhparent = policy.parent::regclass;
  -- Autovacuum analyzes partitions, never the parent.
  IF
    policy.analyzed_at IS NOT NULL
    AND abs(changes - policy.analyzed_changes) < size * 0.1 + 1000
    AND (changes = policy.analyzed_changes OR policy.analyzed_at > now() - interval '1 day')
  THEN
    RETURN false;
  END IF;
  EXECUTE format(
    'ANALYZE (SKIP_LOCKED) %s %s',
    CASE WHEN current_setting('server_version_num')::integer >= 180000 THEN 'ONLY' ELSE '' END,
    policy.parent::regclass
  );
  UPDATE equitie_private.retention_policies AS p
  SET
    analyzed_at = clock_timestamp(),
    analyzed_changes = changes
  WHERE p.parent = policy.parent;
  RETURN true;
END
$$;

CREATE FUNCTION equitie_private.run_maintenance_task(task text) RETURNS bigint
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  due record;
  called regprocedure;
  started timestamptz := clock_timestamp();
  result bigint;
BEGIN
  SELECT * INTO STRICT due FROM equitie_private.maintenance_tasks AS t WHERE t.name = task FOR UPDATE;
  called := to_regprocedure(due.function);
  IF called IS NULL THEN
    RAISE EXCEPTION 'the task "%" names the function %, which does not exist', task, due.function
      USING ERRCODE = 'undefined_function';
  END IF;
  EXECUTE format('SELECT %s', called) INTO result;
  UPDATE equitie_private.maintenance_tasks AS t
  SET
    last_run = clock_timestamp(),
    last_result = result,
    last_seconds = extract(epoch FROM clock_timestamp() - started),
    last_error = NULL
  WHERE t.name = task;
  RETURN result;
END
$$;

CREATE FUNCTION equitie_private.record_task_error(task text, error text) RETURNS void
LANGUAGE sql
SECURITY DEFINER
SET search_path = ''
AS $$
  UPDATE equitie_private.maintenance_tasks AS t
  SET
    last_run = clock_timestamp(),
    last_result = NULL,
    last_error = left(error, 1000)
  WHERE t.name = task
$$;

CREATE FUNCTION equitie_private.refresh_query_stats() RETURNS bigint
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  PERFORM equitie_private.refresh_query_stats_hourly();
  RETURN (SELECT count(*) FROM equitie_private.query_stats_hourly);
END
$$;

CREATE FUNCTION equitie_private.purge_old_idempotency_keys() RETURNS bigint
LANGUAGE sql
SET search_path = ''
AS $$
  SELECT equitie_private.purge_idempotency_keys(interval '30 days', interval '1 day')
$$;

COMMENT ON FUNCTION equitie_private.analyze_parent(text) IS 'Analyzes a partitioned table when enough has changed since, or something and a day has passed; says whether it did.';
COMMENT ON FUNCTION equitie_private.run_maintenance_task(text) IS 'Calls the function of a task and returns what it returned.';
COMMENT ON FUNCTION equitie_private.record_task_error(text, text) IS 'Notes that a task failed, and why.';
COMMENT ON FUNCTION equitie_private.refresh_query_stats() IS 'Task: brings the hourly statistics up to date and returns their rows.';
COMMENT ON FUNCTION equitie_private.purge_old_idempotency_keys() IS 'Task: removes keys of the application after 30 days, the library''s own after one.';

INSERT INTO equitie_private.maintenance_tasks (name, function, every)
VALUES
  ('refresh query statistics', 'equitie_private.refresh_query_stats()', '1 hour'),
  ('purge idempotency keys', 'equitie_private.purge_old_idempotency_keys()', '1 day');

-- What SQL can do by itself: for pg_cron --------------------------------------------------------------------------------

CREATE FUNCTION equitie_private.maintenance_status()
RETURNS TABLE (
  parent text,
  partitions bigint,
  first_bound timestamptz,
  last_bound timestamptz,
  next_gap date,
  months_ahead integer,
  default_rows bigint,
  default_first timestamptz,
  default_last timestamptz,
  detach_pending text[],
  expired bigint,
  retired bigint,
  active_holds bigint,
  last_run timestamptz,
  last_outcome text
)
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  policy record;
  built record;
BEGIN
  FOR policy IN SELECT * FROM equitie_private.retention_policies AS p ORDER BY p.parent LOOP
    SELECT * INTO STRICT built FROM equitie_private.month_partitioning(policy.parent::regclass);
    parent := policy.parent;
    months_ahead := policy.months_ahead;
    SELECT
      count(*),
      min(b.from_key),
      max(b.to_key),
      count(*) FILTER (WHERE b.to_key <= (current_date - policy.keep)::date)
    INTO STRICT partitions, first_bound, last_bound, expired
    FROM equitie_private.month_partition_bounds(policy.parent::regclass) AS b
    WHERE NOT b.is_default;
    next_gap := (
      SELECT min(m.month)::date
      FROM generate_series(
        date_trunc('month', current_date::timestamp), date_trunc('month', current_date::timestamp) + interval '10 years', interval '1 month'
      ) AS m (month)
      WHERE NOT EXISTS (
        SELECT FROM equitie_private.month_partition_bounds(policy.parent::regclass) AS b
        WHERE NOT b.is_default AND b.from_key <= m.month AND b.to_key >= m.month + interval '1 month'
      )
    );
    EXECUTE format(
      'SELECT count(*), min(%I)::timestamptz, max(%I)::timestamptz FROM ONLY %s',
      built.key_column, built.key_column, built.default_partition
    )
    INTO STRICT default_rows, default_first, default_last;
    detach_pending := ARRAY(
      SELECT i.inhrelid::regclass::text
      FROM pg_catalog.pg_inherits AS i
      WHERE i.inhparent = policy.parent::regclass AND i.inhdetachpending
    );
    retired := (
      SELECT count(*)
      FROM equitie_private.retired_partitions AS r
      WHERE r.parent = policy.parent AND r.state IN ('detached', 'settled', 'archived')
    );
    active_holds := (
      SELECT count(*)
      FROM equitie_private.legal_holds AS h
      WHERE h.released_at IS NULL AND (h.parent IS NULL OR h.parent = policy.parent)
    );
    SELECT r.started_at, r.outcome
    INTO last_run, last_outcome
    FROM equitie_private.maintenance_runs AS r
    ORDER BY r.run_id DESC
    LIMIT 1;
    RETURN NEXT;
  END LOOP;
END
$$;

CREATE FUNCTION equitie_private.maintenance_steps()
RETURNS TABLE (kind text, parent text, month date, task text)
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  policy record;
  built record;
BEGIN
  FOR policy IN SELECT * FROM equitie_private.retention_policies AS p ORDER BY p.parent LOOP
    SELECT * INTO STRICT built FROM equitie_private.month_partitioning(policy.parent::regclass);
    -- Months ahead, and months of late rows that are neither past retention nor beyond the months ahead.
    RETURN QUERY EXECUTE format(
      'WITH wanted AS ('
      ' SELECT m.month::date AS month'
      ' FROM generate_series(date_trunc(''month'', current_date::timestamp), date_trunc(''month'', current_date::timestamp) + make_interval(months => $2), interval ''1 month'') AS m (month)'
      ' UNION'
      ' SELECT DISTINCT date_trunc(''month'', d.%I::timestamptz, ''UTC'')::date FROM ONLY %s AS d'
      ' WHERE d.%I < date_trunc(''month'', current_date::timestamp) + make_interval(months => $2 + 1)'
      ' AND d.%I >= coalesce(date_trunc(''month'', current_date - $3), ''-infinity'')'
      ')'
      ' SELECT ''month'', $1, w.month, NULL::text FROM wanted AS w'
      ' WHERE NOT EXISTS ('
      '  SELECT FROM equitie_private.month_partition_bounds($1::regclass) AS b'
      '  WHERE NOT b.is_default AND b.from_key < w.month + interval ''1 month'' AND b.to_key > w.month'
      ' ) ORDER BY w.month',
      built.key_column, built.default_partition, built.key_column, built.key_column
    )
    USING policy.parent, policy.months_ahead, policy.keep;
    RETURN QUERY SELECT 'analyze'::text, policy.parent, NULL::date, NULL::text;
  END LOOP;
  RETURN QUERY
  SELECT 'task'::text, NULL::text, NULL::date, t.name
  FROM equitie_private.maintenance_tasks AS t
  -- A run that comes a moment early would otherwise leave the task to the next one.
  WHERE t.last_run IS NULL OR t.last_run + t.every * 0.95 <= clock_timestamp()
  ORDER BY t.name;
END
$$;

CREATE FUNCTION equitie_private.do_maintenance_step(kind text, parent text, month date, task text) RETURNS text
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  moved bigint;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  IF kind = 'month' THEN
    moved := equitie_private.make_month(parent::regclass, month, 2000, 50);
    RETURN format('made %s of %s with %s late rows', to_char(month, 'YYYY-MM'), parent, moved);
  ELSIF kind = 'analyze' THEN
    RETURN CASE WHEN equitie_private.analyze_parent(parent) THEN format('analyzed %s', parent) END;
  ELSIF kind = 'task' THEN
    RETURN format('%s: %s', task, equitie_private.run_maintenance_task(task));
  END IF;
  RAISE EXCEPTION 'there is no maintenance step of the kind "%"', kind
    USING ERRCODE = 'invalid_parameter_value';
END
$$;

CREATE FUNCTION equitie_private.begin_maintenance_run(source text) RETURNS bigint
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  run bigint;
BEGIN
  PERFORM equitie_private.take_maintenance_turn();
  -- It is our turn, so whoever is noted as running is not.
  UPDATE equitie_private.maintenance_runs AS r SET outcome = 'failed' WHERE r.outcome = 'running';
  DELETE FROM equitie_private.maintenance_runs AS r WHERE r.started_at < now() - interval '400 days';
  INSERT INTO equitie_private.maintenance_runs (source)
  VALUES (begin_maintenance_run.source)
  RETURNING run_id INTO STRICT run;
  RETURN run;
END
$$;

CREATE FUNCTION equitie_private.finish_maintenance_run(run bigint, outcome text, report jsonb) RETURNS void
LANGUAGE sql
SECURITY DEFINER
SET search_path = ''
AS $$
  UPDATE equitie_private.maintenance_runs AS r
  SET
    finished_at = clock_timestamp(),
    outcome = finish_maintenance_run.outcome,
    report = finish_maintenance_run.report
  WHERE r.run_id = run
$$;

CREATE PROCEDURE equitie_private.maintain()
LANGUAGE plpgsql
AS $$
DECLARE
  run bigint;
  step record;
  outcome text;
  refusal text;
  done text[] := '{}';
  not_done text[] := '{}';
BEGIN
  -- A procedure that commits may have no settings of its own; this one lasts as long as the transaction, so again below.
  PERFORM pg_catalog.set_config('search_path', '', true);
  run := equitie_private.begin_maintenance_run('sql');
  COMMIT;

  FOR step IN SELECT * FROM equitie_private.maintenance_steps() LOOP
    -- Tries of 50 ms at most, so that nobody waits for us; about a minute of them.
    FOR attempt IN 1..100 LOOP
      PERFORM pg_catalog.set_config('search_path', '', true);
      outcome := NULL;
      refusal := NULL;
      BEGIN
        outcome := equitie_private.do_maintenance_step(step.kind, step.parent, step.month, step.task);
      EXCEPTION
        WHEN lock_not_available OR deadlock_detected THEN
          refusal := SQLERRM;
        WHEN OTHERS THEN
          refusal := SQLERRM;
          IF step.kind = 'task' THEN
            PERFORM equitie_private.record_task_error(step.task, refusal);
          END IF;
          attempt := 100;
      END;
      COMMIT;
      EXIT WHEN refusal IS NULL OR attempt = 100;
      PERFORM pg_catalog.pg_sleep(0.3 + pg_catalog.random() * 0.6);
      COMMIT;
    END LOOP;
    IF refusal IS NULL THEN
      done := done || outcome;
    ELSE
      not_done := not_done || pg_catalog.concat_ws(' ', step.kind, step.parent, pg_catalog.to_char(step.month, 'YYYY-MM'), step.task || ':', refusal);
    END IF;
  END LOOP;

  PERFORM pg_catalog.set_config('search_path', '', true);
  PERFORM equitie_private.finish_maintenance_run(
    run,
    CASE WHEN not_done = '{}' THEN 'done' ELSE 'incomplete' END,
    pg_catalog.jsonb_build_object('done', pg_catalog.array_remove(done, NULL), 'not_done', not_done)
  );
  COMMIT;
  IF not_done <> '{}' THEN
    RAISE WARNING 'maintenance could not do everything: %', pg_catalog.array_to_string(not_done, '; ');
  END IF;
END
$$;

COMMENT ON FUNCTION equitie_private.maintenance_status() IS 'What stands, what waits and what is due, by table. The command "python -m equitie_data maintain status" judges it.';
COMMENT ON FUNCTION equitie_private.maintenance_steps() IS 'What CALL equitie_private.maintain() would do now.';
COMMENT ON FUNCTION equitie_private.do_maintenance_step(text, text, date, text) IS 'One step of CALL equitie_private.maintain().';
COMMENT ON FUNCTION equitie_private.begin_maintenance_run(text) IS 'Notes that a run begins; fails while another one is at work.';
COMMENT ON FUNCTION equitie_private.finish_maintenance_run(bigint, text, jsonb) IS 'Notes how a run ended.';
COMMENT ON PROCEDURE equitie_private.maintain() IS 'The part of maintenance that needs no files: months ahead, late rows to their months as long as those are few, statistics of parents, tasks. Commits after every step: CALL it outside of a transaction.';

-- Privileges ------------------------------------------------------------------------------------------------------------

DO $$
DECLARE
  ours regprocedure;
BEGIN
  FOR ours IN
    SELECT p.oid::regprocedure
    FROM pg_catalog.pg_proc AS p
    WHERE
      p.pronamespace = 'equitie_private'::regnamespace
      AND p.proname IN (
        'retention_start', 'take_maintenance_turn', 'month_partitioning', 'lock_partitions', 'copy_statement_triggers', 'inbound_references',
        'refuse_referenced',
        'break_drain', 'move_late_rows', 'attach_month', 'make_month', 'begin_drain', 'copy_drain', 'drain_obstacles',
        'drain_differences', 'finish_drain', 'undrained_rows', 'drop_drain', 'lock_peers', 'record_maintenance_event',
        'place_legal_hold', 'release_legal_hold', 'holds_on', 'measure_partition', 'detach_month', 'finalize_detach',
        'release_retired',
        'settle_retired', 'record_archive', 'drop_retired', 'prepare_restored', 'attach_restored', 'record_restore',
        'analyze_parent', 'run_maintenance_task', 'record_task_error', 'refresh_query_stats', 'purge_old_idempotency_keys',
        'maintenance_status', 'maintenance_steps', 'do_maintenance_step', 'begin_maintenance_run',
        'finish_maintenance_run', 'maintain'
      )
  LOOP
    EXECUTE format('REVOKE ALL ON ROUTINE %s FROM PUBLIC, anon, authenticated, equitie_staff, service_role', ours);
  END LOOP;
END
$$;

GRANT EXECUTE ON PROCEDURE equitie_private.maintain() TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.maintenance_status() TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.retention_start(text) TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.maintenance_steps() TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.do_maintenance_step(text, text, date, text) TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.begin_maintenance_run(text) TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.finish_maintenance_run(bigint, text, jsonb) TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.record_task_error(text, text) TO service_role;
