"""The freshness probe: posts a batch with a user never seen before, and asks until that user's features are readable.

Times count from when the batch was due, not from when it left. It runs in a process of its own, so that nothing of the
load delays it.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field

from benchmarks.load import Connection, Result
from benchmarks.traffic import INGEST, NONCE, Traffic, fill, get, nonces, request, stamp

# Less often the longer it has waited: a dozen probes that wait would be a load of their own.
ASK_EVERY_S = 0.001  # at first
ASK_SHARE = 0.1  # then after this share of the time that has passed
_ASK_STORE_EVERY_S = 0.01
GIVE_UP_S = 20.0
_WATCHERS = 16  # so many probes may wait at once before one is late
_SEEN = b'"event_count_5m":1'


@dataclass
class Seen:
    """Seconds from due to the POST's answer, to readable by the route, and to the public key; `lost` never came."""

    answered: Result = field(default_factory=Result)
    readable: list[float] = field(default_factory=list)
    public: list[float] = field(default_factory=list)
    lost: int = 0


def probe(port: int, store: str | None, batch: int, per_second: float, seconds: float) -> Seen:
    """Probe `per_second` times a second for so long; `store` is its socket, None leaves the public key out."""
    others = Traffic(batch=max(batch - 1, 1), requests=50, seed=7).templates()
    seen, makes = Seen(), nonces()
    public = _Public(store, seen) if store else None
    began = time.monotonic() + 0.1

    def watch(first: int) -> None:
        line, asks = Connection(port), Connection(port)
        for number in range(first, int(per_second * seconds), _WATCHERS):
            due = began + number / per_second
            time.sleep(max(0.0, due - time.monotonic()))
            user = f"probe_{next(makes).decode()}"
            status = line.ask(fill(_with(others[number % len(others)], user, batch), next(makes), stamp()))
            seen.answered.latencies.append(time.monotonic() - due)
            seen.answered.statuses[status] = seen.answered.statuses.get(status, 0) + 1
            if not _until_readable(asks, user):
                seen.lost += 1
                continue
            seen.readable.append(time.monotonic() - due)
            if public is not None:
                public.waiting[user] = due

    threads = [threading.Thread(target=watch, args=(first,)) for first in range(_WATCHERS)]
    for thread in threads:
        thread.start()
    while public is not None and any(thread.is_alive() for thread in threads):
        public.look()
    for thread in threads:
        thread.join()
    end = time.monotonic() + GIVE_UP_S
    while public is not None and public.waiting and time.monotonic() < end:
        public.look()
    return seen


def _until_readable(asks: Connection, user: str) -> bool:
    question, began = get(f"/api/ml/features/{user}"), time.monotonic()
    while asks.ask(question) != 200 or _SEEN not in asks.body:
        passed = time.monotonic() - began
        if passed > GIVE_UP_S:
            return False
        time.sleep(max(ASK_EVERY_S, ASK_SHARE * passed))
    return True


def _with(template: bytes, user: str, batch: int) -> bytes:
    """The template with an event of `user` as its last, or alone for a batch of one."""
    mine = (
        f'{{"event_id":"evt_{NONCE.decode()}_last","event_type":"ride_request_response","user_id":"{user}",'
        f'"session_id":"s_1","timestamp":"{stamp().decode()}","app_version":"5.2.1","device_type":"android",'
        '"location":{"lat":14.58,"lng":121.03},"data":{"request_id":"r_1","response":"accepted","response_time":3.2}}'
    ).encode()
    if batch == 1:
        return request(INGEST, b'{"events":[' + mine + b"]}")
    body = template.split(b"\r\n\r\n", 1)[1]
    at = body.rindex(b"]")
    return request(INGEST, body[:at] + b"," + mine + body[at:])


class _Public:
    """Looks for the public keys of the users in `waiting` (user -> due), by a raw MGET, which costs the store least."""

    def __init__(self, store: str, seen: Seen) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(store)
        self._file = self._socket.makefile("rb")
        self._seen = seen
        self.waiting: dict[str, float] = {}

    def look(self) -> None:
        time.sleep(_ASK_STORE_EVERY_S)
        users = list(self.waiting)
        if not users:
            return
        words = [b"MGET", *(f"ml:serving:features:{user}".encode() for user in users)]
        self._socket.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words))
        self._file.readline()
        for user in users:
            size = int(self._file.readline()[1:])
            if size >= 0 and _SEEN in self._file.read(size + 2):
                self._seen.public.append(time.monotonic() - self.waiting.pop(user))
