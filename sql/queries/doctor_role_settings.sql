-- Settings that a role or the database gives to its sessions by itself.
SELECT
  coalesce(r.rolname, '') AS role,
  coalesce(d.datname, '') AS database,
  split_part(s.setting, '=', 1) AS name
FROM pg_catalog.pg_db_role_setting AS c
CROSS JOIN LATERAL unnest(c.setconfig) AS s (setting)
LEFT JOIN pg_catalog.pg_roles AS r ON r.oid = c.setrole
LEFT JOIN pg_catalog.pg_database AS d ON d.oid = c.setdatabase
WHERE
  (c.setrole = 0 OR r.rolname = session_user)
  AND (c.setdatabase = 0 OR d.datname = current_database())
ORDER BY 1, 2, 3
