"""The benchmarks' own parts: what they send, how they count, what the table says."""

from __future__ import annotations

import importlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from itertools import islice
from statistics import mean

import msgspec
import pytest

from benchmarks import table
from benchmarks.__main__ import topics
from benchmarks.load import closed_loop, open_loop, percentile
from benchmarks.table import Row
from benchmarks.traffic import EVENT_BYTES, NONCE, STAMP, Traffic, fill, get, nonces, stamp
from pipeline.ingest import judge

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def events(request: bytes) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(request.split(b"\r\n\r\n", 1)[1])["events"]
    return found


class Server:
    """Answers each request after `delay_s`, one at a time."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._turn = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            with self._turn:
                self._closed.wait(self.delay_s)
            connection.sendall(ANSWER)

    def close(self) -> None:
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def test_every_topic_has_a_title_and_a_run() -> None:
    found = [importlib.import_module(f"benchmarks.bench_{name}") for name in topics()]
    assert len(found) >= 7
    assert all(isinstance(module.TITLE, str) and callable(module.run) for module in found)


def test_an_event_has_330_bytes_on_average() -> None:
    bodies = [request.split(b"\r\n\r\n", 1)[1] for request in Traffic(requests=50).templates()]
    assert mean(len(body) / 100 for body in bodies) == pytest.approx(EVENT_BYTES, rel=0.02)


@pytest.mark.parametrize("ids", [True, False])
def test_every_event_that_is_sent_is_accepted(ids: bool) -> None:
    template = Traffic(requests=1, ids=ids).templates()[0]
    posted = msgspec.json.decode(fill(template, next(nonces()), stamp()).split(b"\r\n\r\n", 1)[1])["events"]
    verdicts = judge(posted, time.time_ns() // 1_000_000)
    assert (len(verdicts.kept), verdicts.rejected) == (100, [])


def test_a_filled_template_has_ids_that_no_other_has_and_the_length_it_says() -> None:
    template = Traffic(requests=1, batch=20).templates()[0]
    sent = [fill(template, nonce, stamp()) for nonce in islice(nonces(), 50)]
    ids = [event["event_id"] for request in sent for event in events(request)]
    assert len(set(ids)) == len(ids) == 1000
    for request in sent:
        head, body = request.split(b"\r\n\r\n", 1)
        assert int(re.findall(rb"Content-Length: (\d+)", head)[0]) == len(body)
        assert NONCE not in body
        assert STAMP not in body


def test_users_in_turn_are_all_brought_in_once() -> None:
    found = [str(e["user_id"]) for r in Traffic(batch=10, requests=5, users=50, first=0).templates() for e in events(r)]
    assert sorted(found) == sorted(set(found))
    assert len(found) == 50


def test_the_busiest_hundredth_of_the_users_makes_a_fifth_of_the_events() -> None:
    found = [e["user_id"] for request in Traffic(requests=100).templates() for e in events(request)]
    assert mean(str(user) < "driver_0000100" for user in found) == pytest.approx(0.2, abs=0.03)


def test_closed_loop_stops_at_its_count(server: Server) -> None:
    result = closed_loop(server.port, [get("/")], 3, count=20)
    assert result.statuses == {200: 20}
    assert len(result.latencies) == 20


def test_open_loop_counts_from_when_a_request_was_due() -> None:
    slow = Server(delay_s=0.05)  # 20 a second, asked for 100
    try:
        result = open_loop(slow.port, [get("/")], 100, 0.2)
    finally:
        slow.close()
    assert result.statuses == {200: 20}
    assert max(result.latencies) > 0.5  # a closed loop would have seen 0.05 each


def test_an_answer_of_another_status_is_not_passed_over(server: Server) -> None:
    with pytest.raises(RuntimeError, match="200"):
        closed_loop(server.port, [get("/")], 1, count=1).only(202)


def test_requests_without_an_answer_count_as_the_slowest() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5, beyond=4) == 4.0


def test_a_row_is_the_median_with_least_and_most() -> None:
    row = table.of("rate", [3.0, 1.0, 9.0], "events/s")
    assert (row.value, row.spread) == (3.0, (1.0, 9.0))


def test_a_ratio_is_taken_repetition_by_repetition() -> None:
    row = table.ratio("rate", [10.0, 40.0], [5.0, 10.0], "the peer")
    assert (row.value, row.spread) == (3.0, (2.0, 4.0))


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("a", 5.0, "ms", target=10, aim=6), "aim"),
        (Row("a", 8.0, "ms", target=10, aim=6), "target"),
        (Row("a", 11.0, "ms", target=10, aim=6), "missed"),
        (Row("a", 11.0, "/s", target=10, aim=20, more_is_better=True), "target"),
        (Row("a", 9.0, "/s", target=10, more_is_better=True), "missed"),
        (Row("a", None, "ms", target=10), ""),
        (Row("a", 5.0, "ms"), ""),
    ],
)
def test_a_row_says_what_it_reached(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_what_could_not_be_measured_says_so_and_why() -> None:
    text = table.markdown("Topic", [table.missing("Feast", "rows/s", "not installable here: no network")])
    assert "| Feast | not measured |" in text
    assert "not installable here: no network" in text
