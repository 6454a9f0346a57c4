"""What the routes take."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Json = dict[str, Any]
Values = dict[str, Any]
StreamName = Literal["features", "storage", "aggregates", "inference", "bridge"]


class Location(TypedDict):
    lat: float
    lng: float


class PostedEvent(TypedDict):
    """Flat or nested: every key outside the envelope goes to `data`. `timestamp` is RFC 3339 or epoch milliseconds."""

    event_type: str
    user_id: str
    event_id: NotRequired[str]
    session_id: NotRequired[str]
    timestamp: NotRequired[str | int | float]
    app_version: NotRequired[str]
    device_type: NotRequired[str]
    location: NotRequired[Location]
    data: NotRequired[Json]


class EventBatch(TypedDict):
    events: list[PostedEvent]
    source: NotRequired[str | None]


class ActionBody(TypedDict):
    """`events` and `source` go with send_batch and hybrid_process."""

    action: Literal[
        "test_integration", "send_batch", "hybrid_process", "pause", "resume", "reset_circuit", "open_circuit"
    ]
    events: NotRequired[list[PostedEvent]]
    source: NotRequired[str | None]


class UsersBody(TypedDict):
    """At most 500 users and 1,000 names, each of at most 128 characters, and at most 50,000 of users times names."""

    user_ids: list[str]
    names: NotRequired[list[str] | None]


class TransactionsBody(TypedDict):
    transaction_ids: list[str]


class PredictBody(TypedDict):
    """`event` goes with fraud; `zone`, the city where absent, and `horizon`, in half hours, with demand."""

    model: Literal["fraud", "demand"]
    event: NotRequired[PostedEvent]
    zone: NotRequired[str | None]
    horizon: NotRequired[int]


class SettingsBody(TypedDict):
    """A value of null goes back to the environment's. A reason has at most 500 characters."""

    settings: Values
    reason: NotRequired[str | None]


class RedriveBody(TypedDict):
    """`ids`, or `stream` and/or `reason` (a part of it), or `all`."""

    ids: NotRequired[list[str] | None]
    stream: NotRequired[StreamName | None]
    reason: NotRequired[str | None]
    all: NotRequired[bool | None]
