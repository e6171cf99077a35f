-- Every write to transactions is noted by month, and the kept totals are out of users' reach.
SELECT format('%s lacks the trigger %s, or has it switched off: run SELECT equitie_private.watch_transaction_months(%L).', m.relid, g.name, m.relid)
FROM pg_partition_tree('public.transactions_clean') AS m
CROSS JOIN unnest(ARRAY['month_insert', 'month_update', 'month_delete', 'month_truncate']) AS g (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_trigger AS x
  WHERE x.tgrelid = m.relid AND x.tgname = g.name AND x.tgenabled = 'A'
)
ORDER BY 1;

SELECT format('Row-level security of equitie_private.%s is off.', wanted.name)
FROM unnest(ARRAY['transaction_months', 'transaction_month_totals', 'transaction_month_changes']) AS wanted (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_class AS c
  WHERE c.oid = to_regclass('equitie_private.' || wanted.name) AND c.relrowsecurity
);

SELECT format('%s holds %s on %s, which holds totals of everybody: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type, c.oid::regclass)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE
  c.oid IN (
    to_regclass('equitie_private.transaction_months'), to_regclass('equitie_private.transaction_month_totals'),
    to_regclass('equitie_private.transaction_month_changes')
  )
  AND a.grantee <> c.relowner
  AND NOT (a.privilege_type = 'SELECT' AND a.grantee IN ('equitie_staff'::regrole, 'service_role'::regrole));
