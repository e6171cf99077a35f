"""The demo as somebody runs it: one command, a table that proves itself, JSON for machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REAL_FILE = Path(__file__).parents[2].parent / "shared" / "data" / "crunchbase_investments_2013.csv.gz"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "equitie_data", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**{key: value for key, value in os.environ.items() if key != "DATABASE_URL"}, **environment},
    )


def test_the_table_fits_a_terminal_and_everything_in_it_holds() -> None:
    done = run("--rows", "3000")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("[ok]" in line for line in lines) == 6
    assert "FAILED" not in done.stdout
    assert "3,000 read = 3,000 inserted + 0 duplicates" in done.stdout


def test_json_for_machines() -> None:
    done = run("--rows", "2000", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["import"]["inserted"] == 2000
    assert found["audit"]["changes"] == found["audit"]["events"] > 2000
    assert 0 < found["visibility"]["seen"] == found["visibility"]["owned"] < found["visibility"]["total"]
    assert found["retries"] >= 1
    assert set(found["read"]) == {"calls", "p50_ms", "p95_ms", "p99_ms"}


def test_an_existing_database_is_used_but_never_polluted(empty_dsn: str) -> None:
    done = run("--rows", "500", "--json", "--dsn", empty_dsn)
    assert done.returncode == 0, done.stderr
    again = run("--rows", "500", "--dsn", empty_dsn)
    assert again.returncode == 1
    assert again.stderr.startswith("error: The database holds transactions already")


def test_kept_data_opens_again() -> None:
    # Not pytest's tmp_path: as root the server runs under another account, which may not enter it.
    directory = Path(tempfile.mkdtemp(prefix="equitie-kept-"))
    directory.chmod(0o711)
    done = run("--rows", "500", "--keep", TMPDIR=str(directory))
    assert done.returncode == 0, done.stderr
    (kept,) = directory.glob("equitie-demo-*/data")
    assert f'Database.embedded("{kept}")' in done.stderr
    from equitie_data import Database, as_service

    with Database.embedded(kept) as database, as_service("look"):
        assert database.execute_read("SELECT count(*) FROM public.transactions_clean") == [(700,)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rows", "0"], 2, "--rows must be at least 1"),
        (["--dsn", "postgresql://u:s3cret@127.0.0.1:1/x"], 1, "nothing listens there"),
        (["--data", "no-such-file.csv"], 1, "no-such-file.csv"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not REAL_FILE.exists(), reason=f"the real investments are not at {REAL_FILE}")
def test_the_real_file_needs_no_mapping() -> None:
    done = run("--data", str(REAL_FILE), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["import"]
    assert (found["read"], found["inserted"], found["duplicates"], found["rejected"]) == (80_245, 72_549, 140, 7_556)
    assert found["amount_inserted"] == 929_332_232_181
