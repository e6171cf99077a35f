-- Makes the investors nobody knows yet, notes their ids, and says how many those are. What they are and whether they
-- may log in is for staff to say. An e-mail that another session takes at this very moment stays unresolved.
WITH made AS (
  INSERT INTO public.investors_clean (full_name, primary_email)
  SELECT DISTINCT
    mentioned.investor,
    nullif(mentioned.new_email, '')
  FROM pg_temp.import_investors AS mentioned
  WHERE mentioned.investor_id IS NULL
    AND mentioned.problem IS NULL
  ON CONFLICT (primary_email) DO NOTHING
  RETURNING investor_id, full_name, primary_email
),
resolved AS (
  UPDATE pg_temp.import_investors AS mentioned
  SET investor_id = made.investor_id
  FROM made
  WHERE mentioned.investor_id IS NULL
    AND mentioned.problem IS NULL
    AND mentioned.investor = made.full_name
    AND mentioned.new_email = coalesce(made.primary_email, '')
)
SELECT count(*)
FROM made
