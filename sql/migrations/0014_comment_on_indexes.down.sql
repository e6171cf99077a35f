-- Takes the comments off those indexes again.

COMMENT ON INDEX public.idx_deals_underlying_company IS NULL;
COMMENT ON INDEX public.idx_deals_partner_company IS NULL;
COMMENT ON INDEX public.idx_deals_holding_entity IS NULL;
COMMENT ON INDEX public.idx_user_profiles_investor IS NULL;
COMMENT ON INDEX public.idx_user_profiles_company IS NULL;
COMMENT ON INDEX equitie_private.idx_query_stats_hourly IS NULL;
