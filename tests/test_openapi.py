"""The OpenAPI document: it names every route, and the real application's answers are what it says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pipeline.runtime import Runtime
from pipeline.web.openapi import OPERATIONS, document, routes_of
from tests.helpers import event, payment, report, response, until

DOCUMENT = document("test")
NOT_JSON = {"/metrics"}


def test_every_route_is_in_the_document_and_no_other(client):
    assert routes_of(client.application) == sorted(OPERATIONS)


def test_document_is_served_as_it_is_made(client, nexus: Runtime):
    answer = client.get("/openapi.json")
    assert (answer.status_code, answer.json) == (200, document(nexus.version))
    assert answer.json["openapi"] == "3.1.0"


def test_every_schema_is_valid_and_every_reference_leads_somewhere():
    components = DOCUMENT["components"]["schemas"]
    for schema in components.values():
        Draft202012Validator.check_schema(schema)
    references = re.findall(r"#/components/schemas/(\w+)", str(DOCUMENT))
    assert set(references) == set(components)


def test_every_path_parameter_is_declared_and_names_are_unique():
    ids = []
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            ids.append(operation["operationId"])
            inside = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert inside == re.findall(r"\{(\w+)\}", path)
    assert len(ids) == len(set(ids))


REQUESTS: list[tuple[str, str, str, Any]] = [
    ("POST", "/api/ml/events/ingest", "", [event(), {"event_type": "BAD", "user_id": "u"}]),
    ("POST", "/api/ml/events/ingest", "?wait=features&timeout_ms=5000", {"events": [event()], "source": "test"}),
    ("POST", "/api/ml/events/ingest", "", {"event_type": "BAD", "user_id": "u"}),
    ("POST", "/api/ml/events/ingest", "", "no event"),
    ("GET", "/api/ml/events/ingest", "?check=health", None),
    ("GET", "/api/ml/events/ingest", "?check=nothing", None),
    ("GET", "/api/ml/bridge/python", "?action=health", None),
    ("GET", "/api/ml/bridge/python", "?action=features&user_id=driver_1", None),
    ("GET", "/api/ml/bridge/python", "?action=features&user_id=nobody", None),
    ("POST", "/api/ml/bridge/python", "", {"action": "send_batch", "events": [event()]}),
    ("POST", "/api/ml/bridge/python", "", {"action": "send_batch", "events": [{}]}),
    ("POST", "/api/ml/bridge/python", "", {"action": "hybrid_process", "events": [response(), payment("t-2")]}),
    ("POST", "/api/ml/bridge/python", "", {"action": "hybrid_process", "events": [{}]}),
    ("POST", "/api/ml/bridge/python", "", {"action": "test_integration"}),
    ("POST", "/api/ml/bridge/python", "", {"action": "pause"}),
    ("POST", "/api/ml/bridge/python", "", {"action": "resume"}),
    ("POST", "/api/ml/bridge/python", "", {"action": "dance"}),
    ("GET", "/api/ml/bridge/attempts", "?limit=10", None),
    ("GET", "/api/ml/bridge/outages", "", None),
    ("GET", "/api/ml/events", "?user_id=driver_1&order=desc&limit=2", None),
    ("GET", "/api/ml/events/{event_id}", "e-known", None),
    ("GET", "/api/ml/events/{event_id}", "e-unknown", None),
    ("GET", "/api/ml/features/{user_id}", "driver_1", None),
    ("GET", "/api/ml/features/{user_id}", "driver_1?as_of={now}", None),
    ("GET", "/api/ml/features/{user_id}", "nobody", None),
    ("GET", "/api/ml/features/{user_id}", "m-1?entity=merchant", None),
    ("GET", "/api/ml/features/{user_id}", "m-1?entity=car", None),
    ("POST", "/api/ml/features", "", {"user_ids": ["driver_1", "nobody"]}),
    ("POST", "/api/ml/features/sync", "", {}),
    ("GET", "/api/ml/feature-definitions", "", None),
    ("GET", "/api/ml/feature-health", "", None),
    ("GET", "/api/ml/aggregates", "?by=type&step=1s", None),
    ("GET", "/api/ml/aggregates", "?by=colour", None),
    ("POST", "/api/ml/predict", "", {"model": "fraud", "event": payment("t-3")}),
    ("POST", "/api/ml/predict", "", {"model": "demand", "horizon": 2}),
    ("POST", "/api/ml/predict", "", {"model": "weather"}),
    ("GET", "/api/ml/predictions/fraud/{transaction_id}", "t-1", None),
    ("GET", "/api/ml/predictions/fraud/{transaction_id}", "t-unknown", None),
    ("POST", "/api/ml/predictions/fraud", "", {"transaction_ids": ["t-1", "t-unknown"]}),
    ("GET", "/api/ml/predictions/demand", "?horizon=3", None),
    ("GET", "/api/ml/models", "", None),
    ("POST", "/api/ml/models/{name}/retrain", "fraud/retrain", None),
    ("POST", "/api/ml/models/{name}/retrain", "fraud/retrain?wait=false", None),
    ("GET", "/api/ml/settings", "", None),
    ("PATCH", "/api/ml/settings", "", {"settings": {"FEATURE_SYNC_INTERVAL": 60}, "reason": "a test"}),
    ("PATCH", "/api/ml/settings", "", {"settings": {"FEATURE_SYNC_INTERVAL": 0}}),
    ("GET", "/api/ml/settings/audit", "", None),
    ("GET", "/api/ml/dead-letters", "?stream=features", None),
    ("POST", "/api/ml/dead-letters/redrive", "", {"stream": "features"}),
    ("GET", "/healthz", "", None),
    ("GET", "/readyz", "", None),
    ("GET", "/openapi.json", "", None),
]  # fmt: skip


def test_answers_of_the_real_application_are_as_described(client, nexus: Runtime):
    """Good and bad requests of every route, on a Nexus that has users, payments, dead letters and attempts."""
    posted = [
        event(event_id="e-known"),
        response(),
        payment("t-1", data={"merchant_id": "m-1"}),
        report("t-1"),
        report("t-1", is_fraud="perhaps"),
    ]
    answer = client.post("/api/ml/events/ingest?wait=features&timeout_ms=5000", json=posted)
    assert answer.json["accepted"] == len(posted)
    until(lambda: client.get("/api/ml/dead-letters").json["dead_letters"], "a dead letter")
    until(lambda: client.get("/api/ml/bridge/attempts").json["attempts"], "an attempt")
    until(lambda: client.get("/api/ml/predictions/fraud/t-1").status_code == 200, "a score")
    for method, path, rest, body in REQUESTS:
        url = (path.partition("{")[0] + rest).replace("{now}", str(nexus.clock()))
        answer = client.open(url, method=method, json=body)
        operation = DOCUMENT["paths"][path][method.lower()]
        described = operation["responses"].get(str(answer.status_code)) or operation["responses"]["default"]
        schema = {**described["content"]["application/json"]["schema"], "components": DOCUMENT["components"]}
        wrong = [
            f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(answer.json)
        ]
        assert not wrong, (method, url, answer.status_code, wrong, answer.json)


def test_every_route_that_answers_json_is_asked():
    assert {(m, p) for m, p, _, _ in REQUESTS} == {(m, p) for m, p in OPERATIONS if p not in NOT_JSON}


@pytest.mark.parametrize("path", ["/api/ml/nothing", "/api/ml/models/fraud/retrain"])
def test_errors_outside_a_route_have_the_described_form_too(client, path: str):
    answer = client.get(path)
    error = DOCUMENT["components"]["schemas"]["Error"]
    schema = {**error, "components": DOCUMENT["components"]}
    assert answer.status_code in (404, 405)
    assert not list(Draft202012Validator(schema).iter_errors(answer.json))


def test_described_bodies_are_what_the_routes_take():
    """The bodies of the requests above that were accepted fit the described ones."""
    for method, path, _, body in REQUESTS:
        described = DOCUMENT["paths"][path][method.lower()].get("requestBody")
        if described is None or body in ("no event", {}) or "BAD" in str(body) or "dance" in str(body):
            continue
        schema = {**described["content"]["application/json"]["schema"], "components": DOCUMENT["components"]}
        wrong = [error.message for error in Draft202012Validator(schema).iter_errors(body)]
        assert bool(wrong) == ("[{}]" in str(body) or "weather" in str(body)), (method, path, body, wrong)
