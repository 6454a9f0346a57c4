"""Retention: lets go of the oldest segments of the log, by arrival and by memory, never past the slowest stream."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.commit_log.lease import Lease
from pipeline.events import rfc3339
from pipeline.log import Log
from pipeline.operations.store_watch import REFUSE_AT

TRIM_AT = 0.75  # of the store's memory limit: below where ingest begins to refuse
MAX_SEGMENTS = 20  # a run, so that it stays short
MAX_CLOCK_LEAP_MS = 3_600_000
log = logging.getLogger(__name__)


class Retention:
    """One run trims what is due. A segment goes as a whole: when its last event is older than the retention, or,
    oldest first, while the store is short of memory. `latest`: the last run's report. `let_go`: events since the start."""

    def __init__(self, events: Log, lease: Lease, retention_ms: int) -> None:
        self._log, self._lease, self._retention_ms = events, lease, retention_ms
        self._last_run: int | None = None
        self.latest: dict[str, Any] = {"trimmed": 0, "held_back": []}
        self.let_go = {"past_retention": 0, "within_retention": 0}
        self._within_at: int | None = None
        self._for_age = True

    def told(self) -> dict[str, Any]:
        """The latest run, what is held back is due for (age or memory), and what went since the start."""
        at = None if self._within_at is None else rfc3339(self._within_at)
        due = None if not self.latest["held_back"] else "age" if self._for_age else "memory"
        return {**self.latest, "due_for": due, **self.let_go, "within_retention_at": at}

    def run(self, now: int, memory_used: float) -> dict[str, Any]:
        """`memory_used` is a share of the limit, 0 without one. Answers how many segments went, and the streams that hold
        back what else is due."""
        report = self.latest = {"trimmed": 0, "held_back": []}
        leapt = self._last_run is not None and now - self._last_run > MAX_CLOCK_LEAP_MS
        self._last_run = now
        if not self._lease.epoch or leapt:  # after a leap of the clock one run is sat out: it may leap back
            return report
        self._log.finish_trim(self._lease.epoch)
        sealed = self._log.sealed()
        past = self._log.head().last_arrival < now - self._retention_ms
        if not sealed and (memory_used > REFUSE_AT or past):
            # Only an append seals the open segment, and none comes: ingest refuses, or has long had nothing to take.
            report["held_back"], self._for_age = self._log.seal(self._lease.epoch), past
            sealed = self._log.sealed()
        for segment, (first_arrival, last_arrival, size, end) in sorted(sealed.items()):
            old = last_arrival < now - self._retention_ms
            if not (old or memory_used > TRIM_AT) or report["trimmed"] == MAX_SEGMENTS:
                break
            first = self._log.first_ordinal(segment)
            if not self._log.trim(segment, self._lease.epoch):
                report["held_back"], self._for_age = self._log.readers(segment), old
                break
            report["trimmed"] += 1
            self.let_go["past_retention" if old else "within_retention"] += 0 if first is None else end - first
            facts = {
                "segment": segment,
                "events": None if first is None else end - first,
                "bytes": size,
                "first_arrival": rfc3339(first_arrival),
                "last_arrival": rfc3339(last_arrival),
            }
            if old:
                log.info("events past their retention were let go of", extra=facts)
                continue
            self._within_at = now
            used = f"{memory_used:.0%} of the memory limit is used"
            log.warning("events within their retention were let go of", extra={"reason": used, **facts})
            break  # one at a time: the next run sees what it brought
        return report
