-- What the login and the four database roles own in this database, and the databases they own.
SELECT
  r.rolname,
  pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid) AS described
FROM pg_catalog.pg_shdepend AS d
INNER JOIN pg_catalog.pg_roles AS r ON r.oid = d.refobjid
WHERE
  d.refclassid = 'pg_catalog.pg_authid'::regclass
  AND d.deptype = 'o'
  AND d.dbid IN (0, (SELECT db.oid FROM pg_catalog.pg_database AS db WHERE db.datname = current_database()))
  AND (r.rolname = session_user OR r.rolname = ANY (%(roles)s))
  -- Temporary tables come and go with their sessions.
  AND NOT coalesce((
    SELECT n.nspname LIKE 'pg\_temp\_%%' OR n.nspname LIKE 'pg\_toast%%'
    FROM pg_catalog.pg_class AS c
    INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE d.classid = 'pg_catalog.pg_class'::regclass AND c.oid = d.objid
  ), false)
  AND NOT coalesce((
    SELECT n.nspname LIKE 'pg\_temp\_%%' OR n.nspname LIKE 'pg\_toast%%'
    FROM pg_catalog.pg_type AS t
    INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = t.typnamespace
    WHERE d.classid = 'pg_catalog.pg_type'::regclass AND t.oid = d.objid
  ), false)
ORDER BY 1, 2
