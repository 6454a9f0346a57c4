"""How much the bridge asks of the partner at once: events in a call, and calls in flight. Pure: latencies are passed
in.

Calls in flight follow the partner's latency (as TCP Vegas does): from how much longer a call takes than the quickest
ones, the calls that merely queue at the partner are estimated; few: one more call, many: one less. Events in a call
are halved when a call of that size ran out of time, and doubled while calls are quick.
"""

from __future__ import annotations

MOST_LANES = 16
MOST_EVENTS = 500
SINGLES_EVENTS = 25  # of one lane at a time, at a partner that takes one event a call
FEW_QUEUED, MANY_QUEUED = 1.5, 3.0
ROUND = 4  # calls per lane between two decisions
FORGET_AFTER = 50  # decisions after which the quickest latency is found anew: partners change
_QUICK_SHARE = 0.2  # of the timeout


class Throttle:
    """`lanes`: calls in flight; `events`: the most in one call."""

    def __init__(self) -> None:
        self.lanes, self.events = 1, MOST_EVENTS
        self._most = MOST_EVENTS  # less at a partner that called more too large
        self._quickest: float | None = None
        self._sum, self._count, self._decisions = 0.0, 0, 0

    def restart(self) -> None:
        """Begin gently: the partner has just come back."""
        self.lanes, self._most = 1, MOST_EVENTS
        self._forget()

    def went_well(self, full: bool, latency_ms: float, timeout_ms: float) -> None:
        """A call went well; `full`: it held all the events that it might."""
        if not full:
            return
        if latency_ms > timeout_ms / 2:
            self._resize(self.events // 2)
            return
        if self.events < self._most and latency_ms < timeout_ms * _QUICK_SHARE:
            self._resize(self.events * 2)
            return
        self._sum += latency_ms
        self._count += 1
        if self._count < ROUND * self.lanes:
            return
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        self._decisions += 1
        if self._decisions % FORGET_AFTER == 0:
            self.restart()
            return
        if self._quickest is None or mean < self._quickest:
            self._quickest = mean
        queued = self.lanes * (1 - self._quickest / mean) if mean > 0 else 0.0
        if queued < FEW_QUEUED:
            self.lanes = min(MOST_LANES, self.lanes + 1)
        elif queued > MANY_QUEUED:
            self.lanes = max(1, self.lanes - 1)

    def failed(self, events: int, timed_out: bool) -> None:
        """A call failed: half the lanes; one that ran out of time held too many events as well."""
        self.lanes = max(1, self.lanes // 2)
        self._sum, self._count = 0.0, 0
        if timed_out:
            self._resize(min(self.events, events) // 2)

    def too_large(self, events: int) -> None:
        """So many events were too large a call: it would be again, however quick the smaller ones are."""
        self._most = max(1, min(self._most, events // 2))
        self._resize(self.events)

    def _resize(self, events: int) -> None:
        events = max(1, min(self._most, events))
        if events != self.events:
            self.events = events
            self._forget()

    def _forget(self) -> None:
        self._quickest = None
        self._sum, self._count = 0.0, 0
