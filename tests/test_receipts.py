"""Receipts of what is not like other events: canaries, events for the bridge alone, and what a trim has taken."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import ALL_STREAMS, CANARY, Position
from pipeline.commit_log.lookups import Lookups
from pipeline.events import canary, rfc3339, uuid7
from pipeline.log import Log, Request
from pipeline.runtime import Runtime
from pipeline.store import Store
from tests.conftest import Start, client_of
from tests.faults import HEALTH, INGEST, settled
from tests.faults import routes as over
from tests.helpers import LOCAL, NOON, STREAMS, FakePartner, append, event, frames, until

BRIDGE = "/api/ml/bridge/python"


def receipt(client: FlaskClient, event_id: str) -> Any:
    answer = client.get(f"/api/ml/events/{event_id}")
    assert answer.status_code == 200, answer.json
    return answer.json


def states(client: FlaskClient, event_id: str) -> dict[str, str]:
    return {name: row["state"] for name, row in receipt(client, event_id)["streams"].items()}


def test_receipt_of_a_canary_says_what_each_stream_did_and_when(
    nexus: Runtime, client: FlaskClient, partner: FakePartner
) -> None:
    partner.supports = ("batch", "canary")
    until(lambda: "canary" in nexus.bridge.partner.supports, "the partner's capabilities")
    sent = canary(uuid7(nexus.clock()), nexus.clock())
    nexus.log.accept([Request([sent], "nexus", ALL_STREAMS | CANARY)], nexus.clock())
    nexus.taken()
    until(lambda: set(states(client, sent.event_id).values()) == {"done"}, "every stream to have passed it")
    passed = rfc3339(nexus.clock())
    assert client.post(INGEST, json={"events": [event()]}).status_code == 202  # whose commit comes later
    settled(over(client), STREAMS)

    found = receipt(client, sent.event_id)
    assert found["event"]["event_type"] == "nexus.canary"
    assert all(row["at"] is not None and row["at"] <= passed for row in found["streams"].values()), found
    assert client.get(HEALTH).json["totals"]["accepted"] == 1


def test_receipt_of_an_event_for_the_bridge_alone_says_that_the_others_were_not_asked(
    client: FlaskClient, partner: FakePartner
) -> None:
    posted = {"action": "send_batch", "events": [event(event_id="alone")]}
    assert client.post(BRIDGE, json=posted).status_code == 200
    assert partner.ids == ["alone"]

    found = receipt(client, "alone")["streams"]
    assert found["bridge"]["state"] == "done"
    assert found["bridge"]["at"] is not None
    assert {(found[name]["state"], found[name]["at"]) for name in LOCAL} == {("not_addressed", None)}


def test_receipt_of_an_event_for_the_bridge_alone_is_pending_while_the_partner_is_away(start_nexus: Start) -> None:
    client = client_of(start_nexus())
    assert client.post(BRIDGE, json={"action": "send_batch", "events": [event(event_id="alone")]}).status_code == 202

    assert states(client, "alone")["bridge"] in ("pending", "retrying")


def test_receipt_tells_the_commit_that_covered_its_event_as_far_as_the_journal_reaches(
    store: Store, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "JOURNAL_LENGTH", 2)
    for n in range(3):
        append(log, [event(event_id=f"e{n}")], NOON)
    for n, frame in enumerate(frames(log)):
        store.many(checkpoints.advance(Progress("features", frame.after(), 1), NOON + n))

    told = [Lookups(store, log).receipt(f"e{n}")["streams"]["features"] for n in range(3)]
    assert {row["state"] for row in told} == {"done"}
    # The entry of the first commit is gone; that the oldest one left covers an event does not say that none before did.
    assert [row["at"] for row in told] == [None, None, rfc3339(NOON + 2)]


def test_receipt_ends_with_the_retention_of_its_event(nexus: Runtime, client: FlaskClient) -> None:
    assert client.post(INGEST, json={"events": [event(event_id="gone")]}).status_code == 202
    settled(over(client), STREAMS)
    first = frames(nexus.log, Position())[0]
    nexus.store.call("UNLINK", "ml:{p}:log:" + str(first.address >> 24))
    nexus.log.drop_tail()

    assert client.get("/api/ml/events/gone").status_code == 404


def test_canary_that_the_partner_was_never_given_is_not_told_as_delivered(
    nexus: Runtime, client: FlaskClient, partner: FakePartner
) -> None:
    until(lambda: nexus.bridge.health is not None, "the partner's capabilities")  # canaries are none of them
    sent = canary(uuid7(nexus.clock()), nexus.clock())
    nexus.log.accept([Request([sent], "nexus", ALL_STREAMS | CANARY)], nexus.clock())
    nexus.taken()
    until(lambda: receipt(client, sent.event_id)["streams"]["bridge"]["state"] != "pending", "the bridge to pass it")

    found = receipt(client, sent.event_id)["streams"]
    assert partner.received == []
    assert found["bridge"] == {"state": "not_addressed", "at": None, "attempts": 0, "result": None}
    until(lambda: {states(client, sent.event_id)[name] for name in LOCAL} == {"done"}, "the local streams")
