"""The model-based test: arbitrary orders of steps against a brute-force model, which finds each bug that is planted.

NEXUS_EXAMPLES=1000 looks longer, and then a failure is shrunk to few steps too; that may take minutes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from pipeline.commit_log import checkpoints
from pipeline.store import Command, Store
from pipeline.streams.aggregates import Aggregates
from pipeline.streams.inference import Inference
from pipeline.streams.storage import ROW, Storage
from pipeline.streams.stream import Batch, Outcome
from pipeline.windows import Windows
from tests.machine import Machine

Plant = Callable[[Store, pytest.MonkeyPatch], None]
EXAMPLES = os.environ.get("NEXUS_EXAMPLES")


def check(store: Store, examples: int, shrink: bool = False) -> None:
    machine = type("Machine", (Machine,), {"store": store})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_whatever_happens_in_whatever_order_each_event_takes_effect_once(store: Store) -> None:
    check(store, int(EXAMPLES or 50), shrink=EXAMPLES is not None)


def rewrite(store: Store, script: str, old: str, new: str) -> None:
    """Change a script of this connection."""
    assert old in store._sources[script]
    store._sources[script] = store._sources[script].replace(old, new)
    store._shas[script] = hashlib.sha1(store._sources[script].encode()).hexdigest()


def skip_an_event(store: Store, patch: pytest.MonkeyPatch) -> None:
    process = Storage.process

    def skipping(self: Storage, batch: Batch, now: int) -> Outcome:
        outcome = process(self, batch, now)
        if self._pending:
            rows = self._pending.pop()
            self._pending.append(rows[: -ROW.itemsize])
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
        made.final = ()
        return made

    patch.setattr(Storage, "cut", forgetful)


def ignore_the_epoch(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(store, "commit", "~= ARGV[1]", "== 'nobody'")


def forget_duplicates(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(store, "accept", "if found[i] or taken[digest] then", "if false then")


def trim_past_the_slowest(store: Store, patch: pytest.MonkeyPatch) -> None:
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


def inference_forgets(store: Store, patch: pytest.MonkeyPatch) -> None:
    cut = Inference.cut

    def forgetful(self: Inference, now: int) -> object:
        if self._scores:
            self._scores.popitem()
        return cut(self, now)

    patch.setattr(Inference, "cut", forgetful)


def inference_scores_twice(store: Store, patch: pytest.MonkeyPatch) -> None:
    payment = Inference._payment

    def twice(self: Inference, *event: object) -> None:
        payment(self, *event)  # type: ignore[arg-type]
        payment(self, *event)  # type: ignore[arg-type]

    patch.setattr(Inference, "_payment", twice)


def canary_counts(store: Store, patch: pytest.MonkeyPatch) -> None:
    process = Aggregates.process

    def counting(self: Aggregates, batch: Batch, now: int) -> Outcome:
        batch.canary = False
        return process(self, batch, now)

    patch.setattr(Aggregates, "process", counting)


def canary_is_accepted(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(store, "accept", "if math.floor(to / CANARY) % 2 == 1 then return end", "")


def bridge_only_is_accepted_for_all(store: Store, patch: pytest.MonkeyPatch) -> None:
    rewrite(store, "accept", "if to == 16 then bridge_only", "if false then bridge_only")


@pytest.mark.parametrize(
    ("plant", "broken"),
    [
        (skip_an_event, Machine.accounts_are_whole),
        (commit_effects_without_the_position, Machine.accounts_are_whole),
        (commit_the_position_without_effects, Machine.each_event_is_stored_once),
        (ignore_the_epoch, Machine.only_the_owner_writes),
        (forget_duplicates, Machine.each_id_is_taken_once),
        (trim_past_the_slowest, Machine.nothing_is_trimmed_that_a_stream_has_yet_to_read),
        (forget_how_far_a_user_is, Machine.each_user_has_each_event_once),
        (redrive_twice, Machine.each_letter_is_sent_again_once),
        (keep_the_epoch_when_taking_over, Machine.only_the_owner_writes),
        (inference_forgets, Machine.each_payment_is_scored_once),
        (inference_scores_twice, Machine.each_payment_is_scored_once),
        (canary_counts, Machine.each_event_is_counted_once),
        (canary_is_accepted, Machine.accounts_are_whole),
        (bridge_only_is_accepted_for_all, Machine.accounts_are_whole),
    ],
)
def test_a_planted_bug_is_found_by_what_it_breaks(
    store: Store, monkeypatch: pytest.MonkeyPatch, plant: Plant, broken: Callable[..., object]
) -> None:
    plant(store, monkeypatch)

    with pytest.raises(AssertionError) as caught:
        check(store, examples=500)  # and no more than it takes to find it, twenty mostly
    assert broken.__name__ in [step.name for step in caught.traceback]
