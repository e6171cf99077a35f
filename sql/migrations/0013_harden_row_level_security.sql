-- Who appoints whom, which columns staff may write, and the deals of an investor with a million transactions.
--
-- Nobody changes their own profile: neither role nor links nor whether it is active. Admins manage the profiles of
-- everybody who is no admin; superadmins those of admins and superadmins too. That is the whole difference between them.

-- squawk-ignore-file require-concurrent-index-creation, ban-drop-function, ban-drop-view
-- The index holds cancelled and failed rows only, which are few. What is dropped is made again under the same name.

-- Helpers ------------------------------------------------------------------------------------------------------------
-- In PL/pgSQL, which keeps its plan for the session: before PostgreSQL 18 a function in SQL is planned anew in every
-- statement that asks a policy, for 70 us instead of 13. None of them writes, and all are safe in parallel workers, which
-- get the transaction's settings.

CREATE OR REPLACE FUNCTION equitie_private.current_user_id() RETURNS uuid
LANGUAGE plpgsql STABLE PARALLEL SAFE
SET search_path = ''
AS $$
BEGIN
  RETURN (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid;
END
$$;

CREATE OR REPLACE FUNCTION equitie_private.app_role() RETURNS text
LANGUAGE plpgsql STABLE PARALLEL SAFE
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  RETURN (
    SELECT p.role
    FROM public.user_profiles AS p
    WHERE p.user_id = equitie_private.current_user_id() AND p.is_active
  );
END
$$;

CREATE OR REPLACE FUNCTION equitie_private.is_admin() RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL SAFE
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  RETURN coalesce(equitie_private.app_role() IN ('admin', 'superadmin'), false);
END
$$;

CREATE FUNCTION equitie_private.is_superadmin() RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL SAFE
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  RETURN coalesce(equitie_private.app_role() = 'superadmin', false);
END
$$;

CREATE OR REPLACE FUNCTION equitie_private.can_audit() RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL SAFE
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  RETURN coalesce(equitie_private.app_role() IN ('auditor', 'admin', 'superadmin'), false);
END
$$;

CREATE OR REPLACE FUNCTION equitie_private.current_investor_id() RETURNS integer
LANGUAGE plpgsql STABLE PARALLEL SAFE
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  RETURN (
    SELECT p.investor_id
    FROM public.user_profiles AS p
    WHERE
      p.user_id = (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
      AND p.is_active
  );
END
$$;

CREATE FUNCTION equitie_private.current_investor_id_for_update() RETURNS integer
LANGUAGE plpgsql STABLE PARALLEL SAFE
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  RETURN (
    SELECT p.investor_id
    FROM public.user_profiles AS p
    WHERE
      p.user_id = equitie_private.current_user_id()
      AND p.is_active
      AND p.role = 'investor'
  );
END
$$;

COMMENT ON FUNCTION equitie_private.is_superadmin() IS 'Whether the current user is an active superadmin.';
COMMENT ON FUNCTION equitie_private.current_investor_id_for_update() IS 'Investor whose row the current user may edit: the linked one, if the user''s role is investor. A viewer with a link reads only.';

REVOKE ALL ON FUNCTION equitie_private.is_superadmin() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.current_investor_id_for_update() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.is_superadmin() TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.current_investor_id_for_update() TO authenticated, equitie_staff, service_role;

-- Profiles -----------------------------------------------------------------------------------------------------------

CREATE FUNCTION equitie_private.refuse_own_profile_change() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  acting uuid := (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid;
BEGIN
  IF acting IN (OLD.user_id, NEW.user_id) THEN
    RAISE EXCEPTION 'nobody changes the role, links or activity of their own profile'
      USING
        ERRCODE = 'insufficient_privilege',
        HINT = 'Have another admin do it, or the application as the service.';
  END IF;
  IF TG_OP = 'DELETE' THEN
    RETURN OLD;
  END IF;
  RETURN NEW;
END
$$;

COMMENT ON FUNCTION equitie_private.refuse_own_profile_change() IS 'Row trigger: refuses a write of the acting user''s own profile, under whatever database role, function or policy it comes.';

REVOKE ALL ON FUNCTION equitie_private.refuse_own_profile_change() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;

-- Policies keep people away from their own row already. This stands behind them: a function that runs as the owner, or a
-- policy somebody adds, does not get around it. Whoever has no claims (the service, the owner) is not meant.
-- A first profile that gives nothing may be one's own: an application's sign-up makes it.
CREATE TRIGGER refuse_own_profile_insert
BEFORE INSERT ON public.user_profiles
FOR EACH ROW
WHEN (NEW.role <> 'viewer' OR NEW.investor_id IS NOT NULL OR NEW.company_id IS NOT NULL)
EXECUTE FUNCTION equitie_private.refuse_own_profile_change();

CREATE TRIGGER refuse_own_profile_delete
BEFORE DELETE ON public.user_profiles
FOR EACH ROW
EXECUTE FUNCTION equitie_private.refuse_own_profile_change();

CREATE TRIGGER refuse_own_profile_update
BEFORE UPDATE ON public.user_profiles
FOR EACH ROW
WHEN (
  OLD.user_id IS DISTINCT FROM NEW.user_id
  OR OLD.role IS DISTINCT FROM NEW.role
  OR OLD.investor_id IS DISTINCT FROM NEW.investor_id
  OR OLD.company_id IS DISTINCT FROM NEW.company_id
  OR OLD.is_active IS DISTINCT FROM NEW.is_active
)
EXECUTE FUNCTION equitie_private.refuse_own_profile_change();

-- ALWAYS: a session in replica mode would otherwise write unseen.
ALTER TABLE public.user_profiles
ENABLE ALWAYS TRIGGER refuse_own_profile_insert,
ENABLE ALWAYS TRIGGER refuse_own_profile_update,
ENABLE ALWAYS TRIGGER refuse_own_profile_delete;

GRANT INSERT (user_id, email, role, investor_id, company_id, is_active)
ON public.user_profiles
TO equitie_staff;

GRANT UPDATE (email, role, investor_id, company_id, is_active)
ON public.user_profiles
TO equitie_staff;

CREATE POLICY user_profiles_insert_staff ON public.user_profiles
FOR INSERT TO equitie_staff
WITH CHECK (
  (SELECT equitie_private.is_admin())
  AND user_id <> (SELECT equitie_private.current_user_id())
  AND (role NOT IN ('admin', 'superadmin') OR (SELECT equitie_private.is_superadmin()))
);

CREATE POLICY user_profiles_update_staff ON public.user_profiles
FOR UPDATE TO equitie_staff
USING (
  (SELECT equitie_private.is_admin())
  AND user_id <> (SELECT equitie_private.current_user_id())
  AND (role NOT IN ('admin', 'superadmin') OR (SELECT equitie_private.is_superadmin()))
)
WITH CHECK (
  (SELECT equitie_private.is_admin())
  AND user_id <> (SELECT equitie_private.current_user_id())
  AND (role NOT IN ('admin', 'superadmin') OR (SELECT equitie_private.is_superadmin()))
);

-- Columns ------------------------------------------------------------------------------------------------------------
-- Admins write what is said about a row. Its key and when it was made or changed are not theirs to say: a key of one's
-- own choice collides with those the sequence gives out later, and a changed one carries its children along.

REVOKE INSERT, UPDATE ON
  public.companies_clean,
  public.deals_clean,
  public.investors_clean,
  public.transactions_clean
FROM equitie_staff;

DO $$
DECLARE
  target record;
BEGIN
  FOR target IN
    SELECT
      t.name,
      (
        SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
        FROM pg_catalog.pg_attribute AS a
        WHERE
          a.attrelid = t.name::regclass
          AND a.attnum > 0
          AND NOT a.attisdropped
          AND a.attname NOT IN (t.key, 'created_at', 'updated_at')
      ) AS columns
    FROM (
      VALUES
        ('public.companies_clean', 'company_id'),
        ('public.deals_clean', 'deal_id'),
        ('public.investors_clean', 'investor_id'),
        ('public.transactions_clean', 'transaction_id')
    ) AS t (name, key)
  LOOP
    EXECUTE format('GRANT INSERT (%s), UPDATE (%s) ON %s TO equitie_staff', target.columns, target.columns, target.name);
  END LOOP;
END
$$;

ALTER POLICY investors_update_authenticated ON public.investors_clean
USING (investor_id = (SELECT equitie_private.current_investor_id_for_update()))
WITH CHECK (investor_id = (SELECT equitie_private.current_investor_id_for_update()));

-- Deals --------------------------------------------------------------------------------------------------------------

CREATE INDEX idx_transactions_inactive
ON public.transactions_clean (deal_id, investor_id)
WHERE status IN ('cancelled', 'failed');

COMMENT ON INDEX public.idx_transactions_inactive IS 'Who was in a deal: the rows that idx_transactions_active leaves out.';

CREATE OR REPLACE FUNCTION equitie_private.current_deal_ids() RETURNS SETOF integer
LANGUAGE plpgsql STABLE
SECURITY DEFINER
ROWS 100
SET search_path = ''
-- Planning for a hundred partitions takes longer than running; one plan is right for every investor.
SET plan_cache_mode = 'force_generic_plan'
AS $$
DECLARE
  investor integer := equitie_private.current_investor_id();
  budget bigint := 2000;
  found_deals integer[];
  transactions_read bigint;
  deals_left bigint;
BEGIN
  IF investor IS NULL THEN
    RETURN;
  END IF;

  -- Most investors have a few hundred transactions: read them. Whoever has a million has most of their deals among the
  -- first thousands; the other deals are then asked for one by one, unless reading on is cheaper. To learn that an
  -- investor is not in a deal takes a look into two indexes of every month, which costs as much as reading 500 rows. So
  -- the work is about twice that of the better way at most, without knowing beforehand which one it is.
  LOOP
    SELECT coalesce(array_agg(DISTINCT t.deal_id), '{}'), count(*)
    INTO STRICT found_deals, transactions_read
    FROM (
      SELECT s.deal_id
      FROM public.transactions_clean AS s
      WHERE s.investor_id = investor
      LIMIT budget
    ) AS t;
    EXIT WHEN transactions_read < budget;

    SELECT count(*)
    INTO STRICT deals_left
    FROM public.deals_clean AS d
    WHERE d.deal_id <> ALL (found_deals);
    EXIT WHEN deals_left <= 20 OR deals_left * 500 <= budget;
    budget := deals_left * 500;
  END LOOP;

  RETURN QUERY SELECT unnest(found_deals);
  IF transactions_read = budget THEN
    RETURN QUERY
    SELECT d.deal_id
    FROM public.deals_clean AS d
    WHERE
      d.deal_id <> ALL (found_deals)
      AND (
        -- OFFSET 0: one look into the index per deal. Planned as a join, it would read everything once more.
        EXISTS (
          SELECT FROM public.transactions_clean AS a
          WHERE a.deal_id = d.deal_id AND a.investor_id = investor AND a.status NOT IN ('cancelled', 'failed')
          OFFSET 0
        )
        OR EXISTS (
          SELECT FROM public.transactions_clean AS a
          WHERE a.deal_id = d.deal_id AND a.investor_id = investor AND a.status IN ('cancelled', 'failed')
          OFFSET 0
        )
      );
  END IF;
END
$$;

-- A hashed set instead of an array, which would be searched from its beginning for every deal.
ALTER POLICY deals_select_authenticated ON public.deals_clean
USING (deal_id IN (SELECT equitie_private.current_deal_ids()));

-- Books of imports ---------------------------------------------------------------------------------------------------
-- The service alone has privileges on them. With row-level security on, a privilege somebody adds opens no row.

ALTER TABLE equitie_private.import_runs ENABLE ROW LEVEL SECURITY;
ALTER TABLE equitie_private.imported_rows ENABLE ROW LEVEL SECURITY;

CREATE POLICY import_runs_all_service ON equitie_private.import_runs
FOR ALL TO service_role
USING (true)
WITH CHECK (true);

CREATE POLICY imported_rows_all_service ON equitie_private.imported_rows
FOR ALL TO service_role
USING (true)
WITH CHECK (true);

-- Platforms ----------------------------------------------------------------------------------------------------------
-- equitie_staff is our own: a platform that made auth.uid() has not let it in. Where that is not ours to give, staff's
-- policies of others take equitie_private.current_user_id(), which says the same.
DO $$
BEGIN
  IF to_regnamespace('auth') IS NULL THEN
    RETURN;
  ELSIF has_schema_privilege('equitie_staff', 'auth', 'USAGE') THEN
    RETURN;
  ELSIF has_schema_privilege('auth', 'USAGE WITH GRANT OPTION') THEN
    GRANT USAGE ON SCHEMA auth TO equitie_staff;
  ELSE
    RAISE NOTICE 'equitie_staff may not use the schema auth: policies for staff call equitie_private.current_user_id() instead of auth.uid()';
  END IF;
END
$$;

-- Sketches -----------------------------------------------------------------------------------------------------------
-- An aggregate cannot pin its search_path, which Supabase's linter asks of everything that runs. As a function of an
-- array the same sum is linear, too, where the aggregate wrote a new object for every row. The view holds nothing but
-- sums of query_stats, and is made again.

DROP FUNCTION equitie_private.query_stats_by_hour(timestamptz);
DROP MATERIALIZED VIEW equitie_private.query_stats_hourly;
DROP AGGREGATE equitie_private.sum_buckets(jsonb);

CREATE FUNCTION equitie_private.sum_buckets(sketches jsonb[]) RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = ''
AS $$
  SELECT coalesce(jsonb_object_agg(s.bucket, s.runs), '{}')
  FROM (
    SELECT e.key AS bucket, sum(e.value::bigint) AS runs
    FROM unnest(sketches) AS u (sketch)
    CROSS JOIN LATERAL jsonb_each_text(coalesce(u.sketch, '{}')) AS e
    GROUP BY e.key
  ) AS s
$$;

CREATE OR REPLACE FUNCTION equitie_private.record_query_stats(events jsonb) RETURNS integer
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  recorded integer;
BEGIN
  -- In key order, so that two workers that report the same statement cannot deadlock; summed first, because one
  -- statement must not touch a row twice.
  INSERT INTO public.query_stats AS q (
    minute, worker, fingerprint, query_text, operation, calls, errors, rows, total_ms, max_ms, over_1s, over_3s, over_5s,
    buckets
  )
  SELECT
    date_trunc('minute', e.minute, 'UTC'),
    e.worker,
    e.fingerprint,
    min(e.query_text),
    e.operation,
    coalesce(sum(e.calls), 0),
    coalesce(sum(e.errors), 0),
    coalesce(sum(e.rows), 0),
    coalesce(sum(e.total_ms), 0),
    coalesce(max(e.max_ms), 0),
    coalesce(sum(e.over_1s), 0),
    coalesce(sum(e.over_3s), 0),
    coalesce(sum(e.over_5s), 0),
    equitie_private.sum_buckets(array_agg(e.buckets))
  FROM jsonb_to_recordset(events) AS e (
    minute timestamptz, worker text, fingerprint text, query_text text, operation text, calls bigint, errors bigint,
    rows bigint, total_ms double precision, max_ms double precision, over_1s bigint, over_3s bigint, over_5s bigint,
    buckets jsonb
  )
  GROUP BY date_trunc('minute', e.minute, 'UTC'), e.worker, e.fingerprint, e.operation
  ORDER BY date_trunc('minute', e.minute, 'UTC'), e.worker, e.fingerprint, e.operation
  ON CONFLICT ON CONSTRAINT query_stats_pkey DO UPDATE
  SET
    calls = q.calls + excluded.calls,
    errors = q.errors + excluded.errors,
    rows = q.rows + excluded.rows,
    total_ms = q.total_ms + excluded.total_ms,
    max_ms = greatest(q.max_ms, excluded.max_ms),
    over_1s = q.over_1s + excluded.over_1s,
    over_3s = q.over_3s + excluded.over_3s,
    over_5s = q.over_5s + excluded.over_5s,
    buckets = equitie_private.add_buckets(q.buckets, excluded.buckets);
  GET DIAGNOSTICS recorded = ROW_COUNT;
  RETURN recorded;
END
$$;

-- In equitie_private and granted to nobody: row-level security does not exist for materialized views.
CREATE MATERIALIZED VIEW equitie_private.query_stats_hourly AS
SELECT
  date_trunc('hour', q.minute, 'UTC') AS hour,
  q.fingerprint,
  q.operation,
  min(q.query_text) AS query_text,
  sum(q.calls)::bigint AS calls,
  sum(q.errors)::bigint AS errors,
  sum(q.rows)::bigint AS rows,
  sum(q.total_ms) AS total_ms,
  max(q.max_ms) AS max_ms,
  sum(q.over_1s)::bigint AS over_1s,
  sum(q.over_3s)::bigint AS over_3s,
  sum(q.over_5s)::bigint AS over_5s,
  equitie_private.sum_buckets(array_agg(q.buckets)) AS buckets
FROM public.query_stats AS q
GROUP BY date_trunc('hour', q.minute, 'UTC'), q.fingerprint, q.operation;

CREATE UNIQUE INDEX idx_query_stats_hourly
ON equitie_private.query_stats_hourly (hour, fingerprint, operation);

COMMENT ON MATERIALIZED VIEW equitie_private.query_stats_hourly IS 'query_stats by hour, over all workers, as of the last refresh. Read it through equitie_private.query_stats_by_hour().';
COMMENT ON COLUMN equitie_private.query_stats_hourly.hour IS 'Start of the hour.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.fingerprint IS 'Hash of the normalised statement.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.operation IS 'read or write.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.query_text IS 'The statement, normalised: no values.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.calls IS 'How often it ran, errors included.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.errors IS 'How often it failed.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.rows IS 'Rows returned or changed.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.total_ms IS 'Time spent, milliseconds.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.max_ms IS 'Longest run, milliseconds.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.over_1s IS 'Runs longer than 1 second.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.over_3s IS 'Runs longer than 3 seconds.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.over_5s IS 'Runs longer than 5 seconds.';
COMMENT ON COLUMN equitie_private.query_stats_hourly.buckets IS 'Latency sketch of the hour.';

CREATE FUNCTION equitie_private.query_stats_by_hour(since timestamptz)
RETURNS SETOF equitie_private.query_stats_hourly
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
BEGIN
  IF current_setting('role') <> 'service_role' AND NOT equitie_private.can_audit() THEN
    RETURN;
  END IF;
  RETURN QUERY
  SELECT h.*
  FROM equitie_private.query_stats_hourly AS h
  WHERE h.hour >= since;
END
$$;

COMMENT ON FUNCTION equitie_private.sum_buckets(jsonb[]) IS 'Sum of latency sketches, bucket by bucket.';
COMMENT ON FUNCTION equitie_private.query_stats_by_hour(timestamptz) IS 'query_stats_hourly from a time on, for the service and for users who may audit; nothing for others.';

REVOKE ALL ON equitie_private.query_stats_hourly FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.sum_buckets(jsonb[]) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.query_stats_by_hour(timestamptz) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.sum_buckets(jsonb[]) TO equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.query_stats_by_hour(timestamptz) TO equitie_staff, service_role;
