"""Every query of the platform reads the months it names and no others, through the index made for it, whoever asks.

Plans of 200,000 rows in 97 partitions, from EXPLAIN: of the owner, of an investor and of staff under row-level
security.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
from tests.migration.conftest import Platform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data.embedded import EmbeddedServer
    from equitie_data.testing import DatabaseTemplate

ROWS, INVESTORS, DEALS = 200_000, 2_000, 200
TODAY = dt.datetime.now(dt.timezone.utc).date()
QUARTER_ENDS = TODAY.replace(day=1) - dt.timedelta(days=400)
QUARTER_BEGINS = (QUARTER_ENDS - dt.timedelta(days=80)).replace(day=3)

SEED = f"""
SELECT equitie_private.ensure_month_partitions(
  'public.transactions_clean', (current_date - interval '83 months')::date, (current_date + interval '12 months')::date
);
INSERT INTO deals_clean (deal_id, deal_name) SELECT g, 'd' FROM generate_series(1, {DEALS}) AS g;
INSERT INTO investors_clean (investor_id, full_name) SELECT g, 'i' FROM generate_series(1, {INVESTORS}) AS g;
INSERT INTO user_profiles (user_id, email, role, investor_id)
VALUES (%(investor)s, 'i@example.com', 'investor', 7), (%(analyst)s, 'a@example.com', 'analyst', NULL);

-- Only plans are looked at: what the triggers would do is not needed.
SET session_replication_role = replica;
SELECT setseed(0.5);
ALTER TABLE ONLY transactions_clean DISABLE TRIGGER audit_insert, DISABLE TRIGGER month_insert;
INSERT INTO transactions_clean (
  transaction_id, deal_id, investor_id, transaction_date, amount, transaction_type, status, currency
)
SELECT
  to_char(s.day, 'YYYYMMDD')::bigint * 100000000 + s.g,
  1 + floor({DEALS} * random())::integer,
  1 + floor({INVESTORS} * random())::integer,
  s.day,
  s.g,
  CASE WHEN random() < 0.05 THEN 'secondary' ELSE 'primary' END,
  CASE WHEN random() < 0.03 THEN 'cancelled' ELSE 'completed' END,
  'USD'
FROM (SELECT g, current_date - g %% 2500 AS day FROM generate_series(1, {ROWS}) AS g) AS s;
RESET session_replication_role;
ANALYZE transactions_clean, user_profiles;
"""

SHOWN = "SELECT transaction_id, transaction_date, amount FROM transactions_clean"
NEWEST = "ORDER BY transaction_date DESC LIMIT 50"
WITHIN = f"transaction_date >= '{QUARTER_BEGINS}' AND transaction_date < '{QUARTER_ENDS}'"
EVERYBODY = ("owner", "analyst", "investor")
STAFF = ("owner", "analyst")


@attrs.frozen
class Expectation:
    """A query, and what its plan must be.

    Attributes:
        query: Its text.
        index: The index of the parent whose parts it reads.
        who: Whoever asks it.
        pruned: Whether it names the quarter.
        sorted_by_index: Whether no partition's rows are sorted.
    """

    query: str
    index: str
    who: tuple[str, ...]
    pruned: bool = False
    sorted_by_index: bool = False


EXPECTED = {
    "investor history": Expectation(
        f"{SHOWN} WHERE investor_id = 7 {NEWEST}", "idx_transactions_investor_date", EVERYBODY, sorted_by_index=True
    ),
    "investor history of a quarter": Expectation(
        f"{SHOWN} WHERE investor_id = 7 AND {WITHIN} {NEWEST}",
        "idx_transactions_investor_date",
        EVERYBODY,
        pruned=True,
    ),
    "one's own history, without saying whose": Expectation(
        f"{SHOWN} {NEWEST}", "idx_transactions_investor_date", ("investor",), sorted_by_index=True
    ),
    "one's own totals of a quarter": Expectation(
        f"SELECT currency, sum(amount) FROM transactions_clean WHERE {WITHIN} GROUP BY currency",
        "idx_transactions_investor_date",
        ("investor",),
        pruned=True,
    ),
    "deal by type": Expectation(
        f"{SHOWN} WHERE deal_id = 3 AND transaction_type = 'secondary'", "idx_transactions_deal_type", STAFF
    ),
    "deal by type in a quarter": Expectation(
        f"{SHOWN} WHERE deal_id = 3 AND transaction_type = 'secondary' AND {WITHIN}",
        "idx_transactions_deal_type",
        STAFF,
        pruned=True,
    ),
    "type by date": Expectation(
        f"{SHOWN} WHERE transaction_type = 'secondary' AND {WITHIN} ORDER BY transaction_date LIMIT 50",
        "idx_transactions_type_date",
        STAFF,
        pruned=True,
    ),
    "active only": Expectation(
        "SELECT currency, sum(amount) FROM transactions_clean"
        " WHERE deal_id = 3 AND investor_id = 7 AND status NOT IN ('cancelled', 'failed') GROUP BY currency",
        "idx_transactions_active",
        EVERYBODY,
    ),
    "newest of everybody": Expectation(f"{SHOWN} {NEWEST}", "idx_transactions_date", STAFF, sorted_by_index=True),
}
CASES = [(name, person) for name, each in EXPECTED.items() for person in each.who]


@pytest.fixture(scope="module")
def seeded(equitie_server: EmbeddedServer, equitie_template: DatabaseTemplate) -> Iterator[Platform]:
    """Filled once for all tests of the module: none of them writes."""
    with (
        equitie_template.copy() as name,
        psycopg.connect(equitie_server.dsn(name), autocommit=True) as owner,
        psycopg.connect(equitie_template.app_dsn(name), autocommit=True) as app,
    ):
        people = {person: str(Platform.user_id_of(person)) for person in ("investor", "analyst")}
        psycopg.ClientCursor(owner).execute(SEED, people)
        yield Platform(owner, app, {})


@contextlib.contextmanager
def acting(platform: Platform, person: str) -> Iterator[psycopg.Connection[Any]]:
    if person == "owner":
        with platform.owner.transaction():
            yield platform.owner
    else:
        with platform.acting(person) as connection:
            yield connection


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every node of a plan that reads a table or an index."""
    if "Relation Name" in plan or plan["Node Type"] == "Bitmap Index Scan":
        yield plan
    for child in plan.get("Plans", ()):
        yield from scans(child)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def explained(connection: psycopg.Connection[Any], query: str, options: str = "") -> dict[str, Any]:
    row = connection.execute(f"EXPLAIN (FORMAT JSON{options}) {query}").fetchone()
    assert row is not None
    return dict(row[0][0]["Plan"])


def months_of_the_quarter() -> set[str]:
    days = [QUARTER_BEGINS + dt.timedelta(days=n) for n in range((QUARTER_ENDS - QUARTER_BEGINS).days)]
    return {f"transactions_clean_{day:%Y_%m}" for day in days}


@pytest.mark.parametrize(("name", "person"), CASES)
def test_a_query_is_pruned_and_goes_through_its_index(seeded: Platform, name: str, person: str) -> None:
    expected = EXPECTED[name]
    with acting(seeded, person) as connection:
        plan = explained(connection, expected.query)
    part_of = dict(
        seeded.rows(
            "SELECT c.relname, p.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid"
            " JOIN pg_class AS p ON p.oid = i.inhparent WHERE c.relkind = 'i'"
        )
    )
    rows_in = dict(
        seeded.rows(
            "SELECT relname, reltuples FROM pg_class WHERE relname LIKE 'transactions_clean_%%' AND relkind = 'r'"
        )
    )
    found = [node for node in scans(plan) if str(node.get("Relation Name", "transactions")).startswith("transactions")]
    read = {node["Relation Name"] for node in found if "Relation Name" in node}
    if expected.pruned:
        assert read == months_of_the_quarter()
    else:
        assert len(read) == 97
    for node in found:
        # A partition of a few pages may be read as it pleases: those ahead, and the first one.
        if rows_in.get(node.get("Relation Name"), 0) > 1_000 and node["Node Type"] != "Bitmap Heap Scan":
            assert "Index" in node["Node Type"], node
        if "Index Name" in node and rows_in.get(node.get("Relation Name"), ROWS) > 1_000:
            assert part_of[node["Index Name"]] == expected.index, node
    if expected.sorted_by_index:
        assert not [node for node in nodes(plan) if "Sort" in node["Node Type"] and node["Plan Rows"] > 50], plan


@pytest.mark.parametrize("person", ["analyst", "investor"])
def test_who_asks_is_found_out_once_and_not_for_every_row(seeded: Platform, person: str) -> None:
    with acting(seeded, person) as connection:
        plan = explained(connection, f"SELECT count(*) FROM transactions_clean WHERE {WITHIN}")
    assert "current_investor_id" not in str([node.get("Filter", "") for node in nodes(plan)])
    init_plans = [node for node in nodes(plan) if node.get("Parent Relationship") == "InitPlan"]
    assert len(init_plans) == (1 if person == "investor" else 0)


@pytest.mark.parametrize("person", EVERYBODY)
def test_a_prepared_statement_prunes_what_it_is_given(seeded: Platform, person: str) -> None:
    # What the library prepares is planned once for every value: then the partitions are chosen when it starts.
    query = "SELECT sum(amount) FROM transactions_clean WHERE investor_id = $1 AND transaction_date BETWEEN $2 AND $3"
    with acting(seeded, person) as connection, connection.transaction(force_rollback=True):
        connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE totals (int, date, date) AS {query}")
        try:
            plan = explained(
                connection, f"EXECUTE totals (7, '{QUARTER_BEGINS}', '{QUARTER_BEGINS.replace(day=28)}')", ", ANALYZE"
            )
        finally:
            connection.execute("DEALLOCATE totals")
    assert [node["Subplans Removed"] for node in nodes(plan) if "Subplans Removed" in node] == [96]
    assert [node["Relation Name"] for node in scans(plan) if node.get("Relation Name", "").startswith("tr")] == [
        f"transactions_clean_{QUARTER_BEGINS:%Y_%m}"
    ]


@pytest.mark.parametrize("person", EVERYBODY)
def test_a_lookup_by_id_alone_reads_one_partition(seeded: Platform, person: str) -> None:
    ids = seeded.rows("SELECT transaction_id, transaction_date FROM transactions_clean WHERE investor_id = 7 LIMIT 3")
    for transaction_id, day in ids:
        with acting(seeded, person) as connection:
            found = connection.execute("SELECT count(*) FROM get_transaction(%s)", (transaction_id,)).fetchone()
            locked = connection.execute(
                "SELECT DISTINCT c.relname FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation"
                " WHERE l.pid = pg_backend_pid() AND c.relkind = 'r' AND c.relname LIKE 'transactions_clean_%%'"
            ).fetchall()
        assert found == (1,)
        assert locked == [(f"transactions_clean_{day:%Y_%m}",)]


def test_the_table_is_as_large_as_it_is_said_to_be(seeded: Platform) -> None:
    assert seeded.one("SELECT count(*) FROM transactions_clean") == ROWS
    assert seeded.one("SELECT count(*) FROM pg_inherits WHERE inhparent = 'public.transactions_clean'::regclass") == 97
