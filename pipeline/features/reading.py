"""Reading tiles: from an entity's tiles to the values of features, and when those values will change by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import gcd
from typing import Any

from pipeline.definitions import Feature
from pipeline.features.aggregations import Column, value_of
from pipeline.features.families import needs_of
from pipeline.features.readers import NEVER, Read, Span, States, Waiting, compile_reader, lane_of
from pipeline.features.tiles import Entity, Layout

Values = dict[str, float | int | None]
_TRIES, _PAUSE_S = 50, 0.0001  # while the pipeline moves states of the entity that is read, which takes microseconds
_NOTHING: Waiting = {}


class Reading:
    """The values of `features`, read from families in a layout. All times are epoch ms. A `part` of another one shares its
    readers, and so may tell of features beside its own."""

    def __init__(self, features: Sequence[Feature], layout: Layout, whole: Reading | None = None) -> None:
        self._layout, self.families = layout, layout.families
        # All tiles and windows are multiples of the grain: within it, no tile enters a window or leaves one.
        self.grain = gcd(*(ms for family in self.families for ms in (*family.tiles, *family.windows))) or 1
        self._spans = lru_cache(maxsize=16)(self._spans_of)
        self._nothing: Values = {feature.name: None for feature in features}
        single: list[list[Feature]] = [[] for _ in self.families]
        self._joint: list[tuple[str, Callable[[Sequence[States | None]], Any]]] = []  # of columns from several families
        self._ratios = [(feature.name, *feature.of) for feature in features if feature.of is not None]
        needed: set[int] = set()
        for feature in features:
            if feature.of is None:
                places = self._places(feature)
                needed.update(i for i, _ in places)
                value = value_of(feature)
                self._nothing[feature.name] = value([_nothing_of(column) for _, column in places])
                if len({i for i, _ in places}) == 1:
                    single[places[0][0]].append(feature)
                else:
                    self._joint.append((feature.name, self._reader_of_several(feature, places)))
        self._readers: list[Read] = (
            [compile_reader(layout, i, of_family) for i, of_family in enumerate(single)]
            if whole is None
            else whole._readers
        )
        self._needed = [self._readers[i] for i in sorted(needed)]

    def part(self, features: Sequence[Feature]) -> Reading:
        """Of some of the features alone, which takes no more time than their families need."""
        return Reading(features, self._layout, self)

    def _places(self, feature: Feature) -> list[tuple[int, Column]]:
        """In which families its columns are."""
        window_ms = feature.window_s * 1000
        there = {
            (family.event_type, column): i
            for i, family in enumerate(self.families)
            for column, reach in zip(family.columns, family.reach, strict=True)
            if window_ms in family.windows and reach >= window_ms
        }
        return [(there[event_type, column], column) for _, event_type, column, _ in needs_of(feature)]

    def _reader_of_several(
        self, feature: Feature, places: Sequence[tuple[int, Column]]
    ) -> Callable[[Sequence[States | None]], Any]:
        """A feature of several families, each of which may have no tile."""
        value, ways = value_of(feature), []
        for i, column in places:
            family = self.families[i]
            level, lane = family.windows.index(feature.window_s * 1000), lane_of(family, family.columns.index(column))
            ways.append((i, level, lane, _nothing_of(column)))

        def read(states: Sequence[States | None]) -> Any:
            numbers = []
            for i, level, lane, nothing in ways:
                state = states[i]
                if state is None:
                    numbers.append(nothing)
                elif lane is None:
                    numbers.append(state[level])
                else:
                    numbers.append((state[level] >> lane[0] & lane[1]) - lane[2])
            return value(numbers)

        return read

    def values_and_due(self, entity: Entity, at: int, spacing_ms: int) -> tuple[Values, int | None]:
        """All features as of `at`, and when (epoch ms) to look at them again, were nothing to come; None: nothing will change.

        That is when an event ahead of the clock gets its time, when the first window empties, or when a tile leaves one, but then
        not before `spacing_ms` from now. The pipeline goes on writing: what it moved meanwhile is read again.
        """
        for _ in range(_TRIES):
            ended = entity.ended
            if entity.begun == ended:
                found, empties, leaves = self._read(entity, at)
                if entity.begun == ended:
                    break
            time.sleep(_PAUSE_S)
        else:
            found, empties, leaves = self._read(entity, at)
        if empties == NEVER:
            return found, None
        return found, min(empties, max(leaves, at + spacing_ms))

    def _read(self, entity: Entity, at: int) -> tuple[Values, int, int]:
        """All features, when the first window empties or an event ahead gets its time, and when the first tile leaves one.
        Families without a tile cost nothing."""
        found = self._nothing.copy()
        states: list[States | None] = [None] * len(self.families)
        spans, ripe = self._spans(at // self.grain), _NOTHING
        empties = leaves = NEVER
        if entity.future:
            ripe, empties = _ripe(entity, at)
        for read in self._needed:
            empty, leave = read(entity, spans, ripe, found, states)
            if empty < empties:
                empties = empty
            if leave < leaves:
                leaves = leave
        for name, of_several in self._joint:
            found[name] = of_several(states)
        for name, over, under in self._ratios:
            part, whole = found[over], found[under]
            found[name] = part / whole if part is not None and whole else None
        return found, empties, leaves

    def _spans_of(self, grain: int) -> list[Span]:
        """For each slot the times in which a tile's start lies that is in its window, and the start of the first tile after."""
        at, spans = grain * self.grain, []
        for i, level in self._layout.slots:
            tile_ms, window = self.families[i].tiles[level], self.families[i].windows[level]
            spans.append((((at - window) // tile_ms + 1) * tile_ms, (at // tile_ms + 1) * tile_ms))
        return spans


def _ripe(entity: Entity, at: int) -> tuple[Waiting, int]:
    """Of each family what waited for its time and has it now: event times and what they add. And when the next one has it."""
    first = entity.future[:1]  # a copy: the pipeline may take the last one away meanwhile
    if first and first[0][0] > at:
        return _NOTHING, first[0][0]
    found: dict[int, list[tuple[int, int]]] = {}
    next_at = NEVER
    for ts, i, delta in [*entity.future]:
        if ts <= at:
            found.setdefault(i, []).append((ts, delta))
        elif ts < next_at:
            next_at = ts
    return found, next_at


def _nothing_of(column: Column) -> Any:
    """The state of a column that no event is in."""
    return (0.0, 0.0) if column.kind == "decayed" else 0
