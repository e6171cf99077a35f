-- Which ids did the new deals get?
UPDATE pg_temp.import_deals AS mentioned
SET deal_id = deal.deal_id
FROM public.deals_clean AS deal
WHERE mentioned.deal_id IS NULL
  AND deal.deal_code = mentioned.deal_key
