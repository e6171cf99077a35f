-- Policies are in force, and anon has nothing.
SELECT format('Row-level security of public.%s is off.', wanted.name)
FROM unnest(ARRAY[
  'companies_clean', 'deals_clean', 'investors_clean', 'transactions_clean', 'user_profiles', 'audit_logs'
]) AS wanted (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_class AS c
  WHERE c.oid = to_regclass('public.' || wanted.name) AND c.relrowsecurity
);

SELECT format('%s holds %s on %s: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type, c.oid::regclass)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE
  c.oid IN (
    to_regclass('public.companies_clean'), to_regclass('public.deals_clean'), to_regclass('public.investors_clean'),
    to_regclass('public.transactions_clean'), to_regclass('public.user_profiles'), to_regclass('public.audit_logs')
  )
  AND a.grantee IN (0, 'anon'::regrole);

SELECT format('%s may change public.audit_logs: revoke %s.', a.grantee::regrole, a.privilege_type)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE
  c.oid = to_regclass('public.audit_logs')
  AND a.grantee <> c.relowner
  AND a.grantee <> 0
  AND a.privilege_type <> 'SELECT';

SELECT format('The table %s has the permissive policy %I that this release does not: it can only widen what is seen.', p.polrelid::regclass, p.polname)
FROM pg_catalog.pg_policy AS p
WHERE
  p.polrelid IN (
    to_regclass('public.companies_clean'), to_regclass('public.deals_clean'), to_regclass('public.investors_clean'),
    to_regclass('public.transactions_clean'), to_regclass('public.user_profiles'), to_regclass('public.audit_logs')
  )
  AND p.polpermissive
  AND p.polname !~ '^(companies|deals|investors|transactions|user_profiles|audit_logs)_(select|insert|update|all)_(authenticated|staff|service)$';
