"""What the tests of the bridge share: a Nexus before a misbehaving partner, events for it, and the recount."""

from __future__ import annotations

import json
from typing import Any

from pipeline.commit_log import checkpoints
from pipeline.runtime import Runtime
from tests.conftest import Start
from tests.helpers import event, until
from tests.misbehaving import Misbehaving

INTERVAL_S = 1.0
TIMEOUT_MS = 400


def run(start_nexus: Start, server: Misbehaving, **environment: Any) -> Runtime:
    """A Nexus whose partner is `server`, with the first health check behind it."""
    values = {"PYTHON_SERVICE_TIMEOUT": TIMEOUT_MS, **environment}
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url, **values)
    until(lambda: nexus.bridge.health is not None, "the first health check")
    return nexus


def post(nexus: Runtime, count: int, users: int = 7, **more: Any) -> list[dict[str, Any]]:
    """Events through the ingest, in frames of ten."""
    events = [event(user=f"user_{i % users}", **more) for i in range(count)]
    for at in range(0, count, 10):
        take(nexus, *events[at : at + 10])
    return events


def take(nexus: Runtime, *events: dict[str, Any]) -> list[dict[str, Any]]:
    """These events through the ingest, in one frame."""
    status, answer = nexus.ingest.post(json.dumps(events).encode(), "application/json", "", {})
    assert (status, answer["accepted"]) == (202, len(events))
    return list(events)


def settled(nexus: Runtime, deadline_s: float = 30.0) -> checkpoints.Account:
    """The bridge's account once nothing waits any more; at every look on the way nothing is unexplained."""

    def look() -> checkpoints.Account | None:
        audit = checkpoints.audit(nexus.store)
        assert audit.accounts["bridge"].unexplained == 0
        return audit.accounts["bridge"] if audit.accounts["bridge"].pending == 0 else None

    return until(look, "an empty backlog", deadline_s)


def reconcile(nexus: Runtime, server: Misbehaving, posted: list[dict[str, Any]], dead: int = 0) -> None:
    """Once nothing waits: each posted event was applied once and in order, but for so many dead letters."""
    account = settled(nexus)
    mine = {e["event_id"] for e in posted}
    applied = [i for i in server.applied if i in mine]
    assert account.dead == dead
    assert len(applied) == len(set(applied)) == len(posted) - dead
    assert server.in_order(posted)
