"""A store over its memory limit takes no events, but all else of the bridge: what waits drains, and people's orders pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.bridge import outages
from tests.bridging import post, run, settled
from tests.conftest import Start, client_of, runtimes
from tests.helpers import Valkey, until
from tests.misbehaving import Misbehaving


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving()
    yield made
    made.close()


@pytest.fixture
def start_nexus(own_server: Valkey, tmp_path: Path) -> Iterator[Start]:
    """Starts instances of Nexus on a store of the test's own, whose limit it may set."""
    yield from runtimes(own_server.url, tmp_path)


def test_what_waited_during_an_outage_is_delivered_once_the_partner_is_back(start_nexus, server, own_server):
    first = run(start_nexus, server)
    server.leave()
    posted = post(first, 60, users=40)
    until(lambda: outages.rows(first.store, 1), "the outage")
    first.stop()
    own_server.client.config_set("maxmemory", 1)
    server.listen()
    second = run(start_nexus, server)  # it counts the outage's users anew
    assert settled(second).dead == 0
    assert {event["event_id"] for event in posted} == set(server.applied)
    row = until(lambda: (r := outages.rows(second.store, 1)[0])["caught_up"] and r, "the outage over")
    until(lambda: second.bridge.ledger.current is None, "its users counted")
    row = outages.rows(second.store, 1)[0]
    assert (row["queued"], row["delivered"], row["users"], row["unexplained"]) == (60, 60, 40, 0)


def test_orders_by_hand_and_changes_of_settings_are_taken(start_nexus, server, own_server):
    nexus = run(start_nexus, server)
    client = client_of(nexus)
    own_server.client.config_set("maxmemory", 1)
    for action in ("pause", "resume", "open_circuit", "reset_circuit"):
        assert client.post("/api/ml/bridge/python", json={"action": action}).status_code == 200
    change = {"settings": {"FEATURE_SYNC_INTERVAL": 60}}
    assert client.patch("/api/ml/settings", json=change).status_code == 200
    assert nexus.live["FEATURE_SYNC_INTERVAL"] == 60
