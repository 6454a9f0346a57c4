"""A brute-force model of the log and its streams, and the machine that drives the real ones beside it, step by step.

The machine has two instances. Each step is one that a real process can die after: an accept, a batch processed, one
chunk of a checkpoint, a take-over. After every step the store must hold exactly what the model says of these positions.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import pipeline.log as log_module
from pipeline import checkpoints, keys, lease
from pipeline.checkpoints import Progress
from pipeline.errors import Fenced
from pipeline.frames import REDRIVE, Position, record
from pipeline.lease import Lease
from pipeline.log import Log, Request
from pipeline.store import Store
from pipeline.streams import fold
from pipeline.streams.aggregates import Aggregates
from pipeline.streams.features import Features
from pipeline.streams.inference import Inference
from pipeline.streams.storage import ROW, Storage
from pipeline.streams.stream import Batch, Outcome, Stream
from pipeline.streams.worker import Group, Shared
from tests.helpers import HOUR_MS, LOCAL, NOON, STREAMS, Clock, parsed

SEGMENT_BYTES = 1_000  # a frame or two, so that segments are sealed and trimmed within a few steps
IDS, LATE_MS = 200, 5 * HOUR_MS
KINDS = ("ui_interaction", "ride_request_response", "slow", "poison", "payment")
USERS = ("user_0", "user_1", "user_2")
Event = dict[str, Any]
decode = msgspec.json.Decoder().decode


@dataclass
class Entry:
    """One event in the log: for whom it is, and which streams cannot take it."""

    ordinal: int
    place: int
    event_id: str
    user: str
    to: frozenset[str]
    dies: frozenset[str]
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
        assert len(set(positions.values())) == 1, "streams that commit together stand together"
        group = Group(self.shared, positions["storage"], positions, self._failed)
        for name, position in positions.items():
            group.load(name, position)
            group._committed[name] = position
        self.group = group

    def process(self, size: int) -> None:
        """One pass over the next frames."""
        assert self.group is not None
        frames = self.log.read(self.group.position)[:size]
        if run := next(self.group._runs(frames), None):
            self.group._pass(Batch(run, self.group.position.index))

    def checkpoint_step(self) -> bool:
        """One commit; False where there is nothing to write. Raises Fenced."""
        group = self.group
        assert group is not None
        if group._steps is None:
            if not group._moved():
                return False
            group._steps = group._checkpoint()
        if next(group._steps, group) is group:
            group._steps = None
        return True

    def _failed(self, failure: Any) -> None:
        raise AssertionError(f"{failure.stream} threw {failure.error} at {failure.ordinal}")


def events() -> st.SearchStrategy[list[Event]]:
    """Batches out of a few ids, so that they come again; some late by hours, some that a stream cannot take."""
    one = st.tuples(st.integers(0, IDS), st.sampled_from(KINDS), st.sampled_from(USERS), st.integers(0, LATE_MS))
    return st.lists(one.map(lambda drawn: _event(*drawn)), min_size=2, max_size=6)


def _batch(rng: random.Random) -> list[Event]:
    """The same, out of a generator of numbers."""
    size = rng.randint(2, 6)
    return [
        _event(rng.randint(0, IDS), rng.choice(KINDS), rng.choice(USERS), rng.randint(0, LATE_MS)) for _ in range(size)
    ]


def _event(number: int, kind: str, user: str, late: int) -> Event:
    data: dict[str, Any] = {}
    if kind in ("slow", "ride_request_response"):
        data = {"response": "accepted", "response_time": "slow" if kind == "slow" else 2.5}
    elif kind == "payment":
        data = {"transaction_id": f"t{number}", "amount": 10.0}
    event_type = "ride_request_response" if kind == "slow" else kind
    stamp = NOON - late
    return {"event_id": f"e{number}", "event_type": event_type, "user_id": user, "timestamp": stamp, "data": data}


WHO = st.sampled_from([0, 1])


class Machine(RuleBasedStateMachine):
    """Arbitrary orders of what can happen. `store` is set by the test."""

    store: Store

    @initialize()
    def begin(self) -> None:
        self.store.call("FLUSHALL")
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(log_module, "SEGMENT_BYTES", SEGMENT_BYTES)
        self.patch.setattr(fold, "_CHUNK", 1)  # a commit per user: crashes fall between them
        self.clock, self.model = Clock(NOON), Model()
        self.instances = [Instance(name, self.store, self.clock) for name in ("first", "second")]
        self.owner = 1
        self.take_over(0)

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule(who=WHO, batches=st.lists(events(), min_size=1, max_size=4))
    def accept(self, who: int, batches: list[list[Event]]) -> None:
        """Any instance takes events, the standby too."""
        for batch in batches:
            self._accept(who, batch)

    def _accept(self, who: int, batch: list[Event]) -> None:
        taken = self.instances[who].log.accept([Request(parsed(batch, self.clock()), "test")], self.clock())[0]
        fresh, duplicates = [], []
        for index, event in enumerate(batch):
            if event["event_id"] in self.model.known:
                duplicates.append(index)
            else:
                self.model.known.add(event["event_id"])
                fresh.append(event)
        assert taken.duplicates == duplicates
        for index, event in enumerate(fresh):
            dies = {"features"} if event["data"].get("response_time") == "slow" else set()
            dies |= {"aggregates"} if event["event_type"] == "poison" else set()
            place, ordinal = taken.address * 8192 + index, taken.end - taken.taken + index
            entry = Entry(ordinal, place, event["event_id"], event["user_id"], frozenset(STREAMS), frozenset(dies))
            self.model.entries.append(entry)
        self.model.duplicates += len(duplicates)

    @rule(who=WHO)
    def take_over(self, who: int) -> None:
        """An instance starts its streams: the holder after a failure of its own, another once the lease has run out."""
        instance = self.instances[who]
        if self.owner != who:
            self.clock.advance(lease.TTL_MS)
            assert instance.lease.take()
        else:
            assert instance.lease.raise_epoch()
        self.owner = who
        instance.start()

    @rule(who=WHO, size=st.integers(1, 4))
    def process(self, who: int, size: int) -> None:
        """The owner goes on; so does one that was replaced and has not noticed."""
        if self.instances[who].group is not None:
            self.instances[who].process(size)

    @rule(who=WHO)
    def work(self, who: int) -> None:
        """All there is, and its checkpoint."""
        if self.instances[who].group is not None:
            self.instances[who].process(1_000)
            self._commit(who, whole=True)

    @rule(who=WHO)
    def checkpoint_step(self, who: int) -> None:
        self._commit(who, whole=False)

    @rule(who=WHO)
    def checkpoint(self, who: int) -> None:
        self._commit(who, whole=True)

    def _commit(self, who: int, whole: bool) -> None:
        instance = self.instances[who]
        if instance.group is None:
            return
        try:
            wrote = instance.checkpoint_step()
            while wrote and whole and instance.group._steps is not None:
                instance.checkpoint_step()
        except Fenced:
            assert self.owner != who, "the owner was refused"
            instance.group = None
        else:
            assert self.owner == who or not wrote, "one that was replaced has written"

    @rule(who=WHO)
    def crash(self, who: int) -> None:
        self.instances[who].group = None

    @rule(size=st.integers(1, 50))
    def deliver(self, size: int) -> None:
        """The bridge, frame by frame."""
        instance = self.instances[self.owner]
        for frame in instance.log.read(checkpoints.read(self.store, ["bridge"])["bridge"])[:size]:
            done = len(frame.records) if frame.to & 16 else 0
            commands = checkpoints.advance(Progress("bridge", frame.after(), done), self.clock())
            checkpoints.commit(self.store, instance.lease.epoch, commands)

    @rule(stream=st.sampled_from(["features", "aggregates"]), twice=st.booleans())
    def redrive(self, stream: str, twice: bool) -> None:
        """Dead letters are sent again, also by two people at once."""
        bodies = {
            name.decode(): decode(raw)["body"] for name, raw in self.store.call("HGETALL", keys.DEAD + stream).items()
        }
        names = sorted(bodies)
        by_place = {e.place: e for e in self.model.entries}
        dead = [by_place[int(name.rpartition("-")[2])] for name in names]
        letters = []
        for name, entry in zip(names, dead, strict=True):
            assert entry.event_id in bodies[name]
            letters.append((stream, name, "test", record(NOON, bodies[name].encode())))
        if not letters:
            return
        ordinal = Log(self.store).head().ordinal
        log = self.instances[0].log
        assert log.redrive(letters, self.clock()) == [True] * len(letters)
        if twice:
            assert log.redrive(letters, self.clock()) == [False] * len(letters)
        places = self._places_from(ordinal)
        assert len(places) == len(letters), "sent again once each"
        for number, (entry, place) in enumerate(zip(dead, places, strict=True)):
            self.model.redriven.add((stream, entry.place))
            dies = entry.dies & {"features"}
            only = frozenset({stream})
            self.model.entries.append(
                Entry(ordinal + number, place, entry.event_id, entry.user, only, dies, again=True)
            )

    def _places_from(self, ordinal: int) -> list[int]:
        """The places of the events from an ordinal on, read from the log by a reader of its own."""
        log, found = Log(self.store), []
        at = Position(log.head().first_segment)
        while frames := log.read(at):
            found += [f.place(i) for f in frames for i in range(len(f.records)) if f.ordinal + i >= ordinal]
            at = frames[-1].after()
        return found

    @rule()
    def trim(self) -> None:
        """All that may be let go of."""
        while self._trim():
            pass

    def _trim(self) -> bool:
        instance = self.instances[self.owner]
        segment = instance.log.head().first_segment
        if not instance.log.trim(segment, instance.lease.epoch):
            return False
        gone = [e for e in self.model.entries if e.segment == segment]
        slowest = min(position.ordinal for position in checkpoints.read(self.store, STREAMS).values())
        assert all(e.ordinal < slowest for e in gone), "a stream has yet to read what was let go of"
        self.model.trimmed.add(segment)
        self.model.known -= {e.event_id for e in gone if not e.again}
        return True

    @rule(seed=st.integers(0, 2**32 - 1))
    def burst(self, seed: int) -> None:
        """Many steps of the same kinds at once: deeper than single draws come, in the same time."""
        rng = random.Random(seed)
        steps: list[tuple[int, Callable[[int], None]]] = [
            (6, lambda who: self.accept(who, [_batch(rng) for _ in range(rng.randint(1, 4))])),
            (5, lambda who: self.process(who, rng.randint(1, 4))),
            (5, self.checkpoint_step),
            (2, self.checkpoint),
            (2, self.work),
            (1, self.crash),
            (2, self.take_over),
            (2, lambda _: self.deliver(rng.randint(1, 50))),
            (1, lambda _: self.redrive(rng.choice(("features", "aggregates")), rng.random() < 0.3)),
            (1, lambda _: self.trim()),
        ]
        for step in rng.choices([s for _, s in steps], [weight for weight, _ in steps], k=25):
            step(self.owner if rng.random() < 0.7 else 1 - self.owner)
            self.accounts_are_whole()
            self.each_event_is_stored_once()
            self.each_event_is_counted_once()
            self.each_user_has_each_event_once()

    @invariant()
    def accounts_are_whole(self) -> None:
        audit = checkpoints.audit(self.store)
        assert audit.unexplained == 0, audit.accounts
        assert audit.head.accepted == sum(not e.again for e in self.model.entries)
        assert audit.head.duplicates == self.model.duplicates
        for stream in LOCAL:
            account = audit.accounts[stream]
            dead = self.model.dead(stream, account.position.ordinal)
            assert account.dead == len(dead)
            assert account.processed == self.model.processed(stream, account.position.ordinal)
            names = {int(name.rpartition(b"-")[2]) for name in self.store.call("HKEYS", keys.DEAD + stream)}
            assert names == dead

    @invariant()
    def each_event_is_stored_once(self) -> None:
        reached = checkpoints.read(self.store, ["storage"])["storage"].ordinal
        expected = [e.place for e in self.model.before("storage", reached) if e.segment not in self.model.trimmed]
        segments = {e.segment for e in self.model.entries}
        packed = b"".join(self.store.call("GET", f"{keys.ROWS}{segment}") or b"" for segment in sorted(segments))
        assert sorted(int(p) for p in np.frombuffer(packed, ROW)["place"]) == sorted(expected)

    @invariant()
    def each_event_is_counted_once(self) -> None:
        reached = checkpoints.read(self.store, ["aggregates"])["aggregates"].ordinal
        counted = 0
        for name in self.store.call("KEYS", keys.AGGREGATE + "3600:*"):
            counted += int(self.store.call("HGET", name, "all"))
        # The poison that Mendable gave up was counted by the stream below it, and once more when sent again.
        assert counted == len(self.model.before("aggregates", reached))

    @invariant()
    def each_user_has_each_event_once(self) -> None:
        features = Features(self.store)
        stored = features.read(USERS)
        reached = checkpoints.read(self.store, ["features"])["features"].ordinal
        owned = Counter(e.user for e in self.model.before("features", reached) if "features" not in e.dies)
        assert set(owned) <= set(stored)
        for user, entity in stored.items():
            upto = max(entity.position, reached)  # a chunk that was written is ahead of the checkpoint
            expected = [e for e in self.model.before("features", upto) if e.user == user and "features" not in e.dies]
            assert features.windows.values(entity, NOON)["event_count_24h"] == len(expected)
