-- What else depends on the old tables, and would go on looking at the backup?
SELECT pg_catalog.format('the foreign key %%I of %%s', k.conname, k.conrelid::regclass) AS what
FROM pg_catalog.pg_constraint AS k
WHERE
  k.contype = 'f'
  AND k.confrelid = ANY (%(oids)s::oid[])
  AND NOT k.conrelid = ANY (%(oids)s::oid[])
  AND k.conparentid = 0
UNION
SELECT pg_catalog.format('the %%s %%s', CASE v.relkind WHEN 'm' THEN 'materialized view' ELSE 'view' END, v.oid::regclass)
FROM pg_catalog.pg_depend AS d
INNER JOIN pg_catalog.pg_rewrite AS w ON w.oid = d.objid
INNER JOIN pg_catalog.pg_class AS v ON v.oid = w.ev_class
WHERE
  d.classid = 'pg_catalog.pg_rewrite'::regclass
  AND d.refclassid = 'pg_catalog.pg_class'::regclass
  AND d.refobjid = ANY (%(oids)s::oid[])
  AND NOT v.oid = ANY (%(oids)s::oid[])
UNION
SELECT pg_catalog.format('%%s, which inherits from it', i.inhrelid::regclass)
FROM pg_catalog.pg_inherits AS i
WHERE i.inhparent = ANY (%(oids)s::oid[])
UNION
SELECT pg_catalog.format('the trigger %%I of %%s, which calls %%s', t.tgname, t.tgrelid::regclass, t.tgfoid::regproc)
FROM pg_catalog.pg_trigger AS t
INNER JOIN pg_catalog.pg_proc AS p ON p.oid = t.tgfoid
WHERE
  p.proname = ANY (%(functions)s::text[])
  AND NOT t.tgisinternal
  AND NOT t.tgrelid = ANY (%(oids)s::oid[])
ORDER BY 1
