"""A partner over real sockets that misbehaves on demand, byte by byte under its own control. It honours idempotency:
an event id that it has applied is not applied again, so that what a test finds in `applied` is what such a partner
would have."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers import free_port


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def events(self) -> list[dict[str, Any]]:
        found = json.loads(self.body)
        return found["events"] if self.path.endswith("/batch") else [found]


class Answer:
    """Writes to the connection of one request, in whatever way a test wants."""

    def __init__(self, connection: socket.socket, stopped: threading.Event) -> None:
        self.connection, self.stopped = connection, stopped

    def send(
        self, status: int, body: Any = None, headers: Sequence[str] = (), content_type: str = "application/json"
    ) -> None:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Whatever", *headers]
        if status != 204:
            lines += [f"Content-Type: {content_type}", f"Content-Length: {len(raw)}"]
        self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)

    def raw(self, data: bytes) -> None:
        self.connection.sendall(data)

    def close(self) -> None:
        raise ConnectionAbortedError

    def hang(self) -> None:
        self.stopped.wait()
        self.close()


Behaviour = Callable[["Misbehaving", Asked, Answer], None]


@dataclass
class Misbehaving:
    """`on_post` and `on_health` answer the two kinds of requests; replaced while it runs, they hold from the next
    request on."""

    supports: Sequence[str] | None = ("batch", "canary")
    prefix: str = ""
    tls: ssl.SSLContext | None = None
    applied: list[str] = field(default_factory=list)  # event ids, in order
    users: list[str] = field(default_factory=list)  # their users
    canaries: list[str] = field(default_factory=list)  # apart from the others
    requests: list[Asked] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)  # how often each id has arrived
    refuse: Callable[[dict[str, Any]], bool] = lambda _: False

    def __post_init__(self) -> None:
        self.on_post: Behaviour = answer_well
        self.on_health: Behaviour = healthy
        self.port = free_port()
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}{self.prefix}"
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.listen()

    def listen(self) -> None:
        """Be there, or be back."""
        self.stopped = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", self.port))
        self._start(lambda: self._accept(self._socket, self.stopped))

    def leave(self) -> None:
        """Be gone: no one listens, and open connections break."""
        self.stopped.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it has just ended by itself

    def close(self) -> None:
        if not self.stopped.is_set():
            self.leave()
        for thread in self._threads:
            thread.join(10)

    def apply(self, asked: Asked) -> dict[str, Any]:
        """What a well-behaved partner does with the events, and its answer."""
        accepted = duplicates = 0
        rejected = []
        with self._lock:
            known = set(self.applied)
            for index, event in enumerate(asked.events):
                canary = event["event_type"] == "nexus.canary"
                if not canary:
                    self.seen[event["event_id"]] += 1
                if self.refuse(event):
                    rejected.append(
                        {"index": index, "event_id": event["event_id"], "message": "I will not have this one"}
                    )
                elif canary:
                    self.canaries.append(event["event_id"])
                    accepted += 1
                elif event["event_id"] in known:
                    duplicates += 1
                else:
                    known.add(event["event_id"])
                    self.applied.append(event["event_id"])
                    self.users.append(event["user_id"])
                    accepted += 1
        return {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}

    def in_order(self, posted: Sequence[dict[str, Any]]) -> bool:
        """Each user's events were applied in the order in which they were posted."""

        def per_user(pairs: Any) -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            for user, event_id in pairs:
                found.setdefault(user, []).append(event_id)
            return found

        applied, mine = set(self.applied), {e["event_id"] for e in posted}
        wanted = per_user((e["user_id"], e["event_id"]) for e in posted if e["event_id"] in applied)
        return per_user((u, i) for u, i in zip(self.users, self.applied, strict=True) if i in mine) == wanted

    def posts(self, path: str = "/events") -> list[Asked]:
        return [
            asked
            for asked in list(self.requests)
            if asked.method == "POST" and asked.path.startswith(self.prefix + path)
        ]

    def _start(self, body: Callable[[], None]) -> None:
        thread = threading.Thread(target=body, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, server: socket.socket, stopped: threading.Event) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            self._start(lambda c=connection: self._serve(c, stopped))  # type: ignore[misc]

    def _serve(self, connection: socket.socket, stopped: threading.Event) -> None:
        try:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(connection)
            reader = connection.makefile("rb")
            while not stopped.is_set() and (asked := _read(reader)) is not None:
                self.requests.append(asked)
                behave = self.on_post if asked.method == "POST" else self.on_health
                behave(self, asked, Answer(connection, stopped))
        except OSError:
            return  # either side has gone away: what the tests are about
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()


def _read(reader: Any) -> Asked | None:
    first = reader.readline()
    if not first:
        return None
    method, path, _ = first.decode().split(" ", 2)
    headers = {}
    while line := reader.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    size = int(headers.get("content-length", 0))
    body = reader.read(size)
    return Asked(method, path, headers, body, time.monotonic()) if len(body) == size else None  # its sender has gone


# ------------------------------------------------------------------------------------------- behaviours


def healthy(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    body: dict[str, Any] = {"status": "healthy"}
    if server.supports is not None:
        body["supports"] = list(server.supports)
    answer.send(200, body)


def answer_well(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    known = ("/events", "/events/batch") if "batch" in (server.supports or ()) else ("/events",)
    if asked.path not in [server.prefix + path for path in known]:
        answer.send(404, {"detail": "Not Found"})
        return
    said = server.apply(asked)
    if asked.path.endswith("/batch") or not said["rejected"]:
        answer.send(200, said)
    else:
        answer.send(422, {"detail": said["rejected"][0]["message"]})


def says(
    status: int, body: Any = None, headers: Sequence[str] = (), content_type: str = "application/json"
) -> Behaviour:
    """Answers so, and applies nothing unless the status is a good one."""

    def behave(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        if 200 <= status < 300 and asked.method == "POST":
            server.apply(asked)
        answer.send(status, body, headers, content_type)

    return behave


def hangs(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    """Takes the request and never answers."""
    answer.hang()


def drips(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    """Applies the events and answers a byte at a time, without an end."""
    if asked.method == "POST":
        server.apply(asked)
    answer.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
    while not server.stopped.wait(0.02):
        answer.raw(b" ")
    answer.close()


def loses_answers(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    """Applies the events, then the connection breaks before the answer."""
    server.apply(asked)
    answer.close()


def cuts_answers(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    """Applies the events, and breaks off in the middle of the answer."""
    server.apply(asked)
    answer.raw(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"accep')
    answer.close()


def slow(seconds: float) -> Behaviour:
    def behave(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        server.stopped.wait(seconds)
        answer_well(server, asked, answer)

    return behave


def slow_per_event(seconds: float) -> Behaviour:
    """Takes so long for each event of a call, applies them, and answers when nobody may wait any more."""

    def behave(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        server.stopped.wait(seconds * len(asked.events))
        answer_well(server, asked, answer)

    return behave


def refuses_batches_with(bad: Callable[[dict[str, Any]], bool], status: int = 400) -> Behaviour:
    """One bad event, and the whole call is refused."""

    def behave(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        if any(bad(event) for event in asked.events):
            answer.send(status, {"error": "amount must not be negative"})
        else:
            answer_well(server, asked, answer)

    return behave


def miscounts(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    """Batches: applies the first half, and says that it accepted as many."""
    if not asked.path.endswith("/batch"):
        answer_well(server, asked, answer)
        return
    half = asked.events[: len(asked.events) // 2]
    server.apply(Asked("POST", asked.path, {}, json.dumps({"events": half}).encode(), asked.at))
    answer.send(200, {"accepted": len(half), "duplicates": 0, "rejected": []})


def closes_after_each(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    """Closes each connection after its answer, without having said so."""
    answer_well(server, asked, answer)
    answer.close()


def chunked(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    raw = json.dumps(server.apply(asked)).encode()
    answer.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for at in range(0, len(raw), 7):
        part = raw[at : at + 7]
        answer.raw(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    answer.raw(b"0\r\n\r\n")


def huge(server: Misbehaving, asked: Asked, answer: Answer) -> None:
    """A good answer of ten megabytes."""
    server.apply(asked)
    answer.send(200, b"x" * (10 << 20), content_type="text/plain")


def redirects(status: int, to: str) -> Behaviour:
    """Sends to `to` (a path, or an address) whatever is not there yet."""

    def behave(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        if asked.path == to:
            said = server.apply(asked)
            answer.send(200, said)
        else:
            answer.send(status, None, [f"Location: {to}"])

    return behave
