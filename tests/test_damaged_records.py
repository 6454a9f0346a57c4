"""A stored record that was damaged after the streams had read it: it is left out, told once, and spoils no other."""

from __future__ import annotations

import logging

import pytest

from pipeline import keys
from pipeline.runtime import Runtime
from pipeline.store import Store
from tests.conftest import client_of
from tests.faults import INGEST, routes, settled
from tests.helpers import response


@pytest.fixture(params=["all of it", "its envelope", "its data"])
def damaged(request: pytest.FixtureRequest, nexus: Runtime, store: Store) -> Runtime:
    """A Nexus that has taken three events of one user; the second one's record has been overwritten since."""
    send = routes(client_of(nexus))
    assert send("POST", INGEST, [response("driver_1", event_id=f"e{n}") for n in range(3)])[0] == 202
    settled(send)
    raw = store.call("GET", f"{keys.LOG}1")
    start = raw.index(b'{"event_id":"e1"')
    end = raw.index(b'{"event_id":"e2"') - 8
    whole, envelope, data = (start - 8, end - start + 8), (start + 12, 10), (end - 9, 3)
    at, size = {"all of it": whole, "its envelope": envelope, "its data": data}[request.param]
    store.call("SETRANGE", f"{keys.LOG}1", at, b"\xff" * size)
    nexus.log.drop_tail()
    return nexus


def test_events_are_listed_without_it_and_it_is_told_once(damaged: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = client_of(damaged)
    for path in ("/api/ml/events", "/api/ml/events?user_id=driver_1", "/api/ml/events?order=desc"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert sorted(e["event_id"] for e in answer.json["events"]) == ["e0", "e2"]

    assert [r.levelname for r in caplog.records if r.getMessage() == "stored event is damaged"] == ["ERROR"]
    assert client.get("/api/ml/events/e1").json["event"]["raw"]


def test_features_of_a_past_moment_are_those_of_the_others(damaged: Runtime) -> None:
    answer = client_of(damaged).get(f"/api/ml/features/driver_1?as_of={damaged.clock()}")
    assert answer.status_code == 200
    assert answer.json["features"]["event_count_24h"] == 2


def test_bytes_are_measured_on_the_others(damaged: Runtime) -> None:
    damaged.serving._footprint._measured = -1e9
    damaged.serving._footprint.look()
    assert damaged.serving._footprint.latest["per_user"]
