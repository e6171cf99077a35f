-- Which tables of equitie_part are neither partitions nor anything that maintenance has put there?
SELECT c.oid::regclass::text
FROM pg_catalog.pg_class AS c
WHERE
  c.relnamespace = 'equitie_part'::regnamespace
  AND c.relkind IN ('r', 'p')
  AND NOT c.relispartition
  AND NOT EXISTS (
    SELECT
    FROM equitie_private.retired_partitions AS r
    WHERE r.table_name = c.relname AND r.state IN ('detached', 'settled', 'archived')
  )
  AND NOT EXISTS (
    SELECT
    FROM equitie_private.partition_drains AS d
    WHERE c.relname = format('drained_%s', d.drain_id) OR c.relname LIKE format('drain\_%s\_%%', d.drain_id)
  )
ORDER BY 1
