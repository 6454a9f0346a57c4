"""The HTTP client of the Python service: every call under a total deadline, failures told apart, capabilities found
out.

A partner may have only GET /health and POST /events; what else it supports it says in its health answer's "supports".
Of a partner over https with a certificate of its own making, SSL_CERT_FILE names the certificate to trust.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import certifi
import httpx
import msgspec

from pipeline.circuit import MAX_RETRY_AFTER_S
from pipeline.errors import PartnerContract, PartnerError, PartnerStatus, PartnerTimeout, PartnerUnreachable
from pipeline.health import Health, judge
from pipeline.settings import masked

MAX_BODY_BYTES = 4 << 20
MAX_REDIRECTS = 3
_SINGLE_ANSWER = 1 << 16  # bytes; of an answer to one event the status is what counts
_KEPT_BODY_CHARS = 500
_SINGLES_MS = 1000.0  # how long events are sent one by one before it is looked whether that is still wanted
_FINAL = (400, 405, 406, 409, 410, 411, 413, 414, 415, 422, 431, 451)
_WITHOUT_BATCH = (404, 405, 501)
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Delivery:
    """What became of events sent. The first `done` of them are settled: taken, or (index, reason) in `rejected`.

    `error` is why the rest are not: None when there is no rest, or no more than a second was to be spent. `status`
    and `answer` are the last call's, `slowest_ms` the longest call's; `sent_bytes` and `got_bytes` count bodies.
    """

    status: int | None = None
    latency_ms: float = 0.0
    slowest_ms: float = 0.0
    answer: str = ""
    done: int = 0
    rejected: list[tuple[int, str]] = field(default_factory=list)
    error: PartnerError | None = None
    sent_bytes: int = 0
    got_bytes: int = 0


def retryable(error: PartnerError) -> bool:
    """May the same request succeed later? Timeouts, connections, 5xx and 429 may. Nor is an event to blame for a wrong
    address or password (401, 403, 404, a redirect): such calls are made again too, until somebody has put it right."""
    return not (isinstance(error, PartnerStatus) and error.status_code in _FINAL)


def kind_of(error: PartnerError) -> str:
    """The error's kind as the attempt log names it."""
    if isinstance(error, PartnerTimeout):
        return "timeout"
    if isinstance(error, PartnerUnreachable):
        return "connect"
    if isinstance(error, PartnerStatus):
        return "status"
    return "contract" if isinstance(error, PartnerContract) else "error"


class Partner:
    """All calls are coroutines of the bridge's event loop. `url` and `timeout_ms` are read anew for every call."""

    def __init__(self, url: Callable[[], str], timeout_ms: Callable[[], int], clock: Callable[[], int]) -> None:
        self._url, self._timeout_ms, self._clock = url, timeout_ms, clock
        self._client: httpx.AsyncClient | None = None  # building one costs 20 ms: it is kept
        self._said: frozenset[str] = frozenset()
        self.lacks: dict[str, str] = {}  # what it says it supports but does not, and how that was found out
        self._known_url = ""

    @property
    def url(self) -> str:
        return self._url()

    @property
    def supports(self) -> frozenset[str]:
        """What the partner at this address can do beside the two routes that every partner has."""
        return frozenset() if self.unknown else self._said - self.lacks.keys()

    def remembered(self) -> dict[str, Any]:
        """The capabilities as they are kept in the store."""
        return {"url": self._known_url, "supports": sorted(self._said), "lacks": self.lacks}

    def recall(self, kept: dict[str, Any]) -> None:
        """Take over capabilities found out earlier; the next health check looks again."""
        self._known_url, self._said, self.lacks = str(kept["url"]), frozenset(kept["supports"]), dict(kept["lacks"])

    def rediscover(self) -> None:
        """Forget what was found lacking: after a recovery it may be another version that answers."""
        self.lacks = {}

    @property
    def unknown(self) -> bool:
        """The partner at this address has not answered a health check yet."""
        return self._known_url != self._url()

    def open(self) -> None:
        """Make the client, which takes a moment, before the first call's time runs."""
        if self._client is None:
            self._client = _client()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def health(self) -> Health:
        """Ask for the partner's health; never raises PartnerError, the answer says what happened."""
        url, now = self._url(), self._clock()
        began = time.perf_counter()
        try:
            status, _, raw = await self._call("GET", "/health")
        except PartnerError as error:
            return Health("offline", error.message, url, now)
        took = (time.perf_counter() - began) * 1000
        try:
            body = _decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            body = raw.decode(errors="replace")[:_KEPT_BODY_CHARS]
        if 200 <= status < 300:
            self._learn(url, body)
        verdict, reason = judge(status, took, body, self._timeout_ms())
        return Health(verdict, reason, url, now, status, took, body, self.supports)

    def _learn(self, url: str, body: Any) -> None:
        if url != self._known_url:
            self._known_url, self.lacks = url, {}
        listed = body.get("supports") if isinstance(body, dict) else None
        self._said = frozenset(s for s in listed if isinstance(s, str)) if isinstance(listed, list) else frozenset()

    async def send(self, events: Sequence[bytes]) -> Delivery:
        """Deliver stored events (JSON each), in order, as far as it goes. Raises nothing: the delivery tells."""
        if "batch" in self.supports and (delivery := await self._send_batch(events)) is not None:
            return delivery
        return await self._send_singly(events)

    async def _send_batch(self, events: Sequence[bytes]) -> Delivery | None:
        """All in one call; None when it turned out that the partner cannot do that."""
        body = b'{"events":[' + b",".join(events) + b"]}"
        delivery = Delivery(sent_bytes=len(body))
        key = event_id(events[0]) if len(events) == 1 else f"{event_id(events[0])}+{len(events)}+{event_id(events[-1])}"
        began = time.perf_counter()
        try:
            status, headers, raw = await self._call("POST", "/events/batch", body, {"Idempotency-Key": key})
        except PartnerError as error:
            delivery.error = error
            return delivery
        finally:
            delivery.latency_ms = delivery.slowest_ms = (time.perf_counter() - began) * 1000
        delivery.status, delivery.answer, delivery.got_bytes = status, _words(raw), len(raw)
        if status in _WITHOUT_BATCH:
            self.lacks["batch"] = f"POST /events/batch answered {status}"
            return None
        if not 200 <= status < 300:
            delivery.error = _failure("POST /events/batch", status, headers, raw)
            return delivery
        try:
            delivery.rejected = _verdicts(raw, len(events))
        except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            # What it did with them is unknown: each is sent by itself, under its own id, where the status says all.
            self.lacks["batch"] = f"POST /events/batch answered {status} with something else than agreed: {error}"
            return None
        delivery.done = len(events)
        return delivery

    async def _send_singly(self, events: Sequence[bytes]) -> Delivery:
        delivery = Delivery()
        for index, event in enumerate(events):
            began = time.perf_counter()
            delivery.sent_bytes += len(event)
            try:
                headers = {"Idempotency-Key": event_id(event)}
                delivery.status, answered, raw = await self._call("POST", "/events", event, headers, _SINGLE_ANSWER)
            except PartnerError as error:
                delivery.error, delivery.status = error, None
                return delivery
            finally:
                took = (time.perf_counter() - began) * 1000
                delivery.latency_ms += took
                delivery.slowest_ms = max(delivery.slowest_ms, took)
            delivery.answer = _words(raw)
            delivery.got_bytes += len(raw)
            if not 200 <= delivery.status < 300:
                refusal = _failure("POST /events", delivery.status, answered, raw)
                if retryable(refusal):
                    delivery.error = refusal
                    return delivery
                delivery.rejected.append((index, refusal.message))
            elif b'"rejected"' in raw and (reason := _refusal(raw)) is not None:
                delivery.rejected.append((index, reason))
            delivery.done = index + 1
            if delivery.latency_ms > _SINGLES_MS:
                break
        return delivery

    async def features(self, user_id: str) -> dict[str, Any] | None:
        """The partner's features of a user from its own route, None where it knows none."""
        status, headers, raw = await self._call("GET", f"/features/{quote(user_id, safe='')}")
        if status == 404:
            return None
        return self._object("GET /features", status, headers, raw)

    async def predict(self, body: bytes) -> dict[str, Any]:
        """The partner's own prediction."""
        status, headers, raw = await self._call("POST", "/predict", body)
        return self._object("POST /predict", status, headers, raw)

    @staticmethod
    def _object(what: str, status: int, headers: httpx.Headers, raw: bytes) -> dict[str, Any]:
        if not 200 <= status < 300:
            raise _failure(what, status, headers, raw)
        try:
            answer = _decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PartnerContract(f"{what} answered {status}, but not JSON") from error
        if not isinstance(answer, dict):
            raise PartnerContract(f"{what} answered {status} with something else than an object")
        return answer

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        most: int = MAX_BODY_BYTES,
    ) -> tuple[int, httpx.Headers, bytes]:
        """One exchange within the timeout, redirects on the same host followed. An answer's body is read up to
        `most` bytes."""
        base, timeout_s = self._url().rstrip("/"), self._timeout_ms() / 1000
        sent = {"Content-Type": "application/json", **(headers or {})} if body is not None else headers
        self.open()
        try:
            url = httpx.URL(base + path)
            # httpx's own timeouts are per read: a partner that drips a byte at a time would never run into them.
            async with asyncio.timeout(timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    status, answered, raw = await self._exchange(method, url, body, sent, most)
                    target = _target(url, method, status, answered)
                    if target is None:
                        return status, answered, raw
                    url = target
            raise PartnerStatus(f"{method} {path} was redirected more than {MAX_REDIRECTS} times", status)
        except TimeoutError as error:
            raise PartnerTimeout(f"{method} {path} was not answered within {timeout_s:g} s") from error
        except (httpx.ConnectError, OSError) as error:
            raise PartnerUnreachable(f"no connection to {masked(base)}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PartnerUnreachable(f"{method} {path} broke off: {str(error) or type(error).__name__}") from error

    async def _exchange(
        self, method: str, url: httpx.URL, body: bytes | None, headers: dict[str, str] | None, most: int
    ) -> tuple[int, httpx.Headers, bytes]:
        assert self._client is not None
        for last_try in (False, True):
            raw = bytearray()
            try:
                async with self._client.stream(method, url, content=body, headers=headers) as response:
                    async for part in response.aiter_bytes():
                        raw += part
                        if len(raw) >= most:
                            break
                    return response.status_code, response.headers, bytes(raw)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A kept connection that the partner has just closed looks so; a fresh one tells.
                if last_try or raw:
                    raise
        raise AssertionError("unreachable")


def _client() -> httpx.AsyncClient:
    trusted = ssl.create_default_context()  # the system's certificates, or those of SSL_CERT_FILE and SSL_CERT_DIR
    trusted.load_verify_locations(certifi.where())
    limits = httpx.Limits(max_connections=32, max_keepalive_connections=32, keepalive_expiry=4.0)
    return httpx.AsyncClient(timeout=None, limits=limits, follow_redirects=False, trust_env=False, verify=trusted)


def _target(url: httpx.URL, method: str, status: int, headers: httpx.Headers) -> httpx.URL | None:
    """Where a redirect leads, None for none. A POST is repeated where the status allows (307, 308), and events leave
    for another host only if somebody sets its address."""
    location = headers.get("Location")
    if location is None or status not in ((301, 302, 303, 307, 308) if method == "GET" else (307, 308)):
        return None
    target = url.join(location)
    if target.scheme not in ("http", "https") or target.host != url.host:
        shown = masked(str(target))
        raise PartnerStatus(f"{method} {url.path} is redirected to {shown}: set PYTHON_EVENT_API_URL to it", status)
    return target


def retry_after_s(headers: httpx.Headers, now: float | None = None) -> float | None:
    """What a Retry-After header asks for, in seconds, bounded; None without a readable one."""
    text = headers.get("Retry-After")
    if text is None:
        return None
    if text.strip().isdigit():
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        wanted = parsedate_to_datetime(text).timestamp() - (time.time() if now is None else now)
    except (TypeError, ValueError):
        return None
    return min(max(wanted, 0.0), MAX_RETRY_AFTER_S)


def event_id(event: bytes) -> str:
    """The id of a stored event, which begins with it (events.py), as a header can carry it: percent-encoded, in the
    form of RFC 5987, where it has more than visible ASCII."""
    start = len(b'{"event_id":"')
    raw = event[start : event.index(b'"', start)]
    if raw.isascii() and b"\\" not in raw:
        return raw.decode()
    return "utf-8''" + quote(_decode_id(event).event_id, safe="")


class _OnlyId(msgspec.Struct):
    event_id: str


_decode_id = msgspec.json.Decoder(_OnlyId).decode


def _verdicts(raw: bytes, sent: int) -> list[tuple[int, str]]:
    """The refused ones of a batch by index. Raises where the answer is not the agreed one."""
    answer = _decode(raw)
    rejected = [
        (int(r["index"]), str(r.get("message") or r.get("code") or "refused")) for r in answer.get("rejected") or []
    ]
    if answer["accepted"] + answer.get("duplicates", 0) + len(rejected) != sent:
        raise ValueError(f"its counts do not add up to the {sent} events sent")
    if any(not 0 <= index < sent for index, _ in rejected) or len(dict(rejected)) < len(rejected):
        raise ValueError("it rejects events that were not sent")
    return rejected


def _refusal(raw: bytes) -> str | None:
    """Why a 2xx answer to one event says all the same that it was refused, None where it does not."""
    try:
        answer = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    refused = answer.get("rejected") if isinstance(answer, dict) else None
    if not isinstance(refused, list) or not refused:
        return None
    first = refused[0]
    return str(first.get("message") or first.get("code") or "refused") if isinstance(first, dict) else str(first)


def _failure(what: str, status: int, headers: httpx.Headers, raw: bytes) -> PartnerStatus:
    said = _words(raw)
    error = PartnerStatus(f"{what} answered {status}{': ' + said if said else ''}", status)
    error.details["retry_after_s"] = retry_after_s(headers)
    return error


def _words(raw: bytes) -> str:
    return raw[:_KEPT_BODY_CHARS].decode(errors="replace").strip()
