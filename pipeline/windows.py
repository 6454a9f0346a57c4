"""Tiles: sliding windows as packed states per time slice. Constant work per event, at most 60 tiles per window and read.

tiles.py has the form of an entity's tiles in memory, reading.py makes values of them; here they are filled, handed up from finer
to coarser levels, and brought to the store and back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from heapq import heappop
from typing import Any

import msgspec

from pipeline.definitions import Entity as Kind
from pipeline.definitions import Feature
from pipeline.events import Event, Stored
from pipeline.features.extraction import Deltas, Extract, compile_extraction
from pipeline.features.families import Family, plan
from pipeline.features.reading import Reading, Values
from pipeline.features.tiles import NUMBER, Entity, Layout

POSITION = b"p"
FUTURE = b"f"
_EXPIRY_SLACK_MS = 3 * 3_600_000
_WORDS = 2_000  # of one command: the store's scripts take no more than some 8,000
_FIELD = 8  # bytes of a tile's field in the store: family id (3), level (1), tile number (4)


class Windows:
    """The arithmetic of tiles for one kind of entity; it holds no state of them. All times are epoch ms and passed in.

    `features` are those that values() answers; `families`, planned from them where not given, those that events are counted in.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        families: Sequence[Family] | None = None,
        kind: Kind = "user",
        suffix: bytes = b"",
    ) -> None:
        self.kind = kind
        self._position, self._future = POSITION + suffix, FUTURE + suffix
        self.kept: frozenset[bytes] | None = None  # families of others in the same hashes; None: touch no foreign field
        self.filled: bytes | None = None  # the suffix of the fold that filled families before these took over from it
        self.features = tuple(f for f in features if f.entity == kind)
        chosen = plan(self.features) if families is None else families
        self.families = tuple(family for family in chosen if family.entity == kind)
        self.layout = Layout(self.families)
        self._first, self._slots = self.layout.first, self.layout.slots
        self._size, self._mask = self.layout.size, self.layout.mask
        self._prefix = [self.families[i].id + bytes([level]) for i, level in self._slots]
        self._by_prefix = {prefix: slot for slot, prefix in enumerate(self._prefix)}
        self._by_id = {family.id: i for i, family in enumerate(self.families)}
        self._merge = [family.merge for family in self.families]
        self._members = [[(i, *self._newest(i)) for i in members] for members in self.layout.members]
        self._latest = [-1] * len(self._members)  # by group, the tile that an entity came to last
        self._rows_of = lru_cache(maxsize=10_000)(self._touched_rows)
        self.event_types = frozenset(f.event_type for f in self.families if f.event_type is not None)
        self._extract_any = compile_extraction(self.layout, None)
        self._extract: dict[str, Extract] = {kind: compile_extraction(self.layout, kind) for kind in self.event_types}
        self.horizon_ms = max((family.windows[-1] for family in chosen), default=0)
        self._reading = Reading(self.features, self.layout)
        self._part_of = lru_cache(maxsize=100)(self._part)  # who asks for some asks for the same ones again

    def new(self) -> Entity:
        return self.layout.new()

    @property
    def grain_ms(self) -> int:
        """Within a multiple of it, no tile enters a window or leaves one."""
        return self._reading.grain

    # ------------------------------------------------------------------------------------------ counting

    def extract(self, event: Event | Stored, data: Mapping[str, Any], ts: int) -> Deltas:
        """What an event adds, per family. Raises Malformed; nothing is changed then."""
        return self._extract.get(event.event_type, self._extract_any)(data, event, ts)

    def add(self, entity: Entity, ts: int, deltas: Deltas, now: int) -> None:
        """Count an event in its own tiles; one that is ahead of the clock waits, one from before 1970 has no tile."""
        if entity.future:
            self.ripen(entity, now)
        if not 0 <= ts <= now:
            if ts > now:
                for i, delta in deltas:
                    entity.wait(ts, i, delta)
                entity.stirred = True
            return
        for i, delta in deltas:
            group = self.layout.group[i]
            tile = ts // self.layout.lengths[group]
            if entity.tiles[group] == tile or self.turn(entity, group, tile, now):
                before = entity.values[i]
                after = self._merge[i](before, delta)
                if after != before:
                    entity.values[i] = after
                    entity.touched |= 1 << i
            else:
                self.add_late(entity, ts, [(i, delta)], now)

    def turn(self, entity: Entity, group: int, tile: int, now: int) -> bool:
        """Have this as a group's newest tile, empty; False for one that is older than the newest, or too old for any window."""
        newest, length, values = entity.tiles[group], self.layout.lengths[group], entity.values
        if tile < newest or tile <= (now - self.layout.horizons[group]) // length:
            return False
        entity.begun += 1
        for i, slot, mask, size, window in self._members[group]:
            state, unsaved = values[i], entity.touched >> i & 1
            if state or unsaved:
                rows = entity.rows[slot]
                if rows is None:
                    rows = entity.rows[slot] = bytearray()
                rows += NUMBER.pack(newest) + (state & mask).to_bytes(size, "little")
                values[i] = 0
                if unsaved:
                    entity.mark(slot, newest)
                    entity.touched ^= 1 << i
                if NUMBER.unpack_from(rows)[0] <= (now - window) // length:
                    self._hand_up(entity, i, now)
        latest = self._latest[group]
        if latest == tile:
            tile = (
                latest  # one number for all entities that are in this tile: whoever compares it finds it in the cache
            )
        self._latest[group] = entity.tiles[group] = tile
        entity.ended += 1
        return True

    def add_late(self, entity: Entity, ts: int, deltas: Deltas, now: int) -> None:
        """Count in older tiles than the newest."""
        entity.begun += 1
        for i, delta in deltas:
            if delta:
                self._put(entity, i, 0, ts // self.families[i].tiles[0], delta, now)
        entity.ended += 1

    def _put(self, entity: Entity, i: int, level: int, tile: int, state: int, now: int) -> None:
        """Merge a state into the row of its tile, in the finest level from `level` on whose window still has it."""
        family, slot = self.families[i], self._first[i] + level
        while tile <= (now - family.windows[level]) // family.tiles[level]:
            level += 1
            if level == len(family.windows):
                return  # its last window has passed: no value of now may show it
            tile = tile * family.tiles[level - 1] // family.tiles[level]
            slot += 1
        state &= self._mask[slot]
        rows, step = entity.rows[slot], self._size[slot] + 4
        if rows is None:
            rows = entity.rows[slot] = bytearray()
        at = _place(rows, step, tile)
        if at < len(rows) and NUMBER.unpack_from(rows, at)[0] == tile:
            merged = self._merge[i](int.from_bytes(rows[at + 4 : at + step], "little"), state) & self._mask[slot]
            rows[at + 4 : at + step] = merged.to_bytes(step - 4, "little")
        else:
            rows[at:at] = NUMBER.pack(tile) + state.to_bytes(step - 4, "little")
        entity.mark(slot, tile)

    def _hand_up(self, entity: Entity, i: int, now: int) -> None:
        """Rows that left their level's window go into the next coarser level, or are let go."""
        family, slot = self.families[i], self._first[i]
        for level, (window, tile_ms) in enumerate(zip(family.windows, family.tiles, strict=True)):
            rows = entity.rows[slot + level]
            if not rows:
                continue
            edge, step, at = (now - window) // tile_ms, self._size[slot + level] + 4, 0
            while at < len(rows) and (tile := NUMBER.unpack_from(rows, at)[0]) <= edge:
                entity.forget(self._prefix[slot + level] + NUMBER.pack(tile))
                self._put(entity, i, level, tile, int.from_bytes(rows[at + 4 : at + step], "little"), now)
                at += step
            if at:
                del rows[:at]

    def ripen(self, entity: Entity, now: int) -> None:
        """Count what waited for its time and has it now."""
        if not entity.future or entity.future[0][0] > now:
            return
        entity.begun += 1
        ripe = []
        while entity.future and entity.future[0][0] <= now:
            ripe.append(heappop(entity.future))
        for ts, i, delta in ripe:
            self.add(entity, ts, [(i, delta)], now)
        entity.stirred = True
        entity.ended += 1

    def values(self, entity: Entity, at: int, names: frozenset[str] | None = None) -> Values:
        """All features as of `at`, or those of `names` and maybe more: events with a time in (at - window, at], the older edge
        rounded up to a whole tile."""
        reading = self._reading if names is None else self._part_of(names)
        return reading.values_and_due(entity, at, 0)[0]

    def _part(self, names: frozenset[str]) -> Reading:
        asked = names.union(*(feature.of or () for feature in self.features if feature.name in names))
        some = [feature for feature in self.features if feature.name in asked]
        return self._reading.part(some) if some else self._reading

    def values_and_due(self, entity: Entity, at: int, spacing_ms: int) -> tuple[Values, int | None]:
        """The values of `at`, and when they should be looked at again; see Reading."""
        return self._reading.values_and_due(entity, at, spacing_ms)

    # ------------------------------------------------------------------------------------------ the store's form

    def dump(self, entity: Entity, key: str, now: int) -> list[list[Any]]:
        """The commands that bring the store up to this entity: only the rows that changed, and the position with them."""
        words: list[Any] = [self._position, entity.position]
        tiles, values = entity.tiles, entity.values
        for i, group, prefix, mask, size in self._rows_of(entity.touched):
            words += prefix + NUMBER.pack(tiles[group]), (values[i] & mask).to_bytes(size, "little")
        entity.touched = 0
        if entity.changed:
            for slot, tile in dict.fromkeys(entity.changed):
                raw = self._row(entity, slot, tile)
                if raw is not None:
                    words += self._prefix[slot] + NUMBER.pack(tile), raw
            entity.changed = []
        if entity.stirred and not entity.future:
            entity.forget(self._future)
        elif entity.stirred:
            words += self._future, msgspec.msgpack.encode(self._waiting(entity))
        entity.stirred = False
        commands = []
        if entity.gone:
            commands += [["HDEL", key, *some] for some in _pieces(list(dict.fromkeys(entity.gone)))]
            entity.gone = []
        commands += [["HSET", key, *some] for some in _pieces(words)]
        if entity.expires < now + self.horizon_ms:
            entity.expires = now + self.horizon_ms + _EXPIRY_SLACK_MS
            commands.append(["PEXPIREAT", key, entity.expires])
        return commands

    def _waiting(self, entity: Entity) -> list[tuple[int, bytes, bytes]]:
        """What is stamped ahead, as it is stored: event time, family's id, and what it adds."""
        found = []
        for ts, i, delta in entity.future:
            _, mask, size, _ = self._newest(i)
            found.append((ts, self.families[i].id, (delta & mask).to_bytes(size, "little")))
        return found

    def _newest(self, i: int) -> tuple[int, int, int, int]:
        """Of a family's newest tile the slot, mask and bytes, and the window (ms) of its level."""
        slot = self._first[i]
        return slot, self._mask[slot], self._size[slot], self.families[i].windows[0]

    def _touched_rows(self, touched: int) -> list[tuple[int, int, bytes, int, int]]:
        """The families of these bits: index, group, and of the newest tile its field without the number, mask and bytes."""
        found = []
        for i, group in enumerate(self.layout.group):
            if touched >> i & 1:
                slot, mask, size, _ = self._newest(i)
                found.append((i, group, self._prefix[slot], mask, size))
        return found

    def _row(self, entity: Entity, slot: int, tile: int) -> bytes | None:
        """The state of a row, None where it has been handed up since."""
        rows, step = entity.rows[slot] or b"", self._size[slot] + 4
        at = _place(rows, step, tile)
        there = at < len(rows) and NUMBER.unpack_from(rows, at)[0] == tile
        return bytes(rows[at + 4 : at + step]) if there else None

    def load(self, flat: Mapping[bytes, bytes]) -> Entity:
        """An entity from its hash in the store; fields that nobody reads any more are marked to be deleted."""
        entity = self.new()
        entity.position = int(flat.get(self._position, 0))
        if self.filled is not None:  # an entity that only the other fold knew has only its position
            entity.position = max(entity.position, int(flat.get(POSITION + self.filled, 0)))
        found: dict[int, list[tuple[int, bytes]]] = {}
        for field, value in flat.items():
            if len(field) == _FIELD:
                slot = self._by_prefix.get(field[:4])
                if slot is not None:
                    found.setdefault(slot, []).append((NUMBER.unpack_from(field, 4)[0], value))
                elif self.kept is not None and field[:3] not in self.kept:
                    entity.forget(field)
            elif field == self._future or (field.startswith(FUTURE) and self.kept == frozenset()):
                self._load_future(entity, value)
                if field != self._future:
                    entity.forget(field)
                    entity.stirred = True
            elif field != self._position and self.kept == frozenset():
                entity.forget(field)
        newest = entity.tiles
        for slot, rows in found.items():
            rows.sort()
            i, level = self._slots[slot]
            if level == 0:
                newest[self.layout.group[i]] = max(newest[self.layout.group[i]], rows[-1][0])
        for slot, rows in found.items():
            i, level = self._slots[slot]
            if level == 0 and rows[-1][0] == newest[self.layout.group[i]]:
                entity.values[i] = int.from_bytes(rows.pop()[1], "little")
            if rows:
                entity.rows[slot] = bytearray(b"".join([NUMBER.pack(tile) + state for tile, state in rows]))
        return entity

    def _load_future(self, entity: Entity, raw: bytes) -> None:
        for ts, family_id, state in msgspec.msgpack.decode(raw):
            if family_id in self._by_id:
                entity.wait(ts, self._by_id[family_id], int.from_bytes(state, "little"))


def _place(rows: bytes | bytearray, step: int, tile: int) -> int:
    """The offset of a tile's row, or of where it belongs. Most come last."""
    last = len(rows) - step
    if last < 0 or NUMBER.unpack_from(rows, last)[0] < tile:
        return last + step
    return step * bisect_left(range(last // step), tile, key=lambda row: NUMBER.unpack_from(rows, row * step)[0])


def _pieces(words: list[Any]) -> list[list[Any]]:
    return [words] if len(words) <= _WORDS else [words[at : at + _WORDS] for at in range(0, len(words), _WORDS)]
