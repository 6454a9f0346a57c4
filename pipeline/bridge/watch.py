"""The watch over the partner's health: checks that ask, and what real calls tell between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec

from pipeline import keys
from pipeline.bridge import health as verdicts
from pipeline.bridge.health import Health
from pipeline.events import rfc3339
from pipeline.partner import Partner
from pipeline.store import Command, Store

_CHANGES = 20
_MOST_NOTES = 200
_JUST_MS = 500
_LOOK_S = 0.25
log = logging.getLogger(__name__)


class Watch:
    """Of the bridge's event loop. `health` and `since` (epoch ms) may be read from any thread."""

    def __init__(self, partner: Partner, clock: Callable[[], int], known: Callable[[Health], None]) -> None:
        self._partner, self._clock, self._known = partner, clock, known
        self.health: Health | None = None
        self.since: int | None = None
        self.changes: list[dict[str, Any]] = []  # of the verdict, newest first
        self._asked: Health | None = None  # the last check's own verdict
        self._failing: str | None = None  # why the latest real call failed, if it did
        self._takes = False  # events were taken since the checks began to fail as the last one did
        self._notes: list[Command] = []  # verdicts yet to be kept
        self._kept: dict[str, object] = {}
        self._before: str | None = None  # the verdict of the time before this process
        self._checking: asyncio.Task[Health] | None = None

    @property
    def answers(self) -> bool:
        """The last check found it there."""
        return self._asked is not None and self._asked.status != "offline"

    def load(self, store: Store) -> None:
        """Go on with the capabilities and the verdict that the store has."""
        raw = store.call("GET", keys.CAPABILITIES)
        self._kept = msgspec.json.decode(raw) if raw else {}
        if raw and self._asked is None:
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

    @property
    def failing(self) -> bool:
        """The latest real call failed."""
        return self._failing is not None

    async def check(self) -> Health:
        """Ask the partner; callers at the same time share one check."""
        return await asyncio.shield(self._ask())

    def check_soon(self) -> None:
        """Ask the partner without waiting for it, unless it has just been asked."""
        if self._asked is None or not 0 <= self._clock() - self._asked.checked_at < _JUST_MS:
            self._ask()

    def _ask(self) -> asyncio.Task[Health]:
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        return self._checking

    async def _check(self) -> Health:
        health, before = await self._partner.health(), self._asked
        self._asked = health
        if before is not None and before.url != health.url:
            self._failing, self._takes = None, False
        if health.status != "offline" or before is None or before.status_code != health.status_code:
            self._takes = False
        try:
            self._known(health)  # where that closes the circuit, what failed before is forgotten
        finally:
            found = health
            if health.status == "online" and self._failing is not None:
                found = replace(health, status="degraded", reason=f"its health check is fine, but {self._failing}")
            self._show(self._softened(replace(found)), health.checked_at)
            assert self.health is not None
            self._note(self.health)
        return self.health

    async def new_address(self, stop: Callable[[], bool]) -> None:
        """Ask at once where the partner's address is new, before anything is sent there."""
        self._partner.look()
        while (self._asked is None or self._asked.url != self._partner.url) and not stop():
            checking = self._ask()
            while not checking.done() and not stop():
                self._partner.look()
                await asyncio.wait((checking,), timeout=_LOOK_S)
            if checking.done():
                checking.result()

    def took(self) -> None:
        """Events were taken, whatever the health checks say."""
        if not self._takes:
            self._takes = True
            if self.health is not None and self.health.status == "offline" and self._failing is None:
                self._show(self._softened(self.health))
                self._ask()  # it is there: the last check was asked a moment too soon, or of something else

    def forget(self) -> None:
        """What failed is held against the partner no more: the last check's verdict stands."""
        if self._failing is not None:
            self._stand_by(self._asked)

    def delivered(self) -> None:
        """A real call went well again after some that had not: the last check's verdict stands, unless it found nobody
        there."""
        asked = self._asked
        gone = asked is not None and asked.status == "offline" and asked.status_code is None
        self._stand_by(replace(asked, status="online", reason=None) if asked is not None and gone else asked)

    def _stand_by(self, verdict: Health | None) -> None:
        self._failing = None
        if self.health is not None and verdict is not None:
            self._show(self._softened(replace(verdict)))

    def failed(self, status: str, reason: str) -> None:
        """A real call failed. It is no better than the last check found it."""
        self._failing, self._takes = reason, False
        if self.health is not None and not (self.health.status == "offline" and status == "degraded"):
            self._show(replace(self.health, status=status, reason=reason))

    def _softened(self, health: Health) -> Health:
        """A partner that takes events is not offline."""
        if health.status != "offline" or not self._takes:
            return health
        return replace(health, status="degraded", reason=f"it takes events, but {health.reason}")

    def commands(self) -> list[Command]:
        """What is to be kept: verdicts, and capabilities where they are not those that are. See `kept`."""
        found = self._partner.remembered()
        if self._asked is None or found == self._kept:
            return [*self._notes]
        return [*self._notes, ("SET", keys.CAPABILITIES, msgspec.json.encode(found))]

    def kept(self) -> None:
        """The commands are in the store, or it is not for this instance to keep them."""
        self._notes = []
        if self._asked is not None:
            self._kept = self._partner.remembered()

    def _show(self, health: Health, at: int | None = None) -> None:
        before = self.health.status if self.health is not None else self._before
        if before != health.status or self.since is None:
            self.since = self._clock() if at is None else at
            entry = {"at": rfc3339(self.since), "status": health.status, "reason": health.reason}
            self.changes = [entry, *self.changes[: _CHANGES - 1]]
            if at is None:
                self._note(replace(health, checked_at=self.since))
            level = logging.INFO if health.status == "online" else logging.WARNING
            log.log(level, "partner is %s", health.status, extra={"reason": health.reason})
        self.health = health

    def _note(self, health: Health) -> None:
        """To be kept, even if the store is away just now."""
        self._notes = [*self._notes, *verdicts.remember(health)][-_MOST_NOTES:]
