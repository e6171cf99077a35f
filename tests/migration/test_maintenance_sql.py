"""What SQL does by itself, for pg_cron: months, few late rows, statistics of parents, tasks; and who may call it."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import psycopg
import pytest

from equitie_data.maintenance import maintain, status
from equitie_data.maintenance.period import add_months, month_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.migration.conftest import Platform

TRANSACTIONS = "public.transactions_clean"
TODAY = dt.datetime.now(dt.timezone.utc).date()
CALL = "CALL equitie_private.maintain()"


def add_late(platform: Platform, day: dt.date | str, rows: int = 1) -> None:
    platform.owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT %s, %s, %s::date, 1 FROM generate_series(1, %s)",
        [platform.ids["deal_a"], platform.ids["investor_a"], day, rows],
    )


def months_of(platform: Platform) -> set[str]:
    return {
        row[0]
        for row in platform.rows(
            "SELECT to_char(from_key AT TIME ZONE 'UTC', 'YYYY-MM')"
            " FROM equitie_private.month_partition_bounds(%s) WHERE NOT is_default",
            TRANSACTIONS,
        )
    }


def test_one_call_does_what_sql_can_do(platform: Platform) -> None:
    gap = add_months(month_of(TODAY), 3)
    platform.owner.execute(f"DROP TABLE equitie_part.transactions_clean_{gap:%Y_%m}")
    add_late(platform, "2024-05-31", 3)
    add_late(platform, "2099-05-31", 2)
    add_late(platform, add_months(TODAY, -86), 2)
    platform.owner.execute(CALL)
    assert {f"{gap:%Y-%m}", "2024-05"} <= months_of(platform)
    assert platform.one("SELECT count(*) FROM ONLY equitie_part.transactions_clean_default") == 4
    (run,) = platform.rows("SELECT source, outcome, report FROM equitie_private.maintenance_runs")
    assert run[:2] == ("sql", "done")
    assert f"made {gap:%Y-%m} of {TRANSACTIONS} with 0 late rows" in run[2]["done"]
    assert f"made 2024-05 of {TRANSACTIONS} with 3 late rows" in run[2]["done"]
    assert platform.rows("SELECT name FROM equitie_private.maintenance_tasks WHERE last_run IS NULL") == []
    platform.owner.execute(CALL)
    (run,) = platform.rows("SELECT report FROM equitie_private.maintenance_runs ORDER BY run_id DESC LIMIT 1")
    assert run[0] == {"done": [], "not_done": []}


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Etc/GMT+12"])
def test_months_begin_at_midnight_utc_whatever_the_sessions_time_zone(platform: Platform, zone: str) -> None:
    gap = add_months(month_of(TODAY), 3)
    platform.owner.execute(f"DROP TABLE equitie_part.audit_logs_{gap:%Y_%m}")
    platform.owner.execute(
        'INSERT INTO audit_logs ("timestamp", source, actor_type, action, entity_type)'
        " VALUES ('2026-01-01 00:00+00', 'sdk', 'database', 'READ', 'x')"
    )
    platform.owner.execute(f"SET TimeZone = '{zone}'")
    platform.owner.execute(CALL)
    platform.owner.execute("SET TimeZone = 'UTC'")
    found = platform.rows(
        "SELECT partition::text, from_key::text FROM equitie_private.month_partition_bounds('public.audit_logs')"
    )
    assert (f"equitie_part.audit_logs_{gap:%Y_%m}", f"{gap} 00:00:00+00") in found
    assert ("equitie_part.audit_logs_2026_01", "2026-01-01 00:00:00+00") in found


def test_the_service_may_call_it_and_nobody_else(platform: Platform) -> None:
    platform.app.execute("SET ROLE service_role")
    platform.app.execute(CALL)
    (row,) = platform.app.execute(
        "SELECT parent, partitions, next_gap, default_rows FROM equitie_private.maintenance_status() WHERE parent = %s",
        [TRANSACTIONS],
    ).fetchall()
    assert row == (TRANSACTIONS, 13, add_months(month_of(TODAY), 13), 0)
    platform.app.execute("RESET ROLE")
    assert platform.rows("SELECT outcome FROM equitie_private.maintenance_runs") == [("done",)]
    for person in ("investor_a", "admin", "inactive_admin"):
        for call in (
            "maintenance_status()",
            "maintenance_steps()",
            "retention_start('x')",
            "begin_maintenance_run('sql')",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
                conn.execute(f"SELECT equitie_private.{call}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(person) as conn:
            conn.execute(CALL)
    for call in (
        "place_legal_hold('r', 'me', NULL, NULL, NULL, NULL, NULL)",
        "release_legal_hold(1, 'me')",
        "detach_month('public.transactions_clean', 'public.transactions_clean', '2100-01-01', 50)",
        "drop_retired(1, 50)",
        "begin_drain('public.transactions_clean', '{}', 50)",
        "make_month('public.transactions_clean', '2024-01-01', 0, 50)",
        "run_maintenance_task('purge idempotency keys')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), platform.acting(None) as conn:
            conn.execute(f"SELECT equitie_private.{call}")


def test_a_month_too_full_for_sql_is_left_to_the_command(platform: Platform, owner_dsn: str) -> None:
    add_late(platform, "2024-05-31", 2001)
    add_late(platform, "2024-06-30", 1)
    with ServerWarnings(platform) as messages:
        platform.owner.execute(CALL)
    assert "more than 2000 late rows" in messages[0]
    assert months_of(platform) & {"2024-05", "2024-06"} == {"2024-06"}
    assert platform.rows("SELECT outcome FROM equitie_private.maintenance_runs") == [("incomplete",)]
    assert not maintain(owner_dsn).needs_attention
    assert platform.one("SELECT count(*) FROM equitie_part.transactions_clean_2024_05") == 2001


class ServerWarnings:
    """Collects the server's warnings."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._messages: list[str] = []

    def __enter__(self) -> list[str]:
        self._platform.owner.add_notice_handler(self._note)
        return self._messages

    def __exit__(self, *_: object) -> None:
        self._platform.owner.remove_notice_handler(self._note)

    def _note(self, diagnostic: psycopg.errors.Diagnostic) -> None:
        self._messages.append(diagnostic.message_primary or "")


def test_who_is_in_the_way_does_not_wait_for_the_procedure(platform: Platform, owner_dsn: str) -> None:
    add_late(platform, "2024-05-31")
    with psycopg.connect(owner_dsn) as reader:
        reader.execute("SELECT count(*) FROM transactions_clean")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            platform.owner.execute("SELECT equitie_private.make_month(%s, '2024-05-01', 10, 20)", [TRANSACTIONS])
    platform.owner.execute("SELECT equitie_private.make_month(%s, '2024-05-01', 10, 5000)", [TRANSACTIONS])
    assert "2024-05" in months_of(platform)


@pytest.mark.parametrize("by", ["sql", "command"])
def test_a_task_that_fails_is_noted_and_keeps_nobody(platform: Platform, owner_dsn: str, by: str) -> None:
    platform.owner.execute(
        "CREATE FUNCTION public.broken() RETURNS bigint LANGUAGE plpgsql AS"
        " $$ BEGIN CREATE TABLE public.half_done (a int); RAISE 'out of cheese'; END $$;"
        "CREATE FUNCTION public.fine() RETURNS bigint LANGUAGE sql AS 'SELECT 42::bigint';"
        "INSERT INTO equitie_private.maintenance_tasks (name, function, every) VALUES"
        " ('a broken one', 'public.broken()', '1 day'), ('b missing', 'public.missing()', '1 day'),"
        " ('c fine', 'public.fine()', '1 day'), ('d later', 'public.fine()', '1 day');"
        "UPDATE equitie_private.maintenance_tasks SET last_run = now() - interval '1 hour' WHERE name = 'd later'"
    )
    if by == "sql":
        with ServerWarnings(platform) as messages:
            platform.owner.execute(CALL)
        assert "out of cheese" in messages[0]
    else:
        report = maintain(owner_dsn)
        assert len(report.failures) == 2
        assert "out of cheese" in report.failures[0]
    assert platform.rows(
        "SELECT name, last_result, last_error IS NULL, last_run > now() - interval '1 minute'"
        " FROM equitie_private.maintenance_tasks WHERE name ~ '^[a-d] ' ORDER BY name"
    ) == [
        ("a broken one", None, False, True),
        ("b missing", None, False, True),
        ("c fine", 42, True, True),
        ("d later", None, True, False),
    ]
    assert platform.one("SELECT to_regclass('public.half_done')") is None
    assert [sentence for sentence in status(owner_dsn).overdue if "The task 'a broken one' failed" in sentence]
    assert any("names the function public.missing()" in each for each in verify_findings(owner_dsn))


def verify_findings(dsn: str) -> tuple[str, ...]:
    from equitie_data.migrate import verify

    return tuple(verify(dsn))


def test_parents_are_analyzed_when_it_is_worth_it(
    platform: Platform, add_transactions: Callable[[Platform, int], None]
) -> None:
    def analyze() -> bool:
        # What this session has counted reaches the others' statistics at the end of a transaction, after a second.
        platform.owner.execute("SELECT pg_stat_force_next_flush()")
        return bool(platform.one("SELECT equitie_private.analyze_parent(%s)", TRANSACTIONS))

    add_transactions(platform, 300)
    assert analyze()
    assert platform.one("SELECT count(*) FROM pg_stats WHERE tablename = 'transactions_clean' AND inherited") > 0
    assert not analyze()
    add_transactions(platform, 5000)
    assert analyze()
    add_transactions(platform, 1)
    assert not analyze()
    platform.owner.execute("UPDATE equitie_private.retention_policies SET analyzed_at = now() - interval '25 hours'")
    assert analyze()
    platform.owner.execute("UPDATE equitie_private.retention_policies SET analyzed_at = now() - interval '25 hours'")
    assert not analyze(), "nothing has changed since"


def test_status_says_when_maintenance_stopped(platform: Platform, owner_dsn: str) -> None:
    assert "Maintenance has never run on this database." in status(owner_dsn).overdue
    maintain(owner_dsn)
    assert status(owner_dsn).overdue == ()
    platform.owner.execute("UPDATE equitie_private.maintenance_runs SET started_at = now() - interval '3 days'")
    (sentence,) = status(owner_dsn).overdue
    assert "it should run every day" in sentence


def test_verify_finds_what_was_altered(platform: Platform, owner_dsn: str) -> None:
    assert verify_findings(owner_dsn) == ()
    month = f"equitie_part.transactions_clean_{TODAY:%Y_%m}"
    platform.owner.execute(f"DROP TRIGGER audit_truncate ON {month}")
    platform.owner.execute("GRANT SELECT ON equitie_private.legal_holds TO equitie_staff")
    platform.owner.execute("INSERT INTO equitie_private.retention_policies (parent) VALUES ('public.companies_clean')")
    found = "\n".join(verify_findings(owner_dsn))
    assert f"The partition {month} lacks the trigger audit_truncate" in found
    assert "equitie_staff holds a privilege on equitie_private.legal_holds" in found
    assert "The retention policy of public.companies_clean names no table" in found
    default = "equitie_part.transactions_clean_default"
    platform.owner.execute("SELECT equitie_private.copy_statement_triggers(%s, %s)", [default, month])
    assert "lacks the trigger" not in "\n".join(verify_findings(owner_dsn))


def test_an_owner_who_is_no_superuser_maintains(platform: Platform, owner_dsn: str) -> None:
    """Everything ours given to an ordinary role: what it sees of other sessions is less, and enough."""
    name = f"owner_{platform.one('SELECT current_database()')}"
    platform.owner.execute(
        f"CREATE ROLE {name} LOGIN PASSWORD 'for-a-second';"
        f"GRANT CREATE ON DATABASE {platform.one('SELECT current_database()')} TO {name}"
    )
    try:
        platform.owner.execute(
            "DO $$ DECLARE o record; BEGIN"
            " FOR o IN SELECT format('ALTER %s %s OWNER TO " + name + "', k, n) AS c FROM ("
            "  SELECT 'SCHEMA' AS k, nspname::text AS n FROM pg_namespace WHERE nspname ~ '^equitie|^public$'"
            "  UNION ALL SELECT CASE relkind WHEN 'm' THEN 'MATERIALIZED VIEW' WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END,"
            "   oid::regclass::text FROM pg_class WHERE relkind IN ('r', 'p', 'm', 'v')"
            "   AND relnamespace::regnamespace::text ~ '^equitie_p|^public$'"
            "  UNION ALL SELECT 'ROUTINE', oid::regprocedure::text FROM pg_proc WHERE prokind <> 'a'"
            "   AND pronamespace IN ('public'::regnamespace, 'equitie_private'::regnamespace)"
            " ) AS x LOOP EXECUTE o.c; END LOOP; END $$"
        )
        add_late(platform, "2024-05-31", 2)
        dsn = psycopg.conninfo.make_conninfo(owner_dsn, user=name, password="for-a-second")
        report = maintain(dsn)
        assert not report.needs_attention, report
        assert "2024-05" in months_of(platform)
    finally:
        platform.owner.execute(f"REASSIGN OWNED BY {name} TO postgres; DROP OWNED BY {name}; DROP ROLE {name}")
