"""Definitions: a wrong one stops the start with a line that names it, and each aggregation says what it promises."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.catalogue import FEATURES
from pipeline.definitions import DAY, HOUR, MINUTE, Feature, WrongDefinition, check, from_object, to_object
from pipeline.events import Stored
from pipeline.features.aggregations import error
from pipeline.features.families import Family, pack_definitions, plan, provides, unpack_definitions
from pipeline.runtime import Runtime
from pipeline.settings import load
from pipeline.windows import Windows
from tests.helpers import DAY_MS, MINUTE_MS, NOON

GOOD = Feature(name="f", aggregation="mean", event_type="t", field="x", window_s=DAY, description="a mean")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "Not A Name"}, "a-z"),
    ({"aggregation": "median"}, "aggregation"),
    ({"entity": "car"}, "entity"),
    ({"owner": "nobody"}, "owner"),
    ({"merge": "latest"}, "merge"),
    ({"window_s": 30}, "window_s"),
    ({"window_s": 91 * DAY}, "90 days"),
    ({"window_s": 3601}, "multiple of 60"),
    ({"window_s": 60.0}, "window_s int"),
    ({"description": ""}, "description"),
    ({"fresh_s": 0}, "fresh_s"),
    ({"tolerance": -1}, "tolerance"),
    ({"field": None}, "field"),
    ({"field": "user_id"}, "envelope"),
    ({"aggregation": "count"}, "where"),
    ({"aggregation": "distinct", "field": None}, "distinct"),
    ({"aggregation": "rate", "field": None}, "where"),
    ({"aggregation": "rate", "field": None, "where": ("x", ("a",)), "share": "b"}, "share"),
    ({"share": "a"}, "share"),
    ({"where": ("x", ())}, "at least one"),
    ({"of": ("a", "b")}, "ratio"),
    ({"aggregation": "ratio", "field": None, "of": ("a", "b")}, "two other features"),
    ({"aggregation": "ratio", "field": None, "of": ("g", "zoned")}, "same entity"),
    ({"quantile": 0.5}, "quantile"),
    ({"aggregation": "quantile"}, "quantile"),
    ({"aggregation": "quantile", "quantile": 1.5, "low": 1, "high": 2}, "0 to 1"),
    ({"aggregation": "quantile", "quantile": 0.5, "low": 0, "high": 2}, "0 < low < high"),
    ({"half_life_s": 60}, "decayed_mean"),
    ({"aggregation": "decayed_mean"}, "half_life_s"),
    ({"aggregation": "decayed_mean", "half_life_s": 60}, "1/60"),
    ({"low": 2, "high": 1}, "low below high"),
    ({"name": 5}, "name"),
    ({"name": ["f"]}, "name"),
    ({"name": "café"}, "a-z"),
    ({"fresh_s": "60"}, "fresh_s"),
    ({"window_s": "60"}, "window_s"),
    ({"window_s": True}, "window_s"),
    ({"tolerance": None}, "tolerance"),
    ({"field": 3}, "field"),
    ({"field": ""}, "name in field"),
    ({"event_type": "Ride Request"}, "event_type"),
    ({"event_type": ""}, "event_type"),
    ({"low": "0"}, "low"),
    ({"high": math.nan}, "high"),
    ({"where": ("response",)}, "where"),
    ({"where": ("response", "accepted")}, "where"),
    ({"where": ("response", ["accepted"])}, "where"),
    ({"where": ("response", (None,))}, "where"),
    ({"where": ("response", (["a"],))}, "where"),
    ({"where": "response"}, "where"),
    ({"aggregation": None}, "aggregation"),
    ({"aggregation": "ratio", "field": None, "of": ("g",)}, "of"),
    ({"aggregation": "ratio", "field": None, "of": "g"}, "of"),
    ({"aggregation": "decayed_mean", "half_life_s": 3600.5}, "half_life_s"),
]


@pytest.mark.parametrize(("change", "word"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_wrong_definition_is_named_with_its_remedy(change, word):
    others = [replace(GOOD, name="g"), replace(GOOD, name="zoned", entity="zone")]
    with pytest.raises(WrongDefinition) as caught:
        check([*others, replace(GOOD, **change)])
    line = caught.value.message
    assert "\n" not in line
    assert f"feature {change.get('name', 'f')} " in line
    assert word in line


def test_name_that_is_taken_is_wrong():
    with pytest.raises(WrongDefinition, match="feature f "):
        check([GOOD, GOOD])


def test_windows_that_no_tiles_can_tell_apart_are_wrong():
    with pytest.raises(WrongDefinition, match=r"feature g .*86400"):
        plan([GOOD, replace(GOOD, name="g", window_s=DAY + MINUTE)])


def test_wrong_definition_stops_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.runtime.FEATURES", (replace(GOOD, window_s=1),))
    with pytest.raises(WrongDefinition, match="feature f holds 1; it takes window_s"):
        Runtime(load({"NEXUS_DATA_DIR": str(tmp_path)}))


def test_built_in_definitions_are_right_and_cover_what_they_should():
    check(FEATURES)
    assert len([f for f in FEATURES if f.entity == "user"]) >= 25
    assert {f.entity for f in FEATURES} == {"user", "merchant", "zone"}
    assert {f.name for f in FEATURES if f.owner == "shared"} == {
        "acceptance_rate",
        "response_time",
        "recent_rejections",
    }


def test_definitions_and_families_survive_the_store():
    families = plan(FEATURES)
    assert unpack_definitions(pack_definitions(FEATURES, families, "mark")) == (FEATURES, families, "mark")
    assert tuple(from_object(to_object(f)) for f in FEATURES) == FEATURES


def test_tile_is_at_most_a_sixtieth_of_its_window_and_whole_in_the_next():
    for family in plan(FEATURES):
        for window, tile in zip(family.windows, family.tiles, strict=True):
            assert 0 < tile <= window / 60
        assert all(upper % lower == 0 for lower, upper in zip(family.tiles, family.tiles[1:], strict=False))


def test_feature_added_beside_others_gets_a_family_of_its_own():
    before = plan([GOOD])
    after = plan([GOOD, replace(GOOD, name="g", aggregation="std")], before)
    assert after[0] == before[0]
    assert [column.kind for column in after[1].columns] == ["squares"]
    assert plan([replace(GOOD, name="g", aggregation="max")], before)[0].columns[0].kind == "greatest"


def test_feature_that_a_family_provides_already_needs_none():
    known = plan([GOOD])
    assert plan([GOOD, replace(GOOD, name="g", aggregation="sum")], known) == known
    assert all(isinstance(family, Family) and provides(family) for family in known)


def one(aggregation: str, numbers: list[float], **more: Any) -> float | int | None:
    """The value of one feature over events a minute apart, the first the oldest."""
    feature = replace(GOOD, **{"aggregation": aggregation, **more})
    windows = Windows([feature])
    entity = windows.new()
    for n, number in enumerate(numbers):
        ts = NOON - (len(numbers) - 1 - n) * MINUTE_MS
        event = Stored("e", "t", "u", "", "1", "x", {feature.field or "": number})
        windows.add(entity, ts, windows.extract(event, {"x": number}, ts), NOON)
    return windows.values(entity, NOON)["f"]


numbers = st.lists(st.floats(-1e6, 1e6).map(lambda x: round(x, 4)), min_size=1, max_size=60)


@settings(deadline=None)
@given(numbers)
def test_sum_mean_deviation_and_extremes_are_those_of_the_numbers(found):
    assert one("sum", found) == pytest.approx(math.fsum(found), rel=1e-9, abs=1e-6)
    assert one("mean", found) == pytest.approx(statistics.fmean(found), rel=1e-9, abs=1e-6)
    assert one("std", found) == pytest.approx(statistics.pstdev(found), rel=1e-9, abs=1e-6)
    assert (one("min", found), one("max", found), one("last", found)) == (min(found), max(found), found[-1])


@settings(deadline=None)
@given(st.floats(-1e15, 1e15), st.integers(1, 50))
def test_equal_numbers_have_no_deviation_at_all(number, times):
    assert one("std", [number] * times) == 0.0
    assert one("deviation", [number] * times) is None


def test_deviation_is_how_far_the_latest_lies_from_habit():
    assert one("deviation", [1.0, 3.0, 1.0, 3.0, 2.0, 2.0, 8.0]) == pytest.approx(
        (8 - 20 / 7) / statistics.pstdev([1.0, 3.0, 1.0, 3.0, 2.0, 2.0, 8.0])
    )


@settings(deadline=None)
@given(st.lists(st.floats(0.2, 60), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_quantile_errs_by_no_more_than_it_states(found, q):
    feature = replace(GOOD, aggregation="quantile", quantile=q, low=0.2, high=60.0)
    stated = error(feature)
    assert stated is not None
    assert stated < 0.07
    value = one("quantile", found, quantile=q, low=0.2, high=60.0)
    exact = sorted(found)[round(q * (len(found) - 1))]
    assert value == pytest.approx(exact, rel=stated + 1e-9)


@pytest.mark.parametrize("n", [1, 5, 50, 256])
def test_distinct_count_errs_by_about_what_it_states(n):
    stated = error(replace(GOOD, aggregation="distinct"))
    assert stated is not None
    errors = []
    for seed in range(20):
        names = [f"name-{seed}-{i}" for i in range(n)] * 2
        value = one("distinct", names)  # type: ignore[arg-type]
        assert value is not None
        errors.append((value - n) / n)
    assert abs(statistics.fmean(errors)) <= stated
    assert statistics.pstdev(errors) <= 2 * stated


def test_decayed_mean_weighs_by_age():
    weights = [0.5**2, 0.5, 1.0]
    feature: dict[str, Any] = {"half_life_s": HOUR, "window_s": DAY}
    windows = Windows([replace(GOOD, aggregation="decayed_mean", **feature)])
    entity = windows.new()
    for n, number in enumerate((1.0, 2.0, 4.0)):
        ts = NOON - (2 - n) * HOUR * 1000
        event = Stored("e", "t", "u", "", "1", "x", {"x": number})
        windows.add(entity, ts, windows.extract(event, {"x": number}, ts), NOON)
    expected = sum(w * x for w, x in zip(weights, (1.0, 2.0, 4.0), strict=True)) / sum(weights)
    assert windows.values(entity, NOON)["f"] == pytest.approx(expected, rel=1e-6)


def test_decayed_mean_of_the_same_events_has_the_same_bits_whenever_it_is_read():
    windows = Windows([replace(GOOD, aggregation="decayed_mean", half_life_s=HOUR)])
    entity = windows.new()
    for n in range(20):
        ts, data = NOON + n * MINUTE_MS, {"x": 3.0 + n / 7}
        event = Stored("e", "t", "u", "", "1", "x", data)
        windows.add(entity, ts, windows.extract(event, data, ts), ts)
    assert len({windows.values(entity, ts + later)["f"] for later in range(0, 50_000, 77)}) == 1


def test_memory_of_an_entity_stays_bounded_however_long_it_is_busy():
    windows = Windows(FEATURES)
    entity = windows.new()
    sizes = []
    for day in range(100):
        for minute in range(0, 1440, 3):
            ts = NOON + day * DAY_MS + minute * MINUTE_MS
            data = {"response": "accepted", "response_time": 3.0}
            event = Stored("e", "ride_request_response", "u", "", "1", "x", data, "s")
            windows.add(entity, ts, windows.extract(event, data, ts), ts)
        windows.dump(entity, "k", ts)
        sizes.append(windows.layout.memory(entity))
    assert max(sizes[40:]) <= max(sizes[8:40]) * 1.05
    assert max(sizes) < 64 << 10
