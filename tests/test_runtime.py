"""The runtime's own upkeep."""

from __future__ import annotations

import gc

import pytest

from pipeline.runtime import tidy_memory


@pytest.mark.parametrize("busy", [False, True])
def test_memory_is_frozen_where_it_has_grown_and_collected_before_unless_events_come_in(busy: bool) -> None:
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append(info["generation"])

    gc.disable()
    try:
        gc.collect(1)
        gc.callbacks.append(note)
        frozen = gc.get_freeze_count()
        tidy_memory(busy=False)
        assert (collected, gc.get_freeze_count()) == ([], frozen)
        kept = [[n] for n in range(100)]
        gc.collect(0)  # as comes due by itself once enough was made
        tidy_memory(busy)
        assert collected == ([0] if busy else [0, 1])
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
        gc.enable()
