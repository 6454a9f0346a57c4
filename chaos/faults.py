"""The faults of a chaos run: kill -9, and SIGSTOP with SIGCONT, in an order decided by the seed."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass

from chaos.system import TARGETS, System, send

LEASE_S = 10.0
BACK_S = 60.0  # within this long a part that was killed must run again
_PAUSED = ("worker", "service", "store")
_OFTEN = {"worker": 4, "service": 3, "store": 3, "nexus": 2}  # weights of the kills beyond one of each kind


@dataclass(frozen=True)
class Fault:
    """`wait_s` before it, then SIGKILL, or SIGSTOP for `hold_s`."""

    target: str
    wait_s: float
    hold_s: float = 0.0

    @property
    def kills(self) -> bool:
        return not self.hold_s

    def __str__(self) -> str:
        return f"kill {self.target}" if self.kills else f"stop {self.target} for {self.hold_s:.1f} s"


def plan(seed: int, kills: int, seconds: float, past_lease: bool) -> list[Fault]:
    """`kills` kills and an eighth as many stops, at least one of each kind, in about `seconds` altogether.

    With `past_lease` the worker is once stopped for longer than its lease lasts.
    """
    rng = random.Random(f"{seed}/faults")
    names = [*TARGETS, *rng.choices(list(_OFTEN), list(_OFTEN.values()), k=max(0, kills - len(TARGETS)))]
    stops = [*_PAUSED, *rng.choices(_PAUSED, k=max(0, kills // 8 - len(_PAUSED)))]
    longest = 7.0 if past_lease else 2.0
    holds = [rng.uniform(0.3, longest) for _ in stops]
    if past_lease:
        holds[0] = LEASE_S + rng.uniform(2.0, 4.0)
    todo = [(name, 0.0) for name in names] + list(zip(stops, holds, strict=True))
    rng.shuffle(todo)
    mean = max(0.1, (seconds - sum(holds)) / len(todo))
    return [Fault(name, rng.uniform(0.0, 2 * mean), hold) for name, hold in todo]


class Saboteur(threading.Thread):
    """Works off a plan. A part that does not run is waited for: that each comes back is part of what is shown."""

    def __init__(self, system: System, faults: list[Fault]) -> None:
        super().__init__(name="saboteur", daemon=True)
        self._system, self._faults = system, faults
        self.figures: Counter[str] = Counter()
        self.not_back: str | None = None
        self._done = 0
        self._began, self._wait = time.monotonic(), 1.0

    def progress(self) -> float:
        """Which part of the faults has been done, 0 to 1, moving on during the wait for the next one."""
        if not self.is_alive():
            return 1.0
        waited = min(1.0, (time.monotonic() - self._began) / self._wait)
        return min(1.0, (self._done + waited) / len(self._faults))

    def run(self) -> None:
        try:
            for fault in self._faults:
                self._began, self._wait = time.monotonic(), max(fault.wait_s, 0.01)
                time.sleep(fault.wait_s)
                self._make(fault)
                self._done += 1
        except (TimeoutError, RuntimeError) as error:
            self.not_back = str(error)

    def _make(self, fault: Fault) -> None:
        while True:
            pid = self._system.wait_pid(fault.target, BACK_S)
            if send(pid, signal.SIGKILL if fault.kills else signal.SIGSTOP):
                break
        if fault.kills:
            self.figures["kills"] += 1
            self.figures[f"kills of {fault.target}"] += 1
            return
        time.sleep(fault.hold_s)
        send(pid, signal.SIGCONT)
        self.figures["stops"] += 1
        self.figures[f"stops of {fault.target}"] += 1
        self.figures["stops past the lease"] += fault.target == "worker" and fault.hold_s > LEASE_S
