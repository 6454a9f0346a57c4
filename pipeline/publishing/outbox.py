"""The outbox: the users whose public key lags behind, those that wait longest first, and how far in the log none does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice

from pipeline.commit_log.frames import Position


class Outbox:
    """Users and, of each, the ordinal of the first event that its public key may lack. Any thread may call it.

    It is in memory alone: what it holds is found again in the log, between the published position, which is the latest checkpoint
    up to which no key lacks an event, and the checkpoint.
    """

    def __init__(self) -> None:
        self._users: dict[str, int] = {}  # by ascending ordinals
        self._latest = 0
        self._checkpoints = deque([Position()])  # from the published position on
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._users)

    def add(self, users: Iterable[str], ordinal: int | None = None) -> None:
        """Users with events from `ordinal` on, not less than in the calls before; without it, users whose key lacks no event but
        should be made anew. One that waits already keeps its place."""
        with self._lock:
            if ordinal is not None:
                self._latest = ordinal
            lacks, put = self._latest, self._users.setdefault
            for user_id in users:
                put(user_id, lacks)

    def first(self, most: int) -> list[str]:
        """Those that wait longest; they stay."""
        with self._lock:
            return list(islice(self._users, most))

    def take(self, users: Iterable[str]) -> dict[str, int]:
        """These leave; put_back() takes what this answers."""
        with self._lock:
            return {user_id: self._users.pop(user_id) for user_id in users if user_id in self._users}

    def put_back(self, taken: Mapping[str, int]) -> None:
        """They could not be published, and come first again."""
        with self._lock:
            lowest = min([*taken.values(), *islice(self._users.values(), 1)], default=0)
            back = dict.fromkeys(taken, lowest)
            self._users = {**back, **self._users, **back}

    def saw(self, checkpoint: Position) -> None:
        """All users with events before it are in here, or were."""
        with self._lock:
            if checkpoint != self._checkpoints[-1]:
                self._checkpoints.append(checkpoint)

    def advance(self) -> Position | None:
        """The published position, where it has moved on since it was last asked for."""
        known, before = self._checkpoints, self._checkpoints[0]
        with self._lock:
            reached = next(iter(self._users.values()), None)  # None: nobody waits
            while len(known) > 1 and (reached is None or known[1].ordinal <= reached):
                known.popleft()
            return known[0] if known[0] is not before else None
