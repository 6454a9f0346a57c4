"""What keeps slow and vanished clients from holding up the others: turns that a request gets once its body has come,
and an end to connections on which nothing moves."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipeline.concurrency.turns import Line
from pipeline.web.posted import MAX_BODY_BYTES

_MOST_DROPPED, _DROPPED_S, _PIECE = 4 * MAX_BODY_BYTES, 10.0, 256 << 10  # of a body that is refused for its length
_NO_TURN = {"/healthz", "/readyz"}  # a probe answers however long the line is
# In Linux's struct tcp_info: ms since data was last sent, since an acknowledgement was, since data was last received.
_LAST_MOVED, _INFO_BYTES = struct.Struct("=44xIII"), 104
_INTERNET = {socket.AF_INET, socket.AF_INET6}
Wsgi = Callable[..., Iterable[bytes]]


class Turns:
    """A WSGI wrapper: so many requests are worked on at a time, and each has its body by then.

    The server gives every request a thread, many more of them than there are turns: an upload that stalls holds only
    that. Without turns as many threads would struggle for one interpreter lock. Of those that take long, by `takes_long`,
    only a quarter of the turns are given to at a time: the others' are for what is soon done.
    """

    def __init__(
        self, app: Wsgi, turns: int, takes_long: Callable[[dict[str, Any]], bool] = lambda environ: False
    ) -> None:
        self._app, self.line = app, Line(turns)
        self._long_line, self._takes_long = Line(max(1, turns // 4)), takes_long

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] in _NO_TURN:
            return self._app(environ, start_response)
        if size := _to_read(environ):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(size))
        else:
            _read_off(environ)
        with self._long_line if self._takes_long(environ) else contextlib.nullcontext(), self.line:
            return self._app(environ, start_response)


def _to_read(environ: dict[str, Any]) -> int:
    """The bytes of the body that the routes may ask for; 0 for one that is too long, which they refuse unread."""
    if "HTTP_TRANSFER_ENCODING" in environ:
        return MAX_BODY_BYTES + 1
    length = environ.get("CONTENT_LENGTH") or ""
    size = int(length) if length.isdecimal() and len(length) < 10 else 0
    return size if size <= MAX_BODY_BYTES else 0


def _read_off(environ: dict[str, Any]) -> None:
    """Drop a body that is too long, where that is soon done: the server closes the connection upon an answer before its end, and a
    client that is still sending then does not read it. One that waits for a word before it sends has the answer at once."""
    length = environ.get("CONTENT_LENGTH") or ""
    left = int(length) if length.isdecimal() and len(length) < 10 else 0
    if left > _MOST_DROPPED or "HTTP_EXPECT" in environ:
        return
    deadline = time.monotonic() + _DROPPED_S
    while left > 0 and time.monotonic() < deadline and (piece := environ["wsgi.input"].read(min(left, _PIECE))):
        left -= len(piece)


def close_idle(port: int, after_s: float, at_stop_s: float) -> int:
    """Close this process's connections to `port` on which neither side has sent anything for so long; how many.

    The web server has a deadline for a request's head but none for its body, and a client that vanished amid one sends
    no farewell: its connection and its thread would be held for good. A server that has been told to stop listens no
    more and waits for its requests: then the shorter time holds.
    """
    with contextlib.ExitStack() as held:
        ours = [held.enter_context(found) for found in _sockets(port)]
        connections = [found for found in ours if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
        limit_s = after_s if len(connections) < len(ours) else at_stop_s
        idle = [connection for connection in connections if _idle_ms(connection) > limit_s * 1000]
        for connection in idle:
            with contextlib.suppress(OSError):  # closed by the other side since
                connection.shutdown(socket.SHUT_RDWR)
    return len(idle)


def _sockets(port: int) -> Iterator[socket.socket]:
    """This process's TCP sockets at a local port, as descriptors of their own, for the caller to close."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since
            descriptor = os.dup(int(name))
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                continue
            found = socket.socket(fileno=descriptor)
            if found.family in _INTERNET and found.type == socket.SOCK_STREAM and found.getsockname()[1] == port:
                yield found
            else:
                found.close()


def _idle_ms(connection: socket.socket) -> int:
    sent, _, received = _LAST_MOVED.unpack_from(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES))
    return int(min(sent, received))
