"""The proxy byte by byte, before an echo and before a server that knows just enough of the protocol."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from equitie_data.tcp_proxy import TcpProxy, _Conversation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STARTUP = struct.pack("!ii", 8, 3 << 16)
SSL_REQUEST = struct.pack("!ii", 8, 80_877_103)
READY = b"Z\0\0\0\5I"


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!i", 4 + len(body)) + body


def query(sql: bytes) -> bytes:
    return message(b"Q", sql + b"\0")


def parse(name: bytes, sql: bytes) -> bytes:
    return message(b"P", name + b"\0" + sql + b"\0\0\0")


def bind(name: bytes, portal: bytes = b"") -> bytes:
    return message(b"B", portal + b"\0" + name + b"\0" + b"\0\0\0\0\0\0")


EXECUTE = message(b"E", b"\0\0\0\0\0")
SYNC = message(b"S")


class Server:
    """Listens on loopback and does with every connection what it is told to."""

    def __init__(self, serve: Callable[[socket.socket, Server], None]) -> None:
        self.heard = bytearray()
        self.hung_up = threading.Event()
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = f"host=127.0.0.1 port={self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._serve(connection, self)
        self.hung_up.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def echo(connection: socket.socket, server: Server) -> None:
    while chunk := connection.recv(65_536):
        server.heard += chunk
        connection.sendall(chunk)


def answer(connection: socket.socket, server: Server) -> None:
    """Answers READY to everything that asks for it."""
    conversation = _Conversation(connection, connection)
    connection.sendall(READY)
    while chunk := connection.recv(65_536):
        server.heard += chunk
        for each in conversation.read_messages(chunk):
            if each.awaits_answer:
                connection.sendall(READY)


@pytest.fixture
def echo_server() -> Iterator[Server]:
    server = Server(echo)
    yield server
    server.close()


@pytest.fixture
def database_server() -> Iterator[Server]:
    server = Server(answer)
    yield server
    server.close()


@pytest.fixture
def echo_proxy(echo_server: Server) -> Iterator[TcpProxy]:
    with TcpProxy(echo_server.dsn) as proxy:
        yield proxy


@pytest.fixture
def proxy(database_server: Server) -> Iterator[TcpProxy]:
    with TcpProxy(database_server.dsn) as proxy:
        yield proxy


def dial(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=20)


def read_exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = connection.recv(count - len(received))
        if not chunk:
            break
        received += chunk
    return received


def log_in(proxy: TcpProxy) -> socket.socket:
    connection = dial(proxy)
    connection.sendall(STARTUP)
    assert read_exactly(connection, len(READY)) == READY
    return connection


def is_cut(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# --- forwarding ---------------------------------------------------------------------------------------------------


def test_it_forwards_every_byte_and_counts_turns(echo_proxy: TcpProxy) -> None:
    with dial(echo_proxy) as connection:
        for turn in range(1, 6):
            sent = bytes([turn]) * 100_000
            sender = threading.Thread(target=connection.sendall, args=(sent,))
            sender.start()
            assert read_exactly(connection, len(sent)) == sent
            sender.join()
        assert echo_proxy.connections == 1
    with dial(echo_proxy) as connection:
        before = echo_proxy.round_trips
        for _ in range(7):
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
        assert echo_proxy.round_trips - before == 7
        assert echo_proxy.connections == 2


def test_an_orderly_end_is_passed_on_and_last_words_are_heard() -> None:
    def last_words(connection: socket.socket, server: Server) -> None:
        while connection.recv(100):
            pass
        connection.sendall(b"good-bye")

    server = Server(last_words)
    try:
        with TcpProxy(server.dsn) as proxy, dial(proxy) as connection:
            connection.sendall(b"hello")
            connection.shutdown(socket.SHUT_WR)
            assert read_exactly(connection, 100) == b"good-bye"
    finally:
        server.close()


def test_a_dsn_by_way_of_the_proxy_keeps_everything_else() -> None:
    proxy = TcpProxy("postgresql://u:p@10.0.0.1:5433/db?application_name=a")
    proxy.port = 7
    target = conninfo_to_dict("postgresql://u:p@127.0.0.1:7/db?application_name=a")
    assert conninfo_to_dict(proxy.dsn) == target
    other = conninfo_to_dict(proxy.dsn_for("host=x hostaddr=10.0.0.2 dbname=other"))
    assert other == {"host": "127.0.0.1", "dbname": "other", "port": "7"}


# --- outages ------------------------------------------------------------------------------------------------------


def test_stop_refuses_and_cuts_and_start_serves_on_the_same_port(echo_proxy: TcpProxy) -> None:
    port = echo_proxy.port
    with dial(echo_proxy) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        echo_proxy.stop()
        assert is_cut(connection)
    with pytest.raises(ConnectionRefusedError):
        dial(echo_proxy)
    echo_proxy.start()
    assert echo_proxy.port == port
    with dial(echo_proxy) as connection:
        connection.sendall(b"y")
        assert connection.recv(1) == b"y"


def test_a_server_that_is_away_looks_like_one(echo_server: Server, echo_proxy: TcpProxy) -> None:
    echo_server.close()
    with contextlib.suppress(OSError), dial(echo_proxy) as connection:  # the reset may come while it connects
        assert is_cut(connection)


def test_deaf_it_holds_everything_back_and_loses_nothing(echo_proxy: TcpProxy) -> None:
    with dial(echo_proxy) as connection:
        echo_proxy.go_deaf()
        connection.sendall(b"held back")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(20)
        echo_proxy.hear()
        assert read_exactly(connection, 9) == b"held back"


def test_deaf_it_can_be_cut_and_stopped(echo_proxy: TcpProxy) -> None:
    with dial(echo_proxy) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        echo_proxy.go_deaf()
        connection.sendall(b"lost")
        echo_proxy.cut()
        assert is_cut(connection)
        echo_proxy.stop()


# --- at a byte ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 9, 10])
def test_it_cuts_after_so_many_bytes_to_the_server(echo_server: Server, echo_proxy: TcpProxy, count: int) -> None:
    with dial(echo_proxy) as connection:
        connection.sendall(b"before")
        assert read_exactly(connection, 6) == b"before"
        fault = echo_proxy.cut_after(count, "to_server")
        for place in range(11):
            with contextlib.suppress(OSError):
                connection.sendall(b"%d" % (place % 10))
        assert fault.struck.wait(20)
        assert echo_server.hung_up.wait(20)
        assert bytes(echo_server.heard) == b"before" + b"0123456789"[:count]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_it_cuts_after_so_many_bytes_to_the_client(echo_proxy: TcpProxy, count: int) -> None:
    with dial(echo_proxy) as connection:
        fault = echo_proxy.cut_after(count, "to_client")
        connection.sendall(b"0123456789")
        received = b""
        with contextlib.suppress(ConnectionResetError):
            received = read_exactly(connection, 11)
        assert received == b"0123456789"[:count]
        assert fault.struck.wait(20)
    with dial(echo_proxy) as connection:  # once
        connection.sendall(b"0123456789")
        assert read_exactly(connection, 10) == b"0123456789"


def test_bytes_are_counted_for_each_connection(echo_proxy: TcpProxy) -> None:
    with dial(echo_proxy) as one, dial(echo_proxy) as two:
        echo_proxy.cut_after(5, "to_server")
        for connection in (one, two):
            connection.sendall(b"12345")
            assert read_exactly(connection, 5) == b"12345"
        one.sendall(b"6")
        assert is_cut(one)
        two.sendall(b"6")
        assert read_exactly(two, 1) == b"6"


def test_a_fault_can_be_taken_back(echo_proxy: TcpProxy) -> None:
    with dial(echo_proxy) as connection:
        fault = echo_proxy.cut_after(0, "to_server")
        echo_proxy.disarm()
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        assert not fault.struck.is_set()


# --- at a statement -----------------------------------------------------------------------------------------------

COMMITS = {
    "simple": (b"", query(b"COMMIT"), b""),
    "extended": (b"", parse(b"", b"COMMIT") + bind(b"") + EXECUTE, SYNC),
    "prepared": (parse(b"c", b"COMMIT") + SYNC, bind(b"c") + EXECUTE, SYNC),
    "after another statement": (b"", parse(b"", b"UPDATE") + bind(b"") + EXECUTE + query(b"COMMIT"), b""),
}


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[place : place + size] for place in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 3, 1_000])
@pytest.mark.parametrize("form", COMMITS)
def test_the_reply_to_a_statement_is_cut(database_server: Server, proxy: TcpProxy, form: str, size: int) -> None:
    earlier, statement, sync = COMMITS[form]
    with log_in(proxy) as connection:
        if earlier:
            connection.sendall(earlier)
            assert read_exactly(connection, len(READY)) == READY
        heard_by_then: list[bytes] = []
        fault = proxy.cut_reply_to(b"COMMIT", then=lambda: heard_by_then.append(bytes(database_server.heard)))
        for piece in pieces(statement + sync, size):
            connection.sendall(piece)
        assert is_cut(connection)
        assert fault.struck.is_set()
    assert heard_by_then == [STARTUP + earlier + statement + sync]


@pytest.mark.parametrize("size", [1, 3, 1_000])
@pytest.mark.parametrize("form", COMMITS)
def test_a_statement_is_cut_off_before_the_server_can_execute_it(
    database_server: Server, proxy: TcpProxy, form: str, size: int
) -> None:
    earlier, statement, sync = COMMITS[form]
    with log_in(proxy) as connection:
        if earlier:
            connection.sendall(earlier)
            assert read_exactly(connection, len(READY)) == READY
        fault = proxy.cut_before(b"COMMIT")
        with contextlib.suppress(OSError):
            for piece in pieces(statement + sync, size):
                connection.sendall(piece)
        assert fault.struck.wait(20)
        assert is_cut(connection)
    assert database_server.hung_up.wait(20)
    executed = statement[: -len(query(b"COMMIT"))] if form in ("simple", "after another statement") else statement[:-10]
    heard = bytes(database_server.heard)
    assert heard.startswith(STARTUP + earlier + executed)
    assert len(heard) < len(STARTUP + earlier + statement)


def test_half_open_the_server_goes_on_believing_in_its_client(database_server: Server, proxy: TcpProxy) -> None:
    with log_in(proxy) as connection:
        fault = proxy.cut_before(b"COMMIT", half_open=True)
        connection.sendall(query(b"BEGIN"))
        assert read_exactly(connection, len(READY)) == READY
        connection.sendall(query(b"COMMIT"))
        assert is_cut(connection)
        assert fault.struck.wait(20)
    assert not database_server.hung_up.wait(0.2)
    assert bytes(database_server.heard) == STARTUP + query(b"BEGIN")
    proxy.cut()
    assert database_server.hung_up.wait(20)


def test_the_client_learns_of_the_cut_only_after_the_callback(proxy: TcpProxy) -> None:
    for arm in (proxy.cut_reply_to, proxy.cut_before):
        with log_in(proxy) as connection:
            seen: list[object] = []

            def look(connection: socket.socket = connection, seen: list[object] = seen) -> None:
                connection.settimeout(0.1)
                try:
                    seen.append(connection.recv(1))
                except TimeoutError as error:
                    seen.append(type(error))
                finally:
                    connection.settimeout(20)

            fault = arm(b"COMMIT", then=look)
            connection.sendall(query(b"COMMIT"))
            assert fault.struck.wait(20)
            assert seen == [TimeoutError]
            assert is_cut(connection)


def test_text_that_is_no_statement_does_not_count(proxy: TcpProxy) -> None:
    with log_in(proxy) as connection:
        fault = proxy.cut_reply_to(b"COMMIT")
        connection.sendall(parse(b"c", b"COMMIT") + SYNC)
        assert read_exactly(connection, len(READY)) == READY
        connection.sendall(parse(b"", b"SELECT $1") + bind(b"", portal=b"COMMIT") + EXECUTE + SYNC)
        assert read_exactly(connection, len(READY)) == READY
        assert not fault.struck.is_set()


def test_the_offer_of_encryption_is_followed() -> None:
    """`S` and the rest is TLS, which is forwarded without a look; `N` and the startup comes next."""

    def negotiate(connection: socket.socket, server: Server) -> None:
        assert connection.recv(8) == SSL_REQUEST
        connection.sendall(b"S")
        echo(connection, server)

    server = Server(negotiate)
    try:
        with TcpProxy(server.dsn) as proxy, dial(proxy) as connection:
            fault = proxy.cut_reply_to(b"COMMIT")
            connection.sendall(SSL_REQUEST)
            assert connection.recv(1) == b"S"
            connection.sendall(query(b"COMMIT"))
            assert read_exactly(connection, len(query(b"COMMIT"))) == query(b"COMMIT")
            assert not fault.struck.is_set()
    finally:
        server.close()


TEXTS = st.binary(min_size=1, max_size=20).filter(lambda text: b"\0" not in text)
SESSIONS = st.lists(
    st.one_of(
        TEXTS.map(lambda sql: (query(sql), [(sql, True)])),
        st.tuples(TEXTS, TEXTS).map(
            lambda pair: (parse(pair[0], pair[1]) + bind(pair[0]) + EXECUTE + SYNC, [(pair[1], False), (None, True)])
        ),
        st.just((SYNC, [(None, True)])),
        st.binary(max_size=50).map(lambda data: (message(b"d", data), [])),
    ),
    max_size=8,
)


@given(session=SESSIONS, cuts=st.sets(st.integers(0, 400), max_size=10), negotiated=st.booleans())
def test_messages_are_the_same_however_they_are_split(
    session: list[tuple[bytes, list[tuple[bytes | None, bool]]]], cuts: set[int], negotiated: bool
) -> None:
    stream = STARTUP + b"".join(data for data, _ in session)
    with socket.socket() as unused:
        conversation = _Conversation(unused, unused)
        if negotiated:
            assert list(conversation.read_messages(SSL_REQUEST)) == []
            conversation.read_answers(b"N")
        places = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
        found: list[tuple[bytes | None, bool]] = []
        for start, end in itertools.pairwise(places):
            for each in conversation.read_messages(stream[start:end]):
                assert 0 <= each.start < each.end <= end - start
                sql = None if each.sql is None else each.sql.rstrip(b"\0")
                found.append((sql, each.awaits_answer))
    assert found == [expected for _, messages in session for expected in messages]


@given(count=st.integers(1, 5), size=st.integers(1, 7))
def test_every_answer_is_waited_for(count: int, size: int) -> None:
    with socket.socket() as unused:
        conversation = _Conversation(unused, unused)
        list(conversation.read_messages(STARTUP + query(b"SELECT") * count))
        answers = READY + (message(b"D", b"Zrow") + READY) * count
        threads = [threading.Thread(target=conversation.await_answer)]
        threads[0].start()
        for piece in pieces(answers[:-1], size):
            conversation.read_answers(piece)
        assert threads[0].is_alive()
        conversation.read_answers(answers[-1:])
        threads[0].join(20)
        assert not threads[0].is_alive()
