"""Counts that a stream has in memory and the store adds up: how a reader finds each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pipeline import keys
from pipeline.store import Store, as_hash

T = TypeVar("T")


@dataclass(slots=True)
class _Part(Generic[T]):
    counts: T
    first: int | None = None  # the ordinal of the first event that was counted


class Unwritten(Generic[T]):
    """Counts since the latest checkpoint, and those that the checkpoint under way writes. Any thread may ask for them.

    From the commit until the stream hears of it, the store has the latter too. The stream's position tells, which moves in
    the same step, whoever moves it: what was counted from before it on is in the store. So who asks takes the counts first, and
    then reads the store.
    """

    def __init__(self, empty: Callable[[], T]) -> None:
        self._empty = empty
        # Replaced as a whole: whoever looks at it finds each part once.
        self._parts: tuple[_Part[T], ...] = (_Part(empty()),)

    def count_from(self, ordinal: int) -> T:
        """Where to count events, of which the first has this ordinal."""
        part = self._parts[-1]
        if part.first is None:
            part.first = ordinal
        return part.counts

    def cut(self) -> T:
        """What the checkpoint that begins now writes."""
        part = self._parts[-1]
        self._parts = (part, _Part(self._empty()))
        return part.counts

    def written(self) -> None:
        """The checkpoint has succeeded."""
        self._parts = self._parts[-1:]

    def parts(self) -> list[tuple[int, T]]:
        """(first ordinal, counts): not in the store as long as the position there is not beyond that ordinal."""
        return [(part.first, part.counts) for part in self._parts if part.first is not None]


def stored(store: Store, stream: str, hashes: Sequence[str]) -> tuple[int, list[Iterable[tuple[bytes, bytes]]]]:
    """A stream's position, as an ordinal, and what hashes that the stream adds to held at it, as (field, value)."""
    commands = [("HGET", keys.CHECKPOINT + stream, "ordinal"), *[("HGETALL", name) for name in hashes]]
    ordinal, *held = store.many(commands, atomic=True)
    return int(ordinal or 0), [as_hash(flat).items() for flat in held]
