"""What Supabase's database linter asks, and what it overlooks, as queries of our own: each returns what breaks a rule.

The linter looks at plain tables and skips partitioned ones, compares the text of policies with a few names, and knows
some schemas only. These look at every relation of ours, partitions included. Whatever serves an API is `public`.
"""

from __future__ import annotations

import attrs

SCHEMAS = ("public", "equitie_private", "equitie_part", "equitie_migrations")
OURS = str(SCHEMAS)
API_ROLES = "('anon', 'authenticated', 'equitie_staff')"
_READABLE = (
    "EXISTS (SELECT FROM pg_roles r WHERE r.rolname IN ('anon', 'authenticated', 'equitie_staff')"
    " AND (has_table_privilege(r.oid, c.oid, 'SELECT') OR has_any_column_privilege(r.oid, c.oid, 'SELECT')))"
)
_RELATION = "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
_INDEX = "pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_class c ON c.oid = i.indrelid"
_POLICY_TEXT = "concat_ws(' ', pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))"


@attrs.frozen
class Rule:
    """A rule and a way to break it.

    Attributes:
        query: Returns one column: what breaks it.
        breach: Statements after which it is broken.
    """

    query: str
    breach: str


RULES = {
    "a foreign key is led by an index, on partitions as well": Rule(
        f"SELECT k.conrelid::regclass || ' ' || k.conname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid"
        f" WHERE k.contype = 'f' AND c.relnamespace::regnamespace::text IN {OURS} AND NOT EXISTS ("
        "  SELECT FROM pg_index i WHERE i.indrelid = k.conrelid AND i.indisvalid AND i.indpred IS NULL"
        "  AND (i.indkey::smallint[])[0:cardinality(k.conkey) - 1] = k.conkey)",
        "CREATE TABLE public.t (a int PRIMARY KEY, b int REFERENCES public.t)",
    ),
    "a relation of the API does not show auth.users": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} WHERE n.nspname = 'public' AND c.relkind IN ('v', 'm') AND EXISTS ("
        "  SELECT FROM pg_rewrite w JOIN pg_depend d ON d.objid = w.oid AND d.classid = 'pg_rewrite'::regclass"
        "  WHERE w.ev_class = c.oid AND d.refobjid = to_regclass('auth.users'))",
        "CREATE TABLE IF NOT EXISTS auth.users (id uuid); CREATE VIEW public.t AS SELECT id FROM auth.users",
    ),
    "a policy asks who acts once a statement, not once a row": Rule(
        # Whatever function is called in it, ours or the platform's, stands directly behind a SELECT.
        "SELECT p.polrelid::regclass || ' ' || p.polname FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} AND regexp_replace({_POLICY_TEXT},"
        r" '\( ?SELECT [a-z_.]+\([^()]*\)', '', 'g') ~ '([a-z_]+\.[a-z_]+|current_setting|current_user) ?\('",
        "CREATE POLICY t ON public.companies_clean FOR DELETE TO authenticated USING (equitie_private.is_admin())",
    ),
    "a table has a primary key, partitions as well": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} WHERE n.nspname IN {OURS} AND c.relkind IN ('r', 'p')"
        " AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)",
        "CREATE TABLE equitie_private.t (a int)",
    ),
    "a role has one permissive policy for each action": Rule(
        "SELECT concat_ws(' ', p.polrelid::regclass, r.role::regrole, a.action) FROM pg_policy p"
        " CROSS JOIN LATERAL unnest(p.polroles) AS r (role)"
        " CROSS JOIN LATERAL regexp_split_to_table(replace(p.polcmd::text, '*', 'rawd'), '') AS a (action)"
        " WHERE p.polpermissive AND p.polrelid IN (SELECT c.oid FROM pg_class c"
        f"  WHERE c.relnamespace::regnamespace::text IN {OURS})"
        " GROUP BY p.polrelid, r.role, a.action HAVING count(*) > 1",
        "CREATE POLICY t ON public.transactions_clean FOR SELECT TO authenticated USING (false)",
    ),
    "a policy names its roles": Rule(
        "SELECT p.polrelid::regclass || ' ' || p.polname FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} AND 0 = ANY (p.polroles)",
        "CREATE POLICY t ON public.transactions_clean FOR DELETE USING (false)",
    ),
    "a policy is in force": Rule(
        "SELECT p.polrelid::regclass || ' ' || p.polname FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} AND NOT c.relrowsecurity",
        "ALTER TABLE public.transactions_clean DISABLE ROW LEVEL SECURITY",
    ),
    "a table without policies is open to nobody": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} WHERE n.nspname IN {OURS} AND c.relkind IN ('r', 'p')"
        " AND c.relrowsecurity AND NOT EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid)"
        " AND EXISTS (SELECT FROM aclexplode(c.relacl) AS a WHERE a.grantee <> c.relowner)",
        "GRANT SELECT ON equitie_private.idempotency_keys TO service_role",
    ),
    "an index exists once, on partitions as well": Rule(
        f"SELECT string_agg(x.oid::regclass::text, ' ') FROM {_INDEX}"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} GROUP BY i.indrelid, i.indkey, i.indoption, i.indclass,"
        " x.relam, pg_get_expr(i.indpred, i.indrelid), pg_get_expr(i.indexprs, i.indrelid), i.indnkeyatts"
        " HAVING count(*) > 1",
        "CREATE INDEX t ON public.transactions_clean (investor_id, transaction_date DESC)",
    ),
    "a view asks with its reader's rights": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} WHERE n.nspname IN {OURS} AND c.relkind = 'v' AND {_READABLE}"
        " AND NOT coalesce(c.reloptions, '{}') && ARRAY['security_invoker=true', 'security_invoker=on']",
        "CREATE VIEW public.t AS SELECT 1 AS a; GRANT SELECT ON public.t TO authenticated",
    ),
    # Not procedures: PostgreSQL lets none that pins a setting commit between its steps. An empty path, which satisfies
    # the linter, would find types in the session's temporary schema first.
    "a function looks names up in pg_catalog first and among temporary objects last": Rule(
        "SELECT p.oid::regprocedure::text FROM pg_proc p"
        f" WHERE p.pronamespace::regnamespace::text IN {OURS} AND (p.prokind <> 'p' OR p.prosecdef)"
        " AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (p.proconfig), false)",
        "CREATE FUNCTION equitie_private.t() RETURNS int LANGUAGE sql SET search_path = '' AS 'SELECT 1'",
    ),
    "a table of the API has row-level security, partitioned or not": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p')"
        " AND NOT c.relrowsecurity",
        "CREATE TABLE public.t (a int PRIMARY KEY) PARTITION BY LIST (a)",
    ),
    "a partition is in no schema of the API and open to nobody": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} WHERE c.relispartition AND c.relkind IN ('r', 'p')"
        f" AND pg_partition_root(c.oid) IN (SELECT o.oid FROM pg_class o"
        f"  WHERE o.relnamespace::regnamespace::text IN {OURS})"
        " AND (n.nspname <> 'equitie_part' OR EXISTS ("
        "  SELECT FROM aclexplode(c.relacl) AS a WHERE a.grantee <> c.relowner))",
        "GRANT SELECT ON equitie_part.transactions_clean_default TO service_role",
    ),
    "nobody may use the schema of partitions": Rule(
        "SELECT a.grantee::regrole::text FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) AS a"
        " WHERE n.nspname = 'equitie_part' AND a.grantee <> n.nspowner",
        "GRANT USAGE ON SCHEMA equitie_part TO service_role",
    ),
    "no extension is put into the API": Rule(
        "SELECT e.extname FROM pg_extension e WHERE e.extnamespace = 'public'::regnamespace",
        "CREATE EXTENSION pg_trgm SCHEMA public",
    ),
    "no policy believes what users say of themselves": Rule(
        "SELECT p.polrelid::regclass || ' ' || p.polname FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} AND {_POLICY_TEXT} ~ 'user_metadata|jwt'",
        "CREATE POLICY t ON public.deals_clean FOR DELETE TO authenticated"
        " USING (((SELECT auth.jwt()) -> 'user_metadata' ->> 'role') = 'admin')",
    ),
    "no materialized view or foreign table is readable": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} WHERE n.nspname IN {OURS} AND c.relkind IN ('m', 'f')"
        f" AND {_READABLE}",
        "GRANT SELECT ON equitie_private.query_stats_hourly TO equitie_staff",
    ),
    "no column holds what an upgrade cannot carry over": Rule(
        f"SELECT a.attrelid::regclass || ' ' || a.attname {_RELATION} JOIN pg_attribute a ON a.attrelid = c.oid"
        f" WHERE n.nspname IN {OURS} AND c.relkind IN ('r', 'p', 'm') AND NOT a.attisdropped"
        " AND a.atttypid::regtype::text ~ '^reg' AND a.atttypid::regtype::text NOT IN"
        " ('regclass', 'regrole', 'regtype')",
        "ALTER TABLE equitie_private.import_runs ADD COLUMN t regprocedure",
    ),
    "no foreign key leads into auth": Rule(
        "SELECT k.conrelid::regclass || ' ' || k.conname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid"
        " JOIN pg_class f ON f.oid = k.confrelid WHERE k.contype = 'f' AND f.relnamespace = to_regnamespace('auth')"
        f" AND c.relnamespace::regnamespace::text IN {OURS}",
        "CREATE TABLE IF NOT EXISTS auth.users (id uuid PRIMARY KEY);"
        "ALTER TABLE public.user_profiles ADD FOREIGN KEY (user_id) REFERENCES auth.users",
    ),
    "what looks like a secret is behind row-level security": Rule(
        f"SELECT a.attrelid::regclass || ' ' || a.attname {_RELATION} JOIN pg_attribute a ON a.attrelid = c.oid"
        f" WHERE n.nspname IN {OURS} AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND NOT c.relrowsecurity"
        " AND a.attname ~ 'passw|secret|token|ssn|tax_id|iban|account_number|card|passport|birth|api_key|phone|email'",
        "CREATE TABLE equitie_private.t (a int PRIMARY KEY, bank_account_number text)",
    ),
    "no user writes what they like": Rule(
        "SELECT p.polrelid::regclass || ' ' || p.polname FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid"
        f" WHERE c.relnamespace::regnamespace::text IN {OURS} AND p.polpermissive AND p.polcmd <> 'r'"
        " AND 'true' IN (pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))"
        " AND p.polroles <> ARRAY['service_role'::regrole::oid]",
        "CREATE POLICY t ON public.deals_clean FOR DELETE TO equitie_staff USING (true)",
    ),
    "no function of the API runs with its owner's rights": Rule(
        "SELECT p.oid::regprocedure || ' ' || r.rolname FROM pg_proc p, pg_roles r"
        " WHERE p.pronamespace = 'public'::regnamespace AND p.prosecdef"
        f" AND r.rolname IN {API_ROLES} AND has_function_privilege(r.oid, p.oid, 'EXECUTE')",
        "CREATE FUNCTION public.t() RETURNS int LANGUAGE sql SECURITY DEFINER SET search_path = '' AS 'SELECT 1'",
    ),
    "anon holds nothing": Rule(
        f"SELECT c.oid::regclass::text {_RELATION} CROSS JOIN LATERAL aclexplode(c.relacl) AS a"
        f" WHERE n.nspname IN {OURS} AND a.grantee IN (0, 'anon'::regrole)"
        " UNION ALL SELECT p.oid::regprocedure::text FROM pg_proc p"
        " CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a"
        f" WHERE p.pronamespace::regnamespace::text IN {OURS} AND a.grantee IN (0, 'anon'::regrole)",
        "GRANT SELECT ON public.companies_clean TO anon",
    ),
}
