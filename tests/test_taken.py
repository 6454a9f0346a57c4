"""What the log has taken is told as taken, whatever becomes of the store while its results are waited for: a 503 says that
nothing was, and who posts again without event ids would double its events."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.commit_log import checkpoints
from pipeline.commit_log.lease import Lease
from pipeline.errors import StoreUnavailable
from pipeline.feature_store import FeatureStore
from tests.conftest import Start, client_of, runtimes
from tests.helpers import Valkey, append, event, until

INGEST, BRIDGE = "/api/ml/events/ingest", "/api/ml/bridge/python"
Lost = Callable[..., Any]


@pytest.fixture
def start_own(own_server: Valkey, tmp_path: Path) -> Iterator[Start]:
    """Starts instances on `own_server`."""
    yield from runtimes(own_server.url, tmp_path)


@pytest.fixture
def lost(own_server: Valkey, start_own: Start, monkeypatch: pytest.MonkeyPatch) -> Lost:
    """Posts something to a standby whose work nobody does, and kills the store once it has taken the events: the answer."""
    monkeypatch.setattr(Lease, "take", lambda lease: False)

    def post(path: str, body: Any) -> Any:
        nexus = start_own("standby", PYTHON_SERVICE_TIMEOUT=5000)
        client, answers = client_of(nexus), list[Any]()
        asked = threading.Thread(target=lambda: answers.append(client.post(path, json=body)))
        before = nexus.log.head().ordinal
        asked.start()
        until(lambda: nexus.log.head().ordinal > before, "the events in the log")
        own_server.kill()
        asked.join(30)
        return answers[0]

    return post


def test_ingest_that_waits_says_that_the_events_were_taken_and_not_applied(lost):
    answer = lost(f"{INGEST}?wait=features&timeout_ms=5000", [event(event_id="a")])
    assert (answer.status_code, answer.json["accepted"], answer.json["applied"]) == (202, 1, False)


def test_send_batch_says_that_the_events_are_queued(lost):
    twice = [event(event_id="a"), event(event_id="a"), event(event_id="b")]
    answer = lost(BRIDGE, {"action": "send_batch", "events": twice})
    assert (answer.status_code, answer.json["sent"], answer.json["queued"]) == (202, 0, 2)
    assert answer.json["event_ids"] == ["a", "a", "b"]


def test_hybrid_process_says_that_the_events_were_taken_and_is_degraded(lost):
    answer = lost(BRIDGE, {"action": "hybrid_process", "events": [event(event_id="a")]})
    assert (answer.status_code, answer.json["accepted"], answer.json["event_ids"]) == (200, 1, ["a"])
    assert (answer.json["success"], answer.json["degraded"]) == (False, True)
    assert answer.json["typescript"] == {"processed": 0, "features": {}, "predictions": {}}
    assert (answer.json["python"]["processed"], answer.json["python"]["queued"]) == (0, 1)
    assert answer.json["python"]["error"]


def away(*_: Any) -> Any:
    raise StoreUnavailable("away for a moment")


def test_hybrid_process_whose_results_cannot_be_read_tells_what_was_processed(nexus, client, monkeypatch):
    monkeypatch.setattr(FeatureStore, "combine", away)
    answer = client.post(BRIDGE, json={"action": "hybrid_process", "events": [event()]})
    assert (answer.status_code, answer.json["success"], answer.json["degraded"]) == (200, False, True)
    assert (answer.json["accepted"], answer.json["typescript"]["processed"]) == (1, 1)
    assert answer.json["python"] == {"processed": 1, "queued": 0, "error": None}


@pytest.mark.parametrize("action", ["send_batch", "hybrid_process"])
def test_events_of_which_nobody_knows_whether_they_were_refused_count_as_queued(nexus, client, monkeypatch, action):
    monkeypatch.setattr(checkpoints, "reasons", away)
    append(nexus.log, [event(event_id="before")], nexus.clock())
    answer = client.post(BRIDGE, json={"action": action, "events": [event(event_id="before"), event()]})
    told = answer.json if action == "send_batch" else answer.json["python"]
    assert (answer.status_code, told["queued"]) == (202 if action == "send_batch" else 200, 2)
    assert told.get("sent", told.get("processed")) == 0
    assert action == "send_batch" or (answer.json["degraded"] and told["error"])
