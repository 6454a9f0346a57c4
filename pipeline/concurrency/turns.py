"""Turns: so many requests are worked on at a time, first come first served. One that waits for anything but the processor
passes its turn on meanwhile."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class _Here(threading.local):
    line: Line | None = None  # in which this thread has a turn


_here = _Here()


class Line:
    """So many threads have a turn at a time: whoever enters waits for one, and has it until they leave."""

    def __init__(self, turns: int) -> None:
        self._free = turns
        self._lock = threading.Lock()
        self.waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        self._take_turn()
        _here.line = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _here.line = None
        self._pass_on()

    def _take_turn(self) -> None:
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return
            called = threading.Lock()
            called.acquire()
            self.waiting.append(called)
        called.acquire()

    def _pass_on(self) -> None:
        with self._lock:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self._free += 1


@contextmanager
def turn_passed_on() -> Iterator[None]:
    """While this thread waits for a stream or the partner. Of one that has no turn, nothing: a job's, or one that has passed
    it on already. To be entered without any lock that a request may wait for: its holder would be behind it in the line."""
    line = _here.line
    if line is None:
        yield
        return
    line.__exit__(None, None, None)
    try:
        yield
    finally:
        line.__enter__()
