"""Retention: what it lets go of and when, by arrival and for want of memory, and never what a stream has yet to read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from pipeline import keys
from pipeline import log as log_module
from pipeline.commit_log import checkpoints, retention
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import Position
from pipeline.commit_log.lease import Lease
from pipeline.commit_log.retention import Retention
from pipeline.errors import Fenced
from pipeline.events import rfc3339
from pipeline.log import Log, Request
from pipeline.operations.standing import BRIDGE_OFF
from pipeline.operations.store_watch import REFUSE_AT
from pipeline.runtime import Runtime
from pipeline.store import Store
from tests.conftest import Start, client_of, runtimes
from tests.faults import HEALTH, INGEST, routes, settled
from tests.helpers import (
    HOUR_MS,
    MINUTE_MS,
    NOON,
    STREAMS,
    Clock,
    FakePartner,
    Valkey,
    append,
    event,
    frames,
    parsed,
    payment,
    report,
    until,
)

EVENTS, APART_MS = 24, HOUR_MS // 4
END = NOON + EVENTS * APART_MS  # six hours of events lie before it
FULL = retention.TRIM_AT + 0.05


@pytest.fixture
def lease(store: Store) -> Lease:
    held = Lease(store, "test", Clock(NOON), lambda: True)
    assert held.take()
    return held


@pytest.fixture
def filled(store: Store, log: Log, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> Log:
    """A log with an event every quarter of an hour, two to a segment, which every stream has read."""
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 600)
    for n in range(EVENTS):
        append(log, [event(event_id=f"e{n}")], NOON + n * APART_MS)
    read_up_to(store, lease, EVENTS)
    return log


def read_up_to(store: Store, lease: Lease, ordinal: int, streams: Sequence[str] = STREAMS) -> None:
    """The checkpoints of streams that have read so many events."""
    log = Log(store)
    before = checkpoints.read(store, STREAMS)
    last = next((f for f in frames(log, Position(log.head().first_segment)) if f.after().ordinal == ordinal), None)
    for stream in streams:
        progress = Progress(stream, last.after() if last else Position(), ordinal - before[stream].ordinal)
        checkpoints.commit(store, lease.epoch, checkpoints.advance(progress, NOON))


def kept(log: Log) -> list[int]:
    """How long before END what is still there arrived, oldest first, in ms."""
    log.drop_tail()
    return [END - frame.received_at for frame in frames(log, Position(log.head().first_segment))]


def test_what_arrived_before_the_retention_goes_and_all_else_stays(store: Store, filled: Log, lease: Lease) -> None:
    report = Retention(filled, lease, 3 * HOUR_MS).run(END, 0.0)

    assert report["trimmed"] > 0
    assert not report["held_back"]
    assert set(kept(filled)) >= {n * APART_MS for n in range(1, 13)}  # all of the last three hours
    assert max(kept(filled)) < 3 * HOUR_MS + HOUR_MS  # a segment goes as a whole
    assert checkpoints.audit(store).unexplained == 0
    assert filled.locate(["e0", f"e{EVENTS - 1}"])[0] is None
    assert filled.locate([f"e{EVENTS - 1}"])[0] is not None


def test_segment_stays_until_its_last_event_is_past_the_retention(log: Log, store: Store, lease: Lease) -> None:
    append(log, [event(event_id="first")], NOON)
    append(log, [event(event_id="last")], NOON + 30 * MINUTE_MS)
    append(log, [event()], NOON + 12 * HOUR_MS)  # begins the next one
    read_up_to(store, lease, 3)
    job = Retention(log, lease, 24 * HOUR_MS)

    assert job.run(NOON + 24 * HOUR_MS + 30 * MINUTE_MS, 0.0)["trimmed"] == 0  # the first one is past it
    assert None not in log.locate(["first", "last"])
    assert job.run(NOON + 24 * HOUR_MS + 30 * MINUTE_MS + 1, 0.0)["trimmed"] == 1
    assert log.locate(["first", "last"]) == [None, None]


def test_segment_that_the_next_append_seals_ends_with_its_own_last_arrival(log: Log) -> None:
    append(log, [event(event_id="a")], NOON)
    append(log, [event(event_id="b")], NOON + MINUTE_MS)
    append(log, [event(event_id="b")], NOON + 2 * MINUTE_MS)  # a duplicate, which adds nothing
    assert log.head().last_arrival == NOON + MINUTE_MS
    append(log, [event()], NOON + 12 * HOUR_MS)
    assert log.sealed()[1][:2] == (NOON, NOON + MINUTE_MS)
    append(log, [event()], NOON + 24 * HOUR_MS)
    assert log.sealed()[2][:2] == (NOON + 12 * HOUR_MS, NOON + 12 * HOUR_MS)
    append(log, [event()], NOON)  # the clock has leapt back
    assert [frame.received_at for frame in frames(log)][-2:] == [NOON + 24 * HOUR_MS] * 2


def test_segments_that_one_call_fills_end_with_its_arrival(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 600)
    append(log, [event()], NOON)
    log.accept([Request(parsed([event(data={"x": "x" * 300})], NOON), "s") for _ in range(4)], NOON + MINUTE_MS)
    ends = [last for _, (_, last, _, _) in sorted(log.sealed().items())]
    assert (ends[0], set(ends[1:])) == (NOON, {NOON + MINUTE_MS})


def test_event_time_does_not_matter(log: Log, store: Store, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 600)
    for _ in range(6):
        append(log, [event(timestamp=NOON - 100 * HOUR_MS)], NOON)  # long past, and only just arrived
    read_up_to(store, lease, 6)

    assert Retention(log, lease, 3 * HOUR_MS).run(NOON + MINUTE_MS, 0.0)["trimmed"] == 0


def test_a_run_lets_go_of_so_many_segments_at_most(filled: Log, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MAX_SEGMENTS", 3)
    job = Retention(filled, lease, HOUR_MS)

    assert [job.run(END + n, 0.0)["trimmed"] for n in range(2)] == [3, 3]


def test_store_short_of_memory_is_given_room_one_segment_a_run_and_only_until_there_is(
    filled: Log, lease: Lease
) -> None:
    job = Retention(filled, lease, 1000 * HOUR_MS)
    before = filled.head().first_segment

    assert [job.run(END + n, FULL)["trimmed"] for n in range(3)] == [1, 1, 1]
    assert job.run(END + 3, retention.TRIM_AT)["trimmed"] == 0
    assert filled.head().first_segment == before + 3


def test_memory_alone_does_not_hold_up_what_is_too_old_anyway(filled: Log, lease: Lease) -> None:
    assert Retention(filled, lease, 3 * HOUR_MS).run(END, FULL)["trimmed"] > 3


def test_what_goes_is_told_by_age_as_a_note_and_for_want_of_memory_as_a_warning_with_what_it_was(
    filled: Log, lease: Lease, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Retention(filled, lease, 3 * HOUR_MS).run(END, 0.0)
    by_age = [r for r in caplog.records if r.name == retention.__name__]
    assert by_age
    assert {(r.levelname, r.getMessage()) for r in by_age} == {("INFO", "events past their retention were let go of")}

    caplog.clear()
    Retention(filled, lease, 1000 * HOUR_MS).run(END, FULL)
    (warning,) = [r for r in caplog.records if r.name == retention.__name__]
    assert (warning.levelname, warning.getMessage()) == ("WARNING", "events within their retention were let go of")
    facts = vars(warning)
    assert facts["reason"] == "80% of the memory limit is used"
    gone = EVENTS - len(kept(filled)) - sum(vars(r)["events"] for r in by_age)
    assert (facts["events"], facts["first_arrival"] < facts["last_arrival"]) == (gone, True)


def test_what_went_since_the_start_is_counted_by_what_it_went_for(filled: Log, lease: Lease) -> None:
    job = Retention(filled, lease, 3 * HOUR_MS)
    assert job.told()["within_retention_at"] is None
    job.run(END, 0.0)
    by_age = EVENTS - len(kept(filled))
    for n in range(2):
        job.run(END + n, FULL)
    job.run(END + 2, 0.0)
    told = job.told()
    assert (told["trimmed"], told["past_retention"]) == (0, by_age)
    assert told["within_retention"] == EVENTS - len(kept(filled)) - by_age > 0
    assert told["within_retention_at"] == rfc3339(END + 1)


def test_open_segment_that_no_append_will_seal_goes_too_once_its_last_event_is_past_the_retention(
    log: Log, store: Store, lease: Lease
) -> None:
    append(log, [event(event_id=f"e{n}") for n in range(3)], NOON)
    read_up_to(store, lease, 3)
    job = Retention(log, lease, HOUR_MS)

    assert job.run(NOON + HOUR_MS, 0.0) == {"trimmed": 0, "held_back": []}
    assert job.run(NOON + HOUR_MS + 1, 0.0) == {"trimmed": 1, "held_back": []}
    assert log.locate(["e0"]) == [None]
    assert job.run(NOON + HOUR_MS + 2, 0.0) == {"trimmed": 0, "held_back": []}  # there is nothing in it

    append(log, [event(event_id="e0")], NOON + HOUR_MS + 3)
    (frame,) = log.read(checkpoints.read(store, STREAMS)["features"])  # the streams go on there
    assert frame.ordinal == 3
    assert checkpoints.audit(store).accounts["features"].pending == 1
    assert checkpoints.audit(store).unexplained == 0


@pytest.mark.parametrize("memory_used", [0.0, REFUSE_AT + 0.01])
def test_open_segment_that_a_stream_has_yet_to_read_stays(
    log: Log, store: Store, lease: Lease, memory_used: float
) -> None:
    append(log, [event()], NOON)
    append(log, [event()], NOON)
    read_up_to(store, lease, 2, STREAMS[:-1])
    read_up_to(store, lease, 1, STREAMS[-1:])

    report = Retention(log, lease, HOUR_MS).run(NOON + 2 * HOUR_MS, memory_used)
    assert report == {"trimmed": 0, "held_back": ["bridge"]}
    assert not log.sealed()


def test_open_segment_stays_while_ingest_takes_events(log: Log, store: Store, lease: Lease) -> None:
    append(log, [event()], NOON)
    read_up_to(store, lease, 1)

    assert Retention(log, lease, HOUR_MS).run(NOON, REFUSE_AT)["trimmed"] == 0
    assert Retention(log, lease, HOUR_MS).run(NOON, REFUSE_AT + 0.01)["trimmed"] == 1


def test_only_the_leases_holder_seals(log: Log, store: Store, lease: Lease) -> None:
    append(log, [event()], NOON)
    read_up_to(store, lease, 1)
    stale = lease.epoch
    lease.raise_epoch()

    with pytest.raises(Fenced):
        log.seal(stale)
    assert not log.sealed()


@pytest.fixture
def start_own(own_server: Valkey, tmp_path: Path) -> Iterator[Start]:
    yield from runtimes(own_server.url, tmp_path)


def test_ingest_opens_again_where_the_memory_holds_less_than_one_segment(
    start_own: Start, own_server: Valkey, partner: FakePartner
) -> None:
    nexus = start_own(PYTHON_EVENT_API_URL=partner.url)
    client = client_of(nexus)
    own_server.client.config_set("maxmemory", int(own_server.client.info("memory")["used_memory"]) + (4 << 20))

    def post() -> int:
        batch = [event(user="user_1", data={"note": "x" * 4000}) for _ in range(50)]
        return int(client.post(INGEST, json={"events": batch}).status_code)

    until(lambda: post() == 503 and nexus.ingest.closed, "ingest to close")
    assert not nexus.log.sealed()
    until(lambda: post() == 202, "ingest to open again", 60)
    assert nexus.log.head().first_segment > 1
    settled(routes(client))
    assert client.get(HEALTH).json["unexplained"] == 0


@pytest.mark.parametrize("slowest", STREAMS)
@pytest.mark.parametrize("memory_used", [0.0, FULL, 1.0])
def test_what_the_slowest_stream_has_yet_to_read_stays_however_old_and_however_full_the_store_is(
    store: Store, lease: Lease, log: Log, monkeypatch: pytest.MonkeyPatch, slowest: str, memory_used: float
) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 600)
    for n in range(EVENTS):
        append(log, [event(event_id=f"e{n}")], NOON + n * APART_MS)
    read_up_to(store, lease, EVENTS, [stream for stream in STREAMS if stream != slowest])
    job = Retention(log, lease, HOUR_MS)

    assert job.run(END, memory_used) == job.latest == {"trimmed": 0, "held_back": [slowest]}

    read_up_to(store, lease, 11, [slowest])
    runs = [job.run(END + n, memory_used) for n in range(1, 15)]
    assert sum(run["trimmed"] for run in runs) > 0
    assert runs[-1] == {"trimmed": 0, "held_back": [slowest]}
    log.drop_tail()
    left = log.read(checkpoints.read(store, [slowest])[slowest])[0]
    assert left.ordinal == 11  # the next one that it has to read
    assert checkpoints.audit(store).unexplained == 0


def test_one_run_is_sat_out_after_a_leap_of_the_clock_which_may_leap_back(filled: Log, lease: Lease) -> None:
    job = Retention(filled, lease, 24 * HOUR_MS)
    job.run(END, 0.0)
    ahead = END + 99 * HOUR_MS

    assert job.run(ahead, 0.0)["trimmed"] == 0
    assert job.run(END + 10_000, 0.0)["trimmed"] == 0  # it was a leap: nothing is lost
    assert len(kept(filled)) == EVENTS

    assert job.run(ahead, 0.0)["trimmed"] == 0
    assert job.run(ahead + 10_000, 0.0)["trimmed"] > 0  # it stays there, so that is the time


def test_instance_without_the_lease_lets_go_of_nothing(store: Store, filled: Log) -> None:
    standby = Lease(store, "standby", Clock(NOON), lambda: False)
    assert not standby.take()

    assert Retention(filled, standby, HOUR_MS).run(END, FULL) == {"trimmed": 0, "held_back": []}
    assert len(kept(filled)) == EVENTS


def test_health_tells_for_whom_events_past_their_retention_are_kept(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bridge switched off its backlog stays deliverable, so it is kept, and that must not come as a surprise."""
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 600)
    nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    client = client_of(nexus)
    for _ in range(6):
        assert client.post(INGEST, json=event()).status_code == 202
    settled(routes(client))
    later = nexus.clock() + 1_000 * HOUR_MS
    for _ in range(2):  # the first one sees the clock leap
        nexus.retention.run(later, 0.0)

    health = client.get(HEALTH).json
    kept = health["retention"]
    assert (health["status"], kept["held_back"], kept["due_for"]) == ("degraded", ["bridge"], "age")
    remedy = f": it is switched off. {BRIDGE_OFF}"
    assert f"events past their retention are kept for bridge, yet to read them{remedy}" in health["reasons"]
    nexus.serving.refresh()
    assert client.get("/nexus/feed.json").json["retention"] == kept

    nexus.retention.run(nexus.clock(), FULL)  # a leap back
    nexus.retention.run(nexus.clock(), FULL)
    health = client.get(HEALTH).json
    assert health["retention"]["due_for"] == "memory"
    assert (
        f"for want of memory events should go, but are kept for bridge, yet to read them{remedy}" in health["reasons"]
    )


def test_what_is_kept_for_a_time_says_so_to_the_store(nexus: Runtime, client: FlaskClient, store: Store) -> None:
    """What is written without an end of its own stays until the store is full."""
    here = {"pickup": {"lat": 14.55, "lng": 121.02}}
    paid = payment("t", data={"merchant_id": "m"})
    assert client.post(INGEST, json=[paid, report("t"), event("ride_request", data=here)]).status_code == 202
    settled(routes(client))
    until(lambda: store.call("EXISTS", f"{keys.SERVING}rider_1"), "the public key")

    for family in (keys.SCORES, keys.LABELS, keys.DEMAND, keys.PAID, keys.AGGREGATE, keys.SEEN, keys.SERVING):
        of_it = [key for key in store.call("KEYS", "*") if key.decode().startswith(family)]
        assert of_it, family
        assert all(store.call("PTTL", key) > 0 for key in of_it), family


def test_health_names_retention_while_it_fails(start_nexus: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the store fills, and the first to be told are those whose events are refused."""
    nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    client = client_of(nexus)
    until(lambda: client.get(HEALTH).json["status"] == "healthy", "healthy")

    def fails(epoch: int) -> None:
        raise ValueError("subsection not found")

    with monkeypatch.context() as patch:
        patch.setattr(nexus.log, "finish_trim", fails)
        nexus.scheduler.jobs["retention"]()
        health = client.get(HEALTH).json
        assert health["status"] == "degraded"
        assert "the job retention fails: ValueError: subsection not found" in health["reasons"]

    nexus.scheduler.jobs["retention"]()
    until(lambda: client.get(HEALTH).json["status"] == "healthy", "healthy")
