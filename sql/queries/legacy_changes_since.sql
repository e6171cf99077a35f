-- How many rows of the clean tables, and of what goes on beside them, were changed since the switch?
SELECT
  a.entity_type,
  count(DISTINCT a.entity_id)
FROM public.audit_logs AS a
WHERE
  a.audit_id > %(mark)s
  AND a.source = 'trigger'
  AND a.entity_type IN (
    'companies_clean', 'deals_clean', 'investors_clean', 'transactions_clean',
    'legacy_company_details', 'legacy_deal_details', 'legacy_investor_details', 'legacy_transaction_details'
  )
  AND a.reason IS DISTINCT FROM %(reason)s
  AND %(run_id)s > 0
GROUP BY a.entity_type
ORDER BY a.entity_type
