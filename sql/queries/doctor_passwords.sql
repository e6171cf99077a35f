-- Roles that can log in and whose password is kept in a form that is no longer safe; for superusers.
SELECT
  r.rolname,
  CASE WHEN r.rolpassword IS NULL THEN 'none' WHEN r.rolpassword LIKE 'md5%%' THEN 'md5' ELSE 'scram' END AS kept_as
FROM pg_catalog.pg_authid AS r
WHERE r.rolcanlogin AND r.rolname = %(login)s
