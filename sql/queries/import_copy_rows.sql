-- Stages rows as they come out of the file.
COPY pg_temp.import_rows (
  line,
  row_hash,
  deal_key,
  company,
  investor,
  email,
  deal,
  transaction_date,
  amount,
  transaction_type,
  status,
  currency,
  units,
  unit_price,
  reason,
  original
)
FROM STDIN
