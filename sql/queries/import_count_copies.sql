-- How many pending rows, and what amount, only repeat a transaction of this very file?
SELECT
  coalesce(sum(pending.copies - (made.row_hash IS NOT NULL)::int), 0)::bigint,
  coalesce(sum((pending.copies - (made.row_hash IS NOT NULL)::int) * pending.amount), 0)::text
FROM pg_temp.import_pending AS pending
LEFT JOIN pg_temp.import_transactions AS made USING (row_hash)
