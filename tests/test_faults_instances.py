"""Faults of instances: two on one store, one that wakes after its lease, commits that are unanswered or come late."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import keys
from pipeline.commit_log import checkpoints, lease
from pipeline.commit_log.frames import Head, record
from pipeline.commit_log.lease import Lease
from pipeline.errors import Fenced, OutcomeUnknown
from pipeline.log import Log
from pipeline.store import Store
from tests.conftest import Start, client_of, runtimes
from tests.faults import HEALTH, INGEST, Fault, Load, Proxy, Send, recount, routes, settled, sha_of
from tests.helpers import Clock, Part, Valkey, clean_environment, event, free_port, until

Record = Callable[[str, object], None]


@pytest.fixture
def proxy(own_server: Valkey, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy before `own_server`."""
    made = Proxy(own_server.socket, tmp_path)
    yield made
    made.close()


@pytest.fixture
def start(proxy: Proxy, tmp_path: Path) -> Iterator[Start]:
    """Starts instances that reach the store through the proxy."""
    yield from runtimes(proxy.url, tmp_path)


@pytest.fixture
def instances(own_server: Valkey, tmp_path: Path) -> Iterator[list[Part]]:
    """Two instances as processes on one store, each with a data folder of its own."""
    parts = []
    for name in ("first", "second"):
        environment = clean_environment(
            REDIS_URL=own_server.url,
            NEXUS_PORT=str(port := free_port()),
            NEXUS_DATA_DIR=str(tmp_path / name),
            NEXUS_LOG_DIR=str(tmp_path / name / "logs"),
            ENABLE_PYTHON_BRIDGE="false",
        )
        parts.append(Part("app.py", port, environment, tmp_path / f"{name}.log"))
    yield parts
    for part in parts:
        for pid in part.children():
            signal_process(pid, signal.SIGCONT)
        part.close()


def signal_process(pid: int, sign: signal.Signals) -> None:
    os.kill(pid, sign)


def over_http(part: Part) -> Any:
    def send(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = part.http.request(method, path, json=body)
        return answer.status_code, answer.json()

    return send


def state_of(part: Part) -> str:
    return str(part.http.get(HEALTH).json()["streams"]["features"]["state"])


def test_a_standby_takes_over_from_a_stopped_instance_which_wakes_after_its_lease_and_writes_nothing(
    instances: list[Part], record_property: Record
) -> None:
    first, second = instances
    first.start("/readyz")
    until(lambda: state_of(first) == "running", "the first instance to run the pipeline")
    second.start("/readyz")
    until(lambda: state_of(second) == "standby", "the second instance to stand by")
    to_second = over_http(second)

    with Load(to_second) as load:  # the standby takes events and answers reads all the time
        load.more(200)
        assert second.http.get("/api/ml/events?limit=5").json()["events"]
        frozen = [*first.children(), first.process.pid if first.process else 0]
        began = time.monotonic()
        for pid in frozen:
            signal_process(pid, signal.SIGSTOP)  # what it has processed since its checkpoint is still to be written
        until(lambda: state_of(second) == "running", "the second instance to take over")
        took_s = time.monotonic() - began
        load.more(200)
        for pid in frozen:
            signal_process(pid, signal.SIGCONT)
        until(lambda: state_of(first) == "standby", "the first instance to notice that it was replaced")
        load.more(200)

    assert recount(to_second, load.acknowledged) == (0, 0)
    assert set(load.statuses) == {202}
    shows = "the standby took events and answered reads throughout; the woken one stood by"
    Fault(record_property).seen("an instance stopped past its lease, another stands by", shows, took_s, 0, 0)

    began = time.monotonic()
    for pid in second.children():
        signal_process(pid, signal.SIGKILL)  # so that it cannot give its lease back
    second.kill()
    until(lambda: state_of(first) == "running", "the first instance to take over again")
    took_s = time.monotonic() - began
    lost, doubled = recount(over_http(first), load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "requests to the other instance went on; its streams said standby, then running"
    Fault(record_property).seen("the writing instance killed, another stands by", shows, took_s, lost, doubled)


def test_a_commit_whose_answer_is_lost_counts_once(start: Start, proxy: Proxy, record_property: Record) -> None:
    nexus = start(ENABLE_PYTHON_BRIDGE="false")  # so that the commit is one of the pipeline
    send = routes(client_of(nexus))
    with Load(send) as load:
        proxy.swallow(sha_of(nexus.store, "commit"))
        assert proxy.struck.wait(20)
        began = time.monotonic()
        until(lambda: nexus.runner.state == "restarting", "the pipeline to notice")
        until(lambda: nexus.runner.state == "running", "the pipeline to run again")
        took_s = time.monotonic() - began
        load.more(100)

    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "streams say restarting for a moment; requests are answered"
    Fault(record_property).seen("the answer to a commit is lost", shows, took_s, lost, doubled)


def test_an_accept_whose_answer_is_lost_is_asked_for_again_and_told_as_what_it_was(
    start: Start, proxy: Proxy, record_property: Record
) -> None:
    nexus = start()
    send = routes(client_of(nexus))
    assert send("POST", INGEST, {"events": [event()]})[0] == 202  # the store knows the script from now on
    events = [event() for _ in range(3)]
    proxy.swallow(sha_of(nexus.store, "accept"))
    began = time.monotonic()

    status, body = send("POST", INGEST, {"events": [*events, {"event_type": "Bad"}]})
    took_s = time.monotonic() - began
    assert status == 202, body
    assert proxy.struck.is_set()
    assert (body["accepted"], body["duplicates"], len(body["rejected"])) == (3, 0, 1)
    totals = send("GET", HEALTH, None)[1]["totals"]
    assert (totals["accepted"], totals["duplicates"], totals["rejected"]) == (4, 0, 1)

    status, body = send("POST", INGEST, {"events": events})
    assert (status, body["accepted"], body["duplicates"]) == (202, 0, 3)
    lost, doubled = recount(send, [e["event_id"] for e in events])
    assert (lost, doubled) == (0, 0)
    shows = "nothing: the answer is asked for again, and comes a moment later"
    Fault(record_property).seen("the answer to an accept is lost", shows, took_s, lost, doubled)


@pytest.fixture
def impatient(proxy: Proxy, start: Start, monkeypatch: pytest.MonkeyPatch) -> Send:
    """The routes of an instance that soon gives up an answer of the store."""
    monkeypatch.setattr("pipeline.store._TIMEOUT_S", 0.5)
    monkeypatch.setattr("pipeline.log._INSIST_S", 0.0)
    return routes(client_of(start()))


@pytest.mark.parametrize("path", [INGEST, "/api/ml/bridge/python"], ids=["ingest", "send_batch"])
def test_events_whose_acceptance_was_never_answered_are_sent_again_by_the_ids_that_the_503_names(
    impatient: Send, proxy: Proxy, own_server: Valkey, path: str
) -> None:
    nameless = [{"event_type": "ghost", "user_id": "u"}, {"event_type": "Bad"}, event(event_id="mine")]
    status, body = impatient("POST", path, {"action": "send_batch", "events": [event(event_id="first")]})
    assert status in (200, 202), body  # the store knows the script from now on
    before = taken_by(own_server)
    proxy.hold_answers("ghost")
    status, body = impatient("POST", path, {"action": "send_batch", "events": nameless})
    assert (status, body["error"]["code"]) == (503, "outcome_unknown")
    made, rejected, given = body["error"]["details"]["event_ids"]
    assert (rejected, given) == (None, "mine")
    assert taken_by(own_server) == before + 2
    proxy.let_answers_go()

    named = [{**nameless[0], "event_id": made}, nameless[2]]

    def again() -> Any:
        status, body = impatient("POST", path, {"action": "send_batch", "events": named})
        return body if status < 300 else None

    assert until(again, "the store to answer again")["duplicates"] == 2
    assert taken_by(own_server) == before + 2


def taken_by(server: Valkey) -> int:
    """Events, canaries aside; asked at the store itself, not through the proxy."""
    head = Head.unpack(server.client.get(keys.HEAD))
    return head.accepted + head.bridge_only


@pytest.mark.parametrize(
    ("method", "path", "body", "mark"),
    [
        ("POST", "/api/ml/bridge/python", {"action": "pause"}, "HSETNX"),
        ("PATCH", "/api/ml/settings", {"settings": {"FEATURE_SYNC_INTERVAL": 60}}, "FEATURE_SYNC"),
    ],
    ids=["order", "setting"],
)
def test_an_order_whose_answer_is_lost_is_told_as_open(
    impatient: Send, proxy: Proxy, method: str, path: str, body: Any, mark: str
) -> None:
    assert impatient(method, path, body)[0] == 200
    proxy.hold_answers(mark)
    status, answer = impatient(method, path, body)
    assert (status, answer["error"]["code"]) == (503, "outcome_unknown")
    assert "ask again" in answer["error"]["message"]
    proxy.let_answers_go()


def test_a_redrive_whose_answer_is_lost_is_told_as_open(proxy: Proxy, own_server: Valkey) -> None:
    log = Log(Store(proxy.url))
    letters = [("storage", "storage-1", "app", record(0, b"{}"))]
    assert log.redrive(letters, 1) == [False]
    proxy.swallow(sha_of(log._store, "redrive"))
    with pytest.raises(OutcomeUnknown, match="ask again"):
        log.redrive(letters, 1)


def test_a_commit_that_arrives_after_its_sender_gave_up_writes_nothing(
    start: Start, proxy: Proxy, record_property: Record
) -> None:
    nexus = start(ENABLE_PYTHON_BRIDGE="false")  # so that the commit is one of the pipeline
    send = routes(client_of(nexus))
    with Load(send) as load:
        proxy.hold(sha_of(nexus.store, "commit"))
        assert proxy.struck.wait(20)
        began = time.monotonic()
        until(lambda: nexus.runner.state == "restarting", "the pipeline to notice")
        until(lambda: nexus.runner.state == "running", "the pipeline to run again")
        took_s = time.monotonic() - began
        load.more(50)
        settled(send)
        assert b"FENCED" in proxy.deliver()
        load.more(50)

    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "streams say restarting for a moment; requests are answered"
    Fault(record_property).seen("a commit reaches the store long after it was sent", shows, took_s, lost, doubled)


def test_two_instances_started_by_mistake_on_one_store_never_both_write(
    start: Start, own_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TTL_MS", 1_500)
    first = start(folder=tmp_path / "one")
    second = start("standby", folder=tmp_path / "two")
    send = routes(client_of(second))

    with Load(send) as load:
        load.more(300)
        assert second.runner.state == "standby"
    assert recount(send, load.acknowledged) == (0, 0)

    first.stop()  # in order: it gives its lease back
    until(lambda: second.runner.state == "running", "the second instance to take over")
    with Load(send) as more:
        more.more(100)
    assert recount(send, load.acknowledged + more.acknowledged) == (0, 0)


def test_an_instance_on_a_copy_of_the_folder_under_the_same_path_stands_by(start: Start, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    first = start()
    folder.rename(elsewhere)  # as another machine, or another container, has its own under that path
    shutil.copytree(elsewhere, folder)
    epoch = first.lease.epoch
    second = start("standby")

    settled(routes(client_of(first)))
    assert (first.runner.state, first.lease.epoch, second.lease.epoch) == ("running", epoch, 0)


def test_an_instance_on_the_folder_of_one_that_died_takes_over_at_once(
    start: Start, own_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TTL_MS", 600_000)
    (folder := tmp_path / "data").mkdir()
    store = Store(own_server.url)
    with (folder / "nexus.lock").open("w") as lock:
        died = Lease(store, lease.name_of(lock), None, lambda: False)
        assert died.take()
    nexus = start()  # and waits until it runs
    assert nexus.lease.epoch > died.epoch
    store.close()


def test_taking_the_lease_fences_off_every_commit_of_the_holder_before(store: Store, clock: Clock) -> None:
    holder, heir = (Lease(store, name, clock, lambda: False) for name in ("holder", "heir"))
    assert holder.take()
    assert not heir.take()
    clock.advance(lease.TTL_MS)
    assert heir.take()

    with pytest.raises(Fenced):
        checkpoints.commit(store, holder.epoch, [("SET", keys.PREFIX + "x", "written")])
    assert store.call("GET", keys.PREFIX + "x") is None
    assert not holder.renew()
    assert holder.epoch == 0


def test_an_epoch_of_before_the_store_was_emptied_never_returns(store: Store, clock: Clock) -> None:
    before = Lease(store, "before", clock, lambda: False)
    assert before.take()
    store.call("FLUSHALL")
    after = Lease(store, "after", clock, lambda: False)
    clock.advance(1)
    assert after.take()

    with pytest.raises(Fenced):
        checkpoints.commit(store, before.epoch, [("SET", keys.PREFIX + "x", "written")])


def test_a_holder_that_was_replaced_cannot_raise_its_epoch(store: Store, clock: Clock) -> None:
    holder, heir = (Lease(store, name, clock, lambda: False) for name in ("holder", "heir"))
    assert holder.take()
    clock.advance(lease.TTL_MS)
    assert heir.take()

    assert not holder.raise_epoch()
    assert holder.epoch == 0
    assert heir.renew()
