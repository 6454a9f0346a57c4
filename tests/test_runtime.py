"""The runtime's own upkeep."""

from __future__ import annotations

import gc
import weakref

import pytest

from pipeline.errors import PartnerUnreachable
from pipeline.runtime import Runtime, tidy_memory
from tests.helpers import until


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
        assert collected == [0, 0 if busy else 1]
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
        gc.enable()


class Cycle:
    def __init__(self) -> None:
        self.myself = self


@pytest.mark.parametrize("busy", [False, True])
def test_a_cycle_that_died_young_is_collected_and_not_frozen(busy: bool) -> None:
    gc.disable()
    try:
        kept = [[n] for n in range(100)]
        gc.collect(0)
        left = weakref.ref(Cycle())
        tidy_memory(busy)
        assert left() is None
        assert kept
    finally:
        gc.unfreeze()
        gc.enable()


def test_what_failed_in_the_bridge_is_gone_without_the_cycle_collector(nexus: Runtime) -> None:
    async def fails() -> None:
        raise PartnerUnreachable("gone")

    gc.disable()
    try:
        with pytest.raises(PartnerUnreachable) as caught:
            nexus.in_bridge(fails())
        left = weakref.ref(caught.value)
        del caught
        until(lambda: left() is None)
    finally:
        gc.enable()
