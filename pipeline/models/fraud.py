"""Fraud: an online logistic regression over a payment's habits and its payee's record, fed by late labels.

Until it has seen enough reported frauds it is warming up: the score is then only how far the amount lies from the
payer's habit.
"""

from __future__ import annotations

import math

import msgspec

VERSION = "logistic-1"
HABIT_VERSION = "habit-1"
NAMES = (
    "amount",
    "amount over habit",
    "deviation from habit",
    "payments before",
    "time since the last",
    "payee's fraud rate",
    "0 to 6 h UTC",
)
LABELS_NEEDED = 20  # reported frauds before the model is trusted over the habit rule
PRESUMED_PER_FRAUD = 8  # recent payments taken as legitimate for each reported fraud: nobody reports those
_RESERVOIR = 512
_RATE = 0.3


class Habit(msgspec.Struct, gc=False):
    """A payer's habit: payments so far, mean and sum of squared deviations of log(1 + amount), time of the last
    (epoch ms)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    last: float = 0.0


class Payee(msgspec.Struct, gc=False):
    """A payee's record: payments received, and how many of them were reported as fraud."""

    count: float = 0.0
    frauds: float = 0.0


class Fraud(msgspec.Struct):
    """The model's whole state; small, so that it is committed as one value."""

    weights: list[float] = msgspec.field(default_factory=lambda: [0.0] * (len(NAMES) + 1))
    squares: list[float] = msgspec.field(default_factory=lambda: [1e-3] * (len(NAMES) + 1))
    frauds: int = 0
    legitimate: int = 0
    scored: int = 0
    recent: list[list[float]] = []
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
            return 1.0 - math.exp(-max(0.0, x[2]) / 2.0)
        return _sigmoid(self._linear(x))

    def reasons(self, x: list[float]) -> list[str]:
        """The inputs that raised the score most, strongest first."""
        if not self.ready:
            return [f"{NAMES[2]} {x[2]:.2g}"] if x[2] > 0.5 else []
        shares = sorted(((w * v, name, v) for w, v, name in zip(self.weights[1:], x, NAMES, strict=True)), reverse=True)
        return [f"{name} {value:.2g}" for share, name, value in shares[:3] if share > 0.1]

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


def inputs(amount: float, ts: int, habit: Habit, payee: Payee) -> list[float]:
    """The model's inputs, known at the payment's time: amounts in the payer's currency, `ts` in epoch ms."""
    level = math.log1p(max(0.0, amount))
    spread = math.sqrt(habit.m2 / habit.count) if habit.count > 1 else 1.0
    deviation = (level - habit.mean) / max(spread, 0.25) if habit.count > 0 else 0.0
    gap_s = max(0.0, ts - habit.last) / 1000 if habit.count else 7 * 86_400
    hour = ts // 3_600_000 % 24
    return [
        level / 5.0,
        level - habit.mean if habit.count else 0.0,
        max(-5.0, min(10.0, deviation)),
        math.log1p(habit.count) / 5.0,
        math.log1p(gap_s) / 12.0,
        math.sqrt(payee.frauds / (payee.count + 20.0)),
        1.0 if hour < 6 else 0.0,
    ]


def update_habit(habit: Habit, amount: float, ts: int) -> None:
    level = math.log1p(max(0.0, amount))
    habit.count += 1
    delta = level - habit.mean
    habit.mean += delta / habit.count
    habit.m2 += delta * (level - habit.mean)
    habit.last = max(habit.last, float(ts))


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-35.0, min(35.0, z))))
