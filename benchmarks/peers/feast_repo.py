"""The Feast peer: a feature view with a push source on the online store. Prints one JSON line for each command.

    .venv-bench/bin/python benchmarks/peers/feast_repo.py FOLDER apply STORE_PORT
    .venv-bench/bin/python benchmarks/peers/feast_repo.py FOLDER push USERS BATCH BATCHES

It stores feature values that somebody else has computed. What it does not do: compute features, take events, keep them,
idempotency, look-ups, aggregates, scores, a partner.
"""

from __future__ import annotations

import json
import random
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource
from feast.data_source import PushMode
from feast.types import Float64, Int64

FIELDS = (
    "acceptance_rate",
    "response_time",
    "recent_rejections",
    "event_count_5m",
    "event_count_1h",
    "event_count_24h",
)


def rows(users: list[str]) -> pd.DataFrame:
    """A row of values for each user."""
    frame: dict[str, list[object]] = {"user_id": list(users), "event_timestamp": [datetime.now(UTC)] * len(users)}
    for name in FIELDS[:2]:
        frame[name] = [random.random() for _ in users]
    for name in FIELDS[2:]:
        frame[name] = [random.randrange(100) for _ in users]
    return pd.DataFrame(frame)


def apply(folder: Path, store_port: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feature_store.yaml").write_text(
        "project: bench\nregistry: registry.db\nprovider: local\n"
        f"online_store:\n  type: redis\n  connection_string: localhost:{store_port}\n"
        "offline_store:\n  type: file\nentity_key_serialization_version: 3\ntelemetry: false\n"
    )
    rows(["nobody"]).to_parquet(folder / "offline.parquet")
    offline = FileSource(path=str(folder / "offline.parquet"), timestamp_field="event_timestamp")
    user = Entity(name="user", join_keys=["user_id"])
    view = FeatureView(
        name="driver",
        entities=[user],
        ttl=timedelta(days=1),
        schema=[*(Field(name=n, dtype=Float64) for n in FIELDS[:2]), *(Field(name=n, dtype=Int64) for n in FIELDS[2:])],
        source=PushSource(name="driver_push", batch_source=offline),
    )
    FeatureStore(repo_path=str(folder)).apply([user, view])
    print(json.dumps({"applied": True}))


def push(folder: Path, users: int, batch: int, batches: int) -> None:
    store = FeatureStore(repo_path=str(folder))
    frames = [rows([f"driver_{int(users * random.random() ** 3):07d}" for _ in range(batch)]) for _ in range(batches)]
    store.push("driver_push", frames[0], to=PushMode.ONLINE)
    began = time.monotonic()
    for frame in frames:
        store.push("driver_push", frame, to=PushMode.ONLINE)
    print(json.dumps({"seconds": time.monotonic() - began, "rows": batch * batches}))


if __name__ == "__main__":
    where, command, *numbers = sys.argv[1:]
    if command == "apply":
        apply(Path(where), int(numbers[0]))
    else:
        push(Path(where), *map(int, numbers))
