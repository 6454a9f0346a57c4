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
from typing import Any
from urllib.parse import quote

import certifi
import httpx
import msgspec

from pipeline.bridge.health import Health, judge
from pipeline.bridge.replies import (
    Delivery,
    failure,
    read_json,
    read_object,
    refusal,
    retryable,
    target_of,
    verdicts,
    words,
)
from pipeline.bridge.transport import KeptConnections
from pipeline.errors import PartnerError, PartnerStatus, PartnerTimeout, PartnerUnreachable
from pipeline.settings import masked

MAX_BODY_BYTES = 4 << 20
MAX_REDIRECTS = 3
MOST_QUESTIONS = 16  # at a time, for requests: half of the connections is left to events and health checks
LACKS_MS = 300_000  # after so long, good health is reason to try again what was found lacking
_SINGLE_ANSWER = 1 << 16  # bytes; of an answer to one event the status is what counts
_KEPT_BODY = 1 << 13  # bytes of a health answer that are passed on as they are
_JUST_MS = 10_000
_SINGLES_MS = 1000.0  # how long events are sent one by one before it is looked whether that is still wanted
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "Connection": "keep-alive", "User-Agent": "nexus"}
_WITHOUT_ROUTE = (404, 405, 410, 501)


class Partner:
    """All calls are coroutines of the bridge's event loop. `url` and `timeout_ms` are read anew for every call."""

    def __init__(self, url: Callable[[], str], timeout_ms: Callable[[], int], clock: Callable[[], int]) -> None:
        self._url, self._timeout_ms, self._clock = url, timeout_ms, clock
        # Whether the store is full, so that what is delivered lets it let go of events.
        self.makes_room: Callable[[], bool] = lambda: False
        # Without httpx's client around it, which would cost as much again. Building one takes 20 ms: it is kept.
        self._transport: KeptConnections | None = None
        self._said: frozenset[str] = frozenset()
        self.lacks: dict[str, str] = {}  # what it says it supports but does not, and how that was found out
        self._lacked_at = 0
        self._known_url = ""
        self._took_batch = False  # the partner at this address has taken events of a batch
        self._asking = asyncio.Semaphore(MOST_QUESTIONS)
        # The deadlines of calls: their address, and when they began.
        self._under_way: dict[asyncio.Timeout, tuple[str, float]] = {}
        self._looked = ("", 0)

    @property
    def url(self) -> str:
        return self._url()

    @property
    def supports(self) -> frozenset[str]:
        """What the partner at this address can do beside the two routes that every partner has."""
        return frozenset() if self.unknown else self._said - self.lacks.keys()

    def remembered(self) -> dict[str, Any]:
        """The capabilities as they are kept in the store."""
        return {
            "url": self._known_url,
            "supports": sorted(self._said),
            "lacks": dict(self.lacks),
            "lacked_at": self._lacked_at,
        }

    def recall(self, kept: dict[str, Any]) -> None:
        """Take over capabilities found out earlier; the next health check looks again."""
        self._known_url, self._said, self.lacks = str(kept["url"]), frozenset(kept["supports"]), dict(kept["lacks"])
        self._lacked_at = int(kept.get("lacked_at", 0))

    def rediscover(self) -> None:
        """Forget what was found lacking: after a recovery it may be another version that answers. But for what was found just now: it
        may be what the recovery came of."""
        if not 0 <= self._clock() - self._lacked_at < _JUST_MS:
            self.lacks = {}
        self._took_batch = False

    def _lack(self, url: str, what: str, why: str) -> None:
        """Of the partner at `url`, which need not be the one that is called from now on."""
        if url == self._url():
            self.lacks, self._lacked_at = {**self.lacks, what: why}, self._clock()

    @property
    def unknown(self) -> bool:
        """The partner at this address has not answered a health check yet."""
        return self._known_url != self._url()

    def open(self) -> None:
        """Make what takes a moment before the first call's time runs."""
        if self._transport is None:
            self._transport = _transport()

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()
            self._transport = None

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
            body = read_json(raw)
        except ValueError:
            body = words(raw)
        if 200 <= status < 300:
            self._learn(url, body)
        verdict, reason = judge(status, took, body, self._timeout_ms())
        if self.lacks and verdict == "online" and not 0 <= now - self._lacked_at < LACKS_MS:
            self.rediscover()
        kept = body if len(raw) <= _KEPT_BODY else words(raw)
        return Health(verdict, reason, url, now, status, took, kept, self.supports)

    def _learn(self, url: str, body: Any) -> None:
        if url != self._known_url:
            self._known_url = url
            self.lacks, self._took_batch = {}, False
        listed = body.get("supports") if isinstance(body, dict) else None
        self._said = frozenset(s for s in listed if isinstance(s, str)) if isinstance(listed, list) else frozenset()

    async def send(self, events: Sequence[bytes]) -> list[Delivery]:
        """Deliver stored events (JSON each), in order, as far as it goes: at least the first, and up to the first
        error. Raises nothing: the deliveries tell."""
        url = self._url()
        if "batch" not in self.supports or (batch := await self._send_batch(url, events)) is None:
            return await self._send_singly(events)
        if len(events) > 1 or batch.error is None or retryable(batch.error):
            return [batch]
        # Refused though it was alone. Perhaps it is the batch that is refused: the route that all partners have tells.
        single = await self._send_singly(events)
        error = single[0].error
        if error is None and not self._took_batch:
            self._lack(url, "batch", f"{batch.error.message}; POST /events took the same event")
        return [batch] if isinstance(error, PartnerStatus) and error.status_code in _WITHOUT_ROUTE else single

    async def send_singly(self, event: bytes, why: str) -> list[Delivery]:
        """Deliver an event that failed again and again in batches, for this reason, though it was alone, by the route that all
        partners have. Where that takes it, it is the batches that fail."""
        url = self._url()
        made = await self._send_singly([event])
        if made[0].error is None and "batch" in self.supports and not self._took_batch:
            self._lack(url, "batch", f"{why}; POST /events took the same event")
        return made

    async def _send_batch(self, url: str, events: Sequence[bytes]) -> Delivery | None:
        """All in one call; None when it turned out that the partner cannot do that."""
        body = b'{"events":[' + b",".join(events) + b"]}"
        key = event_id(events[0]) if len(events) == 1 else f"{event_id(events[0])}+{len(events)}+{event_id(events[-1])}"
        delivery, raw = await self._post("/events/batch", body, key, len(events))
        status = delivery.status
        if status in _WITHOUT_ROUTE:
            self._lack(url, "batch", f"POST /events/batch answered {status}")
            return None
        if delivery.error is not None:
            return delivery
        try:
            delivery.rejected = verdicts(raw, len(events))
        except ValueError as error:
            # What it did with them is unknown: each is sent by itself, under its own id, where the status says all.
            self._lack(url, "batch", f"POST /events/batch answered {status} with something else than agreed: {error}")
            return None
        self._took_batch = self._took_batch or len(delivery.rejected) < len(events)
        return delivery

    async def _send_singly(self, events: Sequence[bytes]) -> list[Delivery]:
        """Calls for one event each, up to the first error or until it is time to look about."""
        made: list[Delivery] = []
        url, spent_ms = self._url(), 0.0
        for event in events:
            one, raw = await self._post("/events", event, event_id(event), 1, _SINGLE_ANSWER)
            if one.error is None and (reason := refusal(raw)) is not None:
                one.rejected = [(0, reason)]
            if made and not (one.error or one.rejected or made[-1].rejected):
                made[-1].add(one)
            else:
                made.append(one)
            spent_ms += one.latency_ms
            if one.error is not None or spent_ms > _SINGLES_MS or self._url() != url:
                break
        return made

    async def _post(
        self, path: str, body: bytes, key: str, events: int, most: int = MAX_BODY_BYTES
    ) -> tuple[Delivery, bytes]:
        """One call with events, and the answer's body; anything but a 2xx answer is the delivery's error."""
        delivery, raw = Delivery(self._clock(), events, sent_bytes=len(body), url=self._url()), b""
        began = time.perf_counter()
        sent = {"Idempotency-Key": key} | ({"Nexus-Makes-Room": "true"} if self.makes_room() else {})
        try:
            delivery.status, headers, raw = await self._call("POST", path, body, sent, most)
            delivery.answer, delivery.got_bytes = words(raw), len(raw)
            if not 200 <= delivery.status < 300:
                delivery.error = failure(f"POST {path}", delivery.status, headers, raw)
        except PartnerError as error:
            # Without the traceback, which refers to the delivery: a cycle, which may never be freed.
            delivery.error = error.with_traceback(None)
        delivery.latency_ms = delivery.slowest_ms = (time.perf_counter() - began) * 1000
        return delivery, raw

    async def features(self, user_id: str) -> dict[str, Any] | None:
        """The partner's features of a user from its own route, None where it knows none."""
        async with self._asking:
            status, headers, raw = await self._call("GET", f"/features/{quote(user_id, safe='')}")
        if status == 404:
            return None
        return read_object("GET /features", status, headers, raw)

    async def predict(self, body: bytes) -> dict[str, Any]:
        """The partner's own prediction."""
        async with self._asking:
            status, headers, raw = await self._call("POST", "/predict", body)
        return read_object("POST /predict", status, headers, raw)

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
        sent = {**_HEADERS, **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
        self.open()
        # httpx's own timeouts are per read: a partner that drips a byte at a time would never run into them.
        deadline = asyncio.timeout(timeout_s)
        self._under_way[deadline] = self._url(), asyncio.get_running_loop().time()
        try:
            url = httpx.URL(base + path)
            async with deadline:
                for _ in range(MAX_REDIRECTS + 1):
                    status, answered, raw = await self._exchange(method, url, body, sent, most)
                    target = target_of(url, method, path, status, answered)
                    if target is None:
                        return status, answered, raw
                    url = target
            raise PartnerStatus(f"{method} {path} was redirected more than {MAX_REDIRECTS} times", status)
        except TimeoutError as error:
            if base != self._url().rstrip("/"):
                raise PartnerTimeout(f"{method} {path} was given up: the address is another now") from error
            timeout_s = min(timeout_s, self._timeout_ms() / 1000)
            raise PartnerTimeout(f"{method} {path} was not answered within {timeout_s:g} s") from error
        except (httpx.ConnectError, OSError) as error:
            raise PartnerUnreachable(f"no connection to {masked(base)}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"{method} {path} broke off: {str(error) or type(error).__name__}"
            raise PartnerUnreachable(message, details={"broke_off": True}) from error
        finally:
            del self._under_way[deadline]

    def look(self) -> None:
        """Where the address or the timeout has been changed, what is under way keeps to it too. Costs next to nothing where it has
        not."""
        now = self._url(), self._timeout_ms()
        if now == self._looked:
            return
        self._looked = now
        for deadline, (url, began) in self._under_way.items():
            due = 0.0 if url != now[0] else began + now[1] / 1000
            if not deadline.expired() and (before := deadline.when()) is not None and due < before:
                deadline.reschedule(due)

    async def _exchange(
        self, method: str, url: httpx.URL, body: bytes | None, headers: dict[str, str], most: int
    ) -> tuple[int, httpx.Headers, bytes]:
        assert self._transport is not None
        request = httpx.Request(method, url, content=body, headers=headers)
        if url.username or url.password:
            request = next(httpx.BasicAuth(url.username, url.password).auth_flow(request))
        for last_try in (False, True):
            raw = bytearray()
            try:
                response = await self._transport.handle_async_request(request)
                try:
                    async for part in response.aiter_bytes():
                        raw += part
                        if len(raw) >= most:
                            break
                except httpx.DecodingError:
                    pass  # it says that it is packed, and is not: the status tells what became of the call
                finally:
                    await response.aclose()
                return response.status_code, response.headers, bytes(raw)
            except (httpx.RemoteProtocolError, httpx.ReadError):
                # A kept connection that the partner has just closed looks so; a fresh one tells.
                if last_try or raw:
                    raise
        raise AssertionError("unreachable")


def _transport() -> KeptConnections:
    trusted = ssl.create_default_context()  # the system's certificates, or those of SSL_CERT_FILE and SSL_CERT_DIR
    trusted.load_verify_locations(certifi.where())
    return KeptConnections(trusted)


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
