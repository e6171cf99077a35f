"""The embedded server: real servers of every PostgreSQL found, as root and as an ordinary user."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equitie_data import embedded
from equitie_data._postgres.account import first_path_closed_to, unprivileged_account
from equitie_data._postgres.process import free_port
from equitie_data.embedded import EmbeddedServer, find_server, find_servers
from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

IS_ROOT = os.geteuid() == 0
ON_LINUX = sys.platform == "linux"
root_only = pytest.mark.skipif(not IS_ROOT, reason="what root does")
linux_only = pytest.mark.skipif(not ON_LINUX, reason="rests on /proc")


@pytest.fixture
def bin_dir(server: EmbeddedServer) -> Path:
    return server.bin_dir


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for data directories that a server's account may pass through; pytest's own are closed to it."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


def query(server: EmbeddedServer, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def wait_until_gone(path: Path) -> None:
    while path.exists():
        time.sleep(0.01)


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, status.st_mode


def shared_memory() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()}


def command_lines() -> str:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append(process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


# What a server is like.


def test_every_version_means_the_same_by_its_settings(server: EmbeddedServer) -> None:
    [(encoding, timezone, by_code_point, letters)] = query(
        server,
        "SELECT current_setting('server_encoding'), current_setting('timezone'), 'Z' < 'a', lower('ÄÉß')",
    )
    assert (encoding, timezone, by_code_point, letters) == ("UTF8", "UTC", True, "äéß")
    assert query(server, "SELECT current_setting('server_version_num')::int") == [(server.version,)]
    assert server.major == server.version // 10_000


def test_tcp_and_socket_ask_for_the_password(server: EmbeddedServer) -> None:
    password = str(psycopg.conninfo.conninfo_to_dict(server.dsn())["password"])
    for host in ("127.0.0.1", str(server.socket_dir)):
        login = f"host='{host}' port={server.port} user=postgres dbname=postgres"
        with psycopg.connect(login, password=password) as connection:
            assert connection.info.status == psycopg.pq.ConnStatus.OK
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(login, password="wrong")
        with pytest.raises(psycopg.OperationalError, match="no password supplied"):
            psycopg.connect(login, passfile=os.devnull)
    [(hash_,)] = query(server, "SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'")
    assert str(hash_).startswith("SCRAM-SHA-256$")


def test_a_dsn_names_any_database_and_role(server: EmbeddedServer) -> None:
    parts = psycopg.conninfo.conninfo_to_dict(server.dsn("a b/ä", "r@le", "p:w/d@"))
    assert (parts["dbname"], parts["user"], parts["password"]) == ("a b/ä", "r@le", "p:w/d@")
    assert "password" not in psycopg.conninfo.conninfo_to_dict(server.dsn("postgres", "somebody"))


def test_the_password_is_in_no_repr_and_no_process_title(server: EmbeddedServer) -> None:
    password = str(psycopg.conninfo.conninfo_to_dict(server.dsn())["password"])
    assert password not in repr(server)
    assert password not in repr(server.dsn())
    assert "***" in repr(server.dsn())
    assert password in f"{server.dsn()}"
    titles: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            titles.append(command_lines())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with server.replica():
            pass
    finally:
        done.set()
        watcher.join()
    assert not any(password in title for title in titles)


def test_only_its_account_can_read_the_password(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
        password_file = server.data_dir / "equitie_data.password"
        assert password_file.read_text() == psycopg.conninfo.conninfo_to_dict(server.dsn())["password"]
        assert password_file.stat().st_mode & 0o777 == 0o600
        assert server.data_dir.stat().st_mode & 0o777 == 0o700
        assert password_file.stat().st_uid == server.data_dir.stat().st_uid != 0 or not IS_ROOT


def test_several_run_at_once_and_leave_nothing(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir) as one, EmbeddedServer(bin_dir=bin_dir) as other:
        directories = [one.data_dir, other.data_dir]
        assert one.port != other.port
        query(one, "CREATE TABLE here (id int)")
        assert query(other, "SELECT to_regclass('here')") == [(None,)]
    assert not [path for path in directories if path.parent.exists()]
    assert not one.is_running
    with pytest.raises(EmbeddedServerError, match=r"was not started: call start\(\)"):
        one.dsn()


def test_starting_and_stopping_twice_is_no_error(bin_dir: Path) -> None:
    server = EmbeddedServer(bin_dir=bin_dir)
    server.stop()
    server.start()
    pid = query(server, "SELECT pg_postmaster_start_time()")
    server.start()
    assert query(server, "SELECT pg_postmaster_start_time()") == pid
    server.stop()
    server.stop()


def test_a_failing_with_block_stops_it(bin_dir: Path) -> None:
    server = EmbeddedServer(bin_dir=bin_dir)

    def fail() -> None:
        with server:
            places.append(server.data_dir)
            raise LookupError

    places: list[Path] = []
    with pytest.raises(LookupError):
        fail()
    assert not places[0].exists()


@pytest.mark.parametrize("kept", [True, False])
def test_durability_goes_with_the_data_directory(bin_dir: Path, place: Path, kept: bool) -> None:
    with EmbeddedServer(place / "data" if kept else None, bin_dir=bin_dir) as server:
        expected = ("on", "on", "on") if kept else ("off", "on", "on")
        [row] = query(
            server,
            "SELECT current_setting('fsync'), current_setting('synchronous_commit'),"
            " current_setting('full_page_writes')",
        )
        assert row == expected
        assert query(server, "SHOW data_checksums") == [("on" if kept or server.major >= 18 else "off",)]


@settings(max_examples=50, deadline=None)
@example(value="back\\slash, 'quotes'\n\\n\\'")
@given(value=st.text(st.sampled_from("\\'\"\n\r\t #=nt0") | st.characters(exclude_characters="\0", codec="utf-8")))
def test_a_setting_is_read_as_it_was_given(server: EmbeddedServer, value: str) -> None:
    other = EmbeddedServer(bin_dir=server.bin_dir, settings={"equitie.text": value})
    text = other._settings_text
    file = server.data_dir / "equitie_data.conf"
    before = file.read_text(encoding="utf-8")
    try:
        file.write_bytes((before + text).encode())
        [row] = query(server, "SELECT setting, error FROM pg_file_settings WHERE name = 'equitie.text'")
    finally:
        file.write_text(before, encoding="utf-8")
    assert row == (value, None)


def test_settings_reach_the_server(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir, settings={"max_connections": "17", "timezone": "Asia/Dubai"}) as server:
        assert query(server, "SHOW max_connections") == [("17",)]
        assert query(server, "SHOW timezone") == [("Asia/Dubai",)]
        query(server, "ALTER SYSTEM SET work_mem = '7MB'")
        server.restart()
        assert query(server, "SHOW work_mem") == [("7MB",)]


@pytest.mark.parametrize("name", ["port", "Listen_Addresses", "hba_file", "logging_collector"])
def test_settings_that_are_decided_here_are_refused(name: str) -> None:
    with pytest.raises(EmbeddedServerError, match="is decided by EmbeddedServer"):
        EmbeddedServer(settings={name: "1"})


@pytest.mark.parametrize("name", ["", "a b", "x = 1\ny", "1x"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(EmbeddedServerError, match="no name of a server setting"):
        EmbeddedServer(settings={name: "1"})


# Data that is kept.


def test_a_kept_server_keeps_rows_password_and_port(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "new" / "data", bin_dir=bin_dir) as server:
        query(server, "CREATE TABLE kept AS SELECT 7 AS id")
        dsn = server.dsn()
    with EmbeddedServer(place / "new" / "data", bin_dir=bin_dir) as server:
        assert query(server, "SELECT id FROM kept") == [(7,)]
        assert server.dsn() == dsn
        assert (server.data_dir / "server.log.1").exists()


def test_a_restart_keeps_data_and_port_of_a_temporary_server(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir) as server:
        dsn = server.dsn()
        query(server, "CREATE TABLE kept AS SELECT 7 AS id")
        server.restart()
        assert server.dsn() == dsn
        assert query(server, "SELECT id FROM kept") == [(7,)]


def test_a_long_path_gets_its_socket_elsewhere(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / ("x" * 120) / "data, with 'quotes'", bin_dir=bin_dir) as server:
        assert len(str(server.socket_dir)) < 90
        socket_dir = server.socket_dir
        password = psycopg.conninfo.conninfo_to_dict(server.dsn())["password"]
        psycopg.connect(host=str(socket_dir), port=server.port, user="postgres", password=password).close()
    assert not socket_dir.parent.exists()
    assert server._kept is not None
    assert (server._kept / "PG_VERSION").exists()


def test_a_port_that_was_taken_meanwhile_is_given_up(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
        port = server.port
    with socket.create_server(("127.0.0.1", port)), EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
        assert server.port != port
        assert query(server, "SELECT 1") == [(1,)]


def test_a_port_taken_between_choice_and_use_is_given_up(bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_port(), free_port()
    choices = iter(ports)
    monkeypatch.setattr(embedded, "free_port", lambda: next(choices))
    with socket.create_server(("127.0.0.1", ports[0])), EmbeddedServer(bin_dir=bin_dir) as server:
        assert server.port == ports[1]


# Crashes.


def test_a_killed_server_recovers_what_was_committed(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir) as server:
        query(server, "CREATE TABLE kept AS SELECT 7 AS id")
        dsn = server.dsn()
        server.kill()
        assert not server.is_running
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(dsn)
        server.start()
        assert server.dsn() == dsn
        assert query(server, "SELECT id FROM kept") == [(7,)]


@linux_only
def test_backends_that_outlive_a_killed_server_do_not_hinder_its_start(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir) as server:
        with contextlib.closing(psycopg.connect(server.dsn(), autocommit=True)) as connection:
            # Computing, it does not notice the postmaster's death.
            series = ", ".join(f"generate_series(1, 10000) AS s{number}" for number in range(4))
            connection.pgconn.send_query(f"SELECT count(*) FROM {series}".encode())
            busy = connection.info.backend_pid
            while query(server, f"SELECT state FROM pg_stat_activity WHERE pid = {busy}") != [("active",)]:
                time.sleep(0.005)
            server.kill()
            server.start()
            assert not Path(f"/proc/{busy}").exists() or b"Z" in Path(f"/proc/{busy}/stat").read_bytes()
        assert query(server, "SELECT 1") == [(1,)]


@linux_only
def test_a_temporary_server_that_was_killed_leaves_no_shared_memory(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir) as server:
        # Line 7 of the lock file: key and id of the System V segment.
        segment = (server.data_dir / "postmaster.pid").read_text().splitlines()[6].split()[1]
        assert segment in shared_memory()
        server.kill()
    assert segment not in shared_memory()


@linux_only
def test_a_stale_lock_file_with_a_reused_process_id_is_seen_through(server: EmbeddedServer, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=server.bin_dir) as kept:
        lock = (kept.data_dir / "postmaster.pid").read_text().splitlines()
    other_pid = (server.data_dir / "postmaster.pid").read_text().splitlines()[0]
    (place / "data" / "postmaster.pid").write_text("\n".join([other_pid, *lock[1:]]) + "\n")
    with EmbeddedServer(place / "data", bin_dir=server.bin_dir) as kept:
        assert query(kept, "SELECT 1") == [(1,)]


def test_a_data_directory_in_use_is_refused(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
        pid = (server.data_dir / "postmaster.pid").read_text().splitlines()[0]
        second = EmbeddedServer(place / "data", bin_dir=bin_dir)
        with pytest.raises(
            EmbeddedServerError, match=rf"in use by another server \(process {pid}\): stop it or choose"
        ):
            second.start()
        second.stop()
        assert query(server, "SELECT 1") == [(1,)]


def test_a_crashed_servers_stop_spares_the_next_server_of_its_data(bin_dir: Path, place: Path) -> None:
    crashed = EmbeddedServer(place / "data", bin_dir=bin_dir)
    crashed.start()
    crashed.kill()
    with EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
        with pytest.raises(EmbeddedServerError, match="in use by another server"):
            crashed.start()
        crashed.stop()
        assert query(server, "SELECT 1") == [(1,)]


def test_of_two_that_create_one_data_directory_at_once_one_gets_it(bin_dir: Path, place: Path) -> None:
    servers = [EmbeddedServer(place / "data", bin_dir=bin_dir) for _ in range(2)]
    errors: list[EmbeddedServerError] = []

    def start(server: EmbeddedServer) -> None:
        try:
            server.start()
        except EmbeddedServerError as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=[server]) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len([server for server in servers if server.is_running]) == 1
        assert "in use" in str(errors)
    finally:
        for server in servers:
            server.stop()


# One clear error.


def one_error(server: EmbeddedServer) -> str:
    with pytest.raises(EmbeddedServerError) as caught:
        server.start()
    assert not server.is_running
    server.stop()
    return str(caught.value)


def test_data_of_another_major_version_is_refused(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
        major = server.major
    (place / "data" / "PG_VERSION").write_text("99\n")
    message = one_error(EmbeddedServer(place / "data", bin_dir=bin_dir))
    assert f"was made by PostgreSQL 99 and cannot be opened by {major}: install PostgreSQL 99" in message


def test_data_of_another_version_of_this_machine_names_its_programs(place: Path) -> None:
    one, *others = {found.major: found for found in find_servers()}.values()
    if not others:
        pytest.skip("one version of PostgreSQL only")
    with EmbeddedServer(place / "data", bin_dir=one.bin_dir):
        pass
    message = one_error(EmbeddedServer(place / "data", bin_dir=others[0].bin_dir))
    assert f"pass bin_dir={str(one.bin_dir)!r}" in message


def test_a_strange_directory_is_refused_and_left_alone(bin_dir: Path, place: Path) -> None:
    directory = place / "photographs"
    directory.mkdir()
    (directory / "cat.jpg").touch()
    before = owner_and_mode(directory)
    assert "is not empty and no data directory" in one_error(EmbeddedServer(directory, bin_dir=bin_dir))
    assert owner_and_mode(directory) == before
    assert [path.name for path in directory.iterdir()] == ["cat.jpg"]


def test_an_interrupted_creation_is_recognised(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=bin_dir):
        pass
    (place / "data" / "equitie_data.password").unlink()
    assert "or its making was interrupted" in one_error(EmbeddedServer(place / "data", bin_dir=bin_dir))


def test_an_unusable_path_is_named(bin_dir: Path, place: Path) -> None:
    (place / "file").touch()
    message = one_error(EmbeddedServer(place / "file" / "data", bin_dir=bin_dir))
    assert str(place / "file") in message
    assert "could not start" in message


def test_the_servers_last_word_is_in_the_error(bin_dir: Path, place: Path) -> None:
    message = one_error(EmbeddedServer(place / "data", bin_dir=bin_dir, settings={"no_such_setting": "1"}))
    assert 'unrecognized configuration parameter "no_such_setting"' in message
    assert "unrecognized" in (place / "data" / "server.log").read_text()
    message = one_error(EmbeddedServer(bin_dir=bin_dir, settings={"shared_preload_libraries": "no_such_library"}))
    assert 'could not access file "no_such_library"' in message


def test_a_full_disk_is_one_clear_error(bin_dir: Path, place: Path) -> None:
    # The limit on a file's size fails the same writes as a full disk does, and needs no disk to fill.
    script = """
        import resource, sys
        from equitie_data.embedded import EmbeddedServer
        from equitie_data.errors import EmbeddedServerError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            EmbeddedServer(sys.argv[1], bin_dir=sys.argv[2]).start()
        except EmbeddedServerError as error:
            print(error)
    """
    message = run_script(script, place / "data", bin_dir)
    assert message.startswith("initdb failed in")
    assert message.count("\n") == 1
    assert not (place / "data" / "PG_VERSION").exists()


# Which server.


def test_the_environment_chooses_the_server(bin_dir: Path, server: EmbeddedServer) -> None:
    environ = {"EQUITIE_PG_BIN": str(bin_dir), "PATH": os.environ["PATH"]}
    assert find_server(environ) == (server.version, bin_dir)
    found = find_servers(environ)
    assert found[0].bin_dir == bin_dir
    assert len({entry.bin_dir.resolve() for entry in found}) == len(found)


def test_a_wrong_environment_is_no_reason_to_take_another_server(place: Path) -> None:
    for wrong in (place, place / "missing", Path("/bin")):
        with pytest.raises(EmbeddedServerError, match=f"EQUITIE_PG_BIN is '{wrong}', which has no program"):
            EmbeddedServer(environ={"EQUITIE_PG_BIN": str(wrong)})


def test_the_environment_is_read_at_the_call(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("EQUITIE_PG_BIN", str(place))
    with pytest.raises(EmbeddedServerError, match="EQUITIE_PG_BIN"):
        EmbeddedServer()


# The process that started it.


def run_script(script: str, *arguments: object, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd="/").stdout


START = """
    import os, sys, time
    from equitie_data.embedded import EmbeddedServer
    server = EmbeddedServer(sys.argv[1] or None, bin_dir=sys.argv[2])
    server.start()
    print(server.data_dir, server.dsn(), flush=True)
"""


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_the_process_that_is_killed(
    bin_dir: Path, place: Path, kept: bool, number: signal.Signals
) -> None:
    with started(START + "    time.sleep(600)\n", place / "data" if kept else "", bin_dir) as (process, data_dir):
        process.send_signal(number)
        process.wait()
        wait_until_gone(data_dir / "postmaster.pid" if kept else data_dir.parent)
    if kept:
        with EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
            assert "not properly shut down" not in server.log_path.read_text()


def test_a_server_ends_with_a_process_whose_fork_child_lives_on(bin_dir: Path) -> None:
    script = START + "    os.fork() or time.sleep(600)\n    time.sleep(600)\n"
    with started(script, "", bin_dir) as (process, data_dir):
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until_gone(data_dir.parent)


def test_a_server_ends_with_a_process_that_just_returns(bin_dir: Path) -> None:
    data_dir = Path(run_script(START, "", bin_dir).split()[0])
    assert not data_dir.parent.exists()


def test_a_fork_child_cannot_stop_its_parents_server(bin_dir: Path) -> None:
    script = """
        import os, psycopg, sys
        from equitie_data.embedded import EmbeddedServer
        from equitie_data.errors import EmbeddedServerError
        with EmbeddedServer(bin_dir=sys.argv[2]) as server:
            child = os.fork()
            if not child:
                assert server.is_running
                server.stop()
                for refused in (server.kill, server.restart):
                    try:
                        refused()
                    except EmbeddedServerError as error:
                        assert "belongs to process" in str(error)
                    else:
                        os._exit(3)
                assert server.is_running
                sys.exit()  # its atexit handlers and its __exit__ run
            status = os.waitpid(child, 0)[1]
            psycopg.connect(server.dsn()).close()
            print(status)
    """
    assert run_script(script, "", bin_dir) == "0\n"


@contextlib.contextmanager
def started(script: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run a script that starts a server; it and its fork children are killed at the end."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            data_dir, dsn = process.stdout.readline().split()
            psycopg.connect(dsn).close()
            yield process, Path(data_dir)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# Accounts and permissions.


@root_only
def test_roots_server_runs_under_another_account(bin_dir: Path) -> None:
    account = unprivileged_account()
    assert account is not None
    with EmbeddedServer(bin_dir=bin_dir) as server:
        assert server.data_dir.stat().st_uid == account.uid != 0
        pid = (server.data_dir / "postmaster.pid").read_text().splitlines()[0]
        if ON_LINUX:
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{account.uid}\t{account.uid}\t{account.uid}\t{account.uid}" in status


@root_only
@linux_only
def test_roots_server_has_none_of_roots_groups(bin_dir: Path) -> None:
    script = """
        import os, pathlib, sys
        from equitie_data.embedded import EmbeddedServer
        os.setgroups([0, 4])
        with EmbeddedServer(bin_dir=sys.argv[1]) as server:
            pid = server.data_dir.joinpath("postmaster.pid").read_text().splitlines()[0]
            print(pathlib.Path("/proc", pid, "status").read_text())
    """
    assert "Groups:\t \n" in run_script(script, bin_dir)


def test_nothing_outside_its_own_directory_changes_owner_or_mode(bin_dir: Path, place: Path) -> None:
    watched = {*place.parents, place, *bin_dir.parents, *bin_dir.parent.rglob("*"), Path(tempfile.gettempdir())}
    before = {path: owner_and_mode(path) for path in watched if path.exists()}
    accounts = Path("/etc/passwd").read_bytes()
    with EmbeddedServer(place / "data", bin_dir=bin_dir) as server, server.replica(), EmbeddedServer(bin_dir=bin_dir):
        during = {path: owner_and_mode(path) for path in before}
    assert during == before
    assert {path: owner_and_mode(path) for path in before} == before
    assert Path("/etc/passwd").read_bytes() == accounts


@root_only
def test_a_closed_directory_above_is_named_and_left_closed(bin_dir: Path, place: Path) -> None:
    private = place / "private"
    private.mkdir(mode=0o700)
    message = one_error(EmbeddedServer(private / "data", bin_dir=bin_dir))
    assert f"it may not enter {str(private)!r}" in message
    assert owner_and_mode(private) == (0, private.stat().st_gid, 0o40700)
    assert not (private / "data").exists()


@root_only
def test_data_of_roots_is_refused(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=bin_dir):
        pass
    for path in [place / "data", *(place / "data").rglob("*")]:
        os.chown(path, 0, 0)
    assert "belongs to root, under which PostgreSQL does not run" in one_error(
        EmbeddedServer(place / "data", bin_dir=bin_dir)
    )


@root_only
def test_data_of_another_account_is_opened_under_it(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(place / "data", bin_dir=bin_dir):
        pass
    stranger = 54_321
    for path in [place / "data", *(place / "data").rglob("*")]:
        os.chown(path, stranger, stranger, follow_symlinks=False)
    with EmbeddedServer(place / "data", bin_dir=bin_dir) as server:
        assert query(server, "SELECT 1") == [(1,)]
        assert server.log_path.stat().st_uid == stranger


@root_only
def test_programs_that_only_root_may_run_are_copied_not_opened(bin_dir: Path, place: Path) -> None:
    installation = bin_dir.parent
    if not (installation / "share").is_dir():
        message = one_error_of_closed_programs(bin_dir, place)
        assert "may not be executed by the unprivileged account" in message
        return
    home = place / "home"
    home.mkdir(mode=0o700)
    package = home / installation.parent.name
    shutil.copytree(installation, package / installation.name, symlinks=True)
    bundled = installation.parent.with_name(f"{installation.parent.name}.libs")
    if bundled.is_dir():
        shutil.copytree(bundled, home / bundled.name, symlinks=True)
    for path in [*home.rglob("*")]:
        path.chmod(path.stat().st_mode & 0o700)
    before = {path: owner_and_mode(path) for path in [home, *home.rglob("*")]}
    with EmbeddedServer(bin_dir=package / installation.name / "bin") as server, server.replica() as replica:
        assert query(replica, "SELECT 1") == [(1,)]
        assert {path: owner_and_mode(path) for path in before} == before
        copies = [server._bin_dir, replica._bin_dir]
    assert not [path for path in copies if path.exists()]


def one_error_of_closed_programs(bin_dir: Path, place: Path) -> str:
    home = place / "home"
    home.mkdir(mode=0o700)
    shutil.copytree(bin_dir, home / "bin", symlinks=True)
    return one_error(EmbeddedServer(bin_dir=home / "bin"))


@root_only
@pytest.mark.parametrize("kept", [True, False])
def test_an_ordinary_user_runs_it_under_the_own_account(bin_dir: Path, place: Path, kept: bool) -> None:
    nobody = pwd.getpwnam("nobody")
    account = unprivileged_account()
    if first_path_closed_to(account, [*reversed(bin_dir.parents), bin_dir / "postgres"]):
        pytest.skip("other accounts may not run this PostgreSQL")
    home = place / "home"
    home.mkdir(mode=0o700)
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    # The account is changed after the imports: other accounts may not be allowed to read this Python.
    script = """
        import os, sys, psycopg
        from equitie_data.embedded import EmbeddedServer
        home, bin_dir, uid, gid, kept = sys.argv[1:]
        psycopg.conninfo.conninfo_to_dict("")
        os.setgroups([]); os.setgid(int(gid)); os.setuid(int(uid))
        with EmbeddedServer(home + "/data" if kept else None, bin_dir=bin_dir) as server:
            with psycopg.connect(server.dsn()) as connection:
                connection.execute("CREATE TABLE kept AS SELECT 7 AS id")
            server.kill()
            server.start()
            with server.replica() as replica, psycopg.connect(replica.dsn()) as connection:
                print(connection.execute("SELECT id FROM kept").fetchone()[0], server.data_dir.stat().st_uid)
    """
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home)}
    arguments = [home, bin_dir, nobody.pw_uid, nobody.pw_gid, "kept" if kept else ""]
    assert run_script(script, *arguments, env=environment) == f"7 {nobody.pw_uid}\n"
    assert [path.name for path in home.iterdir()] == (["data"] if kept else [])


# Replicas.


def await_answer(server: EmbeddedServer, statement: str, answer: object) -> None:
    while query(server, statement) != [(answer,)]:
        time.sleep(0.005)


def test_a_replica_streams_until_it_is_promoted(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir, settings={"max_connections": "23"}) as primary:
        query(primary, "CREATE TABLE kept AS SELECT 1 AS id")
        with primary.replica() as replica, primary.replica(settings={"work_mem": "9MB"}) as other:
            query(primary, "INSERT INTO kept VALUES (2)")
            for each in (replica, other):
                await_answer(each, "SELECT count(*) FROM kept", 2)
                assert query(each, "SELECT pg_is_in_recovery()") == [(True,)]
                assert query(each, "SHOW max_connections") == [("23",)]
            assert query(other, "SHOW work_mem") == [("9MB",)]
            names = {row[0] for row in query(primary, "SELECT application_name FROM pg_stat_replication")}
            assert names == {query(each, "SHOW cluster_name")[0][0] for each in (replica, other)}
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                query(replica, "INSERT INTO kept VALUES (3)")
            primary.restart()
            query(primary, "INSERT INTO kept VALUES (3)")
            await_answer(replica, "SELECT count(*) FROM kept", 3)
            primary.kill()
            replica.promote()
            query(replica, "INSERT INTO kept VALUES (4)")
            assert query(replica, "SELECT count(*) FROM kept") == [(4,)]
            primary.start()
        assert query(primary, "SELECT count(*) FROM pg_replication_slots") == [(0,)]


def test_a_replicas_slot_goes_with_it(bin_dir: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir) as primary:
        for _ in range(3):
            with primary.replica():
                await_answer(primary, "SELECT active FROM pg_replication_slots", answer=True)
            assert query(primary, "SELECT count(*) FROM pg_replication_slots") == [(0,)]


def test_a_kept_replica_goes_on_where_it_was(bin_dir: Path, place: Path) -> None:
    with EmbeddedServer(bin_dir=bin_dir) as primary:
        with primary.replica(place / "replica"):
            pass
        query(primary, "CREATE TABLE kept AS SELECT 1 AS id")
        with EmbeddedServer(place / "replica", bin_dir=bin_dir) as replica:
            await_answer(replica, "SELECT to_regclass('kept')::text", "kept")


def test_a_primary_cannot_be_promoted(server: EmbeddedServer) -> None:
    with pytest.raises(EmbeddedServerError, match="cannot be promoted: it is no replica"):
        server.promote()


def test_a_stopped_server_has_no_replica(bin_dir: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="was not started"):
        EmbeddedServer(bin_dir=bin_dir).replica()
