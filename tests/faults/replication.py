"""A primary with two streaming replicas, and what can befall them."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from tests.faults.application import settings, wait_until

from equitie_data.embedded import EmbeddedServer
from equitie_data.provision import DATABASE, provision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from equitie_data import Settings


class Cluster:
    """Three servers, as their owner sees them.

    Args:
        bin_dir: Whose programs they run.
        synchronous: Whether a commit waits for one of the replicas.
    """

    def __init__(self, bin_dir: Path, *, synchronous: bool = False) -> None:
        self._stack = ExitStack()
        self.primary = self._stack.enter_context(
            EmbeddedServer(bin_dir=bin_dir, settings={"deadlock_timeout": "50ms", "wal_sender_timeout": "5s"})
        )
        self.app_dsn = provision(self.primary)
        self.replicas = [self._stack.enter_context(self.primary.replica()) for _ in range(2)]
        if synchronous:
            ask(self.primary, "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'")
            ask(self.primary, "SELECT pg_reload_conf()")
            wait_until(lambda: ask(self.primary, "SHOW synchronous_standby_names") == [("ANY 1 (*)",)])

    def close(self) -> None:
        self._stack.close()

    def dsn_of(self, server: EmbeddedServer) -> str:
        """Return the application's DSN of one of the servers."""
        return self.app_dsn.replace(f":{self.primary.port}/", f":{server.port}/")

    def settings(self, **changes: Any) -> Settings:
        """Return the application's settings: the primary, and two replicas that are looked at often."""
        replicas = [self.dsn_of(replica) for replica in self.replicas]
        return settings(self.app_dsn, **{"replicas": replicas, "health_check_interval": 0.3, **changes})

    def await_replay(self) -> None:
        """Wait until the running replicas have replayed everything."""
        position = ask(self.primary, "SELECT pg_current_wal_insert_lsn()")[0]
        for replica in self.replicas:
            if replica.is_running:
                wait_until(partial(_answers, replica, "SELECT pg_last_wal_replay_lsn() >= %s", True, position))


def ask(server: EmbeddedServer, statement: str, params: Any = None) -> list[tuple[Any, ...]]:
    """Run a statement as the owner."""
    with psycopg.connect(server.dsn(DATABASE), autocommit=True, connect_timeout=10) as connection:
        cursor = connection.execute(statement, params)
        return [] if cursor.description is None else cursor.fetchall()


def _answers(server: EmbeddedServer, statement: str, answer: object, params: Any = None) -> bool:
    return ask(server, statement, params) == [(answer,)]


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    """Stop every process of a server without a word to anybody: connections stay open, and nothing answers."""
    main = int((server.data_dir / "postmaster.pid").read_text().split("\n", 1)[0])
    stopped: list[int] = []
    try:
        os.kill(main, signal.SIGSTOP)
        stopped.append(main)
        for process in _children(main):
            os.kill(process, signal.SIGSTOP)
            stopped.append(process)
        yield
    finally:
        for process in reversed(stopped):
            os.kill(process, signal.SIGCONT)


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


@contextmanager
def replay_paused(*replicas: EmbeddedServer) -> Iterator[None]:
    """Let replicas receive and not replay."""
    try:
        for replica in replicas:
            ask(replica, "SELECT pg_wal_replay_pause()")
            wait_until(partial(_answers, replica, "SELECT pg_get_wal_replay_pause_state()", "paused"))
        yield
    finally:
        for replica in replicas:
            ask(replica, "SELECT pg_wal_replay_resume()")
