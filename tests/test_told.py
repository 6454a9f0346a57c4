"""What nexus-ai.log tells of trouble: each change once, with its reason, however many attempts it takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import DeadLetter, Progress
from pipeline.commit_log.frames import Position
from pipeline.commit_log.lease import Lease
from pipeline.store import Store
from tests.conftest import Start, client_of, runtimes
from tests.faults import INGEST
from tests.helpers import NOON, FakePartner, Valkey, event, until
from tests.misbehaving import Misbehaving


@pytest.fixture
def start_own(own_server: Valkey, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Start]:
    """Starts instances on `own_server`; what they tell from INFO on is captured."""
    caplog.set_level(logging.INFO)
    yield from runtimes(own_server.url, tmp_path)


def told(caplog: pytest.LogCaptureFixture, about: str) -> list[tuple[str, str]]:
    """Level and message of what was told of something, oldest first."""
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.getMessage().startswith(about)]


def reasons(caplog: pytest.LogCaptureFixture, message: str) -> list[str]:
    return [vars(r)["reason"] for r in caplog.records if r.getMessage() == message]


def test_store_that_goes_and_comes_back_is_told_once_each_with_why(
    start_own: Start, own_server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    nexus = start_own()
    watch = nexus.serving.store_watch
    until(lambda: watch.status["status"] == "online", "the store to show as online")
    own_server.kill()
    looks = nexus.scheduler.jobs["snapshot"].runs
    until(lambda: nexus.scheduler.jobs["snapshot"].runs > looks + 2, "several looks at a store that is away")
    own_server.start()
    until(lambda: watch.status["status"] == "online" and nexus.runner.state == "running", "all to be back")

    online, away = ("INFO", "store is online"), ("WARNING", "store is offline")
    assert [line for line in told(caplog, "store is") if "loading" not in line[1]] == [online, away, online]
    assert "does not answer" in reasons(caplog, "store is offline")[0]


def test_pipeline_that_restarts_is_told_once_with_why_however_often_it_tries(
    start_own: Start, own_server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    nexus = start_own()
    own_server.kill()
    until(lambda: nexus.runner.state == "restarting", "the pipeline to notice")
    first = nexus.runner.detail
    until(lambda: nexus.runner.detail != first or "connecting" in str(first), "a further attempt")
    own_server.start()
    until(lambda: nexus.runner.state == "running", "the pipeline to run again")

    running, restarting = ("INFO", "pipeline is running"), ("WARNING", "pipeline is restarting")
    assert told(caplog, "pipeline is") == [running, restarting, running]
    assert "the store does not answer" in reasons(caplog, "pipeline is restarting")[0]


def test_lease_is_told_when_it_is_taken_lost_and_given_back_and_so_is_standing_by(
    store: Store, start_nexus: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = Lease(store, "other", None, lambda: False)
    assert other.take()
    nexus = start_nexus(wait_for="standby")
    other.release()
    until(lambda: nexus.runner.state == "running", "the pipeline to take over")
    assert Lease(store, "thief", None, lambda: True).take()
    until(lambda: nexus.runner.state == "standby", "the pipeline to stand by")
    nexus.stop()

    assert told(caplog, "lease was") == [
        ("INFO", "lease was taken"),  # by the other one
        ("INFO", "lease was given back"),
        ("INFO", "lease was taken"),
        ("INFO", "lease was taken"),  # by the thief
        ("WARNING", "lease was lost"),
    ]
    states = [message for _, message in told(caplog, "pipeline is")]
    assert [s for s in states if "restarting" not in s][:3] == [
        "pipeline is standby",
        "pipeline is running",
        "pipeline is standby",
    ]


def test_ingest_that_closes_and_opens_is_told_with_why(
    start_own: Start, own_server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    nexus = start_own()
    used = int(own_server.client.info("memory")["used_memory"])
    own_server.client.config_set("maxmemory", int(used / 0.95))
    until(lambda: nexus.ingest.closed, "ingest to close")
    looks = nexus.scheduler.jobs["snapshot"].runs
    until(lambda: nexus.scheduler.jobs["snapshot"].runs > looks + 1, "further looks")
    own_server.client.config_set("maxmemory", 0)
    until(lambda: told(caplog, "ingest is open"), "ingest to open")

    assert told(caplog, "ingest") == [("WARNING", "ingest is closed"), ("INFO", "ingest is open again")]
    assert "of the memory limit is used" in reasons(caplog, "ingest is closed")[0]


def test_circuit_that_opens_and_closes_is_told_once_each_whatever_is_probed_between(
    start_nexus: Start, partner: FakePartner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    partner.status = 500
    assert client_of(nexus).post(INGEST, json=event()).status_code == 202
    until(lambda: nexus.bridge.circuit.state != "closed", "the circuit to open")
    probes = len(partner.requests)
    until(lambda: len(partner.requests) > probes + 2, "further probes")
    partner.status = 200
    until(lambda: told(caplog, "outage is over"), "the outage to be over")

    assert told(caplog, "circuit is") == [("WARNING", "circuit is open"), ("INFO", "circuit is closed")]
    assert "500" in reasons(caplog, "circuit is open")[0]
    assert told(caplog, "partner") == [
        ("INFO", "partner is online"),
        ("WARNING", "partner is degraded"),
        ("INFO", "partner is online"),
    ]
    [over] = [vars(r) for r in caplog.records if r.getMessage() == "outage is over"]
    assert (over["queued"], over["delivered"], over["dead"], over["users"]) == (1, 1, 0, 1)
    assert over["away_s"] > 0
    assert "500" in over["reason"]


def test_partner_that_fails_without_traffic_is_told_when_it_goes_and_when_it_is_back(
    start_nexus: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = Misbehaving()
    server.supports = None  # no canaries either
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url)
    until(lambda: nexus.partner_status()["status"] == "online", "the partner online")
    server.leave()
    until(lambda: nexus.partner_status()["status"] == "offline", "the partner offline")
    nexus.in_bridge(nexus.bridge.check_health())
    nexus.in_bridge(nexus.bridge.check_health())
    server.listen()
    until(lambda: nexus.partner_status()["status"] == "online", "the partner online again")
    server.close()

    online, offline = ("INFO", "partner is online"), ("WARNING", "partner is offline")
    assert told(caplog, "partner") == [online, offline, online]
    assert reasons(caplog, "partner is offline")[0]


def test_bridge_that_cannot_work_is_told_once_with_why_and_that_it_goes_on(
    start_own: Start, own_server: Valkey, partner: FakePartner, caplog: pytest.LogCaptureFixture
) -> None:
    nexus = start_own(PYTHON_EVENT_API_URL=partner.url)
    until(lambda: nexus.bridge.state == "running", "the bridge to run")
    own_server.kill()
    until(lambda: nexus.bridge.state == "restarting", "the bridge to notice")
    first = nexus.bridge.detail
    until(lambda: nexus.bridge.detail != first or "connecting" in str(first), "a further attempt")
    own_server.start()
    until(lambda: told(caplog, "bridge goes on"), "the bridge to go on")

    assert told(caplog, "bridge") == [("WARNING", "bridge is restarting"), ("INFO", "bridge goes on")]
    assert "the store does not answer" in reasons(caplog, "bridge is restarting")[0]


def test_dead_letters_of_thousands_of_checkpoints_are_told_in_a_few_lines_that_count_them_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "_told", {})
    letter = DeadLetter("storage-1", "storage", 1, "odd", 3, NOON, NOON, "test", NOON, b"{}")
    for n in range(1_000):  # one in ten milliseconds
        checkpoints.tell_of_dead(Progress("storage", Position(), dead=[letter]), NOON + 10 * n)
    checkpoints.tell_of_dead(Progress("storage", Position(), dead=[letter]), NOON + 10_000)
    assert [vars(r)["events"] for r in caplog.records] == [1, 1_000]


def test_dead_letters_are_told_and_so_is_sending_them_again(
    start_nexus: Start, partner: FakePartner, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(checkpoints, "_told", {})
    partner.refuse = lambda event: "unknown driver" if event["user_id"] == "bad" else None
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    client = client_of(nexus)
    client.post(INGEST, json=[event(user=user) for user in ("bad", "good", "bad")])
    until(lambda: nexus.bridge.processed == 1, "the events through")
    client.post("/api/ml/dead-letters/redrive", json={"stream": "bridge"})

    dead, again = [vars(r) for r in caplog.records if "dead letters" in r.getMessage()][:2]
    assert (dead["levelname"], dead["message"]) == ("WARNING", "events are dead letters")
    assert (dead["stream"], dead["events"], dead["reason"]) == ("bridge", 2, "refused: unknown driver")
    assert (again["levelname"], again["message"]) == ("INFO", "dead letters were sent again")
    assert (again["stream"], again["events"], again["failed"], again["by"]) == ("bridge", 2, 0, "127.0.0.1")
