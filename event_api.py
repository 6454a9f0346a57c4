"""The reference Python feature service: takes events over HTTP and keeps features per user in a Redis or Valkey store.

Features, by event time; T is now, a window is (T - window, T]. Empty window: null for rates and means, 0 for counts.

    name                       value                                                       window  tile
    acceptance_rate            accepted / (accepted + rejected), ride_request_response     24 h    10 min
    response_time              mean response_time of ride_request_response, s              24 h    10 min
    recent_rejections          rejected ride_request_response                              1 h     20 s
    py_activity_score          ln(1 + events) / ln(1001), at most 1                        24 h    10 min
    py_session_count_24h       distinct session_id, at most 100                            24 h    10 min
    py_mean_event_gap_s        mean time from one event to the next, s                     24 h    10 min
    py_payment_amount_mean_7d  mean amount of payment                                      7 d     2 h

The newer edge is exact: an event with a later timestamp waits for its time. The older one moves by tiles: a tile
counts while all of it is inside, so an expired event is never counted.

How events are kept: one script adds a batch to a journal and its ids to the seen ones, or does neither. The users'
states live in this process; an event is counted when its user is next published, stored or asked for. Ten times a
second `features:{user_id}` is written for those who were asked for and those who have waited for the longest, so many
that it stays cheap: at once under light load, within five seconds under any. States are stored likewise, but more
seldom, and the journal is cut to what no stored state has yet; whoever starts, or had lost the store, claims it and
replays the journal. The scripts refuse a process that is no longer the owner; it then drops what it holds. What is stored
but cannot be read counts as empty, and is kept under `py:{py}:unreadable:` for eight days. The keys of a
script share the tag {py}, for Cluster: there the public keys are written just before the states, with the journal as
outbox.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import blake2b, sha1, sha256
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec
import redis.asyncio as redis
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from msgspec import Meta
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

VERSION = "1.0.0"
HOUR, DAY, WEEK = 3_600_000, 86_400_000, 7 * 86_400_000  # all times are epoch milliseconds
HOUR_TILE, DAY_TILE, WEEK_TILE, DEMAND_TILE = 20_000, 600_000, 7_200_000, 1_800_000
# Nexus sends at most 500 events a call, out of 8 MiB of its log and what one frame goes beyond; it halves what is too large.
MAX_EVENTS, MAX_BODY = 5_000, 16 << 20
MAX_BODIES, BODY_S = 256 << 20, 30.0  # bytes of all that are being received; how long one may take
MAX_HEAD = 1 << 16  # about so many bytes of a request's line and headers
MAX_STATES, MAX_UNSAVED, MAX_SESSIONS = 50_000, 25_000, 100  # in memory; of them not yet stored; per user
SEEN_PERIOD, SEEN_PERIODS = 2 * DAY, 5  # one set of ids per two days: an id is known for 8 to 10 days
KEEP_S = 8 * 86_400  # an idle user is forgotten a day after its last window has run empty
TICK_S = 0.1  # how often the flusher looks
PUBLISHED, PUBLISH_MS, LATEST_MS = 100, 900, 5_000  # users a tick; a user at most so often; a change at the latest
WRITTEN = 50  # users in one step
GROUPED = 1_000  # events in one step, where several requests wait
SAVED, LATEST_SAVE_MS = 20, 20_000  # states a tick; a state at the latest, which bounds the journal
MAX_WAITING = 100_000  # events of the requests that wait for the store
STUCK_S, PAUSE_S = 60, 5.0  # so long events are taken though nothing can be flushed; the longest pause between attempts
STORE_TIMEOUT_S = 2.0
LARGEST = 1e15  # in size, that a number may have to be summed
OTHER, ACCEPTED, REJECTED, ANSWERED, PAYMENT, REQUEST = range(6)
EPOCH, MILLISECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(milliseconds=1)
CITY = " city"  # the demand of the city, kept like a user; no user_id holds a space
PREFIX = "py:{py}:"
OWNER, JOURNAL, COUNTS, STATE, SEEN, ASIDE = (
    PREFIX + name for name in ("owner", "journal", "counts", "state:", "seen:", "unreadable:")
)
log = logging.getLogger("event_api")

CLAIM = """#!lua flags=allow-oom
redis.call('SET', KEYS[1], ARGV[1])
return redis.call('XRANGE', KEYS[2], '-', '+')
"""
# Over the memory limit this one is refused before its first write. Where ids are known it writes nothing and answers
# their positions, so that the caller comes back with a frame of the new ones only. What can fail comes before the ids
# are added: an event whose id is seen would never be taken again.
ACCEPT = """#!lua
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('NOTOWNER') end
local ids, known = {}, {}
for i = 1, #ARGV[2], 12 do ids[#ids + 1] = string.sub(ARGV[2], i, i + 11) end
if #ids > 0 then
  for k = 4, #KEYS do
    if redis.call('EXISTS', KEYS[k]) == 1 then
      for i, hit in ipairs(redis.call('SMISMEMBER', KEYS[k], unpack(ids))) do
        if hit == 1 then known[#known + 1] = i - 1 end
      end
    end
  end
  if #known > 0 then return known end
end
local counts = redis.call('HMGET', KEYS[3], 'seq', 'accepted', 'duplicates')
local seq, accepted, duplicates = tonumber(counts[1] or 0), tonumber(counts[2] or 0), tonumber(counts[3] or 0)
if not (seq and accepted and duplicates and seq < 1e14 and accepted + duplicates < 1e14) then
  return redis.error_reply('WRONGTYPE a count in ' .. KEYS[3])
end
seq = math.max(ARGV[7], seq + 1)
if ARGV[5] ~= '' then
  local added = redis.pcall('XADD', KEYS[2], seq .. '-0', 'facts', ARGV[5])
  if added.err then return redis.error_reply('WRONGTYPE ' .. added.err .. ' in ' .. KEYS[2]) end
end
accepted, duplicates = string.format('%d', accepted + ARGV[3]), string.format('%d', duplicates + ARGV[4])
redis.call('HSET', KEYS[3], 'seq', seq, 'accepted', accepted, 'duplicates', duplicates)
if #ids > 0 then
  redis.call('SADD', KEYS[4], unpack(ids))
  redis.call('EXPIRE', KEYS[4], ARGV[6])
end
return seq
"""
# For a sender that keeps the events in the same store until they are taken, and takes no more itself: refused, neither would ever
# get out of a full store.
ACCEPT_OVER_THE_LIMIT = ACCEPT.replace("#!lua", "#!lua flags=allow-oom", 1)
# Allowed over the memory limit: cutting the journal gives memory back. Keys and values come joined, with their sizes:
# the client would spend more on packing hundreds of arguments than on all else.
SAVE = """#!lua flags=allow-oom
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('NOTOWNER') end
local words, at = {}, 1
for size in string.gmatch(ARGV[4], '%d+') do
  words[#words + 1] = string.sub(ARGV[5], at, at + size - 1)
  at = at + size
end
for i = 1, #words, 2 do redis.call('SET', words[i], words[i + 1], 'EX', ARGV[3]) end
return redis.call('XTRIM', KEYS[2], 'MINID', ARGV[2])
"""

# What cannot be read is kept under another name: keys that are not of the given types (without a token whoever the owner
# is), or entries of the journal.
SET_ASIDE = """#!lua flags=allow-oom
if ARGV[1] ~= '' and redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('NOTOWNER') end
local moved = {}
for i = 2, #KEYS, 2 do
  local is = redis.call('TYPE', KEYS[i]).ok
  if is ~= 'none' and is ~= ARGV[2 + i / 2] then
    redis.call('RENAME', KEYS[i], KEYS[i + 1])
    redis.call('EXPIRE', KEYS[i + 1], ARGV[2])
    moved[#moved + 1] = KEYS[i]
  end
end
return moved
"""
FRAMES_ASIDE = """#!lua flags=allow-oom
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('NOTOWNER') end
for i = 3, #ARGV do
  for _, entry in ipairs(redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])) do
    redis.call('XADD', KEYS[3], entry[1], unpack(entry[2]))
    redis.call('XDEL', KEYS[2], entry[1])
  end
end
return redis.call('EXPIRE', KEYS[3], ARGV[2])
"""
# Writes nothing, but is refused wherever ACCEPT would be: over the memory limit, by a replica, by a disk that is full.
WOULD_TAKE = """#!lua
return 1
"""

# ---------------------------------------------------------------------------------------------- events

NAME, TYPE = r"[^\s/\x00-\x1f\x7f-\x9f]{1,128}", r"[a-z0-9_.\-]{1,64}"
# The patterns are for the documents: checked by msgspec they would cost three times as much as all the decoding.
Name = Annotated[str, Meta(extra_json_schema={"pattern": f"^{NAME}$"})]
Type = Annotated[str, Meta(extra_json_schema={"pattern": f"^{TYPE}$"})]
Parsed = TypeVar("Parsed")
Fact = tuple[str, int, int, float, str | None]  # entity, event time, kind, value (NaN: none), session


class Location(msgspec.Struct, gc=False):
    lat: Annotated[float, Meta(ge=-90, le=90)]
    lng: Annotated[float, Meta(ge=-180, le=180)]


class Data(msgspec.Struct, gc=False):
    """The fields of `data` that features use; others pass unread, and one of a strange type counts as absent. Only a
    `response_time` of a strange type makes the event a rejected one, as it does at Nexus: both must count the same."""

    response: Any = None
    response_time: Any = None
    amount: Any = None
    quantity: Any = None


class Event(msgspec.Struct, gc=False):
    """One nested event. `timestamp` is RFC 3339 (UTC where it says no offset) or epoch milliseconds."""

    event_type: Type
    user_id: Name
    event_id: Name | None = None
    session_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    timestamp: datetime | int | float | None = None
    location: Location | None = None
    data: Data | None = None


class Batch(msgspec.Struct, gc=False):
    events: list[Event]


class RawBatch(msgspec.Struct, gc=False):
    events: list[msgspec.Raw]


# The first events of a batch and one more: all others are skipped, and take no memory.
Few = msgspec.defstruct(
    "Few", [(f"at_{n}", msgspec.Raw, msgspec.Raw()) for n in range(MAX_EVENTS + 1)], array_like=True, gc=False
)


class FewOfBatch(msgspec.Struct, gc=False):
    events: Few  # type: ignore[valid-type]


class OnlyId(msgspec.Struct, gc=False):
    event_id: str | None = None


class Question(msgspec.Struct, gc=False):
    """`event` belongs to the model fraud; `zone` and `horizon`, in half hours, to the model demand."""

    model: str
    event: Event | None = None
    zone: str | None = None
    horizon: Annotated[int, Meta(ge=1, le=336)] = 1


class Rejection(msgspec.Struct, gc=False):
    index: int
    event_id: str | None
    field: str
    code: str
    message: str


class ApiError(Exception):
    """An answer that is an error: status, code, message, details, which are an object."""

    def __init__(self, status: int, code: str, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.details = status, code, message, details or {}


UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
decode_batch = msgspec.json.Decoder(Batch).decode
decode_raw_batch = msgspec.json.Decoder(RawBatch).decode
decode_few = msgspec.json.Decoder(FewOfBatch).decode
decode_event = msgspec.json.Decoder(Event).decode
decode_question = msgspec.json.Decoder(Question).decode
to_json = msgspec.json.Encoder().encode
is_name = re.compile(NAME).fullmatch
is_user = lru_cache(MAX_STATES)(is_name)
is_type = lru_cache(1000)(re.compile(TYPE).fullmatch)


def parse_events(body: bytes) -> tuple[list[tuple[int, Event]], list[Rejection]]:
    """The events of a batch body by position, and the rejected ones. Raises msgspec.DecodeError where it is none, and
    ApiError where there are too many, which is found out before they are decoded."""
    if body.count(b"{") > MAX_EVENTS:  # no event that can be decoded is without one
        require_few(body)
    try:
        return list(enumerate(decode_batch(body).events)), []
    except msgspec.ValidationError:  # one of them is bad, or the body is: look at each by itself
        require_few(body)
        events, rejected = [], []
        for index, raw in enumerate(decode_raw_batch(body).events):
            try:
                events.append((index, decode_event(raw)))
            except UNDECODABLE as error:
                rejected.append(Rejection(index, _event_id(raw), *verdict(error)))
        return events, rejected


def parse(decode: Callable[[bytes], Parsed], body: bytes) -> Parsed:
    """What a request's body holds; the only place where what cannot be decoded is the request's fault."""
    try:
        return decode(body)
    except UNDECODABLE as error:
        if not isinstance(error, msgspec.ValidationError):
            raise ApiError(400, "not_json", str(error)) from error
        field, code, message = verdict(error)
        raise ApiError(422, code, message, {"field": field}) from error


def require_few(body: bytes) -> None:
    if getattr(decode_few(body).events, f"at_{MAX_EVENTS}"):
        raise ApiError(413, "too_many", f"a batch has at most {MAX_EVENTS} events")


def _event_id(raw: msgspec.Raw) -> str | None:
    try:
        return msgspec.json.decode(raw, type=OnlyId).event_id
    except UNDECODABLE:
        return None


def verdict(error: Exception) -> tuple[str, str, str]:
    """Field, code and message of a validation error."""
    text = str(error)
    if missing := re.search(r"missing required field `(\w+)`", text):
        return missing[1], "missing", text
    at = re.search(r" - at `\$\.([^`]+)`", text)
    return at[1] if at else "event", "invalid", text


def take(events: list[tuple[int, Event]], now: int) -> tuple[dict[bytes, tuple[Fact, ...]], int, list[Rejection]]:
    """What each new event means to the features, by the digest of its id; the duplicates among them; the rejected."""
    fresh: dict[bytes, tuple[Fact, ...]] = {}
    duplicates, rejected = 0, []
    ids = "".join([event.event_id or "" for _, event in events])
    plain = (
        ids.isascii() and ids.isprintable() and " " not in ids and "/" not in ids
    )  # quicker than the pattern for each
    for index, event in events:
        event_id, stamp, problem = event.event_id, event.timestamp, None
        if stamp is None:
            ts = now
        elif isinstance(stamp, datetime):
            ts = ((stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)) - EPOCH) // MILLISECOND
        else:
            ts = int(stamp)
            if stamp < 1e11:
                problem = "timestamp", "looks_like_seconds", f"{stamp} is seconds; multiply by 1000 for milliseconds"
        if ts - now > HOUR:
            problem = "timestamp", "in_the_future", "more than one hour ahead of this clock; check the device's clock"
        facts = _facts(event, ts)
        if facts is None:
            problem = "data.response_time", "invalid", f"it takes a number up to {LARGEST:g} in size, or null"
        if not is_type(event.event_type):
            problem = "event_type", "invalid", "it takes 1 to 64 characters of a-z 0-9 _ . -"
        if not is_user(event.user_id):
            problem = "user_id", "invalid", "it takes 1 to 128 characters without spaces, control characters or /"
        if event_id is not None and not (0 < len(event_id) <= 128 if plain else is_name(event_id)):
            problem = "event_id", "invalid", "it takes 1 to 128 characters without spaces, control characters or /"
        if problem:
            rejected.append(Rejection(index, event_id, *problem))
        elif facts is not None:
            digest = os.urandom(12) if event_id is None else blake2b(event_id.encode(), digest_size=12).digest()
            if digest in fresh:
                duplicates += 1
            else:
                fresh[digest] = facts
    return fresh, duplicates, rejected


def take_one(event: Event) -> tuple[dict[bytes, tuple[Fact, ...]], int]:
    """The same of one event. Raises ApiError where it is rejected."""
    fresh, duplicates, rejected = take([(0, event)], now_ms())
    if rejected:
        raise ApiError(422, rejected[0].code, rejected[0].message, rejected[0])
    return fresh, duplicates


def _facts(event: Event, ts: int) -> tuple[Fact, ...] | None:
    """None where a `response_time` cannot be summed."""
    event_type, data, user, session = event.event_type, event.data, event.user_id, event.session_id
    if event_type == "ride_request_response":
        if data:
            kind = ACCEPTED if data.response == "accepted" else REJECTED if data.response == "rejected" else ANSWERED
            value = _number(data.response_time)
            return ((user, ts, kind, value, session),) if value == value or data.response_time is None else None
    elif event_type == "payment":
        if data and (value := _number(data.amount)) == value:
            return ((user, ts, PAYMENT, value, session),)
    elif event_type == "ride_request":
        quantity = _number(data.quantity) if data else math.nan
        quantity = quantity if quantity > 0 else 1.0
        return (user, ts, OTHER, math.nan, session), (CITY, ts, REQUEST, quantity, None)
    elif event_type == "nexus.canary":
        return ()
    return ((user, ts, OTHER, math.nan, session),)


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else math.nan


# -------------------------------------------------------------------------------------------- features


class State(msgspec.Struct, array_like=True, gc=False):
    """What is kept of one user, or of the city's demand; the dicts go from the number of a tile to a count or a sum.

    Dicts of plain numbers, and gc=False, keep the garbage collector from walking through thousands of users.
    """

    seq: int = 0  # the last journal frame in here
    published: int = 0
    newest: int = 0  # event time
    tick: int = 0  # the hour tile up to which it has been advanced
    hour_edge: int = 0  # the last expired tile
    day_edge: int = 0
    week_edge: int = 0
    demand_edge: int = 0
    future: list[Fact] | None = None
    rejections: dict[int, int] = {}
    accepted: dict[int, int] = {}
    rejected: dict[int, int] = {}
    response_count: dict[int, int] = {}
    response_sum: dict[int, float] = {}
    events: dict[int, int] = {}
    first: dict[int, int] = {}
    sessions: dict[str, int] = {}
    payment_count: dict[int, int] = {}
    payment_sum: dict[int, float] = {}
    payment_squares: dict[int, float] = {}
    requests: dict[int, float] = {}


WINDOWS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("hour_edge", HOUR, HOUR_TILE, ("rejections",)),
    ("day_edge", DAY, DAY_TILE, ("accepted", "rejected", "response_count", "response_sum", "events", "first")),
    ("week_edge", WEEK, WEEK_TILE, ("payment_count", "payment_sum", "payment_squares")),
    ("demand_edge", WEEK, DEMAND_TILE, ("requests",)),
)


def add(state: State, facts: Iterable[Fact], now: int) -> None:
    """Count facts; those of a later time wait."""
    events, first, sessions = state.events, state.first, state.sessions
    for fact in facts:
        _, ts, kind, value, session = fact
        if ts > now:
            state.future = state.future or []
            state.future.append(fact)
            continue
        if kind == REQUEST:
            if (tile := ts // DEMAND_TILE) > state.demand_edge:
                state.requests[tile] = state.requests.get(tile, 0.0) + value
            continue
        if ts > state.newest:
            state.newest = ts
        if (tile := ts // DAY_TILE) > state.day_edge:
            events[tile] = events.get(tile, 0) + 1
            if ts < first.get(tile, ts + 1):
                first[tile] = ts
            if (
                session is not None
                and (seen := sessions.get(session, 0)) < tile
                and (seen or len(sessions) < MAX_SESSIONS)
            ):
                sessions[session] = tile
            if kind == ACCEPTED:
                state.accepted[tile] = state.accepted.get(tile, 0) + 1
            elif kind == REJECTED:
                state.rejected[tile] = state.rejected.get(tile, 0) + 1
            if value == value and ACCEPTED <= kind <= ANSWERED:
                state.response_count[tile] = state.response_count.get(tile, 0) + 1
                state.response_sum[tile] = state.response_sum.get(tile, 0.0) + value
        if kind == REJECTED and (tile := ts // HOUR_TILE) > state.hour_edge:
            state.rejections[tile] = state.rejections.get(tile, 0) + 1
        elif kind == PAYMENT and (tile := ts // WEEK_TILE) > state.week_edge:
            state.payment_count[tile] = state.payment_count.get(tile, 0) + 1
            state.payment_sum[tile] = state.payment_sum.get(tile, 0.0) + value
            state.payment_squares[tile] = state.payment_squares.get(tile, 0.0) + value * value


def advance(state: State, now: int) -> State:
    """Bring a state to `now`: count what has come due, drop the tiles that are no longer wholly inside their window."""
    if state.future:
        waiting, state.future = state.future, None
        add(state, waiting, now)
    if state.tick == (tick := now // HOUR_TILE):  # all windows and tiles are multiples of this one
        return state
    state.tick = tick
    for name, window, tile, series in WINDOWS:
        edge = (now - window) // tile
        if edge > getattr(state, name):
            setattr(state, name, edge)
            for each in series:
                if tiles := getattr(state, each):
                    setattr(state, each, {at: value for at, value in tiles.items() if at > edge})
            if name == "day_edge" and state.sessions:
                state.sessions = {session: at for session, at in state.sessions.items() if at > edge}
    return state


def features(state: State, now: int) -> dict[str, float | int | None]:
    """The features of a user as of `now` (epoch ms); see the table above."""
    advance(state, now)
    accepted, rejected = sum(state.accepted.values()), sum(state.rejected.values())
    answers, events = sum(state.response_count.values()), sum(state.events.values())
    payments = sum(state.payment_count.values())
    return {
        "acceptance_rate": accepted / (accepted + rejected) if accepted + rejected else None,
        "response_time": sum(state.response_sum.values()) / answers if answers else None,
        "recent_rejections": sum(state.rejections.values()),
        "py_activity_score": min(1.0, math.log1p(events) / math.log(1001)),
        "py_session_count_24h": len(state.sessions),
        "py_mean_event_gap_s": (state.newest - min(state.first.values())) / (events - 1) / 1000 if events > 1 else None,
        "py_payment_amount_mean_7d": sum(state.payment_sum.values()) / payments if payments else None,
    }


# --------------------------------------------------------------------------------------------- service

encode, decode_state = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(State).decode
decode_facts = msgspec.msgpack.Decoder(list[Fact]).decode


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def rfc3339(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def longest(queue: dict[str, int], most: int, now: int, limit: int) -> list[str]:
    """The first users of a queue: `most` of them, and those that have waited `limit` ms; all if the clock went back."""
    users: list[str] = []
    for user, since in queue.items():
        if len(users) >= most and abs(now - since) < limit:
            break
        users.append(user)
    return users


class Waiting:
    """A request that waits for the store: new events, its duplicates, and in the end how many were new, how many not."""

    def __init__(self, fresh: dict[bytes, tuple[Fact, ...]], duplicates: int, makes_room: bool = False) -> None:
        self.fresh, self.duplicates, self.makes_room = fresh, duplicates, makes_room
        self.outcome: tuple[int, int] | None = None


def makes_room(request: Request) -> bool:
    """Whether the sender says that it keeps the events in a full store until they are taken."""
    return "nexus-makes-room" in request.headers


def together(waiting: list[Waiting]) -> list[Waiting]:
    """The first of those without an outcome, as many alike as make a step of the store that keeps nobody else waiting for long."""
    requests: list[Waiting] = []
    events = 0
    for request in waiting:
        if request.outcome is None:
            events += len(request.fresh)
            if requests and (events > GROUPED or request.makes_room != requests[0].makes_room):
                break
            requests.append(request)
    return requests


def drop(parts: list[dict[bytes, tuple[Fact, ...]]], digests: list[bytes]) -> None:
    """Take events out of the parts, wherever they are."""
    for part in parts if digests else ():
        for digest in digests:
            part.pop(digest, None)


def seen_keys() -> list[str]:
    """Of the sets of ids that are asked; new ids are added to the first."""
    period = now_ms() // SEEN_PERIOD
    return [f"{SEEN}{period - back}" for back in range(SEEN_PERIODS)]


class NotOwner(Exception):
    """Another process of this service has claimed the store."""


class Service:
    """The states of the users and their way into the store, on one event loop. Without the store: ApiError 503."""

    def __init__(self, url: str, cluster: bool) -> None:
        # No retries: a write whose answer is lost may have happened, and only the journal tells.
        options: dict[str, Any] = {"protocol": 2, "socket_timeout": STORE_TIMEOUT_S, "retry": Retry(NoBackoff(), 0)}
        self.cluster = cluster
        self.client: Any = (redis.RedisCluster if cluster else redis.Redis).from_url(url, **options)
        scripts = CLAIM, ACCEPT, ACCEPT_OVER_THE_LIMIT, SAVE, SET_ASIDE, FRAMES_ASIDE, WOULD_TAKE
        self.shas = {script: sha1(script.encode()).hexdigest() for script in scripts}
        self.lock = asyncio.Lock()  # one claim or step at a time: states take the frames in the journal's order
        self.waiting: list[Waiting] = []  # in the order in which they ask for the lock
        self.held = 0  # events of these requests, and one more for each
        self.stopping = asyncio.Event()
        self.failed_at, self.trouble = -1.0, ""
        self.stuck, self.stuck_at = "", 0.0  # why nothing can be flushed, and since when
        self.forget()

    def forget(self) -> None:
        """Trust nothing in memory any more; the next use claims the store and replays its journal."""
        self.token = ""
        self.seq = 0  # of the last frame taken
        self.states: dict[str, State] = {}
        self.uncounted: dict[str, list[Fact]] = {}  # what the states lack; each of these users is in the next two
        self.unpublished: dict[str, int] = {}  # user -> the first frame that its public key lacks; lowest first
        self.unsaved: dict[str, int] = {}  # user -> the first frame that its stored state lacks; lowest first
        self.asked: dict[str, None] = {}  # users that are published before all others
        self.due: list[tuple[int, str]] = []  # when an event that waits for its time will count; a heap

    async def run(self, script: str, keys: list[str], args: list[Any]) -> Any:
        try:
            return await self.client.evalsha(self.shas[script], len(keys), *keys, *args)
        except NoScriptError:
            return await self.client.eval(script, len(keys), *keys, *args)

    @contextlib.asynccontextmanager
    async def store(self) -> AsyncIterator[None]:
        """Translate the store's errors; after one that leaves the outcome open, forget."""
        try:
            yield
        except OutOfMemoryError as error:
            raise ApiError(503, "store_full", "the store is at its memory limit; nothing was taken") from error
        except (RedisError, RedisClusterException, OSError) as error:  # the second is none of the first
            if "WRONGTYPE" in str(error):  # refused, with nothing written that memory has not
                async with self.store():
                    keys = " and ".join(await self.mend(str(error))) or "a key"
                raise ApiError(503, "store_damaged", f"{keys} could not be read, and was set aside") from error
            self.forget()
            if "NOTOWNER" in str(error):
                raise NotOwner from error
            self.failed_at = time.monotonic()
            self.trouble = f"the store does not answer: {str(error) or type(error).__name__}"
            if isinstance(error, MovedError):
                self.trouble = "the store is a node of a Cluster: set REDIS_CLUSTER=true"
            await self.client.aclose()  # open connections may lead to what is a replica now
            raise ApiError(503, "store_unavailable", self.trouble) from error
        except BaseException:
            self.forget()
            raise

    async def claim(self) -> None:
        """Own the store, its journal replayed. Call with the lock held."""
        if self.token:
            return
        if time.monotonic() - self.failed_at < 0.2:  # requests in a queue must not wait for a time-out each
            raise ApiError(503, "store_unavailable", self.trouble)
        async with self.store():
            await self.mend()
            token = os.urandom(8).hex()
            journal, unreadable = [], {}
            for at, fields in await self.run(CLAIM, [OWNER, JOURNAL], [token]):
                try:
                    journal.append((int(at.split(b"-")[0]), decode_facts(fields[1])))
                except UNDECODABLE as error:
                    unreadable[at] = error
            if unreadable:
                kept, (at, why) = f"{ASIDE}journal:{now_ms()}", next(iter(unreadable.items()))
                await self.run(FRAMES_ASIDE, [OWNER, JOURNAL, kept], [token, KEEP_S, *unreadable])
                log.error(
                    "%d entries of %s from %s on cannot be read (%s); kept as %s for 8 days",
                    *(len(unreadable), JOURNAL, at.decode(), why, kept),
                )
            states = await self.load({fact[0] for _, facts in journal for fact in facts}, token)
        self.token, self.states = token, states
        for seq, facts in journal:
            self.apply([fact for fact in facts if states[fact[0]].seq < seq], seq)
        log.info("claimed the store, %d journal frames replayed", len(journal))

    async def load(self, users: Iterable[str], token: str) -> dict[str, State]:
        """The stored states of those that are not in memory; new ones for users never seen."""
        loaded: dict[str, State] = {}
        missing = [user for user in users if user not in self.states]
        for first in range(0, len(missing), 500):
            part = missing[first : first + 500]
            loaded |= await self.decoded(part, await self.client.mget([STATE + user for user in part]), token)
        return loaded

    async def decoded(self, users: list[str], blobs: list[bytes | None], token: str) -> dict[str, State]:
        """The states of what MGET answered. One that cannot be read counts as empty, and is set aside."""
        states: dict[str, State] = {}
        absent: list[str] = []
        for user, blob in zip(users, blobs, strict=True):
            if blob is None:
                absent.append(STATE + user)
            else:
                try:
                    states[user] = decode_state(blob)
                    continue
                except UNDECODABLE as error:
                    await self.set_aside({STATE + user: "none"}, str(error), token)
            states[user] = State()
        if absent and await self.client.exists(*absent):  # MGET does not tell one of another type
            await self.set_aside(dict.fromkeys(absent, "string"), "another type", token)
        return states

    async def set_aside(self, types: dict[str, str], why: str, token: str = "") -> list[str]:
        """Move the keys that are not of these types to where nobody reads them; of the type none is none of them."""
        kept = {key: f"{key.replace(PREFIX, ASIDE, 1)}:{now_ms()}" for key in types}
        keys = [OWNER, *chain.from_iterable(kept.items())]
        moved = [key.decode() for key in await self.run(SET_ASIDE, keys, [token, KEEP_S, *types.values()])]
        for key in moved:
            log.error("%s cannot be read (%s): it counts as empty, and is kept as %s for 8 days", key, why, kept[key])
        return moved

    async def mend(self, error: str = "") -> list[str]:
        """Set aside the keys of all users that are of another type than theirs, or named in an error."""
        types = {OWNER: "string", JOURNAL: "stream", COUNTS: "hash", **dict.fromkeys(seen_keys(), "set")}
        types |= {key: "none" for key in types if f" in {key}" in error}
        return await self.set_aside(types, error or "another type")

    async def accept(
        self, fresh: dict[bytes, tuple[Fact, ...]], duplicates: int, makes_room: bool = False
    ) -> tuple[int, int]:
        """Keep the facts of events by the digests of their ids, once each: how many were new, how many not. What comes
        while the store is busy goes to it together: one step for several requests. What `makes_room` is taken by a full store too."""
        if self.stuck and time.monotonic() - self.stuck_at > STUCK_S:  # the journal would grow without end
            raise ApiError(503, "not_flushed", self.stuck)
        size = len(fresh) + 1
        if self.waiting and self.held + size > MAX_WAITING:
            raise ApiError(503, "busy", "too many events wait for the store; nothing was taken")
        mine = Waiting(fresh, duplicates, makes_room)
        self.waiting.append(mine)
        self.held += size
        try:
            while mine.outcome is None:
                try:
                    async with self.lock:
                        if mine.outcome is None:
                            await self.claim()
                            await self._accept(together(self.waiting))
                except NotOwner:
                    log.warning("the store was emptied, or another process has claimed it; claiming it back")
            return mine.outcome
        finally:
            self.waiting.remove(mine)
            self.held -= size

    async def _accept(self, requests: list[Waiting]) -> None:
        token, keys = self.token, [OWNER, JOURNAL, COUNTS, *seen_keys()]
        new: list[dict[bytes, tuple[Fact, ...]]] = []
        for request in requests:
            new.append(dict(request.fresh))
            drop(new[-1:], [digest for earlier in new[:-1] for digest in earlier.keys() & request.fresh.keys()])
        script = ACCEPT_OVER_THE_LIMIT if requests[0].makes_room else ACCEPT
        total = sum(len(request.fresh) + request.duplicates for request in requests)
        async with self.store():
            while total:
                digests = [digest for part in new for digest in part]
                each = [facts for part in new for facts in part.values()]
                facts = [fact for facts in each for fact in facts]
                counts = [sum(map(bool, each)), total - len(digests)]  # a canary has no facts and counts nowhere
                frame, expire_s = encode(facts) if facts else b"", SEEN_PERIODS * SEEN_PERIOD // 1000
                least = max(now_ms(), self.seq + 1)
                answer = await self.run(script, keys, [token, b"".join(digests), *counts, frame, expire_s, least])
                if isinstance(answer, int):
                    if self.token == token:  # else the store was lost in between, and the replay brings these too
                        self.apply(facts, answer)
                    break
                drop(new, [digests[position] for position in answer])
        for request, part in zip(requests, new, strict=True):
            request.outcome = len(part), len(request.fresh) + request.duplicates - len(part)

    def apply(self, facts: list[Fact], seq: int) -> None:
        """Take a frame of the journal: its facts are counted when their users are next looked at."""
        uncounted, now = self.uncounted, now_ms()
        for fact in facts:
            user = fact[0]
            if (others := uncounted.get(user)) is not None:
                others.append(fact)
            else:
                uncounted[user] = [fact]
                self.unpublished.setdefault(user, seq)
                self.unsaved.setdefault(user, seq)
            if fact[1] > now:
                heappush(self.due, (fact[1], user))
        self.seq = seq

    def count(self, user: str, now: int) -> State:
        """The state of a user, which must be in memory, with every accepted event in it."""
        state = advance(self.states[user], now)  # first: then there is less to go through
        if facts := self.uncounted.pop(user, None):
            add(state, facts, now)
            state.seq = self.seq  # the user has no others up to there
        return state

    def evict(self) -> None:
        """Keep what is in memory bounded. With the lock held: who reads a stored state must not find it changed."""
        if len(self.states) > MAX_STATES:  # the front is what has not been saved for the longest time
            for user in list(islice((user for user in self.states if user not in self.unsaved), MAX_STATES // 10)):
                del self.states[user]

    async def flush(self, everything: bool = False) -> None:
        """Publish and store those that have waited for the longest, or `everything`."""
        now, states = now_ms(), self.states
        while self.due and self.due[0][0] <= now:
            _, user = heappop(self.due)
            self.unpublished.setdefault(user, self.seq + 1)
            self.unsaved.setdefault(user, self.seq + 1)
        publish = longest(self.unpublished, PUBLISHED, now, LATEST_MS)
        publish = [user for user in publish if user not in states or states[user].published <= now - PUBLISH_MS]
        save = longest(self.unsaved, max(SAVED, len(self.unsaved) - MAX_UNSAVED), now, LATEST_SAVE_MS)
        if everything:
            publish, save = list(self.unpublished), list(self.unsaved)
        users, saved = list(dict.fromkeys([*self.asked, *publish, *save])), set(save)
        self.asked.clear()
        for at in range(0, len(users), WRITTEN):  # in parts, so that requests come in between, here and in the store
            if self.states is states:
                async with self.store():
                    await self._write(users[at : at + WRITTEN], saved)

    async def _write(self, users: list[str], save: set[str]) -> None:
        """Publish users, and store the states of those in `save`: none is stored that is not published."""
        states, token = self.states, self.token
        loaded = await self.load(users, token)
        if self.states is not states:  # the store was lost meanwhile
            return
        states.update({user: state for user, state in loaded.items() if user not in states})
        now = now_ms()
        stored: list[bytes] = []
        public: list[bytes] = []
        published: dict[str, int] = {}
        saved: dict[str, int] = {}
        computed_at = rfc3339(now)
        try:
            for user in users:
                state = self.count(user, now)
                if (since := self.unpublished.pop(user, None)) is not None and user != CITY:
                    published[user] = since
                    state.published = now
                    body = {"user_id": user, "features": features(state, now), "computed_at": computed_at}
                    public += b"features:" + user.encode(), to_json(body)
                if user in save:
                    states[user] = states.pop(user)  # to the end
                    saved[user] = self.unsaved.pop(user)
                    stored += (STATE + user).encode(), encode(state)
        except Exception as error:  # it could be decoded, but was no state of this version's
            if not await self.set_aside({STATE + user: "none"}, str(error), token):
                raise
            self.forget()  # the journal has what is not stored, of all of them
            return
        args = [token, next(iter(self.unsaved.values()), self.seq + 1), KEEP_S]
        try:
            if self.cluster:
                pipeline = self.client.pipeline()
                for key, value in zip(public[::2], public[1::2], strict=True):
                    pipeline.set(key, value, ex=KEEP_S)
                await pipeline.execute()
            else:
                stored += public
            await self.run(SAVE, [OWNER, JOURNAL], [*args, " ".join(map(str, map(len, stored))), b"".join(stored)])
        except ResponseError:  # refused: they wait on
            if self.states is states:
                self.unpublished = published | self.unpublished | published
                self.unsaved = saved | self.unsaved | saved
            raise

    async def keep_flushing(self) -> None:
        """Claim the store whenever it is not owned, and flush; when stopping, flush everything and return. Nothing else ends
        it: what goes wrong is logged once, /health tells it, and it is tried again."""
        pause = TICK_S
        while True:
            stopping = self.stopping.is_set()
            try:
                async with self.lock:
                    await self.claim()
                    self.evict()
                await self.flush(everything=stopping)
                if self.stuck:
                    log.info("flushed again")
                self.stuck, pause = "", TICK_S
            except NotOwner as error:
                log.debug("not flushed: %s", error)
            except Exception as error:  # else nothing would be published any more
                expected = isinstance(error, ApiError)
                pause = TICK_S if expected else min(2 * pause, PAUSE_S)
                why = str(error) if expected else f"{type(error).__name__}: {error}"
                if not self.stuck:
                    self.stuck_at = time.monotonic()
                if why != self.stuck:
                    log.error("not flushed, and tried again: %s", why, exc_info=None if expected else error)
                self.stuck = why
            if stopping:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), pause)

    async def read(self, user: str, publish: bool = False) -> State | None:
        """The state with every accepted event in it, to look at only; None for a user never seen. `publish`: the next flush
        writes the user's public key anew."""
        while True:
            with contextlib.suppress(NotOwner):
                async with self.lock:
                    await self.claim()
                    states, token = self.states, self.token
                    async with self.store():
                        owner, blob = await self.client.mget(OWNER, STATE + user)
                        mine, new = owner == token.encode(), user not in states
                        if mine and new and (blob is not None or user in self.uncounted):
                            states.setdefault(user, (await self.decoded([user], [blob], token))[user])
                    if mine and self.states is states:
                        if user not in states:
                            return None
                        if publish:
                            self.unpublished.setdefault(user, self.seq + 1)
                            self.asked[user] = None
                        return self.count(user, now_ms())
            self.forget()

    async def health(self) -> tuple[dict[str, str], list[int]]:
        """The store's part of /health, and how many events were accepted and how many known; asked now."""
        told, counts = {"status": "ok"}, []
        try:
            async with asyncio.timeout(1), self.store():
                counts = await self.client.hmget(COUNTS, "accepted", "duplicates")
                await self.run(WOULD_TAKE, [OWNER], [])
        except TimeoutError:
            told = {"status": "unavailable", "message": "no answer within a second"}
        except ApiError as error:
            told = {"status": error.code.removeprefix("store_"), "message": error.message}
        else:
            if self.stuck:
                told = {"status": "stuck", "message": self.stuck}
        return told, [int(count) if count and count.isdigit() else 0 for count in counts or [b"", b""]]


# ----------------------------------------------------------------------------------------- predictions


def fraud(state: State, amount: float, now: int) -> dict[str, Any]:
    """How far an amount lies above the user's payments of seven days: 0.5 at three standard deviations."""
    advance(state, now)
    n, total, squares = (sum(s.values()) for s in (state.payment_count, state.payment_sum, state.payment_squares))
    if n < 5 or amount != amount:
        reason = f"{n} payments in 7 days; it takes 5, and an amount"
        return {"status": "warming_up", "score": None, "reasons": [reason]}
    mean = total / n
    spread = max(math.sqrt(max(0.0, squares / n - mean * mean)), 0.1 * abs(mean), 0.01)
    z = max(-50.0, min(50.0, (amount - mean) / spread))
    reason = f"{z:.1f} standard deviations from the user's mean of {mean:.2f}"
    return {"status": "ready", "score": 1 / (1 + math.exp(3 - z)), "reasons": [reason]}


def demand(state: State, zone: str | None, horizon: int, now: int) -> dict[str, Any]:
    """The city's mean of ride requests per half hour, the same for each step: no more than a baseline."""
    advance(state, now)
    steps = now // DEMAND_TILE - min(state.requests, default=now // DEMAND_TILE)  # whole half hours behind us
    answer = {"zone": zone, "step_s": DEMAND_TILE // 1000, "made_at": rfc3339(now)}
    if zone is None and steps >= 4:
        mean = sum(value for tile, value in state.requests.items() if tile < now // DEMAND_TILE) / steps
        margin = 1.96 * math.sqrt(mean)
        ats = (rfc3339((now // DEMAND_TILE + step) * DEMAND_TILE) for step in range(horizon))  # from the present one on
        band = {"value": mean, "low": max(0.0, mean - margin), "high": mean + margin}
        return {**answer, "status": "ready", "forecasts": [{"at": at, **band} for at in ats]}
    return {**answer, "status": "warming_up", "forecasts": []}


# ------------------------------------------------------------------------------------------------ HTTP


def reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, "application/json")


class Bodies:
    """Receives the bodies of requests; what of them waits in memory is bounded, and for how long."""

    def __init__(self) -> None:
        self.held = 0  # bytes

    async def read(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    size += len(part)
                    self.held += len(part)
                    if size > MAX_BODY:
                        raise ApiError(413, "too_large", f"a body has at most {MAX_BODY} bytes")
                    if self.held > MAX_BODIES:
                        raise ApiError(503, "busy", "too much is being received at a time; nothing was taken")
                    parts.append(part)
        except TimeoutError as error:
            raise ApiError(408, "too_slow", f"the body was not whole within {BODY_S:g} s") from error
        except ClientDisconnect as error:  # nobody is there to be answered
            raise ApiError(400, "broken_off", "the connection was closed before the body was whole") from error
        finally:
            self.held -= size
        return b"".join(parts)


def takes(kind: type) -> dict[str, Any]:
    """The OpenAPI entry of a route that decodes its body itself."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def create_app(settings: Settings) -> FastAPI:
    service: Service
    started = time.monotonic()
    bodies = Bodies()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal service
        service = Service(settings.store_url, settings.cluster)
        flusher = asyncio.create_task(service.keep_flushing())
        yield
        service.stopping.set()
        await flusher
        await service.client.aclose()

    app = FastAPI(title="event_api", version=VERSION, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        body = {"error": {"code": error.code, "message": error.message, "details": error.details}}
        return reply(body, error.status, {503: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(error.status))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return await api_error(request, ApiError(error.status_code, code, f"{request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return await api_error(request, ApiError(500, "internal_error", f"{type(error).__name__}; see the log"))

    @app.get("/health")
    async def health() -> Response:
        store, (accepted, duplicates) = await service.health()
        return reply(
            {
                "status": "healthy" if store["status"] == "ok" else "degraded",
                "service": "event_api",
                "version": VERSION,
                "supports": ["batch", "features", "predict", "canary"],
                "store": store,
                "uptime_s": round(time.monotonic() - started, 3),
                "events": {"accepted": accepted, "duplicates": duplicates},
            }
        )

    @app.post("/events", openapi_extra=takes(Event))
    async def post_event(request: Request) -> Response:
        fresh, duplicates = take_one(parse(decode_event, await bodies.read(request)))
        accepted, duplicates = await service.accept(fresh, duplicates, makes_room(request))
        return reply({"accepted": accepted, "duplicates": duplicates, "rejected": []})

    @app.post("/events/batch", openapi_extra=takes(Batch))
    async def post_batch(request: Request) -> Response:
        events, rejected = parse(parse_events, await bodies.read(request))
        fresh, duplicates, refused = take(events, now_ms())
        accepted, duplicates = await service.accept(fresh, duplicates, makes_room(request))
        rejected = sorted(rejected + refused, key=lambda rejection: rejection.index)
        return reply({"accepted": accepted, "duplicates": duplicates, "rejected": rejected})

    @app.get("/features/{user_id}")
    async def get_features(user_id: str) -> Response:
        state = await service.read(user_id, publish=True) if user_id != CITY else None
        if state is None:
            raise ApiError(404, "unknown_user", f"no events of {user_id!r} are known here")
        now = now_ms()
        return reply({"user_id": user_id, "features": features(state, now), "computed_at": rfc3339(now)})

    @app.post("/predict", openapi_extra=takes(Question))
    async def predict(request: Request) -> Response:
        question = parse(decode_question, await bodies.read(request))
        if question.model == "fraud" and question.event:
            take_one(question.event)
            state, data = await service.read(question.event.user_id), question.event.data
            answer = fraud(state or State(), _number(data.amount if data else None), now_ms())
        elif question.model == "demand":
            answer = demand(await service.read(CITY) or State(), question.zone, question.horizon, now_ms())
        else:
            takes = '{"model":"fraud","event":{...}} or {"model":"demand","zone","horizon"}'
            raise ApiError(422, "invalid", f"it takes {takes}")
        return reply({"model": "python-heuristic", "version": VERSION, **answer})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(DOCS)

    schemas = msgspec.json.schema_components((Batch, Event, Question), ref_template="#/components/schemas/{name}")[1]
    app.openapi()["components"] = {"schemas": schemas}
    return app


DOCS = """<!doctype html><html lang="en"><meta charset="utf-8"><title>event_api</title><link rel="icon" href="data:,">
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}
pre,textarea,input{font:14px monospace;width:100%;box-sizing:border-box}pre{background:#f3f4f6;overflow:auto}</style>
<h1>event_api</h1><p>Described in <a href="/openapi.json">/openapi.json</a></p><main></main><h2>Schemas</h2><pre></pre>
<script>
const make = (tag, properties) => Object.assign(document.createElement(tag), properties)
const event = {event_type: "payment", user_id: "driver_123", event_id: "e-1", data: {amount: 12.5}}
const bodies = {"/events": event, "/events/batch": {events: [event]}, "/predict": {model: "fraud", event}}
fetch("/openapi.json").then(answer => answer.json()).then(api => {
  document.querySelector("pre").textContent = JSON.stringify(api.components.schemas, null, 1)
  for (const [path, methods] of Object.entries(api.paths)) for (const method of Object.keys(methods)) {
    const url = make("input", {value: path.replace("{user_id}", "driver_123"), ariaLabel: "path"})
    const body = make("textarea", {value: JSON.stringify(bodies[path]), hidden: method == "get", ariaLabel: "body"})
    const out = make("pre"), button = make("button", {textContent: "Try it", onclick: async () => {
      const post = {method, headers: {"Content-Type": "application/json"}, body: body.value}
      const answer = await fetch(url.value, method == "get" ? {} : post)
      out.textContent = answer.status + " " + await answer.text()}})
    const title = make("h2", {textContent: method.toUpperCase() + " " + path})
    document.querySelector("main").append(title, url, body, button, out)
  }
})
</script></html>"""


class Bounded(HttpToolsProtocol):
    """Ends a connection whose headers have no end: of a long one all is copied anew with each piece that comes."""

    bare = 0  # bytes received since there was any of a body, or a request was whole

    def data_received(self, data: bytes) -> None:
        self.bare += len(data)
        super().data_received(data)
        if self.bare > MAX_HEAD and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                message = f"the line and the headers of a request have at most {MAX_HEAD} bytes"
                body = to_json({"error": {"code": "headers_too_large", "message": message, "details": {}}})
                head = "HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                self.transport.write(head.encode() + body)
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self.bare = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.bare = 0
        super().on_message_complete()


# ------------------------------------------------------------------------------------------------ start


class Settings(NamedTuple):
    host: str
    port: int
    origins: list[str]
    store_url: str
    cluster: bool


def read_settings(env: Mapping[str, str]) -> Settings:
    """The settings of an environment. Raises ValueError that names the variable, what it held and what it takes."""

    def setting(name: str, default: str, pattern: str, takes: str) -> str:
        value = env.get(name, "").strip() or default
        if not re.fullmatch(pattern, value, re.IGNORECASE):
            shown = re.sub(r"^((?:\w+://)?[^:@/]*):.*@", r"\1:***@", value)  # without a password
            raise ValueError(f"{name} is {shown!r}; it takes {takes}")
        return value

    def port(name: str, default: str) -> int:
        value = int(setting(name, default, r"\+?[0-9]{1,18}", takes := "a port number, 1 to 65535"))
        if not 1 <= value <= 65535:
            raise ValueError(f"{name} is {str(value)!r}; it takes {takes}")
        return value

    def host(name: str, default: str) -> str:
        pattern = r"(\[[\w.:%-]+\]|[\w.:%-]+)?"
        return setting(name, default, pattern, "a host name or an IP address").strip("[]")

    origin = r"(\*|https?://[^\s,/]+)"
    some_origins = "origins such as http://localhost:4000, comma separated"
    origins = setting("CORS_ORIGINS", "http://localhost:4000", rf"{origin}(\s*,\s*{origin})*", some_origins)
    cluster = setting("REDIS_CLUSTER", "false", "true|false|1|0|yes|no|on|off", "true or false").lower()
    some_store = "a URL that begins with redis://, rediss:// or unix://, its path a socket's or a database's number"
    url = setting("REDIS_URL", "", r"rediss?://[^\s/?#]+(/[0-9]*)?([?#]\S*)?|unix://\S+|", some_store)
    redis_host, redis_port = host("REDIS_HOST", ""), port("REDIS_PORT", "6379")
    if not url and redis_host:
        url = f"redis://{f'[{redis_host}]' if ':' in redis_host else redis_host}:{redis_port}"
    clustered = cluster in ("true", "1", "yes", "on")
    if clustered and not url.startswith("redis"):
        raise ValueError(
            f"REDIS_CLUSTER is {cluster!r}; it takes a node's address in REDIS_URL or REDIS_HOST beside it"
        )
    if not url:  # the embedded store
        folder = os.path.abspath(env.get("NEXUS_DATA_DIR", "").strip() or ".nexus")
        path = os.path.join(folder, "valkey.sock")
        if len(os.fsencode(path)) > 107:  # the system's limit for the name of a socket
            name = f"nexus-{os.getuid()}-{sha256(os.fsencode(folder)).hexdigest()[:12]}"
            path = os.path.join(tempfile.gettempdir(), name, "valkey.sock")
        url = "unix://" + quote(path)
    where = host("API_HOST", "127.0.0.1"), port("API_PORT", "8000")
    return Settings(*where, [each.strip() for each in origins.split(",")], url, clustered)


def require_free_port(host: str, port: int) -> None:
    """Raises OSError where somebody listens. The server itself would find out only when it has claimed the store."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections just closed do not count
        probe.bind(address)


def main() -> int:
    parser = argparse.ArgumentParser(description="The reference Python feature service.")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    level = parser.parse_args().log_level
    try:
        settings = read_settings(os.environ)
    except ValueError as error:
        print(f"event_api: {error}", file=sys.stderr)
        return 2
    host, port = settings.host, settings.port
    try:
        require_free_port(host, port)
    except OSError as error:
        where = f"port {port} on {host} is not free ({error.strerror})"
        print(f"event_api: {where}; stop what listens there, or set API_PORT", file=sys.stderr)
        return 1
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for stop in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises its signal again once all is answered and flushed
        signal.signal(stop, lambda *_: sys.exit(0))
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    uvicorn.run(
        create_app(settings),
        host=host,
        port=port,
        loop="uvloop",
        http=Bounded,
        ws="none",
        log_config=None,
        access_log=level == "debug",
        timeout_graceful_shutdown=10,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
