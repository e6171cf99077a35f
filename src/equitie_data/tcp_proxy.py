"""A TCP proxy that fails on purpose: for tests of outages, and for measuring over a link with a delay.

It reads enough of PostgreSQL's protocol to fail at an exact place: before a statement reaches the server, after
the server has answered it, or at a byte. Encrypted connections it only forwards.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import attrs
from psycopg.conninfo import conninfo_to_dict, make_conninfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Direction", "Fault", "TcpProxy"]

Direction: TypeAlias = Literal["to_server", "to_client"]

_CHUNK = 65_536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes close() send RST
_ANSWER_SECONDS = 10.0  # a COMMIT that waits for a synchronous replica is not answered at all
_PROTOCOL_3 = 3
_LONGEST_STARTUP = 10_000  # bytes, as in the server; more is a TLS handshake that began without asking
_SSL_REQUEST, _GSS_REQUEST = 80_877_103, 80_877_104


@attrs.define(eq=False)
class Fault:
    """A fault that happens once, when its moment comes.

    Attributes:
        text: It strikes at the statement that holds this text; ``None`` when it strikes at a byte.
        before: Whether the statement must not reach the server, or is answered there and the answer lost.
        half_open: Whether the server is left believing that its client is still there.
        direction: Whose bytes are counted.
        count: How many of them pass.
        then: Called before the client learns that its connection is gone.
        struck: Set when it has happened; the client learns of it afterwards.
    """

    text: bytes | None = None
    before: bool = False
    half_open: bool = False
    direction: Direction = "to_server"
    count: int = 0
    then: Callable[[], None] | None = None
    struck: threading.Event = attrs.field(factory=threading.Event)


class TcpProxy:
    """Forwards a loopback port to a server's, and stops, stalls, cuts, delays or counts on demand.

    Args:
        target_dsn: The server behind it.
        delay: Seconds that every chunk takes in each direction.

    Attributes:
        delay: As above; may be changed at any time.
        round_trips: How often a client has sent after the server had: what a link's delay is paid for.
        connections: How many have been accepted.
        port: Where it listens; 0 before the first start.
    """

    def __init__(self, target_dsn: str, *, delay: float = 0.0) -> None:
        parts = conninfo_to_dict(target_dsn)
        self._target = (str(parts.get("hostaddr") or parts.get("host") or "127.0.0.1"), int(parts.get("port") or 5432))
        self._parts = parts
        self.delay = delay
        self.round_trips = 0
        self.connections = 0
        self.port = 0
        self._hearing = threading.Event()
        self._hearing.set()
        self._fault: Fault | None = None
        self._conversations: set[_Conversation] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    @property
    def dsn(self) -> str:
        """The target's DSN, by way of the proxy."""
        return self.dsn_for("")

    def dsn_for(self, dsn: str) -> str:
        """Return another DSN of the same server, by way of the proxy."""
        parts: dict[str, Any] = dict(conninfo_to_dict(dsn) if dsn else self._parts)
        parts.pop("hostaddr", None)
        return make_conninfo("", **{**parts, "host": "127.0.0.1", "port": self.port})

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(256)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="tcp-proxy", daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Refuse new connections and cut those there are."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        if self._acceptor is not None:
            self._acceptor.join()
            self._acceptor = None
        self.cut()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hear()
        self.stop()

    # --- faults ---------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            conversations = list(self._conversations)
        for conversation in conversations:
            self._end(conversation)

    def go_deaf(self) -> None:
        """Forward nothing any more, in either direction, and say nothing about it."""
        self._hearing.clear()

    def hear(self) -> None:
        """Forward again, what was held back first."""
        self._hearing.set()

    def cut_reply_to(self, text: bytes, then: Callable[[], None] | None = None) -> Fault:
        """Once: let the server execute and answer a statement, and cut the connection instead of passing the answer on.

        Args:
            text: The statement is the next one whose SQL holds this, such as ``b"COMMIT"``; prepared ones count.
            then: Called when the server has answered and the client does not yet know that the answer is lost.
        """
        return self._arm(Fault(text=text, then=then))

    def cut_before(self, text: bytes, then: Callable[[], None] | None = None, *, half_open: bool = False) -> Fault:
        """Once: cut the connection instead of letting the server execute a statement.

        Args:
            text: As in `cut_reply_to`.
            then: Called when the statement was held back and the client does not yet know of the cut.
            half_open: Cut the client off and tell the server nothing: its transaction stays open, with its locks,
                until `cut` or `stop`.
        """
        return self._arm(Fault(text=text, before=True, half_open=half_open, then=then))

    def cut_after(self, count: int, direction: Direction) -> Fault:
        """Once: cut the first connection over which so many bytes more have passed in a direction.

        Args:
            count: How many bytes pass; the next one does not.
            direction: Which way.
        """
        with self._lock:
            for conversation in self._conversations:
                conversation.passed = dict.fromkeys(conversation.passed, 0)
        return self._arm(Fault(direction=direction, count=count))

    def disarm(self) -> None:
        """Take back a fault that has not happened yet."""
        self._fault = None

    def _arm(self, fault: Fault) -> Fault:
        self._fault = fault
        return fault

    # --- work -----------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conversation = _Conversation(client, server)
            with self._lock:
                self._conversations.add(conversation)
                self.connections += 1
            for direction in ("to_server", "to_client"):
                threading.Thread(
                    target=self._pump, args=(conversation, direction), name=f"tcp-proxy-{direction}", daemon=True
                ).start()

    def _pump(self, conversation: _Conversation, direction: Direction) -> None:
        from_client = direction == "to_server"
        source, sink = conversation.ends(direction)
        try:
            while chunk := source.recv(_CHUNK):
                self._count_turn(conversation, from_client)
                if self.delay:
                    time.sleep(self.delay)
                while not self._hearing.wait(0.05):
                    if conversation.ended:
                        return
                goes_on = self._to_server(conversation, chunk) if from_client else self._to_client(conversation, chunk)
                if not goes_on:
                    return
            if not conversation.muted:
                # The orderly end is passed on as such: a server's last words still reach its client.
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            conversation.half_ended = True
        if not from_client:
            conversation.server_left()
            if conversation.muted and not conversation.abandoned:
                return  # who muted it is waiting, and ends it when it is time for the client to know
        if conversation.half_ended or conversation.muted:
            self._end(conversation)
        conversation.half_ended = True

    def _count_turn(self, conversation: _Conversation, from_client: bool) -> None:
        with self._lock:
            if from_client and not conversation.client_spoke_last:
                self.round_trips += 1
            conversation.client_spoke_last = from_client

    def _to_server(self, conversation: _Conversation, chunk: bytes) -> bool:
        """Pass a client's chunk on, or as much of it as a fault allows; return whether the connection goes on."""
        doomed: Fault | None = conversation.doomed
        for message in conversation.read_messages(chunk):
            if doomed is None and message.sql is not None:
                doomed = self._take_at_statement(message.sql)
                if doomed is not None and doomed.before:
                    return self._strike(conversation, doomed, conversation.server, chunk[: message.start])
                if doomed is not None:
                    conversation.doomed, conversation.muted = doomed, True
            if doomed is not None and message.awaits_answer:
                conversation.server.sendall(chunk[: message.end])
                conversation.await_answer()
                return self._strike(conversation, doomed, conversation.server, b"")
        return self._pass_on(conversation, "to_server", conversation.server, chunk)

    def _to_client(self, conversation: _Conversation, chunk: bytes) -> bool:
        """Pass a server's chunk on, unless the client is not to hear it; return whether the connection goes on."""
        conversation.read_answers(chunk)
        return conversation.muted or self._pass_on(conversation, "to_client", conversation.client, chunk)

    def _pass_on(self, conversation: _Conversation, direction: Direction, sink: socket.socket, chunk: bytes) -> bool:
        before = conversation.passed[direction]
        conversation.passed[direction] = before + len(chunk)
        fault = self._take_at_byte(direction, before + len(chunk))
        if fault is not None:
            return self._strike(conversation, fault, sink, chunk[: fault.count - before])
        sink.sendall(chunk)
        return True

    def _take_at_statement(self, sql: bytes) -> Fault | None:
        """Disarm the fault and return it if this statement is its moment."""
        with self._lock:
            fault = self._fault
            if fault is None or fault.text is None or fault.text not in sql:
                return None
            self._fault = None
            return fault

    def _take_at_byte(self, direction: Direction, passed: int) -> Fault | None:
        """Disarm the fault and return it if this number of bytes is too many."""
        with self._lock:
            fault = self._fault
            if fault is None or fault.text is not None or fault.direction != direction or passed <= fault.count:
                return None
            self._fault = None
            return fault

    def _strike(self, conversation: _Conversation, fault: Fault, sink: socket.socket, last: bytes) -> Literal[False]:
        """Pass on the last bytes, and cut."""
        conversation.muted = True
        try:
            sink.sendall(last)
            if fault.then is not None:
                fault.then()
        finally:
            fault.struck.set()
            if fault.half_open:
                conversation.abandoned = True
                _reset(conversation.client)
            else:
                self._end(conversation)
        return False

    def _end(self, conversation: _Conversation) -> None:
        with self._lock:
            if conversation.ended:
                return
            conversation.ended = True
            self._conversations.discard(conversation)
        _reset(conversation.client)
        _reset(conversation.server)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)  # wakes the other thread from its recv
    end.close()


class _Message(NamedTuple):
    """A message of a client's that matters to faults; offsets are those of the chunk it ends in.

    Attributes:
        start: Where it begins; 0 when it began in an earlier chunk.
        end: Where it ends.
        sql: The statement it makes the server execute, if it does.
        awaits_answer: Whether the server answers everything up to here.
    """

    start: int
    end: int
    sql: bytes | None
    awaits_answer: bool


class _Conversation:
    """One connection through the proxy, and as much of the protocol's state as faults need.

    See the manual's "Frontend/Backend Protocol": messages have a type and a length, except the first ones.
    """

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.passed: dict[Direction, int] = {"to_server": 0, "to_client": 0}
        self.client_spoke_last = False
        self.doomed: Fault | None = None
        self.muted = False
        self.abandoned = False
        self.half_ended = False
        self.ended = False
        self._answers = threading.Condition()
        self._asked = 1  # the startup is answered like a statement
        self._answered = 0
        self._starting = True
        self._negotiating = False
        self._encrypted = False
        self._from_client = bytearray()
        self._from_server = bytearray()
        self._statements: dict[bytes, bytes] = {}
        self._portals: dict[bytes, bytes] = {}

    def ends(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        """Return the socket to read and the one to write."""
        return (self.client, self.server) if direction == "to_server" else (self.server, self.client)

    def read_messages(self, chunk: bytes) -> Iterator[_Message]:
        """Yield the client's messages that end in a chunk and matter to faults."""
        if self._encrypted:
            return
        held = self._from_client
        origin = len(held)
        held += chunk
        offset = 0
        while not self._encrypted:
            header = 0 if self._starting else 1
            if len(held) < offset + header + 4:
                break
            size = int.from_bytes(held[offset + header : offset + header + 4], "big")
            if self._starting and size > _LONGEST_STARTUP:
                self._encrypted = True
                break
            end = offset + header + size
            if len(held) < end:
                break
            body = bytes(held[offset + header + 4 : end])
            if self._starting:
                self._read_startup(body)
                sql, awaits_answer = None, False
            else:
                sql, awaits_answer = self._read_message(held[offset : offset + 1], body)
            if sql is not None or awaits_answer:
                yield _Message(max(offset - origin, 0), end - origin, sql, awaits_answer)
            offset = end
        del held[:offset]

    def _read_startup(self, body: bytes) -> None:
        code = int.from_bytes(body[:4], "big")
        if code in (_SSL_REQUEST, _GSS_REQUEST):
            self._negotiating = True
        elif code >> 16 == _PROTOCOL_3:
            self._starting = False
        else:
            self._encrypted = True  # a cancel request: nothing follows it

    def _read_message(self, kind: bytes | bytearray, body: bytes) -> tuple[bytes | None, bool]:
        sql = None
        if kind == b"Q":
            sql = body
        elif kind == b"P":
            name, statement, _ = body.split(b"\0", 2)
            self._statements[name] = statement
        elif kind == b"B":
            portal, name, _ = body.split(b"\0", 2)
            self._portals[portal] = self._statements.get(name, b"")
        elif kind == b"E":
            sql = self._portals.get(body.split(b"\0", 1)[0], b"")
        awaits_answer = kind in (b"Q", b"S", b"F")
        if awaits_answer:
            with self._answers:
                self._asked += 1
        return sql, awaits_answer

    def read_answers(self, chunk: bytes) -> None:
        """Count what the server has answered."""
        held = self._from_server
        held += b"" if self._encrypted else chunk
        offset = 0
        while not self._encrypted and len(held) > offset:
            if self._negotiating:
                self._encrypted, self._negotiating = held[offset] != ord("N"), False
                offset += 1
                continue
            if len(held) < offset + 5:
                break
            end = offset + 1 + int.from_bytes(held[offset + 1 : offset + 5], "big")
            if len(held) < end:
                break
            if held[offset] == ord("Z"):  # ready for query
                with self._answers:
                    self._answered += 1
                    self._answers.notify_all()
            offset = end
        del held[:offset]

    def server_left(self) -> None:
        """Note that nothing will be answered any more."""
        with self._answers:
            self._answered = 1 << 62
            self._answers.notify_all()

    def await_answer(self) -> None:
        """Wait until the server has answered everything so far, or has gone, or takes too long."""
        with self._answers:
            self._answers.wait_for(lambda: self._answered >= self._asked, _ANSWER_SECONDS)
