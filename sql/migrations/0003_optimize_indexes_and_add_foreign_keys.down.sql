-- Takes the foreign keys and indexes away again. The two duplicate indexes that went with them stay gone.

-- squawk-ignore-file require-concurrent-index-deletion
-- Nobody uses a table that is being taken back this far.

ALTER TABLE public.user_profiles DROP CONSTRAINT fk_user_profiles_company;
ALTER TABLE public.user_profiles DROP CONSTRAINT fk_user_profiles_investor;
ALTER TABLE public.deals_clean DROP CONSTRAINT fk_deals_holding_entity;
ALTER TABLE public.deals_clean DROP CONSTRAINT fk_deals_partner_company;
ALTER TABLE public.deals_clean DROP CONSTRAINT fk_deals_underlying_company;
ALTER TABLE public.transactions_clean DROP CONSTRAINT fk_transactions_investor;
ALTER TABLE public.transactions_clean DROP CONSTRAINT fk_transactions_deal;

DROP INDEX public.idx_transactions_investor_date;
DROP INDEX public.idx_transactions_deal_type;
DROP INDEX public.idx_transactions_type_date;
DROP INDEX public.idx_transactions_active;
DROP INDEX public.idx_transactions_date_brin;
DROP INDEX public.idx_transactions_date;
DROP INDEX public.idx_transactions_parent;
DROP INDEX public.idx_deals_underlying_company;
DROP INDEX public.idx_deals_partner_company;
DROP INDEX public.idx_deals_holding_entity;
DROP INDEX public.idx_user_profiles_investor;
DROP INDEX public.idx_user_profiles_company;
