"""Features: definitions against events per second, reads with provenance, backfill, past values, memory per user."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from benchmarks import bench_endtoend, table
from benchmarks.harness import Options
from benchmarks.peers import launch
from benchmarks.six_features import SIX, SixFeatures
from benchmarks.table import Row
from benchmarks.traffic import event as event_text
from benchmarks.traffic import name_of
from pipeline.catalogue import FEATURES
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import Frame, Position
from pipeline.commit_log.lease import Lease
from pipeline.definitions import Feature
from pipeline.events import Parsed, parse
from pipeline.feature_store import FeatureStore
from pipeline.features import offline
from pipeline.log import Log, Request
from pipeline.store import Store
from pipeline.streams.features import Features
from pipeline.streams.storage import EventStore, Storage
from pipeline.streams.stream import Batch
from pipeline.tools.training_set import Label, TrainingSet

TITLE = "Features: the cost of definitions, reads, history and backfill"
USERS = 10_000
FRAMES_PER_BATCH, BATCHES_PER_CHECKPOINT = 10, 12
NAMES = tuple(f.name for f in FEATURES if f.entity == "user")[:25]


def run(options: Options) -> list[Row]:
    events = options.pick(20_000, 60_000, 200_000)
    with launch.store(options.data) as server:
        bench = Bench(Store(f"unix://{server.socket}"), events)
        rows = [
            *bench.definitions(options.repetitions),
            *bench.memory(),
            *bench.reads(options.pick(50, 300)),
            *bench.past(options.pick(3, 10)),
            *bench.backfill(),
            *bench.training(options.pick(200, 1_000)),
        ]
    return [*rows, *end_to_end(options)]


def end_to_end(options: Options) -> list[Row]:
    """What the whole catalogue costs of the rate through all five streams."""
    events = options.pick(40_000, 100_000, 300_000)
    every, six = [], []
    for _ in range(options.repetitions):
        every.append(bench_endtoend.nexus(options.data, events)[0])
        six.append(bench_endtoend.nexus(options.data, events, SixFeatures)[0])
    name, more = f"end to end with all {len(FEATURES)} definitions", {"target": 0.5, "aim": 1.0, "more_is_better": True}
    return [
        table.of(f"end to end, {len(SIX)} definitions", six, "events/s", more_is_better=True),
        table.of(name, every, "events/s", more_is_better=True),
        table.ratio(name, every, six, f"{len(SIX)} definitions", **more),
    ]


def definitions_of(count: int) -> tuple[Feature, ...]:
    """The first version's six, then the others until there are so many."""
    first = [f for f in FEATURES if f.name in SIX]
    others = [f for f in FEATURES if f.name not in SIX]
    chosen = (first + others)[:count]
    names = {f.name for f in chosen}
    return tuple(f for f in chosen if names.issuperset(f.of or ()))


class Bench:
    """A log of realistic events in a store of its own, and what is measured over it."""

    def __init__(self, store: Store, events: int) -> None:
        self.store, self.log, self.now = store, Log(store), time.time_ns() // 1_000_000
        self.events = events
        random = Random(1)
        for at in range(0, events, 100):
            texts = [event_text(random, name_of(int(USERS * random.random() ** 3)), i) for i in range(100)]
            self.log.accept([Request([self._parsed(text, at) for text in texts], "bench")], self.now)
        self.frames = self._all()

    def _parsed(self, text: str, at: int) -> Parsed:
        raw = msgspec.json.decode(text.replace("@@@@@@@@@@", f"{at:010d}"))
        return parse({**raw, "timestamp": self.now - 600_000 + at * 600_000 // self.events}, self.now)

    def _all(self) -> list[Frame]:
        found: list[Frame] = []
        position = Position()
        while some := self.log.read(position, 8 << 20):
            found += some
            position = some[-1].after()
        return found

    def _forget(self) -> None:
        """No tile of any entity is left in the store."""
        for kind in ("user", "merchant", "zone", "paid", "definitions", "backfill"):
            for key in list(self.store.client.scan_iter(f"ml:{{p}}:{kind}*", 5_000)):
                self.store.call("UNLINK", key)

    def feed(self, features: Sequence[Feature]) -> tuple[Features, float]:
        """A stream that has taken everything in, checkpoints included, and the processor seconds that took here."""
        self._forget()
        stream = Features(self.store, features)
        batches = [
            Batch(self.frames[at : at + FRAMES_PER_BATCH]) for at in range(0, len(self.frames), FRAMES_PER_BATCH)
        ]
        for batch in batches:
            _ = batch.zones  # another stream has computed them already
        gc.collect()
        gc.freeze()
        began = time.thread_time()
        for turn, batch in enumerate(batches, 1):
            stream.process(batch, self.now)
            if turn % BATCHES_PER_CHECKPOINT == 0 or turn == len(batches):
                cut = stream.cut(self.now)
                for chunk in cut.chunks:
                    self.store.many(chunk)
                self.store.many(cut.final)
                cut.done()
        took = time.thread_time() - began
        gc.unfreeze()
        return stream, took

    def definitions(self, repetitions: int) -> list[Row]:
        counts = (1, len(SIX), 12, 25, len(FEATURES))
        found: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(repetitions):
            for count in counts:
                found[count].append(self.events / self.feed(definitions_of(count))[1])
        rows = [
            table.of(f"features stream, {count} definitions", rates, "events/s of one core", more_is_better=True)
            for count, rates in found.items()
        ]
        every, six = found[len(FEATURES)], found[len(SIX)]
        note = "of the stream alone, checkpoints included"
        name = f"rate with all {len(FEATURES)} definitions"
        return [
            *rows,
            table.ratio(
                name, every, six, f"{len(SIX)} definitions", target=0.5, aim=1.0, more_is_better=True, note=note
            ),
        ]

    def memory(self) -> list[Row]:
        before = self._used()
        self._forget()
        empty = self._used()
        stream, _ = self.feed(FEATURES)
        users = stream.fold.tables["user"]
        everyone = sum(len(table.entities) for table in stream.fold.tables.values())
        tiles = sorted(users.windows.layout.memory(entity) for entity in users.entities.values())
        busy = users.windows.new()
        return [
            table.of("tiles of a user, mean", [sum(tiles) / len(tiles)], "B", note=f"{len(tiles)} users"),
            table.of("tiles of the busiest user", [float(tiles[-1])], "B", note="at most 60 tiles for each window"),
            table.of("a user's tiles at their bound", [float(users.windows.layout.bound())], "B", note=f"{len(busy.values)} families"),
            table.of("store, each entity", [(self._used() - empty) / everyone], "B", note=f"{everyone} entities; {before} B before"),
        ]  # fmt: skip

    def _used(self) -> int:
        return int(self.store.client.info("memory")["used_memory"])

    def reads(self, times: int) -> list[Row]:
        stream, _ = self.feed(FEATURES)
        events = EventStore(self.store, self.log, Storage(self.store).unwritten)
        settings: Any = {"HYBRID_FEATURE_MODE": True, "FEATURE_SYNC_INTERVAL": 300}
        store = FeatureStore(self.store, events, settings, lambda: stream, lambda: self.now)
        cold = FeatureStore(self.store, events, settings, lambda: None, lambda: self.now)
        names, random = frozenset(NAMES), Random(2)
        everyone = [name_of(int(USERS * random.random() ** 3)) for _ in range(2_000)]
        for user in everyone[::2]:
            value = {
                "features": {"acceptance_rate": 0.5, "py_activity_score": 0.1},
                "computed_at": "2026-01-01T00:00:00Z",
            }
            self.store.call("SET", f"features:{user}", msgspec.json.encode(value))
        note = f"{len(NAMES)} features with provenance, some read a moment before; half of the users have the Python service's, too"
        rows = []
        for label, reader, count in (
            ("1 user", store, 1),
            ("100 users", store, 100),
            ("1 user, not in memory", cold, 1),
            ("100 users, not in memory", cold, 100),
        ):
            took = _milliseconds(lambda: reader.combine(random.sample(everyone, count), names), times)  # noqa: B023
            rows.append(table.of(f"combined vector of {label}, median", [took[len(took) // 2]], "ms", note=note))
            rows.append(table.of(f"combined vector of {label}, p99", [took[len(took) * 99 // 100]], "ms"))
        return rows

    def past(self, times: int) -> list[Row]:
        storage = Storage(self.store)
        for at in range(0, len(self.frames), FRAMES_PER_BATCH):
            storage.process(Batch(self.frames[at : at + FRAMES_PER_BATCH]), self.now)
        events = EventStore(self.store, self.log, storage.unwritten)
        windows = Features(self.store).windows
        counts: dict[str, int] = {}
        for frame in self.frames:
            for event in Batch([frame]).events:
                if event is not None:
                    counts[event.user_id] = counts.get(event.user_id, 0) + 1
        ordered = sorted(counts, key=lambda user: counts[user])
        rows = []
        for user in (ordered[0], ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]):
            took = _milliseconds(lambda: offline.past(events, windows, user, self.now), times)  # noqa: B023
            note = f"of {self.events} events in the log"
            rows.append(table.of(f"as_of, a user of {counts[user]} events", [took[len(took) // 2]], "ms", note=note))
        return rows

    def backfill(self) -> list[Row]:
        self._forget()
        lease = Lease(self.store, "bench", lambda: self.now, lambda: True)
        lease.take()
        self.feed(definitions_of(len(SIX)))
        end = self.frames[-1].after()
        stream = Features(self.store, definitions_of(len(SIX)))
        checkpoints.commit(self.store, lease.epoch, checkpoints.advance(Progress("features", end), self.now))
        stream.adopt(None, fresh=True)
        stream = self._with_definitions(stream, lease)
        began = time.monotonic()
        while stream.backfill is not None:
            stream.backfill.step(self.now)
        rate = self.events / (time.monotonic() - began)
        note = f"from {len(SIX)} to {len(FEATURES)} definitions, nothing else going on; beside events it takes half of each second"
        return [table.of("backfill", [rate], "events/s", more_is_better=True, note=note)]

    def _with_definitions(self, before: Features, lease: Lease) -> Features:
        from pipeline import keys
        from pipeline.features.families import pack_definitions

        self.store.call("SET", keys.DEFINITIONS, pack_definitions(before.served, before.fold.families))
        stream = Features(self.store, FEATURES, epoch=lambda: lease.epoch)
        stream.load(self.now)
        return stream

    def training(self, labels: int) -> list[Row]:
        random = Random(5)
        rows = [
            Label({"user_id": name_of(int(USERS * random.random() ** 3))}, self.now - random.randrange(600_000))
            for _ in range(labels)
        ]
        maker = TrainingSet(self.log, [f for f in FEATURES if f.name in NAMES])
        began = time.monotonic()
        done = sum(1 for _ in maker.join(rows))
        took = time.monotonic() - began
        note = f"{labels} labels with {len(maker.features)} features over {self.events} events"
        return [
            table.of("training set, events", [self.events / took], "events/s", more_is_better=True, note=note),
            table.of("training set, labels", [done / took], "labels/s", more_is_better=True),
        ]


def _milliseconds(work: Callable[[], Any], times: int) -> list[float]:
    """How long each run took, ascending."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1000)
    return sorted(took)
