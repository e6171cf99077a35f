-- Every function looks names up among temporary objects last, so that none of them can stand in for a type or table.
SELECT format('The function %s looks names up among the session''s temporary objects first.', p.oid::regprocedure)
FROM pg_catalog.pg_proc AS p
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
WHERE
  n.nspname IN ('equitie_private', 'equitie_migrations')
  AND p.prokind <> 'a'
  -- A procedure that commits cannot have settings of its own; it runs as its caller.
  AND (p.prokind <> 'p' OR p.prosecdef)
  AND NOT EXISTS (
    SELECT FROM unnest(p.proconfig) AS s (setting)
    WHERE s.setting LIKE 'search_path=%' AND s.setting LIKE '%pg_temp'
  )
ORDER BY p.oid::regprocedure::text;
