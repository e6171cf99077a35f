-- Makes the transactions, and remembers which row became which, so that no later import brings it in again; how many
-- rows are remembered, what amount came into being? The joined columns are what import_create_transactions made unique.
WITH inserted AS (
  INSERT INTO public.transactions_clean (
    deal_id,
    investor_id,
    transaction_date,
    transaction_type,
    status,
    amount,
    currency,
    units,
    unit_price
  )
  SELECT
    made.deal_id,
    made.investor_id,
    made.transaction_date,
    made.transaction_type,
    made.status,
    made.amount,
    made.currency,
    made.units,
    made.unit_price
  FROM pg_temp.import_transactions AS made
  ORDER BY made.transaction_date
  RETURNING
    transaction_id,
    deal_id,
    investor_id,
    transaction_date,
    transaction_type,
    amount,
    currency,
    units,
    unit_price
),
remembered AS (
  INSERT INTO equitie_private.imported_rows (row_hash, transaction_id, run_id)
  SELECT
    made.row_hash,
    inserted.transaction_id,
    %(run_id)s
  FROM inserted
  JOIN pg_temp.import_transactions AS made
    ON made.deal_id = inserted.deal_id
    AND made.investor_id = inserted.investor_id
    AND made.transaction_date = inserted.transaction_date
    AND made.amount = inserted.amount
    AND made.transaction_type = inserted.transaction_type
    AND made.currency = inserted.currency
    AND made.units IS NOT DISTINCT FROM inserted.units
    AND made.unit_price IS NOT DISTINCT FROM inserted.unit_price
  RETURNING row_hash
)
SELECT
  (SELECT count(*) FROM remembered),
  (SELECT coalesce(sum(inserted.amount), 0)::text FROM inserted)
