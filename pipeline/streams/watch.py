"""The watch over the partner's health: checks that ask, and what real calls tell between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec

from pipeline import health as verdicts
from pipeline import keys
from pipeline.events import rfc3339
from pipeline.health import Health
from pipeline.partner import Partner
from pipeline.store import Command, Store

_CHANGES = 20
_JUST_MS = 500


class Watch:
    """Of the bridge's event loop. `health` and `since` (epoch ms) may be read from any thread."""

    def __init__(self, partner: Partner, clock: Callable[[], int], known: Callable[[Health], None]) -> None:
        self._partner, self._clock, self._known = partner, clock, known
        self.health: Health | None = None
        self.since: int | None = None
        self.changes: list[dict[str, Any]] = []  # of the verdict, newest first
        self._asked: Health | None = None  # the last check's own verdict
        self._failing: str | None = None  # why the latest real call failed, if it did
        self._kept: dict[str, object] = {}
        self._before: str | None = None  # the verdict of the time before this process
        self._checking: asyncio.Task[Health] | None = None

    def load(self, store: Store) -> None:
        """Go on with the capabilities and the verdict that the store has."""
        raw = store.call("GET", keys.CAPABILITIES)
        if raw:
            self._kept = msgspec.json.decode(raw)
            self._partner.recall(self._kept)
        if self.since is None:
            kept = verdicts.history(store)
            self.changes = verdicts.changes(kept)[:_CHANGES]
            if kept and self.health is None:
                self._before = kept[0]["status"]
                self.since = kept[-1]["at"]
                for verdict, older in pairwise(kept):
                    if older["status"] != verdict["status"]:
                        self.since = verdict["at"]
                        break

    async def check(self) -> Health:
        """Ask the partner; callers at the same time share one check."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        return await asyncio.shield(self._checking)

    def check_soon(self) -> None:
        """Ask the partner without waiting for it, unless it has just been asked."""
        recent = self._asked is not None and self._clock() - self._asked.checked_at < _JUST_MS
        if not recent and (self._checking is None or self._checking.done()):
            self._checking = asyncio.create_task(self._check())

    async def _check(self) -> Health:
        health = await self._partner.health()
        self._asked = health
        if health.status == "online" and self._failing is not None:
            health = replace(health, status="degraded", reason=f"its health check is fine, but {self._failing}")
        self._show(replace(health), health.checked_at)
        self._known(self._asked)
        assert self.health is not None
        return self.health

    async def new_address(self) -> bool:
        """Ask at once where the partner's address is new, before anything is sent there. True when it was."""
        url = self._partner.url
        if self._asked is not None and self._asked.url == url:
            return False
        changed = self._asked is not None
        await self.check()
        return changed

    def delivered(self) -> None:
        """A real call went well again after some that had not: the last check's verdict stands, unless it was
        offline."""
        self._failing = None
        if self.health is None or self._asked is None:
            return
        back = self._asked if self._asked.status == "degraded" else replace(self._asked, status="online", reason=None)
        self._show(replace(back))

    def failed(self, status: str, reason: str) -> None:
        """A real call failed. It is no better than the last check found it."""
        self._failing = reason
        if self.health is not None and not (self.health.status == "offline" and status == "degraded"):
            self._show(replace(self.health, status=status, reason=reason))

    def commands(self, health: Health) -> list[Command]:
        """What of a check is to be kept."""
        commands = verdicts.remember(self.health or health)
        found = self._partner.remembered()
        if found != self._kept:
            self._kept = {**found, "lacks": dict(self._partner.lacks)}
            commands.append(("SET", keys.CAPABILITIES, msgspec.json.encode(found)))
        return commands

    def _show(self, health: Health, at: int | None = None) -> None:
        before = self.health.status if self.health is not None else self._before
        if before != health.status or self.since is None:
            self.since = self._clock() if at is None else at
            entry = {"at": rfc3339(self.since), "status": health.status, "reason": health.reason}
            self.changes = [entry, *self.changes[: _CHANGES - 1]]
        self.health = health
