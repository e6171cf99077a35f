-- Where do transactions stand whose ids do not say so?
SELECT
  s.transaction_id,
  s.transaction_date
FROM equitie_private.stray_transactions AS s
WHERE s.transaction_id = ANY (%s::bigint[])
