"""Stream one: real-time features. Each event is counted in the tiles of its user, and of its merchant and zone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import msgspec

from pipeline import keys
from pipeline.catalogue import FEATURES
from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import CANARY, Position, named, user_of
from pipeline.definitions import Entity as Kind
from pipeline.definitions import Feature
from pipeline.errors import StoreUnavailable
from pipeline.features.backfill import Backfill, forget_stale
from pipeline.features.completeness import Backlog
from pipeline.features.families import Family, needs_of, pack_definitions, plan, provides, unpack_definitions
from pipeline.features.reading import Values
from pipeline.features.tiles import Entity
from pipeline.log import Log
from pipeline.publishing.outbox import Outbox
from pipeline.store import Command, Store, as_hash
from pipeline.streams.fold import Fold
from pipeline.streams.stream import Batch, Cut, Outcome, Stream
from pipeline.windows import Windows

CACHED_USERS = 400_000
RETENTION_MS = 168 * 3_600_000


class Features(Stream):
    """Tiles of the entities at work, in memory; the store has the rest, and is brought up to date by each checkpoint.

    `epoch` gives the lease's epoch, which backfill commits under; without it nothing is backfilled. `backlog` is told of every
    batch, so that it can say how far the Python service is behind for a user.
    """

    name = "features"

    def __init__(
        self,
        store: Store,
        features: Sequence[Feature] = FEATURES,
        retention_ms: int = RETENTION_MS,
        epoch: Callable[[], int] | None = None,
        backlog: Backlog | None = None,
        cached_users: int = CACHED_USERS,
    ) -> None:
        super().__init__(store)
        self.wanted = tuple(features)
        self._retention_ms, self._epoch, self._backlog, self._cached_users = retention_ms, epoch, backlog, cached_users
        self.lock: AbstractContextManager[object] = (
            threading.RLock()
        )  # held while the fold changes; backfill takes over between two batches
        self.backfill: Backfill | None = None
        self.writing = False  # from a cut until it is written
        self._unsaved: bytes | None = None  # definitions that go before the next checkpoint
        self.torn = False  # rows that it takes for written may not be in the store: it has to be made anew
        self.active: dict[str, None] = {}  # users with events since the last feature sync
        self.outbox = Outbox()  # the publisher takes from it
        self._handed_out = 0  # whoever has events up to this ordinal came into it
        self._cut = 0  # and up to this one with the checkpoint that is under way, or was the latest
        self.serve(self.wanted, plan(self.wanted))

    @property
    def windows(self) -> Windows:
        """The arithmetic of users' tiles, for the definitions that are served."""
        return self.fold.tables["user"].windows

    @property
    def ordinal(self) -> int:
        """How many events of the log are counted."""
        return self.fold.ordinal

    @property
    def users(self) -> int:
        """How many users are in memory."""
        return len(self.fold.tables["user"].entities)

    def serve(self, features: Sequence[Feature], families: Sequence[Family], after: Fold | None = None) -> None:
        """Count in these families from here on, and answer these features; `after` is the fold that did so before."""
        fold = Fold(self.store, features, families, self._retention_ms)
        if after is not None:
            fold.take_over(after)
        self.served, self.fold, self._unsaved = tuple(features), fold, None
        self.definitions = {feature.name: feature for feature in features}

    def load(self, now: int) -> None:
        """Take up the definitions that the store serves, see which of ours are new to it, and find the users whose public key
        an earlier process left behind: those between the published position and the checkpoint."""
        reached = checkpoints.read(self.store, [self.name])[self.name]
        stored = self.store.call("GET", keys.DEFINITIONS)
        self.adopt(stored, fresh=stored is None and reached.ordinal == 0)
        self.fold.ordinal = reached.ordinal
        if self._epoch is not None:
            forget_stale(self.store, self.backfill)
        log = Log(self.store)
        if self._backlog is not None:
            self._backlog.load(log, checkpoints.read(self.store, ["bridge"])["bridge"], reached.ordinal)
        raw = self.store.call("GET", keys.PUBLISHED)
        behind = Position(*msgspec.json.decode(raw)) if raw else Position()
        self.outbox.saw(behind)
        while behind.ordinal < reached.ordinal and (frames := log.read(behind)):
            sound = (frame for frame in frames if not frame.to & CANARY and not frame.broken)
            users = {user_of(record[8:]) for frame in sound for record in frame.records}
            self.outbox.add((named(user) for user in users if user), behind.ordinal)
            behind = frames[-1].after()
        self._handed_out = self._cut = reached.ordinal

    def adopt(self, stored: bytes | None, fresh: bool) -> None:
        """Serve what the store has tiles for, and see what has to be filled for definitions that are new."""
        self.backfill = None
        if fresh:
            self.serve(self.wanted, plan(self.wanted))
            self._unsaved = pack_definitions(self.wanted, self.fold.families)
            self.fold.share((), None)
            return
        features, families, filled = unpack_definitions(stored) if stored else ((), (), None)
        target = plan(self.wanted, families)
        new = [family for family in target if family not in families]
        there = {need for family in families for need in provides(family)}
        old = {feature.name: feature for feature in features}
        served = [feature if there.issuperset(needs_of(feature)) else old.get(feature.name) for feature in self.wanted]
        chosen = _closed([feature for feature in served if feature is not None])
        needed = {need for feature in chosen for need in needs_of(feature)}
        kept = [family for family in families if family in target or (new and needed.intersection(provides(family)))]
        self.serve(chosen, kept)
        if new and self._epoch is not None:
            # Weakly: a cycle would outlive both, once it is frozen.
            self.backfill = Backfill(weakref.proxy(self), self.wanted, target, new, self._retention_ms, self._epoch)
            new = list(self.backfill.families)
        if (self._epoch is not None or not new) and (features, families) != (self.served, self.fold.families):
            self._unsaved = pack_definitions(self.served, self.fold.families, filled)
        self.fold.share(new, filled)

    def states(self) -> dict[str, str]:
        """For each definition: "ready", or "backfilling NN%" while its history is being made; the old version serves meanwhile."""
        filling = self.backfill
        if filling is None:  # "waiting": for the instance that runs the pipeline
            return {f.name: "ready" if self.definitions.get(f.name) == f else "waiting" for f in self.wanted}
        new = {need for family in filling.families for need in provides(family)}
        share = f"backfilling {filling.progress():.0%}"
        found = {f.name: share if new.intersection(needs_of(f)) else "ready" for f in self.wanted}
        for feature in self.wanted:
            found[feature.name] = next((found[n] for n in feature.of or () if found[n] != "ready"), found[feature.name])
        return found

    def process(self, batch: Batch, now: int) -> Outcome:
        with self.lock:
            self._check_whole()
            outcome = self.fold.process(batch, now)
        self.pass_over(batch)
        return outcome

    def pass_over(self, batch: Batch) -> None:
        if self._backlog is not None:
            self._backlog.note(batch)

    def cut(self, now: int) -> Cut:
        with self.lock:
            self._check_whole()
            fold, self.writing = self.fold, True
            # Before the rows: what a definition that was dropped has in them is deleted there, and must not be served again.
            definitions: list[Command] = [("SET", keys.DEFINITIONS, self._unsaved)] if self._unsaved is not None else []
            self._unsaved = None
            chunks = self._locked(chain([definitions] if definitions else [], self.chunks(now)))
            final = fold.payees.cut()

        def written() -> None:
            with self.lock:
                self.writing = False
                self.fold.payees.written()
                for table in self.fold.tables.values():
                    table.evict(self._cached_users)

        return Cut(chunks, final, written)

    def _check_whole(self) -> None:
        """Raises StoreUnavailable where it is torn, as a failed commit does: the streams begin again from their checkpoints."""
        if self.torn:
            raise StoreUnavailable("the rows of a finished backfill did not reach the store")

    def chunks(self, now: int) -> Iterator[list[Command]]:
        """What brings the store up to the entities that have something to write; with the lock held."""
        self._handed_out, self._cut = self._cut, self.fold.ordinal
        return self.fold.chunks(now, self._hand_out)

    def _hand_out(self, users: Sequence[str]) -> None:
        """Give users with events that were not written yet to the publisher and the feature sync. With the lock held, and before
        the commit: a publisher that sees the new checkpoint must find them. Some at a time: all at once would be a pause."""
        self.outbox.add(users, self._handed_out)
        if len(self.active) < self._cached_users:
            self.active.update(dict.fromkeys(users))

    def _locked(self, chunks: Iterator[list[Command]]) -> Iterator[list[Command]]:
        while True:
            with self.lock:
                some = next(chunks, None)
            if some is None:
                return
            yield some

    def values(
        self,
        ids: Sequence[str],
        at: int,
        kind: Kind = "user",
        hashes: dict[str, Any] | None = None,
        names: frozenset[str] | None = None,
    ) -> dict[str, Values]:
        """Each known entity's features as of `at` (epoch ms, now or a moment ago), all or at least those of `names`; entities
        without any event are left out. Not to be changed.

        `hashes` has the stored form of entities that are not in memory, where the caller has read them already.
        """
        table = self.fold.tables[kind]
        found: dict[str, Values] = {}
        absent: list[str] = []
        for i in ids:
            entity = table.entities.get(i)
            if entity is not None:
                if entity.position:
                    found[i] = table.read_lately.values(i, entity, at, names)
            elif hashes is None or i not in hashes:  # it may have been in memory a moment ago
                absent.append(i)
            elif hashes.get(i):
                found[i] = table.windows.values(table.windows.load(as_hash(hashes[i])), at, names)
        for i, entity in self.read(absent, kind).items():
            found[i] = table.windows.values(entity, at, names)
        return found

    def absent(self, ids: Sequence[str], kind: Kind = "user") -> list[str]:
        """Those that are not in memory."""
        entities = self.fold.tables[kind].entities
        return [i for i in ids if i not in entities]

    def entities(self, user_ids: Sequence[str]) -> dict[str, Entity]:
        """Users' tiles; empty ones for unknown users."""
        cached = self.fold.tables["user"].entities
        found = {i: entity for i in user_ids if (entity := cached.get(i)) is not None}
        found |= self.read([i for i in user_ids if i not in found])
        return {i: found.get(i) or self.windows.new() for i in user_ids}

    def read(self, ids: Sequence[str], kind: Kind = "user") -> dict[str, Entity]:
        """Entities as the store has them; those without any event are left out."""
        table = self.fold.tables[kind]
        return {i: table.windows.load(flat) for i, flat in zip(ids, table.hashes(ids), strict=True) if flat}


def _closed(features: Sequence[Feature]) -> list[Feature]:
    """Without the ratios whose parts are not there."""
    names = {feature.name for feature in features}
    return [feature for feature in features if names.issuperset(feature.of or ())]
