"""Stream four: model inference. Each payment gets a fraud score, each ride request feeds the demand of its zone."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import msgspec

from pipeline import keys
from pipeline.commit_log.frames import Head
from pipeline.events import rfc3339
from pipeline.models import demand, fraud
from pipeline.store import Command, Store
from pipeline.streams.stream import Batch, Cut, Outcome, Stream
from pipeline.streams.unwritten import Unwritten

DAY_MS = 86_400_000
WEEK_S = 7 * 86_400  # of steps in one key
CITY = "city"
_FULL = 250  # payments: some three rows each, for which the store takes a few ms
_CACHED = 200_000
DAYS = 7  # of retention, where nothing else is set
VERSIONS_KEPT = 50
_LEARNED = 4_096
MAX_QUANTITY = 1e9

T = TypeVar("T", bound=msgspec.Struct)
_pack = msgspec.msgpack.Encoder().encode


class Score(msgspec.Struct, gc=False, array_like=True):
    """A payment's score as given on arrival, and what is needed to learn from its label. Times in epoch ms."""

    score: float
    version: str
    scored_at: int
    reasons: list[str]
    inputs: list[float]
    payee: str
    payer: str = ""


@dataclass(frozen=True, slots=True)
class Promoted:
    """A trained version that takes over. `known` are the transactions whose labels it has learned; `record` goes into
    the list of versions in the same step."""

    name: str
    model: fraud.Fraud | demand.Demand
    record: bytes
    known: frozenset[str] = field(default_factory=frozenset)


class _Late(NamedTuple):
    """A report of a payment that was not in memory, or that came after such a one; with the label that stood there before, and the
    payment that has come since."""

    transaction: str
    is_fraud: bool
    ts: int
    before: bytes | None
    score: Score | None


class Malformed(ValueError):
    """A payment, report or request lacks what the models need."""


class _Table(dict[str, T]):
    """Rows by id, read from the store when first needed."""

    def __init__(self, store: Store, prefix: str, row: type[T]) -> None:
        super().__init__()
        self._store, self._prefix, self._row = store, prefix, row
        self.dirty: set[str] = set()

    def load(self, ids: set[str]) -> None:
        absent = [i for i in ids if i not in self]
        if absent:
            for i, raw in zip(absent, self._store.call("MGET", *[self._prefix + i for i in absent]), strict=True):
                self[i] = msgspec.msgpack.decode(raw, type=self._row) if raw else self._row()

    def dump(self, kept_ms: int) -> list[Command]:
        commands: list[Command] = [("SET", self._prefix + i, _pack(self[i]), "PX", kept_ms) for i in self.dirty]
        self.dirty = set()
        return commands

    def evict(self) -> None:
        if len(self) > _CACHED:
            for i in [i for i in self if i not in self.dirty][: len(self) - _CACHED]:
                del self[i]


class Inference(Stream):
    """Scores, labels and counts since the last checkpoint, and the rows that scoring needs."""

    name = "inference"

    def __init__(self, store: Store, retention_ms: int = DAYS * DAY_MS) -> None:
        super().__init__(store)
        self._retention_ms, self._days = retention_ms, -(-retention_ms // DAY_MS)
        self._arrived = 0  # the latest arrival, epoch ms
        self.model = fraud.Fraud()
        self.demand = demand.Demand()
        self._promoted: deque[Promoted] = deque()
        self._learned: deque[tuple[str, list[float], bool]] = deque(maxlen=_LEARNED)
        self._habits = _Table(store, keys.HABIT, fraud.Habit)
        self._payees = _Table(store, keys.PAYEE, fraud.Payee)
        self._scores: dict[str, Score] = {}
        self._labels: dict[str, bytes] = {}  # as they are stored, see _label()
        self._late: list[_Late] = []  # each checkpoint asks the store for all at once
        self._requests: Unwritten[Counter[tuple[str, int]]] = Unwritten(Counter)
        self._writing: tuple[dict[str, Score], dict[str, bytes]] = ({}, {})

    def load(self, now: int) -> None:
        self.model, self.demand = stored_fraud(self.store), stored_demand(self.store)

    def promote(self, version: Promoted) -> None:
        """Hand a trained version over, from any thread: the next checkpoint puts it in force, in memory and store."""
        self._promoted.append(version)

    @property
    def unsaved(self) -> bool:
        return bool(self._promoted)

    @property
    def full(self) -> bool:
        return len(self._scores) >= _FULL

    def assess(self, user_id: str, ts: int, data: dict[str, Any]) -> Score:
        """The score of a payment that is not made, from any thread; changes nothing. Raises Malformed, StoreError."""
        amount, payee_id = _number(data, "amount"), _payee(data)
        habit = self._habits.get(user_id) or _stored(self.store, keys.HABIT + user_id, fraud.Habit)
        payee = self._payees.get(payee_id) or _stored(self.store, keys.PAYEE + payee_id, fraud.Payee)
        x = fraud.inputs(amount, ts, habit, payee, self.model.amounts)
        return Score(self.model.score(x), self.model.scores_as, ts, self.model.reasons(x), x, payee_id, user_id)

    def process(self, batch: Batch, now: int) -> Outcome:
        outcome = batch.outcome()
        payments, reports, requests = (batch.by_type.get(t, []) for t in ("payment", "fraud_report", "ride_request"))
        self._habits.load({batch.users[i] for i in payments})
        self._payees.load({_payee(batch.data(i)) for i in payments} - {""})
        self._arrived = batch.arrivals[-1]
        typed = [(i, self._payment) for i in payments] + [(i, self._report) for i in reports]
        typed.sort(key=itemgetter(0))  # a report finds the payments before it
        for index, handle in chain(typed, ((i, self._request) for i in requests)):
            try:
                handle(batch, index, batch.data(index))
            except Malformed as error:
                outcome.done -= 1
                outcome.dead.append((index, f"malformed: {error}"))
        outcome.dead.sort()
        return outcome

    def _payment(self, batch: Batch, index: int, data: dict[str, Any]) -> None:
        user_id = batch.users[index]
        transaction, amount = _text(data, "transaction_id"), _number(data, "amount")
        payee_id = _payee(data)
        ts = batch.ts[index]
        habit = self._habits[user_id]
        payee = self._payees[payee_id] if payee_id else fraud.Payee()
        x = fraud.inputs(amount, ts, habit, payee, self.model.amounts)
        told = self.model.score(x), self.model.scores_as, batch.arrivals[index], self.model.reasons(x)
        score = Score(*told, x, payee_id, user_id)
        self._scores.setdefault(transaction, score)
        self.model.seen(x)
        fraud.paid(amount, ts, habit, payee, self.model.amounts)
        self._habits.dirty.add(user_id)
        if payee_id:
            self._payees.dirty.add(payee_id)

    def _report(self, batch: Batch, index: int, data: dict[str, Any]) -> None:
        transaction, is_fraud = _text(data, "transaction_id"), data.get("is_fraud")
        if is_fraud not in (0, 1):
            raise Malformed(f"data.is_fraud is {is_fraud!r:.80}; it takes 0 or 1")
        latest = self._labels.get(transaction)
        before = latest or self._writing[1].get(transaction)
        self._labels[transaction] = _label(is_fraud, learned=False)
        score = self._writing[0].get(transaction) or self._scores.get(transaction)
        if score is None or (latest is not None and _learned(latest) is None):  # or one that is late goes before it
            self._late.append(_Late(transaction, bool(is_fraud), batch.ts[index], before, score))
        else:
            self._load_of([score])
            self._learn(transaction, score, bool(is_fraud), batch.ts[index], _learned(before))

    def _learn_late(self) -> None:
        """Learn from the reports whose payments are in the store, if at all: else they are unknown, or older than what is
        retained, and only the label is kept."""
        late, self._late = self._late, []
        if not late:
            return
        # Arrival never runs backwards: no payment before these reports is of a later day.
        days, transactions = _days_before(self._arrived, self._days), [report.transaction for report in late]
        stored = [_score(raw) for raw in _find(self.store, keys.SCORES, days[::-1], transactions)]
        scores = [score or report.score for score, report in zip(stored, late, strict=True)]
        labels = _find(self.store, keys.LABELS, days, transactions)
        self._load_of([score for score in scores if score is not None])
        known: dict[str, int] = {}
        for (transaction, is_fraud, ts, before, _), score, label in zip(late, scores, labels, strict=True):
            if score is not None:
                self._learn(transaction, score, is_fraud, ts, known.get(transaction, _learned(before or label)))
                known[transaction] = int(is_fraud)

    def _learn(self, transaction: str, score: Score, is_fraud: bool, ts: int, before: int | None) -> None:
        """Learn a label; one that repeats what was learned `before` it tells nothing, one that differs takes its place."""
        self._labels[transaction] = _label(is_fraud, learned=True)
        if before == is_fraud:
            return
        self.model.learn(score.inputs, is_fraud)
        if before is not None:
            self.model.unlearn(bool(before))
        self._learned.append((transaction, score.inputs, is_fraud))
        if is_fraud or before:
            payee = self._payees[score.payee] if score.payee else fraud.Payee()
            habit = self._habits[score.payer] if score.payer else fraud.Habit()
            fraud.reported(ts, habit, payee, 1 if is_fraud else -1)
            self._payees.dirty.update({score.payee} - {""})
            self._habits.dirty.update({score.payer} - {""})

    def _load_of(self, scores: list[Score]) -> None:
        """Have in memory whom these payments were of."""
        self._payees.load({score.payee for score in scores} - {""})
        self._habits.load({score.payer for score in scores} - {""})

    def _request(self, batch: Batch, index: int, data: dict[str, Any]) -> None:
        quantity = 1.0
        if data.get("quantity") is not None:
            quantity = _number(data, "quantity")
            if not 0 <= quantity <= MAX_QUANTITY:  # a sum beyond what a number holds would fail the whole commit
                raise Malformed(f"data.quantity is {quantity:g}; it takes a number from 0 to {MAX_QUANTITY:g}")
        step = batch.ts[index] // 1000 // demand.STEP_S * demand.STEP_S
        requests = self._requests.count_from(batch.first_ordinal)
        requests[CITY, step] += quantity  # type: ignore[assignment]  # a feed may count in fractions
        zone = batch.zones[index]
        if zone is not None:
            requests[zone, step] += quantity  # type: ignore[assignment]

    def cut(self, now: int) -> Cut:
        self._learn_late()
        self._writing = scores, labels = self._scores, self._labels
        self._scores, self._labels = {}, {}
        final: list[Command] = []
        by_day: dict[str, list[str | bytes]] = {}
        for transaction, score in scores.items():
            by_day.setdefault(f"{keys.SCORES}{score.scored_at // DAY_MS}", []).extend((transaction, _pack(score)))
        final += [("HSETNX", key, *words) for key, words in by_day.items()]  # the first score of a payment stands
        days = set(by_day)
        if labels:
            key = f"{keys.LABELS}{self._arrived // DAY_MS}"
            days.add(key)
            final.append(("HSET", key, *[word for label in labels.items() for word in label]))
        final += [("PEXPIRE", key, self._retention_ms + 2 * DAY_MS) for key in days]
        requests = self._requests.cut()
        final += [("HINCRBYFLOAT", demand_key(zone, step), step, count) for (zone, step), count in requests.items()]
        weeks = {demand_key(zone, step) for zone, step in requests}
        final += [("PEXPIRE", key, demand.HISTORY_S * 1000 + 2 * DAY_MS) for key in weeks]
        final += self._habits.dump(self._retention_ms * 13) + self._payees.dump(self._retention_ms * 13)
        while self._promoted:
            final += self._take_over(self._promoted.popleft())
        if scores or labels:
            final.append(("SET", keys.MODEL + "fraud", _pack(self.model)))
        return Cut(iter(()), final, self._written)

    def _take_over(self, version: Promoted) -> list[Command]:
        if isinstance(version.model, demand.Demand):
            self.demand = version.model
        else:
            before, self.model = self.model, version.model
            self.model.recent, self.model.scored, self.model.amounts = before.recent, before.scored, before.amounts
            for transaction, x, is_fraud in self._learned:
                if transaction not in version.known:  # its label came while the version was in training
                    self.model.learn(x, is_fraud)
        return [
            ("SET", keys.MODEL + version.name, _pack(version.model)),
            ("LPUSH", keys.VERSIONS + version.name, version.record),
            ("LTRIM", keys.VERSIONS + version.name, 0, VERSIONS_KEPT - 1),
        ]

    def _written(self) -> None:
        self._writing = ({}, {})
        self._requests.written()
        self._habits.evict()
        self._payees.evict()

    def unwritten_scores(self) -> dict[str, Score]:
        return {**self._scores, **self._writing[0]}

    def unwritten_labels(self) -> dict[str, int]:
        return {transaction: int(label) for transaction, label in {**self._writing[1], **self._labels}.items()}

    def unwritten_requests(self, zone: str) -> list[tuple[int, dict[int, float]]]:
        """(first ordinal, requests by step) of what is not in the store as long as the position there is not beyond that."""
        return [
            (ordinal, {step: count for (of, step), count in list(counts.items()) if of == zone})
            for ordinal, counts in self._requests.parts()
        ]


def demand_key(zone: str, step: int) -> str:
    return f"{keys.DEMAND}{zone}:{step // WEEK_S * WEEK_S}"


def stored_fraud(store: Store) -> fraud.Fraud:
    """The fraud model as of the last checkpoint; a new one where an earlier version of Nexus had other inputs."""
    model = _stored(store, keys.MODEL + "fraud", fraud.Fraud)
    return model if len(model.weights) == len(fraud.NAMES) + 1 else fraud.Fraud()


def stored_demand(store: Store) -> demand.Demand:
    """The demand model as of the last promotion."""
    return _stored(store, keys.MODEL + "demand", demand.Demand)


def _stored(store: Store, key: str, row: type[T]) -> T:
    raw = store.call("GET", key)
    return msgspec.msgpack.decode(raw, type=row) if raw else row()


def find_scores(store: Store, transactions: list[str], now: int, days: int = DAYS) -> list[Score | None]:
    """The stored scores of transactions, the first of each, None where there is none within the `days` of the retention."""
    return [_score(raw) for raw in _find(store, keys.SCORES, days_kept(store, now, days)[::-1], transactions)]


def find_labels(store: Store, transactions: list[str], now: int, days: int = DAYS) -> list[int | None]:
    """The stored labels of transactions, the latest of each, None where none arrived."""
    found = _find(store, keys.LABELS, days_kept(store, now, days), transactions)
    return [int(raw) if raw is not None else None for raw in found]


def days_kept(store: Store, now: int, days: int) -> list[int]:
    """The days of arrival that may have scores and labels, the latest first. Where the clock was ahead and is right again,
    arrival stands still ahead of it."""
    arrived = Head.unpack(store.call("GET", keys.HEAD)).last_arrival
    return sorted({*_days_before(now, days), *_days_before(max(now, arrived), days)}, reverse=True)


def _days_before(at: int, days: int) -> list[int]:
    """The days of a retention that ends at a moment (epoch ms), the latest first."""
    return [at // DAY_MS - i for i in range(days + 2)]


def _find(store: Store, prefix: str, days: list[int], transactions: list[str]) -> list[bytes | None]:
    return store.find([f"{prefix}{day}" for day in days], transactions)


def _label(is_fraud: bool, learned: bool) -> bytes:
    """A label as it is stored: a number, with a sign where the model has not learned it, since its payment was not known then."""
    return b"%d" % is_fraud if learned else b"+%d" % is_fraud


def _learned(label: bytes | None) -> int | None:
    """What the model has learned of a label."""
    return None if label is None or label.startswith(b"+") else int(label)


def _score(raw: bytes | None) -> Score | None:
    return msgspec.msgpack.decode(raw, type=Score) if raw else None


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if type(value) is int:
        value = str(value)
    if type(value) is not str or not 1 <= len(value) <= 128:
        raise Malformed(f"data.{name} is {value!r:.80}; it takes a string of 1 to 128 characters")
    return value


def _payee(data: dict[str, Any]) -> str:
    """The payee of a payment, "" where none is named."""
    value = data.get("merchant_id")
    return str(value) if type(value) in (str, int) and len(str(value)) <= 128 else ""


def _number(data: dict[str, Any], name: str) -> float:
    value: Any = data.get(name)
    if type(value) not in (int, float):
        raise Malformed(f"data.{name} is {value!r:.80}; it takes a number")
    return float(value)


def describe(score: Score, transaction: str, label: int | None) -> dict[str, Any]:
    """A score as the routes answer it."""
    return {
        "transaction_id": transaction,
        "score": round(score.score, 6),
        "model": "fraud",
        "version": score.version,
        "scored_at": rfc3339(score.scored_at),
        "reasons": score.reasons,
        "label": label,
    }
