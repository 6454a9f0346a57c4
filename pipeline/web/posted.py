"""What a client posted: the body unpacked and read as events, those that cannot be decoded with a verdict of their own."""

from __future__ import annotations

import json
import re
import zlib
from codecs import BOM_UTF8
from io import BytesIO
from itertools import islice
from typing import Any

import msgspec

from pipeline.errors import BadRequest, NexusError, TooLarge
from pipeline.events import MAX_NESTING, NOT_UNICODE, Plain, Rejected

MAX_BODY_BYTES = 5 << 20
MAX_EVENTS = 5_000
_PIECE = 16 << 10
_MAX_DIGITS = 400  # more than the largest double has
_PARSED_DEPTH = 64
_NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# Nothing is looked at twice: a string without an end is one up to there, not a place to try again from each quote in it.
_brackets = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]+|[\]}]+').finditer
_MOST_TURNS = 1_000_000  # texts, and runs of brackets that all open or all close: some tenths of a second


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    events: list[Plain]
    source: str | None = None


_decode_plain = msgspec.json.Decoder(_Batch | list[Plain]).decode
_plain_event = msgspec.json.Decoder(Plain)
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def unpack(body: bytes, encoding: str) -> bytes:
    """The body without its Content-Encoding, and without a byte-order mark. Raises TooLarge beyond MAX_BODY_BYTES, BadRequest for a
    broken one."""
    encoding = encoding.strip().lower()
    if encoding in ("gzip", "x-gzip"):
        body = _gunzip(body)
    elif encoding not in ("", "identity"):
        raise NexusError(
            "unsupported_encoding", f"Content-Encoding {encoding!r} is unknown here; use gzip or none", status=415
        )
    if len(body) > MAX_BODY_BYTES:
        raise TooLarge("body_too_large", f"a body is at most {MAX_BODY_BYTES} bytes; send fewer events at a time")
    return body.removeprefix(BOM_UTF8)


def _gunzip(body: bytes) -> bytes:
    """All members of a gzip body (RFC 1952), up to a byte beyond the limit. In pieces: what follows a member's end is
    copied, and with many small members whole copies would take for ever."""
    unzip, out, at = zlib.decompressobj(wbits=31), bytearray(), 0
    try:
        while at < len(body) and len(out) <= MAX_BODY_BYTES:
            if unzip.eof:
                unzip = zlib.decompressobj(wbits=31)
            out += unzip.decompress(body[at : at + _PIECE], MAX_BODY_BYTES + 1 - len(out))
            at = min(at + _PIECE, len(body)) - len(unzip.unused_data)
    except zlib.error as error:
        raise BadRequest("not_gzip", f"Content-Encoding says gzip, the body is not: {error}") from error
    if len(out) <= MAX_BODY_BYTES and not unzip.eof:
        raise BadRequest("not_gzip", "the gzip body is cut off; send it whole")
    return bytes(out)


def read_plain(body: bytes, content_type: str) -> tuple[list[Plain], str] | None:
    """The posted events and their source where all of it can be decoded as is usual; None where it takes read_body() to say
    what it is. Raises BadRequest."""
    source: str | None = None
    try:
        if _is_ndjson(content_type):
            # Each line by itself: the lines decoder takes two events on one, and one on two.
            events = [_plain_event.decode(line) for line in BytesIO(body) if not line.isspace()]
        else:
            try:
                posted = _decode_plain(body)
            except msgspec.ValidationError:
                posted = [_plain_event.decode(body)]
            events, source = (posted, None) if type(posted) is list else (posted.events, posted.source)
    except _UNREADABLE:
        return None
    if len(events) > MAX_EVENTS:
        return None
    return events, "unknown" if source is None else read_source(source)


def _is_ndjson(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() in _NDJSON


def read_body(body: bytes, content_type: str) -> tuple[list[Any], str]:
    """The posted events and their source, from any of the accepted forms. Raises BadRequest, TooLarge."""
    source: Any = None
    if _is_ndjson(content_type):
        require_few(sum(not line.isspace() for line in BytesIO(body)))
        events = [_line(line) for line in body.split(b"\n") if line.strip()]
    else:
        posted, is_sound = read_json(body)
        if type(posted) is list:
            events = posted
        elif type(posted) is not dict:
            raise BadRequest(
                "not_events", 'the body is {"events":[...],"source":"..."}, an array of events, or one event'
            )
        elif "events" in posted:
            events, source = posted["events"], posted.get("source")
            if type(events) is not list:
                raise BadRequest("not_events", "'events' is an array of events")
        else:
            events = [posted]
            if "event_type" not in posted and "source" in posted and len(posted) == 1:
                raise BadRequest("not_events", "'events' is missing: an array of events")
        require_few(len(events))
        if not is_sound:
            events = [sound(event) for event in events]
    return events, "unknown" if source is None else read_source(source)


def read_json(body: bytes) -> tuple[Any, bool]:
    """What the body holds; False where only a lenient decoder takes it, so that each event has to be looked at by sound().
    Raises BadRequest."""
    try:
        return _decode(body), True
    except _UNREADABLE as error:
        return _by_parts(body, error), False


def require_few(events: int) -> None:
    """Raises TooLarge where that many are too many for a batch. Before they are judged: a verdict takes far more than they do."""
    if events > MAX_EVENTS:
        raise TooLarge("too_many_events", f"a batch has at most {MAX_EVENTS} events, this one {events}; split it")


def read_source(source: Any) -> str:
    """A batch's source, where it has one. Raises BadRequest."""
    try:
        if type(source) is str and 1 <= len(source) <= 64 and len(source.encode()) <= 128:
            return source
    except UnicodeEncodeError:
        pass
    raise BadRequest("invalid_source", "'source' is a string of 1 to 64 characters, or absent")


def _line(line: bytes) -> Any:
    try:
        return _decode(line)
    except _UNREADABLE as error:
        return Rejected("event", "not_json", f"the line is not JSON: {error}")


def _by_parts(body: bytes, error: Exception) -> Any:
    """JSON that the strict decoder refuses as a whole for what one event in it holds: half a surrogate pair, bytes that
    are no UTF-8, a number beyond all bounds, endless nesting. Raises BadRequest where it is no JSON at all."""
    text = body.decode(errors="surrogateescape")
    try:
        return _lenient(text)
    except RecursionError:
        text = _flattened(text)
    except ValueError:
        raise BadRequest("not_json", f"the body is not JSON: {error}") from error
    try:
        return _lenient(text)
    except (ValueError, RecursionError):
        raise BadRequest("not_json", f"the body is not JSON: {error}") from error


def _lenient(text: str) -> Any:
    """As Python reads JSON; numbers without end come as infinite, which no event may hold."""
    return json.loads(text, parse_int=_whole, parse_constant=_no_constant)


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _flattened(text: str) -> str:
    """The text without what is nested too deep to be parsed: what is left there is still too deep for an event. Nothing where the
    nesting has no end, or too much of it would have to be looked at."""
    parts, depth, kept = [], 0, 0
    for found in islice(_brackets(text), _MOST_TURNS):
        start, end = found.span()
        before, bracket = depth, text[start]
        if bracket in "[{":
            depth += end - start
            if before <= _PARSED_DEPTH < depth:
                parts.append(text[kept : start + _PARSED_DEPTH - before])
        elif bracket in "]}":
            depth -= end - start
            if depth <= _PARSED_DEPTH < before:
                parts.append("null")
                kept = start + before - _PARSED_DEPTH
    return "".join([*parts, text[kept:]]) if depth == 0 else ""


def sound(event: Any) -> Any:
    """The event, or its verdict where its texts cannot be written as UTF-8: not even a rejection could quote them."""
    try:
        _encode(event)
    except UnicodeEncodeError:
        return Rejected("event", "not_unicode", NOT_UNICODE)
    except RecursionError:
        return Rejected("event", "too_deep", f"objects and lists nest at most {MAX_NESTING} deep; flatten this one")
    return event
