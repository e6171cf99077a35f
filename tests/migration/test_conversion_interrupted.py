"""A conversion that is killed goes on where it was, or is given up, and nobody's row knows of it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import psycopg
import pytest
from tests.migration.flat_table import Ledger, contents, make_flat

from equitie_data import conversion
from equitie_data.conversion.run import steps_of
from equitie_data.embedded import EmbeddedServer
from equitie_data.testing import fresh_database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# One process that has everything imported forks another for each death. What follows the operation and the DSN are the
# steps at which to die; without any, the moments come later and later, so that each run gets further than the last.
PROGRAM = """
import os, signal, sys, time
from equitie_data import conversion

operation, dsn, *steps = sys.argv[1:]
options = {"copy": True} if operation == "copy" else {}
run = conversion.convert if operation in {"attach", "copy"} else getattr(conversion, operation)

def live(step):
    def advanced(name, rows):
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        run(dsn, advanced=advanced, **options)
    except Exception as error:
        # The statement of a run that was killed may still be running on the server.
        print(error)
        os._exit(0 if "still migrating" in str(error) else 9)
    os._exit(7)

for number in range(len(steps) or 60):
    child = os.fork()
    if not child:
        live(steps[number] if steps else None)
    if not steps:
        deadline = time.monotonic() + 0.05 * 1.2**number
        while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    how = {-9: "killed", 0: "waited", 7: "done"}.get(os.waitstatus_to_exitcode(status), "failed")
    print(how, conversion.status(dsn).left[:1], flush=True)
    if how in {"done", "failed"}:
        break
"""


def dies(operation: str, dsn: str, *steps: str) -> list[str]:
    """Run an operation that is killed again and again; return how each run ended, and the step it had come to."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, operation, dsn, *steps], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


COMMANDS: dict[str, Callable[..., conversion.ConversionReport]] = {
    "attach": conversion.convert,
    "copy": lambda dsn, **options: conversion.convert(dsn, copy=True, **options),
    "split": conversion.split,
    "undo": conversion.undo,
}


class Interrupted(Exception):  # noqa: N818 - what happened, not what is wrong
    pass


def prepare(dsn: str, operation: str) -> None:
    make_flat(dsn, 300)
    if operation in {"split", "undo"}:
        conversion.convert(dsn)
    if operation == "undo":
        # A row of a later month closes the short way back.
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(
                "UPDATE public.transactions_clean SET transaction_date = '2999-01-01' WHERE transaction_id = 1"
            )


def steps(operation: str) -> list[str]:
    return [name for name, _ in steps_of(operation, {})]  # type: ignore[arg-type]


def shape_and_names(dsn: str) -> list[str]:
    with psycopg.connect(dsn) as conn:
        return [
            str(row)
            for row in conn.execute(
                "SELECT c.oid::regclass::text, c.relkind, pg_get_expr(c.relpartbound, c.oid), c.relacl::text"
                " FROM pg_class AS c"
                " WHERE c.relnamespace::regnamespace::text ~ '^(public$|equitie_part$|equitie_conv)'"
                " UNION ALL SELECT conname, contype, conrelid::regclass::text, pg_get_constraintdef(oid)"
                " FROM pg_constraint"
                " WHERE connamespace::regnamespace::text ~ '^(public$|equitie_part$|equitie_conv)' AND contype <> 'n'"
                " UNION ALL SELECT tgname, 't', tgrelid::regclass::text, NULL FROM pg_trigger WHERE NOT tgisinternal"
                " UNION ALL SELECT p.proname, 'f', NULL, NULL FROM pg_proc AS p"
                " WHERE p.pronamespace::regnamespace::text ~ '^equitie_'"
                " ORDER BY 1, 2, 3, 4"
            )
        ]


@pytest.fixture(scope="module")
def newest() -> Iterator[EmbeddedServer]:
    """One server: what is killed here is the client, and each death costs the start of a process."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def killed_dsn(newest: EmbeddedServer) -> Iterator[str]:
    with fresh_database(newest) as dbname:
        yield newest.dsn(dbname)


# Copying has the same steps as splitting.
@pytest.mark.parametrize("operation", ["attach", "split", "undo"])
def test_killed_at_every_step_in_turn_it_gets_there(killed_dsn: str, operation: str) -> None:
    prepare(killed_dsn, operation)
    ledger = Ledger(killed_dsn)
    with ledger.writing(2):
        assert dies(operation, killed_dsn, *steps(operation)) == [f"killed ('{step}',)" for step in steps(operation)]
        report = COMMANDS[operation](killed_dsn)
    assert report.outcome == "done"
    ledger.compare()
    with psycopg.connect(killed_dsn) as conn:
        left = conn.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'equitie_conversion%'").fetchall()
    assert left == []


@pytest.mark.parametrize("operation", ["attach", "copy", "undo"])
def test_given_up_at_any_step_it_has_not_happened(empty_dsn: str, operation: str) -> None:
    prepare(empty_dsn, operation)
    give_up = conversion.convert if operation == "undo" else conversion.undo
    before, rows = shape_and_names(empty_dsn), contents(empty_dsn)

    def interrupt_at(wanted: str) -> Callable[[str, int], None]:
        def advanced(step: str, count: int) -> None:
            if step == wanted:
                raise Interrupted

        return advanced

    for step in steps(operation):
        with pytest.raises(Interrupted):
            COMMANDS[operation](empty_dsn, advanced=interrupt_at(step))
        assert contents(empty_dsn) == rows
        if step == "tidy":
            break
        assert give_up(empty_dsn).outcome == "abandoned", step
        found = [line for line in shape_and_names(empty_dsn) if "partition_conversions" not in line]
        assert found == [line for line in before if "partition_conversions" not in line], step
        assert contents(empty_dsn) == rows
    # After the exchange there is nothing to give up; going back is another conversion.
    if operation != "undo":
        assert conversion.undo(empty_dsn).shape == "flat"
        assert contents(empty_dsn) == rows


def test_killed_at_any_moment_it_gets_there(killed_dsn: str) -> None:
    make_flat(killed_dsn, 5_000)
    ledger = Ledger(killed_dsn)
    with ledger.writing(2):
        for operation in ("copy", "undo"):
            ends = dies(operation, killed_dsn)
            assert ends[-1] == "done ()", ends
            assert sum(end.startswith("killed") for end in ends) > 1
    ledger.compare()
    assert conversion.status(killed_dsn).shape == "flat"


def test_another_command_waits_for_its_turn(empty_dsn: str) -> None:
    prepare(empty_dsn, "split")

    def stop(step: str, count: int) -> None:
        if step == "copy":
            raise Interrupted

    with pytest.raises(Interrupted):
        conversion.split(empty_dsn, advanced=stop)
    with pytest.raises(conversion.ConversionError, match="interrupted `partition split` comes first"):
        conversion.convert(empty_dsn)
    assert "or `partition undo` to give it up" in conversion.status(empty_dsn).advice
    assert conversion.main(["status", "--dsn", empty_dsn]) == 1
    assert conversion.split(empty_dsn).outcome == "done"
