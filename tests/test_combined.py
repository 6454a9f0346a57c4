"""The combined vector: merge rules, verdicts, completeness, one round trip; public keys that change by themselves; sync and health."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any
from zlib import crc32

import msgspec
import pyarrow.parquet as pq
import pytest
from h3.api.basic_str import latlng_to_cell
from hypothesis import given
from hypothesis import strategies as st

from pipeline import keys
from pipeline.catalogue import FEATURES
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import ALL_STREAMS, BRIDGE_ONLY, Position, record
from pipeline.commit_log.lease import Lease
from pipeline.errors import Fenced, PartnerUnreachable, StoreUnavailable
from pipeline.events import rfc3339
from pipeline.feature_store import FeatureStore
from pipeline.features.completeness import Backlog
from pipeline.features.families import pack_definitions, plan
from pipeline.features.foreign import read_moment
from pipeline.log import Log, Request
from pipeline.publishing.feature_health import FeatureHealth
from pipeline.publishing.publisher import LEAST_SHARE, MOST_SHARE, Publisher
from pipeline.publishing.sync import synchronise
from pipeline.runtime import wall_clock
from pipeline.store import Store
from pipeline.streams.features import Features
from pipeline.streams.storage import EventStore, Storage
from pipeline.streams.stream import Batch
from tests.helpers import (
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    NOON,
    ROOT,
    Clock,
    append,
    batch_of,
    clean_environment,
    event,
    frames,
    parsed,
    payment,
    response,
    until,
    write,
)  # fmt: skip

RATE = next(f for f in FEATURES if f.name == "acceptance_rate")


class Setting(dict[str, Any]):
    """Settings in force, to set."""


class Both:
    """A feature store over a stream that a test feeds; what the Python service wrote is written by the test."""

    def __init__(self, store: Store, features: tuple[Any, ...] = FEATURES) -> None:
        self.store, self.clock = store, Clock()
        self.stream = Features(store, features)
        self.settings = Setting(HYBRID_FEATURE_MODE=True, FEATURE_SYNC_INTERVAL=300)
        self.lag_s = 0.0
        storage = Storage(store)
        self.reads = FeatureStore(
            store, EventStore(store, Log(store), storage.unwritten), self.settings, lambda: self.stream, self.clock,  # type: ignore[arg-type]
            lambda: self.lag_s, lambda user: 41,
        )  # fmt: skip

    def take(self, *events: dict[str, Any]) -> None:
        self.stream.process(batch_of(self.store, events, self.clock.now), self.clock.now)

    def python(self, user: str, features: dict[str, Any], age_s: float | None = 0.0) -> None:
        at = None if age_s is None else rfc3339(self.clock.now - int(age_s * 1000))
        self.store.call("SET", keys.PARTNER + user, json.dumps({"features": features, "computed_at": at}))

    def value(self, name: str = "acceptance_rate", user: str = "u") -> tuple[Any, dict[str, Any]]:
        found = self.reads.combine([user])[user]
        return found.combined[name], found.meta[name]


@pytest.mark.parametrize(
    ("rule", "owner", "python_age_s", "nexus_lag_s", "taken"),
    [
        ("owner", "shared", 0, 0, "nexus"),
        ("owner", "nexus", 0, 0, "nexus"),
        ("owner", "python", 0, 0, "python"),
        ("python", "nexus", 10, 0, "python"),
        ("nexus", "python", 0, 10, "nexus"),
        ("freshest", "shared", 0, 10, "python"),
        ("freshest", "shared", 10, 0, "nexus"),
    ],
)
def test_merge_rule_says_whose_value_is_taken_and_the_other_one_is_shown(
    store, rule, owner, python_age_s, nexus_lag_s, taken
):
    both = Both(store, (replace(RATE, merge=rule, owner=owner),))
    both.lag_s = nexus_lag_s
    both.take(response("u", timestamp=NOON))
    both.python("u", {"acceptance_rate": 0.25}, python_age_s)
    value, meta = both.value()
    assert (value, meta["owner"], meta["verdict"]) == (1.0 if taken == "nexus" else 0.25, taken, "fresh")
    assert meta["python_value" if taken == "nexus" else "nexus_value"] == (0.25 if taken == "nexus" else 1.0)
    assert meta["agrees"] is False


def test_values_within_tolerance_agree(store):
    both = Both(store)
    both.take(response("u", timestamp=NOON))
    both.python("u", {"acceptance_rate": 0.995})
    assert both.value()[1]["agrees"] is True


def test_owner_without_a_usable_value_gives_way_as_a_fallback(store):
    both = Both(store, (replace(RATE, owner="python"),))
    both.take(response("u", timestamp=NOON))
    assert (both.value()[0], both.value()[1]["verdict"]) == (1.0, "fallback")
    both.python("u", {"acceptance_rate": 0.25}, age_s=2 * 86_400)
    value, meta = both.value()
    assert (value, meta["verdict"], meta["python_value"]) == (1.0, "fallback", 0.25)


def test_value_whose_window_has_passed_is_never_served_as_present(store):
    both = Both(store)
    both.python("u", {"recent_rejections": 5}, age_s=3601)
    value, meta = both.value("recent_rejections")
    assert (value, meta["verdict"], meta["expired_value"]) == (None, "expired", 5)


def test_own_values_grow_stale_while_the_stream_is_behind(store):
    both = Both(store)
    both.take(response("u", timestamp=NOON))
    both.lag_s = 61.0
    _, meta = both.value()
    assert (meta["verdict"], meta["age_s"], meta["computed_at"]) == ("stale", 61.0, rfc3339(NOON - 61_000))


def test_name_that_neither_side_has_is_missing(store):
    both = Both(store)
    both.take(response("u", timestamp=NOON))
    found = both.reads.combine(["u"], frozenset({"acceptance_rate", "nothing"}))["u"]
    assert found.combined == {"acceptance_rate": 1.0, "nothing": None}
    assert found.meta["nothing"]["verdict"] == "missing"


def test_hybrid_mode_off_serves_own_values_alone_and_asks_for_no_others(store):
    both = Both(store)
    both.take(response("u", timestamp=NOON))
    both.python("u", {"acceptance_rate": 0.25, "theirs": 1})
    both.settings["HYBRID_FEATURE_MODE"] = False
    found = both.reads.combine(["u"])["u"]
    assert found.python == {}
    assert found.combined == found.nexus


@pytest.mark.parametrize("raw", ["no json", "7", '{"features": 3}'])
def test_malformed_foreign_value_is_reported_with_its_key(store, raw):
    both = Both(store)
    store.call("SET", "features:u", raw)
    assert "features:u" in (both.reads.combine(["u"])["u"].malformed or "")


@pytest.mark.parametrize("value", ["high", [0.5], {"a": 1}, True])
def test_foreign_value_that_is_no_number_is_reported_with_its_key_and_not_served(store, value):
    both = Both(store)
    both.python("u", {"acceptance_rate": value, "theirs": "gold"})
    found = both.reads.combine(["u"])["u"]
    assert found.combined == found.python == {"theirs": "gold"}
    assert found.malformed is not None
    assert "features:u: acceptance_rate is " in found.malformed
    store.call("DEL", "features:u")
    store.call("HSET", "features:u", "acceptance_rate", json.dumps(value))
    both.take(response("u", timestamp=NOON))
    found = both.reads.combine(["u"])["u"]
    assert (found.combined["acceptance_rate"], found.meta["acceptance_rate"]["verdict"]) == (1.0, "fresh")
    assert "acceptance_rate" in (found.malformed or "")


@pytest.mark.parametrize("stamp", ["yesterday", "9999-01-01T00:00:00Z", 1e300, [1]])
def test_foreign_stamp_that_is_no_past_time_is_reported_with_its_key(store, stamp):
    both = Both(store)
    store.call("SET", "features:u", json.dumps({"features": {"theirs": 1}, "computed_at": stamp}))
    store.call("HSET", "features:v", "theirs", 1, "computed_at", json.dumps(stamp))
    for user, found in both.reads.combine(["u", "v"]).items():
        assert found.combined == {"theirs": 1}
        assert f"features:{user}: computed_at is " in (found.malformed or "")


@pytest.mark.parametrize("stamp", ["2100-01-01 11:59:30", "2100-01-01 19:59:30+08:00", "2100-01-01T19:59:30 08:00"])
def test_time_with_a_space_is_a_time(store, stamp):
    both = Both(store)
    store.call("SET", "features:u", json.dumps({"features": {"theirs": 1}, "computed_at": stamp}))
    assert both.value("theirs")[1]["age_s"] == 30.0


def test_usable_value_of_one_system_is_served_before_the_others_null(store):
    both = Both(store)
    both.take(event(user="u", timestamp=NOON))
    both.python("u", {"acceptance_rate": 0.25, "response_time": None})
    value, meta = both.value()
    assert (value, meta["owner"], meta["verdict"], meta["nexus_value"]) == (0.25, "python", "fallback", None)
    value, meta = both.value("response_time")
    assert (value, meta["owner"], meta["verdict"]) == (None, "nexus", "fresh")
    both.python("u", {"acceptance_rate": 0.25}, age_s=2 * 86_400)
    assert both.value()[0] is None
    of_python = Both(store, (replace(RATE, owner="python"),))
    of_python.take(response("v", timestamp=NOON))
    of_python.python("v", {"acceptance_rate": None})
    value, meta = of_python.value(user="v")
    assert (value, meta["owner"], meta["verdict"]) == (1.0, "nexus", "fallback")


def test_values_of_payees_and_zones_are_read_like_those_of_users(store):
    both = Both(store)
    place = {"lat": 14.5, "lng": 121.0}
    both.take(
        payment("t", 30.0, timestamp=NOON, data={"merchant_id": "m"}),
        event("ride_request", location=place, timestamp=NOON),
    )
    payee = both.reads.of_entity("merchant", "m", frozenset({"payee_amount_mean_30d", "nothing"}))
    assert payee.combined == {"nothing": None, "payee_amount_mean_30d": 30.0}
    assert (payee.meta["payee_amount_mean_30d"]["owner"], payee.meta["nothing"]["verdict"]) == ("nexus", "missing")
    zone = both.reads.of_entity("zone", latlng_to_cell(14.5, 121.0, 7))
    assert (zone.combined["zone_requests_15m"], zone.meta["zone_requests_15m"]["verdict"]) == (1, "fresh")
    both.lag_s = 61.0
    assert both.reads.of_entity("merchant", "m").meta["payee_payments_30d"]["verdict"] == "stale"
    assert not both.reads.of_entity("merchant", "nobody").known


def test_past_value_says_from_when_on_it_is_covered_where_its_window_begins_before(store, monkeypatch):
    both, log = Both(store), Log(store)
    names = ("event_count_1h", "event_count_24h", "events_per_session_24h", "nothing")
    both.take(event(user="u"))
    assert both.reads.covers_from(names, NOON) == {}, "nothing was let go of yet"
    monkeypatch.setattr("pipeline.log.SEGMENT_BYTES", 1)
    for hour in (2, 3):
        append(log, [event(user="u")], NOON + hour * HOUR_MS)
    lease = Lease(store, "test", both.clock, lambda: True)
    assert lease.take()
    head = log.head()
    for name in keys.STREAMS:
        at = Position(head.segment, head.offset, 0, head.ordinal)
        checkpoints.commit(store, lease.epoch, checkpoints.advance(Progress(name, at, 3), NOON))
    assert log.trim(1, lease.epoch)
    since = rfc3339(NOON + 2 * HOUR_MS)
    day = {"event_count_24h": since, "events_per_session_24h": since}
    assert both.reads.covers_from(names, NOON + 3 * HOUR_MS) == day
    assert both.reads.covers_from(names, NOON + 3 * HOUR_MS - 1) == {**day, "event_count_1h": since}
    assert both.reads.covers_from(names, NOON + 26 * HOUR_MS) == {}


def test_standby_serves_the_definitions_of_who_runs_the_stream_also_once_they_change(store, monkeypatch):
    monkeypatch.setattr("pipeline.feature_store._ADOPT_S", 0.0)
    both, served = Both(store), []
    monkeypatch.setattr(both.reads, "_live", lambda: None)
    for known in (FEATURES[:1], FEATURES):
        store.call("SET", keys.DEFINITIONS, pack_definitions(known, plan(known)))
        served.append(len(both.reads.stream.served))
    assert served[0] < served[1] == len(FEATURES)


def test_hash_without_a_time_is_stale_not_gone(store):
    both = Both(store)
    store.call("HSET", "features:u", "theirs", "7")
    assert both.value("theirs")[0] == 7
    assert both.value("theirs")[1]["verdict"] == "stale"


def counted(call: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The same call, noted down."""

    def noted(*args: Any, **more: Any) -> Any:
        calls.append(args)
        return call(*args, **more)

    return noted


@pytest.mark.parametrize("users", [1, 100])
def test_vectors_take_one_round_trip_whether_users_are_in_memory_or_not(store, users, monkeypatch):
    both = Both(store)
    names = [f"u{i}" for i in range(users)]
    both.take(*[response(name, timestamp=NOON) for name in names])
    write(store, both.stream.cut(NOON))
    both.stream = Features(store)  # nobody in memory
    for i, name in enumerate(names):
        if i % 2:
            both.python(name, {"theirs": i})
        else:
            store.call("HSET", keys.PARTNER + name, "theirs", i)
    trips: list[Any] = []
    for method in ("call", "many", "run"):
        monkeypatch.setattr(store, method, counted(getattr(store, method), trips))
    found = both.reads.combine(names)
    assert len(trips) == 1
    assert [found[name].combined["theirs"] for name in names] == list(range(users))
    assert all(found[name].combined["acceptance_rate"] == 1.0 for name in names)


def test_completeness_counts_the_users_events_behind_the_bridges_position(store):
    log = Log(store)
    delivered = 0
    backlog = Backlog(lambda: delivered)
    append(log, [event(user="a"), event(user="b"), event(user="a")], NOON)
    append(log, [event(user="a")], NOON)
    for frame in frames(log):
        backlog.note(Batch([frame]))
    assert (backlog.behind("a"), backlog.behind("b"), backlog.behind("c")) == (3, 1, 0)
    delivered = 2
    assert (backlog.behind("a"), backlog.behind("b")) == (2, 0)
    delivered = 4
    assert backlog.behind("a") == 0


def test_stream_that_was_made_anew_and_reads_again_adds_nothing_to_the_backlog(store):
    backlog = Backlog(lambda: 0)
    batch = batch_of(store, [event(user="u")], NOON)
    backlog.note(batch)
    backlog.note(batch)
    assert backlog.behind("u") == 1


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=40), st.integers(0, 60)), max_size=60))
def test_completeness_of_a_long_backlog_is_counted_in_few_parts_as_it_is_event_by_event(
    steps: list[tuple[str, int]],
) -> None:
    """Reads ask for it all the time: one part for each batch made them slower the longer the Python service was away."""
    posted, delivered = "", 0
    backlog = Backlog(lambda: delivered)
    for users, more in steps:
        backlog._add(len(posted), array("I", [crc32(user.encode()) for user in users]))
        posted += users
        delivered = min(delivered + more, len(posted))
        assert [backlog.behind(user) for user in "abc"] == [posted[delivered:].count(user) for user in "abc"]
        assert 2 ** len(backlog._parts) <= 2 * max(len(posted), 1)


def test_completeness_counts_what_is_addressed_to_the_bridge_whoever_else_it_is_for(start_nexus):
    nexus = start_nexus(HEALTH_CHECK_INTERVAL=600)
    nexus.bridge.control("pause")
    for addressees in (ALL_STREAMS, BRIDGE_ONLY, ALL_STREAMS - BRIDGE_ONLY, BRIDGE_ONLY):
        append(nexus.log, [event(user="a"), event(user="b")], nexus.clock(), to=addressees)
    nexus.taken()
    until(lambda: nexus.runner.ordinal("features") == nexus.log.head().ordinal, "the features to be past them")
    assert nexus.backlog.behind("a") == 3

    again = Backlog(lambda: nexus.bridge.ordinal)
    again.load(nexus.log, checkpoints.read(nexus.store, ["bridge"])["bridge"], nexus.log.head().ordinal)
    assert again.behind("a") == 3


def test_completeness_of_an_earlier_process_is_read_from_the_log(store):
    log = Log(store)
    append(log, [event(user="a"), event(user="ü"), event(user="a")], NOON)
    append(log, [event(user="a")], NOON, to=BRIDGE_ONLY)
    backlog = Backlog(lambda: 1)
    backlog.load(log, Position(index=1, ordinal=1), 4)
    assert (backlog.behind("a"), backlog.behind("ü")) == (2, 1)


def published(store: Store, user: str) -> dict[str, Any]:
    raw = store.call("GET", keys.SERVING + user)
    return json.loads(raw)["features"] if raw else {}


@pytest.fixture
def publisher(store: Store) -> tuple[Publisher, Both]:
    both = Both(store)
    lease = Lease(store, "test", both.clock, lambda: True)
    assert lease.take()
    health = FeatureHealth(lambda: both.stream, both.clock)
    return Publisher(store, lease, lambda: both.stream, both.clock, health), both


def test_public_key_changes_when_a_window_empties_without_new_events(store, publisher):
    publish, both = publisher
    both.take(response("u", "rejected", timestamp=NOON))
    write(store, both.stream.cut(NOON))
    publish.publish()
    assert published(store, "u")["recent_rejections"] == 1
    for at, expected in ((NOON + 5 * MINUTE_MS, (0, 1, 1)), (NOON + HOUR_MS, (0, 0, 1)), (NOON + DAY_MS, (0, 0, 0))):
        both.clock.now = at - 1
        publish.publish()
        assert published(store, "u") != {}
        both.clock.now = at
        assert publish.publish() == 1
        found = published(store, "u")
        assert (found["event_count_5m"], found["recent_rejections"], found["event_count_24h"]) == expected
        assert publish.publish() == 0
    both.clock.now = NOON + 100 * DAY_MS
    for _ in range(3):
        publish.publish()
    assert store.call("ZCARD", keys.DUE) == 0


def test_public_key_follows_events_ahead_of_the_clock_as_each_gets_its_time(store, publisher):
    publish, both = publisher
    both.take(*[event("payment", "u", timestamp=NOON + ahead) for ahead in (0, 4_000, 4_000, 30_000)])
    write(store, both.stream.cut(NOON))
    publish.publish()
    assert published(store, "u")["event_count_5m"] == 1
    for at, count in ((NOON + 4_000, 3), (NOON + 30_000, 4)):
        both.clock.now = at - 1
        assert publish.publish() == 0
        both.clock.now = at
        assert publish.publish() == 1
        assert published(store, "u")["event_count_5m"] == count


def test_later_event_does_not_put_off_when_an_earlier_one_leaves_a_window(store, publisher):
    publish, both = publisher
    for later in (0, 4 * MINUTE_MS + 30_000):
        both.clock.now = NOON + later
        both.take(event("payment", "u", timestamp=both.clock.now))
        write(store, both.stream.cut(both.clock.now))
        publish.publish()
    assert float(store.call("ZSCORE", keys.DUE, "u")) <= NOON + 5 * MINUTE_MS


def test_user_that_is_due_is_published_by_the_next_process_too(store, publisher):
    publish, both = publisher
    both.take(response("u", "rejected", timestamp=NOON))
    write(store, both.stream.cut(NOON))
    publish.publish()
    both.stream = Features(store)
    both.clock.now = NOON + 2 * HOUR_MS
    publish.publish()
    assert published(store, "u")["recent_rejections"] == 0


def test_public_keys_of_a_cluster_are_written_by_the_leases_holder_alone(store, publisher, monkeypatch):
    """There no script can hold them beside the lease: it is looked at once more."""
    publish, both = publisher
    both.take(response("u", timestamp=NOON))
    write(store, both.stream.cut(NOON))
    monkeypatch.setattr(store, "cluster", True)
    monkeypatch.setattr(publish._health, "look", lambda *_: setattr(publish._lease, "epoch", 0))  # it is lost meanwhile
    with pytest.raises(Fenced):
        publish.publish()
    assert published(store, "u") == {}


def test_published_position_never_passes_a_user_whose_key_lags_behind(store, publisher):
    """The publisher may look between a checkpoint's commit and what the stream does after it; then the process is killed."""
    publish, both = publisher
    both.take(response("u", timestamp=NOON))
    cut = both.stream.cut(NOON)
    for chunk in cut.chunks:
        store.many(chunk)
    at = frames(Log(store))[-1].after()
    store.many([*cut.final, *checkpoints.advance(Progress("features", at, 1), NOON)])
    publish.publish()
    both.stream = Features(store)
    both.stream.load(NOON)
    publish.publish()
    assert published(store, "u")["event_count_24h"] == 1


def test_user_whose_event_comes_between_a_cut_and_its_writing_is_published_too(store, publisher):
    publish, both = publisher
    both.take(response("u", timestamp=NOON))
    cut = both.stream.cut(NOON)
    both.take(response("v", timestamp=NOON))
    write(store, cut)
    write(store, both.stream.cut(NOON))
    publish.publish()
    assert published(store, "v")["event_count_24h"] == 1


def test_users_whose_publishing_failed_are_published_by_the_next_round(store, publisher, monkeypatch):
    publish, both = publisher
    both.take(response("u", timestamp=NOON))
    write(store, both.stream.cut(NOON))

    def away(*_: Any) -> None:
        raise StoreUnavailable("for a moment")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "commit", away)
        with pytest.raises(StoreUnavailable):
            publish.publish()
    assert published(store, "u") == {}
    assert publish.publish() == 1
    assert published(store, "u")["event_count_24h"] == 1


def test_published_position_follows_those_who_wait_longest_while_others_always_wait(store, publisher, monkeypatch):
    monkeypatch.setattr("pipeline.publishing.publisher.MOST_PER_ROUND", 2)
    publish, both = publisher
    checkpointed = []
    for round_ in range(4):
        both.take(*[response(f"u{round_}-{i}", timestamp=NOON) for i in range(4)])
        at = frames(Log(store))[-1].after()
        write(store, both.stream.cut(NOON))
        store.many(checkpoints.advance(Progress("features", at, 4), NOON))
        checkpointed.append(at)
        assert publish.publish() == 2
    assert len(both.stream.outbox) == 8
    assert Position(*json.loads(store.call("GET", keys.PUBLISHED))) == checkpointed[1]
    both.stream = Features(store)
    both.stream.load(NOON)
    assert sorted(both.stream.outbox.first(99)) == [f"u{round_}-{i}" for round_ in (2, 3) for i in range(4)]


def test_stream_starts_behind_an_event_that_nobody_can_decode(store):
    log, [sound] = Log(store), parsed([event(user="u")], NOON)
    bad = [
        msgspec.structs.replace(sound, event_id=f"bad{i}", record=record(NOON, body))
        for i, body in enumerate((b"{", b'{"user_id":"a\\q"}'))
    ]
    log.accept([Request([*bad, sound], "test")], NOON)
    at = frames(log)[-1].after()
    store.many(checkpoints.advance(Progress("features", at, 3), NOON))
    stream = Features(store, backlog=Backlog(lambda: 0))
    stream.load(NOON)
    assert stream.outbox.first(9) == ["u"]


def test_user_is_published_at_most_once_a_second(store, publisher):
    publish, both = publisher
    publish._clock = wall_clock
    both.take(response("u", timestamp=NOON))
    made: list[int] = []
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        both.stream.outbox.add(["u"])
        if publish.publish():
            made.append(read_moment("", json.loads(store.call("GET", keys.SERVING + "u"))["computed_at"]))
    assert len(made) >= 2
    assert all(later - earlier >= 1_000 for earlier, later in pairwise(made))


def test_publisher_takes_less_of_the_interpreter_the_more_all_else_takes(publisher, monkeypatch):
    publish, _ = publisher
    now, spent = 100.0, 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: spent)
    publish._share()
    shares = []
    for busy in (0.0, 0.4, 0.8, 1.5):
        now, spent = now + 1, spent + busy
        shares.append(publish._share())
    assert shares == pytest.approx([MOST_SHARE, MOST_SHARE / 2, LEAST_SHARE, LEAST_SHARE])


def test_health_of_features_tells_nulls_values_out_of_range_and_age(store, publisher):
    publish, both = publisher
    health = publish._health
    both.take(*[payment(f"t{i}", 2e6, f"u{i}", timestamp=NOON - 5_000) for i in range(10)])
    write(store, both.stream.cut(NOON))
    publish.publish()
    rows = health.snapshot()["features"]
    assert rows["acceptance_rate"]["null_rate"] == 1.0
    assert rows["payment_mean_30d"]["null_rate"] == 0.0
    assert rows["payment_mean_30d"]["out_of_range_rate"] == 1.0
    assert rows["payment_mean_30d"]["age_s"] == 5.0
    assert rows["acceptance_rate"]["age_s"] is None


def test_sync_refreshes_those_that_drifted_and_leaves_the_others(store):
    both = Both(store)
    both.take(response("old"), response("new"), response("none"))
    write(store, both.stream.cut(NOON))
    both.stream.outbox.take(["old", "new", "none"])
    both.python("old", {}, age_s=900)
    both.python("new", {}, age_s=10)
    asked: list[Any] = []
    report = synchronise(both.stream, both.reads, counted(lambda user: {}, asked), NOON, 300.0)
    assert sorted(user for (user,) in asked) == sorted(both.stream.outbox.first(9)) == ["none", "old"]
    assert (report["checked"], report["drifted"], report["refreshed"], report["waiting"]) == (3, 2, 2, 0)
    assert synchronise(both.stream, both.reads, None, NOON, 300.0)["checked"] == 0


def test_sync_looks_at_so_many_users_a_run_and_asks_the_partner_for_fewer(store, monkeypatch):
    monkeypatch.setattr("pipeline.publishing.sync.MAX_USERS", 5)
    monkeypatch.setattr("pipeline.publishing.sync.REFRESHES", 2)
    both = Both(store)
    both.take(*[response(f"u{n}") for n in range(8)])
    write(store, both.stream.cut(NOON))
    asked: list[Any] = []
    report = synchronise(both.stream, both.reads, counted(lambda user: {}, asked), NOON, 300.0)
    assert (report["checked"], report["refreshed"], len(asked), report["waiting"]) == (5, 2, 2, 6)


def test_sync_comes_back_to_whom_it_could_not_refresh_and_a_user_that_fails_waits_for_the_others(store):
    both = Both(store)
    users = [f"u{n}" for n in range(120)]
    both.take(*[response(user) for user in users])
    write(store, both.stream.cut(NOON))
    asked: list[str] = []
    away = True

    def refresh(user: str) -> dict[str, Any]:
        asked.append(user)
        if away or user == "u3":
            raise PartnerUnreachable("away")
        return {}

    report = synchronise(both.stream, both.reads, refresh, NOON, 300.0)
    assert (report["drifted"], report["failed"], report["waiting"]) == (120, 1, 120)
    away = False
    runs = [synchronise(both.stream, both.reads, refresh, NOON, 300.0) for _ in range(6)]
    assert set(asked) == set(users)
    assert sum(run["refreshed"] for run in runs) == 119
    assert list(both.stream.active) == ["u3"]


def test_training_set_is_written_with_the_labels_columns_and_features_of_their_time(store, store_server, tmp_path):
    now = time.time_ns() // 1_000_000
    log = Log(store)
    append(log, [payment(f"t{i}", 10.0 * i, "u", timestamp=now - i * HOUR_MS) for i in range(1, 6)], now)
    labels = tmp_path / "labels.csv"
    rows = [f"u,{now},1", f"u,{rfc3339(now - 3 * HOUR_MS)},0", f"nobody,{now},0"]
    labels.write_text("user_id,timestamp,label\n" + "\n".join(rows) + "\n")
    out = tmp_path / "set.parquet"
    command = [sys.executable, "-m", "pipeline.tools.training_set", "--labels", str(labels), "--out", str(out)]
    environment = clean_environment(REDIS_URL=store_server.url, NEXUS_DATA_DIR=str(tmp_path))
    names = "payments_24h,payment_last_30d,completion_ratio_7d"
    subprocess.run([*command, "--features", names], cwd=ROOT, env=environment, check=True, capture_output=True)
    table = pq.read_table(out).to_pydict()
    assert list(table) == ["user_id", "timestamp", "label", *names.split(",")]
    assert table["label"] == ["1", "0", "0"]
    assert table["payments_24h"] == [5.0, 3.0, None]
    assert table["payment_last_30d"] == [10.0, 30.0, None]
    wrong = subprocess.run([*command, "--features", "nope"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (wrong.returncode, "no feature nope" in wrong.stderr) == (1, True)
