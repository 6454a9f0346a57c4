"""The follower: reads on at the log's end, for the workers and the bridge."""

from __future__ import annotations

import time

from pipeline.commit_log.frames import Frame, Position
from pipeline.log import Log

POLL_S = 0.1


class Follower:
    """Reads on at the log's end. What this process appended is at hand; for what another instance did, and is not there, the
    store is asked only now and then: that costs a round trip."""

    def __init__(self, log: Log) -> None:
        self._log, self._next_look = log, 0.0

    def read(self, position: Position, limit: int = 1 << 20, at_once: bool = False) -> list[Frame]:
        """Whole frames from a position on, as Log.read() gives them; `at_once`: there is reason to ask the store."""
        if recent := self._log.recent(position, limit):
            return recent
        if not at_once and time.monotonic() < self._next_look:
            return []
        frames = self._log.read(position, limit)
        self._next_look = 0.0 if frames else time.monotonic() + POLL_S
        return frames
