-- The partitions of a table but its default one; infinite bounds are NULL.
SELECT
  b.partition::text,
  CASE WHEN isfinite(b.from_key) THEN b.from_key END,
  CASE WHEN isfinite(b.to_key) THEN b.to_key END,
  i.inhdetachpending,
  CASE
    WHEN NOT i.inhdetachpending AND b.to_key <= %(cutoff)s::date
    THEN equitie_private.holds_on(%(parent)s::text, b.partition, b.from_key, b.to_key)
    ELSE '{}'
  END
FROM equitie_private.month_partition_bounds(%(parent)s::text::regclass) AS b
INNER JOIN pg_catalog.pg_inherits AS i ON i.inhrelid = b.partition
WHERE NOT b.is_default
ORDER BY b.from_key
