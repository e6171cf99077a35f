-- How many rows, and what amount, were rejected for which reason?
SELECT
  reject.reason,
  sum(reject.copies)::bigint,
  sum(reject.copies * reject.amount)::text
FROM pg_temp.import_rejects AS reject
GROUP BY reject.reason
