"""Answers that wait for the streams name the events that these gave up, whether a checkpoint has been made since or not."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from pipeline.commit_log import checkpoints
from pipeline.errors import StoreUnavailable
from pipeline.runtime import Runtime
from pipeline.streams.worker import Worker
from tests.helpers import FakePartner, event, payment, report, until

INGEST = "/api/ml/events/ingest?wait=features&timeout_ms=20000"
BRIDGE = "/api/ml/bridge/python"


def fare(value: Any, user: str = "rider_1") -> dict[str, Any]:
    return event("ride_completed", user, data={"fare": value})


@pytest.fixture(params=["in memory", "written"])
def written(request: pytest.FixtureRequest, nexus: Runtime, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the streams have made a checkpoint by the time of the look; without one, none is made at all."""
    if request.param == "in memory":
        monkeypatch.setattr(Worker, "checkpoint_step", lambda worker, idle: False)
    else:
        look = checkpoints.reasons

        def after(store: Any, stream: str, places: Any) -> dict[int, str]:
            settled = lambda: all(a.pending == 0 for a in checkpoints.audit(store).accounts.values())  # noqa: E731
            until(settled, "the checkpoints")
            return look(store, stream, places)

        monkeypatch.setattr(checkpoints, "reasons", after)
    return request.param == "written"


def hybrid(client: FlaskClient, *events: dict[str, Any]) -> dict[str, Any]:
    answer = client.post(BRIDGE, json={"action": "hybrid_process", "events": events})
    assert answer.status_code == 200
    found: dict[str, Any] = answer.get_json()
    return found


def test_hybrid_process_names_what_nexus_could_not_process(client: FlaskClient, written: bool) -> None:
    posted = [
        fare(12.5),
        {},
        fare("12,50"),
        payment("t1"),
        report("t1", is_fraud="perhaps"),
        event("payment", data={"amount": 5}),
    ]
    answer = hybrid(client, *posted)
    assert (answer["success"], answer["accepted"], answer["typescript"]["processed"]) == (True, 5, 2)
    named = {r["index"]: (r["event_id"], r["field"], r["code"]) for r in answer["rejected"]}
    assert named.keys() == {1, 2, 4, 5}
    assert named[2] == (posted[2]["event_id"], "data.fare", "refused_by_nexus")
    assert named[4][1:] == ("data.is_fraud", "refused_by_nexus")
    assert named[5][1:] == ("data.transaction_id", "refused_by_nexus")
    assert len(answer["rejected"]) == 4
    assert all(r["message"] for r in answer["rejected"])


def test_hybrid_process_of_which_nexus_could_process_nothing_is_no_success(client: FlaskClient, written: bool) -> None:
    answer = hybrid(client, fare("12,50"))
    assert (answer["success"], answer["typescript"]["processed"], answer["python"]["processed"]) == (False, 0, 1)
    assert [r["field"] for r in answer["rejected"]] == ["data.fare"]


def test_ingest_that_waits_names_what_the_features_could_not_take(client: FlaskClient, written: bool) -> None:
    bad = fare("12,50", "nobody")
    assert client.post(INGEST, json=[fare(1.0)]).get_json().keys().isdisjoint({"dead"})
    answer = client.post(INGEST, json=[{}, fare(1.0, "u1"), bad, bad]).get_json()
    assert (answer["accepted"], answer["duplicates"], answer["applied"]) == (2, 1, True)
    [dead] = answer["dead"]
    assert (dead["index"], dead["event_id"], dead["stream"]) == (2, bad["event_id"], "features")
    assert "data.fare is '12,50'" in dead["reason"]
    assert client.get("/api/ml/features/nobody").status_code == 404


def test_ingest_that_waits_is_applied_though_the_dead_letters_cannot_be_read(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise StoreUnavailable("away for a moment")

    monkeypatch.setattr(checkpoints, "reasons", away)
    answer = client.post(INGEST, json=[fare("12,50")])
    assert (answer.status_code, answer.get_json()["applied"]) == (202, True)
    assert "dead" not in answer.get_json()


def test_refusal_of_the_python_service_names_the_field_that_it_names(client: FlaskClient, partner: FakePartner) -> None:
    said = {"index": 0, "field": "data.response_time", "code": "invalid", "message": "it takes a number, or null"}
    partner.script = [lambda path, body: (200, {"accepted": 1, "duplicates": 0, "rejected": [said]})]
    answer = hybrid(client, event(event_id="bad"), event())
    [refused] = answer["rejected"]
    assert (refused["index"], refused["field"], refused["code"]) == (0, "data.response_time", "refused_by_python")
    letter = until(lambda: client.get("/api/ml/dead-letters?stream=bridge").json["dead_letters"], "the dead letter")[0]
    assert letter["reason"] == refused["message"] == "refused: data.response_time: it takes a number, or null"


@pytest.mark.parametrize("action", ["send_batch", "hybrid_process"])
def test_action_judges_an_event_that_cannot_be_decoded_alone(client: FlaskClient, action: str) -> None:
    body = b'{"action":"%s","events":[{"event_type":"t","user_id":"u","event_id":"\\ud83d"},{"event_type":"t","user_id":"u"}]}'
    answer = client.post(BRIDGE, data=body % action.encode(), content_type="application/json")
    assert answer.status_code == 200
    found = answer.get_json()
    assert [(r["index"], r["code"]) for r in found["rejected"]] == [(0, "not_unicode")]
    assert len([i for i in found["event_ids"] if i is not None]) == 1
