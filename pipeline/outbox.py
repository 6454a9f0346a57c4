"""The outbox: the users whose public key lags behind, those that wait longest first, and how far in the log none does."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from itertools import islice


class Outbox:
    """Users and, of each, the ordinal of the first event that its public key may lack. Any thread may call it.

    It is in memory alone: what it holds is found again in the log, between the published position and the checkpoint.
    """

    def __init__(self) -> None:
        self._users: dict[str, int] = {}  # by ascending ordinals
        self._latest = 0
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

    def reached(self) -> int | None:
        """The ordinal up to which no public key lacks an event; None where nobody waits."""
        with self._lock:
            return min(islice(self._users.values(), 1), default=None)
