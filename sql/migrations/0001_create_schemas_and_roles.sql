-- Schemas and database roles that everything after this rests on.
--
-- Roles belong to the whole cluster: another database may have made them already, or may be making them at this very
-- moment. Existing roles are never altered, because they may not be ours to alter (a hosted platform owns its own).

DO $$
DECLARE
  wanted text;
  may_bypass boolean;
BEGIN
  -- BYPASSRLS may be given by a superuser and, since PostgreSQL 16, by a role that has it itself. Where it may not be,
  -- service_role works through the policies that migration 0006 makes for it in either case.
  SELECT r.rolsuper OR (r.rolbypassrls AND current_setting('server_version_num')::integer >= 160000)
  INTO STRICT may_bypass
  FROM pg_catalog.pg_roles AS r
  WHERE r.rolname = current_user;

  FOREACH wanted IN ARRAY ARRAY['anon', 'authenticated', 'equitie_staff', 'service_role'] LOOP
    IF EXISTS (SELECT FROM pg_catalog.pg_roles AS r WHERE r.rolname = wanted) THEN
      CONTINUE;
    END IF;
    BEGIN
      IF wanted = 'service_role' AND may_bypass THEN
        CREATE ROLE service_role NOLOGIN NOINHERIT BYPASSRLS;
      ELSE
        EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT', wanted);
      END IF;
    EXCEPTION
      WHEN duplicate_object OR unique_violation THEN
        -- A migration of another database of this cluster was quicker.
        NULL;
      WHEN insufficient_privilege THEN
        RAISE EXCEPTION 'the database role "%" does not exist and "%" may not create it', wanted, current_user
          USING
            ERRCODE = 'insufficient_privilege',
            HINT = format('Give the migrating role CREATEROLE, or run CREATE ROLE %I NOLOGIN NOINHERIT as a superuser.', wanted);
    END;
  END LOOP;
END
$$;

CREATE SCHEMA IF NOT EXISTS equitie_private;
CREATE SCHEMA IF NOT EXISTS equitie_part;

COMMENT ON SCHEMA equitie_private IS 'Functions behind the policies, the audit trail and partitioning, and bookkeeping. Not part of any API.';
COMMENT ON SCHEMA equitie_part IS 'Partitions of the partitioned tables. Row-level security does not reach a partition that is read directly, so nobody holds any privilege here.';

REVOKE ALL ON SCHEMA equitie_private FROM PUBLIC;
REVOKE ALL ON SCHEMA equitie_part FROM PUBLIC;
GRANT USAGE ON SCHEMA equitie_private TO authenticated, equitie_staff, service_role;

DO $$
BEGIN
  -- Only the owner of the database may revoke this; new databases since PostgreSQL 15 do not grant it.
  REVOKE CREATE ON SCHEMA public FROM PUBLIC;
  GRANT USAGE ON SCHEMA public TO authenticated, equitie_staff, service_role;
EXCEPTION
  WHEN insufficient_privilege THEN
    NULL;
END
$$;

-- Supabase and PostgREST bring auth.uid(), auth.role() and auth.jwt(). Elsewhere, policies and views written for them
-- work through these. Our own policies use equitie_private alone and do not need them.
DO $$
BEGIN
  IF to_regprocedure('auth.uid()') IS NOT NULL THEN
    RETURN;
  END IF;

  CREATE SCHEMA IF NOT EXISTS auth;
  GRANT USAGE ON SCHEMA auth TO anon, authenticated, equitie_staff, service_role;

  CREATE FUNCTION auth.uid() RETURNS uuid
  LANGUAGE sql STABLE PARALLEL SAFE
  SET search_path = ''
  AS 'SELECT (nullif(current_setting(''request.jwt.claims'', true), '''')::jsonb ->> ''sub'')::uuid';

  CREATE FUNCTION auth.role() RETURNS text
  LANGUAGE sql STABLE PARALLEL SAFE
  SET search_path = ''
  AS 'SELECT nullif(current_setting(''request.jwt.claims'', true), '''')::jsonb ->> ''role''';

  CREATE FUNCTION auth.jwt() RETURNS jsonb
  LANGUAGE sql STABLE PARALLEL SAFE
  SET search_path = ''
  AS 'SELECT nullif(current_setting(''request.jwt.claims'', true), '''')::jsonb';

  COMMENT ON SCHEMA auth IS 'Stand-ins for the functions that Supabase puts here.';
  COMMENT ON FUNCTION auth.uid() IS 'The "sub" of the request''s claims; NULL when nobody is named.';
  COMMENT ON FUNCTION auth.role() IS 'The "role" of the request''s claims; NULL when there are none.';
  COMMENT ON FUNCTION auth.jwt() IS 'The request''s claims; NULL when there are none.';
EXCEPTION
  WHEN insufficient_privilege OR duplicate_function THEN
    RAISE NOTICE 'auth.uid() was not created: the schema auth belongs to somebody else';
END
$$;

CREATE FUNCTION equitie_private.set_updated_at() RETURNS trigger
LANGUAGE plpgsql
SET search_path = ''
AS $$
BEGIN
  NEW.updated_at := now();
  RETURN NEW;
END
$$;

COMMENT ON FUNCTION equitie_private.set_updated_at() IS 'Row trigger: stamps a changed row with the time of its transaction.';

REVOKE ALL ON FUNCTION equitie_private.set_updated_at() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
