"""The bridge: what it sends, in which order, and what it does while the partner is away, refuses, or knows less."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from flask.testing import FlaskClient

from pipeline.bridge import delivery, linger
from pipeline.bridge.delivery import Window, cut
from pipeline.commit_log import checkpoints
from pipeline.runtime import Runtime
from tests.conftest import Start, client_of
from tests.helpers import DAY_MS, FakePartner, Valkey, event, response, until


def post(client: FlaskClient, *events: dict[str, Any]) -> list[str]:
    answer = client.post("/api/ml/events/ingest", json=list(events))
    assert answer.status_code == 202, answer.json
    return [e["event_id"] for e in events]


def account(nexus: Runtime) -> Any:
    audit = checkpoints.audit(nexus.store)
    assert audit.unexplained == 0
    return audit.accounts["bridge"]


def delivered(nexus: Runtime) -> None:
    until(lambda: account(nexus).pending == 0, "the bridge's work")


def switch(client: FlaskClient, **settings: Any) -> None:
    assert client.patch("/api/ml/settings", json={"settings": settings}).status_code == 200


def test_event_is_sent_in_the_nested_shape_with_its_id_and_without_an_absent_location(nexus, client, partner):
    post(client, event("ride_request_response", "driver_1", event_id="a", response="accepted", driver_id="driver_1"))
    delivered(nexus)
    [sent] = partner.received
    assert sent == {
        "event_id": "a",
        "event_type": "ride_request_response",
        "user_id": "driver_1",
        "timestamp": sent["timestamp"],
        "app_version": "unknown",
        "device_type": "unknown",
        "data": {"response": "accepted"},
    }
    assert sent["timestamp"].endswith("Z")


def test_who_waits_for_a_delivery_waits_for_no_pause_after_a_small_window(monkeypatch, nexus, client, partner):
    monkeypatch.setattr(linger, "LEAST_S", 3_600.0)
    monkeypatch.setattr(linger, "MOST_S", 3_600.0)
    nexus.bridge._linger.look()
    for _ in range(3):
        post(client, event())
        assert nexus.bridge.wait_for(nexus.log.head().ordinal, 20.0)


def test_events_arrive_in_the_order_of_the_log_over_many_batches(nexus, client, partner):
    posted = [name for n in range(6) for name in post(client, *[event(user=f"u{n % 7}") for n in range(300)])]
    delivered(nexus)
    assert partner.ids == posted
    assert account(nexus).processed == 1800


def test_while_the_partner_is_away_ingest_and_the_other_streams_go_on_and_later_nothing_is_missing(
    nexus, client, partner
):
    partner.status = 503
    posted = post(client, *[event() for _ in range(50)])
    until(lambda: len(partner.requests) > 1, "tries")
    assert client.post("/api/ml/events/ingest?wait=features", json=(last := event())).json["applied"] is True
    health = client.get("/api/ml/events/ingest?check=health").json
    assert health["status"] == "degraded"
    assert health["streams"]["bridge"]["lag"] == 51
    partner.status = 200
    delivered(nexus)
    assert partner.ids == [*posted, last["event_id"]]


def test_partner_that_comes_up_later_is_found(start_nexus: Start, partner: FakePartner):
    nexus = start_nexus()
    client = client_of(nexus)
    posted = post(client, event(), event())
    until(lambda: client.get("/api/ml/bridge/python?action=health").json["status"] == "offline", "offline")
    switch(client, PYTHON_EVENT_API_URL=partner.url)
    delivered(nexus)
    assert partner.ids == posted
    until(lambda: client.get("/api/ml/bridge/python?action=health").json["status"] == "online", "online")


def test_answer_that_never_comes_is_a_timeout_and_the_events_are_sent_again(nexus, client, partner):
    switch(client, PYTHON_SERVICE_TIMEOUT=100)
    partner.gate.clear()
    posted = post(client, event(), event())
    until(lambda: client.get("/api/ml/bridge/attempts").json["attempts"], "an attempt")
    assert client.get("/api/ml/bridge/attempts").json["attempts"][0]["error"] == "timeout"
    partner.gate.set()
    delivered(nexus)
    assert list(dict.fromkeys(partner.ids)) == posted


def test_refused_event_is_a_dead_letter_with_the_partners_words_and_the_others_arrive(nexus, client, partner):
    partner.refuse = lambda e: "no such ride" if e["event_id"] == "bad" else None
    post(client, event(), event(event_id="bad"), event())
    delivered(nexus)
    assert (account(nexus).processed, account(nexus).dead, len(partner.received)) == (2, 1, 2)
    [letter] = client.get("/api/ml/dead-letters?stream=bridge").json["dead_letters"]
    assert letter["event"]["event_id"] == "bad"
    assert "no such ride" in letter["reason"]
    assert client.get("/api/ml/events/bad").json["streams"]["bridge"]["state"] == "dead"


def test_batch_that_is_refused_as_a_whole_is_divided_until_the_bad_event_is_alone(nexus, client, partner):
    def picky(path: str, body: bytes) -> tuple[int, Any]:
        if b'"bad"' in body:
            return 422, {"detail": "unprocessable"}
        partner.script.insert(0, picky)
        partner.status, kept = 200, partner.script.copy()
        partner.script.clear()
        answer = partner.answer(path, {}, body)
        partner.script[:] = kept
        return answer

    partner.script = [picky] * 40
    posted = post(client, *[event() for _ in range(7)], event(event_id="bad"), *[event() for _ in range(7)])
    delivered(nexus)
    assert sorted(partner.ids) == sorted(set(posted) - {"bad"})
    assert account(nexus).dead == 1


@pytest.mark.parametrize("supports", [None, []])
def test_partner_with_the_two_given_routes_alone_gets_event_by_event(start_nexus, partner, supports):
    partner.supports = supports
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    posted = post(client_of(nexus), *[event() for _ in range(5)])
    delivered(nexus)
    assert partner.ids == posted
    assert {path for path, _, _ in partner.requests} == {"/events"}


def test_pause_keeps_the_backlog_over_a_restart_and_resume_sends_it(start_nexus, partner):
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    client = client_of(nexus)
    assert client.post("/api/ml/bridge/python", json={"action": "pause"}).status_code == 200
    posted = post(client, event(), event())
    nexus.stop()
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    client = client_of(nexus)
    until(lambda: nexus.stream_states()["bridge"][0] == "paused", "paused")
    assert account(nexus).pending == 2
    assert partner.received == []
    client.post("/api/ml/bridge/python", json={"action": "resume"})
    delivered(nexus)
    assert partner.ids == posted


def test_windows_are_full_as_long_as_the_log_has_more(start_nexus, partner, monkeypatch):
    windows: list[Window] = []

    def noted(*given: Any) -> Window:
        windows.append(cut(*given))
        return windows[-1]

    monkeypatch.setattr(delivery, "cut", noted)
    monkeypatch.setattr(delivery, "READ_BYTES", 1 << 17)  # a step holds one frame, and a window events of two or three
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    client = client_of(nexus)
    client.post("/api/ml/bridge/python", json={"action": "pause"})
    posted = [event_id for _ in range(20) for event_id in post(client, *[event() for _ in range(300)])]
    nexus.bridge._log.drop_tail()  # as after a restart: the backlog is read from the store
    end = nexus.log.head().ordinal
    windows.clear()  # of a canary before the pause
    client.post("/api/ml/bridge/python", json={"action": "resume"})
    delivered(nexus)
    assert sorted(set(partner.ids).intersection(posted)) == sorted(posted)
    assert all(window.full for window in windows if window.after.ordinal < end)


def test_circuit_opened_by_hand_stays_open_until_it_is_reset(nexus, client, partner):
    client.post("/api/ml/bridge/python", json={"action": "open_circuit"})
    post(client, event())
    health = client.get("/api/ml/bridge/python?action=health").json
    assert health["circuit"]["state"] == "open"
    nexus.in_bridge(nexus.bridge.check_health())
    assert partner.received == []
    client.post("/api/ml/bridge/python", json={"action": "reset_circuit"})
    delivered(nexus)
    assert len(partner.received) == 1


def test_circuit_opens_after_failures_in_a_row_and_closes_again(nexus, client, partner):
    partner.status = 500
    post(client, event())
    until(
        lambda: client.get("/api/ml/bridge/python?action=health").json["circuit"]["state"] in ("open", "half_open"),
        "the circuit open",
    )
    partner.status = 200
    delivered(nexus)
    until(
        lambda: client.get("/api/ml/bridge/python?action=health").json["circuit"]["state"] == "closed",
        "the circuit closed",
    )


def test_switched_off_bridge_sends_nothing_and_switched_on_sends_all(nexus, client, partner):
    switch(client, ENABLE_PYTHON_BRIDGE=False)
    until(lambda: nexus.stream_states()["bridge"][0] == "paused", "paused")
    assert client.get("/api/ml/bridge/python?action=health").json["status"] == "disabled"
    posted = post(client, event(), event())
    assert client.get("/api/ml/events/ingest?check=health").json["streams"]["bridge"]["lag"] == 2
    assert partner.received == []
    switch(client, ENABLE_PYTHON_BRIDGE=True)
    delivered(nexus)
    assert partner.ids == posted


def test_restart_sends_what_was_not_committed_and_the_idempotency_key_tells_it_apart(
    own_server: Valkey, start_nexus, partner
):
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    post(client_of(nexus), event(event_id="a"))
    delivered(nexus)
    nexus.stop()
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    post(client_of(nexus), event(event_id="b"))
    delivered(nexus)
    assert partner.ids == ["a", "b"]
    assert all(headers.get("Idempotency-Key") for _, headers, _ in partner.requests)


def test_old_and_late_events_are_forwarded_with_their_own_time(nexus, client, partner):
    old = time.time_ns() // 1_000_000 - 400 * DAY_MS
    post(client, response(timestamp=old))
    delivered(nexus)
    assert partner.received[0]["timestamp"].startswith(time.strftime("%Y-%m-%dT", time.gmtime(old / 1000)))


def test_canary_of_a_partner_that_refuses_it_leaves_the_account_alone(start_nexus, partner):
    partner.supports = ["batch", "canary"]
    partner.refuse = lambda e: "no canaries" if e["event_type"] == "nexus.canary" else None
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    client = client_of(nexus)
    client.post("/api/ml/bridge/python", json={"action": "test_integration"})
    post(client, event(), event())
    delivered(nexus)
    found = account(nexus)
    assert (found.accepted, found.processed, found.dead) == (2, 2, 0)


def test_attempts_are_listed_newest_first(nexus, client, partner):
    for n in range(3):
        post(client, *[event() for _ in range(n + 1)])
        delivered(nexus)
    attempts = client.get("/api/ml/bridge/attempts").json["attempts"]
    assert sum(a["events"] for a in attempts) == 6
    assert all(a["status"] == 200 and a["error"] is None and a["latency_ms"] > 0 for a in attempts)
    assert [a["at"] for a in attempts] == sorted((a["at"] for a in attempts), reverse=True)
    assert json.dumps(attempts)
