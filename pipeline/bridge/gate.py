"""The gate: every call to the partner passes it. The circuit as it stands, kept in the store for all instances, and
what people decide about it at any of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from pipeline import keys
from pipeline.bridge.circuit import Circuit
from pipeline.operations.live_settings import LiveSettings
from pipeline.store import Command, Store

_LOOK_S = 0.25
log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class Gate:
    """Of the bridge's event loop. `told` may be read from any thread; `changed` is called whenever the circuit has become
    another."""

    def __init__(self, store: Store, live: LiveSettings, clock: Callable[[], int], changed: Callable[[], None]) -> None:
        self._store, self._live, self._clock, self._on_change = store, live, clock, changed
        self.circuit = Circuit()
        self.dirty = False  # the store has yet to learn of a change
        self.closing = False
        self._open_since: int | None = None  # as it was told
        self._news = asyncio.Event()  # replaced each time it is set: lanes that wait look again

    @property
    def told(self) -> Circuit:
        """The circuit as it is to be told of: what failed at an old address is never said of the one in force."""
        circuit, url = self.circuit, self._live["PYTHON_EVENT_API_URL"]
        if circuit.url != url:
            circuit = msgspec.structs.replace(circuit)
            circuit.another(url)
        return circuit

    def follow(self) -> None:
        """Go over to the address in force, where it is a new one."""
        if self.circuit.url != (url := self._live["PYTHON_EVENT_API_URL"]):
            self.circuit.another(url)
            self.changed()

    def decide(self, action: str, by: str) -> None:
        """Keep in the store what a person decided: pause, resume, reset_circuit or open_circuit. From any thread."""
        key, paused, state = keys.CIRCUIT, "paused" if self.circuit.paused else "running", self.told.state
        orders: dict[str, tuple[list[Command], tuple[str, str, str]]] = {
            "pause": (
                [("HSET", key, "paused", 1), ("HSETNX", key, "paused_at", self._clock())],
                ("bridge", paused, "paused"),
            ),
            "resume": ([("HSET", key, "paused", 0), ("HDEL", key, "paused_at")], ("bridge", paused, "running")),
            "reset_circuit": (
                [("HSET", key, "forced", 0), ("HINCRBY", key, "resets", 1)],
                ("circuit", state, "closed"),
            ),
            "open_circuit": ([("HSET", key, "forced", 1)], ("circuit", state, "open")),
        }
        commands, change = orders[action]
        self._live.keep(commands, [change], None, by)

    def look(self, load: bool) -> None:
        """Take over what was decided at whichever instance; to `load`, the whole circuit."""
        fields = ("state", "paused", "paused_at", "forced", "resets")
        raw, paused, paused_at, forced, resets = self._store.call("HMGET", keys.CIRCUIT, *fields)
        if load:
            self.circuit = msgspec.json.decode(raw, type=Circuit) if raw else Circuit()
            self.circuit.probe_until = 0  # whoever made that probe will not report any more
            self._open_since = self._since()  # told by whoever opened it
        circuit, before = self.circuit, (self.circuit.paused, self.circuit.forced, self.circuit.resets)
        circuit.paused, circuit.paused_at = paused == b"1", int(paused_at) if paused_at else None
        if int(resets or 0) != circuit.resets or (circuit.forced and forced != b"1"):
            circuit.resets = int(resets or 0)
            circuit.reset()
        if forced == b"1" and not circuit.forced:
            circuit.force_open(self._clock())
        if before != (circuit.paused, circuit.forced, circuit.resets):
            self.changed()

    def kept(self) -> list[Command]:
        """The command that keeps a change; from then on it counts as kept."""
        if not self.dirty:
            return []
        self.dirty = False
        return [("HSET", keys.CIRCUIT, "state", _encode(self.circuit))]

    def changed(self) -> None:
        """The circuit is another: it is to be kept, and lanes that wait look again."""
        self.dirty = True
        self._news.set()
        self._news = asyncio.Event()
        self._tell()
        self._on_change()

    def _tell(self) -> None:
        """A line in the log when the circuit opens and when it closes; what is probed between is none of it."""
        since = self._since()
        if since is not None and self._open_since is None:
            log.warning("circuit is open", extra={"reason": self.circuit.reason})
        elif since is None and self._open_since is not None:
            log.info("circuit is closed", extra={"after_s": (self._clock() - self._open_since) / 1000})
        self._open_since = since

    def _since(self) -> int | None:
        return None if self.circuit.state == "closed" else self.circuit.opened_at or self._clock()

    def open(self) -> None:
        """For a new epoch."""
        self.closing = False

    def close(self) -> None:
        """Nothing more is to be sent: lanes that wait give up."""
        self.closing = True
        self._news.set()
        self._news = asyncio.Event()

    async def admission(self) -> None:
        """Wait until a call may be made. Raises CancelledError once the gate is closed."""
        while True:
            if self.closing:
                raise asyncio.CancelledError
            now = self._clock()
            if self._live["ENABLE_PYTHON_BRIDGE"]:
                before = self.circuit.state
                admitted = self.circuit.admits(now, 3 * int(self._live["PYTHON_SERVICE_TIMEOUT"]) + 1000)
                self.dirty = self.dirty or self.circuit.state != before
                if admitted:
                    return
            left_s = (self.circuit.retry_at - now) / 1000
            wait_s = min(_LOOK_S, max(0.01, left_s)) if left_s > 0 else _LOOK_S
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except TimeoutError:
                continue

    @property
    def shut(self) -> bool:
        """By hand: not even a probe may pass."""
        return not self._live["ENABLE_PYTHON_BRIDGE"] or self.circuit.paused or self.circuit.forced

    @property
    def halted(self) -> str | None:
        """Why nothing is sent just now, None while it is."""
        if not self._live["ENABLE_PYTHON_BRIDGE"]:
            return "the bridge is switched off"
        if self.circuit.paused:
            return "paused by hand"
        circuit = self.told
        return (circuit.reason or "the circuit is open") if circuit.state == "open" else None

    def stands(self) -> tuple[str, str | None]:
        """The bridge's state as far as the gate decides it, and why."""
        why = self.halted
        if why is None:
            return ("behind", self.circuit.reason) if self.circuit.failures > 0 else ("running", None)
        return ("behind" if self.circuit.state == "open" and not self.circuit.paused else "paused"), why
