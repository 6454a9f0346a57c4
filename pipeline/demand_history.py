"""Ride requests per zone and step out of the store: the history that demand forecasts are made of."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pipeline.models import demand
from pipeline.streams.inference import CITY, WEEK_S, Inference, demand_key

if TYPE_CHECKING:
    from pipeline.runtime import Runtime


def demand_counts(nexus: Runtime, zone: str, now_s: int) -> dict[int, float]:
    """A zone's ride requests per step (start in epoch s -> count) over the history that forecasts use."""
    first = now_s - demand.HISTORY_S
    names = sorted({demand_key(zone, start) for start in (*range(first, now_s, WEEK_S), now_s)})
    counts: Counter[int] = Counter()
    for flat in nexus.store.many([("HGETALL", name) for name in names]):
        pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
        for step, count in pairs:
            counts[int(step)] += float(count)  # type: ignore[assignment]  # a feed may count in fractions
    stream = nexus.stream("inference")
    if isinstance(stream, Inference):
        counts.update(stream.unwritten_requests(zone))
    return {step: count for step, count in counts.items() if first <= step <= now_s}


def city_warming(nexus: Runtime, now_s: int) -> str | None:
    """Why the city's demand has no forecast yet, or None."""
    return demand.warming_up(demand_counts(nexus, CITY, now_s), now_s)
