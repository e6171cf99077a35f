-- Partitions are out of everybody's reach: row-level security does not apply to one that is read directly.
SELECT 'public.transactions_clean is not a partitioned table with a default partition.'
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_partitioned_table AS p
  WHERE p.partrelid = to_regclass('public.transactions_clean') AND p.partdefid <> 0
);

SELECT format('%s holds a privilege on the schema equitie_part: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END)
FROM pg_catalog.pg_namespace AS n
CROSS JOIN LATERAL aclexplode(n.nspacl) AS a
WHERE n.nspname = 'equitie_part' AND a.grantee <> n.nspowner
GROUP BY a.grantee;

SELECT format('%s holds %s on the partition %s: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type, c.oid::regclass)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE c.relnamespace = 'equitie_part'::regnamespace AND a.grantee <> c.relowner;

SELECT format('The partition %s stands outside equitie_part, where its rows can be granted around the policies.', i.inhrelid::regclass)
FROM pg_catalog.pg_inherits AS i
INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.inhrelid
WHERE
  i.inhparent IN (to_regclass('public.transactions_clean'), to_regclass('public.audit_logs'))
  AND c.relnamespace <> 'equitie_part'::regnamespace;
