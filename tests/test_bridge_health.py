"""The watch over the partner's health: what checks find, what real calls tell, what is kept, and who is left alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pipeline import health
from tests import misbehaving as partners
from tests.bridging import post, run, settled
from tests.conftest import Start
from tests.helpers import until
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
