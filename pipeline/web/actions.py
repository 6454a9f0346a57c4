"""The bridge route's actions: send_batch and hybrid_process, over the one log that all events take, and
test_integration."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import events as event_forms
from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import ALL_STREAMS, BRIDGE_ONLY, PER_FRAME, SHIFT
from pipeline.errors import BadRequest, PartnerError, StoreError
from pipeline.feature_store import Combined
from pipeline.ingest import Verdicts, judge
from pipeline.log import Taken
from pipeline.operations.canary import Canary
from pipeline.streams.inference import Inference
from pipeline.web.posted import read_source, require_few

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

_SLACK_S = 1.0
_PUBLISHED_S = 2.0  # how long the Python service's public features are waited for
_UNASKED_S = 0.3  # before it is asked for them: then it writes them at once, under load it would take seconds
_ASKED = 32  # users at a time
_LOOK_S = 0.02
# What a reason says first of all: the field it is about.
_field = re.compile(
    r"(?:(?:refused|malformed): )?(data\.[^\s:]+|location[.\w]*|[a-z]+_[a-z]+|timestamp)(?:: | is )"
).match


@dataclass(slots=True)
class AtPartner:
    """What became of a batch at the Python service: how many were sent and how many are queued, and the refused ones as
    rejections. `error`: why nobody knows; then all count as queued."""

    sent: int
    queued: int
    refused: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


class Actions:
    """What POST /api/ml/bridge/python does beyond switching the circuit."""

    def __init__(self, nexus: Runtime) -> None:
        self._nexus = nexus
        self.canary = Canary(nexus)

    def send_batch(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Events to the Python service alone: 200 when all were sent, 202 when some wait durably in the log."""
        nexus, began = self._nexus, time.perf_counter()
        verdicts = judge(_events(body), nexus.clock())
        taken = nexus.ingest.take(verdicts, _source(body), BRIDGE_ONLY)
        with suppress(StoreError):
            nexus.bridge.wait_for(taken.end, self._timeout_s())
        theirs = self._at_partner(verdicts, taken)
        answer = {
            "sent": theirs.sent,
            "queued": theirs.queued,
            "duplicates": len(taken.duplicates),
            "rejected": verdicts.rejected + theirs.refused,
            "event_ids": verdicts.event_ids,
            "response_time_ms": _ms(began),
        }
        if not verdicts.kept:
            return 422, _with_error(answer)
        return (202 if theirs.queued else 200), answer

    def hybrid_process(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Events to both systems; answers when the result is readable, or when the time is up."""
        nexus, began = self._nexus, time.perf_counter()
        verdicts = judge(_events(body), arrived := nexus.clock())
        taken = nexus.ingest.take(verdicts, _source(body), ALL_STREAMS)
        deadline = time.monotonic() + self._timeout_s()
        applied = delivered = readable = False
        combined: dict[str, Combined] = {}
        predictions: dict[str, Any] = {}
        given_up: list[dict[str, Any]] = []
        kept = [event_forms.decode(event.body) for event in verdicts.kept]
        with suppress(StoreError):  # what was taken is told all the same
            applied = all(
                nexus.runner.wait_for(name, taken.end, deadline - time.monotonic())
                for name in ("features", "inference")
            )
            if applied:
                given_up = self._given_up(verdicts, taken)
            delivered = nexus.bridge.wait_for(taken.end, deadline - time.monotonic())
            users = list(dict.fromkeys(event["user_id"] for event in kept))
            if delivered and taken.taken:
                self._wait_published(users, arrived, deadline)
            combined, predictions = nexus.features.combine(users), self._predictions(kept)
            readable = True
        theirs = self._at_partner(verdicts, taken)
        spurned = theirs.refused[0]["message"] if theirs.refused and not theirs.sent and not theirs.queued else None
        processed = taken.taken - len(given_up) if applied else 0
        answer = {
            "success": applied and readable and bool(verdicts.kept) and (processed > 0 or not given_up),
            "degraded": not (applied and delivered and readable) or theirs.error is not None or spurned is not None,
            "accepted": taken.taken,
            "duplicates": len(taken.duplicates),
            "rejected": verdicts.rejected + given_up + theirs.refused,
            "event_ids": verdicts.event_ids,
            "typescript": {
                "processed": processed,
                "features": {user: found.nexus for user, found in combined.items()},
                "predictions": predictions,
            },
            "python": {
                "processed": theirs.sent,
                "queued": theirs.queued,
                "error": theirs.error or (spurned if delivered else self._why_queued()),
            },
            "combined_features": {user: found.combined for user, found in combined.items()},
            "processing_time_ms": _ms(began),
        }
        return (200, answer) if verdicts.kept else (422, _with_error(answer))

    def test_integration(self) -> tuple[int, dict[str, Any]]:
        """One canary along the whole real path, hop by hop, the Python service always included."""
        return 200, self.canary.run()

    def _at_partner(self, verdicts: Verdicts, taken: Taken) -> AtPartner:
        try:
            behind = self._nexus.bridge.reached() - (taken.end - taken.taken)
            settled = min(taken.taken, max(0, behind))
            refused = self._refused(verdicts, taken, settled)
            queued = taken.taken - settled + self._still_waiting(verdicts, taken)
            return AtPartner(settled - len(refused), queued, refused)
        except StoreError as error:
            return AtPartner(0, len({event.event_id for event in verdicts.kept}), error=error.message)

    def _still_waiting(self, verdicts: Verdicts, taken: Taken) -> int:
        """How many of the duplicates are so because they were posted before, and still wait for the bridge."""
        duplicates = set(taken.duplicates)
        again = {verdicts.kept[i].event_id for i in duplicates}
        again -= {event.event_id for i, event in enumerate(verdicts.kept) if i not in duplicates}
        if not again:
            return 0
        at = checkpoints.read(self._nexus.store, ["bridge"])["bridge"]
        reached = ((at.segment << SHIFT) + at.offset) * PER_FRAME + at.index
        return sum(place is not None and place >= reached for place in self._nexus.log.locate(list(again)))

    def _predictions(self, kept: list[dict[str, Any]]) -> dict[str, Any]:
        """The scores of the payments among some events."""
        nexus = self._nexus
        stream = nexus.stream("inference")
        payments = [event["data"] for event in kept if event["event_type"] == "payment"]
        transactions = [str(t) for data in payments if (t := data.get("transaction_id")) is not None]
        inference = stream if isinstance(stream, Inference) else None
        return nexus.lookups.predictions(transactions, nexus.clock(), inference)

    def _why_queued(self) -> str:
        bridge = self._nexus.bridge
        status = self._nexus.partner_status()
        return bridge.halted or status["reason"] or "not answered in time, or a backlog is before them"

    def _wait_published(self, users: list[str], since: int, deadline: float) -> None:
        """Until a Python service that publishes features has published those of the users, events of `since`
        included."""
        partner = self._nexus.bridge.partner
        if "features" not in partner.supports:
            return

        async def ask(some: list[str]) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(deadline - time.monotonic()):
                    await asyncio.gather(*map(partner.features, some), return_exceptions=True)

        began = time.monotonic()
        deadline = min(deadline, began + _PUBLISHED_S)
        waiting, asked = users, set[str]()
        while waiting and time.monotonic() < deadline:
            found = self._nexus.features.partner(waiting)
            waiting = [user for user in waiting if (found[user].computed_at or 0) < since]
            some = [user for user in waiting if user not in asked][:_ASKED]
            if some and time.monotonic() > began + _UNASKED_S:
                with suppress(PartnerError):
                    self._nexus.in_bridge(ask(some))
                asked.update(some)
            elif waiting:
                self._nexus.pause(_LOOK_S)

    def _refused(self, verdicts: Verdicts, taken: Taken, settled: int) -> list[dict[str, Any]]:
        """Events of a frame that the partner refused, as rejections by input position."""
        places = dict(list(verdicts.places(taken).items())[:settled])
        words = checkpoints.reasons(self._nexus.store, "bridge", list(places))
        return _rejections(verdicts, places, words, "refused_by_python")

    def _given_up(self, verdicts: Verdicts, taken: Taken) -> list[dict[str, Any]]:
        """Events of a frame that Nexus's own streams could not process, as rejections by input position."""
        places = verdicts.places(taken)
        reasons: dict[int, str] = {}
        for name in ("inference", "features"):
            reasons |= self._nexus.runner.reasons(name, list(places))
        return _rejections(verdicts, places, reasons, "refused_by_nexus")

    def _timeout_s(self) -> float:
        return float(self._nexus.live["PYTHON_SERVICE_TIMEOUT"]) / 1000 + _SLACK_S


def _rejections(verdicts: Verdicts, places: dict[int, int], reasons: dict[int, str], code: str) -> list[dict[str, Any]]:
    """Those of the events, by their places, that there is a reason for."""
    return [
        {
            "index": verdicts.positions[i],
            "event_id": verdicts.kept[i].event_id,
            "field": named[1] if (named := _field(reasons[place])) else "event",
            "code": code,
            "message": reasons[place],
        }
        for place, i in places.items()
        if place in reasons
    ]


def _with_error(answer: dict[str, Any]) -> dict[str, Any]:
    message = "none of the events is valid; 'rejected' names each one's field and remedy"
    return {**answer, "error": {"code": "no_event_accepted", "message": message, "details": {}}}


def _events(body: dict[str, Any]) -> list[Any]:
    events = body.get("events")
    if not isinstance(events, list):
        raise BadRequest("not_events", "'events' is an array of events")
    require_few(len(events))
    return events


def _source(body: dict[str, Any]) -> str:
    source = body.get("source")
    return "bridge" if source is None else read_source(source)


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 2)
