"""What was tried is told: the attempt log, its bounds and queries, and an event's own attempts in its receipt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline import keys
from pipeline.bridge import attempts
from pipeline.commit_log import checkpoints
from pipeline.errors import StoreUnavailable
from pipeline.runtime import Runtime, wall_clock
from tests import misbehaving as partners
from tests.bridging import run, settled, take
from tests.conftest import client_of, quick
from tests.helpers import HOUR_MS, event, until
from tests.misbehaving import Misbehaving


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving()
    yield made
    made.close()


def test_attempts_are_listed_newest_first_with_what_was_answered(start_nexus, server):
    nexus = run(start_nexus, server)
    take(nexus, event(), event())
    settled(nexus)
    server.on_post = partners.says(503, {"detail": "later"})
    take(nexus, event())
    until(lambda: nexus.bridge.errors_total >= 2, "failed attempts")
    server.on_post = partners.answer_well
    settled(nexus)
    client = client_of(nexus)
    rows = client.get("/api/ml/bridge/attempts").get_json()["attempts"]
    assert [row["at"] for row in rows] == sorted((row["at"] for row in rows), reverse=True)
    assert {"at", "events", "status", "latency_ms", "error"} <= rows[0].keys()
    assert (rows[0]["status"], rows[0]["error"]) == (200, None)
    failed = [row for row in rows if row["error"]]
    assert (failed[0]["status"], failed[0]["error"], failed[0]["events"]) == (503, "status", 1)
    assert "later" in failed[0]["detail"]
    assert len(client.get("/api/ml/bridge/attempts?limit=1").get_json()["attempts"]) == 1


def test_attempts_of_one_kind_of_error_or_status_are_asked_for(start_nexus, server):
    nexus = run(start_nexus, server)
    server.on_post = partners.says(503)
    take(nexus, event())
    until(lambda: nexus.bridge.errors_total >= 2, "failed attempts")
    server.on_post = partners.answer_well
    settled(nexus)
    client = client_of(nexus)

    def found(query: str) -> set[tuple[int | None, str | None]]:
        rows = client.get(f"/api/ml/bridge/attempts?{query}").get_json()["attempts"]
        return {(row["status"], row["error"]) for row in rows}

    assert found("") == {(503, "status"), (200, None)}
    assert found("error=status") == found("status=503") == found("status=503&error=status") == {(503, "status")}
    assert found("error=timeout") == found("status=200&error=status") == set()
    for query in ("error=none", "status=x", "status=20", "status=\u00b2\u00b2\u00b2", "status=\uff12\uff10\uff10"):
        assert client.get(f"/api/ml/bridge/attempts?{query}").status_code == 400


def test_the_attempt_log_is_bounded(start_nexus, server, monkeypatch):
    monkeypatch.setattr(attempts, "KEPT", 5)
    nexus = run(start_nexus, server)
    for _ in range(8):
        assert nexus.actions.send_batch({"events": [event()]})[0] == 200
    assert len(attempts.latest(nexus.store, 100)) == 5


def test_a_receipt_tells_the_attempts_and_the_partners_answer(start_nexus, server):
    server.supports = ("batch",)  # no canary in a call before it, behind which it would not be tried
    nexus = run(start_nexus, server)
    waits = event()
    server.on_post = partners.says(503, {"detail": "later"})
    take(nexus, waits)
    until(lambda: nexus.bridge.errors_total >= 2, "failed attempts")
    state = until(
        lambda: (s := nexus.lookups.receipt(waits["event_id"])["streams"]["bridge"])["state"] == "retrying" and s,
        "the event told to be retried",
    )
    assert (state["result"]["status"], state["result"]["error"]) == (503, "status")
    server.on_post = partners.answer_well
    settled(nexus)
    state = nexus.lookups.receipt(waits["event_id"])["streams"]["bridge"]
    assert state["state"] == "done"
    assert state["attempts"] >= 3
    assert (state["result"]["status"], state["result"]["events"]) == (200, 1)
    assert json.loads(state["result"]["answer"])["accepted"] == 1


def test_a_receipt_at_a_partner_without_batches_tells_the_events_own_call(start_nexus, server):
    server.supports, server.refuse = None, lambda e: e["user_id"] == "bad"
    nexus = run(start_nexus, server)
    good, bad, late = event(user="good"), event(user="bad"), event(user="late")
    server.on_post = lambda s, asked, answer: (
        answer.send(503) if asked.events[0]["user_id"] == "late" else partners.answer_well(s, asked, answer)
    )
    take(nexus, good, bad, event(user="good"), late, event(user="after"))

    def part(posted: dict[str, Any]) -> Any:
        return nexus.lookups.receipt(posted["event_id"])["streams"]["bridge"]

    until(lambda: part(late)["state"] == "retrying", "a try that failed")
    assert (part(late)["result"]["status"], part(late)["result"]["events"]) == (503, 1)
    rows = attempts.latest(nexus.store, 100)[::-1]
    assert [(row["events"], row["status"]) for row in rows[:4]] == [(1, 200), (1, 422), (1, 200), (1, 503)]
    server.on_post = partners.answer_well
    settled(nexus)
    assert (part(good)["state"], part(good)["attempts"], part(good)["result"]["status"]) == ("done", 1, 200)
    assert (part(bad)["state"], part(bad)["attempts"], part(bad)["result"]["status"]) == ("dead", 1, 422)


def test_an_event_behind_one_that_fails_has_not_been_tried(start_nexus, server):
    server.supports, server.on_post = None, partners.says(503)
    nexus = run(start_nexus, server)
    waits = [event() for _ in range(5)]
    take(nexus, *waits)
    until(lambda: attempts.latest(nexus.store, 1), "an attempt kept")
    state = nexus.lookups.receipt(waits[-1]["event_id"])["streams"]["bridge"]
    assert (state["state"], state["attempts"]) == ("pending", 0)


def test_an_older_call_that_ended_later_does_not_hide_an_events_own(store):
    body = b'{"event_id":"a","event_type":"t","user_id":"u1"}'
    own = attempts.Attempt(1005, 3, 200, 1.0, None, 55, 59)
    slow = attempts.Attempt(990, 3, None, 5000.0, "timeout", 50, 54)
    older = attempts.Attempt(900, 3, 200, 99.0, None, 0, 4)
    store.many(attempts.keep([older, own, slow]))  # in the order in which they ended
    store.many(attempts.keep([own]))  # kept once more: the first commit's answer was lost
    assert attempts.of_event(store, 55, body, 1000) == ([own], True)


def test_events_own_attempt_is_found_though_its_arrival_was_later_by_a_clock_that_was_ahead(store):
    body = b'{"event_id":"a","event_type":"t","user_id":"u1"}'
    mine = attempts.lane_of(body, 2)
    before = [attempts.Attempt(at, 1, 200, 1.0, None, at, at) for at in range(100)]
    own = attempts.Attempt(200, 5, 200, 1.0, None, 110, 119, mine, 2)
    beside = attempts.Attempt(199, 5, 200, 3.0, None, 100, 109, 1 - mine, 2)  # the window before, of another lane
    after = [attempts.Attempt(at, 1, 200, 1.0, None, at, at) for at in range(201, 211)]
    store.many(attempts.keep([*before, own, beside, *after]))
    assert attempts.of_event(store, 115, body, 3_600_000) == ([own], True)


def test_no_more_attempts_are_read_than_lie_before_an_events_arrival(store, monkeypatch):
    store.many(attempts.keep([attempts.Attempt(at, 1, 200, 1.0, None, at, at) for at in range(2_000)]))
    pages: list[Any] = []
    call = store.call

    def counted(*words: Any) -> Any:
        pages.append(words)
        return call(*words)

    monkeypatch.setattr(store, "call", counted)
    found, complete = attempts.of_event(store, 1_990, b'{"user_id":"u1"}', 1_990)
    assert ([a.first for a in found], complete, len(pages)) == ([1_990], True, 1)


def test_a_receipt_tells_the_partners_answer_after_the_clock_was_ahead(store_server, store, tmp_path, server):
    off = [0]
    nexus = Runtime(quick(store_server.url, tmp_path, PYTHON_EVENT_API_URL=server.url), lambda: wall_clock() + off[0])
    nexus.start()
    try:
        told = []
        for ahead in (0, HOUR_MS, 0):
            off[0] = ahead
            [sent] = take(nexus, event())
            settled(nexus)
            told.append(nexus.lookups.receipt(sent["event_id"])["streams"]["bridge"])
    finally:
        nexus.stop()
    assert [(state["state"], state["attempts"], state["result"]["status"]) for state in told] == [("done", 1, 200)] * 3


def test_what_a_commit_that_fails_was_to_keep_is_in_the_next_one(start_nexus, server, monkeypatch):
    failed: list[int] = []
    real = checkpoints.commit

    def fail_once(store: Any, epoch: int, commands: Any) -> None:
        words = list(commands)
        kept = {word[1] for word in words if len(word) > 1}
        if {keys.CAPABILITIES, keys.ATTEMPTS} & kept and len(failed) < 2:
            failed.append(len(words))
            raise StoreUnavailable("away for a moment")
        real(store, epoch, words)

    monkeypatch.setattr(checkpoints, "commit", fail_once)
    nexus = run(start_nexus, server)
    [sent] = take(nexus, event())
    settled(nexus)
    assert len(failed) == 2
    assert nexus.store.call("GET", keys.CAPABILITIES)
    state = nexus.lookups.receipt(sent["event_id"])["streams"]["bridge"]
    assert (state["state"], state["attempts"], state["result"]["status"]) == ("done", 1, 200)


def test_an_attempt_of_another_lane_is_not_the_events_own(store):
    body = b'{"event_id":"a","event_type":"t","user_id":"u1"}'
    mine = attempts.lane_of(body, 2)
    rows = [attempts.Attempt(10 + lane, 3, 200, 1.0, None, 0, 9, lane, 2) for lane in (0, 1)]
    store.many(attempts.keep(rows))
    found, complete = attempts.of_event(store, 5, body, 0)
    assert [a.lane for a in found] == [mine]
    assert complete
