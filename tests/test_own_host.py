"""Pages elsewhere do not get there: what changes the state of Nexus is asked for by programs and from its own pages, while events
are taken from everywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers import event, until

BRIDGE = "/api/ml/bridge/python"
CONTROLS = ("open_circuit", "pause", "resume", "reset_circuit")
REQUESTS = [
    *[(BRIDGE, {"action": action}) for action in CONTROLS],
    ("/api/ml/dead-letters/redrive", {"all": True}),
    ("/api/ml/models/fraud/retrain", None),
    ("/api/ml/models/fraud/retrain?wait=false", None),
    ("/api/ml/features/sync", None),
]
EVIL = "http://evil.example"


def send(client: Any, path: str, body: Any, **headers: str) -> Any:
    """As a page elsewhere can, without the browser asking the server first."""
    text = "" if body is None else json.dumps(body)
    return client.post(path, data=text, content_type="text/plain", headers=headers)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": EVIL}, "foreign_origin"),
        ({"Origin": "null"}, "foreign_origin"),
        ({"Origin": "http://localhost:4001", "Host": "localhost:4000"}, "foreign_origin"),
        ({"Origin": EVIL, "Host": "evil.example"}, "foreign_host"),  # its name leads here meanwhile
    ],
)
def test_pages_elsewhere_change_nothing(nexus, client, headers, code):
    for path, body in REQUESTS:
        answer = send(client, path, body, **headers)
        assert (answer.status_code, answer.json["error"]["code"]) == (403, code), (path, body)
        assert answer.json["error"].keys() == {"code", "message", "details"}
    circuit = client.get(f"{BRIDGE}?action=health").json["circuit"]
    assert (circuit["forced"], circuit["paused"]) == (False, False)


@pytest.mark.parametrize(
    "headers", [{}, {"Host": "nexus.example"}, {"Host": "localhost:4000", "Origin": "http://localhost:4000"}]
)
def test_programs_and_the_servers_own_pages_get_there(nexus, client, headers):
    until(lambda: nexus.stream("inference"), "the models")
    for path, body in REQUESTS:
        assert send(client, path, body, **headers).status_code in (200, 202, 409), (path, body)


def test_canary_is_not_sent_for_a_page_elsewhere_but_by_any_name_of_the_server(client):
    refused = send(client, BRIDGE, {"action": "test_integration"}, Origin=EVIL)
    assert (refused.status_code, refused.json["error"]["code"]) == (403, "foreign_origin")
    assert send(client, BRIDGE, {"action": "test_integration"}, Host="nexus.example").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/ml/events/ingest", [event()]),
        (BRIDGE, {"action": "send_batch", "events": [event()]}),
        (BRIDGE, {"action": "hybrid_process", "events": [event()]}),
    ],
)
def test_events_are_taken_from_apps_of_any_origin_by_any_name_of_the_server(client, path, body):
    assert send(client, path, body, Origin="capacitor://localhost", Host="events.example").status_code in (200, 202)
