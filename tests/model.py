"""A brute-force model of the log and its streams, and what the machine (machine.py) drives beside it: two instances."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import ALL_STREAMS, BRIDGE_ONLY, CANARY, REDRIVE
from pipeline.commit_log.lease import Lease
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.aggregates import Aggregates
from pipeline.streams.features import Features
from pipeline.streams.group import Group
from pipeline.streams.inference import Inference
from pipeline.streams.storage import Storage
from pipeline.streams.stream import Batch, Outcome, Stream
from pipeline.streams.worker import Shared
from tests.helpers import HOUR_MS, LOCAL, NOON, STREAMS, Clock

IDS, LATE_MS = 200, 5 * HOUR_MS
KINDS = ("ui_interaction", "ride_request_response", "slow", "poison", "payment", "unpriced")
USERS = ("user_0", "user_1", "user_2")
Event = dict[str, Any]
ADDRESSEES = {  # by the mask of a frame; canaries count for nobody
    ALL_STREAMS: frozenset(STREAMS),
    BRIDGE_ONLY: frozenset({"bridge"}),
    ALL_STREAMS | CANARY: frozenset[str](),
}
DIES = {"slow": {"features"}, "poison": {"aggregates"}, "unpriced": {"features", "inference"}}


@dataclass
class Entry:
    """One event in the log: for whom it is, and which streams cannot take it."""

    ordinal: int
    place: int
    event_id: str
    user: str
    to: frozenset[str]
    dies: frozenset[str]
    kind: str = ""
    again: bool = False  # sent again out of the dead letters, so not accepted anew

    @property
    def segment(self) -> int:
        return self.place >> 37


@dataclass
class Model:
    """All that was ever accepted, in order, and what was let go of."""

    entries: list[Entry] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    trimmed: set[int] = field(default_factory=set)
    redriven: set[tuple[str, int]] = field(default_factory=set)  # (stream, place)
    duplicates: int = 0

    def accepted(self, to: int) -> int:
        """How many events were taken for these addressees."""
        return sum(e.to == ADDRESSEES[to] and not e.again for e in self.entries)

    def before(self, stream: str, ordinal: int) -> list[Entry]:
        """The events for a stream before an ordinal."""
        return [e for e in self.entries if e.ordinal < ordinal and stream in e.to]

    def processed(self, stream: str, ordinal: int) -> int:
        return sum(stream not in e.dies for e in self.before(stream, ordinal))

    def dead(self, stream: str, ordinal: int) -> set[int]:
        """The places of a stream's dead letters once it has come to an ordinal."""
        return {
            e.place for e in self.before(stream, ordinal) if stream in e.dies and (stream, e.place) not in self.redriven
        }


class Mendable(Aggregates):
    """Cannot take "poison" at first, and can when it is sent again: as if its code had been mended meanwhile."""

    def process(self, batch: Batch, now: int) -> Outcome:
        outcome = super().process(batch, now)
        if batch.to & REDRIVE:
            return outcome
        for index, event in enumerate(batch.events):
            if event is not None and event.event_type == "poison":
                outcome.done -= 1
                outcome.dead.append((index, "poison"))
        return outcome


class Instance:
    """One process of Nexus: its lease, its log, and its group of streams, which it loses when it crashes."""

    def __init__(self, name: str, store: Store, clock: Clock) -> None:
        self.log, self.lease = Log(store), Lease(store, name, clock, lambda: False)
        make: dict[str, Callable[[], Stream]] = {
            "features": lambda: Features(store),
            "storage": lambda: Storage(store),
            "aggregates": lambda: Mendable(store),
            "inference": lambda: Inference(store),
        }
        self.shared = Shared(store, self.log, self.lease, clock, make, threading.Event(), lambda *_: None)
        self.group: Group | None = None

    def start(self) -> None:
        """What the runner does once it holds the lease."""
        positions = checkpoints.read(self.shared.store, LOCAL)
        start = min(positions.values(), key=lambda position: position.ordinal)
        group = Group(self.shared, start, positions, self._failed)
        for name, position in positions.items():
            group.load(name, position)
            group._committed[name] = position
        self.group = group

    def lead(self, size: int) -> None:
        """The next frames, for the leader alone."""
        assert self.group is not None
        self.group._at_hand = deque(self.log.read(self.group.front)[:size])
        if self.group._at_hand:
            self.group.lead()

    def follow(self) -> bool:
        """For the others, what the leader has had."""
        assert self.group is not None
        return self.group.follow()

    def checkpoint_step(self, answered: bool) -> bool | None:
        """One commit of the stream whose turn it is, and its answer unless that is left to the next step; whether it was made,
        None where that is not known. Raises Fenced."""
        group = self.group
        assert group is not None
        group.settle()
        name, pace = next(iter(group._paces.items()))
        group._paces[name] = group._paces.pop(name)
        if pace.steps is None:
            if not group._moved(name):
                return False
            pace.steps = group._checkpoint(name)
        while next(pace.steps, group) is not group:
            if group._under_way is not None:
                if not answered:
                    return None
                group.settle()
                return True
        pace.steps = None
        return False

    @property
    def committing(self) -> bool:
        """Has a checkpoint begun that is not through?"""
        return self.group is not None and any(pace.steps for pace in self.group._paces.values())

    def _failed(self, failure: Any) -> None:
        raise AssertionError(f"{failure.stream} threw {failure.error} at {failure.ordinal}")


def events() -> st.SearchStrategy[list[Event]]:
    """Batches out of a few ids, so that they come again; some late by hours, some that a stream cannot take."""
    one = st.tuples(st.integers(0, IDS), st.sampled_from(KINDS), st.sampled_from(USERS), st.integers(0, LATE_MS))
    return st.lists(one.map(lambda drawn: _event(*drawn)), min_size=2, max_size=6)


def batch(rng: random.Random) -> list[Event]:
    """The same, out of a generator of numbers."""
    size = rng.randint(2, 6)
    return [
        _event(rng.randint(0, IDS), rng.choice(KINDS), rng.choice(USERS), rng.randint(0, LATE_MS)) for _ in range(size)
    ]


def _event(number: int, kind: str, user: str, late: int) -> Event:
    """A posted event; `kind` is told beside it."""
    data: dict[str, Any] = {}
    event_type = {"slow": "ride_request_response", "unpriced": "payment"}.get(kind, kind)
    if event_type == "ride_request_response":
        data = {"response": "accepted", "response_time": "slow" if kind == "slow" else 2.5}
    elif event_type == "payment":
        data = {"transaction_id": f"t{number}", "amount": "free" if kind == "unpriced" else 10.0}
    return {
        "event_id": f"e{number}",
        "event_type": event_type,
        "user_id": user,
        "timestamp": NOON - late,
        "app_version": kind,  # by which the model knows it again
        "data": data,
    }
