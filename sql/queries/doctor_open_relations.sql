-- Relations of the application's own that its roles can reach without a policy in between.
SELECT
  format('%%I.%%I', n.nspname, c.relname) AS name,
  c.relkind::text,
  ARRAY(
    SELECT g.name
    FROM (
      SELECT r.rolname::text, r.oid
      FROM pg_catalog.pg_roles AS r
      WHERE r.rolname = ANY (%(roles)s) OR r.rolname = session_user
    ) AS g (name, oid)
    WHERE
      NOT pg_catalog.pg_has_role(g.oid, c.relowner, 'USAGE')
      AND pg_catalog.has_schema_privilege(g.oid, n.oid, 'USAGE')
      AND pg_catalog.has_table_privilege(g.oid, c.oid, 'SELECT, INSERT, UPDATE, DELETE')
    ORDER BY 1
  ) AS reached_by
FROM pg_catalog.pg_class AS c
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE
  n.nspname <> ALL (%(elsewhere)s)
  AND n.nspname NOT LIKE 'pg\_%%'
  AND NOT c.relispartition
  AND (
    (c.relkind IN ('r', 'p') AND NOT c.relrowsecurity)
    OR c.relkind IN ('m', 'f')
    OR (c.relkind = 'v' AND NOT coalesce(c.reloptions && ARRAY['security_invoker=true', 'security_invoker=on'], false))
  )
  AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_depend AS d
    WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
  )
ORDER BY 1
