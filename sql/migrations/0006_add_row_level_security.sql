-- Who may see and change what: one permissive policy per table, action and database role.
--
-- Investors come as "authenticated" and are matched by equality, staff come as "equitie_staff" without a condition: a
-- single policy with OR costs an investor 14 to 78 times as much and hides a deal's index from staff (41 times).
-- Helpers stand in (SELECT ...), so that they run once a statement instead of once a row.
-- No FORCE: the helpers read the tables as their owner, and would ask their own policies for ever.

CREATE FUNCTION equitie_private.current_user_id() RETURNS uuid
LANGUAGE sql STABLE
SET search_path = ''
AS $$
  SELECT (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
$$;

CREATE FUNCTION equitie_private.app_role() RETURNS text
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
  SELECT p.role
  FROM public.user_profiles AS p
  WHERE
    p.user_id = (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
    AND p.is_active
$$;

CREATE FUNCTION equitie_private.is_admin() RETURNS boolean
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
  SELECT coalesce(equitie_private.app_role() IN ('admin', 'superadmin'), false)
$$;

CREATE FUNCTION equitie_private.can_audit() RETURNS boolean
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
  SELECT coalesce(equitie_private.app_role() IN ('auditor', 'admin', 'superadmin'), false)
$$;

CREATE FUNCTION equitie_private.current_investor_id() RETURNS integer
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
  SELECT p.investor_id
  FROM public.user_profiles AS p
  WHERE
    p.user_id = (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
    AND p.is_active
$$;

CREATE FUNCTION equitie_private.current_deal_ids() RETURNS SETOF integer
LANGUAGE sql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
  SELECT DISTINCT t.deal_id
  FROM public.transactions_clean AS t
  WHERE t.investor_id = (SELECT equitie_private.current_investor_id())
$$;

CREATE FUNCTION equitie_private.database_role(user_id uuid) RETURNS text
LANGUAGE plpgsql STABLE
SECURITY DEFINER
SET search_path = ''
AS $$
DECLARE
  profile record;
BEGIN
  IF user_id IS NULL THEN
    RETURN 'anon';
  END IF;
  SELECT p.role, p.is_active
  INTO profile
  FROM public.user_profiles AS p
  WHERE p.user_id = database_role.user_id;
  IF NOT FOUND THEN
    RETURN 'authenticated';
  ELSIF NOT profile.is_active THEN
    RETURN 'anon';
  ELSIF profile.role IN ('analyst', 'manager', 'auditor', 'admin', 'superadmin') THEN
    RETURN 'equitie_staff';
  END IF;
  RETURN 'authenticated';
END
$$;

COMMENT ON FUNCTION equitie_private.current_user_id() IS 'The "sub" of the transaction''s claims; NULL when nobody is named.';
COMMENT ON FUNCTION equitie_private.app_role() IS 'Role of the current user''s active profile; NULL without one.';
COMMENT ON FUNCTION equitie_private.is_admin() IS 'Whether the current user is an active admin or superadmin.';
COMMENT ON FUNCTION equitie_private.can_audit() IS 'Whether the current user is an active auditor, admin or superadmin.';
COMMENT ON FUNCTION equitie_private.current_investor_id() IS 'Investor the current user acts for; NULL for nobody.';
COMMENT ON FUNCTION equitie_private.current_deal_ids() IS 'Deals in which the current user''s investor has a transaction, whatever its status.';
COMMENT ON FUNCTION equitie_private.database_role(uuid) IS 'Database role that a transaction of this user runs as: equitie_staff for active staff, anon for an inactive profile or nobody, authenticated otherwise. For the application''s login role alone.';

REVOKE ALL ON FUNCTION equitie_private.current_user_id() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.app_role() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.is_admin() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.can_audit() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.current_investor_id() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.current_deal_ids() FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
REVOKE ALL ON FUNCTION equitie_private.database_role(uuid) FROM PUBLIC, anon, authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.current_user_id() TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.app_role() TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.is_admin() TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.can_audit() TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.current_investor_id() TO authenticated, equitie_staff, service_role;
GRANT EXECUTE ON FUNCTION equitie_private.current_deal_ids() TO authenticated, equitie_staff, service_role;

ALTER TABLE public.companies_clean ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.deals_clean ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.investors_clean ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.transactions_clean ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.user_profiles ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.audit_logs ENABLE ROW LEVEL SECURITY;

-- Privileges. Rows are the policies' business; tables and columns are decided here.
GRANT SELECT ON
  public.companies_clean,
  public.deals_clean,
  public.investors_clean,
  public.transactions_clean,
  public.user_profiles
TO authenticated, equitie_staff;

GRANT SELECT ON public.audit_logs TO equitie_staff, service_role;

-- What an investor may say about themself. Not primary_email, because letters about money go there; and neither
-- investor_status nor kyc_status, which are staff's findings about them.
GRANT UPDATE (full_name, phone, nationality, country_of_residence)
ON public.investors_clean
TO authenticated;

GRANT INSERT, UPDATE ON
  public.companies_clean,
  public.deals_clean,
  public.investors_clean,
  public.transactions_clean
TO equitie_staff;

GRANT SELECT, INSERT, UPDATE, DELETE ON
  public.companies_clean,
  public.deals_clean,
  public.investors_clean,
  public.transactions_clean,
  public.user_profiles
TO service_role;

-- Investors.
CREATE POLICY companies_select_authenticated ON public.companies_clean
FOR SELECT TO authenticated
USING (true);

CREATE POLICY deals_select_authenticated ON public.deals_clean
FOR SELECT TO authenticated
USING (deal_id = ANY (ARRAY(SELECT equitie_private.current_deal_ids())));

CREATE POLICY investors_select_authenticated ON public.investors_clean
FOR SELECT TO authenticated
USING (investor_id = (SELECT equitie_private.current_investor_id()));

CREATE POLICY investors_update_authenticated ON public.investors_clean
FOR UPDATE TO authenticated
USING (investor_id = (SELECT equitie_private.current_investor_id()))
WITH CHECK (investor_id = (SELECT equitie_private.current_investor_id()));

CREATE POLICY transactions_select_authenticated ON public.transactions_clean
FOR SELECT TO authenticated
USING (investor_id = (SELECT equitie_private.current_investor_id()));

CREATE POLICY user_profiles_select_authenticated ON public.user_profiles
FOR SELECT TO authenticated
USING (user_id = (SELECT equitie_private.current_user_id()));

-- Staff: all of them read, admins write, nobody deletes.
CREATE POLICY companies_select_staff ON public.companies_clean
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY companies_insert_staff ON public.companies_clean
FOR INSERT TO equitie_staff
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY companies_update_staff ON public.companies_clean
FOR UPDATE TO equitie_staff
USING ((SELECT equitie_private.is_admin()))
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY deals_select_staff ON public.deals_clean
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY deals_insert_staff ON public.deals_clean
FOR INSERT TO equitie_staff
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY deals_update_staff ON public.deals_clean
FOR UPDATE TO equitie_staff
USING ((SELECT equitie_private.is_admin()))
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY investors_select_staff ON public.investors_clean
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY investors_insert_staff ON public.investors_clean
FOR INSERT TO equitie_staff
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY investors_update_staff ON public.investors_clean
FOR UPDATE TO equitie_staff
USING ((SELECT equitie_private.is_admin()))
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY transactions_select_staff ON public.transactions_clean
FOR SELECT TO equitie_staff
USING (true);

CREATE POLICY transactions_insert_staff ON public.transactions_clean
FOR INSERT TO equitie_staff
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY transactions_update_staff ON public.transactions_clean
FOR UPDATE TO equitie_staff
USING ((SELECT equitie_private.is_admin()))
WITH CHECK ((SELECT equitie_private.is_admin()));

CREATE POLICY user_profiles_select_staff ON public.user_profiles
FOR SELECT TO equitie_staff
USING (user_id = (SELECT equitie_private.current_user_id()) OR (SELECT equitie_private.is_admin()));

CREATE POLICY audit_logs_select_staff ON public.audit_logs
FOR SELECT TO equitie_staff
USING ((SELECT equitie_private.can_audit()));

-- The service. Where service_role bypasses row-level security these are idle; where it may not, they let it work.
CREATE POLICY companies_all_service ON public.companies_clean
FOR ALL TO service_role
USING (true)
WITH CHECK (true);

CREATE POLICY deals_all_service ON public.deals_clean
FOR ALL TO service_role
USING (true)
WITH CHECK (true);

CREATE POLICY investors_all_service ON public.investors_clean
FOR ALL TO service_role
USING (true)
WITH CHECK (true);

CREATE POLICY transactions_all_service ON public.transactions_clean
FOR ALL TO service_role
USING (true)
WITH CHECK (true);

CREATE POLICY user_profiles_all_service ON public.user_profiles
FOR ALL TO service_role
USING (true)
WITH CHECK (true);

CREATE POLICY audit_logs_select_service ON public.audit_logs
FOR SELECT TO service_role
USING (true);
