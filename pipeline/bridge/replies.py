"""What the partner's replies mean: whether events were taken, refused or failed, in which words, and where a redirect
leads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec

from pipeline.bridge.circuit import MAX_RETRY_AFTER_S
from pipeline.errors import PartnerContract, PartnerError, PartnerStatus, PartnerTimeout, PartnerUnreachable
from pipeline.settings import masked

KEPT_CHARS = 500  # of an answer's text
KINDS = ("timeout", "connect", "status", "contract", "error")
BUSY = (429, 503)
_FINAL = (400, 406, 409, 413, 414, 415, 422, 431, 451)
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Delivery:
    """What became of `events` that were sent in one call, or one by one with the same outcome: all are settled, taken
    or (index, reason) in `rejected`; or none is, and `error` says why.

    `at` is when it began, epoch ms, and `url` the address that was called. `status` and `answer` are the last call's,
    `slowest_ms` the longest call's; `sent_bytes` and `got_bytes` count bodies.
    """

    at: int
    events: int
    status: int | None = None
    latency_ms: float = 0.0
    slowest_ms: float = 0.0
    answer: str = ""
    rejected: list[tuple[int, str]] = field(default_factory=list)
    error: PartnerError | None = None
    sent_bytes: int = 0
    got_bytes: int = 0
    url: str = ""

    def add(self, other: Delivery) -> None:
        """Another event was sent in a call of its own, and went as well."""
        self.events += other.events
        self.status, self.answer = other.status, other.answer
        self.latency_ms += other.latency_ms
        self.slowest_ms = max(self.slowest_ms, other.slowest_ms)
        self.sent_bytes += other.sent_bytes
        self.got_bytes += other.got_bytes


def retryable(error: PartnerError) -> bool:
    """May the same request succeed later? Timeouts, connections, 5xx and 429 may. So may what met a wrong address or
    password (401, 403, 404, 405, 410, a redirect), once somebody has put it right."""
    return not (isinstance(error, PartnerStatus) and error.status_code in _FINAL)


def perhaps_its_events(error: PartnerError) -> bool:
    """Of a call that may be made again: may what it held be the reason? An event can make the partner fail, hang or
    fall, and any status may be meant for it alone (404: no such user), but no event makes the partner be away."""
    return isinstance(error, (PartnerStatus, PartnerTimeout)) or bool(error.details.get("broke_off"))


def on_proof_alone(error: PartnerError) -> bool:
    """Such statuses are most often the partner's (busy, misconfigured): however long one lasts, an event is to blame for it only
    where others are taken meanwhile."""
    return (
        retryable(error) and isinstance(error, PartnerStatus) and (error.status_code < 500 or error.status_code in BUSY)
    )


def kind_of(error: PartnerError) -> str:
    """The error's kind as the attempt log names it: one of KINDS."""
    if isinstance(error, PartnerTimeout):
        return "timeout"
    if isinstance(error, PartnerUnreachable):
        return "connect"
    if isinstance(error, PartnerStatus):
        return "status"
    return "contract" if isinstance(error, PartnerContract) else "error"


def read_json(raw: bytes) -> Any:
    """Raises ValueError for what is no JSON, or nested beyond measure."""
    try:
        return _decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_object(what: str, status: int, headers: httpx.Headers, raw: bytes) -> dict[str, Any]:
    """The object that a call was answered with. Raises PartnerError."""
    if not 200 <= status < 300:
        raise failure(what, status, headers, raw)
    try:
        answer = read_json(raw)
    except ValueError as error:
        raise PartnerContract(f"{what} answered {status}, but not JSON") from error
    if not isinstance(answer, dict):
        raise PartnerContract(f"{what} answered {status} with something else than an object")
    return answer


def verdicts(raw: bytes, sent: int) -> list[tuple[int, str]]:
    """The refused ones of a batch by index. Raises ValueError where the answer is not the agreed one."""
    try:
        answer = read_json(raw)
        rejected = [(int(r["index"]), _why(r)) for r in answer.get("rejected") or []]
        total = answer["accepted"] + answer.get("duplicates", 0) + len(rejected)
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if total != sent:
        raise ValueError(f"its counts do not add up to the {sent} events sent")
    if any(not 0 <= index < sent for index, _ in rejected) or len(dict(rejected)) < len(rejected):
        raise ValueError("it rejects events that were not sent")
    return rejected


def refusal(raw: bytes) -> str | None:
    """Why a 2xx answer to one event says all the same that it was refused, None where it does not."""
    if b'"rejected"' not in raw:
        return None
    try:
        answer = read_json(raw)
    except ValueError:
        return None
    refused = answer.get("rejected") if isinstance(answer, dict) else None
    if not isinstance(refused, list) or not refused:
        return None
    first = refused[0]
    return _why(first) if isinstance(first, dict) else str(first)


def _why(rejected: dict[str, Any]) -> str:
    """The words of a refusal, behind the field where one is named."""
    said, field = str(rejected.get("message") or rejected.get("code") or "refused"), rejected.get("field")
    return said if not field or field == "event" or str(field) in said else f"{field}: {said}"


def failure(what: str, status: int, headers: httpx.Headers, raw: bytes) -> PartnerStatus:
    said = words(raw)
    error = PartnerStatus(f"{what} answered {status}{': ' + said if said else ''}", status)
    error.details["retry_after_s"] = retry_after_s(headers)
    return error


def words(raw: bytes) -> str:
    return raw[:KEPT_CHARS].decode(errors="replace").strip()


def retry_after_s(headers: httpx.Headers, now: float | None = None) -> float | None:
    """What a Retry-After header asks for, in seconds, bounded; None without a readable one."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        wanted = parsedate_to_datetime(text).timestamp() - (time.time() if now is None else now)
    except (TypeError, ValueError, LookupError, OverflowError):
        return None
    return min(max(wanted, 0.0), MAX_RETRY_AFTER_S)


def target_of(url: httpx.URL, method: str, path: str, status: int, headers: httpx.Headers) -> httpx.URL | None:
    """Where a redirect leads, None for none. A POST is repeated as it was, also after 301 and 302, whose change to GET
    is a habit of browsers; after 303, or to another host, somebody has to set the address. Name and password go along, but
    not from https to http. Raises PartnerStatus."""
    location = headers.get("Location")
    if location is None or status not in (301, 302, 303, 307, 308):
        return None
    target = url.join(location)
    if target.scheme in ("http", "https") and target.host == url.host and (status != 303 or method == "GET"):
        exposed = url.scheme == "https" and target.scheme == "http"
        return target if target.userinfo or exposed else target.copy_with(userinfo=url.userinfo)
    base = masked(str(target)).rstrip("/").removesuffix(path)
    raise PartnerStatus(f"{method} {path} is redirected ({status}): set PYTHON_EVENT_API_URL to {base}", status)
