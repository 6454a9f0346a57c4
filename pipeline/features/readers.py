"""Readers: what the tiles of one family come to, as a function written as source and compiled, as counting is (extraction.py).

Most families of an entity hold its newest tile alone, or rows that all lie in their windows: both are told at once from the
ends. A family without a tile costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import chain
from math import fsum
from operator import add, or_
from struct import Struct
from typing import Any

from pipeline.definitions import Feature
from pipeline.features.aggregations import NAMES, Column, decayed, value_text
from pipeline.features.families import Family, needs_of
from pipeline.features.tiles import NUMBER, Entity, Layout

NEVER = 1 << 62
NOTHING = NEVER, NEVER
States = Sequence[Any]  # for each level of a family what its events come to: an integer, of decayed columns a pair
Span = tuple[int, int]  # ms
Waiting = Mapping[int, list[tuple[int, int]]]  # family -> event times, and what they add
Read = Callable[
    [Entity, Sequence[Span], Waiting, dict[str, Any], list[States | None]], tuple[int, int]
]  # entity, spans by slot, what waited and has its time now, values, states by family -> when it empties, when a tile leaves


def compile_reader(layout: Layout, i: int, features: Sequence[Feature]) -> Read:
    """The function that reads a family: the values of these features, all their columns in it, and the states for others.

    It tells when the first window that is not empty becomes so, and when the first tile leaves one (epoch ms)."""
    family, first, tile_ms = layout.families[i], layout.first[i], layout.families[i].tiles[0]
    levels = range(len(family.windows))
    rows, spans = [f"r{k}" for k in levels], [f"(b{k}, e{k})" for k in levels]
    slots, bias = f"{first}:{first + len(levels)}", _bias(family)
    masks = layout.mask[first : first + len(levels)]
    tiles = _Tiles(layout, i)
    lines = [
        "def read(entity, spans, ripe, found, states):",
        f" held, ({', '.join(rows)},) = entity.values[{i}], entity.rows[{slots}]",
        f" start = entity.tiles[{layout.group[i]}] * {tile_ms}",
        f" if {' or '.join(rows)} or {i} in ripe:",
        f"  cells = [(ts - ts % {tile_ms}, delta) for ts, delta in ripe.get({i}, ())]",
        f"  if held: cells.append((start, held & {masks[0]}))",
        f"  v, empties, leaves = states_of(({', '.join(rows)},), spans[{slots}], cells)",
        f"  {', '.join(f'v{k}' for k in levels)}, = v",
        " elif held:",
        f"  ({', '.join(spans)},) = spans[{slots}]",
    ]
    for k, mask in zip(levels, masks, strict=True):
        state, nothing = f"held + {bias} & {mask}" if bias else f"held & {mask}", str(bias & mask)
        if family.half_life_s is not None:
            state, nothing = f"decayed({state}, 0, {family.half_life_s!r})", "(0.0, 0.0)"
        lines.append(f"  v{k} = {state} if b{k} <= start < e{k} else {nothing}")
    for k, (window, length) in enumerate(zip(family.windows, family.tiles, strict=True)):
        # The shortest window that it is in empties first: a longer one is longer by at least a tile of its own.
        lines.append(
            f"  {'el' if k else ''}if start >= b{k}: empties = leaves = start // {length} * {length} + {window}"
        )
    lines += ["  else: empties = leaves = NEVER", " else: return NOTHING"]
    lines.append(f" states[{i}] = ({', '.join(f'v{k}' for k in levels)},)")
    texts: dict[tuple[int, Column], str] = {}
    for feature in features:
        level = family.windows.index(feature.window_s * 1000)
        columns = []
        for _, _, column, _ in needs_of(feature):
            if (level, column) not in texts:
                lane = lane_of(family, family.columns.index(column))
                text = texts[level, column] = f"v{level}" if lane is None else f"c{len(texts)}"
                if lane is not None:
                    shift, mask, half = lane
                    lines.append(f" {text} = (v{level} >> {shift} & {mask}) - {half}")
            columns.append(texts[level, column])
        lines.append(f" found[{feature.name!r}] = {value_text(feature, columns)}")
    lines.append(" return empties, leaves")
    names = {**NAMES, "decayed": decayed, "states_of": tiles.states, "NEVER": NEVER, "NOTHING": NOTHING}
    exec(compile("\n".join(lines), "<reader>", "exec"), names)
    read: Read = names["read"]
    return read


class _Tiles:
    """The states of a family from all of its tiles."""

    def __init__(self, layout: Layout, i: int) -> None:
        family = layout.families[i]
        slots = range(layout.first[i], layout.first[i] + len(family.windows))
        self._family, self._decays = family, family.half_life_s is not None
        self._merge, self._bias = _MERGES[family.merge], _bias(family)
        self._levels = [
            (window, tile_ms, layout.mask[slot], layout.size[slot] + NUMBER.size, _states_in(layout.size[slot]))
            for slot, window, tile_ms in zip(slots, family.windows, family.tiles, strict=True)
        ]

    def states(
        self, rows: Sequence[bytearray | None], spans: Sequence[Span], carried: list[tuple[int, int]]
    ) -> tuple[States, int, int]:
        """The states, when the first window empties, and when the first tile leaves one. `carried` has the starts of tiles
        beside the rows, and their states."""
        found: list[Any] = []
        number_at = NUMBER.unpack_from
        total, empties, leaves = 0, NEVER, NEVER
        first, last = NEVER, -1  # the first and the last tile in the window, by their start
        for (window, tile_ms, mask, step, states_in), (begins, ends), raw in zip(
            self._levels, spans, rows, strict=True
        ):
            inside = [total]
            if raw:
                row = bytes(raw)  # a copy: the pipeline may change it meanwhile
                oldest, newest = number_at(row, 0)[0] * tile_ms, number_at(row, len(row) - step)[0] * tile_ms
                if begins <= oldest and newest < ends and not self._decays:
                    first = oldest if oldest < first else first
                    last = newest if newest > last else last
                    inside += states_in(row)
                else:
                    starts = [number_at(row, at)[0] * tile_ms for at in range(0, len(row), step)]
                    carried += zip(starts, states_in(row), strict=True)
            older = []
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
                if (empty := last // tile_ms * tile_ms + window) < empties:
                    empties = empty
                if (leave := first // tile_ms * tile_ms + window) < leaves:
                    leaves = leave
            if self._decays:
                found.append(_decayed(self._family, [cell for cell in carried if begins <= cell[0] < ends]))
            else:
                total = self._merge(inside)
                found.append(total + self._bias & mask)
            carried = older
        return found, empties, leaves


def lane_of(family: Family, column: int) -> tuple[int, int, int] | None:
    """Where a column is in a state that has the bias added: shift, mask, and what is taken off again; None where it is the
    whole state."""
    if not family.columns[0].light:
        return None
    width = family.widths[column]
    return sum(family.widths[:column]), (1 << width) - 1, 1 << width - 1


_MERGES: dict[Callable[[int, int], int], Callable[[Iterable[int]], int]] = {
    add: sum,
    max: max,
    or_: lambda states: reduce(or_, states),
}


def _bias(family: Family) -> int:
    """Half of what each lane takes: with it added none is negative, and none has borrowed from the next."""
    if not family.columns[0].light:
        return 0
    return sum(1 << sum(family.widths[: lane + 1]) - 1 for lane in range(len(family.widths)))


def _states_in(size: int) -> Callable[[bytes], Iterable[int]]:
    """The states of the tiles in a row, each of so many bytes behind its number."""
    if size in (4, 8):
        unpack = Struct("<4xI" if size == 4 else "<4xQ").iter_unpack
        return lambda row: chain.from_iterable(unpack(row))
    unpack, whole = Struct(f"<4x{size}s").iter_unpack, int.from_bytes
    return lambda row: [whole(state, "little") for (state,) in unpack(row)]


def _decayed(family: Family, inside: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Weight and weighted sum of (start, state), faded to the latest tile and summed in any order: of the same events the same
    bits."""
    latest, half_life_s = max((start for start, _ in inside), default=0), family.half_life_s or 1.0
    parts = [decayed(state, latest - start, half_life_s) for start, state in inside]
    return fsum(weight for weight, _ in parts), fsum(part for _, part in parts)
