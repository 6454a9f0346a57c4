"""The log: accept, read, fetch, trim. It is the truth, and the write-ahead log of everything else.

A segment is a string to which frames are appended; a frame holds the events of one request. An address is
segment * 2^24 + byte offset; an event's place is address of its frame * 8192 + index in the frame.

    frame   57-byte header (lua/accept.lua packs it) | source | n offsets (u32) | n records
    record  event time (i64, epoch ms) | the event's stored JSON
"""

from __future__ import annotations

import hashlib
import logging
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

from pipeline import keys
from pipeline.events import Parsed, Stored
from pipeline.store import Store

SEGMENT_BYTES = 8 << 20
SEGMENT_MS = 3_600_000
MAX_FRAME_EVENTS = 5_000
ALL_STREAMS = 0b11111
BRIDGE_ONLY = 0b10000
CANARY = 0b100000
REDRIVE = 0b1000000

_HEADER = struct.Struct("<2sBBHIQQ6s6s6s6s6sB")
_HEAD = struct.Struct("<18Q")
_TS = struct.Struct("<q")
_SHIFT = 24
_DAMAGE_KEPT = 4096
_TAIL_EVENTS = 20_000
_FORGET_WORDS = 2_000
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream stands: the next frame, the next event in it, and how many events the log held before it."""

    segment: int = 1
    offset: int = 0
    index: int = 0
    ordinal: int = 0


@dataclass(slots=True)
class Head:
    """The log's end and its counters, as accept.lua packs them."""

    segment: int = 1
    offset: int = 0
    ordinal: int = 0
    addressed: tuple[int, ...] = (0, 0, 0, 0, 0)
    accepted: int = 0
    bridge_only: int = 0
    duplicates: int = 0
    rejected: int = 0
    ids: int = 0
    opened: int = 0
    last_arrival: int = 0
    first_segment: int = 1

    @classmethod
    def unpack(cls, raw: bytes | None) -> Head:
        if not raw:
            return cls()
        v = _HEAD.unpack(raw)
        return cls(v[0], v[1], v[2], v[3:8], v[8], v[9], v[10], v[11], v[12], v[15], v[16], v[17])


@dataclass(slots=True)
class Frame:
    """The events of one request."""

    address: int
    next: int
    to: int
    received_at: int
    ordinal: int
    source: str
    records: list[bytes]
    events: list[Stored] | None = None  # decoded, where this process has just appended the frame itself
    broken: bool = False  # undecodable: one record per missing event, the first holds the raw bytes

    def place(self, index: int) -> int:
        return self.address * 8192 + index

    def after(self) -> Position:
        return Position(self.next >> _SHIFT, self.next & 0xFFFFFF, 0, self.ordinal + len(self.records))


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


def digest(event_id: str) -> bytes:
    """10 bytes that stand for an event id in the id table: among 10^9 ids two collide with a chance of 4 in 10^7."""
    return hashlib.blake2b(event_id.encode(), digest_size=10).digest()


class Log:
    """The log of one partition. What this process appended last it can read again without asking the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tail: dict[int, Frame] = {}  # by address, in order
        self._tail_events = 0
        self._tail_lock = threading.Lock()

    def accept(self, requests: Sequence[Request], now: int) -> list[Taken]:
        """Take the requests in one atomic step; `now` in epoch ms. Raises StoreUnavailable or StoreFull: nothing is
        taken
        then, unless the answer was lost."""
        args: list[str | bytes | int] = [
            now,
            sum(r.rejected for r in requests),
            SEGMENT_BYTES,
            SEGMENT_MS,
            len(requests),
        ]
        records = [[_TS.pack(event.ts) + event.body for event in request.events] for request in requests]
        for request, packed in zip(requests, records, strict=True):
            args += [request.to, request.source.encode(), len(packed)]
            args.append(b"".join([digest(event.event_id) for event in request.events]))
            args += packed
        answer = self._store.run("accept", (keys.HEAD, keys.LOG, keys.ID, keys.SEGMENTS), args)
        found = []
        for row, request, packed in zip(answer, requests, records, strict=True):
            taken = Taken(int(row[0]), row[1] + row[2], row[2], row[4:])
            if taken.taken:
                self._remember(taken, int(row[3]), request, packed)
            found.append(taken)
        return found

    def _remember(self, taken: Taken, received_at: int, request: Request, records: list[bytes]) -> None:
        """Keep an appended frame for the readers that follow at once."""
        events = [event.stored for event in request.events]
        if taken.duplicates:
            known = set(taken.duplicates)
            records = [packed for i, packed in enumerate(records) if i not in known]
            events = [event for i, event in enumerate(events) if i not in known]
        size = _HEADER.size + len(request.source.encode()) + 4 * len(records) + sum(map(len, records))
        first = taken.end - taken.taken
        frame = Frame(
            taken.address, taken.address + size, request.to, received_at, first, request.source, records, events
        )
        with self._tail_lock:
            if self._tail and next(reversed(self._tail)) >= taken.address:  # the store was emptied
                self._clear_tail()
            self._tail[taken.address] = frame
            self._tail_events += len(records)
            while self._tail_events > _TAIL_EVENTS and len(self._tail) > 1:
                oldest = self._tail.pop(next(iter(self._tail)))
                self._tail_events -= len(oldest.records)

    def drop_tail(self) -> None:
        """Read from the store alone what stands there now: it may have been emptied or trimmed."""
        with self._tail_lock:
            self._clear_tail()

    def _clear_tail(self) -> None:
        self._tail, self._tail_events = {}, 0

    def _recent(self, position: Position, limit: int) -> list[Frame]:
        """The frames from a position on that this process has just appended."""
        frames: list[Frame] = []
        address, ordinal, size = (position.segment << _SHIFT) + position.offset, position.ordinal - position.index, 0
        while size < limit and (frame := self._tail.get(address)) is not None and frame.ordinal == ordinal:
            frames.append(frame)
            size += frame.next - address
            address, ordinal = frame.next, ordinal + len(frame.records)
        return frames

    def head(self) -> Head:
        return Head.unpack(self._store.call("GET", keys.HEAD))

    def read(self, position: Position, limit: int = 1 << 20) -> list[Frame]:
        """Whole frames from a position on, about `limit` bytes of them; empty at the log's end."""
        if recent := self._recent(position, limit):
            return recent
        segment, offset = position.segment, position.offset
        while True:
            raw_head, chunk = self._store.many(
                (("GET", keys.HEAD), ("GETRANGE", f"{keys.LOG}{segment}", offset, offset + limit - 1))
            )
            head = Head.unpack(raw_head)
            frames, damaged = _parse(chunk, segment, offset)
            if frames:
                return frames
            if damaged:
                frame, offset = self._damage(segment, offset, position.ordinal)
                if frame is not None:
                    return [frame]
            elif len(chunk) == limit:
                limit *= 8  # a frame longer than what was asked for
            elif segment < head.segment:
                segment, offset = segment + 1, 0
            else:
                return []

    def _damage(self, segment: int, offset: int, ordinal: int) -> tuple[Frame | None, int]:
        """What stands at an address where no frame of this version does, as a broken frame of as many events as are
        missing,
        and the offset behind it. None where no event is missing: something else was written there."""
        raw: bytes = self._store.call("GET", f"{keys.LOG}{segment}") or b""
        head = self.head()
        if header := _header(raw, offset, any_version=True):
            end, upto, to, received = offset + _HEADER.size + header[4], header[6] + header[3], header[2], header[5]
        else:
            end, to, received = offset + 1, ALL_STREAMS, head.last_arrival
            while (end := raw.find(b"NX", end)) >= 0 and not _header(raw, end):
                end += 1
            if end >= 0:
                upto = _HEADER.unpack_from(raw, end)[6]
            else:
                end = len(raw)
                sealed = self._store.call("HGET", keys.SEGMENTS, segment)
                upto = struct.unpack("<4Q", sealed)[3] if sealed else head.ordinal
        missing = upto - ordinal
        log.error(
            "log is damaged", extra={"segment": segment, "offset": offset, "bytes": end - offset, "events": missing}
        )
        if missing <= 0:
            return None, end
        start = segment << _SHIFT
        records = [_TS.pack(0) + raw[offset : min(end, offset + _DAMAGE_KEPT)], *[_TS.pack(0)] * (missing - 1)]
        return Frame(start + offset, start + end, to, received, ordinal, "", records, broken=True), end

    def fetch(self, places: Sequence[int]) -> list[Fetched | None]:
        """Single events by place, None where the log no longer reaches."""
        rows = self._store.run("fetch", (keys.LOG,), places) if places else []
        return [
            Fetched(int(r[0]), r[1].decode(errors="replace"), *split(r[2]), int(r[3]), int(r[4])) if r else None
            for r in rows
        ]

    def redrive(self, letters: Sequence[tuple[str, str, str, bytes]], now: int) -> list[bool]:
        """Send dead letters (stream, id, source, record) to their streams again; False for those no longer dead."""
        args: list[str | bytes | int] = [now, SEGMENT_BYTES, SEGMENT_MS]
        for stream, letter_id, source, record in letters:
            args += [stream, 1 << keys.STREAMS.index(stream), letter_id, source.encode(), record]
        names = (keys.HEAD, keys.LOG, keys.SEGMENTS, keys.DEAD, keys.DEAD_ORDER, keys.CHECKPOINT, keys.REDRIVEN)
        return [bool(sent) for sent in self._store.run("redrive", names, args)]

    def trim(self, segment: int, epoch: int) -> bool:
        """Let go of the oldest segment, the ids in it and its index; False while a stream has yet to read it. Raises
        Fenced."""
        if not self._trimmable(segment):
            return False
        position = Position(segment)
        while frames := self.read(position):
            if frames[0].address >> _SHIFT != segment:
                break
            words: list[str | bytes | int] = [epoch]
            for frame in frames:
                for index, record in enumerate(frame.records):
                    if not frame.broken and not frame.to & REDRIVE:
                        words += [digest(_event_id(record)), frame.place(index)]
            for at in range(1, len(words), _FORGET_WORDS):
                self._store.run("forget", (keys.HEAD, keys.ID, keys.OWNER), [epoch, *words[at : at + _FORGET_WORDS]])
            position = frames[-1].after()
        names = (keys.HEAD, keys.OWNER, keys.SEGMENTS, keys.SPANS, keys.LOG, keys.ROWS, keys.CHECKPOINT)
        trimmed = bool(self._store.run("trim", names, (epoch, segment, *keys.STREAMS)))
        if trimmed:
            self.drop_tail()
        return trimmed

    def _trimmable(self, segment: int) -> bool:
        """Every stream has read past the segment; the script decides, this spares forgetting ids in vain."""
        rows = self._store.many([("HGET", keys.CHECKPOINT + stream, "segment") for stream in keys.STREAMS])
        return self.head().segment > segment and all(int(row or 1) > segment for row in rows)

    def sealed(self) -> dict[int, tuple[int, int, int, int]]:
        """The sealed segments: first and last arrival (epoch ms), bytes, and the ordinal behind their last event."""
        flat = self._store.call("HGETALL", keys.SEGMENTS)
        pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
        return {int(segment): struct.unpack("<4Q", packed) for segment, packed in pairs}

    def arrivals(self, positions: Sequence[Position]) -> list[int | None]:
        """When the frames at positions arrived (epoch ms), None at the log's end."""
        size = _HEADER.size
        commands = [("GETRANGE", f"{keys.LOG}{p.segment}", p.offset, p.offset + size - 1) for p in positions]
        found = self._store.many(commands) if commands else []
        return [_HEADER.unpack(raw)[5] if len(raw) == size else None for raw in found]

    def locate(self, event_ids: Sequence[str]) -> list[int | None]:
        """The places of events by id, None where unknown."""
        found = self._store.run("locate", (keys.HEAD, keys.ID), [digest(event_id) for event_id in event_ids])
        return [int(place) if place else None for place in found]


def record(ts: int, body: bytes) -> bytes:
    """The log record of an event: its time (epoch ms) and stored JSON."""
    return _TS.pack(ts) + body


def event_time(record: bytes) -> int:
    """A record's event time, epoch ms."""
    ts: int = _TS.unpack_from(record)[0]
    return ts


def split(record: bytes) -> tuple[int, bytes]:
    """A record's event time (epoch ms) and stored JSON."""
    return _TS.unpack_from(record)[0], record[8:]


def _event_id(record: bytes) -> str:
    """The id of a stored event, which its JSON begins with (events.py)."""
    start = 8 + len(b'{"event_id":')
    end = record.index(b'","event_type":', start) + 1
    event_id: str = msgspec.json.decode(record[start:end])
    return event_id


def _header(chunk: bytes, at: int, any_version: bool = False) -> tuple[Any, ...] | None:
    """The header at an offset of a chunk; None where none of this version stands."""
    if at + _HEADER.size > len(chunk):
        return None
    header = _HEADER.unpack_from(chunk, at)
    magic, version, _, n, length = header[:5]
    sound = magic == b"NX" and (version == 1 or any_version) and header[-1] + 4 * n <= length
    return header if sound else None


def _parse(chunk: bytes, segment: int, base: int) -> tuple[list[Frame], bool]:
    """The whole frames at the start of a chunk, and whether what follows them is no frame of this version."""
    frames: list[Frame] = []
    at, size = 0, len(chunk)
    while at + _HEADER.size <= size:
        header = _header(chunk, at)
        if header is None:
            return frames, True
        _, _, to, n, length, received, ordinal, _, _, _, _, _, source_size = header
        body = at + _HEADER.size
        end = body + length
        if end > size:
            return frames, False
        table = body + source_size
        records = table + 4 * n
        bounds = [*struct.unpack_from(f"<{n}I", chunk, table), end - records]
        frames.append(
            Frame(
                (segment << _SHIFT) + base + at,
                (segment << _SHIFT) + base + end,
                to,
                received,
                ordinal,
                chunk[body:table].decode(errors="replace"),
                [chunk[records + a : records + b] for a, b in pairwise(bounds)],
            )
        )
        at = end
    # Bytes too few for a header are damage only where nothing follows: an append is atomic.
    return frames, at < size and size - at < _HEADER.size and not frames and size < _HEADER.size
