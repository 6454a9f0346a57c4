"""The watch over the partner's health: what checks find, what real calls tell, what is kept, and who is left alone."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from unittest.mock import MagicMock

import msgspec
import pytest

from pipeline.bridge import health
from pipeline.bridge.health import Health
from pipeline.bridge.watch import Watch
from pipeline.runtime import Runtime
from tests import misbehaving as partners
from tests.bridging import TIMEOUT_MS, post, run, settled
from tests.conftest import Start, client_of
from tests.helpers import NOON, until
from tests.misbehaving import Misbehaving


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving()
    yield made
    made.close()


def test_health_history_outlives_a_rerun(start_nexus, server):
    first = run(start_nexus, server)
    until(lambda: health.history(first.store), "a verdict kept")
    since = until(lambda: first.bridge.status_since, "online since")
    first.stop()
    second = run(start_nexus, server)
    until(lambda: second.bridge.health and second.bridge.health.status == "online", "online")
    assert second.bridge.status_since == since
    assert second.bridge_health()["history"][-1]["status"] == "online"


@pytest.mark.parametrize(
    ("behave", "status", "words"),
    [
        (partners.says(200, {"status": "healthy"}), "online", None),
        (partners.says(200, {"status": "degraded"}), "degraded", "degraded"),
        (partners.says(404), "degraded", "404"),
        (partners.says(503), "offline", "503"),
        (partners.slow(0.3), "degraded", "slow"),
        (partners.hangs, "offline", "not answered"),
        (partners.drips, "offline", "not answered"),
    ],
    ids=["online", "says degraded", "404", "503", "slow", "hangs", "drips"],
)
def test_health_is_judged_by_status_latency_and_body(behave, status, words, start_nexus, server):
    if behave.__qualname__.startswith("slow"):

        def slowly(s, asked, answer):
            s.stopped.wait(0.3)
            partners.healthy(s, asked, answer)

        behave = slowly
    server.on_health = behave
    nexus = run(start_nexus, server)
    until(lambda: nexus.partner_status()["status"] == status, f"it is {status}")
    assert words is None or words in str(nexus.partner_status()["reason"])


def test_a_partner_that_takes_events_is_not_offline_whatever_its_health_answers(start_nexus, server):
    server.supports, server.on_health = None, partners.says(503)
    nexus = run(start_nexus, server)
    assert nexus.partner_status()["status"] == "offline"
    post(nexus, 3)
    settled(nexus)
    status = nexus.partner_status()
    assert (status["status"], status["reason"]) == ("degraded", "it takes events, but GET /health answered 503")
    nexus.in_bridge(nexus.bridge.check_health())
    assert nexus.partner_status()["status"] == "degraded"
    server.leave()
    nexus.in_bridge(nexus.bridge.check_health())
    assert nexus.partner_status()["status"] == "offline"


def test_what_real_calls_tell_of_it_is_in_the_history_that_is_kept(start_nexus, server):
    server.supports = ("batch",)
    first = run(start_nexus, server, HEALTH_CHECK_INTERVAL=600)
    server.on_post = partners.says(500)
    post(first, 1)
    until(lambda: first.partner_status()["status"] == "degraded", "noticed")
    server.on_post = partners.answer_well
    settled(first)
    until(lambda: first.partner_status()["status"] == "online", "online again")
    changes = first.bridge.watch.changes
    first.stop()
    second = run(start_nexus, server, HEALTH_CHECK_INTERVAL=600)
    until(lambda: second.bridge.watch.changes, "the history read")
    assert [c["status"] for c in changes] == ["online", "degraded", "online"]
    assert second.bridge.watch.changes == changes


def broken(nexus: Runtime, server: Misbehaving) -> None:
    """Its events fail, and the circuit is open."""
    server.on_post = partners.says(500)
    post(nexus, 3)
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    assert nexus.partner_status()["status"] == "degraded"


def test_a_circuit_that_is_reset_holds_nothing_against_the_partner_any_more(start_nexus, server):
    nexus = run(start_nexus, server)
    broken(nexus, server)
    server.on_post = partners.answer_well
    nexus.bridge.control("reset_circuit")
    settled(nexus)
    assert nexus.in_bridge(nexus.bridge.check_health()).status == "online"
    assert nexus.bridge_health()["reason"] is None


def test_a_reset_with_nothing_to_send_shows_what_the_last_check_found(start_nexus, server):
    nexus = run(start_nexus, server, HEALTH_CHECK_INTERVAL=600)
    broken(nexus, server)
    nexus.bridge.control("pause")  # so that no event can tell
    nexus.bridge.control("reset_circuit")
    assert (nexus.bridge_health()["status"], nexus.bridge_health()["reason"]) == ("online", None)


def test_a_circuit_that_a_health_check_closes_holds_nothing_against_the_partner_any_more(start_nexus, server):
    server.on_post = partners.slow(0.6 * TIMEOUT_MS / 1000)
    nexus = run(start_nexus, server, HEALTH_CHECK_INTERVAL=600)
    while nexus.bridge.circuit.state == "closed":
        post(nexus, 1)
        settled(nexus)
    assert "slow" in nexus.partner_status()["reason"]
    assert nexus.in_bridge(nexus.bridge.check_health()).status == "online"
    assert nexus.bridge.circuit.state == "closed"
    assert [c["status"] for c in nexus.bridge.watch.changes] == ["online", "degraded", "online"]


def test_of_a_new_address_nothing_is_said_that_the_old_one_did(start_nexus, server):
    nexus, mine = run(start_nexus, server, HEALTH_CHECK_INTERVAL=600), socket.socket()
    mine.bind(("127.0.0.1", 0))  # and listens never: nobody else can take the port meanwhile
    gone = f"http://127.0.0.1:{mine.getsockname()[1]}"
    other = Misbehaving(supports=None)
    other.on_health, held = partners.hangs, other.on_health
    nexus.live.change({"PYTHON_EVENT_API_URL": gone}, "a test", "test")
    post(nexus, 3)
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    assert gone in nexus.bridge_health()["reason"]
    nexus.live.change({"PYTHON_EVENT_API_URL": other.url, "PYTHON_SERVICE_TIMEOUT": 20_000}, "a test", "test")
    found = nexus.bridge_health()
    assert gone not in json.dumps({name: part for name, part in found.items() if name != "history"})
    assert (found["reason"], found["circuit"]["failures"], nexus.bridge.halted) == ("not asked yet", 0, None)
    predicted = client_of(nexus).post("/api/ml/predict", json={"model": "demand"}).get_json()
    assert "has not said yet whether it predicts: not asked yet" in predicted["python"]["error"]
    until(lambda: other.requests, "the new one asked")
    found = nexus.bridge_health()
    assert gone not in json.dumps({name: part for name, part in found.items() if name != "history"})
    other.on_health = held
    other.leave()
    other.listen()
    settled(nexus)
    until(lambda: nexus.partner_status()["status"] == "online", "the new one online")
    assert (nexus.bridge_health()["circuit"]["state"], nexus.bridge.state) == ("closed", "running")
    other.close()
    mine.close()


def test_a_call_that_fails_at_the_old_address_is_held_against_nobody_at_the_new_one(start_nexus, server):
    nexus, other = run(start_nexus, server, HEALTH_CHECK_INTERVAL=600, PYTHON_SERVICE_TIMEOUT=20_000), Misbehaving()
    server.on_post = partners.hangs
    post(nexus, 3)
    until(server.posts, "a call under way")
    nexus.live.change({"PYTHON_EVENT_API_URL": other.url}, "a test", "test")
    until(lambda: nexus.partner_status()["status"] == "online", "the new one asked")
    server.leave()
    settled(nexus)
    other.close()
    assert len(other.applied) == 3
    assert [c["status"] for c in nexus.bridge.watch.changes] == ["online"]
    assert (nexus.bridge.circuit.failures, nexus.bridge_health()["reason"]) == (0, None)


def test_a_circuit_left_open_at_another_address_is_tried_at_once_after_a_restart(start_nexus, server):
    first = run(start_nexus, server, HEALTH_CHECK_INTERVAL=600)
    server.leave()
    post(first, 3)
    until(lambda: first.bridge.circuit.state == "open", "the circuit open")
    first.stop()
    other = Misbehaving()
    second = run(start_nexus, other, HEALTH_CHECK_INTERVAL=600)
    assert server.url not in json.dumps([second.bridge_health()["circuit"], second.bridge_health()["reason"]])
    settled(second)
    assert second.bridge_health()["circuit"]["state"] == "closed"
    other.close()


def test_a_bridge_that_is_switched_off_calls_nobody(start_nexus: Start, server):
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url, ENABLE_PYTHON_BRIDGE="false")
    other = Misbehaving()
    until(lambda: nexus.stream_states()["bridge"][0] == "paused", "the bridge paused")
    nexus.live.change({"PYTHON_EVENT_API_URL": other.url}, "a test", "test")
    polled = nexus.bridge._polled
    until(lambda: nexus.bridge._polled > polled, "another look at the settings")
    assert not server.requests + other.requests
    nexus.live.change({"ENABLE_PYTHON_BRIDGE": True}, "a test", "test")
    until(lambda: nexus.partner_status()["status"] == "online", "asked")
    other.close()


def test_a_standby_keeps_nothing_that_it_may_not_write(start_nexus, server, tmp_path):
    run(start_nexus, server)
    standby = start_nexus(wait_for="standby", folder=tmp_path / "second", PYTHON_EVENT_API_URL=server.url)
    for _ in range(20):
        standby.in_bridge(standby.bridge.check_health())
    until(lambda: not standby.bridge._notes + standby.bridge.watch.commands(), "nothing kept")


def test_verdicts_that_cannot_be_kept_for_long_are_the_latest_ones(clock):
    watch = Watch(MagicMock(), clock, lambda _: None)
    for n in range(500):
        watch._note(Health("offline", None, "http://partner", NOON + n))
    kept = [msgspec.json.decode(entry)["at"] for _, _, entry, *_ in watch._notes if isinstance(entry, bytes)]
    assert kept == list(range(NOON + 400, NOON + 500))


@pytest.mark.parametrize("also_posts", [False, True])
def test_stopping_does_not_wait_for_a_partner_that_hangs(also_posts, start_nexus, server):
    server.on_health = partners.hangs
    if also_posts:
        server.on_health, server.on_post = partners.healthy, partners.hangs
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url, PYTHON_SERVICE_TIMEOUT=60_000)
    post(nexus, 10)
    until(lambda: server.posts() if also_posts else server.requests, "a call that hangs")
    server.on_health = partners.hangs
    began = time.monotonic()
    nexus.stop()
    assert time.monotonic() - began < 5.0
