"""Demand: forecasts are right at every length of history, better than the season alone, and their intervals hold what they say."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.models import backtest
from pipeline.models.demand import DAY_STEPS, HISTORY_S, STEP_S, WEEK_STEPS, Demand, forecast, warming_up

NOW = 1_800_000_000 // STEP_S * STEP_S
LEARNED = HISTORY_S // STEP_S


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
