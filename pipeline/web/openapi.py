"""GET /openapi.json: the OpenAPI 3.1 description of every route, made once from the table here and wire's types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from flask import Blueprint, Flask, Response

from pipeline.bridge.replies import KINDS
from pipeline.wire import bodies, data, operating

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

JSON, TEXT, NDJSON = "application/json", "text/plain", "application/x-ndjson"
_REF = "#/components/schemas/{name}"
_INT = {"type": "integer", "minimum": 1}
_TEXT = {"type": "string"}
_WHEN = {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "integer"}], "description": "or epoch ms, not s"}
_LIMIT = ("limit", {**_INT, "maximum": 1000, "default": 100}, "rows at most")
_CURSOR = ("cursor", _TEXT, "of the page before")
_STREAM = {"enum": ["features", "storage", "aggregates", "inference", "bridge"]}

Query = tuple[str, dict[str, Any], str]
Types = tuple[type[Any], ...]


@dataclass(frozen=True)
class Operation:
    """What a route does, takes and answers: types by status, several where an answer has several forms. `own`: pages
    elsewhere are refused."""

    summary: str
    answers: dict[int, Types]
    query: Sequence[Query] = ()
    body: Types = ()
    required: frozenset[str] = field(default_factory=frozenset)
    own: bool = False


def _one(summary: str, answer: type[Any], *query: Query, body: Types = (), **more: Any) -> Operation:
    return Operation(summary, {200: (answer,)}, query, body, **more)


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/api/ml/events/ingest"): Operation(
        "Take events, durably before the answer; also a bare array, one event, NDJSON, gzip",
        {202: (data.Ingested,), 422: (data.Ingested,), 503: (data.Open, data.Error)},
        (
            ("wait", {"enum": ["features"]}, "answer when the events are readable"),
            ("timeout_ms", {**_INT, "maximum": 30_000}, "how long to wait"),
        ),
        (bodies.EventBatch, list[bodies.PostedEvent], bodies.PostedEvent),
    ),
    ("GET", "/api/ml/events/ingest"): Operation(
        "How the streams stand, counted in one consistent read",
        {200: (data.IngestHealth,), 503: (data.IngestHealth,)},
        (("check", {"enum": ["health"]}, "what to check"),),
    ),
    ("GET", "/api/ml/bridge/python"): Operation(
        "The Python service's health, or both systems' features of a user",
        {200: (data.BridgeHealth, data.BothFeatures)},
        (("action", {"enum": ["health", "features"]}, "which"), ("user_id", _TEXT, "with features")),
        required=frozenset({"action"}),
    ),
    ("POST", "/api/ml/bridge/python"): Operation(
        "Send to the Python service, to both systems, a canary; pause, resume, switch the circuit",
        {
            200: (data.Sent, data.Hybrid, data.Integration, data.Switched),
            202: (data.Sent,),
            422: (data.Sent, data.Hybrid),
            503: (data.Open, data.Error),
        },
        body=(bodies.ActionBody,),
        own=True,
    ),
    ("GET", "/api/ml/bridge/attempts"): _one(
        "The latest calls of the Python service",
        operating.Attempts,
        ("error", {"enum": list(KINDS)}, "with which kind of error"),
        ("status", _INT, "with which HTTP status"),
        _LIMIT,
    ),
    ("GET", "/api/ml/bridge/outages"): _one("Outages of the Python service, newest first", operating.Outages, _LIMIT),
    ("GET", "/api/ml/events"): _one(
        "Stored events by user, type, session, source and time",
        data.Events,
        ("user_id", _TEXT, "whose"),
        ("event_type", _TEXT, "of which type"),
        ("session_id", _TEXT, "of which session"),
        ("source", _TEXT, "from which source"),
        ("since", _WHEN, "event time, inclusive"),
        ("until", _WHEN, "event time, inclusive"),
        ("order", {"enum": ["asc", "desc"], "default": "asc"}, "oldest or newest first"),
        _LIMIT,
        _CURSOR,
    ),
    ("GET", "/api/ml/events/{event_id}"): _one("The receipt: what each stream did with an event", data.Receipt),
    ("GET", "/api/ml/features/{user_id}"): Operation(
        "A user's combined features with their provenance; a payee's or a zone's own, by its id",
        {200: (data.Features, data.EntityFeatures)},
        (
            ("entity", {"enum": ["user", "merchant", "zone"], "default": "user"}, "whose the id is"),
            ("as_of", _WHEN, "as of a past moment, event time; of users"),
            ("known_at", _WHEN, "leave out what arrived later"),
            ("names", _TEXT, "some features only, comma separated"),
        ),
    ),
    ("POST", "/api/ml/features"): _one("The same of up to 500 users", data.Vectors, body=(bodies.UsersBody,)),
    ("POST", "/api/ml/features/sync"): _one("Run the feature sync now", data.Synchronised, own=True),
    ("GET", "/api/ml/feature-definitions"): _one("Every feature, declared", data.Definitions),
    ("GET", "/api/ml/feature-health"): _one("Null rate, out-of-range rate and age of features", data.FeatureHealth),
    ("GET", "/api/ml/aggregates"): _one(
        "Events counted by event time; before `kept_since` some may be missing. `distinct_users` is of the whole hours that "
        "`distinct_users_of` names, as of the latest checkpoint, with a standard error of 0.8 %",
        data.Aggregates,
        ("by", {"enum": ["type", "source", "device", "zone"], "default": "type"}, "the dimension"),
        ("step", {"enum": ["1s", "1m", "1h"], "default": "1m"}, "the bucket"),
        ("since", _WHEN, "inclusive"),
        ("until", _WHEN, "inclusive"),
    ),
    ("POST", "/api/ml/predict"): Operation(
        "Both systems' predictions, and as `unified` Nexus's own, or the Python service's where Nexus's model is warming up",
        {200: (operating.FraudPrediction, operating.DemandPrediction)},
        body=(bodies.PredictBody,),
    ),
    ("GET", "/api/ml/predictions/fraud/{transaction_id}"): _one(
        "The score a payment got on arrival", operating.FraudScore
    ),
    ("POST", "/api/ml/predictions/fraud"): _one(
        "The same of up to 1,000 payments", operating.FraudScores, body=(bodies.TransactionsBody,)
    ),
    ("GET", "/api/ml/predictions/demand"): _one(
        "Ride requests to be expected",
        operating.DemandForecast,
        ("zone", _TEXT, "an H3 cell; absent: the city"),
        ("horizon", {**_INT, "maximum": 336, "default": 5}, "half hours"),
    ),
    ("GET", "/api/ml/models"): _one(
        "The models in force, how they do, and versions judged. Of the fraud model's figures: payments that nobody has reported count "
        "as legitimate, those whose report may yet come as well, and are a sample of each day, the same one each time; all that were "
        "reported count",
        operating.Models,
    ),
    ("POST", "/api/ml/models/{name}/retrain"): Operation(
        "Train on the labelled history, judge, promote where better",
        {200: (operating.Judged,), 202: (operating.InTraining,)},
        (("wait", {"enum": ["true", "false"], "default": "true"}, "false: answer at once"),),
        own=True,
    ),
    ("GET", "/api/ml/settings"): _one("The settings that change at run time", operating.Settings),
    ("PATCH", "/api/ml/settings"): _one(
        "Change them; null goes back", operating.Settings, body=(bodies.SettingsBody,), own=True
    ),
    ("GET", "/api/ml/settings/audit"): _one("Who changed what, and why", operating.Changes, _LIMIT),
    ("GET", "/api/ml/dead-letters"): _one(
        "Events that a stream could not process",
        operating.DeadLetters,
        ("stream", _STREAM, "of one stream"),
        ("reason", _TEXT, "a part of the reason"),
        _LIMIT,
        _CURSOR,
    ),
    ("POST", "/api/ml/dead-letters/redrive"): _one(
        "Send dead letters again", operating.Redriven, body=(bodies.RedriveBody,), own=True
    ),
    ("GET", "/healthz"): _one("Alive", operating.Alive),
    ("GET", "/readyz"): Operation("Able to serve, or why not", {200: (operating.Ready,), 503: (operating.Ready,)}),
    ("GET", "/metrics"): Operation("Prometheus metrics", {200: (str,)}),
    ("GET", "/openapi.json"): Operation("This document", {200: (dict,)}),
}


def openapi_routes(nexus: Runtime) -> Blueprint:
    api = Blueprint("openapi", __name__)
    made: list[bytes] = []

    @api.get("/openapi.json")
    def openapi() -> Response:
        if not made:
            made.append(msgspec.json.encode(document(nexus.version)))
        return Response(made[0], content_type=JSON)

    return api


def routes_of(app: Flask) -> list[tuple[str, str]]:
    """(method, path) of each route that programs use, paths as OpenAPI writes them; the dashboard's are left out."""
    found = []
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        if path.startswith("/api/") or path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
            found += [(method, path) for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})]
    return sorted(found)


def document(version: str) -> dict[str, Any]:
    """The whole document."""
    types = [t for o in OPERATIONS.values() for some in (*o.answers.values(), o.body) for t in some]
    schemas, components = msgspec.json.schema_components([*types, data.Error], ref_template=_REF)
    by_type = {repr(t): schema for t, schema in zip([*types, data.Error], schemas, strict=True)}
    paths: dict[str, Any] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Nexus", "version": version, "license": {"name": "MIT", "identifier": "MIT"}},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(method: str, path: str, operation: Operation, by_type: dict[str, Any]) -> dict[str, Any]:
    inside = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in re.findall(r"\{(\w+)\}", path)
    ]
    query = [
        {"name": n, "in": "query", "required": n in operation.required, "schema": schema, "description": text}
        for n, schema, text in operation.query
    ]
    made: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub(r'[^a-z0-9]+', '_', path).rstrip('_')}",
        "summary": operation.summary,
        "parameters": inside + query,
        "responses": {
            str(status): {"description": "", "content": {_media(types): {"schema": _any_of(types, by_type)}}}
            for status, types in operation.answers.items()
        },
    }
    wrong = {"content": {JSON: {"schema": by_type[repr(data.Error)]}}}
    if operation.own:
        made["responses"]["403"] = {"description": "asked by a page elsewhere, or by a name not the server's", **wrong}
    made["responses"]["default"] = {"description": "what went wrong", **wrong}
    if operation.body:
        content = {JSON: {"schema": _any_of(operation.body, by_type)}}
        if list[bodies.PostedEvent] in operation.body:
            content[NDJSON] = {"schema": _TEXT}
        made["requestBody"] = {"required": True, "content": content}
    return made


def _media(types: Types) -> str:
    return TEXT if types == (str,) else JSON


def _any_of(types: Types, by_type: dict[str, Any]) -> dict[str, Any]:
    schemas = [by_type[repr(t)] for t in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
