-- Which months do the pending rows fall into?
SELECT DISTINCT date_trunc('month', pending.transaction_date)::date AS first_day
FROM pg_temp.import_pending AS pending
ORDER BY first_day
