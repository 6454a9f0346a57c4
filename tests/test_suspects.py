"""Who is to blame for calls that fail: an event that fails while others are taken, or the partner. As pure logic."""

from __future__ import annotations

import random

import pytest

from pipeline.bridge import suspects
from pipeline.bridge.suspects import HOLD_S, MAX_ATTEMPTS, MAX_REFUSALS, MOST_PATIENCE_S, PROOFS, Jury, Suspect

LONG = 10 * HOLD_S


def failures_until_condemned(jury: Jury, suspect: Suspect, between: list[bool], most: int = 100) -> int | None:
    """How often it has to fail while between two failures others are taken (True) or fail (False)."""
    for times in range(1, most):
        if jury.condemns(suspect, 0.0, healthy=True):
            return times
        for taken in between:
            if taken:
                jury.took()
            else:
                jury.failed += 1
    return None


def test_an_event_that_fails_while_others_are_taken_is_to_blame():
    assert failures_until_condemned(Jury(), Suspect(0, 0.0), [True]) == PROOFS + 1
    assert failures_until_condemned(Jury(), Suspect(0, 0.0), [True, False, True]) == PROOFS + 1


@pytest.mark.parametrize("between", [[], [False], [True, False], [True, False, False]])
def test_where_no_more_is_taken_than_fails_it_is_the_partner(between):
    assert failures_until_condemned(Jury(), Suspect(0, 0.0), between) is None


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_partner_that_fails_at_random_gets_hardly_any_event_condemned(share):
    chance, condemned = random.Random(7), 0
    for _ in range(2_000):
        jury, suspect = Jury(), Suspect(0, 0.0)
        while chance.random() < share:
            if jury.condemns(suspect, 0.0, healthy=True):
                condemned += 1
                break
            for _ in range(chance.randrange(1, 4)):  # calls of other lanes
                if chance.random() < share:
                    jury.failed += 1
                else:
                    jury.took()
    assert condemned <= 4


def test_another_event_is_tried_in_its_stead_after_some_failures_unless_one_is_taken_anyway():
    jury, suspect = Jury(), Suspect(0, 0.0)
    for _ in range(MAX_ATTEMPTS - 1):
        jury.condemns(suspect, 0.0, healthy=True)
        assert not jury.wants_another(suspect)
    jury.condemns(suspect, 0.0, healthy=True)
    assert jury.wants_another(suspect)
    jury.took()
    assert not jury.wants_another(suspect)


def test_unproven_an_event_is_given_up_after_a_long_time_the_next_one_after_a_longer_and_only_where_health_is_good():
    jury = Jury()
    assert not jury.condemns(Suspect(0, 0.0), HOLD_S - 1, healthy=True)
    assert not jury.condemns(Suspect(0, 0.0), LONG, healthy=False)
    assert jury.condemns(Suspect(0, 0.0), HOLD_S, healthy=True)
    assert not jury.condemns(Suspect(0, 0.0), 2 * HOLD_S - 1, healthy=True)
    assert jury.condemns(Suspect(0, 0.0), 2 * HOLD_S, healthy=True)
    jury.took()
    assert jury.condemns(Suspect(0, 0.0), HOLD_S, healthy=True)
    for _ in range(20):
        jury.condemns(Suspect(0, 0.0), 10.0**6, healthy=True)
    assert jury.condemns(Suspect(0, 0.0), suspects.MOST_HOLD_S, healthy=True)


def test_refusals_are_believed_until_too_many_follow_each_other():
    jury = Jury()
    assert [jury.believes_refusal() for _ in range(MAX_REFUSALS + 2)] == [True] * MAX_REFUSALS + [False] * 2
    jury.took()
    assert jury.believes_refusal()


def test_suspect_waits_as_long_as_the_one_that_was_taken_in_its_stead_had_waited_or_as_long_as_was_asked():
    suspect = Suspect(0, 0.0)
    suspect.waits(10.0, 0.0)
    suspect.another_taken(10.5)
    assert suspect.not_before == 11.0
    suspect.another_taken(10.8)  # it does not wait anew for each
    assert suspect.not_before == 11.0
    suspect.waits(11.0, 0.0)
    suspect.another_taken(11.1)
    assert suspect.not_before == 12.1  # longer each time, up to a limit
    suspect.waits(12.1, 0.0)
    suspect.another_taken(19.0)
    assert suspect.not_before == 19.0 + MOST_PATIENCE_S
    suspect.waits(20.0, 60.0)
    suspect.another_taken(21.0)
    assert suspect.not_before == 80.0


def test_so_many_users_whose_event_was_to_blame_are_remembered(monkeypatch):
    monkeypatch.setattr(suspects, "MOST_CONVICTED", 2)
    jury = Jury()
    for user in (b"a", b"b", b"c"):
        jury.convict(user, "http://one", 404)
    assert jury.convicted == {b"b": ("http://one", 404), b"c": ("http://one", 404)}
