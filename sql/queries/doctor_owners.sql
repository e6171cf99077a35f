-- Who owns the library's schemas, tables and functions.
SELECT o.owner, min(o.name) AS example, count(*)
FROM (
  SELECT c.relowner::regrole::text AS owner, format('%%I.%%I', n.nspname, c.relname) AS name
  FROM pg_catalog.pg_class AS c
  INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE
    c.relkind IN ('r', 'p', 'v', 'm')
    AND (n.nspname IN ('equitie_private', 'equitie_part', 'equitie_migrations')
      OR format('%%I.%%I', n.nspname, c.relname) = ANY (%(ours)s))
  UNION ALL
  SELECT p.proowner::regrole::text, format('%%I.%%I()', n.nspname, p.proname)
  FROM pg_catalog.pg_proc AS p
  INNER JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
  WHERE n.nspname = 'equitie_private'
) AS o
GROUP BY o.owner
ORDER BY 3 DESC, 1
