-- What the indexes are for that did not say so yet; every other index, table and column has a comment already.

COMMENT ON INDEX public.idx_deals_underlying_company IS 'A company''s deals; the foreign key looks here before a company goes.';
COMMENT ON INDEX public.idx_deals_partner_company IS 'Deals made together with a company; likewise for its foreign key.';
COMMENT ON INDEX public.idx_deals_holding_entity IS 'Deals a company holds the stake of; likewise for its foreign key.';
COMMENT ON INDEX public.idx_user_profiles_investor IS 'Logins that act for an investor; the foreign key looks here before an investor goes.';
COMMENT ON INDEX public.idx_user_profiles_company IS 'Logins that belong to a company; likewise for its foreign key.';
COMMENT ON INDEX equitie_private.idx_query_stats_hourly IS 'The hours of a report; unique, as refreshing without stopping readers demands.';
