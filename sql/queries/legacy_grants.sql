-- Which roles besides the library's own have privileges on the old tables that the views will not have?
SELECT DISTINCT
  c.oid::regclass::text AS relation,
  CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.pg_get_userbyid(a.grantee)::text END AS grantee
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) AS a
WHERE
  c.oid = ANY (%(oids)s::oid[])
  AND a.grantee <> c.relowner
  AND (a.grantee = 0 OR pg_catalog.pg_get_userbyid(a.grantee) NOT IN ('authenticated', 'equitie_staff', 'service_role'))
ORDER BY 1, 2
