"""The snapshot states what is so now: unknown where the store does not answer, starting before anything was asked."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from pipeline.bridge import attempts
from pipeline.bridge.attempts import Attempt
from pipeline.commit_log import checkpoints
from pipeline.runtime import Runtime
from pipeline.serving import Drain
from pipeline.streams.worker import Worker
from tests.conftest import Start, client_of, quick
from tests.helpers import LOCAL, FakePartner, Valkey, append, event, until


def feed(nexus: Runtime, history: bool = False) -> dict[str, Any]:
    nexus.serving.refresh()
    found: dict[str, Any] = json.loads(nexus.serving.feed(history))
    return found


@pytest.fixture
def idle(store_server: Valkey, partner: FakePartner, tmp_path: Any) -> Any:
    """A Nexus that is built and not started."""
    nexus = Runtime(quick(store_server.url, tmp_path, PYTHON_EVENT_API_URL=partner.url))
    yield nexus
    nexus.store.close()


def test_figures_of_the_store_are_unknown_while_it_is_away(own_server: Valkey, tmp_path: Any) -> None:
    nexus = Runtime(quick(own_server.url, tmp_path))
    known = feed(nexus)
    assert (known["totals"]["accepted"], known["unexplained"], known["backlog"]["pending"]) == (0, 0, 0)
    own_server.kill()
    away = feed(nexus)
    assert away["store"]["status"] == "offline"
    assert set(away["totals"].values()) == {None}
    assert set(away["backlog"].values()) == {None}
    assert away["unexplained"] is None
    assert set(away["rates"].values()) == {None}
    assert (away["freshness"]["nexus_s"], away["freshness"]["python_s"]) == (None, None)
    for stream in away["streams"].values():
        assert [stream[name] for name in ("lag", "lag_s", "processed", "failed", "rate")] == [None] * 5
    nexus.store.close()


def test_history_of_errors_holds_those_of_each_second_as_an_open_page_counts_them(idle: Runtime) -> None:
    for total in (0, 2, 2, 5):
        idle.bridge.sender.errors_total = total
        idle.serving.refresh()
    latest = feed(idle, history=True)
    assert latest["history"]["errors"] == [0, 2, 0, 3, 0]
    assert (latest["bridge_errors"]["per_min"], latest["bridge_errors"]["total"]) == (5, 5)


def test_errors_from_before_the_start_are_told_from_the_kept_attempts(idle: Runtime) -> None:
    def attempt(at: int, error: str | None) -> Attempt:
        return Attempt(at, 5, None, 1.0, error, 0, 4, detail=error and f"{error} at {at}")

    kept = [attempt(at, "timeout" if at % 100 == 0 else None) for at in range(1000, 2001)]
    for command in attempts.keep([*kept, attempt(2**50, "refused")]):
        idle.store.call(*command)
    recent = feed(idle)["bridge_errors"]["recent"]
    assert [error["at"] for error in recent] == [2000, 1900, 1800, 1700, 1600, 1500, 1400, 1300]
    assert recent[0] == {"at": 2000, "kind": "timeout", "status": None, "detail": "timeout at 2000"}
    idle.bridge.sender.errors.appendleft({"at": 3000, "kind": "status", "status": 503, "detail": "away"})
    assert [error["at"] for error in feed(idle)["bridge_errors"]["recent"]][:2] == [3000, 2000]


def test_circuit_opened_by_hand_says_so_and_has_no_next_try(nexus: Runtime) -> None:
    until(lambda: nexus.bridge.state == "running", "the bridge at work")
    nexus.bridge.control("open_circuit")
    circuit = feed(nexus)["circuit"]
    assert (circuit["state"], circuit["forced"], circuit["reason"]) == ("open", True, "opened by hand")
    assert circuit["retry_in_s"] is None


def test_before_the_first_run_all_is_starting_and_the_health_route_keeps_its_words(idle: Runtime) -> None:
    before = feed(idle)
    assert before["python"]["status"] == "starting"
    assert before["pipeline"]["state"] == "starting"
    assert {stream["state"] for stream in before["streams"].values()} == {"starting"}
    assert client_of(idle).get("/api/ml/bridge/python?action=health").json["status"] == "offline"


def test_stream_restarts_only_once_it_has_run(idle: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for state in ("restarting", "running", "restarting"):
        monkeypatch.setattr(idle.runner, "states", lambda state=state: dict.fromkeys(LOCAL, (state, None)))
        seen.append(feed(idle)["streams"]["features"]["state"])
    assert seen == ["starting", "running", "restarting"]


def test_partner_that_was_asked_and_did_not_answer_is_offline_not_starting(start_nexus: Start) -> None:
    nexus = start_nexus()
    until(lambda: feed(nexus)["python"]["status"] == "offline", "nobody at the partner's address")


def test_setting_tells_what_the_environment_says_beside_its_default(start_nexus: Start) -> None:
    nexus = start_nexus(FEATURE_SYNC_INTERVAL=60)
    nexus.live.change({"FEATURE_SYNC_INTERVAL": 45}, None, "test")
    found = feed(nexus)["settings"]["FEATURE_SYNC_INTERVAL"]
    assert [found[name] for name in ("value", "environment", "default", "source")] == [45, 60, 300, "store"]


def test_feed_stays_small_after_outages_and_canaries(nexus: Runtime) -> None:
    outage = dict.fromkeys(("began", "ended", "caught_up"), "2026-11-26T22:53:44.123Z")
    counts = {"queued": 6_666, "delivered": 6_666, "dead": 0, "users": 900, "reason": "connection refused " * 9}
    nexus.bridge.ledger.latest = [{**outage, **counts}] * 5
    steps = [{"name": f"hop_{i}", "ok": i > 0, "ms": 1.0, "detail": "in the log"} for i in range(8)]
    nexus.actions.canary.latest = {"at": 1, "success": False, "duration_ms": 9.1, "steps": steps}
    found = feed(nexus)
    assert found["outages"][0]["queued"] == 6_666
    assert found["canary"]["failed"] == [{"name": "hop_0", "detail": "in the log"}]
    assert len(nexus.serving.feed(False)) < 6 * 1024


def test_feed_holds_every_reason_that_health_gives(start_nexus: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    nexus = start_nexus()
    nexus.log.mark.saw(113, nexus.log.mark.reached)
    nexus.log.head()  # which ends earlier
    monkeypatch.setattr(nexus.scheduler, "broken", lambda: ["the job retention fails: ValueError"])
    health = client_of(nexus).get("/api/ml/events/ingest?check=health").json
    reasons = feed(nexus)["reasons"]
    assert {"log", "partner", "job"} <= {reason["about"] for reason in reasons}
    assert {reason["text"] for reason in reasons if reason["about"] in ("log", "job")} <= set(health["reasons"])


def test_what_a_stream_has_processed_is_no_lag_while_its_checkpoint_takes_long(
    start_nexus: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus = start_nexus(ENABLE_PYTHON_BRIDGE="false", HEALTH_CHECK_INTERVAL=1000)
    client, pause = client_of(nexus), threading.Event()
    until(lambda: nexus.log.head().ordinal == nexus.runner.ordinal("features"), "it at the log's end")
    monkeypatch.setattr(Worker, "checkpoint_step", lambda self, idle: pause.wait(0.02) and False)
    taken = append(nexus.log, [event() for _ in range(5)], nexus.clock())
    nexus.taken()
    assert nexus.runner.wait_for("features", taken.end, 30.0)
    at = nexus.runner.position("features")
    append(nexus.log, [event()], nexus.clock() + 57_000)
    monkeypatch.setattr(nexus.runner, "position", lambda name: at)  # as if it had yet to come to the last one
    monkeypatch.setattr(nexus.serving, "_clock", lambda: nexus.clock() + 57_000)

    health = client.get("/api/ml/events/ingest?check=health").json
    row = health["streams"]["features"]
    assert (row["lag"], row["unsaved"], row["state"]) == (6, 5, "running")
    assert row["lag_s"] < 30 < 57 <= row["unsaved_s"]
    assert [reason for reason in health["reasons"] if reason.startswith("features")] == []
    shown = feed(nexus)
    assert shown["streams"]["features"]["state"] == "running"
    assert shown["freshness"]["nexus_s"] < 30 < shown["streams"]["features"]["unsaved_s"]


def test_backlog_has_an_end_only_once_it_has_shrunk_for_a_while() -> None:
    drain = Drain()
    outage = [drain.look(pending, now) for now, pending in enumerate((1000, 1100, 1200, 1300))]
    assert outage == [(False, None)] * 4
    back = [drain.look(pending, now) for now, pending in enumerate((1200, 1100, 1000, 900), 4)]
    assert back == [(True, None), (True, None), (True, 10.0), (True, 9.0)]
    assert [drain.look(0, 8), drain.look(None, 9)] == [(False, None), (None, None)]
    assert [drain.look(pending, now)[0] for now, pending in enumerate((500, 499, 500, 498), 10)] == [False] * 4


def test_what_waited_long_does_not_make_features_old_once_nothing_waits(nexus: Runtime) -> None:
    append(nexus.log, [event()], nexus.clock())
    nexus.taken()
    until(lambda: checkpoints.audit(nexus.store).accounts["bridge"].pending == 0, "it delivered")
    nexus.bridge.delay_s = 66.0
    fresh = feed(nexus)["freshness"]
    assert (fresh["nexus_s"], fresh["python_s"], fresh["python_delay_s"]) == (0, 0, 66)
