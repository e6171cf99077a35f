"""One run brings months, late rows and interrupted work to where they ought to be; nobody misses a row meanwhile."""

from __future__ import annotations

import datetime as dt
import threading
import time
from typing import TYPE_CHECKING, Any

import attrs
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equitie_data.errors import ConfigurationError, MaintenanceError
from equitie_data.maintenance import maintain
from equitie_data.maintenance import run as run_module
from equitie_data.maintenance.period import Period, add_months, month_of
from equitie_data.maintenance.plan import Limits, months_between
from equitie_data.maintenance.run import Options
from equitie_data.maintenance.session import Locking, open_session, take_turn

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.migration.conftest import Platform

    from equitie_data.maintenance import MaintenanceReport

TRANSACTIONS = "public.transactions_clean"
DEFAULT = "equitie_part.transactions_clean_default"
TODAY = dt.datetime.now(dt.timezone.utc).date()
INSERT = (
    "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
    " VALUES (%s, %s, %s, %s) RETURNING transaction_id"
)
DIGEST = (
    "SELECT count(*), sum(amount), sum(hashtextextended(t::text, 1)), count(DISTINCT transaction_id)"
    " FROM transactions_clean AS t"
)


def months_of(platform: Platform, parent: str = TRANSACTIONS) -> set[dt.date]:
    """First days of the months that have a partition of their own."""
    return {
        start.date()
        for start, end in platform.rows(
            "SELECT from_key AT TIME ZONE 'UTC', to_key AT TIME ZONE 'UTC'"
            " FROM equitie_private.month_partition_bounds(%s) WHERE NOT is_default",
            parent,
        )
        if add_months(start.date(), 1) == end.date()
    }


def add_late(platform: Platform, day: str | dt.date, rows: int = 1, amount: int = 1) -> None:
    platform.owner.execute(
        "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
        " SELECT %s, %s, %s::date, %s FROM generate_series(1, %s)",
        [platform.ids["deal_a"], platform.ids["investor_a"], day, amount, rows],
    )


def run_with(dsn: str, **options: Any) -> MaintenanceReport:
    """A run with options that only tests have."""
    with open_session(dsn) as conn, take_turn(conn, 5):
        return run_module._Run(conn, Options(**options)).run()


COPYING = Limits(rows=0, bytes=0, months=2)
"""Has every month made by copying."""


# Months -----------------------------------------------------------------------------------------------------------


def test_a_migrated_database_needs_nothing_but_its_first_run(platform: Platform, owner_dsn: str) -> None:
    first = maintain(owner_dsn)
    assert {step.kind for step in first.steps} <= {"analyze", "task"}
    assert not first.needs_attention
    assert maintain(owner_dsn).steps == ()
    outcomes = platform.rows("SELECT source, outcome, finished_at IS NOT NULL FROM equitie_private.maintenance_runs")
    assert outcomes == [("command", "done", True)] * 2


@pytest.mark.parametrize("limits", [Limits(), COPYING], ids=["short steps", "copying"])
def test_months_are_kept_ahead_for_every_policy(platform: Platform, owner_dsn: str, limits: Limits) -> None:
    later = add_months(TODAY, 8)
    run_with(owner_dsn, today=later, limits=limits)
    for parent in (TRANSACTIONS, "public.audit_logs"):
        wanted = set(months_between(month_of(later), add_months(month_of(later), 12)))
        assert wanted <= months_of(platform, parent)
    assert platform.rows("SELECT * FROM equitie_private.partition_drains") == []


def test_a_table_of_the_applications_own_is_looked_after(platform: Platform, owner_dsn: str) -> None:
    platform.owner.execute(
        "CREATE TABLE public.prices (price_id bigint, day date, value numeric, PRIMARY KEY (price_id, day))"
        " PARTITION BY RANGE (day);"
        "CREATE TABLE equitie_part.prices_default PARTITION OF public.prices DEFAULT;"
        "INSERT INTO public.prices SELECT g, current_date - 40, g FROM generate_series(1, 5) AS g;"
        "INSERT INTO equitie_private.retention_policies (parent, months_ahead, keep, amount_column)"
        " VALUES ('public.prices', 2, '2 months', 'value')"
    )
    assert not maintain(owner_dsn).needs_attention
    assert set(months_between(month_of(TODAY), add_months(month_of(TODAY), 2))) <= months_of(platform, "public.prices")
    assert platform.one("SELECT count(*) FROM ONLY equitie_part.prices_default") == 0
    assert platform.one("SELECT count(*) FROM public.prices") == 5


def test_a_dry_run_says_what_a_run_does_and_changes_nothing(platform: Platform, owner_dsn: str) -> None:
    add_late(platform, "2024-05-31", 3)
    maintain(owner_dsn, today=TODAY)
    add_late(platform, "2024-06-01", 2)
    later = add_months(TODAY, 2)
    before = platform.rows(
        "SELECT c.oid::regclass::text, xmin::text FROM pg_class AS c"
        " WHERE relnamespace IN ('equitie_part'::regnamespace, 'equitie_private'::regnamespace) ORDER BY 1"
    )
    rehearsed = maintain(owner_dsn, dry_run=True, today=later)
    assert rehearsed.run_id is None
    assert before == platform.rows(
        "SELECT c.oid::regclass::text, xmin::text FROM pg_class AS c"
        " WHERE relnamespace IN ('equitie_part'::regnamespace, 'equitie_private'::regnamespace) ORDER BY 1"
    )
    done = maintain(owner_dsn, today=later)

    def named(report: MaintenanceReport) -> list[tuple[str, str]]:
        return [(step.kind, step.subject) for step in report.steps if step.kind == "month"]

    assert named(rehearsed) == named(done)
    assert ("month", f"{TRANSACTIONS} 2024-06") in named(done)


@pytest.mark.parametrize("limits", [Limits(), COPYING], ids=["short steps", "copying"])
def test_a_gap_is_filled_and_a_partition_made_by_hand_is_left_alone(
    platform: Platform, owner_dsn: str, limits: Limits
) -> None:
    gap = add_months(month_of(TODAY), 2)
    cut = add_months(month_of(TODAY), 4)
    for month in (gap, cut):
        platform.owner.execute(f"DROP TABLE equitie_part.transactions_clean_{month:%Y_%m}")
    platform.owner.execute(
        "CREATE TABLE equitie_part.by_hand PARTITION OF transactions_clean"
        f" FOR VALUES FROM ('{cut:%Y-%m}-10') TO ('{add_months(cut, 1)}')"
    )
    report = run_with(owner_dsn, limits=limits)
    assert gap in months_of(platform)
    assert any(f"The month {cut:%Y-%m}" in each and "equitie_part.by_hand" in each for each in report.overdue)
    assert report.needs_attention
    assert report.failures == ()


def test_a_table_in_the_way_is_named_and_the_rest_is_done(platform: Platform, owner_dsn: str) -> None:
    month = add_months(month_of(TODAY), 3)
    platform.owner.execute(f"DROP TABLE equitie_part.transactions_clean_{month:%Y_%m}")
    platform.owner.execute(f"CREATE TABLE equitie_part.transactions_clean_{month:%Y_%m} (a int)")
    add_late(platform, "2024-05-31")
    report = maintain(owner_dsn)
    assert any("exists, but is not a partition" in each for each in report.failures)
    assert any("is no partition and was not retired" in each for each in report.notes)
    assert dt.date(2024, 5, 1) in months_of(platform)
    assert platform.rows("SELECT outcome FROM equitie_private.maintenance_runs") == [("failed",)]


# Late rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [Limits(), COPYING], ids=["short steps", "copying"])
def test_late_rows_move_to_their_month_and_typing_errors_stay(
    platform: Platform, owner_dsn: str, limits: Limits
) -> None:
    first_kept = month_of(add_months(TODAY, -84))
    last = add_months(month_of(TODAY), 12)
    inside = [first_kept, dt.date(2024, 2, 29), dt.date(2023, 12, 31), dt.date(2024, 1, 1)]
    outside = [dt.date(1013, 1, 1), first_kept - dt.timedelta(days=1), add_months(last, 1), dt.date(2099, 12, 31)]
    for day in inside + outside:
        add_late(platform, day, 2, 7)
    platform.owner.execute(INSERT, [platform.ids["deal_a"], platform.ids["investor_a"], dt.date(2024, 2, 1), 3])
    # An id from before ids carried days, and one whose date was corrected.
    platform.owner.execute(
        "INSERT INTO transactions_clean (transaction_id, deal_id, investor_id, transaction_date, amount)"
        " VALUES (4711, %s, %s, '2024-02-02', 5)",
        [platform.ids["deal_a"], platform.ids["investor_a"]],
    )
    platform.owner.execute("UPDATE transactions_clean SET transaction_date = '2024-01-31' WHERE amount = 3")
    before, mark = platform.rows(DIGEST), platform.mark()
    strays = platform.rows("SELECT * FROM equitie_private.stray_transactions ORDER BY 1")

    report = run_with(owner_dsn, limits=limits)

    assert platform.rows(DIGEST) == before
    assert platform.rows("SELECT * FROM equitie_private.stray_transactions ORDER BY 1") == strays
    assert platform.events_after(mark, "action") == []
    assert {month_of(day) for day in inside} <= months_of(platform)
    assert platform.rows(f"SELECT transaction_date FROM ONLY {DEFAULT} GROUP BY 1 ORDER BY 1") == [
        (day,) for day in sorted(outside)
    ]
    assert any("8 rows of public.transactions_clean wait in the default partition" in each for each in report.notes)
    assert not report.needs_attention
    assert run_with(owner_dsn, limits=limits).steps == ()
    # The months are as any other: audited, constrained, indexed, out of reach.
    mark = platform.mark()
    platform.owner.execute("DELETE FROM transactions_clean WHERE transaction_date = '2024-02-29'")
    platform.owner.execute("DELETE FROM equitie_part.transactions_clean_2023_12")
    platform.owner.execute(f"DELETE FROM {DEFAULT} WHERE transaction_date = '2099-12-31'")
    assert platform.events_after(mark, "action") == [("DELETE",)] * 6
    assert verify_findings(owner_dsn) == ()
    assert month_shape(platform, "2024_02") == month_shape(platform, f"{TODAY:%Y_%m}")
    assert month_shape(platform, "default") == month_shape(platform, f"{TODAY:%Y_%m}")


def verify_findings(dsn: str) -> tuple[str, ...]:
    from equitie_data.migrate import verify

    return tuple(verify(dsn))


def month_shape(platform: Platform, suffix: str) -> list[Any]:
    """Constraints, triggers, indexes and privileges of a partition, without its name."""
    name = f"equitie_part.transactions_clean_{suffix}"
    return platform.owner.execute(
        "SELECT 'constraint', k.conname, pg_get_constraintdef(k.oid), k.convalidated::text FROM pg_constraint AS k"
        " WHERE k.conrelid = %(t)s::text::regclass AND k.contype IN ('c', 'f')"
        " UNION ALL SELECT 'trigger', t.tgname, replace(pg_get_triggerdef(t.oid), %(t)s::text, ''), t.tgenabled::text"
        " FROM pg_trigger AS t WHERE t.tgrelid = %(t)s::text::regclass AND NOT t.tgisinternal"
        " UNION ALL SELECT 'index', replace(replace(pg_get_indexdef(i.oid), i.relname, ''), %(t)s::text, ''), '',"
        " x.indisvalid::text FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid"
        " WHERE x.indrelid = %(t)s::text::regclass"
        " UNION ALL SELECT 'privilege', a.grantee::regrole::text, a.privilege_type, '' FROM pg_class AS c"
        " CROSS JOIN LATERAL aclexplode(c.relacl) AS a"
        " WHERE c.oid = %(t)s::text::regclass AND a.grantee <> c.relowner ORDER BY 1, 2",
        {"t": name},
    ).fetchall()


@pytest.mark.parametrize(
    ("zone", "limits"),
    [("Pacific/Kiritimati", Limits()), ("Etc/GMT+12", Limits()), ("America/Los_Angeles", COPYING)],
    ids=["14 hours ahead", "12 hours behind", "summer time"],
)
def test_months_begin_at_midnight_utc_in_every_time_zone(
    platform: Platform, owner_dsn: str, zone: str, limits: Limits
) -> None:
    for moment in ("2025-12-31 23:59:59.999999+00", "2026-01-01 00:00+00", "2026-01-31 23:59:59.999999+00"):
        platform.owner.execute(
            'INSERT INTO audit_logs ("timestamp", source, actor_type, action, entity_type)'
            " VALUES (%s, 'sdk', 'database', 'READ', 'x')",
            [moment],
        )
    name = platform.one("SELECT current_database()")
    platform.owner.execute(f"ALTER DATABASE {name} SET timezone = '{zone}'")
    report = run_with(owner_dsn, limits=limits)
    assert not report.needs_attention
    assert {dt.date(2025, 12, 1), dt.date(2026, 1, 1)} <= months_of(platform, "public.audit_logs")
    assert platform.one("SELECT count(*) FROM ONLY equitie_part.audit_logs_2025_12") == 1
    assert platform.one("SELECT count(*) FROM ONLY equitie_part.audit_logs_2026_01 WHERE entity_type = 'x'") == 2
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        platform.owner.execute("DELETE FROM audit_logs WHERE entity_type = 'x'")


def test_rows_that_others_refer_to_stay_and_the_foreign_key_is_named(platform: Platform, owner_dsn: str) -> None:
    add_late(platform, "2024-05-31", 2)
    add_late(platform, "2024-06-30", 2)
    platform.owner.execute(
        "CREATE TABLE public.settlements (transaction_id bigint, transaction_date date,"
        " CONSTRAINT fk_settled FOREIGN KEY (transaction_id, transaction_date)"
        "  REFERENCES transactions_clean (transaction_id, transaction_date) ON DELETE CASCADE);"
        "INSERT INTO public.settlements SELECT transaction_id, transaction_date FROM transactions_clean"
        " WHERE transaction_date = '2024-05-31' LIMIT 1"
    )
    before = platform.rows(DIGEST)
    for limits in (Limits(), Limits(rows=1)):
        report = run_with(owner_dsn, limits=limits)
        assert any("refer to them: fk_settled of public.settlements" in each for each in report.failures), report
        assert any("2024-05" in each and "still" in each for each in report.overdue)
        assert platform.rows(DIGEST) == before
        assert platform.one("SELECT count(*) FROM public.settlements") == 1
        assert platform.rows("SELECT * FROM equitie_private.partition_drains") == []
    assert dt.date(2024, 6, 1) in months_of(platform)
    platform.owner.execute("DELETE FROM public.settlements")
    assert not maintain(owner_dsn).needs_attention
    assert dt.date(2024, 5, 1) in months_of(platform)


# While others work ------------------------------------------------------------------------------------------------


def test_nobody_misses_a_row_while_months_are_made(platform: Platform, owner_dsn: str) -> None:
    """Readers see every row in every statement and snapshot; writers reach every row; nothing fails."""
    add_late(platform, "2024-05-10", 1500)
    add_late(platform, "2024-06-10", 1500)
    add_late(platform, "2024-07-10", 20)
    stop = threading.Event()
    problems: list[str] = []
    balance = [0]

    def working(work: Callable[[psycopg.Connection[Any]], None]) -> Callable[[], None]:
        def loop() -> None:
            try:
                with psycopg.connect(owner_dsn, autocommit=True) as conn:
                    while not stop.is_set():
                        work(conn)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test has to show it
                problems.append(repr(error))

        return loop

    def write(conn: psycopg.Connection[Any]) -> None:
        row = conn.execute(INSERT, [platform.ids["deal_a"], platform.ids["investor_a"], "2024-05-11", 1]).fetchone()
        assert row is not None
        key = [row[0]]
        for statement in (
            "UPDATE transactions_clean SET units = 1 WHERE transaction_id = %s",
            "UPDATE transactions_clean SET transaction_date = '2024-06-12' WHERE transaction_id = %s",
            "UPDATE transactions_clean SET transaction_date = '2024-05-12' WHERE transaction_id = %s",
            "DELETE FROM transactions_clean WHERE transaction_id = %s",
        ):
            rows = conn.execute(statement, key).rowcount
            problems.extend([f"{rows} rows found by {statement}"] if rows != 1 else [])
        conn.execute(INSERT, [platform.ids["deal_a"], platform.ids["investor_a"], "2024-07-11", 1])
        balance[0] += 1

    def read(conn: psycopg.Connection[Any]) -> None:
        (rows,) = conn.execute(
            "SELECT count(*) FROM transactions_clean WHERE amount = 1 AND units IS NULL"
            " AND transaction_date IN ('2024-05-10', '2024-06-10')"
        ).fetchone() or (0,)
        if rows != 3000:
            problems.append(f"{rows} rows seen")

    def read_in_a_snapshot(conn: psycopg.Connection[Any]) -> None:
        with conn.transaction():
            conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            conn.execute("SELECT 1")  # takes the snapshot, and no lock on the partitions
            time.sleep(0.05)
            read(conn)

    threads = [threading.Thread(target=working(work)) for work in (write, read, read_in_a_snapshot, read_in_a_snapshot)]
    for thread in threads:
        thread.start()
    try:
        report = run_with(owner_dsn, limits=Limits(rows=1000, months=2), locking=Locking(patience=90))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert not report.needs_attention, report
    assert {step.kind for step in report.steps} >= {"drain"}
    assert platform.one("SELECT count(*) FROM transactions_clean WHERE transaction_date = '2024-07-11'") == balance[0]
    assert (
        platform.one(
            "SELECT sum(amount) FROM transactions_clean WHERE transaction_date BETWEEN '2024-05-01' AND '2024-07-31'"
        )
        == 3020 + balance[0]
    )
    assert platform.one("SELECT count(*) - count(DISTINCT transaction_id) FROM transactions_clean") == 0


@pytest.mark.parametrize("by", ["ensure_month_partitions", "make_month"])
def test_a_statement_that_waited_for_the_move_finds_the_rows_where_they_are_now(
    platform: Platform, owner_dsn: str, by: str
) -> None:
    add_late(platform, "2024-05-10", 3)
    statements = (
        "SELECT count(*) FROM transactions_clean WHERE amount = 1",
        "UPDATE transactions_clean SET units = 1 WHERE amount = 1",
        (
            "INSERT INTO transactions_clean (deal_id, investor_id, transaction_date, amount)"
            f" VALUES ({platform.ids['deal_a']}, {platform.ids['investor_a']}, '2024-05-10', 2)"
        ),
    )
    found: dict[str, Any] = {}

    def work(statement: str) -> None:
        with psycopg.connect(owner_dsn, autocommit=True) as conn:
            cursor = conn.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            found[statement] = cursor.rowcount if row is None else row[0]

    threads = [threading.Thread(target=work, args=(statement,)) for statement in statements]
    with psycopg.connect(owner_dsn) as mover:
        arguments = {"ensure_month_partitions": "'2024-05-01', '2024-05-01'", "make_month": "'2024-05-01', 10, 1000"}
        mover.execute(f"SELECT equitie_private.{by}('public.transactions_clean', {arguments[by]})")
        for thread in threads:
            thread.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        while platform.one(waiting) < len(threads):
            time.sleep(0.01)
        mover.commit()
    for thread in threads:
        thread.join()
    assert [found.get(statement) for statement in statements] == [3, 3, 1]


def test_who_is_in_the_way_is_named_and_waited_for_without_holding_others_up(
    platform: Platform, owner_dsn: str
) -> None:
    add_late(platform, "2024-05-10", 3)
    with psycopg.connect(owner_dsn) as reader:
        reader.execute("SELECT count(*) FROM transactions_clean")
        pid = reader.info.backend_pid
        report = maintain(owner_dsn, patience=0.3)
        assert any(f"server process {pid}" in each and "2024-05" in each for each in report.not_done)
        assert any("2024-05" in each for each in report.overdue)
        assert report.outcome == "incomplete"
    assert not maintain(owner_dsn).needs_attention


def test_an_older_snapshot_is_waited_for_before_copies_take_over(platform: Platform, owner_dsn: str) -> None:
    add_late(platform, "2024-05-10", 3)
    with psycopg.connect(owner_dsn) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        report = run_with(owner_dsn, limits=COPYING, locking=Locking(patience=0.3))
        assert any("transaction open since before" in each for each in report.not_done), report
        assert platform.rows("SELECT * FROM equitie_private.partition_drains") == []
        assert reader.execute("SELECT count(*) FROM transactions_clean WHERE amount = 1").fetchone() == (3,)
    assert not run_with(owner_dsn, limits=COPYING).needs_attention
    assert platform.one("SELECT count(*) FROM equitie_part.transactions_clean_2024_05") == 3


@pytest.mark.parametrize("moment", ["drain begun", "drain copied", "drain verified"])
def test_rows_that_others_move_past_the_mirror_start_the_drain_over(
    platform: Platform, owner_dsn: str, moment: str
) -> None:
    for day in ("2024-05-10", "2024-06-10", "2024-07-10"):
        add_late(platform, day, 10)
    before = platform.rows(DIGEST)
    seen: list[str] = []

    def interfere(at: str) -> None:
        if at == moment and at not in seen:
            # As an import does.
            platform.owner.execute(
                "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)",
                ["2024-05-01"] * 2,
            )
        seen.append(at)

    report = run_with(owner_dsn, limits=COPYING, boundary=interfere)
    assert platform.rows(DIGEST) == before
    assert "drain starts over" in seen or report.failures
    assert platform.rows("SELECT * FROM equitie_private.partition_drains") == []
    assert not run_with(owner_dsn, limits=COPYING).needs_attention
    assert platform.rows(DIGEST) == before
    assert platform.one(f"SELECT count(*) FROM ONLY {DEFAULT}") == 0


@pytest.mark.parametrize("moment", ["drain begun", "drain copied", "drain verified"])
def test_whatever_happens_to_late_rows_meanwhile_is_repeated_on_the_copies(
    platform: Platform, owner_dsn: str, moment: str
) -> None:
    for day in ("2024-05-10", "2024-06-10", "2099-07-10"):
        add_late(platform, day, 20)

    def interfere(at: str) -> None:
        if at != moment:
            return
        platform.owner.execute(
            "DELETE FROM transactions_clean WHERE transaction_id IN (SELECT transaction_id FROM transactions_clean"
            " WHERE transaction_date = '2024-05-10' ORDER BY 1 LIMIT 5)"
        )
        platform.owner.execute("UPDATE transactions_clean SET amount = 2 WHERE transaction_date = '2024-06-10'")
        platform.owner.execute(
            "UPDATE transactions_clean SET transaction_date = '2099-07-11'"
            " WHERE transaction_id IN (SELECT transaction_id FROM transactions_clean"
            "  WHERE transaction_date = '2024-06-10' ORDER BY 1 LIMIT 3)"
        )
        platform.owner.execute(
            "UPDATE transactions_clean SET transaction_date = '2024-05-31'"
            " WHERE transaction_id IN (SELECT transaction_id FROM transactions_clean"
            "  WHERE transaction_date = '2099-07-10' ORDER BY 1 LIMIT 4)"
        )
        add_late(platform, "2024-06-30", 2)
        before[:] = platform.rows(DIGEST)

    before: list[Any] = []
    report = run_with(owner_dsn, limits=COPYING, boundary=interfere)
    assert not report.needs_attention, report
    assert platform.rows(DIGEST) == before
    counted = platform.rows(
        "SELECT tableoid::regclass::text, count(*) FROM transactions_clean"
        " WHERE transaction_date NOT BETWEEN current_date - 90 AND current_date + 90 GROUP BY 1 ORDER BY 1"
    )
    assert counted == [
        ("equitie_part.transactions_clean_2024_05", 19),
        ("equitie_part.transactions_clean_2024_06", 19),
        (DEFAULT, 19),
    ]


@pytest.mark.parametrize("moment", ["drain copied", "drain verified"])
def test_a_truncated_table_has_no_copies_left(platform: Platform, owner_dsn: str, moment: str) -> None:
    add_late(platform, "2024-05-10", 5)

    def interfere(at: str) -> None:
        if at == moment and platform.one(f"SELECT count(*) FROM ONLY {DEFAULT}"):
            platform.owner.execute("TRUNCATE transactions_clean")

    run_with(owner_dsn, limits=COPYING, boundary=interfere)
    assert platform.one("SELECT count(*) FROM transactions_clean") == 0


@pytest.mark.parametrize("moment", ["drain begun", "drain verified"])
def test_a_write_goes_on_even_if_it_cannot_be_mirrored(platform: Platform, owner_dsn: str, moment: str) -> None:
    add_late(platform, "2024-05-10", 5)

    def interfere(at: str) -> None:
        if at == moment and not platform.rows("SELECT 1 FROM equitie_private.drain_failures"):
            (table,) = platform.rows(
                "SELECT oid::regclass::text FROM pg_class WHERE relname LIKE 'drain\\_%%\\_2024\\_05' AND relkind = 'r'"
            )[0]
            platform.owner.execute(f"ALTER TABLE {table} ADD CHECK (amount < 100)")
            add_late(platform, "2024-05-10", 1, 100)

    seen: list[str] = []

    def boundary(at: str) -> None:
        seen.append(at)
        if seen.count(moment) == 1:
            interfere(at)

    report = run_with(owner_dsn, limits=COPYING, boundary=boundary)
    assert "drain starts over" in seen
    assert not report.needs_attention, report
    assert platform.one("SELECT sum(amount) FROM equitie_part.transactions_clean_2024_05") == 105


def test_copies_that_differ_are_thrown_away(platform: Platform, owner_dsn: str) -> None:
    add_late(platform, "2024-05-10", 5)
    before = platform.rows(DIGEST)

    def spoil(at: str) -> None:
        if at == "drain copied":
            for (table,) in platform.rows(
                "SELECT oid::regclass::text FROM pg_class WHERE relname LIKE 'drain\\_%%\\_2024\\_05' AND relkind = 'r'"
            ):
                platform.owner.execute(f"UPDATE {table} SET units = 1")

    report = run_with(owner_dsn, limits=COPYING, boundary=spoil)
    assert any("copies of a drain differ" in each for each in report.failures)
    assert platform.rows(DIGEST) == before
    assert platform.rows("SELECT * FROM equitie_private.partition_drains") == []
    assert dt.date(2024, 5, 1) not in months_of(platform)


# Interrupted detaches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("month", "becomes"), [("2017-01", "retired"), ("2024-01", "a table of its own")])
def test_an_interrupted_concurrent_detach_is_finished(
    platform: Platform, owner_dsn: str, month: str, becomes: str
) -> None:
    platform.owner.execute(
        "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)", [f"{month}-01"] * 2
    )
    add_late(platform, f"{month}-10", 4)
    name = f"equitie_part.transactions_clean_{month.replace('-', '_')}"
    # A concurrent detach is possible without a default partition only.
    platform.owner.execute(f"ALTER TABLE transactions_clean DETACH PARTITION {DEFAULT}")
    with psycopg.connect(owner_dsn) as reader:
        reader.execute("SELECT count(*) FROM transactions_clean")
        platform.owner.execute("SET lock_timeout = '100ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            platform.owner.execute(f"ALTER TABLE transactions_clean DETACH PARTITION {name} CONCURRENTLY")
    platform.owner.execute("SET lock_timeout = 0")
    assert platform.rows("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhdetachpending") == [(name,)]
    platform.owner.execute(f"ALTER TABLE transactions_clean ATTACH PARTITION {DEFAULT} DEFAULT")

    report = maintain(owner_dsn)

    assert platform.rows("SELECT 1 FROM pg_inherits WHERE inhdetachpending") == []
    assert ("finalize", name) in [(step.kind, step.subject) for step in report.steps]
    if becomes == "retired":
        (found,) = platform.rows("SELECT state, row_count, table_name FROM equitie_private.retired_partitions")
        assert found == ("settled", 4, "retired_transactions_clean_2017_01")
        assert platform.one(f"SELECT count(*) FROM equitie_part.{found[2]}") == 4
    else:
        assert platform.one(f"SELECT count(*) FROM {name}") == 4
        assert any(name in note and "is no partition" in note for note in report.notes)
    assert not report.failures


# One at a time, and by whom ---------------------------------------------------------------------------------------


def test_runs_take_turns(platform: Platform, owner_dsn: str) -> None:
    with open_session(owner_dsn) as conn, take_turn(conn, 0):
        with pytest.raises(MaintenanceError, match=rf"Another run \(server process {conn.info.backend_pid}\)"):
            maintain(owner_dsn, wait=0.2)
        with pytest.raises(psycopg.errors.ObjectInUse, match="another maintenance run"):
            platform.owner.execute("CALL equitie_private.maintain()")
        with pytest.raises(psycopg.errors.ObjectInUse, match="another maintenance run"):
            platform.owner.execute(
                "SELECT equitie_private.make_month('public.transactions_clean', '2024-01-01', 0, 50)"
            )
        # Reading needs no turn.
        assert maintain(owner_dsn, dry_run=True).run_id is None
    results: list[int] = []

    def one() -> None:
        results.append(len(maintain(owner_dsn, wait=30).failures))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0, 0]


def test_only_the_owner_maintains(platform: Platform, app_dsn: str, owner_dsn: str, empty_dsn: str) -> None:
    with pytest.raises(MaintenanceError, match="owner"):
        maintain(app_dsn)
    with pytest.raises(MaintenanceError, match="run `python -m equitie_data migrate` first"):
        maintain(empty_dsn)
    platform.owner.execute("INSERT INTO equitie_private.retention_policies (parent) VALUES ('public.nowhere')")
    with pytest.raises(MaintenanceError, match=r"public\.nowhere names no table"):
        maintain(owner_dsn)


def test_arguments_that_cannot_be_meant_are_refused(owner_dsn: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigurationError, match="less than a month"):
        maintain(owner_dsn, keep={TRANSACTIONS: Period(days=3)})
    with pytest.raises(ConfigurationError, match=r"public\.x has no retention policy"):
        maintain(owner_dsn, keep={"public.x": Period(months=84)})
    with pytest.raises(MaintenanceError, match="does not exist"):
        maintain(owner_dsn, archive_dir=tmp_path / "missing")


# A model ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class World:
    """What there is before a run."""

    partitions: tuple[dt.date, ...]
    late: tuple[tuple[dt.date, int], ...]
    limits: Limits


@st.composite
def worlds(draw: st.DrawFn) -> World:
    past = st.dates(dt.date(2018, 1, 1), dt.date(2022, 12, 31))
    partitions = draw(st.sets(past.map(month_of), max_size=3))
    odd = st.sampled_from([dt.date(1013, 1, 1), dt.date(2099, 12, 31), add_months(month_of(TODAY), 13)])
    days = draw(st.lists(st.tuples(st.one_of(past, past, odd), st.integers(1, 4)), max_size=5))
    return World(tuple(sorted(partitions)), tuple(days), draw(st.sampled_from([Limits(), Limits(rows=2), COPYING])))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=worlds())
def test_after_a_run_the_catalogs_are_what_a_model_says(platform: Platform, owner_dsn: str, world: World) -> None:
    for month in months_of(platform) - set(months_between(month_of(TODAY), add_months(month_of(TODAY), 12))):
        platform.owner.execute(f"DROP TABLE equitie_part.transactions_clean_{month:%Y_%m}")
    platform.owner.execute(
        "DELETE FROM transactions_clean; DELETE FROM equitie_private.retired_partitions;"
        "DO $$ DECLARE t regclass; BEGIN FOR t IN SELECT oid FROM pg_class WHERE relname LIKE 'retired\\_%'"
        " AND relkind = 'r' AND relnamespace = 'equitie_part'::regnamespace"
        " LOOP EXECUTE 'DROP TABLE ' || t; END LOOP; END $$"
    )
    for month in world.partitions:
        platform.owner.execute(
            "SELECT equitie_private.ensure_month_partitions('public.transactions_clean', %s, %s)", [month, month]
        )
    for day, rows in world.late:
        add_late(platform, day, rows)
    report = run_with(owner_dsn, limits=world.limits)

    cutoff = Period(months=84).before(TODAY)
    first, last = month_of(cutoff), add_months(month_of(TODAY), 12)
    held = {month_of(day) for day, _ in world.late}
    retired = {month for month in world.partitions if add_months(month, 1) <= cutoff}
    expected = {month for month in world.partitions if month not in retired}
    expected |= set(months_between(month_of(TODAY), last)) | {month for month in held if first <= month <= last}
    assert months_of(platform) == expected
    assert {
        start.date()
        for (start,) in platform.rows("SELECT from_key AT TIME ZONE 'UTC' FROM equitie_private.retired_partitions")
    } == retired
    visible = sum(rows for day, rows in world.late if month_of(day) not in retired)
    assert platform.one("SELECT count(*) FROM transactions_clean") == visible
    outside = sum(rows for day, rows in world.late if month_of(day) not in expected | retired)
    assert platform.one(f"SELECT count(*) FROM ONLY {DEFAULT}") == outside
    assert platform.one("SELECT coalesce(sum(row_count), 0) FROM equitie_private.retired_partitions") == sum(
        rows for day, rows in world.late if month_of(day) in retired
    )
    assert not report.needs_attention, report
    assert run_with(owner_dsn, limits=world.limits).steps == ()
