"""A store that comes back without its latest events, by a failover or out of a copy: gone on from, and told."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pipeline.commit_log.high_water import HighWater
from pipeline.log import Log
from pipeline.runtime import Runtime
from pipeline.store import Store
from tests.conftest import Start, client_of
from tests.faults import HEALTH, INGEST, recount, routes, settled
from tests.helpers import NOON, Valkey, append, event, until
from tests.test_log import ids_in

LOST = "the store came back without its latest events: the log had reached "


def copy_of(server: Valkey) -> list[tuple[bytes, int, bytes]]:
    """All keys, as they are now."""
    names = server.client.keys("*")
    pipe = server.client.pipeline()
    for name in names:
        pipe.pttl(name).dump(name)
    found = pipe.execute()
    return list(zip(names, found[::2], found[1::2], strict=True))


def put_back(server: Valkey, copy: list[tuple[bytes, int, bytes]]) -> None:
    """In one step, so that no connection breaks and no call fails."""
    pipe = server.client.pipeline(transaction=True).flushall()
    for name, ttl, packed in copy:
        pipe.restore(name, max(0, ttl), packed)
    pipe.execute()


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelname == "ERROR"]


def test_log_that_falls_back_unnoticed_is_gone_on_with_and_told_once(
    start_nexus: Start, store_server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    nexus: Runtime = start_nexus(ENABLE_PYTHON_BRIDGE="false", HEALTH_CHECK_INTERVAL=1000)
    send = routes(client_of(nexus))

    def post(count: int, size: int = 1) -> list[str]:
        events: list[dict[str, Any]] = [event(data={"note": "x" * size}) for _ in range(count)]
        assert send("POST", INGEST, events)[0] == 202
        settled(send)
        return [e["event_id"] for e in events]

    before = post(20)
    ends_at, copy = nexus.log.head().ordinal, copy_of(store_server)
    gone = post(30)
    reached = nexus.log.head().ordinal  # canaries are among them
    put_back(store_server, copy)
    until(lambda: errors(caplog), "it to be told")
    after = post(40, size=1000)

    assert [r.getMessage() for r in errors(caplog)] == [f"{LOST}{reached}, now it ends at {ends_at}"]
    assert recount(send, before + after) == (0, 0)
    assert not set(gone) & {e["event_id"] for e in send("GET", "/api/ml/events?limit=1000", None)[1]["events"]}
    status, health = send("GET", HEALTH, None)
    assert (status, health["status"], health["unexplained"]) == (200, "degraded", 0)
    (reason,) = [reason for reason in health["reasons"] if reason.startswith(LOST)]
    assert f"{reached}, now it ends at {ends_at}" in reason


def test_health_no_longer_tells_of_it_after_an_hour(store: Store, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, [event(), event()], NOON)
    assert log.mark.reason is None
    store.client.flushall()
    append(log, [event()], NOON)
    assert f"{LOST}2, now it ends at 1" in str(log.mark.reason)
    monkeypatch.setattr("pipeline.commit_log.high_water.TOLD_S", 0.0)
    assert log.mark.reason is None


def test_nothing_of_an_emptied_store_is_read_from_memory(store: Store, log: Log) -> None:
    for n in range(3):
        append(log, [event(event_id=f"gone-{n}")], NOON)
    store.client.flushall()
    append(log, [event(event_id="kept-0")], NOON)  # ends where the first of those did
    log.mark.heed()
    assert ids_in(log) == ["kept-0"]


def test_fall_that_several_notice_at_once_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    mark = HighWater()
    mark.saw(10, 0)
    mark.saw(5, 10)
    mark.saw(6, 10)  # asked before the fall was noticed, answered after

    assert (mark.reached, mark.fell, len(errors(caplog))) == (5, True, 1)


def test_another_instances_events_and_answers_that_overtake_each_other_are_no_fall(store: Store, log: Log) -> None:
    other = Log(store)
    append(log, [event()], NOON)
    append(other, [event(), event()], NOON)
    known = log.mark.reached
    assert log.head().ordinal == 3
    log.mark.saw(1, known)  # an older answer that comes later

    assert (log.mark.reached, log.mark.fell) == (3, False)
