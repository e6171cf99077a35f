-- The columns of a table, in order, and whether their type can be compared.
SELECT
  a.attname AS name,
  pg_catalog.format_type(a.atttypid, NULL) AS type,
  pg_catalog.format_type(a.atttypid, a.atttypmod) AS declared,
  t.typcategory::text AS category
FROM pg_catalog.pg_attribute AS a
INNER JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
WHERE
  a.attrelid = %(oid)s
  AND a.attnum > 0
  AND NOT a.attisdropped
ORDER BY a.attnum
