-- How many bytes do the clean tables take, with indexes and TOAST, and how much of it belongs to partitions without rows?
SELECT
  r.name,
  sum(pg_catalog.pg_total_relation_size(t.relid))::bigint AS bytes,
  (coalesce(sum(pg_catalog.pg_total_relation_size(t.relid)) FILTER (
    WHERE pg_catalog.pg_relation_size(t.relid) = 0 AND t.relid <> r.name::regclass
  ), 0))::bigint AS empty_bytes,
  count(*) FILTER (WHERE pg_catalog.pg_relation_size(t.relid) = 0 AND t.relid <> r.name::regclass) AS empty_partitions
FROM pg_catalog.unnest(%(names)s::text[]) AS r (name)
CROSS JOIN LATERAL (
  SELECT pt.relid::oid AS relid FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass(r.name)) AS pt
  UNION
  SELECT pg_catalog.to_regclass(r.name)::oid
) AS t
WHERE pg_catalog.to_regclass(r.name) IS NOT NULL
GROUP BY r.name
