-- The retired partitions of a table that still stand in equitie_part.
SELECT
  r.retired_id,
  r.partition_name,
  r.table_name,
  r.state,
  r.detached_at,
  r.row_count,
  r.archive_file,
  equitie_private.holds_on(r.parent, format('equitie_part.%%I', r.table_name)::regclass, r.from_key, r.to_key)
FROM equitie_private.retired_partitions AS r
WHERE
  r.parent = %(parent)s
  AND r.state IN ('detached', 'settled', 'archived')
  AND to_regclass(format('equitie_part.%%I', r.table_name)) IS NOT NULL
ORDER BY r.from_key
