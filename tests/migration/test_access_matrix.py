"""Role x table x column x action x row: what the database allows is what the model says, on random worlds."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any
from uuid import UUID

import attrs
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psycopg import sql
from tests.migration import access_model
from tests.migration.access_model import DENIED, ROLES, Outcome, Person, Row

from equitie_data import migrate
from equitie_data.embedded import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

ACTORS = ("nobody", "inactive", "no profile", *ROLES, "service")
PUBLIC = {
    "companies_clean", "deals_clean", "investors_clean", "transactions_clean", "user_profiles", "audit_logs",
    "query_stats", "query_metrics", "system_metrics", "performance_alerts",
}  # fmt: skip
ALWAYS_GENERATED = {"audit_id"}

# Runs each statement as whoever asks, takes it back, and says how many rows it met.
ATTEMPTS = """
CREATE FUNCTION public.attempts(statements text[]) RETURNS text[]
LANGUAGE plpgsql
AS $$
DECLARE
  statement text;
  rows bigint;
  outcomes text[] := '{}';
BEGIN
  FOREACH statement IN ARRAY statements LOOP
    BEGIN
      EXECUTE statement;
      GET DIAGNOSTICS rows = ROW_COUNT;
      RAISE EXCEPTION USING ERRCODE = 'TAKEN', MESSAGE = rows;
    EXCEPTION
      WHEN SQLSTATE 'TAKEN' THEN
        outcomes := outcomes || SQLERRM;
      WHEN insufficient_privilege THEN
        outcomes := outcomes || 'denied'::text;
      WHEN OTHERS THEN
        outcomes := outcomes || format('%s: %s', SQLSTATE, SQLERRM);
    END;
  END LOOP;
  RETURN outcomes;
END
$$
"""


@attrs.frozen
class World:
    """What stands in the database when somebody acts.

    Attributes:
        investors: How many investors there are.
        deals: How many deals.
        transactions: Deal, investor, months ago, and status of each transaction.
        people: Those who have a profile.
        actor: Who acts.
    """

    investors: int
    deals: int
    transactions: tuple[tuple[int, int, int, str], ...]
    people: tuple[Person, ...]
    actor: Person


def person(number: int, role: str, active: bool, investor: int | None) -> Person:
    return Person(UUID(int=number), role, active, investor)


@st.composite
def worlds(draw: st.DrawFn, kind: str) -> World:
    investors = draw(st.integers(1, 3), label="investors")
    deals = draw(st.integers(1, 3), label="deals")
    links = st.none() | st.integers(1, investors)
    transactions = draw(
        st.lists(
            st.tuples(
                st.integers(1, deals),
                st.integers(1, investors),
                st.integers(0, 3),
                st.sampled_from(["pending", "completed", "cancelled", "failed"]),
            ),
            max_size=5,
        ),
        label="transactions",
    )
    people = [person(100 + number, role, draw(st.booleans()), draw(links)) for number, role in enumerate(ROLES)]
    if kind == "service":
        actor = Person(is_service=True)
    elif kind == "nobody":
        actor = Person()
    elif kind == "no profile":
        actor = Person(UUID(int=1))
    else:
        role = draw(st.sampled_from(ROLES), label="role") if kind == "inactive" else kind
        actor = person(1, role, kind != "inactive", draw(links, label="link"))
        people.append(actor)
    return World(investors, deals, tuple(transactions), tuple(people), actor)


# --- the world, in the database -------------------------------------------------------------------------------------


def build(owner: psycopg.Connection[Any], world: World) -> list[Row]:
    """Write a world, within the owner's transaction, and return its rows: one of a kind of every table."""
    run = owner.execute
    run("INSERT INTO companies_clean (company_id, company_name) VALUES (1, 'Acme')")
    run(
        "INSERT INTO deals_clean (deal_id, deal_name, underlying_company_id) SELECT g, 'd', 1"
        " FROM generate_series(1, %s) AS g",
        (world.deals,),
    )
    run(
        "INSERT INTO investors_clean (investor_id, full_name) SELECT g, 'i' FROM generate_series(1, %s) AS g",
        (world.investors,),
    )
    rows = [Row("companies_clean", "company_id = 1")]
    for number, (deal, investor, months, status) in enumerate(world.transactions, 1):
        run(
            "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, status, amount)"
            " VALUES (%s, %s, %s, (current_date - make_interval(months => %s))::date, %s, 1)",
            (number, deal, investor, months, status),
        )
        rows += [
            Row(table, f"transaction_id = {number}", investor=investor)
            for table in ("transactions_clean", "stray_transactions")
        ]
    for deal in range(1, world.deals + 1):
        involved = frozenset(investor for of, investor, *_ in world.transactions if of == deal)
        rows.append(Row("deals_clean", f"deal_id = {deal}", investors=involved))
    rows += [
        Row("investors_clean", f"investor_id = {investor}", investor=investor)
        for investor in range(1, world.investors + 1)
    ]
    for who in world.people:
        run(
            "INSERT INTO user_profiles (user_id, email, role, investor_id, company_id, is_active)"
            " VALUES (%s, %s, %s, %s, 1, %s)",
            (who.user, str(who.user), who.role, who.investor, who.active),
        )
        rows.append(Row("user_profiles", f"user_id = '{who.user}'", profile=who))
    run(
        "INSERT INTO query_stats (minute, worker, fingerprint, query_text, operation)"
        " VALUES ('2026-01-01', 'w', 'f', 'q', 'read');"
        "INSERT INTO query_metrics (query_id, query_text, execution_time) VALUES (1, 'q', 1);"
        "INSERT INTO system_metrics (metric_id, metric_name, metric_value) VALUES (1, 'm', 1);"
        "INSERT INTO performance_alerts (alert_id, alert_type, severity, rule, message)"
        " VALUES (1, 'HIGH_LOAD', 'LOW', 'r', 'm');"
        "INSERT INTO equitie_private.import_runs (run_id, source) VALUES (1, 's');"
        "INSERT INTO equitie_private.imported_rows (row_hash, transaction_id, run_id)"
        " VALUES ('00000000-0000-0000-0000-000000000007', 1, 1);"
        "INSERT INTO equitie_private.transaction_months (month, partition, bounds)"
        " VALUES ('1999-01-01', 0, '00000000-0000-0000-0000-000000000007');"
        "INSERT INTO equitie_private.transaction_month_totals"
        " (month, transaction_type, status, currency, transactions, amount)"
        " VALUES ('1999-01-01', 'primary', 'pending', 'USD', 1, 1);"
        "INSERT INTO equitie_private.transaction_month_changes (month) VALUES ('1999-01-01')"
    )
    newest = run("SELECT max(audit_id) FROM audit_logs").fetchone()
    assert newest is not None
    return [
        *rows,
        Row("audit_logs", f"audit_id = {newest[0]}"),
        Row("query_stats", "worker = 'w'"),
        Row("query_metrics", "query_id = 1"),
        Row("system_metrics", "metric_id = 1"),
        Row("performance_alerts", "alert_id = 1"),
        Row("import_runs", "run_id = 1"),
        Row("imported_rows", "transaction_id = 1"),
        *(
            Row(table, "month = '1999-01-01'")
            for table in ("transaction_months", "transaction_month_totals", "transaction_month_changes")
        ),
    ]


# What a row needs at least; the first of each is what no other row has.
NEW = {
    "companies_clean": {"company_name": "'New'"},
    "deals_clean": {"deal_name": "'New'"},
    "investors_clean": {"full_name": "'New'"},
    "transactions_clean": {"deal_id": "1", "investor_id": "1", "transaction_date": "current_date", "amount": "1"},
    "user_profiles": {"user_id": f"'{UUID(int=999)}'", "email": "'new'", "role": "'viewer'"},
    "audit_logs": {"source": "'sdk'", "actor_type": "'user'", "action": "'READ'", "entity_type": "'x'"},
    "query_stats": {
        "minute": "now()", "worker": "'x'", "fingerprint": "'x'", "query_text": "'q'", "operation": "'read'"
    },
    "query_metrics": {"query_text": "'q'", "execution_time": "1"},
    "system_metrics": {"metric_name": "'m'", "metric_value": "1"},
    "performance_alerts": {"rule": "'x'", "alert_type": "'HIGH_LOAD'", "severity": "'LOW'", "message": "'m'"},
    "import_runs": {"source": "'s'"},
    "imported_rows": {"row_hash": f"'{UUID(int=8)}'", "transaction_id": "2", "run_id": "1"},
    "transaction_months": {"month": "'1999-02-01'", "partition": "0", "bounds": f"'{UUID(int=8)}'"},
    "transaction_month_totals": {
        "month": "'1999-02-01'", "transaction_type": "'a'", "status": "'b'", "currency": "'USD'", "transactions": "1",
        "amount": "1"
    },
    "transaction_month_changes": {"month": "'1999-02-01'"},
    "stray_transactions": {"transaction_id": "99", "transaction_date": "current_date", "investor_id": "1"},
}  # fmt: skip


def qualified(table: str) -> str:
    return f"{'public' if table in PUBLIC else 'equitie_private'}.{table}"


def insert(table: str, values: dict[str, str], *also: str) -> str:
    named = {**values, **dict.fromkeys(set(also) - set(values), "DEFAULT")}
    return f"INSERT INTO {qualified(table)} ({', '.join(named)}) VALUES ({', '.join(named.values())})"


def questions(world: World, rows: list[Row], columns: dict[str, list[str]]) -> dict[str, Outcome]:
    """Everything that can be asked of this world, as statements, and what the model answers."""
    actor = world.actor
    asked: dict[str, Outcome] = {}
    for row in rows:
        name = qualified(row.table)
        asked[f"SELECT FROM {name} WHERE {row.key}"] = access_model.selects(actor, row)
        asked[f"DELETE FROM {name} WHERE {row.key}"] = access_model.deletes(actor, row)
        for column in columns[name]:
            value = "DEFAULT" if column in ALWAYS_GENERATED else column
            asked[f"UPDATE {name} SET {column} = {value} WHERE {row.key}"] = access_model.updates(actor, row, column)
        if row.profile is not None:
            for role in ROLES:
                statement = f"UPDATE {name} SET role = '{role}' WHERE {row.key}"
                asked[statement] = access_model.updates(actor, row, "role", role)
    for table, values in NEW.items():
        named = list(values)
        profile = Person(UUID(int=999), "viewer") if table == "user_profiles" else None
        asked[f"TRUNCATE {qualified(table)}"] = DENIED
        asked[insert(table, values)] = access_model.inserts(actor, table, named, profile)
        for column in set(columns[qualified(table)]) - set(values) - ALWAYS_GENERATED:
            # NULL where the default is none: a constraint may object, but only after privileges and policies agreed.
            asked[insert(table, values, column)] = access_model.inserts(actor, table, [*named, column], profile)
    for user in (UUID(int=999), actor.user):
        for role in ROLES if user else ():
            values = {"user_id": f"'{user}'", "email": "'new'", "role": f"'{role}'"}
            profile = Person(user, role)
            asked[insert("user_profiles", values)] = access_model.inserts(actor, "user_profiles", list(values), profile)
    for name, names in columns.items():
        if name.partition(".")[2] not in access_model.READ:
            for statement in ("SELECT FROM {}", "DELETE FROM {}", "TRUNCATE {}", "INSERT INTO {} DEFAULT VALUES"):
                asked[statement.format(name)] = DENIED
            asked[f"UPDATE {name} SET {names[-1]} = {names[-1]}"] = DENIED
    return asked


def answers(owner: psycopg.Connection[Any], actor: Person, statements: list[str]) -> list[Outcome]:
    """Ask as somebody, the way a transaction of the library would."""
    role = "service_role"
    if not actor.is_service:
        found = owner.execute("SELECT equitie_private.database_role(%s)", (actor.user,)).fetchone()
        assert found is not None
        role = found[0]
    claims = json.dumps({"sub": str(actor.user), "role": "authenticated"}) if actor.user else ""
    owner.execute("SELECT set_config('request.jwt.claims', %s, true), set_config('role', %s, true)", (claims, role))
    row = owner.execute("SELECT public.attempts(%s)", (statements,)).fetchone()
    assert row is not None
    # A constraint has the last word, and only after privileges and policies had theirs.
    return [DENIED if text == "denied" else int(text) if text.isdigit() else text for text in row[0]]


# --- two ways the service works -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["service bypasses", "service by policies"])
def owner(request: pytest.FixtureRequest, server: EmbeddedServer) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to a migrated database, whose service_role has or has not BYPASSRLS."""
    with EmbeddedServer(bin_dir=server.bin_dir) as running:
        password = secrets.token_urlsafe(8)
        with psycopg.connect(running.dsn(), autocommit=True) as superuser:
            if request.param == "service by policies":
                superuser.execute(sql.SQL("CREATE ROLE plain LOGIN CREATEROLE PASSWORD {}").format(password))
                superuser.execute("CREATE DATABASE matrix OWNER plain")
                migrate.migrate(running.dsn("matrix", "plain", password))
            else:
                superuser.execute("CREATE DATABASE matrix")
                migrate.migrate(running.dsn("matrix"))
            bypasses = superuser.execute("SELECT rolbypassrls FROM pg_roles WHERE rolname = 'service_role'").fetchone()
            assert bypasses == (request.param == "service bypasses",)
        with psycopg.connect(running.dsn("matrix"), autocommit=True) as conn:
            conn.execute(ATTEMPTS)
            yield conn


@pytest.fixture(scope="module")
def columns(owner: psycopg.Connection[Any]) -> dict[str, list[str]]:
    return dict(
        owner.execute(
            "SELECT n.nspname || '.' || c.relname, array_agg(a.attname::text ORDER BY a.attnum) FROM pg_class c"
            " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid"
            " WHERE n.nspname IN ('public', 'equitie_private') AND c.relkind IN ('r', 'p')"
            " AND a.attnum > 0 AND NOT a.attisdropped GROUP BY 1"
        ).fetchall()
    )


@pytest.mark.parametrize("kind", ACTORS)
@settings(
    max_examples=4,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_the_database_allows_what_the_model_says(
    owner: psycopg.Connection[Any], columns: dict[str, list[str]], kind: str, data: st.DataObject
) -> None:
    world = data.draw(worlds(kind))
    with owner.transaction(force_rollback=True):
        asked = questions(world, build(owner, world), columns)
        found = dict(zip(asked, answers(owner, world.actor, list(asked)), strict=True))
    wrong = {
        statement: f"{found[statement]}, not {expected}"
        for statement, expected in asked.items()
        if found[statement] != expected and not (expected == 1 and str(found[statement]).startswith("23"))
    }
    assert wrong == {}
    assert len(asked) > 400
