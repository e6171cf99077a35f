"""A PgBouncer of a test's own: on a free port, under an unprivileged account, gone with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from equitie_data._postgres.account import unprivileged_account
from equitie_data._postgres.process import free_port

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from equitie_data.embedded import EmbeddedServer

MISSING = "PgBouncer IS MISSING: nothing was tested behind it. To get it: apt-get install pgbouncer"

_CONSOLE_PASSWORD = "console"
# What docs/how-to/run-behind-pgbouncer.md recommends, but for the sizes.
_CONFIGURATION = """
[databases]
* = host=127.0.0.1 port={server_port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {directory}/userlist.txt
admin_users = console
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 300
server_login_retry = 1
ignore_startup_parameters = {ignored}
logfile = {directory}/pgbouncer.log
pidfile =
"""


def program() -> str | None:
    """Return where PgBouncer is installed, if it is."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"])
    return shutil.which("pgbouncer", path=path)


class PgBouncer:
    """PgBouncer in transaction mode before a server.

    Logins are checked by SCRAM against the server's own verifiers, which PgBouncer also logs in to the server with.

    Args:
        server: What stands behind it.
        pool_size: Most server connections per database and role.
        ignored: Start-up parameters that it drops; it refuses every other unknown one.

    Attributes:
        port: Where it listens.
        server_port: Where it looks for the server; takes effect with the next start.
    """

    def __init__(self, server: EmbeddedServer, *, pool_size: int = 4, ignored: str = "") -> None:
        found = program()
        if found is None:
            raise FileNotFoundError(MISSING)
        self.port = free_port()
        self.server_port = server.port
        self._program = found
        self._server = server
        self._pool_size = pool_size
        self._ignored = ignored
        self._account = unprivileged_account()
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None

    def dsn(self, dsn: str) -> str:
        """Return a DSN of the server, by way of the pooler."""
        parts: dict[str, Any] = dict(conninfo_to_dict(dsn))
        parts.pop("hostaddr", None)
        return make_conninfo("", **{**parts, "host": "127.0.0.1", "port": self.port})

    def ask(self, command: str) -> list[dict[str, Any]]:
        """Run a command of the administration console."""
        dsn = f"host=127.0.0.1 port={self.port} user=console password={_CONSOLE_PASSWORD} dbname=pgbouncer"
        with psycopg.connect(dsn, autocommit=True, row_factory=psycopg.rows.dict_row) as console:
            cursor = console.cursor(binary=False)
            # The console speaks the simple protocol alone.
            result = console.pgconn.exec_(command.encode())
            cursor.close()
            if result.status not in {psycopg.pq.ExecStatus.TUPLES_OK, psycopg.pq.ExecStatus.COMMAND_OK}:
                raise psycopg.OperationalError(result.error_message.decode())
            names = [(result.fname(column) or b"").decode() for column in range(result.nfields)]
            return [
                {name: (result.get_value(row, column) or b"").decode() for column, name in enumerate(names)}
                for row in range(result.ntuples)
            ]

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it takes connections."""
        directory = self._prepare()
        options: dict[str, Any] = {} if self._account is None else self._account.popen_options
        self._process = subprocess.Popen(
            [self._program, "-q", str(directory / "pgbouncer.ini")],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                self.ask("SHOW VERSION")
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = directory / "pgbouncer.log"
                    said = log.read_text() if log.exists() else "it said nothing"
                    raise RuntimeError(f"PgBouncer does not start: {said}") from None
                time.sleep(0.01)
            else:
                return

    def kill(self) -> None:
        """End it at once: every client and every server connection is cut."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def restart(self) -> None:
        """End it at once and start it again."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it and remove what it left."""
        self.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _prepare(self) -> Path:
        """Write its files, with today's verifiers."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="equitie-pgbouncer-"))
        directory = self._directory
        configuration = _CONFIGURATION.format(
            server_port=self.server_port,
            port=self.port,
            directory=directory,
            pool_size=self._pool_size,
            ignored=self._ignored,
        )
        with psycopg.connect(self._server.dsn()) as owner:
            verifiers = owner.execute(
                "SELECT rolname, rolpassword FROM pg_catalog.pg_authid WHERE rolpassword LIKE 'SCRAM-SHA-256%'"
            ).fetchall()
        users = [f'"{name}" "{verifier}"' for name, verifier in [*verifiers, ("console", _CONSOLE_PASSWORD)]]
        for name, text in (("pgbouncer.ini", configuration), ("userlist.txt", "\n".join(users) + "\n")):
            path = directory / name
            path.write_text(text)
            path.chmod(0o600)
            self._hand_over(path)
        self._hand_over(directory)
        return directory

    def _hand_over(self, path: Path) -> None:
        if self._account is not None:
            with contextlib.suppress(PermissionError):
                os.chown(path, self._account.uid, self._account.gid)
