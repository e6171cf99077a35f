"""A PostgreSQL data directory: whose it is, which server holds it, and the library's own files in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from equitie_data._postgres.account import Account, first_path_closed_to
from equitie_data.errors import EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

__all__ = ["DataDirectory", "make_private"]

_HAS_PROC = Path("/proc/self/cwd").exists()


def make_private(directory: Path, account: Account | None) -> None:
    """Make a directory that only the account and root may enter."""
    directory.mkdir(mode=0o700)
    if account:
        os.chown(directory, account.uid, account.gid)


class DataDirectory:
    """An existing data directory, or an empty one that is about to become one.

    Args:
        path: An absolute path without symbolic links.
        account: Whose it is; None when it is the process's own.
        durable: Whether what is written must survive a crash of the operating system.
    """

    def __init__(self, path: Path, account: Account | None, *, durable: bool) -> None:
        self.path = path
        self.account = account
        self.durable = durable

    @classmethod
    def adopt(cls, path: Path, account: Account | None) -> DataDirectory:
        """Take a directory the user named, made if it is missing; refuse while it is untouched.

        Args:
            path: The data directory.
            account: Whose a new one becomes; an existing one stays its owner's.

        Raises:
            EmbeddedServerError: It is not empty and no data directory, it is another account's, or its path is closed
                to the account.
        """
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        owner = path.stat()
        new = not any(path.iterdir())
        if not new and not (path / "PG_VERSION").exists():
            raise EmbeddedServerError(f"{str(path)!r} is not empty and no data directory: choose another directory.")
        if account is None:
            if owner.st_uid != os.geteuid():
                raise EmbeddedServerError(
                    f"The data directory {str(path)!r} belongs to another account (user id {owner.st_uid}): "
                    "run as that account or choose another directory."
                )
        else:
            if owner.st_uid != 0:
                account = Account(f"user id {owner.st_uid}", owner.st_uid, owner.st_gid)
            elif not new:
                raise EmbeddedServerError(
                    f"The data directory {str(path)!r} belongs to root, under which PostgreSQL does not run: "
                    "give it and everything in it to the account that shall run the server."
                )
            closed = first_path_closed_to(account, reversed(path.parents))
            if closed:
                if new:
                    path.rmdir()
                raise EmbeddedServerError(
                    f"The data directory {str(path)!r} cannot be reached by account {account.name!r}, under which "
                    f"root's server runs, because it may not enter {str(closed)!r}: choose a directory elsewhere."
                )
            os.chown(path, account.uid, account.gid)
        if new:
            path.chmod(0o700)
        return cls(path, account, durable=True)

    @property
    def made_by(self) -> str | None:
        """The major version that made it; None while it is empty."""
        return self.read("PG_VERSION").strip() or None

    def server_pid(self) -> int | None:
        """The process id of the live server that holds the directory, if any."""
        pid = self._lock_file()[:1]
        if not pid or not pid[0].isdigit():
            return None
        if _HAS_PROC:
            return int(pid[0]) if self._is_held_by(pid[0]) else None
        try:
            os.kill(int(pid[0]), 0)
        except OSError:
            return None
        return int(pid[0])

    def is_ready(self, pid: int) -> bool:
        """Whether the server of that process id takes connections."""
        # The lock file's eighth line, where pg_ctl looks too (PostgreSQL's pidfile.h, PM_STATUS_READY and _STANDBY).
        lines = self._lock_file()
        return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() in {"ready", "standby"}

    def was_left_by(self, pid: int) -> bool:
        """Whether the dead server of that process id, and not one started since, left its lock file behind."""
        return self._lock_file()[:1] == [str(pid)]

    def forget_dead_server(self) -> None:
        """Remove a dead server's lock file.

        PostgreSQL would refuse to start as long as any process of its account bears the process id in it; process
        ids are used again, after a restart of the machine or container in particular.
        """
        (self.path / "postmaster.pid").unlink(missing_ok=True)

    def last_port(self) -> int | None:
        """The TCP port of the server's last start."""
        match = re.search(r'"-p" "(\d+)"', self.read("postmaster.opts"))
        return int(match[1]) if match else None

    def end_processes(self) -> None:
        """End the processes a killed server left behind, which go on with their statement; wait until they are gone."""
        deadline = time.monotonic() + 5.0
        while held_by := [pid.name for pid in Path("/proc").glob("[0-9]*") if self._is_held_by(pid.name)]:
            for pid in held_by:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGQUIT if time.monotonic() < deadline else signal.SIGKILL)
            time.sleep(0.01)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process at a time create or start a server here."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # Files. The account could plant symbolic links in its directory: root must not follow them.

    def read(self, name: str) -> str:
        """Read a file; empty when there is none."""
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return ""
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
            return file.read()

    def append(self, name: str, text: str) -> None:
        """Add to an existing file."""
        with os.fdopen(os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW), "a") as file:
            file.write(text)

    def write(self, name: str, text: str) -> None:
        """Replace a file by one of mode 0600, whole or not at all."""
        temporary = f"{name}.new"
        with self.create(temporary) as file:
            file.write(text.encode())
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        (self.path / temporary).replace(self.path / name)

    def create(self, name: str) -> IO[bytes]:
        """Open a new file of mode 0600 that belongs to the account, in the place of one that exists."""
        path = self.path / name
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if self.account:
            os.fchown(descriptor, self.account.uid, self.account.gid)
        return os.fdopen(descriptor, "ab")

    def _lock_file(self) -> list[str]:
        return self.read("postmaster.pid").splitlines()

    def _is_held_by(self, pid: str) -> bool:
        """A server and its backends work in their data directory; a stranger who got the process id does not."""
        process = Path("/proc", pid)
        try:
            return (process / "cwd").samefile(self.path) and (process / "comm").read_text() == "postgres\n"
        except OSError:  # it is gone, or another account's, which cannot be in a directory of mode 0700
            return False
