-- How many pending rows lack their deal or investor after those were made? Only somebody else's writes at the same
-- moment can bring that about.
SELECT count(*)
FROM pg_temp.import_pending AS pending
LEFT JOIN pg_temp.import_deals AS deal USING (deal_key)
LEFT JOIN pg_temp.import_investors AS investor USING (investor, email)
WHERE deal.deal_id IS NULL
  OR investor.investor_id IS NULL
