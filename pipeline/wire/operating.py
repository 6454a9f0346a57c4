"""Answers about models, settings, outages, dead letters, and the probes."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Json = dict[str, Any]
StreamName = Literal["features", "storage", "aggregates", "inference", "bridge"]


class OwnScore(TypedDict):
    model: str
    version: str
    status: Literal["ready", "warming_up"]
    score: float
    reasons: list[str]


class Forecast(TypedDict):
    at: str
    value: float
    low: float
    high: float


class DemandForecast(TypedDict):
    zone: str
    step_s: int
    forecasts: list[Forecast]
    made_at: str
    model: str
    state: Literal["ready", "warming_up"]
    detail: str | None


class UnitedScore(TypedDict):
    score: float
    method: Literal["precedence"]
    of: list[Literal["nexus", "python"]]


class UnitedForecast(Forecast):
    of: list[Literal["nexus", "python"]]


class UnitedForecasts(TypedDict):
    forecasts: list[UnitedForecast]
    method: Literal["precedence"]


class FraudPrediction(TypedDict):
    nexus: OwnScore
    python: Json
    unified: UnitedScore
    degraded: bool


class DemandPrediction(TypedDict):
    nexus: DemandForecast
    python: Json
    unified: UnitedForecasts
    degraded: bool


class FraudScore(TypedDict):
    transaction_id: str
    score: float
    model: str
    version: str
    scored_at: str
    reasons: list[str]
    label: Literal[0, 1] | None


class FraudScores(TypedDict):
    predictions: dict[str, FraudScore]


class Baseline(TypedDict):
    name: str
    metrics: dict[str, Json]


class Judged(TypedDict):
    model: str
    version: str
    promoted: bool
    metrics: Json


class JudgedAt(Judged):
    at: str


class Model(TypedDict):
    name: str
    version: str
    state: Literal["ready", "warming_up"]
    detail: str | None
    metrics: dict[str, Json]
    baseline: Baseline
    versions: list[JudgedAt]


class Models(TypedDict):
    models: list[Model]
    made_at: str | None


class InTraining(TypedDict):
    model: str
    state: Literal["training"]


class Setting(TypedDict):
    value: Any
    default: Any
    environment: Any
    source: Literal["environment", "store"]
    min: int | None
    max: int | None
    unit: str | None
    meaning: str


class Settings(TypedDict):
    settings: dict[str, Setting]


Change = TypedDict(
    "Change",
    {"at": str, "name": str, "from": Any, "to": Any, "reason": str | None, "by": str},
)


class Changes(TypedDict):
    changes: list[Change]


class Outage(TypedDict):
    began: str
    ended: str | None
    reason: str | None
    queued: int
    users: int
    delivered: int
    dead: int
    caught_up: str | None


class Outages(TypedDict):
    outages: list[Outage]


class Attempt(TypedDict):
    at: str
    events: int
    status: int | None
    latency_ms: float
    error: str | None


class Attempts(TypedDict):
    attempts: list[Attempt]


class DeadLetter(TypedDict):
    id: str
    stream: StreamName
    event: Json
    reason: str
    attempts: int
    first_at: str
    last_at: str


class DeadLetters(TypedDict):
    """Fewer than `limit` where events are large, about 8 MiB of them: what follows is told by the cursor alone."""

    dead_letters: list[DeadLetter]
    cursor: str | None


class NotRedriven(TypedDict):
    id: str
    reason: str


class Redriven(TypedDict):
    redriven: int
    failed: list[NotRedriven]


class Alive(TypedDict):
    status: Literal["alive"]
    version: str


class Ready(TypedDict):
    status: Literal["ready", "not ready"]
    why: NotRequired[str]
