-- Which deal is meant by each deal key of the file?
-- A deal the file names is an existing deal_code, else an existing deal of that company and name, else one that an
-- earlier import made for the same company and name (whatever it is called by now), else new. A deal it does not name
-- is the one an earlier import made for the same company, date and amount, else new.
CREATE TEMPORARY TABLE pg_temp.import_deals
ON COMMIT DROP
AS
WITH mentioned AS (
  SELECT
    pending.deal_key,
    min(pending.company) AS company,
    min(pending.deal) AS deal,
    min(pending.transaction_date) AS deal_date,
    min(pending.amount) AS amount,
    CASE WHEN min(pending.currency) = max(pending.currency) THEN min(pending.currency) END AS deal_currency
  FROM pg_temp.import_pending AS pending
  GROUP BY pending.deal_key
),
named AS (
  SELECT
    company.company_name,
    deal.deal_name,
    min(deal.deal_id) AS deal_id,
    count(*) AS deals
  FROM public.deals_clean AS deal
  JOIN public.companies_clean AS company ON company.company_id = deal.underlying_company_id
  GROUP BY company.company_name, deal.deal_name
)
SELECT
  mentioned.deal_key,
  mentioned.company,
  mentioned.deal_date,
  mentioned.deal_currency,
  coalesce(
    mentioned.deal,
    mentioned.company || ', ' || to_char(mentioned.deal_date, 'YYYY-MM-DD') || ', ' || mentioned.amount
  ) AS deal_name,
  CASE
    WHEN coded.deal_id IS NOT NULL THEN coded.deal_id
    WHEN named.deals = 1 THEN named.deal_id
    ELSE keyed.deal_id
  END AS deal_id,
  CASE
    WHEN coded.deal_id IS NOT NULL AND owner.company_name <> mentioned.company THEN 'deal belongs to another company'
    WHEN coded.deal_id IS NULL AND named.deals > 1 THEN 'deal is ambiguous'
  END AS problem
FROM mentioned
LEFT JOIN public.deals_clean AS coded ON coded.deal_code = mentioned.deal
LEFT JOIN public.companies_clean AS owner ON owner.company_id = coded.underlying_company_id
LEFT JOIN named ON named.company_name = mentioned.company AND named.deal_name = mentioned.deal
LEFT JOIN public.deals_clean AS keyed ON keyed.deal_code = mentioned.deal_key
