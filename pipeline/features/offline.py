"""Offline values: features as of a past moment, folded from the stored events with the definitions that serve online.

An event counts by its own time, whenever it arrived; `known_at` leaves out what arrived later, `before` what stands later in the
log. Every aggregation merges exactly and in any order, so the result is the one that was online.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pipeline.commit_log.frames import Position
from pipeline.definitions import Malformed
from pipeline.events import CANARY_TYPE, Event
from pipeline.features.reading import Values
from pipeline.features.tiles import Entity
from pipeline.log import Log
from pipeline.streams.storage import EventStore, Query
from pipeline.windows import Windows

_PAGE = 1_000
_decode = msgspec.json.Decoder().decode


def past(
    events: EventStore,
    windows: Windows,
    user_id: str,
    as_of: int,
    known_at: int | None = None,
    before: int | None = None,
    judges: Sequence[Windows] = (),
) -> Values:
    """A user's features as of a moment (epoch ms); empty where no event of the user counts. `before` is a place in the log.

    What one of the `judges`, the windows of payees and zones, cannot take counts for no user either."""
    entity = windows.new()
    query = Query(user_id=user_id, until=as_of)  # one older than every window still tells that the user is known
    cursor, seen = None, False
    while True:
        page, cursor = events.find(query, _PAGE, cursor)
        for found in page:
            if (known_at is None or found.received_at <= known_at) and (before is None or found.place < before):
                seen |= fold(windows, entity, found.event, found.ts, as_of, judges)
        if cursor is None:
            return windows.values(entity, as_of) if seen else {}


def stored_since(log: Log) -> int | None:
    """When the oldest event that is still stored arrived (epoch ms), None where nothing was let go of yet."""
    head = log.head()
    if head.first_segment == 1:
        return None
    [frame] = log.next_frames([Position(head.first_segment)])
    return frame[0] if frame is not None else head.last_arrival


def fold(windows: Windows, entity: Entity, event: Event, ts: int, as_of: int, judges: Sequence[Windows] = ()) -> bool:
    """Count one stored event; False for one that the stream did not count either."""
    if event.event_type == CANARY_TYPE:
        return False
    read = any(event.event_type in some.event_types for some in (windows, *judges))
    data: Mapping[str, object] = _decode(event.data) if read else {}
    try:
        for judge in judges:
            judge.extract(event, data, ts)
        deltas = windows.extract(event, data, ts)
    except Malformed:
        return False  # the stream has made it a dead letter
    windows.add(entity, ts, deltas, as_of)
    return True
