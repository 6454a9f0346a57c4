"""Reading tiles: from an entity's tiles to the values of features, and when those values will change by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import fsum
from typing import Any

from pipeline.aggregations import decayed, lanes, value_of
from pipeline.definitions import Feature
from pipeline.families import Family, needs_of
from pipeline.tiles import NUMBER, Entity, Layout

Values = dict[str, float | int | None]
States = list[list[Any]]  # for each level of a family the numbers of its columns
_Cells = list[tuple[int, int]]  # tile, state
_Read = Callable[[list[States | None]], float | int | None]
_TRIES, _PAUSE_S = 50, 0.0001  # while the pipeline moves states of the entity that is read, which takes microseconds


class Reading:
    """The values of `features`, read from families in a layout. All times are epoch ms."""

    def __init__(self, features: Sequence[Feature], layout: Layout) -> None:
        self._layout, self.families = layout, layout.families
        self._nothing: Values = {feature.name: None for feature in features}
        self._single: list[list[tuple[str, _Read]]] = [[] for _ in self.families]
        self._joint: list[tuple[str, _Read]] = []  # of columns from several families
        self._ratios = [(feature.name, *feature.of) for feature in features if feature.of is not None]
        for feature in features:
            if feature.of is None:
                self._place(feature)

    def _place(self, feature: Feature) -> None:
        window_ms = feature.window_s * 1000
        there = {
            (family.event_type, column): (i, lane)
            for i, family in enumerate(self.families)
            for lane, column in enumerate(family.columns)
            if window_ms in family.windows and family.reach[lane] >= window_ms
        }
        places = []
        for _, event_type, column, window in needs_of(feature):
            i, lane = there[event_type, column]
            nothing = (0.0, 0.0) if column.kind == "decayed" else 0
            places.append((i, self.families[i].windows.index(window), lane, nothing))
        value = value_of(feature)
        self._nothing[feature.name] = value([nothing for _, _, _, nothing in places])
        if len({i for i, _, _, _ in places}) == 1:
            i, level, lanes_ = places[0][0], places[0][1], [lane for _, _, lane, _ in places]
            self._single[i].append((feature.name, _single(i, level, lanes_, value)))
        else:
            self._joint.append((feature.name, _joint(places, value)))

    def values(self, entity: Entity, at: int) -> Values:
        """All features as of `at`. The pipeline goes on writing: what it moved meanwhile is read again."""
        for _ in range(_TRIES):
            ended = entity.ended
            if entity.begun == ended:
                found = self._values(entity, at)
                if entity.begun == ended:
                    return found
            time.sleep(_PAUSE_S)
        return self._values(entity, at)

    def _values(self, entity: Entity, at: int) -> Values:
        """Those of families without a tile cost nothing."""
        found = self._nothing.copy()
        states: list[States | None] = []
        ripe = _ripe(entity, at)
        for i, single in enumerate(self._single):
            state = self._states(entity, i, at, ripe.get(i, []))
            states.append(state)
            if state is not None:
                for name, read in single:
                    found[name] = read(states)
        for name, read in self._joint:
            found[name] = read(states)
        for name, over, under in self._ratios:
            part, whole = found[over], found[under]
            found[name] = part / whole if part is not None and whole else None
        return found

    def _states(self, entity: Entity, i: int, at: int, ripe: _Cells) -> States | None:
        """A family's numbers; None where it has no tile at all. `ripe` are event times and what they add."""
        family, slot = self.families[i], self._layout.first[i]
        newest, state = entity.tiles[self._layout.group[i]], entity.values[i]
        rows = [bytes(held) if held else b"" for held in entity.rows[slot : slot + len(family.windows)]]
        cells = [(ts // family.tiles[0], delta) for ts, delta in ripe]
        if state:
            cells.append((newest, state & self._layout.mask[slot]))
        elif not cells and not any(rows):
            return None
        if family.half_life_s is not None:
            return [[self._decayed(family, cells + _cells(rows[0], self._layout.size[slot] + NUMBER.size), at)]]
        merge, light = family.merge, family.columns[0].light
        found: States = []
        total, older = 0, []  # type: int, list[tuple[int, int]]
        for level, (window, tile_ms) in enumerate(zip(family.windows, family.tiles, strict=True)):
            if older:
                cells += [(start // tile_ms, state) for start, state in older]
                older = []
            if rows[level]:
                cells += _cells(rows[level], self._layout.size[slot + level] + NUMBER.size)
            edge, last = (at - window) // tile_ms, at // tile_ms
            for tile, state in cells:
                if tile <= edge:
                    older.append((tile * tile_ms, state))  # too old for this window, maybe not for the next
                elif tile <= last:
                    total = merge(total, state)
            cells = []
            kept = total & self._layout.mask[slot + level]
            found.append(lanes(kept, family.widths) if light else [kept])
        return found

    @staticmethod
    def _decayed(family: Family, cells: _Cells, at: int) -> tuple[float, float]:
        """Weight and weighted sum, faded to the latest tile and summed in any order: of the same events the same bits."""
        tile_ms, half_life_s = family.tiles[0], family.half_life_s or 1.0
        edge, last = (at - family.windows[0]) // tile_ms, at // tile_ms
        inside = [(tile, state) for tile, state in cells if edge < tile <= last]
        latest = max((tile for tile, _ in inside), default=0)
        parts = [decayed(state, (latest - tile) * tile_ms, half_life_s) for tile, state in inside]
        return fsum(weight for weight, _ in parts), fsum(part for _, part in parts)

    def due(self, entity: Entity, at: int, spacing_ms: int) -> int | None:
        """When (epoch ms) the values of `at` should be looked at again, were nothing to come; None: nothing will change.

        That is when the first window empties, or when a tile leaves one, but then not before `spacing_ms` from now.
        """
        empties, leaves = [], [ts for ts, _, _ in entity.future[:1]]
        for i, family in enumerate(self.families):
            starts = [entity.tiles[self._layout.group[i]] * family.tiles[0]] if entity.values[i] else []
            for level, (window, tile_ms) in enumerate(zip(family.windows, family.tiles, strict=True)):
                rows, step = (
                    entity.rows[self._layout.first[i] + level],
                    self._layout.size[self._layout.first[i] + level] + NUMBER.size,
                )
                raw = bytes(rows or b"")
                starts += [NUMBER.unpack_from(raw, place)[0] * tile_ms for place in range(0, len(raw), step)]
                ends = [end for start in starts if (end := start // tile_ms * tile_ms + window) > at]
                if ends:
                    empties.append(max(ends))
                    leaves.append(min(ends))
        if not leaves:
            return None
        return min(*empties, max(min(leaves), at + spacing_ms)) if empties else max(min(leaves), at + 1)


def _ripe(entity: Entity, at: int) -> dict[int, list[tuple[int, int]]]:
    """Of each family what waited for its time and has it now: event times and what they add."""
    found: dict[int, list[tuple[int, int]]] = {}
    first = entity.future[:1]  # a copy: the pipeline may take the last one away meanwhile
    if first and first[0][0] <= at:
        for ts, i, delta in [*entity.future]:
            if ts <= at:
                found.setdefault(i, []).append((ts, delta))
    return found


def _cells(raw: bytes, step: int) -> _Cells:
    """The (tile, state) of packed rows."""
    return [
        (int.from_bytes(raw[at : at + 4], "little"), int.from_bytes(raw[at + 4 : at + step], "little"))
        for at in range(0, len(raw), step)
    ]


def _single(i: int, level: int, columns: list[int], value: Callable[[Sequence[Any]], Any]) -> _Read:
    if len(columns) == 1:
        lane = columns[0]
        return lambda states: value((states[i][level][lane],))  # type: ignore[index]

    def read(states: list[States | None]) -> Any:
        numbers = states[i][level]  # type: ignore[index]
        return value([numbers[lane] for lane in columns])

    return read


def _joint(places: list[tuple[int, int, int, Any]], value: Callable[[Sequence[Any]], Any]) -> _Read:
    def read(states: list[States | None]) -> Any:
        numbers = []
        for i, level, lane, nothing in places:
            state = states[i]
            numbers.append(nothing if state is None else state[level][lane])
        return value(numbers)

    return read
