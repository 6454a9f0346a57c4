"""The worker: feeds streams and checkpoints them, in steps; group.py and straggler.py say which and when."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import DeadLetter, Progress
from pipeline.commit_log.frames import CANARY, Position
from pipeline.commit_log.lease import Lease
from pipeline.concurrency.precedence import Precedence
from pipeline.errors import Fenced, StoreError, StoreWrongType
from pipeline.keys import STREAMS
from pipeline.log import Log
from pipeline.store import Call, Store
from pipeline.streams.stream import Batch, Stream

# Rows of what changed coalesce from one checkpoint of a stream to its next: it may take a twentieth of the worker's time, and
# comes the later the more there is to write. After the last event there is nothing to coalesce any more.
CHECKPOINT_S = 0.5  # at least, from one's beginning to the next
CHECKPOINT_SHARE = 19  # pause at least so many times as long as the latest took,
MOST_CHECKPOINT_S = 3.0  # but no longer: so much of the log is read again after a crash
IDLE_CHECKPOINT_S = 0.1
_STREAMS_AT_ONCE = 2  # have their checkpoints carried on between two batches
_PACKED_AT_ONCE = 200  # commands of a checkpoint, some ms; then events have their turn

BITS = {name: 1 << i for i, name in enumerate(STREAMS)}
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Shared:
    """What all workers of a runner share. `wake` is set whenever the log has taken events."""

    store: Store
    log: Log
    lease: Lease
    clock: Callable[[], int]
    make: Mapping[str, Callable[[], Stream]]
    wake: threading.Event
    applied: Callable[[str, int], None]
    precedence: Precedence = field(default_factory=Precedence)


@dataclass(slots=True)
class Counters:
    """What a stream did since the process started, for rates."""

    processed: int = 0
    dead: int = 0


@dataclass(slots=True)
class Busy:
    """What a worker is at, for the watchdog; `since` is monotonic seconds."""

    stream: str
    ordinal: int
    since: float


@dataclass(slots=True)
class _Pace:
    """A stream's checkpoint that is under way, or when the next one is due. Times are monotonic seconds."""

    ended: float  # the latest one
    pause: float = CHECKPOINT_S  # from then on
    began: float = 0.0
    spent_s: float = 0.0  # on the one under way, so far
    steps: Iterator[bool] | None = None


def its_own(error: Exception) -> bool:
    """Whether the trouble is the stream's that it came out of. The store's and the lease's are all streams'."""
    return isinstance(error, StoreWrongType) or not isinstance(error, (StoreError, Fenced))


class Worker(ABC):
    """The common part: streams, their positions, and checkpoints in steps between which processing goes on.

    Each stream has checkpoints of its own: few rows at a time, so that the store is never busy for long with one step.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.epoch = shared.lease.epoch  # of its own: one that was given up must not commit under a later one
        self.streams: dict[str, Stream] = {}
        self.at: dict[str, Position] = {}
        self.counters = {name: Counters() for name in shared.make}
        self.stopping = threading.Event()
        self.abandoned = False
        self.busy: Busy | None = None
        self.delays_s: dict[str, float] = {}  # from an event's arrival until the stream had processed it, the latest
        self.error: Exception | None = None  # whoever looks at it takes it away: see run()
        self._progress: dict[str, Progress] = {}
        self._writing: dict[str, Progress] = {}  # of checkpoints that are under way
        self._committed: dict[str, Position] = {}
        self._paces: dict[str, _Pace] = {}  # those whose turn it is first
        self._under_way: Call | None = None
        self._fed = time.monotonic()  # the latest batch

    def run(self) -> None:
        """The thread's body; what ended it is in `error`, None after a clean stop.

        An error holds on to this worker, by its traceback, and that to the streams with all their users: a cycle that is never
        collected once it is frozen. So nobody keeps one.
        """
        try:
            self.work()
            if not self.abandoned:
                self.checkpoint()
        except Exception as error:
            if not self.abandoned:
                self.error = error
            if not isinstance(error, (StoreError, Fenced)):
                log.exception("worker failed", extra={"streams": sorted(self.streams)})
        finally:
            if self._under_way is not None:
                self._under_way.close()

    @abstractmethod
    def work(self) -> None:
        """Feed the streams until `stopping`."""

    def load(self, name: str, position: Position) -> None:
        """Make a stream anew from the store."""
        stream = self.shared.make[name]()
        stream.load(self.shared.clock())
        self.streams[name], self.at[name] = stream, position
        self._progress[name], self._paces[name] = Progress(name, position), _Pace(time.monotonic())

    def drop(self, name: str) -> None:
        for table in (self.streams, self.at, self._progress, self._writing, self._paces):
            table.pop(name, None)

    @property
    def checkpointed(self) -> float:
        """When the stream that waits longest was checkpointed, monotonic seconds."""
        return min((pace.ended for pace in list(self._paces.values())), default=time.monotonic())

    def feed(self, name: str, batch: Batch) -> None:
        """One stream takes in one batch; anything it throws comes out."""
        if batch.to & BITS[name]:
            self._fed = time.monotonic()
            self.busy = Busy(name, batch.first_ordinal, self._fed)
            try:
                outcome = self.streams[name].process(batch, self.shared.clock())
            except Exception:
                if self.abandoned:  # the stream runs elsewhere by now: this failure is nobody's
                    raise Fenced("this worker hung and was replaced") from None
                raise
            finally:
                self.busy = None
            if self.abandoned:
                raise Fenced("this worker hung and was replaced")
            if not batch.to & CANARY:
                dead = [self.letter(name, batch, index, reason, 1) for index, reason in outcome.dead]
                self.count(name, outcome.done, dead)
            self.delays_s[name] = max(0.0, (self.shared.clock() - batch.arrivals[-1]) / 1000)
        else:
            self.streams[name].pass_over(batch)
        self.at[name] = self._progress[name].position = batch.after

    def count(self, name: str, processed: int, dead: list[DeadLetter]) -> None:
        self._progress[name].processed += processed
        self._progress[name].dead += dead
        self.counters[name].processed += processed
        self.counters[name].dead += len(dead)

    def unwritten_dead(self, name: str) -> list[DeadLetter]:
        """A stream's dead letters that the store may not have yet. From any thread."""
        # In the order in which they go on: one may be seen twice on its way, but never missed.
        found = [self._progress.get(name), self._writing.get(name)]
        return [letter for progress in found if progress is not None for letter in list(progress.dead)]

    def letter(
        self, name: str, batch: Batch, index: int, reason: str, attempts: int, first_at: int | None = None
    ) -> DeadLetter:
        now = self.shared.clock()
        place = batch.places[index]
        return DeadLetter(
            f"{name}-{place}",
            name,
            place,
            reason,
            attempts,
            first_at or now,
            now,
            batch.sources[index],
            batch.arrivals[index],
            batch.body(index),
        )

    def checkpoint_step(self, idle: bool) -> bool:
        """Carry the checkpoints of some streams, each in its turn, on by one step; True when there was something to do."""
        stepped, most = 0, 1 if idle else _STREAMS_AT_ONCE  # when idle, one step: events may have come meanwhile
        for name in list(self._paces):
            if stepped < most and name in self._paces and self._step(name, idle):
                stepped += 1
                if name in self._paces:
                    self._paces[name] = self._paces.pop(name)  # to the end
        return stepped > 0

    def _step(self, name: str, idle: bool) -> bool:
        pace, began = self._paces[name], time.monotonic()
        if pace.steps is None:
            idle = idle and began - self._fed >= IDLE_CHECKPOINT_S
            pause = 0.0 if self.streams[name].full else IDLE_CHECKPOINT_S if idle else pace.pause
            if began - pace.ended < pause or not self._moved(name):
                return False
            pace.steps, pace.spent_s, pace.began = self._checkpoint(name), 0.0, began
        moved = next(pace.steps, None)
        if moved is False:
            return False
        ended = time.monotonic()
        pace.spent_s += ended - began
        if moved is None:
            pace.steps, pace.ended = None, ended
            pace.pause = max(
                CHECKPOINT_S - (ended - pace.began), min(CHECKPOINT_SHARE * pace.spent_s, MOST_CHECKPOINT_S)
            )
        return True

    def checkpoint(self) -> None:
        """Bring everything processed so far into the store, now."""
        for name, pace in list(self._paces.items()):
            for _ in pace.steps or ():
                self.settle()
            pace.steps = None
            if self._paces.get(name) is pace and self._moved(name):
                for _ in self._checkpoint(name):
                    self.settle()
            pace.ended = time.monotonic()

    def _moved(self, name: str) -> bool:
        return self._progress[name].position != self._committed.get(name) or self.streams[name].unsaved

    def _checkpoint(self, name: str) -> Iterator[bool]:
        """A stream's checkpoint, in steps, False where the store has yet to answer; given up where the stream has left."""
        began = time.monotonic()
        cut = self._of(name, partial(self.streams[name].cut, self.shared.clock()))
        if cut is None:
            return
        progress = self._writing[name] = self._progress[name]
        self._progress[name] = Progress(name, self.at[name])
        while (chunk := self._of(name, partial(next, cut.chunks, None))) is not None:
            yield from self._commit(checkpoints.pack(chunk))
        if name not in self.streams:
            return
        final, packed = iter(cut.final), []
        while some := list(islice(final, _PACKED_AT_ONCE)):
            packed.append(checkpoints.pack(some))
            yield True
        packed.append(checkpoints.pack(checkpoints.advance(progress, self.shared.clock())))
        yield from self._commit(b"".join(packed))
        cut.done()
        checkpoints.tell_of_dead(progress, self.shared.clock())
        self._writing.pop(name, None)
        self._committed[name] = progress.position
        ms, ordinal = round((time.monotonic() - began) * 1000, 2), progress.position.ordinal
        log.debug("checkpoint made", extra={"stream": name, "ordinal": ordinal, "ms": ms})

    def _of(self, name: str, part: Callable[[], T]) -> T | None:
        """A stream's part in what is done for all; where it throws or hangs, the trouble is the stream's own."""
        self.busy = Busy(name, self.at[name].ordinal, time.monotonic())
        try:
            return part()
        except Exception as error:
            if not its_own(error) or self.abandoned or not self.left_alone(name, error):
                raise
            return None
        finally:
            self.busy = None

    def left_alone(self, name: str, error: Exception) -> bool:
        """Whether the others go on without a stream that threw."""
        return False

    def _commit(self, packed: bytes) -> Iterator[bool]:
        """Events go on being processed while the store is at it."""
        # Another stream's goes first; while this one waited for that, it may have begun the next.
        while self._under_way is not None:
            yield from self._answered(self._under_way)
        if self.abandoned:
            raise Fenced("this worker hung and was replaced")
        call = self._under_way = checkpoints.begin(self.shared.store, self.epoch, packed)
        yield True
        yield from self._answered(call)

    def _answered(self, call: Call) -> Iterator[bool]:
        """Until a commit is through, unless another step has seen to it."""
        while call is self._under_way:
            if call.ready():
                self.settle()
            else:
                yield False

    @property
    def committing(self) -> bool:
        """A commit is under way."""
        return self._under_way is not None

    def settle(self) -> None:
        """Wait for the commit that is under way. Raises Fenced, StoreError."""
        if self._under_way is not None:
            call, self._under_way = self._under_way, None
            call.result()
