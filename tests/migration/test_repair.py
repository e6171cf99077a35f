"""Repair: by the exact name, said before it is done, and never more than the history and the broken things."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from equitie_data import migrate
from equitie_data.errors import ChecksumDriftError, HistoryTooNewError, MigrationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from equitie_data.migrations.files import Migration

    Release = Callable[..., tuple[Migration, ...]]

STEPS = (
    "CREATE TABLE public.t (a int)",
    "INSERT INTO public.t VALUES (1), (1)",
    "CREATE UNIQUE INDEX CONCURRENTLY idx_t_a ON public.t (a)",
)


def no_transaction(*statements: str) -> str:
    return "-- equitie: transaction=false\n" + "".join(f"{statement};\n" for statement in statements)


def events(conn: psycopg.Connection[Any]) -> list[Any]:
    return conn.execute("SELECT state, step FROM equitie_migrations.history ORDER BY event_id").fetchall()


def test_an_edited_file_is_recorded_as_it_is_now_and_not_run(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    release({"0001_a": "CREATE TABLE public.a (a int);"})
    migrate.migrate(empty_dsn)
    release({"0001_a": "CREATE TABLE public.a (a int); -- reformatted"})
    with pytest.raises(ChecksumDriftError):
        migrate.migrate(empty_dsn)
    [told] = migrate.repair(empty_dsn, "0001_a", apply=False)
    assert "its file is another now" in told
    assert "Nothing in it is run" in told
    assert events(owner) == [("applied", None)]
    said: list[str] = []
    assert migrate.repair(empty_dsn, "0001_a", on_repair=said.append) == (told,)
    assert said == [told]
    assert events(owner) == [("applied", None), ("repaired", None)]
    assert [entry.state for entry in migrate.status(empty_dsn)] == ["applied"]
    assert migrate.migrate(empty_dsn).applied == ()
    migrate.check_current(owner)
    assert migrate.repair(empty_dsn, "0001_a") == ()


def test_a_renamed_file_too(empty_dsn: str, release: Release) -> None:
    release({"0001_a": "SELECT 1;"})
    migrate.migrate(empty_dsn)
    release({"0001_b": "SELECT 1;"})
    with pytest.raises(ChecksumDriftError):
        migrate.migrate(empty_dsn)
    migrate.repair(empty_dsn, "0001_b")
    assert migrate.migrate(empty_dsn).current == "0001_b"


@pytest.mark.parametrize("name", ["1", "0001", "a", "0001_A", "equitie_data/0001_a", "0002_b"])
def test_only_the_whole_name_will_do(empty_dsn: str, release: Release, name: str) -> None:
    release({"0001_a": "SELECT 1;"})
    with pytest.raises(MigrationError, match=r"name the one to repair in full|no directory of migrations"):
        migrate.repair(empty_dsn, name)


def test_what_a_newer_release_left_is_not_repaired(empty_dsn: str, release: Release) -> None:
    release({"0001_a": "SELECT 1;", "0002_b": "SELECT 1;"})
    migrate.migrate(empty_dsn)
    release({"0001_a": "SELECT 1;"})
    with pytest.raises(HistoryTooNewError):
        migrate.repair(empty_dsn, "0001_a")


def test_steps_that_were_edited_are_forgotten_from_there_on(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    release({"0001_a": no_transaction(*STEPS)})
    with pytest.raises(MigrationError, match="could not create unique index"):
        migrate.migrate(empty_dsn)
    # The second step was wrong. Somebody takes back by hand what it did, and mends the file.
    owner.execute("TRUNCATE public.t")
    release({"0001_a": no_transaction(STEPS[0], "INSERT INTO public.t VALUES (1), (2)", STEPS[2])})
    with pytest.raises(MigrationError, match=r"Step 2 of 0001_a is done, but was another statement"):
        migrate.migrate(empty_dsn)
    [steps, index] = migrate.repair(empty_dsn, "0001_a")
    assert "Of the 2 steps of 0001_a that are done, the file still begins with 1" in steps
    assert "The index public.idx_t_a of step 3 is INVALID" in index
    migrate.migrate(empty_dsn)
    assert owner.execute("SELECT a FROM public.t ORDER BY a").fetchall() == [(1,), (2,)]
    assert events(owner) == [
        ("step", 1),
        ("step", 2),
        ("failed", None),
        ("repaired", 1),
        ("step", 2),
        ("step", 3),
        ("applied", None),
    ]


def test_an_index_that_became_invalid_is_built_anew(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    steps = (STEPS[0], "CREATE INDEX CONCURRENTLY idx_t_a ON public.t (a)")
    release({"0001_a": no_transaction(*steps)})
    migrate.migrate(empty_dsn)
    assert migrate.verify(empty_dsn) == ()
    owner.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_t_a'::regclass")
    [found] = migrate.verify(empty_dsn)
    assert "The index public.idx_t_a, made by step 2 of 0001_a, is INVALID" in found
    assert "migrate repair 0001_a" in found
    [done] = migrate.repair(empty_dsn, "0001_a")
    assert "built anew" in done
    assert migrate.verify(empty_dsn) == ()
    assert events(owner)[-1] == ("applied", None)


def test_an_invalid_index_of_nobody_is_found_too(owner_dsn: str) -> None:
    with psycopg.connect(owner_dsn, autocommit=True) as owner:
        owner.execute("CREATE INDEX mine ON deals_clean (deal_date)")
        owner.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'mine'::regclass")
    assert [problem for problem in migrate.verify(owner_dsn) if "The index public.mine is INVALID" in problem]


def test_a_half_detached_partition_is_detached(
    empty_dsn: str, owner: psycopg.Connection[Any], release: Release
) -> None:
    owner.execute("CREATE TABLE public.p (a int) PARTITION BY LIST (a)")
    owner.execute("CREATE TABLE public.p_1 PARTITION OF public.p FOR VALUES IN (1)")
    detach = "ALTER TABLE public.p DETACH PARTITION public.p_1 CONCURRENTLY"
    release({"0001_a": no_transaction(detach)})
    errors: list[str] = []

    def run() -> None:
        try:
            migrate.migrate(empty_dsn)
        except MigrationError as error:
            errors.append(str(error))

    with psycopg.connect(empty_dsn) as holding:
        holding.execute("SELECT FROM public.p")
        thread = threading.Thread(target=run)
        thread.start()
        while owner.execute("SELECT count(*) FROM pg_inherits WHERE inhdetachpending").fetchone() == (0,):
            assert thread.is_alive()
        owner.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%migrate'")
        thread.join()
    assert "canceling statement" in errors[0]
    [done] = migrate.repair(empty_dsn, "0001_a")
    assert "public.p_1 of step 1 is half detached" in done
    assert owner.execute("SELECT count(*) FROM pg_inherits").fetchone() == (0,)
    assert migrate.migrate(empty_dsn).current == "0001_a"


def test_the_command_line_says_it_first(empty_dsn: str, release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    release({"0001_a": "SELECT 1;"})
    migrate.migrate(empty_dsn)
    command = ["--dsn", empty_dsn, "repair", "0001_a"]
    assert migrate.main(command) == 0
    assert capsys.readouterr().out == "Nothing of 0001_a needs a repair.\n"
    release({"0001_a": "SELECT 2;", "0001_a.down": "SELECT 3;"})
    assert migrate.main(command) == 1
    told = capsys.readouterr().out
    assert told.endswith("Nothing was done: to do it, add --yes.\n")
    assert all(len(line) <= 80 for line in told.splitlines())
    assert migrate.main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["done"] is False
    assert migrate.main([*command, "--yes"]) == 0
    assert capsys.readouterr().out.endswith("1 repair done.\n")
    assert migrate.main([*command, "--json", "--yes"]) == 0
    assert json.loads(capsys.readouterr().out) == {"migration": "0001_a", "repairs": [], "done": True}

    down = ["--dsn", empty_dsn, "down", "0001"]
    assert migrate.main(down) == 1
    assert capsys.readouterr().out == "SELECT 3;\n\nNothing was done: to run these statements, add --yes.\n"
    assert migrate.main([*down, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] is True
    assert migrate.main([*down, "--yes"]) == 1
    assert "is not applied" in capsys.readouterr().err
