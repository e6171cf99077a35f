-- From and to which day do the partitions of the transactions reach? An open end is the far past or future.
SELECT
  CASE WHEN isfinite(b.from_key) THEN b.from_key::date ELSE '0001-01-01'::date END AS first,
  CASE WHEN isfinite(b.to_key) THEN b.to_key::date ELSE '9999-12-31'::date END AS last
FROM equitie_private.month_partition_bounds('public.transactions_clean'::regclass) AS b
WHERE NOT b.is_default
ORDER BY b.from_key
