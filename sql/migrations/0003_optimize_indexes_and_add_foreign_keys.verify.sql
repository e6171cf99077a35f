-- Indexes the platform names are there and valid, and foreign keys are validated.
SELECT format('The index public.%s is missing or invalid.', wanted.name)
FROM unnest(ARRAY[
  'idx_transactions_investor_date', 'idx_transactions_deal_type', 'idx_transactions_type_date',
  'idx_transactions_active', 'idx_transactions_date_brin', 'idx_transactions_date'
]) AS wanted (name)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_index AS i
  WHERE i.indexrelid = to_regclass('public.' || wanted.name) AND i.indisvalid
);

SELECT format('The foreign key %s of %s is missing or not validated.', wanted.name, wanted.of_table)
FROM (
  VALUES
    ('fk_transactions_deal', 'public.transactions_clean'),
    ('fk_transactions_investor', 'public.transactions_clean'),
    ('fk_deals_underlying_company', 'public.deals_clean'),
    ('fk_deals_partner_company', 'public.deals_clean'),
    ('fk_deals_holding_entity', 'public.deals_clean')
) AS wanted (name, of_table)
WHERE NOT EXISTS (
  SELECT FROM pg_catalog.pg_constraint AS c
  WHERE c.conname = wanted.name AND c.conrelid = to_regclass(wanted.of_table) AND c.contype = 'f' AND c.convalidated
);
