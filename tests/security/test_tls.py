"""TLS to a server that has it: a verified one is let through, an impostor is refused with a sentence."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from psycopg.conninfo import make_conninfo
from tests.security.certificates import Authority

from equitie_data import Database, UnavailableError, as_service
from equitie_data.connect import connect
from equitie_data.embedded import EmbeddedServer, find_servers
from equitie_data.errors import EmbeddedServerError
from equitie_data.provision import DATABASE, provision

if TYPE_CHECKING:
    from collections.abc import Iterator


class Deployment(NamedTuple):
    server: EmbeddedServer
    dsn: str
    authority: Path
    stranger: Path


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A migrated platform on a server whose certificate is for localhost and db.example.

    Once, and not on every server: TLS is the client's business, and the server in the wheel was built without it.
    """
    directory = Path(tempfile.mkdtemp(prefix="equitie-tls-"))
    directory.chmod(0o711)
    authority, stranger = Authority("ours", directory), Authority("theirs", directory)
    certificate, key = authority.sign("localhost", "db.example")
    settings = {"ssl": "on", "ssl_cert_file": str(certificate), "ssl_key_file": str(key)}
    try:
        with started(settings) as running:
            # The loopback address stands in for the network; the name is what the certificate is checked against.
            dsn = make_conninfo(provision(running), host="db.example", hostaddr="127.0.0.1")
            yield Deployment(running, dsn, authority.file, stranger.file)
    finally:
        shutil.rmtree(directory)


def started(settings: dict[str, str]) -> EmbeddedServer:
    """Start the newest server that was built with TLS."""
    for binaries in find_servers():
        server = EmbeddedServer(bin_dir=binaries.bin_dir, settings=settings)
        try:
            server.start()
        except EmbeddedServerError as error:
            if "SSL is not supported" not in str(error):
                raise
        else:
            return server
    pytest.skip("NO TLS WAS TESTED: no PostgreSQL here was built with it; apt-get install postgresql-15")


def verified_by(deployment: Deployment, authority: Path, **parameters: str) -> str:
    return make_conninfo(deployment.dsn, sslmode="verify-full", sslrootcert=str(authority), **parameters)


def test_a_verified_server_is_let_through_by_pool_probe_and_all(deployment: Deployment) -> None:
    dsn = verified_by(deployment, deployment.authority)
    with Database(dsn) as database, as_service("a test"):
        assert database.execute_read(lambda connection: connection.pgconn.ssl_in_use)
        assert not database.pool.primary.probe().in_recovery


def test_an_impostor_with_another_authority_is_refused(deployment: Deployment) -> None:
    with pytest.raises(UnavailableError) as caught:
        Database(verified_by(deployment, deployment.stranger)).open()
    assert "no authority in sslrootcert has signed the server's certificate" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_of_another_name_is_refused(deployment: Deployment) -> None:
    with pytest.raises(UnavailableError) as caught:
        Database(verified_by(deployment, deployment.authority, host="other.example")).open()
    assert "the server's certificate is for another host" in str(caught.value)


def test_a_missing_authority_file_is_named_as_what_it_is(deployment: Deployment) -> None:
    with pytest.raises(UnavailableError, match="sslrootcert names no file"):
        connect(verified_by(deployment, Path("/nowhere/ca.crt")))


def test_a_server_without_tls_is_refused_where_it_is_asked_for(app_dsn: str) -> None:
    with pytest.raises(UnavailableError, match="asks for TLS, which the server does not offer"):
        connect(make_conninfo(app_dsn, sslmode="require"))


def test_a_server_that_insists_on_tls_says_what_is_missing(deployment: Deployment) -> None:
    hba = deployment.server.data_dir / "pg_hba.conf"
    before = hba.read_bytes()
    try:
        with hba.open("rb+") as file:
            file.write(b"hostssl all all 127.0.0.1/32 scram-sha-256\n")
            file.truncate()
        with connect(deployment.server.dsn()) as owner:
            owner.execute("SELECT pg_reload_conf()")
        with pytest.raises(UnavailableError, match="takes encrypted connections only"):
            connect_again_and_again(make_conninfo(deployment.dsn, sslmode="disable"))
        with connect(verified_by(deployment, deployment.authority)) as verified:
            assert verified.pgconn.ssl_in_use
    finally:
        with hba.open("rb+") as file:
            file.write(before)
            file.truncate()
        with connect(deployment.server.dsn(DATABASE)) as owner:
            owner.execute("SELECT pg_reload_conf()")


def connect_again_and_again(dsn: str) -> None:
    """Connect until it fails: a reload reaches the postmaster a moment later."""
    for _ in range(200):
        connect(dsn).close()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="only Linux shows the arguments of processes")
def test_no_process_of_an_embedded_server_shows_a_password(deployment: Deployment) -> None:
    words = [deployment.server.dsn().split(":")[2].partition("@")[0]]
    words += [part.partition("=")[2] for part in deployment.dsn.split() if part.startswith("password=")]
    assert all(len(word) > 20 for word in words)
    with Database(verified_by(deployment, deployment.authority)) as database, as_service("a test"):
        database.execute_read("SELECT 1")
        seen = b""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                seen += process.joinpath("cmdline").read_bytes() + process.joinpath("comm").read_bytes()
            except OSError:
                continue
    assert b"postgres" in seen
    for word in words:
        assert word.encode() not in seen
