"""Faults of streams and time: code that throws or hangs, frames that cannot be decoded, clocks that jump."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import ALL_STREAMS, CANARY
from pipeline.errors import StoreUnavailable
from pipeline.jobs import PIPELINE
from pipeline.log import Log
from pipeline.runtime import Runtime, wall_clock
from pipeline.store import Store
from pipeline.streams import runner as runner_module
from pipeline.streams import straggler as straggler_module
from pipeline.streams.aggregates import Aggregates
from pipeline.streams.storage import ROW, Storage
from pipeline.streams.stream import Outcome
from tests.conftest import Start, client_of, quick
from tests.faults import HEALTH, INGEST, Fault, Load, Send, recount, routes, settled, stored_events
from tests.helpers import LOCAL, Valkey, append, event, payment, report, until

Record = Callable[[str, object], None]


def sabotage(monkeypatch: pytest.MonkeyPatch, trouble: Callable[[Any], None]) -> None:
    """Have the aggregates stream call `trouble` with each event that it is given."""
    process = Aggregates.process

    def troubled(self: Aggregates, batch: Any, now: int) -> Any:
        for one in batch.events:
            trouble(one)
        return process(self, batch, now)

    monkeypatch.setattr(Aggregates, "process", troubled)


def throw_at_poison(one: Any) -> None:
    if one is not None and one.event_type == "poison":
        raise RuntimeError("a bug")


def accounts(send: Send) -> Any:
    return send("GET", HEALTH, None)[1]["streams"]


def steps_of(nexus: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pipeline's states from now on, each as it comes."""
    seen: list[str] = []
    turn = nexus.runner._turn

    def note(state: str, detail: str | None = None) -> None:
        seen.append(state)
        turn(state, detail)

    monkeypatch.setattr(nexus.runner, "_turn", note)
    return seen


def test_lasting_trouble_of_the_bridge_with_the_store_does_not_touch_the_local_streams(
    start_nexus: Start, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus = start_nexus()
    send = routes(client_of(nexus))
    steps, epoch = steps_of(nexus, monkeypatch), nexus.lease.epoch
    attempts: list[Exception] = []
    goes_on = nexus.bridge._trouble.goes_on

    def note(error: Exception) -> str:
        attempts.append(error)
        return goes_on(error)

    monkeypatch.setattr(nexus.bridge._trouble, "goes_on", note)
    store.many([("DEL", keys.CIRCUIT), ("RPUSH", keys.CIRCUIT, "no hash")])
    with Load(send) as load:
        until(lambda: len(attempts) >= 3, "the bridge to fail again and again")
        load.more(50)
    settled(send)
    assert (steps, nexus.lease.epoch) == ([], epoch)
    store.call("DEL", keys.CIRCUIT)
    assert recount(send, load.acknowledged) == (0, 0)


def test_unanswered_commit_of_the_bridge_is_fenced_off_and_the_local_streams_go_on(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus = start_nexus()
    send = routes(client_of(nexus))
    steps, epoch, commit = steps_of(nexus, monkeypatch), nexus.lease.epoch, checkpoints.commit
    lost: list[int] = []

    def lose(store: Store, epoch: int, commands: Any) -> None:
        commit(store, epoch, commands)
        if threading.current_thread().name == "bridge" and not lost:
            lost.append(epoch)
            raise StoreUnavailable("no answer", lost=True)

    settled(send)
    until(lambda: nexus.runner._group is not None and not nexus.runner._group.committing, "a pause")
    monkeypatch.setattr(checkpoints, "commit", lose)
    nexus.bridge.control("pause")
    nexus.bridge.control("resume")
    assert send("POST", INGEST, {"events": [event(), event()]})[0] == 202
    until(lambda: lost and nexus.lease.epoch > epoch, "the bridge to raise the epoch")
    assert all(worker.epoch == nexus.lease.epoch for worker in nexus.runner._threads)
    assert send("POST", INGEST, {"events": [event(), event()]})[0] == 202
    settled(send)
    assert steps == []


def test_code_that_throws_at_one_event_buries_that_event_alone(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    sabotage(monkeypatch, throw_at_poison)
    nexus = start_nexus()
    send = routes(client_of(nexus))
    began = time.monotonic()
    with Load(send) as load:
        poison = event("poison")
        assert send("POST", INGEST, {"events": [event(), poison, event()]})[0] == 202
        until(lambda: accounts(send)["aggregates"]["failed"] == 1, "the dead letter")
        until(lambda: nexus.runner.states()["aggregates"][0] == "running", "the stream to be back in the group")
        took_s = time.monotonic() - began

    settled(send)
    letters = send("GET", "/api/ml/dead-letters", None)[1]["dead_letters"]
    assert [(row["event"]["event_id"], row["stream"]) for row in letters] == [(poison["event_id"], "aggregates")]
    assert letters[0]["attempts"] == straggler_module.MAX_ATTEMPTS
    assert "a bug" in letters[0]["reason"]
    streams, total = accounts(send), len(load.acknowledged) + 3
    assert streams["aggregates"]["processed"] == total - 1
    assert all(streams[name]["processed"] == total for name in LOCAL if name != "aggregates")
    assert send("GET", HEALTH, None)[1]["unexplained"] == 0
    lost, doubled = recount(send, [*load.acknowledged, poison["event_id"]])
    assert (lost, doubled) == (0, 0)
    shows = "the event is a dead letter of that stream, with the error; the stream says behind meanwhile"
    Fault(record_property).seen("a stream throws at one event", shows, took_s, lost, doubled)


def test_canary_at_which_code_throws_is_passed_over_and_counts_nowhere(
    store: Store, start_nexus: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch, throw_at_poison)
    append(Log(store), [event("poison")], wall_clock(), to=ALL_STREAMS | CANARY)
    append(Log(store), [event()], wall_clock())

    send = routes(client_of(start_nexus()))

    until(lambda: accounts(send)["aggregates"]["processed"] == 1, "the event behind the canary")
    assert accounts(send)["aggregates"]["failed"] == 0
    assert send("GET", HEALTH, None)[1]["unexplained"] == 0


def test_code_that_throws_at_every_event_holds_its_stream_and_no_other_and_goes_on_once_mended(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    broken = threading.Event()
    broken.set()

    def throw(_: Any) -> None:
        if broken.is_set():
            raise RuntimeError("a bug")

    sabotage(monkeypatch, throw)
    nexus = start_nexus()
    send = routes(client_of(nexus))
    with Load(send) as load:
        until(lambda: nexus.runner.states()["aggregates"][0] == "failed", "the stream to show as failed")
        assert "a bug" in (nexus.runner.states()["aggregates"][1] or "")
        load.more(200)
        others = tuple(name for name in LOCAL if name != "aggregates")
        assert all(accounts(send)[name]["failed"] == 0 for name in others)
        broken.clear()
        began = time.monotonic()
        until(lambda: nexus.runner.states()["aggregates"][0] == "running", "the stream to be back in the group")
        took_s = time.monotonic() - began

    settled(send)
    dead = accounts(send)["aggregates"]["failed"]
    assert 0 < dead <= straggler_module.MAX_BAD_IN_A_ROW + 1  # then the stream was suspected, not the events
    assert (
        send("POST", "/api/ml/dead-letters/redrive", {"stream": "aggregates", "reason": "a bug"})[1]["redriven"] == dead
    )
    settled(send)
    assert accounts(send)["aggregates"]["failed"] == 0
    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "that stream says failed, with the error; the others go on; its first dead letters are sent again"
    Fault(record_property).seen("a stream throws at every event, then is mended", shows, took_s, lost, doubled)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Set at the end, so that threads that hang come to their end."""
    made = threading.Event()
    yield made
    made.set()


def test_code_that_hangs_at_one_event_is_replaced_and_the_event_buried(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch, release: threading.Event, record_property: Record
) -> None:
    monkeypatch.setattr(runner_module, "HANG_S", 0.5)

    def hang(one: Any) -> None:
        if one is not None and one.event_type == "poison":
            release.wait(60)

    sabotage(monkeypatch, hang)
    nexus = start_nexus()
    send = routes(client_of(nexus))
    with Load(send) as load:
        began = time.monotonic()
        poison = event("poison")
        assert send("POST", INGEST, {"events": [poison]})[0] == 202
        until(lambda: accounts(send)["aggregates"]["failed"] == 1, "the dead letter")
        until(lambda: nexus.runner.states()["aggregates"][0] == "running", "the stream to be back in the group")
        took_s = time.monotonic() - began
        release.set()  # the threads given up wake with what they had in hand, and write none of it
        load.more(100)

    settled(send)
    streams, total = accounts(send), len(load.acknowledged) + 1
    assert streams["aggregates"]["processed"] == total - 1
    assert all(streams[name]["processed"] == total for name in LOCAL if name != "aggregates")
    assert send("GET", HEALTH, None)[1]["unexplained"] == 0
    assert "hung" in send("GET", "/api/ml/dead-letters", None)[1]["dead_letters"][0]["reason"]
    lost, doubled = recount(send, [*load.acknowledged, poison["event_id"]])
    assert (lost, doubled) == (0, 0)
    shows = "the stream says behind; after the watchdog's time it is replaced, the event a dead letter"
    Fault(record_property).seen("a stream hangs at one event (watchdog at 0.5 s)", shows, took_s, lost, doubled)


@pytest.mark.parametrize("damage", ["version", "header"])
def test_a_frame_that_cannot_be_decoded_becomes_dead_letters_and_the_others_are_read(
    store: Store, start_nexus: Start, damage: str, record_property: Record
) -> None:
    log, now = Log(store), wall_clock()
    frames = [[event() for _ in range(4)] for _ in range(3)]
    taken = [append(log, events, now) for events in frames]
    offset = taken[1].address & 0xFFFFFF
    if damage == "version":
        store.call("SETRANGE", f"{keys.LOG}1", offset + 2, bytes([99]))
    else:
        store.call("SETRANGE", f"{keys.LOG}1", offset, b"garbage, and no frame of any version at all")

    began = time.monotonic()
    send = routes(client_of(start_nexus()))
    settled(send)
    took_s = time.monotonic() - began

    streams = accounts(send)
    assert all((streams[name]["processed"], streams[name]["failed"]) == (8, 4) for name in LOCAL)
    assert send("GET", HEALTH, None)[1]["unexplained"] == 0
    stored = [e["event_id"] for e in send("GET", "/api/ml/events", None)[1]["events"]]
    assert stored == [e["event_id"] for events in (frames[0], frames[2]) for e in events]
    lost, doubled = recount(send, [e["event_id"] for events in frames for e in events])
    assert (lost, doubled) == (4, 0)  # what stood in the frame is gone, and that is told
    shows = "its events are dead letters of every stream and cannot be recovered; the others are processed"
    what = {
        "version": "a frame of the log is of a version that nobody knows",
        "header": "a frame of the log is overwritten",
    }
    Fault(record_property).seen(f"{what[damage]} (4 events)", shows, took_s, lost, doubled, as_dead_letters=4)


def test_garbage_that_somebody_appends_to_the_log_hides_no_event(
    store: Store, start_nexus: Start, record_property: Record
) -> None:
    log, now = Log(store), wall_clock()
    first, second = [event()], [event()]
    append(log, first, now)
    store.call("APPEND", f"{keys.LOG}1", b"\x00garbage" * 9)
    append(log, second, now)

    send = routes(client_of(start_nexus()))
    began = time.monotonic()
    lost, doubled = recount(send, [first[0]["event_id"], second[0]["event_id"]])
    assert (lost, doubled) == (0, 0)
    shows = "a line in the log that names the place; all events are processed"
    Fault(record_property).seen("garbage was appended to the log", shows, time.monotonic() - began, lost, doubled)


@pytest.fixture
def jumpy(
    store_server: Valkey, store: Store, tmp_path: Path, scheduler_clock: list[float]
) -> Iterator[tuple[Runtime, list[float]]]:
    """A Nexus whose clock, its scheduler's too, is off by the first entry of a list, in seconds."""
    off = scheduler_clock
    nexus = Runtime(quick(store_server.url, tmp_path), lambda: wall_clock() + int(off[0] * 1000))
    nexus.start()
    until(lambda: nexus.runner.state == "running", "the pipeline to run")
    yield nexus, off
    nexus.stop()


def test_clock_that_jumps_back_and_forward_loses_nothing(
    jumpy: tuple[Runtime, list[float]], record_property: Record
) -> None:
    nexus, off = jumpy
    send = routes(client_of(nexus))
    began = time.monotonic()
    with Load(send) as load:
        for hours in (-3, 2, -1, 3):
            off[0] = hours * 3600.0
            load.more(100)
            settled(send)
            assert send("GET", HEALTH, None)[1]["unexplained"] == 0

    stored = stored_events(send)
    arrivals = [stored[event_id]["received_at"] for event_id in load.acknowledged]  # in the order of the log
    assert arrivals == sorted(arrivals)
    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "nothing; arrival times never run back"
    Fault(record_property).seen("the clock jumps by hours", shows, time.monotonic() - began, lost, doubled)


@pytest.mark.parametrize("hours", [-3, 3])
def test_clock_that_jumps_stops_no_job(hours: int, jumpy: tuple[Runtime, list[float]]) -> None:
    nexus, off = jumpy
    jobs = [job for job in nexus.scheduler.jobs.values() if job.every_s() <= 1 and job.name != PIPELINE]
    off[0] = hours * 3600.0
    wanted = [job.runs + 2 for job in jobs]
    until(lambda: all(job.runs >= runs for job, runs in zip(jobs, wanted, strict=True)), "further turns of all")


def test_payment_is_found_after_the_clock_was_days_ahead_for_a_moment(jumpy: tuple[Runtime, list[float]]) -> None:
    nexus, off = jumpy
    send = routes(client_of(nexus))
    off[0] = 3 * 86_400.0
    assert send("POST", INGEST, {"events": [event()]})[0] == 202
    off[0] = 0
    assert send("POST", INGEST, {"events": [payment("t-9")]})[0] == 202
    assert send("POST", INGEST, {"events": [report("t-9")]})[0] == 202
    settled(send)
    until(lambda: nexus.store.call("KEYS", keys.LABELS + "*"), "the checkpoint")

    status, found = send("GET", "/api/ml/predictions/fraud/t-9", None)
    assert (status, found["label"]) == (200, 1)


def test_event_that_a_stream_skips_is_unexplained_and_health_says_so(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped: list[str] = []
    process = Storage.process

    def skip_one(self: Storage, batch: Any, now: int) -> Outcome:
        outcome = process(self, batch, now)
        if not skipped and not batch.to & CANARY:
            skipped.append(batch.events[-1].event_id)
            self._pending.append(self._pending.pop()[: -ROW.itemsize])
            outcome.done -= 1
        return outcome

    monkeypatch.setattr(Storage, "process", skip_one)
    send = routes(client_of(start_nexus()))
    with Load(send) as load:
        load.more(100)

    settled(send)
    status, health = send("GET", HEALTH, None)
    assert (status, health["unexplained"], health["status"]) == (200, 1, "degraded")
    assert load.acknowledged.count(skipped[0]) == 1
    assert skipped[0] not in stored_events(send)
    lost, _ = recount(send, load.acknowledged)
    assert lost == 1
