"""The machine of the model-based test: it drives two real instances and the brute-force model (model.py), step by step.

Each step is one that a real process can die after: an accept, a batch processed, one chunk of a checkpoint, a take-over. After
every step the store must hold exactly what the model says of these positions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import pipeline.log as log_module
from pipeline import keys
from pipeline.commit_log import checkpoints, lease
from pipeline.commit_log.checkpoints import Audit, Progress
from pipeline.commit_log.frames import ALL_STREAMS, BRIDGE_ONLY, CANARY, Position, record
from pipeline.errors import Fenced
from pipeline.events import CANARY_USER, canary
from pipeline.features.tiles import Entity
from pipeline.log import Log, Request, Taken
from pipeline.models.fraud import Fraud
from pipeline.store import Store, as_hash
from pipeline.streams import fold
from pipeline.streams.features import Features
from pipeline.streams.storage import ROW
from tests.helpers import DAY_MS, HOUR_MS, NOON, STREAMS, Clock, parsed
from tests.model import ADDRESSEES, DIES, LATE_MS, USERS, Entry, Event, Instance, Model, batch, events

SEGMENT_BYTES = 1_000  # a frame or two, so that segments are sealed and trimmed within a few steps
HOURS = [(NOON - ago) // 1000 for ago in range(0, LATE_MS + 1, HOUR_MS)]
WHO = st.sampled_from([0, 1])
REDRIVEN = ("features", "aggregates", "inference")
decode = msgspec.json.Decoder().decode


@dataclass
class Seen:
    """What the store holds at one moment."""

    audit: Audit
    dead: dict[str, set[int]]  # stream -> places of its dead letters
    rows: list[int]  # places in the index of stored events
    counted: int  # events in the aggregates
    users: dict[str, Entity]
    scores: list[str]  # transactions
    model: Fraud

    def reached(self, stream: str) -> int:
        return self.audit.accounts[stream].position.ordinal


class Machine(RuleBasedStateMachine):
    """Arbitrary orders of what can happen. `store` is set by the test."""

    store: Store

    @initialize()
    def begin(self) -> None:
        self.store.call("FLUSHALL")
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(log_module, "SEGMENT_BYTES", SEGMENT_BYTES)
        self.patch.setattr(fold, "_CHUNK", 1)  # a commit per user: crashes fall between them
        self.clock, self.model, self.reader = Clock(NOON), Model(), Features(self.store)
        self.canaries = 0
        self.instances = [Instance(name, self.store, self.clock) for name in ("first", "second")]
        self.owner = 1
        self.take_over(0)

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule(
        who=WHO,
        batches=st.lists(events(), min_size=1, max_size=4),
        to=st.sampled_from([ALL_STREAMS] * 3 + [BRIDGE_ONLY]),
    )
    def accept(self, who: int, batches: list[list[Event]], to: int = ALL_STREAMS) -> None:
        """Any instance takes events, the standby too; some are for the bridge alone."""
        for posted in batches:
            taken = self._take(who, Request(parsed(posted, self.clock()), "test", to))
            fresh: dict[str, Event] = {}
            duplicates = []
            for index, event in enumerate(posted):
                if event["event_id"] in self.model.known or event["event_id"] in fresh:
                    duplicates.append(index)
                else:
                    fresh[event["event_id"]] = event
            self.each_id_is_taken_once(taken, duplicates)
            self.model.known |= fresh.keys()
            self.model.duplicates += len(duplicates)
            for index, event in enumerate(fresh.values()):
                kind, place = event["app_version"], taken.address * 8192 + index
                dies = ADDRESSEES[to] & DIES.get(kind, set())
                ordinal, user = taken.end - taken.taken + index, event["user_id"]
                self.model.entries.append(Entry(ordinal, place, event["event_id"], user, ADDRESSEES[to], dies, kind))

    def each_id_is_taken_once(self, taken: Taken, duplicates: list[int]) -> None:
        assert taken.duplicates == duplicates

    @rule(who=WHO)
    def send_canary(self, who: int) -> None:
        """An event of Nexus's own takes the same way and counts nowhere."""
        self.canaries += 1
        name, to = f"canary-{self.canaries}", ALL_STREAMS | CANARY
        taken = self._take(who, Request([canary(name, self.clock())], "nexus", to))
        place = taken.address * 8192
        self.model.entries.append(Entry(taken.end - 1, place, name, CANARY_USER, ADDRESSEES[to], frozenset()))

    def _take(self, who: int, request: Request) -> Taken:
        return self.instances[who].log.accept([request], self.clock())[0]

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
    def lead(self, who: int, size: int) -> None:
        """The owner goes on, the features first; so does one that was replaced and has not noticed."""
        if self.instances[who].group is not None:
            self.instances[who].lead(size)

    @rule(who=WHO)
    def follow(self, who: int) -> None:
        """The other streams go on."""
        if self.instances[who].group is not None:
            self.instances[who].follow()

    @rule(who=WHO)
    def work(self, who: int) -> None:
        """All there is, and its checkpoint."""
        if self.instances[who].group is not None:
            self.instances[who].lead(1_000)
            while self.instances[who].follow():
                pass
            self._commit(who, whole=True)

    @rule(who=WHO, answered=st.booleans())
    def checkpoint_step(self, who: int, answered: bool = True) -> None:
        self._commit(who, whole=False, answered=answered)

    @rule(who=WHO)
    def checkpoint(self, who: int) -> None:
        self._commit(who, whole=True)

    def _commit(self, who: int, whole: bool, answered: bool = True) -> None:
        instance = self.instances[who]
        if instance.group is None:
            return
        try:
            wrote = instance.checkpoint_step(answered)
            while whole and (
                instance.committing or any(instance.group._moved(name) for name in instance.group.streams)
            ):
                wrote = instance.checkpoint_step(answered) or wrote
        except Fenced:
            assert self.owner != who, "the owner was refused"
            instance.group = None
        else:
            self.only_the_owner_writes(who, wrote)

    def only_the_owner_writes(self, who: int, wrote: bool | None) -> None:
        assert self.owner == who or not wrote, "one that was replaced has written"

    @rule(who=WHO)
    def crash(self, who: int) -> None:
        self.instances[who].group = None

    @rule(size=st.integers(1, 50))
    def deliver(self, size: int) -> None:
        """The bridge, frame by frame."""
        instance = self.instances[self.owner]
        for frame in instance.log.read(checkpoints.read(self.store, ["bridge"])["bridge"])[:size]:
            done = len(frame.records) if frame.to & BRIDGE_ONLY and not frame.to & CANARY else 0
            commands = checkpoints.advance(Progress("bridge", frame.after(), done), self.clock())
            checkpoints.commit(self.store, instance.lease.epoch, commands)

    @rule(stream=st.sampled_from(REDRIVEN), twice=st.booleans())
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
        self.each_letter_is_sent_again_once(letters, places)
        for number, (entry, place) in enumerate(zip(dead, places, strict=True)):
            self.model.redriven.add((stream, entry.place))
            dies = entry.dies & {stream} - {"aggregates"}  # which has been mended since
            to = frozenset({stream})
            again = Entry(ordinal + number, place, entry.event_id, entry.user, to, dies, entry.kind, again=True)
            self.model.entries.append(again)

    def each_letter_is_sent_again_once(self, letters: list[Any], places: list[int]) -> None:
        assert len(places) == len(letters)

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
        self.nothing_is_trimmed_that_a_stream_has_yet_to_read(gone)
        self.model.trimmed.add(segment)
        self.model.known -= {e.event_id for e in gone if not e.again}
        return True

    def nothing_is_trimmed_that_a_stream_has_yet_to_read(self, gone: list[Entry]) -> None:
        slowest = min(position.ordinal for position in checkpoints.read(self.store, STREAMS).values())
        assert all(e.ordinal < slowest for e in gone)

    @rule(seed=st.integers(0, 2**32 - 1))
    def burst(self, seed: int) -> None:
        """Many steps of the same kinds at once: deeper than single draws come, in the same time."""
        rng = random.Random(seed)

        def some() -> list[list[Event]]:
            return [batch(rng) for _ in range(rng.randint(1, 4))]

        steps: list[tuple[int, Callable[[int], None]]] = [
            (5, lambda who: self.accept(who, some())),
            (1, lambda who: self.accept(who, some(), BRIDGE_ONLY)),
            (1, self.send_canary),
            (5, lambda who: self.lead(who, rng.randint(1, 4))),
            (5, self.follow),
            (5, self.checkpoint_step),
            (2, self.checkpoint),
            (2, self.work),
            (1, self.crash),
            (2, self.take_over),
            (2, lambda _: self.deliver(rng.randint(1, 50))),
            (1, lambda _: self.redrive(rng.choice(REDRIVEN), rng.random() < 0.3)),
            (1, lambda _: self.trim()),
        ]
        for step in rng.choices([s for _, s in steps], [weight for weight, _ in steps], k=25):
            step(self.owner if rng.random() < 0.7 else 1 - self.owner)
            self.all_holds()

    @invariant()
    def all_holds(self) -> None:
        seen = self._look()
        self.accounts_are_whole(seen)
        self.each_event_is_stored_once(seen)
        self.each_event_is_counted_once(seen)
        self.each_user_has_each_event_once(seen)
        self.each_payment_is_scored_once(seen)

    def _look(self) -> Seen:
        audit = checkpoints.audit(self.store)
        segments, users = range(1, audit.head.segment + 1), [*USERS, CANARY_USER]
        days = sorted({day // DAY_MS for day in (NOON, self.clock())})
        answers = iter(
            self.store.many(
                [
                    *[("HKEYS", keys.DEAD + stream) for stream in STREAMS],
                    ("MGET", *[f"{keys.ROWS}{segment}" for segment in segments]),
                    *[("HGET", f"{keys.AGGREGATE}3600:{hour}", "all") for hour in HOURS],
                    *[("HGETALL", keys.USER + user) for user in users],
                    *[("HKEYS", f"{keys.SCORES}{day}") for day in days],
                    ("GET", keys.MODEL + "fraud"),
                ]
            )
        )
        dead = {stream: {int(name.rpartition(b"-")[2]) for name in next(answers)} for stream in STREAMS}
        packed = b"".join(filter(None, next(answers)))
        rows = [int(place) for place in np.frombuffer(packed, ROW)["place"]]
        counted = sum(int(next(answers) or 0) for _ in HOURS)
        hashes = {user: as_hash(next(answers)) for user in users}
        entities = {user: self.reader.windows.load(flat) for user, flat in hashes.items() if flat}
        scores = [name.decode() for _ in days for name in next(answers)]
        raw = next(answers)
        model = msgspec.msgpack.decode(raw, type=Fraud) if raw else Fraud()
        return Seen(audit, dead, rows, counted, entities, scores, model)

    def accounts_are_whole(self, seen: Seen) -> None:
        audit = seen.audit
        assert audit.unexplained == 0, audit.accounts
        assert audit.head.accepted == self.model.accepted(ALL_STREAMS)
        assert audit.head.bridge_only == self.model.accepted(BRIDGE_ONLY)
        assert audit.head.duplicates == self.model.duplicates
        for stream in STREAMS:
            account = audit.accounts[stream]
            dead = self.model.dead(stream, account.position.ordinal)
            assert seen.dead[stream] == dead
            assert account.dead == len(dead)
            assert account.processed == self.model.processed(stream, account.position.ordinal)

    def each_event_is_stored_once(self, seen: Seen) -> None:
        before = self.model.before("storage", seen.reached("storage"))
        assert sorted(seen.rows) == sorted(e.place for e in before if e.segment not in self.model.trimmed)

    def each_event_is_counted_once(self, seen: Seen) -> None:
        # The poison that Mendable gave up was counted by the stream below it, and once more when sent again.
        assert seen.counted == len(self.model.before("aggregates", seen.reached("aggregates")))

    def each_user_has_each_event_once(self, seen: Seen) -> None:
        reached = seen.reached("features")
        owned = Counter(e.user for e in self.model.before("features", reached) if "features" not in e.dies)
        assert set(owned) <= set(seen.users) <= set(USERS)
        for user, entity in seen.users.items():
            upto = max(entity.position, reached)  # a chunk that was written is ahead of the checkpoint
            expected = [e for e in self.model.before("features", upto) if e.user == user and "features" not in e.dies]
            assert self.reader.windows.values(entity, NOON)["event_count_24h"] == len(expected)

    def each_payment_is_scored_once(self, seen: Seen) -> None:
        paid = [e for e in self.model.before("inference", seen.reached("inference")) if e.kind == "payment"]
        assert seen.model.scored == len(paid)
        assert sorted(seen.scores) == sorted({e.event_id.replace("e", "t") for e in paid})
