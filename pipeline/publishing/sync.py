"""Feature sync: finds users whose two sides drifted apart in age, republishes ours and asks the partner to refresh theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from pipeline.errors import PartnerError
from pipeline.feature_store import FeatureStore
from pipeline.streams.features import Features

MAX_USERS = 500  # a run, so that it stays short; the others' turn comes with the next one
REFRESHES = 50


def synchronise(
    stream: Features | None,
    store: FeatureStore,
    refresh: Callable[[str], Any] | None,
    now: int,
    drift_s: float,
) -> dict[str, Any]:
    """One run over the users that were active since the last one. `refresh` asks the partner for one user's features, None
    where it cannot. Answers counts and the duration in ms. Raises StoreError: the users' turn comes again."""
    began = time.perf_counter()
    report: dict[str, Any] = {"checked": 0, "drifted": 0, "republished": 0, "refreshed": 0, "failed": 0, "malformed": 0}
    if stream is None:
        return {**report, "skipped": "another instance runs the pipeline", "duration_ms": 0.0}
    users = list(islice(list(stream.active), MAX_USERS))
    theirs = store.partner(users)
    drifted = []
    for user_id in users:
        stream.active.pop(user_id, None)
        partner = theirs[user_id]
        report["malformed"] += partner.malformed is not None
        if partner.computed_at is None or (now - partner.computed_at) / 1000 > drift_s:
            drifted.append(user_id)
    stream.outbox.add(drifted)
    report["drifted"] = report["republished"] = len(drifted)
    if refresh is not None:
        stream.active.update(dict.fromkeys(_refresh(drifted, refresh, report)))
    report.update(checked=len(users), waiting=len(stream.active))
    report["duration_ms"] = round((time.perf_counter() - began) * 1000, 2)
    return report


def _refresh(users: list[str], refresh: Callable[[str], Any], report: dict[str, Any]) -> list[str]:
    """Ask for the first of them; whose turn has yet to come."""
    for n, user_id in enumerate(users[:REFRESHES]):
        try:
            report["refreshed"] += refresh(user_id) is not None
        except PartnerError:  # the partner is away, or cannot bear this user, who comes last then
            report["failed"] += 1
            return [*users[n + 1 :], user_id]
    return users[REFRESHES:]
