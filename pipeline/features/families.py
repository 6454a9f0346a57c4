"""Families: which columns share tiles, and how features find theirs.

A family is the columns of one entity and event type that merge alike; the light ones share one, each heavy one has its own. Its
levels are the windows that features ask for, ascending. A tile of a level is at most 1/60 of its window and a multiple of the
tile below, so that an event is counted once, in the finest level, and whole tiles are handed up as they leave its window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from pipeline.definitions import Entity, Feature, WrongDefinition, from_object, to_object
from pipeline.features.aggregations import Column, columns_of

TILES_PER_WINDOW = 60


@dataclass(frozen=True)
class Family:
    """`windows` in ms, ascending; `reach[i]` is the greatest window (ms) that column i is read over, descending.

    `mark` tells a family that was filled from the stored events apart from any of the same columns before it, whose tiles may
    still be in the store. Events before the place `until` of the log were counted in it then.
    """

    entity: Entity
    event_type: str | None
    windows: tuple[int, ...]
    columns: tuple[Column, ...]
    reach: tuple[int, ...]
    mark: str = ""
    until: int = field(default=0, compare=False)

    @cached_property
    def id(self) -> bytes:
        """3 bytes that stand in the store's fields: other columns or windows are another family, so no old tile is misread."""
        text = repr((self.entity, self.event_type, self.windows, self.columns, self.reach)) + self.mark
        return hashlib.blake2b(text.encode(), digest_size=3).digest()

    @cached_property
    def tiles(self) -> tuple[int, ...]:
        """The length of each level's tiles, ms."""
        found: list[int] = []
        for window in self.windows:
            longest = window // TILES_PER_WINDOW
            found.append(longest // found[-1] * found[-1] if found else longest)
        return tuple(found)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The bits of each column's lane, from the lowest on."""
        return tuple(column.bits for column in self.columns)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of a tile's state in each level: a coarser level keeps only the columns that reach so far."""
        return tuple(
            sum(width for width, reach in zip(self.widths, self.reach, strict=True) if reach >= window) // 8
            for window in self.windows
        )

    @property
    def half_life_s(self) -> float | None:
        """Of a decayed column, whose states are relative to their tile."""
        return self.columns[0].more[0] if self.columns[0].kind == "decayed" else None

    @property
    def merge(self) -> Callable[[int, int], int]:
        return self.columns[0].merge

    def to_object(self) -> list[Any]:
        """As JSON; from_object is its inverse."""
        columns = [[c.kind, c.field, c.where, c.more] for c in self.columns]
        return [self.entity, self.event_type, self.windows, columns, self.reach, self.mark, self.until]

    @classmethod
    def from_object(cls, kept: Sequence[Any]) -> Family:
        entity, event_type, windows, columns, reach, *filled = kept
        made = [
            Column(kind, name, (where[0], tuple(where[1])) if where else None, tuple(more))
            for kind, name, where, more in columns
        ]
        return cls(entity, event_type, tuple(windows), tuple(made), tuple(reach), *filled)


Need = tuple[Entity, str | None, Column, int]  # a column over a window, ms


def needs_of(feature: Feature) -> list[Need]:
    """What a feature reads, in the order of its columns."""
    return [(feature.entity, feature.event_type, column, feature.window_s * 1000) for column in columns_of(feature)]


def provides(family: Family) -> list[Need]:
    """What can be read from a family."""
    return [
        (family.entity, family.event_type, column, window)
        for column, reach in zip(family.columns, family.reach, strict=True)
        for window in family.windows
        if window <= reach
    ]


def plan(features: Iterable[Feature], known: Sequence[Family] = ()) -> tuple[Family, ...]:
    """The families that the features need: of those known, the ones still used, then new ones for what they lack.

    A known family stays as it is, so that a new feature beside it costs it none of its history. Raises WrongDefinition.
    """
    asked = {need: feature for feature in features for need in needs_of(feature)}
    there: dict[Need, Family] = {}
    for family in known:
        for need in provides(family):
            there.setdefault(need, family)
    used = {there[need] for need in asked if need in there}
    groups: dict[tuple[Any, ...], dict[Column, set[int]]] = {}
    for entity, event_type, column, window in (need for need in asked if need not in there):
        # Decayed states are relative to their own tile, so that they cannot be handed up: each window has its own family.
        apart = None if column.light else column
        groups.setdefault((entity, event_type, apart), {}).setdefault(column, set()).add(window)
    made = []
    for (entity, event_type, _), columns in groups.items():
        ordered = sorted(columns, key=lambda column: -max(columns[column]))
        windows = tuple(sorted({window for wanted in columns.values() for window in wanted}))
        family = Family(entity, event_type, windows, tuple(ordered), tuple(max(columns[c]) for c in ordered))
        for lower, upper, tile in zip(windows, windows[1:], family.tiles[1:], strict=False):
            if upper - lower < tile:
                feature = next(f for need, f in asked.items() if need[:2] == (entity, event_type) and need[3] == upper)
                raise WrongDefinition(
                    feature.name,
                    f"window_s {upper // 1000}",
                    f"the window of its neighbour, {lower // 1000}, or one that is longer by at least {tile // 1000} s",
                )
        made.append(family)
    return tuple([family for family in known if family in used] + made)


def pack_definitions(features: Sequence[Feature], families: Sequence[Family], filled: str | None = None) -> bytes:
    """The definitions in force, the families they are read from, and the mark of the backfill that filled some of them."""
    kept = {"features": [to_object(f) for f in features], "families": [f.to_object() for f in families]}
    return msgspec.json.encode({**kept, "filled": filled})


def unpack_definitions(raw: bytes) -> tuple[tuple[Feature, ...], tuple[Family, ...], str | None]:
    kept = msgspec.json.decode(raw)
    return tuple(map(from_object, kept["features"])), tuple(map(Family.from_object, kept["families"])), kept["filled"]
