"""The attempt log: each call of the bridge to the partner, bounded; and an event's own attempts, for its receipt.

An attempt holds the events of its lane from one ordinal of the log to another: a user's lane is a checksum of the
user's id.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline import keys
from pipeline.bridge.replies import KINDS, Delivery, kind_of
from pipeline.commit_log.frames import CANARY, user_hashes_of
from pipeline.errors import BadRequest, PartnerStatus
from pipeline.events import rfc3339
from pipeline.log import Log
from pipeline.store import Command, Store

KEPT = 10_000
_ANSWER_CHARS = 300
_PAGE = 250
_WINDOWS_AT_ONCE = 8  # of the bridge, at the most; from its first event to its last a call is about as long as one
_encode = msgspec.json.Encoder().encode


class Attempt(msgspec.Struct, omit_defaults=True):
    """One call, or calls for one event each that followed directly and went alike. `first` and `last` are ordinals, `at` epoch
    ms."""

    at: int
    events: int
    status: int | None
    latency_ms: float
    error: str | None
    first: int
    last: int
    lane: int = 0
    lanes: int = 1
    answer: str = ""
    detail: str | None = None
    sent_bytes: int = 0
    got_bytes: int = 0
    refused: int = 0


_decode = msgspec.json.Decoder(Attempt).decode


def lane_of(body: bytes, lanes: int) -> int:
    """The lane that carries all events of the event's user."""
    return user_hashes_of([body])[0] % lanes


def made(delivery: Delivery, first: int, last: int, lane: int, lanes: int) -> Attempt:
    """The record of a call."""
    error = delivery.error
    return Attempt(
        delivery.at,
        delivery.events,
        error.status_code if isinstance(error, PartnerStatus) else delivery.status,
        round(delivery.latency_ms, 2),
        None if error is None else kind_of(error),
        first,
        last,
        lane,
        lanes,
        delivery.answer[:_ANSWER_CHARS],
        None if error is None else error.message[:_ANSWER_CHARS],
        delivery.sent_bytes,
        delivery.got_bytes,
        len(delivery.rejected),
    )


def keep(attempts: list[Attempt]) -> list[Command]:
    """The commands that keep attempts, oldest first."""
    if not attempts:
        return []
    return [("LPUSH", keys.ATTEMPTS, *[_encode(a) for a in attempts]), ("LTRIM", keys.ATTEMPTS, 0, KEPT - 1)]


def latest(store: Store, limit: int, error: str | None = None, status: str | None = None) -> list[dict[str, Any]]:
    """The latest attempts, newest first, as the route answers them; of one kind of error or one status alone. Raises
    BadRequest."""
    if error is not None and error not in KINDS:
        raise BadRequest("invalid_error", f"error is {error!r}; it takes {', '.join(KINDS)}")
    if status is not None and not (status.isascii() and status.isdecimal() and len(status) == 3):
        raise BadRequest("invalid_status", f"status is {status!r}; it takes the HTTP status of an answer")
    code = None if status is None else int(status)
    found: list[dict[str, Any]] = []
    for start in range(0, KEPT, _PAGE):
        page = store.call("LRANGE", keys.ATTEMPTS, start, start + _PAGE - 1)
        for attempt in map(_decode, page):
            if error in (None, attempt.error) and code in (None, attempt.status):
                found.append({**msgspec.structs.asdict(attempt), "at": rfc3339(attempt.at)})
            if len(found) == limit:
                return found
        if len(page) < _PAGE:
            break
    return found


def failures(store: Store, before: int, limit: int) -> list[dict[str, object]]:
    """The latest attempts from before a moment that failed, newest first, as the bridge tells its errors."""
    found: list[dict[str, object]] = []
    for start in range(0, KEPT, _PAGE):
        page = store.call("LRANGE", keys.ATTEMPTS, start, start + _PAGE - 1)
        failed = [a for a in map(_decode, page) if a.error is not None and a.at < before]
        found += [{"at": a.at, "kind": a.error, "status": a.status, "detail": a.detail} for a in failed]
        if len(found) >= limit or len(page) < _PAGE:
            break
    return found[:limit]


def of_event(store: Store, ordinal: int, body: bytes, received_at: int) -> tuple[list[Attempt], bool]:
    """The attempts that held an event, newest first, and whether the log reaches back to the event's arrival."""
    found: list[Attempt] = []
    seen: set[bytes] = set()  # kept twice where a commit's answer was lost
    for start in range(0, KEPT, _PAGE):
        page = store.call("LRANGE", keys.ATTEMPTS, start, start + _PAGE - 1)
        for raw in page:
            attempt = _decode(raw)
            if attempt.at + attempt.latency_ms < received_at and _long_before(attempt, ordinal):
                return found, True  # they are kept in the order in which they ended
            mine = attempt.lanes == 1 or lane_of(body, attempt.lanes) == attempt.lane
            if attempt.first <= ordinal <= attempt.last and mine and raw not in seen:
                found.append(attempt)
                seen.add(raw)
        if len(page) < _PAGE:
            return found, start + len(page) < KEPT
    return found, False


def _long_before(attempt: Attempt, ordinal: int) -> bool:
    """Whether an attempt is of events so far before one that no call for that can have ended before it. Time does not tell: arrival
    stands still ahead of a clock that was set back."""
    return attempt.last + _WINDOWS_AT_ONCE * (attempt.last - attempt.first + 1) < ordinal


def bridge_state(store: Store, log: Log, place: int, found: dict[str, Any]) -> dict[str, Any]:
    """The bridge's part of a receipt, made out of what its position tells: how often the event was sent, and what the
    partner answered to the call that held it last. Null where the attempt log no longer reaches."""
    attempts: list[Attempt] = []
    complete, canary = True, False
    for event in log.fetch(_places(store, place)):
        if event is not None:
            some, reaches = of_event(store, event.ordinal, event.body, event.received_at)
            attempts = some + attempts
            complete, canary = complete and reaches, bool(event.to & CANARY)
    state = "retrying" if found["state"] == "pending" and attempts else found["state"]
    if not attempts and canary and complete and state == "done":  # passed over: the partner takes no canaries
        return {"state": "not_addressed", "at": None, "attempts": 0, "result": None}
    if not attempts:
        return {
            **found,
            "attempts": 0 if complete and state == "pending" else None if state == "done" else found["attempts"],
        }
    last = attempts[0]
    answer = {
        "at": rfc3339(last.at),
        "status": last.status,
        "latency_ms": last.latency_ms,
        "events": last.events,
        "answer": last.answer,
        "error": last.error,
        "detail": last.detail,
    }
    return {**found, "state": state, "attempts": len(attempts), "result": {**(found["result"] or {}), **answer}}


def _places(store: Store, place: int) -> list[int]:
    """Where the event stands in the log: its own place, and those of its redrives, oldest first."""
    places = [place]
    while (again := store.call("HGET", keys.REDRIVEN, f"bridge-{places[-1]}")) is not None:
        places.append(int(again))
    return places
