"""Values that were read a moment ago, for who asks again: they are the same until an event comes or a tile leaves its window."""

from __future__ import annotations

from pipeline.features.reading import Values
from pipeline.features.tiles import Entity
from pipeline.windows import Windows

MOST = 5_000  # entities whose values are kept: some 3 KB each


class ReadLately:
    """Of the entities of one kind that are in memory."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._kept: dict[str, tuple[tuple[Entity, int, int, int, frozenset[str] | None], Values]] = {}

    def values(self, owner: str, entity: Entity, at: int, names: frozenset[str] | None = None) -> Values:
        """As Windows.values() gives them; not to be changed. `at` is epoch ms."""
        if entity.future:  # what waits there counts from its own moment on
            return self._windows.values(entity, at, names)
        # The ordinal moves with every event that is counted, the other number with all that changes places.
        state = (entity, entity.position, entity.ended, at // self._windows.grain_ms, names)
        kept = self._kept.get(owner)
        if kept is not None and kept[0] == state:
            return kept[1]
        values = self._windows.values(entity, at, names)
        if entity.begun == entity.ended == state[2]:
            if len(self._kept) >= MOST:
                self._kept.clear()
            self._kept[owner] = state, values
        return values
