-- How many of the new transactions are older than the retention, so that the next maintenance run retires them?
SELECT count(*)
FROM pg_temp.import_transactions AS made
WHERE made.transaction_date < equitie_private.retention_start('public.transactions_clean')
