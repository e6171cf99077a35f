-- Default privileges that would open what is made next to the application's roles.
SELECT
  owner.rolname::text AS owner,
  coalesce(n.nspname::text, '') AS schema,
  CASE d.defaclobjtype
    WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS' WHEN 'n' THEN 'SCHEMAS' ELSE 'TYPES'
  END AS kind,
  coalesce(g.rolname::text, 'PUBLIC') AS grantee
FROM pg_catalog.pg_default_acl AS d
INNER JOIN pg_catalog.pg_roles AS owner ON owner.oid = d.defaclrole
LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid = d.defaclnamespace
CROSS JOIN LATERAL aclexplode(d.defaclacl) AS a
LEFT JOIN pg_catalog.pg_roles AS g ON g.oid = a.grantee
WHERE
  d.defaclobjtype IN ('r', 'S', 'f', 'n')
  AND a.grantee <> d.defaclrole
  AND (n.nspname IS NULL OR n.nspname <> ALL (%(elsewhere)s))
  AND (g.rolname IS NULL OR g.rolname = ANY (%(roles)s) OR g.rolname = session_user)
  -- Functions are everybody's by PostgreSQL's own default; a global entry only repeats that.
  AND NOT (a.grantee = 0 AND d.defaclobjtype = 'f' AND d.defaclnamespace = 0)
GROUP BY 1, 2, 3, 4
ORDER BY 1, 2, 3, 4
