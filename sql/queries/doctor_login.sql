-- What the login role is by itself.
SELECT
  r.rolname,
  r.rolsuper,
  r.rolbypassrls,
  r.rolcreaterole,
  r.rolcreatedb,
  r.rolreplication,
  r.rolinherit,
  r.rolvaliduntil IS NOT NULL AND r.rolvaliduntil < now() + interval '14 days' AS expires
FROM pg_catalog.pg_roles AS r
WHERE r.rolname = session_user
