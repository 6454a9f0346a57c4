"""Backfill: fills the families of new or changed definitions from the stored events, while ingest and the stream go on.

It folds the log from its first event on, in small steps, into the same hashes but fields of its own, guarded by a position of
its own. Once it has come to where the stream stands, it holds the stream between two batches, both are written, and the stream
goes on with all families: each event was counted in each family exactly once, before that ordinal here, from it on there.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, replace
from typing import Protocol

import msgspec

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import PER_FRAME, REDRIVE, SHIFT, Frame, Position
from pipeline.definitions import Feature
from pipeline.features.families import Family, pack_definitions
from pipeline.log import Log
from pipeline.store import Command, Store
from pipeline.streams.fold import PREFIXES, Fold
from pipeline.streams.stream import Batch
from pipeline.windows import Windows

STEP_S = 0.5  # of each second at most, so that the stream keeps its share
CACHED = 50_000
_READ_BYTES = 1 << 19
_FEATURES_BIT = 1
log = logging.getLogger(__name__)


class Host(Protocol):
    """The features stream, as far as backfill deals with it; `lock` is held while it takes in a batch, `writing` is true from a
    cut until all of it is in the store, and one that is `torn` goes on no more."""

    store: Store
    fold: Fold
    lock: AbstractContextManager[object]
    writing: bool
    torn: bool
    backfill: Backfill | None

    @property
    def ordinal(self) -> int: ...

    def chunks(self, now: int) -> Iterator[list[Command]]: ...

    def serve(self, features: Sequence[Feature], families: Sequence[Family], after: Fold | None = None) -> None: ...


class Backfill:
    """Fills `families`, after which the stream serves `features` from all of `target`.

    Each filling has a mark of its own, which a restart goes on with: what an earlier one has left behind, or a definition that
    was dropped and came again, is never counted on.
    """

    def __init__(
        self,
        stream: Host,
        features: Sequence[Feature],
        target: Sequence[Family],
        families: Sequence[Family],
        retention_ms: int,
        epoch: Callable[[], int],
    ) -> None:
        raw = stream.store.call("GET", keys.BACKFILL)
        kept = msgspec.json.decode(raw) if raw else {}
        self._ids = b"".join(sorted(family.id for family in families)).hex()
        self.mark: str = kept["mark"] if kept.get("families") == self._ids else secrets.token_hex(3)
        self.families = tuple(replace(family, mark=self.mark) for family in families)
        self._target = tuple(replace(family, mark=self.mark) if family in families else family for family in target)
        self._stream, self._features, self._epoch = stream, tuple(features), epoch
        judges = [Windows(features, self._target, kind) for kind in PREFIXES]
        self._fold = Fold(stream.store, (), self.families, retention_ms, self.mark.encode(), judges)
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
        if not self._epoch() or self._stream.torn:
            return
        began = time.monotonic()
        try:
            position = self._position or self._resume()
            while True:
                frames = [f for f in self._log.read(position, _READ_BYTES) if f.ordinal < self._stream.ordinal]
                whole = [f for f in frames if f.after().ordinal <= self._stream.ordinal]
                if not whole:
                    if self._take_over(position, now):
                        return
                    break
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
            if frame.to & _FEATURES_BIT and not frame.to & REDRIVE:  # what was sent again stands in its own place too
                self.skipped += len(self._fold.process(Batch([frame]), now, upto).dead)
        return frames[-1].after()

    def _write(self, position: Position, now: int) -> None:
        store, epoch = self._stream.store, self._epoch()
        for chunk in self._fold.chunks(now):
            checkpoints.commit(store, epoch, chunk)
        kept = {"mark": self.mark, "families": self._ids, "position": astuple(position), "first": self._first}
        checkpoints.commit(store, epoch, [*self._fold.payees.cut(), ("SET", keys.BACKFILL, msgspec.json.encode(kept))])
        self._fold.payees.written()
        self._position = position
        for table in self._fold.tables.values():
            table.evict(CACHED)

    def _take_over(self, position: Position, now: int) -> bool:
        """Bring both folds to one ordinal, write both, and let the stream go on with all families. False while rows of the
        stream may be on their way into the store: the next step tries again."""
        stream = self._stream
        with stream.lock:
            if stream.writing:
                return False
            until = ((position.segment << SHIFT) + min(position.offset, (1 << SHIFT) - 1)) * PER_FRAME
            while frames := [f for f in self._log.read(position, _READ_BYTES) if f.ordinal < stream.ordinal]:
                end, last = self._feed(frames, now, stream.ordinal), frames[-1]
                until = last.place(stream.ordinal - last.ordinal)
                if end.ordinal > stream.ordinal:
                    break  # in the midst of a frame: should this fail, it is read again as a whole
                position = end
            self._write(position, now)
            target = [replace(f, until=until) if f in self.families else f for f in self._target]
            definitions = pack_definitions(self._features, target, self.mark)
            stream.torn = True  # until all of it is known to be in the store
            for chunk in stream.chunks(now):
                checkpoints.commit(stream.store, self._epoch(), chunk)
            checkpoints.commit(
                stream.store, self._epoch(), [("SET", keys.DEFINITIONS, definitions), ("DEL", keys.BACKFILL)]
            )
            stream.torn = False
            stream.serve(self._features, target, after=stream.fold)
            stream.fold.share((), self.mark)
            stream.backfill = None
        log.info("backfill ends", extra={"families": len(self.families), "skipped": self.skipped})
        return True


def forget_stale(store: Store, running: Backfill | None) -> None:
    """Forget how far an earlier backfill came unless this one goes on with it: the stream deletes what nobody reads."""
    raw = store.call("GET", keys.BACKFILL)
    if raw and (running is None or msgspec.json.decode(raw)["mark"] != running.mark):
        store.call("DEL", keys.BACKFILL)
