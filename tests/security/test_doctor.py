"""The doctor: nothing is wrong with a fresh deployment, and whatever is broken on purpose is found, and it alone."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from equitie_data.__main__ import main
from equitie_data.connect import connect
from equitie_data.doctor import Severity, examine
from equitie_data.doctor import baseline as baseline_module
from equitie_data.doctor.baseline import baseline, security_facts
from equitie_data.doctor.examination import _check_replica
from equitie_data.doctor.findings import RULES, finding, quoted
from equitie_data.doctor.roles import check_login
from equitie_data.doctor.server import Link, check_link, check_passwords, check_server, check_timeouts
from equitie_data.settings import Replica, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data.doctor import Finding
    from equitie_data.embedded import EmbeddedServer

APP = "equitie_test_app"


class Damage(NamedTuple):
    """What is broken, how it is undone where it outlives the database, and what must be found."""

    code: str
    harm: str
    undo: str = ""
    also: frozenset[str] = frozenset()
    subject: str = ""


BROKEN = {
    "bypasses": Damage("login-bypasses-policies", f"ALTER ROLE {APP} BYPASSRLS", f"ALTER ROLE {APP} NOBYPASSRLS"),
    "may create roles": Damage("login-attribute", f"ALTER ROLE {APP} CREATEROLE", f"ALTER ROLE {APP} NOCREATEROLE"),
    "may create databases": Damage("login-attribute", f"ALTER ROLE {APP} CREATEDB", f"ALTER ROLE {APP} NOCREATEDB"),
    "may replicate": Damage("login-attribute", f"ALTER ROLE {APP} REPLICATION", f"ALTER ROLE {APP} NOREPLICATION"),
    "expires": Damage(
        "login-expires",
        f"ALTER ROLE {APP} VALID UNTIL '%soon%'",
        f"ALTER ROLE {APP} VALID UNTIL 'infinity'",
    ),
    "owns a table": Damage(
        "login-owns", f"CREATE SCHEMA theirs; CREATE TABLE theirs.t (); ALTER TABLE theirs.t OWNER TO {APP}"
    ),
    "reads all": Damage(
        "login-membership-extra", f"GRANT pg_read_all_data TO {APP}", f"REVOKE pg_read_all_data FROM {APP}"
    ),
    "may grant": Damage(
        "login-may-grant",
        f"GRANT authenticated TO {APP} WITH ADMIN OPTION",
        f"REVOKE ADMIN OPTION FOR authenticated FROM {APP}",
    ),
    "no longer a member": Damage(
        "login-membership-missing", f"REVOKE equitie_staff FROM {APP}", f"GRANT equitie_staff TO {APP}"
    ),
    "a role logs in": Damage("role-can-login", "ALTER ROLE anon LOGIN", "ALTER ROLE anon NOLOGIN"),
    "a role creates roles": Damage(
        "role-attribute", "ALTER ROLE equitie_staff CREATEROLE", "ALTER ROLE equitie_staff NOCREATEROLE"
    ),
    "a role bypasses": Damage(
        "role-bypasses-policies", "ALTER ROLE equitie_staff BYPASSRLS", "ALTER ROLE equitie_staff NOBYPASSRLS"
    ),
    "a role is another": Damage(
        "role-member", "GRANT service_role TO authenticated", "REVOKE service_role FROM authenticated"
    ),
    "a role reads statements": Damage(
        "statements-visible",
        "GRANT pg_read_all_stats TO equitie_staff",
        "REVOKE pg_read_all_stats FROM equitie_staff",
        # By way of it, the login could become that role, too.
        also=frozenset({"login-membership-extra"}),
    ),
    "a role owns": Damage(
        "role-owns", "CREATE SCHEMA theirs; CREATE TABLE theirs.t (); ALTER TABLE theirs.t OWNER TO authenticated"
    ),
    "an identity by default": Damage(
        "session-default",
        f"ALTER ROLE {APP} IN DATABASE {{db}} SET \"request.jwt.claims\" = '{{{{}}}}'",
        f'ALTER ROLE {APP} IN DATABASE {{db}} RESET "request.jwt.claims"',
    ),
    "no triggers by default": Damage(
        "session-default", "ALTER DATABASE {db} SET session_replication_role = 'replica'"
    ),
    "policies off": Damage("policies-off", "ALTER TABLE public.deals_clean DISABLE ROW LEVEL SECURITY"),
    "policies off on the parent": Damage(
        "policies-off", "ALTER TABLE public.transactions_clean DISABLE ROW LEVEL SECURITY"
    ),
    "one more policy": Damage(
        "policy-extra", "CREATE POLICY all_of_it ON public.transactions_clean FOR SELECT TO authenticated USING (true)"
    ),
    "a policy for everybody": Damage("policy-extra", "CREATE POLICY open ON public.audit_logs USING (true)"),
    "a policy less": Damage("policy-missing", "DROP POLICY deals_select_authenticated ON public.deals_clean"),
    "a policy opened": Damage(
        "policy-altered",
        "ALTER POLICY investors_select_authenticated ON public.investors_clean USING (true)",
    ),
    "a table granted": Damage("privilege-extra", "GRANT DELETE ON public.audit_logs TO equitie_staff"),
    "a column granted": Damage(
        "privilege-extra", "GRANT UPDATE (kyc_status) ON public.investors_clean TO authenticated"
    ),
    "a table of nobody's granted": Damage(
        "privilege-extra", "GRANT SELECT ON equitie_private.idempotency_keys TO equitie_staff"
    ),
    "a sequence granted": Damage(
        "privilege-extra", "GRANT USAGE ON SEQUENCE public.investors_clean_investor_id_seq TO authenticated"
    ),
    "a function granted": Damage(
        "privilege-extra", "GRANT EXECUTE ON FUNCTION equitie_private.database_role(uuid) TO PUBLIC"
    ),
    "a schema granted": Damage("privilege-extra", "GRANT USAGE ON SCHEMA equitie_part TO authenticated"),
    "public may be written": Damage("privilege-extra", "GRANT CREATE ON SCHEMA public TO PUBLIC"),
    "the login granted": Damage("privilege-extra", f"GRANT SELECT ON public.transactions_clean TO {APP}"),
    "a privilege less": Damage("privilege-missing", "REVOKE SELECT ON public.deals_clean FROM authenticated"),
    "the login's function gone": Damage(
        "privilege-missing", f"REVOKE EXECUTE ON FUNCTION equitie_private.database_role(uuid) FROM {APP}"
    ),
    "a function replaced": Damage(
        "function-altered",
        "CREATE OR REPLACE FUNCTION equitie_private.is_admin() RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER"
        " SET search_path = '' AS 'SELECT true'",
    ),
    "a function's path freed": Damage(
        "function-altered",
        "ALTER FUNCTION equitie_private.is_admin() RESET search_path",
        also=frozenset({"definer-search-path"}),
    ),
    "a function of another owner": Damage(
        "owners-differ", "ALTER FUNCTION equitie_private.is_admin() OWNER TO pg_database_owner"
    ),
    "a function gone": Damage("object-missing", "DROP FUNCTION equitie_private.can_audit() CASCADE",
        also=frozenset({"policy-missing"}),
    ),
    "a partition granted": Damage(
        "partition-granted", "GRANT SELECT ON equitie_part.transactions_clean_default TO authenticated"
    ),
    "a table of the application's": Damage(
        "relation-open", "CREATE TABLE public.notes (a text); GRANT SELECT ON public.notes TO authenticated"
    ),
    "a view of the application's": Damage(
        "relation-open",
        "CREATE VIEW public.everything AS SELECT * FROM public.transactions_clean;"
        " GRANT SELECT ON public.everything TO equitie_staff",
    ),
    "a materialized view": Damage(
        "relation-open",
        "CREATE MATERIALIZED VIEW public.everything AS SELECT * FROM public.transactions_clean;"
        " GRANT SELECT ON public.everything TO equitie_staff",
    ),
    "a definer function": Damage(
        "definer-search-path",
        "CREATE FUNCTION public.peek() RETURNS bigint LANGUAGE sql SECURITY DEFINER"
        " AS 'SELECT count(*) FROM public.transactions_clean'",
    ),
    "tables open by default": Damage(
        "default-privileges", "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO anon"
    ),
    "functions open by default": Damage(
        "default-privileges", "ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO authenticated"
    ),
    "old passwords": Damage("password-encryption", "ALTER DATABASE {db} SET password_encryption = 'md5'"),
    "statements in the log": Damage("log-parameters", "ALTER DATABASE {db} SET log_statement = 'all'"),
    "slow statements in the log": Damage("log-parameters", "ALTER DATABASE {db} SET log_min_duration_statement = 500"),
    "failed parameters in the log": Damage(
        "log-parameters", "ALTER DATABASE {db} SET log_parameter_max_length_on_error = -1"
    ),
    "errors in the log": Damage("log-details", "ALTER DATABASE {db} SET log_min_messages = 'warning'"),
    "a migration less": Damage(
        "migrations", "DELETE FROM equitie_migrations.history WHERE version = (SELECT max(version) FROM"
        " equitie_migrations.history)"
    ),
    "the history closed": Damage("migrations", f"REVOKE SELECT ON equitie_migrations.history FROM {APP}"),
    "an audit trigger off": Damage("altered", "ALTER TABLE public.deals_clean DISABLE TRIGGER ALL"),
}  # fmt: skip

MENDED_BY_SQL = {
    "default-privileges",
    "definer-search-path",
    "login-attribute",
    "login-bypasses-policies",
    "login-may-grant",
    "partition-granted",
    "policies-off",
    "policy-altered",
    "policy-extra",
    "policy-missing",
    "privilege-extra",
    "privilege-missing",
    "relation-open",
    "role-can-login",
    "role-member",
    "session-default",
}
"""Whose fix is SQL as it stands."""

ELSEWHERE = {
    "login-superuser",
    "login-inherits",
    "login-is-database-role",
    "view-altered",
    "tls-off",
    "tls-not-verified",
    "tls-old",
    "password-kept-as-md5",
    "host-rule",
    "log-plans",
    "statement-timeout",
    "idle-timeout",
    "server-too-old",
    "replica-differs",
}
"""What has a test of its own below."""


@pytest.fixture(autouse=True)
def _baseline_of_the_day(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with what the migrations make now: that the file has the same is one test's business and not all's."""
    if "owner_dsn" in request.fixturenames:
        facts = _facts_of(request.getfixturevalue("owner_dsn"))
        monkeypatch.setattr(baseline_module, "baseline", lambda: facts)


def _facts_of(owner_dsn: str) -> frozenset[baseline_module.Fact]:
    with connect(owner_dsn) as conn, conn.transaction():
        conn.execute("SELECT pg_catalog.set_config('search_path', '', true)")
        return frozenset(security_facts(conn, APP))


def findings_of(app_dsn: str, owner_dsn: str | None, **settings: Any) -> list[Finding]:
    return list(examine(Settings(dsn=app_dsn, **settings), owner_dsn).findings)


@contextlib.contextmanager
def broken(owner_dsn: str, damage: Damage) -> Iterator[None]:
    name = str(conninfo_to_dict(owner_dsn)["dbname"])
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        row = owner.execute("SELECT (now() + interval '2 days')::text").fetchone()
        assert row is not None
        try:
            owner.execute(damage.harm.replace("%soon%", row[0]).format(db=name).encode())
            yield
        finally:
            if damage.undo:
                owner.execute(damage.undo.format(db=name).encode())


def test_nothing_is_wrong_with_a_fresh_deployment(app_dsn: str, owner_dsn: str) -> None:
    report = examine(Settings(dsn=app_dsn), owner_dsn)
    assert report.findings == ()
    assert report.skipped == ()
    assert report.passed


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found_alone_and_the_sql_mends_it(app_dsn: str, owner_dsn: str, what: str) -> None:
    damage = BROKEN[what]
    with broken(owner_dsn, damage):
        found = findings_of(app_dsn, owner_dsn)
        if damage.code in MENDED_BY_SQL and not damage.also:
            with psycopg.connect(owner_dsn, autocommit=True) as owner:
                for each in found:
                    if each.code == damage.code:
                        owner.execute(each.fix.encode())
            assert findings_of(app_dsn, owner_dsn) == []
    # `migrate verify`, which knows some of it too, may agree; it must not be the only one to notice.
    codes = {each.code for each in found}
    assert codes - {"altered"} - damage.also == {damage.code} - {"altered"}
    assert damage.code in codes
    assert damage.also <= codes
    for each in found:
        assert each.what.endswith(".")
        assert each.fix


def test_every_rule_is_broken_by_some_test() -> None:
    assert {damage.code for damage in BROKEN.values()} | ELSEWHERE == set(RULES)


def test_a_superuser_is_the_one_finding(owner_dsn: str) -> None:
    assert [each.code for each in findings_of(owner_dsn, None)] == ["login-superuser"]


def test_an_inheriting_login_is_found(app_dsn: str, owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        new = owner.info.server_version >= 160000
        harm, undo = (
            (f"GRANT authenticated TO {APP} WITH INHERIT TRUE", f"GRANT authenticated TO {APP} WITH INHERIT FALSE")
            if new
            else (f"ALTER ROLE {APP} INHERIT", f"ALTER ROLE {APP} NOINHERIT")
        )
        owner.execute(harm)
        try:
            found = findings_of(app_dsn, owner_dsn)
            assert {each.code for each in found} == {"login-inherits"}
            owner.execute(found[0].fix.encode())
            assert findings_of(app_dsn, owner_dsn) == []
        finally:
            owner.execute(undo)


def test_a_database_role_as_a_login_is_found(owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("SET SESSION AUTHORIZATION authenticated")
        assert [each.code for each in check_login(owner)] == ["login-is-database-role"]


def test_a_view_that_runs_as_its_owner_is_found(app_dsn: str, owner_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = baseline_module.Fact("view", "public.shown", "", "security_invoker")
    facts = baseline_module.baseline() | {fact}
    monkeypatch.setattr(baseline_module, "baseline", lambda: facts)
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("CREATE VIEW public.shown AS SELECT 1 AS one")
    assert [each.code for each in findings_of(app_dsn, owner_dsn)] == ["view-altered"]


@pytest.mark.parametrize(
    ("link", "codes"),
    [
        (Link(host="db", local=False, encrypted=False, sslmode="prefer"), ["tls-off"]),
        (Link(host="db", local=False, encrypted=True, sslmode="require"), ["tls-not-verified"]),
        (Link(host="db", local=False, encrypted=True, sslmode="verify-ca"), ["tls-not-verified"]),
        (Link(host="db", local=False, encrypted=True, sslmode="verify-full"), []),
        (Link(host="localhost", local=True, encrypted=False, sslmode="prefer"), []),
    ],
)
def test_a_way_that_can_be_listened_to_is_found(link: Link, codes: list[str]) -> None:
    assert [each.code for each in check_link(link)] == codes


def test_the_way_is_described_as_it_is(app_dsn: str) -> None:
    with connect(app_dsn) as conn:
        link = Link.of(conn, app_dsn)
    assert link == Link(host="127.0.0.1", local=True, encrypted=False, sslmode="prefer")
    # A name proves nothing: what counts is where it led.
    named = make_conninfo(app_dsn, host="db.example", hostaddr="127.0.0.1")
    with connect(named) as conn:
        assert attrs.evolve(Link.of(conn, named), host="") == attrs.evolve(link, host="")


@pytest.mark.parametrize(
    ("settings", "codes"),
    [
        ({}, []),
        ({"server_version_num": "140012"}, ["server-too-old"]),
        ({"ssl": "on", "ssl_min_protocol_version": "TLSv1"}, ["tls-old"]),
        ({"auto_explain.log_min_duration": "0"}, ["log-plans"]),
        ({"auto_explain.log_min_duration": "-1"}, []),
        ({"pgaudit.log": "read", "pgaudit.log_parameter": "on"}, ["log-parameters"]),
        ({"log_transaction_sample_rate": "0.1", "log_parameter_max_length": "-1"}, ["log-parameters"]),
        ({"log_statement": "all", "log_parameter_max_length": "0"}, []),
        ({"log_statement": "ddl", "log_parameter_max_length": "-1"}, []),
        ({"log_error_verbosity": "default"}, ["log-details"]),
        ({"log_error_verbosity": "terse"}, []),
    ],
)
def test_a_server_that_writes_values_down_is_found(settings: dict[str, str], codes: list[str]) -> None:
    assert [each.code for each in check_server(settings, "db:5432")] == codes


def test_sessions_without_time_limits_are_found(app_dsn: str) -> None:
    found = findings_of(app_dsn, None, statement_timeout=0, idle_in_transaction_timeout=0)
    assert {each.code for each in found} == {"statement-timeout", "idle-timeout"}
    assert [each.code for each in check_timeouts({})] == ["statement-timeout", "idle-timeout"]


def test_passwords_and_host_rules_are_looked_at(server: EmbeddedServer, owner_dsn: str) -> None:
    hba = server.data_dir / "pg_hba.conf"
    before = hba.read_bytes()
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.add_notice_handler(lambda _: None)  # PostgreSQL 18 warns of MD5
        owner.execute("CREATE ROLE old_fashioned LOGIN; SET password_encryption = 'md5'")
        owner.execute("ALTER ROLE old_fashioned PASSWORD 'x'")
        try:
            with hba.open("ab") as file:
                file.write(b"\nhost all all 0.0.0.0/0 trust\n")
            codes = [each.code for each in check_passwords(owner, "old_fashioned", "db:5432")]
        finally:
            with hba.open("rb+") as file:
                file.write(before)
                file.truncate()
            owner.execute("DROP ROLE old_fashioned")
        assert codes == ["password-kept-as-md5", "host-rule"]
        assert list(check_passwords(owner, APP, "db:5432")) == []


def test_a_replica_that_is_none_is_found(app_dsn: str, owner_dsn: str) -> None:
    alias = make_conninfo(app_dsn, application_name="another")
    assert [each.code for each in findings_of(app_dsn, owner_dsn, replicas=(Replica(alias),))] == ["replica-differs"]
    with connect(app_dsn) as conn:
        assert "no copy" in next(_check_replica(conn, app_dsn, "1")).what


def test_an_owner_who_is_no_superuser_skips_what_only_those_may_see(app_dsn: str, owner_dsn: str) -> None:
    report = examine(Settings(dsn=app_dsn), app_dsn)
    assert any("only a superuser" in what for what in report.skipped)


def test_another_role_by_way_of_one_of_ours_is_found(app_dsn: str, owner_dsn: str) -> None:
    name = 'odd "name"; --'
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        role = sql.Identifier(name)
        owner.execute(sql.SQL("CREATE ROLE {}").format(role))
        try:
            owner.execute(sql.SQL("GRANT {} TO {}").format(role, sql.Identifier(APP)))
            (found,) = findings_of(app_dsn, owner_dsn)
            assert found.code == "login-membership-extra"
            owner.execute(found.fix.encode())
            assert findings_of(app_dsn, owner_dsn) == []
        finally:
            owner.execute(sql.SQL("DROP ROLE {}").format(role))


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def _environment(app_dsn: str, owner_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", app_dsn)
    monkeypatch.setenv("MIGRATION_DATABASE_URL", owner_dsn)
    monkeypatch.delenv("READ_REPLICA_URLS", raising=False)


@pytest.mark.usefixtures("_environment")
def test_the_command_says_that_nothing_is_wrong(app_dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Nothing is wrong.\n")
    assert str(conninfo_to_dict(app_dsn)["password"]) not in out


@pytest.mark.usefixtures("_environment")
def test_the_command_shows_what_why_and_how(owner_dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    with broken(owner_dsn, BROKEN["a table of the application's"]):
        assert main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "HIGH      relation-open\n" in out
        assert "\n    ALTER TABLE public.notes ENABLE ROW LEVEL SECURITY;\n" in out
        prose = [line for line in out.splitlines() if not line.startswith("    ")]
        assert max(map(len, prose)) <= 80
        assert main(["doctor", "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
    assert not told["passed"]
    assert [each["code"] for each in told["findings"]] == ["relation-open"]
    assert set(told["findings"][0]) == {"code", "severity", "subject", "what", "why", "fix"}


@pytest.mark.usefixtures("_environment")
def test_advice_does_not_fail(owner_dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    with broken(owner_dsn, BROKEN["errors in the log"]):
        assert main(["doctor"]) == 0
    assert "1 advice." in capsys.readouterr().out


@pytest.mark.usefixtures("_environment")
def test_a_name_cannot_steer_the_terminal(owner_dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = sql.Identifier("\x1b[2Jgone\nNothing is wrong.\n\u202e")
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE TABLE public.{} (a int)").format(name))
        owner.execute(sql.SQL("GRANT SELECT ON public.{} TO anon").format(name))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\u202e"}
    assert "Nothing is wrong." not in out.splitlines()


def test_a_deployment_that_cannot_be_reached_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dsn", "postgresql://u:hunter2@127.0.0.1:1/x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "hunter2" not in captured.err


# --- the baseline and the page --------------------------------------------------------------------------------------


def test_the_baseline_is_what_the_migrations_make(owner_dsn: str) -> None:
    found = _facts_of(owner_dsn)
    lacking, stale = sorted(found - baseline()), sorted(baseline() - found)
    assert (lacking, stale) == ([], []), "run tools/make_security_baseline.py"


def test_the_page_has_every_rule_with_its_severity() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "check-a-deployment.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \|", page, re.MULTILINE)
    assert dict(rows) == {code: rule.severity.value for code, rule in RULES.items()}
    assert len(rows) == len(RULES)


def test_names_are_quoted_where_they_need_it() -> None:
    assert [quoted(name) for name in ("PUBLIC", "plain_1", "Weird", 'q"q')] == [
        "PUBLIC",
        "plain_1",
        '"Weird"',
        '"q""q"',
    ]


def test_a_finding_takes_its_severity_from_its_rule() -> None:
    assert finding("log-details", "x", "y.", "z").severity is Severity.ADVICE
