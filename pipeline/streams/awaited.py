"""Who waits for a stream: each is woken once it has what they wait for, not whenever it has moved, since hundreds may wait
while it catches up; and has no turn meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from pipeline.concurrency.turns import turn_passed_on


class Awaited:
    """Those who wait until a stream has so many events of the log behind it, which `ordinal` tells."""

    def __init__(self, ordinal: Callable[[], int]) -> None:
        self._ordinal = ordinal
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, threading.Lock]] = []

    def wait(self, ordinal: int, timeout_s: float) -> None:
        """Until it has come to `ordinal`, or so long."""
        called = threading.Lock()
        called.acquire()
        place = (ordinal, called)
        with self._lock:
            self._waiting.append(place)
        # Looked at only now: who moves the stream looks for those who wait afterwards.
        if self._ordinal() < ordinal:
            with turn_passed_on():
                called.acquire(timeout=timeout_s)
        with self._lock:
            if place in self._waiting:
                self._waiting.remove(place)

    def moved(self) -> None:
        """The stream has come to another ordinal; costs next to nothing while nobody waits."""
        if not self._waiting:
            return
        at = self._ordinal()
        with self._lock:
            there = [place for place in self._waiting if place[0] <= at]
            self._waiting = [place for place in self._waiting if place[0] > at]
        for _, called in there:
            called.release()


def looks_s() -> Iterator[float]:
    """The pauses between two looks at the checkpoint of another instance's stream: the longer one has waited, the longer."""
    pause_s = 0.05
    while True:
        yield pause_s
        pause_s = min(0.5, pause_s * 1.5)
