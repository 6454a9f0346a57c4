"""The bridge's pause after a small window, so that the next one holds what several requests brought."""

from __future__ import annotations

import asyncio
import contextlib
import time

from pipeline.concurrency.precedence import Precedence

# A call costs both sides as much as fifty events. The busier this process is the dearer that is: then others wait for it.
LEAST_S, MOST_S = 0.05, 0.3
GIVE_WAY_S, _GLANCE_S = 0.02, 0.002  # longer at the most for those who have precedence; so often it is looked at
FULL = 0.8  # of a core: busier than that it hardly becomes


class Linger:
    """For one event loop."""

    def __init__(self, precedence: Precedence) -> None:
        self._precedence = precedence
        self.pause_s = LEAST_S
        self._ends = 0.0
        self._hurried = asyncio.Event()
        self._seen = time.monotonic(), time.process_time()

    def look(self) -> None:
        """See how busy the process has been since the last look; the pauses from now on go by that."""
        (then, before), self._seen = self._seen, (time.monotonic(), time.process_time())
        busy = (self._seen[1] - before) / max(0.001, self._seen[0] - then)
        self.pause_s = LEAST_S + (MOST_S - LEAST_S) * min(1.0, busy / FULL)

    def cut(self, full: bool) -> None:
        """A window was cut. After a full one there is no pause: what follows is there already."""
        self._ends = 0.0 if full else time.monotonic() + self.pause_s

    def hurry(self) -> None:
        """Somebody waits: end the pause, or leave the next one out. From the loop itself."""
        self._hurried.set()

    async def rest(self) -> None:
        await self._wait(self._ends - time.monotonic())
        until = time.monotonic() + GIVE_WAY_S
        while self._precedence.taken and not self._hurried.is_set() and time.monotonic() < until:
            await self._wait(_GLANCE_S)
        self._hurried.clear()

    async def _wait(self, seconds: float) -> None:
        """Until somebody hurries, at the most."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurried.wait(), seconds)
