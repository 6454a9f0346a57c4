"""Ingest: a posted body becomes verdicts per event and, before the answer goes out, frames in the log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.commit_log.frames import ALL_STREAMS, PER_FRAME
from pipeline.concurrency.joint import Joint
from pipeline.concurrency.precedence import Precedence
from pipeline.errors import BadRequest, OutcomeUnknown, StoreError, StoreFull
from pipeline.events import Parsed, Plain, Rejected, parse, parse_plain
from pipeline.log import Log, Request, Taken
from pipeline.web.posted import read_body, read_plain, unpack

_GROUP_BYTES = 4 << 20
_MAX_WAIT_MS = 30_000


@dataclass(slots=True)
class Verdicts:
    """What validation made of a batch: `kept` and its input positions, rejections, and an id for each position."""

    kept: list[Parsed]
    positions: list[int]
    rejected: list[dict[str, Any]]
    event_ids: list[str | None]

    def places(self, taken: Taken) -> dict[int, int]:
        """Of the events that the log took: their places in it, each with its index in `kept`."""
        duplicates, first = set(taken.duplicates), taken.address * PER_FRAME
        return {first + at: i for at, i in enumerate(i for i in range(len(self.kept)) if i not in duplicates)}


class Ingest:
    """The ingest route's work, free of any web framework.

    `closed` holds the reason while the store is too full to take events. `applied(ordinal, timeout_s)` waits until the
    features of all events before the ordinal are readable; `given_up(stream, places)` says which events it could not process,
    and why.
    """

    def __init__(
        self,
        log: Log,
        clock: Callable[[], int],
        taken: Callable[[], None],
        applied: Callable[[int, float], bool],
        precedence: Precedence | None = None,
        given_up: Callable[[str, Sequence[int]], dict[int, str]] = lambda stream, places: {},
    ) -> None:
        # Requests that arrive while the store is busy with others go to the log together, in one atomic step.
        self._group = Joint[Request, Taken](lambda some: log.accept(some, clock()), _GROUP_BYTES, _size)
        self._precedence = precedence or Precedence()
        self._clock, self._taken, self._applied, self._given_up = clock, taken, applied, given_up
        self.closed: str | None = None
        self.latencies_ms: deque[float] = deque(maxlen=1000)

    def post(
        self, body: bytes, content_type: str, encoding: str, query: Mapping[str, str]
    ) -> tuple[int, dict[str, Any]]:
        """The status and the answer's object. Raises BadRequest, TooLarge, StoreError."""
        began = time.perf_counter()
        wait_s = _wait_s(query)
        with self._precedence:
            verdicts, source = self._judge(unpack(body, encoding), content_type)
            taken = self._submit(verdicts, source, ALL_STREAMS)
        answer: dict[str, Any] = {
            "accepted": taken.taken,
            "duplicates": len(taken.duplicates),
            "rejected": verdicts.rejected,
            "event_ids": verdicts.event_ids,
        }
        self.latencies_ms.append((time.perf_counter() - began) * 1000)
        self._taken()  # only now: who reads the log takes the interpreter from who has yet to answer
        if not verdicts.kept:
            answer["error"] = {
                "code": "no_event_accepted",
                "message": f"none of the {len(verdicts.rejected)} events is valid; 'rejected' names each one's field and remedy"
                if verdicts.rejected
                else "there is no event in the body; post at least one",
                "details": {"rejected": verdicts.rejected},
            }
            return 422, answer
        if wait_s is not None:
            answer["applied"] = self._is_applied(taken.end, wait_s)
            if answer["applied"] and (dead := self._dead(verdicts, taken)):
                answer["dead"] = dead
        return 202, answer

    def _is_applied(self, end: int, timeout_s: float) -> bool:
        """Not as far as anybody knows where the store goes away meanwhile: the events are taken, which a 503 would deny."""
        try:
            return self._applied(end, timeout_s)
        except StoreError:
            return False

    def _dead(self, verdicts: Verdicts, taken: Taken) -> list[dict[str, Any]]:
        """Those of the events that the features could not take, as far as the store tells."""
        places = verdicts.places(taken)
        try:
            reasons = self._given_up("features", list(places))
        except StoreError:
            return []
        return [
            {
                "index": verdicts.positions[i],
                "event_id": verdicts.kept[i].event_id,
                "stream": "features",
                "reason": reasons[place],
            }
            for place, i in places.items()
            if place in reasons
        ]

    def _judge(self, body: bytes, content_type: str) -> tuple[Verdicts, str]:
        """The verdicts on what a body holds, and its source. Most bodies are plain and sound, which is found out at a fraction
        of the cost; all others are read and judged event by event."""
        now = self._clock()
        plain = read_plain(body, content_type)
        verdicts = judge_plain(plain[0], now) if plain is not None else None
        if plain is not None and verdicts is not None:
            return verdicts, plain[1]
        events, source = read_body(body, content_type)
        return judge(events, now), source

    def take(self, verdicts: Verdicts, source: str, to: int = ALL_STREAMS) -> Taken:
        """Bring judged events to the log and wake its readers. Raises StoreError: nothing was taken, except where it is
        OutcomeUnknown."""
        taken = self._submit(verdicts, source, to)
        self._taken()
        return taken

    def _submit(self, verdicts: Verdicts, source: str, to: int) -> Taken:
        if self.closed is not None:
            raise StoreFull(self.closed)
        try:
            return self._group.ask(Request(verdicts.kept, source, to, len(verdicts.rejected)))
        except OutcomeUnknown as error:
            message = f"{error.message}: send the events again with the ids in details.event_ids, and none counts twice"
            raise OutcomeUnknown(message, details={"event_ids": verdicts.event_ids}) from error


def _size(request: Request) -> int:
    return sum([len(event.record) for event in request.events])


def judge_plain(events: list[Plain], now: int) -> Verdicts | None:
    """What judge() says of events that are all sound; None where one of them may not be. The events are changed."""
    try:
        kept = parse_plain(events, now)
    except Rejected:
        return None
    return Verdicts(kept, list(range(len(kept))), [], [event.event_id for event in kept])


def judge(events: list[Any], now: int) -> Verdicts:
    """Each event's verdict: `now` is the arrival in epoch ms; an item may be an exception, met while it was decoded."""
    verdicts = Verdicts([], [], [], [])
    for index, raw in enumerate(events):
        try:
            if isinstance(raw, Rejected):
                raise raw
            event = parse(raw, now)
        except Rejected as verdict:
            given = raw.get("event_id") if type(raw) is dict else None
            verdicts.rejected.append(
                {
                    "index": index,
                    "event_id": given if type(given) is str else None,
                    "field": verdict.field,
                    "code": verdict.code,
                    "message": verdict.message,
                }
            )
            verdicts.event_ids.append(None)
        else:
            verdicts.kept.append(event)
            verdicts.positions.append(index)
            verdicts.event_ids.append(event.event_id)
    return verdicts


def _wait_s(query: Mapping[str, str]) -> float | None:
    wait = query.get("wait")
    if wait is None:
        return None
    if wait != "features":
        raise BadRequest("invalid_wait", f"wait takes 'features', not {wait!r}")
    text = query.get("timeout_ms", "2000")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= _MAX_WAIT_MS):
        raise BadRequest("invalid_timeout", f"timeout_ms takes a whole number from 0 to {_MAX_WAIT_MS}, not {text!r}")
    return int(text) / 1000
