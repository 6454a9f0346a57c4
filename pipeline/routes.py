"""The HTTP routes under /api/ml, and the probes: thin, each reads its parameters, asks one part, and answers JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec
from flask import Blueprint, Flask, Response, request
from werkzeug.exceptions import HTTPException

from pipeline import keys
from pipeline.bridge.attempts import latest as latest_attempts
from pipeline.bridge.outages import rows as outage_rows
from pipeline.commit_log.lookups import event_object
from pipeline.errors import BadRequest, Fenced, NexusError, NotFound, StoreError, TooLarge
from pipeline.events import rfc3339
from pipeline.features.foreign import FIRST_MS, read_moment
from pipeline.streams.aggregates import DIMENSIONS, STEPS_S, Aggregates, counted, kept_ms
from pipeline.streams.inference import Inference
from pipeline.streams.storage import Query
from pipeline.web.answers import (
    INTERNAL,
    JSON,
    answer,
    error_answer,
    json_object,
    limit,
    object_with_events,
    require_own_page,
    require_own_server,
    required,
    strings,
)
from pipeline.web.feature_routes import feature_routes, names_in, of_partner_alone, vector, vector_of_now
from pipeline.web.metrics import metrics_routes
from pipeline.web.model_routes import demand_answer, model_routes
from pipeline.web.openapi import openapi_routes
from pipeline.web.posted import MAX_BODY_BYTES

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

ACTIONS = ("test_integration", "send_batch", "hybrid_process", "pause", "resume", "reset_circuit", "open_circuit")
MAX_TRANSACTIONS = 1_000
MAX_POINTS = 20_000
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
log = logging.getLogger(__name__)


def register(app: Flask, nexus: Runtime) -> None:
    """All routes, and answers in JSON for whatever goes wrong outside the dashboard."""
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES + 1  # of a body without a length, so much is read and no more
    app.url_map.merge_slashes = False  # /api//ml is another path, not a redirect
    app.register_blueprint(_routes(nexus))
    app.register_blueprint(feature_routes(nexus))
    app.register_blueprint(model_routes(nexus))
    app.register_blueprint(metrics_routes(nexus))
    app.register_blueprint(openapi_routes(nexus))

    @app.errorhandler(NexusError)
    def _ours(error: NexusError) -> Response:
        return error_answer(error)

    @app.errorhandler(HTTPException)
    def _http(error: HTTPException) -> Response | HTTPException:
        if request.path.startswith("/nexus"):
            return error
        code = (error.name or "error").lower().replace(" ", "_")
        body = {"error": {"code": code, "message": error.description or code, "details": {"path": request.path}}}
        made = answer(body, error.code or 500)
        if allow := error.get_response().headers.get("Allow"):
            made.headers["Allow"] = allow
        return made

    @app.errorhandler(Exception)
    def _unexpected(error: Exception) -> Response:
        log.exception("request failed", extra={"path": request.path})
        return answer(INTERNAL, 500)

    @app.after_request
    def _bare(made: Response) -> Response:
        """A redirect outside the dashboard says where in its header alone, not in a page."""
        if 300 <= made.status_code < 400 and not request.path.startswith("/nexus"):
            made.set_data(b"")
            del made.headers["Content-Type"]
        return made


def _routes(nexus: Runtime) -> Blueprint:
    api = Blueprint("api", __name__)

    @api.post("/api/ml/events/ingest")
    def ingest() -> Response:
        status, headers, body = ingest_response(nexus, request.environ)
        return Response(body, status, headers)

    @api.get("/api/ml/events/ingest")
    def ingest_health() -> Response:
        if request.args.get("check", "health") != "health":
            raise BadRequest("unknown_check", "check takes 'health'")
        status, body = nexus.ingest_health()
        return answer(body, status, {"Retry-After": "1"} if "error" in body else None)

    @api.get("/api/ml/bridge/python")
    def bridge_get() -> Response:
        action = request.args.get("action")
        if action == "health":
            return answer(nexus.bridge_health())
        if action == "features":
            return _both_features(nexus, required("user_id"))
        raise BadRequest(
            "unknown_action",
            f"action is {action!r}; GET takes health and features",
            details={"actions": ["health", "features"]},
        )

    @api.post("/api/ml/bridge/python")
    def bridge_post() -> Response:
        body = object_with_events()
        action = body.get("action")
        if action == "send_batch":
            status, found = nexus.actions.send_batch(body)
        elif action == "hybrid_process":
            status, found = nexus.actions.hybrid_process(body)
        elif action == "test_integration":
            require_own_page(nexus)
            status, found = nexus.actions.test_integration()
        elif action in ACTIONS:
            require_own_page(nexus)
            nexus.bridge.control(action, by=request.remote_addr or "unknown")
            status, found = 200, {"action": action, **nexus.bridge_health()}
        else:
            message = f"action is {action!r}; POST takes {', '.join(ACTIONS)}"
            raise BadRequest("unknown_action", message, details={"actions": list(ACTIONS)})
        return answer(found, status)

    @api.get("/api/ml/bridge/attempts")
    def attempts() -> Response:
        error, status = request.args.get("error"), request.args.get("status")
        return answer({"attempts": latest_attempts(nexus.store, limit(100), error, status)})

    @api.get("/api/ml/bridge/outages")
    def outages() -> Response:
        return answer({"outages": outage_rows(nexus.store, limit(100))})

    @api.get("/api/ml/events")
    def events() -> Response:
        since, until = (request.args.get(name) for name in ("since", "until"))
        order = request.args.get("order", "asc")
        if order not in ("asc", "desc"):
            raise BadRequest("invalid_order", f"order is {order!r}; it takes asc or desc")
        query = Query(
            user_id=request.args.get("user_id"),
            event_type=request.args.get("event_type"),
            session_id=request.args.get("session_id"),
            source=request.args.get("source"),
            since=None if since is None else read_moment("since", since),
            until=None if until is None else read_moment("until", until),
            newest_first=order == "desc",
        )
        found, cursor = nexus.events.find(query, limit(100), request.args.get("cursor"))
        return answer({"events": [event_object(f.body, f.source, f.received_at) for f in found], "cursor": cursor})

    @api.get("/api/ml/events/<event_id>")
    def receipt(event_id: str) -> Response:
        return answer(nexus.lookups.receipt(event_id))

    @api.get("/api/ml/aggregates")
    def aggregates() -> Response:
        return _aggregates(nexus)

    @api.get("/api/ml/predictions/fraud/<path:transaction_id>")
    def fraud_one(transaction_id: str) -> Response:
        found = _fraud(nexus, [transaction_id])
        if transaction_id not in found:
            raise NotFound("unknown_transaction", f"no payment {transaction_id} was scored")
        return answer(found[transaction_id])

    @api.post("/api/ml/predictions/fraud")
    def fraud_many() -> Response:
        return answer({"predictions": _fraud(nexus, strings(json_object(), "transaction_ids", MAX_TRANSACTIONS))})

    @api.get("/api/ml/predictions/demand")
    def demand_forecast() -> Response:
        return answer(demand_answer(nexus, request.args.get("zone"), request.args.get("horizon")))

    @api.get("/api/ml/settings")
    def settings() -> Response:
        return answer({"settings": nexus.live.describe()})

    @api.patch("/api/ml/settings")
    def change_settings() -> Response:
        require_own_server(nexus)
        body = json_object(strict_type=True)
        wanted = body.get("settings")
        if not isinstance(wanted, dict):
            raise BadRequest("no_settings", '"settings" is an object of names and values')
        reason = body.get("reason")
        if reason is not None and not isinstance(reason, str):
            raise BadRequest("invalid_reason", "'reason' is a text, or absent")
        nexus.live.change(wanted, reason, by=request.remote_addr or "unknown")
        return answer({"settings": nexus.live.describe()})

    @api.get("/api/ml/settings/audit")
    def audit() -> Response:
        return answer({"changes": nexus.live.audit(limit(100))})

    @api.get("/api/ml/dead-letters")
    def dead_letters() -> Response:
        args = request.args
        found = nexus.dead_letters.find(args.get("stream"), args.get("reason"), limit(100), args.get("cursor"))
        return answer(found)

    @api.post("/api/ml/dead-letters/redrive")
    def redrive() -> Response:
        require_own_page(nexus)
        body = json_object()
        ids = strings(body, "ids", 5000) if body.get("ids") is not None else None
        stream, reason = body.get("stream"), body.get("reason")
        if ids is None and stream is None and reason is None and body.get("all") is not True:
            raise BadRequest("nothing_named", 'give "ids", or "stream" and/or "reason", or "all": true')
        for name, value in (("stream", stream), ("reason", reason)):
            if value is not None and not isinstance(value, str):
                raise BadRequest(f"invalid_{name}", f"{name} is a text, or absent")
        report = nexus.dead_letters.redrive(ids, stream, reason, nexus.clock(), by=request.remote_addr or "unknown")
        nexus.taken()
        return answer(report)

    @api.get("/healthz")
    def alive() -> Response:
        return answer({"status": "alive", "version": nexus.version})

    @api.get("/readyz")
    def ready() -> Response:
        why = nexus.not_ready()
        return answer(
            {"status": "ready"} if why is None else {"status": "not ready", "why": why}, 200 if why is None else 503
        )

    @api.get("/nexus/feed.json")
    def feed() -> Response:
        made = Response(nexus.serving.feed("history" in request.args), content_type=JSON)
        made.headers["Cache-Control"] = "no-store"
        return made

    return api


Bare = tuple[int, list[tuple[str, str]], bytes]  # status, headers and body of a route that is dispatched ahead of Flask


def ingest_response(nexus: Runtime, environ: dict[str, Any]) -> Bare:
    """POST /api/ml/events/ingest, from a bare WSGI environ."""

    def post() -> tuple[int, dict[str, Any]]:
        body, query = _read_body(environ), query_of(environ)
        encoding = environ.get("HTTP_CONTENT_ENCODING") or ""
        return nexus.ingest.post(body, environ.get("CONTENT_TYPE") or "", encoding, query)

    return _bare(environ, post)


def features_response(nexus: Runtime, environ: dict[str, Any], user_id: str) -> Bare:
    """GET /api/ml/features/{user_id}, from a bare WSGI environ."""
    return _bare(environ, lambda: (200, vector(nexus, user_id, query_of(environ))))


def features_responses(nexus: Runtime, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[Bare]:
    """The same for several users as of now, each with its environ: they share a trip to the store."""
    now, failed = nexus.clock(), None
    try:
        found = nexus.features.combine_each([(user_id, names_in(query_of(environ))) for user_id, environ in asked])
    except (BadRequest, TooLarge):  # of one of them: then each by itself
        return [features_response(nexus, environ, user_id) for user_id, environ in asked]
    except Exception as error:  # noqa: BLE001  each of them is told
        failed = error

    def route(index: int) -> tuple[int, dict[str, Any]]:
        if failed is not None:
            raise failed
        return 200, vector_of_now(nexus, asked[index][0], found[index], now)

    try:
        return [_bare(environ, partial(route, index)) for index, (_, environ) in enumerate(asked)]
    finally:
        failed = None  # its traceback refers to this frame: a cycle, which may never be freed


def _bare(environ: dict[str, Any], route: Callable[[], tuple[int, dict[str, Any]]]) -> Bare:
    headers = [("Content-Type", JSON)]
    try:
        status, made = route()
        return status, headers, _encode(made)
    except NexusError as error:
        if isinstance(error, StoreError | Fenced):
            headers.append(("Retry-After", str(error.retry_after)))
        return error.status, headers, _encode(error.body())
    except Exception:
        log.exception("request failed", extra={"path": environ.get("PATH_INFO")})
        return 500, headers, _encode(INTERNAL)


def _read_body(environ: dict[str, Any]) -> bytes:
    length = environ.get("CONTENT_LENGTH") or ""
    if length.isdecimal() and (len(length) > 18 or int(length) > MAX_BODY_BYTES):
        raise TooLarge("body_too_large", f"a body is at most {MAX_BODY_BYTES} bytes; send fewer events at a time")
    body: bytes = environ["wsgi.input"].read(int(length) if length.isdecimal() else MAX_BODY_BYTES + 1)
    if length.isdecimal() and len(body) < int(length):
        raise BadRequest("cut_off", f"the body ended after {len(body)} of {length} bytes")
    if not length and _is_torn(environ, body):
        raise BadRequest("cut_off", "the body ended within its last line")
    return body


def _is_torn(environ: dict[str, Any], body: bytes) -> bool:
    """Whether chunked NDJSON ends within a line: the server says nothing of chunks that broke off, and the lines before would
    be taken from a sender who will send them all again. In any other form such a body cannot be read anyway."""
    kind, last = (environ.get("CONTENT_TYPE") or "").lower(), body[body.rfind(b"\n") + 1 :].strip()
    if not last or environ.get("HTTP_CONTENT_ENCODING") or not ("ndjson" in kind or "jsonl" in kind):
        return False
    try:
        _decode(last)
    except (ValueError, RecursionError) as error:
        return not last.endswith(b"}") or "truncated" in str(error)  # else it is that event's own fault
    return False


def query_of(environ: dict[str, Any]) -> Mapping[str, str]:
    """The query's parameters, of each the first."""
    text = environ.get("QUERY_STRING")
    return _parsed(text) if text else {}


@lru_cache(maxsize=500)  # who asks for some features asks for the same ones again
def _parsed(text: str) -> Mapping[str, str]:
    return MappingProxyType(dict(reversed(parse_qsl(text, keep_blank_values=True))))


def _both_features(nexus: Runtime, user_id: str) -> Response:
    found = nexus.features.combine([user_id])[user_id]
    if not found.known:
        found = of_partner_alone(nexus, user_id)
    return answer(
        {
            "python_features": {"user_id": user_id, "features": found.python},
            "combined_features": {
                "python_features": found.python,
                "typescript_features": found.nexus,
                "combined": found.combined,
            },
            "meta": found.meta,
            **found.notes(),
        }
    )


def _aggregates(nexus: Runtime) -> Response:
    by, step_name = request.args.get("by", "type"), request.args.get("step", "1m")
    if by not in DIMENSIONS:
        raise BadRequest("unknown_dimension", f"by is {by!r}; it takes {', '.join(DIMENSIONS)}")
    if step_name not in STEPS_S:
        raise BadRequest("unknown_step", f"step is {step_name!r}; it takes {', '.join(STEPS_S)}")
    step, now_s = STEPS_S[step_name], nexus.clock() // 1000
    since, until = request.args.get("since"), request.args.get("until")
    # Events may be stamped up to an hour ahead; the default begins 60 steps before the present all the same.
    last = now_s + (3600 if step > 1 else 0) if until is None else read_moment("until", until) // 1000
    begin = (now_s if until is None else last) - 60 * step
    begin = max(begin, FIRST_MS // 1000) if since is None else read_moment("since", since) // 1000
    # Not a list before it is known to be short.
    starts = range(begin // step * step, last + 1, step) if begin <= last else range(0)
    if len(starts) > MAX_POINTS:
        raise BadRequest(
            "too_many_points",
            f"since, until and step ask for {len(starts)} points; at most {MAX_POINTS}: take a larger step",
        )
    nexus.catch_up("aggregates")
    stream = nexus.stream("aggregates")
    series = counted(nexus.store, stream if isinstance(stream, Aggregates) else None, by, step, starts)
    users, users_of = 0, None
    if starts:
        hours = range(starts[0] // 3600 * 3600, last + 1, 3600)
        users = nexus.store.call("PFCOUNT", *[f"{keys.SEEN}{hour}" for hour in hours])
        users_of = {"since": rfc3339(hours[0] * 1000), "until": rfc3339(hours[-1] * 1000 + 3_599_999)}
    rows = [
        {"key": key, "points": [[rfc3339(at * 1000), n] for at, n in sorted(points.items())]}
        for key, points in sorted(series.items())
    ]
    kept_since = rfc3339(nexus.clock() - kept_ms(step, nexus.settings.event_retention_hours * 3_600_000))
    return answer({"series": rows, "distinct_users": users, "distinct_users_of": users_of, "kept_since": kept_since})


def _fraud(nexus: Runtime, transactions: list[str]) -> dict[str, dict[str, Any]]:
    stream = nexus.stream("inference")
    return nexus.lookups.predictions(transactions, nexus.clock(), stream if isinstance(stream, Inference) else None)
