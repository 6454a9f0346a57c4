"""Backfill: a new definition's history is made from the stored events, exactly, while events go on arriving."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

from pipeline import keys
from pipeline.catalogue import FEATURES
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import DeadLetter, Progress
from pipeline.commit_log.dead_letters import DeadLetters
from pipeline.commit_log.frames import Position
from pipeline.commit_log.lease import Lease
from pipeline.definitions import DAY, HOUR, Feature
from pipeline.errors import Fenced, StoreUnavailable
from pipeline.features.backfill import Backfill
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.features import Features
from pipeline.streams.payees import Paid, Payees
from pipeline.streams.stream import Batch
from pipeline.tools.training_set import Label, TrainingSet
from tests.helpers import (
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    NOON,
    Clock,
    append,
    batch_of,
    event,
    frames,
    payment,
    report,
    response,
)
from tests.test_rollback import copy_of, put_back

OLD = (
    Feature(name="touches", aggregation="count", event_type="ui_interaction", window_s=HOUR, description="touches"),
    Feature(
        name="answers", aggregation="count", event_type="ride_request_response", window_s=DAY, description="answers"
    ),
)
NEW = (
    OLD[0],
    replace(OLD[1], window_s=7 * DAY),
    Feature(name="slowest", aggregation="max", event_type="ride_request_response", field="response_time", window_s=DAY,
            description="slowest answer"),
    Feature(name="events", aggregation="count", window_s=DAY, description="events"),
    Feature(name="per_touch", aggregation="ratio", of=("events", "touches"), window_s=DAY, description="events per touch"),
    Feature(name="frauds", aggregation="count", event_type="fraud_report", entity="merchant", window_s=DAY, description="frauds"),
)  # fmt: skip


class Worker:
    """What the runner does with the stream: feeds it, writes its cuts with the checkpoint, makes it anew after a crash."""

    def __init__(self, store: Store, lease: Lease, features: tuple[Feature, ...]) -> None:
        self.store, self.lease, self.log = store, lease, Log(store)
        self.at = checkpoints.read(store, ["features"])["features"]
        self.stream = Features(store, features, epoch=lambda: lease.epoch)
        self.stream.load(NOON)

    def feed(self, now: int = NOON) -> None:
        for frame in frames(self.log, self.at):
            self.stream.process(Batch([frame], self.at.index), now)
            self.at = frame.after()

    def checkpoint(self, now: int = NOON, skip_final: bool = False) -> None:
        cut = self.stream.cut(now)
        for chunk in cut.chunks:
            checkpoints.commit(self.store, self.lease.epoch, chunk)
        if not skip_final:
            progress = Progress("features", self.at)
            checkpoints.commit(self.store, self.lease.epoch, [*cut.final, *checkpoints.advance(progress, now)])
            cut.done()

    def fill(self, now: int = NOON) -> None:
        while self.stream.backfill is not None:
            self.stream.backfill.step(now)

    def bury(self) -> None:
        """The next frame's one event becomes a dead letter, as one that the stream throws at."""
        frame = frames(self.log, self.at)[0]
        batch, self.at = Batch([frame]), frame.after()
        place = batch.places[0]
        letter = DeadLetter(
            f"features-{place}", "features", place, "failed", 3, NOON, NOON, "test", NOON, batch.body(0)
        )
        progress = Progress("features", self.at, dead=[letter])
        checkpoints.commit(self.store, self.lease.epoch, checkpoints.advance(progress, NOON))

    def redrive(self) -> None:
        assert DeadLetters(self.store, self.log).redrive(None, "features", None, NOON)["redriven"] == 1


@pytest.fixture
def lease(store: Store) -> Lease:
    made = Lease(store, "test", Clock(), lambda: True)
    assert made.take()
    return made


def test_definitions_are_known_after_crashes_on_both_sides_of_the_first_checkpoint(store: Store, lease: Lease) -> None:
    append(Log(store), [response()], NOON)
    first = Worker(store, lease, OLD)
    first.feed()
    first.checkpoint(skip_final=True)
    second = Worker(store, lease, OLD)
    second.feed()
    second.checkpoint()  # of an event that is in its row already
    third = Worker(store, lease, OLD)
    assert third.stream.served == OLD
    assert third.stream.backfill is None


def events(user: str, n: int) -> list[dict[str, Any]]:
    found = [event(user=user, timestamp=NOON - i * MINUTE_MS) for i in range(n)]
    found += [response(user, response_time=float(i), timestamp=NOON - i * HOUR_MS) for i in range(n)]
    return [*found, payment(f"t-{user}", user=user, data={"merchant_id": "m"}), report(f"t-{user}", user=user)]


def post(store: Store, *users: str, n: int = 3) -> None:
    for user in users:
        append(Log(store), events(user, n), NOON)


def afresh(store: Store, features: tuple[Feature, ...] = NEW) -> Features:
    """A stream that always had the definitions, and saw every event; it knows nothing of what the store has of entities."""
    stream = Features(store, features)
    for table in stream.fold.tables.values():
        table.asking = lambda ids: iter(([], [{} for _ in ids]))  # type: ignore[method-assign, arg-type]
    for frame in frames(Log(store)):
        stream.process(Batch([frame]), NOON)
    return stream


def answers(stream: Features, users: list[str]) -> dict[str, Any]:
    return {**stream.values(users, NOON), "m": stream.values(["m"], NOON, "merchant")["m"]}


def grown(store: Store, lease: Lease) -> Worker:
    """A stream with the new definitions over a store that was filled with the old ones."""
    post(store, "u1", "u2", "u3")
    old = Worker(store, lease, OLD)
    old.feed()
    old.checkpoint()
    return Worker(store, lease, NEW)


def test_first_start_needs_no_backfill(store, lease):
    worker = Worker(store, lease, OLD)
    assert worker.stream.backfill is None
    assert set(worker.stream.states().values()) == {"ready"}


def test_stream_that_is_made_anew_amid_a_backfill_is_gone_without_the_cycle_collector(store, lease):
    worker = grown(store, lease)
    assert worker.stream.backfill is not None
    before = weakref.ref(worker.stream)
    gc.disable()
    try:
        worker.stream = Features(store, NEW)
        assert before() is None
    finally:
        gc.enable()


def test_old_version_serves_until_the_new_one_has_caught_up(store, lease):
    worker = grown(store, lease)
    before = worker.stream.values(["u1"], NOON)["u1"]
    assert before == {"touches": 3, "answers": 3}
    states = worker.stream.states()
    assert states["touches"] == "ready"
    assert states["answers"].startswith("backfilling ")
    assert states["per_touch"].startswith("backfilling ")
    worker.fill()
    assert answers(worker.stream, ["u1", "u2", "u3"]) == answers(afresh(store), ["u1", "u2", "u3"])
    assert set(worker.stream.states().values()) == {"ready"}


def test_events_that_arrive_meanwhile_are_counted_once(store, lease, monkeypatch):
    worker = grown(store, lease)
    monkeypatch.setattr("pipeline.features.backfill._READ_BYTES", 2_000)
    monkeypatch.setattr("pipeline.features.backfill.STEP_S", 0.0)
    users = ["u1", "u2", "u3", "u4"]
    for turn in range(200):
        if turn < 6:
            post(store, users[turn % 4], n=2)
            worker.feed()
        if turn % 2:
            worker.checkpoint()
        if worker.stream.backfill is None:
            break
        worker.stream.backfill.step(NOON)
    assert worker.stream.backfill is None
    post(store, "u2")
    worker.feed()
    worker.checkpoint()
    assert answers(worker.stream, users) == answers(afresh(store), users)
    again = Worker(store, lease, NEW)
    assert again.stream.backfill is None
    assert answers(again.stream, users) == answers(afresh(store), users)


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_crash_at_any_commit_leaves_every_event_counted_once(store, lease, monkeypatch, fails_at):
    worker = grown(store, lease)
    users = ["u1", "u2", "u3"]
    post(store, *users)
    worker.feed()
    real, count = checkpoints.commit, iter(range(1, 1000))

    def broken(*args: Any) -> None:
        if next(count) == fails_at:
            raise Fenced("the process was killed here")
        real(*args)

    monkeypatch.setattr(checkpoints, "commit", broken)
    crashed = False
    try:
        worker.checkpoint()
        worker.fill()
        worker.checkpoint()
    except Fenced:
        crashed = True
    monkeypatch.setattr(checkpoints, "commit", real)
    after = Worker(store, lease, NEW)
    after.feed()
    after.fill()
    after.checkpoint()
    assert answers(after.stream, users) == answers(afresh(store), users)
    assert answers(Worker(store, lease, NEW).stream, users) == answers(afresh(store), users)
    assert crashed == (fails_at < next(count))


def test_definition_dropped_again_leaves_no_field_behind(store, lease):
    worker = grown(store, lease)
    worker.fill()
    back = Worker(store, lease, OLD)
    back.fill()
    back.checkpoint()
    post(store, "u1", "u2", "u3")
    back.feed()
    back.checkpoint()
    ids = {family.id for family in back.stream.fold.families}
    for user in ("u1", "u2", "u3"):
        fields = store.client.hkeys(keys.USER + user)
        assert {field[:3] for field in fields if len(field) == 8} <= ids
        assert {field for field in fields if len(field) != 8} == {b"p"}
    assert back.stream.values(["u1"], NOON)["u1"]["touches"] == 6


def test_backfill_goes_on_where_a_restart_interrupted_it(store, lease, monkeypatch):
    worker = grown(store, lease)
    filling = worker.stream.backfill
    assert isinstance(filling, Backfill)
    monkeypatch.setattr("pipeline.features.backfill._READ_BYTES", 500)
    monkeypatch.setattr("pipeline.features.backfill.STEP_S", 0.0)
    filling.step(NOON)
    monkeypatch.undo()
    kept = msgspec.json.decode(store.call("GET", keys.BACKFILL))
    assert 0 < Position(*kept["position"]).ordinal < worker.stream.ordinal
    again = Worker(store, lease, NEW)
    again.fill()
    assert answers(again.stream, ["u1", "u2", "u3"]) == answers(afresh(store), ["u1", "u2", "u3"])


def test_without_the_lease_nothing_is_filled(store, lease):
    worker = grown(store, lease)
    lease.epoch = 0
    assert worker.stream.backfill is not None
    worker.stream.backfill.step(NOON)
    assert store.call("GET", keys.BACKFILL) is None


def test_feature_added_beside_others_leaves_their_tiles_where_they_are(store, lease):
    worker = grown(store, lease)
    before = {family.id for family in worker.stream.fold.families}
    worker.fill()
    touches = next(family for family in worker.stream.fold.families if family.event_type == "ui_interaction")
    assert touches.id in before


def test_built_in_features_added_to_a_running_store_equal_those_from_the_start(store, lease):
    post(store, "u1", "u2")
    first = Worker(store, lease, FEATURES[:5])
    first.feed()
    first.checkpoint()
    worker = Worker(store, lease, FEATURES)
    worker.fill()
    users = ["u1", "u2"]
    assert worker.stream.values(users, NOON) == afresh(store, FEATURES).values(users, NOON)
    assert worker.stream.served == FEATURES


EVENTS = Feature(name="events", aggregation="count", window_s=DAY, description="events")
SUM = Feature(name="waited", aggregation="sum", event_type="ride_request_response", field="response_time", window_s=DAY,
              description="s")  # fmt: skip


def test_reports_are_filled_for_the_payees_that_they_counted_for_when_they_came(store, lease):
    """What the stream has kept of payments since tells a backfill nothing that was not known where it reads."""
    before = tuple(f for f in FEATURES if f.entity == "merchant")
    more = (
        *before,
        replace(next(f for f in before if f.name == "payee_frauds_30d"), name="payee_frauds_7d", window_s=7 * DAY),
    )
    early = [report("early"), payment("early", data={"merchant_id": "m"})]
    twice = [payment("twice", data={"merchant_id": "m"}), report("twice"), report("twice", 0), report("twice")]
    late = [payment("late", data={"merchant_id": "m"}), report("late")]
    first = Worker(store, lease, before)
    for some in (*early, *twice, *late):
        append(first.log, [some], NOON)
        first.feed()
        first.checkpoint()
    second = Worker(store, lease, more)
    second.fill()
    found = second.stream.values(["m"], NOON, "merchant")["m"]
    assert (found["payee_frauds_30d"], found["payee_frauds_7d"]) == (2, 2)
    append(second.log, [report("late")], NOON)  # still known to be reported
    second.feed()
    assert second.stream.values(["m"], NOON, "merchant")["m"]["payee_frauds_7d"] == 2


def test_backfill_leaves_what_the_stream_has_kept_of_a_payment_since(store):
    """It comes behind the stream, and knows nothing yet of the report by which that was told of a fraud."""
    batch = batch_of(store, [payment("t", data={"merchant_id": "m"})], NOON)
    for over, paid in ((True, Paid("m", 0, reported=5)), (False, Paid("m", 0))):
        payees = Payees(store, 7 * DAY_MS, over)
        payees.keep(batch, [(0, "t", paid)])
        store.many(list(payees.cut()))
        payees.written()
    [raw] = store.client.hvals(f"{keys.PAID}{NOON // DAY_MS}")
    assert msgspec.msgpack.decode(raw, type=Paid) == Paid("m", 0, reported=5)


def counts(stream: Features, user: str = "u1") -> dict[str, Any]:
    return stream.values([user], NOON)[user]


def test_definition_dropped_and_added_again_counts_every_event_once_also_of_idle_users(store, lease):
    both = (OLD[0], EVENTS)
    first = Worker(store, lease, both)
    post(store, "u1", "u2")
    first.feed()
    first.checkpoint()
    without = Worker(store, lease, OLD[:1])
    post(store, "u2", n=1)
    without.feed()
    without.checkpoint()
    again = Worker(store, lease, both)
    again.fill()
    again.checkpoint()
    for user in ("u1", "u2"):
        assert counts(again.stream, user) == counts(afresh(store, both), user)


def test_catalogue_that_changes_while_it_is_filled_counts_every_event_once(store, lease, monkeypatch):
    post(store, "u1", "u2", "u3")
    first = Worker(store, lease, OLD[:1])
    first.feed()
    first.checkpoint()
    second = Worker(store, lease, (OLD[0], EVENTS))
    monkeypatch.setattr("pipeline.features.backfill._READ_BYTES", 500)
    monkeypatch.setattr("pipeline.features.backfill.STEP_S", 0.0)
    assert second.stream.backfill is not None
    second.stream.backfill.step(NOON)
    monkeypatch.undo()
    three = (OLD[0], EVENTS, SUM)
    third = Worker(store, lease, three)
    third.fill()
    third.checkpoint()
    for user in ("u1", "u2", "u3"):
        assert counts(third.stream, user) == counts(afresh(store, three), user)


@pytest.mark.parametrize("chunks", range(4))
def test_crash_while_a_dropped_definition_is_deleted_never_serves_what_is_left_of_it(store, lease, chunks):
    both = (OLD[0], EVENTS)
    users = [f"u{n}" for n in range(250)]  # more than one chunk
    append(Log(store), [event(user=user, timestamp=NOON) for user in users], NOON)
    first = Worker(store, lease, both)
    first.feed()
    first.checkpoint()
    without = Worker(store, lease, OLD[:1])
    append(Log(store), [event(user=user, timestamp=NOON) for user in users], NOON)
    without.feed()
    for _, chunk in zip(range(chunks), without.stream.cut(NOON).chunks, strict=False):
        checkpoints.commit(store, lease.epoch, chunk)
    again = Worker(store, lease, both)
    again.feed()
    again.fill()
    assert {v["events"] for v in again.stream.values(users, NOON).values()} == {2}


def test_dropped_definition_beside_a_new_one_is_not_served_from_what_is_left_of_it(store, lease):
    post(store, "u1")
    first = Worker(store, lease, (OLD[0], EVENTS))
    first.feed()
    first.checkpoint()
    other = Worker(store, lease, (OLD[0], SUM))  # crashes before it is filled
    post(store, "u1")
    other.feed()
    other.checkpoint()
    again = Worker(store, lease, (OLD[0], EVENTS))
    again.fill()
    assert counts(again.stream) == counts(afresh(store, (OLD[0], EVENTS)))


def test_backfill_does_not_take_over_while_rows_are_on_their_way(store, lease):
    worker = grown(store, lease)
    post(store, "u1")
    worker.feed()
    cut = worker.stream.cut(NOON)
    assert worker.stream.backfill is not None
    worker.stream.backfill.step(NOON)
    assert worker.stream.backfill is not None
    for chunk in cut.chunks:
        checkpoints.commit(store, lease.epoch, chunk)
    cut.done()
    worker.stream.backfill.step(NOON)
    assert worker.stream.backfill is None
    assert answers(worker.stream, ["u1", "u2", "u3"]) == answers(afresh(store), ["u1", "u2", "u3"])


def test_users_that_a_takeover_writes_are_published(store, lease):
    worker = grown(store, lease)
    append(Log(store), [event(user="late", timestamp=NOON)], NOON)
    worker.feed()
    worker.fill()
    assert "late" in worker.stream.outbox.first(100)
    assert "late" in worker.stream.active


@pytest.mark.parametrize("failing", ["rows", "definitions"])
def test_store_that_fails_for_a_moment_in_a_takeover_costs_no_event(store, lease, monkeypatch, failing):
    worker = grown(store, lease)
    post(store, "u1", "u4")
    worker.feed()
    real, stream = checkpoints.commit, worker.stream

    def broken(store: Store, epoch: int, commands: Any) -> None:
        if stream.torn and (failing == "rows" or any(command[1] == keys.DEFINITIONS for command in commands)):
            raise StoreUnavailable("for a moment")
        real(store, epoch, commands)

    monkeypatch.setattr(checkpoints, "commit", broken)
    with pytest.raises(StoreUnavailable):
        worker.fill()
    monkeypatch.setattr(checkpoints, "commit", real)
    post(store, "u5")
    with pytest.raises(StoreUnavailable):  # the runner makes the streams anew then
        worker.feed()
    with pytest.raises(StoreUnavailable):
        worker.checkpoint()
    after = Worker(store, lease, NEW)
    after.feed()
    after.fill()
    after.checkpoint()
    again = Worker(store, lease, NEW)
    assert answers(again.stream, ["u1", "u4", "u5"]) == answers(afresh(store), ["u1", "u4", "u5"])


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_store_that_fails_for_a_moment_in_a_step_costs_no_event(store, lease, monkeypatch, fails_at):
    """The rows of a step go in several commits: which of them are in the store nobody knows then."""
    users = [f"u{n}" for n in range(100)]
    append(Log(store), [response(user, timestamp=NOON) for user in users], NOON)
    old = Worker(store, lease, OLD)
    old.feed()
    old.checkpoint()
    worker = Worker(store, lease, NEW)
    filling, real, count = worker.stream.backfill, checkpoints.commit, iter(range(1, 1000))
    assert filling is not None

    def broken(*args: Any) -> None:
        if next(count) == fails_at:
            raise StoreUnavailable("for a moment")
        real(*args)

    monkeypatch.setattr(checkpoints, "commit", broken)
    with pytest.raises(StoreUnavailable):
        filling.step(NOON)
    worker.fill()
    again = Worker(store, lease, NEW)
    assert again.stream.values(users, NOON) == afresh(store).values(users, NOON)


def test_backfill_goes_on_from_where_a_store_is_that_came_back_without_its_latest_writes(
    store, store_server, lease, monkeypatch
):
    worker = grown(store, lease)
    filling = worker.stream.backfill
    assert filling is not None
    earlier = copy_of(store_server)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.features.backfill._READ_BYTES", 500)
        patched.setattr("pipeline.features.backfill.STEP_S", 0.0)
        filling.step(NOON)
        patched.setattr(checkpoints, "commit", MagicMock(side_effect=StoreUnavailable("it fails over")))
        with pytest.raises(StoreUnavailable):
            filling.step(NOON)
    put_back(store_server, earlier)
    worker.fill()
    users = ["u1", "u2", "u3"]
    assert answers(Worker(store, lease, NEW).stream, users) == answers(afresh(store), users)


def test_crash_of_a_takeover_in_the_midst_of_a_frame_loses_nothing(store, lease, monkeypatch):
    """A stream that goes on alone, event by event, stands there."""
    worker = grown(store, lease)
    post(store, "u1")
    frame = frames(worker.log, worker.at)[0]
    worker.stream.process(Batch([frame], 0, single=True), NOON)
    real = checkpoints.commit

    def broken(store: Store, epoch: int, commands: Any) -> None:
        if any(command[1] == keys.DEFINITIONS for command in commands):
            raise Fenced("the process was killed here")
        real(store, epoch, commands)

    monkeypatch.setattr(checkpoints, "commit", broken)
    with pytest.raises(Fenced):
        worker.fill()
    monkeypatch.setattr(checkpoints, "commit", real)
    after = Worker(store, lease, NEW)
    after.feed()
    after.fill()
    assert answers(after.stream, ["u1", "u2", "u3"]) == answers(afresh(store), ["u1", "u2", "u3"])


def test_definition_that_is_not_served_yet_is_not_called_ready_by_an_instance_that_only_reads(store, lease):
    grown(store, lease)
    reader = Features(store, NEW)
    reader.adopt(store.call("GET", keys.DEFINITIONS), fresh=False)
    states = reader.states()
    assert {name for name, state in states.items() if state == "ready"} == set(reader.definitions) - {"answers"}
    assert states["slowest"] == "waiting"


def test_user_is_known_throughout_while_backfill_takes_over(store, lease):
    """A reader asks who is in memory, then for the others' hashes, then for values."""
    worker = grown(store, lease)
    worker.feed()
    worker.stream.fold.tables["user"].load(["u1"])
    assert worker.stream.absent(["u1"]) == []
    worker.fill()
    assert counts(worker.stream) == worker.stream.values(["u1"], NOON, hashes={})["u1"]


@pytest.mark.parametrize("redriven", ["before", "meanwhile", "after"])
def test_event_sent_again_counts_once_in_what_is_filled_whenever_it_is_sent(store, lease, redriven, monkeypatch):
    worker = Worker(store, lease, OLD[:1])
    append(Log(store), [event(user="u1", timestamp=NOON)], NOON)
    worker.feed()
    append(Log(store), [event(user="u1", timestamp=NOON)], NOON)
    worker.bury()
    if redriven == "before":
        worker.redrive()
        worker.feed()
    worker.checkpoint()
    worker = Worker(store, lease, (OLD[0], EVENTS))
    if redriven == "meanwhile":
        worker.redrive()
        worker.feed()
    worker.fill()
    if redriven == "after":
        assert counts(worker.stream) == {"touches": 1, "events": 2}
        worker.redrive()
        worker.bury()  # and once more
        worker.redrive()
        worker.feed()
    assert counts(worker.stream) == {"touches": 2, "events": 2}
    worker.checkpoint()
    assert counts(Worker(store, lease, (OLD[0], EVENTS)).stream) == {"touches": 2, "events": 2}
    maker = TrainingSet(Log(store), (OLD[0], EVENTS))
    assert list(maker.join([Label({"user_id": "u1"}, NOON)])) == [{"touches": 2, "events": 2}]


def test_dead_letter_of_after_a_filling_counts_in_every_definition_when_it_is_sent_again(store, lease):
    worker = grown(store, lease)
    worker.fill()
    append(Log(store), [event(user="u1", timestamp=NOON)], NOON)
    worker.bury()
    before = counts(worker.stream)
    worker.redrive()
    worker.feed()
    assert counts(worker.stream)["touches"] == before["touches"] + 1
    assert counts(worker.stream)["events"] == before["events"] + 1
