"""What a stream is: the batch it is given, and what it gives back to be committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import msgspec
from h3.api.basic_str import latlng_to_cell

from pipeline.events import CANARY_TYPE, NO_LOCATION, Event, Stored
from pipeline.frames import Frame, Position, event_time, split
from pipeline.store import Command, Store

ZONE_RESOLUTION = 7  # H3 cells of about 5 km², the size of a city district

_decode_event = msgspec.json.Decoder(Event).decode
_decode_json = msgspec.json.Decoder().decode
UNDECODABLE = "undecodable: the stored event is not of a form this version knows"


class _Spot(msgspec.Struct, gc=False):
    """A location as ingest has judged it."""

    lat: float
    lng: float


_decode_spot = msgspec.json.Decoder(_Spot).decode


class Batch:
    """Consecutive events of the log, decoded once for all streams; lists run parallel, index by index.

    `ts` and `arrivals` are epoch ms; `places` are the log's (log.py). An event that no version can decode is None.
    """

    def __init__(self, frames: list[Frame], skip: int = 0, single: bool = False) -> None:
        self.events: list[Event | Stored | None] = []
        self.ts: list[int] = []
        self.places: list[int] = []
        self.arrivals: list[int] = []
        self.sources: list[str] = []
        self._records: list[bytes] = []
        self._data: dict[int, dict[str, Any]] = {}
        self.first_ordinal = frames[0].ordinal + skip
        self.to = frames[0].to
        for frame in frames:
            stop = skip + 1 if single else len(frame.records)
            records = frame.records[skip:stop]
            self._records += records
            self.ts += [event_time(record) for record in records]
            self.events += frame.events[skip:stop] if frame.events is not None else map(_decoded, records)
            first = frame.place(0)
            self.places += range(first + skip, first + stop)
            self.arrivals += [frame.received_at] * (stop - skip)
            self.sources += [frame.source] * (stop - skip)
            skip = 0
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
        """The decoded `data` of one event."""
        data = self._data.get(index)
        if data is None:
            event = self.events[index]
            if isinstance(event, Stored):
                return event.data
            decoded = _decode_json(event.data) if event is not None else {}
            data = self._data[index] = decoded if type(decoded) is dict else {}
        return data

    @cached_property
    def zones(self) -> list[str | None]:
        """The H3 cell of each event: a ride request's pickup, else its location, else None."""
        return [self._zone(i, event) if event is not None else None for i, event in enumerate(self.events)]

    def _zone(self, index: int, event: Event | Stored) -> str | None:
        if event.event_type == "ride_request" and (pickup := self.data(index).get("pickup")) is not None:
            return _cell_of(pickup)
        if isinstance(event, Stored):
            if event.location is None:
                return None
            lat, lng = event.location["lat"], event.location["lng"]
        elif event.location is NO_LOCATION:
            return None
        else:
            spot = _decode_spot(event.location)
            lat, lng = spot.lat, spot.lng
        zone: str = latlng_to_cell(lat, lng, ZONE_RESOLUTION)
        return zone


def _decoded(record: bytes) -> Event | None:
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
    zone: str | None = latlng_to_cell(lat, lng, ZONE_RESOLUTION) if -90 <= lat <= 90 and -180 <= lng <= 180 else None
    return zone


def is_canary(event: Event | Stored) -> bool:
    return event.event_type == CANARY_TYPE


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
    final: list[Command] = field(default_factory=list)
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

    def load(self, now: int) -> None:  # noqa: B027  most streams have nothing to load
        """Read what must be in memory before the first batch."""

    @abstractmethod
    def process(self, batch: Batch, now: int) -> Outcome:
        """Take in a batch; `now` is the clock in epoch ms. An exception undoes nothing: the runner drops this
        stream."""

    @abstractmethod
    def cut(self, now: int) -> Cut:
        """What to write for everything processed up to this moment."""
