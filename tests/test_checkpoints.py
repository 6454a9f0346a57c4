"""Checkpoints: effects and position in one fenced step, and the conservation of events, counted from positions."""

from __future__ import annotations

import struct

import pytest

from pipeline import keys
from pipeline import log as log_module
from pipeline.bridge import outages
from pipeline.bridge.health import Health, remember
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import DeadLetter, Progress, advance, audit, commit
from pipeline.commit_log.frames import ALL_STREAMS, CANARY, Position
from pipeline.commit_log.lease import TTL_MS, Lease
from pipeline.errors import Fenced
from pipeline.log import Log
from pipeline.models import fraud
from pipeline.operations.live_settings import LiveSettings
from pipeline.settings import load
from pipeline.streams.inference import Inference, Promoted
from tests.helpers import NOON, STREAMS, Clock, append, event, frames, write


@pytest.fixture
def epoch(store) -> int:
    lease = Lease(store, "test", lambda: NOON, lambda: False)
    assert lease.take()
    return lease.epoch


def letter(stream: str, place: int) -> DeadLetter:
    return DeadLetter(f"{stream}-{place}", stream, place, "bad", 1, NOON, NOON, "test", NOON, b'{"event_id":"x"}')


def account(store, stream: str):
    return audit(store).accounts[stream]


def test_position_comes_back_as_committed(store, epoch):
    position = Position(3, 77, 5, 1234)
    commit(store, epoch, advance(Progress("storage", position, 5), NOON))
    found = checkpoints.read(store, ["storage", "features"])
    assert found == {"storage": position, "features": Position()}


@pytest.mark.parametrize("index", [0, 1, 3])
def test_pending_is_counted_from_the_position_down_to_the_event_in_its_frame(store, log, epoch, index):
    for size in (4, 5, 6):
        append(log, [event() for _ in range(size)], NOON)
    second = frames(log)[1]
    position = Position(second.address >> 24, second.address & 0xFFFFFF, index, second.ordinal + index)
    commit(store, epoch, advance(Progress("features", position, 4 + index), NOON))
    found = account(store, "features")
    assert (found.accepted, found.processed, found.pending, found.unexplained) == (15, 4 + index, 11 - index, 0)


def test_event_that_a_stream_skips_is_unexplained(store, log, epoch):
    append(log, [event() for _ in range(10)], NOON)
    after = frames(log)[-1].after()
    for stream in STREAMS:
        commit(store, epoch, advance(Progress(stream, after, 9 if stream == "aggregates" else 10), NOON))
    found = audit(store)
    assert found.accounts["aggregates"].unexplained == 1
    assert found.unexplained == 1


def test_event_counted_twice_is_unexplained_and_does_not_hide_a_skipped_one(store, log, epoch):
    append(log, [event() for _ in range(10)], NOON)
    after = frames(log)[-1].after()
    for stream, processed in zip(STREAMS, (9, 11, 10, 10, 10), strict=True):
        commit(store, epoch, advance(Progress(stream, after, processed), NOON))
    assert audit(store).unexplained == 2


def test_dead_letter_explains_its_event_and_is_kept_with_it(store, log, epoch):
    append(log, [event() for _ in range(10)], NOON)
    after = frames(log)[-1].after()
    commit(store, epoch, advance(Progress("storage", after, 9, [letter("storage", 1)]), NOON))
    found = account(store, "storage")
    assert (found.processed, found.dead, found.pending, found.unexplained) == (9, 1, 0, 0)
    assert store.call("HLEN", keys.DEAD + "storage") == 1


def test_commit_of_a_writer_that_lost_the_lease_writes_nothing(store, log, epoch):
    append(log, [event()], NOON)
    assert Lease(store, "other", lambda: NOON, lambda: True).take()
    with pytest.raises(Fenced):
        commit(store, epoch, advance(Progress("features", frames(log)[-1].after(), 1), NOON))
    assert account(store, "features").processed == 0


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        (b"", b""),
        (bytes(range(256)) * 300, bytes(range(256)) * 300),
        ("caf\u00e9 \r\n", "caf\u00e9 \r\n".encode()),
        (2**63 - 1, b"9223372036854775807"),
        (-1, b"-1"),
        (0.1, b"0.1"),
    ],
)
def test_commit_writes_each_word_as_it_is(store, epoch, word, kept):
    commit(store, epoch, [("SET", "ml:{p}:x", word), ("HSET", "ml:{p}:y", word, word), ("HSET", "ml:{p}:y", "z", 1)])
    assert store.call("GET", "ml:{p}:x") == kept
    assert store.call("HGET", "ml:{p}:y", kept) == kept
    assert store.call("HGET", "ml:{p}:y", "z") == b"1"


def test_commit_takes_no_word_of_another_kind(store, epoch):
    with pytest.raises(TypeError):
        commit(store, epoch, [("SET", "ml:{p}:x", None)])  # type: ignore[list-item]


def test_commit_into_an_emptied_store_is_refused(store, epoch):
    store.call("FLUSHALL")
    with pytest.raises(Fenced):
        commit(store, epoch, [("SET", "ml:{p}:x", 1)])
    assert store.call("DBSIZE") == 0


def test_lease_goes_to_one_holder_until_it_runs_out(store):
    clock = Clock()
    first, second = (Lease(store, name, clock, lambda: False) for name in ("first", "second"))
    assert first.take()
    assert not second.take()
    clock.advance(TTL_MS - 1)
    assert first.renew()
    clock.advance(TTL_MS - 1)
    assert not second.take()
    clock.advance(1)
    assert second.take()
    assert second.epoch > 0
    assert not first.renew()
    assert first.epoch == 0


def test_released_lease_is_free_at_once(store):
    first, second = (Lease(store, name, lambda: NOON, lambda: False) for name in ("first", "second"))
    first.take()
    first.release()
    assert second.take()


def test_lease_released_by_a_former_holder_stays_with_who_has_it(store):
    first, other = (Lease(store, name, lambda: NOON, lambda: False) for name in ("first", "other"))
    heir = Lease(store, "heir", lambda: NOON, lambda: True)
    assert first.take()
    assert heir.take()
    first.release()
    assert not other.take()


def test_holder_of_the_folder_need_not_wait_for_a_lease_to_run_out(store):
    Lease(store, "dead", lambda: NOON, lambda: False).take()
    assert Lease(store, "new", lambda: NOON, lambda: True).take()


def test_lease_taken_in_an_emptied_store_has_another_epoch_than_before(store):
    """Otherwise a writer of before would go on from a position that no longer is one."""
    clock = Clock()
    lease = Lease(store, "one", clock, lambda: True)
    lease.take()
    before = lease.epoch
    store.call("FLUSHALL")
    assert not lease.renew()
    clock.advance(1)
    lease.take()
    assert lease.epoch not in (0, before)


def test_emptied_store_can_be_taken_at_once_whatever_its_former_holder_tried_before(store):
    lease, other = (Lease(store, name, lambda: NOON, lambda: False) for name in ("one", "two"))
    lease.take()
    store.call("FLUSHALL")
    assert not lease.raise_epoch()
    assert not lease.renew()
    assert not lease.renew()
    assert other.take()


def test_lease_is_not_taken_away_by_an_instance_whose_clock_differs(store):
    """Instances have no clock of their own in it: the store's is the one that they share."""
    first, second = (Lease(store, name, None, lambda: False) for name in ("first", "second"))
    assert first.take()
    assert not second.take()
    assert first.renew()
    seconds, micros = store.call("TIME")
    now = int(seconds) * 1000 + int(micros) // 1000
    found = audit(store)
    assert now < found.lease_expires <= now + TTL_MS
    assert (found.owned, abs(found.at - now) < 5_000) == (True, True)
    store.call("HSET", keys.OWNER, "expires", now)
    assert not audit(store).owned
    assert second.take()


def test_lease_written_by_a_clock_since_set_back_is_not_waited_for(store):
    clock = Clock()
    first, second = (Lease(store, name, clock, lambda: False) for name in ("first", "second"))
    assert first.take()
    clock.advance(-TTL_MS // 2)  # by less than a term: it is live
    assert not second.take()
    clock.advance(-TTL_MS)
    assert second.take()


def test_every_move_is_in_the_journal_also_over_what_counts_nowhere(store, log, epoch):
    """Else a canary's receipt would tell the time of a later event's commit."""
    append(log, [event()], NOON, to=ALL_STREAMS | CANARY)
    append(log, [event()], NOON)
    for seconds, frame in enumerate(frames(log)):
        commit(store, epoch, advance(Progress("features", frame.after(), seconds), NOON + seconds * 1000))
    kept = [struct.unpack("<QQ", raw) for raw in store.call("LRANGE", f"{keys.JOURNAL}features", 0, -1)]
    assert kept == [(2, NOON + 1000), (1, NOON)]


def audited(store):
    LiveSettings(store, load({}), lambda: NOON).keep([], [("a setting", 0, 1)], None, "test")


def over(store):
    """An outage that ended at once."""
    ledger = outages.Ledger(store, Log(store))
    store.many([*ledger.opened("away", NOON), *ledger.closed(NOON), *ledger.settle(0, NOON)])


def promoted(store):
    stream = Inference(store)
    stream.promote(Promoted("fraud", fraud.Fraud(), b"{}"))
    write(store, stream.cut(NOON))


@pytest.mark.parametrize(
    ("most", "key", "add"),
    [
        (
            "pipeline.commit_log.checkpoints.JOURNAL_LENGTH",
            f"{keys.JOURNAL}features",
            lambda store: store.many(advance(Progress("features", Position()), NOON)),
        ),
        (
            "pipeline.bridge.health.HISTORY_LENGTH",
            keys.HEALTH,
            lambda store: store.many(remember(Health("online", None, "http://partner", NOON))),
        ),
        ("pipeline.operations.live_settings.AUDIT_LENGTH", keys.AUDIT, audited),
        ("pipeline.bridge.outages.KEPT", keys.OUTAGES, over),
        ("pipeline.streams.inference.VERSIONS_KEPT", f"{keys.VERSIONS}fraud", promoted),
    ],
    ids=["journal", "health", "audit", "outages", "versions"],
)
def test_history_keeps_so_many_entries_at_most(store, monkeypatch, most, key, add):
    monkeypatch.setattr(most, 3)
    lengths = []
    for _ in range(5):
        add(store)
        lengths.append(store.call("LLEN", key))
    assert lengths == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("bad", range(6), ids=lambda n: f"frame {n}")
@pytest.mark.parametrize("index", [0, 2])
def test_conservation_holds_for_a_stream_that_stands_before_a_damaged_frame(store, log, epoch, monkeypatch, bad, index):
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 2_000)  # two or three frames
    for _ in range(6):
        append(log, [event() for _ in range(4)], NOON)
    whole = frames(log)
    assert log.head().segment > 1
    frame = whole[bad]
    segment, offset = frame.address >> 24, frame.address & 0xFFFFFF
    store.call("SETRANGE", f"{keys.LOG}{segment}", offset, b"garbage NX, and no frame of any version at all")
    for stream in STREAMS:
        done = frame.ordinal + index
        commit(store, epoch, advance(Progress(stream, Position(segment, offset, index, done), done), NOON))
    found = audit(store)
    assert {account.pending for account in found.accounts.values()} == {24 - frame.ordinal - index}
    assert found.unexplained == 0


def test_conservation_holds_before_two_damaged_frames_and_garbage_behind_the_last_one(store, log, epoch):
    for _ in range(4):
        append(log, [event() for _ in range(3)], NOON)
    for frame in frames(log)[1:3]:
        store.call("SETRANGE", f"{keys.LOG}1", frame.address & 0xFFFFFF, bytes(57))
    first = frames(Log(store))[0]
    for stream in STREAMS:
        commit(store, epoch, advance(Progress(stream, first.after(), 3), NOON))
    assert audit(store).unexplained == 0
    store.call("APPEND", f"{keys.LOG}1", b"garbage" * 20)
    for stream in STREAMS:
        commit(store, epoch, advance(Progress(stream, frames(log)[-1].after(), 9), NOON))
    assert audit(store).unexplained == 0


def test_new_fields_are_set_and_those_that_are_there_stand(store, epoch):
    store.call("HSET", "h", "b", "first")
    commands = [
        ("HSETNX", "h", "a", "1", "b", "2", "c", "3"),
        ("HSETNX", "h", "a", "4"),
        ("HSETNX", "h", "b", "5", "c", "6"),
    ]
    checkpoints.commit(store, epoch, commands)
    assert store.call("HMGET", "h", "a", "b", "c") == [b"1", b"first", b"3"]
