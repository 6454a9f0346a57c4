"""Retained events: time per event, memory, start and recovery once the log is long."""

from __future__ import annotations

from benchmarks import table
from benchmarks.bench_growth import Stage, measure, post, rows
from benchmarks.harness import Options, running
from benchmarks.table import Row
from benchmarks.traffic import Traffic

TITLE = "Growth: more retained events"
RETAINED = 10_000_000  # events
USERS, BATCH, _PART = 10_000, 500, 250_000


def run(options: Options) -> list[Row]:
    if not options.full:
        why = "only in the full run: make bench ARGS='--full --only retained'"
        return [table.missing(f"time per event, {RETAINED:,} events retained", "µs", why)]
    with running(options.data) as system:
        post(system, Traffic(users=USERS, first=0, requests=USERS // 100), USERS)
        stages = [measure(system, Stage("a short log", USERS), options)]
        while (held := system.accounts()["totals"]["accepted"]) < RETAINED:
            post(system, Traffic(batch=BATCH, users=USERS, requests=1_000, seed=held), _PART)
        stages.append(measure(system, Stage(f"{RETAINED:,} events retained", USERS), options))
    return rows(stages)
