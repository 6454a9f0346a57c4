"""Isolation: ingest and local freshness while the partner is dead, hangs, drips or is slow, as a ratio to healthy."""

from __future__ import annotations

import contextlib
import sys

from benchmarks import bench_freshness, table
from benchmarks.bench_freshness import Fresh
from benchmarks.harness import Options, System, call, free_port, running
from benchmarks.load import load, open_loop
from benchmarks.partners import KINDS
from benchmarks.peers.launch import process
from benchmarks.table import Row
from benchmarks.traffic import Traffic

TITLE = "Isolation: a partner in trouble beside a healthy one"
RATE = 2_000  # events/s; below what any part has trouble with, so that ratios show isolation alone
BATCH = 20  # a hundred requests a second: of twenty the slowest hundredth would be the two or three slowest of all
STATES = ("dead", *KINDS)


def run(options: Options) -> list[Row]:
    seconds = options.pick(3, 16, 30)
    found: dict[str, list[Fresh]] = {state: [] for state in ("healthy", *STATES)}
    with contextlib.ExitStack() as stack:
        system = stack.enter_context(running(options.data))
        urls = {"healthy": f"http://127.0.0.1:{system.api_port}", "dead": f"http://127.0.0.1:{free_port()}"}
        for kind in KINDS:
            port = free_port()
            stack.enter_context(process([sys.executable, "-m", "benchmarks.partners", kind, str(port)]))
            urls[kind] = f"http://127.0.0.1:{port}"
        load(open_loop, system.port, Traffic(seed=2), RATE / 100, 2)
        for _ in range(options.repetitions):
            for state in found:
                point(system, urls[state])
                found[state].append(bench_freshness.measure(system, BATCH, RATE, seconds, public=False))
                if state != "healthy":
                    point(system, urls["healthy"])
                system.quiet(300)
    rows = []
    healthy = found["healthy"]
    for name, pick in (
        ("ingest p99", lambda fresh: fresh.ingest_p99),
        ("local freshness p99", lambda fresh: fresh.readable_p99),
        ("local freshness p50", lambda fresh: fresh.readable_p50),
    ):
        rows.append(table.of(f"{name}, healthy, {RATE:,} events/s", [pick(fresh) for fresh in healthy], "ms"))
        for state in STATES:
            asked = (1.2, 1.05) if name.endswith("p99") else (None, None)
            rows.append(
                table.ratio(
                    f"{name}, partner {state}",
                    [pick(fresh) for fresh in found[state]],
                    [pick(fresh) for fresh in healthy],
                    "healthy",
                    target=asked[0],
                    aim=asked[1],
                )
            )
    return rows


def point(system: System, url: str) -> None:
    """Send the bridge to another partner, with its circuit closed."""
    body = {"settings": {"PYTHON_EVENT_API_URL": url}, "reason": "benchmark"}
    status, answer = call(system.port, "PATCH", "/api/ml/settings", body)
    if status != 200:
        raise RuntimeError(f"the partner's address cannot be set: {answer}")
    status, answer = call(system.port, "POST", "/api/ml/bridge/python", {"action": "reset_circuit"})
    if status != 200:
        raise RuntimeError(f"the circuit cannot be reset: {answer}")
