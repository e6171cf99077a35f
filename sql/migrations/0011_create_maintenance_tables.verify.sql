-- What maintenance works on is there and shut, and every partition is guarded like the default partition.
SELECT format('The retention policy of %s names no table that is partitioned by month with a default partition in equitie_part.', p.parent)
FROM equitie_private.retention_policies AS p
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_partitioned_table AS t
  INNER JOIN pg_catalog.pg_class AS d ON d.oid = t.partdefid
  WHERE t.partrelid = to_regclass(p.parent) AND d.relnamespace = 'equitie_part'::regnamespace
);

SELECT format('The maintenance task "%s" names the function %s, which does not exist.', t.name, t.function)
FROM equitie_private.maintenance_tasks AS t
WHERE to_regprocedure(t.function) IS NULL;

SELECT format('The partition %s lacks the trigger %I of the default partition: run SELECT equitie_private.copy_statement_triggers(%L, %L).', i.inhrelid::regclass, t.tgname, d.partdefid::regclass, i.inhrelid::regclass)
FROM equitie_private.retention_policies AS p
INNER JOIN pg_catalog.pg_partitioned_table AS d ON d.partrelid = to_regclass(p.parent)
INNER JOIN pg_catalog.pg_inherits AS i ON i.inhparent = d.partrelid AND i.inhrelid <> d.partdefid
INNER JOIN pg_catalog.pg_trigger AS t
  ON t.tgrelid = d.partdefid AND NOT t.tgisinternal AND t.tgtype & 1 = 0 AND t.tgname NOT LIKE 'mirror\_drain%'
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_trigger AS x
  WHERE x.tgrelid = i.inhrelid AND x.tgname = t.tgname AND x.tgenabled = t.tgenabled
)
ORDER BY 1;

SELECT format('%s holds a privilege on equitie_private.%I: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, c.relname)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE
  c.oid IN (
    to_regclass('equitie_private.retention_policies'), to_regclass('equitie_private.legal_holds'),
    to_regclass('equitie_private.retired_partitions'), to_regclass('equitie_private.partition_drains'),
    to_regclass('equitie_private.drain_failures'), to_regclass('equitie_private.maintenance_runs'),
    to_regclass('equitie_private.maintenance_tasks')
  )
  AND a.grantee <> c.relowner
GROUP BY a.grantee, c.relname;

SELECT format('The retired partition equitie_part.%I is missing, although it was not dropped: it was %s.', r.table_name, r.state)
FROM equitie_private.retired_partitions AS r
WHERE r.state IN ('detached', 'settled', 'archived') AND to_regclass(format('equitie_part.%I', r.table_name)) IS NULL;
