"""Completeness: how many events of a user the Python service has yet to get, counted from the bridge's position."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from zlib import crc32

import numpy as np

from pipeline.frames import BRIDGE_ONLY, Position
from pipeline.log import Log
from pipeline.streams.stream import Batch

MOST_EVENTS = 5_000_000  # remembered of a backlog: 20 MB; beyond this the figure is a least one


class Backlog:
    """The users of the events that the bridge has yet to deliver, as 32 bits each in the log's order.

    `delivered` gives the ordinal behind the bridge's last delivered event.
    """

    def __init__(self, delivered: Callable[[], int]) -> None:
        self._delivered = delivered
        self._parts: deque[tuple[int, array[int]]] = deque()  # ordinal of the first, users by ordinal
        self._events = 0
        self.truncated = False

    def note(self, batch: Batch) -> None:
        """A batch that the features stream has come past, whomever it is addressed to."""
        if batch.to & BRIDGE_ONLY:
            self._add(batch.first_ordinal, array("I", batch.user_hashes))

    def _add(self, first: int, users: array[int]) -> None:
        done = self._delivered()
        parts = self._parts
        if parts and first < parts[-1][0] + len(parts[-1][1]):
            self._parts.clear()  # the stream was made anew, and reads again
            self._events = 0
        while parts and parts[0][0] + len(parts[0][1]) <= done:
            self._events -= len(parts.popleft()[1])
        if first + len(users) > done:
            parts.append((first, users))
            self._events += len(users)
        while self._events > MOST_EVENTS:
            self._events -= len(parts.popleft()[1])
            self.truncated = True
        if not parts:
            self.truncated = False

    def load(self, log: Log, position: Position, upto: int) -> None:
        """Read the backlog of an earlier process: from the bridge's position up to an ordinal."""
        self._parts.clear()
        self._events = 0
        while position.ordinal < upto and (frames := log.read(position, 1 << 20)):
            for frame in frames:
                if frame.ordinal < upto and frame.to & BRIDGE_ONLY:
                    self._add(frame.ordinal, array("I", frame.user_hashes()))
            position = frames[-1].after()

    def behind(self, user_id: str) -> int:
        """How many events of the user the Python service has not been given yet."""
        done, wanted = self._delivered(), crc32(user_id.encode())
        parts = list(self._parts)
        if not parts or parts[-1][0] + len(parts[-1][1]) <= done:
            return 0
        return sum(
            int(np.count_nonzero(np.frombuffer(users, np.uint32)[max(0, done - first) :] == wanted))
            for first, users in parts
            if first + len(users) > done
        )
