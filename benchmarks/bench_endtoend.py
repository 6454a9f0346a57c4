"""End to end: from the first POST until every event has passed all five streams, beside peers with smaller jobs."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import table
from benchmarks.harness import Options, System, running, wait_until
from benchmarks.load import closed_loop, load
from benchmarks.peers import launch
from benchmarks.table import Row
from benchmarks.traffic import Traffic, fill, nonces, stamp

TITLE = "End to end: batches of 100 events, 10,000 users, until all five streams have them"
CONNECTIONS = 8
BATCH = 100
_WARM_UP = 5_000
_BY_HAND = (
    "FastAPI, pydantic, pipelined XADD per event, consumer with XREADGROUP and HINCRBY; features alone: no "
    "idempotency, no windows, not exactly once, no look-ups, aggregates, scores, partner"
)
_ONCE = "the same with SET NX per id; a crash between SET and XADD loses the event"
_BYTEWAX = (
    "features alone, from a file, one worker: no HTTP, events not kept, no idempotency, no windows, no look-ups, "
    "aggregates, scores, partner, recovery"
)
_FEAST = "SDK push of 100 rows of finished values: computes nothing, takes no events, keeps none"


def run(options: Options) -> list[Row]:
    events = options.pick(40_000, 150_000, 300_000)
    rates: dict[str, list[float]] = {"nexus": [], "byhand": [], "once": [], "bytewax": [], "feast": []}
    costs: dict[str, list[float]] = {}
    for _ in range(options.repetitions):
        rate, cost = nexus(options.data, events)
        rates["nexus"].append(rate)
        for name, value in cost.items():
            costs.setdefault(name, []).append(value)
        rates["byhand"].append(by_hand(options.data, events))
        rates["once"].append(by_hand(options.data, events, "--once"))
        if not launch.unavailable("bytewax"):
            rates["bytewax"].append(bytewax(options.data, events))
        if not launch.unavailable("feast"):
            rates["feast"].append(feast(options.data, options.pick(20, 100, 300)))
    rows = [
        table.of(
            "Nexus, all five streams",
            rates["nexus"],
            "events/s",
            target=15_000,
            aim=25_000,
            more_is_better=True,
            note=f"idempotency, AOF and bridge on, the Python service parses and computes; {CONNECTIONS} connections",
        )
    ]
    options.found["top_rate"] = rows[0].value or 0.0
    for name, label, note, target in (
        ("byhand", "by hand", _BY_HAND, 1.5),
        ("once", "by hand, ids looked up", _ONCE, None),
        ("bytewax", "Bytewax", _BYTEWAX, None),
        ("feast", "Feast push", _FEAST, None),
    ):
        if not rates[name]:
            rows.append(table.missing(label, "events/s", launch.unavailable(name) or "not measured"))
            continue
        rows.append(table.of(label, rates[name], "rows/s" if name == "feast" else "events/s", note=note))
        rows.append(table.ratio("Nexus", rates["nexus"], rates[name], label, target=target, more_is_better=True))
    rows += [table.of(f"processor time of {name}", values, "µs/event") for name, values in sorted(costs.items())]
    return rows


def nexus(data: Path, events: int, kind: type[System] = System) -> tuple[float, dict[str, float]]:
    """Events/s through all five streams of a fresh system, and each part's processor time per event in µs."""
    with running(data, kind) as system:
        load(closed_loop, system.port, Traffic(seed=2), CONNECTIONS, _WARM_UP // BATCH).only(202)
        system.drained(60)
        before = system.cpu_s()
        posted = load(closed_loop, system.port, Traffic(), CONNECTIONS, events // BATCH).only(202)
        system.drained(600)
        seconds = time.monotonic() - posted.began
        accounts = system.accounts()
        if accounts["totals"]["accepted"] != events + _WARM_UP or accounts["unexplained"]:
            raise RuntimeError(f"the accounts do not match what was posted: {accounts}")
        after = system.cpu_s()
        return events / seconds, {part: (after[part] - before[part]) / events * 1e6 for part in after}


def by_hand(data: Path, events: int, *options: str) -> float:
    """Events/s through the hand-written peer."""
    with launch.store(data) as store, launch.byhand(store, *options) as port:

        def done(wanted: int) -> None:
            wait_until(lambda: int(store.client.get("processed") or 0) >= wanted, 600, "the consumer")

        load(closed_loop, port, Traffic(seed=2, path="/events"), CONNECTIONS, _WARM_UP // BATCH).only(202)
        done(_WARM_UP)
        posted = load(closed_loop, port, Traffic(path="/events"), CONNECTIONS, events // BATCH).only(202)
        done(_WARM_UP + events)
        return events / (time.monotonic() - posted.began)


def bytewax(data: Path, events: int) -> float:
    """Events/s through the Bytewax flow, from a file with one event a line."""
    with launch.store(data) as store:
        path = store.folder / "events.jsonl"
        lines = Traffic(batch=1, requests=min(events, 40_000)).templates()
        makes = nonces()
        with path.open("wb") as file:
            for number in range(events):
                body = lines[number % len(lines)].split(b"\r\n\r\n", 1)[1]
                file.write(fill(body[len(b'{"events":[') : body.rindex(b"]")], next(makes), stamp()) + b"\n")
        return events / launch.bytewax(store, path)


def feast(data: Path, batches: int) -> float:
    """Rows/s pushed into Feast's online store."""
    with launch.store(data) as store:
        return launch.feast_push(launch.feast_apply(store), 10_000, BATCH, batches)
