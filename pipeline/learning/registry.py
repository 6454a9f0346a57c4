"""The models in force and how they do; and retraining, where a new version is judged before it takes over.

A promoted version is handed to the inference stream, which owns the models: its next checkpoint writes it, fenced as
all that a stream writes, so that memory and store agree whatever is killed in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.errors import Fenced, NexusError, NotFound
from pipeline.events import rfc3339
from pipeline.learning.demand_history import demand_counts
from pipeline.learning.labelled import examples
from pipeline.models import backtest, demand, fraud, training
from pipeline.streams.inference import (
    CITY,
    VERSIONS_KEPT,
    Inference,
    Promoted,
    stored_demand,
    stored_fraud,
)

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

NAMES = ("fraud", "demand")
WINDOWS_DAYS = {"24h": 1, "7d": 7}
LOOKED_AT = 2_000  # payments of each day that nobody reported, in what is looked at every minute
TAKEN_OVER_S = 60.0  # a checkpoint is pending for several seconds under full load
_DAY_S = 86_400
_LOOK_S = 0.05
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Busy(NexusError):
    """The model cannot be trained just now."""

    default_status = 409


class Models:
    """`look` is a job: judging takes longer than a request may. `described` is what it found last."""

    def __init__(self, nexus: Runtime) -> None:
        self._nexus = nexus
        self._training = threading.Lock()
        self.described: dict[str, Any] = {"models": [], "made_at": None}

    def look(self) -> dict[str, Any]:
        """Judge what is in force over its windows. Raises StoreError."""
        now = self._nexus.clock()
        self.described = {"models": [self._fraud(now), self._demand(now)], "made_at": rfc3339(now)}
        return self.described

    def fraud_in_force(self) -> fraud.Fraud:
        """The version in force, of whichever instance runs it."""
        stream = self._stream()
        return stored_fraud(self._nexus.store) if stream is None else stream.model

    def demand_in_force(self) -> demand.Demand:
        stream = self._stream()
        return stored_demand(self._nexus.store) if stream is None else stream.demand

    def check(self, name: str) -> None:
        """Raises NotFound for a model that there is not, Fenced where another instance runs the models."""
        if name not in NAMES:
            raise NotFound("unknown_model", f"model is {name!r}; there are {' and '.join(NAMES)}")
        if self._stream() is None:
            raise Fenced("the inference stream does not run in this instance; ask the one that runs the pipeline")

    def retrain(self, name: str) -> dict[str, Any]:
        """Train, judge, and promote where better: {"model", "version", "promoted", "metrics"}. Raises Busy, Fenced,
        NotFound, StoreError."""
        self.check(name)
        if not self._training.acquire(blocking=False):
            raise Busy("already_training", "a model is in training; try again when it has been judged")
        try:
            version = self._next_version(name)
            return self._train_fraud(version) if name == "fraud" else self._train_demand(version)
        finally:
            self._training.release()

    def _train_fraud(self, version: str) -> dict[str, Any]:
        nexus, now = self._nexus, self._nexus.clock()
        history = examples(nexus.store, now, nexus.settings.retention_days)
        in_force = self.fraud_in_force().scores_as
        parts = training.split(history, in_force)
        if parts is None:
            frauds = sum(e.y for e in history)
            raise Busy(
                "too_few_labels",
                f"{frauds} reported frauds are on record; it takes {fraud.LABELS_NEEDED}, of them "
                f"{training.HELD_OUT_FRAUDS} that {in_force}, which is in force, has scored",
                details={"frauds": frauds, "needed": fraud.LABELS_NEEDED, "payments": len(history)},
            )
        earlier, later = parts
        ours, theirs = training.scores(training.fit(earlier), later), training.served(later)
        better, share = training.surely_better(ours, theirs, later)
        metrics = {
            "candidate": training.measure(ours, later),
            "current": {"version": in_force, **training.measure(theirs, later)},
            "baseline": {"name": fraud.HABIT_VERSION, **training.measure(training.habit(later), later)},
            "judged_by": "average_precision",
            "better_in": share,
            "trained_on": {"frauds": sum(e.y for e in earlier), "examples": len(earlier)},
            "held_out_since": rfc3339(min(e.at for e in later)),
        }
        model = training.fit(history)  # what is promoted has learned the held-out part as well
        model.version = version
        known = frozenset(e.transaction for e in history if not e.presumed)
        return self._settle("fraud", model, better, metrics, known)

    def _train_demand(self, version: str) -> dict[str, Any]:
        counts, at, needed = *self._origins(), backtest.STEPS_NEEDED
        if len(at) < needed:
            hours = len(at) * demand.STEP_S // 3600
            raise Busy(
                "too_little_history",
                f"{hours} hours of the city's requests can be judged; it takes {needed * demand.STEP_S // 3600}",
                details={"steps": len(at), "needed": needed},
            )
        edge = round(len(at) * (1 - backtest.HELD_OUT))
        earlier, later = at[:edge], at[edge:]
        model, current = backtest.best(counts, earlier, version), self.demand_in_force()
        errors = {"candidate": backtest.error(model, counts, later), "current": backtest.error(current, counts, later)}
        metrics = {
            "candidate": {"wape": errors["candidate"], "weeks": model.weeks, "loose": model.loose},
            "current": {
                "version": current.version, "wape": errors["current"], "weeks": current.weeks, "loose": current.loose
            },
            "baseline": {"name": "seasonal-naive", "wape": backtest.naive_error(counts, later)},
            "judged_by": "wape",
            "trained_on": {"steps": len(earlier)},
            "held_out_since": rfc3339(later[0] * 1000),
        }  # fmt: skip
        better = None not in errors.values() and errors["candidate"] < errors["current"]  # type: ignore[operator]
        return self._settle("demand", model, better, metrics)

    def _settle(
        self,
        name: str,
        model: fraud.Fraud | demand.Demand,
        promoted: bool,
        metrics: dict[str, Any],
        known: frozenset[str] = frozenset(),
    ) -> dict[str, Any]:
        verdict = {"model": name, "version": model.version, "promoted": promoted, "metrics": metrics}
        record = _encode({**verdict, "at": rfc3339(self._nexus.clock())})
        if promoted:
            self._hand_over(Promoted(name, model, record, known))
        else:
            key = keys.VERSIONS + name
            commands = [("LPUSH", key, record), ("LTRIM", key, 0, VERSIONS_KEPT - 1)]
            checkpoints.commit(self._nexus.store, self._nexus.lease.epoch, commands)
        self.look()
        return verdict

    def _hand_over(self, version: Promoted) -> None:
        """Until the store has it: a stream that was made anew meanwhile, from the version before, is given it again."""
        stored: Callable[..., Any] = stored_fraud if version.name == "fraud" else stored_demand
        deadline, given_to = time.monotonic() + TAKEN_OVER_S, None
        while stored(self._nexus.store).version != version.model.version:
            stream = self._stream()
            if stream is not None and stream is not given_to:
                stream.promote(version)
                given_to = stream
            if time.monotonic() > deadline:
                raise Fenced(
                    f"{version.model.version} is better, but was not checkpointed within {TAKEN_OVER_S:g} s; "
                    "GET /api/ml/models tells whether it took over since"
                )
            self._nexus.pause(_LOOK_S)

    def _fraud(self, now: int) -> dict[str, Any]:
        model, windows, baseline = self.fraud_in_force(), {}, {}
        # Of what this version has scored: two versions' scores have no common scale.
        known = examples(self._nexus.store, now, max(WINDOWS_DAYS.values()), LOOKED_AT)
        for window, days in WINDOWS_DAYS.items():
            inside = [e for e in known if e.at >= now - days * _DAY_S * 1000 and e.version == model.scores_as]
            windows[window] = training.measure(training.served(inside), inside)
            baseline[window] = training.measure(training.habit(inside), inside)
        needed = fraud.LABELS_NEEDED - model.frauds
        return self._described(
            "fraud",
            model.scores_as,
            None if model.ready else f"needs {needed} more reported frauds",
            windows,
            {"name": fraud.HABIT_VERSION, "metrics": baseline},
        )

    def _demand(self, now: int) -> dict[str, Any]:
        model, windows, baseline = self.demand_in_force(), {}, {}
        counts, at = self._origins()
        for window, days in WINDOWS_DAYS.items():
            inside = [origin for origin in at if origin >= now // 1000 - days * _DAY_S]
            windows[window] = {"wape": backtest.error(model, counts, inside), "forecasts": len(inside)}
            baseline[window] = {"wape": backtest.naive_error(counts, inside), "forecasts": len(inside)}
        why = demand.warming_up(counts, now // 1000)
        return self._described("demand", model.version, why, windows, {"name": "seasonal-naive", "metrics": baseline})

    def _described(
        self, name: str, version: str, why: str | None, windows: dict[str, Any], baseline: dict[str, Any]
    ) -> dict[str, Any]:
        state = "ready" if why is None else "warming_up"
        versions = [_decode(raw) for raw in self._nexus.store.call("LRANGE", keys.VERSIONS + name, 0, -1)]
        return {
            "name": name, "version": version, "state": state, "detail": why, "metrics": windows, "baseline": baseline,
            "versions": versions,
        }  # fmt: skip

    def _origins(self) -> tuple[dict[int, float], list[int]]:
        now_s = self._nexus.clock() // 1000
        counts = demand_counts(self._nexus, CITY, now_s)
        return counts, backtest.origins(counts, now_s)

    def _next_version(self, name: str) -> str:
        """One more than the latest that was judged, promoted or not."""
        raw = self._nexus.store.call("LINDEX", keys.VERSIONS + name, 0)
        latest = _decode(raw)["version"] if raw else (fraud.VERSION if name == "fraud" else demand.VERSION)
        word, _, number = latest.rpartition("-")
        return f"{word}-{int(number) + 1}"

    def _stream(self) -> Inference | None:
        stream = self._nexus.stream("inference")
        return stream if isinstance(stream, Inference) else None
