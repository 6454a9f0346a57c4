"""Folding events into entities: the tiles of users, merchants and zones at work, in memory; the store has the rest.

The features stream folds what arrives, backfill what was stored before a definition came; both with this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from pipeline import keys
from pipeline.definitions import Entity as Kind
from pipeline.definitions import Feature, Malformed
from pipeline.events import CANARY_TYPE, Stored
from pipeline.extraction import Count, Counting, compile_counting
from pipeline.families import Family
from pipeline.frames import REDRIVE
from pipeline.read_lately import ReadLately
from pipeline.store import Call, Command, Store
from pipeline.streams.stream import UNDECODABLE, Batch, Outcome
from pipeline.tiles import Entity
from pipeline.windows import Windows

PAYMENT, REPORT = "payment", "fraud_report"
PREFIXES: Mapping[Kind, str] = {"user": keys.USER, "merchant": keys.MERCHANT, "zone": keys.ZONE}
_CHUNK, _CALLS = 40, 8  # entities of a call, and calls under way at once
_DAY_MS = 86_400_000
Hash = Mapping[bytes, bytes]


class Table:
    """The entities of one kind. `dirty` are those that have something to write."""

    def __init__(self, store: Store, windows: Windows) -> None:
        self.windows, self.prefix = windows, PREFIXES[windows.kind]
        self.entities: dict[str, Entity] = {}
        self.dirty: dict[str, Entity] = {}
        self.read_lately = ReadLately(windows)
        self._store = store

    def load(self, ids: Iterable[str]) -> None:
        """Have these in memory, the unknown ones empty."""
        absent = [i for i in ids if i not in self.entities]
        if absent:
            for i, flat in zip(absent, self.hashes(absent), strict=True):
                self.entities[i] = self.windows.load(flat) if flat else self.windows.new()

    def hashes(self, ids: Sequence[str]) -> list[Hash]:
        found: list[Hash] = []
        under_way: deque[Call] = deque()  # the store is at the next ones while this process takes the answer of one in
        try:
            for at in range(0, len(ids), _CHUNK):  # a command for each would cost this process five times as much
                some = [self.prefix + i for i in ids[at : at + _CHUNK]]
                under_way.append(self._store.begin("vectors", some, [0]))
                if len(under_way) == _CALLS:
                    found += map(as_hash, under_way.popleft().result())
            while under_way:
                found += map(as_hash, under_way.popleft().result())
        finally:
            for call in under_way:
                call.close()
        return found

    def evict(self, most: int) -> None:
        """Let go of the longest known beyond `most`, but of none that has something to write."""
        surplus = len(self.entities) - most
        if surplus > 0:
            for i in list(islice((i for i in self.entities if i not in self.dirty), surplus)):
                del self.entities[i]


@dataclass(frozen=True, slots=True)
class Counter:
    """How the events of a type are counted, and of which kinds of entities."""

    count: Count
    of_user: bool
    of_payee: bool
    of_zone: bool


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
        self._store, self._retention_ms, self._judges = store, retention_ms, judges
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
        self._paid: dict[str, dict[str, str]] = {}  # day of arrival -> transaction -> merchant, not written yet
        self._writing: dict[str, dict[str, str]] = {}
        self._cutting: list[tuple[Table, str, Entity]] = []  # what the present checkpoint has yet to write
        self.ordinal = 0
        self.newest: dict[str, int] = {}  # event type -> the latest event time (ms) that was counted

    def take_over(self, before: Fold) -> None:
        """Go on where another fold, all of it written, stands."""
        self.ordinal, self.newest = before.ordinal, before.newest
        self._paid, self._writing = before._paid, before._writing

    def share(self, kept: Sequence[Family], filled: str | None) -> None:
        """Leave the fields of these families alone, delete all others that are not this fold's; `filled` see Windows."""
        for table in self.tables.values():
            table.windows.kept = frozenset(family.id for family in kept)
            table.windows.filled = filled.encode() if filled is not None else None

    def clear(self) -> None:
        """Forget everything that is in memory."""
        self._paid, self._writing, self._cutting = {}, {}, []
        for table in self.tables.values():
            table.entities, table.dirty = {}, {}

    def _counter(self, event_type: str | None) -> Counter:
        untyped = any(f.event_type is None for f in self.tables["user"].windows.families)
        kinds = [
            kind
            for kind, table in self.tables.items()
            if event_type in table.windows.event_types or (kind == "user" and untyped)
        ]
        windows: dict[Kind, Counting] = {kind: table.windows for kind, table in self.tables.items()}
        return Counter(compile_counting(windows, event_type, kinds), *(kind in kinds for kind in self.tables))

    def process(self, batch: Batch, now: int, upto: int | None = None) -> Outcome:
        """Count a batch, or its events before the ordinal `upto`."""
        outcome = Outcome()
        first = batch.first_ordinal
        events = batch.events if upto is None else batch.events[: max(0, upto - first)]
        merchants = self._merchants(batch) if self._joins else {}
        filled = self._first_places(batch) if batch.to & REDRIVE and self._until else None
        of_users, of_payees, of_zones = self.tables.values()
        users, payees, zones = of_users.entities, of_payees.entities, of_zones.entities
        counters, untyped, ts, newest = self._counters, self._untyped, batch.ts, self.newest
        for index, event in enumerate(events):
            if event is None:
                outcome.dead.append((index, UNDECODABLE))
                continue
            event_type, user_id = event.event_type, event.user_id
            counter = counters.get(event_type, untyped)
            if counter is None or event_type == CANARY_TYPE:
                continue
            data = event.data
            # Each of its entities, unless the event is read again after a crash and already in it.
            ordinal, at = first + index, ts[index]
            payee_id = zone_id = None
            user = payee = zone = None
            if counter.of_user:
                user = users.get(user_id) or self._fetch(batch, events, merchants, users, user_id)
                if ordinal < user.position:
                    user = None
            if counter.of_payee:
                payee_id = merchants.get(str(data.get("transaction_id"))) if event_type == REPORT else merchant_of(data)
                if payee_id is not None:
                    payee = payees.get(payee_id) or self._fetch(batch, events, merchants, payees, payee_id)
                    if ordinal < payee.position:
                        payee = None
            if counter.of_zone:
                zone_id = batch.zones[index]
                if zone_id is not None:
                    zone = zones.get(zone_id) or self._fetch(batch, events, merchants, zones, zone_id)
                    if ordinal < zone.position:
                        zone = None
            try:
                if self._judges and counter is not untyped:
                    for judge in self._judges:
                        judge.extract(event, data, at)
                if 0 <= at <= now and filled is None:
                    counter.count(data, event, at, now, user, payee, zone)
                else:
                    self._count_apart(
                        counter, event, data, at, now, (user, payee, zone), filled[index] if filled else None
                    )
            except Malformed as error:
                outcome.dead.append((index, f"malformed: {error}"))
                continue
            if user is not None:
                user.position = ordinal + 1
                of_users.dirty[user_id] = user
            if payee is not None and payee_id is not None:
                payee.position = ordinal + 1
                of_payees.dirty[payee_id] = payee
            if zone is not None and zone_id is not None:
                zone.position = ordinal + 1
                of_zones.dirty[zone_id] = zone
            if counter is not untyped and newest.get(event_type, 0) < at <= now:
                newest[event_type] = at
            if event_type == PAYMENT and self._joins:
                self._remember(batch.arrivals[index], data, merchants)
        if ts:
            newest[""] = max(newest.get("", 0), min(max(ts), now))  # of any type
        self.ordinal = first + len(events)
        outcome.done = len(events) - len(outcome.dead)
        return outcome

    def _fetch(
        self,
        batch: Batch,
        events: Sequence[Stored | None],
        merchants: Mapping[str, str],
        entities: Mapping[str, Entity],
        owner: str,
    ) -> Entity:
        """One of `entities` that was not in memory: in one round trip for each kind all come that the batch may count for."""
        found = [(i, e, self._counters.get(e.event_type, self._untyped)) for i, e in enumerate(events) if e is not None]
        counted = [(i, e, c) for i, e, c in found if c is not None and e.event_type != CANARY_TYPE]
        of_users, of_payees, of_zones = self.tables.values()
        of_users.load({e.user_id for _, e, c in counted if c.of_user})
        payees = [merchant_of(e.data) for _, e, c in counted if c.of_payee]
        of_payees.load({payee for payee in (*payees, *merchants.values()) if payee is not None})
        of_zones.load({zone for i, _, c in counted if c.of_zone and (zone := batch.zones[i]) is not None})
        return entities[owner]

    def _count_apart(
        self,
        counter: Counter,
        event: Stored,
        data: Mapping[str, Any],
        ts: int,
        now: int,
        entities: Sequence[Entity | None],
        place: int | None,
    ) -> None:
        """Count an event that is ahead of the clock, from before 1970, or sent again: then `place` is where it stood at first,
        and a backfill has counted it already in the families that it filled beyond that. Raises Malformed."""
        flags = (counter.of_user, counter.of_payee, counter.of_zone)
        tables = [some.windows for some, has in zip(self.tables.values(), flags, strict=True) if has]
        made = [(windows, windows.extract(event, data, ts)) for windows in tables]
        chosen = [entity for entity, has in zip(entities, flags, strict=True) if has]
        for (windows, deltas), entity in zip(made, chosen, strict=True):
            if entity is not None:
                kept = [d for d in deltas if place is None or windows.families[d[0]].until <= place]
                windows.add(entity, ts, kept, now)

    def _merchants(self, batch: Batch) -> dict[str, str]:
        """The merchants of the payments that the batch's fraud reports are about, from before the batch."""
        asked = {str(batch.data(i).get("transaction_id")) for i in batch.by_type.get(REPORT, ())}
        found: dict[str, str] = {}
        for paid in (*self._paid.values(), *self._writing.values()):
            found = {transaction: paid[transaction] for transaction in asked if transaction in paid} | found
        if wanted := sorted(asked.difference(found)):
            today = batch.arrivals[-1] // _DAY_MS
            days = range(today + 1, today - self._retention_ms // _DAY_MS - 2, -1)
            stored = self._store.find([f"{keys.PAID}{day}" for day in days], wanted)
            found |= {t: merchant.decode() for t, merchant in zip(wanted, stored, strict=True) if merchant is not None}
        return found

    def _remember(self, arrival: int, data: Mapping[str, Any], merchants: dict[str, str]) -> None:
        transaction, merchant = data.get("transaction_id"), merchant_of(data)
        if type(transaction) in (str, int) and merchant is not None:
            merchants[str(transaction)] = merchant
            self._paid.setdefault(f"{keys.PAID}{arrival // _DAY_MS}", {})[str(transaction)] = merchant

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

    def chunks(self, now: int) -> Iterator[list[Command]]:
        """What brings the store up to the entities that are dirty now; empty once another call has overtaken it."""
        for table in self.tables.values():
            self._cutting += [(table, owner, entity) for owner, entity in table.dirty.items()]
            table.dirty = {}
        return self._chunks(now)

    def _chunks(self, now: int) -> Iterator[list[Command]]:
        while some := [self._cutting.pop() for _ in range(min(_CHUNK, len(self._cutting)))]:
            commands: list[Command] = []
            for table, owner, entity in some:
                entity.position = max(entity.position, self.ordinal)
                commands += table.windows.dump(entity, table.prefix + owner, now)
            yield commands

    def paid(self) -> list[Command]:
        """What keeps the payments' merchants, to be written with the checkpoint; written() once it was."""
        self._writing, self._paid = self._paid, {}
        commands: list[Command] = []
        for key, pairs in self._writing.items():
            items = iter(pairs.items())
            while some := list(islice(items, 500)):
                commands.append(("HSET", key, *[word for pair in some for word in pair]))
            commands.append(("PEXPIRE", key, self._retention_ms + 2 * _DAY_MS))
        return commands

    def written(self) -> None:
        self._writing = {}


def merchant_of(data: Mapping[str, Any]) -> str | None:
    """The payee of a payment, None where none is named."""
    value = data.get("merchant_id")
    if type(value) is int:
        value = str(value)
    return value if type(value) is str and 1 <= len(value) <= 128 else None


def as_hash(flat: Any) -> Hash:
    """A HGETALL's answer, in whichever shape the client gives it."""
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
