"""The dashboard: what one refresh costs the server, idle and under load, and how soon it is answered."""

from __future__ import annotations

import time

from benchmarks import bench_endtoend, table
from benchmarks.harness import Options, System, running
from benchmarks.load import Connection, Result, apart, load, open_loop
from benchmarks.table import Row
from benchmarks.traffic import Traffic, get

TITLE = "Dashboard: one refresh of the feed"
FEED = "/nexus/feed.json"
TOP_SHARE = 0.9  # of the top rate: at the rate itself nothing would be left to answer with
_PER_S = 50.0  # refreshes a second while their cost is measured: one would vanish in what goes on anyway
_REST_S = 5.0  # after the last event, for what follows it: checkpoints, public keys


def run(options: Options) -> list[Row]:
    top = options.found.get("top_rate")
    if top is None:
        top = options.found["top_rate"] = bench_endtoend.nexus(options.data, 50_000)[0]
    seconds = options.pick(3, 8, 20)
    idle, busy, base, p95, idle_p95 = [], [], [], [], []
    with running(options.data) as system:
        load(open_loop, system.port, Traffic(seed=2), 50, 2)
        line = Connection(system.port)
        line.ask(get(FEED))
        size = len(line.body)
        for _ in range(options.repetitions):
            system.drained(60)
            time.sleep(_REST_S)
            quiet = cost_per_s(system, seconds)
            refreshed, latencies = with_refreshes(system, seconds)
            base.append(quiet * 1000)
            idle.append((refreshed - quiet) / _PER_S * 1000)
            idle_p95.append(latencies.ms(0.95))
            without = under_load(system, top * TOP_SHARE, seconds, False)[0]
            with_them, latencies = under_load(system, top * TOP_SHARE, seconds, True)
            busy.append((with_them - without) / _PER_S * 1000)
            p95.append(latencies.ms(0.95))
    return [
        table.of("server CPU of one refresh, idle", idle, "ms", target=2, aim=0.5),
        table.of(
            f"server CPU of one refresh, at {TOP_SHARE:.0%} of the top rate",
            busy,
            "ms",
            target=2,
            aim=0.5,
            note=f"Nexus's CPU with {_PER_S:g} refreshes/s less that without, so its spread is that of the load",
        ),
        Row("bytes of one refresh", size / 1024, "KiB", target=10, aim=4, note="the body, not compressed"),
        table.of("p95 of its answer, idle", idle_p95, "ms"),
        table.of(f"p95 of its answer, at {TOP_SHARE:.0%} of the top rate", p95, "ms"),
        table.of("Nexus's CPU without traffic or viewers", base, "ms/s", note="jobs, checks and the snapshot itself"),
    ]


def cost_per_s(system: System, seconds: float) -> float:
    """Nexus's processor seconds per second while nobody asks."""
    before, began = system.cpu_s()["nexus"], time.monotonic()
    time.sleep(seconds)
    return (system.cpu_s()["nexus"] - before) / (time.monotonic() - began)


def with_refreshes(system: System, seconds: float) -> tuple[float, Result]:
    """The same with _PER_S refreshes a second, and their latencies."""
    before, began = system.cpu_s()["nexus"], time.monotonic()
    result = load(open_loop, system.port, [get(FEED)], _PER_S, seconds).only(200)
    return (system.cpu_s()["nexus"] - before) / (time.monotonic() - began), result


def under_load(system: System, rate: float, seconds: float, refreshing: bool) -> tuple[float, Result]:
    """Nexus's processor seconds per second at `rate` events/s, with or without refreshes."""
    beside = apart(open_loop, system.port, Traffic(), rate / 100, seconds + 2)
    time.sleep(1.5)
    if refreshing:
        cost, result = with_refreshes(system, seconds)
    else:
        cost, result = cost_per_s(system, seconds), Result()
    beside.result().only(202)
    system.drained(300)
    return cost, result
