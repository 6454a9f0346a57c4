"""The bridge's pause after a small window."""

from __future__ import annotations

import asyncio
import time

import pytest

from pipeline.bridge import linger
from pipeline.bridge.linger import LEAST_S, MOST_S, Linger
from pipeline.concurrency.precedence import Precedence

PATIENCE_S = 20.0


def rested(pause: Linger) -> None:
    """Fails where the rest goes on for longer than any pause ought to."""
    asyncio.run(asyncio.wait_for(pause.rest(), PATIENCE_S))


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linger, "LEAST_S", 10 * PATIENCE_S)


@pytest.mark.usefixtures("endless")
def test_nobody_rests_before_the_first_window_or_after_a_full_one():
    pause = Linger(Precedence())
    rested(pause)
    pause.cut(full=True)
    rested(pause)


@pytest.mark.usefixtures("endless")
def test_who_is_in_a_hurry_ends_the_rest_and_the_next_window_has_its_own():
    async def hurried_in_the_midst(pause: Linger) -> None:
        resting = asyncio.create_task(pause.rest())
        await asyncio.sleep(0)
        assert not resting.done()
        pause.hurry()
        await asyncio.wait_for(resting, PATIENCE_S)
        pause.cut(full=False)
        again = asyncio.create_task(pause.rest())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not again.done()
        again.cancel()

    pause = Linger(Precedence())
    pause.cut(full=False)
    asyncio.run(hurried_in_the_midst(pause))


def test_rest_after_a_small_window_ends_by_itself_and_not_at_once():
    async def rests(pause: Linger) -> None:
        resting = asyncio.create_task(pause.rest())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not resting.done()
        await asyncio.wait_for(resting, PATIENCE_S)

    pause = Linger(Precedence())
    pause.pause_s = 0.5
    pause.cut(full=False)
    asyncio.run(rests(pause))


def test_whoever_has_precedence_goes_before_the_next_window_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def rests(pause: Linger) -> None:
        resting = asyncio.create_task(pause.rest())
        await asyncio.sleep(3 * linger._GLANCE_S)
        assert not resting.done()
        precedence.__exit__(None, None, None)
        await asyncio.wait_for(resting, PATIENCE_S)

    precedence = Precedence()
    pause = Linger(precedence)
    with monkeypatch.context() as patched:
        patched.setattr(linger, "GIVE_WAY_S", 10 * PATIENCE_S)
        precedence.__enter__()
        asyncio.run(rests(pause))
    with precedence:
        rested(Linger(precedence))


@pytest.mark.parametrize(
    ("busy", "pause_s"), [(0.0, LEAST_S), (0.4, (LEAST_S + MOST_S) / 2), (0.8, MOST_S), (1.6, MOST_S)]
)
def test_pause_is_the_longer_the_busier_the_process_is(monkeypatch, busy, pause_s):
    clock, worked = 100.0, 10.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(time, "process_time", lambda: worked)
    pause = Linger(Precedence())
    clock, worked = clock + 2.0, worked + 2.0 * busy
    pause.look()
    assert pause.pause_s == pytest.approx(pause_s)
