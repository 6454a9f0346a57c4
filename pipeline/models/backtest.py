"""Backtests of the demand model: what a version would have forecast at each past step, from what was known then."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np

from pipeline.models.demand import DAY_STEPS, STEP_S, WEEK_STEPS, Demand, History, Learned, began

AHEAD = 5  # half hours that are forecast and judged
HELD_OUT = 0.3  # of the steps, the latest
STEPS_NEEDED = 3 * DAY_STEPS
_WEEKS = (1, 2, 3)
_LOOSE = (0.01, 0.05, 0.25)
_LEARNED_ANEW = DAY_STEPS  # steps; a forecast itself learns at each
Counts = Mapping[int, float]


def origins(counts: Counts, now: int) -> list[int]:
    """The steps (epoch s) at which a forecast could be made and judged: a day of history before, AHEAD steps after."""
    current = now - now % STEP_S
    first = began(counts, now) + DAY_STEPS * STEP_S
    return list(range(first, current - (AHEAD - 1) * STEP_S, STEP_S))


def forecasts(model: Demand, counts: Counts, at: list[int]) -> Iterator[tuple[int, list[float]]]:
    """At each of some origins, in order of time, what the next AHEAD steps would have been expected to be."""
    if not at:
        return
    history = History(counts, at[-1] + STEP_S)
    for start in range(0, len(at), _LEARNED_ANEW):
        some = at[start : start + _LEARNED_ANEW]
        indexes = np.array([(origin - history.first) // STEP_S for origin in some])
        learned = Learned(history, int(indexes[0]), model, AHEAD)
        yield from zip(some, learned.values(indexes, np.arange(1, AHEAD + 1)).tolist(), strict=True)


def error(model: Demand, counts: Counts, at: list[int]) -> float | None:
    """The weighted absolute percentage error over AHEAD steps from each origin: the sum of misses over the sum of what
    came. None where nothing came."""
    missed = came = 0.0
    for origin, values in forecasts(model, counts, at):
        for i, value in enumerate(values):
            actual = counts.get(origin + i * STEP_S, 0.0)
            missed, came = missed + abs(actual - value), came + actual
    return round(missed / came, 6) if came else None


def naive_error(counts: Counts, at: list[int]) -> float | None:
    """The same of the baseline: a step is as it was a week ago, or a day where there is no week of history."""
    missed = came = 0.0
    first = began(counts, at[-1] + STEP_S) if at else 0
    for origin in at:
        season = WEEK_STEPS if origin - first >= WEEK_STEPS * STEP_S else DAY_STEPS
        for i in range(AHEAD):
            when = origin + i * STEP_S
            actual = counts.get(when, 0.0)
            missed += abs(actual - counts.get(when - season * STEP_S * math.ceil((i + 1) / season), 0.0))
            came += actual
    return round(missed / came, 6) if came else None


def best(counts: Counts, at: list[int], version: str) -> Demand:
    """The version with the least error over the origins."""
    candidates = [Demand(version=version, weeks=weeks, loose=loose) for weeks, loose in product(_WEEKS, _LOOSE)]
    return min(candidates, key=lambda model: error(model, counts, at) or 0.0)
