"""The labelled history: payments of the past with the score they were given and the label that came since.

Bounded whatever the history: at most MAX_LABELS labels, the latest, and of each day some SAMPLE payments that nobody
reported, the same ones each time. These count as legitimate, also where a report may yet come.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pipeline import keys
from pipeline.models.fraud import NAMES
from pipeline.models.training import Example
from pipeline.store import Store
from pipeline.streams.inference import DAY_MS, Score, days_kept, find_scores

MAX_LABELS = 50_000
SAMPLE = 10_000  # payments a day, for a verdict
_CHUNK = 1_000
_decode = msgspec.msgpack.Decoder(Score).decode


def examples(store: Store, now: int, days: int, sample: int = SAMPLE) -> list[Example]:
    """What is known of the payments that arrived within `days` days before `now` (epoch ms), with `sample` payments of
    each day that nobody reported. Raises StoreError."""
    kept = days_kept(store, now, days)
    labels = _labels(store, kept)
    found = [
        Example(transaction, score.scored_at, score.inputs, label, score.score, score.version, known_at=known_at)
        for transaction, score in _scores(store, list(labels), now, days)
        for label, known_at in [labels[transaction]]
        if score.scored_at >= now - days * DAY_MS
    ]
    for day in kept:
        key = f"{keys.SCORES}{day}"
        # By the store's hash of the transaction: the same payments each time, whatever else has come since, and no more work for more.
        _, flat = store.call("HSCAN", key, 0, "COUNT", sample)
        rows = [(raw.decode(), _decode(packed)) for raw, packed in _pairs(flat)]
        unreported = [(t, s) for t, s in rows if t not in labels and s.scored_at >= now - days * DAY_MS]
        share = (
            int(store.call("HLEN", key)) / len(rows) if rows else 0.0
        )  # how many payments one of the sample stands for
        found += [Example(t, s.scored_at, s.inputs, 0, s.score, s.version, share, presumed=True) for t, s in unreported]
    return [example for example in found if len(example.x) == len(NAMES)]  # scored by another version's inputs: no use


def _labels(store: Store, kept: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Of each transaction its latest label, and when that was surely known (epoch ms): at the end of the day on which it came."""
    found: dict[str, tuple[int, int]] = {}
    for day in kept:
        if len(found) >= MAX_LABELS:
            break
        for raw, label in _pairs(store.call("HGETALL", f"{keys.LABELS}{day}")):
            found.setdefault(raw.decode(), (int(label), (day + 1) * DAY_MS))
    return found


def _scores(store: Store, transactions: Sequence[str], now: int, days: int) -> list[tuple[str, Score]]:
    found: list[tuple[str, Score]] = []
    for at in range(0, len(transactions), _CHUNK):
        chunk = list(transactions[at : at + _CHUNK])
        found += [(t, s) for t, s in zip(chunk, find_scores(store, chunk, now, days), strict=True) if s is not None]
    return found


def _pairs(flat: object) -> list[tuple[bytes, bytes]]:
    """Field and value, whether the client has paired them already or not."""
    if isinstance(flat, dict):
        return list(flat.items())
    assert isinstance(flat, list)
    if flat and isinstance(flat[0], list | tuple):
        return [(field, value) for field, value in flat]
    return list(zip(flat[::2], flat[1::2], strict=True))
