"""A TCP proxy that fails on purpose: for tests of outages, and for measuring over a link with a delay."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from psycopg.conninfo import conninfo_to_dict, make_conninfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["TcpProxy"]

_CHUNK = 65_536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes close() send RST


class TcpProxy:
    """Forwards a loopback port to a server's, and stops, stalls, cuts, delays or counts on demand.

    Args:
        target_dsn: The server behind it.
        delay: Seconds that every chunk takes in each direction.
    """

    def __init__(self, target_dsn: str, *, delay: float = 0.0) -> None:
        parts = conninfo_to_dict(target_dsn)
        self._target = (str(parts.get("hostaddr") or parts.get("host") or "127.0.0.1"), int(parts.get("port") or 5432))
        self._parts = parts
        self.delay = delay
        self.round_trips = 0
        """How often a client has sent after the server had: what a link's delay is paid for."""
        self.connections = 0
        self._deaf = threading.Event()
        self._cut_reply_to: bytes | None = None
        self._on_cut: Callable[[], None] | None = None
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.port = 0

    @property
    def dsn(self) -> str:
        """The target's DSN, by way of the proxy."""
        return self.dsn_for("")

    def dsn_for(self, dsn: str) -> str:
        """Return another DSN of the same server, by way of the proxy."""
        parts: dict[str, Any] = dict(conninfo_to_dict(dsn) if dsn else self._parts)
        parts.pop("hostaddr", None)
        return make_conninfo("", **{**parts, "host": "127.0.0.1", "port": self.port})

    # --- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(256)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="tcp-proxy", daemon=True).start()

    def stop(self) -> None:
        """Refuse new connections and cut those there are."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.hear()
        self.stop()

    # --- faults -----------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._drop(pair)

    def go_deaf(self) -> None:
        """Forward nothing any more, in either direction, and say nothing about it."""
        self._deaf.set()

    def hear(self) -> None:
        """Forward again what was held back."""
        self._deaf.clear()

    def cut_reply_to(self, text: bytes, then: Callable[[], None] | None = None) -> None:
        """Once: forward the next chunk from a client that holds ``text``, and cut before its reply gets back.

        Args:
            text: What to wait for, such as ``b"COMMIT"``.
            then: Called when the cut was made.
        """
        self._cut_reply_to, self._on_cut = text, then

    # --- work -------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                if self._listener is not listener:
                    return
                with contextlib.suppress(OSError, UnboundLocalError):
                    client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
                self.connections += 1
            turn = _Turn()
            for source, sink, from_client in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pump, args=(pair, source, sink, from_client, turn), name="tcp-proxy", daemon=True
                ).start()

    def _pump(
        self,
        pair: tuple[socket.socket, socket.socket],
        source: socket.socket,
        sink: socket.socket,
        from_client: bool,
        turn: _Turn,
    ) -> None:
        try:
            while chunk := source.recv(_CHUNK):
                if from_client and not turn.client_spoke_last:
                    self.round_trips += 1
                turn.client_spoke_last = from_client
                if self.delay:
                    time.sleep(self.delay)
                while self._deaf.is_set():
                    time.sleep(0.005)
                if not from_client and turn.mute:
                    continue
                wanted = self._cut_reply_to
                if from_client and wanted is not None and wanted in chunk:
                    self._cut_reply_to = None
                    turn.mute = True
                    sink.sendall(chunk)
                    time.sleep(0.2)  # lets the server act on it before its client is gone
                    if self._on_cut is not None:
                        self._on_cut()
                    break
                sink.sendall(chunk)
        except OSError:
            pass
        self._drop(pair)

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            if pair not in self._pairs:
                return
            self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the other thread from its recv
            end.close()


class _Turn:
    """Who spoke last on a connection, and whether the server is still heard."""

    __slots__ = ("client_spoke_last", "mute")

    def __init__(self) -> None:
        self.client_spoke_last = False
        self.mute = False
