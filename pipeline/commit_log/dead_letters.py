"""Dead letters: listed newest first, and sent to their streams again, one, many or all."""

from __future__ import annotations

import base64
import logging
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from pipeline import keys
from pipeline.commit_log.frames import record
from pipeline.commit_log.lookups import Lookups, event_object
from pipeline.errors import BadRequest
from pipeline.events import Rejected, parse_rfc3339, rfc3339
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.storage import PAGE_BYTES

_AT_ONCE = 200
log = logging.getLogger(__name__)
_decode = msgspec.json.Decoder().decode


class DeadLetters:
    """What the streams could not process. Kept until it is sent again: nothing is dropped in silence."""

    def __init__(self, store: Store, log: Log) -> None:
        self._store, self._log, self._lookups = store, log, Lookups(store, log)

    def find(self, stream: str | None, reason: str | None, limit: int, cursor: str | None) -> dict[str, Any]:
        """Of one stream or all, up to `limit` of those whose reason contains a text, about PAGE_BYTES of them. Raises
        BadRequest."""
        streams = _streams(stream)
        at, offset = _read_cursor(cursor)
        found: list[dict[str, Any]] = []
        size = 0
        while at < len(streams):
            full = len(found) == limit or size >= PAGE_BYTES
            rows = self._page(streams[at], offset, newest_first=True)
            past = self._lookups.past([_decode(raw)["id"] for raw in rows if raw is not None])
            for raw in rows:
                letter = _decode(raw) if raw is not None else None
                if letter is not None and (reason is None or reason in letter["reason"]):
                    if len(found) == limit or size >= PAGE_BYTES:
                        return {"dead_letters": found, "cursor": _cursor(at, offset)}
                    found.append(_shown(letter, past.get(letter["id"], letter)))
                    size += len(letter["body"])
                offset += 1
            if full and rows:  # whether one follows is not worth reading on
                return {"dead_letters": found, "cursor": _cursor(at, offset)}
            if not rows:
                at, offset = at + 1, 0
        return {"dead_letters": found, "cursor": None}

    def redrive(
        self, ids: Sequence[str] | None, stream: str | None, reason: str | None, now: int, by: str = "unknown"
    ) -> dict[str, Any]:
        """Send again those named, or all of a stream (of all where none is given) whose reason contains a text.

        Answers how many were sent, and which were not and why. Each leaves the dead letters in the same step in which it
        enters the log. Raises BadRequest, StoreError.
        """
        failed: list[dict[str, str]] = []
        sent = 0
        waiting = self._named(ids, failed) if ids is not None else self._matching(_streams(stream), reason)
        some: list[tuple[str, str, str, bytes]] = []
        for letter in [*waiting, None]:
            if letter is not None:
                try:
                    ts = parse_rfc3339(_decode(letter["body"])["timestamp"])[0]
                except (msgspec.DecodeError, Rejected, LookupError, TypeError):
                    failed.append({"id": letter["id"], "reason": "it cannot be decoded"})
                    continue
                some.append((letter["stream"], letter["id"], letter["source"], record(ts, letter["body"].encode())))
            if some and (letter is None or len(some) == _AT_ONCE):
                for (_, letter_id, _, _), done in zip(some, self._log.redrive(some, now), strict=True):
                    sent += done
                    if not done:
                        failed.append({"id": letter_id, "reason": "it is no longer a dead letter"})
                some = []
        told = {"stream": stream, "reason": reason, "events": sent, "failed": len(failed), "by": by}
        log.info("dead letters were sent again", extra=told)
        return {"redriven": sent, "failed": failed}

    def _named(self, ids: Sequence[str], failed: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for letter_id in dict.fromkeys(ids):
            stream = letter_id.rpartition("-")[0]
            raw = self._store.call("HGET", keys.DEAD + stream, letter_id) if stream in keys.STREAMS else None
            if raw is None:
                failed.append({"id": letter_id, "reason": "there is no such dead letter"})
            else:
                yield _decode(raw)

    def _matching(self, streams: list[str], reason: str | None) -> list[dict[str, Any]]:
        """All of them before the first is sent: a letter that dies again while this runs is not sent twice."""
        found = []
        for stream in streams:
            offset = 0
            while rows := self._page(stream, offset, newest_first=False):
                offset += len(rows)
                letters = [_decode(raw) for raw in rows if raw is not None]
                found += [letter for letter in letters if reason is None or reason in letter["reason"]]
        return found

    def _page(self, stream: str, offset: int, newest_first: bool) -> list[bytes | None]:
        command = "ZREVRANGE" if newest_first else "ZRANGE"
        ids = self._store.call(command, keys.DEAD_ORDER + stream, offset, offset + _AT_ONCE - 1)
        rows: list[bytes | None] = self._store.call("HMGET", keys.DEAD + stream, *ids) if ids else []
        return rows


def _streams(stream: str | None) -> list[str]:
    if stream is None:
        return list(keys.STREAMS)
    if stream not in keys.STREAMS:
        raise BadRequest("unknown_stream", f"stream is {stream!r}; there are {', '.join(keys.STREAMS)}")
    return [stream]


def _shown(letter: dict[str, Any], past: dict[str, Any]) -> dict[str, Any]:
    """`past` is what there was before it was sent again, or the letter itself."""
    before = past["attempts"] if past is not letter else 0
    return {
        "id": letter["id"],
        "stream": letter["stream"],
        "event": event_object(letter["body"].encode(), letter["source"], past["received_at"]),
        "reason": letter["reason"],
        "attempts": before + letter["attempts"],
        "first_at": rfc3339(past["first_at"]),
        "last_at": rfc3339(letter["last_at"]),
    }


def _cursor(at: int, offset: int) -> str:
    return base64.urlsafe_b64encode(struct.pack("<BQ", at, offset)).decode().rstrip("=")


def _read_cursor(cursor: str | None) -> tuple[int, int]:
    if cursor is None:
        return 0, 0
    try:
        at, offset = struct.unpack("<BQ", base64.urlsafe_b64decode(cursor + "==="))
        if offset >= 1 << 32:
            raise ValueError("no list is that long")
    except (ValueError, struct.error) as error:
        raise BadRequest("invalid_cursor", "cursor takes what an earlier answer gave as 'cursor'") from error
    return int(at), int(offset)
