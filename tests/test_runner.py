"""The runner: crashes between any two writes, a store that is away, restarts or is emptied, standby and takeover."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.commit_log import checkpoints
from pipeline.errors import StoreUnavailable
from pipeline.runtime import Runtime
from pipeline.store import Call
from tests.conftest import Start, client_of, runtimes
from tests.helpers import (
    LOCAL,
    FakePartner,
    Valkey,
    assert_counted_once,
    event,
    payment,
    report,
    response,
    until,
)


def now() -> int:
    return time.time_ns() // 1_000_000


def traffic(rounds: int = 1) -> list[dict[str, Any]]:
    """Events for all streams, of more users than one step of a checkpoint writes."""
    found: list[dict[str, Any]] = []
    for n in range(rounds):
        found += [response(f"driver_{i}") for i in range(120)]
        found += [payment(f"t-{n}-{i}", 50 + i, f"rider_{i}") for i in range(20)]
        found += [report(f"t-{n}-{i}", user=f"rider_{i}") for i in range(3)]
        found += [event("ride_request", "rider_1", location={"lat": 14.55, "lng": 121.02})]
    return found


def post(nexus: Runtime, events: list[dict[str, Any]]) -> None:
    answer = client_of(nexus).post("/api/ml/events/ingest", json=events)
    assert answer.status_code == 202, answer.json
    assert answer.json["accepted"] == len(events)


def settled(nexus: Runtime, streams: tuple[str, ...] = LOCAL) -> None:
    """Wait until the streams have nothing pending, checkpointed, and are running."""

    def quiet() -> bool:
        accounts = checkpoints.audit(nexus.store).accounts
        states = nexus.stream_states()
        return all(accounts[name].pending == 0 and states[name][0] == "running" for name in streams)

    until(quiet, "the streams' work")
    nexus.serving.refresh()


def get_of(nexus: Runtime) -> Callable[[str], Any]:
    client = client_of(nexus)
    return lambda path: client.get(path).json


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("nth", range(1, 7))
def test_crash_at_any_write_of_a_checkpoint_counts_nothing_twice(start_nexus, monkeypatch, nth, written):
    """The nth write fails: either nothing of it arrived, or all of it and only the answer was lost."""
    genuine, count = checkpoints.begin, 0

    def failing(*arguments: Any) -> Call:
        nonlocal count
        count += 1
        if count == nth:
            if written:
                genuine(*arguments).result()
            raise StoreUnavailable("the answer was lost")
        return genuine(*arguments)

    monkeypatch.setattr(checkpoints, "begin", failing)
    nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    posted = []
    for _ in range(2):
        posted += (more := traffic())
        post(nexus, more)
        settled(nexus)
    assert count > nth
    assert_counted_once(get_of(nexus), posted, now())


def test_stopped_and_started_again_goes_on_where_it_was(start_nexus):
    posted: list[dict[str, Any]] = []
    for _ in range(3):
        nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false")
        posted += (more := traffic())
        post(nexus, more)
        settled(nexus)
        assert_counted_once(get_of(nexus), posted, now())
        nexus.stop()


def test_stop_brings_everything_processed_into_the_store(start_nexus, monkeypatch):
    monkeypatch.setattr("pipeline.streams.worker.CHECKPOINT_S", 1000.0)
    monkeypatch.setattr("pipeline.streams.worker.IDLE_CHECKPOINT_S", 1000.0)
    nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    posted = traffic()
    post(nexus, posted)
    until(lambda: nexus.runner.processed("inference") == len(posted), "the work")
    monkeypatch.undo()
    nexus.stop()
    again = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    assert all(checkpoints.audit(again.store).accounts[name].processed == len(posted) for name in LOCAL)


def test_stop_while_the_partners_health_is_asked_for_is_no_error(start_nexus, partner, caplog):
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    until(lambda: nexus.bridge.health is not None, "a first check")
    partner.health_gate.clear()
    asked = partner.asked
    until(lambda: partner.asked > asked, "a check on its way")
    nexus.stop()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_news_that_come_while_nexus_stops_are_no_error(start_nexus):
    nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    nexus.stop()
    nexus.taken()
    nexus.stop()


def test_second_instance_stands_by_serves_and_takes_over(start_nexus):
    first = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    second = start_nexus("standby", ENABLE_PYTHON_BRIDGE="false")
    posted = traffic()
    post(second, posted)
    settled(first)
    assert client_of(second).get("/api/ml/features/driver_0").json["features"]["event_count_24h"] == 1
    assert client_of(second).get("/readyz").status_code == 200
    first.stop()
    until(lambda: second.runner.state == "running", "the takeover")
    posted += (more := traffic())
    post(second, more)
    settled(second)
    assert_counted_once(get_of(second), posted, now())


@pytest.fixture
def start_own(own_server: Valkey, tmp_path: Path) -> Iterator[Start]:
    """Starts instances on `own_server`."""
    yield from runtimes(own_server.url, tmp_path)


def test_store_that_is_killed_and_comes_back_is_survived_without_a_restart(own_server, start_own):
    nexus = start_own(ENABLE_PYTHON_BRIDGE="false")
    client = client_of(nexus)
    posted = traffic()
    post(nexus, posted)
    own_server.kill()
    refused = client.post("/api/ml/events/ingest", json=event())
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "store_unavailable")
    assert int(refused.headers["Retry-After"]) >= 1
    until(lambda: client.get("/readyz").status_code == 503, "not ready")
    own_server.start()
    more = traffic()
    until(lambda: client.post("/api/ml/events/ingest", json=more).status_code == 202, "ingest again")
    settled(nexus)
    assert_counted_once(get_of(nexus), posted + more, now())


def test_streams_of_before_a_crash_of_the_store_are_gone_though_they_were_frozen(own_server, start_own):
    """What has been frozen, as all that lives for long is, is never looked at by the cycle collector again."""
    nexus = start_own(ENABLE_PYTHON_BRIDGE="false")
    post(nexus, traffic())
    settled(nexus)
    before = [weakref.ref(nexus.stream(name)) for name in LOCAL]
    gc.freeze()
    for _ in range(3):
        post(nexus, traffic())  # so that a commit may be on its way
        own_server.kill()
        until(lambda: nexus.runner.state == "restarting", "the crash to be noticed")
        own_server.start()
        until(lambda: nexus.runner.state == "running" and nexus.stream("inference"), "running again")
        before += [weakref.ref(nexus.stream(name)) for name in LOCAL]
        gc.freeze()
    live = [nexus.stream(name) for name in LOCAL]
    until(lambda: all(stream() is None or stream() in live for stream in before), "the streams of before to be gone")


def test_store_that_is_emptied_is_begun_anew_without_a_restart(own_server, start_own, partner: FakePartner):
    nexus = start_own(PYTHON_EVENT_API_URL=partner.url)
    post(nexus, traffic(2))
    settled(nexus, (*LOCAL, "bridge"))
    own_server.client.flushall()
    until(lambda: own_server.client.exists("ml:{p}:owner"), "a lease in the emptied store")
    until(lambda: nexus.runner.state == "running", "running again")
    partner.received.clear()
    posted = traffic()
    post(nexus, posted)
    settled(nexus, (*LOCAL, "bridge"))
    assert_counted_once(get_of(nexus), posted, now())
    assert partner.ids == [e["event_id"] for e in posted]


def test_full_store_refuses_ingest_while_the_backlog_drains(own_server, start_own):
    nexus = start_own(ENABLE_PYTHON_BRIDGE="false")
    post(nexus, posted := traffic())
    own_server.client.config_set("maxmemory", 1)
    refused = client_of(nexus).post("/api/ml/events/ingest", json=event())
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "store_full")
    settled(nexus)
    own_server.client.config_set("maxmemory", 0)
    nexus.serving.refresh()
    assert_counted_once(get_of(nexus), posted, now())
    until(lambda: client_of(nexus).post("/api/ml/events/ingest", json=event()).status_code == 202, "ingest again")


def test_starting_while_the_store_is_away_waits_for_it(own_server, start_own):
    own_server.kill()
    nexus = start_own("restarting", ENABLE_PYTHON_BRIDGE="false")
    assert client_of(nexus).get("/api/ml/events/ingest?check=health").status_code == 503
    own_server.start()
    until(lambda: nexus.runner.state == "running", "running")
    post(nexus, posted := traffic())
    settled(nexus)
    assert_counted_once(get_of(nexus), posted, now())
