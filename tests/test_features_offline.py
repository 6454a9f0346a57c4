"""What was online equals what is folded from the stored events: any aggregation, any order, every position in the log."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.catalogue import FEATURES
from pipeline.definitions import DAY, Entity, Feature, Malformed
from pipeline.errors import Unprocessable
from pipeline.events import Stored
from pipeline.feature_store import FeatureStore
from pipeline.features.extraction import Owners, compile_counting
from pipeline.features.offline import past
from pipeline.ingest import judge
from pipeline.log import Log, Request
from pipeline.store import Store
from pipeline.streams.features import Features
from pipeline.streams.storage import EventStore, Storage
from pipeline.streams.stream import Batch
from pipeline.tools.demo import City
from pipeline.tools.training_set import Label, TrainingSet, chosen, read_labels
from pipeline.windows import Windows
from tests.helpers import DAY_MS, HOUR_MS, NOON, append, batch_of, event, frames, payment, report, response, write

on_a_store = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
USERS = ("u1", "u2")
ages = st.one_of(
    st.integers(-HOUR_MS, 0),
    st.integers(0, 2 * HOUR_MS),
    st.integers(0, 40 * DAY_MS),
    st.sampled_from([0, HOUR_MS, DAY_MS]),
)
amounts = st.one_of(st.floats(-1e6, 1e6), st.integers(0, 1000), st.sampled_from([1e6, 1e6 + 0.01, 0.0, -0.0]))
places = st.fixed_dictionaries({"lat": st.floats(14.5, 14.6), "lng": st.floats(121.0, 121.1)})
kinds = st.one_of(
    st.tuples(st.just("ride_request_response"), st.fixed_dictionaries(
        {"response": st.sampled_from(["accepted", "rejected", "odd", 7, None, ["x"]])}, optional={"response_time": amounts})),
    st.tuples(st.just("payment"), st.fixed_dictionaries(
        {"transaction_id": st.sampled_from(["t1", "t2", "t3"]), "amount": amounts},
        optional={"merchant_id": st.sampled_from(["m1", "m2", 3])})),
    st.tuples(st.just("fraud_report"), st.fixed_dictionaries(
        {"transaction_id": st.sampled_from(["t1", "t2", "t3"]), "is_fraud": st.sampled_from([0, 1, True])})),
    st.tuples(st.just("payment"), st.just({"transaction_id": "t9", "amount": "twelve"})),
    st.tuples(st.just("ride_request"), st.fixed_dictionaries({}, optional={"pickup": places})),
    st.tuples(st.just("ride_completed"), st.fixed_dictionaries({}, optional={"fare": amounts, "distance_km": amounts})),
    st.tuples(st.just("ride_cancelled"), st.fixed_dictionaries({"cancelled_by": st.sampled_from(["rider", "driver"])})),
    st.tuples(st.just("ui_interaction"), st.fixed_dictionaries({}, optional={"screen": st.sampled_from(["a", "b", 5])})),
    st.tuples(st.just("anything.else"), st.just({})),
)  # fmt: skip
posted = st.tuples(ages, st.sampled_from(USERS), kinds, st.sampled_from([None, "s1", "s2"]))
steps = st.lists(
    st.tuples(st.lists(posted, min_size=1, max_size=8), st.integers(0, 3 * DAY_MS), st.booleans()),
    min_size=1,
    max_size=5,
)


NOTHING = Windows(FEATURES)
EMPTY = NOTHING.values(NOTHING.new(), NOON)


def assert_same(online: dict[str, Any], offline: dict[str, Any]) -> None:
    if not offline:  # what is stamped ahead: online the user is known by it already, with nothing in any window
        offline = EMPTY if online else {}
    assert online.keys() == offline.keys()
    for name, value in online.items():
        other = offline[name]
        same = value == other or (value is not None and other is not None and math.isclose(value, other, rel_tol=1e-9))
        assert same, f"{name}: online {value}, offline {other}"


def as_event(item: Any, now: int) -> dict[str, Any]:
    age, user, (kind, data), session = item
    more = {} if session is None else {"session_id": session}
    return event(kind, user, data=data, timestamp=now - age, **more)


def with_streams(store: Store) -> tuple[Features, Storage, EventStore]:
    features, storage = Features(store), Storage(store)
    storage.load(NOON)
    return features, storage, EventStore(store, Log(store), storage.unwritten)


@settings(on_a_store, max_examples=200)
@given(steps)
def test_offline_value_at_an_events_log_position_equals_the_one_committed_online_there(store, steps):
    store.call("FLUSHALL")
    log, now = Log(store), NOON
    features, storage, events = with_streams(store)
    features.load(now)
    for items, pause, restart in steps:
        for item in items:
            append(log, [as_event(item, now)], now)
            batch = Batch([frames(log)[-1]])
            features.process(batch, now)
            storage.process(batch, now)
            online = features.values([item[1]], now).get(item[1], {})
            assert_same(online, past(events, features.windows, item[1], now, before=batch.places[0] + 1))
        write(store, features.cut(now))
        write(store, storage.cut(now))
        if restart:
            features, storage, events = with_streams(store)
            features.load(now)
        for user in USERS:
            assert_same(features.values([user], now).get(user, {}), past(events, features.windows, user, now))
        now += pause


def fields(commands: list[list[Any]]) -> dict[Any, Any]:
    """What a dump writes, in whichever order."""
    return {
        field: raw
        for name, _, *words in commands
        if name == "HSET"
        for field, raw in zip(words[::2], words[1::2], strict=True)
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40 * DAY_MS), kinds, st.sampled_from([None, "s1", "s2"])), max_size=30))
def test_counting_straight_in_the_tiles_does_what_adding_an_events_deltas_does(items):
    of: dict[Entity, Windows] = {kind: Windows(FEATURES, None, kind) for kind in ("user", "merchant", "zone")}
    straight = {kind: windows.new() for kind, windows in of.items()}
    added = {kind: windows.new() for kind, windows in of.items()}
    now = NOON
    for age, (kind, data), session in items:
        now += HOUR_MS
        posted = Stored("e", kind, "u", "", "1", "x", data, session)
        dead: list[tuple[int, str]] = []
        owners = {of_kind: Owners(["o"], {"o": entity}, {}) for of_kind, entity in straight.items()}
        compile_counting(of, kind, list(of))([0], [posted], [now - age], now, 0, owners, [], dead)
        try:
            deltas = {of_kind: windows.extract(posted, data, now - age) for of_kind, windows in of.items()}
        except Malformed as error:
            reason = str(error)
        else:
            reason = ""
            for of_kind, windows in of.items():
                windows.add(added[of_kind], now - age, deltas[of_kind], now)
        assert dead == ([(0, f"malformed: {reason}")] if reason else [])
        for kind, windows in of.items():
            assert windows.values(straight[kind], now) == windows.values(added[kind], now)
            assert fields(windows.dump(straight[kind], "k", now)) == fields(windows.dump(added[kind], "k", now))


@on_a_store
@given(steps)
def test_training_set_of_any_entity_equals_what_is_online(store, steps):
    store.call("FLUSHALL")
    log, now = Log(store), NOON
    features = Features(store)
    features.load(now)
    for items, pause, _ in steps:
        append(log, [as_event(item, now) for item in items], now)
        features.process(Batch([frames(log)[-1]]), now)
        write(store, features.cut(now))
        now += pause
    zones = list(features.fold.tables["zone"].entities) or ["nowhere"]
    maker = TrainingSet(log, FEATURES)
    for user, merchant, zone in zip(("u1", "u2", "u1"), ("m1", "m2", "3"), (zones * 3)[:3], strict=True):
        row = {"user_id": user, "merchant_id": merchant, "zone": zone}
        [offline] = maker.join([Label(row, now)])
        owners: dict[Entity, str] = {"user": user, "merchant": merchant, "zone": zone}
        for kind, owner in owners.items():
            online = features.values([owner], now, kind).get(owner)
            if online is not None:
                found = {name: offline[name] for name in online}
                nothing = features.fold.tables[kind].windows
                # An entity that has no event up to then is known online by others of its events, offline it is not.
                assert_same(online, found if set(found.values()) != {None} else nothing.values(nothing.new(), now))


@on_a_store
@given(st.lists(posted, min_size=1, max_size=12))
def test_events_that_come_together_count_as_they_do_one_by_one(store, items):
    store.call("FLUSHALL")
    events = [as_event(item, NOON) for item in items]
    batch = batch_of(store, events, NOON)
    together, alone = Features(store), Features(store)
    dead = [index for index, _ in together.process(batch, NOON).dead]
    [frame] = frames(Log(store))
    for index in range(len(events)):
        assert bool(alone.process(Batch([frame], index, single=True), NOON).dead) == (index in dead)
    for kind in together.fold.tables:
        known, others = (
            sorted(owner for owner, entity in stream.fold.tables[kind].entities.items() if entity.position)
            for stream in (together, alone)
        )
        assert known == others
        assert together.values(known, NOON, kind) == alone.values(known, NOON, kind)
    assert together.fold.newest == alone.fold.newest


def test_reported_fraud_counts_for_the_payee_of_the_payment_also_after_a_restart(store):
    log = Log(store)
    stream = Features(store)
    stream.load(NOON)
    append(log, [payment("t1", data={"merchant_id": "m"}), payment("t2", data={"merchant_id": "m"})], NOON)
    stream.process(Batch(frames(log)), NOON)
    write(store, stream.cut(NOON))
    again = Features(store)
    again.load(NOON)
    append(log, [report("t1"), report("t9")], NOON)
    again.process(Batch([frames(log)[-1]]), NOON)
    assert again.values(["m"], NOON, "merchant")["m"]["payee_fraud_rate_30d"] == 0.5


def test_report_that_comes_while_its_payment_is_being_written_counts_for_the_payee(store):
    features = Features(store)
    features.load(NOON)
    features.process(batch_of(store, [payment("t", data={"merchant_id": "m"})], NOON), NOON)
    cut = features.cut(NOON)
    features.process(batch_of(store, [report("t")], NOON), NOON)
    write(store, cut)
    assert features.values(["m"], NOON, "merchant")["m"]["payee_frauds_30d"] == 1


def test_payment_reported_again_and_again_or_withdrawn_counts_once_as_reported(store):
    log, features = Log(store), Features(store)
    paid = {"merchant_id": "m1"}
    first = [payment("t1", data=paid), report("t1"), report("t1")]
    for some in (first, [report("t1")], [report("t1", 0)], [payment("t2", data=paid)], [report("t2", 0)]):
        append(log, some, NOON)
        features.process(Batch([frames(log)[-1]]), NOON)
        write(store, features.cut(NOON))
        features = Features(store)
        features.load(NOON)
    found = features.values(["m1"], NOON, "merchant")["m1"]
    assert (found["payee_payments_30d"], found["payee_frauds_30d"], found["payee_fraud_rate_30d"]) == (2, 1, 0.5)
    [trained] = training(log, ["payee_frauds_30d"], merchant_id="m1")
    assert trained["payee_frauds_30d"] == 1


def test_report_of_a_payment_that_is_a_dead_letter_or_has_no_transaction_counts_for_nobody(store):
    log, features = Log(store), Features(store)
    paid = {"merchant_id": "m1"}
    spoilt, nameless = payment("t1", data={**paid, "amount": "much"}), payment("t2", data=paid)
    del nameless["data"]["transaction_id"]
    append(
        log,
        [spoilt, nameless, payment("t3", data=paid), report("t1"), event("fraud_report", data={"is_fraud": 1})],
        NOON,
    )
    features.process(Batch(frames(log)), NOON)
    names = ["payee_frauds_30d", "payee_payments_30d"]
    online = features.values(["m1"], NOON, "merchant")["m1"]
    [trained] = training(log, names, merchant_id="m1")
    assert [online[name] for name in names] == [trained[name] for name in names] == [0, 2]


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("payments_1h", {}),
        ("recent_rejections", {}),
        ("payee_frauds_30d", {"merchant_id": "m1"}),
        ("event_count_24h", {}),
    ],
)
def test_count_of_nothing_is_zero_in_a_training_set_whatever_else_is_asked_for(store, name, of):
    append(Log(store), [payment("t1", user="u1", data={"merchant_id": "m1"}, timestamp=NOON - 40 * DAY_MS)], NOON)
    [alone] = training(Log(store), [name], user_id="u1", **of)
    [beside] = training(Log(store), [name, "payments_24h"], user_id="u1", **of)
    assert alone[name] == beside[name] == 0
    [unknown] = training(Log(store), [name], **dict.fromkeys(["user_id", *of], "nobody"))
    assert unknown[name] is None


def training(log: Log, names: list[str], **row: str) -> list[dict[str, Any]]:
    """The one row of a training set at NOON."""
    return list(TrainingSet(log, chosen(names)).join([Label(row, NOON)]))


def test_payment_that_no_feature_counts_is_still_known_to_the_report_about_it(store):
    frauds = next(feature for feature in FEATURES if feature.name == "payee_frauds_30d")
    stream = Features(store, [frauds])
    outcome = stream.process(batch_of(store, [payment("t", data={"merchant_id": "m"}), report("t")], NOON), NOON)
    assert not outcome.dead
    assert stream.values(["m"], NOON, "merchant")["m"] == {"payee_frauds_30d": 1}


def test_event_that_a_feature_of_payees_cannot_take_counts_in_no_past_value_of_users_either(store):
    count = Feature(name="n", aggregation="count", window_s=DAY, description="events")
    tips = Feature(name="tips", aggregation="sum", event_type="payment", field="tip", entity="merchant", window_s=DAY,
                   description="tips")  # fmt: skip
    features, storage = Features(store, (count, tips)), Storage(store)
    for stream in (features, storage):
        stream.load(NOON)
    batch = batch_of(store, [payment("t", data={"tip": "much", "merchant_id": "m"}), response("rider_1")], NOON)
    assert [index for index, _ in features.process(batch, NOON).dead] == [0]
    storage.process(batch, NOON)
    reads = FeatureStore(
        store, EventStore(store, Log(store), storage.unwritten), {}, lambda: features, lambda: NOON  # type: ignore[arg-type]
    )  # fmt: skip
    assert reads.nexus(["rider_1"], NOON)["rider_1"] == reads.past("rider_1", NOON) == {"n": 1}


def test_known_at_leaves_out_what_arrived_later(store):
    log = Log(store)
    features, storage, events = with_streams(store)
    for arrival in (NOON, NOON + HOUR_MS):
        append(log, [response("d", timestamp=NOON - HOUR_MS)], arrival)
        batch = Batch([frames(log)[-1]])
        storage.process(batch, arrival)
    windows = features.windows
    assert past(events, windows, "d", NOON)["event_count_24h"] == 2
    assert past(events, windows, "d", NOON, known_at=NOON)["event_count_24h"] == 1
    assert past(events, windows, "d", NOON, known_at=NOON - 1) == {}


def test_replayed_week_of_the_city_equals_a_recount_by_other_code(store):
    """A week of traffic, counted again by plain loops over the posted events."""
    city = City(seed=3, start=NOON / 1000 - 7 * 86_400, rate=0.05, riders=40, drivers=12)
    week = list(city.events(NOON / 1000))
    log, stream = Log(store), Features(store)
    stream.load(NOON)
    for at in range(0, len(week), 500):
        append_valid(log, week[at : at + 500])
    for frame in frames(log):
        stream.process(Batch([frame]), NOON)
    write(store, stream.cut(NOON))
    stored = {
        e.event_id: (e, b.ts[i], b.data(i))
        for b in [Batch([f]) for f in frames(log)]
        for i, e in enumerate(b.events)
        if e is not None
    }
    checked = 0
    for user in sorted({e.user_id for e, _, _ in stored.values()}):
        mine = [(e, ts, data) for e, ts, data in stored.values() if e.user_id == user]
        online = stream.values([user], NOON)[user]
        for name, expected in recount(mine, NOON).items():
            got: Any = online[name]
            assert got == expected or math.isclose(got, expected, rel_tol=1e-9), (user, name)
            checked += 1
    assert checked > 300


def append_valid(log: Log, events: list[dict[str, Any]]) -> None:
    """The events that ingest accepts, at the arrival NOON."""
    log.accept([Request(judge(events, NOON).kept, "city")], NOON)


def recount(mine: list[tuple[Any, int, dict[str, Any]]], at: int) -> dict[str, Any]:
    """Features by brute force: their window's older edge lies on the next whole sixtieth, as the definitions say."""

    def inside(
        window_s: int, kind: str | None = None, tile_s: int | None = None
    ) -> list[tuple[Any, int, dict[str, Any]]]:
        tile = (tile_s or window_s // 60) * 1000
        edge = (at - window_s * 1000) // tile
        return [(e, ts, d) for e, ts, d in mine if ts // tile > edge and ts <= at and kind in (None, e.event_type)]

    answers = [d for _, _, d in inside(86_400, "ride_request_response")]
    known = [d["response"] for d in answers if d["response"] in ("accepted", "rejected")]
    times = [d["response_time"] for d in answers]
    paid = [(ts, d["amount"]) for _, ts, d in inside(30 * 86_400, "payment")]
    amounts = [amount for _, amount in paid]
    mean = sum(amounts) / len(amounts) if amounts else None
    return {
        "acceptance_rate": known.count("accepted") / len(known) if known else None,
        "response_time": sum(times) / len(times) if times else None,
        "recent_rejections": sum(d["response"] == "rejected" for _, _, d in inside(3600, "ride_request_response")),
        "event_count_24h": len(inside(86_400)),
        "ride_requests_7d": len(inside(7 * 86_400, "ride_request")),
        "payments_24h": len(inside(86_400, "payment")),
        "payment_mean_30d": mean,
        "payment_std_30d": math.sqrt(sum((a - mean) ** 2 for a in amounts) / len(amounts))
        if mean is not None
        else None,
        "payment_max_30d": max(amounts, default=None),
        "payment_min_30d": min(amounts, default=None),
        "payment_last_30d": max(paid)[1] if paid else None,
    }


HEADER = b"user_id,timestamp,label\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"user_id,label\nu,1\n", "no column timestamp"),
        (b"", "no column timestamp, user_id"),
        (HEADER + b"u,2026-01-05T08:00:00Z,1\nu,2026-01-05T08:00:00Z\n", "line 3: it takes 3 fields"),
        (HEADER + b"u,2026-01-05T08:00:00Z,1,2\n", "line 2: it takes 3 fields"),
        (HEADER + b"u,yesterday,1\n", "line 2: timestamp is 'yesterday'"),
        (HEADER + b"u,2026-01-05T08:00:00Z,1\n\xff,2026-01-05T08:00:00Z,1\n", "line 3: it takes CSV in UTF-8"),
        (b"user_id,timestamp,\xff\n", "line 1: it takes CSV in UTF-8"),
        (HEADER + b'u,2026-01-05T08:00:00Z,"1"2\n', "line 2: it takes CSV in UTF-8"),
        (b"user_id,timestamp,payments_1h\nu,2026-01-05T08:00:00Z,1\n", "has a column payments_1h, like the feature"),
        (b"user_id,timestamp,x,x\nu,2026-01-05T08:00:00Z,1,1\n", "the column x more than once"),
    ],
)
def test_label_file_that_is_wrong_is_told_in_one_line_with_the_row(tmp_path, content, said):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(Unprocessable) as caught:
        read_labels(path, ["user"], ["payments_1h"])
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_label_file_of_a_spreadsheet_and_times_with_a_space_are_read(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(
        b"\xef\xbb\xbfuser_id,timestamp,label\r\nu,2026-01-05 08:00:00,\r\n\r\nv,2026-01-05 16:00:00+08:00,1\r\n"
    )
    found = read_labels(path, ["user"])
    assert [label.row["label"] for label in found] == ["", "1"]
    assert {label.at for label in found} == {1_767_600_000_000}


def test_training_set_without_a_feature_is_refused():
    with pytest.raises(Unprocessable, match="--features"):
        chosen([])
