"""The group: the streams that stand together. One of them leads, since its work is read at once; the others follow when they can."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from pipeline.commit_log import checkpoints
from pipeline.commit_log.follower import POLL_S, Follower
from pipeline.commit_log.frames import Frame, Position
from pipeline.streams.stream import Batch
from pipeline.streams.worker import IDLE_CHECKPOINT_S, Shared, Worker, its_own

LEADER = "features"
PASS_EVENTS = 300  # and the frame that goes beyond: a few ms, which is how long what comes behind waits
MOST_AHEAD, MOST_AHEAD_BYTES = 40_000, 32 << 20  # events by which the leader is ahead at the most, and about their size
GIVE_WAY_S = 0.25  # so long after the leader the others' work waits for those who have precedence
_GLANCE_S = 0.002  # who gives way looks so often whether it still has to
_ANSWER_S = 0.001  # the store's, about
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Failed:
    """A stream that threw out of a batch."""

    stream: str
    error: str
    ordinal: int


@dataclass(slots=True)
class _Led:
    """What was given to the leader alone: its bytes in the log, and since when (monotonic seconds)."""

    batch: Batch
    size: int
    since: float


class Group(Worker):
    """The streams that stand together, or a little ahead of `start`: each batch is decoded once for all. There may be none yet.

    What is new goes to the leader first. The others are given it, and checkpoints carried on, while nothing is new: the more
    there is to do, the later, until the leader is as far ahead as it may be.
    """

    def __init__(
        self, shared: Shared, start: Position, positions: Mapping[str, Position], failed: Callable[[Failed], None]
    ) -> None:
        super().__init__(shared)
        self._start = dict(positions)
        self._failed = failed
        self.position = start  # where those that follow stand
        self.front = start  # what comes next in the log
        self._at_hand: deque[Frame] = deque()  # read, but given to nobody yet
        self._led: deque[_Led] = deque()
        self._led_bytes = 0
        self._joining: list[str] = []
        self._hurried = 0  # up to this ordinal nobody is given way to
        self._follower = Follower(shared.log)

    def join(self, name: str) -> None:
        """Take a stream in that stands at its checkpoint, at the next batch boundary."""
        self._joining.append(name)
        self.shared.wake.set()

    def hurry(self) -> None:
        """Somebody waits for those that follow: they give way to nobody before they have what the leader has. From any thread."""
        self._hurried = self.front.ordinal
        self.shared.wake.set()

    def work(self) -> None:
        for name, position in self._start.items():
            self.at[name] = position
            self._of(name, partial(self.load, name, position))
            self._committed[name] = position
        while not self.stopping.is_set():
            woken = self.shared.wake.is_set()
            self.shared.wake.clear()
            while self._joining:
                self._admit(self._joining.pop())
            if self._may_lead() and self.lead(woken):
                continue
            if self._gives_way():
                self.shared.wake.wait(_GLANCE_S)
            elif self.follow():
                self.checkpoint_step(False)
            elif not self.checkpoint_step(True):
                self.shared.wake.wait(self._idle_s())

    def _idle_s(self) -> float:
        """When there may be something to do without an event."""
        if self.committing:
            return _ANSWER_S
        return IDLE_CHECKPOINT_S / 2 if any(self._moved(name) for name in self._paces) else POLL_S

    def lead(self, woken: bool = True) -> bool:
        """Give the leader what comes next; False where there is nothing."""
        if not self._at_hand:
            self._at_hand.extend(self._follower.read(self.front, at_once=woken))
        if not self._at_hand:
            return False
        run = self._run()
        with self.shared.precedence:
            batch = Batch(run, self.front.index)
            self._give(batch, [name for name in self.streams if name == LEADER])
        self.front = batch.after
        self._led.append(_Led(batch, sum(frame.next - frame.address for frame in run), time.monotonic()))
        self._led_bytes += self._led[-1].size
        return True

    def follow(self) -> bool:
        """Give the others a batch that the leader has had; False where they have had all."""
        if not self._led:
            return False
        led = self._led.popleft()
        self._led_bytes -= led.size
        self._give(led.batch, [name for name in self.streams if name != LEADER])
        self.position = led.batch.after
        return True

    def _may_lead(self) -> bool:
        """Whether the leader is not as far ahead as it may be."""
        return self.front.ordinal - self.position.ordinal < MOST_AHEAD and self._led_bytes < MOST_AHEAD_BYTES

    def _gives_way(self) -> bool:
        """Whether those that follow let others go before them."""
        return (
            self.shared.precedence.taken
            and bool(self._led)
            and self.position.ordinal >= self._hurried
            and time.monotonic() - self._led[0].since < GIVE_WAY_S
            and not self.stopping.is_set()
        )

    def _run(self) -> list[Frame]:
        """Neighbouring frames with the same addressees, some events in all."""
        edges = {position.ordinal for position in self.at.values()}
        run = [self._at_hand.popleft()]
        size = len(run[0].records)
        while self._at_hand and size < PASS_EVENTS:
            frame = self._at_hand[0]
            if frame.to != run[0].to or frame.ordinal in edges:
                break
            run.append(self._at_hand.popleft())
            size += len(frame.records)
        return run

    def _give(self, batch: Batch, names: Iterable[str]) -> None:
        end = batch.first_ordinal + len(batch)
        for name in names:
            if self.at[name].ordinal >= end:
                continue  # joined ahead of the group
            try:
                self.feed(name, batch)
            except Exception as error:  # whatever it throws, it leaves the group
                if not its_own(error):
                    raise
                self.left_alone(name, error)
                continue
            self.shared.applied(name, end)

    def left_alone(self, name: str, error: Exception) -> bool:
        ordinal = self.at[name].ordinal
        log.error("stream left the group", exc_info=error, extra={"stream": name, "ordinal": ordinal})
        self.settle()  # whoever goes on with the stream reads its checkpoint
        self.drop(name)
        self._failed(Failed(name, f"{type(error).__name__}: {error}", ordinal))
        return True

    def _admit(self, name: str) -> None:
        """Load a stream and bring it to the group's position, or leave it ahead, at a frame's beginning, for the group
        to reach."""
        while self.follow():  # the leader or not, it finds all at one place
            pass
        position = self.at[name] = checkpoints.read(self.shared.store, [name])[name]
        self._of(name, partial(self.load, name, position))
        self._committed[name] = position
        while name in self.streams and not self.stopping.is_set():
            if self.at[name].ordinal >= self.position.ordinal and not self.at[name].index:
                return
            for frame in self.shared.log.read(self.at[name]):
                if frame.ordinal >= self.position.ordinal and not self.at[name].index:
                    return
                try:
                    self.feed(name, Batch([frame], self.at[name].index))
                except Exception as error:
                    if not its_own(error):
                        raise
                    self.left_alone(name, error)
                    return
                self.shared.applied(name, frame.ordinal + len(frame.records))
