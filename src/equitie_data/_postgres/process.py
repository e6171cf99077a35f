"""Running PostgreSQL's programs, and seeing to it that a server ends with the process that started it."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import time
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import IO

    from equitie_data._postgres.directory import DataDirectory

__all__ = ["Watchdog", "becomes_free", "free_port", "is_free", "last_word", "run_program", "spawn_server"]

_PORT_PATIENCE = 1.0  # seconds

# Runs until its standard input gives a line (dismissed) or ends (the process that started it is gone, however).
# $1 data directory, $2 signal for the server, $3 directory to delete afterwards or "".
# The process id may be another process's by now: only one that works in the data directory is the server.
_WATCHDOG = """
if read -r _; then exit 0; fi
lock="$1/postmaster.pid"
for _ in 1 2 3 4 5; do [ -e "$lock" ] || sleep 0.2; done
pid=
{ read -r pid < "$lock"; } 2> /dev/null
case $pid in
    "" | *[!0-9]*) ;;
    *)
        if [ ! -d /proc/self ] || [ "/proc/$pid/cwd" -ef "$1" ]; then
            kill -"$2" "$pid"
            for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
                for _ in 1 2 3 4 5 6 7 8 9 10; do [ ! -e "$lock" ] || sleep 0.1; done
            done
        fi ;;
esac
[ -n "$3" ] || exit 0
for process in /proc/[0-9]*; do
    [ ! "$process/cwd" -ef "$1" ] || kill -KILL "${process#/proc/}"
done
rm -rf -- "$3"
"""


class Watchdog:
    """A tiny process that stops a server as soon as this process is gone, even by SIGKILL.

    It holds the reading end of a pipe whose other end only this process has. A parent-death signal would not do: it
    fires when the *thread* that started the server ends.

    Args:
        data_dir: The server's data directory.
        stop_signal: The name of the signal that stops the server.
        delete: A directory to delete after that.
    """

    _watching: ClassVar[weakref.WeakSet[Watchdog]] = weakref.WeakSet()
    _knows_forks: ClassVar[bool] = False

    def __init__(self, data_dir: Path, stop_signal: str, delete: Path | None) -> None:
        if not Watchdog._knows_forks:
            # A fork child that outlives this process must not hold the pipe open. Fork hooks cannot be removed.
            os.register_at_fork(after_in_child=Watchdog._let_go_in_fork_child)
            Watchdog._knows_forks = True
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "sh", data_dir, stop_signal, delete or ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        Watchdog._watching.add(self)

    def dismiss(self) -> None:
        """End it without any effect on the server."""
        Watchdog._watching.discard(self)
        self._process.communicate(b"\n")

    @classmethod
    def _let_go_in_fork_child(cls) -> None:
        for watchdog in cls._watching:
            watchdog.let_go()

    def let_go(self) -> None:
        """Close this process's end of the pipe, as a fork child must."""
        if self._process.stdin is not None:
            self._process.stdin.close()


def spawn_server(
    bin_dir: Path, directory: DataDirectory, port: int, socket_dir: Path, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start `postgres` on a TCP port of 127.0.0.1 and a Unix socket; it may not be ready yet."""
    own_settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": f'"{socket_dir}"',
        "log_destination": "stderr",
        "logging_collector": "off",
    }
    options = [word for name, value in own_settings.items() for word in ("-c", f"{name}={value}")]
    return subprocess.Popen(
        [bin_dir / "postgres", "-D", directory.path, "-p", str(port), *options],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        # Ctrl-C goes to every process of the terminal's foreground group; who stops the server is the program.
        start_new_session=True,
        **_process_options(directory),
    )


def run_program(
    bin_dir: Path,
    program: str,
    arguments: Sequence[str | Path],
    directory: DataDirectory,
    *,
    environment: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> None:
    """Run one of PostgreSQL's programs in a data directory, under its account, to its end.

    Raises:
        EmbeddedServerError: It is missing or it failed; the message has its own last word.
    """
    if not (bin_dir / program).exists():
        raise EmbeddedServerError(f"{str(bin_dir)!r} has no program {program}.")
    options = _process_options(directory)
    options["env"] |= environment or {}
    ended = subprocess.run(
        [bin_dir / program, *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        pass_fds=pass_fds,
        **options,
    )
    if ended.returncode:
        raise EmbeddedServerError(f"{program} failed in {str(directory.path)!r}: {last_word(ended.stderr)}")


def last_word(log: str) -> str:
    """Find the line of a log, or of a program's errors, that says why it gave up; it ends with a full stop."""
    said: list[tuple[str, str]] = re.findall(r"(?m)^.*?\b(FATAL|PANIC|ERROR|error|LOG):\s+(.*\S)", log)
    # "... contains errors" only points at the lines before it.
    grave = [text for level, text in said if level != "LOG" and "contains errors" not in text]
    other = [text for _, text in said] or [line.strip() for line in log.splitlines() if line.strip()]
    reason = (grave or [text for text in other if "contains errors" not in text] or ["it gave no reason"])[-1]
    return reason.rstrip(".") + "."


def free_port() -> int:
    """Pick a port below the ephemeral range, so that no outgoing connection takes it while the server is down."""
    for _ in range(1_000):
        port = 15_000 + secrets.randbelow(17_000)
        if is_free(port):
            return port
    raise EmbeddedServerError("No free TCP port was found on 127.0.0.1.")


def is_free(port: int) -> bool:
    """Whether a server could listen on the port of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def becomes_free(port: int) -> bool:
    """Whether a server could listen on the port soon: within a second."""
    deadline = time.monotonic() + _PORT_PATIENCE
    while not is_free(port):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def _process_options(directory: DataDirectory) -> dict[str, Any]:
    # PG* variables would change what the programs do, and the rest of an application's environment is not for the
    # eyes of a server's account.
    passed_on = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        "env": {**passed_on, "LC_ALL": "C", "TZ": "UTC"},
        "cwd": directory.path,
        "umask": 0o077,
        **(directory.account.popen_options if directory.account else {}),
    }
