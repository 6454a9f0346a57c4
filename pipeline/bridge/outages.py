"""The outage ledger: each time the circuit opens, a record of when, why, how much waited for how many users, and the
proof that all of it was delivered or is among the dead letters.

`queued` is counted from the log's own positions; `delivered` and `dead` are counted by the commits, in the same step
as the checkpoint. The two must meet: unexplained = queued - delivered - dead = 0 once the outage has been caught up
with.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Progress
from pipeline.commit_log.frames import BRIDGE_ONLY, CANARY, Position, user_of
from pipeline.events import rfc3339
from pipeline.log import Log
from pipeline.store import Command, Store

KEPT = 1_000
LATEST = 5
PIECE_BYTES = 1 << 18  # of the log, looked through for users at a time: some ms
_BRIDGE = keys.STREAMS.index("bridge")
log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class Outage(msgspec.Struct):
    """One outage. Times in epoch ms. `edge` is the log's end when the partner was back: up to there it must be caught
    up with."""

    began: int
    reason: str
    before: int  # events addressed to the bridge that it had behind it when the outage began
    start: tuple[int, int, int, int]  # segment, offset, index, ordinal: how far the users have been counted
    ended: int | None = None
    edge: int | None = None
    caught_up: int | None = None
    queued: int = 0
    delivered: int = 0
    dead: int = 0
    users: int | None = None
    relapses: int = 0

    @property
    def unexplained(self) -> int:
        return self.queued - self.delivered - self.dead


_decode = msgspec.json.Decoder(Outage).decode


class Ledger:
    """Kept by the instance that runs the bridge, in the bridge's thread; `latest` may be read from any."""

    def __init__(self, store: Store, log: Log) -> None:
        self._store, self._log = store, log
        self.current: Outage | None = None  # from the opening of the circuit until all that waited is through
        self.latest: list[dict[str, Any]] = []
        self.stale = True  # something was kept since `latest` was read

    def load(self) -> None:
        """Go on with what the store has."""
        raw = self._store.call("GET", keys.OUTAGE)
        self.current = _decode(raw) if raw else None
        self.refresh(always=True)

    def refresh(self, always: bool = False) -> None:
        """Read the latest records again, for the dashboard, where they may have changed."""
        if always or self.current is not None or self.stale:
            self.stale = False
            self.latest = rows(self._store, LATEST)

    def is_edge(self, ordinal: int) -> bool:
        """A commit must end exactly here, so that the account of an outage is its own."""
        return self.current is not None and self.current.edge == ordinal

    @property
    def counting(self) -> bool:
        """All that waited is through, but not all of its users have been counted."""
        return self.current is not None and self.current.caught_up is not None

    def opened(self, reason: str, began: int) -> list[Command]:
        """The circuit is open: a new record, or a relapse of the one that has not been caught up with yet."""
        before: list[Command] = []
        if self.counting:
            while self.count_users():
                pass
            before = self._finished()
        return before + self._opened(reason, began)

    def _opened(self, reason: str, began: int) -> list[Command]:
        outage = self.current
        if outage is None:
            audit = checkpoints.audit(self._store)
            account, at = audit.accounts["bridge"], audit.accounts["bridge"].position
            before = audit.head.addressed[_BRIDGE] - account.pending
            start = (at.segment, at.offset, at.index, at.ordinal)
            outage = self.current = Outage(began, reason, before, start)
            return [("DEL", keys.OUTAGE_USERS), ("SET", keys.OUTAGE, _encode(outage))]
        if outage.ended is None:
            return []
        outage.ended = outage.edge = None
        outage.relapses += 1
        return [("SET", keys.OUTAGE, _encode(outage))]

    def closed(self, now: int) -> list[Command]:
        """The partner is back: what waits at this moment is the outage's backlog."""
        outage = self.current
        if outage is None or outage.ended is not None:
            return []
        head = self._log.head()
        outage.ended, outage.edge, outage.queued = now, head.ordinal, head.addressed[_BRIDGE] - outage.before
        return [("SET", keys.OUTAGE, _encode(outage))]

    def progressed(self, progress: Progress) -> list[Command]:
        """Events were delivered or given up; belongs into the same commit."""
        if self.current is None or self.counting:
            return []
        self.current.delivered += progress.processed
        self.current.dead += len(progress.dead)
        return [("SET", keys.OUTAGE, _encode(self.current))]

    def settle(self, ordinal: int, now: int) -> list[Command]:
        """Once all events before the edge are behind the bridge: call by call some more of the users, then the record's
        last state."""
        outage = self.current
        if outage is None or outage.edge is None or ordinal < outage.edge:
            return []
        kept: list[Command] = []
        if outage.caught_up is None:
            outage.caught_up = now
            kept = [("SET", keys.OUTAGE, _encode(outage))]
        return kept if self.count_users() else self._finished()

    def _finished(self) -> list[Command]:
        outage, self.current = self.current, None
        assert outage is not None
        outage.users = int(self._store.call("PFCOUNT", keys.OUTAGE_USERS))
        log.info("outage is over", extra={**_row(outage), "away_s": _seconds(outage.began, outage.ended)})
        return [
            ("LPUSH", keys.OUTAGES, _encode(outage)),
            ("LTRIM", keys.OUTAGES, 0, KEPT - 1),
            ("DEL", keys.OUTAGE, keys.OUTAGE_USERS),
        ]

    def count_users(self) -> bool:
        """Count the users of some more waiting events, while the bridge has nothing else to do; False when there are
        none."""
        outage = self.current
        if outage is None or (outage.edge is not None and outage.start[3] >= outage.edge):
            return False
        frames = self._log.read(Position(*outage.start), PIECE_BYTES)
        if not frames:
            return False
        users = set()
        skip = outage.start[2]
        for frame in frames:
            if outage.edge is not None and frame.ordinal >= outage.edge:
                break
            if frame.to & BRIDGE_ONLY and not frame.to & CANARY:
                users.update([user_of(record[8:]) for record in frame.records[skip:]])
            at, skip = frame.after(), 0
            outage.start = (at.segment, at.offset, at.index, at.ordinal)
        if users:
            checkpoints.write(self._store, [("PFADD", keys.OUTAGE_USERS, *users)])
        return True


def rows(store: Store, limit: int) -> list[dict[str, Any]]:
    """The outages as the route answers them, newest first; the one under way has no `ended`, and what waits so far as
    `queued`."""
    current, waiting, *kept = _read(store, limit)
    found = [_row(_decode(raw)) for raw in kept]
    if current is not None:
        row = _row(_decode(current))
        row["users"] = int(waiting)
        if row["ended"] is None:
            outage = _decode(current)
            head = Log(store).head()
            row["queued"] = head.addressed[_BRIDGE] - outage.before
            row["unexplained"] = None
        found.insert(0, row)
    return found[:limit]


def _read(store: Store, limit: int) -> list[Any]:
    current, users, kept = store.many(
        (("GET", keys.OUTAGE), ("PFCOUNT", keys.OUTAGE_USERS), ("LRANGE", keys.OUTAGES, 0, limit - 1))
    )
    return [current, users, *kept]


def _row(outage: Outage) -> dict[str, Any]:
    took_s = _seconds(outage.ended, outage.caught_up)
    rate = None if not took_s else round((outage.delivered + outage.dead) / took_s, 1)
    return {
        "began": rfc3339(outage.began),
        "ended": _moment(outage.ended),
        "reason": outage.reason,
        "queued": outage.queued,
        "users": outage.users,
        "delivered": outage.delivered,
        "dead": outage.dead,
        "caught_up": _moment(outage.caught_up),
        "catch_up_s": took_s,
        "catch_up_rate": rate,
        "relapses": outage.relapses,
        "unexplained": outage.unexplained if outage.caught_up is not None else None,
    }


def _seconds(since: int | None, until: int | None) -> float | None:
    return None if since is None or until is None else (until - since) / 1000


def _moment(ms: int | None) -> str | None:
    return None if ms is None else rfc3339(ms)
