"""Precedence: what somebody waits for goes before what nobody does. All of it shares one interpreter lock and a few cores."""

from __future__ import annotations

import threading
from types import TracebackType


class Precedence:
    """Entered by whoever has somebody waiting, for what is short: judging, a batch, a trip to the store. Those without look whether it
    is `taken`, and put off what they are about to begin, for as long as they can afford to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = 0

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._entered -= 1

    @property
    def taken(self) -> bool:
        return self._entered > 0
