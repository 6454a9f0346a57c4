"""Clients of the chaos run: they post events with known ids, retry until answered, send some twice and some late."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chaos.system import System, Unanswered

INGEST = "/api/ml/events/ingest"
BATCH_SIZES = (1, 5, 20, 100, 300)
LATE_MS = (2 * 3_600_000, 5 * 3_600_000)  # late events stay clear of the edges of the one-hour windows
SCREENS = ("map", "earnings", "trip", "profile")
_ANSWER_S = 8.0
_GIVE_UP_S = 240.0  # for one batch: far beyond the longest outage that a run makes

Batch = list[dict[str, Any]]


@dataclass
class Ledger:
    """What all clients sent and were told. Guarded by `lock`."""

    sent: dict[str, dict[str, Any]] = field(default_factory=dict)  # id -> the event as posted, with its source
    acknowledged: set[str] = field(default_factory=set)
    figures: Counter[str] = field(default_factory=Counter)
    contradictions: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, **figures: int) -> None:
        with self.lock:
            self.figures.update(figures)

    def contradiction(self, text: str) -> None:
        with self.lock:
            self.contradictions.append(text)


class Client(threading.Thread):
    """One device fleet: its own ids and source, its own order decided by the seed.

    `share()` says which part of its events (0 to 1) may have been sent by now: load lasts as long as the faults do.
    """

    def __init__(self, system: System, ledger: Ledger, number: int, seed: int, events: int, share: Callable[[], float]):
        super().__init__(name=f"client-{number}", daemon=True)
        self._system, self._ledger, self._number, self._events, self._share = system, ledger, number, events, share
        self._random = random.Random(f"{seed}/{number}")
        self._users = max(10, events // 100)
        self._source = f"fleet-{number}"
        self._made = 0
        self._transactions: list[tuple[str, str]] = []
        self.gave_up: str | None = None

    def run(self) -> None:
        held: list[Batch] = []
        try:
            while self._made < self._events:
                if self._made > self._events * self._share():
                    time.sleep(0.02)
                    continue
                self._turn(held)
            for batch in held:
                self._post(batch)
        except TimeoutError as error:
            self.gave_up = str(error)

    def _turn(self, held: list[Batch]) -> None:
        pick = self._random.random
        if held and pick() < 0.15:
            self._post(held.pop(0))
            return
        batch = self._batch(min(self._random.choice(BATCH_SIZES), self._events - self._made))
        if pick() < 0.05:
            held.append(batch)  # it arrives late, behind batches made after it
            self._ledger.count(late_batches=1)
            return
        self._post(batch)
        if pick() < 0.1:
            self._post(batch, again=True)
        elif pick() < 0.05:
            held.append(batch)  # and once more, much later

    def _batch(self, size: int) -> Batch:
        batch = [self._event() for _ in range(size)]
        with self._ledger.lock:
            for event in batch:
                self._ledger.sent[event["event_id"]] = {**event, "source": self._source}
        return batch

    def _event(self) -> dict[str, Any]:
        rng, number = self._random, self._made
        self._made += 1
        now = time.time_ns() // 1_000_000
        late = rng.random() < 0.03
        event: dict[str, Any] = {
            "event_id": f"c{self._number}-{number}",
            "timestamp": now - (rng.randrange(*LATE_MS) if late else rng.randrange(2_000)),
            "session_id": f"s{self._number}-{rng.randrange(self._users)}",
            "device_type": rng.choice(("android", "ios")),
        }
        self._ledger.count(late_events=int(late))
        return event | self._kind(rng, rng.randrange(self._users), number)

    def _kind(self, rng: random.Random, user: int, number: int) -> dict[str, Any]:
        """Type, user and data. About one in 500 lacks what a stream needs, and belongs to the dead letters."""
        name, roll, broken = self._number, rng.random(), rng.random() < 0.004
        if roll < 0.5:
            data = {
                "request_id": f"r{number}",
                "response": rng.choice(("accepted", "rejected")),
                "response_time": "slow" if broken else rng.randrange(1, 60) / 4,  # quarters: their sums are exact
            }
            return {"event_type": "ride_request_response", "user_id": f"driver{name}-{user}", "data": data}
        rider = f"rider{name}-{user}"
        if roll < 0.65:
            place = {"lat": 14.5 + rng.random() / 10, "lng": 121.0 + rng.random() / 10}
            return {
                "event_type": "ride_request",
                "user_id": rider,
                "location": place,
                "data": {"request_id": f"r{number}"},
            }
        if roll < 0.85:
            amount: Any = "free" if broken else round(rng.lognormvariate(5, 0.6), 2)
            transaction = f"t{name}-{number}"
            if not broken:
                self._transactions = [*self._transactions[-200:], (transaction, rider)]
            data = {"transaction_id": transaction, "amount": amount, "merchant_id": f"driver{name}-{user}"}
            return {"event_type": "payment", "user_id": rider, "data": data}
        if roll < 0.9 and self._transactions:
            transaction, payer = self._transactions.pop(rng.randrange(len(self._transactions)))
            data = {"transaction_id": transaction, "is_fraud": int(rng.random() < 0.5)}
            return {"event_type": "fraud_report", "user_id": payer, "data": data}
        data = {"screen": rng.choice(SCREENS), "element": f"button{rng.randrange(9)}"}
        return {"event_type": "ui_interaction", "user_id": rider, "data": data}

    def _post(self, batch: Batch, again: bool = False) -> None:
        """Post until there is a 202; every earlier answer may have been lost on its way."""
        ids = [event["event_id"] for event in batch]
        with self._ledger.lock:
            known = all(event_id in self._ledger.acknowledged for event_id in ids)
        deadline = time.monotonic() + _GIVE_UP_S
        tries = 0
        while True:
            tries += 1
            wait_s = self._random.uniform(0.05, 0.3)
            try:
                status, body = self._system.post(INGEST, {"events": batch, "source": self._source}, timeout_s=_ANSWER_S)
            except Unanswered:
                self._ledger.count(lost_answers=1)
            else:
                if status == 202:
                    break
                if status != 503:
                    self._ledger.contradiction(f"{len(batch)} good events were answered {status}: {str(body)[:300]}")
                self._ledger.count(refused=1)
            if time.monotonic() > deadline:
                raise TimeoutError(f"a batch of {self._source} had no 202 in {_GIVE_UP_S:g} s")
            time.sleep(wait_s)
        self._check(batch, ids, body, known)
        with self._ledger.lock:
            self._ledger.acknowledged.update(ids)
        self._ledger.count(
            batches=1, posts=tries, resends=tries - 1 + int(again or known), duplicates=body["duplicates"]
        )

    def _check(self, batch: Batch, ids: list[str], body: dict[str, Any], known: bool) -> None:
        say = self._ledger.contradiction
        if body["accepted"] + body["duplicates"] != len(batch) or body["rejected"]:
            say(f"{len(batch)} good events, and the verdict is {str(body)[:300]}")
        if body["event_ids"] != ids:
            say(f"the ids of a batch came back changed: {str(body['event_ids'])[:200]}")
        if known and body["accepted"]:
            say(f"{body['accepted']} events acknowledged before were accepted again, first of batch {ids[0]}")
