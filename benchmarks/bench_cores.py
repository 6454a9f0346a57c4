"""The machine: what a second busy core costs the first. Virtual cores are often the two halves of one."""

from __future__ import annotations

import os
import sys
import time

from benchmarks import table
from benchmarks.harness import Options
from benchmarks.peers.launch import process
from benchmarks.table import Row

TITLE = "The machine: two cores at once"
SPIN = "while True: sum(range(1000))"
_ROUNDS = 6


def run(options: Options) -> list[Row]:
    """Processor time of a fixed computation beside a busy core, as a ratio to that beside an idle one."""
    cores, before = sorted(os.sched_getaffinity(0)), os.sched_getaffinity(0)
    if len(cores) < 2:
        return [table.missing("a computation beside a busy core", "times", "this machine has one core")]
    loops = options.pick(20_000, 50_000, 100_000)
    alone: list[float] = []
    beside: list[float] = []
    try:
        os.sched_setaffinity(0, {cores[0]})
        for _ in range(_ROUNDS):
            alone.append(computed(loops))
            with process([sys.executable, "-c", SPIN]) as other:
                os.sched_setaffinity(other.pid, {cores[1]})
                beside.append(computed(loops))
    finally:
        os.sched_setaffinity(0, before)
    note = "1: the cores have nothing in common; 2: they are one"
    return [table.ratio("a computation beside a busy core", beside, alone, "beside an idle one", note=note)]


def computed(loops: int) -> float:
    """Seconds of processor time that the computation took."""
    began = time.process_time()
    for _ in range(loops):
        sum(range(1000))
    return time.process_time() - began
