"""The lease: which instance may commit. Its epoch goes into every commit, and a newer epoch fences off the older
ones."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pipeline import keys
from pipeline.store import Store

TTL_MS = 10_000
log = logging.getLogger(__name__)


def name_of(lock: IO[str]) -> str:
    """The holder's name where it has locked this open file: two with one name cannot both live. A host name and a path would
    not do: copied machines and containers have them in common. After a boot it is another one, and the lease is waited for."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file = os.fstat(lock.fileno())
    return f"{boot}:{file.st_dev}:{file.st_ino}"


class Lease:
    """One instance's hold on the partition. `seizes`: the holder before is known to be dead, so that its lease need not
    be waited for. Without a `clock` (epoch ms) time is the store's: the clocks of two hosts may differ by more than a
    lease lasts."""

    def __init__(self, store: Store, holder: str, clock: Callable[[], int] | None, seizes: Callable[[], bool]) -> None:
        self.holder = holder
        self._store, self._clock, self._seizes = store, clock, seizes
        self._lock = threading.Lock()
        self.epoch = 0  # 0: not held
        self.raised: Callable[[], None] = lambda: None  # called where it was: commits go on under the new epoch

    def take(self) -> bool:
        """Take the lease if it is free, ours by the folder's lock, or has run out."""
        return self._act("seize" if self._seizes() else "take")

    def raise_epoch(self) -> bool:
        """Fence off our own earlier commits: those of a thread that hangs, or whose answer never came and which may yet
        arrive. False once another instance has taken over, or the store was emptied."""
        held = self._act("raise")
        if held:
            self.raised()
        return held

    def renew(self) -> bool:
        """False once another instance has taken over, or the store was emptied."""
        with self._lock:
            if self._run("renew") == 0:
                self._hold(0)
            return self.epoch != 0

    def release(self) -> None:
        with self._lock:
            if self.epoch:
                self._run("release")
                self.epoch = 0
                log.info("lease was given back", extra={"holder": self.holder})

    def _act(self, action: str) -> bool:
        with self._lock:
            self._hold(self._run(action))
            return self.epoch != 0

    def _hold(self, epoch: int) -> None:
        """Held under this epoch from now on, 0: no longer; a line in the log for each change."""
        if epoch and not self.epoch:
            log.info("lease was taken", extra={"holder": self.holder, "epoch": epoch})
        elif self.epoch and not epoch:
            log.warning("lease was lost", extra={"holder": self.holder, "epoch": self.epoch})
        self.epoch = epoch

    def _run(self, action: str) -> int:
        now = self._clock() if self._clock is not None else 0
        return int(self._store.run("lease", (keys.OWNER,), (action, self.holder, now, TTL_MS, self.epoch)))
