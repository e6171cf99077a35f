-- Which transactions stand on these days under these ids? The list of days is redundant, and lets the planner leave out
-- all other months.
SELECT
  t.transaction_id,
  t.deal_id,
  t.investor_id,
  t.transaction_date,
  t.transaction_type,
  t.status,
  t.units,
  t.unit_price,
  t.gross_capital,
  t.net_capital,
  t.amount,
  t.currency,
  t.admin_fee,
  t.management_fee_percent,
  t.performance_fee_percent,
  t.structuring_fee_percent,
  t.premium_fee_percent,
  t.parent_transaction_id,
  t.created_at,
  t.updated_at
FROM unnest(%(ids)s::bigint[], %(days)s::date[]) AS wanted (transaction_id, transaction_date)
INNER JOIN public.transactions_clean AS t
  ON t.transaction_id = wanted.transaction_id
  AND t.transaction_date = wanted.transaction_date
WHERE t.transaction_date = ANY (%(distinct_days)s::date[])
