"""Events: from what a client posted to the one form that is stored and forwarded, or an error that names the field."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from math import isfinite
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

MAX_EVENT_BYTES = 64 * 1024
MAX_NESTING = 8
NOT_UNICODE = "texts are valid Unicode; one in this event is not"
MAX_AHEAD_MS = 3_600_000
MIN_EPOCH_MS = 10**11
SECONDS = "is below 10^11, so it is seconds; multiply by 1000 to give epoch milliseconds"
MAX_NUMBER = int(sys.float_info.max)  # whoever reads an event reads its numbers as doubles
CANARY_TYPE = "nexus.canary"
CANARY_USER = "nexus-canary"

ENVELOPE = frozenset(
    ("event_id", "event_type", "user_id", "session_id", "timestamp", "app_version", "device_type", "location", "data")
)
_TYPE = re.compile(r"[a-z0-9_.\-]{1,64}\Z").match
_NAME_CHARACTERS = re.compile(r"[^\s/\x00-\x1f\x7f-\x9f]*\Z").match
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)?\Z", re.ASCII).match
_CANONICAL = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z\Z", re.ASCII).match
_NUMBERS = frozenset((int, float))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)

# Seeded by the system once per process: asking the system for each id would give up the interpreter's lock each time.
_random = Random(os.urandom(32))
_random_bits = _random.getrandbits
os.register_at_fork(after_in_child=lambda: _random.seed(os.urandom(32)))

encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
decode = msgspec.json.Decoder().decode
_pack_time = struct.Struct("<q").pack  # which a record of the log begins with


# Event types that were judged before: there are few, and a look-up costs less than a match.
_known_types: set[str] = set()
_MAX_KNOWN_TYPES = 10_000
# A canonical time is looked up in two parts: up to the second, of those that were met lately, and what follows it, in ms.
_seconds: dict[str, int] = {}
_MAX_SECONDS = 10_000
_ENDS = {"Z": 0, **{f".{ms:03d}Z": ms for ms in range(1000)}}


class Rejected(Exception):
    """One event's verdict: the field, a code, and a message with the remedy."""

    def __init__(self, field: str, code: str, message: str) -> None:
        super().__init__(message)
        self.field, self.code, self.message = field, code, message


NO_LOCATION = msgspec.Raw(b"null")


class Event(msgspec.Struct, gc=False):
    """An event as stored and forwarded. `data` stays raw JSON until a stream needs it."""

    event_id: str
    event_type: str
    user_id: str
    timestamp: str
    data: msgspec.Raw
    session_id: str | None = None
    app_version: str = "unknown"
    device_type: str = "unknown"
    location: msgspec.Raw = NO_LOCATION


class Stored(msgspec.Struct, omit_defaults=True, gc=False):
    """An event on its way in, encoded as the stored JSON: in this order, an absent session or location left out."""

    event_id: str
    event_type: str
    user_id: str
    timestamp: str
    app_version: str
    device_type: str
    data: dict[str, Any]
    session_id: str | None = None
    location: dict[str, Any] | None = None


# What an event may hold beneath its envelope, level by level: so the decoder itself judges depth and numbers.
if TYPE_CHECKING:
    _Value = Any
else:
    _Scalar = str | Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | float | bool | None
    _Value = _Scalar
    for _ in range(MAX_NESTING - 1):
        _Value = _Scalar | list[_Value] | dict[str, _Value]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Plain(Stored, kw_only=True, forbid_unknown_fields=True, gc=False):
    """An event as it is posted mostly: nested, and of such types that it can be decoded into what is stored. Where a default
    is stored, too, it is a `partial`: any other would be left out, an empty `dict` as well."""

    event_id: _Text = ""
    event_type: str
    user_id: _Text
    timestamp: Any = None
    app_version: _Text = msgspec.field(default_factory=partial(str, "unknown"))
    device_type: _Text = msgspec.field(default_factory=partial(str, "unknown"))
    data: dict[str, _Value] = msgspec.field(default_factory=partial(dict))
    session_id: _Text | None = None
    location: dict[str, _Value] | None = None


class Parsed(msgspec.Struct, gc=False):
    """An accepted event before it has a place: its id, event time (epoch ms), record for the log (frames.py), and what its
    stored JSON says."""

    event_id: str
    ts: int
    record: bytes
    stored: Stored

    @property
    def body(self) -> bytes:
        """The stored JSON."""
        return self.record[8:]


def parse(raw: Any, now: int) -> Parsed:
    """The stored form of one posted event, flat or nested; `now` is the arrival in epoch ms. Raises Rejected."""
    if type(raw) is not dict:
        raise Rejected("event", "not_an_object", "an event is a JSON object; this is " + _kind(raw))
    get: Callable[[str], Any] = raw.get
    event_type, user_id, event_id, stamp = get("event_type"), get("user_id"), get("event_id"), get("timestamp")
    if type(event_type) is not str or event_type not in _known_types:
        _check_type(event_type)
    if not _is_name(user_id):
        raise _bad("user_id", user_id, "a string of 1 to 128 characters without spaces, control characters or /")
    if event_id is None:
        event_id = uuid7(now)
    elif not _is_name(event_id):
        takes = "a string of 1 to 128 characters without spaces, control characters or /, or absent"
        raise _bad("event_id", event_id, takes)
    ts, text = _moment(stamp, now)
    session_id, version, device, location = get("session_id"), get("app_version"), get("device_type"), get("location")
    data = _data(raw, user_id)
    for key, value in data.items():
        kind = type(value)
        if kind is float:
            if not isfinite(value):
                raise Rejected(f"data.{key}", "not_finite", "numbers are finite")
        elif kind is int:
            if not -MAX_NUMBER <= value <= MAX_NUMBER:
                raise Rejected(f"data.{key}", "not_finite", "numbers are finite as 64-bit floating point, too")
        elif kind is dict or kind is list:
            _check_nested(value, f"data.{key}", 2)
    stored = Stored(
        event_id,
        event_type,
        user_id,
        text,
        "unknown" if version is None else _text("app_version", version),
        "unknown" if device is None else _text("device_type", device),
        data,
        None if session_id is None else _text("session_id", session_id),
        None if location is None else _location(location),
    )
    try:
        body = encode(stored)
        if len(body) > MAX_EVENT_BYTES:
            _check_size(encode(raw))  # what was posted counts, without what is added here
    except (UnicodeEncodeError, ValueError) as error:
        raise Rejected("event", "not_unicode", NOT_UNICODE) from error
    return Parsed(event_id, ts, _pack_time(ts) + body, stored)


def parse_plain(events: Sequence[Plain], now: int) -> list[Parsed]:
    """What parse() makes of each, for events that are all sound. Raises Rejected where one of them is not: which one it is,
    and whether it breaks a rule at all, is for parse() to say. The events are changed."""
    for event in events:
        if not event.event_id:
            event.event_id = uuid7(now)
    if not _are_names("".join([event.user_id + event.event_id for event in events])):
        raise Rejected("event", "invalid", "a user_id or an event_id holds what it may not")
    for event_type in {event.event_type for event in events} - _known_types:
        _check_type(event_type)
    spots = [event.location for event in events if event.location is not None]
    if spots and not _are_spots(spots):
        raise Rejected("location", "invalid", "a location is not on earth")
    try:
        times = [_seconds[stamp[:19]] + _ENDS[stamp[19:]] for stamp in [event.timestamp for event in events]]
    except (KeyError, TypeError):
        times = []
        for event in events:
            ts, event.timestamp = _moment(event.timestamp, now)
            times.append(ts)
    _check_ahead(max(times, default=now), "a timestamp", now)
    bodies = _encode_lines(events).split(b"\n")[:-1]
    _check_size(max(bodies, key=len, default=b""))
    return [
        Parsed(event.event_id, ts, _pack_time(ts) + body, event)
        for event, ts, body in zip(events, times, bodies, strict=True)
    ]


def _check_type(event_type: Any) -> None:
    if type(event_type) is not str or not _TYPE(event_type):
        raise _bad("event_type", event_type, "1 to 64 characters of a-z 0-9 _ . -")
    if event_type == CANARY_TYPE:
        raise Rejected("event_type", "reserved", f"{CANARY_TYPE} is made by Nexus alone; use a type of your own")
    if len(_known_types) < _MAX_KNOWN_TYPES:
        _known_types.add(event_type)


def _is_name(value: Any) -> bool:
    """1 to 128 characters without spaces, control characters or /."""
    return type(value) is str and 1 <= len(value) <= 128 and _are_names(value)


def _are_names(text: str) -> bool:
    """There are neither spaces nor control characters nor / in it."""
    if text.isascii():
        return text.isprintable() and " " not in text and "/" not in text
    return _NAME_CHARACTERS(text) is not None


def _check_size(body: bytes) -> None:
    if len(body) > MAX_EVENT_BYTES:
        raise Rejected("event", "too_large", f"an event is at most {MAX_EVENT_BYTES} bytes; this one has {len(body)}")


def canary(event_id: str, now: int) -> Parsed:
    """A canary: an event of Nexus's own that takes the real path and counts nowhere."""
    stored = Stored(event_id, CANARY_TYPE, CANARY_USER, rfc3339(now), "unknown", "unknown", {"sent_at": now})
    return Parsed(event_id, now, _pack_time(now) + encode(stored), stored)


def _data(raw: dict[str, Any], user_id: str) -> dict[str, Any]:
    """`data` of a nested event, or every key outside the envelope of a flat one; both together are merged."""
    data = raw.get("data")
    if data is None:
        data = {}
    elif type(data) is not dict:
        raise _bad("data", data, "an object")
    if ENVELOPE.issuperset(raw):
        return data
    for key, value in raw.items():
        if key in ENVELOPE or (key == "driver_id" and value == user_id):
            continue
        if key in data and data[key] != value:
            raise Rejected(key, "given_twice", f"{key} stands in the event and, differently, in data; give it once")
        data[key] = value
    return data


def _text(field: str, value: Any) -> str:
    if type(value) is not str or not 1 <= len(value) <= 128:
        raise _bad(field, value, "a string of 1 to 128 characters, or absent")
    return value


def _location(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _bad("location", value, 'an object {"lat", "lng"}, or absent')
    lat: Any = value.get("lat")
    lng: Any = value.get("lng")
    if type(lat) not in _NUMBERS or not -90 <= lat <= 90:
        raise _bad("location.lat", lat, "a number from -90 to 90")
    if type(lng) not in _NUMBERS or not -180 <= lng <= 180:
        raise _bad("location.lng", lng, "a number from -180 to 180")
    if len(value) > 2:
        _check_nested(value, "location", 1)
    return value


def _are_spots(locations: Sequence[dict[str, Any]]) -> bool:
    """What _location() says of each of some locations, one at least, whose numbers are finite."""
    try:
        lats, lngs = [location["lat"] for location in locations], [location["lng"] for location in locations]
    except KeyError:
        return False
    if not _NUMBERS.issuperset([*map(type, lats), *map(type, lngs)]):
        return False
    return min(lats) >= -90 and max(lats) <= 90 and min(lngs) >= -180 and max(lngs) <= 180


def _check_nested(value: Any, field: str, depth: int) -> None:
    if depth > MAX_NESTING:
        raise Rejected(field, "too_deep", f"objects and lists nest at most {MAX_NESTING} deep; flatten this one")
    for item in value.values() if type(value) is dict else value:
        kind = type(item)
        if kind is float:
            if not isfinite(item):
                raise Rejected(field, "not_finite", "numbers are finite")
        elif kind is int:
            if not -MAX_NUMBER <= item <= MAX_NUMBER:
                raise Rejected(field, "not_finite", "numbers are finite as 64-bit floating point, too")
        elif kind is dict or kind is list:
            _check_nested(item, field, depth + 1)


def _moment(stamp: Any, now: int) -> tuple[int, str]:
    """Epoch ms and the canonical text of a posted timestamp; of the arrival where there is none."""
    if stamp is None:
        return now, rfc3339(now)
    ts, text = parse_rfc3339(stamp) if type(stamp) is str else _epoch_ms(stamp)
    _check_ahead(ts, text, now)
    return ts, text


def _check_ahead(ts: int, text: str, now: int) -> None:
    if ts - now > MAX_AHEAD_MS:
        ahead = f"{text} is more than one hour ahead of the server's clock ({rfc3339(now)})"
        raise Rejected("timestamp", "in_the_future", f"{ahead}; check the device's clock")


def _epoch_ms(stamp: Any) -> tuple[int, str]:
    if type(stamp) not in (int, float):
        raise _bad("timestamp", stamp, "RFC 3339 text or epoch milliseconds")
    if stamp < MIN_EPOCH_MS:
        raise Rejected(
            "timestamp",
            "looks_like_seconds",
            f"{stamp} {SECONDS}",
        )
    if not stamp < 253_402_300_800_000:
        raise _bad("timestamp", stamp, "a time before the year 10000, in epoch milliseconds")
    ts = int(stamp)
    return ts, rfc3339(ts)


def parse_rfc3339(text: str) -> tuple[int, str]:
    """Epoch ms and the canonical text (UTC, Z) of an RFC 3339 time; without an offset it is UTC. Raises Rejected."""
    second, ms = _seconds.get(text[:19]), _ENDS.get(text[19:])
    if second is not None and ms is not None:
        return second + ms, text
    if not _RFC3339(text):
        raise _bad("timestamp", text, "RFC 3339, such as 2026-01-31T08:00:00Z, or epoch milliseconds")
    leap = timedelta(0)
    try:
        if text[17:19] == "60":
            moment, leap = datetime.fromisoformat(text[:17] + "59" + text[19:].upper()), timedelta(seconds=1)
        else:
            moment = datetime.fromisoformat(text.upper())
        moment = (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)) + leap
    except (ValueError, OverflowError) as error:
        raise _bad("timestamp", text, f"a time that exists ({error})") from error
    ts = (moment - _EPOCH) // _MS
    if not leap and _CANONICAL(text):
        if len(_seconds) >= _MAX_SECONDS:
            _seconds.clear()
        _seconds[text[:19]] = ts // 1000 * 1000
        return ts, text
    return ts, moment.isoformat().replace("+00:00", "Z")


def rfc3339(ms: int) -> str:
    """Epoch ms as RFC 3339 with Z and milliseconds."""
    return f"{_to_the_second(ms // 1000)}.{ms % 1000:03d}Z"


@lru_cache(maxsize=4096)
def _to_the_second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()[:19]


def uuid7(now: int) -> str:
    """A UUIDv7 (RFC 9562): 48 bits of epoch ms, then 74 random ones."""
    ms, tail = now & 0xFFFFFFFFFFFF, _random_bits(74)
    variant = 0x8000 | (tail >> 12 & 0x3FFF)
    return f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{tail & 0xFFF:03x}-{variant:04x}-{tail >> 26:012x}"


def _bad(field: str, value: Any, takes: str) -> Rejected:
    if value is None:
        return Rejected(field, "missing", f"{field} is required: {takes}")
    try:
        shown = repr(value)
    except RecursionError:
        shown = "too deep to be shown"
    return Rejected(
        field, "invalid", f"{field} is {shown if len(shown) <= 80 else shown[:77] + '...'}; it takes {takes}"
    )


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}.get(
        type(value), "null"
    )
