-- Which investor is meant by each name and e-mail of the file?
-- With an e-mail: the one who has it, if the name is the same, else nobody; a new one if nobody has it. Without: the
-- only one of that exact name, counting those whom this file's e-mails make; a new one if there is none.
-- "new_email" says with which e-mail a newcomer is made.
CREATE TEMPORARY TABLE pg_temp.import_investors
ON COMMIT DROP
AS
WITH mentioned AS (
  SELECT DISTINCT
    pending.investor,
    pending.email
  FROM pg_temp.import_pending AS pending
  JOIN pg_temp.import_deals AS deal USING (deal_key)
  WHERE deal.problem IS NULL
),
addressed AS (
  SELECT
    lower(investor.primary_email) AS email,
    min(investor.investor_id) AS investor_id,
    min(investor.full_name) AS full_name,
    count(*) AS investors
  FROM public.investors_clean AS investor
  WHERE investor.primary_email IS NOT NULL
  GROUP BY lower(investor.primary_email)
),
by_email AS (
  SELECT
    mentioned.investor,
    mentioned.email,
    addressed.investor_id,
    CASE
      WHEN addressed.investors > 1 THEN 'email belongs to several investors'
      WHEN addressed.full_name <> mentioned.investor THEN 'email belongs to another investor'
      WHEN addressed.investors IS NULL AND count(*) OVER (PARTITION BY mentioned.email) > 1
        THEN 'email stands with several names'
    END AS problem
  FROM mentioned
  LEFT JOIN addressed USING (email)
  WHERE mentioned.email <> ''
),
newcomers AS (
  SELECT
    by_email.investor,
    min(by_email.email) AS email,
    count(*) AS investors
  FROM by_email
  WHERE by_email.investor_id IS NULL
    AND by_email.problem IS NULL
  GROUP BY by_email.investor
),
homonyms AS (
  SELECT
    investor.full_name AS investor,
    min(investor.investor_id) AS investor_id,
    count(*) AS investors
  FROM public.investors_clean AS investor
  GROUP BY investor.full_name
),
by_name AS (
  SELECT
    mentioned.investor,
    mentioned.email,
    homonyms.investor_id,
    newcomers.email AS new_email,
    coalesce(homonyms.investors, 0) + coalesce(newcomers.investors, 0) AS candidates
  FROM mentioned
  LEFT JOIN homonyms USING (investor)
  LEFT JOIN newcomers USING (investor)
  WHERE mentioned.email = ''
)
SELECT
  by_email.investor,
  by_email.email,
  by_email.investor_id,
  by_email.email AS new_email,
  by_email.problem
FROM by_email
UNION ALL
SELECT
  by_name.investor,
  by_name.email,
  by_name.investor_id,
  coalesce(by_name.new_email, '') AS new_email,
  CASE WHEN by_name.candidates > 1 THEN 'investor is ambiguous' END AS problem
FROM by_name
