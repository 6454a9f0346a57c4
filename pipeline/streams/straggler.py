"""The straggler: one stream on its own, which failed or fell behind the group; it finds the bad event and catches up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import CANARY, Frame, Position
from pipeline.streams.stream import Batch
from pipeline.streams.worker import Shared, Worker, its_own

MAX_ATTEMPTS = 3
MAX_BAD_IN_A_ROW = 5  # beyond this the stream itself is suspected, and events are held rather than dead-lettered
HOLD_S = 60.0  # and for so long, once: if it is not mended by then, it is the events after all
TRUSTED_AFTER = 100  # good events in a row after which a straggler takes whole batches again
log = logging.getLogger(__name__)


class Straggler(Worker):
    """One stream that failed or fell behind: event by event around the trouble, in batches once it goes well again."""

    def __init__(self, shared: Shared, name: str, caught_up: Callable[[Position], bool], careful: bool) -> None:
        super().__init__(shared)
        self.name = name
        self._caught_up = caught_up
        self.careful = careful
        self.holding: str | None = None  # the error for which the stream waits at one event
        self.trouble: str | None = None  # what it threw elsewhere than at an event, the last time
        self.attempts: dict[int, tuple[int, int, str]] = {}  # ordinal -> attempts, first at (epoch ms), error
        self.condemned: dict[int, str] = {}
        self._good, self._bad_in_a_row = 0, 0
        self._held_since: float | None = None  # monotonic; until a good event comes
        self.done = False

    def hung_at(self, ordinal: int, before: Straggler) -> None:
        """Go on where a straggler hung, with what it had found out."""
        self.attempts, self.condemned = before.attempts, before.condemned
        self._bad_in_a_row, self._held_since = before._bad_in_a_row, before._held_since
        self._failed_at(ordinal, "hung", single=True)

    def work(self) -> None:
        name = self.name
        if self.trouble is not None:
            self.stopping.wait(1.0)
        self._reload()
        while not self.stopping.is_set():
            self.shared.wake.clear()
            frames = self.shared.log.read(self.at[name], 1 << 17)
            if not self.careful and (not frames or self._caught_up(self.at[name])):
                self.done = True
                return
            if not frames:
                self.careful = False
                continue
            for batch in self._batches(frames):
                if not self._try(batch):
                    break
                self.checkpoint_step(False)
                if self.stopping.is_set():
                    return

    def _reload(self) -> None:
        self.settle()  # a commit that is on its way would come after the look at what has been committed
        position = checkpoints.read(self.shared.store, [self.name])[self.name]
        self.load(self.name, position)
        self._committed[self.name] = position

    def _batches(self, frames: list[Frame]) -> Iterator[Batch]:
        for frame in frames:
            skip = self.at[self.name].index
            if not self.careful:
                yield Batch([frame], skip)
                continue
            for index in range(skip, len(frame.records)):
                yield Batch([frame], index, single=True)

    def _try(self, batch: Batch) -> bool:
        """Feed a batch; False when it failed and the stream was made anew."""
        name, ordinal = self.name, batch.first_ordinal
        single = len(batch) == 1
        if single and ordinal in self.condemned:
            attempts, first_at, error = self.attempts.pop(ordinal)
            reason = f"{self.condemned.pop(ordinal)}: {error}"
            if not batch.to & CANARY:  # which counts nowhere
                self.count(name, 0, [self.letter(name, batch, 0, reason, attempts, first_at)])
            self.at[name] = self._progress[name].position = batch.after
            self.shared.applied(name, ordinal + 1)
            self._bad_in_a_row += 1
            return True
        if ordinal in self.attempts:
            self.checkpoint()  # what is good before a bad event must not be done again with it
        try:
            self.feed(name, batch)
        except Exception as error:  # whatever it throws is this event's failure
            if not its_own(error):
                raise
            self._failed_at(ordinal, f"{type(error).__name__}: {error}", single)
            self._reload()
            return False
        self.shared.applied(name, ordinal + len(batch))
        self.holding, self._held_since = None, None
        self._bad_in_a_row = 0
        self._good += len(batch)
        if self.careful and self._good >= TRUSTED_AFTER:
            self.careful = False
        return True

    def _failed_at(self, ordinal: int, error: str, single: bool) -> None:
        self._good = 0
        self.careful = True
        if not single:
            return
        attempts, first_at, _ = self.attempts.get(ordinal, (0, self.shared.clock(), ""))
        self.attempts[ordinal] = (attempts + 1, first_at, error)
        log.warning("stream failed at an event", extra={"stream": self.name, "ordinal": ordinal, "error": error})
        if attempts + 1 < MAX_ATTEMPTS:
            self.stopping.wait(0.05 * 2**attempts)
        elif self._bad_in_a_row < MAX_BAD_IN_A_ROW:
            self.condemned[ordinal] = "failed"
        else:
            self.holding = error
            self._held_since = self._held_since or time.monotonic()
            if time.monotonic() - self._held_since >= HOLD_S:
                self.condemned[ordinal] = "failed"
            else:
                self.stopping.wait(min(5.0, 0.1 * 2 ** min(attempts, 6)))
