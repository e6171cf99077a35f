-- Nobody can raise themself, anon and PUBLIC hold nothing of ours, and columns that decide about rights are closed.
SELECT format('public.user_profiles lacks the trigger %s, or has it switched off: people could change their own role.', wanted.name)
FROM unnest(ARRAY['refuse_own_profile_insert', 'refuse_own_profile_update', 'refuse_own_profile_delete']) AS wanted (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_trigger AS t
  WHERE t.tgrelid = to_regclass('public.user_profiles') AND t.tgname = wanted.name AND t.tgenabled = 'A'
);

SELECT format('%s holds %s on %s: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type, c.oid::regclass)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE
  c.relnamespace IN ('equitie_private'::regnamespace, 'equitie_part'::regnamespace)
  AND a.grantee <> c.relowner
  AND (a.grantee IN (0, 'anon'::regrole) OR c.relnamespace = 'equitie_part'::regnamespace)
ORDER BY 1;

SELECT format('%s may execute %s: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, p.oid::regprocedure)
FROM pg_catalog.pg_proc AS p
CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
WHERE
  p.pronamespace = 'equitie_private'::regnamespace
  AND a.grantee IN (0, 'anon'::regrole)
ORDER BY 1;

SELECT format('%s holds %s on the sequence %s: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type, s.oid::regclass)
FROM pg_catalog.pg_depend AS d
INNER JOIN pg_catalog.pg_class AS s ON s.oid = d.objid AND s.relkind = 'S'
CROSS JOIN LATERAL aclexplode(s.relacl) AS a
WHERE
  d.classid = 'pg_catalog.pg_class'::regclass
  AND d.refobjid IN (
    to_regclass('public.companies_clean'), to_regclass('public.deals_clean'), to_regclass('public.investors_clean'),
    to_regclass('public.transactions_clean'), to_regclass('public.audit_logs'), to_regclass('public.query_metrics'),
    to_regclass('public.system_metrics'), to_regclass('public.performance_alerts')
  )
  AND (a.grantee = 0 OR a.grantee IN ('anon'::regrole, 'authenticated'::regrole, 'equitie_staff'::regrole))
ORDER BY 1;

SELECT format('%s may %s the column %I of %s: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type, c.attname, c.attrelid::regclass)
FROM pg_catalog.pg_attribute AS c
CROSS JOIN LATERAL aclexplode(c.attacl) AS a
WHERE
  c.attrelid IN (
    to_regclass('public.companies_clean'), to_regclass('public.deals_clean'), to_regclass('public.investors_clean'),
    to_regclass('public.transactions_clean'), to_regclass('public.user_profiles'), to_regclass('public.audit_logs')
  )
  AND (
    a.grantee IN (0, 'anon'::regrole)
    OR (
      a.grantee = 'authenticated'::regrole
      AND NOT (
        c.attrelid = to_regclass('public.investors_clean')
        AND a.privilege_type = 'UPDATE'
        AND c.attname IN ('full_name', 'phone', 'nationality', 'country_of_residence')
      )
    )
  )
ORDER BY 1;

SELECT format('%s may %s every column of %s, keys included: revoke it, and grant the columns.', a.grantee::regrole, a.privilege_type, c.oid::regclass)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE
  c.oid IN (
    to_regclass('public.companies_clean'), to_regclass('public.deals_clean'), to_regclass('public.investors_clean'),
    to_regclass('public.transactions_clean'), to_regclass('public.user_profiles')
  )
  AND a.grantee IN ('authenticated'::regrole, 'equitie_staff'::regrole)
  AND a.privilege_type <> 'SELECT'
ORDER BY 1;
