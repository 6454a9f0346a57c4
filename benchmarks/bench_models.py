"""Models: how well they do on recorded data, each beside its baseline; nothing here depends on the machine's speed."""

from __future__ import annotations

import csv
import gzip
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import Options
from benchmarks.table import Row, missing
from pipeline.models import backtest, training
from pipeline.models.demand import HISTORY_S, STEP_S, WEEK_STEPS, forecast
from pipeline.models.fraud import HABIT_VERSION, Fraud, Habit, Payee, inputs, paid, reported
from pipeline.models.training import Example

TITLE = "Models: on recorded demand and payments, beside their baselines"
TAXI, PICKUPS, PAYMENTS = (
    "nyc_taxi_demand_2014-07_2015-01.csv",
    "uber_pickups_nyc_2014-04-01_07.csv.gz",
    "payments_2018-04-01_2018-06-10.csv.gz",
)
_AHEAD = backtest.AHEAD
_DAY_MS = 86_400_000
_LABEL_DELAY_MS = 7 * _DAY_MS
_TESTED_DAYS = 7
_CARDS = 100


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    for name, measure in ((TAXI, _taxi), (PICKUPS, _pickups), (PAYMENTS, _payments)):
        path = options.recorded / name
        rows += (
            measure(path, options) if path.exists() else [missing(name, "", "not in the folder that --recorded names")]
        )
    return rows


def _taxi(path: Path, options: Options) -> list[Row]:
    """The Numenta Anomaly Benchmark's series: passengers per half hour."""
    with path.open() as file:
        counts = [float(row["value"]) for row in csv.DictReader(file)]
    return _demand("taxi passengers in half a year", counts, HISTORY_S // STEP_S, options.pick(23, 1))


def _pickups(path: Path, options: Options) -> list[Row]:
    """One week alone: forecasts know days only."""
    with gzip.open(path, "rt") as file:
        steps = Counter(int(_epoch(row["pickup_at"])) // STEP_S for row in csv.DictReader(file))
    counts = [float(steps[step]) for step in range(min(steps), max(steps) + 1)]
    return _demand("pickups in one week", counts, WEEK_STEPS // 7 * 2, 1)


def _demand(name: str, counts: list[float], since: int, every: int) -> list[Row]:
    """At each of these steps the next five, from what was before; beside the value of a week, else a day, before."""
    season = WEEK_STEPS if since >= WEEK_STEPS else WEEK_STEPS // 7
    missed, naive, inside, origins = (
        np.zeros(_AHEAD),
        np.zeros(_AHEAD),
        np.zeros(_AHEAD),
        range(since, len(counts) - _AHEAD, every),
    )
    came = np.zeros(_AHEAD)
    for origin in origins:
        known = {step * STEP_S: counts[step] for step in range(max(0, origin - HISTORY_S // STEP_S), origin)}
        outcome = np.array(counts[origin : origin + _AHEAD])
        made = forecast(known, origin * STEP_S, _AHEAD)
        missed += np.abs(np.array([f.value for f in made]) - outcome)
        naive += np.abs(np.array(counts[origin - season : origin - season + _AHEAD]) - outcome)
        inside += [f.low <= value <= f.high for f, value in zip(made, outcome, strict=True)]
        came += outcome
    note = f"sum of misses over sum of outcomes, {len(origins):,} forecasts"
    before = "the week before" if season == WEEK_STEPS else "the day before"
    errors, others = 100 * missed / came, 100 * naive / came
    return [
        Row(f"{name}: error of the next half hour", errors[0], "%", note=note),
        Row(f"{name}: error of the fifth half hour", errors[-1], "%"),
        Row(f"{name}: error of all five", 100 * missed.sum() / came.sum(), "%"),
        Row(f"{name}: that of {before}, all five", float(others.mean()), "%"),
        Row(f"{name}: outcomes within the 80 % interval", 100 * float(inside.mean()) / len(origins), "%"),
    ]


class Payment(NamedTuple):
    transaction: str
    at: int
    payer: str
    payee: str
    amount: float
    is_fraud: bool


def _payments(path: Path, options: Options) -> list[Row]:
    """The Fraud Detection Handbook's evaluation: what is known of a label a week after its payment, judged on the last week, without
    payers who were known as compromised by then."""
    payments = list(_read(path))
    last = payments[-1].at // _DAY_MS + 1
    tested, trained = (last - _TESTED_DAYS) * _DAY_MS, (last - 2 * _TESTED_DAYS) * _DAY_MS
    examples = list(_scored(payments))
    compromised = {p.payer for p in payments if p.is_fraud and p.at + _LABEL_DELAY_MS < tested}
    chosen = [(p, e) for p, e in zip(payments, examples, strict=True) if p.at >= tested and p.payer not in compromised]
    held_out = [e for _, e in chosen]
    retrained = training.fit([e for e in examples if e.at < trained])
    rows: list[Row] = []
    for name, scores in (
        ("as scored on arrival", training.served(held_out)),
        ("as trained anew a week before", training.scores(retrained, held_out)),
        (f"the rule {HABIT_VERSION}", training.habit(held_out)),
    ):
        measured = training.measure(scores, held_out)
        note = f"{measured['payments']:,} payments, {measured['frauds']} frauds" if not rows else ""
        rows += [
            Row(f"fraud, {name}: average precision", measured["average_precision"], "", note=note),
            Row(f"fraud, {name}: area under the ROC curve", measured["auc"], ""),
            Row(
                f"fraud, {name}: card precision at {_CARDS}",
                _card_precision([p for p, _ in chosen], scores.tolist()),
                "",
            ),
        ]
    return rows


def _read(path: Path) -> Iterator[Payment]:
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            at = int(_epoch(row["timestamp"]) * 1000)
            yield Payment(
                row["transaction_id"],
                at,
                row["customer_id"],
                row["terminal_id"],
                float(row["amount"]),
                row["is_fraud"] == "1",
            )


def _scored(payments: list[Payment]) -> Iterator[Example]:
    """Each payment as the inference stream scores it, frauds being reported a week later."""
    model, reports = Fraud(), deque[tuple[Payment, list[float]]]()
    habits: defaultdict[str, Habit] = defaultdict(Habit)
    payees: defaultdict[str, Payee] = defaultdict(Payee)
    for payment in payments:
        while reports and reports[0][0].at + _LABEL_DELAY_MS <= payment.at:
            of, seen = reports.popleft()
            model.learn(seen, True)
            reported(payment.at, habits[of.payer], payees[of.payee])
        habit, payee = habits[payment.payer], payees[payment.payee]
        x = inputs(payment.amount, payment.at, habit, payee, model.amounts)
        yield Example(payment.transaction, payment.at, x, int(payment.is_fraud), model.score(x), model.scores_as)
        model.seen(x)
        paid(payment.amount, payment.at, habit, payee, model.amounts)
        if payment.is_fraud:
            reports.append((payment, x))


def _card_precision(payments: list[Payment], scores: list[float]) -> float:
    """Of each day's hundred payers with the highest scores the share who were defrauded that day, the mean of days. Whoever was found
    on one day is not asked about on the next."""
    days: defaultdict[int, dict[str, tuple[float, bool]]] = defaultdict(dict)
    for payment, score in zip(payments, scores, strict=True):
        before = days[payment.at // _DAY_MS].get(payment.payer, (0.0, False))
        days[payment.at // _DAY_MS][payment.payer] = max(before[0], score), before[1] or payment.is_fraud
    found: set[str] = set()
    shares = []
    for day in sorted(days):
        ranked = sorted(
            ((score, payer) for payer, (score, _) in days[day].items() if payer not in found), reverse=True
        )[:_CARDS]
        hits = {payer for _, payer in ranked if days[day][payer][1]}
        found |= hits
        shares.append(len(hits) / _CARDS)
    return sum(shares) / len(shares)


def _epoch(text: str) -> float:
    at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
