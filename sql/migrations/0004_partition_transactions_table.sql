-- transactions_clean becomes a table partitioned by month; its rows, their ids and the sequence continue.
--
-- The rows are copied within this transaction while nobody else can write: right for the sizes the platform has (a
-- million rows take seconds). Views or foreign keys of others that depend on the table stop the migration and are named;
-- nothing is dropped along with it.

-- squawk-ignore-file renaming-table, renaming-object, ban-drop-table
-- The old table makes way for the partitioned one of the same name, with all its rows, in one transaction.

CREATE FUNCTION equitie_private.month_partition_bounds(parent regclass)
RETURNS TABLE (partition regclass, from_key timestamptz, to_key timestamptz, is_default boolean)
LANGUAGE sql STABLE
-- pg_get_expr prints bounds in the session's style; these make it one that the expressions below can read.
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
  SELECT
    i.inhrelid::regclass,
    CASE
      WHEN b.bound LIKE 'FOR VALUES FROM (MINVALUE)%' THEN '-infinity'
      ELSE substring(b.bound FROM 'FROM \(''([^'']+)''\)')::timestamptz
    END,
    CASE
      WHEN b.bound LIKE '%TO (MAXVALUE)' THEN 'infinity'
      ELSE substring(b.bound FROM 'TO \(''([^'']+)''\)')::timestamptz
    END,
    b.bound = 'DEFAULT'
  FROM pg_catalog.pg_inherits AS i
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid
  CROSS JOIN LATERAL pg_catalog.pg_get_expr(c.relpartbound, c.oid) AS b (bound)
  WHERE i.inhparent = parent
$$;

COMMENT ON FUNCTION equitie_private.month_partition_bounds(regclass) IS 'The partitions of a table partitioned by one date or timestamptz, with their bounds (dates as midnight UTC; MINVALUE and MAXVALUE as infinities).';

CREATE FUNCTION equitie_private.ensure_month_partitions(parent regclass, first date, last date)
RETURNS integer
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
SET "DateStyle" = 'ISO, YMD'
SET "TimeZone" = 'UTC'
AS $$
DECLARE
  parent_schema name;
  parent_name name;
  key_column name;
  default_partition regclass;
  column_list text;
  audited boolean;
  append_only boolean;
  month date;
  next_month date;
  partition_name name;
  overlapping regclass;
  covered boolean;
  has_late_rows boolean;
  silence text[];
  restore text[];
  command text;
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

  -- "Ours" is a table of this function's owner, partitioned by one date or time, whose default partition stands in
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

  -- Statement triggers, unlike row triggers, do not reach a partition by themselves.
  SELECT
    coalesce(bool_or(t.tgname = 'audit_insert'), false),
    coalesce(bool_or(t.tgname = 'refuse_truncate'), false)
  INTO STRICT audited, append_only
  FROM pg_catalog.pg_trigger AS t
  WHERE t.tgrelid = parent;

  month := date_trunc('month', first);
  WHILE month <= last LOOP
    next_month := month + interval '1 month';
    partition_name := parent_name || to_char(month, '_YYYY_MM');

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

    -- ATTACH needs this lock anyway; taken here, no late row can slip in between the move and the attachment.
    EXECUTE format('LOCK TABLE ONLY %s IN ACCESS EXCLUSIVE MODE', default_partition);
    EXECUTE format('SELECT EXISTS (SELECT FROM ONLY %s WHERE %I >= $1 AND %I < $2)', default_partition, key_column, key_column)
    INTO STRICT has_late_rows
    USING month, next_month;

    IF has_late_rows THEN
      EXECUTE format(
        'INSERT INTO equitie_part.%I (%s) SELECT %s FROM ONLY %s WHERE %I >= $1 AND %I < $2',
        partition_name, column_list, column_list, default_partition, key_column, key_column
      )
      USING month, next_month;

      -- Moving a row to its month is no change of it: no audit event, and no refusal where the table is append-only.
      SELECT
        array_agg(format('ALTER TABLE %s DISABLE TRIGGER %I', default_partition, t.tgname)),
        array_agg(
          format(
            'ALTER TABLE %s ENABLE %s TRIGGER %I',
            default_partition,
            CASE t.tgenabled WHEN 'A' THEN 'ALWAYS' WHEN 'R' THEN 'REPLICA' ELSE '' END,
            t.tgname
          )
        )
      INTO silence, restore
      FROM pg_catalog.pg_trigger AS t
      WHERE
        t.tgrelid = default_partition
        AND NOT t.tgisinternal
        AND t.tgenabled <> 'D';

      FOREACH command IN ARRAY coalesce(silence, '{}') LOOP
        EXECUTE command;
      END LOOP;
      EXECUTE format(
        'DELETE FROM ONLY %s WHERE %I >= $1 AND %I < $2', default_partition, key_column, key_column
      )
      USING month, next_month;
      FOREACH command IN ARRAY coalesce(restore, '{}') LOOP
        EXECUTE command;
      END LOOP;
    END IF;

    EXECUTE format(
      'ALTER TABLE %s ATTACH PARTITION equitie_part.%I FOR VALUES FROM (%L) TO (%L)',
      parent, partition_name, month, next_month
    );
    EXECUTE format(
      'COMMENT ON TABLE equitie_part.%I IS %L',
      partition_name, format('Rows of %I.%I from %s to before %s.', parent_schema, parent_name, month, next_month)
    );
    IF audited THEN
      PERFORM equitie_private.track(format('equitie_part.%I', partition_name)::regclass);
    END IF;
    IF append_only THEN
      PERFORM equitie_private.make_append_only(format('equitie_part.%I', partition_name)::regclass);
    END IF;

    created := created + 1;
    month := next_month;
  END LOOP;
  RETURN created;
END
$$;

COMMENT ON FUNCTION equitie_private.ensure_month_partitions(regclass, date, date) IS 'Makes the missing month partitions from the month of first to the month of last, moving rows of those months out of the default partition, and says how many it made. One transaction: ask for a few years at a time, since every new partition holds locks until the end.';

REVOKE ALL ON FUNCTION equitie_private.month_partition_bounds(regclass) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.ensure_month_partitions(regclass, date, date) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.month_partition_bounds(regclass) TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.ensure_month_partitions(regclass, date, date) TO service_role;

LOCK TABLE public.transactions_clean IN ACCESS EXCLUSIVE MODE;

ALTER TABLE public.transactions_clean RENAME TO transactions_clean_unpartitioned;
ALTER SEQUENCE public.transactions_clean_transaction_id_seq RENAME TO transactions_clean_unpartitioned_seq;

CREATE TABLE public.transactions_clean (
  LIKE public.transactions_clean_unpartitioned INCLUDING ALL EXCLUDING INDEXES
)
PARTITION BY RANGE (transaction_date);

CREATE TABLE equitie_part.transactions_clean_default
PARTITION OF public.transactions_clean
DEFAULT;

COMMENT ON TABLE public.transactions_clean IS 'What an investor put into a deal, and when. Partitioned by month of transaction_date.';
COMMENT ON TABLE equitie_part.transactions_clean_default IS 'Rows of public.transactions_clean whose month has no partition yet; ensure_month_partitions moves them.';

SELECT equitie_private.ensure_month_partitions(
  'public.transactions_clean',
  -- At most ten years back: each partition takes some thirty entries of the lock table until this transaction ends, and
  -- a server as installed has about 6,400. Older rows wait in the default partition for ensure_month_partitions.
  greatest(
    least(
      (SELECT min(t.transaction_date) FROM public.transactions_clean_unpartitioned AS t WHERE isfinite(t.transaction_date)),
      current_date
    ),
    (current_date - interval '10 years')::date
  ),
  (current_date + interval '12 months')::date
);

INSERT INTO public.transactions_clean
OVERRIDING SYSTEM VALUE
SELECT t.*
FROM public.transactions_clean_unpartitioned AS t;

SELECT setval(
  pg_get_serial_sequence('public.transactions_clean', 'transaction_id'),
  s.last_value,
  s.is_called
)
FROM public.transactions_clean_unpartitioned_seq AS s;

-- No CASCADE: a view or foreign key of others stops the migration here and is named.
DROP TABLE public.transactions_clean_unpartitioned;

-- A partitioned table's primary key has to hold the partition key.
ALTER TABLE public.transactions_clean
ADD CONSTRAINT transactions_clean_pkey
PRIMARY KEY (transaction_id, transaction_date);

CREATE INDEX idx_transactions_investor_date
ON public.transactions_clean (investor_id, transaction_date DESC);

CREATE INDEX idx_transactions_deal_type
ON public.transactions_clean (deal_id, transaction_type);

CREATE INDEX idx_transactions_type_date
ON public.transactions_clean (transaction_type, transaction_date);

CREATE INDEX idx_transactions_active
ON public.transactions_clean (deal_id, investor_id)
WHERE status NOT IN ('cancelled', 'failed');

CREATE INDEX idx_transactions_date_brin
ON public.transactions_clean USING brin (transaction_date);

CREATE INDEX idx_transactions_date
ON public.transactions_clean (transaction_date DESC);

CREATE INDEX idx_transactions_parent
ON public.transactions_clean (parent_transaction_id)
WHERE parent_transaction_id IS NOT NULL;

COMMENT ON INDEX public.idx_transactions_investor_date IS 'An investor''s transactions, newest first; every policy of an investor goes through it.';
COMMENT ON INDEX public.idx_transactions_deal_type IS 'A deal''s transactions, by type.';
COMMENT ON INDEX public.idx_transactions_type_date IS 'Transactions of one type over a range of dates.';
COMMENT ON INDEX public.idx_transactions_active IS 'Who is in a deal: rows that are neither cancelled nor failed.';
COMMENT ON INDEX public.idx_transactions_date_brin IS 'Date ranges, for almost no space.';
COMMENT ON INDEX public.idx_transactions_date IS 'The newest transactions of everybody.';
COMMENT ON INDEX public.idx_transactions_parent IS 'Transactions that derive from one.';

ALTER TABLE public.transactions_clean
ADD CONSTRAINT fk_transactions_deal
FOREIGN KEY (deal_id) REFERENCES public.deals_clean (deal_id)
ON DELETE CASCADE
ON UPDATE CASCADE;

ALTER TABLE public.transactions_clean
ADD CONSTRAINT fk_transactions_investor
FOREIGN KEY (investor_id) REFERENCES public.investors_clean (investor_id)
ON DELETE CASCADE
ON UPDATE CASCADE;

CREATE TRIGGER set_updated_at
BEFORE UPDATE ON public.transactions_clean
FOR EACH ROW
WHEN (OLD OPERATOR(pg_catalog.*<>) NEW)
EXECUTE FUNCTION equitie_private.set_updated_at();

REVOKE ALL ON public.transactions_clean, equitie_part.transactions_clean_default FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON SEQUENCE public.transactions_clean_transaction_id_seq FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
