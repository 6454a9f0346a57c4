"""The publisher: brings the public keys ml:serving:features:{user_id} up to date, after the commit that changed a user."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple

import msgspec

from pipeline import checkpoints, keys
from pipeline.events import rfc3339
from pipeline.feature_health import FeatureHealth
from pipeline.lease import Lease
from pipeline.store import Command, Store
from pipeline.streams.features import Features

PER_STEP = 100
ROUND_S = 0.1  # of each second at most: under full load public keys come later, the routes stay fresh
DUE_PER_ROUND = 500
SPACING_MS = 60_000  # a user that nothing happens to is looked at again so often at most, and when a window empties
_encode = msgspec.json.Encoder().encode


class Publisher:
    """A round publishes each changed user once, in small steps. `features` gives the running stream, None where it runs elsewhere.

    The users still to publish are the outbox. It is not written anywhere: it is what the log holds between the published
    position and the features stream's checkpoint, and is found again from there after a crash. Users whose values change by
    themselves, as their windows empty, stand in the store by the time of the next change: no user is looked at before.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        features: Callable[[], Features | None],
        clock: Callable[[], int],
        health: FeatureHealth,
    ) -> None:
        self._store, self._lease, self._features, self._clock, self._health = store, lease, features, clock, health
        self._aging: set[str] = set()  # users that came to be published by their time
        self.published = 0

    def publish(self) -> int:
        """One round; the number of users published. Raises Fenced, StoreError."""
        stream = self._features()
        if stream is None or not self._lease.epoch:
            return 0
        self._take_due(stream)
        if not stream.changed:
            return 0
        began, done = time.monotonic(), 0
        position = checkpoints.read(self._store, [stream.name])[stream.name]
        waiting = list(stream.changed)
        for at in range(0, len(waiting), PER_STEP):
            users = waiting[at : at + PER_STEP]
            for user_id in users:
                stream.changed.pop(user_id, None)
            try:
                self._step(stream, users)
            except Exception:
                stream.changed.update(dict.fromkeys(users))
                raise
            done += len(users)
            if time.monotonic() - began > ROUND_S:
                break
        else:
            checkpoints.commit(self._store, self._lease.epoch, [("SET", keys.PUBLISHED, _encode(astuple(position)))])
        self.published += done
        return done

    def _take_due(self, stream: Features) -> None:
        for raw in self._store.call("ZRANGEBYSCORE", keys.DUE, "-inf", self._clock(), "LIMIT", 0, DUE_PER_ROUND):
            user_id = raw.decode()
            self._aging.add(user_id)
            stream.changed[user_id] = None

    def _step(self, stream: Features, users: list[str]) -> None:
        now = self._clock()
        entities = stream.entities(users)
        vectors = {user_id: stream.windows.values(entity, now) for user_id, entity in entities.items()}
        self._health.look(vectors, stream.definitions)
        computed_at = rfc3339(now)
        kept_ms = stream.windows.horizon_ms + SPACING_MS  # nothing happened for so long: every window is empty
        public: list[Command] = [
            (
                "SET",
                keys.SERVING + user,
                _encode({"user_id": user, "features": values, "computed_at": computed_at}),
                "PX",
                kept_ms,
            )
            for user, values in vectors.items()
        ]
        sooner: list[str | int] = []
        commands: list[Command] = []
        for user_id, entity in entities.items():
            due = stream.windows.due(entity, now, SPACING_MS)
            if user_id in self._aging:  # its time has come and been used: the next one replaces it
                commands.append(("ZREM", keys.DUE, user_id) if due is None else ("ZADD", keys.DUE, due, user_id))
            elif due is not None:
                sooner += [due, user_id]
        if sooner:
            commands.append(("ZADD", keys.DUE, "LT", *sooner))
        if self._store.cluster:  # keys of many slots: no script can hold them beside the lease
            if self._lease.epoch:
                self._store.many(public)
        else:
            commands = public + commands
        checkpoints.commit(self._store, self._lease.epoch, commands)
        self._aging.difference_update(users)
