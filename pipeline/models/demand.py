"""Demand: how many rides a zone will be asked for: what is usual there at such a time, scaled by how the present differs from it.

Usual is the mean of the same steps of the weeks before (of the days, before there is a week of history). How the latest differences
from it foretell those to come is learned from the history itself, at each forecast, by a weighted ridge regression for each of some
steps ahead; an interval is as wide as the same forecast's past misses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

VERSION = "seasonal-1"
STEP_S = 1800
DAY_STEPS = 48
WEEK_STEPS = 7 * DAY_STEPS
HISTORY_DAYS = 23
HISTORY_S = HISTORY_DAYS * 86_400
_Z = 1.2816  # standard deviations to either side that hold 80 % of what is normally distributed
_FEW = 30.0  # requests that are added to either side of a comparison: a few tell little about the present
_MOST = 4.0  # times, and a share of, what is usual: further goes only what the present differs by, and _SLACK (in logarithms)
_SLACK = 0.4
_STRAY, _SURE = 0.05, 12.0  # of what follows; by how much a change is likelier than none, in logarithms
_AROUND = 2  # steps to either side that a step of few requests is smoothed over
_AHEAD = np.array(
    [1, 2, 3, 4, 5, 6, 8, 12, 18, 24, 36, 48, 96, 192, WEEK_STEPS]
)  # learned; those between go by their neighbours
_LEAST_LEARNED, _MOST_LEARNED = DAY_STEPS // 2, 2 * WEEK_STEPS  # past steps that a regression is made from
_RECENT, _FADE = 6, 0.85  # before there are: the mean of so many steps, of which so much is left a step further ahead
_FEATURES = 6
_SPREAD, _SPREAD_WEIGHT = 1.5, 10  # over chance alone, as if so many misses had been so
_FORGOTTEN = 2 * DAY_STEPS  # steps, after which a miss counts half
Steps = NDArray[np.int64]
Numbers = NDArray[np.float64]


class Demand(msgspec.Struct):
    """What training chooses: how many weeks (or days) make the usual, and by how much a coefficient may differ from what is taken
    for it beforehand (a variance)."""

    version: str = VERSION
    weeks: int = 3
    loose: float = 0.05


@dataclass(frozen=True, slots=True)
class Forecast:
    """Expected requests in the step that begins at `at` (epoch s), with an 80 % interval."""

    at: int
    value: float
    low: float
    high: float


def warming_up(counts: Mapping[int, float], now: int) -> str | None:
    """Why there is no forecast yet, or None: it takes a day of history. `counts`: step start (epoch s) -> requests."""
    if not counts:
        return f"no request within the last {HISTORY_DAYS} days"
    hours = max(0, now - began(counts, now)) / 3600
    return None if hours >= 24 else f"has {hours:.1f} of 24 hours of history within the last {HISTORY_DAYS} days"


def began(counts: Mapping[int, float], now: int) -> int:
    """Where history begins (epoch s): with the first requests that are not strays. What comes before the others and is nearly empty
    beside them (a ride made for a test, a phone whose clock was wrong) tells nothing of what is usual."""
    end = now - now % STEP_S
    first = max(min(counts, default=end), end - HISTORY_S)
    if first >= end:
        return first
    return first + STEP_S * _strays(np.array([counts.get(at, 0.0) for at in range(first, end, STEP_S)]))


def _strays(counts: Numbers) -> int:
    """How many steps at the beginning are nearly empty beside all that follow, both in requests and in steps that have any: where a
    change between two rates of such steps, if it is nearly sure, is the likeliest."""
    at = np.flatnonzero(counts)  # a change comes with the first of these that follow
    size, number = len(counts), len(at)
    if number < 2:
        return 0
    steps, had, sums = at[1:], np.arange(1, number), np.cumsum(counts[at])
    rest, follow = size - steps, number - had
    level = np.maximum(rest, DAY_STEPS)  # less than a day may be its busiest hours
    empty = (had / steps <= _STRAY * follow / level) & (sums[:-1] / steps <= _STRAY * (sums[-1] - sums[:-1]) / level)
    likelier = had * np.log(had / steps) + follow * np.log(follow / rest) - number * math.log(number / size)
    likelier = np.where(empty, likelier, 0.0)
    found = int(likelier.argmax())
    return int(steps[found]) if likelier[found] >= _SURE else 0


def forecast(counts: Mapping[int, float], now: int, steps: int, model: Demand | None = None) -> list[Forecast]:
    """The next `steps` steps after the last complete one at `now` (epoch s), from the counts before it."""
    history, ahead = History(counts, now), np.arange(1, steps + 1)
    learned = Learned(history, len(history.counts), model or Demand(), steps)
    values = learned.values(np.array([len(history.counts)]), ahead)[0]
    spreads = _Z * np.sqrt(learned.spread(ahead) * (values + 1.0))
    return [
        Forecast(history.end + i * STEP_S, value, max(0.0, value - spread), value + spread)
        for i, (value, spread) in enumerate(zip(values.tolist(), spreads.tolist(), strict=True))
    ]


class History:
    """Counts per step, oldest first, from `first` up to `end` (epoch s), the end of the last complete step."""

    def __init__(self, counts: Mapping[int, float], now: int) -> None:
        self.end = now - now % STEP_S
        self.first = min(began(counts, now), self.end - STEP_S)
        self.counts: Numbers = np.array([counts.get(at, 0.0) for at in range(self.first, self.end, STEP_S)])


class Learned:
    """What the steps before `upto`, an index into a history, teach; origins are such indexes, from there on or before, steps that are
    forecast from what was before them. `most` is the furthest step ahead that will be asked for; these count from 1."""

    def __init__(self, history: History, upto: int, model: Demand, most: int = WEEK_STEPS) -> None:
        self._counts, self._upto, self._model = history.counts, upto, model
        self._season = WEEK_STEPS if upto >= WEEK_STEPS else DAY_STEPS
        self._usual = self._usually()
        size = len(self._counts)
        # 0 where nothing is known before, and before the history.
        self._different = np.nan_to_num(np.log((self._counts + _FEW) / (self._usual[:size] + _FEW)))
        self._latest = self._differences()
        padded = np.concatenate((np.zeros(DAY_STEPS), self._counts))
        self._peaks = sliding_window_view(padded, DAY_STEPS).max(1)  # of the day before each origin
        self._ahead = _AHEAD[: np.searchsorted(_AHEAD, most) + 1]
        found = [self._regression(steps) for steps in map(int, self._ahead)]
        self._coefficients = np.array([coefficients for coefficients, _ in found])
        self._spreads = np.maximum.accumulate([spread for _, spread in found])

    def values(self, origins: Steps, ahead: Steps) -> Numbers:
        """What is expected so many steps ahead of each origin: a row for each."""
        coefficients = np.array([np.interp(ahead, self._ahead, column) for column in self._coefficients.T])
        tells = self._latest[origins] @ coefficients[:-1]
        tells += coefficients[-1] * self._day_before(origins[:, None], ahead)
        latest = self._latest[origins][:, None]
        return self._scaled(self._usual_at(origins[:, None], ahead), tells, latest, self._peaks[origins][:, None])

    def spread(self, ahead: Steps) -> Numbers:
        """Times by which squared misses so far ahead were those of chance alone, of a Poisson distribution."""
        between: Numbers = np.interp(ahead, self._ahead, self._spreads)
        return between

    def _usually(self) -> Numbers:
        """What is usual at each step and for a season beyond, from the seasons before it; not a number where none is known."""
        smooth, size = _smoothed(self._counts, self._upto), len(self._counts)
        index = np.arange(size + self._season)
        total, known = np.zeros(len(index)), np.zeros(len(index))
        for before in range(1, self._model.weeks + 1):
            at = index - self._season * before
            there = (at >= 0) & (at < size)
            total[there] += smooth[at[there]]
            known += there
        found: Numbers = np.where(known > 0, total / np.maximum(known, 1), np.nan)
        return found

    def _usual_at(self, origins: Steps, steps: Steps | int) -> Numbers:
        """What is usual so far ahead, as it is known at the origins: beyond a season it is that of the season's step."""
        return np.nan_to_num(self._usual[origins + (steps - 1) % self._season])

    def _differences(self) -> Numbers:
        """At each origin by how much the latest three steps differ, the latest six on average, and the latest day."""
        padded = np.concatenate((np.zeros(DAY_STEPS), self._different))
        sums, origins = np.concatenate(([0.0], np.cumsum(padded))), DAY_STEPS + np.arange(len(self._counts) + 1)
        means = [(sums[origins] - sums[origins - length]) / length for length in (_RECENT, DAY_STEPS)]
        return np.stack([padded[origins - 1], padded[origins - 2], padded[origins - 3], *means], 1)

    def _day_before(self, origins: Steps, steps: Steps | int) -> Numbers:
        """By how much the step differed that is days before the one so far ahead, the latest that is known at the origin."""
        index = origins + (steps - 1) % DAY_STEPS - DAY_STEPS
        return np.where(index >= 0, self._different[np.maximum(index, 0)], 0.0)

    def _scaled(self, usual: Numbers, tells: Numbers, latest: Numbers, peak: Numbers) -> Numbers:
        """What `tells` makes of the usual: within _MOST times of it, or as far from it as the latest six steps or day are; and no
        more than the latest day's `peak` where that is more than _MOST times the usual."""
        differs, most = latest[..., 3:], math.log(_MOST)
        bounded = np.clip(
            tells, np.minimum(differs.min(-1) - _SLACK, -most), np.maximum(differs.max(-1) + _SLACK, most)
        )
        usual = usual + _FEW
        found: Numbers = np.clip(usual * np.exp(bounded) - _FEW, 0.0, np.maximum(usual * _MOST - _FEW, peak))
        return found

    def _regression(self, steps: int) -> tuple[Numbers, float]:
        """The coefficients of the features so far ahead, and the spread of what they missed."""
        taken = np.zeros(_FEATURES)
        taken[3] = _FADE ** (steps - 1)
        last = self._upto - steps  # whose outcome is known
        origins = np.arange(max(self._season + DAY_STEPS, last + 1 - _MOST_LEARNED), last + 1)
        if len(origins) < _LEAST_LEARNED:
            return taken, _SPREAD
        usual = self._usual_at(origins, steps)
        features = np.column_stack((self._latest[origins], self._day_before(origins, steps)))
        weights = (usual + _FEW) / (usual + _FEW).mean()
        missed = self._different[origins + steps - 1] - features @ taken
        noise = max(float((weights * missed**2).mean()), 1e-9)
        weighted = features * weights[:, None]
        # Outcomes so far ahead overlap: as many of them as that say no more than one.
        ridge = noise * steps / self._model.loose * np.eye(_FEATURES)
        coefficients: Numbers = taken + np.linalg.solve(weighted.T @ features + ridge, weighted.T @ missed)
        values = self._scaled(usual, features @ coefficients, self._latest[origins], self._peaks[origins])
        squares = (self._counts[origins + steps - 1] - values) ** 2 / (values + 1.0)
        if self._season == WEEK_STEPS:
            spread, fitted = _four_in_five(squares) / _Z**2, steps
        else:  # weekdays may yet differ in ways that were not seen
            spread, fitted = float(squares.mean()), 2 * steps
        number = len(origins)
        free = max(number - fitted, number / 4)  # so many of them the regression did not fit
        return coefficients, (number * spread + _SPREAD * _SPREAD_WEIGHT) / (free + _SPREAD_WEIGHT)


def _four_in_five(squares: Numbers) -> float:
    """What four in five of the squared misses are below, the latest counting most: a mean would be that of a few great ones,
    where most steps are empty or the level has changed."""
    order = np.argsort(squares)
    weights = 0.5 ** ((len(squares) - 1 - order) / _FORGOTTEN)
    below = np.cumsum(weights)
    return float(squares[order[np.searchsorted(below, 0.8 * below[-1])]])


def _smoothed(counts: Numbers, upto: int) -> Numbers:
    """The counts drawn towards the mean of their neighbours, by the share of what they differ that chance explained before `upto`."""
    width = np.ones(2 * _AROUND + 1)
    if len(counts) < len(width):
        return counts
    size = np.convolve(np.ones(len(counts)), width, "same")
    around = np.convolve(counts, width, "same") / size
    apart = counts - around
    known = slice(0, max(0, upto - _AROUND))  # whose neighbours were known
    squares, chance = float((apart[known] ** 2).sum()), float((around * (1 - 1 / size))[known].sum())
    real = max(0.0, 1 - chance / squares) if squares else 0.0
    found: Numbers = around + real * apart
    return found
