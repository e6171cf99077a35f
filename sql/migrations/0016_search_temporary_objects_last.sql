-- Functions look names up among temporary objects last, and not first.
--
-- With an empty search_path PostgreSQL still looks for relations and types in the session's temporary schema before
-- pg_catalog. Whoever can run SQL in a user's transaction could make a domain pg_temp.jsonb with a CHECK of their own,
-- and have a SECURITY DEFINER function run that with its owner's rights at its next cast to jsonb. Named explicitly and
-- last, the temporary schema hides nothing (manual, "Writing SECURITY DEFINER Functions Safely").

DO $$
DECLARE
  routine regprocedure;
BEGIN
  -- track() writes functions, also for tables that come later: they are to be like the others.
  EXECUTE replace(
    pg_catalog.pg_get_functiondef('equitie_private.track(regclass)'::regprocedure),
    'SET search_path = ''''',
    'SET search_path = pg_catalog, pg_temp'
  );

  FOR routine IN
    SELECT p.oid
    FROM pg_catalog.pg_proc AS p
    INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
    WHERE
      n.nspname IN ('public', 'equitie_private', 'equitie_migrations')
      AND 'search_path=""' = ANY (p.proconfig)
      -- In public there may be others' functions, which are not ours to alter.
      AND (n.nspname <> 'public' OR p.proname IN ('get_transaction', 'month_report'))
      AND pg_catalog.pg_has_role(current_user, p.proowner, 'USAGE')
      AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_depend AS d
        WHERE d.classid = 'pg_catalog.pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
      )
    ORDER BY p.oid
  LOOP
    EXECUTE format('ALTER ROUTINE %s SET search_path = pg_catalog, pg_temp', routine);
  END LOOP;

  -- The stand-ins for Supabase's functions, where they are ours.
  FOR routine IN
    SELECT p.oid
    FROM pg_catalog.pg_proc AS p
    INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
    WHERE
      n.nspname = 'auth'
      AND p.proname IN ('uid', 'role', 'jwt')
      AND 'search_path=""' = ANY (p.proconfig)
      AND pg_catalog.pg_has_role(current_user, p.proowner, 'USAGE')
  LOOP
    EXECUTE format('ALTER ROUTINE %s SET search_path = pg_catalog, pg_temp', routine);
  END LOOP;
END
$$;
