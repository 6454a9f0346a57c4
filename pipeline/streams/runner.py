"""The runner of the local streams: holds the lease, starts their workers, restarts, watches and reports, once for all
four.

Streams that stand together share what is decoded (group.py), not their checkpoints. A stream that
throws, hangs or is behind goes on alone (straggler.py), finds the bad event, and joins the group again once it
has caught up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter

from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import Position
from pipeline.commit_log.lease import TTL_MS, Lease
from pipeline.concurrency.precedence import Precedence
from pipeline.errors import Fenced, StoreError
from pipeline.keys import LOCAL_STREAMS
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.awaited import Awaited, looks_s
from pipeline.streams.group import Failed, Group
from pipeline.streams.straggler import Straggler
from pipeline.streams.stream import Stream
from pipeline.streams.worker import Counters, Shared, Worker, its_own

STARTING = "starting"
HANG_S = 30.0
NEAR_EVENTS = 2_000  # a straggler this close to the group joins it
APART_EVENTS = 100_000  # streams that a crash left no farther apart go on as one group, from the hindmost on
_CATCH_UP_EVENTS = 10_000  # who is farther behind is not waited for: it takes about a second
_FIRST_RESTART_S, _LAST_RESTART_S = 0.1, 5.0
Spawn = Callable[[str, Callable[[], None]], threading.Thread]
log = logging.getLogger(__name__)


class Runner:
    """Runs the local streams while this instance holds the lease, and stands by while another one does."""

    def __init__(
        self,
        store: Store,
        events: Log,
        lease: Lease,
        clock: Callable[[], int],
        make: Mapping[str, Callable[[], Stream]],
        spawn: Spawn,
        precedence: Precedence | None = None,
    ) -> None:
        self._store, self._lease, self._spawn = store, lease, spawn
        self._shared = Shared(
            store, events, lease, clock, make, threading.Event(), self._applied, precedence or Precedence()
        )
        lease.raised = self._hand_on
        self._group: Group | None = None
        self._stragglers: dict[str, Straggler] = {}
        self._threads: dict[Worker, threading.Thread] = {}
        self._failures: list[Failed] = []
        self._news = threading.Event()
        self._totals = {name: Counters() for name in make}
        self._ordinals: dict[str, int] = {}
        self._awaited = {name: Awaited(partial(self.ordinal, name)) for name in make}
        self.state = STARTING  # then running, standby, restarting, stopped
        self.detail: str | None = None

    def run(self, stop: threading.Event) -> None:
        """Blocks until `stop`. Survives a store that is away, restarts or was emptied, and a lost lease."""
        pause, began = _FIRST_RESTART_S, time.monotonic()
        while not stop.is_set():
            try:
                self._shared.log.drop_tail()  # it may be of a store that has been emptied since
                self._shared.log.head()  # which is told
                self._shared.log.mark.heed()
                if not (self._lease.epoch and self._lease.raise_epoch()) and not self._lease.take():
                    self._turn("standby", "another instance runs the pipeline")
                    stop.wait(0.5)
                    continue
                began = time.monotonic()
                self._start()
                self._supervise(stop)
                pause = _FIRST_RESTART_S
            except (StoreError, Fenced) as error:
                self._turn("restarting", error.message)
                pause = _FIRST_RESTART_S if time.monotonic() - began > 5.0 else min(_LAST_RESTART_S, pause * 2)
            except Exception as error:
                log.exception("pipeline failed")
                self._turn("restarting", f"{type(error).__name__}: {error}")
                pause = min(_LAST_RESTART_S, pause * 2)
            finally:
                self._stop_workers()
            if not stop.is_set():
                stop.wait(pause)
        self._turn("stopped")

    def _turn(self, state: str, detail: str | None = None) -> None:
        """It stands like this from now on; a line in the log for each change of the state, not for each attempt."""
        if state != self.state:
            level = logging.WARNING if state == "restarting" else logging.INFO
            log.log(level, "pipeline is %s", state, extra={"reason": detail})
        self.state, self.detail = state, detail

    def wake(self) -> None:
        """The log has taken events."""
        self._shared.wake.set()

    def stream(self, name: str) -> Stream | None:
        """The running stream object with its live state, None while it does not run here."""
        straggler = self._stragglers.get(name)
        for worker in (straggler, self._group):
            if worker is not None and name in worker.streams:
                return worker.streams[name]
        return None

    def states(self) -> dict[str, tuple[str, str | None]]:
        """For each stream: running, behind, failed, restarting, standby, starting or stopped, and why."""
        found: dict[str, tuple[str, str | None]] = {}
        for name in LOCAL_STREAMS:
            straggler, group = self._stragglers.get(name), self._group
            if self.state != "running":
                found[name] = (self.state, self.detail)
            elif straggler is not None:
                why = straggler.holding or straggler.trouble
                found[name] = ("failed", why) if why else ("behind", "catches up by itself")
            elif group is not None and name in group.streams:
                found[name] = ("running", None)
            else:
                found[name] = ("restarting", None)
        return found

    def processed(self, name: str) -> int:
        """Events the stream processed here since the process started, checkpointed or not."""
        workers: list[Worker | None] = [self._group, self._stragglers.get(name)]
        return self._totals[name].processed + sum(w.counters[name].processed for w in workers if w is not None)

    def checkpoint_age_s(self) -> float | None:
        group = self._group
        return time.monotonic() - group.checkpointed if group is not None else None

    def delay_s(self, name: str) -> float | None:
        """How long after its arrival the latest event was processed by the stream."""
        worker = self._stragglers.get(name) or self._group
        return worker.delays_s.get(name) if worker is not None else None

    def position(self, name: str) -> Position | None:
        """Where the stream stands, live; None while it does not run here."""
        worker = self._stragglers.get(name) or self._group
        return worker.at.get(name) if worker is not None else None

    def ordinal(self, name: str) -> int:
        """How many events of the log the stream has behind it, live."""
        return self._ordinals.get(name, 0)

    def wait_for(self, name: str, ordinal: int, timeout_s: float) -> bool:
        """Wait until the stream has processed all events before `ordinal`."""
        deadline, pauses = time.monotonic() + timeout_s, looks_s()
        while self.ordinal(name) < ordinal:
            left, pause_s = deadline - time.monotonic(), 0.25
            if left <= 0:
                return False
            if self.state != "running":  # another instance does the work: its checkpoint tells
                if checkpoints.read(self._store, [name])[name].ordinal >= ordinal:
                    return True
                pause_s = next(pauses)
            self._awaited[name].wait(ordinal, min(left, pause_s))
        return True

    def reasons(self, name: str, places: Sequence[int]) -> dict[int, str]:
        """Which of the events, by place, the stream has given up, and why: with a checkpoint or since then. Raises StoreError."""
        workers: list[Worker | None] = [self._group, self._stragglers.get(name)]
        letters = [letter for w in workers if w is not None for letter in w.unwritten_dead(name)]
        fresh = {letter.place: letter.reason for letter in letters}  # before the store is asked
        found = checkpoints.reasons(self._store, name, places)
        return found | {place: fresh[place] for place in places if place in fresh}

    def catch_up(self, name: str, timeout_s: float) -> None:
        """Wait until a stream has what the leader has; not for one that runs apart from the group, or is far behind."""
        group = self._group
        if group is None or self.state != "running" or name not in group.streams:
            return
        front = group.front.ordinal
        if 0 < front - self._ordinals.get(name, 0) < _CATCH_UP_EVENTS:
            group.hurry()
            self.wait_for(name, front, timeout_s)

    def _applied(self, name: str, ordinal: int) -> None:
        self._ordinals[name] = ordinal
        self._awaited[name].moved()

    def _start(self) -> None:
        positions = checkpoints.read(self._store, LOCAL_STREAMS)
        self._failures.clear()
        for name, position in positions.items():
            self._ordinals[name] = position.ordinal
        self._divide(positions)
        self._turn("running")

    def _divide(self, positions: Mapping[str, Position]) -> None:
        """Start the streams near the foremost one as the group, and those far behind it on their own, as far as they do not
        run already. Within a frame, none waits for the group: the group goes by whole frames."""
        free = {name: p for name, p in positions.items() if name not in self._stragglers}
        by_ordinal = attrgetter("ordinal")
        foremost = max((free or positions).values(), key=by_ordinal)
        near = [p for p in free.values() if foremost.ordinal - p.ordinal <= APART_EVENTS]
        start = min(near, key=by_ordinal, default=foremost)
        together = {
            name: p
            for name, p in free.items()
            if p.ordinal == start.ordinal or (p.ordinal > start.ordinal and not p.index)
        }
        self._group = Group(self._shared, start, together, self._on_failure)
        self._launch(self._group, "pipeline")
        for name in free.keys() - together.keys():
            self._start_straggler(name, careful=False)

    def _supervise(self, stop: threading.Event) -> None:
        renewed = time.monotonic()
        while not stop.is_set():
            self._news.wait(0.1)
            self._news.clear()
            if time.monotonic() - renewed > TTL_MS / 4000:
                if not self._lease.renew():
                    raise Fenced("the lease is another's, or the store was emptied")
                renewed = time.monotonic()
            while self._failures:
                self._start_straggler(self._failures.pop().stream, careful=True)
            group = self._group
            if group is not None and not self._threads[group].is_alive():
                error, group.error = group.error, None
                raise error or StoreError("the pipeline ended")
            for name, straggler in list(self._stragglers.items()):
                if not self._threads[straggler].is_alive():
                    self._retire(straggler, name)
            self._watch()

    def _retire(self, straggler: Straggler, name: str) -> None:
        del self._stragglers[name]
        error = straggler.error
        self._forget(straggler)
        if isinstance(error, Fenced):
            raise error
        if straggler.done and error is None and self._group is not None:
            self._group.join(name)
        else:
            self._start_straggler(name, careful=straggler.careful)
            if error is not None and its_own(error):
                self._stragglers[name].trouble = f"{type(error).__name__}: {error}"

    def _watch(self) -> None:
        """Replace a worker whose stream hangs: its thread cannot be ended, but it never commits again."""
        for worker in (self._group, *self._stragglers.values()):
            busy = worker.busy if worker is not None else None
            if worker is None or busy is None or time.monotonic() - busy.since < HANG_S:
                continue
            log.error("stream hangs", extra={"stream": busy.stream, "ordinal": busy.ordinal})
            worker.abandoned = True
            if not self._lease.raise_epoch():  # it may have a commit on its way
                raise Fenced("the lease is another's, or the store was emptied")
            if isinstance(worker, Straggler):
                del self._stragglers[busy.stream]
                self._forget(worker)
                self._start_straggler(busy.stream, careful=True, hung=(busy.ordinal, worker))
            else:
                self._forget(worker)
                self._start_straggler(busy.stream, careful=True)
                self._divide(checkpoints.read(self._store, LOCAL_STREAMS))
            return

    def _hand_on(self) -> None:
        """The lease's epoch was raised, against a worker that hangs or a commit of the bridge: the others go on under it. From any
        thread."""
        for worker in list(self._threads):
            if not worker.abandoned:
                worker.epoch = self._lease.epoch

    def _start_straggler(self, name: str, careful: bool, hung: tuple[int, Straggler] | None = None) -> None:
        def caught_up(position: Position) -> bool:
            group = self._group
            return group is not None and group.position.ordinal - position.ordinal < NEAR_EVENTS

        straggler = Straggler(self._shared, name, caught_up, careful)
        if hung is not None:
            straggler.hung_at(*hung)
        self._stragglers[name] = straggler
        self._launch(straggler, f"straggler-{name}")

    def _launch(self, worker: Worker, name: str) -> None:
        def body() -> None:
            worker.run()
            self._news.set()

        self._threads[worker] = self._spawn(name, body)

    def _forget(self, worker: Worker) -> None:
        self._threads.pop(worker, None)
        worker.error = None
        for name, counters in worker.counters.items():
            self._totals[name].processed += counters.processed
            self._totals[name].dead += counters.dead

    def _on_failure(self, failure: Failed) -> None:
        self._failures.append(failure)
        self._news.set()

    def _stop_workers(self) -> None:
        workers = list(self._threads)
        for worker in workers:
            worker.stopping.set()
        self._shared.wake.set()
        for worker in workers:
            self._threads[worker].join(10.0)
            worker.abandoned = True  # one that still hangs must not commit once a successor has started
            self._forget(worker)
        self._group, self._stragglers = None, {}
