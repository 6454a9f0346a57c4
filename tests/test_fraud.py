"""Fraud: what the model is told of a payment, and that it finds the frauds that habits alone do not show."""

from __future__ import annotations

import random

import pytest

from pipeline.models import training
from pipeline.models.fraud import HALF_LIFE_MS, NAMES, Amounts, Fraud, Habit, Payee, inputs, paid, reported
from pipeline.models.training import Example
from tests.helpers import DAY_MS, HOUR_MS, NOON

PAYEE_RATE, PAYER_RATE = NAMES.index("payee's fraud rate"), NAMES.index("payer's fraud rate")


def told(at: int, habit: Habit, payee: Payee, amount: float = 10.0) -> list[float]:
    return inputs(amount, at, habit, payee, Amounts())


def test_every_input_has_a_name_and_steps_of_one_name_begin_with_the_plain_one():
    x = inputs(1_000.0, NOON, Habit(count=9, mean=2.0, m2=0.9), Payee(), Amounts(count=9, mean=3.0, m2=9.0))
    assert len(x) == len(NAMES)
    assert x[NAMES.index("deviation from habit")] == 10.0  # bounded
    assert x[NAMES.index("amount beside all payments")] == pytest.approx(3.9, abs=0.1)


def test_what_was_reported_of_payee_and_payer_fades_whether_they_are_paid_or_not():
    habit, payee, amounts = Habit(), Payee(), Amounts()
    for i in range(10):
        paid(10.0, NOON + i, habit, payee, amounts)
    reported(NOON + 10, habit, payee)
    now, later = (told(NOON + 10 + wait, habit, payee) for wait in (0, 4 * HALF_LIFE_MS))
    assert now[PAYEE_RATE] == now[PAYER_RATE] == pytest.approx((1 / 13) ** 0.5, rel=1e-4)
    assert later[PAYEE_RATE] == later[PAYER_RATE] == pytest.approx((0.0625 / (0.625 + 3)) ** 0.5, rel=1e-4)
    payee.fade(NOON + 10 + 4 * HALF_LIFE_MS)
    assert told(NOON + 10 + 4 * HALF_LIFE_MS, habit, payee)[PAYEE_RATE] == pytest.approx(later[PAYEE_RATE])


def test_report_that_is_taken_back_leaves_nothing():
    habit, payee, amounts = Habit(), Payee(), Amounts()
    paid(10.0, NOON, habit, payee, amounts)
    reported(NOON, habit, payee)
    reported(NOON + HOUR_MS, habit, payee, -1)
    assert (payee.frauds, habit.record.frauds) == (0, 0)


def test_payment_out_of_order_is_told_nothing_of_times_to_come():
    habit, payee = Habit(), Payee()
    paid(10.0, NOON, habit, payee, Amounts())
    reported(NOON, habit, payee)
    assert told(NOON - DAY_MS, habit, payee)[PAYEE_RATE] == told(NOON, habit, payee)[PAYEE_RATE]


def test_frauds_of_payees_who_were_taken_over_are_found_by_late_labels_where_habits_show_nothing():
    """Of two hundred payees a few are taken over for two weeks each, and half of what they get is fraud of usual amounts."""
    chance = random.Random(4)
    habits, payees, amounts = [Habit() for _ in range(500)], [Payee() for _ in range(200)], Amounts()
    model, examples = Fraud(), list[Example]()
    waiting: list[tuple[int, tuple[int, int], list[float]]] = []
    for i in range(30_000):
        at = NOON + i * 60 * DAY_MS // 30_000
        while waiting and waiting[0][0] + 3 * DAY_MS <= at:
            _, of, x = waiting.pop(0)
            model.learn(x, True)
            reported(at, habits[of[0]], payees[of[1]])
        payer, payee = chance.randrange(500), chance.randrange(200)
        bad = (at // (14 * DAY_MS)) % 40 == payee % 40 and chance.random() < 0.5
        amount = chance.lognormvariate(3, 0.5)
        x = inputs(amount, at, habits[payer], payees[payee], amounts)
        examples.append(Example(str(i), at, x, int(bad), model.score(x), model.scores_as))
        model.seen(x)
        paid(amount, at, habits[payer], payees[payee], amounts)
        if bad:
            waiting.append((at, (payer, payee), x))
    late = examples[20_000:]
    ours, rule = (
        training.measure(given(late), late)["average_precision"] for given in (training.served, training.habit)
    )
    assert ours > 5 * rule


def test_reasons_name_each_kind_of_input_once_with_what_it_was():
    model = Fraud(weights=[0.0] + [1.0] * len(NAMES), frauds=50)
    x = inputs(5_000.0, NOON, Habit(count=9, mean=2.0, m2=0.9), Payee(count=1, frauds=1, at=NOON), Amounts(9, 3.0, 9.0))
    reasons = model.reasons(x)
    assert reasons[0] == "deviation from habit 10"
    assert len({reason.rsplit(" ", 1)[0] for reason in reasons}) == len(reasons) == 3
