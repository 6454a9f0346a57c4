"""What a stream is: the batch it is given, and what it gives back to be committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, TypeVar

import msgspec
from h3.api.basic_int import latlng_to_cell

from pipeline.commit_log.frames import CANARY, Frame, Position, event_time, split
from pipeline.events import Stored
from pipeline.store import Command, Store

ZONE_RESOLUTION = 7  # H3 cells of about 5 km², the size of a city district

_decode_event = msgspec.json.Decoder(Stored).decode
_decode_events = msgspec.json.Decoder(list[Stored]).decode
UNDECODABLE = "undecodable: the stored event is not of a form this version knows"
_BLANK = Stored("", "", "", "", "", "", {})  # stands in the columns where an event is undecodable
T = TypeVar("T")


class Batch:
    """Consecutive events of the log, decoded once for all streams; columns run parallel, index by index.

    `ts` and `arrivals` are epoch ms; `places` are the log's (frames.py). An event that no version can decode is None, and its
    index is among the `undecodable`; where a stream has no use for these, `counted` leaves them out of a column.
    """

    def __init__(self, frames: list[Frame], skip: int = 0, single: bool = False) -> None:
        self.events: list[Stored | None] = []
        self.ts: list[int] = []
        self.places: list[int] = []
        self.arrivals: list[int] = []
        self.sources: list[str] = []
        self._records: list[bytes] = []
        self._pieces: list[tuple[Frame, int, int]] = []
        self.first_ordinal = frames[0].ordinal + skip
        self.to = frames[0].to
        self.canary = bool(self.to & CANARY)
        at_hand = True
        for frame in frames:
            stop = skip + 1 if single else len(frame.records)
            records = frame.records[skip:stop]
            self._records += records
            self._pieces.append((frame, skip, stop))
            if frame.events is not None and frame.times is not None:
                self.events += frame.events[skip:stop]
                self.ts += frame.times[skip:stop]
            else:
                self.events += _decoded(records)
                self.ts += map(event_time, records)
                at_hand = False
            first = frame.place(0)
            self.places += range(first + skip, first + stop)
            self.arrivals += [frame.received_at] * (stop - skip)
            self.sources += [frame.source] * (stop - skip)
            skip = 0
        self.undecodable = [] if at_hand else [i for i, event in enumerate(self.events) if event is None]
        last = frames[-1]
        self.after = (
            last.after()
            if stop == len(last.records)
            else Position(last.address >> 24, last.address & 0xFFFFFF, stop, last.ordinal + stop)
        )

    def body(self, index: int) -> bytes:
        """The stored JSON of one event."""
        return split(self._records[index])[1]

    def __len__(self) -> int:
        return len(self.events)

    def data(self, index: int) -> dict[str, Any]:
        """The `data` of one event."""
        event = self.events[index]
        return event.data if event is not None else {}

    @cached_property
    def _rows(self) -> Sequence[Stored]:
        return [event or _BLANK for event in self.events] if self.undecodable else self.events  # type: ignore[return-value]

    @cached_property
    def types(self) -> list[str]:
        return [event.event_type for event in self._rows]

    @cached_property
    def users(self) -> list[str]:
        return [event.user_id for event in self._rows]

    @cached_property
    def user_hashes(self) -> list[int]:
        """32 bits for each user."""
        return [found for frame, start, stop in self._pieces for found in frame.user_hashes()[start:stop]]

    @cached_property
    def sessions(self) -> list[str]:
        """Empty texts where there is none."""
        return [event.session_id or "" for event in self._rows]

    @cached_property
    def devices(self) -> list[str]:
        return [event.device_type for event in self._rows]

    @cached_property
    def by_type(self) -> dict[str, list[int]]:
        """The indexes of the events of each type, in order."""
        found: dict[str, list[int]] = {}
        for index, event_type in enumerate(self.types):
            if event_type in found:
                found[event_type].append(index)
            else:
                found[event_type] = [index]
        return found

    @cached_property
    def zones(self) -> list[str | None]:
        """The H3 cell of each event: a ride request's pickup, else its location, else None."""
        spots: list[Any] = [event.location for event in self._rows]
        pickups = {
            i: pickup
            for i in self.by_type.get("ride_request", ())
            if (pickup := self.data(i).get("pickup")) is not None
        }
        for index in pickups:
            spots[index] = None
        # Locations were judged by ingest. No function of ours runs for each: this is a good part of what an event costs.
        zones = [
            None if spot is None else _name_of(latlng_to_cell(spot["lat"], spot["lng"], ZONE_RESOLUTION))
            for spot in spots
        ]
        for index, pickup in pickups.items():
            zones[index] = _cell_of(pickup)
        return zones

    def counted(self, column: Sequence[T]) -> Sequence[T]:
        """A column without the undecodable events."""
        if not self.undecodable:
            return column
        left_out = set(self.undecodable)
        return [value for index, value in enumerate(column) if index not in left_out]

    def outcome(self) -> Outcome:
        """All that can be decoded is done, the others are dead: for a stream that has nothing else to object to."""
        return Outcome(len(self) - len(self.undecodable), [(index, UNDECODABLE) for index in self.undecodable])


def _decoded(records: list[bytes]) -> list[Stored | None]:
    """The events of records, None where one is of no form this version knows: all at once, as costs half, if all are sound."""
    try:
        events: list[Any] = _decode_events(b"[%b]" % b",".join([record[8:] for record in records]))
        if len(events) == len(records):
            return events
    except msgspec.MsgspecError:
        pass
    return [_decoded_alone(record) for record in records]


def _decoded_alone(record: bytes) -> Stored | None:
    try:
        return _decode_event(split(record)[1])
    except msgspec.MsgspecError:
        return None


def _cell_of(pickup: Any) -> str | None:
    """The cell of a pickup, which ingest did not judge: None where it is no place."""
    if type(pickup) is not dict:
        return None
    lat: Any = pickup.get("lat")
    lng: Any = pickup.get("lng")
    if type(lat) not in (int, float) or type(lng) not in (int, float):
        return None
    return _name_of(latlng_to_cell(lat, lng, ZONE_RESOLUTION)) if -90 <= lat <= 90 and -180 <= lng <= 180 else None


@lru_cache(maxsize=50_000)
def _name_of(cell: int) -> str:
    """What H3 writes for a cell."""
    return f"{cell:x}"


@dataclass(slots=True)
class Outcome:
    """What a stream made of a batch: how many events it took in, and (index, reason) of those it never can."""

    done: int = 0
    dead: list[tuple[int, str]] = field(default_factory=list)


@dataclass(slots=True)
class Cut:
    """All that a stream has to write for what it processed so far.

    `chunks` may be written one by one while processing goes on: each row in them carries the ordinal up to which it
    is complete,
    so that reading the log again after a crash counts nothing twice. `final` goes with the checkpoint in one step.
    `done` is called once that step has succeeded.
    """

    chunks: Iterator[list[Command]] = field(default_factory=lambda: iter(()))
    final: Iterable[Command] = ()
    done: Callable[[], None] = lambda: None


class Stream(ABC):
    """One local stream. Its working state lives in memory from load() on; when anything fails, a new one is made from
    the store."""

    name: ClassVar[str]

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def unsaved(self) -> bool:
        """There is something to write though no event came."""
        return False

    @property
    def full(self) -> bool:
        """There is so much to write in one step that it should not become more."""
        return False

    def load(self, now: int) -> None:  # noqa: B027  most streams have nothing to load
        """Read what must be in memory before the first batch."""

    @abstractmethod
    def process(self, batch: Batch, now: int) -> Outcome:
        """Take in a batch; `now` is the clock in epoch ms. An exception undoes nothing: the runner drops this
        stream."""

    def pass_over(self, batch: Batch) -> None:  # noqa: B027  most streams have no use for it
        """Know of a batch that is addressed to others alone."""

    @abstractmethod
    def cut(self, now: int) -> Cut:
        """What to write for everything processed up to this moment."""
