"""The sender: brings the parts of windows to the partner in lanes side by side, and says what each call's outcome
means."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Container

from pipeline.bridge import attempts
from pipeline.bridge.attempts import Attempt
from pipeline.bridge.delivery import Part, Window
from pipeline.bridge.gate import Gate
from pipeline.bridge.health import SLOW_SHARE
from pipeline.bridge.replies import BUSY, Delivery, kind_of, on_proof_alone, perhaps_its_events, retryable
from pipeline.bridge.suspects import MAX_ATTEMPTS, PROOFS, Jury, Suspect
from pipeline.bridge.throttle import SINGLES_EVENTS, Throttle
from pipeline.bridge.watch import Watch
from pipeline.commit_log.frames import user_of
from pipeline.errors import PartnerError, PartnerStatus, PartnerTimeout
from pipeline.operations.live_settings import LiveSettings
from pipeline.partner import Partner

PROBE_EVENTS = 50  # in a call that tries whether the partner is back
FILL = 0.85  # of what a call may hold
_SUSPECT_PAUSE_S = 1.0  # the most between two calls that tell the bad event from the good ones
_NEWS_S = 3.0  # the longest that another event waits behind one that fails, at a partner that answers health checks
_LOOK_S = 0.05
_TOO_LARGE = 413
log = logging.getLogger(__name__)
Lane = deque[tuple[Window, Part]]  # what is to be sent one after the other, every user's events in one of them


class Sender:
    """Of the bridge's event loop. `finished` is called when a part is through, when the sender is in want of a window,
    or has crashed."""

    def __init__(
        self,
        partner: Partner,
        gate: Gate,
        watch: Watch,
        live: LiveSettings,
        clock: Callable[[], int],
        finished: Callable[[], None],
    ) -> None:
        self._partner, self._gate, self._watch = partner, gate, watch
        self._live, self._clock, self._finished = live, clock, finished
        self.throttle = Throttle()
        self.errors: deque[dict[str, object]] = deque(maxlen=8)  # newest first
        self.errors_total = 0
        self.attempts: list[Attempt] = []  # yet to be kept
        self.crashed: Exception | None = None
        self.starved = False  # an event fails, and no other is at hand that could be tried in its stead
        self._jury = Jury()
        self._lanes: dict[int, Lane] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @property
    def batches(self) -> bool:
        """Does the partner take many events in one call?"""
        return "batch" in self._partner.supports

    def share(self) -> tuple[int, int]:
        """How many lanes there are to be, and how many events of a window each is to get on average: users fall unevenly,
        and a lane that has more than a call may hold needs a second one."""
        lanes, most = self.throttle.lanes, self.throttle.events
        if not self.batches:
            return lanes, SINGLES_EVENTS
        return lanes, most if lanes == 1 else max(1, int(most * FILL))

    def start(self) -> None:
        """For a new epoch."""
        self.crashed, self.starved, self._lanes, self._tasks = None, False, {}, {}

    def send(self, window: Window) -> None:
        """Send a window's parts off, each after its lane's part of the window before."""
        if self.starved and self._watch.answers and window.parts:
            self._gate.circuit.sooner(self._clock() + int(1000 * _NEWS_S))
        self.starved = False
        for part in window.parts:
            lane = self._lanes.setdefault(part.lane, deque())
            lane.append((window, part))
            if self.crashed is None and (part.lane not in self._tasks or self._tasks[part.lane].done()):
                self._tasks[part.lane] = asyncio.create_task(self._drain(lane), name=f"lane-{part.lane}")

    async def finish(self, grace_s: float) -> None:
        """Let calls under way end."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=grace_s)

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _drain(self, lane: Lane) -> None:
        """Send what is in a lane, until nothing is; after a crash nothing behind it goes out before it."""
        try:
            while lane:
                window, part = lane[0]
                while part.todo:
                    await self._gate.admission()
                    if (chosen := self._choose(lane)) is None:
                        await asyncio.sleep(_LOOK_S)
                    else:
                        await self._call(lane, *chosen)
                lane.popleft()
                window.unfinished -= 1
                self._finished()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  raised again by the epoch's own loop
            self.crashed = error
            self._finished()

    def _choose(self, lane: Lane) -> tuple[Window, Part, int] | None:
        """The part to send from, and how many events at most: the lane's first, or one of another user in the stead of
        an event that fails, to see whether the partner takes that. None where the lane is to wait."""
        window, part = lane[0]
        suspect = part.suspect
        if suspect is not None:
            part.pull(suspect.index)
            waits = time.monotonic() < suspect.not_before
            if (waits and suspect.asked) or self._jury.wants_another(suspect):
                suspect.due = False
                if (other := _another(lane, suspect, self._jury.convicted)) is not None:
                    return *other, 1
                suspect.cleared.clear()
                self.starved = True
                self._finished()
            if waits:
                self._gate.circuit.probe_until = 0  # perhaps this lane's, which makes no call
                return None
        most = self.throttle.events
        if self._gate.circuit.state == "half_open":
            most = min(most, PROBE_EVENTS if self.batches else 1)
        return window, part, most

    async def _call(self, lane: Lane, window: Window, part: Part, most: int) -> None:
        start, stop = part.next(most)
        events, suspect = part.bodies[start:stop], part.suspect
        if suspect is not None and suspect.failures == MAX_ATTEMPTS and suspect.index == start and self._watch.answers:
            made = await self._partner.send_singly(events[0], suspect.reason)
        else:
            made = await self._partner.send(events)
        for delivery in made:
            self._settle(lane[0][1], window, part, delivery)

    def _settle(self, accused: Part, window: Window, part: Part, delivery: Delivery) -> None:
        """What a call's outcome means to its events, to the circuit and to the throttle. `accused`: the lane's first
        part, in the stead of whose suspect the call may have been made."""
        start, stop = part.next(delivery.events)
        first, last = window.ordinal(part.indexes[start]), window.ordinal(part.indexes[stop - 1])
        made = attempts.made(delivery, first, last, part.lane, part.lanes)
        self.attempts.append(made)
        log.debug("partner called", extra={"events": made.events, "status": made.status, "ms": made.latency_ms})
        error, alone = delivery.error, stop - start == 1
        if delivery.url != self._partner.url:  # it was at another address until just now: no news of who is at this one
            if error is None:
                part.settled(delivery.rejected)
            return
        status = error.status_code if isinstance(error, PartnerStatus) else None
        instead = accused.suspect is not None and (part is not accused or start != accused.suspect.index)
        if error is None:
            self._settled(window, part, delivery)
            if instead and accused.suspect is not None:
                accused.suspect.another_taken(time.monotonic())
        elif retryable(error):
            user = user_of(part.bodies[start])
            known = alone and status is not None and self._jury.convicted.get(user) == (delivery.url, status)
            if known and self._jury.believes_refusal():
                part.give_up(f"refused: {error.message}")
                self._answered(delivery)
                return
            if perhaps_its_events(error):
                self._blame(accused, part, error, instead)
            self._failed(error, delivery, accused)
        elif not alone:
            part.halve()
            if isinstance(error, PartnerStatus) and error.status_code == _TOO_LARGE:
                self.throttle.too_large(delivery.events)
            self._answered(delivery)
        elif self._jury.believes_refusal():
            part.give_up(f"refused: {error.message}")
            self._answered(delivery)
        else:
            error.message = f"it refuses everything: {error.message}"
            self._blame(accused, part, error, instead)
            self._failed(error, delivery, accused)
            if self._gate.circuit.confirm(self._clock(), error.message):
                self._gate.changed()

    def _settled(self, window: Window, part: Part, delivery: Delivery) -> None:
        timeout_ms = float(self._live["PYTHON_SERVICE_TIMEOUT"])
        if self._jury.convicted:
            for body in part.bodies[slice(*part.todo[-1])]:
                self._jury.convicted.pop(user_of(body), None)
        part.settled(delivery.rejected)
        if len(delivery.rejected) < delivery.events:
            self._jury.took()
            self._watch.took()
        if self.batches:
            most = self.throttle.events
            full = delivery.events >= most or (window.full and 2 * delivery.events >= most)
            self.throttle.went_well(full, delivery.latency_ms, timeout_ms)
        else:
            self.throttle.went_well(window.full, delivery.latency_ms / delivery.events, float("inf"))
        self._answered(delivery)

    def _answered(self, delivery: Delivery) -> None:
        """The partner does its work, whatever it said of the events."""
        if self._partner.unknown:
            self._watch.check_soon()
        circuit, timeout_ms = self._gate.circuit, float(self._live["PYTHON_SERVICE_TIMEOUT"])
        failing = circuit.failures > 0 or self._watch.failing
        changed = circuit.succeeded(self._clock(), delivery.slowest_ms > timeout_ms * SLOW_SHARE, delivery.at)
        if failing and circuit.failures == 0 and circuit.state == "closed":
            self._watch.delivered()
            self._partner.rediscover()
        if changed:
            if circuit.state == "open":
                self._watch.failed("degraded", circuit.reason or "its calls are slow")
            self._gate.changed()

    def _blame(self, accused: Part, part: Part, error: PartnerError, instead: bool) -> None:
        """A call failed, and perhaps for what it held: close in on the event, or give it up."""
        start, stop = part.todo[-1]
        if instead:
            self._jury.failed += 1
            if accused.suspect is not None:
                accused.suspect.cleared.add(user_of(part.bodies[start]))
        elif stop - start > 1:
            self._jury.failed += 1
            part.failures += 1
            convicted = self._jury.convicted
            known = next((i for i in range(start, stop) if convicted and user_of(part.bodies[i]) in convicted), None)
            if known is not None:
                part.pull(known)
            elif part.failures >= MAX_ATTEMPTS:
                part.halve()
        else:
            now = time.monotonic()
            suspect = part.suspect = part.suspect or Suspect(start, now)
            suspect.reason = error.message
            status = error.status_code if isinstance(error, PartnerStatus) else None
            if self._jury.condemns(suspect, now, self._watch.answers and not on_proof_alone(error)):
                part.give_up(f"failed {suspect.failures} times: {error.message}")
                if status is not None and status not in BUSY:
                    self._jury.convict(user_of(part.bodies[start]), self._partner.url, status)
            elif status in BUSY:
                suspect.waits(now, error.details.get("retry_after_s") or 0.0)
                if suspect.proofs > 0:
                    error.details["retry_after_s"] = None  # it is asked of this event's user alone

    def _failed(self, error: PartnerError, delivery: Delivery, accused: Part) -> None:
        now, circuit = self._clock(), self._gate.circuit
        first = circuit.failures == 0
        suspect, longest_s = accused.suspect, float(self._live["HEALTH_CHECK_INTERVAL"])
        closing_in = suspect.failures < 2 * PROOFS if suspect is not None else accused.failures >= MAX_ATTEMPTS
        if closing_in and self._watch.answers:
            longest_s = min(longest_s, _SUSPECT_PAUSE_S)
        circuit.failed(now, error.message, error.details.get("retry_after_s"), longest_s, delivery.at)
        self.throttle.failed(delivery.events, isinstance(error, PartnerTimeout) and delivery.events > 1)
        status = error.status_code if isinstance(error, PartnerStatus) else None
        kind, events = kind_of(error), delivery.events
        self.errors.appendleft({"at": now, "kind": kind, "status": status, "detail": error.message})
        self.errors_total += 1
        self._watch.failed("offline" if status is None else "degraded", error.message)
        log.debug("partner failed", extra={"kind": kind, "status": status, "events": events, "detail": error.message})
        if first and status is None:
            self._watch.check_soon()
        self._gate.changed()


def _another(lane: Lane, suspect: Suspect, convicted: Container[bytes]) -> tuple[Window, Part] | None:
    """Where an event of another user is now the next to be sent, the user's first: nobody's order suffers."""
    first = lane[0][1]
    passed = {*suspect.cleared, user_of(first.bodies[suspect.index])}
    for window, part in lane:
        for start, stop in sorted(part.todo):
            for index in range(start, stop):
                user = user_of(part.bodies[index])
                if user not in passed and user not in convicted:
                    part.pull(index)
                    return window, part
    return None
