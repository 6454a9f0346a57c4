"""What the bridge keeps: circuit, outages, attempts, health, capabilities; over restarts and between instances."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

from pipeline import keys
from pipeline.bridge import outages
from pipeline.bridge.circuit import Circuit
from pipeline.bridge.delivery import cut
from pipeline.bridge.gate import Gate
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import Position
from pipeline.commit_log.lease import Lease
from pipeline.events import rfc3339
from pipeline.log import Log
from pipeline.runtime import Runtime, wall_clock
from pipeline.streams.bridge import Bridge
from tests import misbehaving as partners
from tests.conftest import Start, client_of
from tests.helpers import NOON, append, event, frames, until
from tests.misbehaving import Misbehaving


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving()
    yield made
    made.close()


def start(start_nexus: Start, server: Misbehaving, **more: Any) -> Runtime:
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url, PYTHON_SERVICE_TIMEOUT=500, **more)
    until(lambda: nexus.bridge.health is not None, "the first health check")
    return nexus


def post(nexus: Runtime, *events: dict[str, Any]) -> None:
    status, answer = nexus.ingest.post(json.dumps(events).encode(), "application/json", "", {})
    assert (status, answer["accepted"]) == (202, len(events))


def settled(nexus: Runtime) -> None:
    until(lambda: checkpoints.audit(nexus.store).accounts["bridge"].pending == 0, "an empty backlog")


def break_off(nexus: Runtime, server: Misbehaving) -> None:
    """The partner goes, and the bridge notices."""
    server.leave()
    post(nexus, *[event(user=f"u{i}") for i in range(30)])
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")


def test_an_open_circuit_and_its_outage_outlive_a_restart(start_nexus, server):
    first = start(start_nexus, server)
    break_off(first, server)
    opened_at = first.bridge.circuit.opened_at
    first.stop()
    second = start_nexus(PYTHON_EVENT_API_URL=server.url, PYTHON_SERVICE_TIMEOUT=500)
    until(lambda: second.bridge.circuit.opened_at == opened_at, "the circuit as it was")
    post(second, *[event(user=f"v{i}") for i in range(20)])
    server.listen()
    settled(second)
    row = until(lambda: (r := outages.rows(second.store, 1)[0])["caught_up"] and r, "the outage over")
    assert (row["queued"], row["delivered"], row["dead"], row["unexplained"]) == (50, 50, 0, 0)
    assert row["users"] == 50
    assert len(server.applied) == len(set(server.applied))


def test_a_probe_whose_process_was_killed_holds_nothing_up(start_nexus, server, store):
    now = wall_clock()
    left = Circuit(state="half_open", failures=9, opened_at=now - 60_000, probe_until=now + 61_000, pauses=9)
    store.call("HSET", keys.CIRCUIT, "state", msgspec.json.encode(left))
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url, PYTHON_SERVICE_TIMEOUT=20_000)
    post(nexus, event())
    until(lambda: server.applied, "the event delivered", 5.0)
    settled(nexus)
    assert nexus.bridge.circuit.state == "closed"


@pytest.mark.parametrize("held", [{"paused": True}, {"state": "half_open", "probe_until": 10**15}])
def test_lanes_that_may_not_send_look_four_times_a_second(held, store, clock, monkeypatch):
    live: Any = {"ENABLE_PYTHON_BRIDGE": True, "PYTHON_SERVICE_TIMEOUT": 10**15}
    guard, waits = Gate(store, live, clock, lambda: None), []
    guard.circuit = Circuit(**held)

    async def wait(what: Any, seconds: float) -> None:
        what.close()
        waits.append(seconds)
        if len(waits) == 3:
            guard.close()
        raise TimeoutError

    monkeypatch.setattr(asyncio, "wait_for", wait)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(guard.admission())
    assert waits == [0.25] * 3


def test_a_standby_shows_and_changes_the_same_circuit(start_nexus, server, tmp_path):
    leader = start(start_nexus, server)
    standby = start_nexus(wait_for="standby", folder=tmp_path / "second", PYTHON_EVENT_API_URL=server.url)
    standby.bridge.control("open_circuit")
    until(lambda: leader.bridge.circuit.forced, "the leader's circuit forced open")
    until(lambda: standby.bridge_health()["circuit"]["state"] == "open", "the standby's view")
    standby.bridge.control("reset_circuit")
    until(lambda: leader.bridge.circuit.state == "closed", "the leader's circuit reset")
    leader.bridge.control("pause")
    until(lambda: standby.bridge_health()["circuit"]["paused"], "the standby's view")
    standby.bridge.control("resume")
    until(lambda: not leader.bridge.circuit.paused, "the leader resumed")


def test_a_standby_knows_when_events_were_delivered(start_nexus, server, tmp_path):
    start(start_nexus, server)
    standby = start_nexus(wait_for="standby", folder=tmp_path / "second", PYTHON_EVENT_API_URL=server.url)
    until(lambda: standby.bridge.state == "standby", "the bridge standing by")
    status, answer = standby.actions.send_batch({"events": [event(), event()]})
    assert (status, answer["sent"], answer["queued"]) == (200, 2, 0)


def test_forced_open_stays_so_over_a_restart_until_it_is_reset(start_nexus, server):
    first = start(start_nexus, server)
    first.bridge.control("open_circuit")
    assert first.bridge.circuit.state == "open"
    first.stop()
    second = start(start_nexus, server)
    until(lambda: second.bridge.circuit.forced, "still forced open")
    status, answer = second.actions.send_batch({"events": [event()]})
    assert (status, answer["queued"]) == (202, 1)
    second.bridge.control("reset_circuit")
    settled(second)
    assert len(server.applied) == 1


def test_paused_keeps_the_backlog_and_resume_delivers_it(start_nexus, server):
    nexus = start(start_nexus, server)
    nexus.bridge.control("pause")
    post(nexus, event(), event())
    assert nexus.actions.send_batch({"events": [event()]})[0] == 202
    assert not server.applied
    nexus.bridge.control("resume")
    settled(nexus)
    assert len(server.applied) == 3


def test_since_when_it_is_paused_is_told_by_every_instance_and_after_a_restart(start_nexus, server, tmp_path):
    first = start(start_nexus, server)
    assert first.bridge_health()["circuit"]["paused_at"] is None
    before = wall_clock()
    first.bridge.control("pause")
    since = first.bridge_health()["circuit"]["paused_at"]
    assert rfc3339(before) <= since <= rfc3339(wall_clock())
    first.bridge.control("pause")  # it has been all the time
    assert first.bridge_health()["circuit"]["paused_at"] == since
    standby = start_nexus(wait_for="standby", folder=tmp_path / "second", PYTHON_EVENT_API_URL=server.url)
    until(lambda: standby.bridge_health()["circuit"]["paused_at"] == since, "the standby's view")
    first.stop()
    again = start(start_nexus, server)
    until(lambda: again.bridge_health()["circuit"]["paused_at"] == since, "paused since before the restart")
    again.bridge.control("resume")
    assert again.bridge_health()["circuit"]["paused_at"] is None


def test_an_idle_circuit_closes_by_a_health_check(start_nexus, server):
    nexus = start(start_nexus, server)
    server.refuse = lambda _: True
    server.on_post = partners.says(500)
    post(nexus, event())
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    server.on_post = partners.answer_well
    settled(nexus)
    until(lambda: nexus.bridge.circuit.state == "closed", "the circuit closed")


def test_capabilities_are_remembered_over_a_restart(start_nexus, server):
    first = start(start_nexus, server)
    until(lambda: first.store.call("GET", keys.CAPABILITIES), "capabilities kept")
    first.stop()
    server.on_health = partners.says(500)
    second = start(start_nexus, server)
    post(second, event(), event())
    settled(second)
    assert {asked.path for asked in server.posts()} == {"/events/batch"}


def test_a_partner_address_set_at_run_time_is_used_at_once(start_nexus, server):
    nexus = start(start_nexus, server)
    other = Misbehaving(supports=None)
    nexus.live.change({"PYTHON_EVENT_API_URL": other.url}, "a test", "test")
    post(nexus, event())
    settled(nexus)
    other.close()
    assert (len(server.applied), len(other.applied)) == (0, 1)


@pytest.mark.parametrize("answers", [partners.says(500), partners.answer_well])
def test_a_call_to_the_address_before_tells_nothing_of_the_one_in_force(start_nexus, server, answers):
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url, PYTHON_SERVICE_TIMEOUT=20_000)
    until(lambda: nexus.bridge.health is not None, "the first health check")
    other, asked, changed = Misbehaving(), threading.Event(), threading.Event()

    def answer(*given: Any) -> None:
        asked.set()
        changed.wait()
        answers(*given)

    server.on_post = answer
    post(nexus, posted := event())
    asked.wait()
    nexus.live.change({"PYTHON_EVENT_API_URL": other.url}, "a test", "test")
    changed.set()
    settled(nexus)
    other.close()
    assert {*server.applied, *other.applied} == {
        posted["event_id"]
    }  # perhaps at both: the call is freed, and made again
    assert (nexus.bridge.errors_total, nexus.bridge.circuit.failures) == (0, 0)


def test_switched_off_nothing_is_sent_and_switched_on_all_is(start_nexus, server):
    nexus = start(start_nexus, server)
    nexus.live.change({"ENABLE_PYTHON_BRIDGE": False}, "a test", "test")
    post(nexus, event())
    assert nexus.partner_status()["status"] == "disabled"
    assert nexus.actions.send_batch({"events": [event()]})[0] == 202
    assert not server.applied
    nexus.live.change({"ENABLE_PYTHON_BRIDGE": None}, "a test", "test")
    settled(nexus)
    assert len(server.applied) == 2


def test_dead_letters_of_the_partner_are_sent_again(start_nexus, server):
    nexus = start(start_nexus, server)
    server.refuse = lambda e: e["data"].get("bad") == 1
    bad = event(data={"bad": 1})
    post(nexus, event(), bad, event())
    settled(nexus)
    assert nexus.lookups.receipt(bad["event_id"])["streams"]["bridge"]["state"] == "dead"
    server.refuse = lambda _: False
    client = client_of(nexus)
    answer = client.post("/api/ml/dead-letters/redrive", json={"stream": "bridge", "reason": "have this one"})
    assert answer.get_json()["redriven"] == 1
    settled(nexus)
    until(lambda: bad["event_id"] in server.applied, "the event delivered after all")
    state = nexus.lookups.receipt(bad["event_id"])["streams"]["bridge"]
    assert (state["state"], state["attempts"]) == ("done", 2)
    assert checkpoints.audit(nexus.store).unexplained == 0


def test_the_periodic_canary_takes_the_whole_path_and_counts_nowhere(start_nexus, server):
    nexus = start(start_nexus, server)
    latest = until(lambda: nexus.actions.canary.latest, "a canary")
    assert latest["success"], latest
    assert [s["name"] for s in latest["steps"]] == [
        "ingest", "features", "storage", "aggregates", "inference", "bridge", "combined_features",
    ]  # fmt: skip
    until(lambda: server.canaries, "a canary at the partner")
    audit = checkpoints.audit(nexus.store)
    assert (audit.head.accepted, audit.accounts["bridge"].processed, audit.unexplained) == (0, 0, 0)
    assert until(lambda: json.loads(nexus.serving.feed(False)).get("canary"), "the canary in the feed")["success"]


def test_a_standby_sends_no_canaries(start_nexus, server, tmp_path):
    first = start(start_nexus, server)
    standby = start_nexus("standby", tmp_path / "second", PYTHON_EVENT_API_URL=server.url)
    assert standby.actions.canary.periodic() is None
    assert first.actions.canary.periodic() is not None


def test_canaries_do_not_go_to_a_partner_that_does_not_say_it_takes_them(start_nexus, server):
    server.supports = None
    nexus = start(start_nexus, server)
    latest = until(lambda: nexus.actions.canary.latest, "a canary")
    assert latest["success"], latest
    assert not server.posts()
    assert nexus.actions.test_integration()[1]["success"]
    assert len(server.posts()) == 1


@pytest.mark.parametrize(
    ("halt", "why"),
    [("pause", "paused by hand"), ("open_circuit", "opened by hand"), (None, "switched off")],
)
def test_the_integration_test_of_a_partner_without_canaries_fails_where_the_bridge_is_halted_and_calls_nobody(
    halt, why, start_nexus, server
):
    server.supports = None
    nexus = start(start_nexus, server)
    if halt is None:
        nexus.live.change({"ENABLE_PYTHON_BRIDGE": False}, None, "test")
    else:
        nexus.bridge.control(halt)
    answer = nexus.actions.test_integration()[1]
    [step] = [s for s in answer["steps"] if s["name"] == "bridge"]
    assert (answer["success"], step["ok"], server.posts()) == (False, False, [])
    assert why in step["detail"]


@pytest.mark.parametrize("change", ["PYTHON_EVENT_API_URL", "PYTHON_SERVICE_TIMEOUT"])
def test_events_in_a_call_that_hangs_are_sent_again_at_once_after_a_change_of_address_or_of_the_timeout(
    change, start_nexus, server
):
    other = Misbehaving()
    server.on_post = partners.hangs
    nexus = start(start_nexus, server)
    nexus.live.change({"PYTHON_SERVICE_TIMEOUT": 600_000}, None, "test")
    post(nexus, event())
    until(server.posts, "the call that hangs")
    server.on_post = partners.answer_well
    nexus.live.change({change: other.url if change == "PYTHON_EVENT_API_URL" else 500}, None, "test")
    settled(nexus)
    assert [len(server.applied), len(other.applied)] == ([0, 1] if change == "PYTHON_EVENT_API_URL" else [1, 0])
    other.close()


def test_the_integration_test_of_a_partner_without_canaries_fails_where_the_backlog_does_not_move(start_nexus, server):
    server.supports = None
    server.on_post = lambda s, asked, answer: (
        partners.answer_well if asked.events[0]["event_type"] == "nexus.canary" else partners.says(404)
    )(s, asked, answer)
    nexus = start(start_nexus, server)
    post(nexus, event())
    until(lambda: nexus.bridge.errors_total > 2, "failures")
    answer = nexus.actions.test_integration()[1]
    [step] = [s for s in answer["steps"] if s["name"] == "bridge"]
    assert (answer["success"], step["ok"]) == (False, False)
    assert "sent directly, answered 200, but the backlog does not move" in step["detail"]
    server.on_post = partners.answer_well
    settled(nexus)
    assert nexus.actions.test_integration()[1]["success"]


def test_a_canary_that_the_partner_refuses_fails_its_hop_and_is_no_dead_letter(start_nexus, server):
    nexus = start(start_nexus, server)
    server.refuse = lambda _: True
    steps = {s["name"]: s for s in nexus.actions.test_integration()[1]["steps"]}
    assert not steps["bridge"]["ok"]
    assert "will not have" in steps["bridge"]["detail"]
    assert checkpoints.audit(nexus.store).accounts["bridge"].dead == 0


def test_send_batch_says_what_was_sent_queued_and_refused(start_nexus, server):
    nexus = start(start_nexus, server)
    server.refuse = lambda e: e["user_id"] == "bad"
    status, answer = nexus.actions.send_batch({"events": [event(), {"user_id": "x"}, event(user="bad"), event()]})
    assert (status, answer["sent"], answer["queued"]) == (200, 2, 0)
    assert [(r["index"], r["code"]) for r in answer["rejected"]] == [(1, "missing"), (2, "refused_by_python")]
    break_off(nexus, server)
    status, answer = nexus.actions.send_batch({"events": [event(), event()]})
    assert (status, answer["sent"], answer["queued"]) == (202, 0, 2)
    server.listen()
    settled(nexus)
    assert set(answer["event_ids"]) <= set(server.applied)
    audit = checkpoints.audit(nexus.store)
    assert (audit.accounts["features"].accepted, audit.unexplained) == (30, 0)


def test_events_sent_again_while_they_wait_are_told_to_be_queued(start_nexus, server):
    nexus = start(start_nexus, server)
    nexus.bridge.control("pause")
    events = [event(), event()]
    assert nexus.actions.send_batch({"events": events})[0] == 202
    status, answer = nexus.actions.send_batch({"events": [*events, event(), events[0]]})
    assert (status, answer["sent"], answer["queued"], answer["duplicates"]) == (202, 0, 3, 3)
    nexus.bridge.control("resume")
    settled(nexus)
    status, answer = nexus.actions.send_batch({"events": events})
    assert (status, answer["sent"], answer["queued"], answer["duplicates"]) == (200, 0, 0, 2)


def test_hybrid_process_tells_events_sent_again_while_they_wait_to_be_queued(start_nexus, server):
    nexus = start(start_nexus, server)
    nexus.bridge.control("pause")
    events = [event(user="u1"), event(user="u2")]
    assert nexus.actions.hybrid_process({"events": events})[1]["python"]["queued"] == 2
    answer = nexus.actions.hybrid_process({"events": [*events, event(user="u3"), events[0]]})[1]
    assert (answer["degraded"], answer["duplicates"], answer["python"]["queued"]) == (True, 3, 3)
    nexus.bridge.control("resume")
    settled(nexus)
    answer = nexus.actions.hybrid_process({"events": events})[1]
    assert (answer["degraded"], answer["duplicates"], answer["python"]["queued"]) == (False, 2, 0)


def taken(log: Log, users: range) -> Progress:
    """Events of these users are in the log, in frames of ten, and delivered."""
    for first in users[::10]:
        append(log, [event(user=f"u{i}") for i in range(first, first + 10)], NOON)
    return Progress("bridge", frames(log)[-1].after(), len(users))


def test_users_of_an_outage_are_counted_in_pieces_and_what_is_delivered_meanwhile_is_none_of_it(
    store, log, monkeypatch
):
    monkeypatch.setattr(outages, "PIECE_BYTES", 5_000)
    ledger = outages.Ledger(store, log)
    store.many(ledger.opened("away", NOON))
    done = taken(log, range(300))
    store.many([*ledger.closed(NOON), *ledger.progressed(done)])
    with monkeypatch.context() as patched:
        patched.setattr(log, "read", read := MagicMock(side_effect=log.read))
        assert store.many(ledger.settle(done.position.ordinal, NOON + 1)) == [True]
    assert (read.call_count, ledger.counting) == (1, True)
    store.many([*ledger.progressed(taken(log, range(300, 310)))])
    again = outages.Ledger(store, log)  # a restart meanwhile
    again.load()
    for looked in range(1_000):
        store.many(again.settle(310, NOON + 2 + looked))
        if not again.counting:
            break
    [row] = outages.rows(store, 5)
    assert looked > 5
    assert row["users"] == pytest.approx(300, rel=0.05)
    assert (row["delivered"], row["unexplained"], row["caught_up"]) == (300, 0, rfc3339(NOON + 1))


def test_users_of_an_outage_end_exactly_where_its_backlog_does(store, log):
    ledger = outages.Ledger(store, log)
    store.many(ledger.opened("away", NOON))
    done = taken(log, range(20))
    store.many([*ledger.closed(NOON), *ledger.progressed(done)])
    taken(log, range(20, 40))
    store.many(ledger.settle(done.position.ordinal, NOON + 1))
    assert outages.rows(store, 1)[0]["users"] == 20


def test_deliveries_of_an_outage_end_where_its_backlog_does_also_where_those_behind_are_done_too(store, log, clock):
    lease = Lease(store, "test", clock, lambda: True)
    assert lease.take()
    bridge = Bridge(store, log, lease, MagicMock(), MagicMock(), clock, MagicMock())
    bridge._begin(lease.epoch, Position())
    store.many(bridge.ledger.opened("away", NOON))
    taken(log, range(10))
    store.many(bridge.ledger.closed(NOON))
    taken(log, range(10, 20))
    waiting, position = deque(frames(log)), Position()
    while waiting:
        window = cut(waiting, position, 1, 10, False)
        window.unfinished, position = 0, window.after
        bridge._windows.append(window)
    for _ in range(2):
        bridge._flush()
    [row] = outages.rows(store, 5)
    assert (row["queued"], row["delivered"], row["unexplained"]) == (10, 10, 0)
    assert (bridge.ordinal, bridge.processed) == (20, 20)


def test_an_outage_that_begins_while_the_users_of_the_last_are_counted_is_its_own(store, log, monkeypatch):
    monkeypatch.setattr(outages, "PIECE_BYTES", 5_000)
    ledger = outages.Ledger(store, log)
    store.many(ledger.opened("away", NOON))
    done = taken(log, range(300))
    store.many([*ledger.closed(NOON), *ledger.progressed(done)])
    store.many([*ledger.settle(300, NOON + 1), *checkpoints.advance(done, NOON)])
    store.many(ledger.opened("away again", NOON + 2))
    newest, older = outages.rows(store, 5)
    assert (newest["reason"], newest["users"], newest["relapses"]) == ("away again", 0, 0)
    assert (older["unexplained"], older["relapses"]) == (0, 0)
    assert older["users"] == pytest.approx(300, rel=0.05)


def test_hybrid_process_answers_degraded_while_the_partner_is_away(start_nexus, server):
    nexus = start(start_nexus, server)
    good = nexus.actions.hybrid_process({"events": [event(user="u1")]})[1]
    assert (good["success"], good["degraded"], good["python"]["processed"]) == (True, False, 1)
    assert good["python"]["error"] is None
    break_off(nexus, server)
    status, answer = nexus.actions.hybrid_process({"events": [event(user="u1"), event(user="u2")]})
    assert status == 200
    assert (answer["success"], answer["degraded"]) == (True, True)
    assert answer["typescript"]["processed"] == 2
    assert answer["typescript"]["features"].keys() == {"u1", "u2"}
    assert (answer["python"]["processed"], answer["python"]["queued"]) == (0, 2)
    assert answer["python"]["error"]


def test_hybrid_process_asks_for_the_features_that_a_busy_partner_has_not_published_yet(start_nexus, server):
    def publish_when_asked(server: Misbehaving, asked: partners.Asked, answer: partners.Answer) -> None:
        _, _, user = asked.path.partition("/features/")
        if not user:
            return partners.healthy(server, asked, answer)
        found = {"user_id": user, "features": {"theirs": 7}, "computed_at": rfc3339(wall_clock())}
        nexus.store.call("SET", f"features:{user}", json.dumps(found))
        return answer.send(200, found)

    server.supports = ("batch", "features")
    nexus = start(start_nexus, server)
    server.on_health = publish_when_asked
    answer = nexus.actions.hybrid_process({"events": [event(user=f"u{i}") for i in range(50)]})[1]
    assert (answer["success"], answer["degraded"]) == (True, False)
    assert [found["theirs"] for found in answer["combined_features"].values()] == [7] * 50


def test_hybrid_process_is_degraded_where_the_partner_refused_every_event(start_nexus, server):
    nexus = start(start_nexus, server)
    server.refuse = lambda e: e["data"].get("bad") == 1
    answer = nexus.actions.hybrid_process({"events": [event(data={"bad": 1}), event(data={"bad": 1})]})[1]
    assert (answer["success"], answer["degraded"], answer["python"]["processed"]) == (True, True, 0)
    assert "I will not have this one" in answer["python"]["error"]
    answer = nexus.actions.hybrid_process({"events": [event(data={"bad": 1}), event()]})[1]
    assert (answer["degraded"], answer["python"]["processed"], answer["python"]["error"]) == (False, 1, None)


def test_outages_are_listed_newest_first_by_their_route(start_nexus, server):
    nexus = start(start_nexus, server)
    client = client_of(nexus)
    for _ in range(2):
        break_off(nexus, server)
        rows = until(
            lambda: (
                (found := client.get("/api/ml/bridge/outages").get_json()["outages"])
                and found[0]["ended"] is None
                and found
            ),
            "the outage listed",
        )
        assert rows[0]["caught_up"] is None
        server.listen()
        settled(nexus)
        until(lambda: client.get("/api/ml/bridge/outages").get_json()["outages"][0]["caught_up"], "the outage over")
    rows = client.get("/api/ml/bridge/outages").get_json()["outages"]
    assert len(rows) == 2
    assert rows[0]["began"] > rows[1]["began"]
    assert {"began", "ended", "reason", "queued", "users", "delivered", "dead", "caught_up"} <= rows[0].keys()


def test_a_partner_that_falls_again_while_it_catches_up_makes_one_outage(start_nexus, server):
    nexus = start(start_nexus, server)
    break_off(nexus, server)
    server.on_post = lambda s, asked, answer: (
        partners.answer_well(s, asked, answer) if len(s.applied) < 10 else answer.send(500)
    )
    server.supports = None
    server.listen()
    until(lambda: len(server.applied) >= 10, "some delivered")
    calls = len(server.posts())
    until(lambda: len(server.posts()) > calls + 6, "more tries that fail")
    server.on_post = partners.answer_well
    settled(nexus)
    row = until(lambda: (r := outages.rows(nexus.store, 5)[0])["caught_up"] and r, "the outage over")
    assert (row["unexplained"], row["delivered"]) == (0, row["queued"])
    assert len(server.applied) == len(set(server.applied)) == 30
