"""What the fault tests share: load that goes on through a fault, a proxy before the store, and the recount afterwards.

Each test tells what it saw with `Fault.seen`; `python -m chaos.table` runs them and writes docs/faults.md from that.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.store import Store
from tests.helpers import HOUR_MS, LOCAL, event, until

INGEST = "/api/ml/events/ingest"
HEALTH = INGEST + "?check=health"
Send = Callable[[str, str, Any], tuple[int, Any]]  # method, path, JSON body -> status, JSON answer


class Load:
    """Posts small batches from a thread of its own, each again until it has a 202, as a careful client does."""

    def __init__(self, send: Send, size: int = 10, users: int = 5) -> None:
        self._send, self._size, self._users = send, size, users
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.acknowledged: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.last_refused = 0.0

    def __enter__(self) -> Load:
        self._thread.start()
        until(lambda: self.acknowledged, "the first acknowledged events")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """The batch at hand still gets its 202."""
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a batch never got its 202"

    def more(self, count: int = 50) -> None:
        """Wait until so many further events have been acknowledged."""
        goal = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= goal, f"{count} more acknowledged events")

    def _run(self) -> None:
        number = 0
        pause = threading.Event()
        while not self._over.is_set():
            events = [event(user=f"user_{(number + i) % self._users}") for i in range(self._size)]
            number += self._size
            while (status := self._post(events)) != 202:
                self.statuses[status] += 1
                self.last_refused = time.monotonic()
                pause.wait(0.02)
            self.statuses[202] += 1
            self.acknowledged += [e["event_id"] for e in events]
            pause.wait(0.005)

    def _post(self, events: list[dict[str, Any]]) -> int:
        try:
            return self._send("POST", INGEST, {"events": events, "source": "load"})[0]
        except OSError:
            return 0


def routes(client: Any) -> Send:
    """Requests to the routes of an instance in this process."""

    def send(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = client.application.test_client().open(path, method=method, json=body)
        return answer.status_code, answer.get_json(force=True)

    return send


def settled(send: Send, streams: tuple[str, ...] = LOCAL) -> None:
    """Wait until streams have processed all that had been accepted for them by now; more may come meanwhile."""
    goals: list[int] = []

    def done() -> bool:
        status, body = send("GET", HEALTH, None)
        if status != 200:
            return False
        goals.append(body["totals"]["accepted"])
        accounts = [body["streams"][name] for name in streams]
        return all(a["pending"] == 0 or a["processed"] + a["failed"] >= goals[0] for a in accounts)

    until(done, f"{', '.join(streams)} to settle")


def recount(send: Send, acknowledged: list[str]) -> tuple[int, int]:
    """How many acknowledged events are lost, and how many effects are doubled or too few, over all local streams: counted
    again from the stored events and the dead letters, which must be the very ones that the accounts tell of."""
    settled(send)
    stored = list(_pages(send, "/api/ml/events?limit=1000", "events"))
    letters = list(_pages(send, "/api/ml/dead-letters?limit=1000", "dead_letters"))
    ids = [e["event_id"] for e in stored]
    dead = {name: [row["event"].get("event_id") for row in letters if row["stream"] == name] for name in LOCAL}
    taken = {name: len(set(ids) - set(dead[name])) for name in LOCAL}
    users = Counter(e["user_id"] for e in stored if e["event_id"] not in dead["features"])
    _, health = send("GET", HEALTH, None)
    now = time.time_ns() // 1_000_000
    span = f"since={now - 12 * HOUR_MS}&until={now + 12 * HOUR_MS}"
    _, by_type = send("GET", f"/api/ml/aggregates?by=type&step=1m&{span}", None)
    counted = sum(n for row in by_type["series"] for _, n in row["points"])

    def counts() -> dict[str, int] | None:
        _, vectors = send("POST", "/api/ml/features", {"user_ids": sorted(users)})
        found = {user: vectors["users"][user]["features"].get("event_count_24h") for user in users}
        return None if None in found.values() else found  # a stream made anew may have yet to fill a feature

    held = until(counts, "the features to be served") if users else {}
    off = {
        "stored twice": len(ids) - len(set(ids)),
        "counters": counted - taken["aggregates"],
        "unexplained": health["unexplained"],
        **{user: held[user] - count for user, count in users.items()},
        **{f"processed by {n}": health["streams"][n]["processed"] - taken[n] for n in LOCAL},
        **{f"dead in {n}": health["streams"][n]["failed"] - len(dead[n]) for n in LOCAL},
    }
    print({what: number for what, number in off.items() if number})  # shown where a test fails
    return len(set(acknowledged) - set(ids)), sum(map(abs, off.values()))


def _pages(send: Send, path: str, name: str) -> Iterator[dict[str, Any]]:
    cursor: str | None = None
    while True:
        _, body = send("GET", path + (f"&cursor={cursor}" if cursor else ""), None)
        yield from body[name]
        if (cursor := body["cursor"]) is None:
            return


def stored_events(send: Send) -> dict[str, dict[str, Any]]:
    """All stored events by id."""
    return {e["event_id"]: e for e in _pages(send, "/api/ml/events?limit=1000", "events")}


def sha_of(store: Store, script: str) -> str:
    """What stands in a request that runs a script."""
    return store._shas[script]


class Fault:
    """Notes for the table of faults, kept as properties of the test."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def seen(
        self, name: str, shows: str, recovered_s: float | None, lost: int, doubled: int, as_dead_letters: int = 0
    ) -> None:
        """What the user saw of a fault, how long until all was as before (s), and what the recount found; of what was lost,
        how many are dead letters, so that the user was told."""
        row = {"fault": name, "shows": shows, "recovered_s": recovered_s, "lost": lost, "doubled": doubled}
        self._record("fault", json.dumps(row | {"as_dead_letters": as_dead_letters}))


class Proxy:
    """A unix socket before the store's, on which an answer can get lost and a request can be late.

    `swallow(mark)`: the next request that contains `mark` is carried out, its answer is lost with the connection.
    `hold(mark)`: the next such request is kept back, its connection closed; `deliver()` brings it to the store.
    `hold_answers(mark)`: from the next such request on all are carried out, but nobody hears of it until `let_answers_go()`.
    """

    def __init__(self, target: Path, folder: Path) -> None:
        self._target = str(target)
        self.path = folder / "proxy.sock"
        self.url = f"unix://{self.path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        self._swallow: bytes | None = None
        self._hold: bytes | None = None
        self._held = b""
        self._lose: set[socket.socket] = set()
        self.struck = threading.Event()
        self._silence: bytes | None = None
        self._flows = threading.Event()
        self._flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def swallow(self, mark: str) -> None:
        self._swallow = mark.encode()

    def hold(self, mark: str) -> None:
        self._hold = mark.encode()

    def deliver(self) -> bytes:
        """Carry out the request that was held back; the store's answer to it."""
        with self._connect() as store:
            store.sendall(self._held)
            return store.recv(1 << 16)

    def hold_answers(self, mark: str) -> None:
        self._silence = mark.encode()

    def let_answers_go(self) -> None:
        self._flows.set()

    def close(self) -> None:
        self._flows.set()
        self._listener.close()

    def _connect(self) -> socket.socket:
        store = socket.socket(socket.AF_UNIX)
        store.connect(self._target)
        return store

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                store = self._connect()
            except OSError:
                return
            for pump in (self._requests, self._answers):
                threading.Thread(target=self._carry, args=(pump, client, store), daemon=True).start()

    def _carry(self, pump: Callable[[socket.socket, socket.socket], None], *ends: socket.socket) -> None:
        with contextlib.suppress(OSError):  # where one end has gone, the other goes too
            pump(*ends)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _requests(self, client: socket.socket, store: socket.socket) -> None:
        while request := client.recv(1 << 20):
            if self._hold is not None and self._hold in request:
                self._hold = None
                self._held = request + self._rest(client)
                self.struck.set()
                return
            if self._silence is not None and self._silence in request:
                self._silence = None
                self._flows.clear()
            if self._swallow is not None and self._swallow in request:
                self._swallow = None
                self._lose.add(store)
            store.sendall(request)

    def _rest(self, client: socket.socket) -> bytes:
        """What else belongs to a request whose sender now waits for its answer."""
        client.settimeout(0.3)
        rest = b""
        with contextlib.suppress(TimeoutError):
            while more := client.recv(1 << 20):
                rest += more
        return rest

    def _answers(self, client: socket.socket, store: socket.socket) -> None:
        while answer := store.recv(1 << 20):
            if store in self._lose:
                self.struck.set()
                return
            self._flows.wait()
            client.sendall(answer)
