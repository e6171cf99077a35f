-- Everything that decides who may do what in the library's schemas: one row for each policy, privilege and function.
WITH roles (oid, name) AS (
  SELECT r.oid, CASE WHEN r.rolname = %(login)s THEN '<login>' ELSE r.rolname::text END
  FROM pg_catalog.pg_roles AS r
  WHERE r.rolname = ANY (%(roles)s) OR r.rolname = %(login)s
  UNION ALL
  SELECT 0::oid, 'PUBLIC'
),

schemas AS (
  SELECT n.oid, n.nspname, n.nspowner, n.nspacl
  FROM pg_catalog.pg_namespace AS n
  WHERE n.nspname IN ('public', 'equitie_private', 'equitie_part', 'equitie_migrations')
),

relations AS (
  SELECT
    c.oid,
    s.nspname,
    c.relkind,
    c.relowner,
    c.relacl,
    c.relrowsecurity,
    c.reloptions,
    format('%%I.%%I', s.nspname, c.relname) AS name
  FROM pg_catalog.pg_class AS c
  INNER JOIN schemas AS s ON s.oid = c.relnamespace
  WHERE
    c.relkind IN ('r', 'p', 'v', 'm', 'S')
    AND NOT c.relispartition
    AND s.nspname <> 'equitie_part'
    AND NOT EXISTS (
      SELECT FROM pg_catalog.pg_depend AS d
      WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    )
),

functions AS (
  SELECT
    p.oid,
    s.nspname,
    p.proowner,
    p.proacl,
    p.prosecdef,
    p.proconfig,
    p.prosrc,
    p.prokind,
    format('%%I.%%I(%%s)', s.nspname, p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid)) AS name
  FROM pg_catalog.pg_proc AS p
  INNER JOIN schemas AS s ON s.oid = p.pronamespace
  WHERE NOT EXISTS (
    SELECT FROM pg_catalog.pg_depend AS d
    WHERE d.classid = 'pg_catalog.pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
  )
)

SELECT 'row security' AS kind, r.name AS object, '' AS grantee, CASE WHEN r.relrowsecurity THEN 'on' ELSE 'off' END AS detail
FROM relations AS r
WHERE r.relkind IN ('r', 'p')

UNION ALL
SELECT
  'policy',
  r.name,
  p.polname::text,
  format(
    'AS %%s FOR %%s TO %%s%%s%%s',
    CASE WHEN p.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
    CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
    (
      SELECT string_agg(coalesce(quote_ident(g.rolname), 'PUBLIC'), ', ' ORDER BY g.rolname)
      FROM unnest(p.polroles) AS m (oid)
      LEFT JOIN pg_catalog.pg_roles AS g ON g.oid = m.oid
    ),
    coalesce(' USING (' || pg_catalog.pg_get_expr(p.polqual, p.polrelid) || ')', ''),
    coalesce(' WITH CHECK (' || pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid) || ')', '')
  )
FROM pg_catalog.pg_policy AS p
INNER JOIN relations AS r ON r.oid = p.polrelid

UNION ALL
SELECT 'view', r.name, '', CASE WHEN r.reloptions @> ARRAY['security_invoker=true'] THEN 'security_invoker' ELSE 'as its owner' END
FROM relations AS r
WHERE r.relkind = 'v'

UNION ALL
SELECT 'sequence', r.name, '', ''
FROM relations AS r
WHERE r.relkind = 'S'

UNION ALL
SELECT
  'function',
  f.name,
  '',
  format(
    'SECURITY %%s SET %%s BODY %%s',
    CASE WHEN f.prosecdef THEN 'DEFINER' ELSE 'INVOKER' END,
    coalesce(array_to_string(f.proconfig, ' '), 'nothing'),
    left(encode(sha256(convert_to(f.prosrc, 'UTF8')), 'hex'), 32)
  )
FROM functions AS f

UNION ALL
SELECT 'privilege', 'SCHEMA ' || quote_ident(s.nspname), g.name, a.privilege_type
FROM schemas AS s
-- The default when nobody has granted or revoked anything.
CROSS JOIN LATERAL aclexplode(coalesce(s.nspacl, acldefault('n', s.nspowner))) AS a
INNER JOIN roles AS g ON g.oid = a.grantee
WHERE a.grantee <> s.nspowner AND (s.nspname <> 'public' OR a.privilege_type = 'CREATE')

UNION ALL
SELECT 'privilege', CASE r.relkind WHEN 'S' THEN 'SEQUENCE ' ELSE 'TABLE ' END || r.name, g.name, a.privilege_type
FROM relations AS r
CROSS JOIN LATERAL aclexplode(r.relacl) AS a
INNER JOIN roles AS g ON g.oid = a.grantee
WHERE a.grantee <> r.relowner

UNION ALL
SELECT 'privilege', 'TABLE ' || r.name, g.name, format('%%s (%%I)', a.privilege_type, t.attname)
FROM relations AS r
INNER JOIN pg_catalog.pg_attribute AS t ON t.attrelid = r.oid
CROSS JOIN LATERAL aclexplode(t.attacl) AS a
INNER JOIN roles AS g ON g.oid = a.grantee
WHERE a.grantee <> r.relowner

UNION ALL
SELECT
  'privilege',
  CASE f.prokind WHEN 'p' THEN 'PROCEDURE ' ELSE 'FUNCTION ' END || f.name,
  g.name,
  a.privilege_type
FROM functions AS f
CROSS JOIN LATERAL aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) AS a
INNER JOIN roles AS g ON g.oid = a.grantee
WHERE a.grantee <> f.proowner

ORDER BY 1, 2, 3, 4
