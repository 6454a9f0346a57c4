"""The health of features: null rate, out-of-range rate and age of each, counted while vectors are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.definitions import Feature
from pipeline.features.reading import Values
from pipeline.streams.features import Features

HALF_LIFE = 5_000  # vectors: the rates tell of about so many of the latest
SAMPLED = 10  # one of so many published vectors is looked at: the figures are rates, and publishing is frequent


class FeatureHealth:
    """Rates over the latest vectors. `stream` gives the running features stream, None where it runs elsewhere."""

    def __init__(self, stream: Callable[[], Features | None], clock: Callable[[], int]) -> None:
        self._stream, self._clock = stream, clock
        self._weight = 0.0
        self._turn = 0
        self._nulls: dict[str, float] = {}
        self._outside: dict[str, float] = {}
        self.vectors = 0

    def look(self, vectors: Mapping[str, Values], definitions: Mapping[str, Feature]) -> None:
        """Take published vectors into the rates."""
        for values in vectors.values():
            self._turn += 1
            if self._turn % SAMPLED == 1:
                self._take(values, definitions)

    def _take(self, values: Values, definitions: Mapping[str, Feature]) -> None:
        self.vectors += 1
        if self._weight > HALF_LIFE:  # halve everything, so that what was long ago fades
            self._weight /= 2
            for table in (self._nulls, self._outside):
                for name in table:
                    table[name] /= 2
        self._weight += 1
        nulls, outside = self._nulls, self._outside
        for name, value in values.items():
            if value is None:
                nulls[name] = nulls.get(name, 0.0) + 1
                continue
            feature = definitions.get(name)
            if feature is not None and (
                (feature.low is not None and value < feature.low) or (feature.high is not None and value > feature.high)
            ):
                outside[name] = outside.get(name, 0.0) + 1

    def snapshot(self) -> dict[str, Any]:
        """Per feature: null_rate and out_of_range_rate (None before the first vector), and age_s, how long ago the latest event
        that it is made of happened (None: none was seen by this process)."""
        stream, now = self._stream(), self._clock()
        features: Sequence[Feature] = stream.served if stream is not None else ()
        newest = stream.fold.newest if stream is not None else {}
        by_name = {feature.name: feature for feature in features}

        def age_s(feature: Feature) -> float | None:
            if feature.of is not None:
                ages = [age for part in feature.of if (age := age_s(by_name[part])) is not None]
                return min(ages, default=None)
            at = newest.get(feature.event_type or "")
            return None if at is None else max(0.0, (now - at) / 1000)

        rows = {}
        for feature in features:
            known = self._weight > 0 and feature.entity == "user"
            rows[feature.name] = {
                "null_rate": self._nulls.get(feature.name, 0.0) / self._weight if known else None,
                "out_of_range_rate": self._outside.get(feature.name, 0.0) / self._weight if known else None,
                "age_s": age_s(feature),
                "entity": feature.entity,
            }
        return {"vectors": self.vectors, "features": rows}
