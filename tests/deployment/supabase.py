"""A server that is to a migration what a Supabase project is: roles, schemas, owners and default privileges as there.

The superuser is `supabase_admin`; `postgres`, who migrates, owns the database and may create roles, and is none. The
schema `auth` and what is in it belong to `supabase_auth_admin`, who lets `postgres` use it and create nothing. New
tables, functions and sequences of `public` are granted to everybody who comes through the API. Written after what the
platform documents and what its database images are observed to do; nothing here comes from them.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from equitie_data.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

API_ROLES = ("anon", "authenticated", "service_role")
THEIR_SCHEMAS = ("auth", "storage", "realtime", "extensions", "graphql_public", "vault")

ROLES = """
CREATE ROLE anon NOLOGIN INHERIT;
CREATE ROLE authenticated NOLOGIN INHERIT;
CREATE ROLE service_role NOLOGIN INHERIT BYPASSRLS;
CREATE ROLE supabase_auth_admin LOGIN NOINHERIT CREATEROLE;
CREATE ROLE supabase_storage_admin LOGIN NOINHERIT CREATEROLE;
CREATE ROLE dashboard_user NOLOGIN CREATEDB CREATEROLE REPLICATION;
GRANT anon, authenticated, service_role TO authenticator;
ALTER ROLE anon SET statement_timeout = '3s';
ALTER ROLE authenticated SET statement_timeout = '8s';
ALTER DATABASE postgres OWNER TO postgres;
"""

SCHEMAS = """
CREATE SCHEMA auth AUTHORIZATION supabase_auth_admin;
CREATE SCHEMA storage AUTHORIZATION supabase_storage_admin;
CREATE SCHEMA realtime;
CREATE SCHEMA extensions AUTHORIZATION postgres;
CREATE SCHEMA graphql_public;
CREATE SCHEMA vault;
GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role, postgres, supabase_storage_admin;
GRANT USAGE ON SCHEMA storage TO anon, authenticated, service_role, postgres;
GRANT USAGE ON SCHEMA realtime TO anon, authenticated, service_role, postgres;
GRANT USAGE ON SCHEMA extensions, graphql_public TO anon, authenticated, service_role, postgres;
GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
GRANT ALL ON SCHEMA auth, storage TO dashboard_user;
CREATE PUBLICATION supabase_realtime;

CREATE FUNCTION extensions.announce_schema_change() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('pgrst', 'reload schema');
END
$$;
CREATE EVENT TRIGGER announce_schema_change ON ddl_command_end EXECUTE FUNCTION extensions.announce_schema_change();
"""

AUTH = """
SET ROLE supabase_auth_admin;
CREATE TABLE auth.users (
  id uuid PRIMARY KEY,
  email text UNIQUE,
  encrypted_password text,
  raw_app_meta_data jsonb,
  raw_user_meta_data jsonb
);
ALTER TABLE auth.users ENABLE ROW LEVEL SECURITY;
CREATE TABLE auth.refresh_tokens (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, token text, user_id uuid);
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $$
  SELECT coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid
$$;
CREATE FUNCTION auth.role() RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(
    nullif(current_setting('request.jwt.claim.role', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
  )
$$;
CREATE FUNCTION auth.email() RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(
    nullif(current_setting('request.jwt.claim.email', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'email'
  )
$$;
CREATE FUNCTION auth.jwt() RETURNS jsonb LANGUAGE sql STABLE AS $$
  SELECT coalesce(
    nullif(current_setting('request.jwt.claim', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')
  )::jsonb
$$;
GRANT ALL ON ALL TABLES IN SCHEMA auth TO postgres, dashboard_user;
RESET ROLE;
"""

STORAGE_AND_REALTIME = """
SET ROLE supabase_storage_admin;
CREATE TABLE storage.buckets (id text PRIMARY KEY, name text NOT NULL UNIQUE, public boolean DEFAULT false);
CREATE TABLE storage.objects (id uuid PRIMARY KEY, bucket_id text REFERENCES storage.buckets, owner_id uuid, name text);
CREATE INDEX objects_bucket_id ON storage.objects (bucket_id);
ALTER TABLE storage.buckets ENABLE ROW LEVEL SECURITY;
ALTER TABLE storage.objects ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_objects ON storage.objects FOR SELECT TO authenticated USING (owner_id = (SELECT auth.uid()));
GRANT ALL ON storage.buckets, storage.objects TO anon, authenticated, service_role, postgres;
RESET ROLE;
CREATE TABLE realtime.messages (topic text, inserted_at timestamp NOT NULL, PRIMARY KEY (topic, inserted_at))
PARTITION BY RANGE (inserted_at);
CREATE TABLE realtime.messages_today PARTITION OF realtime.messages DEFAULT;
ALTER TABLE realtime.messages ENABLE ROW LEVEL SECURITY;
GRANT SELECT, INSERT ON realtime.messages TO anon, authenticated, service_role;
CREATE TABLE vault.secrets (id uuid PRIMARY KEY, secret text);
"""

# What somebody could find changed after us: everything in their schemas, and what stands above schemas.
FINGERPRINT = """
SELECT 'schema', n.nspname, n.nspowner::regrole::text, n.nspacl::text
FROM pg_namespace n
WHERE n.nspname = ANY (%(schemas)s)
UNION ALL
SELECT 'relation', c.oid::regclass::text, c.relowner::regrole::text,
  concat_ws(' ', c.relkind, c.relrowsecurity, c.relforcerowsecurity, c.relacl::text, c.reloptions::text)
FROM pg_class c
WHERE c.relnamespace::regnamespace::text = ANY (%(schemas)s)
UNION ALL
SELECT 'column', a.attrelid::regclass::text, a.attname::text,
  concat_ws(' ', format_type(a.atttypid, a.atttypmod), a.attacl)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace::regnamespace::text = ANY (%(schemas)s) AND a.attnum > 0
UNION ALL
SELECT 'function', p.oid::regprocedure::text, p.proowner::regrole::text,
  concat_ws(' ', pg_get_functiondef(p.oid), p.proacl::text)
FROM pg_proc p
WHERE p.pronamespace::regnamespace::text = ANY (%(schemas)s)
UNION ALL
SELECT 'policy', p.polrelid::regclass::text, p.polname::text,
  concat_ws(' ', p.polroles::regrole[]::text, pg_get_expr(p.polqual, p.polrelid))
FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
WHERE c.relnamespace::regnamespace::text = ANY (%(schemas)s)
UNION ALL
SELECT 'trigger', t.tgrelid::regclass::text, t.tgname::text, pg_get_triggerdef(t.oid)
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
WHERE c.relnamespace::regnamespace::text = ANY (%(schemas)s)
UNION ALL
SELECT 'role', r.rolname::text, r.rolconfig::text,
  concat_ws(' ', r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin, r.rolreplication)
  || r.rolbypassrls
FROM pg_roles r
WHERE r.rolname !~ '^(pg_|equitie)'
UNION ALL
SELECT 'membership', m.roleid::regrole::text, m.member::regrole::text, m.admin_option::text
FROM pg_auth_members m
WHERE m.roleid::regrole::text NOT LIKE 'equitie%%' AND m.member::regrole::text NOT LIKE 'equitie%%'
UNION ALL
SELECT 'default privilege', d.defaclrole::regrole::text, concat_ws(' ', d.defaclnamespace, d.defaclobjtype),
  d.defaclacl::text
FROM pg_default_acl d
UNION ALL
SELECT 'publication', p.pubname::text, p.pubowner::regrole::text, p.puballtables::text
FROM pg_publication p
UNION ALL
SELECT 'published', p.prrelid::regclass::text, NULL, NULL
FROM pg_publication_rel p
UNION ALL
SELECT 'event trigger', e.evtname::text, e.evtowner::regrole::text, concat_ws(' ', e.evtevent, e.evtenabled)
FROM pg_event_trigger e
ORDER BY 1, 2, 3, 4
"""


@attrs.frozen
class SupabaseProject:
    """A running imitation, before or after our migrations.

    Attributes:
        server: The server.
        admin_dsn: The superuser's DSN, `supabase_admin`.
        postgres_dsn: The DSN of `postgres`, who migrates.
        authenticator_dsn: The DSN of `authenticator`, whom the REST API logs in as.
    """

    server: EmbeddedServer
    admin_dsn: str
    postgres_dsn: str
    authenticator_dsn: str

    def dsn(self, user: str, password: str) -> str:
        """Write the DSN of another login."""
        return self.server.dsn("postgres", user, password)

    def fingerprint(self) -> list[tuple[Any, ...]]:
        """Describe everything that is not ours."""
        with psycopg.connect(self.admin_dsn) as admin:
            return admin.execute(FINGERPRINT, {"schemas": list(THEIR_SCHEMAS)}).fetchall()


@contextlib.contextmanager
def supabase_project(bin_dir: Path) -> Iterator[SupabaseProject]:
    """Start a server of its own, since roles belong to the cluster, and make a project of it."""
    with EmbeddedServer(bin_dir=bin_dir) as server:
        password = str(conninfo_to_dict(server.dsn())["password"])
        passwords = {name: secrets.token_urlsafe(12) for name in ("postgres", "authenticator")}
        # Nobody renames themself.
        with psycopg.connect(server.dsn(), autocommit=True) as bootstrap:
            bootstrap.execute(sql.SQL("CREATE ROLE midwife SUPERUSER LOGIN PASSWORD {}").format(password))
        with psycopg.connect(server.dsn("postgres", "midwife", password), autocommit=True) as midwife:
            midwife.execute("ALTER ROLE postgres RENAME TO supabase_admin")
        admin_dsn = server.dsn("postgres", "supabase_admin", password)
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute("DROP ROLE midwife")
            admin.execute(
                sql.SQL(
                    "CREATE ROLE postgres LOGIN NOSUPERUSER CREATEDB CREATEROLE REPLICATION BYPASSRLS PASSWORD {}"
                ).format(passwords["postgres"])
            )
            admin.execute(
                sql.SQL("CREATE ROLE authenticator LOGIN NOINHERIT PASSWORD {}").format(passwords["authenticator"])
            )
            admin.execute(ROLES)
            # From 16 on CREATEROLE alone does not let one grant roles that others made.
            option = sql.SQL("WITH ADMIN OPTION" if server.major >= 16 else "")
            admin.execute(sql.SQL("GRANT anon, authenticated, service_role TO postgres {}").format(option))
            admin.execute(SCHEMAS)
            for grantor in ("postgres", "supabase_admin"):
                for kind in ("TABLES", "FUNCTIONS", "SEQUENCES"):
                    admin.execute(
                        f"ALTER DEFAULT PRIVILEGES FOR ROLE {grantor} IN SCHEMA public"
                        f" GRANT ALL ON {kind} TO postgres, anon, authenticated, service_role"
                    )
            admin.execute(AUTH)
            admin.execute(STORAGE_AND_REALTIME)
        yield SupabaseProject(
            server,
            admin_dsn,
            server.dsn("postgres", "postgres", passwords["postgres"]),
            server.dsn("postgres", "authenticator", passwords["authenticator"]),
        )
