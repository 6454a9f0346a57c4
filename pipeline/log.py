"""The log: accept, read, fetch, trim. It is the truth, and the write-ahead log of everything else.

A segment is a string to which frames (frames.py) are appended, up to 8 MiB or one hour of them.
"""

from __future__ import annotations

import logging
import struct
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from pipeline import keys
from pipeline.commit_log.frames import (
    ALL_STREAMS,
    HEADER,
    PER_FRAME,
    REDRIVE,
    SHIFT,
    Frame,
    Head,
    Position,
    header_at,
    next_header,
    pack,
    parse_frames,
    record,
    split,
)
from pipeline.commit_log.high_water import HighWater
from pipeline.errors import OutcomeUnknown, StoreError, StoreUnavailable
from pipeline.events import Parsed
from pipeline.store import Command, Store, as_hash

SEGMENT_BYTES = 8 << 20
SEGMENT_MS = 3_600_000
_DAMAGE_KEPT = 4096
_DIGEST_BYTES = 10  # accept.lua knows it, too
_TAIL_EVENTS, _TAIL_BYTES = 50_000, 64 << 20
_FORGET_WORDS = 2_000
_MOVED_AT_ONCE = 500  # buckets of an earlier version's id table: some 20 ms of the store
_PATIENCE_MS = 4_000  # less than the connection's time-out: what is asked again is not to be done late on top
_INSIST_S = 3.0  # the embedded store is back within this
_OPEN = "whether it was done is not known"
_PLACE = struct.Struct("<6sH")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Fetched:
    """One event out of the log: arrival and event time in epoch ms, its stored JSON, ordinal, and the mask of its
    streams."""

    received_at: int
    source: str
    ts: int
    body: bytes
    ordinal: int
    to: int


@dataclass(slots=True)
class Request:
    """What one request brings to the log: events that are valid, and how many were not."""

    events: Sequence[Parsed]
    source: str
    to: int = ALL_STREAMS
    rejected: int = 0


@dataclass(slots=True)
class Taken:
    """What the log made of a request: its frame's address, the ordinal behind its last event, and its duplicates."""

    address: int
    end: int
    taken: int
    duplicates: list[int]


def digests(event_ids: Iterable[str]) -> list[bytes]:
    """10 bytes for each event id, which stand for it in the id table: among 10^9 ids two collide with a chance of 4 in
    10^7."""
    return [blake2b(event_id.encode(), digest_size=_DIGEST_BYTES).digest() for event_id in event_ids]


class Log:
    """The log of one partition. What this process appended last it can read again without asking the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.mark = HighWater()
        self._tail: OrderedDict[int, Frame] = OrderedDict()  # by address; the first is let go of first
        self._tail_events = self._tail_bytes = 0
        self._tail_lock = threading.Lock()
        self._answered = keys.ANSWERED + uuid.uuid4().hex
        self._number = 0  # of the latest accept
        self._accepting = threading.Lock()
        self._silent = False  # the latest accept was never answered
        self._ids_moved = False

    def accept(self, requests: Sequence[Request], now: int) -> list[Taken]:
        """Take the requests in one atomic step; `now` in epoch ms. Raises StoreError: nothing was taken, except where it is
        OutcomeUnknown.

        Where no answer comes they are brought again until it is known: the store keeps its last answer to this log. Only one
        that stays away for longer leaves it open.
        """
        rejected = sum(r.rejected for r in requests)
        args: list[str | bytes | int] = []
        records = [[event.record for event in request.events] for request in requests]
        for request, packed in zip(requests, records, strict=True):
            ids = b"".join(digests([event.event_id for event in request.events]))
            args += [request.to, request.source.encode(), len(packed), ids, pack(packed)]
        with self._accepting:
            known = self.mark.reached
            self._number += 1
            answer = self._accept([now, rejected, SEGMENT_BYTES, SEGMENT_MS, self._number, len(requests), *args])
        found = []
        for row, request, packed in zip(answer, requests, records, strict=True):
            taken = Taken(int(row[0]), row[1] + row[2], row[2], row[4:])
            if taken.taken:
                self._remember(taken, int(row[3]), request, packed)
            found.append(taken)
        self.mark.saw(max((taken.end for taken in found), default=known), known)
        return found

    def _accept(self, args: list[str | bytes | int]) -> Any:
        """The script's answer, asked for again while it gets lost. What is said then of the request that comes again says nothing
        of the one before."""
        names = (keys.HEAD, keys.LOG, self._ids(), keys.SEGMENTS, self._answered)
        if self._silent:  # one that still says nothing is not sent what it may take after all
            self._store.lean("EXISTS", keys.HEAD)
            self._silent = False
        until: float | None = None
        while True:
            try:
                return self._store.run("accept", names, [*args, self._store.deadline(_PATIENCE_MS)])
            except StoreError as error:
                if until is None:
                    if not error.lost:
                        raise
                    until = time.monotonic() + _INSIST_S
                if time.monotonic() > until:
                    self._silent = True
                    raise OutcomeUnknown(f"{error.message}; {_OPEN}") from error
                time.sleep(0.02)

    def _remember(self, taken: Taken, received_at: int, request: Request, records: list[bytes]) -> None:
        """Keep an appended frame for the readers that follow at once."""
        events = [event.stored for event in request.events]
        times = [event.ts for event in request.events]
        if taken.duplicates:
            known = set(taken.duplicates)
            records = [packed for i, packed in enumerate(records) if i not in known]
            events = [event for i, event in enumerate(events) if i not in known]
            times = [ts for i, ts in enumerate(times) if i not in known]
        size = HEADER.size + len(request.source.encode()) + 4 * len(records) + sum(map(len, records))
        first = taken.end - taken.taken
        frame = Frame(
            taken.address, taken.address + size, request.to, received_at, first, request.source, records, events, times
        )
        with self._tail_lock:
            if self._tail and next(reversed(self._tail)) >= taken.address:  # the store was emptied
                self._clear_tail()
            self._tail[taken.address] = frame
            self._tail_events += len(records)
            self._tail_bytes += size
            while len(self._tail) > 1 and (self._tail_events > _TAIL_EVENTS or self._tail_bytes > _TAIL_BYTES):
                _, oldest = self._tail.popitem(last=False)
                self._tail_events -= len(oldest.records)
                self._tail_bytes -= oldest.next - oldest.address

    def drop_tail(self) -> None:
        """Read from the store alone what stands there now: it may have been emptied or trimmed."""
        with self._tail_lock:
            self._clear_tail()

    def _clear_tail(self) -> None:
        self._tail, self._tail_events, self._tail_bytes = OrderedDict(), 0, 0

    def recent(self, position: Position, limit: int = 1 << 20) -> list[Frame]:
        """The frames from a position on that this process has just appended, about `limit` bytes of them."""
        frames: list[Frame] = []
        address, ordinal, size = (position.segment << SHIFT) + position.offset, position.ordinal - position.index, 0
        while size < limit and (frame := self._tail.get(address)) is not None and frame.ordinal == ordinal:
            frames.append(frame)
            size += frame.next - address
            address, ordinal = frame.next, ordinal + len(frame.records)
        return frames

    def head(self) -> Head:
        known = self.mark.reached
        head = Head.unpack(self._store.call("GET", keys.HEAD))
        self.mark.saw(head.ordinal, known)
        return head

    def read(self, position: Position, limit: int = 1 << 20) -> list[Frame]:
        """Whole frames from a position on, about `limit` bytes of them; empty at the log's end. Raises StoreUnavailable where
        the log has fallen back, so that positions have to be read again."""
        if recent := self.recent(position, limit):
            return recent
        segment, offset = position.segment, position.offset
        ordinal = position.ordinal - position.index if position.ordinal or segment == 1 else None  # None: not known
        while True:
            known = self.mark.reached
            raw_head, chunk = self._store.many(
                (("GET", keys.HEAD), ("GETRANGE", f"{keys.LOG}{segment}", offset, offset + limit - 1))
            )
            head = Head.unpack(raw_head)
            self.mark.saw(head.ordinal, known)
            if self.mark.fell:
                raise StoreUnavailable("the store came back without its latest events")
            if segment < head.first_segment:
                ordinal = ordinal if segment + 1 == head.first_segment else None
                segment, offset = head.first_segment, 0
                continue
            frames, damaged = parse_frames(chunk, segment, offset)
            if frames:
                return frames
            if damaged:
                frame, offset = self._damage(segment, offset, ordinal)
                if frame is not None:
                    return [frame]
            elif len(chunk) == limit:
                limit *= 8  # a frame longer than what was asked for
            elif segment < head.segment:
                segment, offset = segment + 1, 0
            else:
                return []

    def _damage(self, segment: int, offset: int, ordinal: int | None) -> tuple[Frame | None, int]:
        """What stands at an address where no frame of this version does, as a broken frame of as many events as are
        missing, and the offset behind it. None where no event is known to be missing: something else was written there.
        """
        raw: bytes = self._store.call("GET", f"{keys.LOG}{segment}") or b""
        head, sealed = self.head(), self.sealed()
        if ordinal is None and segment - 1 in sealed:
            ordinal = sealed[segment - 1][3]
        header = header_at(raw, offset, any_version=True)
        if header is not None and ordinal in (None, header[6]):
            end, to, received, ordinal = offset + HEADER.size + header[4], header[2], header[5], int(header[6])
            upto = ordinal + header[3]
        else:
            end, to, received = next_header(raw, offset + 1, ordinal or 0, head.ordinal), ALL_STREAMS, head.last_arrival
            upto = sealed[segment][3] if segment in sealed else head.ordinal
            if end < len(raw):
                upto = HEADER.unpack_from(raw, end)[6]
            ordinal = upto if ordinal is None else ordinal
        missing = upto - ordinal
        log.error(
            "log is damaged", extra={"segment": segment, "offset": offset, "bytes": end - offset, "events": missing}
        )
        if missing <= 0:
            return None, end
        start = segment << SHIFT
        records = [record(0, raw[offset : min(end, offset + _DAMAGE_KEPT)]), *[record(0, b"")] * (missing - 1)]
        return Frame(start + offset, start + end, to, received, ordinal, "", records, broken=True), end

    def fetch(self, places: Sequence[int]) -> list[Fetched | None]:
        """Single events by place, None where the log no longer reaches."""
        words = [word for place in places for word in divmod(place, PER_FRAME)]
        rows = self._store.run("fetch", (keys.LOG,), words) if words else []
        whole = [row if row and len(row[2]) >= 8 else None for row in rows]  # or it is damaged
        return [
            Fetched(int(r[0]), r[1].decode(errors="replace"), *split(r[2]), int(r[3]), int(r[4])) if r else None
            for r in whole
        ]

    def redrive(self, letters: Sequence[tuple[str, str, str, bytes]], now: int) -> list[bool]:
        """Send dead letters (stream, id, source, record) to their streams again; False for those no longer dead."""
        args: list[str | bytes | int] = [now, SEGMENT_BYTES, SEGMENT_MS]
        for stream, letter_id, source, packed in letters:
            args += [stream, 1 << keys.STREAMS.index(stream), letter_id, source.encode(), packed]
        names = (keys.HEAD, keys.LOG, keys.SEGMENTS, keys.DEAD, keys.DEAD_ORDER, keys.CHECKPOINT, keys.REDRIVEN)
        try:
            return [bool(sent) for sent in self._store.run("redrive", names, args)]
        except StoreUnavailable as error:
            if error.lost:
                raise OutcomeUnknown(f"{error.message}; {_OPEN}, ask again: what was sent is dead no more") from error
            raise

    def trim(self, segment: int, epoch: int) -> bool:
        """Let go of the oldest segment, the ids in it and its index; False while a stream has yet to read it. Raises
        Fenced."""
        self.finish_trim(epoch)
        names = (keys.HEAD, keys.OWNER, keys.SEGMENTS, keys.SPANS, keys.LOG, keys.ROWS, keys.CHECKPOINT)
        if not self._store.run("trim", names, (epoch, segment, *keys.STREAMS)):
            return False
        self.drop_tail()
        self.finish_trim(epoch)
        return True

    def seal(self, epoch: int) -> list[str]:
        """Seal the open segment early; the streams for which it has to stay open, yet to read some of it. Raises Fenced."""
        names = (keys.HEAD, keys.LOG, keys.SEGMENTS, keys.OWNER, keys.CHECKPOINT)
        return [name.decode() for name in self._store.run("seal", names, (epoch, *keys.STREAMS))]

    def finish_trim(self, epoch: int) -> None:
        """Forget the ids of the segment that was let go of last, then the segment: where a crash left that undone."""
        segment = self.head().first_segment - 1
        raw: bytes | None = self._store.call("GET", f"{keys.LOG}{segment}")
        if raw is None:
            return
        words: list[str | bytes | int] = []
        at = 0
        while at < len(raw):
            frames, _ = parse_frames(raw[at:] if at else raw, segment, at)
            self._forget_redriven([frame for frame in frames if frame.to & REDRIVE])
            for frame in frames:
                ids = () if frame.to & REDRIVE else map(_event_id, frame.records)
                # A damaged event's id may not be readable: then it stays in the table, which costs its few bytes alone.
                known = {index: event_id for index, event_id in enumerate(ids) if event_id is not None}
                for index, digest in zip(known, digests(known.values()), strict=True):
                    words += [digest, _PLACE.pack(frame.address.to_bytes(6, "little"), index)]
                at = frame.next - (segment << SHIFT)
            if at < len(raw):  # what stands there is damaged
                at = next_header(raw, at + 1, 0, sys.maxsize)
        for start in range(0, max(1, len(words)), _FORGET_WORDS):
            last = [f"{keys.LOG}{segment}"] if start + _FORGET_WORDS >= len(words) else []
            names = (keys.HEAD, self._ids(), keys.OWNER, *last)
            self._store.run("forget", names, [epoch, *words[start : start + _FORGET_WORDS]])

    def _forget_redriven(self, frames: Sequence[Frame]) -> None:
        """What is remembered of dead letters that were sent again in these frames goes with them."""
        ids = [f"<{name}-{f.place(0)}" for f in frames for bit, name in enumerate(keys.STREAMS) if f.to >> bit & 1]
        if ids:
            kept = self._store.call("HMGET", keys.REDRIVEN, *ids)
            ids += [msgspec.json.decode(raw)["id"] for raw in kept if raw is not None]
            self._store.call("HDEL", keys.REDRIVEN, *ids)

    def readers(self, segment: int) -> list[str]:
        """The streams that have yet to read a segment, or are in it."""
        rows = self._store.many([("HGET", keys.CHECKPOINT + stream, "segment") for stream in keys.STREAMS])
        return [stream for stream, row in zip(keys.STREAMS, rows, strict=True) if int(row or 1) <= segment]

    def sealed(self) -> dict[int, tuple[int, int, int, int]]:
        """The sealed segments: first and last arrival (epoch ms), bytes, and the ordinal behind their last event."""
        found = as_hash(self._store.call("HGETALL", keys.SEGMENTS))
        return {int(segment): struct.unpack("<4Q", packed) for segment, packed in found.items()}

    def first_ordinal(self, segment: int) -> int | None:
        """The ordinal of a segment's first event, None where its start is damaged."""
        raw: bytes = self._store.call("GETRANGE", f"{keys.LOG}{segment}", 0, HEADER.size - 1)
        header = header_at(raw, 0, any_version=True)
        return None if header is None else int(header[6])

    def next_frames(self, positions: Sequence[Position]) -> list[tuple[int, list[int]] | None]:
        """Of the frames at positions: arrival (epoch ms), and for each stream how many events were addressed to it before.
        None at the log's end and where it is damaged."""
        last = HEADER.size - 1
        commands: list[Command] = []
        for p in positions:  # at a segment's end it is the next one's first
            commands.append(("GETRANGE", f"{keys.LOG}{p.segment}", p.offset, p.offset + last))
            commands.append(("GETRANGE", f"{keys.LOG}{p.segment + 1}", 0, last))
        found = self._store.many(commands) if commands else []
        headers = [
            header_at(raw or behind, 0, any_version=True) for raw, behind in zip(found[::2], found[1::2], strict=True)
        ]
        return [h and (h[5], [int.from_bytes(count, "little") for count in h[7:12]]) for h in headers]

    def locate(self, event_ids: Sequence[str]) -> list[int | None]:
        """The places of events by id, None where unknown."""
        found = self._store.call("HMGET", self._ids(), *digests(event_ids)) if event_ids else []
        return [_place(packed) if packed else None for packed in found]

    def _ids(self) -> str:
        """The key of the id table; before its first use, what earlier versions kept in buckets moves into it."""
        while not self._ids_moved:
            left = self._store.run("move_ids", (keys.HEAD, keys.IDS, keys.ID_BUCKET), (_MOVED_AT_ONCE,))
            self._ids_moved = left == 0
        return keys.IDS


def _place(packed: bytes) -> int:
    """A place as the id table holds it: 6 bytes of address, 2 of index, since the store's scripts count in doubles."""
    address, index = _PLACE.unpack(packed)
    return int.from_bytes(address, "little") * PER_FRAME + index


def _event_id(record: bytes) -> str | None:
    """The id of a stored event, which its JSON begins with (events.py); None where it is damaged."""
    start = 8 + len(b'{"event_id":')
    end = record.find(b'","event_type":', start) + 1
    try:
        return msgspec.json.decode(record[start:end], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
