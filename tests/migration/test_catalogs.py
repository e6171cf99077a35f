"""One schema, however a database came by it: fresh, step by step with rows in it, taken back and on, on any version."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data import migrate
from equitie_data.errors import MigrationError
from equitie_data.migrations import directories, reference
from equitie_data.migrations.catalog import Catalog, differences, read_catalog
from equitie_data.migrations.reference import reference_catalogs
from equitie_data.migrations.session import open_owner
from equitie_data.testing import fresh_database

if TYPE_CHECKING:
    from equitie_data.embedded import EmbeddedServer

SHIPPED = directories.ours().migrations
DOWNS = directories.ours().downs
LABELS = [migration.label for migration in SHIPPED]


def catalog_of(dsn: str) -> Catalog:
    with open_owner(dsn) as conn:
        return read_catalog(conn)


def found(expected: Catalog, actual: Catalog) -> list[str]:
    return [difference.sentence for difference in differences(expected, actual)]


def fill(conn: psycopg.Connection[Any]) -> None:
    """Put rows into whatever of the platform's tables there is already, so that later migrations meet them."""
    rows = {
        "companies_clean": "INSERT INTO companies_clean (company_name) VALUES ('c')",
        "deals_clean": "INSERT INTO deals_clean (deal_code, deal_name, underlying_company_id)"
        " SELECT g, g, 1 FROM generate_series(1, 3) AS g",
        "investors_clean": "INSERT INTO investors_clean (full_name, primary_email) VALUES ('i', 'i@example.com')",
        # Old ones, of today, and one that nobody expects: they spread over months and the default partition.
        "transactions_clean": "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT 1, 1, d, 1 FROM generate_series(current_date - 200, current_date + 900, interval '50 days') AS d",
        "user_profiles": "INSERT INTO user_profiles (user_id, email, role, investor_id)"
        " VALUES (gen_random_uuid(), 'i@example.com', 'investor', 1)",
        "query_metrics": "INSERT INTO query_metrics (query_text, execution_time) VALUES ('SELECT ?', 1)",
        "system_metrics": "INSERT INTO system_metrics (metric_name, metric_value) VALUES ('m', 1)",
    }
    for table, statement in rows.items():
        if conn.execute("SELECT to_regclass('public.' || %s)", [table]).fetchone() != (None,):
            conn.execute(statement)


def test_the_reference_beside_a_database_is_what_its_migrations_make(empty_dsn: str) -> None:
    with open_owner(empty_dsn) as conn:
        catalogs = reference_catalogs(conn, SHIPPED)
        # Nothing of it is left.
        assert conn.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'equitie%'").fetchall() == []
    for migration, expected in zip(SHIPPED, catalogs, strict=True):
        migrate.migrate(empty_dsn, to=migration.version)
        assert found(expected, catalog_of(empty_dsn)) == [], migration.label
        assert found(catalog_of(empty_dsn), expected) == [], migration.label


def test_the_reference_locks_nothing_that_anybody_uses(owner_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    def look(conn: psycopg.Connection[Any], *arguments: Any) -> Catalog:
        held.extend(
            conn.execute(
                "SELECT c.oid::regclass::text, l.mode FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation"
                " WHERE l.pid = pg_backend_pid() AND l.mode <> 'AccessShareLock'"
                " AND c.relnamespace::regnamespace::text NOT LIKE 'equitie_reference%'"
                # What a new object is written down in, everybody may write to at once.
                " AND NOT (c.relnamespace = 'pg_catalog'::regnamespace AND l.mode = 'RowExclusiveLock')"
                " AND c.relnamespace::regnamespace::text <> 'pg_toast'"
            )
        )
        return read_catalog(conn, *arguments)

    monkeypatch.setattr(reference, "read_catalog", look)
    with open_owner(owner_dsn) as conn:
        reference_catalogs(conn, SHIPPED)
    assert held == []


@pytest.mark.parametrize("label", LABELS[1:-1])
def test_a_database_that_was_used_all_along_ends_as_a_fresh_one(
    empty_dsn: str, owner: psycopg.Connection[Any], owner_dsn: str, label: str
) -> None:
    migrate.migrate(empty_dsn, to=label)
    fill(owner)
    migrate.migrate(empty_dsn)
    fresh = catalog_of(owner_dsn)
    assert len(fresh.objects) > 500
    assert found(fresh, catalog_of(empty_dsn)) == []
    assert found(catalog_of(empty_dsn), fresh) == []
    assert migrate.verify(empty_dsn) == ()


def test_one_at_a_time_ends_as_all_at_once(empty_dsn: str, owner: psycopg.Connection[Any], owner_dsn: str) -> None:
    for migration in SHIPPED:
        migrate.migrate(empty_dsn, to=migration.version)
        if migration.version == 2:
            fill(owner)
    assert found(catalog_of(owner_dsn), catalog_of(empty_dsn)) == []


@pytest.mark.parametrize("label", list(DOWNS))
def test_what_is_taken_back_leaves_what_was_before_it(
    empty_dsn: str, owner: psycopg.Connection[Any], label: str
) -> None:
    place = LABELS.index(label)
    before, at = catalogs_around(empty_dsn, owner, place)
    migrate.down(empty_dsn, label)
    assert found(before, catalog_of(empty_dsn)) == []
    assert found(catalog_of(empty_dsn), before) == []
    states = owner.execute("SELECT state FROM equitie_migrations.history ORDER BY event_id").fetchall()
    assert states == [("applied",)] * (place + 1) + [("rolled_back",)]
    assert migrate.status(empty_dsn)[place].state == "pending"
    migrate.migrate(empty_dsn, to=label)
    assert found(at, catalog_of(empty_dsn)) == []
    assert owner.execute("SELECT count(*) > 0 FROM companies_clean").fetchone() == (True,)


def catalogs_around(dsn: str, conn: psycopg.Connection[Any], place: int) -> tuple[Catalog, Catalog]:
    """Migrate up to the one before a place, put rows in, go on to the place."""
    migrate.migrate(dsn, to=LABELS[place - 1])
    conn.execute("INSERT INTO companies_clean (company_name) VALUES ('c')")
    before = catalog_of(dsn)
    migrate.migrate(dsn, to=LABELS[place])
    return before, catalog_of(dsn)


@pytest.mark.parametrize(
    ("label", "rows"),
    [
        (
            "0007_create_performance_monitoring_tables",
            "INSERT INTO system_metrics (metric_name, metric_value) VALUES ('m', 1)",
        ),
        ("0008_create_import_tables", "INSERT INTO equitie_private.import_runs (source) VALUES ('f')"),
        (
            "0009_create_idempotency_keys",
            "INSERT INTO equitie_private.idempotency_keys (key, actor) VALUES ('k', 'a')",
        ),
    ],
)
def test_what_holds_rows_is_not_taken_back(
    empty_dsn: str, owner: psycopg.Connection[Any], label: str, rows: str
) -> None:
    migrate.migrate(empty_dsn, to=label)
    owner.execute(rows)
    with pytest.raises(MigrationError, match=rf"{label} was not taken back .*hold.*It is there as before") as caught:
        migrate.down(empty_dsn, label)
    assert "\n" not in str(caught.value)
    state = migrate.status(empty_dsn)[LABELS.index(label)].state
    assert state == "applied"


def test_rows_that_come_while_it_is_taken_back_are_not_lost(empty_dsn: str, owner: psycopg.Connection[Any]) -> None:
    migrate.migrate(empty_dsn, to=8)
    errors: list[str] = []

    def take_back() -> None:
        try:
            migrate.down(empty_dsn, "0008")
        except MigrationError as error:
            errors.append(str(error))

    with psycopg.connect(empty_dsn) as writing:
        writing.execute("INSERT INTO equitie_private.import_runs (source) VALUES ('f')")
        thread = threading.Thread(target=take_back)
        thread.start()
        while owner.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (0,):
            assert thread.is_alive()
        writing.commit()
    thread.join()
    assert "holds rows" in errors[0]


@pytest.mark.parametrize("label", [LABELS[0], LABELS[4]])
def test_what_would_lose_something_is_refused(empty_dsn: str, label: str) -> None:
    migrate.migrate(empty_dsn, to=label)
    with pytest.raises(MigrationError, match=f"{label} cannot be taken back without loss"):
        migrate.down(empty_dsn, label)
    if label != LABELS[0]:
        with pytest.raises(MigrationError, match=f"{LABELS[0]} is not the newest"):
            migrate.down(empty_dsn, LABELS[0])


def test_the_versions_differ_in_nothing_but_how_they_write_a_view(
    server: EmbeddedServer, owner_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    catalog = catalog_of(owner_dsn)
    assert not [thing for thing in catalog.objects if re.search(r"PostgreSQL|1[58]\.", thing.name)]
    other = other_server(server)
    if other is None:
        pytest.skip("ONLY ONE VERSION OF POSTGRESQL IS HERE: nothing to compare")
    from equitie_data.embedded import EmbeddedServer as Server

    with Server(bin_dir=other) as second, fresh_database(second) as name:
        migrate.migrate(second.dsn(name))
        there = catalog_of(second.dsn(name))
    assert [
        sentence
        for sentence in found(catalog, there)
        # PostgreSQL 16 and newer leave out the table where a view has only one.
        if not re.search(r"query_stats_hourly has another definition", sentence)
    ] == []


def other_server(server: EmbeddedServer) -> Any:
    from equitie_data.embedded import find_servers

    return next((each.bin_dir for each in find_servers() if each.major != server.major), None)
