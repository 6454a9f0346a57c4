"""The load generator: raw sockets, requests encoded beforehand, a process of its own. Open or closed loop.

Open loop: requests leave by the clock whether the answers come or not, and latency counts from when a request was due,
so that a server that stalls is seen to stall. Closed loop: each connection sends its next request when it has its
answer.
"""

from __future__ import annotations

import multiprocessing
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from benchmarks.traffic import Traffic, fill, nonces, stamp

_SPAWN = multiprocessing.get_context("spawn")
_DRAIN_S = 30.0


@dataclass
class Result:
    """What a run of the load saw. Latencies in s, in order of the answers; `began` and `ended` are monotonic s."""

    began: float = 0.0
    ended: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    unanswered: int = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def ms(self, share: float) -> float:
        """A percentile of the latencies, ms; unanswered requests count as slowest."""
        return percentile(self.latencies, share, self.unanswered) * 1000

    def only(self, *statuses: int) -> Result:
        """This result. Raises RuntimeError when any answer has another status."""
        if set(self.statuses) - set(statuses):
            raise RuntimeError(f"the load met other answers than {statuses}: {self.statuses}")
        return self


def percentile(values: list[float], share: float, beyond: int = 0) -> float:
    """The value that `share` of all do not exceed; `beyond` more values are greater than any."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * (len(ordered) + beyond)))]


class Connection:
    """One kept connection. `due` is when the request in flight was to leave, None when it is idle."""

    def __init__(self, address: int | str) -> None:
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address)
        else:
            self.socket = socket.create_connection(("127.0.0.1", address))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due: float | None = None
        self.body = b""  # of the latest answer
        self._raw = b""

    def send(self, data: bytes, due: float) -> None:
        self.due = due
        self.socket.sendall(data)

    def receive(self) -> int | None:
        """Take what has arrived; the status when the answer is whole. Raises ConnectionError when it hung up."""
        part = self.socket.recv(1 << 18)
        if not part:
            raise ConnectionError("the server closed the connection")
        self._raw += part
        head = self._raw.find(b"\r\n\r\n")
        if head < 0 or len(self._raw) < head + 4 + _length(self._raw[:head]):
            return None
        status, self.body, self._raw, self.due = int(self._raw[9:12]), self._raw[head + 4 :], b"", None
        return status

    def ask(self, data: bytes) -> int:
        """Send and wait for the whole answer; its status."""
        self.send(data, time.monotonic())
        while (status := self.receive()) is None:
            pass
        return status


def _length(head: bytes) -> int:
    lowered = head.lower()
    at = lowered.find(b"content-length:")
    return int(lowered[at + 15 :].split(b"\r", 1)[0]) if at >= 0 else 0


def closed_loop(
    port: int, requests: list[bytes] | Traffic, connections: int, count: int | None = None, seconds: float = 1e9
) -> Result:
    """Keep so many connections busy for `seconds`, or until `count` requests have been answered."""
    ready = _endless(requests) if count is None else iter(list(islice(_endless(requests), count)))
    lines = [Connection(port) for _ in range(connections)]
    selector = selectors.DefaultSelector()
    result = Result(began=time.monotonic())
    left = count if count is not None else 1 << 60
    end = result.began + seconds
    for line in lines[: min(left, connections)]:
        selector.register(line.socket, selectors.EVENT_READ, line)
        line.send(next(ready), time.monotonic())
        left -= 1
    busy = len(selector.get_map())
    while busy:
        for key, _ in selector.select():
            line = key.data
            due = line.due
            status = line.receive()
            if status is None:
                continue
            now = time.monotonic()
            result.latencies.append(now - due)
            result.statuses[status] = result.statuses.get(status, 0) + 1
            if left > 0 and now < end:
                left -= 1
                line.send(next(ready), time.monotonic())
            else:
                busy -= 1
                result.ended = now
    for line in lines:
        line.socket.close()
    return result


def open_loop(port: int, requests: list[bytes] | Traffic, per_second: float, seconds: float) -> Result:
    """Send `per_second` requests a second by the clock, on as many connections as that takes."""
    ready = _endless(requests)
    idle: deque[Connection] = deque(Connection(port) for _ in range(4))
    selector = selectors.DefaultSelector()
    for line in idle:
        selector.register(line.socket, selectors.EVENT_READ, line)
    total = int(per_second * seconds)
    result = Result(began=time.monotonic())
    sent = flying = 0
    upcoming = next(ready)
    while sent < total or flying:
        now = time.monotonic()
        due = result.began + sent / per_second
        if sent < total and now >= due:
            if not idle:
                line = Connection(port)
                selector.register(line.socket, selectors.EVENT_READ, line)
                idle.append(line)
            idle.pop().send(upcoming, due)
            sent, flying = sent + 1, flying + 1
            upcoming = next(ready)
            continue
        if sent == total and now > due + _DRAIN_S:
            result.unanswered = flying
            break
        for key, _ in selector.select(max(0.0, due - now) if sent < total else 1.0):
            line = key.data
            began = line.due
            status = line.receive()
            if status is not None:
                result.latencies.append(time.monotonic() - began)
                result.statuses[status] = result.statuses.get(status, 0) + 1
                idle.append(line)
                flying -= 1
    result.ended = time.monotonic()
    for key in list(selector.get_map().values()):
        key.data.socket.close()
    return result


def _endless(requests: list[bytes] | Traffic) -> Iterator[bytes]:
    if not isinstance(requests, Traffic):
        return cycle(requests)
    return _filled(requests.templates())


def _filled(templates: list[bytes]) -> Iterator[bytes]:
    for template, nonce in zip(cycle(templates), nonces(), strict=False):
        yield fill(template, nonce, stamp())


def apart(work: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run a function in a process of its own, which ends with it."""
    pool = ProcessPoolExecutor(1, mp_context=_SPAWN)
    future = pool.submit(work, *args)
    pool.shutdown(wait=False)
    return future


def load(work: Callable[..., Result], *args: Any) -> Result:
    """Run a loop in a process of its own and wait for what it saw."""
    result: Result = apart(work, *args).result()
    return result
