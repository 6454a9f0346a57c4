"""The high-water mark: how far the log is known to have reached, so that a store that comes back with less is told."""

from __future__ import annotations

import logging
import threading
import time

from pipeline.events import rfc3339

TOLD_S = 3600.0  # health says so for so long, or until this process ends
log = logging.getLogger(__name__)


class HighWater:
    """`reached` is the highest ordinal that the store has confirmed. `fell`: it has come back with less since, by a failover or
    out of a copy, and the streams have yet to go on from what is there; their own places may lie beyond its end."""

    def __init__(self) -> None:
        self.reached = 0
        self.fell = False
        self._lock = threading.Lock()
        self._latest: tuple[float, str] | None = None

    def saw(self, ordinal: int, known: int) -> None:
        """The log's end in an answer of the store; `known` is what `reached` was before the question, since answers may
        overtake each other."""
        if ordinal == self.reached:
            return
        with self._lock:
            if ordinal >= known:
                self.reached = max(self.reached, ordinal)
            elif self.reached >= known:  # nobody has noticed yet
                self.reached, self.fell = ordinal, True
                at = rfc3339(time.time_ns() // 1_000_000)
                why = f"the store came back without its latest events: the log had reached {known}, now it ends at {ordinal}"
                self._latest = time.monotonic(), f"{why} (noticed at {at})"
                log.error(why, extra={"reached": known, "ends_at": ordinal})

    def heed(self) -> None:
        """The checkpoints are read again."""
        self.fell = False

    @property
    def reason(self) -> str | None:
        """What health has to say of it, None where it is long ago or never was."""
        if self._latest is None or time.monotonic() - self._latest[0] > TOLD_S:
            return None
        return self._latest[1]
