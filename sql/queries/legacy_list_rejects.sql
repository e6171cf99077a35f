-- Which rows, or values of rows, were not taken over, from which table, and why?
SELECT
  coalesce(r.run_id, 0) AS run,
  s.source ->> 'schema' AS schema,
  s.source ->> 'name' AS "table",
  r.kind,
  r.legacy_id,
  r.outcome,
  r.reason,
  r.original
FROM equitie_private.legacy_rejects AS r
INNER JOIN equitie_private.legacy_runs AS u ON u.run_id = r.run_id
LEFT JOIN LATERAL jsonb_array_elements(u.sources) AS s (source) ON (s.source ->> 'number')::integer = r.source
WHERE r.run_id = %(run_id)s
ORDER BY r.reject_id
