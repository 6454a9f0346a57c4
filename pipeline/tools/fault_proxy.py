"""A TCP proxy on the loopback that makes faults for real: gone, or slow. Drills put it between Nexus and the Python
service."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

_CHUNK = 1 << 16
_CONNECT_S = 5.0


class FaultProxy:
    """Passes connections on to `target` until told otherwise. Use as a context manager."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.delay_s = 0.0  # before each piece of an answer is passed on
        self._over = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> FaultProxy:
        self._accept_on(self._listener)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.down()

    def down(self) -> None:
        """Be gone: connections break, and new ones are refused."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break_off()

    def to(self, target: tuple[str, int]) -> None:
        """Somebody else answers from now on; connections break."""
        self._target = target
        self._break_off()

    def _break_off(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def up(self) -> None:
        """Be back, at the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._accept_on(self._listener)

    def _accept_on(self, listener: socket.socket) -> None:
        def accept() -> None:
            with contextlib.suppress(OSError):  # closed: the partner is gone
                while True:
                    connection, _ = listener.accept()
                    _spawn(lambda c=connection: self._pass_on(c))  # type: ignore[misc]

        _spawn(accept)

    def _pass_on(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._target, _CONNECT_S) as server:
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            requests = _spawn(lambda: self._pump(client, server, slowly=False))
            self._pump(server, client, slowly=True)
            requests.join(_CONNECT_S)
            with self._lock:
                self._open -= {client, server}

    def _pump(self, source: socket.socket, sink: socket.socket, slowly: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                if slowly and self.delay_s:
                    self._over.wait(self.delay_s)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _spawn(body: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread
