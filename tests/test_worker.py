"""A stream's trouble stays its own: one that throws or hangs finds its bad event, and the others never notice."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import Position
from pipeline.commit_log.lease import Lease
from pipeline.errors import Fenced
from pipeline.events import Event, Stored
from pipeline.log import Log
from pipeline.runtime import Runtime
from pipeline.store import Call, Command, Store
from pipeline.streams import group as groups
from pipeline.streams import worker
from pipeline.streams.aggregates import Aggregates
from pipeline.streams.group import Failed, Group
from pipeline.streams.runner import APART_EVENTS, Runner
from pipeline.streams.storage import Query, Storage
from pipeline.streams.straggler import MAX_ATTEMPTS, MAX_BAD_IN_A_ROW, Straggler
from pipeline.streams.stream import Batch, Cut, Outcome, Stream
from pipeline.streams.worker import Shared
from tests.conftest import Start, client_of
from tests.helpers import LOCAL, NOON, append, event, frames, until

Break = Callable[[Event], None]
OTHERS = ("features", "aggregates", "inference")


class Trouble:
    """What the storage stream of these tests does at an event: throws, or waits, or nothing."""

    def __init__(self) -> None:
        self.at: Callable[[Event | Stored], bool] = lambda _: False
        self.hangs = False
        self.times = 10**9  # how often, then it works
        self.gate = threading.Event()

    def meet(self, found: Event | Stored) -> None:
        if self.times > 0 and self.at(found):
            self.times -= 1
            if self.hangs:
                self.gate.wait()
            raise RuntimeError(f"cannot take {found.event_id}")


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    made = Trouble()

    class Troubled(Storage):
        def process(self, batch: Batch, now: int) -> Outcome:
            for found in batch.events:
                if found is not None:
                    made.meet(found)
            return super().process(batch, now)

    monkeypatch.setattr("pipeline.runtime.Storage", Troubled)
    yield made
    made.gate.set()


@pytest.fixture
def nexus(trouble: Trouble, start_nexus: Start) -> Runtime:
    return start_nexus(ENABLE_PYTHON_BRIDGE="false")


@pytest.fixture
def epoch(store: Store) -> int:
    lease = Lease(store, "test", None, lambda: True)
    assert lease.take()
    return lease.epoch


@pytest.fixture
def group(store: Store, epoch: int) -> Group:
    """A group that holds the storage stream, run by the test itself."""

    def failed(failure: Failed) -> None:
        raise AssertionError(failure)

    lease = Lease(store, "test", None, lambda: True)
    lease.epoch = epoch
    make: dict[str, Callable[[], Stream]] = {
        "storage": lambda: Storage(store),
        "aggregates": lambda: Aggregates(store),
    }
    shared = Shared(store, Log(store), lease, lambda: NOON, make, threading.Event(), lambda *_: None)
    made = Group(shared, Position(), {}, failed)
    made.load("storage", Position())
    return made


def post(nexus: Runtime, *names: str) -> None:
    events = [event(event_id=name) for name in names]
    nexus.ingest.post(json.dumps(events).encode(), "", "", {})


def audit(nexus: Runtime) -> Any:
    found = checkpoints.audit(nexus.store)
    assert found.unexplained == 0
    return found.accounts


def done(nexus: Runtime, *streams: str) -> bool:
    accounts = audit(nexus)
    return all(accounts[name].pending == 0 for name in streams)


def stored_ids(nexus: Runtime) -> list[str]:
    return [f.event.event_id for f in nexus.events.find(Query(), 1000)[0]]


def letters(nexus: Runtime) -> list[dict[str, Any]]:
    return client_of(nexus).get("/api/ml/dead-letters").json["dead_letters"]


@pytest.mark.parametrize("bad", [{"e0"}, {"e5"}, {"e9"}, {"e0", "e1", "e9"}])
def test_event_at_which_a_stream_throws_dies_there_alone_after_several_attempts(nexus, trouble, bad):
    trouble.at = lambda found: found.event_id in bad
    post(nexus, *[f"e{n}" for n in range(10)])
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    found = letters(nexus)
    assert {letter["event"]["event_id"] for letter in found} == bad
    assert all((x["stream"], x["attempts"]) == ("storage", 3) and "cannot take" in x["reason"] for x in found)
    assert sorted(stored_ids(nexus)) == sorted({f"e{n}" for n in range(10)} - bad)
    accounts = audit(nexus)
    assert (accounts["storage"].processed, accounts["storage"].dead) == (10 - len(bad), len(bad))
    assert all((accounts[name].processed, accounts[name].dead) == (10, 0) for name in OTHERS)


def test_stream_that_throws_and_then_works_loses_and_doubles_nothing(nexus, trouble):
    trouble.at, trouble.times = lambda found: found.event_id == "e5", 2
    post(nexus, *[f"e{n}" for n in range(10)])
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    assert sorted(stored_ids(nexus)) == sorted(f"e{n}" for n in range(10))
    assert letters(nexus) == []


def test_stream_that_threw_works_with_the_others_again(nexus, trouble):
    trouble.at = lambda found: found.event_id == "e3"
    post(nexus, *[f"e{n}" for n in range(6)])
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    until(lambda: all(nexus.stream_states()[name][0] == "running" for name in LOCAL), "all streams running")
    post(nexus, "after")
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    assert "after" in stored_ids(nexus)


def test_stream_that_throws_at_everything_holds_its_events_and_shows_it_while_the_others_go_on(nexus, trouble):
    trouble.at = lambda _: True
    names = [f"e{n}" for n in range(40)]
    for name in names:
        post(nexus, name)
    until(lambda: done(nexus, *OTHERS), "the others' work")
    until(lambda: nexus.stream_states()["storage"][0] == "failed", "the failure shown")
    assert "cannot take" in str(nexus.stream_states()["storage"][1])
    assert audit(nexus)["storage"].dead < 10
    assert nexus.runner.state == "running"
    trouble.times = 0
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    accounts = audit(nexus)
    assert accounts["storage"].processed + accounts["storage"].dead == 40
    assert len(stored_ids(nexus)) == accounts["storage"].processed


@pytest.mark.parametrize("part", ["cut", "load"])
def test_stream_that_throws_beside_its_events_is_told_and_the_others_do_not_notice(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    sound = getattr(Storage, part)

    def throws(*_: object) -> None:
        raise RuntimeError("no such table")

    monkeypatch.setattr(Storage, part, throws)
    nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    post(nexus, "e0", "e1")
    until(lambda: done(nexus, *OTHERS), "the others' work")
    until(lambda: nexus.runner.states()["storage"] == ("failed", "RuntimeError: no such table"), "the failure told")
    assert {nexus.runner.states()[name][0] for name in OTHERS} == {"running"}
    monkeypatch.setattr(Storage, part, sound)
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    assert sorted(stored_ids(nexus)) == ["e0", "e1"]
    assert audit(nexus)["storage"].dead == 0


def test_stream_that_hangs_holds_up_nobody_else_and_its_event_dies(nexus, trouble, monkeypatch):
    monkeypatch.setattr("pipeline.streams.runner.HANG_S", 0.3)
    trouble.at, trouble.hangs = lambda found: found.event_id == "e2", True
    post(nexus, *[f"e{n}" for n in range(5)])
    until(lambda: done(nexus, *OTHERS), "the others' work")
    until(lambda: done(nexus, "storage"), "the end of the hanging stream's work")
    assert sorted(stored_ids(nexus)) == ["e0", "e1", "e3", "e4"]
    [letter] = letters(nexus)
    assert (letter["event"]["event_id"], letter["stream"]) == ("e2", "storage")
    assert audit(nexus)["features"].processed == 5


def test_worker_that_wakes_after_it_was_given_up_writes_nothing(nexus, trouble, monkeypatch):
    monkeypatch.setattr("pipeline.streams.runner.HANG_S", 0.3)
    trouble.at, trouble.hangs, trouble.times = lambda found: found.event_id == "e2", True, 1
    post(nexus, *[f"e{n}" for n in range(5)])
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    hung = [thread for thread in threading.enumerate() if thread.name in ("pipeline", "straggler-storage")]
    trouble.gate.set()
    until(lambda: sum(thread.is_alive() for thread in hung) <= 1, "the end of whoever hung")
    post(nexus, "after")
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    assert sorted(stored_ids(nexus)) == ["after", "e0", "e1", "e2", "e3", "e4"]
    assert all(account.processed == 6 for name, account in audit(nexus).items() if name in LOCAL)


def test_commit_that_is_on_its_way_when_its_worker_is_given_up_is_refused(nexus, trouble, monkeypatch):
    monkeypatch.setattr("pipeline.streams.runner.HANG_S", 0.3)
    trouble.at, trouble.hangs, trouble.times = lambda found: found.event_id == "e2", True, 1
    hung = nexus.runner._group
    assert hung is not None
    post(nexus, *[f"e{n}" for n in range(5)])
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    with pytest.raises(Fenced):
        checkpoints.begin(nexus.store, hung.epoch, checkpoints.pack([("SET", "ml:{p}:mark", "1")])).result()
    group = nexus.runner._group
    assert group is not None
    checkpoints.begin(nexus.store, group.epoch, checkpoints.pack([("DEL", "ml:{p}:mark")])).result()


def test_failure_of_a_worker_that_was_given_up_is_nobodys(group: Group) -> None:
    """The stream runs elsewhere by then: a second straggler for it would count everything twice."""
    append(group.shared.log, [event()], NOON)

    def wakes(*_: object) -> Outcome:
        group.abandoned = True
        raise RuntimeError("the call that hung failed at last")

    group.streams["storage"].process = wakes  # type: ignore[method-assign,assignment]
    with pytest.raises(Fenced):
        group._give(Batch(frames(group.shared.log)), ["storage"])


def test_worker_that_wakes_after_it_was_given_up_tells_of_no_progress(group: Group) -> None:
    """Whoever waits for the stream waits for the one that runs by then."""
    told: dict[str, int] = {}
    group.shared.applied = told.__setitem__
    append(group.shared.log, [event()], NOON)
    process = group.streams["storage"].process

    def wakes(batch: Batch, now: int) -> Outcome:
        group.abandoned = True
        return process(batch, now)

    group.streams["storage"].process = wakes  # type: ignore[method-assign]
    with pytest.raises(Fenced):
        group._give(Batch(frames(group.shared.log)), ["storage"])
    assert (told, group.at["storage"].ordinal, group.counters["storage"].processed) == ({}, 0, 0)


def test_worker_that_was_given_up_commits_nothing_though_its_epoch_stands(group: Group) -> None:
    """At the end of the pipeline nobody raises it."""
    append(group.shared.log, [event()], NOON)
    group._give(Batch(frames(group.shared.log)), ["storage"])
    group.abandoned = True
    with pytest.raises(Fenced):
        group.checkpoint()
    assert checkpoints.read(group.shared.store, ["storage"])["storage"] == Position()


def test_live_position_passes_an_event_that_is_given_up_and_what_is_read_on_the_way_into_the_group(
    group: Group,
) -> None:
    told: dict[str, int] = {}
    group.shared.applied = told.__setitem__
    log = group.shared.log
    append(log, [event() for _ in range(2)], NOON)
    append(log, [event()], NOON)
    first, second = frames(log)
    straggler = Straggler(group.shared, "storage", lambda _: False, careful=True)
    straggler.load("storage", Position())
    straggler.attempts[0], straggler.condemned[0] = (MAX_ATTEMPTS, NOON, "odd"), "failed"
    assert straggler._try(Batch([first], 0, single=True))
    assert told == {"storage": 1}
    group.position = group.front = second.after()
    group._admit("aggregates")
    assert told["aggregates"] == 3


def test_key_of_the_wrong_type_is_the_trouble_of_its_event_alone(nexus):
    nexus.store.call("SET", keys.USER + "odd", "no hash")
    events = [event(user="odd", event_id="odd"), *(event(user=f"u{n}") for n in range(5))]
    nexus.ingest.post(json.dumps(events).encode(), "", "", {})
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    assert [(x["stream"], x["event"]["event_id"], "WRONGTYPE" in x["reason"]) for x in letters(nexus)] == [
        ("features", "odd", True)
    ]
    until(lambda: {state for state, _ in nexus.runner.states().values()} == {"running"}, "the stream to join")


@pytest.mark.parametrize("index", [1, 5])
@pytest.mark.parametrize("group_index", [0, 3])
def test_stream_that_joins_within_a_frame_is_fed_no_event_of_it_again(
    group: Group, epoch: int, index: int, group_index: int
) -> None:
    store, log = group.shared.store, group.shared.log
    append(log, [event() for _ in range(6)], NOON)
    append(log, [event() for _ in range(6)], NOON)
    position = Position(1, 0, index, index)
    checkpoints.commit(store, epoch, checkpoints.advance(Progress("aggregates", position, index), NOON))
    group.position = group.front = Position(1, 0, group_index, group_index)
    group._admit("aggregates")
    while group.lead():
        group.follow()
    group.checkpoint()
    accounts = checkpoints.audit(store).accounts
    assert (accounts["aggregates"].processed, accounts["aggregates"].unexplained) == (12, 0)


@pytest.fixture
def now(group: Group, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock that paces the group, in seconds: it stands still until set."""
    clock = [100.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for pace in group._paces.values():
        pace.ended = clock[0]
    return clock


def feed(group: Group) -> None:
    append(group.shared.log, [event()], NOON)
    assert group.lead()
    assert group.follow()


def test_checkpoint_comes_a_moment_after_the_last_event_but_not_between_two(group: Group, now: list[float]) -> None:
    for _ in range(4):
        now[0] += 0.09
        feed(group)
        assert not group.checkpoint_step(True)
    now[0] += 0.11
    assert group.checkpoint_step(True)


def test_checkpoint_of_a_stream_with_much_for_one_step_does_not_wait(
    group: Group, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(group)
    assert not group.checkpoint_step(False)
    monkeypatch.setattr(Storage, "full", True)
    assert group.checkpoint_step(False)


def test_checkpoint_that_takes_long_is_not_followed_by_the_next_at_once(
    group: Group, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = checkpoints.begin

    def slow(*given: Any) -> Call:
        now[0] += 0.1
        return begin(*given)

    monkeypatch.setattr(checkpoints, "begin", slow)
    feed(group)
    now[0] += 1.0
    assert group.checkpoint_step(False)
    feed(group)
    while group._paces["storage"].steps is not None:
        group.checkpoint_step(False)
    now[0] += 1.7  # a twentieth of the time is for checkpoints
    assert not group.checkpoint_step(False)
    now[0] += 0.2
    assert group.checkpoint_step(False)


def test_events_are_taken_in_while_the_store_is_at_a_checkpoint(group: Group) -> None:
    feed(group)
    position = group.at["storage"]
    steps = group._checkpoint("storage")
    while not group.committing:
        next(steps)
    feed(group)
    assert "storage" not in group._committed
    for _ in steps:
        group.settle()
    assert group._committed["storage"] == position
    assert checkpoints.read(group.shared.store, ["storage"])["storage"] == position
    assert group.at["storage"].ordinal == position.ordinal + 1


def test_commit_that_the_store_has_yet_to_answer_holds_up_no_event(
    group: Group, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[bool] = []
    monkeypatch.setattr(Call, "ready", lambda call: bool(answered))
    feed(group)
    now[0] += 1.0
    while not group.committing:
        assert group.checkpoint_step(False)
    assert not group.checkpoint_step(False)
    feed(group)
    answered.append(True)
    while group._paces["storage"].steps is not None:
        assert group.checkpoint_step(False)
    assert group._committed["storage"].ordinal == 1


def test_commit_takes_the_place_of_no_other_that_is_under_way(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = False
    monkeypatch.setattr(Call, "ready", lambda call: answered)
    group.load("aggregates", Position())
    chunks: Iterator[list[Command]] = iter([[("SET", f"x{n}", n)] for n in range(2)])
    monkeypatch.setattr(group.streams["storage"], "cut", lambda now: Cut(chunks))
    feed(group)
    one, other = group._checkpoint("storage"), group._checkpoint("aggregates")
    assert next(one)
    first = group._under_way
    while (began := next(other)) and group._under_way is first:
        pass
    assert not began
    answered = True
    assert next(one)
    second = group._under_way
    assert second is not first
    answered = False
    assert not next(other)
    assert group._under_way is second


def test_store_that_does_not_answer_a_commit_is_found_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    call = store.begin("vectors", ["none"], [0])
    until(call.ready, "the answer")
    assert call.result() == [[]]
    monkeypatch.setattr("pipeline.store.spoke", lambda connection: False)
    call = store.begin("vectors", ["none"], [0])
    assert not call.ready()
    monkeypatch.setattr("pipeline.store._PATIENCE_S", 0.0)
    assert call.ready()
    assert call.result() == [[]]


@pytest.fixture
def led(group: Group, monkeypatch: pytest.MonkeyPatch) -> Group:
    """A group of two streams of which aggregates leads."""
    monkeypatch.setattr(groups, "LEADER", "aggregates")
    group.load("aggregates", Position())
    return group


def ordinals(group: Group) -> dict[str, int]:
    return {name: position.ordinal for name, position in group.at.items()}


def test_what_is_new_goes_to_the_leader_before_the_others_have_had_what_came_earlier(led: Group) -> None:
    for size in (2, 3):
        append(led.shared.log, [event() for _ in range(size)], NOON)
        assert led.lead()
    assert ordinals(led) == {"aggregates": 5, "storage": 0}
    assert led.follow()
    assert ordinals(led) == {"aggregates": 5, "storage": 2}
    assert led.follow()
    assert not led.follow()
    assert ordinals(led) == {"aggregates": 5, "storage": 5}
    led.checkpoint()
    accounts = checkpoints.audit(led.shared.store).accounts
    assert {name: accounts[name].processed for name in led.streams} == {"aggregates": 5, "storage": 5}


@pytest.mark.parametrize("limit", ["MOST_AHEAD", "MOST_AHEAD_BYTES"])
def test_leader_that_is_as_far_ahead_as_it_may_be_waits_for_the_others(
    led: Group, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """However much comes, nothing is ever further ahead."""
    append(led.shared.log, [event(), event()], NOON)
    frame = frames(led.shared.log)[0]
    monkeypatch.setattr(groups, limit, 4 if limit == "MOST_AHEAD" else 2 * (frame.next - frame.address))
    apart: list[int] = []

    def follow() -> bool:
        apart.append(led.at["aggregates"].ordinal - led.at["storage"].ordinal)
        if led.at["storage"].ordinal == 40:
            led.stopping.set()
        return Group.follow(led)

    monkeypatch.setattr(led, "follow", follow)
    monkeypatch.setattr(groups, "PASS_EVENTS", 1)
    for _ in range(19):
        append(led.shared.log, [event(), event()], NOON)
    led.work()
    assert max(apart) == 4
    assert ordinals(led) == {"aggregates": 40, "storage": 40}


def test_those_that_follow_give_way_to_precedence_for_a_while_and_then_no_longer(
    led: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(led.shared.log, [event()], NOON)
    with led.shared.precedence:
        assert not led._gives_way()  # there is nothing to put off
        led.lead()
        monkeypatch.setattr(groups, "GIVE_WAY_S", 1e9)
        assert led._gives_way()
        monkeypatch.setattr(groups, "GIVE_WAY_S", 0.0)
        assert not led._gives_way()
        monkeypatch.setattr(groups, "GIVE_WAY_S", 1e9)
        led.stopping.set()
        assert not led._gives_way()
    led.stopping.clear()
    assert not led._gives_way()


@pytest.mark.parametrize("name", ["aggregates", "storage"])
def test_stream_that_joins_while_the_leader_is_ahead_has_each_event_once(led: Group, name: str) -> None:
    for _ in range(3):
        append(led.shared.log, [event(), event()], NOON)
    assert led.lead()
    led.checkpoint()
    led.drop(name)
    led._admit(name)
    while led.lead():
        led.follow()
    led.checkpoint()
    accounts = checkpoints.audit(led.shared.store).accounts
    assert [(accounts[n].processed, accounts[n].unexplained) for n in led.streams] == [(6, 0), (6, 0)]


def test_stream_with_much_to_write_holds_up_no_other_ones_checkpoint(
    group: Group, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    group.load("aggregates", Position())
    chunks: Iterator[list[Command]] = iter([[("SET", f"x{n}", n)] for n in range(20)])
    monkeypatch.setattr(group.streams["aggregates"], "cut", lambda now: Cut(chunks))
    feed(group)
    now[0] += 1.0
    for _ in range(8):
        group.checkpoint_step(False)
        group.settle()
    assert "aggregates" not in group._committed
    assert group._committed["storage"].ordinal == 1
    while group._paces["aggregates"].steps is not None:
        group.checkpoint_step(False)
    assert group._committed["aggregates"].ordinal == 1
    assert group.shared.store.call("MGET", "x0", "x19") == [b"0", b"19"]


def test_straggler_made_anew_stands_where_its_commit_on_the_way_has_brought_it(
    group: Group, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    straggler = Straggler(group.shared, "storage", lambda _: False, careful=False)
    straggler._reload()
    append(group.shared.log, [event()], NOON)
    assert straggler._try(Batch(frames(group.shared.log)))
    begin = checkpoints.begin

    class Late:
        """A commit that the store comes to only when somebody waits for it."""

        def __init__(self, *given: Any) -> None:
            self.result = lambda: begin(*given).result()

    monkeypatch.setattr(checkpoints, "begin", Late)
    now[0] += 1.0
    while straggler._under_way is None:
        assert straggler.checkpoint_step(False)
    straggler._reload()
    assert straggler.at["storage"].ordinal == 1


def test_stream_that_hangs_at_event_after_event_holds_rather_than_buries_on(group: Group) -> None:
    append(group.shared.log, [event() for _ in range(2 * MAX_BAD_IN_A_ROW)], NOON)
    [frame] = frames(group.shared.log)
    straggler, buried = Straggler(group.shared, "storage", lambda _: False, careful=True), 0
    for ordinal in range(len(frame.records)):
        for _ in range(MAX_ATTEMPTS):
            hung, straggler = straggler, Straggler(group.shared, "storage", lambda _: False, careful=True)
            straggler.stopping.set()  # it pauses nowhere
            straggler.hung_at(ordinal, hung)
        if straggler.holding is not None:
            break
        straggler._reload()
        assert straggler._try(Batch([frame], ordinal, single=True))
        buried += 1
    assert buried == MAX_BAD_IN_A_ROW


def runner_of(group: Group) -> Runner:
    """One whose threads never start."""
    shared = group.shared
    made = Runner(
        shared.store, shared.log, shared.lease, shared.clock, shared.make, lambda _, body: threading.Thread(target=body)
    )
    made._shared = shared
    return made


@pytest.mark.parametrize(
    ("positions", "start", "together"),
    [
        ((10, 10), 10, {"storage", "aggregates"}),
        ((10, 500), 10, {"storage", "aggregates"}),  # as a crash leaves them: each had its own last checkpoint
        ((10, 10 + APART_EVENTS), 10, {"storage", "aggregates"}),
        ((10, 11 + APART_EVENTS), 11 + APART_EVENTS, {"aggregates"}),  # a straggler catches up by itself
    ],
)
def test_streams_go_on_together_from_the_hindmost_unless_one_is_far_behind(
    positions: tuple[int, int], start: int, together: set[str], group: Group
) -> None:
    runner = runner_of(group)
    names = ("storage", "aggregates")
    runner._divide({name: Position(1, at, 0, at) for name, at in zip(names, positions, strict=True)})
    assert runner._group is not None
    assert (runner._group.position.ordinal, set(runner._group._start)) == (start, together)
    assert set(runner._stragglers) == set(names) - together


def test_pipeline_that_fails_at_once_again_and_again_is_started_less_and_less_often(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, pauses = runner_of(group), list[float]()

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            if len(pauses) == 8:
                self.set()
            return self.is_set()

    def fails() -> None:
        raise RuntimeError("it fails")

    monkeypatch.setattr(runner, "_start", fails)
    runner.run(Stop())
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])


def test_stream_within_a_frame_does_not_wait_for_the_group_to_come_by(group: Group) -> None:
    runner = runner_of(group)
    runner._divide({"storage": Position(1, 0, 0, 0), "aggregates": Position(1, 0, 3, 3)})
    assert runner._group is not None
    assert set(runner._group._start) == {"storage"}
    assert set(runner._stragglers) == {"aggregates"}


def test_answer_that_nobody_waits_for_is_not_taken_for_the_next_one(store: Store) -> None:
    store.call("SET", "x", "y")
    with contextlib.closing(store.begin("fetch", ("log:",), [1, 1])):
        pass
    assert store.call("GET", "x") == b"y"


def test_stream_that_throws_as_it_joins_leaves_the_others_alone(group: Group) -> None:
    failed: list[Failed] = []
    group._failed = failed.append
    group.shared.make["aggregates"] = lambda: 1 / 0
    group._admit("aggregates")
    assert [failure.stream for failure in failed] == ["aggregates"]
    assert list(group.streams) == ["storage"]


def test_stream_waits_once_for_its_repair_however_many_bad_events_follow(nexus, trouble, monkeypatch):
    monkeypatch.setattr("pipeline.streams.straggler.HOLD_S", 0.5)
    bad = [f"bad{n}" for n in range(8)]
    trouble.at = lambda found: found.event_id in bad
    post(nexus, *bad, "good")
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    assert [letter["attempts"] > MAX_ATTEMPTS for letter in letters(nexus)].count(True) == 1
    assert (audit(nexus)["storage"].processed, audit(nexus)["storage"].dead) == (1, len(bad))
    assert stored_ids(nexus) == ["good"]


def test_receipt_shows_the_dead_stream_and_the_done_ones(nexus, trouble):
    trouble.at = lambda found: found.event_id == "bad"
    post(nexus, "bad", "good")
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    streams = client_of(nexus).get("/api/ml/events/bad").json["streams"]
    assert streams["storage"]["state"] == "dead"
    assert "cannot take bad" in streams["storage"]["result"]["reason"]
    assert {streams[name]["state"] for name in OTHERS} == {"done"}


def test_dead_letter_sent_again_after_the_repair_is_processed_once(nexus, trouble):
    trouble.at = lambda found: found.event_id == "bad"
    post(nexus, "bad", "good")
    until(lambda: done(nexus, *LOCAL), "the end of the work")
    trouble.times = 0
    client = client_of(nexus)
    [letter] = letters(nexus)
    answer = client.post("/api/ml/dead-letters/redrive", json={"ids": [letter["id"]]})
    assert (answer.status_code, answer.json["redriven"]) == (200, 1)
    until(lambda: done(nexus, *LOCAL) and audit(nexus)["storage"].dead == 0, "the end of the work")
    assert letters(nexus) == []
    assert sorted(stored_ids(nexus)) == ["bad", "good"]
    assert all(account.processed == 2 for name, account in audit(nexus).items() if name in LOCAL)
    assert client.get("/api/ml/events/bad").json["streams"]["storage"]["state"] == "done"


def test_event_posted_beside_a_troubled_stream_is_applied_at_once_for_the_others(nexus, trouble):
    trouble.at = lambda _: True
    post(nexus, "e0")
    posted = client_of(nexus).post("/api/ml/events/ingest?wait=features&timeout_ms=10000", json=event(user="u9"))
    assert posted.json["applied"] is True
    assert nexus.features.combine(["u9"])["u9"].combined["event_count_5m"] == 1
