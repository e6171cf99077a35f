"""Policies cost what an explicit filter costs: plans ask once who acts, use indexes, and read few months."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data.embedded import EmbeddedServer
    from equitie_data.testing import DatabaseTemplate

MONTHS, DEALS = 24, 60
USERS = {"investor": 1, "few deals": 2, "many deals": 3, "analyst": 4, "auditor": 5, "admin": 6}


def user_id(person: str) -> str:
    return f"00000000-0000-4000-8000-{USERS[person]:012d}"


@attrs.frozen
class Filled:
    """A database with two years of transactions in months, and a way to speak as somebody."""

    owner: psycopg.Connection[Any]
    indexes: dict[str, str]

    @contextlib.contextmanager
    def acting(self, person: str) -> Iterator[psycopg.Connection[Any]]:
        with self.owner.transaction(force_rollback=True):
            self.owner.execute(
                "SELECT set_config('request.jwt.claims', %s, true),"
                " set_config('role', equitie_private.database_role(%s::uuid), true)",
                (json.dumps({"sub": user_id(person)}), user_id(person)),
            )
            yield self.owner

    def plan(self, person: str, query: str) -> Plan:
        """Plan a query as somebody would have it planned whose tables are large: no index would be spurned."""
        with self.acting(person) as conn:
            return self.planned(conn, query)

    def planned(self, conn: psycopg.Connection[Any], query: str) -> Plan:
        conn.execute("SET LOCAL enable_seqscan = off")
        row = conn.execute(f"EXPLAIN (FORMAT JSON, COSTS OFF) {query}").fetchone()
        assert row is not None
        return Plan(tuple(nodes(row[0][0]["Plan"])), self.indexes, json.dumps(row[0]))


@attrs.frozen
class Plan:
    nodes: tuple[dict[str, Any], ...]
    parents: dict[str, str]
    text: str

    @property
    def tables(self) -> set[str]:
        """The tables that are read, partitions by their own names."""
        return {node["Relation Name"] for node in self.nodes if "Relation Name" in node}

    @property
    def indexes(self) -> set[str]:
        """The indexes that are used, those of partitions by their parent's name."""
        used = {node["Index Name"] for node in self.nodes if "Index Name" in node}
        return {self.parents.get(name, name) for name in used}

    @property
    def conditions(self) -> list[str | None]:
        """What is looked for in each index that is used."""
        return [node.get("Index Cond") for node in self.nodes if "Index Name" in node]

    @property
    def kinds(self) -> set[str]:
        return {node["Node Type"] for node in self.nodes}

    @property
    def asked_once(self) -> set[str]:
        """The subplans that run once a statement: who acts."""
        return {node["Subplan Name"] for node in self.nodes if node.get("Parent Relationship") == "InitPlan"}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.fixture(scope="module")
def filled(server: EmbeddedServer, equitie_template: DatabaseTemplate) -> Iterator[Filled]:
    with equitie_template.copy() as name, psycopg.connect(server.dsn(name), autocommit=True) as owner:
        owner.execute(
            "SELECT equitie_private.ensure_month_partitions('transactions_clean',"
            " (current_date - make_interval(months => %s))::date, current_date)",
            (MONTHS,),
        )
        owner.execute(
            "INSERT INTO companies_clean (company_name) VALUES ('Acme');"
            "INSERT INTO deals_clean (deal_name, underlying_company_id) SELECT 'd', 1 FROM generate_series(1, 60);"
            "INSERT INTO investors_clean (full_name) SELECT 'i' || g FROM generate_series(1, 300) AS g;"
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, transaction_type, status, amount)"
            " SELECT 1 + g * 7 % 60, 4 + g * 31 % 297, current_date - g * 13 % 700,"
            "  (ARRAY['primary', 'primary', 'secondary'])[1 + g % 3],"
            "  (ARRAY['completed', 'completed', 'pending', 'cancelled'])[1 + g % 4], g"
            " FROM generate_series(1, 20000) AS g;"
            # Two whose transactions are too many to be read one by one: all in one deal; in most deals, and in two more
            # of them lately.
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT 7, 2, current_date - g % 700, 1 FROM generate_series(1, 5500) AS g;"
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
            " SELECT 1 + g % 55, 3, current_date - 300 - g % 300, 1 FROM generate_series(1, 5500) AS g;"
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, status, amount) VALUES"
            " (59, 3, current_date, 'cancelled', 1), (60, 3, current_date, 'pending', 1)"
        )
        for person, number in USERS.items():
            role = person if person in {"analyst", "auditor", "admin"} else "investor"
            investor = {"investor": 9, "few deals": 2, "many deals": 3}.get(person)
            owner.execute(
                "INSERT INTO user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, %s, %s)",
                (user_id(person), f"{number}@example.com", role, investor),
            )
        owner.execute("VACUUM ANALYZE")
        parents = owner.execute(
            "SELECT c.relname, p.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
            " JOIN pg_class p ON p.oid = i.inhparent WHERE c.relkind = 'i'"
        ).fetchall()
        yield Filled(owner, dict(parents))


HISTORY = "SELECT * FROM transactions_clean ORDER BY transaction_date DESC LIMIT 20"
RECENT = "SELECT sum(amount) FROM transactions_clean WHERE transaction_date >= current_date - 20"
DEAL = "SELECT sum(amount) FROM transactions_clean WHERE deal_id = 7 AND transaction_type = 'primary'"
TYPE = (
    "SELECT sum(amount) FROM transactions_clean WHERE transaction_type = 'secondary'"
    " AND transaction_date BETWEEN '{first}' AND '{last}'"
)
ACTIVE = (
    "SELECT count(*) FROM transactions_clean WHERE deal_id = 7 AND investor_id = 12"
    " AND status NOT IN ('cancelled', 'failed')"
)
INVESTOR_INDEX = "idx_transactions_investor_date"


@pytest.mark.parametrize(
    "query",
    [HISTORY, "SELECT count(*), sum(amount) FROM transactions_clean", RECENT, TYPE],
    ids=["history", "total", "recent", "type"],
)
def test_an_investors_rows_are_found_by_index(filled: Filled, query: str) -> None:
    plan = filled.plan("investor", month_of(query))
    # An almost empty partition may be read by whatever index comes first.
    assert INVESTOR_INDEX in plan.indexes, plan.text
    assert "Seq Scan" not in plan.kinds, plan.text
    assert any(condition and "investor_id = " in condition for condition in plan.conditions), plan.text
    assert "SubPlan" not in plan.kinds, plan.text
    assert len(plan.asked_once) == 1, plan.text


def month_of(query: str) -> str:
    first = (dt.datetime.now(dt.timezone.utc).date() - dt.timedelta(days=200)).replace(day=1)
    return query.replace("{first}", str(first)).replace("{last}", str(first + dt.timedelta(days=20)))


@pytest.mark.parametrize("person", ["analyst", "admin"])
@pytest.mark.parametrize(
    ("query", "index"),
    [
        (HISTORY, "idx_transactions_date"),
        (DEAL, "idx_transactions_deal_type"),
        (TYPE, "idx_transactions_type_date"),
        (ACTIVE, "idx_transactions_active"),
    ],
    ids=["newest", "deal", "type", "active"],
)
def test_staff_plan_as_the_owner_does(filled: Filled, person: str, query: str, index: str) -> None:
    plan = filled.plan(person, month_of(query))
    assert index in plan.indexes, plan.text
    assert "Seq Scan" not in plan.kinds, plan.text
    # Nothing is asked, since nothing is filtered; and nothing is sorted that stands in order.
    assert plan.asked_once == set()
    assert "Sort" not in plan.kinds, plan.text
    with filled.owner.transaction(force_rollback=True):
        assert filled.planned(filled.owner, month_of(query)) == plan


@pytest.mark.parametrize("person", ["investor", "analyst"])
def test_a_month_is_read_alone(filled: Filled, person: str) -> None:
    first = dt.datetime.now(dt.timezone.utc).date().replace(day=1)
    query = f"SELECT sum(amount) FROM transactions_clean WHERE transaction_date BETWEEN '{first}' AND '{first}'"
    assert filled.plan(person, query).tables <= {f"transactions_clean_{first:%Y_%m}", "transactions_clean_default"}


@pytest.mark.parametrize("person", ["investor", "analyst"])
def test_parameters_prune_when_the_plan_is_carried_out(filled: Filled, person: str) -> None:
    with filled.acting(person) as conn:
        conn.execute("SET LOCAL plan_cache_mode = 'force_generic_plan'")
        conn.execute("PREPARE recent (date) AS SELECT sum(amount) FROM transactions_clean WHERE transaction_date >= $1")
        try:
            row = conn.execute("EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE recent (current_date - 20)").fetchone()
        finally:
            conn.execute("DEALLOCATE recent")
    assert row is not None
    removed = [node.get("Subplans Removed", 0) for node in nodes(row[0][0]["Plan"])]
    assert sum(removed) > MONTHS - 4


def test_small_tables_are_asked_by_key(filled: Filled) -> None:
    own = filled.plan("investor", "SELECT * FROM investors_clean")
    assert own.indexes == {"investors_clean_pkey"}, own.text
    assert len(own.asked_once) == 1
    for person in ("investor", "analyst", "admin"):
        profile = filled.plan(person, f"SELECT * FROM user_profiles WHERE user_id = '{user_id(person)}'")
        assert not profile.kinds & {"SubPlan"}, profile.text
    with filled.owner.transaction(force_rollback=True):
        filled.owner.execute(
            "INSERT INTO user_profiles (user_id, email)"
            " SELECT gen_random_uuid(), g || '@x' FROM generate_series(1, 2000) AS g"
        )
        filled.owner.execute("ANALYZE user_profiles")
        mine = filled.plan("investor", "SELECT * FROM user_profiles")
    assert mine.indexes == {"user_profiles_pkey"}, mine.text


def test_an_auditor_finds_an_entitys_history_by_index(filled: Filled) -> None:
    plan = filled.plan(
        "auditor",
        "SELECT * FROM audit_logs WHERE entity_type = 'deals_clean' AND entity_id = '7' ORDER BY audit_id DESC LIMIT 5",
    )
    assert plan.indexes == {"idx_audit_logs_entity"}, plan.text
    assert "Seq Scan" not in plan.kinds
    assert len(plan.asked_once) == 1


def test_deals_are_looked_up_in_a_set_that_is_made_once(filled: Filled) -> None:
    plan = filled.plan("investor", "SELECT * FROM deals_clean")
    assert "hashed SubPlan" in plan.text
    assert "ProjectSet" in plan.kinds
    one = filled.plan("investor", "SELECT * FROM deals_clean WHERE deal_id = 7")
    assert one.indexes == {"deals_clean_pkey"} or one.kinds >= {"Seq Scan"}
    staff = filled.plan("analyst", "SELECT * FROM deals_clean WHERE deal_id = 7")
    assert staff.asked_once == set()
    assert "SubPlan" not in staff.text


# "Many deals": two of them stand beyond the transactions that are read, one of which is cancelled, and are asked for
# one by one. "Few deals": nothing but one deal is among the first thousands, so reading goes on to the end.
@pytest.mark.parametrize("person", ["investor", "few deals", "many deals", "analyst"])
def test_the_deals_of_an_investor_are_those_of_their_transactions(filled: Filled, person: str) -> None:
    expected = filled.owner.execute(
        "SELECT DISTINCT t.deal_id FROM transactions_clean t JOIN user_profiles p USING (investor_id)"
        " WHERE p.user_id = %s ORDER BY 1",
        (user_id(person),),
    ).fetchall()
    with filled.acting(person) as conn:
        found = conn.execute("SELECT d FROM equitie_private.current_deal_ids() AS d ORDER BY 1").fetchall()
        assert found == expected
        seen = conn.execute("SELECT deal_id FROM deals_clean ORDER BY 1").fetchall()
    assert seen == (expected if person != "analyst" else [(deal,) for deal in range(1, DEALS + 1)])
    assert len(expected) == {"investor": 20, "few deals": 1, "many deals": DEALS - 3, "analyst": 0}[person]
