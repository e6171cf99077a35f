"""An application at work on each kind of deployment: with BYPASSRLS for the service, and by policies alone."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest

from equitie_data import AuditAction, Database, acting_as, as_service, migrate
from equitie_data.csv_import import import_csv

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deployment.conftest import Deployment

CSV = b"company,investor,date,amount\nAcme,Ada,2024-02-01,100\nAcme,Grace,2024-03-01,50\n"


@pytest.fixture(scope="module")
def database(deployment: Deployment) -> Iterator[Database]:
    with Database(deployment.app_dsn) as database:
        yield database


def test_it_is_what_it_is_called(deployment: Deployment) -> None:
    with psycopg.connect(deployment.admin_dsn) as admin:
        bypasses = admin.execute("SELECT rolbypassrls FROM pg_roles WHERE rolname = 'service_role'").fetchone()
    assert bypasses == (deployment.project is not None,)
    assert migrate.verify(deployment.owner_dsn) == ()


def test_investments_are_imported_and_everybody_sees_their_own(database: Database) -> None:
    with as_service("import"):
        report = import_csv(database, io.BytesIO(CSV))
        again = import_csv(database, io.BytesIO(CSV))
        assert (report.inserted + report.duplicates, again.inserted, again.duplicates) == (2, 0, 2)
        people = {role: uuid4() for role in ("investor", "viewer", "analyst", "admin", "auditor")}
        for role, user in people.items():
            database.execute_write(
                "INSERT INTO user_profiles (user_id, email, role, investor_id) VALUES (%s, %s, %s,"
                " (SELECT investor_id FROM investors_clean WHERE full_name = 'Ada'))",
                [user, f"{user}@example.com", role],
            )
        transactions = database.execute_read("SELECT count(*) FROM transactions_clean")[0][0]
        assert transactions >= 2
    for role, seen in (("investor", 1), ("viewer", 1), ("analyst", transactions), ("admin", transactions)):
        with acting_as(people[role]):
            assert database.execute_read("SELECT count(*) FROM transactions_clean") == [(seen,)]
            assert database.execute_read("SELECT count(*) FROM deals_clean")[0][0] >= 1
    with acting_as(people["investor"]):
        assert database.execute_write("UPDATE investors_clean SET phone = '1'") == 1
    with acting_as(people["viewer"]):
        assert database.execute_write("UPDATE investors_clean SET phone = '2'") == 0
    with acting_as(people["admin"]):
        written = database.execute_write("UPDATE transactions_clean SET amount = amount WHERE amount = 100")
        assert written == 1
        assert database.execute_write("UPDATE user_profiles SET role = 'viewer' WHERE user_id = %s", [people["viewer"]])


def test_a_key_is_kept_and_events_are_logged_and_read(database: Database) -> None:
    auditor, analyst, key = uuid4(), uuid4(), str(uuid4())
    with as_service("a test"):
        for user, role in ((auditor, "auditor"), (analyst, "analyst")):
            database.execute_write(
                "INSERT INTO user_profiles (user_id, email, role) VALUES (%s, %s, %s)", [user, str(user), role]
            )
        insert = "INSERT INTO companies_clean (company_name) VALUES (%s) RETURNING company_name"
        first = database.execute_write(insert, [key], idempotency_key=key)
        assert database.execute_write(insert, [key], idempotency_key=key) == first
        database.audit.log(AuditAction.EXPORT, "company", key)
        database.audit.flush()
        assert database.execute_read("SELECT count(*) FROM audit_logs WHERE entity_id = %s", [key]) == [(1,)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            database.execute_write("DELETE FROM audit_logs")
    with acting_as(auditor):
        assert database.execute_read("SELECT action FROM audit_logs WHERE entity_id = %s", [key]) == [("EXPORT",)]
    with acting_as(analyst):
        assert database.execute_read("SELECT count(*) FROM audit_logs") == [(0,)]


def test_statistics_are_recorded_and_refreshed(database: Database) -> None:
    statistics = '[{"minute": "2026-01-01", "worker": "w", "fingerprint": "f", "query_text": "q", "operation": "read",'
    statistics += ' "calls": 2, "buckets": {"1": 2}}]'
    with as_service("a test"):
        assert database.execute_write("SELECT equitie_private.record_query_stats(%s)", [statistics]) == [(1,)]
        database.execute_write("SELECT equitie_private.refresh_query_stats_hourly()")
        found = database.execute_read("SELECT buckets FROM equitie_private.query_stats_by_hour('-infinity')")
        assert found[0][0]["1"] >= 2
        database.execute_write("INSERT INTO system_metrics (metric_name, metric_value) VALUES ('m', 1)")
        assert database.execute_write("UPDATE performance_alerts SET resolved_at = now()") == 0


def test_the_owner_maintains(deployment: Deployment) -> None:
    with psycopg.connect(deployment.owner_dsn, autocommit=True) as owner:
        owner.execute("CALL equitie_private.maintain()")
    assert migrate.verify(deployment.owner_dsn) == ()
