"""The circuit breaker before the Python service, and the backoff between its tries. Pure: time is passed in, epoch ms.

    closed     calls go out; it opens on failures in a row, on the share of failures, or on the share of slow calls
    open       no calls until `retry_at`
    half_open  one probe at a time: its success closes the circuit, its failure opens it again for longer

A probe that never reports (its process was killed) is given up after a while, and the next one is let through; so it
cannot stay half open. A moment further ahead than any pause can be was set before the clock was set back: it is past.
What a person decided (paused, forced open) is apart from what the circuit found out by itself.
"""

from __future__ import annotations

import random

import msgspec

WINDOW_CALLS, WINDOW_MS = 20, 60_000
FAILURES_IN_A_ROW = 5
LEAST_CALLS = 10  # a share of fewer says nothing
FAILURE_SHARE, SLOW_SHARE = 0.5, 0.8
FIRST_PAUSE_S, LAST_PAUSE_S = 0.2, 30.0
MAX_RETRY_AFTER_S = 60.0  # the longest pause that a partner may ask for
_SHORTEST_PAUSE_S = 0.02
_ESCALATIONS = 12


class Call(msgspec.Struct, array_like=True):
    """One call in the window; `slow`: it went well, but took long."""

    at: int
    ok: bool
    slow: bool


class Circuit(msgspec.Struct):
    """Kept in the store, so that a restart or another instance goes on with it. `failures` are those in a row, at the
    address `url`."""

    state: str = "closed"
    failures: int = 0
    opened_at: int | None = None
    retry_at: int = 0
    forced: bool = False
    paused: bool = False
    paused_at: int | None = None
    reason: str | None = None
    failing_since: int | None = None
    asked_until: int = 0  # the partner's own Retry-After: nothing shortens it
    probe_until: int = 0
    pauses: int = 0
    resets: int = 0  # those obeyed so far (gate.py counts the commands)
    window: list[Call] = []
    url: str = ""

    def admits(self, now: int, probe_ms: int) -> bool:
        """May a call be made now? When half open one probe may, which has `probe_ms` to report."""
        if self.retry_at > now + 1000 * max(LAST_PAUSE_S, MAX_RETRY_AFTER_S):
            self.retry_at = self.asked_until = 0
        if self.paused or self.forced or now < self.retry_at:
            return False
        if self.state == "closed":
            return True
        if self.state == "half_open" and now < self.probe_until <= now + probe_ms:
            return False
        self.state, self.probe_until = "half_open", now + probe_ms
        return True

    def succeeded(self, now: int, slow: bool, began: int) -> bool:
        """A call that began at `began` went well; True when the state changed."""
        self._note(Call(now, True, slow))
        if self.forced or (self.state == "open" and began < (self.opened_at or 0)):
            return False  # it was under way before the circuit opened: no news
        asked = self.asked_until  # perhaps of a call beside this one: good answers do not shorten it
        if self.state != "closed":
            self.close()
            self.retry_at = self.asked_until = asked
            return True
        self.failures, self.failing_since, self.pauses, self.retry_at = 0, None, 0, asked
        if self._share(slow=True) >= SLOW_SHARE:
            self._open(now, f"{round(100 * self._share(slow=True))} % of the latest calls were slow")
            self._pause(now, LAST_PAUSE_S, None)
            return True
        self.reason = None
        return False

    def failed(self, now: int, reason: str, retry_after_s: float | None, longest_s: float, began: int) -> bool:
        """A call failed: pause with full jitter, or as long as the partner asked. True when the state changed."""
        self._note(Call(now, False, False))
        if self.forced:
            return False  # a person's reason stands
        first = began >= self.retry_at  # failures of calls that ran side by side make one pause
        self.failures += 1
        self.reason = reason
        self.failing_since = self.failing_since or now
        before = self.state
        if self.state == "half_open":
            self.state = "open"
        elif self.state == "closed" and (
            self.failures >= FAILURES_IN_A_ROW or self._share(slow=False) >= FAILURE_SHARE
        ):
            self._open(now, reason)
        if first or retry_after_s:
            self._pause(now, longest_s, retry_after_s)
        return self.state != before

    def confirm(self, now: int, reason: str) -> bool:
        """A health check agrees with a call that failed: the partner is away, no need to try more often. True when it
        opened."""
        if self.state != "closed" or self.failures == 0:
            return False
        self._open(now, reason)
        return True

    def good_news(self, now: int, idle: bool) -> bool:
        """A health check went well: with events waiting one of them may try at once; idle, the check is proof
        enough."""
        if self.state == "closed" or self.forced or now < self.asked_until:
            return False
        if idle:
            self.close()
            return True
        self.retry_at = 0
        return False

    def sooner(self, at: int) -> None:
        """There is something else to try: at this moment at the latest, unless the partner asked for more time."""
        if self.retry_at > at:
            self.retry_at = max(at, self.asked_until)

    def close(self) -> None:
        self.state, self.failures, self.opened_at, self.retry_at, self.reason = "closed", 0, None, 0, None
        self.failing_since, self.asked_until, self.probe_until, self.pauses = None, 0, 0, 0
        self.window = []

    def another(self, url: str) -> None:
        """The partner is at another address now: that one is tried at once, and what failed at the old one is no news of it.
        An outage goes on until it takes events."""
        self.url = url
        if self.forced:
            return
        if self.state == "closed":
            self.failing_since = None
        elif self.state == "open":
            self.state = "half_open"
        self.failures, self.reason, self.window = 0, None, []
        self.retry_at = self.asked_until = self.probe_until = self.pauses = 0

    def force_open(self, now: int) -> None:
        """Opened by hand: stays so until it is reset."""
        self._open(now, "opened by hand")
        self.forced = True

    def reset(self) -> None:
        """Closed by hand, whatever it was."""
        self.forced = False
        self.close()

    def _open(self, now: int, reason: str) -> None:
        if self.state == "closed":
            self.opened_at = now
        self.state, self.reason = "open", reason

    def _pause(self, now: int, longest_s: float, retry_after_s: float | None) -> None:
        self.pauses = min(self.pauses + 1, _ESCALATIONS)
        bound_s = min(LAST_PAUSE_S, longest_s, FIRST_PAUSE_S * 2**self.pauses)
        self.retry_at = now + int(1000 * max(_SHORTEST_PAUSE_S, random.uniform(0, bound_s)))
        if retry_after_s:
            self.asked_until = now + int(1000 * retry_after_s)
            self.retry_at = max(self.retry_at, self.asked_until)

    def _note(self, call: Call) -> None:
        self.window = [c for c in self.window[-WINDOW_CALLS + 1 :] if c.at > call.at - WINDOW_MS]
        self.window.append(call)

    def _share(self, slow: bool) -> float:
        """The share of slow or of failed calls in the window; 0 while it holds too few."""
        if len(self.window) < LEAST_CALLS:
            return 0.0
        return sum(call.slow if slow else not call.ok for call in self.window) / len(self.window)
