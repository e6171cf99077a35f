-- Nothing can be changed unseen: every audited table and partition has its triggers, in force for every session.
SELECT format('%s lacks the trigger %s, or has it switched off: run SELECT equitie_private.track(%L).', t.member, g.name, t.root)
FROM (
  SELECT r.root, m.relid AS member
  FROM unnest(ARRAY[
    'public.companies_clean', 'public.deals_clean', 'public.investors_clean', 'public.transactions_clean',
    'public.user_profiles'
  ]) AS r (root)
  CROSS JOIN LATERAL (
    SELECT to_regclass(r.root) AS relid
    UNION
    SELECT p.relid FROM pg_partition_tree(to_regclass(r.root)) AS p
  ) AS m
) AS t
CROSS JOIN unnest(ARRAY['audit_insert', 'audit_update', 'audit_delete', 'audit_truncate']) AS g (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_trigger AS x
  WHERE x.tgrelid = t.member AND x.tgname = g.name AND x.tgenabled = 'A'
)
ORDER BY 1;

SELECT format('%s can be changed: its trigger %s is missing or switched off.', m.relid, g.name)
FROM pg_partition_tree('public.audit_logs') AS m
CROSS JOIN unnest(ARRAY['refuse_change', 'refuse_truncate']) AS g (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_trigger AS x
  WHERE x.tgrelid = m.relid AND x.tgname = g.name AND x.tgenabled = 'A'
)
ORDER BY 1;

SELECT format('The column %I of %s is not known to its audit function: run SELECT equitie_private.track(%L).', a.attname, a.attrelid::regclass, a.attrelid::regclass)
FROM pg_catalog.pg_trigger AS t
INNER JOIN pg_catalog.pg_proc AS f ON f.oid = t.tgfoid
INNER JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.tgrelid
INNER JOIN pg_catalog.pg_class AS c ON c.oid = t.tgrelid
WHERE
  t.tgname = 'audit_update'
  AND f.pronamespace = 'equitie_private'::regnamespace
  AND NOT c.relispartition
  AND a.attnum > 0
  AND NOT a.attisdropped
  AND strpos(f.prosrc, format('THEN %L END', a.attname)) = 0;
