"""Folding events into entities: the tiles of users, merchants and zones at work, in memory; the store has the rest.

The features stream folds what arrives, backfill what was stored before a definition came; both with this.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from pipeline import keys
from pipeline.commit_log.frames import REDRIVE
from pipeline.definitions import Entity as Kind
from pipeline.definitions import Feature, Malformed
from pipeline.events import CANARY_TYPE
from pipeline.features.extraction import Count, Counting, Dead, Owners, compile_counting
from pipeline.features.families import Family
from pipeline.features.read_lately import ReadLately
from pipeline.features.tiles import Entity
from pipeline.store import Call, Command, Store, as_hash
from pipeline.streams.payees import Made, Paid, Payees, merchant_of
from pipeline.streams.stream import UNDECODABLE, Batch, Outcome
from pipeline.windows import Windows

PAYMENT, REPORT = "payment", "fraud_report"
PREFIXES: Mapping[Kind, str] = {"user": keys.USER, "merchant": keys.MERCHANT, "zone": keys.ZONE}
_CHUNK, _CALLS = 40, 8  # entities of a call, and calls under way at once
_LARGER = 8  # times as many entities in a step of a checkpoint that takes seconds
Hash = Mapping[bytes, bytes]


class Table:
    """The entities of one kind. `dirty` are those that have something to write."""

    def __init__(self, store: Store, windows: Windows) -> None:
        self.windows, self.prefix = windows, PREFIXES[windows.kind]
        self.entities: dict[str, Entity] = {}
        self.dirty: dict[str, Entity] = {}
        self.read_lately = ReadLately(windows)
        self._store = store

    def loading(self, ids: Iterable[str]) -> Generator[None]:
        """Have these in memory, the unknown ones empty: asked for in the first step, taken in in the second."""
        absent = [i for i in ids if i not in self.entities]
        asking = self.asking(absent)
        next(asking)
        yield
        for i, flat in zip(absent, next(asking), strict=True):
            self.entities[i] = self.windows.load(flat) if flat else self.windows.new()

    def load(self, ids: Iterable[str]) -> None:
        """loading() at once."""
        for _ in self.loading(ids):
            pass

    def hashes(self, ids: Sequence[str]) -> list[Hash]:
        """What the store has of these; empty for the unknown ones."""
        asking = self.asking(ids)
        next(asking)
        return next(asking)

    def asking(self, ids: Sequence[str]) -> Iterator[list[Hash]]:
        """Nothing yet once the first ones are asked for, then all."""
        found: list[Hash] = []
        under_way: deque[Call] = deque()  # the store is at the next ones while this process takes the answer of one in
        try:
            for at in range(0, len(ids), _CHUNK):  # a command for each would cost this process five times as much
                if len(under_way) == _CALLS:
                    found += map(as_hash, under_way.popleft().result())
                some = [self.prefix + i for i in ids[at : at + _CHUNK]]
                under_way.append(self._store.begin("vectors", some, [0]))
            yield []
            while under_way:
                found += map(as_hash, under_way.popleft().result())
            yield found
        finally:
            for call in under_way:
                call.close()

    def evict(self, most: int) -> None:
        """Let go of the longest known beyond `most`, but of none that has something to write."""
        surplus = len(self.entities) - most
        if surplus > 0:
            for i in list(islice((i for i in self.entities if i not in self.dirty), surplus)):
                del self.entities[i]


@dataclass(frozen=True, slots=True)
class Counter:
    """How the events of a type are counted, and in which kinds of entities."""

    count: Count
    kinds: tuple[Kind, ...]


Work = tuple[str, Counter, list[int]]  # a type, how its events are counted, which they are


class Fold:
    """Counts each event once in every entity it is of.

    `suffix` tells the fields that guard this in an entity's hash apart from those of another fold over the same hashes.
    What one of the `judges` cannot take is not counted at all.
    """

    def __init__(
        self,
        store: Store,
        features: Sequence[Feature],
        families: Sequence[Family],
        retention_ms: int,
        suffix: bytes = b"",
        judges: Sequence[Windows] = (),
    ) -> None:
        self._store, self._judges = store, judges
        self.families = tuple(families)
        self.tables: dict[Kind, Table] = {
            kind: Table(store, Windows(features, families, kind, suffix)) for kind in PREFIXES
        }
        users = self.tables["user"].windows
        self._joins = REPORT in self.tables["merchant"].windows.event_types
        types = {f.event_type for f in families if f.event_type is not None} | ({PAYMENT} if self._joins else set())
        self._counters = {event_type: self._counter(event_type) for event_type in types}
        self._untyped = self._counter(None) if any(f.event_type is None for f in users.families) else None
        self._until = max((family.until for family in families), default=0)
        self.payees = Payees(store, retention_ms, over=not suffix)
        self._cutting: list[tuple[Table, dict[str, Entity]]] = []  # what the present checkpoint has yet to write
        self.ordinal = 0
        self.newest: dict[str, int] = {}  # event type -> the latest event time (ms) that was counted

    def take_over(self, before: Fold) -> None:
        """Go on where another fold, all of it written, stands."""
        self.ordinal, self.newest = before.ordinal, before.newest
        self.payees.take_over(before.payees)

    def share(self, kept: Sequence[Family], filled: str | None) -> None:
        """Leave the fields of these families alone, delete all others that are not this fold's; `filled` see Windows."""
        for table in self.tables.values():
            table.windows.kept = frozenset(family.id for family in kept)
            table.windows.filled = filled.encode() if filled is not None else None

    def clear(self) -> None:
        """Forget everything that is in memory."""
        self._cutting = []
        self.payees.clear()
        for table in self.tables.values():
            table.entities, table.dirty = {}, {}

    def _counter(self, event_type: str | None) -> Counter:
        untyped = any(f.event_type is None for f in self.tables["user"].windows.families)
        kinds = tuple(
            kind
            for kind, table in self.tables.items()
            if event_type in table.windows.event_types or (kind == "user" and untyped)
        )
        windows: dict[Kind, Counting] = {kind: table.windows for kind, table in self.tables.items()}
        return Counter(compile_counting(windows, event_type, kinds), kinds)

    def process(self, batch: Batch, now: int, upto: int | None = None) -> Outcome:
        """Count a batch, or its events before the ordinal `upto`: type by type, since every merge is exact in any order."""
        first, size = batch.first_ordinal, len(batch)
        if upto is not None:
            size = min(size, max(0, upto - first))
        dead: Dead = [(index, UNDECODABLE) for index in batch.undecodable if index < size]
        work = self._work(batch, size)
        ids: dict[Kind, Any] = {"user": batch.users, "merchant": self._payees_of(batch, work), "zone": batch.zones}
        earlier = self._load(batch, ids, work)
        owners: dict[Kind, Owners] = {k: Owners(ids[k], table.entities, {}) for k, table in self.tables.items()}
        filled = self._first_places(batch) if batch.to & REDRIVE and self._until else None
        payments: list[Made] = []
        reported: list[Made] = []
        for event_type, counter, indexes in work:
            if event_type == REPORT and self._joins:
                whose, reported = self.payees.join(batch, indexes, earlier, payments)
                owners["merchant"].ids.update(whose)  # type: ignore[union-attr]  # a dictionary
            if self._judges and counter is not self._untyped:
                indexes = self._judged(batch, indexes, dead)
            if filled is None:
                apart: list[int] = []
                latest = counter.count(indexes, batch.events, batch.ts, now, first, owners, apart, dead)
            else:
                apart, latest = indexes, 0
            for index in apart:
                latest = max(latest, self._count_apart(counter, batch, index, now, owners, filled, dead))
            if counter is not self._untyped and latest > self.newest.get(event_type, 0):
                self.newest[event_type] = latest
            if event_type == PAYMENT and self._joins:
                payments = self.payees.payments(batch, indexes, {index for index, _ in dead})
        lost = {index for index, _ in dead} if reported else ()
        self.payees.keep(batch, [*payments, *(made for made in reported if made[0] not in lost)])
        self.ordinal = first + size
        for kind, table in self.tables.items():
            counted = owners[kind].counted
            for entity in counted.values():
                entity.position = self.ordinal
            table.dirty.update(counted)
        if batch.ts:
            self.newest[""] = max(self.newest.get("", 0), min(max(batch.ts), now))  # of any type
        return Outcome(size - len(dead), sorted(dead))

    def _work(self, batch: Batch, size: int) -> list[Work]:
        """The events to be counted, by type: payments before the reports that may be about them."""
        work = []
        for event_type, indexes in batch.by_type.items():
            counter = self._counters.get(event_type, self._untyped)
            if counter is not None and event_type not in ("", CANARY_TYPE):  # "" stands for what is undecodable
                chosen = indexes if size == len(batch) else [index for index in indexes if index < size]
                work.append((event_type, counter, chosen))
        return sorted(work, key=lambda of_type: of_type[0] != PAYMENT)

    def _load(self, batch: Batch, ids: Mapping[Kind, Any], work: Sequence[Work]) -> dict[str, Paid]:
        """Have in memory whose the events are. Answers the payments from before the batch that reports are about."""
        loading = [self.tables[kind].loading(absent) for kind, absent in self._absent(ids, work).items()]
        try:
            for part in loading:  # all is asked for before the first answer is waited for
                next(part)
            earlier = self.payees.before(batch, batch.by_type.get(REPORT, ())) if self._joins else {}
            for part in loading:
                next(part, None)
        finally:
            for part in loading:
                part.close()
        self.tables["merchant"].load({paid.merchant for paid in earlier.values()})
        return earlier

    def _payees_of(self, batch: Batch, work: Sequence[Work]) -> dict[int, str | None]:
        """By index the payees of payments."""
        return {i: merchant_of(batch.data(i)) for kind, _, indexes in work if kind == PAYMENT for i in indexes}

    def _absent(self, ids: Mapping[Kind, Any], work: Sequence[Work]) -> dict[Kind, set[str]]:
        """Whose events they are, of those that are not in memory."""
        found: dict[Kind, set[str]] = {}
        for kind, table in self.tables.items():
            named = ids[kind].values() if kind == "merchant" else ids[kind]
            absent = {*named}.difference(table.entities)
            absent.discard(None)
            if absent and kind != "merchant":  # only then it matters whose events are counted
                counted = [indexes for _, counter, indexes in work if kind in counter.kinds]
                absent.intersection_update([ids[kind][index] for indexes in counted for index in indexes])
            if absent:
                found[kind] = absent
        return found

    def _judged(self, batch: Batch, indexes: Sequence[int], dead: Dead) -> list[int]:
        """Those that each of the judges can take."""
        sound = []
        for index in indexes:
            event = batch.events[index]
            try:
                for judge in self._judges:
                    judge.extract(event, batch.data(index), batch.ts[index])  # type: ignore[arg-type]
            except Malformed as error:
                dead.append((index, f"malformed: {error}"))
            else:
                sound.append(index)
        return sound

    def _count_apart(
        self,
        counter: Counter,
        batch: Batch,
        index: int,
        now: int,
        owners: Mapping[Kind, Owners],
        places: Sequence[int] | None,
        dead: Dead,
    ) -> int:
        """Count an event that is ahead of the clock, from before 1970, or sent again: then its place is where it stood at first,
        and a backfill has counted it already in the families that it filled beyond that. Answers its time if that has come."""
        event, ts, ordinal = batch.events[index], batch.ts[index], batch.first_ordinal + index
        place = places[index] if places is not None else None
        assert event is not None
        try:
            made = {kind: self.tables[kind].windows.extract(event, event.data, ts) for kind in counter.kinds}
        except Malformed as error:
            dead.append((index, f"malformed: {error}"))
            return 0
        for kind, deltas in made.items():
            of, windows = owners[kind], self.tables[kind].windows
            owner = of.ids[index]
            if owner is not None and ordinal >= (entity := of.entities[owner]).position:
                kept = [d for d in deltas if place is None or windows.families[d[0]].until <= place]
                windows.add(entity, ts, kept, now)
                of.counted[owner] = entity
        return ts if ts <= now else 0

    def _first_places(self, batch: Batch) -> list[int]:
        """Where dead letters that were sent again stood in the log at first."""
        places, asked = list(batch.places), list(range(len(batch)))
        while asked:
            raws = self._store.call("HMGET", keys.REDRIVEN, *[f"<features-{places[i]}" for i in asked])
            before = {i: msgspec.json.decode(raw)["id"] for i, raw in zip(asked, raws, strict=True) if raw is not None}
            for i, letter in before.items():
                places[i] = int(letter.rpartition("-")[2])
            asked = list(before)
        return places

    def chunks(self, now: int, told: Callable[[Sequence[str]], None] | None = None) -> Iterator[list[Command]]:
        """What brings the store up to the entities that are dirty now; empty once another call has overtaken it. `told` is told
        of the users in it, some at a time, before those are through."""
        for table in self.tables.values():
            # As they are: a copy of thousands would be a pause for all threads.
            self._cutting.append((table, table.dirty))
            table.dirty = {}
        return self._chunks(now, told)

    def _chunks(self, now: int, told: Callable[[Sequence[str]], None] | None) -> Iterator[list[Command]]:
        began = time.monotonic()
        while self._cutting:
            table, dirty = self._cutting[-1]
            commands: list[Command] = []
            owners: list[str] = []
            # In larger steps the longer it has taken: while events keep coming, others become dirty meanwhile.
            most = _CHUNK * min(1 + int(time.monotonic() - began), _LARGER)
            for _ in range(min(most, len(dirty))):
                owner, entity = dirty.popitem()
                owners.append(owner)
                entity.position = max(entity.position, self.ordinal)
                commands += table.windows.dump(entity, table.prefix + owner, now)
            if not dirty:
                self._cutting.pop()
            if told is not None and table is self.tables["user"]:
                told(owners)
            if commands:
                yield commands
