"""The runtime: builds all parts of Nexus, starts and stops them in order, and makes the threads of the pipeline and the bridge."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from typing import IO, Any, TypeVar

from pipeline import keys
from pipeline.bridge.health import Health
from pipeline.catalogue import FEATURES
from pipeline.commit_log.dead_letters import DeadLetters
from pipeline.commit_log.frames import Position
from pipeline.commit_log.lease import Lease, name_of
from pipeline.commit_log.lookups import Lookups
from pipeline.commit_log.retention import Retention
from pipeline.concurrency.precedence import Precedence
from pipeline.concurrency.turns import turn_passed_on
from pipeline.definitions import check
from pipeline.embedded import REWRITE_EVERY_S, Rewriting, sync_to_disk
from pipeline.errors import PartnerTimeout, StoreError
from pipeline.events import rfc3339, uuid7
from pipeline.feature_store import FeatureStore
from pipeline.features.completeness import Backlog
from pipeline.ingest import Ingest
from pipeline.jobs import HEALTH_CHECK, PIPELINE, Job, Scheduler
from pipeline.learning.demand_history import city_warming
from pipeline.learning.registry import Models
from pipeline.log import Log
from pipeline.models import fraud
from pipeline.operations.live_settings import LiveSettings
from pipeline.partner import Partner
from pipeline.publishing.feature_health import FeatureHealth
from pipeline.publishing.publisher import Publisher
from pipeline.publishing.sync import synchronise
from pipeline.serving import Serving
from pipeline.settings import Settings, masked
from pipeline.store import Store
from pipeline.streams.aggregates import Aggregates
from pipeline.streams.bridge import Bridge
from pipeline.streams.features import Features
from pipeline.streams.inference import Inference
from pipeline.streams.runner import Runner
from pipeline.streams.storage import EventStore, Storage
from pipeline.streams.stream import Stream
from pipeline.web.actions import Actions
from pipeline.web.connections import close_idle

VERSION = "1.0.0"
YOUNG = 1_000  # new objects between two collections: one takes a ms
SWITCH_INTERVAL_S = 0.0005  # default 5 ms: a request would wait that long behind the pipeline's thread
_FREEZE_S = 5.0
_CAUGHT_UP_S = 0.5  # who asks what another stream has waits so long for what the features have already
_STOP_LOOK_S = 0.25  # who waits for the bridge looks so often whether all is being stopped
_IDLE_S, _IDLE_AT_STOP_S = 300.0, 8.0
T = TypeVar("T")
log = logging.getLogger(__name__)


def wall_clock() -> int:
    """Epoch milliseconds."""
    return time.time_ns() // 1_000_000


class Runtime:
    """One instance of Nexus. Building it starts nothing."""

    def __init__(self, settings: Settings, clock: Callable[[], int] = wall_clock) -> None:
        check(FEATURES)
        self.settings, self.clock = settings, clock
        self.version, self.boot = VERSION, uuid7(clock())
        self.own_names = {"localhost", "127.0.0.1", "::1", settings.nexus_host, socket.gethostname()}
        retention_ms = settings.event_retention_hours * 3_600_000
        self.store = Store(settings.store_url, settings.redis_cluster)
        self.live = LiveSettings(self.store, settings, clock)
        self.log = Log(self.store)
        self._folder_lock: IO[str] | None = None
        self.lease = Lease(self.store, self.boot, None, self._last_here)
        self.backlog = Backlog(lambda: self.bridge.ordinal)
        make: dict[str, Callable[[], Stream]] = {
            "features": lambda: Features(self.store, FEATURES, retention_ms, lambda: self.lease.epoch, self.backlog),
            "storage": lambda: Storage(self.store),
            "aggregates": lambda: Aggregates(self.store, retention_ms),
            "inference": lambda: Inference(self.store, retention_ms),
        }
        self.precedence = Precedence()
        self.runner = Runner(self.store, self.log, self.lease, clock, make, self._spawn, self.precedence)
        partner = Partner(lambda: self.live["PYTHON_EVENT_API_URL"], lambda: self.live["PYTHON_SERVICE_TIMEOUT"], clock)
        self.bridge = Bridge(self.store, self.log, self.lease, self.live, partner, clock, self.precedence)
        self.ingest = Ingest(
            self.log, clock, self.taken, lambda end, s: self.runner.wait_for("features", end, s), self.precedence, self.runner.reasons
        )  # fmt: skip
        partner.makes_room = lambda: self.ingest.closed is not None
        self.events = EventStore(self.store, self.log, self._unwritten_rows)
        self.features = FeatureStore(
            self.store, self.events, self.live, self._live_features, clock, self._own_lag_s, self._python_behind
        )
        self.feature_health = FeatureHealth(self._live_features, clock)
        self.lookups = Lookups(self.store, self.log, settings.retention_days)
        self.dead_letters = DeadLetters(self.store, self.log)
        self.retention = Retention(self.log, self.lease, retention_ms)
        self.actions, self.models = Actions(self), Models(self)
        self.serving = Serving(self, clock)
        self.demand_warming: str | None = "not asked yet"
        self._tidied = 0  # events that were counted when memory was tidied last
        self._stop = threading.Event()
        self.publisher = Publisher(self.store, self.lease, self._live_features, clock, self.feature_health, self._stop)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_ready = threading.Event()
        self._bridge_thread: threading.Thread | None = None
        self.scheduler = Scheduler(self._jobs())
        self.live.changed += [self.scheduler.reschedule, self.bridge.wake]

    def _jobs(self) -> list[Job]:
        live = self.live
        jobs = [
            Job(PIPELINE, lambda: 1.0, lambda: self.runner.run(self._stop)),
            Job("snapshot", lambda: 1.0, self.serving.refresh),
            Job("publish", lambda: 1.0, self.publisher.publish),
            Job("backfill", lambda: 1.0, self._backfill),
            Job("settings", lambda: 2.0, live.refresh),
            Job(HEALTH_CHECK, lambda: float(live["HEALTH_CHECK_INTERVAL"]), self._check_health),
            Job("canary", lambda: float(live["HEALTH_CHECK_INTERVAL"]), self.actions.canary.periodic),
            Job("feature sync", lambda: float(live["FEATURE_SYNC_INTERVAL"]), self.sync_features),
            Job("demand", lambda: 30.0, self._look_at_demand),
            Job("models", lambda: 60.0, self.models.look),
            Job(
                "retention",
                lambda: 10.0,
                lambda: self.retention.run(self.clock(), self.serving.store_watch.memory_used),
            ),
            Job("memory", lambda: _FREEZE_S, self._tidy_memory),
            Job("idle connections", lambda: 2.0, self._close_idle),
        ]
        if self.settings.embedded:
            rewriting = Rewriting(self.settings, self.store.call)
            jobs.append(Job("rewrite file", lambda: REWRITE_EVERY_S, lambda: rewriting.look(time.process_time())))
        if self.settings.embedded and self.settings.store_fsync == "everysec":
            jobs.append(Job("sync to disk", lambda: 1.0, lambda: sync_to_disk(self.settings)))
        return jobs

    def start(self) -> None:
        """Start the bridge's loop and the scheduler, which runs all else; a store that is away does not hinder."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.freeze()
        gc.set_threshold(YOUNG, 1_000_000, 1_000_000)
        self._lock_folder()
        self.live.refresh_quietly()
        for line in self.live.overridden():
            log.warning("setting overridden: %s", line)
        self._bridge_thread = self._spawn("bridge", self._run_bridge)
        self._loop_ready.wait(5.0)
        self.scheduler.start()
        log.info("nexus started", extra={"version": self.version, "boot": self.boot})

    def stop(self) -> None:
        """Mirror of start(): the streams' last checkpoint is made, the lease given back."""
        self._stop.set()
        self.runner.wake()
        self.bridge.wake()
        self.scheduler.stop()
        if self._bridge_thread is not None:
            self._bridge_thread.join(15.0)
        try:
            self.lease.release()
        except StoreError as error:
            log.warning("the lease was not given back: %s", error.message)
        self.store.close()
        if self._folder_lock is not None:
            self._folder_lock.close()
            self._folder_lock = None

    def stream(self, name: str) -> Stream | None:
        return self.runner.stream(name)

    def stream_states(self) -> dict[str, tuple[str, str | None]]:
        return {**self.runner.states(), "bridge": (self.bridge.state, self.bridge.detail)}

    def live_position(self, name: str) -> Position | None:
        """Where a stream stands that is ahead of its checkpoint; None for the others."""
        return self.runner.position(name) if name != "bridge" else None

    def live_processed(self, name: str) -> int:
        return self.bridge.processed if name == "bridge" else self.runner.processed(name)

    def labels_needed(self) -> int:
        stream = self.stream("inference")
        return (
            max(0, fraud.LABELS_NEEDED - stream.model.frauds) if isinstance(stream, Inference) else fraud.LABELS_NEEDED
        )

    def partner_status(self) -> dict[str, Any]:
        """The Python service as it stands: online, degraded, offline or disabled, and why."""
        health = self.bridge.health
        status: str
        reason: str | None
        if not self.live["ENABLE_PYTHON_BRIDGE"]:
            status, reason = "disabled", "the bridge is switched off (ENABLE_PYTHON_BRIDGE)"
        elif health is None:
            status, reason = "offline", "not asked yet"
        else:
            status, reason = health.status, health.reason
        return {
            "status": status,
            "reason": reason,
            "url": masked(self.live["PYTHON_EVENT_API_URL"]),
            "response_time_ms": None
            if health is None or health.response_time_ms is None
            else round(health.response_time_ms, 2),
            "checked_at": None if health is None else health.checked_at,
            "since": self.bridge.status_since,
        }

    def bridge_health(self) -> dict[str, Any]:
        """The answer of ?action=health."""
        health, circuit = self.bridge.health, self.bridge.circuit
        status, audit = self.partner_status(), self.serving.audit
        account = audit.accounts["bridge"] if audit is not None else None
        return {
            "status": status["status"],
            "reason": status["reason"],
            "python_service": {
                "url": status["url"],
                "status_code": None if health is None else health.status_code,
                "response_time_ms": status["response_time_ms"],
                "checked_at": None if health is None else rfc3339(health.checked_at),
                "body": None if health is None else health.body,
            },
            "circuit": {
                "state": circuit.state,
                "opened_at": None if circuit.opened_at is None else rfc3339(circuit.opened_at),
                "failures": circuit.failures,
                "paused": circuit.paused,
                "paused_at": None if circuit.paused_at is None else rfc3339(circuit.paused_at),
                "forced": circuit.forced,
                "reason": circuit.reason,
            },
            "backlog": {
                "pending": account.pending if account else 0,
                "dead": account.dead if account else 0,
                "oldest_age_s": self.serving.backlog_age_s(),
                "eta_s": self.serving.backlog_eta_s(),
            },
            "supports": sorted(self.bridge.partner.supports),
            "lacks": self.bridge.partner.lacks,
            "history": self.bridge.watch.changes,
        }

    def ingest_health(self) -> tuple[int, dict[str, Any]]:
        """The answer of ?check=health, from the counters themselves."""
        return self.serving.ingest_health()

    def not_ready(self) -> str | None:
        """Why Nexus cannot serve, None when it can."""
        try:
            self.store.call("EXISTS", keys.HEAD)  # of a Cluster, the node that holds it
        except StoreError as error:
            return error.message
        if self.runner.state not in ("running", "standby"):
            return f"the pipeline is {self.runner.state}" + (f": {self.runner.detail}" if self.runner.detail else "")
        return None

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep, but not beyond the stop."""
        with turn_passed_on():
            self._stop.wait(seconds)

    def in_bridge(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the bridge's loop and wait for it. Raises PartnerTimeout when the loop does not get to
        it."""
        if self._loop is None:
            work.close()
            raise PartnerTimeout("the bridge does not run")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        deadline = time.monotonic() + float(self.live["PYTHON_SERVICE_TIMEOUT"]) / 1000 + 5.0
        with turn_passed_on():
            while not future.done() and not self.stopping and (left := deadline - time.monotonic()) > 0:
                wait((future,), min(left, _STOP_LOOK_S))
        if future.done() and not future.cancelled():
            try:
                return future.result()
            finally:
                del future  # its error's traceback refers to this frame: a cycle, which may never be freed
        future.cancel()
        raise PartnerTimeout("the bridge is being stopped, or did not get to it in time")

    def aside(self, name: str, body: Callable[[], None]) -> None:
        """Run something that nobody waits for in a thread of its own."""
        self._spawn(name, body)

    def taken(self) -> None:
        """The log has taken events: wakes whoever reads it."""
        self.runner.wake()
        self.bridge.arrived()

    def catch_up(self, name: str) -> None:
        """Wait a moment until a stream has what the features have."""
        self.runner.catch_up(name, _CAUGHT_UP_S)

    def _live_features(self) -> Features | None:
        stream = self.stream("features")
        return stream if isinstance(stream, Features) else None

    def _own_lag_s(self) -> float:
        """How old Nexus's own features are: the age of the oldest event that they do not have yet."""
        return self.serving.lag_s("features")

    def _python_behind(self, user_id: str) -> int | None:
        """Events of a user that the Python service has not been given yet, None where another instance runs the bridge."""
        if not self.lease.epoch or not self.live["ENABLE_PYTHON_BRIDGE"]:
            return None
        return self.backlog.behind(user_id)

    def _backfill(self) -> None:
        stream = self._live_features()
        if stream is not None and stream.backfill is not None:
            stream.backfill.step(self.clock())

    def _unwritten_rows(self) -> Any:
        self.catch_up("storage")
        stream = self.stream("storage")
        return stream.unwritten() if isinstance(stream, Storage) else Storage(self.store).unwritten()

    def _check_health(self) -> Health | None:
        if not self.live["ENABLE_PYTHON_BRIDGE"]:
            return None
        return self.in_bridge(self.bridge.check_health())

    def sync_features(self) -> dict[str, Any]:
        """One run of the feature sync, now. Raises StoreError."""
        partner = self.bridge.partner
        can = self.live["ENABLE_PYTHON_BRIDGE"] and "features" in partner.supports
        refresh = (lambda user_id: self.in_bridge(partner.features(user_id))) if can else None
        drift_s = float(self.live["FEATURE_SYNC_INTERVAL"])
        return synchronise(self._live_features(), self.features, refresh, self.clock(), drift_s)

    def _tidy_memory(self) -> None:
        before, self._tidied = self._tidied, self.runner.ordinal("features")
        tidy_memory(busy=self._tidied != before)

    def _look_at_demand(self) -> None:
        self.demand_warming = city_warming(self, self.clock() // 1000)

    def _close_idle(self) -> int:
        """Every answer is due within the partner's timeout and what is added to it here."""
        after_s = _IDLE_S + float(self.live["PYTHON_SERVICE_TIMEOUT"]) / 1000
        return close_idle(self.settings.nexus_port, after_s, _IDLE_AT_STOP_S)

    def _run_bridge(self) -> None:
        async def body() -> None:
            self._loop = asyncio.get_running_loop()
            self._loop_ready.set()
            await self.bridge.run(self._stop.is_set)

        asyncio.run(body())

    def _lock_folder(self) -> None:
        """The lock of the data folder for Nexus: who holds it knows that no other instance on this folder is alive."""
        try:
            self.settings.data_dir.mkdir(parents=True, exist_ok=True)
            handle = (self.settings.data_dir / "nexus.lock").open("w")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lease.holder = name_of(handle)
            self._folder_lock = handle
        except OSError as error:
            log.warning("the data folder's lock is not to be had, so the lease is waited for: %s", error)

    def _last_here(self) -> bool:
        """The lease was last held on this data folder, and this process has its lock: that holder is dead. A lock says
        nothing of instances on other folders, which an external store may have too. Raises StoreError."""
        if self._folder_lock is None:
            return False
        held_by: bytes | None = self.store.call("HGET", keys.OWNER, "holder")
        return held_by == self.lease.holder.encode()

    def _spawn(self, name: str, body: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=body, name=name, daemon=True)
        thread.start()
        return thread


def tidy_memory(busy: bool) -> None:
    """Freeze what has outlived a collection of the young, so that nothing older is ever walked: over all users' state that
    would stop every thread for long. Unless `busy`, what died since is collected first, which takes tens of ms; a cycle that
    dies once it is frozen stays, and there are few. What was made since that collection is collected in any case."""
    if gc.get_count()[1]:  # collections of the young since the last time
        gc.collect(0 if busy else 1)
        gc.freeze()
