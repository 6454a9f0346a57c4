"""Fraud: an online logistic regression over what is usual for the payer and for all, and over what was reported of payer and payee
lately, fed by late labels.

Until it has seen enough reported frauds it is warming up: the score is then only how far the amount lies from the
payer's habit.
"""

from __future__ import annotations

import math

import msgspec

VERSION = "logistic-1"
HABIT_VERSION = "habit-1"
_DEVIATION, _BESIDE_ALL = "deviation from habit", "amount beside all payments"
# The inputs in their order; those of one name tell the same in steps, since what is far off says more than in proportion.
NAMES = (
    "amount",
    "amount over habit",
    *[_DEVIATION] * 4,
    *[_BESIDE_ALL] * 4,
    "payments before",
    "time since the last",
    "payee's fraud rate",
    "payer's fraud rate",
    "0 to 6 h UTC",
)
_FIRST = {name: NAMES.index(name) for name in NAMES}  # the plain one
_DEVIATES = _FIRST[_DEVIATION]
LABELS_NEEDED = 20  # reported frauds before the model is trusted over the habit rule
PRESUMED_PER_FRAUD = 8  # recent payments taken as legitimate for each reported fraud: nobody reports those
HALF_LIFE_MS = 7 * 86_400_000  # of what is remembered of frauds: an account is taken over for days, not for ever
_RESERVOIR = 512
_RATE = 0.3
_FEW = 3.0  # payments by which a fraud rate is held back


class Record(msgspec.Struct, gc=False):
    """Of a payer or payee the payments of late and how many of them were reported as fraud, both fading; `at` epoch ms."""

    count: float = 0.0
    frauds: float = 0.0
    at: float = 0.0

    def fade(self, ts: int) -> None:
        if ts > self.at:
            left = 2.0 ** ((self.at - ts) / HALF_LIFE_MS)
            self.count, self.frauds, self.at = self.count * left, self.frauds * left, float(ts)

    def rate(self, ts: int) -> float:
        left = 2.0 ** (min(0.0, self.at - ts) / HALF_LIFE_MS)
        return self.frauds * left / (self.count * left + _FEW)


class Payee(Record, gc=False):
    """A payee's record."""


class Amounts(msgspec.Struct, gc=False):
    """Some payments' amounts: how many, mean and sum of squared deviations of log(1 + amount)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def add(self, level: float) -> None:
        self.count += 1
        delta = level - self.mean
        self.mean += delta / self.count
        self.m2 += delta * (level - self.mean)

    def deviation(self, level: float) -> float:
        """In standard deviations, bounded; 0 without any payment."""
        if self.count <= 0:
            return 0.0
        spread = math.sqrt(self.m2 / self.count) if self.count > 1 else 1.0
        return max(-5.0, min(10.0, (level - self.mean) / max(spread, 0.25)))


class Habit(Amounts, gc=False):
    """A payer's habit, with the time of the latest payment (epoch ms) and what was reported of the payer."""

    last: float = 0.0
    record: Record = msgspec.field(default_factory=Record)


class Fraud(msgspec.Struct):
    """The model's whole state; small, so that it is committed as one value."""

    weights: list[float] = msgspec.field(default_factory=lambda: [0.0] * (len(NAMES) + 1))
    squares: list[float] = msgspec.field(default_factory=lambda: [1e-3] * (len(NAMES) + 1))
    frauds: int = 0
    legitimate: int = 0
    scored: int = 0
    recent: list[list[float]] = []
    amounts: Amounts = msgspec.field(default_factory=Amounts)  # of all payments
    version: str = VERSION

    @property
    def ready(self) -> bool:
        return self.frauds >= LABELS_NEEDED

    @property
    def scores_as(self) -> str:
        """The version that its scores are given under: while it warms up, that of the rule in its place."""
        return self.version if self.ready else HABIT_VERSION

    def score(self, x: list[float]) -> float:
        """0 to 1, a rank and no probability: comparable among payments scored by the same version."""
        if not self.ready:
            return 1.0 - math.exp(-max(0.0, x[_DEVIATES]) / 2.0)
        return _sigmoid(self._linear(x))

    def reasons(self, x: list[float]) -> list[str]:
        """The inputs that raised the score most, strongest first."""
        if not self.ready:
            deviation = x[_DEVIATES]
            return [f"{_DEVIATION} {deviation:.2g}"] if deviation > 0.5 else []
        shares: dict[str, float] = {}
        for name, weight, value in zip(NAMES, self.weights[1:], x, strict=True):
            shares[name] = shares.get(name, 0.0) + weight * value
        strongest = sorted(shares.items(), key=lambda share: -share[1])[:3]
        return [f"{name} {x[_FIRST[name]]:.2g}" for name, share in strongest if share > 0.1]

    def seen(self, x: list[float]) -> None:
        """Remember a payment among the recent ones, which stand for the legitimate."""
        self.scored += 1
        if len(self.recent) < _RESERVOIR:
            self.recent.append(x)
        else:
            self.recent[self.scored * 2654435761 % _RESERVOIR] = x

    def learn(self, x: list[float], is_fraud: bool) -> None:
        """One label. A fraud is learned beside recent payments that nobody reported."""
        self._step(x, float(is_fraud))
        if is_fraud:
            self.frauds += 1
            for i in range(min(PRESUMED_PER_FRAUD, len(self.recent))):
                self._step(self.recent[(self.frauds * PRESUMED_PER_FRAUD + i) % len(self.recent)], 0.0)
        else:
            self.legitimate += 1

    def unlearn(self, was_fraud: bool) -> None:
        """A label was replaced by another: it counts no longer."""
        if was_fraud:
            self.frauds = max(0, self.frauds - 1)
        else:
            self.legitimate = max(0, self.legitimate - 1)

    def _linear(self, x: list[float]) -> float:
        return self.weights[0] + sum(w * v for w, v in zip(self.weights[1:], x, strict=True))

    def _step(self, x: list[float], y: float) -> None:
        error = _sigmoid(self._linear(x)) - y
        for i, value in enumerate([1.0, *x]):
            gradient = error * value
            self.squares[i] += gradient * gradient
            self.weights[i] -= _RATE * gradient / math.sqrt(self.squares[i])


def inputs(amount: float, ts: int, habit: Habit, payee: Payee, amounts: Amounts) -> list[float]:
    """The model's inputs, known at the payment's time: amounts in the payer's currency, `ts` in epoch ms, `amounts` of all."""
    level = math.log1p(max(0.0, amount))
    deviation, beside_all = habit.deviation(level), amounts.deviation(level)
    gap_s = max(0.0, ts - habit.last) / 1000 if habit.count else 7 * 86_400
    return [
        level / 5.0,
        level - habit.mean if habit.count else 0.0,
        deviation,
        max(0.0, deviation - 1.0),
        max(0.0, deviation - 2.0),
        max(0.0, deviation - 3.0),
        beside_all,
        max(0.0, beside_all - 1.0),
        max(0.0, beside_all - 1.5),
        max(0.0, beside_all - 2.0),
        math.log1p(habit.count) / 5.0,
        math.log1p(gap_s) / 12.0,
        math.sqrt(payee.rate(ts)),
        math.sqrt(habit.record.rate(ts)),
        1.0 if ts // 3_600_000 % 24 < 6 else 0.0,
    ]


def paid(amount: float, ts: int, habit: Habit, payee: Payee, amounts: Amounts) -> None:
    """Enter a payment, once its inputs are taken."""
    level = math.log1p(max(0.0, amount))
    habit.add(level)
    habit.last = max(habit.last, float(ts))
    amounts.add(level)
    for record in (payee, habit.record):
        record.fade(ts)
        record.count += 1


def reported(ts: int, habit: Habit, payee: Payee, times: int = 1) -> None:
    """Enter that a payment was reported as fraud at a time; -1 takes a report back."""
    for record in (payee, habit.record):
        record.fade(ts)
        record.frauds = max(0.0, record.frauds + times)


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-35.0, min(35.0, z))))
