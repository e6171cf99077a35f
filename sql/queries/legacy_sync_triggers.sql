-- The triggers that copied rows between the old tables, as statements that make them again.
SELECT
  t.tgrelid::oid AS oid,
  t.tgname AS name,
  t.tgenabled::text AS enabled,
  pg_catalog.pg_get_triggerdef(t.oid) AS definition,
  pg_catalog.obj_description(t.oid, 'pg_trigger') AS comment
FROM pg_catalog.pg_trigger AS t
INNER JOIN pg_catalog.pg_proc AS p ON p.oid = t.tgfoid
WHERE
  t.tgrelid = ANY (%(oids)s::oid[])
  AND NOT t.tgisinternal
  AND (p.proname = ANY (%(functions)s::text[]) OR t.tgname = ANY (%(functions)s::text[]))
ORDER BY t.tgrelid, t.tgname
