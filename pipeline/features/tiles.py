"""Tiles in memory: the state of one entity, and where each family's levels are in it.

Of each family an entity has the newest tile of the finest level at hand, as a plain integer. Families whose finest tiles are of
one length (a group) share that tile's number; a family without an event in it has 0 there. The other tiles are flat rows in one
bytearray per family and level (a slot), ascending: tile number (u32), then the state. Flat bytes, because the garbage collector
would walk millions of small objects and pause the whole process.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from heapq import heappush
from typing import Any

from pipeline.features.families import Family

NUMBER = struct.Struct("<I")

_NONE: Any = ()  # the lists of an entity before anything is in them: most never have any, and one for all is in the cache


class Entity:
    """The tiles of one user, merchant or zone. `position` is the ordinal behind the last event in them: none counts twice.

    `touched` has a bit for each family whose newest tile changed since the last write, `changed` the (slot, tile) of other
    changed rows, `gone` the fields of rows that left. `future` keeps what is stamped ahead of the clock, (event time ms,
    family, delta), until its time has come: a heap; `stirred` says that the store has no copy of it as it is. While `begun`
    is ahead of `ended`, states are on their way from one place to another: who reads then may see them in both, or in none.
    """

    __slots__ = (
        "begun",
        "changed",
        "ended",
        "expires",
        "future",
        "gone",
        "position",
        "rows",
        "stirred",
        "tiles",
        "touched",
        "values",
    )

    def __init__(self, families: int, groups: int, slots: int) -> None:
        self.position = 0
        self.tiles = [-1] * groups
        self.values = [0] * families
        self.rows: list[bytearray | None] = [None] * slots
        self.touched = 0
        self.changed: list[tuple[int, int]] = _NONE
        self.gone: list[bytes] = _NONE
        self.future: list[tuple[int, int, int]] = _NONE
        self.stirred = False
        self.expires = 0
        self.begun = self.ended = 0

    def mark(self, slot: int, tile: int) -> None:
        """A row has changed."""
        self.changed = self.changed or []
        self.changed.append((slot, tile))

    def forget(self, field: bytes) -> None:
        """A row, or what else had this field in the store, has left."""
        self.gone = self.gone or []
        self.gone.append(field)

    def wait(self, ts: int, family: int, delta: int) -> None:
        """Keep what is stamped ahead until its time has come."""
        self.future = self.future or []
        heappush(self.future, (ts, family, delta))


class Layout:
    """The slots of a set of families: `first` of each family, and per slot its family and level, and a state's bytes and mask.

    `group` tells each family's. Per group, `lengths` tells how long its tiles are (ms), `members` which families are in it,
    `horizons` the longest window (ms) that one of them has.
    """

    def __init__(self, families: Sequence[Family]) -> None:
        self.families = tuple(families)
        self.first = [sum(len(f.windows) for f in self.families[:i]) for i in range(len(self.families))]
        self.slots = [(i, level) for i, f in enumerate(self.families) for level in range(len(f.windows))]
        self.size = [self.families[i].sizes[level] for i, level in self.slots]
        self.mask = [(1 << 8 * size) - 1 for size in self.size]
        self.lengths = sorted({f.tiles[0] for f in self.families})
        self.group = [self.lengths.index(f.tiles[0]) for f in self.families]
        self.members = [[i for i, g in enumerate(self.group) if g == group] for group in range(len(self.lengths))]
        self.horizons = [max(self.families[i].windows[-1] for i in members) for members in self.members]

    def new(self) -> Entity:
        return Entity(len(self.families), len(self.lengths), len(self.slots))

    def bound(self) -> int:
        """The bytes that an entity's tiles never pass: for each window its tiles, one at either edge, and one being filled."""
        return sum(
            (window // tile + 2) * (size + NUMBER.size)
            for family in self.families
            for window, tile, size in zip(family.windows, family.tiles, family.sizes, strict=True)
        )

    def memory(self, entity: Entity) -> int:
        """The bytes of an entity's tiles, without Python's own overhead."""
        return sum(len(rows) for rows in entity.rows if rows) + sum(self.size[slot] for slot in self.first)
