"""The log: one atomic accept, idempotency by id, reading from any position, single events by place and id, trimming."""

from __future__ import annotations

import json
import signal
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import keys
from pipeline import log as log_module
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import DeadLetter, Progress, bury
from pipeline.commit_log.frames import ALL_STREAMS, BRIDGE_ONLY, CANARY, Position, record
from pipeline.commit_log.lease import Lease
from pipeline.errors import Fenced, OutcomeUnknown, StoreUnavailable
from pipeline.events import decode
from pipeline.log import Log, Request, Taken
from pipeline.store import Store
from pipeline.web.posted import MAX_EVENTS
from tests.faults import Proxy, sha_of
from tests.helpers import HOUR_MS, NOON, STREAMS, append, event, frames, parsed, until

GARBAGE = b"garbage, and no frame of any version at all"


def start_of(taken: Taken) -> Position:
    """Where the frame that a request made begins."""
    return Position(taken.address >> 24, taken.address & 0xFFFFFF, 0, taken.end - taken.taken)


def ids_in(log: Log) -> list[str]:
    return [decode(record[8:])["event_id"] for frame in frames(log) for record in frame.records]


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 600)


def test_events_are_read_back_in_the_order_in_which_they_were_taken(log):
    posted = [[event() for _ in range(n)] for n in (3, 1, 5)]
    for events in posted:
        append(log, events, NOON)
    assert ids_in(log) == [e["event_id"] for events in posted for e in events]


def test_frame_keeps_source_arrival_ordinal_and_addressees(log):
    append(log, [event(), event()], NOON, "driver_app")
    append(log, [event()], NOON + 1, "büro", BRIDGE_ONLY)
    first, second = frames(log)
    assert (first.source, first.received_at, first.ordinal, first.to) == ("driver_app", NOON, 0, ALL_STREAMS)
    assert (second.source, second.received_at, second.ordinal, second.to) == ("büro", NOON + 1, 2, BRIDGE_ONLY)
    assert first.after().ordinal == 2


def test_known_ids_are_duplicates_and_the_first_payload_wins(log):
    append(log, [event(event_id="a", x=1), event(event_id="b")], NOON)
    taken = append(log, [event(event_id="c"), event(event_id="a", x=2)], NOON)
    assert (taken.taken, taken.duplicates) == (1, [1])
    assert ids_in(log) == ["a", "b", "c"]
    place = log.locate(["a"])[0]
    assert b'"x":1' in log.fetch([place])[0].body


def test_same_id_twice_in_one_batch_is_taken_once(log):
    taken = append(log, [event(event_id="a", x=1), event(event_id="a", x=2)], NOON)
    assert (taken.taken, taken.duplicates) == (1, [1])


def test_batch_of_known_ids_alone_appends_nothing(log):
    append(log, [event(event_id="a")], NOON)
    before = log.head()
    taken = append(log, [event(event_id="a")], NOON)
    after = log.head()
    assert (taken.taken, taken.end) == (0, 1)
    assert (after.segment, after.offset, after.ordinal) == (before.segment, before.offset, before.ordinal)
    assert (after.accepted, after.duplicates) == (1, 1)


def test_batch_of_as_many_events_as_one_may_hold_is_taken_in_one_step_and_known_when_it_comes_again(log):
    events = [event(event_id=f"e{n}") for n in range(MAX_EVENTS)]
    assert append(log, events, NOON).taken == MAX_EVENTS
    again = append(log, [event(event_id="new"), *events[1:]], NOON)
    assert (again.taken, again.duplicates) == (1, list(range(1, MAX_EVENTS)))
    assert log.head().ordinal == MAX_EVENTS + 1


def test_several_requests_go_in_as_one_step_each_with_its_own_verdict(log):
    requests = [
        Request(parsed([event(event_id="a"), event(event_id="b")], NOON), "one", rejected=2),
        Request([], "two", rejected=1),
        Request(parsed([event(event_id="b"), event(event_id="c")], NOON), "three"),
    ]
    first, second, third = log.accept(requests, NOON)
    assert (first.taken, second.taken, third.taken, third.duplicates) == (2, 0, 1, [0])
    assert (first.end, third.end) == (2, 3)
    head = log.head()
    assert (head.accepted, head.duplicates, head.rejected, head.ordinal) == (3, 1, 3, 3)


def test_each_stream_is_charged_with_what_is_addressed_to_it_and_canaries_with_nobody(log, store):
    append(log, [event(), event()], NOON)
    append(log, [event()], NOON, to=BRIDGE_ONLY)
    append(log, [event()], NOON, to=ALL_STREAMS | CANARY)
    audit = checkpoints.audit(store)
    assert {name: account.accepted for name, account in audit.accounts.items()} == {
        **dict.fromkeys(STREAMS, 2),
        "bridge": 3,
    }
    assert {name: account.pending for name, account in audit.accounts.items()} == {
        **dict.fromkeys(STREAMS, 2),
        "bridge": 3,
    }
    assert audit.unexplained == 0


def test_arrival_never_runs_backwards_even_when_the_clock_does(log):
    append(log, [event()], NOON)
    append(log, [event()], NOON - HOUR_MS)
    assert [frame.received_at for frame in frames(log)] == [NOON, NOON]


def test_read_goes_on_over_segments_and_from_every_frame(log, small_segments):
    for number in range(40):
        append(log, [event(event_id=f"e{number}-{i}") for i in range(1 + number % 3)], NOON + number)
    everything = frames(log)
    assert log.head().segment > 5
    for at, frame in enumerate(everything):
        assert [f.address for f in frames(log, frame.after())] == [f.address for f in everything[at + 1 :]]


def test_frame_larger_than_what_is_read_at_once_is_read_whole(log):
    append(log, [event(text="x" * 5000) for _ in range(20)], NOON)
    [frame] = log.read(Position(), 1000)
    assert len(frame.records) == 20


def test_frame_that_ends_beyond_what_an_offset_can_say_is_read_and_gone_on_from(log):
    append(log, [event(event_id=f"big-{n}", text="x" * 60_000) for n in range(300)], NOON)
    append(log, [event(event_id="next")], NOON)
    log.drop_tail()
    assert ids_in(log) == [*(f"big-{n}" for n in range(300)), "next"]
    assert frames(log)[0].after().segment == 1


def test_event_behind_bytes_of_others_is_found_by_its_id(store, log):
    append(log, [event(event_id="a")], NOON)
    store.call("APPEND", f"{keys.LOG}1", GARBAGE)
    append(log, [event(event_id="b")], NOON)
    [found] = Log(store).fetch(log.locate(["b"]))
    assert found is not None
    assert json.loads(found.body)["event_id"] == "b"


def test_old_segment_is_sealed_by_time_even_where_it_is_small(log, monkeypatch):
    monkeypatch.setattr(log_module, "SEGMENT_MS", 1000)
    append(log, [event()], NOON)
    append(log, [event()], NOON + 1000)
    assert log.head().segment == 2
    assert len(frames(log)) == 2


def test_every_event_is_found_by_its_id_however_many_there_are(log):
    for start in range(0, 6000, 500):
        append(log, [event(event_id=f"e{n}") for n in range(start, start + 500)], NOON)
    places = log.locate([f"e{n}" for n in range(6000)])
    assert None not in places
    assert len(set(places)) == 6000
    some = [places[n] for n in range(0, 6000, 97)]
    found = [b'"event_id":"e%d"' % n in f.body for n, f in zip(range(0, 6000, 97), log.fetch(some), strict=True)]
    assert all(found)
    assert append(log, [event(event_id=f"e{n}") for n in range(0, 6000, 7)], NOON).taken == 0
    assert log.locate(["never"]) == [None]


def test_ids_that_an_earlier_version_kept_in_buckets_are_still_known(store, log, monkeypatch):
    monkeypatch.setattr(log_module, "_MOVED_AT_ONCE", 7)
    append(log, [event(event_id=f"e{n}") for n in range(200)], NOON)
    places = log.locate([f"e{n}" for n in range(200)])
    for name, place in store.call("HGETALL", keys.IDS).items():  # linear hashing: of 16 buckets 5 are divided
        number = int.from_bytes(name[:4], "little")
        bucket = number % 16 if number % 16 >= 5 else number % 32
        store.call("HSET", f"{keys.ID_BUCKET}{bucket}", name, place)
    store.call("DEL", keys.IDS)
    store.call("SETRANGE", keys.HEAD, 8 * 13, struct.pack("<2Q", 16, 5))
    assert append(Log(store), [event(event_id="e7"), event(event_id="new")], NOON).duplicates == [0]
    assert Log(store).locate([f"e{n}" for n in range(200)]) == places
    assert (store.call("HLEN", keys.IDS), store.call("KEYS", keys.ID_BUCKET + "*")) == (201, [])


def test_events_of_a_log_that_has_run_for_years_are_found_and_let_go_of_one_by_one(store, log, small_segments):
    """Its places are beyond what a double holds, and the store's scripts count in doubles."""
    append(log, [event()], NOON)
    store.call("SETRANGE", keys.HEAD, 0, struct.pack("<Q", 1 << 20))
    names = [f"e{n}" for n in range(6)]
    append(log, [event(event_id=name) for name in names], NOON)
    append(log, [event(text="x" * 2_000)], NOON)
    found = log.fetch(log.locate(names))
    assert [f'"{name}"'.encode() in f.body for name, f in zip(names, found, strict=True)] == [True] * 6
    lease = lease_of(store)
    pass_all(store, log, lease)
    store.call("SETRANGE", keys.HEAD, 8 * 17, struct.pack("<Q", 1 << 20))
    assert log.trim(1 << 20, lease.epoch)
    assert log.locate(names) == [None] * 6


def test_store_that_was_stalled_does_not_take_what_its_sender_was_told_may_be_taken(own_server, monkeypatch):
    monkeypatch.setattr("pipeline.store._TIMEOUT_S", 0.6)
    monkeypatch.setattr(log_module, "_PATIENCE_MS", 400)
    store = Store(own_server.url)
    log = Log(store)
    append(log, [event(event_id="before")], NOON)  # the store knows the script
    checkpoints.audit(store)  # which tells the store's clock
    monkeypatch.setattr(log_module, "_INSIST_S", 0.0)
    own_server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(OutcomeUnknown):
        append(log, [event()], NOON)
    own_server.process.send_signal(signal.SIGCONT)
    append(log, [event(event_id="after")], NOON)
    assert ids_in(log) == ["before", "after"]


@pytest.mark.parametrize("given", [{}, {"event_id": None}], ids=["given id", "id made here"])
def test_answer_lost_on_its_way_is_asked_for_again_and_nothing_is_taken_twice(store, store_server, tmp_path, given):
    proxy = Proxy(store_server.socket, tmp_path)
    through = Store(proxy.url)
    log = Log(through)
    append(log, [event()], NOON)
    proxy.swallow(sha_of(through, "accept"))
    events = parsed([event(**given), event(event_id="known"), event(**given)], NOON)
    append(Log(store), [event(event_id="known")], NOON)
    taken = log.accept([Request(events, "test", rejected=4)], NOON)[0]
    assert proxy.struck.is_set()
    assert (taken.taken, taken.duplicates) == (2, [1])
    assert [len(frame.records) for frame in frames(log, start_of(taken))] == [2]
    head = log.head()
    assert (head.accepted, head.duplicates, head.rejected, head.ordinal) == (4, 1, 4, 4)
    proxy.close()


@pytest.fixture
def held(store, store_server, tmp_path, monkeypatch) -> Iterator[tuple[Log, Proxy]]:
    """A log whose store has answered once, and what can hold back its further answers."""
    monkeypatch.setattr("pipeline.store._TIMEOUT_S", 0.3)
    proxy = Proxy(store_server.socket, tmp_path)
    log = Log(Store(proxy.url))
    append(log, [event()], NOON)
    yield log, proxy
    proxy.close()


def test_answer_that_is_late_is_asked_for_again_and_nothing_is_taken_twice(held, store):
    log, proxy = held
    proxy.hold_answers(sha_of(log._store, "accept"))
    answers: list[Taken] = []
    asking = threading.Thread(target=lambda: answers.append(append(log, [event(event_id="a")], NOON)))
    asking.start()
    until(lambda: Log(store).head().accepted == 2, "the event in the log")
    asking.join(0.4)
    assert not answers
    proxy.let_answers_go()
    asking.join(30)
    assert (answers[0].taken, answers[0].duplicates) == (1, [])
    assert Log(store).head().accepted == 2


def test_answer_that_never_comes_is_told_as_open_and_the_next_request_waits_for_the_store_first(
    held, store, monkeypatch
):
    monkeypatch.setattr(log_module, "_INSIST_S", 0.1)
    log, proxy = held
    proxy.hold_answers(sha_of(log._store, "accept"))
    with pytest.raises(OutcomeUnknown):
        append(log, [event(event_id="a")], NOON)
    with pytest.raises(StoreUnavailable) as told:
        append(log, [event(event_id="b")], NOON)
    assert not isinstance(told.value, OutcomeUnknown)
    proxy.let_answers_go()
    assert ids_in(Log(store))[1:] == ["a"]
    assert append(log, [event(event_id="a")], NOON).duplicates == [0]
    assert append(log, [event(event_id="b")], NOON).taken == 1


def test_refusal_of_a_request_that_comes_again_does_not_say_that_the_first_was_refused(
    store, store_server, tmp_path, monkeypatch
):
    monkeypatch.setattr(log_module, "_INSIST_S", 0.1)
    proxy = Proxy(store_server.socket, tmp_path)
    log = Log(Store(proxy.url))
    append(log, [event()], NOON)
    proxy.swallow(sha_of(log._store, "accept"))
    run = log._store.run

    def full_from_now_on(*words):
        try:
            return run(*words)
        finally:
            store.call("CONFIG", "SET", "maxmemory", 1)

    monkeypatch.setattr(log._store, "run", full_from_now_on)
    try:
        with pytest.raises(OutcomeUnknown):
            append(log, [event(event_id="a")], NOON)
    finally:
        store.call("CONFIG", "SET", "maxmemory", 0)
    assert ids_in(Log(store))[1:] == ["a"]
    proxy.close()


def test_request_that_never_left_is_told_as_not_done(own_server, monkeypatch):
    monkeypatch.setattr("pipeline.store._TIMEOUT_S", 0.3)
    log = Log(Store(own_server.url))
    log._ids_moved = True
    own_server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable) as told:  # the connection is made, and nobody welcomes it
            append(log, [event()], NOON)
    finally:
        own_server.process.send_signal(signal.SIGCONT)
    assert not told.value.lost
    assert not isinstance(told.value, OutcomeUnknown)
    assert ids_in(log) == []


def test_request_that_reaches_the_store_after_a_later_one_of_its_sender_takes_nothing(store, log):
    append(log, [event(event_id="a")], NOON)
    append(log, [event(event_id="b")], NOON)
    log._number = 0  # as if its sender had given it up before
    with pytest.raises(StoreUnavailable, match="LATE"):
        append(log, [event(event_id="c")], NOON)
    assert ids_in(log) == ["a", "b"]
    assert append(Log(store), [event(event_id="c")], NOON).taken == 1  # each sender has numbers of its own


def test_fetch_gives_one_event_with_arrival_source_and_event_time(log):
    append(log, [event(event_id="a"), event(event_id="b", timestamp=NOON - 5)], NOON, "app")
    [found] = log.fetch(log.locate(["b"]))
    assert (found.received_at, found.source, found.ts, found.ordinal, found.to) == (
        NOON,
        "app",
        NOON - 5,
        1,
        ALL_STREAMS,
    )
    assert found.body.startswith(b'{"event_id":"b"')
    assert log.fetch([found.ordinal + (1 << 40)]) == [None]


def test_concurrent_accepts_lose_and_double_nothing(store_server, log):
    def post(worker: int) -> None:
        connection = Store(store_server.url)
        for n in range(20):
            shared, own = event(event_id=f"shared-{n}"), event(event_id=f"own-{worker}-{n}")
            append(Log(connection), [shared, own], NOON)
        connection.close()

    threads = [threading.Thread(target=post, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = ids_in(log)
    assert len(found) == len(set(found)) == 20 + 4 * 20
    assert log.head().accepted == 100


def test_accepted_events_survive_kill_9_of_the_store_and_ids_stay_known(own_server):
    connection = Store(own_server.url)
    log = Log(connection)
    for n in range(30):
        append(log, [event(event_id=f"e{n}")], NOON)
    own_server.kill()
    with pytest.raises(StoreUnavailable):
        append(log, [event()], NOON)
    own_server.start()
    assert until(lambda: ids_in(log)) == [f"e{n}" for n in range(30)]
    assert append(log, [event(event_id="e29"), event(event_id="e30")], NOON).duplicates == [0]
    connection.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=12), st.integers(200, 2000))
def test_whatever_is_posted_each_id_is_in_the_log_once_and_every_account_adds_up(store, posted, segment_bytes):
    store.call("FLUSHALL")
    log = Log(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module, "SEGMENT_BYTES", segment_bytes)
        verdicts = [append(log, [event(event_id=f"e{n}") for n in numbers], NOON) for numbers in posted]
    wanted = list(dict.fromkeys(f"e{n}" for numbers in posted for n in numbers))
    assert ids_in(log) == wanted
    assert sum(v.taken for v in verdicts) == len(wanted)
    assert sum(v.taken + len(v.duplicates) for v in verdicts) == sum(map(len, posted))
    assert checkpoints.audit(store).unexplained == 0


def lease_of(store: Store) -> Lease:
    lease = Lease(store, "test", lambda: NOON, lambda: True)
    assert lease.take()
    return lease


def pass_all(store: Store, log: Log, lease: Lease, names: tuple[str, ...] = STREAMS) -> None:
    """Every stream has processed the whole log."""
    head = log.head()
    position = Position(head.segment, head.offset, 0, head.ordinal)
    for name in names:
        processed = head.accepted - checkpoints.audit(store).accounts[name].processed
        checkpoints.commit(store, lease.epoch, checkpoints.advance(Progress(name, position, processed), NOON))


def test_trimmed_segment_takes_its_ids_along_and_they_can_be_used_again(store, log, small_segments):
    for n in range(12):
        append(log, [event(event_id=f"e{n}")], NOON + n)
    lease = lease_of(store)
    pass_all(store, log, lease)
    first = [e for e in ids_in(log) if log.locate([e])[0] >> 37 == 1]
    assert log.trim(1, lease.epoch)
    assert log.locate(first) == [None] * len(first)
    assert ids_in(log) == [f"e{n}" for n in range(len(first), 12)]
    assert append(log, [event(event_id=first[0])], NOON + 99).taken == 1
    assert checkpoints.audit(store).unexplained == 0


def die_in_trim(store: Store, log: Log, lease: Lease, script: str, nth: int) -> None:
    """A trim of the first segment, killed before a script is run for the nth time."""
    run, times = store.run, 0

    def dying(name: str, *args: Any) -> Any:
        nonlocal times
        times += name == script
        if times == nth:
            raise StoreUnavailable("killed here")
        return run(name, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "run", dying)
        with pytest.raises(StoreUnavailable):
            log.trim(1, lease.epoch)


@pytest.mark.parametrize(("script", "nth"), [("trim", 1), ("forget", 1), ("forget", 2)])
def test_trim_that_dies_midway_leaves_no_event_whose_id_can_be_taken_again(
    store, log, small_segments, monkeypatch, script, nth
):
    monkeypatch.setattr(log_module, "_FORGET_WORDS", 2)
    for n in range(12):
        append(log, [event(event_id=f"e{n}")], NOON + n)
    lease = lease_of(store)
    pass_all(store, log, lease)
    names = [e for e in ids_in(log) if log.locate([e])[0] >> 37 == 1]
    assert len(names) > 1
    die_in_trim(store, log, lease, script, nth)

    after = Log(store)
    taken = [name for name in names if append(after, [event(event_id=name)], NOON + 50).taken]
    retained = Position(after.head().first_segment)
    found = [decode(record[8:])["event_id"] for frame in frames(after, retained) for record in frame.records]
    assert len(found) == len(set(found))
    assert found == ids_in(after)  # nor does a reader that stands further back see them
    assert set(taken) <= set(found[-len(names) :])

    pass_all(store, after, lease)
    while after.trim(after.head().first_segment, lease.epoch):
        pass
    assert [n for n in range(1, after.head().segment) if store.call("EXISTS", f"{keys.LOG}{n}")] == []
    assert store.call("HLEN", keys.IDS) == after.head().ids
    assert checkpoints.audit(store).unexplained == 0


def test_id_taken_again_after_a_trim_that_died_midway_stays_known_once_that_is_finished(
    store, log, small_segments, monkeypatch
):
    monkeypatch.setattr(log_module, "_FORGET_WORDS", 2)
    for n in range(12):
        append(log, [event(event_id=f"e{n}")], NOON + n)
    lease = lease_of(store)
    pass_all(store, log, lease)
    die_in_trim(store, log, lease, "forget", 2)
    after = Log(store)
    assert append(after, [event(event_id="e0")], NOON + 50).taken == 1
    after.finish_trim(lease.epoch)
    assert append(after, [event(event_id="e0")], NOON + 51).duplicates == [0]
    assert ids_in(after).count("e0") == 1


def test_nothing_is_trimmed_of_an_empty_log(store, log):
    assert not log.trim(1, lease_of(store).epoch)


def test_damage_at_the_beginning_of_the_oldest_segment_makes_no_event_of_those_long_gone(store, log, small_segments):
    for n in range(40):
        append(log, [event(event_id=f"e{n}")], NOON + n)
    lease = lease_of(store)
    pass_all(store, log, lease)
    for segment in range(1, 8):
        assert log.trim(segment, lease.epoch)
    held = [frame.address for frame in frames(log)]
    store.call("SETRANGE", f"{keys.LOG}8", 0, GARBAGE)
    store.call("SETRANGE", f"{keys.LOG}9", 0, GARBAGE)
    store.call("SETRANGE", f"{keys.LOG}10", 2, bytes([99]))
    seen = frames(Log(store), Position(8))
    assert [frame.address for frame in seen] == held[1:]  # how many stood in the first one nobody knows
    assert {len(frame.records) for frame in seen} == {1}
    assert [frame.broken for frame in seen].count(True) == 2
    assert Log(store).trim(8, lease.epoch)


@pytest.mark.parametrize("at", [b"{", b":", b'"b"', b"b", b'","event_type":', b"event_type"])
@pytest.mark.parametrize("bit", [0x80, 0x01])
def test_damaged_event_keeps_neither_its_segment_nor_the_ids_of_others(store, log, small_segments, at, bit):
    append(log, [event(event_id=name) for name in "abc"], NOON)
    for n in range(12):
        append(log, [event()], NOON + n)
    lease = lease_of(store)
    pass_all(store, log, lease)
    raw = store.call("GET", f"{keys.LOG}1")
    offset = raw.index(at, raw.index(b'{"event_id":"b"'))
    store.call("SETRANGE", f"{keys.LOG}1", offset, bytes([raw[offset] ^ bit]))
    assert log.trim(1, lease.epoch)
    assert log.trim(2, lease.epoch)
    assert store.call("EXISTS", f"{keys.LOG}1") == 0
    assert log.locate(["a", "c"]) == [None, None]


def test_damaged_frame_is_gone_on_with_from_the_middle(store, log):
    append(log, [event() for _ in range(5)], NOON)
    [sound] = frames(log)
    store.call("SETRANGE", f"{keys.LOG}1", 2, bytes([99]))
    log.drop_tail()
    [frame] = log.read(Position(1, 0, 2, 2))
    assert (frame.broken, frame.ordinal, len(frame.records), frame.after()) == (True, 0, 5, sound.after())


def test_segment_that_one_stream_has_yet_to_read_is_not_trimmed(store, log, small_segments):
    for n in range(12):
        append(log, [event()], NOON + n)
    lease = lease_of(store)
    pass_all(store, log, lease, STREAMS[:-1])
    assert not log.trim(1, lease.epoch)
    assert len(frames(log)) == 12


def test_what_is_remembered_of_a_letter_sent_again_goes_with_its_segment(store, log, small_segments):
    append(log, [event(event_id="bad")], NOON)
    lease = lease_of(store)
    place = log.locate(["bad"])[0]
    body = log.fetch([place])[0].body
    letter = DeadLetter(f"storage-{place}", "storage", place, "why", 1, NOON, NOON, "test", NOON, body)
    checkpoints.commit(store, lease.epoch, bury(letter))
    assert log.redrive([("storage", letter.id, "test", record(NOON, body))], NOON) == [True]
    assert store.call("HLEN", keys.REDRIVEN) == 2
    for n in range(12):
        append(log, [event()], NOON + n)
    pass_all(store, log, lease)
    assert log.trim(1, lease.epoch)
    assert store.call("HLEN", keys.REDRIVEN) == 0


def test_letters_sent_again_begin_a_new_segment_where_the_open_one_is_full(store, log, small_segments):
    append(log, [event(event_id=f"bad-{n}", data={"text": "x" * 300}) for n in range(4)], NOON)
    lease, letters = lease_of(store), []
    for place, found in zip(places := log.locate([f"bad-{n}" for n in range(4)]), log.fetch(places), strict=True):
        letter = DeadLetter(f"storage-{place}", "storage", place, "why", 1, NOON, NOON, "test", NOON, found.body)
        checkpoints.commit(store, lease.epoch, bury(letter))
        letters.append(("storage", letter.id, "test", record(NOON, found.body)))
    head = log.head()
    assert log.redrive(letters, NOON) == [True] * 4
    again = range(head.segment + 1, log.head().segment + 1)
    assert [0 < store.call("STRLEN", f"{keys.LOG}{n}") <= 600 for n in again] == [True] * 4
    assert ids_in(log) == [f"bad-{n}" for n in range(4)] * 2


def test_trim_by_a_former_owner_is_fenced(store, log, small_segments):
    for n in range(12):
        append(log, [event()], NOON + n)
    former = lease_of(store)
    pass_all(store, log, former)
    lease_of(store)
    with pytest.raises(Fenced):
        log.trim(1, former.epoch)
    assert store.call("EXISTS", f"{keys.LOG}1") == 1


def test_what_was_appended_last_is_at_hand_as_far_as_its_bytes_allow(log, monkeypatch):
    for _ in range(3):
        append(log, [event()], NOON)
    assert len(log.recent(Position())) == 3
    monkeypatch.setattr(log_module, "_TAIL_BYTES", 1)
    append(log, [event()], NOON)
    assert log.recent(Position()) == []
    assert [frame.ordinal for frame in log.read(Position())] == [0, 1, 2, 3]
    assert [frame.ordinal for frame in log.recent(log.read(Position())[2].after())] == [3]
