"""Freshness: from POST until the feature is readable by the route, and until its public key is written."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import bench_endtoend, table
from benchmarks.harness import Options, System, running
from benchmarks.load import apart, load, open_loop, percentile
from benchmarks.probe import ASK_EVERY_S, ASK_SHARE, probe
from benchmarks.table import Row
from benchmarks.traffic import Traffic

TITLE = "Freshness: POST until readable, load by the clock"
_PROBES_PER_S = 20.0


@dataclass(frozen=True)
class Case:
    label: str
    batch: int
    rate: float  # events/s
    target: float | None = None  # of the p99, ms
    aim: float | None = None


def run(options: Options) -> list[Row]:
    top = options.found.get("top_rate")
    if top is None:
        top = options.found["top_rate"] = bench_endtoend.nexus(options.data, 50_000)[0]
    cases = (
        Case("500/s in batches of 5", 5, 500, 10, 5),
        Case("5,000/s in batches of 100", 100, 5_000, 25, 10),
        Case("10,000/s in batches of 100", 100, 10_000, 25, 10),
        Case(f"half the top rate, {top / 2:,.0f}/s, in batches of 100", 100, top / 2),
    )
    seconds = options.pick(4, 12, 30)
    seen: dict[Case, list[Fresh]] = {case: [] for case in cases}
    with running(options.data) as system:
        load(open_loop, system.port, Traffic(seed=2), 50, 2)
        for _ in range(options.repetitions):
            for case in cases:
                seen[case].append(measure(system, case.batch, case.rate, seconds))
                system.quiet(300)
    rows = []
    for case, found in seen.items():
        kept = min(fresh.kept for fresh in found)
        lost = sum(fresh.lost for fresh in found)
        note = f"answered {kept:.0%} of the rate" + (f"; {lost} probes not readable within 20 s" if lost else "")
        rows += [
            table.of(f"readable p50, {case.label}", [f.readable_p50 for f in found], "ms", note=note),
            table.of(
                f"readable p99, {case.label}", [f.readable_p99 for f in found], "ms", target=case.target, aim=case.aim
            ),
            table.of(
                f"ingest p99, {case.label}",
                [f.ingest_p99 for f in found],
                "ms",
                target=15 if case.rate == 10_000 else None,
                aim=6 if case.rate == 10_000 else None,
            ),
            table.of(f"public key p50, {case.label}", [f.public_p50 for f in found], "ms"),
            table.of(f"public key p99, {case.label}", [f.public_p99 for f in found], "ms"),
        ]
    how = (
        f"asked every {ASK_EVERY_S * 1000:g} ms, or after {ASK_SHARE:.0%} of the time waited so far, which is in the figures; "
        "times count from when a batch was due"
    )
    rows.append(Row("resolution of the probe", ASK_EVERY_S * 1000, "ms", note=how))
    return rows


@dataclass(frozen=True)
class Fresh:
    """What one measurement saw, ms; `kept` is the share of the wanted rate that was answered in time."""

    readable_p50: float
    readable_p99: float
    ingest_p50: float
    ingest_p99: float
    public_p50: float
    public_p99: float
    kept: float
    lost: int


def measure(system: System, batch: int, rate: float, seconds: float, public: bool = True) -> Fresh:
    """Load by the clock at `rate` events/s, probes included."""
    probes = min(_PROBES_PER_S, rate / batch / 4)
    watching = apart(probe, system.port, system.socket_path if public else None, batch, probes, seconds)
    requests = rate / batch - probes
    loaded = load(open_loop, system.port, Traffic(batch=batch), requests, seconds).only(202)
    seen = watching.result()
    seen.answered.only(202)
    return Fresh(
        percentile(seen.readable, 0.5, seen.lost) * 1000,
        percentile(seen.readable, 0.99, seen.lost) * 1000,
        loaded.ms(0.5),
        loaded.ms(0.99),
        percentile(seen.public, 0.5) * 1000,
        percentile(seen.public, 0.99) * 1000,
        min(1.0, len(loaded.latencies) / requests / max(loaded.seconds, seconds)),
        seen.lost,
    )
