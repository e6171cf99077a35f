-- Which indexes and owned sequences of a table have a name that the backup schema has already, and what are they called there?
WITH parts AS (
  SELECT 'INDEX' AS kind, c.oid, c.relname
  FROM pg_catalog.pg_index AS i
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid
  WHERE i.indrelid = %(table)s::oid
  UNION ALL
  SELECT 'SEQUENCE', c.oid, c.relname
  FROM pg_catalog.pg_depend AS d
  INNER JOIN pg_catalog.pg_class AS c ON c.oid = d.objid AND c.relkind = 'S'
  WHERE
    d.refobjid = %(table)s::oid
    AND d.classid = 'pg_catalog.pg_class'::regclass
    AND d.refclassid = 'pg_catalog.pg_class'::regclass
    AND d.deptype IN ('a', 'i')
)
SELECT
  p.kind,
  p.relname::text AS old,
  pg_catalog.left(%(prefix)s || p.relname, 63) AS wanted
FROM parts AS p
WHERE EXISTS (
  SELECT FROM pg_catalog.pg_class AS t
  WHERE t.relname = p.relname AND t.relnamespace = pg_catalog.to_regnamespace(%(backup)s)
)
ORDER BY p.kind, p.relname
