"""What all routes share: answers and errors in JSON, and the parameters they read, or the error that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from flask import Response, request
from werkzeug.exceptions import RequestEntityTooLarge

from pipeline.errors import BadRequest, Fenced, NexusError, StoreError, TooLarge
from pipeline.web.own_host import require_own
from pipeline.web.posted import MAX_BODY_BYTES, read_json, require_few, sound, unpack

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

JSON = "application/json"
_LONGEST = 128  # characters of an id or a name
INTERNAL = {"error": {"code": "internal", "message": "this should not happen; the log has the details", "details": {}}}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encode(body), status, headers, content_type=JSON)


def error_answer(error: NexusError) -> Response:
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, StoreError | Fenced) else None
    return answer(error.body(), error.status, headers)


def require_own_page(nexus: Runtime) -> None:
    """Raises NexusError where a page asks that is not this server's own. Programs, which name no origin, may come by any name."""
    if "Origin" in request.headers:
        require_own_server(nexus)


def require_own_server(nexus: Runtime) -> None:
    """Raises NexusError where a page of another origin asks, and where the server is called by a name that is not its own: a page
    elsewhere may have that lead here."""
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    require_own(host, origin, nexus.own_names, nexus.settings.nexus_port)


def json_object(strict_type: bool = False) -> dict[str, Any]:
    if strict_type and request.mimetype != JSON:
        raise NexusError("not_json", f"Content-Type is {request.mimetype or 'absent'}; it takes {JSON}", status=415)
    raw = _body()
    try:
        body = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("not_json", f"the body is not JSON: {error}") from error
    return _an_object(body)


def object_with_events() -> dict[str, Any]:
    """As json_object(), but an event that cannot be decoded is not the fault of all: its verdict stands in its place."""
    posted, is_sound = read_json(_body())
    body = _an_object(posted)
    if not is_sound and isinstance(events := body.get("events"), list):
        require_few(len(events))
        body["events"] = [sound(event) for event in events]
    return body


def _body() -> bytes:
    try:
        raw = request.get_data(cache=False)
    except RequestEntityTooLarge:
        raw = None
    if raw is None or len(raw) > MAX_BODY_BYTES:  # one byte more is read of a body without a length (routes.register)
        raise TooLarge("body_too_large", f"a body is at most {MAX_BODY_BYTES} bytes")
    return unpack(raw, request.headers.get("Content-Encoding", ""))


def _an_object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadRequest("not_an_object", "the body is a JSON object")
    return body


def required(name: str) -> str:
    value = request.args.get(name)
    if not value:
        raise BadRequest(f"no_{name}", f"{name} is required")
    return value


def number(text: str) -> int:
    """A whole number of a few digits, else -1: int() itself refuses what has thousands of them, and takes those of any script."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1


def limit(default: int) -> int:
    text = request.args.get("limit", str(default))
    if not 1 <= number(text) <= 1000:
        raise BadRequest("invalid_limit", f"limit is {text!r}; it takes a number from 1 to 1000")
    return int(text)


def strings(body: dict[str, Any], name: str, most: int) -> list[str]:
    values = body.get(name)
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise BadRequest(f"no_{name}", f"{name} is an array of strings")
    return few_and_short(name, values, most)


def few_and_short(name: str, values: list[str], most: int) -> list[str]:
    """The values, which an answer may repeat many times over. Raises TooLarge, BadRequest."""
    if len(values) > most:
        raise TooLarge(f"too_many_{name}", f"{name} has {len(values)} entries; at most {most}")
    if (longest := max(map(len, values), default=0)) > _LONGEST:
        message = f"{name} has an entry of {longest} characters; each has at most {_LONGEST}"
        raise BadRequest(f"invalid_{name}", message, details={"field": name})
    return values
