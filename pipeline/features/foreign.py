"""The Python service's public keys, as any client library may have written them: JSON strings or plain hashes."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import NoneType
from typing import Any

import msgspec
import redis

from pipeline import keys
from pipeline.errors import BadRequest, StoreRefused
from pipeline.events import MIN_EPOCH_MS, SECONDS, parse_rfc3339
from pipeline.store import Store, translate

_decode = msgspec.json.Decoder().decode
_PLUS = re.compile(r" (?=\d\d:\d\d\Z)")  # of an offset; unescaped in a query it arrives as a space
_LONGEST_TIME = 64  # characters
_SHORT_BYTES = 4096  # of a text that is worth keeping
_SKEW_MS = 60_000  # by which two machines' clocks may differ
FIRST_MS, _LAST_MS = -62_135_596_800_000, 253_402_300_799_999  # the years 1 to 9999: RFC 3339 has no others


@dataclass(slots=True)
class Partner:
    """What the Python service has written for a user: its values, when (epoch ms, None unknown), and what is wrong with it."""

    features: dict[str, Any] = field(default_factory=dict)
    computed_at: int | None = None
    malformed: str | None = None


def read(
    store: Store, user_ids: Sequence[str], now: int, own: Sequence[str] = ()
) -> tuple[dict[str, Partner], list[Any]]:
    """What the Python service has of users, and the hashes under the keys `own`, in one round trip. Raises StoreError."""
    names = [keys.PARTNER + user_id for user_id in user_ids]
    if not names and not own:
        return {}, []
    if len(names) == 1 and not own:
        return {user_ids[0]: _partner(_one(store, names[0]), names[0], now)}, []
    if store.cluster:  # keys of many slots: no script may read them together
        found, hashes = _each(store, names, own)
    else:
        answer = store.run("vectors", [*names, *own], [len(names)])
        found, hashes = answer[: len(names)], answer[len(names) :]
    partners = {user: _partner(raw, name, now) for user, raw, name in zip(user_ids, found, names, strict=True)}
    return partners, hashes


def _one(store: Store, name: str) -> Any:
    """A key in whichever form. Nearly all are strings, which cost the store a fifth of what a script does."""
    try:
        return store.lean("GET", name)
    except StoreRefused as error:
        if "WRONGTYPE" not in str(error):
            raise
    return _each(store, [name], ())[0][0] if store.cluster else store.run("vectors", [name], [1])[0]


def _each(store: Store, names: Sequence[str], own: Sequence[str]) -> tuple[list[Any], list[Any]]:
    pipe = store.client.pipeline(transaction=False)
    for name in names:
        pipe.execute_command("GET", name)
        pipe.execute_command("HGETALL", name)
    for name in own:
        pipe.execute_command("HGETALL", name)
    try:
        answers = pipe.execute(raise_on_error=False)
    except redis.RedisError as error:
        raise translate(error) from error
    for answer in answers:
        if isinstance(answer, Exception) and "WRONGTYPE" not in str(answer):
            raise translate(answer) if isinstance(answer, redis.RedisError) else answer
    texts, hashes = answers[: 2 * len(names) : 2], answers[1 : 2 * len(names) : 2]
    found = [
        flat if isinstance(text, Exception) and not isinstance(flat, Exception) else [str(text)] if isinstance(text, Exception) else text
        for text, flat in zip(texts, hashes, strict=True)
    ]  # fmt: skip
    return found, answers[2 * len(names) :]


def _partner(raw: Any, name: str, now: int) -> Partner:
    if raw is None:
        return Partner()
    if isinstance(raw, bytes):
        return _from_json(raw, name, now)
    if isinstance(raw, dict):
        return _from_hash(raw, name, now)
    if len(raw) == 1:
        return Partner(malformed=f"{name} is neither a string nor a hash")
    return _from_hash(dict(zip(raw[::2], raw[1::2], strict=True)), name, now)


def judged(partner: Partner, key: str, numbers: Container[str]) -> Partner:
    """Without what is no number among the features that are `numbers`: it is named instead, with its key."""
    wrong = [n for n, value in partner.features.items() if n in numbers and type(value) not in (int, float, NoneType)]
    if not wrong:
        return partner
    said = [f"{key}: {name} is {partner.features[name]!r:.60}; it takes a number" for name in wrong]
    kept = {name: value for name, value in partner.features.items() if name not in wrong}
    return Partner(kept, partner.computed_at, "; ".join(filter(None, [partner.malformed, *said])))


def _from_json(raw: bytes, name: str, now: int) -> Partner:
    return _made(*(_parsed_before(raw) if len(raw) <= _SHORT_BYTES else _parsed(raw)), name, now)


def told(answer: Any, name: str, now: int) -> Partner:
    """What an answer says that has the form of a key."""
    return _made(*_members(answer), name, now)


def _made(features: dict[str, Any] | None, stamp: Any, fault: str, name: str, now: int) -> Partner:
    return Partner(malformed=f"{name} {fault}") if features is None else _stamped(features, stamp, name, now)


def _parsed(raw: bytes) -> tuple[dict[str, Any] | None, Any, str]:
    """The features in a text, not to be changed, and their stamp; or what is wrong with it."""
    try:
        value = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return None, None, f"is not JSON: {error}"
    return _members(value)


def _members(value: Any) -> tuple[dict[str, Any] | None, Any, str]:
    if not isinstance(value, dict):
        return None, None, "is no JSON object"
    features = value.get("features")
    if features is None and "features" not in value:
        features = {k: v for k, v in value.items() if k not in ("user_id", "computed_at")}
    if not isinstance(features, dict):
        return None, None, "has no object 'features'"
    return features, value.get("computed_at"), ""


_parsed_before = lru_cache(maxsize=5_000)(_parsed)  # a text is read again until the Python service writes another one


def _from_hash(flat: dict[Any, Any], key: str, now: int) -> Partner:
    found: dict[str, Any] = {}
    stamp = None
    for raw_name, raw in flat.items():
        name, text = raw_name.decode(errors="replace"), raw.decode(errors="replace")
        if name == "computed_at":
            stamp = _plain(text)
        elif name == "features" and isinstance(value := _plain(text), dict):
            found.update(value)
        elif name != "user_id":
            found[name] = _plain(text)
    return _stamped(found, stamp, key, now)


def _stamped(features: dict[str, Any], stamp: Any, key: str, now: int) -> Partner:
    at = _moment(stamp, now)
    wrong = at is None and stamp is not None
    return Partner(features, at, f"{key}: computed_at is {stamp!r:.60}; it takes a time up to now" if wrong else None)


def _plain(text: str) -> Any:
    """A hash field's value: a number, boolean or null where it reads as one, else the text."""
    try:
        return _decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def _moment(value: Any, now: int) -> int | None:
    """Epoch ms of a foreign stamp, None where it tells no age: no time at all, or one that has yet to come (another unit,
    a clock that is wrong), which would count as fresh until then."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        ms = value if value > MIN_EPOCH_MS else value * 1000
    elif isinstance(value, str) and len(value) <= _LONGEST_TIME and (read := _ms_of(value)) is not None:
        ms = read
    else:
        return None
    return int(ms) if FIRST_MS <= ms <= now + _SKEW_MS else None


@lru_cache(maxsize=5_000)
def _ms_of(text: str) -> int | None:
    try:
        return read_moment("computed_at", text)
    except BadRequest:
        return None


def read_moment(name: str, text: str) -> int:
    """Epoch ms of a query parameter: RFC 3339 or epoch milliseconds. Raises BadRequest that names it."""
    digits = text.isascii() and text.removeprefix("-").isdecimal()
    if digits and len(text) < 18 and FIRST_MS <= (ms := int(text)) <= _LAST_MS:
        if 0 < abs(ms) < MIN_EPOCH_MS:  # 0 is the same moment in both
            raise BadRequest("looks_like_seconds", f"{name}: {text} {SECONDS}")
        return ms
    try:
        return parse_rfc3339(_PLUS.sub("+", text))[0]
    except Exception as error:
        raise BadRequest("invalid_time", f"{name} is {text!r}; it takes RFC 3339 or epoch milliseconds") from error
