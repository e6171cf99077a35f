-- Policies are in force, and nobody reads the materialized view around them.
SELECT format('Row-level security of public.%s is off.', wanted.name)
FROM unnest(ARRAY['query_stats', 'query_metrics', 'system_metrics', 'performance_alerts']) AS wanted (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_class AS c
  WHERE c.oid = to_regclass('public.' || wanted.name) AND c.relrowsecurity
);

SELECT format('%s may read equitie_private.query_stats_hourly directly: revoke it.', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END)
FROM pg_catalog.pg_class AS c
CROSS JOIN LATERAL aclexplode(c.relacl) AS a
WHERE
  c.oid = to_regclass('equitie_private.query_stats_hourly')
  AND a.grantee <> c.relowner
GROUP BY a.grantee;
