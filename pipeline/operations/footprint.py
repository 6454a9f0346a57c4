"""The footprint: bytes that the store spends on a stored event, on an id and on a user, measured on a few keys of each."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

import msgspec

from pipeline import keys
from pipeline.commit_log.frames import HEADER, Head
from pipeline.log import Log
from pipeline.store import Command, Store
from pipeline.streams.storage import ROW

EVERY_S = 10.0
_NOW_S = 1.0
_SAMPLES = 16
_PLACE = struct.Struct("<Q")  # which a row of the index begins with
_OF_A_USER = (keys.USER, keys.HABIT, keys.SERVING)
Bytes = dict[str, float | None]


class _Named(msgspec.Struct):
    user_id: str


_decode = msgspec.json.Decoder(_Named).decode


class Footprint:
    """`latest` is None for what the store holds nothing of. A look costs a few round trips, whatever the store holds."""

    def __init__(self, store: Store, log: Log) -> None:
        self._store, self._log = store, log
        self._measured = -EVERY_S  # monotonic seconds
        self.latest: Bytes = {"per_event": None, "per_id": None, "per_user": None}
        self.of_events: float | None = None  # all that retention may let go of

    def of_events_now(self) -> float | None:
        """`of_events` as it is, not as it was seconds ago: a store may fill meanwhile. Raises StoreError."""
        self.look(_NOW_S)
        return self.of_events

    def look(self, every_s: float = EVERY_S) -> None:
        """Measure, unless that was done less than so long ago. Raises StoreError."""
        if time.monotonic() < self._measured + every_s:
            return
        self._measured = time.monotonic()
        head = self._log.head()
        self.latest = {
            "per_event": self._per_event(head),
            "per_id": _ratio(self._memory([keys.IDS]), head.ids),
            "per_user": self._per_user(head),
        }
        self.of_events = head.ids * ((self.latest["per_event"] or 0.0) + (self.latest["per_id"] or 0.0))

    def _per_event(self, head: Head) -> float | None:
        """Of the last two segments: the log itself, and the index by which its events are found."""
        segments = [n for n in (head.segment - 1, head.segment) if n >= head.first_segment]
        first = self._store.call("GETRANGE", f"{keys.LOG}{segments[0]}", 0, HEADER.size - 1)
        if len(first) < HEADER.size:
            return None
        events = head.ordinal - HEADER.unpack(first)[6]
        return _ratio(self._memory([prefix + str(n) for n in segments for prefix in (keys.LOG, keys.ROWS)]), events)

    def _per_user(self, head: Head) -> float | None:
        """What is kept under a user's name: feature tiles, habit and public features. The users are those of events spread
        over the latest segment, so that one with many events is more likely among them."""
        name = f"{keys.ROWS}{head.segment}"
        starts = [row * ROW.itemsize for row in _spread(int(self._store.call("STRLEN", name)) // ROW.itemsize)]
        if not starts:
            return self.latest["per_user"]  # a segment that has only just been opened
        packed = self._store.many([("GETRANGE", name, at, at + _PLACE.size - 1) for at in starts])
        found = self._log.fetch([_PLACE.unpack(raw)[0] for raw in packed])
        users = list({user for event in found if event is not None and (user := _user(event.body))})
        return _ratio(self._memory([prefix + user for user in users for prefix in _OF_A_USER]), len(users))

    def _memory(self, names: Sequence[str]) -> int:
        """The bytes of these keys, as the store itself counts them; none for one that is not there."""
        commands: list[Command] = [("MEMORY USAGE", name) for name in names]
        return sum(int(size or 0) for size in self._store.many(commands)) if commands else 0


def _user(body: bytes) -> str | None:
    try:
        return _decode(body).user_id
    except ValueError:  # damaged
        return None


def _spread(count: int) -> list[int]:
    """Some of the numbers below `count`, at even distances."""
    return sorted({count * n // _SAMPLES for n in range(_SAMPLES)}) if count else []


def _ratio(size: int, of: int) -> float | None:
    return round(size / of, 1) if of else None
