"""Migrations no transaction can hold: step by step, resumed after a kill anywhere, never content with INVALID."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data import migrate
from equitie_data.errors import MigrationError
from equitie_data.migrations import session, steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from equitie_data.migrations.files import Migration

    Release = Callable[..., tuple[Migration, ...]]

INVALID = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"


def value(conn: psycopg.Connection[Any], query: str) -> Any:
    row = conn.execute(query).fetchone()
    assert row is not None
    return row[0]


def events(conn: psycopg.Connection[Any]) -> list[Any]:
    return conn.execute("SELECT state, step FROM equitie_migrations.history ORDER BY event_id").fetchall()


def no_transaction(*statements: str) -> str:
    return "-- equitie: transaction=false\n" + "".join(f"{statement};\n" for statement in statements)


def leave_invalid(conn: psycopg.Connection[Any], statement: str) -> None:
    """Build a unique index over duplicates, which leaves it behind INVALID."""
    with pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute(statement)


def parent(conn: psycopg.Connection[Any], months: int = 3) -> None:
    conn.execute("CREATE TABLE public.p (a int, b text, day date) PARTITION BY RANGE (day)")
    for month in range(1, months + 1):
        conn.execute(
            f"CREATE TABLE public.p_{month} PARTITION OF public.p"
            f" FOR VALUES FROM ('2024-{month:02d}-01') TO ('2024-{month + 1:02d}-01')"
        )
    conn.execute("INSERT INTO public.p SELECT g, g::text, date '2024-01-01' + g % 60 FROM generate_series(1, 500) AS g")


def test_each_statement_is_a_recorded_step(empty_dsn: str, owner: psycopg.Connection[Any], release: Release) -> None:
    owner.execute("CREATE TABLE public.t (a int)")
    release(
        {
            "0001_a": no_transaction(
                "INSERT INTO public.t VALUES (1)",
                "CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a)",
                "SELECT 1 / (SELECT count(*) FROM public.t WHERE a = 2)",
                "INSERT INTO public.t VALUES (3)",
            )
        }
    )
    seen: list[tuple[int, int]] = []
    with pytest.raises(MigrationError, match=r"line 4\).*goes on with that statement"):
        migrate.migrate(empty_dsn, on_step=lambda number, count, _: seen.append((number, count)))
    assert seen == [(1, 4), (2, 4)]
    assert events(owner) == [("step", 1), ("step", 2), ("failed", None)]
    assert "2 of its 4 steps are done" in migrate.verify(empty_dsn)[0]
    assert migrate.status(empty_dsn)[0].steps_done == 2
    assert migrate.plan(empty_dsn)[0].steps_done == 2
    owner.execute("INSERT INTO public.t VALUES (2)")
    assert migrate.migrate(empty_dsn).current == "0001_a"
    # Neither insert ran twice.
    assert owner.execute("SELECT a FROM public.t ORDER BY a").fetchall() == [(1,), (2,), (3,)]
    assert events(owner)[3:] == [("step", 3), ("step", 4), ("applied", None)]
    assert migrate.migrate(empty_dsn).applied == ()


def test_a_statement_and_its_record_are_one(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.execute("CREATE TABLE public.t (a int)")
    release({"0001_a": no_transaction("INSERT INTO public.t VALUES (1)")})

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(steps, "record_event", fail)
        with pytest.raises(KeyboardInterrupt):
            migrate.migrate(empty_dsn)
    assert value(owner, "SELECT count(*) FROM public.t") == 0
    migrate.migrate(empty_dsn)
    assert value(owner, "SELECT count(*) FROM public.t") == 1


def test_an_index_that_was_left_invalid_is_built_again(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    owner.execute("CREATE TABLE public.t (a int); INSERT INTO public.t VALUES (1), (1)")
    statement = "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS idx_t_a ON public.t (a)"
    leave_invalid(owner, statement)
    assert owner.execute(INVALID).fetchall() == [("public.idx_t_a",)] or owner.execute(INVALID).fetchall() == [
        ("idx_t_a",)
    ]
    release({"0001_a": no_transaction(statement)})
    with pytest.raises(MigrationError, match="could not create unique index"):
        migrate.migrate(empty_dsn)
    assert "made by step 1 of 0001_a, is INVALID" in migrate.verify(empty_dsn)[1]
    owner.execute("DELETE FROM public.t WHERE ctid = (SELECT min(ctid) FROM public.t)")
    assert migrate.migrate(empty_dsn).current == "0001_a"
    assert owner.execute(INVALID).fetchall() == []
    assert value(owner, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_t_a'::regclass") is True


@pytest.mark.parametrize(
    "other",
    [
        "CREATE INDEX idx_t_a ON public.t (b)",
        "CREATE INDEX idx_t_a ON public.t (a) WHERE a > 0",
        "CREATE UNIQUE INDEX idx_t_a ON public.t (a)",
        "CREATE INDEX idx_t_a ON public.other (a)",
    ],
)
def test_another_index_of_that_name_is_no_substitute(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release, other: str
) -> None:
    owner.execute("CREATE TABLE public.t (a int, b int); CREATE TABLE public.other (a int)")
    owner.execute(other)
    release({"0001_a": no_transaction("CREATE INDEX CONCURRENTLY IF NOT EXISTS idx_t_a ON public.t (a)")})
    with pytest.raises(MigrationError, match="not the one that is to be built"):
        migrate.migrate(empty_dsn)


def test_the_same_index_made_by_hand_is_taken(empty_dsn: str, owner: psycopg.Connection[Any], release: Release) -> None:
    owner.execute('CREATE TABLE public.t (a int, b text); CREATE INDEX "idx T" ON public.t (lower(b), a) WHERE a>3')
    oid = value(owner, "SELECT '\"idx T\"'::regclass::oid")
    text = 'CREATE INDEX CONCURRENTLY "idx T" ON public.t (lower(b), a) WHERE a > 3'
    release({"0001_a": no_transaction(text)})
    migrate.migrate(empty_dsn)
    assert value(owner, "SELECT '\"idx T\"'::regclass::oid") == oid


def test_an_index_on_a_partitioned_table_is_built_partition_by_partition(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    parent(owner)
    # One partition is itself partitioned; one has an index left INVALID by an earlier run; one name is too long.
    owner.execute(
        "CREATE TABLE public.p_4 PARTITION OF public.p FOR VALUES FROM ('2024-05-01') TO ('2024-06-01')"
        " PARTITION BY LIST (a)"
    )
    owner.execute(f"CREATE TABLE public.{'q' * 60} PARTITION OF public.p_4 DEFAULT")
    owner.execute("CREATE UNIQUE INDEX p_1_p_ab ON public.p_1 (a, b)")
    owner.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'p_1_p_ab'::regclass")
    release({"0001_a": no_transaction("CREATE UNIQUE INDEX CONCURRENTLY idx_p_ab ON public.p (a, b)")})
    with pytest.raises(MigrationError, match="unique constraint on partitioned table"):
        # PostgreSQL's own rule, in its own words, before anything is built.
        migrate.migrate(empty_dsn)
    owner.execute("TRUNCATE equitie_migrations.history")
    release({"0001_a": no_transaction("CREATE INDEX CONCURRENTLY idx_p_ab ON public.p (a, lower(b)) WHERE a > 2")})
    migrate.migrate(empty_dsn)
    indexes = dict(
        owner.execute(
            "SELECT c.relname, i.indisvalid FROM pg_partition_tree('idx_p_ab') AS t"
            " JOIN pg_class AS c ON c.oid = t.relid JOIN pg_index AS i ON i.indexrelid = t.relid"
        ).fetchall()
    )
    assert len(indexes) == 6
    assert set(indexes.values()) == {True}
    assert {"idx_p_ab", "p_1_p_ab", "p_2_p_ab", "p_3_p_ab", "p_4_p_ab"} < set(indexes)
    assert owner.execute(INVALID).fetchall() == []


def test_a_partition_made_meanwhile_has_the_index_too(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    parent(owner)
    # CREATE INDEX CONCURRENTLY waits for this transaction's snapshot, on the first partition.
    with psycopg.connect(empty_dsn) as holding:
        holding.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holding.execute("SELECT 1")
        release({"0001_a": no_transaction("CREATE INDEX CONCURRENTLY idx_p_a ON public.p (a)")})
        run = threading.Thread(target=migrate.migrate, args=[empty_dsn])
        run.start()
        wait_for(owner, "SELECT count(*) > 0 FROM pg_stat_progress_create_index")
        owner.execute("CREATE TABLE public.p_9 (LIKE public.p INCLUDING ALL)")
        owner.execute(
            "ALTER TABLE public.p ATTACH PARTITION public.p_9 FOR VALUES FROM ('2024-09-01') TO ('2024-10-01')"
        )
        owner.execute("ALTER TABLE public.p DETACH PARTITION public.p_3")
        owner.execute("DROP TABLE public.p_3")
        holding.rollback()
        run.join()
    assert value(owner, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_p_a'::regclass") is True
    assert value(owner, "SELECT count(*) FROM pg_partition_tree('idx_p_a')") == 4


def wait_for(conn: psycopg.Connection[Any], query: str) -> None:
    deadline = time.monotonic() + 30
    while value(conn, query) is not True:
        assert time.monotonic() < deadline, query
        time.sleep(0.01)


def test_writers_go_on_while_an_index_is_built_on_partitions(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    parent(owner)
    with psycopg.connect(empty_dsn) as holding:
        holding.execute("UPDATE public.p_1 SET b = b")
        release({"0001_a": no_transaction("CREATE INDEX CONCURRENTLY idx_p_a ON public.p (a)")})
        run = threading.Thread(target=migrate.migrate, args=[empty_dsn], kwargs={"lock_timeout": 0.2})
        run.start()
        wait_for(owner, "SELECT count(*) > 0 FROM pg_stat_progress_create_index")
        owner.execute("SET lock_timeout = '5s'")
        owner.execute("INSERT INTO public.p SELECT g, 'x', date '2024-01-01' + g FROM generate_series(0, 89) AS g")
        holding.rollback()
        run.join()
    assert value(owner, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'idx_p_a'::regclass") is True


def test_an_old_transaction_does_not_cut_an_index_short(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    owner.execute("CREATE TABLE public.t (a int)")
    with psycopg.connect(empty_dsn) as holding:
        holding.execute("INSERT INTO public.t VALUES (1)")
        release({"0001_a": no_transaction("CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a)")})
        run = threading.Thread(target=migrate.migrate, args=[empty_dsn], kwargs={"lock_timeout": 0.05})
        run.start()
        wait_for(owner, "SELECT to_regclass('public.idx_t_a') IS NOT NULL")
        begun = value(owner, "SELECT 'public.idx_t_a'::regclass::oid")
        time.sleep(0.5)  # several times the lock timeout
        assert run.is_alive()
        holding.commit()
        run.join()
    # And it is the one that was begun, not one that was built after others had failed.
    assert value(owner, "SELECT 'public.idx_t_a'::regclass::oid") == begun
    assert events(owner) == [("step", 1), ("applied", None)]


def test_a_statement_timeout_of_the_file_bounds_an_index(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    owner.execute("CREATE TABLE public.t (a int)")
    statement = "CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a);\n"
    with psycopg.connect(empty_dsn) as holding:
        holding.execute("INSERT INTO public.t VALUES (1)")
        release({"0001_a": f"-- equitie: transaction=false; statement_timeout=100ms\n{statement}"})
        with pytest.raises(MigrationError, match="statement timeout"):
            migrate.migrate(empty_dsn)
    release({"0001_a": f"-- equitie: transaction=false\n{statement}"})
    migrate.migrate(empty_dsn)
    assert owner.execute(INVALID).fetchall() == []


def test_a_file_that_was_mended_goes_on_where_it_failed(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    first = "CREATE TABLE public.t (a int)"
    release({"0001_a": no_transaction(first, "SELEC 1")})
    with pytest.raises(MigrationError, match="syntax error"):
        migrate.migrate(empty_dsn)
    release({"0001_a": no_transaction("CREATE TABLE public.t (a bigint)", "SELECT 1")})
    with pytest.raises(MigrationError, match="Step 1 of 0001_a is done, but was another statement"):
        migrate.migrate(empty_dsn)
    release({"0001_a": no_transaction(first, "SELECT 1")})
    migrate.migrate(empty_dsn)
    assert events(owner) == [("step", 1), ("failed", None), ("step", 2), ("applied", None)]


def test_dropping_and_rebuilding_may_be_cut_off_anywhere(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    owner.execute("CREATE TABLE public.t (a int); CREATE INDEX idx_t_a ON public.t (a); CREATE INDEX gone ON t (a)")
    # As REINDEX CONCURRENTLY leaves it when it is cut off.
    owner.execute("CREATE INDEX idx_t_a_ccnew ON public.t (a)")
    owner.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_t_a_ccnew'::regclass")
    release(
        {
            "0001_a": no_transaction(
                "DROP INDEX CONCURRENTLY public.gone",
                "REINDEX INDEX CONCURRENTLY public.idx_t_a",
                "REINDEX (VERBOSE) TABLE CONCURRENTLY public.t",
                "VACUUM public.t",
            )
        }
    )
    owner.execute("DROP INDEX gone")  # and its record was not written any more
    migrate.migrate(empty_dsn)
    assert owner.execute(
        "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 't'::regclass"
    ).fetchall() == [("idx_t_a",)]


CUT_OFF = """
import sys, psycopg
psycopg.connect(sys.argv[1], application_name="cut off", autocommit=True).execute(sys.argv[2])
"""


@pytest.mark.parametrize("before", ["nothing", "pending", "detached"])
def test_a_detachment_is_finished(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release, before: str
) -> None:
    parent(owner)
    statement = "ALTER TABLE public.p DETACH PARTITION public.p_2 CONCURRENTLY"
    if before == "pending":
        with psycopg.connect(empty_dsn) as holding:
            holding.execute("SELECT FROM public.p")
            run = subprocess.Popen(
                [sys.executable, "-c", CUT_OFF, empty_dsn, statement], stderr=subprocess.PIPE, text=True
            )
            wait_for(owner, "SELECT count(*) > 0 FROM pg_inherits WHERE inhdetachpending")
            owner.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'cut off'")
            assert "QueryCanceled" in run.communicate()[1]
    elif before == "detached":
        owner.execute(statement)
    release({"0001_a": no_transaction(statement)})
    migrate.migrate(empty_dsn)
    assert value(owner, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'p'::regclass") == 2
    assert value(owner, "SELECT count(*) > 0 FROM public.p_2") is True


@pytest.fixture
def migrated(owner_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """The owner's connection to a database that lacks nothing but what a test adds."""
    with psycopg.connect(owner_dsn, autocommit=True) as conn:
        conn.execute("SET search_path = public")
        yield conn


def test_two_runs_at_once_build_one_index(owner_dsn: str, migrated: psycopg.Connection[Any], tmp_path: Path) -> None:
    migrated.execute("CREATE TABLE public.t (a int); INSERT INTO public.t SELECT generate_series(1, 20000)")
    tmp_path.joinpath("0001_a.sql").write_text(
        no_transaction(
            "CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a)", "CREATE INDEX CONCURRENTLY idx_t_b ON public.t (a, a)"
        )
    )
    command = [sys.executable, "-m", "equitie_data.migrate", "--dsn", owner_dsn, "--json"]
    command += ["--directory", f"billing={tmp_path}"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outcomes = [(*run.communicate(timeout=60), run.returncode) for run in runs]
    assert [(error, code) for _, error, code in outcomes] == [("", 0)] * 2
    applied = [each for output, *_ in outcomes for each in json.loads(output)["applied"]]
    assert [each["name"] for each in applied if each["directory"] == "billing"] == ["a"]
    assert migrated.execute(INVALID).fetchall() == []


KILLED_EVERYWHERE = """
import os, signal, sys
import psycopg
from equitie_data import migrate

dsn, directory = sys.argv[1:]
STATE = '''
SELECT (SELECT array_agg(a ORDER BY a) FROM public.t), (SELECT count(*) FROM pg_index WHERE NOT indisvalid),
  (SELECT count(*) FROM pg_index WHERE indrelid = 'public.t'::regclass),
  (SELECT count(*) FROM pg_partition_tree('public.idx_p_a')), to_regclass('public.p_2') IS NOT NULL,
  (SELECT count(*) FROM pg_inherits WHERE inhparent = 'public.p'::regclass),
  (SELECT array_agg(coalesce(step, 0) ORDER BY event_id) FROM equitie_migrations.history WHERE directory = 'billing')
'''
RESET = '''
DROP TABLE IF EXISTS public.t, public.p, public.p_2;
CREATE TABLE public.t (a int);
CREATE INDEX old ON public.t (a);
CREATE TABLE public.p (a int, day date) PARTITION BY RANGE (day);
CREATE TABLE public.p_1 PARTITION OF public.p FOR VALUES FROM ('2024-01-01') TO ('2024-02-01');
CREATE TABLE public.p_2 PARTITION OF public.p FOR VALUES FROM ('2024-02-01') TO ('2024-03-01');
DELETE FROM equitie_migrations.history WHERE directory = 'billing';
'''
execute, count, deadly = psycopg.Connection.execute, 0, 0

def counting(self, *arguments, **options):
    global count
    count += 1
    if count == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(self, *arguments, **options)

psycopg.Connection.execute = counting
killed = 0
while True:
    owner = psycopg.connect(dsn, autocommit=True)
    execute(owner, RESET)
    child = os.fork()
    if child == 0:
        count, deadly = 0, killed + 1
        migrate.migrate(dsn, directories={"billing": directory})
        os._exit(7)
    status = os.waitpid(child, 0)[1]
    migrate.migrate(dsn, directories={"billing": directory})
    # A step that ran again is no harm; one that ran twice would show in the rows, one left out in the catalogs.
    found = execute(owner, STATE).fetchone()
    steps = found[-1]
    assert found[:-1] == ([1, 2], 0, 1, 2, True, 1), (killed + 1, found)
    assert steps == [1, 2, 3, 4, 5, 6, 7, 0], (killed + 1, steps)
    owner.close()
    if os.waitstatus_to_exitcode(status) == 7:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    killed += 1
print(killed)
"""


def test_a_run_killed_before_any_statement_is_finished_by_the_next(owner_dsn: str, tmp_path: Path) -> None:
    tmp_path.joinpath("0001_a.sql").write_text(
        no_transaction(
            "INSERT INTO public.t VALUES (1)",
            "CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a)",
            "DROP INDEX CONCURRENTLY public.old",
            "CREATE INDEX CONCURRENTLY idx_p_a ON public.p (a)",
            "ALTER TABLE public.p DETACH PARTITION public.p_2 CONCURRENTLY",
            "REINDEX TABLE CONCURRENTLY public.t",
            "INSERT INTO public.t VALUES (2)",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_EVERYWHERE), owner_dsn, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 50


def test_a_run_killed_while_the_server_builds_is_finished_by_the_next(
    owner_dsn: str, migrated: psycopg.Connection[Any], tmp_path: Path
) -> None:
    migrated.execute("CREATE TABLE public.t (a int)")
    tmp_path.joinpath("0001_a.sql").write_text(no_transaction("CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a)"))
    command = [sys.executable, "-m", "equitie_data.migrate", "--dsn", owner_dsn, "--to", "billing/1"]
    command += ["--directory", f"billing={tmp_path}"]
    with psycopg.connect(owner_dsn) as holding:
        holding.execute("INSERT INTO public.t VALUES (1)")
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(migrated, "SELECT to_regclass('public.idx_t_a') IS NOT NULL")
        begun = value(migrated, "SELECT 'public.idx_t_a'::regclass::oid")
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        # Its server process builds on, and the next run waits for that one: polling, or it would be a deadlock.
        next_run = threading.Thread(
            target=migrate.migrate, args=[owner_dsn], kwargs={"directories": {"billing": tmp_path}}
        )
        next_run.start()
        time.sleep(0.3)
        assert next_run.is_alive()
        assert value(migrated, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == 0
        holding.rollback()
        next_run.join()
    assert value(migrated, "SELECT 'public.idx_t_a'::regclass::oid") == begun
    assert migrated.execute(INVALID).fetchall() == []
    assert value(migrated, "SELECT count(*) FROM pg_index WHERE indrelid = 't'::regclass") == 1


def test_a_server_process_that_dies_leaves_nothing_the_next_run_cannot_mend(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    owner.execute("CREATE TABLE public.t (a int)")
    release({"0001_a": no_transaction("CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a)")})
    errors: list[BaseException] = []

    def run() -> None:
        try:
            migrate.migrate(empty_dsn)
        except MigrationError as error:
            errors.append(error)

    with psycopg.connect(empty_dsn) as holding:
        holding.execute("INSERT INTO public.t VALUES (1)")
        thread = threading.Thread(target=run)
        thread.start()
        wait_for(owner, "SELECT to_regclass('public.idx_t_a') IS NOT NULL")
        owner.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_progress_create_index")
        thread.join()
    assert "terminating connection" in str(errors[0])
    assert len(owner.execute(INVALID).fetchall()) == 1
    migrate.migrate(empty_dsn)
    assert owner.execute(INVALID).fetchall() == []


def test_a_pooler_is_refused(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    release({"0001_a": no_transaction("CREATE TABLE public.t (a int)")})
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", -1)
    with pytest.raises(MigrationError, match="pooler"):
        migrate.migrate(empty_dsn)


def test_a_step_that_meets_a_lock_is_tried_again(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.execute("CREATE TABLE public.t (a int)")
    release({"0001_a": no_transaction("ALTER TABLE public.t ADD COLUMN b int", "INSERT INTO public.t VALUES (1)")})
    pauses: list[float] = []
    monkeypatch.setattr(session.time, "sleep", pauses.append)
    holding = psycopg.connect(empty_dsn)
    holding.execute("SELECT FROM public.t")

    def let_go(seconds: float) -> None:
        pauses.append(seconds)
        holding.close()

    monkeypatch.setattr(session.time, "sleep", let_go)
    migrate.migrate(empty_dsn, lock_timeout=0.05)
    assert len(pauses) == 1
    assert value(owner, "SELECT count(*) FROM public.t") == 1
