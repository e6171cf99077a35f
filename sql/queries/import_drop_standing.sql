-- Takes out the pending rows whose transaction stands already, however it came there; how many rows, what amount?
-- The bounds are redundant and let the planner leave out all other months.
WITH standing AS (
  DELETE FROM pg_temp.import_pending AS pending
  USING
    pg_temp.import_deals AS deal,
    pg_temp.import_investors AS investor
  WHERE deal.deal_key = pending.deal_key
    AND investor.investor = pending.investor
    AND investor.email = pending.email
    AND EXISTS (
      SELECT
      FROM public.transactions_clean AS standing
      WHERE standing.deal_id = deal.deal_id
        AND standing.investor_id = investor.investor_id
        AND standing.transaction_date = pending.transaction_date
        AND standing.transaction_date BETWEEN %(first)s AND %(last)s
        AND standing.amount = pending.amount
        AND standing.transaction_type = pending.transaction_type
        AND standing.currency = pending.currency
        AND standing.units IS NOT DISTINCT FROM pending.units
        AND standing.unit_price IS NOT DISTINCT FROM pending.unit_price
    )
  RETURNING pending.copies, pending.amount
)
SELECT
  coalesce(sum(standing.copies), 0)::bigint,
  coalesce(sum(standing.copies * standing.amount), 0)::text
FROM standing
