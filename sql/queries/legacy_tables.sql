-- Which of the named tables are there, whose are they, what size do they have, and may they be moved?
SELECT
  n.nspname AS schema,
  c.relname AS name,
  c.oid AS oid,
  c.relkind::text AS relkind,
  pg_catalog.pg_total_relation_size(c.oid) AS bytes,
  pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::bigint AS blocks,
  pg_catalog.pg_has_role(c.relowner, 'USAGE') AS owned,
  pg_catalog.pg_get_userbyid(c.relowner) AS owner
FROM pg_catalog.pg_class AS c
INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE
  c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND (
    (n.nspname, c.relname) IN (SELECT * FROM unnest(%(schemas)s::text[], %(names)s::text[]))
    OR (n.nspname = 'public' AND c.relname LIKE '%%.%%')
  )
ORDER BY n.nspname, c.relname
