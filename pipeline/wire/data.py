"""Answers about events, features, aggregates and how the streams and the bridge stand."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from pipeline.wire.bodies import Location

Json = dict[str, Any]
Values = dict[str, Any]
PartnerStatus = Literal["online", "degraded", "offline", "disabled"]


class ErrorBody(TypedDict):
    code: str
    message: str
    details: Json


class Error(TypedDict):
    error: ErrorBody


class EventIds(TypedDict):
    event_ids: list[str | None]


class OpenBody(TypedDict):
    code: Literal["outcome_unknown"]
    message: str
    details: EventIds


class Open(TypedDict):
    """The store was asked to take the events and did not answer. Send them again with these ids, one for each input position, null
    where rejected: those that were taken are duplicates then. With any other code of a 503 nothing was taken."""

    error: OpenBody


class Rejection(TypedDict):
    index: int
    event_id: str | None
    field: str
    code: str
    message: str


class GivenUp(TypedDict):
    index: int
    event_id: str
    stream: str
    reason: str


class Ingested(TypedDict):
    """`event_ids` has one id for each input position, null where rejected. With `wait`: whether all events are `applied`, and
    those that became dead letters of the features instead, if any."""

    accepted: int
    duplicates: int
    rejected: list[Rejection]
    event_ids: list[str | None]
    applied: NotRequired[bool]
    dead: NotRequired[list[GivenUp]]


class StreamHealth(TypedDict):
    """All but the state is null while the store is away. `lag_s`: the age of the oldest event yet to be processed; `unsaved`:
    events processed that no checkpoint holds yet, which `lag` has until then, and the age of the oldest of these."""

    state: str
    lag: int | None
    processed: int | None
    failed: int | None
    rate: float | None
    pending: int | None
    lag_s: float | None
    unsaved: int | None
    unsaved_s: float | None


class Totals(TypedDict):
    accepted: int | None
    duplicates: int | None
    rejected: int | None


class StoreHealth(TypedDict):
    status: str
    detail: str | None
    used_bytes: int | None
    max_bytes: int | None
    durable: bool | None
    full_of: Literal["memory", "disk"] | None


class Footprint(TypedDict):
    """Bytes of the store, measured on samples; null where nothing is stored."""

    per_event: float | None
    per_id: float | None
    per_user: float | None


class Retention(TypedDict):
    """The latest run: the segments of the log that it let go of, and the streams for which it keeps what else is due, for its
    age or for want of memory. Then the events that went since the start, of those within their retention the latest when."""

    trimmed: int
    held_back: list[str]
    due_for: Literal["age", "memory"] | None
    past_retention: int
    within_retention: int
    within_retention_at: str | None


class IngestHealth(TypedDict):
    """While the store is away: what is known, null for the rest, and the error. `reasons`: why it is not healthy."""

    status: Literal["healthy", "degraded", "unhealthy"]
    reasons: list[str]
    streams: dict[str, StreamHealth]
    totals: Totals
    unexplained: int | None
    store: StoreHealth
    bytes: Footprint
    retention: Retention
    error: NotRequired[ErrorBody]


class PythonService(TypedDict):
    url: str
    status_code: int | None
    response_time_ms: float | None
    checked_at: str | None
    body: Any


class Circuit(TypedDict):
    state: Literal["closed", "open", "half_open"]
    opened_at: str | None
    failures: int
    paused_at: str | None


class Backlog(TypedDict):
    pending: int
    dead: int
    oldest_age_s: float | None


class BridgeHealth(TypedDict):
    status: PartnerStatus
    python_service: PythonService
    circuit: Circuit
    backlog: Backlog


class PythonVector(TypedDict):
    user_id: str
    features: Values


class ThreeVectors(TypedDict):
    python_features: Values
    typescript_features: Values
    combined: Values


class Provenance(TypedDict):
    """Of one combined value. Where the two systems differ, the other's value stands beside it."""

    owner: str | None
    computed_at: str | None
    age_s: float | None
    verdict: Literal["fresh", "stale", "expired", "fallback", "missing"]
    covers_from: NotRequired[str]


class BothFeatures(TypedDict):
    python_features: PythonVector
    combined_features: ThreeVectors
    meta: dict[str, Provenance]


class Features(TypedDict):
    user_id: str
    as_of: str
    features: Values
    meta: dict[str, Provenance]


class EntityFeatures(TypedDict):
    entity: Literal["merchant", "zone"]
    id: str
    as_of: str
    features: Values
    meta: dict[str, Provenance]


class OneVector(TypedDict):
    features: Values
    meta: dict[str, Provenance]


class Vectors(TypedDict):
    users: dict[str, OneVector]


class Definition(TypedDict):
    name: str
    entity: str
    event_type: str | None
    aggregation: str
    field: str | None
    window_s: int
    owner: str
    description: str
    state: str
    share: NotRequired[str | int | bool]
    quantile: NotRequired[float]
    half_life_s: NotRequired[int]


class Definitions(TypedDict):
    definitions: list[Definition]


class FeatureFigures(TypedDict):
    null_rate: float | None
    out_of_range_rate: float | None
    age_s: float | None


class FeatureHealth(TypedDict):
    vectors: int
    features: dict[str, FeatureFigures]


class Synchronised(TypedDict):
    checked: int
    drifted: int
    republished: int
    refreshed: int
    duration_ms: float


class Sent(TypedDict):
    sent: int
    queued: int
    rejected: list[Rejection]
    response_time_ms: float


class NexusPart(TypedDict):
    processed: int
    features: dict[str, Values]
    predictions: Values


class PythonPart(TypedDict):
    processed: int
    queued: int
    error: str | None


class Hybrid(TypedDict):
    """Among the `rejected` are the events that one of the systems took and could not process: code refused_by_nexus or
    refused_by_python."""

    success: bool
    degraded: bool
    typescript: NexusPart
    python: PythonPart
    combined_features: dict[str, Values]
    processing_time_ms: float


class Step(TypedDict):
    name: str
    ok: bool
    ms: float
    detail: str


class Integration(TypedDict):
    success: bool
    steps: list[Step]
    duration_ms: float


class Switched(BridgeHealth):
    action: str


class Event(TypedDict):
    event_id: str
    event_type: str
    user_id: str
    timestamp: str
    data: Json
    source: str
    received_at: str
    session_id: NotRequired[str | None]
    app_version: NotRequired[str]
    device_type: NotRequired[str]
    location: NotRequired[Location | None]


class Events(TypedDict):
    """Fewer than `limit` where events are large, about 8 MiB of them: what follows is told by the cursor alone."""

    events: list[Event]
    cursor: str | None


class StreamReceipt(TypedDict):
    state: Literal["done", "pending", "retrying", "dead", "not_addressed"]
    at: str | None
    attempts: int | None
    result: Any


class Receipt(TypedDict):
    event: Event
    streams: dict[str, StreamReceipt]


class Series(TypedDict):
    key: str
    points: list[list[str | float]]


class Hours(TypedDict):
    since: str
    until: str


class Aggregates(TypedDict):
    series: list[Series]
    distinct_users: int
    distinct_users_of: Hours | None
    kept_since: str
