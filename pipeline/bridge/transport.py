"""The way to the partner on the wire: HTTP/1.1 over kept connections, as a transport for httpx.

httpx's own goes through three more libraries, and a call takes three times as much processor time: here it is put together in
one piece, and its answer read by the parser that the Python service's server uses.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator

import httptools
import httpx

KEPT_S = 4.0  # that an idle connection is used again: servers close theirs after five
MOST_CONNECTIONS = 32
_MOST_PIECES = 32  # of a body that wait to be taken, each as the socket gave it
_MOST_HEAD = 1 << 16  # about so many bytes in a row that are no body: a head without an end would be kept whole
_HERE = ("localhost", "127.0.0.1", "::1")  # each answers or refuses at once: no need of a race, which leaves a cycle
_Origin = tuple[str, str, int]


class KeptConnections(httpx.AsyncBaseTransport):
    """For one event loop. Deadlines are the caller's: a call that is cancelled closes its connection.

    Raises httpx's errors: ConnectError where there is no connection, ReadError or RemoteProtocolError where the partner closed
    it or does not speak HTTP.
    """

    def __init__(self, trusted: ssl.SSLContext) -> None:
        self._trusted = trusted
        self._idle: list[_Connection] = []  # the latest used last
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await self._room.acquire()
        connection: _Connection | None = None
        try:
            connection = await self._connection(request.url)
            connection.send(request)
            while not connection.status:
                await connection.more()
        except BaseException:
            self.done(connection)
            raise
        return httpx.Response(connection.status, headers=connection.headers, stream=_Body(self, connection))

    async def aclose(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    async def _connection(self, url: httpx.URL) -> _Connection:
        """One that is kept, or a new one."""
        secure = url.scheme == "https"
        origin = (url.scheme, url.host, url.port or (443 if secure else 80))
        for connection in [connection for connection in self._idle if not connection.usable()]:
            self._idle.remove(connection)
            connection.close()
        for connection in reversed(self._idle):
            if connection.origin == origin:
                self._idle.remove(connection)
                return connection
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(origin),
                origin[1],
                origin[2],
                ssl=self._trusted if secure else None,
                happy_eyeballs_delay=None if url.host in _HERE else 0.25,
            )
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(str(error)) from error
        return connection

    def done(self, connection: _Connection | None) -> None:
        """A call is over: its connection is kept where it can take another one."""
        self._room.release()
        if connection is None:
            return
        if connection.complete and connection.keeps:
            connection.kept_at = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()


class _Connection(asyncio.Protocol):
    """A connection, and the answer that is being received on it. The parser calls the methods that begin with on_.

    Parser and connection refer to each other, so the parser is let go of with the answer: what lives for some seconds and dies
    as a cycle is never freed (runtime.tidy_memory).
    """

    _transport: asyncio.Transport

    def __init__(self, origin: _Origin) -> None:
        self.origin = origin
        self.kept_at = 0.0
        self._over = False  # the partner has closed it, or `_error` has
        self._error: Exception | None = None
        self._news: asyncio.Future[None] | None = None
        self._begin(None)

    def _begin(self, parser: httptools.HttpResponseParser | None) -> None:
        self._parser = parser
        self._bare = 0  # bytes received since there was any of the body
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0  # until the head is whole
        self._body: list[bytes] = []  # received and not yet taken
        self.complete = self.keeps = False

    def usable(self) -> bool:
        """May it take another call? Not where the partner has closed it, is about to, or has said something unasked."""
        return self.keeps and not self._over and time.monotonic() - self.kept_at < KEPT_S

    def close(self) -> None:
        self._transport.abort()
        self._parser = self._error = None  # the error, once raised, refers back here by its traceback

    def send(self, request: httpx.Request) -> None:
        self._begin(httptools.HttpResponseParser(self))
        lines = [request.method.encode() + b" " + request.url.raw_path + b" HTTP/1.1"]
        lines += [name + b": " + value for name, value in request.headers.raw]
        if any(b"\r" in line or b"\n" in line for line in lines):
            raise httpx.LocalProtocolError("a header holds a line break")
        self._transport.writelines([b"\r\n".join(lines), b"\r\n\r\n", request.content])

    async def more(self) -> None:
        """Wait for what comes next of the answer."""
        if self._over:
            self._end()
            return
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    def take(self) -> list[bytes]:
        """What has come of the body since."""
        body, self._body = self._body, []
        self._transport.resume_reading()
        return body

    def _end(self) -> None:
        """There is no more to come, which is how an answer without a length ends."""
        if self._error is not None:
            raise self._error
        if not self.status:
            raise httpx.RemoteProtocolError("the connection was closed without an answer")
        if {name.lower() for name, _ in self.headers} & {b"content-length", b"transfer-encoding"}:
            raise httpx.RemoteProtocolError("the connection was closed before the answer was whole")
        self.complete = True

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # ------------------------------------------------------------------------------------------ of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        if exc is not None and self._error is None:
            self._error = httpx.ReadError(str(exc))
        self._tell()

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self.keeps, self._over = False, True  # nobody asked for it
            return
        self._bare += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"its answer is no HTTP: {error}")
        if self.complete:
            self._parser = None
        elif self._bare > _MOST_HEAD:
            self._fail(f"its answer has more than {_MOST_HEAD} bytes of headers")
        elif len(self._body) > _MOST_PIECES:
            self._transport.pause_reading()  # until they have been taken
        self._tell()

    def _fail(self, why: str) -> None:
        if not self.complete:
            self._error = self._error or httpx.RemoteProtocolError(why)
        self.keeps, self._over, self._parser = False, True, None

    # ------------------------------------------------------------------------------------------ of the parser

    def on_message_begin(self) -> None:
        if self.complete:
            self.keeps = False  # nobody asked for it

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.complete:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.complete or self._parser is None:
            return
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status
        else:
            self.headers = []  # the answer proper follows

    def on_body(self, body: bytes) -> None:
        if not self.complete:
            self._bare = 0
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self.status and not self.complete and self._parser is not None:
            self.complete, self.keeps = True, self._parser.should_keep_alive()


class _Body(httpx.AsyncByteStream):
    def __init__(self, owner: KeptConnections, connection: _Connection) -> None:
        self._owner, self._connection = owner, connection
        self._open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            for part in self._connection.take():
                yield part
            if self._connection.complete:
                return
            await self._connection.more()

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            self._owner.done(self._connection)
