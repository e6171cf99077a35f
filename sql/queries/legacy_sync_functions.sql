-- The functions behind those triggers, as statements that make them again, with their owner's grants.
SELECT
  p.oid::regprocedure::text AS signature,
  pg_catalog.pg_get_functiondef(p.oid) AS definition,
  pg_catalog.pg_has_role(p.proowner, 'USAGE') AS owned,
  pg_catalog.obj_description(p.oid, 'pg_proc') AS comment,
  p.proacl IS NOT NULL AS granted,
  ARRAY(
    SELECT pg_catalog.format(
      'GRANT EXECUTE ON FUNCTION %%s TO %%s%%s',
      p.oid::regprocedure,
      CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END,
      CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
    )
    FROM pg_catalog.aclexplode(p.proacl) AS a
    WHERE a.grantee <> p.proowner
  ) AS grants
FROM pg_catalog.pg_proc AS p
WHERE
  p.proname = ANY (%(functions)s::text[])
  AND p.prorettype = 'pg_catalog.trigger'::regtype
ORDER BY 1
