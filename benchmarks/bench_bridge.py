"""The bridge: how fast a backlog drains, what an outage costs the ingest, and how soon trouble is noticed."""

from __future__ import annotations

import contextlib
import sys
import time

from benchmarks import table
from benchmarks.bench_cores import SPIN
from benchmarks.harness import Options, System, call, free_port, running, wait_until
from benchmarks.load import apart, closed_loop, load, open_loop
from benchmarks.partners import KINDS
from benchmarks.peers.launch import process
from benchmarks.table import Row
from benchmarks.traffic import Traffic
from pipeline.keys import LOCAL_STREAMS
from pipeline.tools.fault_proxy import FaultProxy

TITLE = "The bridge: after an outage, during one, and at its beginning"
BATCH = 500  # as the bridge sends them
BARE_CONNECTIONS = (2, 4)  # the partner's own top rate is the better of these
BARE_S = 5.0  # so long each, as long as a drain: what the partner puts off by a second or two has to be done in it, too
LOOK_S, DRAIN_S = 0.25, 300.0
RATE = 2_000  # events/s while the ingest is measured
TRICKLE = 20  # requests/s of one event while trouble is waited for
_HEALTH = "/api/ml/bridge/python?action=health"


def run(options: Options) -> list[Row]:
    backlog = options.pick(60_000, 200_000, 400_000)
    bare: list[float] = []
    busy: list[float] = []
    drained: list[float] = []
    p99: dict[str, list[float]] = {"healthy": [], "away": []}
    noticed: dict[str, list[float]] = {}
    with running(options.data) as system:
        home = f"http://127.0.0.1:{system.api_port}"
        load(open_loop, system.port, Traffic(seed=3), RATE / 100, 2)
        for repetition in range(options.repetitions):
            system.quiet(300)
            bare.append(top_rate(system, options.pick(2.0, BARE_S, 2 * BARE_S), repetition))
            with process([sys.executable, "-c", SPIN]):
                busy.append(top_rate(system, options.pick(2.0, BARE_S, 2 * BARE_S), repetition + 50))
            system.quiet(300)
            drained.append(drain_rate(system, home, backlog, repetition))
            for state, url in (("healthy", home), ("away", f"http://127.0.0.1:{free_port()}")):
                point(system, url)
                seconds = options.pick(4, 10, 30)
                traffic = Traffic(seed=70 + repetition)
                p99[state].append(load(open_loop, system.port, traffic, RATE / 100, seconds).only(202).ms(0.99))
            point(system, home)
            system.drained(300)
            for kind, seconds in detection(system).items():
                noticed.setdefault(kind, []).append(seconds)
            point(system, home)
    rows = [
        table.of(f"the Python service's own top rate, batches of {BATCH}", bare, "events/s"),
        table.of("the same, while a process beside it computes without end", busy, "events/s"),
        table.of("drain of a backlog after an outage", drained, "events/s"),
        table.ratio("drain of a backlog", drained, bare, "the partner's top rate", target=0.8, more_is_better=True),
        table.ratio("drain of a backlog", drained, busy, "that with a busy core beside it"),
        table.of(f"ingest p99, {RATE:,} events/s, partner away", p99["away"], "ms"),
        table.ratio("ingest p99, partner away", p99["away"], p99["healthy"], "healthy", target=1.2),
    ]
    for kind, seconds_each in noticed.items():
        waits = "" if kind == "dead" else "the timeout of a call is 5 s"
        rows.append(table.of(f"a partner that is {kind} noticed after", seconds_each, "s", note=waits))
    return rows


def top_rate(system: System, seconds: float, seed: int) -> float:
    """Events/s that the Python service takes from a bare load generator, in the bridge's batches."""
    best = 0.0
    for connections in BARE_CONNECTIONS:
        traffic = Traffic(batch=BATCH, path="/events/batch", seed=100 * seed + connections)
        result = load(closed_loop, system.api_port, traffic, connections, None, seconds).only(200)
        best = max(best, len(result.latencies) * BATCH / result.seconds)
    return best


def drain_rate(system: System, home: str, events: int, seed: int) -> float:
    """Events/s from the partner's return until nearly all of the backlog of its outage is delivered. Looked at seldom, since
    to ask is a load of its own: the last look at which some still wait ends the measurement."""
    point(system, f"http://127.0.0.1:{free_port()}")
    traffic = Traffic(batch=BATCH, seed=1_000 + seed)
    load(closed_loop, system.port, traffic, 2, events // BATCH).only(202)
    system.quiet(300, *LOCAL_STREAMS)
    waiting = system.pending("bridge")
    point(system, home)
    began = time.monotonic()
    looks = [(began, waiting)]
    while looks[-1][1] > 0:
        if time.monotonic() - began > DRAIN_S:
            raise RuntimeError(f"the backlog was not delivered within {DRAIN_S} s")
        time.sleep(LOOK_S)
        left = system.pending("bridge")
        looks.append((time.monotonic(), left))
    ended, left = looks[-2] if looks[-2][1] < waiting else looks[-1]
    return (waiting - left) / (ended - began)


def detection(system: System) -> dict[str, float]:
    """Seconds until the bridge's status says so, from the moment another takes the partner's place."""
    found = {}
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(("127.0.0.1", system.api_port)))
        ports = {}
        for kind in KINDS:
            if kind != "slow":
                ports[kind] = free_port()
                words = [sys.executable, "-m", "benchmarks.partners", kind, str(ports[kind])]
                stack.enter_context(process(words))
        for kind in ("dead", *ports):
            proxy.to(("127.0.0.1", system.api_port))
            point(system, f"http://127.0.0.1:{proxy.port}")
            wait_until(lambda: status(system) == "online", 90, "the partner online behind the proxy")
            goal = accepted(system) + TRICKLE
            traffic = Traffic(batch=1, seed=len(kind))
            trickle = apart(open_loop, system.port, traffic, TRICKLE, 12)
            wait_for_events(system, goal)
            began = time.monotonic()
            proxy.down() if kind == "dead" else proxy.to(("127.0.0.1", ports[kind]))
            wait_until(lambda: status(system) != "online", 60, f"the {kind} partner noticed", 0.01)
            found[kind] = time.monotonic() - began
            trickle.result()
            if kind == "dead":
                proxy.up()
        proxy.to(("127.0.0.1", system.api_port))
        point(system, f"http://127.0.0.1:{system.api_port}")
        system.drained(120)
    return found


def wait_for_events(system: System, goal: int) -> None:
    wait_until(lambda: accepted(system) > goal, 30, "the trickle of events")


def point(system: System, url: str) -> None:
    """Send the bridge to another partner."""
    body = {"settings": {"PYTHON_EVENT_API_URL": url}, "reason": "benchmark"}
    status_code, answer = call(system.port, "PATCH", "/api/ml/settings", body)
    if status_code != 200:
        raise RuntimeError(f"the partner's address cannot be set: {answer}")


def accepted(system: System) -> int:
    return int(system.accounts()["totals"]["accepted"])


def status(system: System) -> str:
    return str(call(system.port, "GET", _HEALTH)[1]["status"])
