"""The sender: brings the parts of windows to the partner in lanes side by side, and says what each call's outcome
means."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from pipeline import attempts
from pipeline.attempts import Attempt
from pipeline.errors import PartnerError, PartnerStatus, PartnerTimeout
from pipeline.health import SLOW_SHARE
from pipeline.live_settings import LiveSettings
from pipeline.partner import Delivery, Partner, kind_of, retryable
from pipeline.streams.delivery import Part, Window
from pipeline.streams.gate import Gate
from pipeline.streams.watch import Watch
from pipeline.throttle import SINGLES_EVENTS, Throttle

PROBE_EVENTS = 50  # in a call that tries whether the partner is back
log = logging.getLogger(__name__)


class Sender:
    """Of the bridge's event loop. `finished` is called when a part is through, or the sender has crashed."""

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
        self._lanes: list[asyncio.Task[None]] = []

    @property
    def batches(self) -> bool:
        """Does the partner take many events in one call?"""
        return "batch" in self._partner.supports

    def share(self) -> tuple[int, int]:
        """How many lanes there are to be, and how many events of a window each is to get."""
        return self.throttle.lanes, self.throttle.events if self.batches else SINGLES_EVENTS

    def start(self) -> None:
        """For a new epoch."""
        self.attempts, self.crashed, self._lanes = [], None, []

    def send(self, window: Window) -> None:
        """Send a window's parts off, each after its lane's part of the window before."""
        self._lanes = [task for task in self._lanes if not task.done()]
        for part in window.parts:
            name = f"lane-{part.lane}"
            before = next((task for task in reversed(self._lanes) if task.get_name() == name), None)
            self._lanes.append(asyncio.create_task(self._carry(window, part, before), name=name))

    async def finish(self, grace_s: float) -> None:
        """Let calls under way end."""
        if self._lanes:
            await asyncio.wait(self._lanes, timeout=grace_s)

    async def stop(self) -> None:
        for task in self._lanes:
            task.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)

    async def _carry(self, window: Window, part: Part, before: asyncio.Task[None] | None) -> None:
        try:
            if before is not None:
                await asyncio.wait((before,))
            while part.todo:
                await self._gate.admission()
                most = self.throttle.events
                if self._gate.circuit.state == "half_open":
                    most = min(most, PROBE_EVENTS if self.batches else 1)
                start, stop = part.next(most)
                began = self._clock()
                delivery = await self._partner.send(part.bodies[start:stop])
                self._settle(window, part, start, stop, delivery, began)
            window.unfinished -= 1
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  raised again by the epoch's own loop
            self.crashed = error
        self._finished()

    def _settle(self, window: Window, part: Part, start: int, stop: int, delivery: Delivery, began: int) -> None:
        """What a call's outcome means to its events, to the circuit and to the throttle."""
        now, error, circuit = self._clock(), delivery.error, self._gate.circuit
        first, last = window.ordinal(part.indexes[start]), window.ordinal(part.indexes[stop - 1])
        self.attempts.append(attempts.made(began, delivery, stop - start, first, last, part.lane, part.lanes))
        if delivery.done or error is None:
            part.settled(start, delivery.done, delivery.rejected)
        if error is not None and retryable(error):
            self._failed(error, stop - start, now, began)
            return
        timeout_ms = float(self._live["PYTHON_SERVICE_TIMEOUT"])
        if error is not None:
            part.refused(error.message)
        elif self.batches:
            self.throttle.went_well(stop - start >= self.throttle.events, delivery.latency_ms, timeout_ms)
        elif delivery.done:
            self.throttle.went_well(window.full, delivery.latency_ms / delivery.done, float("inf"))
        if self._partner.unknown:
            self._watch.check_soon()
        failing = circuit.failures > 0
        changed = circuit.succeeded(now, delivery.slowest_ms > timeout_ms * SLOW_SHARE, began)
        if failing and circuit.failures == 0:
            self._watch.delivered()
        if changed:
            if circuit.state == "open":
                self._watch.failed("degraded", circuit.reason or "its calls are slow")
            self._gate.changed()

    def _failed(self, error: PartnerError, events: int, now: int, began: int) -> None:
        circuit = self._gate.circuit
        first = circuit.failures == 0
        asked = error.details.get("retry_after_s")
        circuit.failed(now, error.message, asked, float(self._live["HEALTH_CHECK_INTERVAL"]), began)
        self.throttle.failed(events, isinstance(error, PartnerTimeout))
        status = error.status_code if isinstance(error, PartnerStatus) else None
        kind = kind_of(error)
        self.errors.appendleft({"at": now, "kind": kind, "status": status, "detail": error.message})
        self.errors_total += 1
        self._watch.failed("offline" if status is None else "degraded", error.message)
        log.warning("partner failed", extra={"kind": kind, "status": status, "events": events, "detail": error.message})
        if first and status is None:
            self._watch.check_soon()
        self._gate.changed()
