"""Demand: forecasts are right at every length of history, better than the season alone, and their intervals hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import backtest
from pipeline.models.demand import DAY_STEPS, HISTORY_S, STEP_S, WEEK_STEPS, Demand, began, forecast, warming_up

NOW = 1_800_000_000 // STEP_S * STEP_S
LEARNED = HISTORY_S // STEP_S
END = LEARNED * STEP_S  # of histories that begin at 0


def city(mean: float, weeks: int, seed: int, wander: float = 0.0) -> list[float]:
    """Requests per step with a rhythm of days and weeks, by chance around it; `wander` lets the level drift as well."""
    chance, steps = np.random.default_rng(seed), np.arange(weeks * WEEK_STEPS)
    day, weekday = steps % DAY_STEPS / DAY_STEPS, steps // DAY_STEPS % 7
    rate = mean * (1 + 0.7 * np.sin(2 * np.pi * (day - 0.3))) * np.where(weekday >= 5, 1.4, 0.9)
    level = np.zeros(len(steps))
    for i in range(1, len(steps)):
        level[i] = 0.97 * level[i - 1] + chance.normal(0, wander)
    found: list[float] = chance.poisson(rate * np.exp(level)).astype(float).tolist()
    return found


def known(series: list[float], origin: int) -> dict[int, float]:
    """What the store would have at a step: no row for steps without requests."""
    return {i * STEP_S: series[i] for i in range(max(0, origin - LEARNED), origin) if series[i]}


@pytest.mark.parametrize("steps", [48, 49, 50, 53, 60, 100, 335, 336, 337, 340, 384, 400, 500, 672, 1104])
def test_constant_demand_is_forecast_as_it_is_at_every_length_of_history(steps):
    counts = {NOW - i * STEP_S: 100.0 for i in range(1, steps + 1)}
    assert [made.value for made in forecast(counts, NOW, 60)] == pytest.approx([100.0] * 60)


@pytest.mark.parametrize(("mean", "wander"), [(2, 0.0), (10, 0.0), (100, 0.0), (1000, 0.0), (100, 0.05), (1000, 0.05)])
def test_interval_holds_about_four_in_five_outcomes_near_and_far(mean, wander):
    series = city(mean, 6, 11, wander)
    origins = np.random.default_rng(5).choice(np.arange(LEARNED, len(series) - DAY_STEPS), 100, replace=False)
    inside = {1: 0, 5: 0, DAY_STEPS: 0}
    for origin in map(int, origins):
        made = forecast(known(series, origin), origin * STEP_S, DAY_STEPS)
        for ahead in inside:
            inside[ahead] += made[ahead - 1].low <= series[origin + ahead - 1] <= made[ahead - 1].high
    assert all(0.68 <= hits / len(origins) <= 0.95 for hits in inside.values()), inside


@pytest.mark.parametrize("mean", [1, 5, 50, 500])
def test_forecast_misses_less_than_the_week_before_does(mean):
    series = city(mean, 6, 3)
    ours = naive = 0.0
    for origin in range(LEARNED, len(series) - 5, 9):
        for i, made in enumerate(forecast(known(series, origin), origin * STEP_S, 5)):
            ours += abs(made.value - series[origin + i])
            naive += abs(series[origin + i - WEEK_STEPS] - series[origin + i])
    assert ours < 0.9 * naive


def test_level_that_has_doubled_is_followed_before_anything_is_learned_of_it():
    before, after = ({NOW - i * STEP_S: n for i in some} for n, some in ((100.0, range(7, 60)), (200.0, range(1, 7))))
    [made] = forecast(before | after, NOW, 1)
    assert 180 <= made.value <= 200


def test_how_far_the_present_tells_of_the_future_is_learned():
    """A level that wanders is followed, and much better than the week before knows it; one that only chance moves is not."""
    wanders, chance = (misses(city(500, 6, 2, wander)) for wander in (0.05, 0.0))
    assert wanders[0] < 0.5 * wanders[1]
    assert chance[0] < 1.15 * chance[2]


def misses(series: list[float]) -> tuple[float, float, float]:
    """Of the next step in sum: the forecast's, the week before's, and those of the mean of three weeks."""
    found = np.zeros(3)
    for origin in range(LEARNED, len(series) - 1, 7):
        [made] = forecast(known(series, origin), origin * STEP_S, 1)
        usual = sum(series[origin - week * WEEK_STEPS] for week in (1, 2, 3)) / 3
        found += np.abs(np.array([made.value, series[origin - WEEK_STEPS], usual]) - series[origin])
    return float(found[0]), float(found[1]), float(found[2])


def test_backtest_is_what_forecasts_made_then_would_have_said():
    series = city(80, 4, 4, 0.03)[:LEARNED]
    counts = {i * STEP_S: n for i, n in enumerate(series)}
    now = len(series) * STEP_S
    at = [origin for origin in backtest.origins(counts, now) if origin >= now - HISTORY_S // 2]
    model = Demand()
    first, values = next(backtest.forecasts(model, counts, at))
    assert values == pytest.approx([made.value for made in forecast(counts, first, backtest.AHEAD, model)])


def test_interval_is_wide_where_little_is_known_of_past_misses():
    [made] = forecast({NOW - i * STEP_S: 100.0 for i in range(1, 50)}, NOW, 1)
    assert made.low < 100 - 1.28 * 10 < 100 + 1.28 * 10 < made.high


def test_forecast_without_any_request_is_zero_and_says_how_far_from_it_chance_may_lead():
    made = forecast({}, NOW, 2)
    assert [(f.value, f.low) for f in made] == [(0, 0), (0, 0)]
    assert made[0].high > 0


def test_what_has_no_forecast_yet_says_how_far_its_history_reaches():
    assert warming_up({}, NOW) == "no request within the last 23 days"
    assert "2.0 of 24 hours" in (warming_up({NOW - 7200: 1.0}, NOW) or "")
    assert warming_up({NOW - 86_400: 1.0}, NOW) is None


# ------------------------------------------------------------------------- where history begins


def dense(mean: float, steps: int, seed: int) -> dict[int, float]:
    """Requests in so many steps up to END, from any hour of the week on."""
    since = seed % WEEK_STEPS
    some = city(mean, 6, seed)[since : since + steps]
    return {END - (steps - i) * STEP_S: n for i, n in enumerate(some) if n}


@settings(deadline=None, max_examples=40)
@given(
    mean=st.sampled_from([5.0, 50.0, 1000.0]),
    steps=st.integers(2 * DAY_STEPS, 10 * DAY_STEPS),
    seed=st.integers(0, 500),
    strays=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([1.0, 2.0])), min_size=1, max_size=3),
)
def test_few_strays_before_the_first_requests_change_no_forecast(mean, steps, seed, strays):
    known = dense(mean, steps, seed)
    room = LEARNED - steps - DAY_STEPS
    early = {int(where * room) * STEP_S: n for where, n in strays}
    assert values_of(early | known) == pytest.approx(values_of(known), rel=0.05, abs=0.05 * mean)


def values_of(counts: dict[int, float], steps: int = DAY_STEPS) -> list[float]:
    return [made.value for made in forecast(counts, END, steps)]


@pytest.mark.parametrize("since", [4, 10, 30])
def test_stray_makes_no_history_of_the_time_since(since):
    known = dense(1000, since, 3)
    assert warming_up({STEP_S: 1.0} | known, END) == warming_up(known, END) is not None


def test_stray_is_no_history_to_judge_by():
    known = dense(100, 5 * DAY_STEPS, 4)
    late = {STEP_S: 1.0} | known
    assert backtest.origins(late, END) == backtest.origins(known, END)
    at = backtest.origins(known, END)
    assert backtest.error(Demand(), late, at) == pytest.approx(backtest.error(Demand(), known, at), rel=0.01)
    assert backtest.naive_error(late, at) == backtest.naive_error(known, at)


@settings(deadline=None, max_examples=40)
@given(
    mean=st.sampled_from([0.05, 0.3, 2.0, 30.0]), seed=st.integers(0, 500), each=st.sampled_from([1.0, 1000.0]),
    steps=st.integers(DAY_STEPS, LEARNED),
)  # fmt: skip
def test_sparse_zone_keeps_its_history(mean, seed, each, steps):
    counts = {at: n * each for at, n in dense(mean, min(steps, 5 * WEEK_STEPS), seed).items()}
    assert not counts or began(counts, END) == min(counts)


def test_quiet_nights_a_week_without_a_feed_and_a_rush_take_no_history():
    series = np.array(city(30, 4, 8)[:LEARNED])
    hours = np.arange(LEARNED) % DAY_STEPS
    for honest in (
        np.where((hours < 12) | (hours > 44), 0.0, series),
        np.where((np.arange(LEARNED) > 100) & (np.arange(LEARNED) < 100 + WEEK_STEPS), 0.0, series),
        np.where(np.arange(LEARNED) > LEARNED - 10, 40 * series, np.minimum(series, 1.0) * (hours % 9 == 0)),
    ):
        counts = {i * STEP_S: n for i, n in enumerate(honest.tolist()) if n}
        assert began(counts, END) == min(counts)


def test_launch_that_grows_keeps_what_it_has_grown_from():
    grown = np.array(city(100, 4, 9)[:LEARNED]) * np.linspace(0, 1, LEARNED)
    assert began({i * STEP_S: n for i, n in enumerate(grown.tolist()) if n}, END) < 2 * DAY_STEPS * STEP_S


# ------------------------------------------------------------------------- levels and intervals


@pytest.mark.parametrize("times", [0.01, 0.05, 10.0, 100.0])
@pytest.mark.parametrize("days", [1, 2, 5])
def test_level_that_has_changed_by_far_is_followed(times, days):
    change = LEARNED - days * DAY_STEPS
    chance = np.random.default_rng(6)
    level = np.array(city(2000 / max(times, 1), 4, 7)[: LEARNED + 5])
    series = chance.poisson(np.where(np.arange(len(level)) < change, level, times * level)).astype(float)
    values = np.array(values_of(known(series.tolist(), LEARNED), 5))
    assert np.abs(values - series[-5:]).sum() < 0.5 * series[-5:].sum() + 0.005 * level[-5:].sum()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 5.0, 100.0, 1e6, 1e9]), min_size=2 * DAY_STEPS, max_size=11 * DAY_STEPS),
)
def test_no_history_makes_a_forecast_beyond_what_has_been(series):
    counts = {END - (len(series) - i) * STEP_S: n for i, n in enumerate(series) if n}
    made = forecast(counts, END, DAY_STEPS)
    assert all(0 <= f.low <= f.value <= f.high < float("inf") for f in made)
    assert max(f.value for f in made) <= 4 * (max(series) + 30)


@pytest.mark.parametrize("mean", [0.3, 1.0, 3.0])
def test_interval_of_a_feed_that_counts_by_the_thousand_is_no_wider_than_what_comes(mean):
    series = [1000 * n for n in city(mean, 6, 12)]
    held, wide, origins = 0, 0.0, range(LEARNED, len(series) - DAY_STEPS, 19)
    for origin in origins:
        made = forecast(known(series, origin), origin * STEP_S, 5)
        held += sum(f.low <= series[origin + i] <= f.high for i, f in enumerate(made))
        wide += sum(f.high - f.low for f in made)
    number = 5 * len(origins)
    assert 0.65 <= held / number <= 0.95
    assert wide / number < 2.56 * float(np.std(series))


def test_interval_four_days_ahead_holds_what_it_says_and_not_all():
    held = number = 0
    for seed in range(6):
        series = city(100, 6, 20 + seed, 0.03)
        for origin in range(LEARNED, len(series) - 200, 37):
            made = forecast(known(series, origin), origin * STEP_S, 192)[-1]
            held, number = held + (made.low <= series[origin + 191] <= made.high), number + 1
    assert 0.7 <= held / number <= 0.93
