"""Training the fraud model on labelled history, and judging versions: pure functions over examples, without a store.

Of the payments that nobody reported a sample is presumed legitimate. In judging, each of the sample stands for as many
payments as it was drawn from, so that the figures are those of the whole traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.models import fraud

HELD_OUT = 0.3  # of the reported frauds, the latest: what a version is judged on
TRAIN_FRAUDS, HELD_OUT_FRAUDS = 10, 5  # below these a verdict would be chance
_RIDGE = 1.0
_ROUNDS = 50
_RESAMPLED, _SURE = (
    50,
    0.9,
)  # times a verdict is taken on payments drawn anew, and the share of these that a better one is better in
_DIGITS = 6
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Example:
    """A payment of the past: its model inputs, label (1 fraud), the score it was given on arrival, the number of payments it stands
    for, and since when its label has been known; times in epoch ms."""

    transaction: str
    at: int
    x: list[float]
    y: int
    served: float
    version: str = fraud.VERSION
    weight: float = 1.0
    presumed: bool = False
    known_at: int = 0


def split(examples: Sequence[Example], version: str) -> tuple[list[Example], list[Example]] | None:
    """Training examples, with the labels that were known when the held-out ones begin; and these, all of them later, and scored by
    the version in force: two versions' scores have no common scale. None where there are too few frauds for a verdict."""
    frauds = sorted(e.at for e in examples if e.y)
    own = [e for e in examples if e.version == version]
    if len(frauds) < fraud.LABELS_NEEDED or not own:
        return None
    edge = max(min(e.at for e in own), frauds[min(len(frauds) - 1, round(len(frauds) * (1 - HELD_OUT)))])
    earlier, later = [e for e in examples if e.at < edge and e.known_at <= edge], [e for e in own if e.at >= edge]
    enough = sum(e.y for e in earlier) >= TRAIN_FRAUDS and sum(e.y for e in later) >= HELD_OUT_FRAUDS
    return (earlier, later) if enough and not all(e.y for e in earlier) and not all(e.y for e in later) else None


def fit(examples: Sequence[Example]) -> fraud.Fraud:
    """The logistic regression that fits the examples best, by Newton's method under a ridge. The presumed legitimate
    weigh as much beside the frauds as in online learning, which goes on from here."""
    x, y = _design(examples), np.array([e.y for e in examples], float)
    presumed = np.array([e.presumed for e in examples])
    weights = np.ones(len(examples))
    if presumed.any():
        weights[presumed] = fraud.PRESUMED_PER_FRAUD * max(1.0, y.sum()) / presumed.sum()
    ridge = np.diag([0.0] + [_RIDGE] * (x.shape[1] - 1)) + 1e-9 * np.eye(x.shape[1])
    w = np.zeros(x.shape[1])
    for _ in range(_ROUNDS):
        p = _sigmoid(x @ w)
        gradient = x.T @ (weights * (p - y)) + ridge @ w
        curvature = (x * (weights * p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(curvature, gradient)
        w -= step * min(1.0, 5.0 / (np.abs(step).max() + 1e-12))  # bounded: separable data would run away
        if np.abs(step).max() < 1e-8:
            break
    slopes = x * (_sigmoid(x @ w) - y)[:, None]
    squares = 1e-3 + (weights[:, None] * slopes**2).sum(axis=0)
    frauds, legitimate = int(y.sum()), int((1 - y)[~presumed].sum())
    return fraud.Fraud(weights=w.tolist(), squares=squares.tolist(), frauds=frauds, legitimate=legitimate)


def scores(model: fraud.Fraud, examples: Sequence[Example]) -> Array:
    """What a model would have said to the examples."""
    return np.array([model.score(e.x) for e in examples])


def served(examples: Sequence[Example]) -> Array:
    """What they were told on arrival, before their labels were known: the fair measure of what is in force."""
    return np.array([e.served for e in examples])


def habit(examples: Sequence[Example]) -> Array:
    """What the rule says that needs no labels: the baseline."""
    rule = fraud.Fraud()
    return np.array([rule.score(e.x) for e in examples])


def measure(given: Array, examples: Sequence[Example]) -> dict[str, Any]:
    """{"average_precision", "auc", "frauds", "payments"}; the first two null where one label is all there is."""
    y, weight = np.array([e.y for e in examples], float), np.array([e.weight for e in examples])
    found: dict[str, Any] = {
        "average_precision": None,
        "auc": None,
        "frauds": int(y.sum()),
        "payments": round(float(weight.sum())),
    }
    if not 0 < y.sum() < len(y):
        return found
    precision, auc = _ranked(given)(weight * y, weight * (1 - y))
    return {**found, "average_precision": round(precision, _DIGITS), "auc": round(auc, _DIGITS)}


def surely_better(candidate: Array, current: Array, examples: Sequence[Example]) -> tuple[bool, float]:
    """Whether a candidate's average precision is the greater one, and not by the chance of which payments were drawn: of as many
    sets drawn anew from the examples it is so in nearly all. And in what share of them."""
    y, weight = np.array([e.y for e in examples], float), np.array([e.weight for e in examples])
    ranked, chance = (_ranked(candidate), _ranked(current)), np.random.default_rng(0)

    def better(drawn: Array) -> bool:
        ours, theirs = (rank(drawn * y, drawn * (1 - y))[0] for rank in ranked)
        return ours > theirs

    drawn = (weight * chance.poisson(1.0, len(y)).astype(float) for _ in range(_RESAMPLED))
    share = sum(map(better, drawn)) / _RESAMPLED
    return better(weight) and share >= _SURE, share


def _ranked(given: Array) -> Callable[[Array, Array], tuple[float, float]]:
    """Of weights of frauds and of others, in the order of their scores: average precision, and area under the ROC curve."""
    # Thresholds are the distinct scores, highest first: payments of the same score are let in together.
    levels, inverse = np.unique(-given, return_inverse=True)

    def rank(frauds: Array, others: Array) -> tuple[float, float]:
        true, false = (np.bincount(inverse, weights, len(levels)) for weights in (frauds, others))
        trues, falses = true.cumsum(), false.cumsum()
        precision = trues / np.maximum(trues + falses, 1e-300)
        area = (false * (trues - true / 2)).sum() / max(trues[-1] * falses[-1], 1e-300)
        return float((true * precision).sum() / max(trues[-1], 1e-300)), float(area)

    return rank


def _design(examples: Sequence[Example]) -> Array:
    rows: Array = np.array([[1.0, *e.x] for e in examples], float)
    return rows


def _sigmoid(z: Array) -> Array:
    made: Array = 1.0 / (1.0 + np.exp(-np.clip(z, -35.0, 35.0)))
    return made
