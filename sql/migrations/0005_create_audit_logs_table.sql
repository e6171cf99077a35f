-- The audit log, and the triggers that fill it: a change is in it if and only if it committed, whoever made it.

CREATE TABLE public.audit_logs (
  audit_id bigint GENERATED ALWAYS AS IDENTITY,
  "timestamp" timestamptz NOT NULL DEFAULT clock_timestamp(),
  source text NOT NULL,
  actor_type text NOT NULL,
  user_id uuid,
  tenant_id text,
  action text NOT NULL,
  entity_type text NOT NULL,
  entity_id text,
  changes jsonb,
  metadata jsonb,
  ip_address inet,
  user_agent text,
  session_id text,
  request_id text,
  reason text,
  session_role text NOT NULL DEFAULT session_user,
  transaction_xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
  CONSTRAINT audit_logs_pkey PRIMARY KEY (audit_id, "timestamp"),
  CONSTRAINT chk_audit_logs_source
    CHECK (source IN ('trigger', 'sdk')),
  CONSTRAINT chk_audit_logs_actor_type
    CHECK (actor_type IN ('user', 'service', 'database')),
  -- Longer keys would not fit into the index, and would be refused with a message nobody understands.
  CONSTRAINT chk_audit_logs_entity_length
    CHECK (length(entity_type) <= 128 AND length(entity_id) <= 512)
)
PARTITION BY RANGE ("timestamp");

CREATE TABLE equitie_part.audit_logs_default
PARTITION OF public.audit_logs
DEFAULT;

COMMENT ON TABLE public.audit_logs IS 'What was changed, exported, approved, ..., when, by whom. Append-only; partitioned by month; deliberately without foreign keys, so that no delete elsewhere takes the trail along.';
COMMENT ON TABLE equitie_part.audit_logs_default IS 'Rows of public.audit_logs whose month has no partition yet; ensure_month_partitions moves them.';
COMMENT ON COLUMN public.audit_logs.audit_id IS 'Key. For one entity, its order is the order of the commits; over entities it is not.';
COMMENT ON COLUMN public.audit_logs."timestamp" IS 'When it happened, by the server''s clock.';
COMMENT ON COLUMN public.audit_logs.source IS 'trigger: the database saw the change itself. sdk: the application reported it.';
COMMENT ON COLUMN public.audit_logs.actor_type IS 'user; service: the application itself; database: somebody connected without the library.';
COMMENT ON COLUMN public.audit_logs.user_id IS 'The user who acted, as claimed by the application.';
COMMENT ON COLUMN public.audit_logs.tenant_id IS 'Tenant, as claimed by the application.';
COMMENT ON COLUMN public.audit_logs.action IS 'CREATE, UPDATE or DELETE by triggers; the application adds READ, LOGIN, EXPORT, APPROVE, ...';
COMMENT ON COLUMN public.audit_logs.entity_type IS 'Table the entity is a row of, or a name the application chose.';
COMMENT ON COLUMN public.audit_logs.entity_id IS 'Key of the entity; of a row whose key was changed, the one it had before.';
COMMENT ON COLUMN public.audit_logs.changes IS 'CREATE: {"after": row}. UPDATE: {"before": .., "after": ..} of the columns that changed. DELETE: {"before": row}. Times in UTC.';
COMMENT ON COLUMN public.audit_logs.metadata IS 'Anything else. From triggers: {"operation": "TRUNCATE"}, {"malformed": [settings that could not be read]}.';
COMMENT ON COLUMN public.audit_logs.ip_address IS 'Client''s address, as claimed by the application.';
COMMENT ON COLUMN public.audit_logs.user_agent IS 'Client''s software, as claimed by the application.';
COMMENT ON COLUMN public.audit_logs.session_id IS 'The application''s session.';
COMMENT ON COLUMN public.audit_logs.request_id IS 'The application''s request; ties what one request caused together.';
COMMENT ON COLUMN public.audit_logs.reason IS 'Why the service acted.';
COMMENT ON COLUMN public.audit_logs.session_role IS 'Database role that logged in; no claim, a fact.';
COMMENT ON COLUMN public.audit_logs.transaction_xid IS 'Database transaction; ties what committed together.';

CREATE INDEX idx_audit_logs_entity
ON public.audit_logs (entity_type, entity_id, audit_id);

-- Partial, since most rows of a bulk load have no user: 1 us a row saved.
CREATE INDEX idx_audit_logs_user
ON public.audit_logs (user_id, audit_id)
WHERE user_id IS NOT NULL;

CREATE INDEX idx_audit_logs_request
ON public.audit_logs (request_id)
WHERE request_id IS NOT NULL;

CREATE INDEX idx_audit_logs_timestamp_brin
ON public.audit_logs USING brin ("timestamp");

COMMENT ON INDEX public.idx_audit_logs_entity IS 'One entity''s history, in order.';
COMMENT ON INDEX public.idx_audit_logs_user IS 'What one user did, in order.';
COMMENT ON INDEX public.idx_audit_logs_request IS 'What one request caused.';
COMMENT ON INDEX public.idx_audit_logs_timestamp_brin IS 'Time ranges, for almost no space. The newest events come by audit_id.';

CREATE FUNCTION equitie_private.refuse_change() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  RAISE EXCEPTION '%.% is append-only: % refused', TG_TABLE_SCHEMA, TG_TABLE_NAME, TG_OP
    USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE FUNCTION equitie_private.make_append_only(target regclass) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $$
DECLARE
  member regclass;
BEGIN
  -- The row trigger reaches every partition by itself, later ones too; the one for TRUNCATE reaches none.
  IF NOT (SELECT c.relispartition FROM pg_catalog.pg_class AS c WHERE c.oid = target) THEN
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER refuse_change BEFORE UPDATE OR DELETE ON %s'
      ' FOR EACH ROW EXECUTE FUNCTION equitie_private.refuse_change()',
      target
    );
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER refuse_change', target);
  END IF;

  FOR member IN
    SELECT target
    UNION
    SELECT t.relid FROM pg_partition_tree(target) AS t
  LOOP
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER refuse_truncate BEFORE TRUNCATE ON %s'
      ' FOR EACH STATEMENT EXECUTE FUNCTION equitie_private.refuse_change()',
      member
    );
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER refuse_truncate', member);
  END LOOP;
END
$$;

COMMENT ON FUNCTION equitie_private.refuse_change() IS 'Trigger of append-only tables.';
COMMENT ON FUNCTION equitie_private.make_append_only(regclass) IS 'Has UPDATE, DELETE and TRUNCATE refused on a table and all its partitions.';

CREATE FUNCTION equitie_private.audit_context(
  OUT actor_type text,
  OUT user_id uuid,
  OUT tenant_id text,
  OUT ip_address inet,
  OUT user_agent text,
  OUT session_id text,
  OUT request_id text,
  OUT reason text,
  OUT metadata jsonb
)
LANGUAGE plpgsql STABLE
SET search_path = ''
AS $$
DECLARE
  -- A setting that was used once in a session reads '' afterwards, not NULL.
  claims_text text := nullif(current_setting('request.jwt.claims', true), '');
  context_text text := nullif(current_setting('equitie.context', true), '');
  claims jsonb;
  context jsonb;
  malformed text[] := '{}';
BEGIN
  IF claims_text IS NULL AND context_text IS NULL THEN
    actor_type := CASE current_setting('role') WHEN 'service_role' THEN 'service' ELSE 'database' END;
    RETURN;
  END IF;

  BEGIN
    claims := claims_text::jsonb;
    context := context_text::jsonb;
    user_id := CASE WHEN claims_text IS NULL THEN context ->> 'user_id' ELSE claims ->> 'sub' END::uuid;
    ip_address := (context ->> 'ip_address')::inet;
  EXCEPTION
    -- Who acted is worth knowing, but not worth losing the write or its event: keep every field that can be read.
    WHEN OTHERS THEN
      BEGIN
        claims := claims_text::jsonb;
      EXCEPTION WHEN OTHERS THEN
        malformed := malformed || 'request.jwt.claims'::text;
      END;
      BEGIN
        context := context_text::jsonb;
      EXCEPTION WHEN OTHERS THEN
        malformed := malformed || 'equitie.context'::text;
      END;
      BEGIN
        user_id := CASE WHEN claims_text IS NULL THEN context ->> 'user_id' ELSE claims ->> 'sub' END::uuid;
      EXCEPTION WHEN OTHERS THEN
        malformed := malformed || 'user_id'::text;
      END;
      BEGIN
        ip_address := (context ->> 'ip_address')::inet;
      EXCEPTION WHEN OTHERS THEN
        malformed := malformed || 'ip_address'::text;
      END;
      metadata := jsonb_build_object('malformed', malformed);
  END;

  -- The role decides before the claim: nobody becomes the service by saying so.
  actor_type := CASE
    WHEN current_setting('role') = 'service_role' THEN 'service'
    WHEN claims_text IS NOT NULL OR current_setting('role') IN ('anon', 'authenticated', 'equitie_staff') THEN 'user'
    ELSE 'database'
  END;
  -- Outside the service and the owner's own sessions, the claims alone say who the user is.
  IF claims_text IS NULL AND actor_type = 'user' THEN
    user_id := NULL;
  END IF;
  -- Bounded: an index entry of unbounded length would make the write fail.
  tenant_id := left(context ->> 'tenant_id', 256);
  user_agent := left(context ->> 'user_agent', 1024);
  session_id := left(context ->> 'session_id', 256);
  request_id := left(context ->> 'request_id', 256);
  reason := left(context ->> 'reason', 1024);
END
$$;

COMMENT ON FUNCTION equitie_private.audit_context() IS 'Who acts, from the transaction''s settings request.jwt.claims and equitie.context. Never fails: what cannot be read is NULL and named in metadata.';

CREATE FUNCTION equitie_private.track(target regclass) RETURNS void
LANGUAGE plpgsql
SET search_path = ''
AS $track$
DECLARE
  root regclass := coalesce(pg_partition_root(target), target);
  root_name name;
  function_name text;
  id_before text;
  id_after text;
  unchanged_keys text;
  settings text;
  member regclass;
BEGIN
  SELECT
    c.relname,
    format('equitie_private.%I', 'audit_' || CASE n.nspname WHEN 'public' THEN '' ELSE n.nspname || '_' END || c.relname)
  INTO STRICT root_name, function_name
  FROM pg_catalog.pg_class AS c
  INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE c.oid = root;

  IF length(function_name) > length('equitie_private.') + 63 THEN
    RAISE EXCEPTION 'the name of % is too long to name its audit function after it', root
      USING ERRCODE = 'name_too_long';
  END IF;

  IF target = root THEN
    -- The entity's id is the primary key without the partition key, which is there only because it must be.
    SELECT
      string_agg(format('o.%I::text', a.attname), ' || '':'' || ' ORDER BY array_position(x.indkey::smallint[], a.attnum)),
      string_agg(format('n.%I::text', a.attname), ' || '':'' || ' ORDER BY array_position(x.indkey::smallint[], a.attnum))
    INTO id_before, id_after
    FROM pg_catalog.pg_index AS x
    INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = x.indrelid AND a.attnum = ANY (x.indkey)
    LEFT JOIN pg_catalog.pg_partitioned_table AS p ON p.partrelid = x.indrelid
    WHERE
      x.indrelid = root
      AND x.indisprimary
      AND (p.partattrs IS NULL OR x.indnkeyatts = p.partnatts OR NOT a.attnum = ANY (p.partattrs));
    IF id_before IS NULL THEN
      RAISE EXCEPTION '% has no primary key: its rows could not be told apart in the audit log', root
        USING ERRCODE = 'invalid_table_definition';
    END IF;

    -- The comparison is written out for the table's columns: a generic one by jsonb_each costs 42 to 185 us a row.
    -- A type without equality of its own is compared as JSON. A column added later is not in the list, so it shows up
    -- in every UPDATE until the table is tracked again: too much rather than too little.
    SELECT
      string_agg(
        format(
          CASE
            WHEN EXISTS (
              SELECT FROM pg_catalog.pg_operator AS op
              WHERE op.oprname = '=' AND op.oprleft = a.atttypid AND op.oprright = a.atttypid
            )
            THEN 'CASE WHEN o.%1$I IS NOT DISTINCT FROM n.%1$I THEN %2$L END'
            ELSE 'CASE WHEN to_jsonb(o.%1$I) IS NOT DISTINCT FROM to_jsonb(n.%1$I) THEN %2$L END'
          END,
          a.attname, a.attname
        ),
        E',\n            ' ORDER BY a.attnum
      ),
      -- to_jsonb prints these types in the style of the session; each setting pinned costs every statement a little,
      -- so only where it matters.
      concat_ws(
        ' ',
        CASE WHEN bool_or(a.atttypid NOT IN (
          'smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'numeric'::regtype, 'boolean'::regtype,
          'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'uuid'::regtype, 'date'::regtype, 'jsonb'::regtype,
          'inet'::regtype
        )) THEN 'SET "TimeZone" = ''UTC''' END,
        CASE WHEN bool_or(a.atttypid NOT IN (
          'smallint'::regtype, 'integer'::regtype, 'bigint'::regtype, 'numeric'::regtype, 'boolean'::regtype,
          'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'uuid'::regtype, 'date'::regtype, 'jsonb'::regtype,
          'inet'::regtype, 'timestamptz'::regtype, 'timestamp'::regtype
        )) THEN 'SET "DateStyle" = ''ISO, YMD'' SET "IntervalStyle" = ''iso_8601'' SET bytea_output = ''hex'' SET extra_float_digits = 1' END
      )
    INTO STRICT unchanged_keys, settings
    FROM pg_catalog.pg_attribute AS a
    WHERE
      a.attrelid = root
      AND a.attnum > 0
      AND NOT a.attisdropped;

    EXECUTE format(
      $generator$
CREATE OR REPLACE FUNCTION %1$s() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
%2$s
AS $body$
DECLARE
  acting record;
  happened_at timestamptz := clock_timestamp();
  leaf regclass;
BEGIN
  SELECT * INTO STRICT acting FROM equitie_private.audit_context();

  IF TG_OP = 'INSERT' THEN
    INSERT INTO public.audit_logs (
      "timestamp", source, actor_type, user_id, tenant_id, action, entity_type, entity_id, changes, metadata,
      ip_address, user_agent, session_id, request_id, reason
    )
    SELECT
      happened_at, 'trigger', acting.actor_type, acting.user_id, acting.tenant_id, 'CREATE', %3$L, %4$s,
      jsonb_build_object('after', to_jsonb(n)), acting.metadata,
      acting.ip_address, acting.user_agent, acting.session_id, acting.request_id, acting.reason
    FROM new_rows AS n;

  ELSIF TG_OP = 'UPDATE' THEN
    -- Most updates change one row, for which pairing costs more than all the rest.
    IF (SELECT count(*) FROM (SELECT FROM new_rows LIMIT 2) AS few) = 1 THEN
      %8$s
      FROM (
        SELECT
          p.entity_id,
          p.row_before - p.unchanged AS before,
          p.row_after - p.unchanged AS after
        FROM (
          SELECT
            %5$s AS entity_id,
            to_jsonb(o) AS row_before,
            to_jsonb(n) AS row_after,
            ARRAY[
              %6$s
            ] AS unchanged
          FROM old_rows AS o
          CROSS JOIN new_rows AS n
          OFFSET 0
        ) AS p
        OFFSET 0
      ) AS d
      WHERE (d.after - 'updated_at') IS DISTINCT FROM '{}'::jsonb;
    ELSE
      -- Old and new rows are paired by their place: both tables are filled row by row, and a key may itself have changed.
      -- A FULL JOIN cannot become a nested loop, which a plan cached for two rows would be for the next thousands.
      %8$s
      FROM (
        SELECT
          p.entity_id,
          p.row_before - p.unchanged AS before,
          p.row_after - p.unchanged AS after
        FROM (
          SELECT
            coalesce(%5$s, %4$s) AS entity_id,
            o.audit$row AS row_before,
            n.audit$row AS row_after,
            ARRAY[
              %6$s
            ] AS unchanged
          FROM (
            SELECT r.*, to_jsonb(r) AS audit$row, row_number() OVER () AS audit$place
            FROM old_rows AS r
          ) AS o
          FULL JOIN (
            SELECT r.*, to_jsonb(r) AS audit$row, row_number() OVER () AS audit$place
            FROM new_rows AS r
          ) AS n ON n.audit$place = o.audit$place
          OFFSET 0
        ) AS p
        OFFSET 0
      ) AS d
      WHERE (d.after - 'updated_at') IS DISTINCT FROM '{}'::jsonb;
    END IF;

  ELSIF TG_OP = 'DELETE' THEN
    INSERT INTO public.audit_logs (
      "timestamp", source, actor_type, user_id, tenant_id, action, entity_type, entity_id, changes, metadata,
      ip_address, user_agent, session_id, request_id, reason
    )
    SELECT
      happened_at, 'trigger', acting.actor_type, acting.user_id, acting.tenant_id, 'DELETE', %3$L, %5$s,
      jsonb_build_object('before', to_jsonb(o)), acting.metadata,
      acting.ip_address, acting.user_agent, acting.session_id, acting.request_id, acting.reason
    FROM old_rows AS o;

  ELSE
    -- TRUNCATE fires on every table it empties. The partitioned table speaks only for partitions without the trigger.
    FOR leaf IN
      SELECT TG_RELID::regclass
      WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_partitioned_table AS p WHERE p.partrelid = TG_RELID)
      UNION ALL
      SELECT t.relid
      FROM pg_partition_tree(TG_RELID) AS t
      WHERE
        t.isleaf
        AND t.relid <> TG_RELID
        AND NOT EXISTS (
          SELECT FROM pg_catalog.pg_trigger AS g
          WHERE g.tgrelid = t.relid AND g.tgname = 'audit_truncate' AND g.tgenabled <> 'D'
        )
    LOOP
      EXECUTE %7$L || leaf || ' AS o'
      USING
        happened_at, acting.actor_type, acting.user_id, acting.tenant_id,
        coalesce(acting.metadata, '{}') || '{"operation": "TRUNCATE"}',
        acting.ip_address, acting.user_agent, acting.session_id, acting.request_id, acting.reason;
    END LOOP;
  END IF;
  RETURN NULL;
END
$body$
      $generator$,
      function_name,
      settings,
      root_name,
      id_after,
      id_before,
      unchanged_keys,
      format(
        'INSERT INTO public.audit_logs ('
        '"timestamp", source, actor_type, user_id, tenant_id, action, entity_type, entity_id, changes, metadata,'
        ' ip_address, user_agent, session_id, request_id, reason)'
        ' SELECT $1, ''trigger'', $2, $3, $4, ''DELETE'', %L, %s, jsonb_build_object(''before'', to_jsonb(o)),'
        ' $5, $6, $7, $8, $9, $10 FROM ONLY ',
        root_name,
        id_before
      ),
      format(
        'INSERT INTO public.audit_logs ('
        '"timestamp", source, actor_type, user_id, tenant_id, action, entity_type, entity_id, changes, metadata,'
        ' ip_address, user_agent, session_id, request_id, reason)'
        ' SELECT happened_at, ''trigger'', acting.actor_type, acting.user_id, acting.tenant_id, ''UPDATE'', %L, d.entity_id,'
        ' jsonb_build_object(''before'', d.before, ''after'', d.after), acting.metadata,'
        ' acting.ip_address, acting.user_agent, acting.session_id, acting.request_id, acting.reason',
        root_name
      )
    );
    EXECUTE format(
      'COMMENT ON FUNCTION %s() IS %L',
      function_name, format('Writes changes of %s to the audit log. Generated by equitie_private.track: track again after a change of columns.', root)
    );
    EXECUTE format(
      'REVOKE ALL ON FUNCTION %s() FROM PUBLIC, anon, authenticated, equitie_staff, service_role', function_name
    );
  END IF;

  -- Statement triggers do not reach partitions, and one on the parent stays silent about a write that names a partition.
  FOR member IN
    SELECT target
    UNION
    SELECT t.relid FROM pg_partition_tree(target) AS t
  LOOP
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER audit_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows'
      ' FOR EACH STATEMENT EXECUTE FUNCTION %s()',
      member, function_name
    );
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER audit_update AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'
      ' FOR EACH STATEMENT EXECUTE FUNCTION %s()',
      member, function_name
    );
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER audit_delete AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows'
      ' FOR EACH STATEMENT EXECUTE FUNCTION %s()',
      member, function_name
    );
    EXECUTE format(
      'CREATE OR REPLACE TRIGGER audit_truncate BEFORE TRUNCATE ON %s'
      ' FOR EACH STATEMENT EXECUTE FUNCTION %s()',
      member, function_name
    );
    -- ALWAYS: a session in replica mode would otherwise write unseen.
    EXECUTE format(
      'ALTER TABLE %s'
      ' ENABLE ALWAYS TRIGGER audit_insert,'
      ' ENABLE ALWAYS TRIGGER audit_update,'
      ' ENABLE ALWAYS TRIGGER audit_delete,'
      ' ENABLE ALWAYS TRIGGER audit_truncate',
      member
    );
  END LOOP;
END
$track$;

COMMENT ON FUNCTION equitie_private.track(regclass) IS 'Has every change of a table, and of all its partitions, written to the audit log. Run it again after adding or dropping columns.';

CREATE FUNCTION equitie_private.uuid_or_null(candidate text) RETURNS uuid
LANGUAGE plpgsql IMMUTABLE
SET search_path = ''
AS $$
BEGIN
  RETURN candidate::uuid;
EXCEPTION
  WHEN data_exception THEN
    RETURN NULL;
END
$$;

CREATE FUNCTION equitie_private.inet_or_null(candidate text) RETURNS inet
LANGUAGE plpgsql IMMUTABLE
SET search_path = ''
AS $$
BEGIN
  RETURN candidate::inet;
EXCEPTION
  WHEN data_exception THEN
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION equitie_private.uuid_or_null(text) IS 'The UUID a text spells, or NULL. PostgreSQL 15 has no pg_input_is_valid().';
COMMENT ON FUNCTION equitie_private.inet_or_null(text) IS 'The address a text spells, or NULL. PostgreSQL 15 has no pg_input_is_valid().';

CREATE FUNCTION equitie_private.record_audit_events(events jsonb) RETURNS integer
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  acting record;
  is_service boolean := current_setting('role') = 'service_role';
  readable jsonb := events;
  recorded integer;
BEGIN
  IF jsonb_typeof(events) IS DISTINCT FROM 'array' THEN
    RAISE EXCEPTION 'audit events must be a JSON array'
      USING ERRCODE = 'invalid_parameter_value';
  END IF;
  SELECT * INTO STRICT acting FROM equitie_private.audit_context();

  BEGIN
    PERFORM count(e.user_id), count(e.ip_address)
    FROM jsonb_to_recordset(events) AS e (user_id uuid, ip_address inet);
  EXCEPTION
    -- One address that is none must not cost the batch: such fields are left out and named in the event.
    WHEN data_exception THEN
      SELECT
        jsonb_agg(
          e.event
          || jsonb_build_object('user_id', r.user_id, 'ip_address', r.ip_address)
          || CASE
            WHEN r.malformed = '{}' THEN '{}'
            ELSE jsonb_build_object(
              'metadata',
              CASE jsonb_typeof(e.event -> 'metadata') WHEN 'object' THEN e.event -> 'metadata' ELSE '{}' END
              || jsonb_build_object('malformed', r.malformed)
            )
          END
          ORDER BY e.place
        )
      INTO STRICT readable
      FROM jsonb_array_elements(events) WITH ORDINALITY AS e (event, place)
      CROSS JOIN LATERAL (
        SELECT
          equitie_private.uuid_or_null(e.event ->> 'user_id'),
          equitie_private.inet_or_null(e.event ->> 'ip_address')
      ) AS c (user_id, ip_address)
      CROSS JOIN LATERAL (
        SELECT
          c.user_id,
          c.ip_address,
          array_remove(
            ARRAY[
              CASE WHEN c.user_id IS NULL AND e.event ->> 'user_id' IS NOT NULL THEN 'user_id' END,
              CASE WHEN c.ip_address IS NULL AND e.event ->> 'ip_address' IS NOT NULL THEN 'ip_address' END
            ],
            NULL
          )
      ) AS r (user_id, ip_address, malformed);
  END;

  -- Only the service may say who acted and why; a user acts as nobody but themself. Nobody writes into the future.
  INSERT INTO public.audit_logs (
    "timestamp", source, actor_type, user_id, tenant_id, action, entity_type, entity_id, changes, metadata,
    ip_address, user_agent, session_id, request_id, reason
  )
  SELECT
    least(e."timestamp", clock_timestamp()),
    'sdk',
    CASE
      WHEN NOT is_service THEN acting.actor_type
      WHEN e.actor_type IN ('user', 'service') THEN e.actor_type
      WHEN e.user_id IS NOT NULL THEN 'user'
      ELSE 'service'
    END,
    CASE WHEN is_service THEN e.user_id ELSE acting.user_id END,
    left(e.tenant_id, 256),
    e.action,
    e.entity_type,
    e.entity_id,
    e.changes,
    e.metadata,
    e.ip_address,
    left(e.user_agent, 1024),
    left(e.session_id, 256),
    left(e.request_id, 256),
    -- The service's own reason explains its own events, not those it writes for users.
    CASE
      WHEN is_service THEN left(coalesce(e.reason, CASE WHEN e.user_id IS NULL THEN acting.reason END), 1024)
    END
  FROM jsonb_to_recordset(readable) AS e (
    "timestamp" timestamptz, actor_type text, action text, entity_type text, entity_id text, changes jsonb, metadata jsonb,
    user_id uuid, tenant_id text, ip_address inet, user_agent text, session_id text, request_id text, reason text
  );
  GET DIAGNOSTICS recorded = ROW_COUNT;
  RETURN recorded;
END
$$;

COMMENT ON FUNCTION equitie_private.record_audit_events(jsonb) IS 'Appends the application''s own events, an array of objects keyed like the columns of audit_logs, and says how many. Within the caller''s transaction.';

REVOKE ALL ON FUNCTION equitie_private.refuse_change() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.make_append_only(regclass) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.audit_context() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.track(regclass) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.uuid_or_null(text) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.inet_or_null(text) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.record_audit_events(jsonb) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.record_audit_events(jsonb) TO authenticated, equitie_staff, service_role;

REVOKE ALL ON public.audit_logs, equitie_part.audit_logs_default FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON SEQUENCE public.audit_logs_audit_id_seq FROM PUBLIC, anon, authenticated, equitie_staff, service_role;

SELECT equitie_private.make_append_only('public.audit_logs');
SELECT equitie_private.ensure_month_partitions(
  'public.audit_logs', current_date, (current_date + interval '12 months')::date
);

SELECT equitie_private.track('public.companies_clean');
SELECT equitie_private.track('public.deals_clean');
SELECT equitie_private.track('public.investors_clean');
SELECT equitie_private.track('public.transactions_clean');
SELECT equitie_private.track('public.user_profiles');
