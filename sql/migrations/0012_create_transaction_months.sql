-- Totals of the transactions by month, and a month report that is exact at any moment.
--
-- Statement triggers note which months a write touched, each transaction in rows of its own: the rollup makes no writer
-- wait for another. The report takes the kept totals of every month that nobody has touched since they were counted and
-- counts the other months afresh, all in the caller's snapshot. Whether it is right depends on nobody's running the
-- refresh; how fast it is does.

CREATE TABLE equitie_private.transaction_months (
  month date,
  partition oid NOT NULL,
  bounds uuid NOT NULL,
  refreshed_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT transaction_months_pkey PRIMARY KEY (month)
);

COMMENT ON TABLE equitie_private.transaction_months IS 'Months whose totals are kept. They hold as long as the month''s partition is the one they were counted in and no row of transaction_month_changes names the month.';
COMMENT ON COLUMN equitie_private.transaction_months.month IS 'Key: first day of the month.';
COMMENT ON COLUMN equitie_private.transaction_months.partition IS 'Partition that held the month when it was counted. Where it is detached or another one holds the month, the totals are not used.';
COMMENT ON COLUMN equitie_private.transaction_months.bounds IS 'Hash of that partition''s bounds as the catalog has them.';
COMMENT ON COLUMN equitie_private.transaction_months.refreshed_at IS 'When the month was counted.';

CREATE TABLE equitie_private.transaction_month_totals (
  month date,
  transaction_type text,
  status text,
  currency char(3),
  transactions bigint NOT NULL,
  amount numeric NOT NULL,
  gross_capital numeric,
  net_capital numeric,
  admin_fee numeric,
  CONSTRAINT transaction_month_totals_pkey PRIMARY KEY (month, transaction_type, status, currency)
);

COMMENT ON TABLE equitie_private.transaction_month_totals IS 'Totals of the months in transaction_months, as of their last count. Read them through public.month_report, which knows where they no longer hold.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.month IS 'First day of the month.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.transaction_type IS 'primary, secondary, advisory or subnominee.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.status IS 'pending, completed, cancelled or failed.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.currency IS 'ISO 4217 code; amounts of different currencies are never added.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.transactions IS 'How many transactions.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.amount IS 'Exact sum of their amounts, in currency.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.gross_capital IS 'Exact sum of their capital before fees, in currency; NULL when none has one.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.net_capital IS 'Exact sum of their capital after fees, in currency; NULL when none has one.';
COMMENT ON COLUMN equitie_private.transaction_month_totals.admin_fee IS 'Exact sum of their administration fees, in currency; NULL when none has one.';

-- The transaction's id in the key: two transactions that touch the same month make two rows and never wait for each
-- other, and one that touches it a thousand times makes one.
CREATE TABLE equitie_private.transaction_month_changes (
  month date,
  transaction_xid xid8 DEFAULT pg_current_xact_id(),
  CONSTRAINT transaction_month_changes_pkey PRIMARY KEY (month, transaction_xid)
);

COMMENT ON TABLE equitie_private.transaction_month_changes IS 'Months that were written to since they were counted: one row a month and transaction, made by triggers of transactions_clean in the write''s own transaction.';
COMMENT ON COLUMN equitie_private.transaction_month_changes.month IS 'First day of the month.';
COMMENT ON COLUMN equitie_private.transaction_month_changes.transaction_xid IS 'Transaction that wrote to it.';

CREATE FUNCTION equitie_private.note_transaction_months() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  -- The days are made distinct before their months are worked out: a bulk load has many rows and few days.
  IF TG_OP = 'INSERT' THEN
    INSERT INTO equitie_private.transaction_month_changes (month)
    SELECT DISTINCT date_trunc('month', d.day::timestamp)::date
    FROM (SELECT DISTINCT n.transaction_date FROM new_rows AS n) AS d (day)
    ON CONFLICT DO NOTHING;
  ELSIF TG_OP = 'UPDATE' THEN
    INSERT INTO equitie_private.transaction_month_changes (month)
    SELECT DISTINCT date_trunc('month', d.day::timestamp)::date
    FROM (
      SELECT o.transaction_date FROM old_rows AS o
      UNION
      SELECT n.transaction_date FROM new_rows AS n
    ) AS d (day)
    ON CONFLICT DO NOTHING;
  ELSIF TG_OP = 'DELETE' THEN
    INSERT INTO equitie_private.transaction_month_changes (month)
    SELECT DISTINCT date_trunc('month', d.day::timestamp)::date
    FROM (SELECT DISTINCT o.transaction_date FROM old_rows AS o) AS d (day)
    ON CONFLICT DO NOTHING;
  ELSE
    -- TRUNCATE shows no rows. Months without kept totals need no note.
    INSERT INTO equitie_private.transaction_month_changes (month)
    SELECT m.month
    FROM equitie_private.transaction_months AS m
    WHERE
      m.partition = TG_RELID
      OR m.partition IN (SELECT t.relid FROM pg_partition_tree(TG_RELID) AS t)
    ON CONFLICT DO NOTHING;
  END IF;
  RETURN NULL;
END
$$;

CREATE FUNCTION equitie_private.watch_transaction_months(target regclass) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  member regclass;
BEGIN
  -- Statement triggers do not reach partitions, and one on the parent stays silent about a write that names a partition.
  FOR member IN
    SELECT target
    UNION
    SELECT t.relid FROM pg_partition_tree(target) AS t
  LOOP
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER month_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows'
      ' FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.note_transaction_months()',
      member
    );
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER month_update AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'
      ' FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.note_transaction_months()',
      member
    );
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER month_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows'
      ' FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.note_transaction_months()',
      member
    );
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER month_truncate AFTER TRUNCATE ON %s'
      ' FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.note_transaction_months()',
      member
    );
    -- ALWAYS: a session in replica mode would otherwise write unseen.
    EXECUTE format(
      'ALTER TABLE %s'
      ' ENABLE ALWAYS TRIGGER month_insert,'
      ' ENABLE ALWAYS TRIGGER month_update,'
      ' ENABLE ALWAYS TRIGGER month_delete,'
      ' ENABLE ALWAYS TRIGGER month_truncate',
      member
    );
  END LOOP;
END
$$;

CREATE FUNCTION equitie_private.watches_transaction_months(target oid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = ''
AS $$
  SELECT count(*) = 4
  FROM pg_catalog.pg_trigger AS t
  WHERE
    t.tgrelid = target
    AND t.tgname IN ('month_insert', 'month_update', 'month_delete', 'month_truncate')
    AND t.tgenabled = 'A'
$$;

CREATE FUNCTION equitie_private.refresh_transaction_months() RETURNS bigint
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  held record;
  due date;
  due_months date[];
  refreshed bigint := 0;
BEGIN
  -- One at a time, and whoever comes second has nothing left to do: the first is counting what it would count.
  IF NOT pg_try_advisory_xact_lock(hashtextextended('equitie_private.refresh_transaction_months', 0)) THEN
    RETURN 0;
  END IF;

  DELETE FROM equitie_private.transaction_months AS m
  WHERE NOT EXISTS (
    SELECT
    FROM pg_catalog.pg_inherits AS i
    INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid
    WHERE
      i.inhrelid = m.partition
      AND i.inhparent = 'public.transactions_clean'::regclass
      AND NOT i.inhdetachpending
      AND md5(c.relpartbound::text)::uuid = m.bounds
      -- What is written to a partition without the triggers goes unnoticed.
      AND equitie_private.watches_transaction_months(m.partition)
  );
  DELETE FROM equitie_private.transaction_month_totals AS s
  WHERE NOT EXISTS (SELECT FROM equitie_private.transaction_months AS m WHERE m.month = s.month);
  -- A month without kept totals is counted whenever it is asked for, so notes about it say nothing.
  DELETE FROM equitie_private.transaction_month_changes AS n
  WHERE NOT EXISTS (SELECT FROM equitie_private.transaction_months AS m WHERE m.month = n.month);

  FOR held IN
    SELECT
      b.partition,
      (b.from_key AT TIME ZONE 'UTC')::date AS from_day,
      (b.to_key AT TIME ZONE 'UTC')::date AS to_day
    FROM equitie_private.month_partition_bounds('public.transactions_clean') AS b
    WHERE
      NOT b.is_default
      AND equitie_private.watches_transaction_months(b.partition)
    ORDER BY b.from_key
  LOOP
    due_months := equitie_private.transaction_months_in(held.partition, held.from_day, held.to_day);
    FOREACH due IN ARRAY due_months LOOP
      CONTINUE WHEN
        EXISTS (SELECT FROM equitie_private.transaction_months AS m WHERE m.month = due)
        AND NOT EXISTS (SELECT FROM equitie_private.transaction_month_changes AS n WHERE n.month = due);

      -- One statement, so one snapshot: the notes it removes are exactly those of the writes it has counted. A write it
      -- cannot see yet brings a note that it cannot see either, and that note stays.
      EXECUTE $count$
        WITH noted AS (
          DELETE FROM equitie_private.transaction_month_changes AS n
          WHERE n.month = $1
        ),
        counted AS MATERIALIZED (
          SELECT
            t.transaction_type,
            t.status,
            t.currency,
            count(*) AS transactions,
            sum(t.amount) AS amount,
            sum(t.gross_capital) AS gross_capital,
            sum(t.net_capital) AS net_capital,
            sum(t.admin_fee) AS admin_fee
          FROM public.transactions_clean AS t
          WHERE t.transaction_date >= $1 AND t.transaction_date < $2
          GROUP BY t.transaction_type, t.status, t.currency
        ),
        emptied AS (
          DELETE FROM equitie_private.transaction_month_totals AS s
          WHERE
            s.month = $1
            AND NOT EXISTS (
              SELECT
              FROM counted AS c
              WHERE c.transaction_type = s.transaction_type AND c.status = s.status AND c.currency = s.currency
            )
        ),
        kept AS (
          INSERT INTO equitie_private.transaction_months (month, partition, bounds)
          SELECT $1, c.oid, md5(c.relpartbound::text)::uuid
          FROM pg_catalog.pg_class AS c
          WHERE c.oid = $3
          ON CONFLICT (month) DO UPDATE
          SET partition = excluded.partition, bounds = excluded.bounds, refreshed_at = excluded.refreshed_at
        )
        INSERT INTO equitie_private.transaction_month_totals AS s (
          month, transaction_type, status, currency, transactions, amount, gross_capital, net_capital, admin_fee
        )
        SELECT $1, c.*
        FROM counted AS c
        ON CONFLICT (month, transaction_type, status, currency) DO UPDATE
        SET
          transactions = excluded.transactions,
          amount = excluded.amount,
          gross_capital = excluded.gross_capital,
          net_capital = excluded.net_capital,
          admin_fee = excluded.admin_fee
      $count$
      USING due, (due + interval '1 month')::date, held.partition::oid;
      refreshed := refreshed + 1;
    END LOOP;
  END LOOP;
  RETURN refreshed;
END
$$;

CREATE FUNCTION equitie_private.transaction_months_in(partition regclass, from_day date, to_day date) RETURNS date[]
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
  months date[] := '{}';
  next_day date := from_day;
  month date;
BEGIN
  -- The usual case needs no look into the partition, and keeps the totals of a month without rows as well.
  IF from_day = date_trunc('month', from_day) AND to_day = from_day + interval '1 month' THEN
    RETURN ARRAY[from_day];
  END IF;

  -- A range made by hand, or by an online conversion: from row to row by the index on the date, a month at a time. A
  -- month that lies only in part within the range is another partition's as well, and is never kept.
  LOOP
    EXECUTE format('SELECT min(t.transaction_date) FROM ONLY %s AS t WHERE t.transaction_date >= $1 AND isfinite(t.transaction_date)', partition)
    INTO STRICT next_day
    USING next_day;
    EXIT WHEN next_day IS NULL OR next_day >= '200000-01-01';
    month := date_trunc('month', next_day::timestamp);
    next_day := month + interval '1 month';
    IF month >= from_day AND next_day <= to_day THEN
      months := months || month;
    END IF;
  END LOOP;
  RETURN months;
END
$$;

CREATE FUNCTION equitie_private.reads_every_transaction() RETURNS boolean
LANGUAGE sql STABLE
SET search_path = ''
AS $$
  SELECT
    NOT row_security_active('public.transactions_clean'::regclass)
    OR coalesce(
      bool_or(p.polpermissive AND pg_get_expr(p.polqual, p.polrelid) = 'true') AND bool_and(p.polpermissive),
      false
    )
  FROM pg_catalog.pg_policy AS p
  WHERE
    p.polrelid = 'public.transactions_clean'::regclass
    AND p.polcmd IN ('r', '*')
    AND EXISTS (
      SELECT
      FROM unnest(p.polroles) AS r (role)
      WHERE r.role = 0 OR pg_has_role(r.role, 'USAGE')
    )
$$;

CREATE FUNCTION public.month_report(first date, last date)
RETURNS TABLE (
  month date,
  transaction_type text,
  status text,
  currency char(3),
  transactions bigint,
  amount numeric,
  gross_capital numeric,
  net_capital numeric,
  admin_fee numeric
)
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
  first_month date := date_trunc('month', first::timestamp);
  past_last date := date_trunc('month', last::timestamp) + interval '1 month';
  kept date[] := '{}';
  uncounted date := first_month;
  known date;
  parts text[] := '{}';
BEGIN
  IF first IS NULL OR last IS NULL THEN
    RAISE EXCEPTION 'first and last must be dates'
      USING ERRCODE = 'null_value_not_allowed';
  END IF;

  -- Whoever sees some rows only is shown the totals of those: nothing kept is of use to them.
  IF equitie_private.reads_every_transaction() THEN
    kept := ARRAY(
      SELECT m.month
      FROM equitie_private.transaction_months AS m
      INNER JOIN pg_catalog.pg_inherits AS i ON i.inhrelid = m.partition
      INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid
      WHERE
        m.month >= first_month
        AND m.month < past_last
        AND i.inhparent = 'public.transactions_clean'::regclass
        AND NOT i.inhdetachpending
        AND md5(c.relpartbound::text)::uuid = m.bounds
        AND NOT EXISTS (SELECT FROM equitie_private.transaction_month_changes AS n WHERE n.month = m.month)
      ORDER BY m.month
    );
    parts := ARRAY['
      SELECT s.month, s.transaction_type, s.status, s.currency, s.transactions, s.amount, s.gross_capital, s.net_capital,
        s.admin_fee
      FROM equitie_private.transaction_month_totals AS s
      WHERE s.month = ANY ($1)'];
  END IF;

  -- What lies between kept months is counted, each gap from the partitions of its own months.
  FOREACH known IN ARRAY kept || past_last LOOP
    IF uncounted < known THEN
      parts := parts || format('
        SELECT date_trunc(''month'', t.transaction_date::timestamp)::date, t.transaction_type, t.status, t.currency,
          count(*), sum(t.amount), sum(t.gross_capital), sum(t.net_capital), sum(t.admin_fee)
        FROM public.transactions_clean AS t
        WHERE t.transaction_date >= %L AND t.transaction_date %s %L
        GROUP BY 1, 2, 3, 4',
        uncounted, CASE WHEN isfinite(known) THEN '<' ELSE '<=' END, known);
    END IF;
    uncounted := known + interval '1 month';
  END LOOP;

  IF parts <> '{}' THEN
    RETURN QUERY EXECUTE array_to_string(parts, ' UNION ALL ') || ' ORDER BY 1, 2, 3, 4' USING kept;
  END IF;
END
$$;

COMMENT ON FUNCTION equitie_private.note_transaction_months() IS 'Statement trigger of transactions_clean and its partitions: notes the months a write touched.';
COMMENT ON FUNCTION equitie_private.watch_transaction_months(regclass) IS 'Has writes to a table and all its partitions noted by month.';
COMMENT ON FUNCTION equitie_private.watches_transaction_months(oid) IS 'Whether writes to this very table are noted by month.';
COMMENT ON FUNCTION equitie_private.transaction_months_in(regclass, date, date) IS 'The whole months that a partition with these bounds holds: its month, or of a larger range those with rows.';
COMMENT ON FUNCTION equitie_private.refresh_transaction_months() IS 'Counts the months that were written to since they were last counted, and says how many those were. Nobody waits for it but a change of the partitions.';
COMMENT ON FUNCTION equitie_private.reads_every_transaction() IS 'Whether the policies of transactions_clean show its every row to the current role.';
COMMENT ON FUNCTION public.month_report(date, date) IS 'Transactions from the month of first to the month of last by month, type, status and currency: exactly what an aggregate over the rows the caller may read would say in the same snapshot.';

REVOKE ALL ON
  equitie_private.transaction_months,
  equitie_private.transaction_month_totals,
  equitie_private.transaction_month_changes
FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.note_transaction_months() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.watch_transaction_months(regclass) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.watches_transaction_months(oid) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.transaction_months_in(regclass, date, date) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.refresh_transaction_months() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.reads_every_transaction() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION public.month_report(date, date) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;

-- Staff and the service see every transaction, so they may see the totals of all; nobody else reads these tables.
GRANT SELECT ON
  equitie_private.transaction_months,
  equitie_private.transaction_month_totals,
  equitie_private.transaction_month_changes
TO equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.refresh_transaction_months() TO service_role;
GRANT EXECUTE ON FUNCTION equitie_private.reads_every_transaction() TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION public.month_report(date, date) TO authenticated, equitie_staff, service_role;

ALTER TABLE equitie_private.transaction_months ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.transaction_month_totals ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.transaction_month_changes ENABLE ROW LEVEL SECURITY;

CREATE POLICY transaction_months_select_staff ON equitie_private.transaction_months
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY transaction_months_select_service ON equitie_private.transaction_months
FOR SELECT TO service_role
USING (true);

CREATE POLICY transaction_month_totals_select_staff ON equitie_private.transaction_month_totals
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY transaction_month_totals_select_service ON equitie_private.transaction_month_totals
FOR SELECT TO service_role
USING (true);

CREATE POLICY transaction_month_changes_select_staff ON equitie_private.transaction_month_changes
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY transaction_month_changes_select_service ON equitie_private.transaction_month_changes
FOR SELECT TO service_role
USING (true);

SELECT equitie_private.watch_transaction_months('public.transactions_clean');

INSERT INTO equitie_private.maintenance_tasks (name, function, every)
VALUES ('refresh transaction months', 'equitie_private.refresh_transaction_months()', '5 minutes');
