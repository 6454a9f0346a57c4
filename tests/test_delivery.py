"""Cutting the log into windows and parts: nothing between two windows, each user in one part, every event sent once."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bridge import delivery
from pipeline.bridge.attempts import lane_of
from pipeline.bridge.delivery import Ahead, Window, cut, truncated
from pipeline.commit_log.frames import ALL_STREAMS, CANARY, Frame, Position, named, record, user_of
from pipeline.events import Stored


def frame(ordinal: int, count: int, to: int = ALL_STREAMS, broken: bool = False, size: int = 0) -> Frame:
    """A frame of small events of seven users; its address is made from its ordinal."""
    address = (1 << 24) + ordinal * 1000
    records = [
        b"\0" * 8
        + b'{"event_id":"e%d","event_type":"t","user_id":"u%d"}' % (ordinal + i, (ordinal + i) % 7)
        + b" " * size
        for i in range(count)
    ]
    return Frame(address, address + 1000, to, 0, ordinal, "test", records, broken=broken)


def windows(
    frames: list[Frame], lanes: int, most: int, edges: tuple[int, ...] = (), canaries: bool = True
) -> list[Window]:
    waiting, position, found = deque(frames), Position(1, 0), []
    while waiting:
        found.append(cut(waiting, position, lanes, most, canaries, edges.__contains__))
        assert found[-1].after != position
        position = found[-1].after
    return found


def sent(found: list[Window]) -> list[bytes]:
    """All bodies that are in parts, window by window."""
    return [body for window in found for part in window.parts for body in part.bodies]


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("most", [1, 4, 10, 1000])
@pytest.mark.parametrize("edges", [(), (5,), (5, 9)])
def test_every_event_is_in_exactly_one_part(lanes, most, edges):
    frames = [frame(0, 5), frame(5, 4), frame(9, 1), frame(10, 30)]
    found = windows(frames, lanes, most, edges)
    assert sorted(sent(found)) == sorted(record[8:] for f in frames for record in f.records)
    assert found[-1].after.ordinal == 40
    assert all(w.unfinished == len(w.parts) > 0 for w in found)


def test_a_window_ends_at_an_edge():
    found = windows([frame(0, 5), frame(5, 4), frame(9, 6)], 1, 1000, edges=(9,))
    assert [w.after.ordinal for w in found] == [9, 15]


def test_a_users_events_are_all_in_one_part_and_in_order():
    [window] = windows([frame(0, 100)], 4, 1000)
    for part in window.parts:
        assert {lane_of(body, 4) for body in part.bodies} == {part.lane}
        assert list(part.indexes) == sorted(part.indexes)
    assert len({user_of(body) for body in sent([window])}) == 7


def test_canaries_are_passed_over_where_the_partner_does_not_take_them():
    frames = [frame(0, 2), frame(2, 1, ALL_STREAMS | CANARY), frame(3, 2)]
    [window] = windows(frames, 1, 1000, canaries=False)
    assert (len(window.bodies), window.canaries, window.after.ordinal) == (4, 0, 5)
    [window] = windows(frames, 1, 1000)
    assert (len(window.bodies), window.canaries, window.ordinal(2)) == (5, 1, 2)


def test_a_broken_frames_events_are_not_sent_and_are_told():
    [window] = windows([frame(0, 2), frame(2, 3, broken=True), frame(5, 1)], 1, 1000)
    assert [window.ordinal(i) for i in range(3)] == [0, 1, 5]
    assert [f.ordinal + i for f, i in window.broken] == [2, 3, 4]


def test_large_events_make_small_windows(monkeypatch):
    monkeypatch.setattr(delivery, "MOST_BYTES", 3_000)
    frames = [frame(i, 1) for i in range(10)]  # by their addresses each takes 1,000 bytes
    assert [len(w.bodies) for w in windows(frames, 1, 1000)] == [3, 3, 3, 1]


def test_no_more_is_read_ahead_than_its_bytes_allow(monkeypatch):
    monkeypatch.setattr(delivery, "MOST_BYTES", 3_000)
    ahead = Ahead(lambda at, _: [frame(at.ordinal, 1)] if at.ordinal < 50 else [], Position(1, 0))
    assert asyncio.run(ahead.fill(1_000)) == 3


def test_the_finished_beginning_of_a_window_can_be_committed():
    [window] = windows([frame(0, 5), frame(5, 5)], 1, 1000)
    part = window.parts[0]
    assert truncated(window, Position(1, 0)).after == Position(1, 0)
    start, stop = part.next(7)
    assert (start, stop) == (0, 7)
    part.settled([(6, "no")])
    begun = truncated(window, Position(1, 0))
    assert (len(begun.bodies), begun.after.ordinal, begun.after.index) == (7, 7, 2)
    assert part.dead == [(6, "refused: no", 1)]
    part.pull(9)
    part.settled([])
    assert truncated(window, Position(1, 0)).after.ordinal == 7


def test_what_is_under_way_at_the_stop_is_not_committed():
    [window] = windows([frame(0, 5), frame(5, 5)], 1, 1000)
    part = window.parts[0]
    part.next(3)
    part.settled([])
    part.next(3)
    begun = truncated(window, Position(1, 0))
    assert (len(begun.bodies), begun.after.ordinal) == (3, 3)


def test_a_window_with_a_broken_frame_is_not_committed_in_part():
    """Its dead letters belong to the window: what is finished may lie before or behind the broken frame."""
    [window] = windows([frame(0, 2), frame(2, 3, broken=True), frame(5, 4)], 1, 1000)
    part = window.parts[0]
    part.next(4)
    part.settled([])
    begun = truncated(window, Position(1, 0))
    assert (begun.bodies, begun.broken, begun.after) == ([], [], Position(1, 0))


def test_a_refused_slice_is_halved_until_the_bad_event_is_alone():
    [window] = windows([frame(0, 11)], 1, 1000)
    part, taken = window.parts[0], []
    while part.todo:
        start, stop = part.next(500)
        if (start, stop) == (6, 7):
            part.give_up("bad")
        elif start <= 6 < stop:
            part.halve()
        else:
            taken += list(range(start, stop))
            part.settled([])
    assert part.dead == [(6, "bad", 1)]
    assert taken == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]


def test_an_event_that_is_pulled_is_the_next_and_no_other_is_lost():
    [window] = windows([frame(0, 11)], 1, 1000)
    part, taken = window.parts[0], list[int]()
    part.next(4)
    for index in (2, 9, 2, 0, 10):
        part.pull(index)
        assert part.todo[-1] == (index, index + 1)
    while part.todo:
        taken += range(*part.next(3))
        part.settled([])
    assert sorted(taken) == list(range(11))
    assert taken[:4] == [10, 0, 2, 9]


@pytest.mark.parametrize(
    ("body", "user"),
    [
        (b'{"event_id":"a","event_type":"t","user_id":"u1","x":1}', b"u1"),
        (b'{"event_id":"a\\"b","event_type":"t","user_id":"u1"}', b"u1"),
        (b'{"event_id":"a\\\\","event_type":"t","user_id":"u\\"1"}', b'u\\"1'),
        ('{"event_id":"ü","event_type":"t","user_id":"ä"}'.encode(), "ä".encode()),
    ],
)
def test_the_user_is_read_out_of_the_stored_event(body, user):
    assert user_of(body) == user
    assert named(user) == json.loads(body)["user_id"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"user_id":"a\\', b'{"user_id":"a\\q"}', b'\xff"user_id":"\xff"', b'{"user_id":7}']
)
def test_an_event_that_nobody_can_decode_has_a_user_that_holds_up_nobody(body):
    assert type(named(user_of(body))) is str


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.integers(1, 16))
def test_many_events_have_the_lanes_that_each_has_by_itself(users, lanes):
    events = [Stored("a", "t", user, "2026-01-01T00:00:00Z", "1", "android", {"n": 1}) for user in users]
    bodies = [msgspec.json.encode(one) for one in events]
    stored = Frame(0, 0, ALL_STREAMS, 0, 0, "test", [record(0, body) for body in bodies])
    at_hand = replace(stored, events=events, hashes=None)
    for frame in (stored, at_hand):
        assert [found % lanes for found in frame.user_hashes()] == [lane_of(body, lanes) for body in bodies]
