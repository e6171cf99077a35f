-- How many rows that a run has copied were changed by others since it began?
SELECT
  a.entity_type,
  count(DISTINCT a.entity_id)
FROM public.audit_logs AS a
WHERE
  a.audit_id > %(mark)s
  AND a.source = 'trigger'
  AND a.entity_type IN ('companies_clean', 'deals_clean', 'investors_clean', 'transactions_clean')
  AND a.reason IS DISTINCT FROM %(reason)s
  AND EXISTS (
    SELECT FROM equitie_private.legacy_ids AS m
    WHERE
      m.run_id = %(run_id)s
      AND m.outcome = 'inserted'
      AND m.new_id = a.entity_id::bigint
      AND CASE m.kind
        WHEN 'company' THEN 'companies_clean'
        WHEN 'deal' THEN 'deals_clean'
        WHEN 'investor' THEN 'investors_clean'
        ELSE 'transactions_clean'
      END = a.entity_type
  )
GROUP BY a.entity_type
ORDER BY a.entity_type
