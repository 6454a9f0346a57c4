"""Growth: time per event, memory, start and recovery as users become many."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

from benchmarks import table
from benchmarks.bench_endtoend import CONNECTIONS
from benchmarks.harness import Options, System, running, wait_until
from benchmarks.load import closed_loop, load
from benchmarks.table import Row
from benchmarks.traffic import Traffic

TITLE = "Growth: more users"
_CHUNK = 100_000
_START_S = 900.0


@dataclass
class Stage:
    """What was measured at one size."""

    label: str
    users: int
    events: int = 0
    us_per_event: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    recovery: dict[str, float] = field(default_factory=dict)


def run(options: Options) -> list[Row]:
    sizes: tuple[int, ...] = options.pick((10_000, 30_000), (10_000, 100_000, 1_000_000))
    stages: list[Stage] = []
    with running(options.data) as system:
        known = 0
        for users in sizes:
            while known < users:
                part = min(_CHUNK, users - known)
                post(system, Traffic(users=users, first=known, requests=part // 100), part)
                known += part
            stages.append(measure(system, Stage(f"{users:,} users", users), options))
    return rows(stages)


def rows(stages: list[Stage]) -> list[Row]:
    """What was measured at each size, and the time per event over that at the first."""
    made: list[Row] = []
    first = stages[0]
    for stage in stages:
        held = f"{stage.events:,} events retained"
        made.append(table.of(f"time per event, {stage.label}", stage.us_per_event, "µs", note=held))
        made.append(table.of(f"processor time per event, {stage.label}", stage.cpu_us, "µs", note="all three parts"))
        if stage is not first:
            asked = (1.5, 1.2) if stage.users == 1_000_000 else (None, None)
            name, below = f"time per event, {stage.label}", first.us_per_event
            row = table.ratio(name, stage.us_per_event, below, first.label, target=asked[0], aim=asked[1])
            made.append(row)
        for part, size in sorted(stage.memory.items()):
            made.append(Row(f"memory of {part}, {stage.label}", size, "MiB"))
        for what, seconds in stage.recovery.items():
            made.append(Row(f"{what}, {held}", seconds, "s"))
    return made


def post(system: System, traffic: Traffic, events: int) -> float:
    """Post so many events and wait until all streams have them; seconds."""
    posted = load(closed_loop, system.port, traffic, CONNECTIONS, events // traffic.batch).only(202)
    system.drained(900)
    return time.monotonic() - posted.began


def measure(system: System, stage: Stage, options: Options) -> Stage:
    events = options.pick(20_000, 50_000, 100_000)
    for seed in range(options.repetitions):
        traffic = Traffic(users=stage.users, seed=100 + seed, requests=events // 100)
        before = sum(system.cpu_s().values())
        stage.us_per_event.append(post(system, traffic, events) / events * 1e6)
        stage.cpu_us.append((sum(system.cpu_s().values()) - before) / events * 1e6)
    stage.memory = system.memory_mb()
    stage.events = system.accounts()["totals"]["accepted"]
    stage.recovery["Nexus back after its kill -9"] = kill_nexus(system)
    system.stop()
    stage.recovery["start after a clean stop"] = system.start(_START_S)
    system.crash()
    stage.recovery["start after kill -9 of everything"] = system.start(_START_S)
    found = system.accounts()
    if found["totals"]["accepted"] != stage.events or found["unexplained"]:
        raise RuntimeError(f"events were lost in a crash: {stage.events} before, now {found}")
    return stage


def kill_nexus(system: System) -> float:
    """Seconds from kill -9 of Nexus until it is ready again."""
    began = time.monotonic()
    for pid in system.processes()["nexus"]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not system.ready(), 10, "the end of Nexus", 0.005)
    wait_until(system.ready, _START_S, "Nexus's return")
    return time.monotonic() - began
