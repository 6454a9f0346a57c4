"""Ingest alone: requests and events a second by batch size and clients, beside a constant route on the same server."""

from __future__ import annotations

from benchmarks import table
from benchmarks.hammer import TOOL, Closed, hammer
from benchmarks.harness import Options, running
from benchmarks.peers import launch
from benchmarks.table import Row
from benchmarks.traffic import Traffic, fill, nonces, stamp
from pipeline.keys import LOCAL_STREAMS

TITLE = "Ingest alone: the route with the local streams running, the bridge off"
BATCHES = (1, 100, 500)
CLIENTS = (1, 16, 64)


def run(options: Options) -> list[Row]:
    seconds = options.pick(1, 3, 5)
    found: dict[tuple[str, int, int], list[Closed]] = {}
    with running(options.data, ENABLE_PYTHON_BRIDGE="false") as system, launch.constant() as constant:
        hammer(system.port, without_ids(100), 4, 1)
        system.drained(120, *LOCAL_STREAMS)
        for _ in range(options.pick(1, 2, 5)):
            for batch in BATCHES:
                requests = without_ids(batch)
                for clients in CLIENTS:
                    for name, port in (("nexus", system.port), ("constant", constant)):
                        found.setdefault((name, batch, clients), []).append(hammer(port, requests, clients, seconds))
                    system.drained(300, *LOCAL_STREAMS)
    rows = [Row("load generator", None, "", note=f"{TOOL}; closed loop; events without ids, which Nexus makes")]
    for batch in BATCHES:
        for clients in CLIENTS:
            mine, other = found["nexus", batch, clients], found["constant", batch, clients]
            label = f"{'single events' if batch == 1 else f'batches of {batch}'}, {clients} client{'s'[: clients - 1]}"
            rates = [closed.rps for closed in mine]
            rows += [
                table.of(f"requests, {label}", rates, "/s"),
                table.of(f"events, {label}", [rate * batch for rate in rates], "/s"),
                table.of(f"p50, {label}", [closed.p50 for closed in mine], "ms"),
                table.of(f"p99, {label}", [closed.p99 for closed in mine], "ms"),
                table.ratio(
                    f"requests, {label}",
                    rates,
                    [closed.rps for closed in other],
                    "the constant route",
                    note="which takes the body in, drops it and answers one constant",
                ),
            ]
    return rows


def without_ids(batch: int) -> list[bytes]:
    """Requests that may be sent any number of times."""
    templates = Traffic(batch=batch, requests=max(20, 20_000 // batch), ids=False).templates()
    return [fill(template, nonce, stamp()) for template, nonce in zip(templates, nonces(), strict=False)]
