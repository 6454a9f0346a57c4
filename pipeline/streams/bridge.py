"""Stream five: the bridge. Events leave for the Python service in the log's order per user, from a checkpoint of their own.

The backlog is the log itself: while the service is away nothing is queued anywhere else, and nothing else slows down.
Windows of the log (delivery.py) are sent in lanes side by side (sender.py), as many as the partner bears (throttle.py),
through the circuit (gate.py); what is done is committed here, in the log's order.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence

from pipeline.bridge import attempts
from pipeline.bridge.circuit import Circuit
from pipeline.bridge.delivery import MOST_BYTES, Ahead, Window, truncated
from pipeline.bridge.gate import Gate
from pipeline.bridge.health import Health
from pipeline.bridge.linger import Linger
from pipeline.bridge.outages import Ledger
from pipeline.bridge.sender import Sender
from pipeline.bridge.throttle import Throttle
from pipeline.bridge.watch import Watch
from pipeline.commit_log import checkpoints
from pipeline.commit_log.follower import Follower
from pipeline.commit_log.frames import CANARY, Frame, Position
from pipeline.commit_log.lease import Lease
from pipeline.concurrency.precedence import Precedence
from pipeline.concurrency.turns import turn_passed_on
from pipeline.errors import Fenced, StoreError
from pipeline.log import Log
from pipeline.operations.live_settings import LiveSettings
from pipeline.partner import Partner
from pipeline.store import Command, Store
from pipeline.streams.awaited import Awaited, looks_s
from pipeline.streams.trouble import Trouble

DEPTH = 3  # windows in memory: one under way, one to follow at once, one being read
DAMAGED = "damaged: the log's frame cannot be decoded"
_COMMIT_S = 0.02  # at most this often while there is more to send
_IDLE_S, _POLL_S, _GRACE_S = 0.25, 0.5, 2.0


class Bridge:
    """Runs in an event loop of its own thread, while this instance holds the lease."""

    name = "bridge"

    def __init__(
        self,
        store: Store,
        events: Log,
        lease: Lease,
        live: LiveSettings,
        partner: Partner,
        clock: Callable[[], int],
        precedence: Precedence,
    ) -> None:
        self._store, self._log, self._lease, self._live = store, events, lease, live
        self.partner = partner
        self._clock = clock
        self.ledger = Ledger(store, events)
        self.watch = Watch(partner, clock, self._health_known)
        self.gate = Gate(store, live, clock, self._stir)
        self.sender = Sender(partner, self.gate, self.watch, live, clock, self._stir)
        self.canary_refusals: dict[int, str] = {}  # the latest: ordinal -> the partner's words
        self.processed = 0
        self.ordinal = 0
        self.delay_s: float | None = None  # from the latest delivered event's arrival until the partner had taken it
        self.state = "stopped"
        self.detail: str | None = None
        self._awaited = Awaited(lambda: self.ordinal)
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._precedence = precedence
        self._linger = Linger(precedence)
        self._hungry = False  # it has looked for events since it was last woken
        self._polled = 0.0
        self._trouble = Trouble(self.name)
        self._uncertain = 0  # the epoch under which a commit was not answered, or was refused
        self._stop: Callable[[], bool] = lambda: False
        self._begin(0, Position())

    @property
    def circuit(self) -> Circuit:
        return self.gate.told

    @property
    def throttle(self) -> Throttle:
        return self.sender.throttle

    @property
    def errors(self) -> Sequence[dict[str, object]]:
        """The latest failed calls, newest first."""
        return self.sender.errors

    @property
    def errors_total(self) -> int:
        return self.sender.errors_total

    @property
    def halted(self) -> str | None:
        """Why nothing is sent just now, None while it is."""
        return self.gate.halted

    @property
    def health(self) -> Health | None:
        """The verdict on the partner at the address in force, None until that has been asked."""
        health = self.watch.health
        return health if health is not None and health.url == self.partner.url else None

    @property
    def status_since(self) -> int | None:
        return self.watch.since

    def wake(self) -> None:
        """Something changed: settings, a command, or somebody waits. Callable from any thread."""
        self._hungry = True
        self.arrived(hurry=True)

    def arrived(self, hurry: bool = False) -> None:
        """The log has taken events; costs next to nothing while the bridge is busy anyway. Callable from any thread."""
        if self._hungry and self._loop is not None and self._wake is not None:
            self._hungry = False
            with contextlib.suppress(RuntimeError):  # the loop has ended: there is nobody to wake
                self._loop.call_soon_threadsafe(self._stir, hurry)

    def wait_for(self, ordinal: int, timeout_s: float) -> bool:
        """Wait until all events before `ordinal` are delivered or dead letters; gives up where nothing is sent just
        now."""
        deadline, pauses = time.monotonic() + timeout_s, looks_s()
        self.wake()
        while self.ordinal < ordinal:
            left, pause_s = deadline - time.monotonic(), _IDLE_S
            if left <= 0 or self.halted is not None or self._stop():
                return False
            if self.state == "standby":  # another instance does the work: its checkpoint tells
                if checkpoints.read(self._store, [self.name])[self.name].ordinal >= ordinal:
                    return True
                pause_s = next(pauses)
            self._awaited.wait(ordinal, min(left, pause_s))
        return True

    def reached(self) -> int:
        """How many events of the log the bridge has behind it, whichever instance runs it. Raises StoreError as a standby."""
        return self.ordinal if self._lease.epoch else checkpoints.read(self._store, [self.name])[self.name].ordinal

    async def run(self, stop: Callable[[], bool]) -> None:
        """Deliver until `stop`. Survives the store and the partner being away."""
        self._loop, self._wake, self._stop = asyncio.get_running_loop(), asyncio.Event(), stop
        self._linger = Linger(self._precedence)
        self.partner.open()
        try:
            while not stop():
                try:
                    await self._run_epoch()
                except Exception as error:  # noqa: BLE001  told
                    self.state, self.detail = "restarting", self._trouble.goes_on(error)
                if not stop():
                    await self._rest(_POLL_S)
        finally:
            self.state = "stopped"
            await self.partner.close()

    async def check_health(self) -> Health:
        """Ask the partner now."""
        return await self.watch.check()

    def control(self, action: str, by: str = "unknown") -> None:
        """pause, resume, reset_circuit or open_circuit; kept in the store, for all instances."""
        self.gate.decide(action, by)
        if self._loop is not None and self._loop.is_running():
            looked = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
            with turn_passed_on():
                looked.result(10.0)
        self.wake()

    # ---------------------------------------------------------------------------------------- one epoch

    def _begin(self, epoch: int, position: Position) -> None:
        """Forget what was under way: the checkpoint says where to go on."""
        self._epoch, self._committed, self._ahead = epoch, position, Ahead(Follower(self._log).read, position)
        self._windows: deque[Window] = deque()
        self._notes: list[Command] = []
        self._at_end = False
        self._flushed_at = 0.0
        self.ordinal = position.ordinal
        self.gate.open()
        self.sender.start()

    async def _run_epoch(self) -> None:
        """Deliver under one epoch of the lease, from the committed checkpoint on."""
        if self._uncertain and self._uncertain == self._lease.epoch:
            self._lease.raise_epoch()  # what may yet arrive is fenced off; or the lease is found to be another's
        self._uncertain, epoch = 0, self._lease.epoch
        if not epoch:
            self.state, self.detail = "standby", "another instance runs the bridge"
            self._notes, self.sender.attempts = [], []  # whoever runs it keeps what is to be kept
            self.watch.kept()
            await self._look()
            self._trouble.is_over()
            return
        self._begin(epoch, checkpoints.read(self._store, [self.name])[self.name])
        await self._look(load=True)
        self.ledger.load()
        self.watch.load(self._store)
        try:
            while not self._stop() and self._lease.epoch == epoch and self.sender.crashed is None:
                await self._step()
                self._trouble.is_over()
            if self.sender.crashed is not None:
                raise self.sender.crashed
            await self._finish()
        finally:
            await self.sender.stop()

    async def _step(self) -> None:
        """One round: look at what was decided elsewhere, commit what is done, send what there is, rest."""
        if time.monotonic() - self._polled > _POLL_S:
            await self._look()
        if self._live["ENABLE_PYTHON_BRIDGE"]:
            await self.watch.new_address(self._stop)
            self.gate.follow()
        self._keep_ledger()
        self._flush()
        self.state, self.detail = self.gate.stands()
        if not self.gate.shut:
            while self._room():
                if not self._windows:
                    await self._linger.rest()
                if not await self._send_next():
                    break
        counting = self.ledger.counting or (self.circuit.state != "closed" and self.ledger.count_users())
        due = self.gate.dirty or (self._windows and self._windows[0].unfinished == 0)
        await self._rest(_COMMIT_S if counting or due else _IDLE_S)

    async def _rest(self, seconds: float) -> None:
        assert self._wake is not None
        self._hungry = self._hungry or not self._windows
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)
            self._wake.clear()

    async def _look(self, load: bool = False) -> None:
        """Take over what was decided by hand, at whichever instance; as a standby, or to begin with, the whole circuit."""
        self.gate.look(load or not self._epoch or not self._lease.epoch)
        self.ledger.refresh(always=not self._lease.epoch)
        if self.circuit.state == "closed" and self.circuit.failures == 0:
            self.watch.forget()  # it was reset
        self._polled = time.monotonic()
        self._linger.look()

    def _stir(self, hurry: bool = False) -> None:
        """There is something to do, maybe something that somebody waits for; from the loop itself."""
        if hurry:
            self._linger.hurry()
        if self._wake is not None:
            self._wake.set()

    # ---------------------------------------------------------------------------------------- sending

    def _room(self) -> bool:
        """May another window be cut? Small ones wait for those under way: what arrives meanwhile goes into one call. Behind an
        event that fails, as many as memory bears: only others can tell whether it is to blame."""
        if (starved := self.sender.starved) or not any(window.unfinished for window in self._windows):
            self._at_end = False
        more = len(self._windows) < 2 * DEPTH or sum(w.size for w in self._windows) < MOST_BYTES
        return (more if starved else len(self._windows) < DEPTH) and not self._at_end

    async def _send_next(self) -> bool:
        """Cut the next window and send its parts off; False at the log's end, or while the number of lanes changes."""
        lanes, size = self.sender.share()
        self._hungry = self._hungry or self._ahead.waiting < lanes * size
        waiting = await self._ahead.fill(lanes * size)
        if not waiting:
            self._at_end = bool(self._windows)
            return False
        lanes = max(1, min(lanes, 2 * waiting // size))  # rather few large calls than many small ones
        if self._windows and self._windows[-1].lanes != lanes and any(w.unfinished for w in self._windows):
            if not self.sender.starved:
                return False
            lanes = self._windows[-1].lanes
        most, canaries = lanes * size, "canary" in self.partner.supports
        window = self._ahead.cut(lanes, most, canaries, self.ledger.is_edge)
        self._windows.append(window)
        self._at_end = not window.full and not self._ahead.waiting
        self._linger.cut(window.full)
        self.sender.send(window)
        if not window.parts:
            self._flush()
        return True

    def _health_known(self, health: Health) -> None:
        """A health check is through: it may open the circuit together with a failed call, or let it try again."""
        now, circuit = self._clock(), self.gate.circuit
        if health.status == "offline" and circuit.confirm(now, health.reason or "offline"):
            self.gate.changed()
        elif health.status == "online" and circuit.state != "closed":
            if circuit.good_news(now, not self._windows and self._log.head().ordinal == self.ordinal):
                self.watch.forget()
            self.gate.changed()

    # ---------------------------------------------------------------------------------------- keeping

    def _keep_ledger(self) -> None:
        circuit, now = self.circuit, self._clock()
        if circuit.state == "closed":
            if self.ledger.current is not None and self.ledger.current.ended is None:
                self._notes += self.ledger.closed(now)
                self._recovered()
            self._notes += self.ledger.settle(self.ordinal, now)
        elif circuit.opened_at is not None:
            began = min(circuit.failing_since or now, circuit.opened_at)
            self._notes += self.ledger.opened(circuit.reason or "the circuit opened", began)

    def _recovered(self) -> None:
        """The partner is back, perhaps as another version: begin gently, and ask again what it supports."""
        self.throttle.restart()
        self.partner.rediscover()
        self.watch.check_soon()

    def _flush(self) -> None:
        """Commit the finished windows, attempts and what else is to be kept, in one step."""
        more = any(window.unfinished for window in self._windows)
        if more and time.monotonic() - self._flushed_at < _COMMIT_S:
            return
        progress = checkpoints.Progress(self.name, self._committed)
        arrival: int | None = None
        while self._windows and self._windows[0].unfinished == 0:
            window = self._windows.popleft()
            self._enter(window, len(window.bodies), progress)
            arrival = window.last_arrival if window.bodies else arrival
            if self.ledger.is_edge(progress.position.ordinal):
                break
        self._commit(progress)
        if arrival is not None:
            self.delay_s = max(0.0, (self._clock() - arrival) / 1000)

    def _enter(self, window: Window, count: int, progress: checkpoints.Progress) -> None:
        """Add the first `count` events of a window to the progress."""
        progress.position = window.after
        dead = [dead for part in window.parts for dead in part.dead if dead[0] < count]
        letters = [self._letter(*window.event(i), window.bodies[i], reason, tried) for i, reason, tried in dead]
        kept = [letter for letter in letters if letter is not None]
        progress.processed += count - len(kept) - window.canaries
        broken = [self._letter(frame, at, frame.records[at][8:], DAMAGED, 1) for frame, at in window.broken]
        progress.dead += [*kept, *[letter for letter in broken if letter is not None]]

    def _letter(self, frame: Frame, at: int, body: bytes, reason: str, tried: int) -> checkpoints.DeadLetter | None:
        """The dead letter of an event, None for a canary."""
        if frame.to & CANARY:
            self.canary_refusals = {frame.ordinal + at: reason}
            return None
        now, place = self._clock(), frame.place(at)
        return checkpoints.DeadLetter(
            f"{self.name}-{place}", self.name, place, reason, tried, now, now, frame.source, frame.received_at, body
        )  # fmt: skip

    def _commit(self, progress: checkpoints.Progress) -> None:
        """What is taken out to be kept counts as kept once it is: where the store fails, the next commit has it too."""
        noted, tried = bool(self._notes), len(self.sender.attempts)
        commands = [*self._notes, *self.watch.commands(), *attempts.keep(self.sender.attempts)]
        moved = progress.position != self._committed
        if moved:
            commands += self.ledger.progressed(progress)
            commands += checkpoints.advance(progress, self._clock())
        commands += self.gate.kept()
        if not commands:
            return
        try:
            checkpoints.commit(self._store, self._epoch, commands)
        except (StoreError, Fenced) as error:
            self._uncertain = self._epoch if isinstance(error, Fenced) or error.lost else 0
            raise
        checkpoints.tell_of_dead(progress, self._clock())
        self._notes = []
        self.watch.kept()
        del self.sender.attempts[:tried]
        self.ledger.stale = self.ledger.stale or noted
        self._flushed_at = time.monotonic()
        if moved:
            self._committed = progress.position
            self.processed += progress.processed
            self.ordinal = progress.position.ordinal
            self._awaited.moved()
            self._notes += self.ledger.settle(self.ordinal, self._clock())

    async def _finish(self) -> None:
        """Let calls under way end, and commit what is done, up to the first event that is not."""
        self.gate.close()
        await self.sender.finish(_GRACE_S)
        self._flushed_at = 0.0
        self._flush()
        if self._windows:
            part = truncated(self._windows[0], self._committed)
            progress = checkpoints.Progress(self.name, self._committed)
            self._enter(part, len(part.bodies), progress)
            self._commit(progress)
