-- Which transactions are to be made? Rows that differ only in how they name the deal or the investor, or in the
-- status, are one transaction, the first of them.
CREATE TEMPORARY TABLE pg_temp.import_transactions
ON COMMIT DROP
AS
SELECT DISTINCT ON (
  pending.transaction_date,
  deal.deal_id,
  investor.investor_id,
  pending.amount,
  pending.transaction_type,
  pending.currency,
  pending.units,
  pending.unit_price
)
  pending.row_hash,
  deal.deal_id,
  investor.investor_id,
  pending.transaction_date,
  pending.transaction_type,
  pending.status,
  pending.amount,
  pending.currency,
  pending.units,
  pending.unit_price
FROM pg_temp.import_pending AS pending
JOIN pg_temp.import_deals AS deal USING (deal_key)
JOIN pg_temp.import_investors AS investor USING (investor, email)
ORDER BY
  pending.transaction_date,
  deal.deal_id,
  investor.investor_id,
  pending.amount,
  pending.transaction_type,
  pending.currency,
  pending.units,
  pending.unit_price,
  pending.line
