"""A server that may be killed, the books on it, and a proxy before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.faults.application import Listener, settings
from tests.faults.ledger import Ledger

from equitie_data import Database, as_service
from equitie_data.embedded import EmbeddedServer
from equitie_data.provision import DATABASE, provision
from equitie_data.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def primary(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """A server of each version that no other test needs alive."""
    settings = {"deadlock_timeout": "50ms", "max_connections": "120", "wal_level": "replica"}
    with EmbeddedServer(bin_dir=server.bin_dir, settings=settings) as running:
        yield running


@pytest.fixture(scope="session")
def app_role_dsn(primary: EmbeddedServer) -> str:
    """The application's DSN of a migrated database on it."""
    return provision(primary)


@pytest.fixture
def ledger(primary: EmbeddedServer, app_role_dsn: str) -> Ledger:
    """Fresh books, on a server that is up again whatever the last test did to it."""
    if not primary.is_running:
        primary.start()
    return Ledger(primary.dsn(DATABASE))


@pytest.fixture
def proxy(app_role_dsn: str) -> Iterator[TcpProxy]:
    """What the application takes for the server."""
    with TcpProxy(app_role_dsn) as proxy:
        yield proxy


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def application(ledger: Ledger, proxy: TcpProxy, listener: Listener) -> Iterator[Database]:
    """The application's database, by way of the proxy."""
    with Database(settings(proxy.dsn), hooks=[listener]) as database:
        yield database


@pytest.fixture
def service() -> Iterator[None]:
    with as_service("faults"):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # A skipped proof of failover must not look like a passed one.
    reasons = {report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reason for reason in reasons if "NOT tested" in reason):
        terminalreporter.write_line(reason.removeprefix("Skipped: "), red=True, bold=True)
