"""The four local streams, each by itself: what it makes of a batch, what it writes, and what a restart finds."""

from __future__ import annotations

from collections import Counter
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

from pipeline import keys
from pipeline.commit_log.frames import ALL_STREAMS, CANARY, record
from pipeline.events import canary
from pipeline.learning.labelled import examples
from pipeline.log import Log, Request
from pipeline.models import fraud
from pipeline.store import Call
from pipeline.streams import fold
from pipeline.streams.aggregates import OTHER, Aggregates
from pipeline.streams.features import Features
from pipeline.streams.inference import CITY, Inference, find_labels, find_scores
from pipeline.streams.storage import EventStore, Query, Storage
from pipeline.streams.stream import Batch
from tests.helpers import (
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    NOON,
    append,
    batch_of,
    event,
    frames,
    payment,
    report,
    response,
    write,
)

ALL = (Features, Storage, Aggregates, Inference)


@pytest.mark.parametrize("kind", ALL)
def test_every_event_is_done_or_dead_whatever_its_data_holds(store, kind):
    odd: list[Any] = [None, [], {}, "", "x" * 200, -1, 1e308, -1e308, True, [1], {"a": 1}, 2**63, 10**300]
    fields = ("response", "response_time", "transaction_id", "amount", "merchant_id", "is_fraud", "pickup", "quantity")
    types = ("ride_request_response", "ride_request", "payment", "fraud_report", "anything")
    events = [event(kind_of, data={field: value}) for kind_of in types for field in fields for value in odd]
    stream = kind(store)
    stream.load(NOON)
    outcome = stream.process(batch_of(store, events, NOON), NOON)
    assert outcome.done + len(outcome.dead) == len(events)
    assert len({index for index, _ in outcome.dead}) == len(outcome.dead)
    assert all(reason for _, reason in outcome.dead)
    write(store, stream.cut(NOON))


@pytest.mark.parametrize("kind", ALL)
def test_event_of_an_unknown_form_is_dead_and_its_neighbours_are_done(store, kind):
    batch_of(store, [event(), event(), event()], NOON)
    frame = frames(Log(store))[-1]
    frame.records[1] = record(NOON, b'{"of":"another form"}')
    outcome = kind(store).process(Batch([frame]), NOON)
    assert (outcome.done, [index for index, _ in outcome.dead]) == (2, [1])


@pytest.mark.parametrize("kind", ALL)
def test_canary_leaves_no_trace(store, kind):
    log = Log(store)
    log.accept([Request([canary("c", NOON)], "nexus", ALL_STREAMS | CANARY)], NOON)
    before = set(store.call("KEYS", "*"))
    stream = kind(store)
    stream.load(NOON)
    stream.process(Batch(frames(log)), NOON)
    write(store, stream.cut(NOON))
    # The definitions go with the first checkpoint, whatever it is of, and the lease stands before it.
    assert set(store.call("KEYS", "*")) - {keys.DEFINITIONS.encode(), keys.OWNER.encode()} == before


@pytest.mark.parametrize("kind", ALL)
def test_cut_without_anything_new_writes_nothing(store, kind):
    stream = kind(store)
    stream.load(NOON)
    stream.process(batch_of(store, [response(), payment("t")], NOON), NOON)
    write(store, stream.cut(NOON))
    again = stream.cut(NOON)
    assert [command for chunk in again.chunks for command in chunk] + [*again.final] == []


# features


def test_features_reads_a_user_from_the_store_where_it_is_not_in_memory(store):
    first = Features(store)
    first.process(batch_of(store, [response("driver_1")], NOON), NOON)
    write(store, first.cut(NOON))
    assert Features(store).values(["driver_1", "nobody"], NOON).keys() == {"driver_1"}


def test_features_lets_idle_users_go_and_counts_on_when_they_return(store):
    stream = Features(store, cached_users=10)
    for _ in range(3):
        users = [f"driver_{n}" for n in range(30)]
        stream.process(batch_of(store, [response(user, timestamp=NOON) for user in users], NOON), NOON)
        write(store, stream.cut(NOON))
        assert stream.users <= 10
    assert {v["event_count_5m"] for v in stream.values(users, NOON).values()} == {3}


def test_user_with_an_event_between_a_cut_and_its_writing_is_not_let_go_of(store):
    stream = Features(store, cached_users=1)
    stream.load(NOON)

    def both() -> Batch:
        return batch_of(store, [event(user=user, timestamp=NOON) for user in "ab"], NOON)

    stream.process(both(), NOON)
    cut = stream.cut(NOON)
    write(store, cut, skip_final=True)
    stream.process(both(), NOON)
    write(store, cut)
    stream.process(both(), NOON)
    assert {user: found["event_count_24h"] for user, found in stream.values("ab", NOON).items()} == {"a": 3, "b": 3}


def test_users_who_wait_for_the_feature_sync_are_no_more_than_those_in_memory(store):
    stream = Features(store, cached_users=2)
    for n in range(5):
        stream.process(batch_of(store, [event(user=f"u{2 * n}"), event(user=f"u{2 * n + 1}")], NOON), NOON)
        write(store, stream.cut(NOON))
    assert set(stream.active) == {"u0", "u1"}


def test_response_time_that_is_no_number_is_dead_and_changes_nothing(store):
    stream = Features(store)
    outcome = stream.process(batch_of(store, [response(response_time="fast", timestamp=NOON)], NOON), NOON)
    assert [index for index, _ in outcome.dead] == [0]
    assert "response_time" in outcome.dead[0][1]
    assert stream.values(["driver_1"], NOON) == {}


def test_users_payees_and_zones_of_a_batch_are_all_asked_for_before_an_answer_is_waited_for(store, monkeypatch):
    stream = Features(store)
    at = {"lat": 40.7, "lng": -73.9}
    batch = batch_of(
        store,
        [
            payment("t", data={"merchant_id": "m"}),
            report("earlier"),
            event("ride_request", location=at, timestamp=NOON),
        ],
        NOON,
    )
    seen: list[str] = []
    begin, result = store.begin, Call.result

    def begun(script: str, *words: Any) -> Call:
        seen.append(script)
        made: Call = begin(script, *words)
        return made

    def answered(call: Call) -> Any:
        seen.append("answer")
        return result(call)

    monkeypatch.setattr(store, "begin", begun)
    monkeypatch.setattr(Call, "result", answered)
    stream.process(batch, NOON)
    assert seen == ["vectors", "vectors", "vectors", "find", *["answer"] * 4]


def test_checkpoint_gives_users_to_the_publisher_some_at_a_time_and_all_before_it_is_through(store):
    stream = Features(store)
    users = [f"driver_{n}" for n in range(100)]
    stream.process(batch_of(store, [response(user, timestamp=NOON) for user in users], NOON), NOON)
    cut, waiting = stream.cut(NOON), [0]
    for _ in cut.chunks:
        waiting.append(len(stream.outbox))
    assert waiting == sorted(waiting)
    assert len({*waiting} - {0, 100}) > 0
    assert sorted(stream.outbox.first(999)) == sorted(stream.active) == sorted(users)


def test_checkpoint_that_takes_long_goes_on_in_larger_steps(store, monkeypatch):
    stream, seconds = Features(store), [0.0]
    monkeypatch.setattr(fold, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    users = [f"driver_{n}" for n in range(600)]
    stream.process(batch_of(store, [response(user, timestamp=NOON) for user in users], NOON), NOON)
    sizes, before = [], 0
    for _ in stream.cut(NOON).chunks:
        sizes.append(len(stream.outbox) - before)
        before = len(stream.outbox)
        seconds[0] += 1.0
    assert [size for size in sizes if size] == [40, 80, 120, 160, 200]


# storage


def stored(store, events: list[dict[str, Any]], source: str = "test", stream: Storage | None = None) -> Storage:
    stream = stream or Storage(store)
    stream.load(NOON)
    stream.process(batch_of(store, events, NOON, source), NOON)
    return stream


def ids(store, stream: Storage, limit: int = 100, **query: Any) -> list[str]:
    events = EventStore(store, Log(store), stream.unwritten)
    found, cursor = [], None
    while True:
        page, cursor = events.find(Query(**query), limit, cursor)
        found += [f.event.event_id for f in page]
        if cursor is None:
            return found


@pytest.mark.parametrize("written", [False, True])
def test_events_are_found_by_each_field_before_and_after_the_checkpoint(store, written):
    stream = stored(store, [event(event_id="a", user="u1", session_id="s1"), event("payment", "u2", event_id="b")], "x")
    stored(store, [event(event_id="c", user="u1")], "y", stream)
    if written:
        write(store, stream.cut(NOON))
    assert ids(store, stream, user_id="u1") == ["a", "c"]
    assert ids(store, stream, event_type="payment") == ["b"]
    assert ids(store, stream, session_id="s1") == ["a"]
    assert ids(store, stream, source="y") == ["c"]
    assert ids(store, stream, user_id="u1", source="x") == ["a"]
    assert ids(store, stream, user_id="u2", source="y") == []
    assert ids(store, stream, newest_first=True) == ["c", "b", "a"]


def test_events_that_are_in_the_store_before_the_stream_learns_of_it_are_listed_once(store):
    stream = stored(store, [event(event_id="a"), event(event_id="b")])
    store.many(list(stream.cut(NOON).final))
    assert ids(store, stream) == ["a", "b"]


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 7, 50])
def test_pages_are_in_order_of_event_time_over_segments_and_checkpoints(store, monkeypatch, newest_first, limit):
    monkeypatch.setattr("pipeline.log.SEGMENT_BYTES", 1500)
    stream = Storage(store)
    for start in range(0, 45, 5):
        times = [NOON - (n * 7919 % 45) * MINUTE_MS for n in range(start, start + 5)]
        stored(store, [event(event_id=f"e{t:014d}", timestamp=t) for t in times], stream=stream)
        if start % 10 == 0:
            write(store, stream.cut(NOON))
    found = ids(store, stream, limit, newest_first=newest_first)
    assert len(found) == len(set(found)) == 45
    assert found == sorted(found, reverse=newest_first)


@pytest.mark.parametrize("newest_first", [False, True])
def test_events_from_before_a_restart_are_found_by_time_once_their_segment_is_gone_on_with(store, newest_first):
    for name, ts in (("older", NOON - HOUR_MS), ("newer", NOON)):
        stream = stored(store, [event(event_id=name, timestamp=ts)])  # a process each
        write(store, stream.cut(NOON))
    assert ids(store, stream, until=NOON - MINUTE_MS, newest_first=newest_first) == ["older"]
    assert ids(store, stream, since=NOON - MINUTE_MS, newest_first=newest_first) == ["newer"]


def test_events_of_one_instant_are_each_on_one_page(store):
    stream = stored(store, [event(event_id=f"e{n}", timestamp=NOON) for n in range(25)])
    found = ids(store, stream, 4)
    assert sorted(found) == sorted(f"e{n}" for n in range(25))


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("instants", [1, 4, 40])
def test_page_of_large_events_ends_early_and_its_cursor_goes_on_exactly_there(
    store, monkeypatch, newest_first, instants
):
    monkeypatch.setattr("pipeline.log.SEGMENT_BYTES", 20_000)
    monkeypatch.setattr("pipeline.streams.storage.PAGE_BYTES", 3_000)
    stream = Storage(store)
    for start in range(0, 40, 10):
        large = [
            event(event_id=f"e{n:02}", timestamp=NOON + n * instants // 40, data={"x": "x" * (n % 5 * 500)})
            for n in range(start, start + 10)
        ]
        stored(store, large, stream=stream)
        if start == 20:
            write(store, stream.cut(NOON))
    events, found, cursor = EventStore(store, Log(store), stream.unwritten), [], None
    while True:
        page, cursor = events.find(Query(newest_first=newest_first), 1_000, cursor)
        sizes = [len(f.body) for f in page]
        assert sum(sizes[:-1]) < 3_000
        assert cursor is None or sum(sizes) >= 3_000
        found += [f.event.event_id for f in page]
        if cursor is None:
            break
    assert found == sorted((f"e{n:02}" for n in range(40)), reverse=newest_first)


def test_event_larger_than_a_page_is_a_page_and_the_last_one_has_no_cursor(store, monkeypatch):
    monkeypatch.setattr("pipeline.streams.storage.PAGE_BYTES", 1)
    stream = stored(store, [event(event_id=f"e{n}", timestamp=NOON + n) for n in range(3)])
    events = EventStore(store, Log(store), stream.unwritten)
    cursor, pages = None, []
    for _ in range(3):
        page, cursor = events.find(Query(), 1_000, cursor)
        pages.append([f.event.event_id for f in page])
    assert (pages, cursor) == ([["e0"], ["e1"], ["e2"]], None)


def test_no_more_large_events_are_fetched_at_once_than_make_some_pages(store, monkeypatch):
    stream = stored(store, [event(timestamp=NOON + n, data={"x": "x" * 60_000}) for n in range(300)])
    log = Log(store)
    monkeypatch.setattr(log, "fetch", fetch := MagicMock(side_effect=log.fetch))
    page, cursor = EventStore(store, log, stream.unwritten).find(Query(), 1_000)
    assert len(page) == 140
    assert cursor is not None
    assert sum(len(call.args[0]) for call in fetch.call_args_list) < 160


def test_since_and_until_include_their_instants_and_count_by_event_time(store):
    stream = stored(store, [event(event_id=f"e{n}", timestamp=NOON - n * MINUTE_MS) for n in range(10)])
    assert ids(store, stream, since=NOON - 5 * MINUTE_MS, until=NOON - 3 * MINUTE_MS) == ["e5", "e4", "e3"]


# aggregates


def counts(store, step: int, start: int) -> dict[str, int]:
    found = store.client.hgetall(f"{keys.AGGREGATE}{step}:{start // 1000}")
    return {name.decode(): int(count) for name, count in found.items()}


def test_aggregates_count_by_second_minute_and_hour_of_event_time(store):
    stream = Aggregates(store)
    times = [NOON, NOON + 500, NOON - MINUTE_MS, NOON - HOUR_MS]
    events = [event("payment", device_type="ios", timestamp=t) for t in times]
    stream.process(batch_of(store, events, NOON, "app"), NOON)
    write(store, stream.cut(NOON))
    assert counts(store, 1, NOON) == {"all": 2, "type:payment": 2, "source:app": 2, "device:ios": 2}
    assert counts(store, 60, NOON)["all"] == 2
    assert counts(store, 60, NOON - MINUTE_MS)["all"] == 1
    assert counts(store, 3600, NOON)["all"] == 2
    assert counts(store, 3600, NOON - HOUR_MS)["all"] == 2


def test_aggregates_agree_with_a_plain_count_in_every_step_and_dimension(store):
    stream = Aggregates(store)
    expected: Counter[tuple[int, int, str]] = Counter()
    for n in range(3):
        times = [NOON - i * 7919 * 1000 // (n + 1) % (5 * HOUR_MS) for i in range(60)]
        events = [
            event(f"t{i % 4}", f"u{i % 7}", device_type=f"d{i % 3}", timestamp=t, location={"lat": i % 5, "lng": 1})
            for i, t in enumerate(times)
        ]
        batch = batch_of(store, events, NOON, f"s{n}")
        stream.process(batch, NOON)
        for i, t in enumerate(times):
            values = {"type": f"t{i % 4}", "source": f"s{n}", "device": f"d{i % 3}", "zone": batch.zones[i]}
            for step in (1, 60, 3600):
                if step > 1 or t // 1000 > NOON // 1000 - 2 * 3600:
                    for name in ("all", *[f"{name}:{value}" for name, value in values.items()]):
                        expected[step, t // 1000 // step * step, name] += 1
        unwritten = Counter({(step, *row[1:3]): row[3] for step in (1, 60, 3600) for row in stream.unwritten(step)})
        write(store, stream.cut(NOON))
        found: Counter[tuple[int, int, str]] = Counter()
        for step, start in {key[:2] for key in expected}:
            found.update({(step, start, name): count for name, count in counts(store, step, start * 1000).items()})
        assert found == expected
        assert unwritten <= expected


def test_aggregates_add_up_over_checkpoints_and_restarts(store):
    for _ in range(3):
        stream = Aggregates(store)
        stream.process(batch_of(store, [event(timestamp=NOON), event(timestamp=NOON)], NOON), NOON)
        write(store, stream.cut(NOON))
    assert counts(store, 3600, NOON)["all"] == 6


def test_aggregates_count_values_beyond_the_limit_together(store, monkeypatch):
    monkeypatch.setattr("pipeline.streams.aggregates.MAX_VALUES", {"type": 3, "source": 9, "device": 9, "zone": 9})
    stream = Aggregates(store)
    stream.process(batch_of(store, [event(f"t{n % 10}", timestamp=NOON) for n in range(40)], NOON), NOON)
    write(store, stream.cut(NOON))
    found = {name: n for name, n in counts(store, 3600, NOON).items() if name.startswith("type:")}
    assert sum(found.values()) == 40
    assert len(found) <= 4
    assert f"type:{OTHER}" in found


def test_users_that_an_hour_has_seen_are_remembered_for_recent_hours_alone(store):
    stream = Aggregates(store)
    for hour in range(8):
        at = NOON + hour * HOUR_MS
        stream.process(batch_of(store, [event(timestamp=at)], at), at)
        write(store, stream.cut(at))
    assert len(stream._seen) <= 3


def test_zone_of_a_ride_request_is_that_of_its_pickup_and_of_others_that_of_their_location(store):
    here, there = {"lat": 14.55, "lng": 121.02}, {"lat": 14.65, "lng": 121.1}
    events = [
        event("ride_request", data={"pickup": here}, location=there),
        event("ride_request", location=here),
        event("ride_completed", location=here),
        event("ride_request"),
        event("ride_request", data={"pickup": {"lat": 99, "lng": 0}}),
    ]
    zones = batch_of(store, events, NOON).zones
    assert zones[0] == zones[1] == zones[2]
    assert zones[0] is not None
    assert zones[3:] == [None, None]


# inference


def inferred(store, events: list[dict[str, Any]], stream: Inference | None = None) -> Inference:
    if stream is None:
        stream = Inference(store)
        stream.load(NOON)
    outcome = stream.process(batch_of(store, events, NOON), NOON)
    assert outcome.dead == []
    return stream


def test_each_payment_gets_a_score_once_and_the_first_one_stands(store):
    stream = inferred(store, [payment("t1", 10), payment("t1", 9999), payment("t2", 50)])
    write(store, stream.cut(NOON))
    first = find_scores(store, ["t1", "t2", "t3"], NOON)
    assert first[2] is None
    assert all(score and 0 <= score.score <= 1 for score in first[:2])
    write(store, inferred(store, [payment("t1", 5)], stream).cut(NOON))
    assert find_scores(store, ["t1"], NOON) == first[:1]


def test_first_score_of_a_payment_stands_over_midnight(store):
    stream = scored(store, "t", NOON)
    first = find_scores(store, ["t"], NOON)
    later = NOON + 13 * HOUR_MS
    append(Log(store), [payment("t", 9000)], later)
    stream.process(Batch([frames(Log(store))[-1]]), later)
    write(store, stream.cut(later))
    assert find_scores(store, ["t"], later) == first


def test_payment_far_from_a_payers_habit_scores_higher(store):
    stream = inferred(store, [payment(f"t{n}", 100 + n % 3) for n in range(30)] + [payment("odd", 50_000)])
    scores = stream.unwritten_scores()
    assert scores["odd"].score > 0.5 > scores["t29"].score
    assert scores["odd"].reasons


def test_label_reaches_the_score_it_belongs_to_in_the_same_batch_later_and_after_a_restart(store):
    stream = inferred(store, [payment("a"), report("a"), payment("b"), payment("c")])
    write(store, stream.cut(NOON))
    inferred(store, [report("b")], stream)
    write(store, stream.cut(NOON))
    again = inferred(store, [report("c", 0)])
    write(store, again.cut(NOON))
    assert find_labels(store, ["a", "b", "c", "d"], NOON) == [1, 1, 0, None]
    assert (again.model.frauds, again.model.legitimate, again.model.scored) == (2, 1, 3)


def test_fraud_model_says_warming_up_until_it_has_labels_and_is_ready_from_then_on(store):
    stream = inferred(store, [payment(f"t{n}", 100) for n in range(fraud.LABELS_NEEDED)])
    assert not stream.model.ready
    assert stream.unwritten_scores()["t0"].version == fraud.HABIT_VERSION
    inferred(store, [report(f"t{n}") for n in range(fraud.LABELS_NEEDED)], stream)
    inferred(store, [payment("after")], stream)
    assert stream.model.ready
    assert stream.unwritten_scores()["after"].version == fraud.VERSION


@pytest.mark.parametrize(
    "bad",
    [
        event("payment", data={"amount": 5}),
        event("payment", data={"transaction_id": "t"}),
        event("payment", data={"transaction_id": "t", "amount": "5"}),
        event("payment", data={"transaction_id": "t" * 129, "amount": 5}),
        event("fraud_report", data={"transaction_id": "t", "is_fraud": 2}),
        event("fraud_report", data={"is_fraud": 1}),
        event("ride_request", data={"quantity": "many"}),
        event("ride_request", data={"quantity": -1}),
        event("ride_request", data={"quantity": 1e308}),
    ],
)
def test_what_a_model_cannot_read_is_dead_with_a_reason(store, bad):
    stream = Inference(store)
    outcome = stream.process(batch_of(store, [payment("before"), bad, payment("after")], NOON), NOON)
    assert (outcome.done, [index for index, _ in outcome.dead]) == (2, [1])
    write(store, stream.cut(NOON))
    assert None not in find_scores(store, ["before", "after"], NOON)


def demand(store, zone: str | None) -> float:
    names = store.call("KEYS", f"{keys.DEMAND}{zone}:*")
    return sum(float(count) for name in names for count in store.call("HVALS", name))


def test_ride_requests_count_for_their_zone_and_for_the_city_with_their_quantity(store):
    here = {"lat": 14.55, "lng": 121.02}
    events = [event("ride_request", location=here), event("ride_request", quantity=4), event("ride_request")]
    log_batch = batch_of(store, events, NOON)
    stream = Inference(store)
    stream.process(log_batch, NOON)
    write(store, stream.cut(NOON))
    assert demand(store, CITY) == 6
    assert demand(store, log_batch.zones[0]) == 1


def test_habit_of_a_payer_survives_a_restart(store):
    write(store, inferred(store, [payment(f"t{n}", 100) for n in range(10)]).cut(NOON))
    again = inferred(store, [payment("odd", 50_000)])
    assert again.unwritten_scores()["odd"].score > 0.5


def test_payer_and_payee_with_a_payment_between_a_cut_and_its_writing_are_not_let_go_of(store, monkeypatch):
    monkeypatch.setattr("pipeline.streams.inference._CACHED", 1)
    stream, numbers = Inference(store), count()

    def pay() -> list[dict[str, Any]]:
        return [payment(f"t{next(numbers)}", user=f"u{i}", data={"merchant_id": f"m{i}"}) for i in range(4)]

    inferred(store, pay(), stream)
    first = stream.cut(NOON)
    inferred(store, pay(), stream)
    write(store, first)
    write(store, stream.cut(NOON))
    assert [payee(store, f"m{i}").count for i in range(4)] == pytest.approx([2] * 4)


def scored(store, transaction: str, now: int, retention_ms: int = 7 * DAY_MS) -> Inference:
    """A payment that arrived at a moment by the clock of then, scored and written."""
    append(Log(store), [payment(transaction)], now)
    stream = Inference(store, retention_ms)
    stream.process(Batch([frames(Log(store))[-1]]), now)
    write(store, stream.cut(now))
    return stream


@pytest.mark.parametrize("days", [1, 7, 12, 29])
def test_scores_and_labels_are_found_as_long_as_their_events_are_retained(store, days):
    then, retention_ms = NOON - days * DAY_MS, 30 * DAY_MS
    stream = scored(store, "old", then, retention_ms)
    stream.process(batch_of(store, [report("old")], then), then)
    write(store, stream.cut(then))
    append(Log(store), [event()], NOON)
    assert find_labels(store, ["old"], NOON, 30) == [1]
    assert find_scores(store, ["old"], NOON, 30)[0] is not None
    late = Inference(store, retention_ms)
    late.process(batch_of(store, [report("old", 0)], NOON), NOON)
    write(store, late.cut(NOON))
    assert late.model.legitimate == 1  # learned from what the payment looked like then


@pytest.mark.parametrize("leap", [3 * DAY_MS, 40 * DAY_MS])
def test_scores_and_labels_are_found_after_the_clock_was_ahead_for_a_moment(store, leap):
    append(Log(store), [event()], NOON + leap)  # from here on arrival stands still until the clock comes there
    scored(store, "t", NOON)
    stream = Inference(store)
    stream.process(batch_of(store, [report("t")], NOON), NOON)
    write(store, stream.cut(NOON))
    for now in (NOON, NOON + DAY_MS, NOON + leap + DAY_MS):
        assert find_scores(store, ["t"], now)[0] is not None
        assert find_labels(store, ["t"], now) == [1]
        assert [e.y for e in examples(store, now, 7)] == [1]


def test_label_that_came_while_the_clock_was_ahead_gives_way_to_a_later_one(store):
    scored(store, "t", NOON)
    stream = Inference(store)
    stream.process(batch_of(store, [report("t", 1)], NOON), NOON)
    write(store, stream.cut(NOON + 3 * DAY_MS))  # the clock leaps between the event and the checkpoint, and back
    stream.process(batch_of(store, [report("t", 0)], NOON + MINUTE_MS), NOON + MINUTE_MS)
    write(store, stream.cut(NOON + MINUTE_MS))
    assert find_labels(store, ["t"], NOON + DAY_MS) == [0]


def taken(store, stream: Inference, apart: bool, *events: dict[str, Any]) -> Inference:
    """`apart`: each in a batch and a checkpoint of its own, and a restart after it, so that all is in the store by then."""
    for some in [[e] for e in events] if apart else [list(events)]:
        stream.process(batch_of(store, some, NOON), NOON)
        write(store, stream.cut(NOON))
        stream = Inference(store) if apart else stream
        stream.load(NOON)
    return stream


def learned(store, stream: Inference, merchant: str = "m") -> tuple[int, int, float]:
    """Frauds and legitimate payments that the model has learned, and the payee's frauds."""
    return stream.model.frauds, stream.model.legitimate, payee(store, merchant).frauds


@pytest.mark.parametrize("apart", [False, True])
def test_report_that_is_repeated_counts_once_and_one_that_is_withdrawn_not_at_all(store, apart):
    paid = payment("t", data={"merchant_id": "m"})
    stream = taken(store, Inference(store), apart, paid, report("t"), report("t"), report("t"))
    assert learned(store, stream) == (1, 0, 1)
    stream = taken(store, stream, apart, report("t", 0), report("t", 0))
    assert learned(store, stream) == (0, 1, 0)
    stream = taken(store, stream, apart, report("t", 1))
    assert learned(store, stream) == (1, 0, 1)


def test_report_that_is_repeated_while_the_first_is_being_written_counts_once(store):
    stream = inferred(store, [payment("t", data={"merchant_id": "m"}), report("t")])
    first = stream.cut(NOON)
    inferred(store, [report("t")], stream)
    assert stream.model.frauds == 1
    write(store, first)
    write(store, stream.cut(NOON))
    assert learned(store, stream) == (1, 0, 1)


def test_report_is_of_the_first_payment_of_its_transaction_also_while_that_is_being_written(store):
    stream = inferred(store, [payment("t", data={"merchant_id": "m"})])
    first = stream.cut(NOON)
    inferred(store, [payment("t", data={"merchant_id": "other"}), report("t")], stream)
    write(store, first)
    write(store, stream.cut(NOON))
    assert learned(store, stream, "m") == (1, 0, 1)
    assert learned(store, stream, "other") == (1, 0, 0)


@pytest.mark.parametrize("apart", [False, True])
def test_report_that_came_before_its_payment_is_not_learned_and_taking_it_back_takes_nothing_away(store, apart):
    known = [e for i in range(3) for e in (payment(f"f{i}", data={"merchant_id": "m"}), report(f"f{i}"))]
    stream = taken(store, Inference(store), apart, *known)
    stream = taken(store, stream, apart, report("x"), report("x"), payment("x", data={"merchant_id": "m"}))
    assert learned(store, stream) == (3, 0, 3)
    stream = taken(store, stream, apart, report("x", 0))
    assert learned(store, stream) == (3, 1, 3)
    assert find_labels(store, ["x"], NOON) == [0]


@pytest.mark.parametrize("apart", [False, True])
def test_report_that_came_before_its_payment_is_learned_when_it_is_repeated(store, apart):
    paid = payment("t", data={"merchant_id": "m"})
    stream = taken(store, Inference(store), apart, report("t"), paid, report("t"), report("t"))
    assert learned(store, stream) == (1, 0, 1)
    stream = taken(store, stream, apart, report("t", 0), report("t", 0))
    assert learned(store, stream) == (0, 1, 0)


def test_report_that_came_before_its_payment_is_a_label_to_all_who_ask(store):
    stream = taken(store, Inference(store), False, report("t"), payment("t"))
    stream.process(batch_of(store, [report("u")], NOON), NOON)
    assert stream.unwritten_labels() == {"u": 1}
    assert find_labels(store, ["t"], NOON) == [1]
    assert [(e.transaction, e.y) for e in examples(store, NOON, 7)] == [("t", 1)]


def test_label_of_an_earlier_version_is_taken_for_learned(store):
    stream = taken(store, Inference(store), True, payment("t", data={"merchant_id": "m"}), report("t"))
    store.call("HSET", f"{keys.LABELS}{NOON // DAY_MS}", "t", 1)  # as it was written then
    assert learned(store, taken(store, stream, True, report("t"))) == (1, 0, 1)
    assert learned(store, taken(store, stream, True, report("t", 0))) == (0, 1, 0)


@pytest.mark.parametrize("apart", [False, True])
def test_history_that_is_brought_in_later_fades_by_its_own_time(store, apart):
    then, stream = NOON - 60 * DAY_MS, Inference(store)
    paid = [payment(f"t{i}", data={"merchant_id": "m"}, timestamp=then) for i in range(3)]
    late = {**report("t0"), "timestamp": then + 7 * DAY_MS}
    for some in [paid, [late]] if apart else [[*paid, late]]:
        stream.process(batch_of(store, some, NOON), NOON)
        write(store, stream.cut(NOON))
        stream = Inference(store) if apart else stream
    record = payee(store, "m")
    assert (record.count, record.frauds, record.at) == pytest.approx((1.5, 1.0, then + 7.0 * DAY_MS))


def payee(store, name: str) -> fraud.Payee:
    return msgspec.msgpack.decode(store.call("GET", keys.PAYEE + name), type=fraud.Payee)


def test_append_helper_and_batch_agree_on_order(store, log):
    append(log, [event(event_id="a"), event(event_id="b")], NOON)
    append(log, [event(event_id="c")], NOON)
    batch = Batch(frames(log))
    assert [e.event_id for e in batch.events if e] == ["a", "b", "c"]
    assert (batch.first_ordinal, batch.after.ordinal) == (0, 3)
