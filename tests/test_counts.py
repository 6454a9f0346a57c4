"""Counts as they are read while a stream counts, writes and is replaced: aggregates and the history of demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import Position
from pipeline.events import parse_rfc3339
from pipeline.learning.demand_history import demand_counts
from pipeline.models import demand
from pipeline.runtime import Runtime
from pipeline.store import Store
from pipeline.streams import aggregates
from pipeline.streams.aggregates import MAX_VALUES, OTHER, Aggregates
from pipeline.streams.inference import CITY, Inference, demand_key
from pipeline.streams.stream import Batch, Cut
from tests.conftest import Start, client_of
from tests.helpers import HOUR_MS, MINUTE_MS, NOON, batch_of, event, until

ROUTE = "/api/ml/aggregates"


def post(client: FlaskClient, *events: dict[str, Any], source: str = "app") -> None:
    answer = client.post(
        "/api/ml/events/ingest?wait=features&timeout_ms=20000", json={"events": events, "source": source}
    )
    assert answer.json["accepted"] == len(events)


def total(found: Any) -> int:
    return sum(n for row in found["series"] for _, n in row["points"])


def committed(store: Store, stream: str, events: int) -> bool:
    return checkpoints.audit(store).accounts[stream].processed >= events


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[Any], int], None]]:
    """Makes streams of a kind learn of no commit after which so many events are processed, until the test ends."""
    heard = threading.Event()

    def make(kind: type[Any], events: int) -> None:
        written = kind._written

        def later(stream: Any) -> None:
            if committed(stream.store, kind.name, events):
                heard.wait(25.0)
            written(stream)

        monkeypatch.setattr(kind, "_written", later)

    yield make
    heard.set()


# each event once


def test_events_count_once_between_their_commit_and_the_streams_learning_of_it(
    nexus: Runtime, client: FlaskClient, deaf: Callable[[type[Any], int], None]
) -> None:
    deaf(Aggregates, 20)
    post(client, *[event() for _ in range(20)])
    until(lambda: committed(nexus.store, "aggregates", 20), "the commit")
    for by in ("type", "source", "device"):
        for step in ("1s", "1m", "1h"):
            assert total(client.get(f"{ROUTE}?by={by}&step={step}").json) == 20


def test_ride_requests_count_once_between_their_commit_and_the_streams_learning_of_it(
    nexus: Runtime, client: FlaskClient, deaf: Callable[[type[Any], int], None]
) -> None:
    deaf(Inference, 20)
    here = {"lat": 14.55, "lng": 121.02}
    post(client, *[event("ride_request", data={"pickup": here}) for _ in range(20)])
    until(lambda: committed(nexus.store, "inference", 20), "the commit")
    batch = Batch(nexus.log.read(Position()))
    for zone in (CITY, next(filter(None, batch.zones))):
        assert sum(demand_counts(nexus, zone, nexus.clock() // 1000).values()) == 20


def commit(store: Store, batch: Batch, cut: Cut, stream: str = "aggregates") -> None:
    """What the worker commits, in one step."""
    epoch = store.call("HINCRBY", keys.OWNER, "epoch", 0)
    checkpoints.commit(store, epoch, [*cut.final, *checkpoints.advance(Progress(stream, batch.after), NOON)])


def counted(store: Store, stream: Aggregates | None) -> int:
    found = aggregates.counted(store, stream, "type", 3600, [NOON // 1000])
    return sum(n for points in found.values() for n in points.values())


def take(store: Store, stream: Aggregates, events: int) -> Batch:
    batch = batch_of(store, [event(timestamp=NOON) for _ in range(events)], NOON)
    stream.process(batch, NOON)
    return batch


def test_events_count_once_at_every_stage_of_two_checkpoints(store: Store) -> None:
    stream = Aggregates(store)
    assert counted(store, stream) == 0
    first = take(store, stream, 3)
    assert counted(store, stream) == 3
    cut = stream.cut(NOON)
    assert counted(store, stream) == 3
    second = take(store, stream, 4)
    assert counted(store, stream) == 7
    commit(store, first, cut)
    assert counted(store, stream) == 7
    cut.done()
    assert counted(store, stream) == 7
    cut = stream.cut(NOON)
    commit(store, second, cut)
    assert counted(store, stream) == 7
    cut.done()
    assert (counted(store, stream), counted(store, None)) == (7, 7)


@pytest.mark.parametrize("when", ["the checkpoint under way", "what came after it"])
def test_events_count_once_where_a_commit_comes_between_the_looks_at_memory_and_store(
    store: Store, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    stream = Aggregates(store)
    first = take(store, stream, 3)
    under_way = stream.cut(NOON)
    second = take(store, stream, 4)
    looked = stream.unwritten

    def then_commits(step: int) -> Any:
        found = list(looked(step))
        commit(store, first, under_way)
        under_way.done()
        if when == "what came after it":
            commit(store, second, stream.cut(NOON))
        return iter(found)

    monkeypatch.setattr(stream, "unwritten", then_commits)
    assert counted(store, stream) == 7


def test_events_that_another_instance_has_counted_are_left_out_of_what_this_one_still_holds(store: Store) -> None:
    mine, theirs = Aggregates(store), Aggregates(store)
    first = take(store, mine, 3)
    mine.cut(NOON)  # and is halted: another takes over, from the same checkpoint
    second = take(store, mine, 4)
    theirs.process(first, NOON)
    commit(store, first, theirs.cut(NOON))
    assert counted(store, mine) == 7
    theirs.process(second, NOON)
    commit(store, second, theirs.cut(NOON))
    assert counted(store, mine) == 7


def test_stream_made_anew_counts_on_from_the_checkpoint(store: Store) -> None:
    stream = Aggregates(store)
    commit(store, take(store, stream, 3), stream.cut(NOON))
    lost = take(store, stream, 4)
    again = Aggregates(store)
    again.load(NOON)
    assert counted(store, again) == 3
    again.process(lost, NOON)
    assert counted(store, again) == 7


def test_fields_of_the_asked_dimension_alone_are_read(store: Store) -> None:
    stream = Aggregates(store)
    batch = batch_of(store, [event("a", timestamp=NOON, device_type="ios"), event("b", timestamp=NOON)], NOON, "app")
    stream.process(batch, NOON)
    at = NOON // 1000
    in_memory = [aggregates.counted(store, stream, by, 60, [at]) for by in aggregates.DIMENSIONS]
    commit(store, batch, stream.cut(NOON))
    assert [aggregates.counted(store, None, by, 60, [at]) for by in aggregates.DIMENSIONS] == in_memory
    assert in_memory[:2] == [{"a": {at: 1}, "b": {at: 1}}, {"app": {at: 2}}]


# the limit of values


def test_limit_of_values_holds_over_restarts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_VALUES, "source", 5)
    for n in range(4):
        stream = Aggregates(store)
        stream.load(NOON)
        for i in range(3):
            batch = batch_of(store, [event(timestamp=NOON)], NOON, f"s{n}{i}")
            stream.process(batch, NOON)
            commit(store, batch, stream.cut(NOON))
    found = aggregates.counted(store, None, "source", 3600, [NOON // 1000])
    assert found.keys() == {"s00", "s01", "s02", "s10", "s11", OTHER}
    assert sum(points[NOON // 1000] for points in found.values()) == 12


def test_values_are_known_for_as_long_as_what_is_counted_of_them_is_kept(store: Store) -> None:
    stream = Aggregates(store, 5 * HOUR_MS)
    batch = batch_of(store, [event(timestamp=NOON)], NOON)
    stream.process(batch, NOON)
    commit(store, batch, stream.cut(NOON))
    assert 0 < store.call("PTTL", keys.VALUES + "type") <= 5 * HOUR_MS
    assert store.call("EXISTS", keys.VALUES + "zone") == 0


# what a range covers


def test_range_that_ends_before_it_begins_has_no_users_and_no_events(client: FlaskClient) -> None:
    post(client, event(), event())
    now = time.time_ns() // 1_000_000
    for step in ("1s", "1m", "1h"):
        until(lambda: client.get(ROUTE).json["distinct_users"] == 1, "the user")
        found = client.get(f"{ROUTE}?step={step}&since={now}&until={now - 1_000}").json
        assert (found["series"], found["distinct_users"], found["distinct_users_of"]) == ([], 0, None)


def test_answer_tells_which_hours_the_users_are_of(client: FlaskClient) -> None:
    found = client.get(f"{ROUTE}?step=1m&since={NOON + MINUTE_MS}&until={NOON + 3 * MINUTE_MS}").json
    assert found["distinct_users_of"] == {"since": "2100-01-01T12:00:00.000Z", "until": "2100-01-01T12:59:59.999Z"}
    found = client.get(f"{ROUTE}?step=1m&since={NOON - MINUTE_MS}&until={NOON}").json
    assert found["distinct_users_of"] == {"since": "2100-01-01T11:00:00.000Z", "until": "2100-01-01T12:59:59.999Z"}


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
@pytest.mark.parametrize("step", ["1s", "1m", "1h"])
def test_ranges_at_the_ends_of_time_are_empty(client: FlaskClient, step: str, moment: str) -> None:
    for query in (f"until={moment}", f"since={moment}&until={moment}"):
        found = client.get(f"{ROUTE}?step={step}&{query}")
        assert (found.status_code, found.json["series"], found.json["distinct_users"]) == (200, [], 0)


@pytest.mark.parametrize(("step", "hours"), [("1s", 2), ("1m", 30), ("1h", 30)])
def test_answer_tells_since_when_a_step_has_all_counts(start_nexus: Start, step: str, hours: int) -> None:
    nexus = start_nexus(EVENT_RETENTION_HOURS=30)
    client = client_of(nexus)
    now = nexus.clock()
    kept, gone = now - hours * HOUR_MS + 10_000, now - hours * HOUR_MS - 100_000
    post(client, event(timestamp=kept), event(timestamp=gone))

    def points(since: int) -> tuple[int, str]:
        found = client.get(f"{ROUTE}?step={step}&since={since}&until={since + 5_000}").json
        return total(found), found["kept_since"]

    count, since = points(kept)
    assert count >= 1
    if step == "1s":
        assert points(gone)[0] == 0
    assert gone < parse_rfc3339(since)[0] <= kept


@pytest.mark.parametrize("ahead_ms", [0, HOUR_MS])
def test_bucket_is_kept_for_as_long_as_its_step_says_from_its_end_on(store: Store, ahead_ms: int) -> None:
    stream = Aggregates(store, 30 * HOUR_MS)
    at = NOON + ahead_ms
    batch = batch_of(store, [event(timestamp=at)], NOON)
    stream.process(batch, NOON)
    commit(store, batch, stream.cut(NOON))
    for step, hours in ((1, 2), (60, 30), (3600, 30)):
        left = store.call("PTTL", f"{keys.AGGREGATE}{step}:{at // 1000}")
        least = hours * HOUR_MS + ahead_ms + step * 1000
        assert least - 60_000 < left <= least
    assert store.call("PTTL", f"{keys.SEEN}{at // 1000}") > 30 * HOUR_MS + ahead_ms + HOUR_MS - 60_000


def test_history_of_demand_holds_each_week_once(nexus: Runtime) -> None:
    now_s = nexus.clock() // 1000
    step = now_s // demand.STEP_S * demand.STEP_S
    for at in (step, step - 4 * 86_400, step - demand.HISTORY_S + demand.STEP_S):
        nexus.store.call("HSET", demand_key(CITY, at), at, 2)
    assert set(demand_counts(nexus, CITY, now_s).values()) == {2.0}
