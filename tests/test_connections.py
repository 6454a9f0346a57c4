"""Slow and vanished clients: a stalled upload takes no turn, turns go round in order, idle connections are closed."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.concurrency import turns
from pipeline.web.connections import Turns, close_idle
from pipeline.web.hot_route import takes_long
from pipeline.web.posted import MAX_BODY_BYTES
from tests.helpers import until


class Stalled:
    """An upload of which nothing comes until it goes on."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    def read(self, _: int) -> bytes:
        self.goes_on.wait(20)
        return b"{}"


class Unread:
    def read(self, _: int) -> bytes:
        raise AssertionError("it was read")


def request(path: str = "/", body: Any = None, **more: str) -> dict[str, Any]:
    return {"PATH_INFO": path, "wsgi.input": body, **more}


def start(*_: Any) -> None:
    """Of WSGI: what takes status and headers."""


class Slow:
    """An application that holds each request until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.began: list[str] = []

    def __call__(self, environ: dict[str, Any], _: Any) -> list[bytes]:
        self.began.append(environ["PATH_INFO"])
        self.let_go.wait(20)
        return [b""]


def until_there(app: Turns, slow: Slow, count: int) -> None:
    until(lambda: len(slow.began) + len(app.line.waiting) == count)


@pytest.fixture
def aside() -> Iterator[Callable[..., threading.Thread]]:
    """Run something in a thread that has ended when the test has."""
    threads = []

    def run(work: Callable[..., Any], *args: Any) -> threading.Thread:
        threads.append(threading.Thread(target=work, args=args))
        threads[-1].start()
        return threads[-1]

    yield run
    for thread in threads:
        thread.join(20)


def test_upload_that_stalls_takes_no_turn(aside):
    app, body = Turns(lambda environ, _: [environ["wsgi.input"].read()], 1), Stalled()
    aside(app, request(body=body, CONTENT_LENGTH="100"), start)
    assert app(request(body=io.BytesIO(b"[]"), CONTENT_LENGTH="2"), start) == [b"[]"]
    body.goes_on.set()


def test_no_more_requests_are_worked_on_than_there_are_turns(aside):
    slow = Slow()
    app = Turns(slow, 2)
    for path in ("/0", "/1", "/2", "/3", "/4"):
        aside(app, request(path), start)
        until_there(app, slow, int(path[1:]) + 1)
    assert slow.began == ["/0", "/1"]
    slow.let_go.set()
    until(lambda: len(slow.began) == 5)


def test_turns_go_round_in_the_order_in_which_requests_came(aside):
    slow = Slow()
    app = Turns(slow, 1)
    for path in ("/0", "/1", "/2", "/3"):
        aside(app, request(path), start)
        until_there(app, slow, int(path[1:]) + 1)
    slow.let_go.set()
    until(lambda: slow.began == ["/0", "/1", "/2", "/3"])


def test_requests_that_take_long_leave_turns_to_the_others(aside):
    slow = Slow()
    app = Turns(slow, 8, lambda environ: environ["PATH_INFO"].startswith("/long"))
    for i in range(10):
        aside(app, request(f"/long{i}"), start)
    until(lambda: len(slow.began) + len(app._long_line.waiting) == 10)
    assert len(slow.began) == 2
    for i in range(6):
        aside(app, request(f"/short{i}"), start)
    until(lambda: sum(path.startswith("/short") for path in slow.began) == 6)
    slow.let_go.set()
    until(lambda: len(slow.began) == 16)


@pytest.mark.parametrize(
    ("path", "query", "long"),
    [
        ("/api/ml/features/u", "as_of=2026-01-01T00:00:00Z", True),
        ("/api/ml/features/u", "names=a", False),
        ("/api/ml/events", "user_id=u", True),
        ("/api/ml/events/e-1", "", False),
        ("/api/ml/events/ingest", "", False),
        ("/api/ml/dead-letters/redrive", "", True),
        ("/api/ml/aggregates", "by=type", True),
    ],
)
def test_what_has_to_read_any_number_of_events_takes_long(path, query, long):
    assert takes_long({"PATH_INFO": path, "QUERY_STRING": query}) is long


def test_probe_is_answered_while_every_turn_is_taken(aside):
    slow = Slow()
    app = Turns(lambda environ, start: [b"ok"] if environ["PATH_INFO"] == "/healthz" else slow(environ, start), 1)
    aside(app, request("/busy"), start)
    until(lambda: slow.began)
    assert app(request("/healthz"), start) == [b"ok"]
    slow.let_go.set()


def test_turn_of_a_request_that_fails_goes_to_the_next():
    def fails(*_: Any) -> list[bytes]:
        raise ValueError

    app = Turns(fails, 1)
    for _ in range(3):
        with pytest.raises(ValueError, match=""):
            app(request(), start)


@pytest.mark.parametrize(("length", "more"), [(str(4 * MAX_BODY_BYTES + 1), {}), ("9" * 30, {}),
    (str(MAX_BODY_BYTES + 2), {"HTTP_EXPECT": "100-continue"})])  # fmt: skip
def test_body_that_is_far_too_long_or_waits_for_a_word_is_left_unread(length, more):
    app = Turns(lambda environ, _: [type(environ["wsgi.input"]).__name__.encode()], 1)
    assert app(request(body=Unread(), CONTENT_LENGTH=length, **more), start) == [b"Unread"]


@pytest.mark.parametrize("length", [MAX_BODY_BYTES + 1, 4 * MAX_BODY_BYTES])
def test_body_that_is_too_long_is_read_off_before_the_request_takes_a_turn(length):
    class Body(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size in range(1 << 20)  # never whole in memory
            assert turns._here.line is None
            return super().read(size)

    body = Body(bytes(length))
    app = Turns(lambda environ, _: [str(environ["wsgi.input"].tell()).encode()], 1)
    assert app(request(body=body, CONTENT_LENGTH=str(length)), start) == [str(length).encode()]


def test_body_without_a_length_is_read_to_one_byte_beyond_the_limit():
    app = Turns(lambda environ, _: [environ["wsgi.input"].read()], 1)
    [body] = app(request(body=io.BytesIO(bytes(MAX_BODY_BYTES + 9)), HTTP_TRANSFER_ENCODING="chunked"), start)
    assert len(body) == MAX_BODY_BYTES + 1


@pytest.fixture
def pairs() -> Iterator[Callable[[socket.socket], tuple[socket.socket, socket.socket]]]:
    """Connect to a listener, with a part of a request sent: both ends."""
    made = []

    def connect(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
        made.append((socket.create_connection(listener.getsockname()), listener.accept()[0]))
        made[-1][0].sendall(b"POST")
        return made[-1]

    yield connect
    for pair in made:
        for end in pair:
            end.close()


def test_connection_on_which_nothing_moves_is_closed_and_the_others_stay(pairs):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        (still, _), (busy, at_busy), (elsewhere, _) = pairs(server), pairs(server), pairs(other)
        threading.Event().wait(0.6)
        busy.sendall(b"more")
        at_busy.recv(100)
        descriptors = os.listdir("/proc/self/fd")
        assert close_idle(server.getsockname()[1], 0.5, 0.0) == 1
        assert os.listdir("/proc/self/fd") == descriptors
        still.settimeout(20)
        assert still.recv(1) == b""
        for client in (busy, elsewhere):
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)


def test_server_that_listens_no_more_waits_the_shorter_time_for_its_connections(pairs):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        pairs(server)
        threading.Event().wait(0.1)
        assert close_idle(port, 60.0, 0.05) == 0
    assert close_idle(port, 60.0, 0.05) == 1
