-- What the four database roles are, and what they have by way of others.
SELECT
  r.rolname,
  r.rolcanlogin,
  r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication AS has_attributes,
  r.rolbypassrls,
  ARRAY(
    SELECT other.rolname::text
    FROM pg_catalog.pg_roles AS other
    WHERE
      other.oid <> r.oid
      AND NOT r.rolsuper
      AND pg_catalog.pg_has_role(r.oid, other.oid, 'MEMBER')
    ORDER BY 1
  ) AS member_of
FROM pg_catalog.pg_roles AS r
WHERE r.rolname = ANY (%(roles)s)
