"""HTTP/1.1 to the partner, byte by byte: answers in every shape that the protocol allows, and connections kept or not."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import ssl
import weakref
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import TypeVar

import httptools
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bridge.transport import _MOST_PIECES, KEPT_S, KeptConnections, _Connection
from tests.misbehaving import Answer, Asked, Misbehaving

T = TypeVar("T")
Behave = Callable[[Misbehaving, Asked, Answer], None]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving()
    yield made
    made.close()


def says(raw: bytes, close: bool = False) -> Behave:
    def behave(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        answer.raw(raw)
        if close:
            answer.close()

    return behave


async def post(to: KeptConnections, url: str, body: bytes = b"{}") -> tuple[int, bytes]:
    response = await to.handle_async_request(httpx.Request("POST", url + "/events", content=body))
    try:
        return response.status_code, b"".join([part async for part in response.aiter_bytes()])
    finally:
        await response.aclose()


def using(work: Callable[[KeptConnections], Awaitable[T]]) -> T:
    async def body() -> T:
        async with asyncio.timeout(10):
            transport = KeptConnections(ssl.create_default_context())
            try:
                return await work(transport)
            finally:
                await transport.aclose()

    return asyncio.run(body())


def one(server: Misbehaving, behave: Behave) -> tuple[int, bytes]:
    server.on_post = behave
    return using(lambda transport: post(transport, server.url))


@pytest.mark.parametrize(
    ("raw", "close", "expected"),
    [
        (OK, False, (200, b"ok")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, (204, b"")),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, False, (200, b"ok")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, False, (200, b"ok")),
        (
            b"HTTP/1.1 201 X\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
            False,
            (201, b"abcde"),
        ),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", True, (200, b"until the end")),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", True, (200, b"ok")),
        (b"HTTP/1.1 413 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", True, (413, b"")),
    ],
)
def test_answers_of_all_shapes_are_read_whole(raw, close, expected, server):
    assert one(server, says(raw, close)) == expected


def test_a_packed_answer_is_unpacked_though_nobody_asked_for_it(server):
    packed = gzip.compress(b"words" * 1000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    assert one(server, says(head + packed)) == (200, b"words" * 1000)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"SSH-2.0-OpenSSH\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", httpx.RemoteProtocolError),
    ],
)
def test_what_is_no_whole_answer_is_an_error(raw, error, server):
    with pytest.raises(error):
        one(server, says(raw, close=True))


def test_nobody_at_the_address_is_no_connection(server):
    server.leave()
    with pytest.raises(httpx.ConnectError):
        one(server, says(OK))


def connections(monkeypatch: pytest.MonkeyPatch) -> list[_Connection]:
    """All that are made from here on."""
    made: list[_Connection] = []
    begin = _Connection.__init__

    def noted(self: _Connection, origin: tuple[str, str, int]) -> None:
        made.append(self)
        begin(self, origin)

    monkeypatch.setattr(_Connection, "__init__", noted)
    return made


@pytest.mark.parametrize(
    ("raw", "close", "made"),
    [
        (OK, False, 1),
        (OK, True, 2),  # it hangs up without having said so
        (OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), True, 2),
        # Unasked: never the next one's answer.
        (OK + b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", False, 2),
    ],
)
def test_a_connection_is_used_again_where_the_partner_keeps_it(raw, close, made, server, monkeypatch):
    found = connections(monkeypatch)

    async def twice(transport: KeptConnections) -> list[tuple[int, bytes]]:
        server.on_post = says(raw, close)
        first = await post(transport, server.url)
        while close and not found[0]._over:
            await asyncio.sleep(0.001)
        return [first, await post(transport, server.url)]

    assert using(twice) == [(200, b"ok")] * 2
    assert len(found) == made


def test_a_connection_that_has_rested_for_long_is_not_used_again(server, monkeypatch):
    found = connections(monkeypatch)

    async def twice(transport: KeptConnections) -> None:
        server.on_post = says(OK)
        await post(transport, server.url)
        found[0].kept_at -= KEPT_S
        await post(transport, server.url)

    using(twice)
    assert len(found) == 2
    assert found[0]._transport.is_closing()


def test_a_call_that_is_given_up_closes_its_connection_and_makes_room(server, monkeypatch):
    monkeypatch.setattr("pipeline.bridge.transport.MOST_CONNECTIONS", 1)
    found = connections(monkeypatch)

    async def give_up(transport: KeptConnections) -> tuple[int, bytes]:
        server.on_post = lambda server, asked, answer: answer.hang()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await post(transport, server.url)
        assert found[0]._transport.is_closing()
        server.on_post = says(OK)
        return await post(transport, server.url)

    assert using(give_up) == (200, b"ok")


def test_an_endless_answer_is_not_taken_in_beyond_what_is_read(server, monkeypatch):
    found = connections(monkeypatch)

    def endless(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        answer.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while not answer.stopped.is_set():
            answer.raw(b"x" * 65536)

    async def read_little(transport: KeptConnections) -> int:
        server.on_post = endless
        response = await transport.handle_async_request(httpx.Request("POST", server.url + "/events", content=b""))
        connection = found[0]
        while connection._transport.is_reading():
            await asyncio.sleep(0.001)
        held = sum(len(part) for part in connection._body)
        await response.aclose()
        return held

    assert using(read_little) <= (_MOST_PIECES + 1) << 18  # the most that asyncio takes in at once


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"a" * 1000),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 100),
        (b"HTTP/1.1 ", b"2" * 1000),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n", b"X: y\r\n" * 100),
    ],
)
def test_headers_without_an_end_are_no_answer(begins, goes_on, server):
    def endless(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        answer.raw(begins)
        while not answer.stopped.is_set():
            answer.raw(goes_on)

    with pytest.raises(httpx.RemoteProtocolError):
        one(server, endless)


def test_a_body_may_follow_in_the_smallest_of_pieces(server):
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"
    assert one(server, says(raw)) == (200, b"x" * 50_000)


@pytest.mark.parametrize(
    ("raw", "close"),
    [
        (OK, False),
        (OK, True),
        (OK + b"HTTP/1.1 408 Request Timeout\r\n", False),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", True),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 400_000, False),
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"", True),
        (b"", False),  # it never answers
    ],
)
def test_a_connection_is_gone_without_the_cycle_collector_once_it_is_closed(raw, close, server, monkeypatch):
    """What is frozen meanwhile (runtime.tidy_memory) the collector never frees."""
    found = connections(monkeypatch)

    async def work(transport: KeptConnections) -> None:
        server.on_post = says(raw, close)
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(10 if raw or close else 0.1):
                await post(transport, server.url)
        await transport.aclose()
        left = [weakref.ref(connection) for connection in found]
        found.clear()
        while any(connection() for connection in left):
            await asyncio.sleep(0.001)

    gc.disable()
    try:
        using(work)
    finally:
        gc.enable()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_connecting_on_this_machine_leaves_no_task_to_the_cycle_collector(host, server):
    async def work(transport: KeptConnections) -> list[object]:
        server.on_post = says(OK)
        await post(transport, server.url.replace("127.0.0.1", host))
        ours = asyncio.get_running_loop()
        tasks = [left for left in gc.get_objects() if isinstance(left, asyncio.Task)]
        return [left for left in tasks if left.get_loop() is ours and left.done()]

    gc.disable()
    try:
        assert using(work) == []
    finally:
        gc.enable()


@given(cuts=st.lists(st.integers(1, 150), max_size=12))
def test_an_answer_is_the_same_however_it_is_cut_on_the_way(cuts):
    raw = b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n1\r\ne\r\n0\r\n\r\n"
    connection = _Connection(("http", "x", 80))
    connection._begin(httptools.HttpResponseParser(connection))
    edges = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    for start, stop in pairwise(edges):
        connection.data_received(raw[start:stop])
    assert (connection.status, b"".join(connection._body), connection.complete) == (200, b"abcde", True)
    assert connection.keeps
    assert [name for name, _ in connection.headers] == [b"X", b"Transfer-Encoding"]
