"""Nexus on a real Cluster: its keys are on one of three nodes, and that one is asked how it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import keys
from pipeline.operations.footprint import Footprint
from pipeline.runtime import Runtime
from tests.conftest import client_of, runtimes
from tests.faults import HEALTH, INGEST
from tests.helpers import Cluster, FakePartner, assert_counted_once, event, payment, response, until


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster")).start()
    yield made
    made.kill()


@pytest.fixture
def nexus(cluster: Cluster, partner: FakePartner, tmp_path: Path) -> Iterator[Runtime]:
    """A started Nexus on the emptied Cluster, whose partner is `partner`."""
    for node in cluster.nodes:
        node.flushall()
    starts = runtimes(cluster.url, tmp_path)
    yield next(starts)(REDIS_CLUSTER="true", PYTHON_EVENT_API_URL=partner.url)
    next(starts, None)


def limit_memory(node: Any, share: float) -> None:
    """Set a node's limit so that this share of it is used; 0: no limit."""
    used = int(node.info("memory")["used_memory"])
    node.config_set("maxmemory", int(used / share) if share else 0)


def test_nexus_on_a_cluster_takes_events_and_serves_and_delivers_them(
    nexus: Runtime, cluster: Cluster, partner: FakePartner
) -> None:
    client = client_of(nexus)

    def get(path: str) -> Any:
        answer = client.get(path)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json

    users = [f"user_{n}" for n in range(12)]
    posted = [make for user in users for make in (event(user=user), response(user), payment(f"t-{user}", user=user))]
    answer = client.post(INGEST + "?wait=features&timeout_ms=10000", json={"events": posted})
    assert (answer.status_code, answer.json["accepted"], answer.json["applied"]) == (202, len(posted), True)
    assert client.post(INGEST, json={"events": posted[:5]}).json["duplicates"] == 5

    until(lambda: sorted(partner.ids) == sorted(e["event_id"] for e in posted), "the delivery to the partner")
    until(lambda: get(HEALTH)["status"] == "healthy", "good health")
    until(lambda: get("/nexus/feed.json")["models"], "the look at the models")
    assert_counted_once(get, posted, time.time_ns() // 1_000_000)

    # The public features are on all nodes, each user's where its slot is.
    public = [keys.SERVING + user for user in users]
    until(lambda: all(cluster.owner(name).exists(name) for name in public), "the public features")
    assert len({id(cluster.owner(name)) for name in public}) == len(cluster.nodes)
    own = cluster.owner(keys.HEAD)
    assert not [key for node in cluster.nodes if node is not own for key in node.keys(keys.PREFIX + "*")]

    # What the Python service wrote is read from all of them.
    for user in users:
        name, said = keys.PARTNER + user, {"user_id": user, "features": {"their": 1}, "computed_at": None}
        cluster.owner(name).set(name, msgspec.json.encode(said))
    vectors = client.post("/api/ml/features", json={"user_ids": users}).json["users"]
    assert {vectors[user]["features"]["their"] for user in users} == {1}

    receipt = get(f"/api/ml/events/{posted[0]['event_id']}")
    assert {stream["state"] for stream in receipt["streams"].values()} == {"done"}
    for path in (
        "bridge/outages",
        "bridge/attempts",
        "dead-letters",
        "models",
        "settings",
        "settings/audit",
        "feature-definitions",
        "aggregates?by=zone&step=1h",
        "predictions/demand",
        "predictions/fraud/t-user_1",
    ):
        get(f"/api/ml/{path}")
    footprint = Footprint(nexus.store, nexus.log)
    footprint.look()
    assert all(footprint.latest.values())


def test_the_store_watch_speaks_of_the_node_that_holds_nexuss_keys(nexus: Runtime, cluster: Cluster) -> None:
    watch, own = nexus.serving.store_watch, cluster.owner(keys.HEAD)
    others = [node for node in cluster.nodes if node is not own]

    for node in others:
        limit_memory(node, 0.95)
        node.config_set("appendonly", "no")
    watch.look()
    assert (watch.status["status"], watch.memory_used) == ("online", 0.0)
    for node in others:
        limit_memory(node, 0)
        node.config_set("appendonly", "yes")

    limit_memory(own, 0.95)
    watch.look()
    assert watch.status["status"] == "full"
    assert watch.memory_used > 0.85
    limit_memory(own, 0)
    own.config_set("appendonly", "no")
    watch.look()
    assert watch.status["status"] == "degraded"
    own.config_set("appendonly", "yes")
