"""What the application under fire is made with, and how a test watches it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from equitie_data import Settings
from equitie_data._postgres.process import is_free

if TYPE_CHECKING:
    from collections.abc import Callable

    from equitie_data.embedded import EmbeddedServer


class Listener:
    """Keeps the events of a database."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: object) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def settings(dsn: str, **changes: Any) -> Settings:
    """Settings under which nothing but the calls of a test touches the server."""
    quiet = {"enable_audit_logging": False, "enable_performance_monitoring": False}
    return Settings(dsn=dsn, **{"min_size": 2, "max_size": 10, **quiet, **changes})


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something that happens elsewhere."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def crash_and_recover(server: EmbeddedServer) -> None:
    """Kill a server and start it again, on its port: the last of its processes may hold that for a moment."""
    server.kill()
    wait_until(lambda: is_free(server.port))
    server.start()
