"""Look-ups by id: an event's receipt and predictions, derived from what the streams have written."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline import keys
from pipeline.bridge.attempts import bridge_state
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Audit
from pipeline.errors import NotFound
from pipeline.events import rfc3339
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.inference import DAYS, Inference, describe, find_labels, find_scores

_JOURNAL = struct.Struct("<QQ")
_decode = msgspec.json.Decoder().decode


def event_object(body: bytes, source: str, received_at: int) -> dict[str, Any]:
    """A stored event as the routes answer it: the envelope, data, source and received_at (RFC 3339)."""
    try:
        event: dict[str, Any] = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        event = {"raw": body.decode(errors="replace")}
    return {**event, "source": source, "received_at": rfc3339(received_at)}


class Lookups:
    """Reads only; nothing here is kept beside what the streams wrote. `days`: of the retention."""

    def __init__(self, store: Store, log: Log, days: int = DAYS) -> None:
        self._store, self._log, self._days = store, log, days

    def receipt(self, event_id: str) -> dict[str, Any]:
        """What each stream did with an event: derived from positions, dead letters and the journal of commits. Raises
        NotFound."""
        place = self._log.locate([event_id])[0]
        fetched = self._log.fetch([place])[0] if place is not None else None
        if place is None or fetched is None:
            raise NotFound("unknown_event", f"no event {event_id} is retained")
        audit = checkpoints.audit(self._store)
        streams = {}
        for i, stream in enumerate(keys.STREAMS):
            if fetched.to >> i & 1:
                streams[stream] = self._stream_state(stream, place, fetched.ordinal, audit)
                if stream == "bridge":
                    streams[stream] = bridge_state(self._store, self._log, place, streams[stream])
            else:
                streams[stream] = {"state": "not_addressed", "at": None, "attempts": 0, "result": None}
        return {"event": event_object(fetched.body, fetched.source, fetched.received_at), "streams": streams}

    def _stream_state(self, stream: str, place: int, ordinal: int, audit: Audit) -> dict[str, Any]:
        past = self.past([f"{stream}-{place}"])
        while (raw_place := self._store.call("HGET", keys.REDRIVEN, f"{stream}-{place}")) is not None:
            place = int(raw_place)
            past = self.past([f"{stream}-{place}"])
            again = self._log.fetch([place])[0]
            if again is None:
                break
            ordinal = again.ordinal
        tried = past[f"{stream}-{place}"]["attempts"] if past else 0
        raw = self._store.call("HGET", keys.DEAD + stream, f"{stream}-{place}")
        if raw is not None:
            letter = _decode(raw)
            return {
                "state": "dead",
                "at": rfc3339(letter["last_at"]),
                "attempts": tried + letter["attempts"],
                "result": {"reason": letter["reason"], "dead_letter": letter["id"]},
            }
        if audit.accounts[stream].position.ordinal <= ordinal:
            return {"state": "pending", "at": None, "attempts": None, "result": None}
        at = self._committed_at(stream, ordinal)
        return {"state": "done", "at": None if at is None else rfc3339(at), "attempts": tried + 1, "result": None}

    def past(self, letter_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of the dead letters that had been sent again before: attempts, first_at and received_at (epoch ms) until then."""
        rows = self._store.call("HMGET", keys.REDRIVEN, *[f"<{i}" for i in letter_ids]) if letter_ids else []
        return {i: _decode(raw) for i, raw in zip(letter_ids, rows, strict=True) if raw is not None}

    def _committed_at(self, stream: str, ordinal: int) -> int | None:
        """When the commit that covered an ordinal was made; None where the journal no longer reaches."""
        low, high = 0, int(self._store.call("LLEN", keys.JOURNAL + stream))
        found = None
        while low < high:  # newest first: the last entry whose ordinal lies behind the event
            middle = (low + high) // 2
            raw = self._store.call("LINDEX", keys.JOURNAL + stream, middle)
            if raw is None:
                break
            upto, at = _JOURNAL.unpack(raw)
            if upto > ordinal:
                found, low = at, middle + 1
            else:
                high = middle
        full = low >= checkpoints.JOURNAL_LENGTH
        return None if full else found

    def predictions(
        self, transactions: Sequence[str], now: int, inference: Inference | None
    ) -> dict[str, dict[str, Any]]:
        """The scores that payments got on arrival, with labels that came since; unknown transactions are left out."""
        fresh = inference.unwritten_scores() if inference is not None else {}
        labelled = inference.unwritten_labels() if inference is not None else {}
        wanted = list(dict.fromkeys(transactions))
        stored = dict(zip(wanted, find_scores(self._store, wanted, now, self._days), strict=True))
        labels = dict(zip(wanted, find_labels(self._store, wanted, now, self._days), strict=True))
        found = {}
        for transaction in wanted:
            score = stored[transaction] or fresh.get(transaction)
            if score is not None:
                found[transaction] = describe(score, transaction, labelled.get(transaction, labels[transaction]))
        return found
