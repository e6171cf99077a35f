"""What `plan` says about locks is what PostgreSQL takes; and what runs outside of transactions is recognised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equitie_data import migrate
from equitie_data.errors import MigrationError
from equitie_data.migrations.files import parse_migration
from equitie_data.migrations.locks import MODES, TableLock, locks_of, runs_code
from equitie_data.migrations.shapes import Detach, IndexBuild, IndexDrop, Outside, Reindex, shape_of
from equitie_data.migrations.statements import bare

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

    from equitie_data.migrations.files import Migration

    Release = Callable[..., tuple[Migration, ...]]

TABLES = """
CREATE TABLE public.t (a int PRIMARY KEY, b int, CONSTRAINT positive CHECK (a > 0) NOT VALID);
CREATE TABLE public.u (a int REFERENCES public.t);
CREATE INDEX idx_t_b ON public.t (b);
CREATE TABLE public.p (a int) PARTITION BY LIST (a);
CREATE TABLE public.p_1 PARTITION OF public.p FOR VALUES IN (1);
CREATE TABLE public.p_2 (a int);
CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER g AFTER INSERT ON public.t FOR EACH STATEMENT EXECUTE FUNCTION public.f();
CREATE POLICY y ON public.t USING (true);
CREATE MATERIALIZED VIEW public.m AS SELECT a FROM public.t;
CREATE UNIQUE INDEX idx_m ON public.m (a);
"""

IN_TRANSACTIONS = [
    "ALTER TABLE public.t ADD COLUMN c int",
    "ALTER TABLE ONLY public.t ALTER COLUMN b SET STATISTICS 100",
    "ALTER TABLE public.t SET (fillfactor = 90)",
    "ALTER TABLE public.t VALIDATE CONSTRAINT positive",
    "ALTER TABLE public.u ADD CONSTRAINT fk FOREIGN KEY (a) REFERENCES public.t (a)",
    "ALTER TABLE public.u ADD FOREIGN KEY (a) REFERENCES public.t (a) NOT VALID",
    "ALTER TABLE public.t DISABLE TRIGGER g",
    "ALTER TABLE public.t ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE public.p ATTACH PARTITION public.p_2 FOR VALUES IN (2)",
    "ALTER TABLE public.p DETACH PARTITION public.p_1",
    "CREATE TABLE public.p_3 PARTITION OF public.p FOR VALUES IN (3)",
    "CREATE TABLE public.v (a int REFERENCES public.t)",
    "CREATE INDEX ON public.t(a, b)",
    "CREATE UNIQUE INDEX IF NOT EXISTS idx_t_ab ON public.t USING btree (a, b)",
    "DROP INDEX public.idx_t_b",
    "REINDEX INDEX public.idx_t_b",
    "CREATE TRIGGER h BEFORE UPDATE ON public.t FOR EACH ROW EXECUTE FUNCTION public.f()",
    "DROP TRIGGER g ON public.t",
    "CREATE POLICY z ON public.t FOR SELECT USING (true)",
    "DROP POLICY y ON public.t",
    "CREATE STATISTICS public.s (dependencies) ON a, b FROM public.t",
    "DROP TABLE public.u",
    "TRUNCATE public.u",
    "LOCK TABLE public.t IN SHARE ROW EXCLUSIVE MODE",
    "LOCK public.t",
    "REFRESH MATERIALIZED VIEW public.m",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY public.m",
    "ANALYZE public.t",
    "COMMENT ON TABLE public.t IS 'x'",
    "COMMENT ON COLUMN public.t.a IS 'x'",
    "INSERT INTO public.t VALUES (1, 1)",
    "UPDATE public.t SET b = 1",
    "DELETE FROM ONLY public.t WHERE a = 1",
    'alter  table public . t add column "ON" int -- and so on'.replace(" . ", "."),
]


@pytest.mark.parametrize("statement", IN_TRANSACTIONS)
def test_the_locks_are_those_postgresql_takes(owner: psycopg.Connection[Any], statement: str) -> None:
    owner.execute(TABLES)
    oids = dict(
        owner.execute("SELECT oid::regclass::text, oid FROM pg_class WHERE relnamespace = 'public'::regnamespace")
    )
    tables = dict(owner.execute("SELECT indexrelid::regclass::text, indrelid::regclass::text FROM pg_index"))
    with owner.transaction(force_rollback=True):
        owner.execute(statement)  # type: ignore[call-overload]
        taken = owner.execute(
            "SELECT relation, upper(regexp_replace(replace(mode, 'Lock', ''), '([a-z])([A-Z])', '\\1 \\2', 'g'))"
            " FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' AND granted"
        ).fetchall()
    expected = locks_of(statement)
    assert expected
    order = ["ACCESS SHARE", "ROW SHARE", *list(MODES)[1:]]
    for lock in expected:
        name = lock.relation.removeprefix("public.")
        oid = oids[tables.get(name, name)]
        strongest = max((order.index(mode) for relation, mode in taken if relation == oid), default=-1)
        assert order[strongest] == lock.mode, (lock, taken)


@pytest.mark.parametrize(
    ("statement", "shape", "lock"),
    [
        (
            "CREATE INDEX CONCURRENTLY i ON public.t (a)",
            IndexBuild("i", "public.t", unique=False, definition="(a)"),
            TableLock("public.t", "SHARE UPDATE EXCLUSIVE"),
        ),
        (
            'create  unique index\nconcurrently if not exists "I 1" -- why\n on "S".t using gin(a)',
            IndexBuild('"I 1"', '"S".t', unique=True, definition="using gin(a)"),
            TableLock('"S".t', "SHARE UPDATE EXCLUSIVE"),
        ),
        (
            "DROP INDEX CONCURRENTLY IF EXISTS public.i",
            IndexDrop("public.i"),
            TableLock("public.i", "SHARE UPDATE EXCLUSIVE"),
        ),
        ("REINDEX INDEX CONCURRENTLY public.i", Reindex("public.i"), TableLock("public.i", "SHARE UPDATE EXCLUSIVE")),
        (
            "REINDEX (VERBOSE) TABLE CONCURRENTLY public.t",
            Reindex("public.t"),
            TableLock("public.t", "SHARE UPDATE EXCLUSIVE"),
        ),
        (
            "ALTER TABLE public.p DETACH PARTITION public.p_1 CONCURRENTLY",
            Detach("public.p", "public.p_1"),
            TableLock("public.p", "SHARE UPDATE EXCLUSIVE"),
        ),
        ("VACUUM (ANALYZE) public.t", Outside("VACUUM"), TableLock("public.t", "SHARE UPDATE EXCLUSIVE")),
        ("VACUUM FULL public.t", Outside("VACUUM"), TableLock("public.t", "ACCESS EXCLUSIVE")),
        ("CALL public.backfill()", Outside("CALL"), None),
        ("DO $$ BEGIN UPDATE public.t SET a = 1; COMMIT; END $$", Outside("DO"), None),
        ("REFRESH MATERIALIZED VIEW CONCURRENTLY public.m", None, TableLock("public.m", "EXCLUSIVE")),
        ("DO $$ BEGIN PERFORM 1; END $$", None, None),
        ("SELECT 'CREATE INDEX CONCURRENTLY'", None, None),
        ("REINDEX TABLE public.t", None, TableLock("public.t", "SHARE")),
    ],
)
def test_what_no_transaction_can_hold_is_recognised(statement: str, shape: Any, lock: TableLock | None) -> None:
    assert shape_of(statement) == shape
    assert (locks_of(statement)[:1] or (None,))[0] == lock
    if isinstance(shape, Outside) and shape.word in {"CALL", "DO"}:
        parse_migration("0001_a", f"{statement};")  # its transactions, if any, are not for its text to tell
    elif shape is not None:
        with pytest.raises(MigrationError, match="no transaction can hold this statement"):
            parse_migration("0001_a", f"{statement};")
        assert not parse_migration("0001_a", f"-- equitie: transaction=false\n{statement};").transactional


@pytest.mark.parametrize(
    "statement",
    ["CREATE INDEX CONCURRENTLY ON public.t (a)", "ALTER TABLE a, b DETACH PARTITION c CONCURRENTLY"],
)
def test_what_could_not_be_found_again_is_refused(statement: str) -> None:
    with pytest.raises(MigrationError, match=r"0001_a.sql, line 2: name the index, or the partition"):
        parse_migration("0001_a", f"-- equitie: transaction=false\n{statement};")


@pytest.mark.parametrize("statement", ["BEGIN", "commit", "START TRANSACTION", "ROLLBACK", "SAVEPOINT a", "END"])
def test_transactions_are_the_runners(statement: str) -> None:
    with pytest.raises(MigrationError, match="transactions are the runner's"):
        parse_migration("0001_a", f"SELECT 1; {statement};")


def test_a_function_body_is_no_transaction() -> None:
    parse_migration("0001_a", "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$BEGIN RETURN 1; END$$;")


@given(
    st.lists(st.sampled_from(["a", " ", "\n", "\t", "'x  y'", '"q  r"', "-- c\n", "/* d */", "$$ e  f $$", "E'\\''"]))
)
def test_bare_text_has_one_blank_and_no_comment(pieces: list[str]) -> None:
    text = whole = bare(" ".join(pieces))
    assert "-- c" not in text
    assert "/*" not in text
    for quoted in ("'x  y'", '"q  r"', "$$ e  f $$"):
        text = text.replace(quoted, "q")
    assert "  " not in text.strip()
    assert bare(whole) == whole


def test_the_header_may_have_several_options() -> None:
    text = "-- Why.\n-- equitie: transaction=false; lock_timeout=250ms; statement_timeout=2h; phase=post\nSELECT 1;"
    migration = parse_migration("0007_a", text)
    assert migration.summary == "Why."
    assert (migration.transactional, migration.phase, migration.compatible_since) == (False, "post", 7)
    assert (migration.lock_timeout, migration.statement_timeout) == (0.25, 7200.0)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("phase=later", "whose value cannot be read"),
        ("lock_timeout=2", "whose value cannot be read"),
        ("frobnicate=1", "unknown option frobnicate"),
        ("phase=pre phase=post", "twice"),
        ("compatible_since=0009", "comes after it"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header: str, message: str) -> None:
    with pytest.raises(MigrationError, match=message):
        parse_migration("0007_a", f"-- equitie: {header}\nSELECT 1;")


def test_a_plan_says_locks_and_sizes(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    owner.execute(TABLES)
    owner.execute("INSERT INTO public.t SELECT g, g FROM generate_series(1, 1000) AS g; ANALYZE public.t")
    release(
        {
            "0001_a": "-- More.\nUPDATE public.t SET b = 2;\nALTER TABLE public.t ADD COLUMN c int;\n"
            "CREATE TABLE public.new (a int);\nALTER TABLE public.new ADD COLUMN b int;\nSELECT 1;",
            "0002_b": "-- equitie: transaction=false\nDROP INDEX CONCURRENTLY public.idx_t_b;\nANALYZE public.p;",
        }
    )
    first, second = migrate.plan(empty_dsn)
    [lock] = first.locks
    assert (lock.table, lock.mode, lock.stops, lock.rows) == (
        "public.t",
        "ACCESS EXCLUSIVE",
        "readers and writers",
        1000,
    )
    assert 50_000 < lock.bytes < 500_000
    assert (first.code, first.transactional, second.transactional) == (1, True, False)
    assert [(lock.table, lock.mode) for lock in second.locks] == [
        ("public.p", "SHARE UPDATE EXCLUSIVE"),
        ("public.t", "SHARE UPDATE EXCLUSIVE"),
    ]
    assert migrate.main(["--dsn", empty_dsn, "plan"]) == 0
    told = capsys.readouterr().out
    assert "public.t: ACCESS EXCLUSIVE, stops readers and writers" in told
    assert "1 statement of code, whose locks its text does not tell" in told
    assert "0002_b (2 steps, no transaction)" in told
    assert all(len(line) <= 80 for line in told.splitlines())
    migrate.main(["--dsn", empty_dsn, "plan", "--to", "1", "--sql"])
    assert "DROP INDEX" not in capsys.readouterr().out


def test_code_is_what_nobody_can_read() -> None:
    assert runs_code("DO $$ BEGIN END $$")
    assert runs_code("-- why\nselect public.f()")
    assert not runs_code("CREATE TABLE a (b int)")
