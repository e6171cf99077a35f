-- Which roles the login can become, which it inherits, and which it may hand on.
SELECT
  r.rolname,
  pg_catalog.pg_has_role(session_user, r.oid, 'USAGE') AS inherits,
  -- Until PostgreSQL 16 every member may SET ROLE; the options are columns of a later release.
  coalesce(bool_or(coalesce((to_jsonb(m) ->> 'set_option')::boolean, true)), false) AS may_set,
  coalesce(bool_or(m.admin_option), false) AS may_grant,
  count(m.roleid) > 0 AS direct
FROM pg_catalog.pg_roles AS r
LEFT JOIN pg_catalog.pg_auth_members AS m
  ON m.roleid = r.oid AND m.member = session_user::regrole
WHERE
  r.rolname <> session_user
  AND pg_catalog.pg_has_role(session_user, r.oid, 'MEMBER')
GROUP BY r.oid, r.rolname
ORDER BY r.rolname
