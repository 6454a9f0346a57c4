"""Where the time of an event goes: µs of processor time per stage, of the whole system under load.

    python -m benchmarks.profile_stages [--events 100000] [--rate PER_S] [--batch 100] [--users 10000] [--spy FOLDER]

Without --rate the load is a closed loop at the highest rate. --spy has py-spy (from .venv-bench) sample Nexus and the
Python service too, and writes collapsed stacks and prints the functions that held the processor most.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import event_api
from benchmarks import machine
from benchmarks.harness import PEERS_PYTHON, System, call
from benchmarks.load import closed_loop, load, open_loop
from benchmarks.stages import PATH
from benchmarks.traffic import Traffic
from pipeline.store import _script

_COMMANDS, _FUNCTIONS = 12, 25


class StagedSystem(System):
    """The system with stopwatches in Nexus."""

    supervisor = "benchmarks.stages"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_stages", description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rate", type=float, help="events/s by the clock, instead of as fast as possible")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--data", type=Path, default=Path("/tmp"))
    parser.add_argument("--spy", type=Path, help="folder for the stacks that py-spy collects")
    given = parser.parse_args()
    print(machine.markdown(machine.describe() | {"length": "stage"}))
    system = StagedSystem(given.data)
    try:
        system.start()
        profile(system, given)
    finally:
        system.stop()
        system.remove()


def profile(system: StagedSystem, given: argparse.Namespace) -> None:
    traffic = Traffic(batch=given.batch, users=given.users)
    load(closed_loop, system.port, Traffic(seed=2, users=given.users), 4, 100).only(202)
    system.drained(60)
    time.sleep(3)  # what follows the warm-up: public keys
    spies = spy(system, given.spy) if given.spy else []
    system.store.config_resetstat()
    system.store.config_set("slowlog-max-len", 1_000_000)
    system.store.config_set("slowlog-log-slower-than", 0)  # every command, to tell the scripts apart
    system.store.slowlog_reset()
    before, aof = look(system), system.aof_bytes()
    if given.rate:
        posted = load(open_loop, system.port, traffic, given.rate / given.batch, given.events / given.rate).only(202)
    else:
        posted = load(closed_loop, system.port, traffic, 8, given.events // given.batch).only(202)
    system.drained(600)
    seconds = time.monotonic() - posted.began
    after, written = look(system), system.aof_bytes() - aof
    events = len(posted.latencies) * given.batch
    report(before, after, events, seconds)
    print(f"| ingest p50 / p99 | {posted.ms(0.5):.1f} / {posted.ms(0.99):.1f} ms |")
    print(f"| bytes of the append-only file | {written / events:,.0f} per event |")
    commands = sorted(system.store.info("commandstats").items(), key=lambda item: -item[1]["usec"])
    print("\n| store, by command (scripts contain what they call) | µs per event | calls per 1,000 events |")
    print("|---|---:|---:|")
    for name, stats in commands[:_COMMANDS]:
        print(
            f"| {name.removeprefix('cmdstat_')} | {stats['usec'] / events:.2f} | {stats['calls'] / events * 1000:.1f} |"
        )
    print("\n| store, by script | µs per event | calls per 1,000 events | µs per call |")
    print("|---|---:|---:|---:|")
    for script, (calls, spent) in scripts(system).items():
        print(f"| {script} | {spent / events:.2f} | {calls / events * 1000:.1f} | {spent / calls:.0f} |")
    for process, path in spies:
        process.send_signal(signal.SIGINT)  # it writes what it has
        process.wait(30)
        hottest(path)


def look(system: StagedSystem) -> dict[str, dict[str, float]]:
    """Processor seconds by process, thread and stage."""
    status, found = call(system.port, "GET", PATH)
    if status != 200:
        raise RuntimeError(f"no stages: {status} {found}")
    stages = {name: value / 1e9 for name, value in found["stages"].items()}
    return {"processes": system.cpu_s(), "threads": found["threads"], "stages": stages}


def report(before: dict[str, Any], after: dict[str, Any], events: int, seconds: float) -> None:
    spent = {
        kind: {name: (value - before[kind].get(name, 0.0)) / events * 1e6 for name, value in values.items()}
        for kind, values in after.items()
    }
    whole = sum(spent["processes"].values())
    print(
        f"{events:,} events in {seconds:.1f} s, {events / seconds:,.0f} events/s; {whole:.0f} µs of processor time each"
    )
    for kind, title in (
        ("processes", "process"),
        ("threads", "thread of Nexus"),
        ("stages", "stage of Nexus (processor time of its thread)"),
    ):
        print(f"\n| {title} | µs per event |\n|---|---:|")
        for name, value in sorted(spent[kind].items(), key=lambda item: -item[1]):
            if value >= 0.05:
                print(f"| {name} | {value:.1f} |")
    outside = spent["processes"]["nexus"] - sum(spent["stages"].values())
    print(f"| outside the stages: bridge, web server, jobs | {outside:.1f} |")


def scripts(system: StagedSystem) -> dict[str, tuple[int, int]]:
    """Calls and µs of each script since the slow log was emptied; Python's carry the names of event_api.py."""
    texts = {f"Nexus: {path.stem}": _script(path) for path in (machine.ROOT / "pipeline" / "lua").glob("[!_]*.lua")}
    texts |= {f"Python service: {name}": getattr(event_api, name) for name in ("CLAIM", "ACCEPT", "SAVE")}
    names = {hashlib.sha1(text.encode()).hexdigest(): name for name, text in texts.items()}
    found: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for entry in system.store.slowlog_get(1_000_000):
        words = entry["command"].split()
        if words and words[0].upper() == b"EVALSHA":
            name = names.get(words[1].decode(), "another")
            found[name] += entry["duration"]
            calls[name] += 1
    return {name: (calls[name], spent) for name, spent in found.most_common()}


def spy(system: StagedSystem, folder: Path) -> list[tuple[subprocess.Popen[bytes], Path]]:
    """Samplers of the Nexus worker and of the Python service, which write collapsed stacks when they end."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for part in ("nexus", "python"):
        path = folder / f"{part}.folded"
        words = ["record", "-p", str(max(system.processes()[part])), "-r", "100", "-f", "raw", "-o", str(path)]
        more = ["--gil", "--nonblocking", "-d", "600"]
        tool = PEERS_PYTHON.with_name("py-spy")
        process = subprocess.Popen([tool, *words, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append((process, path))
    time.sleep(1)
    return found


def hottest(path: Path) -> None:
    """The functions with the most samples while the interpreter lock was held: alone, and with what they call."""
    alone: Counter[str] = Counter()
    within: Counter[str] = Counter()
    total = 0
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame.rpartition(":")[0] or frame for frame in stack.split(";")]
        total += int(count)
        alone[frames[-1]] += int(count)
        for frame in set(frames):
            within[frame] += int(count)
    for title, counts in (("with what it calls", within), ("alone", alone)):
        print(f"\n| {path.stem}: function, {title} | share of samples |\n|---|---:|")
        for function, samples in counts.most_common(_FUNCTIONS):
            print(f"| {function}) | {samples / total:.1%} |")


if __name__ == "__main__":
    main()
