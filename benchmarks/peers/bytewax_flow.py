"""The Bytewax peer: features per user from a file, by its stateful operator, into the store. Prints one JSON line.

    .venv-bench/bin/python benchmarks/peers/bytewax_flow.py events.jsonl /tmp/valkey.sock

One worker, recovery off. What it does not do: take events over HTTP, keep them, idempotency, windows (its features
count for ever), look-ups, aggregates, scores, a partner, recovery after a crash.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import bytewax.operators as op
import msgspec
import redis
from bytewax.connectors.files import FileSource
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import run_main


class Event(msgspec.Struct):
    user_id: str
    event_type: str
    timestamp: str
    data: dict[str, Any]


class Writer(StatelessSinkPartition):
    """Each batch's users once, in one pipeline."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store

    def write_batch(self, items: list[tuple[str, list[float]]]) -> None:
        pipe = self._store.pipeline(transaction=False)
        for user, (events, accepted, rejected, seconds) in dict(items).items():
            answered = accepted + rejected
            features = {
                "events": events,
                "acceptance_rate": accepted / answered if answered else None,
                "response_time": seconds / answered if answered else None,
            }
            pipe.set(f"features:{user}", json.dumps(features))
        pipe.execute()


class StoreSink(DynamicSink):
    def __init__(self, path: str) -> None:
        self._path = path

    def build(self, step_id: str, worker_index: int, worker_count: int) -> Writer:
        return Writer(redis.Redis(unix_socket_path=self._path))


def count(sums: list[float] | None, event: Event) -> tuple[list[float], list[float]]:
    sums = list(sums) if sums else [0.0, 0.0, 0.0, 0.0]
    sums[0] += 1
    if event.event_type == "ride_request_response":
        sums[1 if event.data["response"] == "accepted" else 2] += 1
        sums[3] += event.data["response_time"]
    return sums, sums


def main() -> None:
    path, socket = sys.argv[1:]
    flow = Dataflow("features")
    lines = op.input("events", flow, FileSource(path, batch_size=1000))
    events = op.map("decode", lines, msgspec.json.Decoder(Event).decode)
    keyed = op.key_on("user", events, lambda event: event.user_id)
    op.output("store", op.stateful_map("count", keyed, count), StoreSink(socket))
    began = time.monotonic()
    run_main(flow)
    print(json.dumps({"seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
