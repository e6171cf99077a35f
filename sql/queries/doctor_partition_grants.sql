-- Privileges on partitions, which row-level security does not reach.
SELECT
  format('%%I.%%I', n.nspname, c.relname) AS partition,
  coalesce(g.rolname::text, 'PUBLIC') AS grantee,
  string_agg(DISTINCT a.privilege_type, ', ' ORDER BY a.privilege_type) AS privileges
FROM pg_catalog.pg_class AS c
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
LEFT JOIN pg_catalog.pg_roles AS g ON g.oid = a.grantee
INNER JOIN pg_catalog.pg_class AS root ON root.oid = pg_catalog.pg_partition_root(c.oid)
WHERE c.relispartition AND root.relrowsecurity AND c.relkind IN ('r', 'p') AND a.grantee <> c.relowner
GROUP BY 1, 2
ORDER BY 1, 2
