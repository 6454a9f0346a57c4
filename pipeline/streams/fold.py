"""Folding events into entities: the tiles of users, merchants and zones at work, in memory; the store has the rest.

The features stream folds what arrives, backfill what was stored before a definition came; both with this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from pipeline import keys
from pipeline.definitions import Entity as Kind
from pipeline.definitions import Feature, Malformed
from pipeline.events import CANARY_TYPE
from pipeline.extraction import Deltas
from pipeline.families import Family
from pipeline.frames import REDRIVE
from pipeline.store import Command, Store
from pipeline.streams.stream import UNDECODABLE, Batch, Outcome
from pipeline.tiles import Entity
from pipeline.windows import Windows

PAYMENT, REPORT = "payment", "fraud_report"
PREFIXES: Mapping[Kind, str] = {"user": keys.USER, "merchant": keys.MERCHANT, "zone": keys.ZONE}
_CHUNK = 100
_DAY_MS = 86_400_000
_NO_DATA: Mapping[str, Any] = {}
Hash = Mapping[bytes, bytes]


class Table:
    """The entities of one kind. `dirty` are those that have something to write."""

    def __init__(self, store: Store, windows: Windows) -> None:
        self.windows, self.prefix = windows, PREFIXES[windows.kind]
        self.entities: dict[str, Entity] = {}
        self.dirty: dict[str, Entity] = {}
        self._store = store

    def load(self, ids: Iterable[str]) -> None:
        """Have these in memory, the unknown ones empty."""
        absent = [i for i in ids if i not in self.entities]
        if absent:
            for i, flat in zip(absent, self.hashes(absent), strict=True):
                self.entities[i] = self.windows.load(flat) if flat else self.windows.new()

    def hashes(self, ids: Sequence[str]) -> list[Hash]:
        flats = self._store.many([("HGETALL", self.prefix + i) for i in ids]) if ids else []
        return [as_hash(flat) for flat in flats]

    def evict(self, most: int) -> None:
        """Let go of the longest known beyond `most`, but of none that has something to write."""
        surplus = len(self.entities) - most
        if surplus > 0:
            for i in list(islice((i for i in self.entities if i not in self.dirty), surplus)):
                del self.entities[i]


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
        self._typed: dict[str, list[Table]] = {}
        for event_type in {f.event_type for f in families if f.event_type is not None}:
            self._typed[event_type] = [
                table
                for kind, table in self.tables.items()
                if event_type in table.windows.event_types
                or (kind == "user" and any(f.event_type is None for f in users.families))
            ]
        self._any = any(f.event_type is None for f in users.families)
        self._joins = REPORT in self.tables["merchant"].windows.event_types
        if self._joins:
            self._typed.setdefault(PAYMENT, [self.tables["user"]] if self._any else [])
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

    def process(self, batch: Batch, now: int, upto: int | None = None) -> Outcome:
        """Count a batch, or its events before the ordinal `upto`."""
        outcome = Outcome()
        counted: dict[Kind, list[tuple[str, int, Deltas]]] = {kind: [] for kind in self.tables}
        of_users = counted["user"]
        users, typed, ts, newest = self.tables["user"], self._typed, batch.ts, self.newest
        merchants = self._merchants(batch) if self._joins else {}
        extract = users.windows.extract
        events = batch.events if upto is None else batch.events[: max(0, upto - batch.first_ordinal)]
        for index, event in enumerate(events):
            if event is None:
                outcome.dead.append((index, UNDECODABLE))
                continue
            outcome.done += 1
            tables = typed.get(event.event_type)
            at = ts[index]
            if tables is None:
                if self._any and event.event_type != CANARY_TYPE:
                    of_users.append((event.user_id, index, extract(event, _NO_DATA, at)))
                continue
            data = batch.data(index)
            try:
                for judge in self._judges:
                    judge.extract(event, data, at)
                made = [(table, table.windows.extract(event, data, at)) for table in tables]
            except Malformed as error:
                outcome.done -= 1
                outcome.dead.append((index, f"malformed: {error}"))
                continue
            if newest.get(event.event_type, 0) < at <= now:
                newest[event.event_type] = at
            if self._joins and event.event_type == PAYMENT:
                self._remember(batch.arrivals[index], data, merchants)
            for table, deltas in made:
                kind = table.windows.kind
                if kind == "user":
                    of_users.append((event.user_id, index, deltas))
                    continue
                if kind == "zone":
                    owner = batch.zones[index]
                elif event.event_type == REPORT:
                    owner = merchants.get(str(data.get("transaction_id")))
                else:
                    owner = merchant_of(data)
                if owner is not None:
                    counted[kind].append((owner, index, deltas))
        if batch.to & REDRIVE and any(family.until for family in self.families):
            self._leave_out_filled(batch, counted)
        first = batch.first_ordinal
        for kind, table in self.tables.items():
            table.load({owner for owner, _, _ in counted[kind]})
            entities, dirty, add = table.entities, table.dirty, table.windows.add
            for owner, index, deltas in counted[kind]:
                entity = entities[owner]
                if first + index >= entity.position:  # else read again after a crash, and already in it
                    add(entity, ts[index], deltas, now)
                    entity.position = first + index + 1
                    dirty[owner] = entity
        if ts:
            newest[""] = max(newest.get("", 0), min(max(ts), now))  # of any type
        self.ordinal = first + len(events)
        return outcome

    def _merchants(self, batch: Batch) -> dict[str, str]:
        """The merchants of the payments that the batch's fraud reports are about, from before the batch."""
        asked = {
            str(batch.data(i).get("transaction_id"))
            for i, event in enumerate(batch.events)
            if event is not None and event.event_type == REPORT
        }
        if not asked:
            return {}
        wanted, today = sorted(asked), batch.arrivals[-1] // _DAY_MS
        days = range(today + 1, today - self._retention_ms // _DAY_MS - 2, -1)
        rows = self._store.many([("HMGET", f"{keys.PAID}{day}", *wanted) for day in days])
        found: dict[str, str] = {}
        for at, transaction in enumerate(wanted):
            pending = next(
                (d[transaction] for d in (*self._paid.values(), *self._writing.values()) if transaction in d), None
            )
            stored = next((row[at] for row in rows if row[at] is not None), None)
            if pending is not None:
                found[transaction] = pending
            elif stored is not None:
                found[transaction] = stored.decode()
        return found

    def _remember(self, arrival: int, data: Mapping[str, Any], merchants: dict[str, str]) -> None:
        transaction, merchant = data.get("transaction_id"), merchant_of(data)
        if type(transaction) in (str, int) and merchant is not None:
            merchants[str(transaction)] = merchant
            self._paid.setdefault(f"{keys.PAID}{arrival // _DAY_MS}", {})[str(transaction)] = merchant

    def _leave_out_filled(self, batch: Batch, counted: dict[Kind, list[tuple[str, int, Deltas]]]) -> None:
        """Of dead letters that were sent again, what a backfill has counted already, where they stood at first."""
        places, asked = list(batch.places), list(range(len(batch)))
        while asked:
            raws = self._store.call("HMGET", keys.REDRIVEN, *[f"<features-{places[i]}" for i in asked])
            before = {i: msgspec.json.decode(raw)["id"] for i, raw in zip(asked, raws, strict=True) if raw is not None}
            for i, letter in before.items():
                places[i] = int(letter.rpartition("-")[2])
            asked = list(before)
        for kind, rows in counted.items():
            until = [family.until for family in self.tables[kind].windows.families]
            rows[:] = [(who, i, [d for d in deltas if until[d[0]] <= places[i]]) for who, i, deltas in rows]

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
