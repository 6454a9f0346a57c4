"""The model-based test: arbitrary orders of steps against a brute-force model, which finds each bug that is planted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pipeline import checkpoints
from pipeline.log import Log
from pipeline.store import Command, Store
from pipeline.streams.storage import Storage
from pipeline.streams.stream import Batch, Outcome
from pipeline.windows import Windows
from tests.model import Machine

Plant = Callable[[Store, pytest.MonkeyPatch], None]
QUIET = list(HealthCheck)


def check(store: Store, examples: int, steps: int, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    machine = type("Machine", (Machine,), {"store": store})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=QUIET,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_whatever_happens_in_whatever_order_each_event_takes_effect_once(store: Store) -> None:
    check(store, examples=50, steps=25)


def rewrite(store: Store, script: str, old: str, new: str) -> None:
    """Change a script of this connection."""
    assert old in store._sources[script]
    store._sources[script] = store._sources[script].replace(old, new)
    store._shas[script] = hashlib.sha1(store._sources[script].encode()).hexdigest()


def skip_an_event(store: Store, patch: pytest.MonkeyPatch) -> None:
    process = Storage.process

    def skipping(self: Storage, batch: Batch, now: int) -> Outcome:
        outcome = process(self, batch, now)
        rows = next(iter(self._pending.values()), None)
        if rows:
            rows.pop()
            outcome.done -= 1
        return outcome

    patch.setattr(Storage, "process", skipping)


def commit_effects_without_the_position(store: Store, patch: pytest.MonkeyPatch) -> None:
    advance = checkpoints.advance

    def without_position(progress: checkpoints.Progress, now: int) -> list[Command]:
        return [c for c in advance(progress, now) if c[0] != "HSET" or "segment" not in c]

    patch.setattr(checkpoints, "advance", without_position)


def commit_the_position_without_effects(store: Store, patch: pytest.MonkeyPatch) -> None:
    cut = Storage.cut

    def forgetful(self: Storage, now: int) -> object:
        made = cut(self, now)
        made.final.clear()
        return made

    patch.setattr(Storage, "cut", forgetful)


def ignore_the_epoch(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(store, "commit", "~= ARGV[1]", "== 'nobody'")


def forget_duplicates(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(
        store,
        "accept",
        "redis.call('HSETNX', bucket_of(digest), digest, string.format('%.0f', base + #records)) == 1",
        "true",
    )


def trim_past_the_slowest(store: Store, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Log, "_trimmable", lambda self, segment: self.head().segment > segment)
    rewrite(store, "trim", "then return 0 end\nend", "then end\nend")


def forget_how_far_a_user_is(store: Store, patch: pytest.MonkeyPatch) -> None:
    load = Windows.load

    def from_zero(self: Windows, flat: object) -> object:
        entity = load(self, flat)  # type: ignore[arg-type]
        entity.position = 0
        return entity

    patch.setattr(Windows, "load", from_zero)


def redrive_twice(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(store, "redrive", "if was_dead == 1 then", "if true then")


def keep_the_epoch_when_taking_over(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(store, "lease", "math.max(epoch + 1, now)", "math.max(epoch, 1)")


@pytest.mark.parametrize(
    "plant",
    [
        skip_an_event,
        commit_effects_without_the_position,
        commit_the_position_without_effects,
        ignore_the_epoch,
        forget_duplicates,
        trim_past_the_slowest,
        forget_how_far_a_user_is,
        redrive_twice,
        keep_the_epoch_when_taking_over,
    ],
)
def test_a_planted_bug_is_found(store: Store, monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    plant(store, monkeypatch)

    with pytest.raises(AssertionError):
        check(store, examples=30, steps=25, phases=(Phase.generate,))
