"""Nexus with a stopwatch around its stages: what `profile_stages` starts in the place of app.py.

    python -m benchmarks.stages          the supervisor, with this Nexus
    python -m benchmarks.stages serve    this Nexus alone

A stopwatch counts processor time of its own thread, without that of the stages called from within, so that stages add
up; GET /bench/stages tells all counts.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Flask

from benchmarks import altered
from pipeline import ingest, log, serving
from pipeline.commit_log import checkpoints
from pipeline.publishing import publisher
from pipeline.streams import aggregates, features, group, inference, storage, stream, worker
from pipeline.web import hot_route

PATH = "/bench/stages"
# owner, attribute, stage. Nested ones count for the inner stage alone.
STAGES: tuple[tuple[Any, str, str], ...] = (
    (hot_route.HotRoute, "__call__", "ingest: HTTP and answer"),
    (ingest.Ingest, "post", "ingest: group commit and the rest"),
    (ingest, "read_plain", "ingest: decode"),
    (ingest, "judge_plain", "ingest: judge"),
    (ingest, "read_body", "ingest: decode, not plain"),
    (ingest, "judge", "ingest: judge, not plain"),
    (log.Log, "accept", "ingest: pack and store call"),
    (group.Group, "work", "pipeline: loop"),
    (worker.Worker, "checkpoint_step", "checkpoint: steps"),
    (checkpoints, "pack", "checkpoint: pack and store call"),
    (checkpoints, "begin", "checkpoint: pack and store call"),
    (log.Log, "read", "log: read"),
    (stream.Batch, "__init__", "pipeline: decode"),
    (features.Features, "process", "features"),
    (features.Features, "cut", "features: checkpoint"),
    (storage.Storage, "process", "storage"),
    (storage.Storage, "cut", "storage: checkpoint"),
    (aggregates.Aggregates, "process", "aggregates"),
    (aggregates.Aggregates, "cut", "aggregates: checkpoint"),
    (inference.Inference, "process", "inference"),
    (inference.Inference, "cut", "inference: checkpoint"),
    (publisher.Publisher, "publish", "public keys"),
    (serving.Serving, "refresh", "snapshot"),
)


class Stopwatch:
    """Processor time by stage, in ns, of all threads."""

    def __init__(self) -> None:
        self.totals: defaultdict[str, int] = defaultdict(int)
        self._local = threading.local()
        self._lock = threading.Lock()

    def around(self, owner: Any, attribute: str, stage: str) -> None:
        """Measure a function where its callers look it up. Raises AttributeError when it is not there."""
        work: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            local, now = self._local, time.thread_time_ns()
            outer = getattr(local, "stage", None)
            if outer is not None:
                self._add(outer, now - local.since)
            local.stage, local.since = stage, now
            try:
                return work(*args, **kwargs)
            finally:
                now = time.thread_time_ns()
                self._add(stage, now - local.since)
                local.stage, local.since = outer, now

        setattr(owner, attribute, timed)

    def _add(self, stage: str, spent: int) -> None:
        with self._lock:
            self.totals[stage] += spent


def threads() -> dict[str, float]:
    """Processor seconds of this process by thread name; threads that Python does not know are the web server's."""
    names = {str(thread.native_id): thread.name for thread in threading.enumerate() if "Dummy" not in thread.name}
    found: defaultdict[str, float] = defaultdict(float)
    for tid in os.listdir("/proc/self/task"):
        words = Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(")")[2].split()
        name = names.get(tid, "web server").split("_")[0]
        found[name] += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return found


def nexus() -> Flask:
    """app.worker() with stopwatches."""
    watch = Stopwatch()
    for owner, attribute, stage in STAGES:
        watch.around(owner, attribute, stage)
    flask = altered.worker()
    flask.add_url_rule(PATH, "stages", lambda: {"stages": dict(watch.totals), "threads": threads()})
    return flask


if __name__ == "__main__":
    sys.exit(altered.main("benchmarks.stages", sys.argv[1:]))
