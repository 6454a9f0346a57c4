"""Events: both posted shapes come to one stored form, and each rejection names the field and the remedy."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.events import Rejected, decode, parse, parse_rfc3339, rfc3339, uuid7
from tests.helpers import DAY_MS, HOUR_MS, NOON


def stored(raw: Any, now: int = NOON) -> dict[str, Any]:
    return decode(parse(raw, now).body)


def rejection(raw: Any, now: int = NOON) -> Rejected:
    with pytest.raises(Rejected) as caught:
        parse(raw, now)
    return caught.value


def bare(**more: Any) -> dict[str, Any]:
    return {"event_type": "ui_interaction", "user_id": "u", **more}


def nested(levels: int) -> Any:
    return {"x": nested(levels - 1)} if levels > 0 else 1


def test_flat_example_of_the_guide_becomes_the_nested_form_of_the_guide():
    flat = {
        "event_type": "ride_request_response",
        "user_id": "driver_123",
        "session_id": "session_456",
        "driver_id": "driver_123",
        "request_id": "req_789",
        "response": "accepted",
        "response_time": 3.2,
    }
    found = stored(flat)
    assert found["data"] == {"response": "accepted", "response_time": 3.2, "request_id": "req_789"}
    assert found["session_id"] == "session_456"
    assert (found["app_version"], found["device_type"]) == ("unknown", "unknown")
    assert found["timestamp"] == rfc3339(NOON)
    assert "location" not in found
    assert "driver_id" not in found


def test_flat_and_nested_shapes_store_the_same():
    envelope = {"event_id": "e", "event_type": "payment", "user_id": "u", "timestamp": NOON}
    data = {"transaction_id": "t", "amount": 5}
    assert stored({**envelope, **data}) == stored({**envelope, "data": data})


def test_driver_id_of_somebody_else_stays_in_data():
    assert stored(bare(driver_id="other"))["data"] == {"driver_id": "other"}


def test_keys_beside_data_are_merged_into_it():
    assert stored(bare(data={"a": 1}, b=2))["data"] == {"a": 1, "b": 2}


def test_key_that_stands_in_the_event_and_differently_in_data_is_rejected():
    assert rejection(bare(data={"a": 1}, a=2)).code == "given_twice"
    assert stored(bare(data={"a": 1}, a=1))["data"] == {"a": 1}


def test_absent_event_id_is_made_as_a_uuid_of_version_7_and_differs_each_time():
    first, second = (parse(bare(), NOON).event_id for _ in range(2))
    assert first != second
    assert (first[14], int(first[:8] + first[9:13], 16)) == ("7", NOON)
    assert len(uuid7(NOON)) == 36


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ([], "event"),
        ("text", "event"),
        (None, "event"),
        (7, "event"),
        ({"user_id": "u"}, "event_type"),
        ({"event_type": "payment"}, "user_id"),
        ({"event_type": "Payment", "user_id": "u"}, "event_type"),
        ({"event_type": "p" * 65, "user_id": "u"}, "event_type"),
        ({"event_type": "payment\n", "user_id": "u"}, "event_type"),
        ({"event_type": 1, "user_id": "u"}, "event_type"),
        (bare(user_id=""), "user_id"),
        (bare(user_id="a b"), "user_id"),
        (bare(user_id="a/b"), "user_id"),
        (bare(user_id="a\x00b"), "user_id"),
        (bare(user_id="a\u2028b"), "user_id"),
        (bare(user_id="u" * 129), "user_id"),
        (bare(user_id=5), "user_id"),
        (bare(event_id=""), "event_id"),
        (bare(event_id="a b"), "event_id"),
        (bare(event_id="a/b"), "event_id"),
        (bare(event_id="e" * 129), "event_id"),
        (bare(event_id=7), "event_id"),
        (bare(session_id=""), "session_id"),
        (bare(session_id="s" * 129), "session_id"),
        (bare(app_version=1), "app_version"),
        (bare(device_type=[]), "device_type"),
        (bare(data=[]), "data"),
        (bare(data="text"), "data"),
        (bare(location="here"), "location"),
        (bare(location={}), "location.lat"),
        (bare(location={"lat": 91, "lng": 0}), "location.lat"),
        (bare(location={"lat": 0, "lng": -181}), "location.lng"),
        (bare(location={"lat": True, "lng": 0}), "location.lat"),
        (bare(location={"lat": float("nan"), "lng": 0}), "location.lat"),
        (bare(data={"x": float("inf")}), "data.x"),
        (bare(data={"x": [float("nan")]}), "data.x"),
        (bare(data={"x": 10**400}), "data.x"),
        (bare(data={"x": {"y": -(10**400)}}), "data.x"),
        (bare(data={"x": {"y": {"z": float("-inf")}}}), "data.x"),
        (bare(data={"x": "y" * 65_536}), "event"),
        (bare(timestamp="yesterday"), "timestamp"),
        (bare(timestamp="2026-02-30T00:00:00Z"), "timestamp"),
        (bare(timestamp=True), "timestamp"),
        (bare(timestamp=[]), "timestamp"),
        (bare(timestamp=float("nan")), "timestamp"),
        (bare(timestamp=1e300), "timestamp"),
        (bare(event_type="nexus.canary"), "event_type"),
    ],
)
def test_what_breaks_a_rule_is_rejected_with_its_field_and_a_message(raw, field):
    found = rejection(raw)
    assert found.field == field
    assert found.code
    assert str(found)


def test_data_may_nest_eight_deep_and_no_deeper():
    deepest = bare(data=nested(8))
    assert stored(deepest)["data"] == nested(8)
    assert rejection(bare(data=nested(9))).code == "too_deep"


def test_event_of_64_kib_is_taken_and_one_byte_more_is_not():
    """As it was posted: its id, its time and what else is added here are not held against it."""
    room = 65_536 - len(msgspec.json.encode(bare(data={"x": ""})))
    assert len(parse(bare(data={"x": "y" * room}), NOON).body) > 65_536
    rejected = rejection(bare(data={"x": "y" * (room + 1)}))
    assert (rejected.code, "this one has 65537" in rejected.message) == ("too_large", True)


def test_whole_number_beyond_64_bits_is_kept_digit_by_digit():
    raw = json.loads('{"event_type": "payment", "user_id": "u", "data": {"amount": 123456789012345678901234567890}}')
    assert stored(raw)["data"] == raw["data"]


def test_seconds_are_rejected_with_the_remedy():
    found = rejection(bare(timestamp=NOON // 1000))
    assert found.code == "looks_like_seconds"
    assert "1000" in str(found)


def test_an_hour_ahead_is_taken_and_more_is_rejected():
    assert parse(bare(timestamp=NOON + HOUR_MS), NOON).ts == NOON + HOUR_MS
    assert rejection(bare(timestamp=NOON + HOUR_MS + 1)).code == "in_the_future"


@pytest.mark.parametrize("past", [NOON - 400 * DAY_MS, 10**11, "1815-12-10T00:00:00Z", "0001-01-01T00:00:00Z"])
def test_any_past_time_is_taken(past):
    assert parse(bare(timestamp=past), NOON).ts < NOON


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2026-06-01T12:00:00Z", "2026-06-01T12:00:00Z"),
        ("2026-06-01T12:00:00", "2026-06-01T12:00:00Z"),
        ("2026-06-01 12:00:00z", "2026-06-01T12:00:00Z"),
        ("2026-06-01T20:00:00+08:00", "2026-06-01T12:00:00Z"),
        ("2026-06-01T12:00:00.250Z", "2026-06-01T12:00:00.250Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
    ],
)
def test_rfc_3339_is_read_as_utc_where_it_has_no_offset_and_written_with_z(text, canonical):
    ts, written = parse_rfc3339(text)
    assert written == canonical
    assert parse_rfc3339(written)[0] == ts


def test_extra_fields_of_a_location_are_kept():
    assert stored(bare(location={"lat": 1, "lng": 2, "accuracy": 5}))["location"] == {"lat": 1, "lng": 2, "accuracy": 5}


@given(st.integers(-62_135_596_800_000, 253_402_300_799_999))
def test_every_moment_written_is_read_back_as_itself(ms):
    assert parse_rfc3339(rfc3339(ms))[0] == ms


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
    | st.integers(-(2**63), 2**64 - 1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
anything = st.dictionaries(
    st.sampled_from(["event_id", "event_type", "user_id", "session_id", "timestamp", "location", "data", "device_type"])
    | st.text(max_size=8),
    json_values,
    max_size=8,
)


@given(anything)
def test_whatever_is_posted_gets_a_stored_form_or_a_rejection_and_nothing_else(raw):
    raw = json.loads(json.dumps(raw))
    try:
        found = parse(raw, NOON)
    except Rejected:
        assert rejection(raw).field
    else:
        assert decode(found.body)["event_id"] == found.event_id


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=5))
def test_data_comes_back_as_it_was_posted(data):
    data = json.loads(json.dumps(data))
    assert stored(bare(data=data))["data"] == data
