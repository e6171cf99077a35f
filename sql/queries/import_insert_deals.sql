-- Makes the deals that do not exist yet. Money went into them, so they are active.
INSERT INTO public.deals_clean (
  deal_code,
  deal_name,
  deal_status,
  underlying_company_id,
  deal_date,
  deal_currency
)
SELECT
  deal.deal_key,
  deal.deal_name,
  'active',
  company.company_id,
  deal.deal_date,
  deal.deal_currency
FROM pg_temp.import_deals AS deal
JOIN public.companies_clean AS company ON company.company_name = deal.company
WHERE deal.deal_id IS NULL
  AND deal.problem IS NULL
  AND EXISTS (
    SELECT
    FROM pg_temp.import_pending AS pending
    WHERE pending.deal_key = deal.deal_key
  )
ON CONFLICT (deal_code) DO NOTHING
