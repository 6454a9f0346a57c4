"""Who is to blame for calls that fail, an event or the partner? Pure: time is passed in, in s.

Where an event fails alone, each time it is sent, while others are taken between its failures, it is to blame. Where
nothing is taken it is the partner, and no event is given up, but for one now and then: all that wait may be bad. Of a user
whose event was to blame for a status, the next event that is answered so is believed to be refused too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_ATTEMPTS = 3  # of a slice before it is halved, of an event before another is tried in its stead
PROOFS = 6  # failures between which others were taken: a partner that fails at random gets there once in 4^6 times
MAX_REFUSALS = 5  # in a row, with nothing taken: from then on the partner is suspected
MOST_PATIENCE_S = 3.0  # with an event that others were taken in the stead of
MOST_CONVICTED = 10_000  # users that are remembered
HOLD_S, MOST_HOLD_S = 300.0, 3600.0  # after so long an event that could not be proven guilty is given up all the same


@dataclass(slots=True)
class Suspect:
    """An event that failed alone; `index` in its part, `since` when it first did."""

    index: int
    since: float
    failures: int = 0
    proofs: int = 0
    taken: int = 0  # what the jury had seen when it last failed
    failed: int = 0
    due: bool = False  # another event is to be tried in its stead
    cleared: set[bytes] = field(default_factory=set)  # users whose event was tried, and was not taken either
    reason: str = ""  # of its latest failure
    failed_at: float = 0.0
    not_before: float = 0.0
    patience: float = 0.0
    asked: bool = False  # to wait, by the partner: others go meanwhile

    def waits(self, now: float, asked_s: float) -> None:
        """It failed at a partner that says it is busy, and is not to be sent again for so long."""
        self.failed_at, self.not_before, self.asked = now, now + asked_s, asked_s > 0
        self.due = self.due or self.asked

    def another_taken(self, now: float) -> None:
        """It is given the same pause as the one that was taken in its stead, and a longer one each time: else that would take its turn
        at a partner that takes so many calls a second, time after time."""
        if self.failed_at > 0.0:
            self.patience = min(MOST_PATIENCE_S, max(now - self.failed_at, 2 * self.patience))
            self.not_before, self.failed_at = max(self.not_before, now + self.patience), 0.0


class Jury:
    """Sees what all lanes of the bridge are answered."""

    def __init__(self) -> None:
        self.taken = 0  # calls of which something was taken
        self.failed = 0  # calls that failed, but for those of events that fail again and again
        self.convicted: dict[bytes, tuple[str, int]] = {}  # users: whose event was to blame, where, for which status
        self._refusals = 0  # of events alone, since something was taken
        self._unproven = 0  # given up for their time, since something was taken

    def took(self) -> None:
        self.taken += 1
        self._refusals = self._unproven = 0

    def believes_refusal(self) -> bool:
        """An event was refused alone. So many in a row are more likely a partner that refuses everything."""
        self._refusals += 1
        return self._refusals <= MAX_REFUSALS

    def convict(self, user: bytes, url: str, status: int) -> None:
        self.convicted[user] = url, status
        if len(self.convicted) > MOST_CONVICTED:
            del self.convicted[next(iter(self.convicted))]

    def condemns(self, suspect: Suspect, now: float, healthy: bool) -> bool:
        """The event has failed alone, perhaps once more. Where nothing proves it guilty time may, at a `healthy` partner."""
        taken, failed = self.taken - suspect.taken, self.failed - suspect.failed
        if suspect.failures > 0 and taken != failed:
            suspect.proofs = max(0, suspect.proofs + (1 if taken > failed else -1))
        suspect.failures += 1
        suspect.due = suspect.failures >= MAX_ATTEMPTS
        self.failed += not suspect.due
        suspect.taken, suspect.failed = self.taken, self.failed
        if suspect.proofs >= PROOFS:
            return True
        if not healthy or now - suspect.since < min(MOST_HOLD_S, HOLD_S * 2**self._unproven):
            return False
        self._unproven += 1
        return True

    def wants_another(self, suspect: Suspect) -> bool:
        """Is another event to be tried in its stead now? Not where one was taken anyway since it last failed."""
        return suspect.due and self.taken == suspect.taken
