"""The publisher: brings the public keys ml:serving:features:{user_id} up to date, after the commit that changed a user."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import astuple

import msgspec

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.commit_log.lease import Lease
from pipeline.events import rfc3339
from pipeline.features.reading import Values
from pipeline.publishing.feature_health import FeatureHealth
from pipeline.store import Command, Store
from pipeline.streams.features import Features

PER_STEP = 100  # users: some ms, then others have their turn; smaller steps begin with cold caches too often
MOST_PER_ROUND = 10_000  # users that are looked at, however many wait: more than a round can publish
ROUND_S = 0.85  # a round ends before the next one is due
ONCE_MS = 1_000  # a user is published at most so often
# Of a round's time, from an idle process to one in which all else takes FULL of it: then public keys come later,
# the routes stay fresh.
MOST_SHARE, LEAST_SHARE, FULL = 0.7, 0.05, 0.8
DUE_PER_ROUND = 500  # users that nothing happened to, in an idle process; fewer the more there is to do, they can wait
SPACING_MS = 60_000  # a user that nothing happens to is looked at again so often at most, and when a window empties
_encode = msgspec.json.Encoder().encode


class Publisher:
    """A round publishes each changed user once, in small steps, with pauses between them by how busy the process is.

    Users whose values change by themselves, as their windows empty, stand in the store by the time of the next change: no user is
    looked at before.

    `features` gives the running stream, None where it runs elsewhere; `stop` ends a round early.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        features: Callable[[], Features | None],
        clock: Callable[[], int],
        health: FeatureHealth,
        stop: threading.Event | None = None,
    ) -> None:
        self._store, self._lease, self._features, self._clock, self._health = store, lease, features, clock, health
        self._stop = stop or threading.Event()
        self._aging: set[str] = set()  # users that came to be published by their time
        self._recent: dict[str, int] = {}  # users published within ONCE_MS and when (epoch ms), in that order
        self._spent_s = 0.0  # processor time of all steps
        self._seen = time.monotonic(), time.process_time()
        self.published = 0

    def publish(self) -> int:
        """One round; the number of users published. Raises Fenced, StoreError."""
        stream, share = self._features(), self._share()
        if stream is None or not self._lease.epoch:
            return 0
        self._take_due(stream, int(DUE_PER_ROUND * (share / MOST_SHARE) ** 2))
        outbox, ends, done = stream.outbox, time.monotonic() + ROUND_S, 0
        if not outbox:
            return 0
        outbox.saw(checkpoints.read(self._store, [stream.name])[stream.name])
        waiting = self._in_turn(outbox.first(MOST_PER_ROUND))
        for at in range(0, len(waiting), PER_STEP):
            users = waiting[at : at + PER_STEP]
            too_soon_s = max(0, self._recent.get(users[-1], 0) + ONCE_MS - self._clock()) / 1000
            if too_soon_s > ends - time.monotonic() or self._stop.wait(too_soon_s):
                break
            began, spent = time.monotonic(), time.thread_time()
            taken = outbox.take(users)
            try:
                self._step(stream, users)
            except Exception:
                outbox.put_back(taken)
                raise
            self._spent_s += time.thread_time() - spent
            done += len(users)
            took_s = time.monotonic() - began  # the longer the more others had to do, too
            if self._stop.wait(took_s * (1 / share - 1)):
                break
        if (position := outbox.advance()) is not None:
            commands: list[Command] = [("SET", keys.PUBLISHED, _encode(astuple(position)))]
            checkpoints.commit(self._store, self._lease.epoch, commands)
        self.published += done
        return done

    def _share(self) -> float:
        """How much of its time this round may work, by what all else has taken since the last one."""
        now, spent = time.monotonic(), time.process_time() - self._spent_s
        (last, before), self._seen = self._seen, (now, spent)
        others = (spent - before) / max(now - last, 0.001)
        return max(LEAST_SHARE, MOST_SHARE * (1 - others / FULL))

    def _in_turn(self, changed: list[str]) -> list[str]:
        """Users that were published a moment ago come last, in the order in which they were."""
        now = self._clock()
        self._recent = {user_id: at for user_id, at in self._recent.items() if 0 <= now - at < ONCE_MS}
        again = set(changed).intersection(self._recent)
        return [u for u in changed if u not in again] + [u for u in self._recent if u in again]

    def _take_due(self, stream: Features, most: int) -> None:
        for raw in self._store.call("ZRANGEBYSCORE", keys.DUE, "-inf", self._clock(), "LIMIT", 0, max(1, most)):
            user_id = raw.decode()
            self._aging.add(user_id)
        stream.outbox.add(self._aging)

    def _step(self, stream: Features, users: list[str]) -> None:
        now = self._clock()
        computed_at = rfc3339(now)
        kept_ms = stream.windows.horizon_ms + SPACING_MS  # nothing happened for so long: every window is empty
        vectors: dict[str, Values] = {}
        public: list[Command] = []
        commands: list[Command] = []
        sooner: list[str | int] = []
        for user_id, entity in stream.entities(users).items():
            time.sleep(0)  # gives way: whoever waits for the interpreter need not wait for a whole switch interval
            values, due = stream.windows.values_and_due(entity, now, SPACING_MS)
            vectors[user_id] = values
            body = _encode({"user_id": user_id, "features": values, "computed_at": computed_at})
            public.append(("SET", keys.SERVING + user_id, body, "PX", kept_ms))
            if user_id in self._aging:  # its time has come and been used: the next one replaces it
                commands.append(("ZREM", keys.DUE, user_id) if due is None else ("ZADD", keys.DUE, due, user_id))
            elif due is not None:
                sooner += [due, user_id]
        self._health.look(vectors, stream.definitions)
        if sooner:
            commands.append(("ZADD", keys.DUE, "LT", *sooner))
        if self._store.cluster:  # keys of many slots: no script can hold them beside the lease
            if self._lease.epoch:
                self._store.many(public)
        else:
            commands = public + commands
        checkpoints.commit(self._store, self._lease.epoch, commands)
        self._aging.difference_update(users)
        for user_id in users:
            self._recent.pop(user_id, None)
            self._recent[user_id] = now
