-- Makes the companies that the new deals need. Another session may be making one of them at this moment: then its row
-- is the one.
INSERT INTO public.companies_clean (company_name)
SELECT DISTINCT deal.company
FROM pg_temp.import_deals AS deal
WHERE deal.deal_id IS NULL
  AND deal.problem IS NULL
  AND EXISTS (
    SELECT
    FROM pg_temp.import_pending AS pending
    WHERE pending.deal_key = deal.deal_key
  )
ON CONFLICT (company_name) DO NOTHING
