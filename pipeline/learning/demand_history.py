"""Ride requests per zone and step out of the store: the history that demand forecasts are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.models import demand
from pipeline.streams.inference import CITY, WEEK_S, Inference, demand_key
from pipeline.streams.unwritten import stored

if TYPE_CHECKING:
    from pipeline.runtime import Runtime


def demand_counts(nexus: Runtime, zone: str, now_s: int) -> dict[int, float]:
    """A zone's ride requests per step (start in epoch s -> count) over the history that forecasts use."""
    stream = nexus.stream("inference")
    unwritten = stream.unwritten_requests(zone) if isinstance(stream, Inference) else []
    since = now_s - demand.HISTORY_S
    names = sorted({demand_key(zone, start) for start in (*range(since, now_s, WEEK_S), now_s)})
    ordinal, weeks = stored(nexus.store, Inference.name, names)
    counts = {int(step): float(count) for week in weeks for step, count in week}
    for first, requests in unwritten:
        if first >= ordinal:
            for step, count in requests.items():
                counts[step] = counts.get(step, 0.0) + count
    return {step: count for step, count in counts.items() if since <= step <= now_s}


def city_warming(nexus: Runtime, now_s: int) -> str | None:
    """Why the city's demand has no forecast yet, or None."""
    return demand.warming_up(demand_counts(nexus, CITY, now_s), now_s)
