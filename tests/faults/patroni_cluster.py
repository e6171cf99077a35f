"""Three PostgreSQL nodes under Patroni, with etcd as its memory: the failover that runs in production."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import attrs

from equitie_data._postgres.account import unprivileged_account
from equitie_data._postgres.process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

_SECONDS = 60.0
_AS_SOMEBODY_ELSE = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]


def missing_parts() -> list[str]:
    """Name what this machine lacks, each with the way to get it."""
    missing = []
    if not sys.platform.startswith("linux"):
        return ["it runs on Linux only"]
    if find_spec("patroni") is None:
        missing.append("Patroni (pip install 'patroni[etcd3,psycopg3]')")
    if shutil.which("etcd") is None:
        missing.append("etcd (apt-get install etcd-server)")
    if shutil.which("setpriv") is None:
        missing.append("setpriv (apt-get install util-linux)")
    if not missing and _way_down() is None:
        missing.append("a way for root to run Python as somebody else (run the tests as an ordinary user)")
    return missing


def _way_down() -> dict[str, Any] | None:
    """Find out how root may run Patroni, which runs PostgreSQL, which refuses to run as root.

    An account that may use this Python, or else a user namespace in which root is somebody else.

    Returns:
        ``prefix``, the command's first words, and ``options`` for `subprocess`; ``None`` if there is no way.
    """
    if os.geteuid() != 0:
        return {"prefix": [], "options": {}}
    account = unprivileged_account()
    ways: list[dict[str, Any]] = [] if account is None else [{"prefix": [], "options": account.popen_options}]
    if shutil.which("unshare"):
        ways.append({"prefix": _AS_SOMEBODY_ELSE, "options": {}})
    probe = [sys.executable, "-c", "import os, patroni; assert os.geteuid() != 0"]
    for way in ways:
        with suppress(OSError):  # an account that may not even run Python
            ended = subprocess.run(
                [*way["prefix"], *probe], check=False, capture_output=True, cwd="/", **way["options"]
            )
            if ended.returncode == 0:
                return way
    return None


def _ask(port: int, path: str, body: dict[str, Any] | None = None) -> str | None:
    """Ask an HTTP server of this machine; ``None`` when it does not answer."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection, suppress(OSError, HTTPException):
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        return connection.getresponse().read().decode()
    return None


@attrs.define(eq=False)
class Member:
    """One node: Patroni and the PostgreSQL it looks after."""

    name: str
    port: int
    api: int
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Patroni's REST API; ``None`` when it does not answer."""
        text = _ask(self.api, path, body)
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            return text

    def postgres_pid(self) -> int:
        """Return PostgreSQL's main process."""
        return int((self.data_dir / "postmaster.pid").read_text().split("\n", 1)[0])


class PatroniCluster:
    """Starts the three nodes and etcd on free ports, and leaves nothing of them.

    Replication is synchronous: an acknowledged commit is on two nodes. Patroni notices the death of a node after
    20 s, the least it allows.

    Args:
        bin_dir: PostgreSQL's programs.
    """

    def __init__(self, bin_dir: Path) -> None:
        way = _way_down()
        assert way is not None, "ask missing_parts() first"
        self._prefix: list[str] = way["prefix"]
        self._options: dict[str, Any] = way["options"]
        self._bin_dir = bin_dir
        self._directory = Path(tempfile.mkdtemp(prefix="patroni-"))
        self._etcd: subprocess.Popen[bytes] | None = None
        self._etcd_port = 0
        self.members = [self._member(f"n{number}") for number in (1, 2, 3)]

    def _member(self, name: str) -> Member:
        directory = self._directory / name
        directory.mkdir()
        return Member(name, free_port(), free_port(), directory)

    def __enter__(self) -> Self:
        try:
            self._own()
            self._start_etcd()
            self.start(self.members[0])
            self.await_leader()  # so that the others copy it, instead of racing it
            for member in self.members[1:]:
                self.start(member)
            self.await_health()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything at once and delete it."""
        for member in self.members:
            self.kill(member)
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()
        await_true(lambda: not self._left(), "the nodes' processes ended")
        shutil.rmtree(self._directory)

    def _left(self) -> list[Path]:
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "cwd").readlink().is_relative_to(self._directory):
                    left.append(process)
        return left

    def _own(self) -> None:
        """Give the directories to the account the nodes run under."""
        self._directory.chmod(0o711)
        if "user" in self._options:
            for directory in (self._directory, *(member.directory for member in self.members)):
                os.chown(directory, self._options["user"], self._options["group"])

    # --- what is running ------------------------------------------------------------------------------------------

    def dsn(self, dbname: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        """Write the connection URI of whichever node takes writes, as `EmbeddedServer.dsn` does of one server."""
        login = quote(user) + (f":{quote(password)}" if password else "")
        return f"postgresql://{login}@{self._hosts()}/{quote(dbname)}?target_session_attrs=read-write"

    def _hosts(self) -> str:
        return ",".join(f"127.0.0.1:{member.port}" for member in self.members)

    def leader(self) -> Member | None:
        """Return the node that takes writes, if one does."""
        return next((member for member in self.members if self._role(member) == "primary"), None)

    def _role(self, member: Member) -> str | None:
        status = member.ask("/patroni") if member.process is not None else None
        if not isinstance(status, dict) or status.get("state") != "running":
            return None
        return "primary" if status.get("role") in ("primary", "master") else str(status.get("role"))

    def await_leader(self, other_than: Member | None = None) -> Member:
        """Wait for a node that takes writes."""
        found: list[Member] = []

        def is_there() -> bool:
            leader = self.leader()
            if leader is None or leader is other_than:
                return False
            found.append(leader)
            return True

        await_true(is_there, "a leader")
        return found[-1]

    def await_health(self) -> None:
        """Wait until all nodes stream from a leader, one of them synchronously."""

        def is_well() -> bool:
            answer = self.members[0].ask("/cluster")
            members = answer.get("members", []) if isinstance(answer, dict) else []
            states = sorted((str(each.get("role")), str(each.get("state"))) for each in members)
            return states == [("leader", "running"), ("replica", "streaming"), ("sync_standby", "streaming")]

        await_true(is_well, "a leader, a synchronous standby and a replica")

    # --- what can be done to it -----------------------------------------------------------------------------------

    def start(self, member: Member) -> None:
        """Start a node, or start it again."""
        config = member.directory / "patroni.json"
        config.write_text(json.dumps(self._configuration(member)))  # JSON is YAML
        config.chmod(0o644)
        log = (member.directory / "patroni.log").open("ab")
        member.process = self._run([sys.executable, "-m", "patroni", str(config)], member.directory, log)
        log.close()

    def switch_over(self) -> None:
        """Have Patroni move the leader's role to another node, in an orderly way."""
        leader = self.await_leader()
        answer = leader.ask("/switchover", {"leader": leader.name})
        assert "uccessfully" in str(answer), answer

    def kill_postgres(self, member: Member) -> None:
        """Kill PostgreSQL; Patroni is left and starts it again, or has another node take over."""
        os.kill(member.postgres_pid(), signal.SIGKILL)

    def kill(self, member: Member) -> None:
        """Kill a whole node, as a power failure does."""
        if member.process is None:
            return
        member.process.kill()
        member.process.wait()
        member.process = None
        with suppress(OSError, ValueError):
            os.kill(member.postgres_pid(), signal.SIGKILL)

    # --- how ------------------------------------------------------------------------------------------------------

    def _run(self, command: list[str], directory: Path, log: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # Should this process be killed, the nodes end as well.
            [*self._prefix, "setpriv", "--pdeathsig", "TERM", *command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "HOME": str(directory)},
            **self._options,
        )

    def _start_etcd(self) -> None:
        self._etcd_port, peers = free_port(), free_port()
        directory = self._directory / "etcd"
        directory.mkdir(mode=0o700)
        if "user" in self._options:
            os.chown(directory, self._options["user"], self._options["group"])
        client_url, peer_url = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{peers}"
        command = ["etcd", "--data-dir", str(directory / "data"), "--initial-cluster", f"default={peer_url}"]
        command += ["--listen-client-urls", client_url, "--advertise-client-urls", client_url]
        command += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
        with (directory / "etcd.log").open("wb") as log:
            self._etcd = self._run(command, directory, log)

        def is_well() -> bool:
            return "true" in (_ask(self._etcd_port, "/health") or "")

        await_true(is_well, "etcd")

    def _configuration(self, member: Member) -> dict[str, Any]:
        admitted = [
            "local all all trust",
            "host all all 127.0.0.1/32 trust",
            "host replication all 127.0.0.1/32 trust",
        ]
        return {
            "scope": "equitie",
            "name": member.name,
            "restapi": {"listen": f"127.0.0.1:{member.api}", "connect_address": f"127.0.0.1:{member.api}"},
            "etcd3": {"hosts": [f"127.0.0.1:{self._etcd_port}"]},
            "bootstrap": {
                "dcs": {
                    "ttl": 20,
                    "loop_wait": 1,
                    "retry_timeout": 3,
                    "synchronous_mode": True,
                    "failsafe_mode": True,
                    "postgresql": {
                        "use_pg_rewind": True,
                        "use_slots": True,
                        "parameters": {"wal_log_hints": "on", "hot_standby": "on", "wal_level": "replica"},
                    },
                },
                "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{member.port}",
                "connect_address": f"127.0.0.1:{member.port}",
                "data_dir": str(member.data_dir),
                "bin_dir": str(self._bin_dir),
                "pg_hba": admitted,
                "authentication": {
                    "superuser": {"username": "postgres", "password": "p"},
                    "replication": {"username": "repl", "password": "p"},
                    "rewind": {"username": "rew", "password": "p"},
                },
                "parameters": {
                    "unix_socket_directories": "",
                    "deadlock_timeout": "50ms",
                    "max_connections": 60,
                    # Processes are killed here, never the machine.
                    "fsync": "off",
                },
            },
            "watchdog": {"mode": "off"},
        }


def await_true(condition: Callable[[], bool], what: str) -> None:
    """Wait for something, and say what did not come."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {_SECONDS:g} s in vain for {what}"
        time.sleep(0.1)
