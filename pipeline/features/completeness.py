"""Completeness: how many events of a user the Python service has yet to get, counted from the bridge's position."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

import numpy as np

from pipeline.commit_log.frames import BRIDGE_ONLY, Position
from pipeline.log import Log
from pipeline.streams.stream import Batch

MOST_EVENTS = 5_000_000  # remembered of a backlog: 20 MB; beyond this the figure is a least one
_LARGE = 1 << 18  # events of a part that is joined with no other


class _Part(NamedTuple):
    """Neighbouring events: the ordinal of the first, and the users of all by ordinal."""

    first: int
    users: array[int]

    @property
    def end(self) -> int:
        return self.first + len(self.users)


def _join(before: _Part, after: _Part) -> bool:
    """Whether two parts are to be one."""
    sizes = len(before.users), len(after.users)
    return before.end == after.first and sizes[0] <= 2 * sizes[1] and sizes[0] < _LARGE


class Backlog:
    """The users of the events that the bridge has yet to deliver, as 32 bits each in the log's order.

    `delivered` gives the ordinal behind the bridge's last delivered event. Reads ask it all the time, so a long backlog is of
    few large parts, not of one for each batch.
    """

    def __init__(self, delivered: Callable[[], int]) -> None:
        self._delivered = delivered
        self._parts: list[_Part] = []  # replaced as a whole: readers are other threads
        self.truncated = False

    def note(self, batch: Batch) -> None:
        """A batch that the features stream has come past, whomever it is addressed to."""
        if batch.to & BRIDGE_ONLY:
            self._add(batch.first_ordinal, array("I", batch.user_hashes))

    def _add(self, first: int, users: array[int]) -> None:
        done, parts = self._delivered(), self._parts
        if parts and first < parts[-1].end:
            parts = []  # the stream was made anew, and reads again
        gone = 0
        while gone < len(parts) and parts[gone].end <= done:
            gone += 1
        parts = parts[gone:]
        if first + len(users) > done:
            parts.append(_Part(first, users))
        # Parts of like sizes become one: each event is copied a few times, whatever the backlog.
        while len(parts) > 1 and _join(*parts[-2:]):
            last = parts.pop()
            parts[-1] = _Part(parts[-1].first, parts[-1].users + last.users)
        while sum(len(part.users) for part in parts) > MOST_EVENTS:
            parts = parts[1:]
            self.truncated = True
        if not parts:
            self.truncated = False
        self._parts = parts

    def load(self, log: Log, position: Position, upto: int) -> None:
        """Read the backlog of an earlier process: from the bridge's position up to an ordinal."""
        self._parts = []
        while position.ordinal < upto and (frames := log.read(position, 1 << 20)):
            for frame in frames:
                if frame.ordinal < upto and frame.to & BRIDGE_ONLY:
                    self._add(frame.ordinal, array("I", frame.user_hashes()))
            position = frames[-1].after()

    def behind(self, user_id: str) -> int:
        """How many events of the user the Python service has not been given yet."""
        done, wanted, parts = self._delivered(), crc32(user_id.encode()), self._parts
        return sum(
            int(np.count_nonzero(np.frombuffer(part.users, np.uint32)[max(0, done - part.first) :] == wanted))
            for part in parts
            if part.end > done
        )
