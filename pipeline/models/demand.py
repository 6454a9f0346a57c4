"""Demand: how many rides a zone will be asked for, from its own history: the season (a week, else a day) scaled by
the present, with an interval as wide as the same forecast's past misses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

VERSION = "seasonal-1"
STEP_S = 1800
DAY_STEPS = 48
WEEK_STEPS = 7 * DAY_STEPS
HISTORY_S = 9 * 86_400
HISTORY_DAYS = HISTORY_S // 86_400
_Z = 1.2816  # standard deviations to either side that hold 80 % of what is normally distributed
_USUAL = 30.0  # requests, as if so many had come as expected: few requests say little about the present
_LEAST, _MOST = 0.25, 4.0  # times the season
_AROUND = 2  # steps to either side that a step of few requests is smoothed over
_JUDGED = (1, 2, 3, 5, 8, 16, 48)  # steps ahead, whose past misses are looked at; those between go by their neighbours
_ORIGINS = 144  # past steps at the most from which these are looked at
_PRIOR, _PRIOR_WEIGHT = 1.5, 10  # the spread over Poisson's that is taken for so many misses not seen yet
Steps = NDArray[np.int64]
Numbers = NDArray[np.float64]


class Demand(msgspec.Struct):
    """What training chooses: how many steps make the present, and how much its word still counts a step further."""

    version: str = VERSION
    recent: int = 6
    fade: float = 0.85


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
    hours = max(0, now - min(counts)) / 3600
    return None if hours >= 24 else f"has {hours:.1f} of 24 hours of history within the last {HISTORY_DAYS} days"


def forecast(counts: Mapping[int, float], now: int, steps: int, model: Demand | None = None) -> list[Forecast]:
    """The next `steps` steps after the last complete one at `now` (epoch s), from the counts before it."""
    model = model or Demand()
    history, ahead = _History(counts, now), np.arange(1, steps + 1)
    values = history.expected(np.array([len(history.counts)]), ahead, model)[0]
    spreads = _Z * np.sqrt(history.dispersion(ahead, model) * (values + 1.0))
    return [
        Forecast(history.end + i * STEP_S, value, max(0.0, value - spread), value + spread)
        for i, (value, spread) in enumerate(zip(values.tolist(), spreads.tolist(), strict=True))
    ]


def expected(counts: Mapping[int, float], now: int, steps: int, model: Demand) -> list[float]:
    """The values of forecast() alone, without their intervals."""
    history = _History(counts, now)
    found: list[float] = history.expected(np.array([len(history.counts)]), np.arange(1, steps + 1), model)[0].tolist()
    return found


class _History:
    """Counts per step, oldest first, up to `end` (epoch s), the end of the last complete step; `origins` are indexes into them,
    steps that a forecast is made from what was before. Steps `ahead` count from 1."""

    def __init__(self, counts: Mapping[int, float], now: int) -> None:
        self.end = now - now % STEP_S
        first = max(min(counts, default=self.end), self.end - HISTORY_S)
        self.counts: Numbers = np.array([counts.get(at, 0.0) for at in range(first, self.end, STEP_S)] or [0.0])
        self.season = WEEK_STEPS if len(self.counts) >= WEEK_STEPS else DAY_STEPS
        self._usual = _smoothed(self.counts)
        self._came_before = np.concatenate(([0.0], np.cumsum(self.counts)))
        self._usual_before = np.concatenate(([0.0], np.cumsum(self._usual)))

    def expected(self, origins: Steps, ahead: Steps, model: Demand, season: int | None = None) -> Numbers:
        """What is expected so many steps ahead of each origin: a row for each."""
        season = season or self.season
        ratio = self._ratio(origins, model.recent, season)[:, None]
        at = origins[:, None] + ahead - 1 - season * -(-ahead // season)
        usual = np.where(at >= 0, self._usual[np.maximum(at, 0)], 0.0)
        fade = model.fade ** (ahead - 1)  # the present says less the further ahead it has to speak
        found: Numbers = usual * (fade * ratio + 1 - fade)
        return found

    def _ratio(self, origins: Steps, recent: int, season: int) -> Numbers:
        """How the latest steps compare with those of a season before, as far as these are known."""
        first = np.minimum(np.maximum(origins - recent, season), origins)
        came = self._came_before[origins] - self._came_before[first]
        before = np.maximum(origins - season, 0), np.maximum(first - season, 0)
        usual = self._usual_before[before[0]] - self._usual_before[before[1]]
        return np.clip((came + _USUAL) / (usual + _USUAL), _LEAST, _MOST)

    def dispersion(self, ahead: Steps, model: Demand) -> Numbers:
        """Times by which the squared misses so far ahead have been those of chance alone, a Poisson distribution's."""
        # With little more than a week of history, a day's season shows more misses, and not much smaller ones.
        season = self.season if len(self.counts) >= self.season + DAY_STEPS * 3 // 2 else DAY_STEPS
        found = []
        for steps in _JUDGED:
            last = len(self.counts) - steps  # whose outcome is known
            origins = np.arange(max(season, last + 1 - _ORIGINS), last + 1)
            values = self.expected(origins, np.array([steps]), model, season)[:, 0]
            misses = (self.counts[origins + steps - 1] - values) ** 2 / (values + 1.0)
            found.append((misses.sum() + _PRIOR * _PRIOR_WEIGHT) / (len(misses) + _PRIOR_WEIGHT))
        between: Numbers = np.interp(ahead, _JUDGED, found)
        return between


def _smoothed(counts: Numbers) -> Numbers:
    """The counts drawn towards the mean of their neighbours, by the share of what they differ that chance explains."""
    width = np.ones(2 * _AROUND + 1)
    size = np.convolve(np.ones(len(counts)), width, "same") if len(counts) >= len(width) else np.ones(len(counts))
    around = np.convolve(counts, width, "same") / size if len(counts) >= len(width) else counts
    apart = counts - around
    squares, chance = float((apart**2).sum()), float((around * (1 - 1 / size)).sum())
    real = max(0.0, 1 - chance / squares) if squares else 0.0
    found: Numbers = around + real * apart
    return found
