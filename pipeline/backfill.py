"""Backfill: fills the families of new or changed definitions from the stored events, while ingest and the stream go on.

It folds the log from its first event on, in small steps, into the same hashes but fields of its own, guarded by a position of
its own. Once it has come to where the stream stands, it holds the stream between two batches, both are written, and the stream
goes on with all families: each event was counted in each family exactly once, before that ordinal here, from it on there.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Protocol

import msgspec

from pipeline import checkpoints, keys
from pipeline.definitions import Feature
from pipeline.families import Family, pack_definitions
from pipeline.frames import Frame, Position
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.fold import PREFIXES, Fold
from pipeline.streams.stream import Batch
from pipeline.windows import Windows

STEP_S = 0.5  # of each second at most, so that the stream keeps its share
CACHED = 50_000
_READ_BYTES = 1 << 19
_FEATURES_BIT = 1
log = logging.getLogger(__name__)


class Host(Protocol):
    """The features stream, as far as backfill deals with it; `lock` is held while it takes in a batch."""

    store: Store
    fold: Fold
    lock: AbstractContextManager[object]
    backfill: Backfill | None

    @property
    def ordinal(self) -> int: ...

    def serve(self, features: Sequence[Feature], families: Sequence[Family], after: Fold | None = None) -> None: ...


class Backfill:
    """Fills `families`, after which the stream serves `features` from all of `target`."""

    def __init__(
        self,
        stream: Host,
        features: Sequence[Feature],
        target: Sequence[Family],
        families: Sequence[Family],
        retention_ms: int,
        epoch: Callable[[], int],
    ) -> None:
        self.families = tuple(families)
        self._stream, self._features, self._target, self._epoch = stream, tuple(features), tuple(target), epoch
        ids = b"".join(sorted(family.id for family in families))
        self.mark = hashlib.blake2b(ids, digest_size=3).hexdigest()
        judges = [Windows(features, target, kind) for kind in PREFIXES]
        self._fold = Fold(stream.store, (), families, retention_ms, self.mark.encode(), judges)
        horizon = max(family.windows[-1] for family in (*target, *stream.fold.families))
        for fold in (self._fold, stream.fold):  # both set the time to live of the same hashes
            for table in fold.tables.values():
                table.windows.horizon_ms = max(horizon, table.windows.horizon_ms)
        self._log = Log(stream.store)
        self._position: Position | None = None
        self._first = 0
        self.skipped = 0  # events that hold something the new definitions cannot take

    def progress(self) -> float:
        """0 to 1: the share of the stored events that are folded."""
        whole = self._stream.ordinal - self._first
        done = 0 if self._position is None else self._position.ordinal - self._first
        return min(1.0, done / whole) if whole > 0 else 1.0

    def step(self, now: int) -> None:
        """One slice of work; takes the stream over at the end. Raises Fenced, StoreError: the next step goes on."""
        if not self._epoch():
            return
        began = time.monotonic()
        try:
            position = self._position or self._resume()
            while True:
                frames = [f for f in self._log.read(position, _READ_BYTES) if f.ordinal < self._stream.ordinal]
                whole = [f for f in frames if f.after().ordinal <= self._stream.ordinal]
                if not whole:
                    self._take_over(position, now)
                    return
                position = self._feed(whole, now)
                if time.monotonic() - began > STEP_S:
                    break
            self._write(position, now)
        except Exception:
            self._position = None  # what is in memory may be ahead of or behind the store: read it again
            self._fold.clear()
            raise

    def _resume(self) -> Position:
        raw = self._stream.store.call("GET", keys.BACKFILL)
        kept = msgspec.json.decode(raw) if raw else {}
        if kept.get("mark") == self.mark:
            position, self._first = Position(*kept["position"]), kept["first"]
        else:
            head = self._log.head()
            position = Position(segment=head.first_segment)
            frames = self._log.read(position, _READ_BYTES)
            self._first = frames[0].ordinal if frames else self._stream.ordinal
            log.info(
                "backfill begins", extra={"families": len(self.families), "events": self._stream.ordinal - self._first}
            )
        self._position = position
        self._fold.ordinal = position.ordinal
        return position

    def _feed(self, frames: list[Frame], now: int, upto: int | None = None) -> Position:
        for frame in frames:
            if frame.to & _FEATURES_BIT:
                self.skipped += len(self._fold.process(Batch([frame]), now, upto).dead)
        return frames[-1].after()

    def _write(self, position: Position, now: int) -> None:
        store, epoch = self._stream.store, self._epoch()
        for chunk in self._fold.chunks(now):
            checkpoints.commit(store, epoch, chunk)
        kept = msgspec.json.encode({"mark": self.mark, "position": astuple(position), "first": self._first})
        checkpoints.commit(store, epoch, [*self._fold.paid(), ("SET", keys.BACKFILL, kept)])
        self._fold.written()
        self._position = position
        for table in self._fold.tables.values():
            table.evict(CACHED)

    def _take_over(self, position: Position, now: int) -> None:
        """Bring both folds to one ordinal, write both, and let the stream go on with all families."""
        stream = self._stream
        with stream.lock:
            while frames := [f for f in self._log.read(position, _READ_BYTES) if f.ordinal < stream.ordinal]:
                position = self._feed(frames, now, stream.ordinal)
            self._write(position, now)
            for chunk in stream.fold.chunks(now):
                checkpoints.commit(stream.store, self._epoch(), chunk)
            definitions = pack_definitions(self._features, self._target, self.mark)
            checkpoints.commit(
                stream.store, self._epoch(), [("SET", keys.DEFINITIONS, definitions), ("DEL", keys.BACKFILL)]
            )
            stream.serve(self._features, self._target, after=stream.fold)
            stream.fold.share((), self.mark)
            stream.backfill = None
        log.info("backfill ends", extra={"families": len(self.families), "skipped": self.skipped})


def forget_stale(store: Store, running: Backfill | None) -> None:
    """Forget how far an earlier backfill came unless this one goes on with it: the stream deletes what nobody reads."""
    raw = store.call("GET", keys.BACKFILL)
    if raw and (running is None or msgspec.json.decode(raw)["mark"] != running.mark):
        store.call("DEL", keys.BACKFILL)
