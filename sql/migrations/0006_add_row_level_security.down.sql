-- Takes policies and privileges away; then the database roles may do nothing at all, and only the owner sees rows.

DROP POLICY companies_select_authenticated ON public.companies_clean;
DROP POLICY deals_select_authenticated ON public.deals_clean;
DROP POLICY investors_select_authenticated ON public.investors_clean;
DROP POLICY investors_update_authenticated ON public.investors_clean;
DROP POLICY transactions_select_authenticated ON public.transactions_clean;
DROP POLICY user_profiles_select_authenticated ON public.user_profiles;
DROP POLICY companies_select_staff ON public.companies_clean;
DROP POLICY companies_insert_staff ON public.companies_clean;
DROP POLICY companies_update_staff ON public.companies_clean;
DROP POLICY deals_select_staff ON public.deals_clean;
DROP POLICY deals_insert_staff ON public.deals_clean;
DROP POLICY deals_update_staff ON public.deals_clean;
DROP POLICY investors_select_staff ON public.investors_clean;
DROP POLICY investors_insert_staff ON public.investors_clean;
DROP POLICY investors_update_staff ON public.investors_clean;
DROP POLICY transactions_select_staff ON public.transactions_clean;
DROP POLICY transactions_insert_staff ON public.transactions_clean;
DROP POLICY transactions_update_staff ON public.transactions_clean;
DROP POLICY user_profiles_select_staff ON public.user_profiles;
DROP POLICY audit_logs_select_staff ON public.audit_logs;
DROP POLICY companies_all_service ON public.companies_clean;
DROP POLICY deals_all_service ON public.deals_clean;
DROP POLICY investors_all_service ON public.investors_clean;
DROP POLICY transactions_all_service ON public.transactions_clean;
DROP POLICY user_profiles_all_service ON public.user_profiles;
DROP POLICY audit_logs_select_service ON public.audit_logs;

ALTER TABLE public.companies_clean DISABLE ROW LEVEL SECURITY;
ALTER TABLE public.deals_clean DISABLE ROW LEVEL SECURITY;
ALTER TABLE public.investors_clean DISABLE ROW LEVEL SECURITY;
ALTER TABLE public.transactions_clean DISABLE ROW LEVEL SECURITY;
ALTER TABLE public.user_profiles DISABLE ROW LEVEL SECURITY;
ALTER TABLE public.audit_logs DISABLE ROW LEVEL SECURITY;

REVOKE ALL ON
  public.companies_clean,
  public.deals_clean,
  public.investors_clean,
  public.transactions_clean,
  public.user_profiles,
  public.audit_logs
FROM authenticated, equitie_staff, service_role;

DROP FUNCTION equitie_private.database_role(uuid);
DROP FUNCTION equitie_private.current_deal_ids();
DROP FUNCTION equitie_private.current_investor_id();
DROP FUNCTION equitie_private.can_audit();
DROP FUNCTION equitie_private.is_admin();
DROP FUNCTION equitie_private.app_role();
DROP FUNCTION equitie_private.current_user_id();
