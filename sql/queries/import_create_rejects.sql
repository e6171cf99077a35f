-- Which pending rows name a deal or an investor that cannot be told?
CREATE TEMPORARY TABLE pg_temp.import_rejects
ON COMMIT DROP
AS
SELECT
  pending.row_hash,
  pending.copies,
  pending.amount,
  coalesce(deal.problem, investor.problem) AS reason
FROM pg_temp.import_pending AS pending
JOIN pg_temp.import_deals AS deal USING (deal_key)
LEFT JOIN pg_temp.import_investors AS investor USING (investor, email)
WHERE deal.problem IS NOT NULL
  OR investor.problem IS NOT NULL
