"""Reading tiles: from an entity's tiles to the values of features, and when those values will change by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from math import fsum, gcd
from operator import add, or_
from struct import Struct
from typing import Any

from pipeline.aggregations import decayed, value_of
from pipeline.definitions import Feature
from pipeline.families import Family, needs_of
from pipeline.tiles import Entity, Layout

Values = dict[str, float | int | None]
States = list[Any]  # for each level of a family what its events come to: an integer, of decayed columns a pair
_Lane = tuple[int, int, int]  # shift, mask, and what is taken off again
_Read = Callable[[Sequence[States | None]], float | int | None]
_Span = tuple[int, int]  # ms
_TRIES, _PAUSE_S = 50, 0.0001  # while the pipeline moves states of the entity that is read, which takes microseconds
_NEVER = 1 << 62


class Reading:
    """The values of `features`, read from families in a layout. All times are epoch ms. A `part` of another one shares its
    plans."""

    def __init__(self, features: Sequence[Feature], layout: Layout, whole: Reading | None = None) -> None:
        self._layout, self.families = layout, layout.families
        self._plans: list[_Plan] = (
            [_Plan(layout, i) for i in range(len(self.families))] if whole is None else whole._plans
        )
        # All tiles and windows are multiples of the grain: within it, no tile enters a window or leaves one.
        self.grain = gcd(*(ms for family in self.families for ms in (*family.tiles, *family.windows))) or 1
        self._spans = lru_cache(maxsize=16)(self._spans_of)
        self._nothing: Values = {feature.name: None for feature in features}
        self._single: list[list[tuple[str, _Read]]] = [[] for _ in self.families]
        self._joint: list[tuple[str, _Read]] = []  # of columns from several families
        self._shared: set[int] = set()  # which those are
        self._ratios = [(feature.name, *feature.of) for feature in features if feature.of is not None]
        for feature in features:
            if feature.of is None:
                self._place(feature)
        self._needed = [
            (i, plan, single)
            for i, (plan, single) in enumerate(zip(self._plans, self._single, strict=True))
            if single or i in self._shared
        ]

    def part(self, features: Sequence[Feature]) -> Reading:
        """Of some of the features alone, which takes no more time than they need."""
        return Reading(features, self._layout, self)

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
            places.append((i, self.families[i].windows.index(window), _lane(self.families[i], lane), nothing))
        value = value_of(feature)
        self._nothing[feature.name] = value([nothing for _, _, _, nothing in places])
        if len({i for i, _, _, _ in places}) == 1:
            i, level = places[0][:2]
            self._single[i].append((feature.name, _single(i, level, [lane for _, _, lane, _ in places], value)))
        else:
            self._joint.append((feature.name, _joint(places, value)))
            self._shared.update(i for i, _, _, _ in places)

    def values_and_due(self, entity: Entity, at: int, spacing_ms: int) -> tuple[Values, int | None]:
        """All features as of `at`, and when (epoch ms) to look at them again, were nothing to come; None: nothing will change.

        That is when the first window empties, or when a tile leaves one, but then not before `spacing_ms` from now. The
        pipeline goes on writing: what it moved meanwhile is read again.
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
        if leaves == _NEVER:
            return found, None
        return found, min(empties, max(leaves, at + (spacing_ms if empties < _NEVER else 1)))

    def _read(self, entity: Entity, at: int) -> tuple[Values, int, int]:
        """All features, when the first window empties, and when the first tile leaves one. Families without a tile cost
        nothing."""
        found = self._nothing.copy()
        states: list[States | None] = [None] * len(self.families)
        spans, ripe = self._spans(at // self.grain), _ripe(entity, at)
        empties, leaves = _NEVER, min([ts for ts, _, _ in entity.future[:1]], default=_NEVER)
        tiles, rows, newest = entity.tiles, entity.rows, entity.values
        for i, plan, single in self._needed:
            held = newest[i]
            others = any(rows[plan.slot : plan.stop]) or i in ripe
            if not held and not others:
                continue
            start = tiles[plan.group] * plan.tile_ms
            if others or plan.decays:
                cells = [(ts - ts % plan.tile_ms, delta) for ts, delta in ripe.get(i, ())]
                if held:
                    cells.append((start, held & plan.mask))
                state, empty, leave = plan.states(rows, spans, cells)
            else:
                state, empty = plan.states_of_newest(spans, start, held)
                leave = empty
            if empty < empties:
                empties = empty
            if leave < leaves:
                leaves = leave
            states[i] = state
            for name, read in single:
                found[name] = read(states)
        for name, read in self._joint:
            found[name] = read(states)
        for name, over, under in self._ratios:
            part, whole = found[over], found[under]
            found[name] = part / whole if part is not None and whole else None
        return found, empties, leaves

    def _spans_of(self, grain: int) -> list[_Span]:
        """For each slot the times in which a tile's start lies that is in its window, and the start of the first tile after."""
        at, spans = grain * self.grain, []
        for i, level in self._layout.slots:
            tile_ms, window = self.families[i].tiles[level], self.families[i].windows[level]
            spans.append((((at - window) // tile_ms + 1) * tile_ms, (at // tile_ms + 1) * tile_ms))
        return spans


class _Plan:
    """How the states of a family are read from its tiles."""

    def __init__(self, layout: Layout, i: int) -> None:
        family = layout.families[i]
        self.slot, self.group, self.tile_ms = layout.first[i], layout.group[i], family.tiles[0]
        self.stop = self.slot + len(family.windows)
        self.mask = layout.mask[self.slot]
        self.decays = family.half_life_s is not None
        self._family, self._merge = family, _MERGES[family.merge]
        self._bias = _bias(family)
        slots = range(self.slot, self.stop)
        self._levels = [
            (slot, window, tile_ms, layout.mask[slot], Struct(f"<I{layout.size[slot]}s").iter_unpack)
            for slot, window, tile_ms in zip(slots, family.windows, family.tiles, strict=True)
        ]

    def states_of_newest(self, spans: Sequence[_Span], start: int, state: int) -> tuple[States, int]:
        """The states where there is one tile alone, and when the first window that it is in empties."""
        found: States = []
        empties = _NEVER
        for slot, window, tile_ms, mask, _ in self._levels:
            begins, ends = spans[slot]
            found.append((state if begins <= start < ends else 0) + self._bias & mask)
            if start >= begins and (end := start // tile_ms * tile_ms + window) < empties:
                empties = end
        return found, empties

    def states(
        self, rows: Sequence[bytearray | None], spans: Sequence[_Span], carried: list[tuple[int, int]]
    ) -> tuple[States, int, int]:
        """The states, when the first window empties, and when the first tile leaves one. `carried` has the starts of tiles
        beside the rows, and their states."""
        found: States = []
        total, empties, leaves = 0, _NEVER, _NEVER
        first, last = _NEVER, -1  # the first and the last tile in the window, by their start
        for slot, window, tile_ms, mask, unpack in self._levels:
            begins, ends = spans[slot]
            raw = rows[slot]
            if raw:
                carried += [(tile * tile_ms, int.from_bytes(state, "little")) for tile, state in unpack(bytes(raw))]
            inside, older = [total], []
            for cell in carried:
                start = cell[0]
                if start < begins:
                    older.append(cell)  # too old for this window, maybe not for the next
                    continue
                if start < first:
                    first = start
                if start > last:
                    last = start
                if start < ends:
                    inside.append(cell[1])
            if last >= 0:
                empties = min(empties, last // tile_ms * tile_ms + window)
                leaves = min(leaves, first // tile_ms * tile_ms + window)
            if self.decays:
                found.append(_decayed(self._family, [cell for cell in carried if begins <= cell[0] < ends]))
            else:
                total = self._merge(inside)
                found.append(total + self._bias & mask)
            carried = older
        return found, empties, leaves


_MERGES: dict[Callable[[int, int], int], Callable[[Iterable[int]], int]] = {
    add: sum,
    max: max,
    or_: lambda states: reduce(or_, states),
}


def _ripe(entity: Entity, at: int) -> dict[int, list[tuple[int, int]]]:
    """Of each family what waited for its time and has it now: event times and what they add."""
    found: dict[int, list[tuple[int, int]]] = {}
    first = entity.future[:1]  # a copy: the pipeline may take the last one away meanwhile
    if first and first[0][0] <= at:
        for ts, i, delta in [*entity.future]:
            if ts <= at:
                found.setdefault(i, []).append((ts, delta))
    return found


def _decayed(family: Family, inside: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Weight and weighted sum of (start, state), faded to the latest tile and summed in any order: of the same events the same
    bits."""
    latest, half_life_s = max((start for start, _ in inside), default=0), family.half_life_s or 1.0
    parts = [decayed(state, latest - start, half_life_s) for start, state in inside]
    return fsum(weight for weight, _ in parts), fsum(part for _, part in parts)


def _bias(family: Family) -> int:
    """Half of what each lane takes: with it added none is negative, and none has borrowed from the next."""
    if not family.columns[0].light:
        return 0
    return sum(1 << sum(family.widths[: lane + 1]) - 1 for lane in range(len(family.widths)))


def _lane(family: Family, lane: int) -> _Lane | None:
    """Where a column is in a state that has the bias added; None where it is the whole state."""
    if not family.columns[0].light:
        return None
    width = family.widths[lane]
    return sum(family.widths[:lane]), (1 << width) - 1, 1 << width - 1


def _single(i: int, level: int, lanes: Sequence[_Lane | None], value: Callable[[Sequence[Any]], Any]) -> _Read:
    """A feature of one family, which has a tile."""
    if lanes[0] is None:
        return lambda states: value((states[i][level],))  # type: ignore[index]
    if len(lanes) == 1:
        shift, mask, half = lanes[0]
        return lambda states: value(((states[i][level] >> shift & mask) - half,))  # type: ignore[index]
    columns = [lane for lane in lanes if lane is not None]

    def read(states: Sequence[States | None]) -> Any:
        state = states[i][level]  # type: ignore[index]
        return value([(state >> shift & mask) - half for shift, mask, half in columns])

    return read


def _joint(places: Sequence[tuple[int, int, _Lane | None, Any]], value: Callable[[Sequence[Any]], Any]) -> _Read:
    """A feature of several families, each of which may have no tile."""

    def read(states: Sequence[States | None]) -> Any:
        numbers = []
        for i, level, lane, nothing in places:
            state = states[i]
            if state is None:
                numbers.append(nothing)
            elif lane is None:
                numbers.append(state[level])
            else:
                numbers.append((state[level] >> lane[0] & lane[1]) - lane[2])
        return value(numbers)

    return read
