"""Sliding windows against brute force: the newer edge exact, the older one within a tile, no event counted twice."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.catalogue import FEATURES
from pipeline.definitions import DAY, HOUR, Entity, Feature
from pipeline.events import Stored
from pipeline.features.extraction import Owners, compile_counting
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.features import Features
from pipeline.streams.stream import Batch
from pipeline.windows import Windows
from tests.helpers import DAY_MS, HOUR_MS, MINUTE_MS, NOON, append, batch_of, event, frames, response, write

WINDOWS = {"event_count_5m": 5 * MINUTE_MS, "event_count_1h": HOUR_MS, "event_count_24h": DAY_MS}
Posted = tuple[int, str, float]  # event time, answer, response time

on_a_store = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ages = st.one_of(
    st.integers(-HOUR_MS, 0),
    st.integers(0, 10 * MINUTE_MS),
    st.integers(0, 2 * HOUR_MS),
    st.integers(DAY_MS - HOUR_MS, DAY_MS + HOUR_MS),
    st.sampled_from([0, 1, 5 * MINUTE_MS, HOUR_MS, HOUR_MS - 1, HOUR_MS + 1, DAY_MS, DAY_MS - 1]),
)
answers = st.tuples(ages, st.sampled_from(["accepted", "rejected"]), st.integers(0, 50).map(float))


def brute(posted: Iterable[Posted], name: str, edge: int, at: int) -> float | int | None:
    """A shared feature over the events with edge < time <= at."""
    inside = [p for p in posted if edge < p[0] <= at]
    if name == "acceptance_rate":
        return sum(p[1] == "accepted" for p in inside) / len(inside) if inside else None
    if name == "response_time":
        return sum(p[2] for p in inside) / len(inside) if inside else None
    if name == "recent_rejections":
        return sum(p[1] == "rejected" for p in inside)
    return len(inside)


def assert_true_as_of(values: dict[str, Any], posted: Sequence[Posted], at: int) -> None:
    """Each value is the brute force one for an older edge moved by no more than a tile, a sixtieth of the window."""
    shared = {"acceptance_rate": DAY_MS, "response_time": DAY_MS, "recent_rejections": HOUR_MS}
    for name, window in {**shared, **WINDOWS}.items():
        tile = window // 60
        low, high = at - window - tile, at - window + tile
        edges = [low, high, *(ts for ts, _, _ in posted if low <= ts <= high)]
        possible = [brute(posted, name, edge, at) for edge in edges]
        near = [p for p in possible if p == values[name] or (p and values[name] and abs(p - values[name]) < 1e-9)]
        assert near, f"{name} is {values[name]}, possible are {possible}"


def take(stream: Features, store: Store, posted: Sequence[Posted], now: int, user: str = "driver_1") -> None:
    events = [response(user, answer, response_time=taken, timestamp=ts) for ts, answer, taken in posted]
    if events:
        stream.process(batch_of(store, events, now), now)


def values(stream: Features, at: int, user: str = "driver_1") -> dict[str, Any]:
    return stream.values([user], at)[user]


@on_a_store
@given(st.lists(answers, min_size=1, max_size=25), st.integers(0, 3 * HOUR_MS))
@example([(-1, "rejected", 1.0)], 0)
@example([(-1, "rejected", 1.0)], 1)
@example([(HOUR_MS, "rejected", 1.0)], 0)
def test_tiles_equal_brute_force_within_one_tile_at_the_older_edge(store, found, later):
    store.call("FLUSHALL")
    posted = [(NOON - age, answer, taken) for age, answer, taken in found]
    stream = Features(store)
    take(stream, store, posted, NOON)
    assert_true_as_of(values(stream, NOON), posted, NOON)
    assert_true_as_of(values(stream, NOON + later), posted, NOON + later)


@on_a_store
@given(
    st.lists(
        st.tuples(st.lists(answers, max_size=6), st.integers(0, 2 * HOUR_MS), st.booleans()), min_size=1, max_size=6
    )
)
def test_values_stay_true_over_time_through_checkpoints_and_restarts(store, steps):
    store.call("FLUSHALL")
    stream, now, posted = Features(store), NOON, []
    stream.load(now)
    for found, pause, restart in steps:
        fresh = [(now - age, answer, taken) for age, answer, taken in found]
        take(stream, store, fresh, now)
        posted += fresh
        write(store, stream.cut(now))
        if restart:
            stream = Features(store)
            stream.load(now)
        now += pause
        if posted:
            assert_true_as_of(values(stream, now), posted, now)


def test_newer_edge_is_exact_to_the_millisecond(store):
    stream = Features(store)
    take(stream, store, [(NOON, "rejected", 1.0), (NOON + 1, "rejected", 1.0)], NOON)
    assert values(stream, NOON)["recent_rejections"] == 1
    assert values(stream, NOON + 1)["recent_rejections"] == 2


def test_event_stamped_ahead_counts_once_its_time_has_come_also_after_a_restart(store):
    stream = Features(store)
    take(stream, store, [(NOON + MINUTE_MS, "rejected", 1.0), (NOON, "accepted", 2.0)], NOON)
    write(store, stream.cut(NOON))
    for reader in (stream, again := Features(store)):
        assert values(reader, NOON)["event_count_5m"] == 1
        assert values(reader, NOON + MINUTE_MS)["event_count_5m"] == 2
    take(again, store, [(NOON + 2 * MINUTE_MS, "accepted", 2.0)], NOON + 2 * MINUTE_MS)
    write(store, again.cut(NOON + 2 * MINUTE_MS))
    assert values(Features(store), NOON + 2 * MINUTE_MS)["event_count_5m"] == 3


def test_expired_count_is_never_shown_as_present(store):
    stream = Features(store)
    take(stream, store, [(NOON, "rejected", 1.0)], NOON)
    later = values(stream, NOON + 25 * HOUR_MS)
    assert later == {
        **later,
        "acceptance_rate": None,
        "response_time": None,
        "recent_rejections": 0,
        "event_count_24h": 0,
    }


@given(
    found=st.lists(answers, min_size=1, max_size=15),
    later=st.integers(0, 3 * HOUR_MS),
    names=st.frozensets(st.sampled_from([*sorted(f.name for f in FEATURES if f.entity == "user"), "unheard_of"])),
)
@on_a_store
def test_values_that_are_asked_for_by_name_are_those_among_all_values(store, found, later, names):
    stream = Features(store)
    posted = [(NOON - age, answer, took) for age, answer, took in found]
    take(stream, store, posted, NOON)
    [whole] = stream.values(["driver_1"], NOON + later).values()
    [some] = stream.values(["driver_1"], NOON + later, names=names).values()
    assert {name: whole[name] for name in some} == some
    assert names & whole.keys() <= some.keys()
    assert some, "a user who is known has values, whatever is asked for"


def test_late_event_counts_in_its_own_window(store):
    stream = Features(store)
    take(stream, store, [(NOON - 2 * HOUR_MS, "rejected", 1.0)], NOON)
    found = values(stream, NOON)
    assert (found["recent_rejections"], found["event_count_1h"], found["event_count_24h"]) == (0, 0, 1)


def test_answer_that_is_neither_accepted_nor_rejected_leaves_the_rate_alone(store):
    stream = Features(store)
    take(stream, store, [(NOON, "accepted", 1.0), (NOON, "timeout", 1.0)], NOON)
    assert values(stream, NOON)["acceptance_rate"] == 1.0


def test_response_without_a_time_leaves_the_mean_alone(store):
    stream = Features(store)
    plain = event("ride_request_response", "driver_1", data={"response": "accepted"}, timestamp=NOON)
    stream.process(batch_of(store, [plain, response(response_time=4.0, timestamp=NOON)], NOON), NOON)
    assert values(stream, NOON)["response_time"] == 4.0


def test_crash_after_any_chunk_of_a_checkpoint_counts_nothing_twice(store):
    """The chunks written so far are in the store, the checkpoint is not: the whole log is read again."""
    log = Log(store)
    users = [f"driver_{n}" for n in range(250)]
    for _ in range(2):
        append(log, [response(user, timestamp=NOON) for user in users], NOON)
    everything = frames(log)
    crashed, written = False, 0
    while not crashed or written:
        stream = Features(store)
        stream.load(NOON)
        for frame in everything:
            stream.process(Batch([frame]), NOON)
        assert {v["event_count_5m"] for v in stream.values(users, NOON).values()} == {2}
        chunks = list(stream.cut(NOON).chunks)
        if not crashed:
            assert len(chunks) > 1
            written, crashed = len(chunks), True
        written -= 1
        for chunk in chunks[: len(chunks) - written]:
            store.many(chunk)
    assert {v["event_count_5m"] for v in Features(store).values(users, NOON).values()} == {2}


def test_long_history_of_one_user_is_written_in_commands_that_a_script_can_take(store):
    stream = Features(store)
    stream.load(NOON)
    events = [event(user="u", timestamp=NOON - (9_000 - n) * 6_000) for n in range(9_000)]
    for at in range(0, len(events), 3_000):
        stream.process(batch_of(store, events[at : at + 3_000], NOON), NOON)
    commands = [command for chunk in stream.cut(NOON).chunks for command in chunk]
    assert sum(map(len, commands)) > 8_000
    assert max(map(len, commands)) < 4_000


def test_event_from_before_1970_is_taken_and_counts_in_no_window(store):
    stream = Features(store)
    stream.load(NOON)
    stamps = ["1970-01-01T07:59:59+08:00", "1969-12-31T23:59:59.999Z", "0001-01-01T00:00:00Z"]
    for stamp in stamps:
        stream.process(batch_of(store, [event(user="u", timestamp=stamp)], NOON), NOON)
        write(store, stream.cut(NOON))
    assert values(stream, NOON, "u")["event_count_24h"] == 0
    take(stream, store, [(NOON, "accepted", 1.0)], NOON, "u")
    write(store, stream.cut(NOON))
    assert values(Features(store), NOON, "u")["event_count_24h"] == 1


def test_events_stamped_ahead_cost_no_more_the_more_of_them_wait(store):
    """An event is looked at when it arrives and when its time has come, and written anew only when one came or went."""
    stream = Features(store)
    ahead = [(NOON + HOUR_MS // 2 + n, "accepted", 1.0) for n in range(3_000)]
    began = time.process_time()
    take(stream, store, ahead, NOON)
    for n in range(20):
        take(stream, store, [(NOON, "accepted", 1.0)], NOON + HOUR_MS // 2 + n)
    assert time.process_time() - began < 1.0, "a list that is searched through each time takes ten times as long"
    assert values(stream, NOON + HOUR_MS // 2 + 19)["event_count_1h"] == 40
    entity = stream.fold.tables["user"].entities["driver_1"]
    stream.windows.dump(entity, "k", NOON)
    take(stream, store, [(NOON, "accepted", 1.0)], NOON + HOUR_MS // 2 + 19)
    words = [word for command in stream.windows.dump(entity, "k", NOON) for word in command]
    assert b"f" not in words


@pytest.mark.parametrize("straight", [True, False])
def test_reader_beside_the_pipeline_never_sees_a_tile_twice_or_not_at_all(straight):
    """At each line of the pipeline's code a reader would be right, or is told to look again."""
    features = [Feature(name=f"of_{s}", aggregation="count", window_s=s, description="d") for s in (HOUR, DAY)]
    windows = Windows(features)
    entity, anything = windows.new(), Stored("e", "t", "u", "", "1", "x", {})
    count = compile_counting({"user": windows}, None, ["user"])
    owners: dict[Entity, Owners] = {"user": Owners(["u"], {"u": entity}, {})}
    torn: list[Any] = []

    def look(frame: FrameType, kind: str, _: object) -> Any:
        if frame.f_code.co_filename not in (inspect.getsourcefile(Windows), "<extraction>"):
            return None
        if kind == "line":
            sys.settrace(None)
            if entity.begun == entity.ended:
                seen = windows.values(entity, at)
                torn.extend((frame.f_lineno, n, seen) for n in seen if not 0 <= (seen[n] or 0) - (before[n] or 0) <= 1)
            sys.settrace(look)
        return look

    for minute in range(200):
        at = NOON + minute * MINUTE_MS
        for ts in (at, at - HOUR_MS + MINUTE_MS // 2, at + 1):
            before = windows.values(entity, at)
            sys.settrace(look)
            if straight and ts <= at:
                count([0], [anything], [ts], at, 0, owners, [], [])
            else:
                windows.add(entity, ts, [(0, 1)], at)
            sys.settrace(None)
    assert not torn


def test_reader_waits_for_what_the_pipeline_is_about_to_finish(monkeypatch):
    windows = Windows([Feature(name="n", aggregation="count", window_s=HOUR, description="d")])
    entity, pauses = windows.new(), iter(range(100))
    windows.add(entity, NOON, [(0, 1)], NOON)
    entity.begun += 1
    entity.values[0] = 7  # a state that nobody should see

    def pause(_: float) -> None:
        if next(pauses) == 3:
            entity.values[0] = 2
            entity.ended += 1

    monkeypatch.setattr("pipeline.features.reading.time.sleep", pause)
    assert windows.values(entity, NOON) == {"n": 2}
    entity.begun += 1
    assert windows.values(entity, NOON) == {"n": 2}, "one that never ends holds nobody up"


@pytest.mark.parametrize("held", [True, False])
def test_vector_is_due_when_the_next_event_ahead_gets_its_time_whatever_else_is_held(held):
    windows = Windows([Feature(name="n", aggregation="count", window_s=HOUR, description="d")])
    entity = windows.new()
    for ts in [*[NOON] * held, NOON + 9_000, NOON + 4_000]:
        windows.add(entity, ts, [(0, 1)], NOON)
    due = [windows.values_and_due(entity, at, MINUTE_MS) for at in (NOON, NOON + 4_000, NOON + 8_999)]
    assert due == [({"n": held}, NOON + 4_000), ({"n": held + 1}, NOON + 9_000), ({"n": held + 1}, NOON + 9_000)]
    values, last = windows.values_and_due(entity, NOON + 9_000, MINUTE_MS)
    assert (values, last) == ({"n": held + 2}, NOON + HOUR_MS)
    assert windows.values_and_due(entity, NOON + 2 * HOUR_MS, MINUTE_MS) == ({"n": 0}, None)


@given(st.integers(0, 40 * DAY_MS), st.integers(0, 40 * DAY_MS))
def test_what_is_in_a_window_is_the_same_throughout_a_grain(at, other):
    reading = Windows(FEATURES)._reading
    assert all(ms % reading.grain == 0 for family in reading.families for ms in (*family.tiles, *family.windows))
    spans = [
        (((at - window) // tile + 1) * tile, (at // tile + 1) * tile)
        for family in reading.families
        for tile, window in zip(family.tiles, family.windows, strict=True)
    ]
    reading._spans(other // reading.grain)  # another moment has been asked for before
    assert reading._spans(at // reading.grain) == spans
