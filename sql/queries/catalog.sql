-- What is in some schemas, fact by fact: (kind, name, relation it belongs to, property, value).
WITH relations AS (
  SELECT
    c.oid, c.relkind, c.relispartition, c.relowner, c.relacl, c.relrowsecurity, c.relforcerowsecurity, c.relpersistence,
    c.reloptions, c.relreplident, c.relpartbound,
    format('%%I.%%I', n.nspname, c.relname) AS name,
    n.nspname,
    -- Partitions are described by what is their own; the rest they have from their table.
    (SELECT h.inhparent FROM pg_catalog.pg_inherits AS h WHERE h.inhrelid = c.oid AND c.relispartition) AS parent
  FROM pg_catalog.pg_class AS c
  INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE
    n.nspname = ANY (%(schemas)s)
    AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
    AND NOT EXISTS (
      SELECT FROM pg_catalog.pg_depend AS d
      WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    )
),
tables AS (
  SELECT r.* FROM relations AS r WHERE NOT r.relispartition AND r.relkind <> 'S'
),
routines AS (
  SELECT
    p.*,
    format('%%I.%%I(%%s)', n.nspname, p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid)) AS name
  FROM pg_catalog.pg_proc AS p
  INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
  WHERE
    n.nspname = ANY (%(schemas)s)
    AND NOT EXISTS (
      SELECT FROM pg_catalog.pg_depend AS d
      WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
    )
),
grantees AS (
  SELECT 0::oid AS oid, 'PUBLIC'::text AS name
  UNION ALL
  SELECT r.oid, r.rolname::text FROM pg_catalog.pg_roles AS r WHERE r.rolname = ANY (%(roles)s)
),
privileges AS (
  SELECT
    o.kind, o.name, o.relation, 'privileges of ' || g.name AS property,
    string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type) AS value
  FROM (
    SELECT
      CASE WHEN r.relispartition THEN 'partition' WHEN r.relkind = 'S' THEN 'sequence' ELSE 'table' END AS kind,
      r.name, coalesce(p.name, r.name) AS relation, r.relowner AS owner,
      coalesce(r.relacl, acldefault(CASE r.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", r.relowner)) AS acl
    FROM relations AS r
    LEFT JOIN relations AS p ON p.oid = r.parent
    UNION ALL
    SELECT 'function', f.name, '', f.proowner, coalesce(f.proacl, acldefault('f', f.proowner))
    FROM routines AS f
    UNION ALL
    SELECT 'column', t.name || '.' || quote_ident(a.attname), t.name, t.relowner, a.attacl
    FROM tables AS t
    INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE a.attacl IS NOT NULL
    UNION ALL
    SELECT 'schema', quote_ident(n.nspname), '', n.nspowner, coalesce(n.nspacl, acldefault('n', n.nspowner))
    FROM pg_catalog.pg_namespace AS n
    WHERE n.nspname = ANY (%(schemas)s)
  ) AS o
  CROSS JOIN LATERAL aclexplode(o.acl) AS a
  INNER JOIN grantees AS g ON g.oid = a.grantee
  WHERE
    a.grantee <> o.owner
    -- What everybody may do in the first schema is the database's own affair.
    AND NOT (o.kind = 'schema' AND a.grantee = 0 AND o.name = quote_ident((%(schemas)s)[1]))
  GROUP BY o.kind, o.name, o.relation, g.name
)
SELECT 'role', g.name, '', 'is', 'a role'
FROM grantees AS g
WHERE g.oid <> 0

UNION ALL
SELECT 'function', 'auth.uid()', '', 'is', 'there'
WHERE to_regprocedure('auth.uid()') IS NOT NULL

UNION ALL
SELECT 'schema', quote_ident(n.nspname), '', p.property, p.value
FROM pg_catalog.pg_namespace AS n
CROSS JOIN LATERAL (
  VALUES
    ('is', 'a schema'),
    ('comment', CASE WHEN n.nspname <> (%(schemas)s)[1] THEN obj_description(n.oid, 'pg_namespace') END)
) AS p (property, value)
WHERE n.nspname = ANY (%(schemas)s)

UNION ALL
SELECT 'table', t.name, t.name, p.property, p.value
FROM tables AS t
CROSS JOIN LATERAL (
  VALUES
    (
      'is',
      CASE t.relkind
        WHEN 'p' THEN 'a partitioned table' WHEN 'v' THEN 'a view' WHEN 'm' THEN 'a materialized view'
        WHEN 'f' THEN 'a foreign table' ELSE 'a table'
      END
    ),
    ('owner', CASE WHEN t.relowner = to_regrole(quote_ident(current_user)) THEN 'the migrating role' ELSE t.relowner::regrole::text END),
    ('comment', obj_description(t.oid, 'pg_class')),
    ('persistence', CASE t.relpersistence WHEN 'p' THEN 'logged' WHEN 'u' THEN 'unlogged' ELSE 'temporary' END),
    ('storage options', array_to_string(t.reloptions, ', ')),
    ('replica identity', nullif(t.relreplident, CASE WHEN t.relkind IN ('r', 'p', 'm') THEN 'd' ELSE 'n' END::"char")::text),
    (
      'row-level security',
      CASE WHEN t.relforcerowsecurity THEN 'forced' WHEN t.relrowsecurity THEN 'on' ELSE 'off' END
    ),
    ('partition key', pg_catalog.pg_get_partkeydef(t.oid)),
    (
      'default partition',
      (SELECT d.name FROM pg_catalog.pg_partitioned_table AS p INNER JOIN relations AS d ON d.oid = p.partdefid WHERE p.partrelid = t.oid)
    ),
    ('definition', CASE WHEN t.relkind IN ('v', 'm') THEN pg_catalog.pg_get_viewdef(t.oid) END)
) AS p (property, value)

UNION ALL
SELECT 'partition', r.name, t.name, p.property, p.value
FROM relations AS r
INNER JOIN relations AS t ON t.oid = r.parent
CROSS JOIN LATERAL (
  VALUES
    ('is', CASE WHEN pg_catalog.pg_get_expr(r.relpartbound, r.oid) = 'DEFAULT' THEN 'the default partition' ELSE 'a partition' END),
    ('owner', CASE WHEN r.relowner = to_regrole(quote_ident(current_user)) THEN 'the migrating role' ELSE r.relowner::regrole::text END),
    ('schema', quote_ident(r.nspname)),
    ('comment', CASE WHEN obj_description(r.oid, 'pg_class') IS NOT NULL THEN 'is there' END),
    ('persistence', CASE r.relpersistence WHEN 'p' THEN 'logged' WHEN 'u' THEN 'unlogged' ELSE 'temporary' END),
    ('row-level security', CASE WHEN r.relforcerowsecurity THEN 'forced' WHEN r.relrowsecurity THEN 'on' ELSE 'off' END)
) AS p (property, value)

UNION ALL
SELECT
  'partition', r.name, t.name, 'trigger ' || quote_ident(g.tgname),
  replace(pg_catalog.pg_get_triggerdef(g.oid), r.name, 'the partition')
  || CASE g.tgenabled WHEN 'O' THEN '' WHEN 'A' THEN ', always' WHEN 'R' THEN ', on replicas' ELSE ', disabled' END
FROM relations AS r
INNER JOIN relations AS t ON t.oid = r.parent
INNER JOIN pg_catalog.pg_trigger AS g ON g.tgrelid = r.oid AND NOT g.tgisinternal AND g.tgparentid = 0

UNION ALL
SELECT
  'partition', r.name, t.name, 'index ' || i.indexrelid::regclass::text,
  regexp_replace(pg_catalog.pg_get_indexdef(i.indexrelid), '^.* USING ', '')
FROM relations AS r
INNER JOIN relations AS t ON t.oid = r.parent
INNER JOIN pg_catalog.pg_index AS i ON i.indrelid = r.oid
WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_inherits AS h WHERE h.inhrelid = i.indexrelid)

UNION ALL
SELECT 'partition', r.name, t.name, 'constraint ' || quote_ident(k.conname), pg_catalog.pg_get_constraintdef(k.oid)
FROM relations AS r
INNER JOIN relations AS t ON t.oid = r.parent
INNER JOIN pg_catalog.pg_constraint AS k ON k.conrelid = r.oid
WHERE k.contype IN ('c', 'f', 'p', 'u', 'x') AND k.conparentid = 0 AND k.coninhcount = 0

UNION ALL
SELECT 'column', t.name || '.' || quote_ident(a.attname), t.name, p.property, p.value
FROM tables AS t
INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = t.oid AND d.adnum = a.attnum
CROSS JOIN LATERAL (
  VALUES
    ('is', 'a column'),
    (
      'type',
      pg_catalog.format_type(a.atttypid, a.atttypmod)
      || coalesce(
        (
          SELECT ' COLLATE ' || a.attcollation::regcollation::text
          FROM pg_catalog.pg_type AS y
          WHERE y.oid = a.atttypid AND y.typcollation <> a.attcollation
        ),
        ''
      )
    ),
    ('nullability', CASE WHEN t.relkind IN ('r', 'p', 'f') THEN CASE WHEN a.attnotnull THEN 'NOT NULL' ELSE 'nullable' END END),
    ('default', CASE WHEN a.attgenerated = '' THEN pg_catalog.pg_get_expr(d.adbin, d.adrelid) END),
    ('generation', CASE WHEN a.attgenerated <> '' THEN pg_catalog.pg_get_expr(d.adbin, d.adrelid) END),
    ('identity', CASE a.attidentity WHEN 'a' THEN 'GENERATED ALWAYS' WHEN 'd' THEN 'GENERATED BY DEFAULT' END),
    ('comment', col_description(t.oid, a.attnum))
) AS p (property, value)

UNION ALL
SELECT 'sequence', s.name, coalesce(o.refobjid::regclass::text, ''), p.property, p.value
FROM relations AS s
INNER JOIN pg_catalog.pg_sequence AS q ON q.seqrelid = s.oid
LEFT JOIN pg_catalog.pg_depend AS o
  ON o.classid = 'pg_class'::regclass AND o.objid = s.oid AND o.refclassid = 'pg_class'::regclass AND o.deptype IN ('a', 'i')
CROSS JOIN LATERAL (
  VALUES
    ('is', 'a sequence'),
    (
      'definition',
      format(
        'AS %%s INCREMENT BY %%s MINVALUE %%s MAXVALUE %%s START WITH %%s CACHE %%s%%s', q.seqtypid::regtype, q.seqincrement,
        q.seqmin, q.seqmax, q.seqstart, q.seqcache, CASE WHEN q.seqcycle THEN ' CYCLE' ELSE '' END
      )
    ),
    ('comment', obj_description(s.oid, 'pg_class'))
) AS p (property, value)

UNION ALL
SELECT 'constraint', quote_ident(k.conname) || ' of ' || t.name, t.name, p.property, p.value
FROM tables AS t
INNER JOIN pg_catalog.pg_constraint AS k
  ON k.conrelid = t.oid AND k.contype IN ('c', 'f', 'p', 'u', 'x') AND k.conparentid = 0
LEFT JOIN pg_catalog.pg_index AS i ON i.indexrelid = k.conindid AND k.contype IN ('p', 'u', 'x')
CROSS JOIN LATERAL (
  VALUES
    ('is', 'a constraint'),
    ('definition', regexp_replace(pg_catalog.pg_get_constraintdef(k.oid), ' NOT VALID$', '')),
    ('validity', CASE WHEN NOT k.convalidated THEN 'not validated' WHEN NOT i.indisvalid THEN 'its index is INVALID' ELSE 'valid' END),
    ('comment', obj_description(k.oid, 'pg_constraint'))
) AS p (property, value)

UNION ALL
SELECT 'index', quote_ident(n.nspname) || '.' || quote_ident(c.relname), t.name, p.property, p.value
FROM tables AS t
INNER JOIN pg_catalog.pg_index AS i ON i.indrelid = t.oid
INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
  VALUES
    ('is', 'an index'),
    ('definition', replace(pg_catalog.pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON ')),
    ('validity', CASE WHEN i.indisvalid THEN 'valid' ELSE 'INVALID' END),
    ('comment', obj_description(c.oid, 'pg_class'))
) AS p (property, value)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_constraint AS k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x')
)

UNION ALL
SELECT 'trigger', quote_ident(g.tgname) || ' of ' || t.name, t.name, p.property, p.value
FROM tables AS t
INNER JOIN pg_catalog.pg_trigger AS g ON g.tgrelid = t.oid AND NOT g.tgisinternal AND g.tgparentid = 0
CROSS JOIN LATERAL (
  VALUES
    ('is', 'a trigger'),
    ('definition', pg_catalog.pg_get_triggerdef(g.oid)),
    (
      'firing',
      CASE g.tgenabled WHEN 'O' THEN 'enabled' WHEN 'A' THEN 'always' WHEN 'R' THEN 'on replicas' ELSE 'disabled' END
    ),
    ('comment', obj_description(g.oid, 'pg_trigger'))
) AS p (property, value)

UNION ALL
SELECT 'policy', quote_ident(y.polname) || ' of ' || t.name, t.name, p.property, p.value
FROM tables AS t
INNER JOIN pg_catalog.pg_policy AS y ON y.polrelid = t.oid
CROSS JOIN LATERAL (
  VALUES
    ('is', 'a policy'),
    (
      'definition',
      concat_ws(
        ' ',
        CASE WHEN y.polpermissive THEN 'AS PERMISSIVE' ELSE 'AS RESTRICTIVE' END,
        'FOR ' || CASE y.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
        'TO ' || (
          SELECT string_agg(CASE u.role WHEN 0 THEN 'PUBLIC' ELSE u.role::regrole::text END, ', ' ORDER BY u.role::regrole::text)
          FROM unnest(y.polroles) AS u (role)
        ),
        'USING (' || pg_catalog.pg_get_expr(y.polqual, y.polrelid) || ')',
        'WITH CHECK (' || pg_catalog.pg_get_expr(y.polwithcheck, y.polrelid) || ')'
      )
    ),
    ('comment', obj_description(y.oid, 'pg_policy'))
) AS p (property, value)

UNION ALL
SELECT 'function', f.name, '', p.property, p.value
FROM routines AS f
LEFT JOIN pg_catalog.pg_aggregate AS a ON a.aggfnoid = f.oid
CROSS JOIN LATERAL (
  VALUES
    ('is', CASE f.prokind WHEN 'a' THEN 'an aggregate' WHEN 'p' THEN 'a procedure' ELSE 'a function' END),
    ('owner', CASE WHEN f.proowner = to_regrole(quote_ident(current_user)) THEN 'the migrating role' ELSE f.proowner::regrole::text END),
    ('comment', obj_description(f.oid, 'pg_proc')),
    (
      'definition',
      CASE f.prokind
        WHEN 'a' THEN format('SFUNC = %%s, STYPE = %%s, INITCOND = %%L', a.aggtransfn, a.aggtranstype::regtype, a.agginitval)
        ELSE pg_catalog.pg_get_functiondef(f.oid)
      END
    )
) AS p (property, value)

UNION ALL
SELECT 'type', format('%%I.%%I', n.nspname, y.typname), '', p.property, p.value
FROM pg_catalog.pg_type AS y
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = y.typnamespace
CROSS JOIN LATERAL (
  VALUES
    ('is', CASE y.typtype WHEN 'd' THEN 'a domain' WHEN 'e' THEN 'an enumeration' ELSE 'a range' END),
    ('comment', obj_description(y.oid, 'pg_type')),
    (
      'definition',
      CASE y.typtype
        WHEN 'e' THEN (SELECT string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder) FROM pg_catalog.pg_enum AS e WHERE e.enumtypid = y.oid)
        WHEN 'd' THEN concat_ws(
          ' ', pg_catalog.format_type(y.typbasetype, y.typtypmod), CASE WHEN y.typnotnull THEN 'NOT NULL' END, y.typdefault,
          (SELECT string_agg(pg_catalog.pg_get_constraintdef(k.oid), ' ' ORDER BY k.conname) FROM pg_catalog.pg_constraint AS k WHERE k.contypid = y.oid AND k.contype = 'c')
        )
      END
    )
) AS p (property, value)
WHERE n.nspname = ANY (%(schemas)s) AND y.typtype IN ('d', 'e', 'r')

UNION ALL
SELECT 'statistics', format('%%I.%%I', n.nspname, s.stxname), t.name, p.property, p.value
FROM pg_catalog.pg_statistic_ext AS s
INNER JOIN tables AS t ON t.oid = s.stxrelid
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = s.stxnamespace
CROSS JOIN LATERAL (
  VALUES
    ('is', 'statistics'),
    ('definition', pg_catalog.pg_get_statisticsobjdef(s.oid))
) AS p (property, value)

UNION ALL
SELECT v.kind, v.name, v.relation, v.property, v.value
FROM privileges AS v
