"""Stream two: storage and indexing. The events are in the log; this keeps the rows by which they are found."""

from __future__ import annotations

import base64
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline import keys
from pipeline.errors import BadRequest
from pipeline.events import Event
from pipeline.log import Log
from pipeline.store import Command, Store, as_hash
from pipeline.streams.stream import Batch, Cut, Outcome, Stream

ROW = np.dtype(
    [("place", "<u8"), ("ts", "<i8"), ("user", "<u4"), ("session", "<u4"), ("type", "<u4"), ("source", "<u4")]
)
_PACK = struct.Struct("<QqIIII").pack
_SPAN = struct.Struct("<qqQ")
_SEGMENT_OF_PLACE = 24 + 13
PAGE_BYTES = 8 << 20  # of events: a page ends here too, since its reader may take its time
_FETCHED_AT_ONCE = 501  # half a page of the most events, and the one that tells whether another follows
_FETCHED_FIRST = 128  # while it is not known how large they are; of the largest, a page
_DAMAGE_TOLD = 1_000  # places; more are left out in silence
Rows = NDArray[np.void]

_decode_event = msgspec.json.Decoder(Event).decode
log = logging.getLogger(__name__)


def name_hash(text: str) -> int:
    """32 bits by which rows are filtered; the event itself decides."""
    return crc32(text.encode())


@dataclass(frozen=True, slots=True)
class Query:
    """Which events: texts match exactly, `since` and `until` (epoch ms) include their instants and count by event
    time."""

    user_id: str | None = None
    event_type: str | None = None
    session_id: str | None = None
    source: str | None = None
    since: int | None = None
    until: int | None = None
    newest_first: bool = False


@dataclass(slots=True)
class Found:
    """A stored event: event time and arrival in epoch ms, where it came from, its place and its JSON."""

    event: Event
    ts: int
    received_at: int
    source: str
    place: int
    body: bytes


@dataclass(slots=True)
class _Page:
    """Up to `limit` events, about PAGE_BYTES of them; `more`: another one was come across."""

    limit: int
    events: list[Found] = field(default_factory=list)
    size: int = 0
    more: bool = False

    @property
    def full(self) -> bool:
        return len(self.events) >= self.limit or self.size >= PAGE_BYTES

    def add(self, event: Found) -> None:
        if self.full:
            self.more = True
        else:
            self.events.append(event)
            self.size += len(event.body)

    def wanted(self) -> int:
        """How many events to fetch: those that are lacking, and the one that tells whether another page follows."""
        lacking, most = self.limit - len(self.events), _FETCHED_FIRST
        if self.size:
            most = min(_FETCHED_AT_ONCE, max(0, PAGE_BYTES - self.size) * len(self.events) // self.size + 1)
        return min(max(lacking + 1, 16), most)


class Storage(Stream):
    """Rows since the last checkpoint wait in memory, by segment of the log; the store appends them."""

    name = "storage"

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._pending: list[bytes] = []
        self._writing: list[bytes] = []
        self._spans: dict[int, tuple[int, int, int]] = {}

    def load(self, now: int) -> None:
        self._spans = read_spans(self.store)

    def process(self, batch: Batch, now: int) -> Outcome:
        if not batch.canary:
            # name_hash() as maps of C functions: no Python runs per event.
            sessions = map(crc32, map(str.encode, batch.sessions))
            few = [
                map({name: name_hash(name) for name in {*column}}.get, column)
                for column in (batch.types, batch.sources)
            ]
            rows = list(map(_PACK, batch.places, batch.ts, batch.user_hashes, sessions, *few))
            self._pending.append(b"".join(batch.counted(rows)))
        return batch.outcome()

    def cut(self, now: int) -> Cut:
        self._writing, self._pending = self._pending, []
        rows = np.frombuffer(b"".join(self._writing), ROW)
        segments = rows["place"] >> _SEGMENT_OF_PLACE
        final: list[Command] = []
        for segment in np.unique(segments).tolist():
            some = rows[segments == segment]
            ts = some["ts"]
            low, high, count = self._spans.get(segment, (int(ts[0]), int(ts[0]), 0))
            span = (min(low, int(ts.min())), max(high, int(ts.max())), count + len(some))
            self._spans[segment] = span
            final.append(("APPEND", f"{keys.ROWS}{segment}", some.tobytes()))
            final.append(("HSET", keys.SPANS, segment, _SPAN.pack(*span)))
        return Cut(iter(()), final, self._written)

    def _written(self) -> None:
        self._writing = []

    def unwritten(self) -> Rows:
        """The rows that the store does not have yet."""
        pending = list(self._pending)  # first: rows that a cut moves meanwhile are seen twice, but never missed
        return np.frombuffer(b"".join(self._writing + pending), ROW)


def read_spans(store: Store) -> dict[int, tuple[int, int, int]]:
    """For each segment: least and greatest event time (epoch ms) and the number of rows."""
    found = as_hash(store.call("HGETALL", keys.SPANS))
    return {int(segment): _SPAN.unpack(packed) for segment, packed in found.items()}


class EventStore:
    """Queries over the stored events, in order of event time, page by page.

    `unwritten` gives the rows of the running stream that the store does not have yet; where another instance runs it,
    none.
    """

    def __init__(self, store: Store, events: Log, unwritten: Callable[[], Rows]) -> None:
        self._store, self._log, self._unwritten = store, events, unwritten
        self._damaged: set[int] = set()  # places that the log file has been told of

    def find(self, query: Query, limit: int, cursor: str | None = None) -> tuple[list[Found], str | None]:
        """Up to `limit` events, about PAGE_BYTES of them, and the cursor of the next page, None at the end. Raises BadRequest
        for a broken cursor."""
        after = _read_cursor(cursor)
        fresh = (
            self._unwritten()
        )  # before the store is asked: a row may be seen twice on its way there, but never missed
        spans = sorted(
            read_spans(self._store).items(), key=lambda item: item[1][query.newest_first], reverse=query.newest_first
        )
        rows, page = _select(fresh, query, after), _Page(limit)
        edge: int | None = None
        for i, (segment, (low, high, _)) in enumerate(spans):
            if (query.since is not None and high < query.since) or (query.until is not None and low > query.until):
                continue
            if after is not None and (low > after[0] if query.newest_first else high < after[0]):
                continue
            raw = self._store.call("GET", f"{keys.ROWS}{segment}") or b""
            rows = np.concatenate((rows, _select(np.frombuffer(raw, ROW), query, after)))
            # Nothing in the segments to come lies before the next one's edge: what is before it is final.
            edge = spans[i + 1][1][query.newest_first] if i + 1 < len(spans) else None
            rows = self._drain(rows, query, page, edge)
            if page.full:
                break
        else:
            self._drain(rows, query, page, None)
            edge = None
        # Of a page that a segment's end has just filled it is not worth reading the next segment to see whether one follows.
        follows = page.more or (page.full and edge is not None)
        return page.events, _cursor(page.events[-1]) if follows else None

    def _drain(self, rows: Rows, query: Query, page: _Page, edge: int | None) -> Rows:
        """Bring events from the sorted start of `rows` up to the edge, verified, to the page; the rows that are left."""
        _, first = np.unique(rows["place"], return_index=True)
        rows = rows[first]
        order = np.lexsort((rows["place"], rows["ts"]))
        rows = rows[order[::-1]] if query.newest_first else rows[order]
        ready = len(rows)
        if edge is not None:
            ready = int(np.count_nonzero(rows["ts"] > edge if query.newest_first else rows["ts"] < edge))
        at = 0
        while at < ready and not page.more:
            some = rows[at : min(at + page.wanted(), ready)]
            at += len(some)
            places = [int(place) for place in some["place"]]
            for place, fetched in zip(places, self._log.fetch(places), strict=True):
                if fetched is None:
                    continue  # trimmed meanwhile
                event = self._decoded(fetched.body, place)
                if event is not None and _matches(event, fetched.source, query):
                    page.add(Found(event, fetched.ts, fetched.received_at, fetched.source, place, fetched.body))
                    if page.more:
                        break
        return rows[at:]

    def _decoded(self, body: bytes, place: int) -> Event | None:
        """The event, None where what is stored was damaged: it counts as one that is gone."""
        try:
            body.decode()  # what is in `data` is not looked at below
            return _decode_event(body)
        except ValueError as error:
            if place not in self._damaged and len(self._damaged) < _DAMAGE_TOLD:
                self._damaged.add(place)
                log.error("stored event is damaged", extra={"place": place, "reason": str(error)})
            return None


def _select(rows: Rows, query: Query, after: tuple[int, int] | None) -> Rows:
    keep = np.ones(len(rows), bool)
    for name, text in (
        ("user", query.user_id),
        ("session", query.session_id),
        ("type", query.event_type),
        ("source", query.source),
    ):
        if text is not None:
            keep &= rows[name] == name_hash(text)
    if query.since is not None:
        keep &= rows["ts"] >= query.since
    if query.until is not None:
        keep &= rows["ts"] <= query.until
    if after is not None:
        ts, place = after
        if query.newest_first:
            keep &= (rows["ts"] < ts) | ((rows["ts"] == ts) & (rows["place"] < place))
        else:
            keep &= (rows["ts"] > ts) | ((rows["ts"] == ts) & (rows["place"] > place))
    return rows[keep]


def _matches(event: Event, source: str, query: Query) -> bool:
    return (
        (query.user_id is None or event.user_id == query.user_id)
        and (query.event_type is None or event.event_type == query.event_type)
        and (query.session_id is None or event.session_id == query.session_id)
        and (query.source is None or source == query.source)
    )


def _cursor(last: Found) -> str:
    return base64.urlsafe_b64encode(struct.pack("<qQ", last.ts, last.place)).decode().rstrip("=")


def _read_cursor(cursor: str | None) -> tuple[int, int] | None:
    if cursor is None:
        return None
    try:
        ts, place = struct.unpack("<qQ", base64.urlsafe_b64decode(cursor + "=="))
    except (ValueError, struct.error) as error:
        raise BadRequest("invalid_cursor", "cursor takes what an earlier answer gave as 'cursor'") from error
    return ts, place
