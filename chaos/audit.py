"""The audit, over HTTP alone: conservation at every look while it runs, and at the end an independent recount.

What the storage stream holds is the ground of the recount: it must be exactly what was sent, everything acknowledged
among it, and what the other streams say must be what one gets by counting it again.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import quote

from chaos.clients import INGEST, Ledger
from chaos.system import System, Unanswered

HEALTH = INGEST + "?check=health"
LOCAL_STREAMS = ("features", "storage", "aggregates", "inference")
STREAMS = (*LOCAL_STREAMS, "bridge")
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
_LOOK_EVERY_S = 0.1
_RECEIPTS = 100
_SHOWN = 20


@dataclass
class Findings:
    """What is wrong, each in a line (the first of each kind are kept in words), and what was looked at."""

    mismatches: int = 0
    lines: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    def wrong(self, text: str, count: int = 1) -> None:
        self.mismatches += count
        if len(self.lines) < _SHOWN:
            self.lines.append(text)

    def equal(self, what: str, found: Any, expected: Any) -> None:
        self.checked[what.partition(" of ")[0]] += 1
        if found != expected:
            self.wrong(f"{what}: {found!r}, recounted {expected!r}")

    def within(self, what: str, found: Any, low: float, high: float) -> None:
        self.checked[what.partition(" of ")[0]] += 1
        if not isinstance(found, int | float) or not low <= found <= high:
            self.wrong(f"{what}: {found!r}, recounted {low} to {high}")


class Watch(threading.Thread):
    """Looks at the accounts all the time: what was accepted for a stream is processed, dead or pending, always."""

    def __init__(self, system: System) -> None:
        super().__init__(name="watch", daemon=True)
        self._system = system
        self._over = threading.Event()
        self.looks = self.unanswered = 0
        self.unexplained: list[str] = []
        self._accepted = 0

    def run(self) -> None:
        while not self._over.is_set():
            try:
                _, body = self._system.get(HEALTH, timeout_s=3.0)
                if "error" not in body:
                    self._look(body)
                else:
                    self.unanswered += 1  # the store is away, and the answer says so
            except Unanswered:
                self.unanswered += 1
            self._over.wait(_LOOK_EVERY_S)

    def _look(self, body: dict[str, Any]) -> None:
        self.looks += 1
        if body["unexplained"] != 0:
            self.unexplained.append(f"look {self.looks}: unexplained {body['unexplained']}, {body['streams']}")
        if body["totals"]["accepted"] < self._accepted:
            self.unexplained.append(f"look {self.looks}: accepted fell from {self._accepted}")
        self._accepted = body["totals"]["accepted"]

    def stop(self) -> None:
        self._over.set()
        self.join(10.0)


def drained(system: System) -> bool:
    """Every stream has processed all that was accepted for it."""
    try:
        status, body = system.get(HEALTH)
    except Unanswered:
        return False
    return status == 200 and all(stream["pending"] == 0 for stream in body["streams"].values())


def audit(system: System, ledger: Ledger) -> Findings:
    """Recount everything once the system is drained. Raises Unanswered where a route does not answer."""
    found = Findings()
    stored = _stored(system, ledger, found)
    dead = _dead_letters(system, stored, found)
    _accounts(system, stored, dead, found)
    _aggregates(system, stored, found)
    _features(system, stored, dead, found)
    _payments(system, stored, dead["inference"], found)
    _receipts(system, stored, dead, found)
    return found


def _stored(system: System, ledger: Ledger, found: Findings) -> dict[str, dict[str, Any]]:
    """All stored events by id, found page by page: each once, as it was sent, and all that was acknowledged."""
    stored: dict[str, dict[str, Any]] = {}
    for event in _pages(system, "/api/ml/events?limit=1000", "events"):
        event_id = event["event_id"]
        found.checked["stored events"] += 1
        if event_id in stored:
            found.wrong(f"{event_id} is stored twice")
        event["ts"] = moment(event["timestamp"])
        stored[event_id] = event
        sent = ledger.sent.get(event_id)
        if sent is None:
            found.wrong(f"{event_id} is stored and was never sent")
        elif {**sent, "timestamp": event["ts"]} != {name: event.get(name) for name in sent} | {
            "timestamp": sent["timestamp"]
        }:
            found.wrong(f"{event_id} was stored as {event}, sent as {sent}")
    for event_id in ledger.acknowledged - stored.keys():
        found.wrong(f"{event_id} was acknowledged and is lost")
    return stored


def _dead_letters(system: System, stored: dict[str, dict[str, Any]], found: Findings) -> defaultdict[str, set[str]]:
    """The dead letters are those events that lack what a stream needs, each once, and no others."""
    dead: defaultdict[str, set[str]] = defaultdict(set)
    for letter in _pages(system, "/api/ml/dead-letters?limit=1000", "dead_letters"):
        event_id = letter["event"]["event_id"]
        if event_id in dead[letter["stream"]]:
            found.wrong(f"{event_id} is twice among the dead letters of {letter['stream']}")
        dead[letter["stream"]].add(event_id)
    unpriced = {i for i, e in stored.items() if isinstance(e["data"].get("amount"), str)}
    untimed = {i for i, e in stored.items() if isinstance(e["data"].get("response_time"), str)}
    expected = {"features": untimed | unpriced, "inference": unpriced, "bridge": untimed}
    for stream in STREAMS:
        odd = dead[stream] ^ expected.get(stream, set())
        found.checked["dead letters"] += len(dead[stream])
        if odd:
            found.wrong(f"{len(odd)} dead letters of {stream} are missing or too many, such as {min(odd)}", len(odd))
    return dead


def _accounts(system: System, stored: dict[str, dict[str, Any]], dead: dict[str, set[str]], found: Findings) -> None:
    _, health = system.get(HEALTH)
    found.equal("totals of accepted", health["totals"]["accepted"], len(stored))
    found.equal("unexplained of all", health["unexplained"], 0)
    for name in STREAMS:
        row = health["streams"][name]
        found.equal(f"processed of {name}", row["processed"], len(stored) - len(dead[name]))
        found.equal(f"dead of {name}", row["failed"], len(dead[name]))
    _, service = system.get("/health", service=True)
    found.equal("accepted by of the Python service", service["events"]["accepted"], len(stored) - len(dead["bridge"]))
    scored = sum(e["event_type"] == "payment" for e in stored.values()) - len(dead["inference"])
    since = time.time_ns() // 1_000_000
    system.wait(lambda: _snapshot(system)["at"] > since and bool(_snapshot(system)["models"]), 20, "a new snapshot")
    found.equal("payments scored of all", _snapshot(system)["models"]["fraud"]["scored"], scored)


def _snapshot(system: System) -> dict[str, Any]:
    """What the dashboard is fed with; a job makes it once a second."""
    return {"at": 0, "models": {}} | system.get("/nexus/feed.json")[1]


def _aggregates(system: System, stored: dict[str, dict[str, Any]], found: Findings) -> None:
    """Every counter per minute and hour, by type, source and device, over all times that occur."""
    if not stored:
        return
    first, last = (pick(e["ts"] for e in stored.values()) for pick in (min, max))
    fields = {"type": "event_type", "source": "source", "device": "device_type"}
    for by, name in fields.items():
        for step, ms in (("1m", 60_000), ("1h", HOUR_MS)):
            expected = Counter((e[name], e["ts"] // ms * ms) for e in stored.values())
            _, body = system.get(f"/api/ml/aggregates?by={by}&step={step}&since={first}&until={last}")
            counted = {(row["key"], moment(at)): n for row in body["series"] for at, n in row["points"]}
            for key in counted.keys() | expected.keys():
                found.equal(f"aggregates by {by} of {step} {key}", counted.get(key, 0), expected[key])


def _features(system: System, stored: dict[str, dict[str, Any]], dead: dict[str, set[str]], found: Findings) -> None:
    """Each user's features, in Nexus and in the Python service, against the counts and sums over the stored events."""
    users: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in stored.values():
        users[event["user_id"]].append(event)

    def ask(user: str) -> tuple[str, int, Any, Any, int]:
        before = time.time_ns() // 1_000_000
        _, both = system.get(f"/api/ml/bridge/python?action=features&user_id={quote(user)}")
        _, alone = system.get(f"/features/{quote(user)}", service=True)
        return user, before, both, alone, time.time_ns() // 1_000_000

    with ThreadPoolExecutor(4) as pool:
        for user, before, both, alone, after in pool.map(ask, users):
            events = users[user]
            alive, delivered = (
                [e for e in events if e["event_id"] not in dead[stream]] for stream in ("features", "bridge")
            )
            ours = both.get("combined_features", {}).get("typescript_features", {})
            theirs = alone.get("features", {})
            if alive:
                _shared(found, f"Nexus {user}", ours, alive, before, after)
                for name, window in (("5m", 300_000), ("1h", HOUR_MS), ("24h", DAY_MS)):
                    low, high = _window(alive, window, before, after)
                    found.within(f"event counts of {user} in {name}", ours.get(f"event_count_{name}"), low, high)
            if not delivered:
                continue
            _shared(found, f"Python {user}", theirs, delivered, before, after)
            if len(delivered) < 1000:  # the score is capped there
                counted = round(math.exp(theirs.get("py_activity_score", 0.0) * math.log(1001))) - 1
                found.equal(f"events at the Python service of {user}", counted, len(delivered))


def _shared(
    found: Findings, who: str, features: dict[str, Any], events: list[dict[str, Any]], before: int, after: int
) -> None:
    """The three features that both systems compute. All events lie within the last 24 hours."""
    answers = [e for e in events if e["event_type"] == "ride_request_response"]
    accepted = sum(e["data"]["response"] == "accepted" for e in answers)
    times = [e["data"]["response_time"] for e in answers]
    rate = accepted / len(answers) if answers else None
    mean = sum(times) / len(times) if times else None
    found.equal(f"acceptance_rate of {who}", features.get("acceptance_rate"), rate)
    found.equal(f"response_time of {who}", features.get("response_time"), mean)
    rejected = [e for e in answers if e["data"]["response"] == "rejected"]
    low, high = _window(rejected, HOUR_MS, before, after)
    found.within(f"recent_rejections of {who}", features.get("recent_rejections"), low, high)


def _window(events: list[dict[str, Any]], window: int, before: int, after: int) -> tuple[int, int]:
    """How many events lie in a window that was asked for between two moments: its older edge may move by one tile."""
    surely = sum(after - window + window // 60 < e["ts"] <= before for e in events)
    return surely, sum(before - window < e["ts"] <= after for e in events)


def _payments(system: System, stored: dict[str, dict[str, Any]], dead: set[str], found: Findings) -> None:
    """Each payment has the score it got when it arrived, and the label that was reported, if one was."""
    payments = {
        e["data"]["transaction_id"]: e
        for e in stored.values()
        if e["event_type"] == "payment" and e["event_id"] not in dead
    }
    labels = {
        e["data"]["transaction_id"]: e["data"]["is_fraud"] for e in stored.values() if e["event_type"] == "fraud_report"
    }
    wanted = list(payments)
    for at in range(0, len(wanted), 1000):
        some = wanted[at : at + 1000]
        _, body = system.post("/api/ml/predictions/fraud", {"transaction_ids": some})
        for transaction in some:
            score = body["predictions"].get(transaction)
            if score is None:
                found.wrong(f"payment {transaction} was never scored")
                continue
            found.within(f"scores of {transaction}", score["score"], 0.0, 1.0)
            arrived = payments[transaction]["received_at"]
            found.equal(f"scored at its arrival of {transaction}", score["scored_at"], arrived)
            found.equal(f"labels of {transaction}", score["label"], labels.get(transaction))


def _receipts(system: System, stored: dict[str, dict[str, Any]], dead: dict[str, set[str]], found: Findings) -> None:
    """What receipts say of events from all parts of the run."""
    ids = sorted(stored, key=lambda event_id: stored[event_id]["ts"])
    for event_id in ids[:: max(1, len(ids) // _RECEIPTS)]:
        _, body = system.get(f"/api/ml/events/{quote(event_id)}")
        for stream in STREAMS:
            state = "dead" if event_id in dead[stream] else "done"
            found.equal(f"receipts of {event_id} in {stream}", body["streams"][stream]["state"], state)


def _pages(system: System, path: str, name: str) -> Iterator[dict[str, Any]]:
    cursor: str | None = None
    while True:
        status, body = system.get(path + (f"&cursor={cursor}" if cursor else ""))
        if status != 200:
            raise Unanswered(f"{path} was answered {status}: {str(body)[:300]}")
        yield from body[name]
        cursor = body["cursor"]
        if cursor is None:
            return


def moment(text: str) -> int:
    """Epoch ms of an RFC 3339 text."""
    return round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)
