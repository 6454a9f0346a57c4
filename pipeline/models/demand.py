"""Demand: how many rides a zone will be asked for, from its own history: the season (a week, else a day) scaled by
the present."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

VERSION = "seasonal-1"
STEP_S = 1800
DAY_STEPS = 48
WEEK_STEPS = 7 * DAY_STEPS
HISTORY_S = 9 * 86_400


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
    first = min(counts, default=now)
    return None if now - first >= 86_400 else f"has {max(0, now - first) / 3600:.1f} of 24 hours of history"


def forecast(counts: Mapping[int, float], now: int, steps: int, model: Demand | None = None) -> list[Forecast]:
    """The next `steps` steps after the last complete one at `now` (epoch s), from the counts before it."""
    model = model or Demand()
    current = now - now % STEP_S
    first = min(counts, default=current)
    season = WEEK_STEPS if current - first >= WEEK_STEPS * STEP_S else DAY_STEPS

    def seen(at: int, lag: int) -> float:
        return counts.get(at - lag * STEP_S, 0.0)

    recent = [
        (counts.get(current - i * STEP_S, 0.0), seen(current - i * STEP_S, season)) for i in range(1, model.recent + 1)
    ]
    ratio = (sum(now_ for now_, _ in recent) + 1.0) / (sum(before for _, before in recent) + 1.0)
    ratio = max(0.25, min(4.0, ratio))
    made = []
    for i in range(1, steps + 1):
        at = current + (i - 1) * STEP_S
        lag = season * math.ceil(i / season)
        fade = model.fade ** (i - 1)  # the present says less the further ahead it has to speak
        value = seen(at, lag) * (fade * ratio + 1 - fade)
        spread = 1.28 * math.sqrt(value * (1.0 + 0.1 * i) + 1.0)
        made.append(Forecast(at, value, max(0.0, value - spread), value + spread))
    return made
