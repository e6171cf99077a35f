-- What makes up public.transactions_clean besides its rows, each piece as the statement that gives it to the twin equitie_conversion.transactions_clean or binds it anew?
--
-- Run with an empty search_path, so that every name comes out with its schema. "part" says what a piece is; see
-- equitie_data.conversion.definition. What the conversion itself adds to the table is left out.
WITH source AS (
  SELECT
    c.oid,
    c.relkind,
    c.relacl,
    c.relowner,
    c.relrowsecurity,
    c.relforcerowsecurity,
    c.relreplident,
    c.reltype,
    (SELECT t.typarray FROM pg_catalog.pg_type AS t WHERE t.oid = c.reltype) AS array_type,
    to_regclass(pg_get_serial_sequence('public.transactions_clean', 'transaction_id')) AS sequence_id
  FROM pg_catalog.pg_class AS c
  WHERE c.oid = to_regclass('public.transactions_clean')
),
trigger AS (
  SELECT
    t.oid,
    t.tgname AS name,
    t.tgtype & 1 = 1 AS for_each_row,
    f.pronamespace = to_regnamespace('equitie_private') AS is_ours,
    concat_ws(
      E';\n',
      regexp_replace(
        pg_get_triggerdef(t.oid), ' ON public\.transactions_clean ', ' ON equitie_conversion.transactions_clean '
      ),
      'ALTER TABLE equitie_conversion.transactions_clean '
      || CASE t.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'A' THEN 'ENABLE ALWAYS' WHEN 'R' THEN 'ENABLE REPLICA' END
      || format(' TRIGGER %I', t.tgname),
      format('COMMENT ON TRIGGER %I ON equitie_conversion.transactions_clean IS ', t.tgname)
      || quote_literal(obj_description(t.oid, 'pg_trigger'))
    ) AS statement
  FROM source AS s
  INNER JOIN pg_catalog.pg_trigger AS t ON t.tgrelid = s.oid
  INNER JOIN pg_catalog.pg_proc AS f ON f.oid = t.tgfoid
  WHERE
    NOT t.tgisinternal
    AND t.tgparentid = 0
    AND f.pronamespace IS DISTINCT FROM to_regnamespace('equitie_conversion')
),
role AS (
  SELECT 0::oid AS oid, 'PUBLIC' AS name
  UNION ALL
  SELECT r.oid, quote_ident(r.rolname) FROM pg_catalog.pg_roles AS r
),
dependent AS (
  SELECT DISTINCT
    d.classid,
    d.objid,
    d.refclassid = 'pg_catalog.pg_type'::regclass AS on_row_type
  FROM source AS s
  INNER JOIN pg_catalog.pg_depend AS d
    ON (d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = s.oid)
    OR (d.refclassid = 'pg_catalog.pg_type'::regclass AND d.refobjid IN (s.reltype, s.array_type))
),
dependent_view AS (
  SELECT DISTINCT r.ev_class AS oid, c.relkind, r.rulename
  FROM source AS s
  CROSS JOIN dependent AS d
  INNER JOIN pg_catalog.pg_rewrite AS r ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.oid = d.objid
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = r.ev_class
),
piece AS (
  SELECT
    1 AS place,
    'column' AS part,
    a.attname::text AS name,
    concat_ws(
      ' ',
      format_type(a.atttypid, a.atttypmod),
      CASE WHEN a.attnotnull THEN 'NOT NULL' END,
      CASE a.attidentity WHEN 'a' THEN 'ALWAYS IDENTITY' WHEN 'd' THEN 'IDENTITY' END,
      CASE a.attgenerated WHEN '' THEN NULL ELSE 'GENERATED' END,
      pg_get_expr(e.adbin, e.adrelid)
    ) AS statement
  FROM source AS s
  INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = s.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_catalog.pg_attrdef AS e ON e.adrelid = a.attrelid AND e.adnum = a.attnum

  UNION ALL
  SELECT
    1, 'column setting', a.attname,
    concat_ws(
      E';\n',
      CASE WHEN a.attstattarget >= 0 THEN
        format('ALTER TABLE equitie_conversion.transactions_clean ALTER COLUMN %I SET STATISTICS %s', a.attname, a.attstattarget)
      END,
      CASE WHEN a.attoptions IS NOT NULL THEN
        format('ALTER TABLE equitie_conversion.transactions_clean ALTER COLUMN %I SET (%s)', a.attname, array_to_string(a.attoptions, ', '))
      END
    )
  FROM source AS s
  INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = s.oid AND a.attnum > 0 AND NOT a.attisdropped
  WHERE a.attstattarget >= 0 OR a.attoptions IS NOT NULL

  UNION ALL
  SELECT 2, CASE k.contype WHEN 'c' THEN 'check' ELSE 'key' END, k.conname, pg_get_constraintdef(k.oid)
  FROM source AS s
  INNER JOIN pg_catalog.pg_constraint AS k ON k.conrelid = s.oid
  WHERE k.contype IN ('c', 'p', 'u', 'x') AND k.conname <> 'transactions_clean_boundary'

  UNION ALL
  SELECT
    3, 'index', c.relname,
    concat_ws(
      E';\n',
      regexp_replace(
        pg_get_indexdef(i.indexrelid),
        ' ON (ONLY )?public\.transactions_clean USING ', ' ON equitie_conversion.transactions_clean USING '
      ),
      format('COMMENT ON INDEX equitie_conversion.%I IS ', c.relname) || quote_literal(obj_description(c.oid, 'pg_class'))
    )
  FROM source AS s
  INNER JOIN pg_catalog.pg_index AS i ON i.indrelid = s.oid
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid
  WHERE
    c.relname NOT IN ('transactions_clean_legacy_pkey', 'transactions_clean_flat_pkey')
    AND NOT EXISTS (
      SELECT FROM pg_catalog.pg_constraint AS k
      WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x')
    )

  UNION ALL
  SELECT
    4, 'foreign key', k.conname,
    format('ALTER TABLE equitie_conversion.transactions_clean ADD CONSTRAINT %I %s', k.conname, pg_get_constraintdef(k.oid))
  FROM source AS s
  INNER JOIN pg_catalog.pg_constraint AS k ON k.conrelid = s.oid AND k.contype = 'f' AND k.conparentid = 0
  WHERE k.confrelid <> s.oid

  UNION ALL
  SELECT 5, CASE WHEN t.for_each_row THEN 'row trigger' WHEN t.is_ours THEN 'own statement trigger' ELSE 'statement trigger' END,
    t.name, t.statement
  FROM trigger AS t

  UNION ALL
  SELECT
    6, 'row security', '',
    concat_ws(
      E';\n',
      CASE WHEN s.relrowsecurity THEN 'ALTER TABLE equitie_conversion.transactions_clean ENABLE ROW LEVEL SECURITY' END,
      CASE WHEN s.relforcerowsecurity THEN 'ALTER TABLE equitie_conversion.transactions_clean FORCE ROW LEVEL SECURITY' END
    )
  FROM source AS s
  WHERE s.relrowsecurity OR s.relforcerowsecurity

  UNION ALL
  SELECT
    6, 'policy', p.polname,
    concat_ws(
      E';\n',
      format('CREATE POLICY %I ON equitie_conversion.transactions_clean', p.polname)
      || CASE WHEN p.polpermissive THEN '' ELSE ' AS RESTRICTIVE' END
      || CASE p.polcmd WHEN 'r' THEN ' FOR SELECT' WHEN 'a' THEN ' FOR INSERT' WHEN 'w' THEN ' FOR UPDATE' WHEN 'd' THEN ' FOR DELETE' ELSE '' END
      || ' TO ' || (SELECT string_agg(r.name, ', ' ORDER BY array_position(p.polroles, r.oid)) FROM role AS r WHERE r.oid = ANY (p.polroles))
      || coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', '')
      || coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', ''),
      format('COMMENT ON POLICY %I ON equitie_conversion.transactions_clean IS ', p.polname)
      || quote_literal(obj_description(p.oid, 'pg_policy'))
    )
  FROM source AS s
  INNER JOIN pg_catalog.pg_policy AS p ON p.polrelid = s.oid

  UNION ALL
  SELECT
    7, 'grant', r.name || ' ' || a.privilege_type || ' ' || a.is_grantable,
    format('GRANT %s ON equitie_conversion.transactions_clean TO %s', a.privilege_type, r.name)
    || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
  FROM source AS s
  CROSS JOIN LATERAL aclexplode(s.relacl) AS a
  INNER JOIN role AS r ON r.oid = a.grantee
  WHERE a.grantee <> s.relowner

  UNION ALL
  SELECT
    7, 'grant', r.name || ' ' || a.privilege_type || ' (' || c.attname || ') ' || a.is_grantable,
    format('GRANT %s (%I) ON equitie_conversion.transactions_clean TO %s', a.privilege_type, c.attname, r.name)
    || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
  FROM source AS s
  INNER JOIN pg_catalog.pg_attribute AS c ON c.attrelid = s.oid AND c.attnum > 0 AND NOT c.attisdropped
  CROSS JOIN LATERAL aclexplode(c.attacl) AS a
  INNER JOIN role AS r ON r.oid = a.grantee

  UNION ALL
  SELECT
    1, 'sequence', c.relname,
    format(
      'ALTER TABLE equitie_conversion.transactions_clean ALTER COLUMN transaction_id ADD GENERATED BY DEFAULT AS IDENTITY'
      ' (SEQUENCE NAME equitie_conversion.%I START WITH %s INCREMENT BY %s %s %s CACHE %s %s)',
      c.relname, q.seqstart, q.seqincrement,
      -- A serial's sequence ends where integers do; that of a bigint goes on.
      CASE WHEN q.seqmin IN (-2147483648, 1) THEN '' ELSE format('MINVALUE %s', q.seqmin) END,
      CASE WHEN q.seqmax IN (2147483647, 9223372036854775807, -1) THEN '' ELSE format('MAXVALUE %s', q.seqmax) END,
      q.seqcache,
      CASE WHEN q.seqcycle THEN 'CYCLE' ELSE 'NO CYCLE' END
    )
  FROM source AS s
  INNER JOIN pg_catalog.pg_sequence AS q ON q.seqrelid = s.sequence_id
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = q.seqrelid

  UNION ALL
  SELECT
    7, 'sequence grant', r.name || ' ' || a.privilege_type,
    format('GRANT %s ON SEQUENCE equitie_conversion.%I TO %s', a.privilege_type, c.relname, r.name)
    || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
  FROM source AS s
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = s.sequence_id
  CROSS JOIN LATERAL aclexplode(c.relacl) AS a
  INNER JOIN role AS r ON r.oid = a.grantee
  WHERE a.grantee <> c.relowner

  UNION ALL
  SELECT
    8, 'replica identity', s.relreplident::text,
    'ALTER TABLE equitie_conversion.transactions_clean REPLICA IDENTITY '
    || CASE s.relreplident WHEN 'f' THEN 'FULL' ELSE 'NOTHING' END
  FROM source AS s
  WHERE s.relreplident IN ('f', 'n')

  UNION ALL
  SELECT
    9, 'statistics', format('%I.%I', e.stxnamespace::regnamespace::text, e.stxname),
    regexp_replace(
      regexp_replace(pg_get_statisticsobjdef(e.oid), ' FROM public\.transactions_clean$', ' FROM equitie_conversion.transactions_clean'),
      '^CREATE STATISTICS \S+', 'CREATE STATISTICS equitie_conversion.' || quote_ident(e.stxname)
    )
  FROM source AS s
  INNER JOIN pg_catalog.pg_statistic_ext AS e ON e.stxrelid = s.oid

  -- From here on, what others have that names the table.
  UNION ALL
  SELECT
    20, 'view', v.oid::regclass::text,
    format(
      'CREATE OR REPLACE VIEW %s%s AS %s',
      v.oid::regclass,
      ' WITH (' || array_to_string(c.reloptions, ', ') || ')',
      rtrim(pg_get_viewdef(v.oid), ';')
    )
  FROM dependent_view AS v
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = v.oid
  WHERE v.relkind = 'v' AND v.rulename = '_RETURN'

  UNION ALL
  SELECT
    21, CASE WHEN bool_or(d.on_row_type) THEN 'function of the row type' ELSE 'function' END, p.oid::regprocedure::text,
    concat_ws(
      E';\n',
      rtrim(pg_get_functiondef(p.oid), E'\n'),
      CASE WHEN bool_or(d.on_row_type) THEN concat_ws(
        E';\n',
        format('REVOKE ALL ON ROUTINE %s FROM PUBLIC', p.oid::regprocedure),
        (
          SELECT string_agg(
            format('REVOKE ALL ON ROUTINE %s FROM %I', p.oid::regprocedure, g.rolname), E';\n' ORDER BY g.rolname
          )
          FROM pg_catalog.pg_roles AS g
          WHERE g.rolname IN ('anon', 'authenticated', 'equitie_staff', 'service_role')
        ),
        (
          SELECT string_agg(
            format(
              'GRANT EXECUTE ON ROUTINE %s TO %s%s',
              p.oid::regprocedure, r.name, CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
            ),
            E';\n' ORDER BY r.name
          )
          FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
          INNER JOIN role AS r ON r.oid = a.grantee
          WHERE a.grantee <> p.proowner
        ),
        format('COMMENT ON ROUTINE %s IS ', p.oid::regprocedure) || quote_literal(obj_description(p.oid, 'pg_proc'))
      ) END
    )
  FROM dependent AS d
  INNER JOIN pg_catalog.pg_proc AS p ON d.classid = 'pg_catalog.pg_proc'::regclass AND p.oid = d.objid
  WHERE p.prokind IN ('f', 'p') AND p.pronamespace IS DISTINCT FROM to_regnamespace('equitie_conversion')
  GROUP BY p.oid, p.proacl, p.proowner

  UNION ALL
  SELECT
    22, 'policy of another table', format('%I on %s', p.polname, p.polrelid::regclass),
    format('ALTER POLICY %I ON %s', p.polname, p.polrelid::regclass)
    || coalesce(' USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', '')
    || coalesce(' WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')', '')
  FROM source AS s
  CROSS JOIN dependent AS d
  INNER JOIN pg_catalog.pg_policy AS p ON d.classid = 'pg_catalog.pg_policy'::regclass AND p.oid = d.objid
  WHERE p.polrelid <> s.oid

  UNION ALL
  SELECT
    23,
    CASE
      WHEN EXISTS (
        SELECT FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = s.oid AND a.attname = 'transaction_date' AND a.attnum = ANY (k.confkey)
      )
      AND k.conrelid <> s.oid
      THEN 'inbound key'
      ELSE 'inbound key by id'
    END,
    format('%I of %s', k.conname, k.conrelid::regclass),
    format(
      'ALTER TABLE %s ADD CONSTRAINT %I %s%s',
      k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid), CASE WHEN k.convalidated THEN ' NOT VALID' ELSE '' END
    )
  FROM source AS s
  INNER JOIN pg_catalog.pg_constraint AS k ON k.confrelid = s.oid AND k.contype = 'f' AND k.conparentid = 0

  UNION ALL
  SELECT
    24, 'publication', p.pubname,
    format(
      'ALTER PUBLICATION %I ADD TABLE public.transactions_clean%s%s',
      p.pubname,
      ' (' || (
        SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
        FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = s.oid AND a.attnum = ANY (m.prattrs)
      ) || ')',
      ' WHERE (' || pg_get_expr(m.prqual, m.prrelid) || ')'
    )
  FROM source AS s
  INNER JOIN pg_catalog.pg_publication_rel AS m ON m.prrelid = s.oid
  INNER JOIN pg_catalog.pg_publication AS p ON p.oid = m.prpubid

  -- And what cannot be carried over: better named now than found missing later.
  UNION ALL
  SELECT 30, 'obstacle', pg_describe_object(d.classid, d.objid, 0), 'depends on the table and cannot be bound anew'
  FROM source AS s
  CROSS JOIN dependent AS d
  WHERE
    NOT CASE d.classid
      WHEN 'pg_catalog.pg_class'::regclass THEN EXISTS (
        SELECT FROM pg_catalog.pg_class AS c
        WHERE
          c.oid = d.objid
          AND (
            c.oid = s.oid
            OR c.relkind IN ('i', 'I', 't')
            OR (c.relkind = 'S' AND NOT d.on_row_type)
            OR (c.relispartition AND NOT d.on_row_type)
          )
      )
      WHEN 'pg_catalog.pg_attrdef'::regclass THEN EXISTS (
        SELECT FROM pg_catalog.pg_attrdef AS e WHERE e.oid = d.objid AND e.adrelid = s.oid
      )
      WHEN 'pg_catalog.pg_constraint'::regclass THEN EXISTS (
        SELECT FROM pg_catalog.pg_constraint AS k
        WHERE k.oid = d.objid AND (k.conrelid = s.oid OR k.confrelid = s.oid)
      )
      WHEN 'pg_catalog.pg_trigger'::regclass THEN EXISTS (
        SELECT FROM pg_catalog.pg_trigger AS t WHERE t.oid = d.objid AND (t.tgrelid = s.oid OR t.tgisinternal)
      )
      WHEN 'pg_catalog.pg_type'::regclass THEN d.objid IN (s.reltype, s.array_type)
      WHEN 'pg_catalog.pg_rewrite'::regclass THEN EXISTS (
        SELECT
        FROM pg_catalog.pg_rewrite AS r
        INNER JOIN dependent_view AS v ON v.oid = r.ev_class AND v.rulename = r.rulename
        WHERE r.oid = d.objid AND v.relkind = 'v' AND v.rulename = '_RETURN'
      )
      WHEN 'pg_catalog.pg_proc'::regclass THEN EXISTS (
        SELECT FROM pg_catalog.pg_proc AS p WHERE p.oid = d.objid AND p.prokind IN ('f', 'p')
      )
      WHEN 'pg_catalog.pg_policy'::regclass THEN true
      WHEN 'pg_catalog.pg_statistic_ext'::regclass THEN true
      WHEN 'pg_catalog.pg_publication_rel'::regclass THEN true
      ELSE false
    END
)
SELECT p.part, p.name, p.statement
FROM piece AS p
ORDER BY p.place, p.part, p.name, p.statement
