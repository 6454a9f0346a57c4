"""The partner's health: conditions on status, latency and body, and the history of verdicts, kept over restarts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pipeline import keys
from pipeline.events import rfc3339
from pipeline.store import Command, Store

HISTORY_LENGTH = 2_880  # a day of checks at one each 30 s
SLOW_SHARE = 0.5  # of the timeout: a call that takes longer counts as slow
_GOOD_WORDS = ("ok", "okay", "healthy", "up", "online", "pass", "alive", "running", "ready", "green", "true")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Health:
    """One verdict. `status`: online, degraded or offline; `checked_at` in epoch ms; `supports` as the body listed
    it."""

    status: str
    reason: str | None
    url: str
    checked_at: int
    status_code: int | None = None
    response_time_ms: float | None = None
    body: Any = None
    supports: frozenset[str] = frozenset()


def judge(status_code: int, latency_ms: float, body: Any, timeout_ms: float) -> tuple[str, str | None]:
    """The verdict on an answer to GET /health, and its reason in words."""
    if status_code >= 500 or 300 <= status_code < 400:
        return "offline", f"GET /health answered {status_code}"
    if status_code >= 400:
        return "degraded", f"GET /health answered {status_code}"
    said = body.get("status") if isinstance(body, dict) else None
    if isinstance(said, bool):
        said = "true" if said else "false"
    if isinstance(said, str) and said.lower() not in _GOOD_WORDS:
        return "degraded", f"it says of itself: {said[:80]}"
    if latency_ms > timeout_ms * SLOW_SHARE:
        return "degraded", f"it is slow: GET /health took {latency_ms / 1000:.1f} s"
    return "online", None


def remember(health: Health) -> list[Command]:
    """The commands that keep a verdict."""
    entry = {
        "at": health.checked_at,
        "status": health.status,
        "reason": health.reason,
        "status_code": health.status_code,
        "response_time_ms": None if health.response_time_ms is None else round(health.response_time_ms, 2),
    }
    return [("LPUSH", keys.HEALTH, _encode(entry)), ("LTRIM", keys.HEALTH, 0, HISTORY_LENGTH - 1)]


def history(store: Store, limit: int = HISTORY_LENGTH) -> list[dict[str, Any]]:
    """The latest verdicts, newest first; `at` in epoch ms."""
    return [_decode(raw) for raw in store.call("LRANGE", keys.HEALTH, 0, limit - 1)]


def changes(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of verdicts (newest first) those that differ from the one before; `at` as RFC 3339."""
    older = [*verdicts[1:], None] if verdicts else []
    return [
        {"at": rfc3339(verdict["at"]), "status": verdict["status"], "reason": verdict["reason"]}
        for verdict, before in zip(verdicts, older, strict=True)
        if before is None or before["status"] != verdict["status"]
    ]
