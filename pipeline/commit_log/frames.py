"""Frames: what a segment of the log is made of, and the addresses in it.

A frame holds the events of one request. An address is segment * 2^24 + byte offset; an event's place is the address of its
frame * 8192 + its index in it.

    frame   57-byte header (lua/accept.lua packs it) | source | n offsets (u32) | n records
    record  event time (i64, epoch ms) | the event's stored JSON
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any
from zlib import crc32

import msgspec

from pipeline.events import Stored

ALL_STREAMS = 0b11111
BRIDGE_ONLY = 0b10000
CANARY = 0b100000
REDRIVE = 0b1000000
HEADER = struct.Struct("<2sBBHIQQ6s6s6s6s6sB")
SHIFT = 24
PER_FRAME = 8192
_TS = struct.Struct("<q")
_HEAD = struct.Struct("<18Q")


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
    times: list[int] | None = None  # event times (epoch ms), given with `events`
    broken: bool = False  # undecodable: one record per missing event, the first holds the raw bytes
    hashes: list[int] | None = None  # what user_hashes() found

    def place(self, index: int) -> int:
        return self.address * PER_FRAME + index

    def user_hashes(self) -> list[int]:
        """32 bits for each event's user, worked out once for all who want them."""
        if self.hashes is None:
            if self.events is not None:
                self.hashes = list(map(crc32, map(str.encode, [event.user_id for event in self.events])))
            else:
                self.hashes = user_hashes_of([record[8:] for record in self.records])
        return self.hashes

    def after(self) -> Position:
        start = self.address & 0xFFFFFF  # not from `next`: a frame may end behind what 24 bits of offset reach
        return Position(self.address >> SHIFT, start + self.next - self.address, 0, self.ordinal + len(self.records))


def record(ts: int, body: bytes) -> bytes:
    """The log record of an event: its time (epoch ms) and stored JSON."""
    return _TS.pack(ts) + body


def pack(records: Sequence[bytes]) -> bytes:
    """The offset table and the records of a frame."""
    offsets = accumulate(map(len, records[:-1]), initial=0) if records else ()
    return b"".join((struct.pack(f"<{len(records)}I", *offsets), *records))


def event_time(record: bytes) -> int:
    """A record's event time, epoch ms."""
    ts: int = _TS.unpack_from(record)[0]
    return ts


def split(record: bytes) -> tuple[int, bytes]:
    """A record's event time (epoch ms) and stored JSON."""
    return _TS.unpack_from(record)[0], record[8:]


def header_at(chunk: bytes, at: int, any_version: bool = False) -> tuple[Any, ...] | None:
    """The header at an offset of a chunk; None where none of this version stands."""
    if at + HEADER.size > len(chunk):
        return None
    header = HEADER.unpack_from(chunk, at)
    magic, version, _, n, length = header[:5]
    sound = magic == b"NX" and (version == 1 or any_version) and header[-1] + 4 * n <= length
    return header if sound else None


def next_header(chunk: bytes, at: int, least: int, most: int) -> int:
    """The offset, from `at` on, of the next header of this version with an ordinal between these; the chunk's end where
    none stands."""
    while (at := chunk.find(b"NX", at)) >= 0:
        header = header_at(chunk, at)
        if header is not None and least <= header[6] <= most:
            return at
        at += 1
    return len(chunk)


def parse_frames(chunk: bytes, segment: int, base: int) -> tuple[list[Frame], bool]:
    """The whole frames at the start of a chunk, and whether what follows them is no frame of this version."""
    frames: list[Frame] = []
    at, size = 0, len(chunk)
    while at + HEADER.size <= size:
        header = header_at(chunk, at)
        if header is None:
            return frames, True
        _, _, to, n, length, received, ordinal, _, _, _, _, _, source_size = header
        body = at + HEADER.size
        end = body + length
        if end > size:
            return frames, False
        table = body + source_size
        records = table + 4 * n
        bounds = [*struct.unpack_from(f"<{n}I", chunk, table), end - records]
        frames.append(
            Frame(
                (segment << SHIFT) + base + at,
                (segment << SHIFT) + base + end,
                to,
                received,
                ordinal,
                chunk[body:table].decode(errors="replace"),
                [chunk[records + a : records + b] for a, b in pairwise(bounds)],
            )
        )
        at = end
    # Bytes too few for a header are damage only where nothing follows: an append is atomic.
    return frames, at < size and size - at < HEADER.size and not frames and size < HEADER.size


class _OnlyUser(msgspec.Struct):
    user_id: str


_MARK = b'"user_id":"'
_decode_user = msgspec.json.Decoder(_OnlyUser).decode
_decode_text = msgspec.json.Decoder(str).decode
_encode = msgspec.json.Encoder().encode


def user_of(body: bytes) -> bytes:
    """The user of a stored event, as JSON has it between the quotes; nothing before it can hold the mark (events.py). Of an event
    that this version cannot decode it may be anything; it raises nothing, since whoever asks has others to look at."""
    user = body.partition(_MARK)[2].partition(b'"')[0]  # half the time of a search by index
    if b"\\" not in user:
        return user
    try:
        return _encode(_decode_user(body).user_id)[1:-1]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return b""


def named(user: bytes) -> str:
    """The user_id that user_of() found."""
    return _decode_text(b'"%b"' % user) if b"\\" in user else user.decode(errors="replace")


def user_hashes_of(bodies: Sequence[bytes]) -> list[int]:
    """32 bits for the user of each of these stored events, the same as of the decoded event's user_id."""
    users = [body.partition(_MARK)[2].partition(b'"')[0] for body in bodies]
    if b"\\" in b"".join(users):  # JSON writes one of them otherwise than it is
        users = [named(user_of(body)).encode() for body in bodies]
    return list(map(crc32, users))
