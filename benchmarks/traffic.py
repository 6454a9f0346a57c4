"""Realistic ride-hailing requests, encoded beforehand: a load generator on the same cores must cost next to nothing.

A template is a whole HTTP request. Before it is sent, `fill` puts in a nonce, which makes its ids unique, and the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

NONCE = b"@@@@@@@@@@"
STAMP = b"2000-01-01T00:00:00.000Z"
INGEST = "/api/ml/events/ingest"
EVENT_BYTES = 330
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
# Of a hundred events; the mean size of the mix is EVENT_BYTES.
_MIX = (
    ("ride_request_response", 44),
    ("ride_request", 20),
    ("ui_interaction", 14),
    ("ride_completed", 11),
    ("payment", 10),
    ("fraud_report", 1),
)
_KINDS = [kind for kind, share in _MIX for _ in range(share)]


@dataclass(frozen=True)
class Traffic:
    """What to send: `batch` events a request, of `users` users, a few of whom make most of the events.

    `first`: from this user on each user in turn, instead of at random, to bring every one of them in. Without `ids` the
    events have none, and the receiver makes them.
    """

    batch: int = 100
    users: int = 10_000
    seed: int = 1
    requests: int = 400
    ids: bool = True
    first: int | None = None
    path: str = INGEST

    def templates(self) -> list[bytes]:
        """The distinct requests, to be sent in turn."""
        random = Random(self.seed)
        pick = self._in_turn() if self.first is not None else self._at_random(random)
        return [
            request(self.path, self.body([event(random, next(pick), i, self.ids) for i in range(self.batch)]))
            for _ in range(self.requests)
        ]

    def body(self, events: list[str]) -> bytes:
        return ('{"events":[' + ",".join(events) + '],"source":"driver_app"}').encode()

    def _in_turn(self) -> Iterator[str]:
        user = self.first or 0
        while True:
            yield name_of(user % self.users)
            user += 1

    def _at_random(self, random: Random) -> Iterator[str]:
        while True:  # the busiest hundredth of the users makes a fifth of the events
            yield name_of(int(self.users * random.random() ** 3))


def name_of(user: int) -> str:
    return f"driver_{user:07d}"


def event(random: Random, user: str, index: int, ids: bool = True) -> str:
    """One event in the nested shape, as JSON text with the places for nonce and time."""
    kind = random.choice(_KINDS)
    nonce, stamp = NONCE.decode(), STAMP.decode()
    lat, lng = random.gauss(14.58, 0.03), random.gauss(121.03, 0.03)
    head = f'"event_id":"evt_{nonce}_{index:04d}",' if ids else ""
    return (
        f'{{{head}"event_type":"{kind}","user_id":"{user}","session_id":"s_{random.randrange(10**8):08d}",'
        f'"timestamp":"{stamp}","app_version":"5.2.1","device_type":"{random.choice(("android", "ios"))}",'
        f'"location":{{"lat":{lat:.5f},"lng":{lng:.5f}}},"data":{{{_DATA[kind](random, f"{nonce}_{index:04d}")}}}}}'
    )


def _response(random: Random, ident: str) -> str:
    word = "accepted" if random.random() < 0.8 else "rejected"
    return f'"request_id":"req_{ident}","response":"{word}","response_time":{random.uniform(1, 12):.2f}'


def _request(random: Random, ident: str) -> str:
    lat, lng = random.gauss(14.58, 0.03), random.gauss(121.03, 0.03)
    return f'"request_id":"req_{ident}","pickup":{{"lat":{lat:.5f},"lng":{lng:.5f}}}'


def _interaction(random: Random, ident: str) -> str:
    return '"screen":"home","element":"where_to"'


def _completed(random: Random, ident: str) -> str:
    fare = random.uniform(80, 900)
    return f'"request_id":"req_{ident}","fare":{fare:.2f},"distance_km":{fare / 31:.2f}'


def _payment(random: Random, ident: str) -> str:
    return (
        f'"transaction_id":"tx_{ident}","amount":{random.uniform(80, 900):.2f},'
        f'"merchant_id":"{name_of(random.randrange(400))}"'
    )


def _report(random: Random, ident: str) -> str:
    return f'"transaction_id":"tx_{ident}","is_fraud":{int(random.random() < 0.5)},"by":"support"'


_DATA: dict[str, Callable[[Random, str], str]] = {
    "ride_request_response": _response,
    "ride_request": _request,
    "ui_interaction": _interaction,
    "ride_completed": _completed,
    "payment": _payment,
    "fraud_report": _report,
}


def request(path: str, body: bytes, method: str = "POST") -> bytes:
    """A whole HTTP/1.1 request on a connection that is kept."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def get(path: str) -> bytes:
    return request(path, b"", "GET")


def nonces() -> Iterator[bytes]:
    """Nonces that no other process makes."""
    prefix = "".join(_DIGITS[byte % 36] for byte in os.urandom(5))
    number = 0
    while True:
        yield f"{prefix}{number:05x}".encode()
        number += 1


def stamp(at: float | None = None) -> bytes:
    """A moment (epoch s), now where none is given, as RFC 3339 with milliseconds."""
    at = time.time() if at is None else at
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at))}.{int(at * 1000) % 1000:03d}Z".encode()


def fill(template: bytes, nonce: bytes, at: bytes) -> bytes:
    """A template made ready to be sent."""
    return template.replace(NONCE, nonce).replace(STAMP, at)
