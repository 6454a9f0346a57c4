"""The contract of the HTTP routes: shapes, statuses, error bodies; the hot route answers as Flask does."""

from __future__ import annotations

import gzip
import json
import re
import time
from io import BytesIO
from typing import Any
from urllib.parse import quote

import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from werkzeug.test import EnvironBuilder, run_wsgi_app

from pipeline.commit_log import checkpoints
from pipeline.events import rfc3339
from pipeline.log import Log
from pipeline.operations.footprint import Footprint
from pipeline.routes import features_responses, ingest_response
from pipeline.runtime import Runtime
from pipeline.store import Store
from pipeline.web.openapi import document
from pipeline.web.posted import MAX_BODY_BYTES
from tests import misbehaving
from tests.conftest import Start, client_of
from tests.helpers import LOCAL, STREAMS, FakePartner, Valkey, event, events_of, payment, report, response, until
from tests.misbehaving import Misbehaving

INGEST = "/api/ml/events/ingest"
BRIDGE = "/api/ml/bridge/python"
DOCUMENT = document("test")
FULL_WIDTH = "%EF%BC%91%EF%BC%90"  # 10, which Python reads as a number
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z\Z")


def post(client: FlaskClient, *events: dict[str, Any], source: str = "driver_app") -> list[str]:
    """Events posted, and applied to the features."""
    answer = client.post(INGEST + "?wait=features&timeout_ms=20000", json={"events": events, "source": source})
    assert (answer.status_code, answer.json["applied"]) == (202, True), answer.json
    return [e["event_id"] for e in events]


def settled(nexus: Runtime, streams: tuple[str, ...] = LOCAL) -> None:
    until(
        lambda: all(checkpoints.audit(nexus.store).accounts[name].pending == 0 for name in streams), "the streams' work"
    )


def assert_error(answer: Any, status: int, code: str | None = None) -> None:
    assert answer.status_code == status, answer.get_data(as_text=True)
    assert answer.content_type == "application/json"
    assert answer.json.keys() == {"error"}
    assert answer.json["error"].keys() == {"code", "message", "details"}
    assert answer.json["error"]["message"]
    assert code in (None, answer.json["error"]["code"])


def assert_described(answer: Any, path: str) -> None:
    """The answer of a GET is as the OpenAPI document says."""
    described = DOCUMENT["paths"][path]["get"]["responses"][str(answer.status_code)]
    schema = {**described["content"]["application/json"]["schema"], "components": DOCUMENT["components"]}
    assert [error.message for error in Draft202012Validator(schema).iter_errors(answer.json)] == []


# ingest


def test_ingest_answers_202_with_verdicts_by_position(client):
    posted = [event(event_id="a"), event(event_id="a"), {"event_type": "t"}, event(event_id="d")]
    answer = client.post(INGEST, json={"events": posted, "source": "driver_app"})
    assert answer.status_code == 202
    found = answer.json
    [rejected] = found.pop("rejected")
    assert found == {"accepted": 2, "duplicates": 1, "event_ids": ["a", "a", None, "d"]}
    assert rejected.keys() == {"index", "event_id", "field", "code", "message"}
    assert (rejected["index"], rejected["event_id"], rejected["field"]) == (2, None, "user_id")


def test_ingest_reads_what_it_has_written_when_asked_to_wait(client):
    for n in range(1, 4):
        post(client, response("driver_1"))
        features = client.get("/api/ml/features/driver_1").json["features"]
        assert features["event_count_5m"] == n


def test_none_valid_is_422_and_says_why(client):
    answer = client.post(INGEST, json=[{"user_id": "u"}, 5])
    assert answer.status_code == 422
    assert (answer.json["accepted"], answer.json["event_ids"]) == (0, [None, None])
    assert [r["index"] for r in answer.json["rejected"]] == [0, 1]
    assert answer.json["error"].keys() == {"code", "message", "details"}


def test_ingest_without_a_store_is_503_with_retry_after_and_takes_nothing(own_server: Valkey, start_nexus: Start):
    nexus = start_nexus(REDIS_URL=own_server.url)
    client = client_of(nexus)
    own_server.kill()
    for answer in (client.post(INGEST, json=event()), flask_answer(nexus, INGEST, json.dumps(event()).encode())):
        assert answer[0] == 503 if isinstance(answer, tuple) else answer.status_code == 503
        headers = answer[1] if isinstance(answer, tuple) else answer.headers
        assert int(headers["Retry-After"]) >= 1
    paths = (
        "/api/ml/events",
        "/api/ml/features/u",
        "/api/ml/aggregates",
        "/api/ml/dead-letters",
    )
    for path in paths:
        found = client.get(path)
        assert_error(found, 503)
        assert int(found.headers["Retry-After"]) >= 1
    health = client.get(f"{INGEST}?check=health")
    assert (health.status_code, health.json["status"]) == (503, "unhealthy")
    assert int(health.headers["Retry-After"]) >= 1
    assert health.json["error"]["code"] == "store_unavailable"
    assert (health.json["unexplained"], set(health.json["totals"].values())) == (None, {None})
    assert health.json["streams"].keys() == set(STREAMS)
    assert {stream["lag"] for stream in health.json["streams"].values()} == {None}
    assert_described(health, INGEST)
    assert client.get("/healthz").status_code == 200
    assert client.get(f"{BRIDGE}?action=health").status_code == 200
    assert client.get("/nexus/feed.json").status_code == 200
    assert client.get("/readyz").status_code == 503
    own_server.start()
    until(lambda: client.post(INGEST, json=event()).status_code == 202, "ingest again")


def flask_answer(nexus: Runtime, path: str, body: bytes, **more: Any) -> tuple[int, dict[str, str], bytes]:
    """The answer of the route as registered in Flask, without the dispatch ahead of it."""
    application = client_of(nexus).application
    return _wsgi(application.wsgi_app._app, path, body, **more)  # type: ignore[attr-defined]


def _wsgi(application: Any, path: str, body: bytes, **more: Any) -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Type": "application/json", **more.pop("headers", {})}
    method = more.pop("method", "POST")
    builder = EnvironBuilder(path, method=method, input_stream=BytesIO(body), headers=headers, **more)
    environ = builder.get_environ()
    environ["CONTENT_LENGTH"] = headers.get("Content-Length", str(len(body)))
    parts, status, found = run_wsgi_app(application, environ, buffered=True)
    return int(status.split()[0]), dict(found), b"".join(parts)


GZIPPED = gzip.compress(json.dumps([event(event_id="g")]).encode(), mtime=0)


@pytest.mark.parametrize(
    ("body", "headers", "query", "status"),
    [
        (b'[{"event_id":"a","event_type":"t","user_id":"u"}]', {}, "", 202),
        (b'[{"event_id":"a","event_type":"t","user_id":"u"}]', {}, "?wait=features&timeout_ms=10000", 202),
        (b'{"event_id":"b","event_type":"t","user_id":"u"}', {"Content-Type": "application/x-ndjson"}, "", 202),
        (GZIPPED, {"Content-Encoding": "gzip"}, "", 202),
        (b'[{"event_type":"t"}]', {}, "", 422),
        (b"[]", {}, "", 422),
        (b"{", {}, "", 400),
        (b"", {}, "", 400),
        (b"null", {}, "", 400),
        (b"plain", {"Content-Encoding": "gzip"}, "", 400),
        (b"[]", {"Content-Encoding": "br"}, "", 415),
        (b"[]", {}, "?wait=storage", 400),
        (b"[]", {}, "?wait=features&timeout_ms=%C2%B2", 400),
        (b"[]", {}, "?wait=features&timeout_ms=" + "9" * 5000, 400),
        (b"[]", {"Content-Length": "9" * 5000}, "", 413),
        (b"[1,", {"Content-Length": "900"}, "", 400),
        (b"[" + b" " * MAX_BODY_BYTES + b"]", {}, "", 413),
        (json.dumps([1] * 5001).encode(), {}, "", 413),
        (gzip.compress(b"[" + b" " * MAX_BODY_BYTES + b"]", mtime=0), {"Content-Encoding": "gzip"}, "", 413),
    ],
)
def test_hot_route_answers_as_the_flask_route_does(nexus, client, body, headers, query, status):
    hot = _wsgi(client.application.wsgi_app, INGEST + query, body, headers=headers)
    cold = flask_answer(nexus, INGEST + query, body, headers=headers)
    assert hot[0] == cold[0] == status
    assert hot[1]["Content-Type"] == cold[1]["Content-Type"] == "application/json"
    first, second = json.loads(hot[2]), json.loads(cold[2])
    if status == 202:  # the second time they are duplicates
        assert (first.pop("accepted"), first.pop("duplicates")) == (1, 0)
        assert (second.pop("accepted"), second.pop("duplicates")) == (0, 1)
    assert first == second
    if status not in (202, 422):
        assert first["error"].keys() == {"code", "message", "details"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("driver_1", 200),
        ("driver_1?names=acceptance_rate,event_count_5m,unknown", 200),
        ("driver_1?names=acceptance_rate&names=event_count_5m", 200),
        ("driver_1?names=", 200),
        ("driver_1?as_of=2026-01-31T08:00:00%2B01:00", 404),
        ("driver_1?as_of=2126-01-31T08:00:00Z", 400),
        ("driver_1?as_of=soon", 400),
        ("driver_1?as%5Fof=2026-01-31T08:00:00%2B01:00", 404),
        ("driver_1?%6Bnown_at=1", 400),
        ("driver_1?%65ntity=planet", 400),
        ("driver_1?names=acceptance_rate%2Cevent_count_5m", 200),
        ("driver_1?known_at=1", 400),
        ("driver_1?entity=merchant", 404),
        ("driver_1?entity=zone&as_of=1", 400),
        ("driver_1?entity=planet", 400),
        ("nobody", 404),
        ("m%C3%BCller%20%2B", 404),
        ("%FF", 404),
        ("", 404),
        ("driver_1/more", 404),
        ("driver_1%2Fmore", 404),
    ],
)
def test_features_ahead_of_flask_answer_as_the_flask_route_does(nexus, client, path, status):
    post(client, response("driver_1"))
    until(lambda: nexus.backlog.behind("driver_1") == 0, "the Python service to have it")
    now = nexus.clock()
    nexus.clock = nexus.features._clock = lambda: now
    path = f"/api/ml/features/{path}"
    hot = _wsgi(client.application.wsgi_app, path, b"", method="GET")
    cold = flask_answer(nexus, path, b"", method="GET")
    assert hot[0] == cold[0] == status
    assert hot[1]["Content-Type"] == cold[1]["Content-Type"] == "application/json"
    assert int(hot[1]["Content-Length"]) == len(hot[2])
    assert json.loads(hot[2]) == json.loads(cold[2])


def test_unexpected_error_of_ingest_is_500_in_json_both_ways(nexus, client, monkeypatch):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(nexus.ingest, "post", broken)
    for answer in (_wsgi(client.application.wsgi_app, INGEST, b"[]"), flask_answer(nexus, INGEST, b"[]")):
        assert (answer[0], json.loads(answer[2])["error"]["code"]) == (500, "internal")
        assert b"secret" not in answer[2]


@pytest.mark.parametrize("path", ["/api/ml/predict", "/api/ml/features", BRIDGE, "/api/ml/dead-letters/redrive"])
def test_body_without_a_length_is_read_up_to_the_limit_and_no_further(nexus, client, path):
    class Endless(BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            wanted = 1 << 30 if size is None or size < 0 else size
            self.given += wanted
            return b" " * wanted

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            return len(buffer)

    body = Endless()
    builder = EnvironBuilder(path, method="POST", content_type="application/json", input_stream=body)
    environ: dict[str, Any] = dict(builder.get_environ())
    environ |= {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    environ.pop("CONTENT_LENGTH", None)
    parts, status, _ = run_wsgi_app(client.application.wsgi_app, environ, buffered=True)
    assert (status.split()[0], json.loads(b"".join(parts))["error"]["code"]) == ("413", "body_too_large")
    assert body.given <= MAX_BODY_BYTES + (1 << 17)


def test_chunked_lines_that_break_off_within_one_are_refused_as_a_whole(nexus: Runtime) -> None:
    """Of chunks that broke off the server says nothing: what came is all there is to judge by."""

    def status(body: bytes) -> tuple[int, str | None]:
        environ = {"wsgi.input": BytesIO(body), "CONTENT_TYPE": "application/x-ndjson"}
        found, _, answer = ingest_response(nexus, environ | {"HTTP_TRANSFER_ENCODING": "chunked"})
        return found, json.loads(answer).get("error", {}).get("code")

    whole = json.dumps(event(data={"a": [1.5, True, None, "\u00e9"]})).encode()
    first = json.dumps(event()).encode() + b"\n"
    assert {status(first + whole[:cut]) for cut in range(1, len(whole))} == {(400, "cut_off")}
    assert nexus.log.head().accepted == 0
    for complete in (first, first + whole, first + whole + b"\n", first + b"{bad}", first + b'{"a": "\xff"}'):
        assert status(complete)[0] == 202  # one bad event never spoils its batch


def test_check_health_shows_every_stream_and_the_totals(nexus, client):
    post(client, event(), event())
    client.post(INGEST, json=[{"bad": 1}])
    settled(nexus, STREAMS)
    answer = client.get(f"{INGEST}?check=health")
    assert answer.status_code == 200
    assert answer.json["streams"].keys() == set(STREAMS)
    for stream in answer.json["streams"].values():
        assert {"state", "lag", "processed", "failed", "rate"} <= stream.keys()
        assert (stream["lag"], stream["processed"], stream["failed"]) == (0, 2, 0)
    totals = answer.json["totals"]
    assert (totals["accepted"], totals["duplicates"], totals["rejected"]) == (2, 0, 1)
    assert answer.json["unexplained"] == 0


def test_check_health_is_healthy_once_all_is_well(client):
    until(lambda: client.get(f"{INGEST}?check=health").json["status"] == "healthy", "healthy")


def test_check_health_sees_one_skipped_event(nexus, client):
    post(client, event(), event())
    settled(nexus)
    until(lambda: client.get(f"{INGEST}?check=health").json["status"] == "healthy", "healthy")
    nexus.store.call("HINCRBY", "ml:{p}:checkpoint:storage", "processed", -1)
    found = client.get(f"{INGEST}?check=health").json
    assert (found["unexplained"], found["status"]) == (1, "degraded")
    assert found["reasons"] == ["events unexplained: 1"]


def test_bytes_of_what_there_is_none_of_are_not_known(store: Store) -> None:
    found = Footprint(store, Log(store))
    found.look()
    assert set(found.latest.values()) == {None}


def test_check_health_shows_the_bytes_of_an_event_an_id_and_a_user(nexus, client):
    assert client.get(f"{INGEST}?check=health").json["bytes"].keys() == {"per_event", "per_id", "per_user"}
    post(client, *[payment(f"t-{n}", user=f"rider-{n % 7}", note="x" * 100) for n in range(300)])
    settled(nexus)
    until(lambda: nexus.store.call("GET", "ml:serving:features:rider-6"), "the public keys")
    found = Footprint(nexus.store, nexus.log)
    found.look()
    assert 300 < (found.latest["per_event"] or 0) < 3000
    assert 20 < (found.latest["per_id"] or 0) < 60
    assert 200 < (found.latest["per_user"] or 0) < 20_000


# the bridge


def test_bridge_health_reports_what_was_measured(client):
    until(lambda: client.get(f"{BRIDGE}?action=health").json["status"] == "online", "online")
    found = client.get(f"{BRIDGE}?action=health").json
    assert found["python_service"].keys() >= {"url", "status_code", "response_time_ms", "checked_at", "body"}
    assert found["python_service"]["status_code"] == 200
    assert found["python_service"]["response_time_ms"] > 0
    assert RFC3339.match(found["python_service"]["checked_at"])
    assert found["circuit"].keys() >= {"state", "opened_at", "failures"}
    assert (found["circuit"]["state"], found["circuit"]["failures"]) == ("closed", 0)
    assert found["backlog"].keys() >= {"pending", "dead", "oldest_age_s"}


def test_bridge_features_are_always_objects(nexus, client):
    post(client, response("driver_1"))
    found = client.get(f"{BRIDGE}?action=features&user_id=driver_1").json
    assert found["python_features"] == {"user_id": "driver_1", "features": {}}
    assert found["combined_features"].keys() == {"python_features", "typescript_features", "combined"}
    assert found["combined_features"]["python_features"] == {}
    assert found["combined_features"]["typescript_features"]["acceptance_rate"] == 1.0
    assert found["combined_features"]["combined"]["acceptance_rate"] == 1.0
    assert found["meta"].keys() == found["combined_features"]["combined"].keys()
    for meta in found["meta"].values():
        assert {"owner", "computed_at", "age_s", "verdict"} <= meta.keys()
        assert meta["verdict"] in ("fresh", "stale", "expired", "fallback")


def test_user_that_neither_side_knows_is_404(client):
    assert_error(client.get(f"{BRIDGE}?action=features&user_id=nobody"), 404, "unknown_user")
    assert_error(client.get("/api/ml/features/nobody"), 404, "unknown_user")


def test_body_of_any_route_may_be_gzip(client, partner):
    post(client, response("driver_1"))
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    packed = gzip.compress(json.dumps({"user_ids": ["driver_1"], "names": ["event_count_5m"]}).encode())
    found = client.post("/api/ml/features", data=packed, headers=headers)
    assert found.json["users"]["driver_1"]["features"] == {"event_count_5m": 1}
    packed = gzip.compress(json.dumps({"action": "send_batch", "events": [event()]}).encode())
    assert client.post(BRIDGE, data=packed, headers=headers).json["sent"] == 1
    assert_error(client.post(BRIDGE, data=b"{}", headers=headers), 400, "not_gzip")
    assert_error(client.post(BRIDGE, data=b"{}", headers={**headers, "Content-Encoding": "br"}), 415)
    bomb = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
    assert_error(client.post("/api/ml/features", data=bomb, headers=headers), 413)


def features_of(server: Misbehaving, asked: misbehaving.Asked, answer: misbehaving.Answer) -> None:
    """Of a partner that writes no key of `new`, which it knows, and fails at `bad`."""
    user = asked.path.partition("/features/")[2]
    if not user:
        misbehaving.healthy(server, asked, answer)
    elif user == "new":
        answer.send(
            200, {"user_id": user, "features": {"theirs": 7}, "computed_at": rfc3339(time.time_ns() // 1_000_000)}
        )
    else:
        answer.send(500 if user == "bad" else 404, {})


def test_user_that_the_partner_has_just_met_is_known(start_nexus):
    server = Misbehaving(supports=("batch", "features"))
    server.on_health = features_of
    nexus = start_nexus(PYTHON_EVENT_API_URL=server.url, HYBRID_FEATURE_MODE="true")
    client = client_of(nexus)
    until(lambda: "features" in nexus.bridge.partner.supports, "the partner's capabilities")
    ask = lambda user: client.get(f"{BRIDGE}?action=features&user_id={user}")  # noqa: E731
    found = ask("new").json
    assert found["python_features"] == {"user_id": "new", "features": {"theirs": 7}}
    assert found["combined_features"]["combined"] == {"theirs": 7}
    assert found["meta"]["theirs"]["owner"] == "python"
    assert "neither system knows" in ask("nobody").json["error"]["message"]
    assert_error(ask("bad"), 404, "unknown_user")
    assert "answered 500" in ask("bad").json["error"]["message"]
    asked = len(server.requests)
    client.patch("/api/ml/settings", json={"settings": {"ENABLE_PYTHON_BRIDGE": False}})
    assert "the Python service is disabled" in ask("new").json["error"]["message"]
    client.patch("/api/ml/settings", json={"settings": {"ENABLE_PYTHON_BRIDGE": None}})
    post(client, event(user="met"))
    assert ask("met").status_code == 200
    client.patch("/api/ml/settings", json={"settings": {"HYBRID_FEATURE_MODE": False}})
    for answer in (ask("new"), client.get("/api/ml/features/new")):
        assert_error(answer, 404, "unknown_user")
        assert "neither" not in answer.json["error"]["message"]
        assert "HYBRID_FEATURE_MODE" in answer.json["error"]["message"]
    assert not [r for r in server.requests[asked:] if "/features/" in r.path]
    server.close()


@pytest.mark.parametrize("query", ["", "?action=", "?action=other", "?action=features", "?action=features&user_id="])
def test_bridge_get_of_another_form_is_400(client, query):
    assert_error(client.get(BRIDGE + query), 400)


def test_unknown_action_is_400_and_lists_the_actions(client):
    answer = client.post(BRIDGE, json={"action": "explode"})
    assert_error(answer, 400, "unknown_action")
    wanted = {"test_integration", "send_batch", "hybrid_process", "pause", "resume", "reset_circuit", "open_circuit"}
    assert wanted <= set(answer.json["error"]["details"]["actions"])


def test_send_batch_reaches_the_partner_alone(nexus, client, partner):
    answer = client.post(BRIDGE, json={"action": "send_batch", "events": [event(event_id="a"), {"bad": 1}]})
    assert answer.status_code == 200
    assert (answer.json["sent"], answer.json["queued"]) == (1, 0)
    assert [r["index"] for r in answer.json["rejected"]] == [1]
    assert answer.json["response_time_ms"] > 0
    assert partner.ids == ["a"]
    health = client.get(f"{INGEST}?check=health").json
    assert health["streams"]["bridge"]["processed"] == 1
    assert {health["streams"][name]["processed"] for name in LOCAL} == {0}
    assert health["totals"]["accepted"] == 0
    assert health["unexplained"] == 0


def test_send_batch_while_the_partner_is_away_is_202_and_queued_durably(start_nexus, partner):
    nexus = start_nexus()
    client = client_of(nexus)
    answer = client.post(BRIDGE, json={"action": "send_batch", "events": [event(event_id="a")]})
    assert answer.status_code == 202
    assert (answer.json["sent"], answer.json["queued"]) == (0, 1)
    client.patch("/api/ml/settings", json={"settings": {"PYTHON_EVENT_API_URL": partner.url}})
    until(lambda: partner.ids == ["a"], "delivery")


@pytest.mark.parametrize("source", ["\U0001f600" * 64, "s" * 65, "", 5])
def test_source_that_the_log_cannot_hold_is_refused_by_every_action(nexus, client, source):
    for action in ("send_batch", "hybrid_process"):
        answer = client.post(BRIDGE, json={"action": action, "events": [event()], "source": source})
        assert_error(answer, 400)
    post(client, event(event_id="after"))
    settled(nexus)
    assert [e["event_id"] for e in client.get("/api/ml/events").json["events"]] == ["after"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"action":"send_batch"}', b'{"action":"send_batch","events":{}}'])
def test_bridge_post_of_another_form_is_400(client, body):
    assert_error(client.post(BRIDGE, data=body, content_type="application/json"), 400)


def test_hybrid_process_answers_with_both_systems_results(client, partner):
    posted = [response("driver_1"), payment("t1", 40, "rider_1")]
    answer = client.post(BRIDGE, json={"action": "hybrid_process", "events": posted})
    assert answer.status_code == 200
    found = answer.json
    assert (found["success"], found["degraded"]) == (True, False)
    assert found["typescript"]["processed"] == 2
    assert found["typescript"]["features"]["driver_1"]["acceptance_rate"] == 1.0
    assert 0 <= found["typescript"]["predictions"]["t1"]["score"] <= 1
    assert (found["python"]["processed"], found["python"]["queued"], found["python"]["error"]) == (2, 0, None)
    assert found["combined_features"].keys() == {"driver_1", "rider_1"}
    assert found["processing_time_ms"] > 0
    assert partner.ids == [e["event_id"] for e in posted]


def test_hybrid_process_without_the_partner_is_degraded_and_queued(start_nexus):
    answer = client_of(start_nexus()).post(BRIDGE, json={"action": "hybrid_process", "events": [response("driver_1")]})
    assert answer.status_code == 200
    assert (answer.json["success"], answer.json["degraded"]) == (True, True)
    assert answer.json["python"]["queued"] == 1
    assert answer.json["python"]["error"]
    assert answer.json["typescript"]["features"]["driver_1"]["event_count_5m"] == 1


@pytest.mark.parametrize("supports", [["batch"], ["batch", "canary"]])
def test_test_integration_goes_the_whole_way_and_counts_nowhere(start_nexus, partner, supports):
    partner.supports = supports
    nexus = start_nexus(PYTHON_EVENT_API_URL=partner.url)
    client = client_of(nexus)
    until(lambda: client.get(f"{BRIDGE}?action=health").json["status"] == "online", "online")
    answer = client.post(BRIDGE, json={"action": "test_integration"})
    assert answer.status_code == 200
    assert answer.json["success"] is True, answer.json
    assert answer.json["duration_ms"] > 0
    assert all(step.keys() >= {"name", "ok", "ms", "detail"} for step in answer.json["steps"])
    assert {e["event_type"] for e in partner.received} == {"nexus.canary"}
    settled(nexus)
    health = client.get(f"{INGEST}?check=health").json
    assert health["totals"]["accepted"] == 0
    assert {stream["processed"] for stream in health["streams"].values()} == {0}
    assert client.get("/api/ml/events").json["events"] == []
    assert client.get("/api/ml/features/nexus-canary").status_code == 404


def test_test_integration_without_the_partner_names_the_hop_that_fails(start_nexus):
    found = client_of(start_nexus()).post(BRIDGE, json={"action": "test_integration"}).json
    assert found["success"] is False
    failed = {step["name"] for step in found["steps"] if not step["ok"]}
    assert "bridge" in failed
    assert not failed & {"ingest", *LOCAL}
    assert all(step["detail"] for step in found["steps"])


@pytest.mark.parametrize(("action", "part", "value"), [("pause", "paused", True), ("open_circuit", "state", "open")])
def test_circuit_actions_answer_with_the_new_state_and_are_undone(client, action, part, value):
    assert client.post(BRIDGE, json={"action": action}).status_code == 200
    assert client.get(f"{BRIDGE}?action=health").json["circuit"][part] == value
    for undo in ("resume", "reset_circuit"):
        assert client.post(BRIDGE, json={"action": undo}).status_code == 200
    found = client.get(f"{BRIDGE}?action=health").json["circuit"]
    assert (found["state"], found["paused"]) == ("closed", False)


# events and receipts


def test_events_answer_envelope_data_source_and_arrival(client):
    post(
        client, event("payment", "u1", event_id="a", session_id="s", data={"amount": 5}, location={"lat": 1, "lng": 2})
    )
    [found] = client.get("/api/ml/events?user_id=u1").json["events"]
    assert (found["event_id"], found["source"], found["data"]) == ("a", "driver_app", {"amount": 5})
    assert (found["session_id"], found["location"]) == ("s", {"lat": 1, "lng": 2})
    assert RFC3339.match(found["received_at"])


def test_events_come_oldest_first_in_pages_by_cursor_and_turned_by_order(nexus, client):
    at = time.time_ns() // 1_000_000
    names = post(client, *[event(timestamp=at - n) for n in range(25)])
    settled(nexus)
    get = lambda path: client.get(path).json  # noqa: E731
    assert [e["event_id"] for e in events_of(get)] == names[::-1]
    first = get("/api/ml/events?limit=10&order=desc")
    assert [e["event_id"] for e in first["events"]] == names[:10]
    second = get(f"/api/ml/events?limit=10&order=desc&cursor={first['cursor']}")
    assert [e["event_id"] for e in second["events"]] == names[10:20]
    third = get(f"/api/ml/events?limit=5&order=desc&cursor={second['cursor']}")
    assert ([e["event_id"] for e in third["events"]], third["cursor"]) == (names[20:], None)
    assert get("/api/ml/events?limit=25")["cursor"] is None
    assert get("/api/ml/events?limit=24")["cursor"] is not None


def test_events_are_filtered_by_source_type_session_and_time_also_as_rfc_3339(client):
    at = time.time_ns() // 1_000_000 // 1000 * 1000
    post(client, event(event_id="a", timestamp=at - 60_000, session_id="s"), source="one")
    post(client, event("payment", event_id="b", timestamp=at), source="two")
    ids = lambda query: [e["event_id"] for e in client.get("/api/ml/events?" + query).json["events"]]  # noqa: E731
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at / 1000))
    local = quote(time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(at / 1000)))
    assert ids("source=one") == ids("session_id=s") == ids(f"until={at - 60_000}") == ["a"]
    assert ids("event_type=payment") == ids(f"since={at}") == ids(f"since={moment}") == ids(f"since={local}") == ["b"]
    assert ids(f"since={at - 60_000}&until={at}") == ["a", "b"]
    assert ids("source=three") == []


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=1001", "limit=ten", "limit=%C2%B2", "limit=" + "9" * 5000, "order=up", "cursor=x",
        "cursor=%FF", "since=yesterday", "until=2026-13-01T00:00:00Z", "since=--5", "since=%C2%B2",
        f"limit={FULL_WIDTH}", f"since={FULL_WIDTH * 7}", f"until={FULL_WIDTH * 2}-01-01T00:00:00Z",
    ],
)  # fmt: skip
def test_events_query_of_another_form_is_400(client, query):
    assert_error(client.get(f"/api/ml/events?{query}"), 400)


def test_receipt_shows_what_each_stream_did(nexus, client):
    [name] = post(client, response())
    settled(nexus, STREAMS)
    found = client.get(f"/api/ml/events/{name}").json
    assert found["event"]["event_id"] == name
    assert found["streams"].keys() == set(STREAMS)
    for stream in found["streams"].values():
        assert stream.keys() == {"state", "at", "attempts", "result"}
        assert (stream["state"], stream["attempts"]) == ("done", 1)
        assert RFC3339.match(stream["at"])


def test_receipt_of_an_event_that_waits_for_the_partner_is_pending_there(start_nexus):
    nexus = start_nexus()
    client = client_of(nexus)
    [name] = post(client, event())
    settled(nexus)
    streams = client.get(f"/api/ml/events/{name}").json["streams"]
    assert streams["bridge"]["state"] in ("pending", "retrying")
    assert {streams[stream]["state"] for stream in LOCAL} == {"done"}


def test_receipt_of_an_unknown_event_is_404(client):
    assert_error(client.get("/api/ml/events/never"), 404, "unknown_event")


@pytest.mark.parametrize("name", ["ünï", 'a"b', "a\\b", "a'b", "%41", "a+b", "a?b", "a#b", "😀"])
def test_event_ids_and_user_ids_of_any_taken_form_are_found(client, name):
    post(client, event(user=name, event_id=name))
    assert client.get(f"/api/ml/events/{quote(name, safe='')}").json["event"]["event_id"] == name
    assert client.get(f"/api/ml/features/{quote(name, safe='')}").json["user_id"] == name
    assert len(client.get(f"/api/ml/events?user_id={quote(name, safe='')}").json["events"]) == 1


# features


def test_features_answer_values_with_their_provenance(client):
    post(client, response("driver_1", "rejected", response_time=4.5))
    found = client.get("/api/ml/features/driver_1").json
    assert found.keys() >= {"user_id", "as_of", "features", "meta"}
    assert RFC3339.match(found["as_of"])
    assert {"acceptance_rate": 0.0, "response_time": 4.5, "recent_rejections": 1}.items() <= found["features"].items()
    assert found["meta"]["acceptance_rate"]["owner"] == "nexus"


def test_features_by_name_are_those_alone(client):
    post(client, response("driver_1"))
    found = client.get("/api/ml/features/driver_1?names=response_time,event_count_1h").json
    assert found["features"] == {"response_time": 3.0, "event_count_1h": 1}
    assert found["meta"].keys() == found["features"].keys()


def test_names_of_features_may_have_spaces_between_them(client):
    post(client, response("driver_1"))
    found = client.get("/api/ml/features/driver_1?names=response_time,%20event_count_1h").json
    assert found["features"] == {"response_time": 3.0, "event_count_1h": 1}


def test_features_as_of_a_past_moment_are_those_of_then(nexus, client):
    at = time.time_ns() // 1_000_000
    post(
        client,
        response("driver_1", "accepted", timestamp=at - 120_000),
        response("driver_1", "rejected", timestamp=at - 60_000),
    )
    found = client.get(f"/api/ml/features/driver_1?as_of={at - 90_000}").json
    assert (found["features"]["acceptance_rate"], found["features"]["recent_rejections"]) == (1.0, 0)
    assert_error(client.get(f"/api/ml/features/driver_1?as_of={at - 7_200_000}"), 404)
    assert_error(client.get(f"/api/ml/features/driver_1?as_of={at + 3_600_000}"), 400)
    assert_error(client.get("/api/ml/features/driver_1?as_of=never"), 400)


@pytest.mark.parametrize("moment", ["99999999999999999", "-9999999999999999", "253402300800000", "-62135596800001"])
def test_moment_outside_the_calendar_is_400(client, moment):
    for path in ("features/driver_1?as_of=", "features/driver_1?known_at=", "events?since=", "aggregates?until="):
        assert_error(client.get(f"/api/ml/{path}{moment}"), 400, "invalid_time")
    assert_error(client.get("/api/ml/features/driver_1?as_of=-62135596800000"), 400, "before_1970")


def test_features_of_many_users_in_one_call(client):
    post(client, response("driver_1"), response("driver_2"))
    body = {"user_ids": ["driver_1", "driver_2", "nobody"], "names": ["event_count_5m"]}
    found = client.post("/api/ml/features", json=body).json["users"]
    assert found.keys() == set(body["user_ids"])
    assert found["driver_1"]["features"] == found["driver_2"]["features"] == {"event_count_5m": 1}
    assert found["nobody"]["features"] == {}
    assert_error(client.post("/api/ml/features", json={"user_ids": [str(n) for n in range(501)]}), 413)
    assert_error(client.post("/api/ml/features", json={"user_ids": "driver_1"}), 400)
    assert_error(client.post("/api/ml/features", json={"user_ids": [1]}), 400)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("features", {"user_ids": ["driver_1"], "names": ["x" * 129]}, "names"),
        ("features", {"user_ids": ["x" * 129]}, "user_ids"),
        ("predictions/fraud", {"transaction_ids": ["x" * 129]}, "transaction_ids"),
        ("dead-letters/redrive", {"ids": ["x" * 129]}, "ids"),
    ],
)
def test_text_longer_than_any_such_name_is_400_that_says_in_which_list(client, path, body, named):
    answer = client.post(f"/api/ml/{path}", json=body)
    assert_error(answer, 400, f"invalid_{named}")
    assert named in answer.json["error"]["message"]
    assert "x" * 129 not in answer.get_data(as_text=True)


def test_answer_about_many_users_is_bounded_by_users_times_names(client):
    post(client, response("driver_1"))
    users, names = [f"driver_{n}" for n in range(500)], [f"n{n}" for n in range(101)]
    answer = client.post("/api/ml/features", json={"user_ids": users, "names": names})
    assert_error(answer, 413, "too_many_values")
    assert "50000" in answer.json["error"]["message"]
    for some in ({"user_ids": users, "names": names[:100]}, {"user_ids": users[:49], "names": names}):
        assert client.post("/api/ml/features", json=some).status_code == 200
    assert client.post("/api/ml/features", json={"user_ids": users, "names": ["n1"] * 1000}).status_code == 200


def test_names_beyond_measure_are_refused_without_those_who_read_at_the_same_time(nexus, client):
    post(client, response("driver_1"))
    asked = [
        ("driver_1", {"QUERY_STRING": "names=event_count_1h"}),
        ("driver_1", {"QUERY_STRING": "names=" + "x" * 129}),
        ("driver_1", {"QUERY_STRING": "names=" + ",".join(f"n{n}" for n in range(1001))}),
    ]
    assert [status for status, _, _ in features_responses(nexus, asked)] == [200, 400, 413]
    for entity in ("user", "merchant"):
        assert_error(client.get(f"/api/ml/features/driver_1?entity={entity}&names=" + "x" * 129), 400, "invalid_names")


def test_feature_definitions_name_every_served_feature(client):
    post(client, response("driver_1"))
    rows = client.get("/api/ml/feature-definitions").json["definitions"]
    wanted = {"name", "entity", "event_type", "aggregation", "field", "window_s", "owner", "description", "state"}
    assert all(row.keys() >= wanted for row in rows)
    assert client.get("/api/ml/features/driver_1").json["features"].keys() <= {row["name"] for row in rows}


# aggregates and predictions


@pytest.mark.parametrize("by", ["type", "source", "device", "zone"])
@pytest.mark.parametrize("step", ["1s", "1m", "1h"])
def test_aggregates_count_recent_events_by_default(client, by, step):
    post(
        client,
        event(device_type="ios", location={"lat": 14.5, "lng": 121}),
        event(user="u2", device_type="ios", location={"lat": 14.5, "lng": 121}),
    )

    def counted() -> Any:
        found = client.get(f"/api/ml/aggregates?by={by}&step={step}").json
        return [sum(n for _, n in row["points"]) for row in found["series"]], found["distinct_users"]

    until(lambda: counted() == ([2], 2), "two events of two users")


SECONDS = (
    "events?since=1767225600", "events?until=4102444800", "aggregates?since=1767225600", "aggregates?until=-1767225600",
    "features/driver_1?as_of=1767225600", "features/driver_1?as_of=1767225600000&known_at=99999999999",
)  # fmt: skip


@pytest.mark.parametrize("path", SECONDS)
def test_seconds_are_refused_in_a_query_with_the_words_of_ingest(client, path):
    name, number = re.findall(r"(\w+)=(-?\d+)$", path)[0]
    refused = client.get(f"/api/ml/{path}")
    assert_error(refused, 400, "looks_like_seconds")
    told = client.post(INGEST, json=event(timestamp=int(number))).json["rejected"][0]
    assert (told["code"], f"{name}: {told['message']}") == ("looks_like_seconds", refused.json["error"]["message"])


def test_a_query_takes_any_time_in_milliseconds_and_the_moment_that_is_the_same_in_both(client):
    post(client, event(event_id="a"))
    for since in (0, 10**11, -(10**11)):
        assert [e["event_id"] for e in client.get(f"/api/ml/events?since={since}").json["events"]] == ["a"]


def test_aggregates_count_by_event_time_between_two_moments(client):
    at = time.time_ns() // 1_000_000 // 3_600_000 * 3_600_000
    post(client, *[event(timestamp=at - n * 3_600_000) for n in range(5)])
    found = client.get(f"/api/ml/aggregates?step=1h&since={at - 3 * 3_600_000}&until={at - 3_600_000}").json
    [row] = found["series"]
    assert row["key"] == "ui_interaction"
    assert [n for _, n in row["points"]] == [1, 1, 1]
    assert all(RFC3339.match(moment) for moment, _ in row["points"])


@pytest.mark.parametrize("query", ["by=colour", "step=2s", "since=x", "until=x", "step=1s&since=0"])
def test_aggregates_of_another_form_are_400(client, query):
    assert_error(client.get(f"/api/ml/aggregates?{query}"), 400)


def test_fraud_score_of_a_payment_is_served_with_its_later_label(nexus, client):
    post(client, payment("t1", 40), payment("t2", 50))
    until(lambda: client.get("/api/ml/predictions/fraud/t1").status_code == 200, "the score")
    found = client.get("/api/ml/predictions/fraud/t1").json
    assert found.keys() >= {"transaction_id", "score", "model", "version", "scored_at", "reasons", "label"}
    assert (found["transaction_id"], found["label"]) == ("t1", None)
    assert 0 <= found["score"] <= 1
    post(client, report("t1"))
    settled(nexus)
    assert client.get("/api/ml/predictions/fraud/t1").json == {**found, "label": 1}
    many = client.post("/api/ml/predictions/fraud", json={"transaction_ids": ["t1", "t2", "t3"]}).json["predictions"]
    assert many.keys() == {"t1", "t2"}
    assert many["t1"]["label"] == 1


@pytest.mark.parametrize("name", ["2026/11/t-1", "a//b"])
def test_fraud_score_of_any_transaction_id_is_served(client, name):
    post(client, payment(name, 40))
    answer = until(
        lambda: (found := client.get(f"/api/ml/predictions/fraud/{quote(name)}")).status_code == 200 and found, "score"
    )
    assert answer.json["transaction_id"] == name


def test_fraud_predictions_of_another_form_are_errors(client):
    assert_error(client.get("/api/ml/predictions/fraud/never"), 404)
    assert_error(client.post("/api/ml/predictions/fraud", json={"transaction_ids": ["t"] * 1001}), 413)
    assert_error(client.post("/api/ml/predictions/fraud", json={}), 400)


def test_demand_without_history_says_warming_up(client):
    post(client, event("ride_request"))
    found = client.get("/api/ml/predictions/demand").json
    assert found.keys() >= {"zone", "step_s", "forecasts", "made_at", "model"}
    assert (found["forecasts"], found["state"]) == ([], "warming_up")


def test_demand_with_a_day_of_history_is_forecast_within_its_interval(nexus, client):
    at = time.time_ns() // 1_000_000
    post(client, *[event("ride_request", timestamp=at - n * 1_800_000, quantity=10) for n in range(100)])
    settled(nexus)
    found = client.get("/api/ml/predictions/demand?horizon=3").json
    assert len(found["forecasts"]) == 3
    assert all(row["low"] <= row["value"] <= row["high"] for row in found["forecasts"])
    assert all(RFC3339.match(row["at"]) for row in found["forecasts"])


@pytest.mark.parametrize("horizon", ["0", "-1", "x", "%C2%B2", "99999", FULL_WIDTH])
def test_demand_horizon_of_another_form_is_400(client, horizon):
    assert_error(client.get(f"/api/ml/predictions/demand?horizon={horizon}"), 400)


# dead letters


def dead_letters(nexus: Runtime, client: FlaskClient) -> list[str]:
    """Three events that the inference stream cannot read."""
    names = post(client, *[event("payment", data={"amount": 5}) for _ in range(3)])
    settled(nexus)
    return names


def test_dead_letters_are_listed_by_stream_and_reason_in_pages(nexus, client):
    names = dead_letters(nexus, client)
    found = client.get("/api/ml/dead-letters?stream=inference").json
    assert {letter["event"]["event_id"] for letter in found["dead_letters"]} == set(names)
    for letter in found["dead_letters"]:
        assert letter.keys() >= {"id", "stream", "event", "reason", "attempts", "first_at", "last_at"}
    assert client.get("/api/ml/dead-letters?stream=storage").json["dead_letters"] == []
    assert len(client.get("/api/ml/dead-letters?reason=transaction_id").json["dead_letters"]) == 3
    assert client.get("/api/ml/dead-letters?reason=nothing").json["dead_letters"] == []
    first = client.get("/api/ml/dead-letters?limit=2").json
    second = client.get(f"/api/ml/dead-letters?limit=2&cursor={first['cursor']}").json
    assert len({letter["id"] for page in (first, second) for letter in page["dead_letters"]}) == 3
    assert second["cursor"] is None
    assert client.get("/api/ml/dead-letters?limit=3").json["cursor"] is None
    assert client.get(f"/api/ml/dead-letters?limit=1&cursor={first['cursor']}").json["cursor"] is None


def test_dead_letters_are_no_lag(nexus, client):
    dead = dead_letters(nexus, client)
    stream = client.get(f"{INGEST}?check=health").json["streams"]["inference"]
    assert (stream["failed"], stream["lag"]) == (len(dead), 0)


@pytest.mark.parametrize("reason", ["", "&reason=transaction_id"])
def test_dead_letters_page_ends_early_where_the_events_are_large(nexus, client, monkeypatch, reason):
    monkeypatch.setattr("pipeline.commit_log.dead_letters.PAGE_BYTES", 10_000)
    posted = [event("payment", data={"amount": 5, "x": "x" * 6_000}) for _ in range(5)]
    names = post(client, *posted, event("payment", data={"transaction_id": "t", "amount": "much"}))[:5]
    settled(nexus)
    pages, cursor = [], ""
    for _ in range(3):
        found = client.get(f"/api/ml/dead-letters?limit=1000&stream=inference{reason}{cursor}").json
        pages.append([letter["event"]["event_id"] for letter in found["dead_letters"]])
        cursor = f"&cursor={found['cursor']}"
    assert found["cursor"] is None
    assert max(map(len, pages)) <= 3
    assert sorted(i for page in pages for i in page if i in names) == sorted(names)


def test_dead_letters_page_that_the_last_match_fills_has_no_cursor(nexus, client):
    post(client, event("payment", data={"transaction_id": "t", "amount": "much"}))
    settled(nexus)
    dead_letters(nexus, client)
    of_stream = "/api/ml/dead-letters?limit=3&stream=inference"
    page = client.get(f"{of_stream}&reason=transaction_id").json
    assert (len(page["dead_letters"]), page["cursor"]) == (3, None)
    assert client.get(of_stream).json["cursor"] is not None


def test_redrive_sends_again_by_id_or_by_stream_and_reason_and_names_what_it_could_not(nexus, client):
    dead_letters(nexus, client)
    before = client.get("/api/ml/dead-letters").json["dead_letters"]
    ids = [letter["id"] for letter in before]
    answer = client.post("/api/ml/dead-letters/redrive", json={"ids": [ids[0], "inference-0"]})
    assert answer.status_code == 200
    assert answer.json["redriven"] == 1
    assert len(answer.json["failed"]) == 1
    settled(nexus)
    body = {"ids": None, "stream": "inference", "reason": None, "all": None}
    assert client.post("/api/ml/dead-letters/redrive", json=body).json["redriven"] == 3
    settled(nexus)
    after = client.get("/api/ml/dead-letters").json["dead_letters"]
    assert sorted(letter["attempts"] for letter in after) == [2, 2, 3]  # what was tried before it died again counts
    for name in ("first_at", "event"):
        assert sorted(map(str, (x[name] for x in after))) == sorted(map(str, (x[name] for x in before)))
    receipt = client.get(f"/api/ml/events/{before[0]['event']['event_id']}").json["streams"]["inference"]
    assert (receipt["state"], receipt["attempts"]) == ("dead", 3)
    assert client.get(f"{INGEST}?check=health").json["unexplained"] == 0


@pytest.mark.parametrize("query", ["stream=other", "limit=0", "cursor=x", "cursor=AP__________"])
def test_dead_letters_query_of_another_form_is_400(client, query):
    assert_error(client.get(f"/api/ml/dead-letters?{query}"), 400)


@pytest.mark.parametrize("body", [{}, {"ids": None}, {"ids": "x"}, {"stream": 5}, {"stream": "other"}])
def test_redrive_of_another_form_is_400(client, body):
    assert_error(client.post("/api/ml/dead-letters/redrive", json=body), 400)


# the rest


def test_probes_answer(client):
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/nope", 404),
        ("GET", "/nope", 404),
        ("POST", "/healthz", 405),
        ("DELETE", INGEST, 405),
        ("PUT", "/api/ml/events", 405),
        ("POST", INGEST + "/", 404),
        ("GET", "/api//ml/events", 404),
        ("GET", "//api/ml/events", 404),
    ],
)
def test_unknown_path_or_method_is_an_error_in_json(client, method, path, status):
    assert_error(client.open(path, method=method), status)


def test_unexpected_error_is_500_in_json_without_a_trace(nexus, client, monkeypatch):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(nexus.events, "find", broken)
    answer = client.get("/api/ml/events")
    assert_error(answer, 500)
    assert "secret" not in answer.get_data(as_text=True)


def test_dashboard_and_its_feed_are_served(client):
    root = client.get("/")
    assert (root.location, root.get_data(), root.content_type) == ("/nexus/", b"", None)
    assert client.get("/nexus/").status_code == 200
    feed = client.get("/nexus/feed.json")
    assert feed.headers["Cache-Control"] == "no-store"
    assert feed.json["streams"].keys() == set(STREAMS)
    assert "history" not in feed.json
    assert "history" in client.get("/nexus/feed.json?history").json


@pytest.mark.parametrize("posted", [{"output": "x"}, {}, [], 7, {"output": "_pages_content.children", "inputs": [7]}])
def test_callback_that_the_dashboard_does_not_have_is_a_bad_request_without_a_traceback(client, caplog, posted):
    assert client.post("/nexus/_dash-update-component", json=posted).status_code == 400
    assert not [entry for entry in caplog.records if entry.exc_info]


@pytest.mark.parametrize("path", ["x/../../y", "dash/x.js", "dash/%00", "dash/%ff.js"])
def test_script_that_the_dashboard_does_not_have_is_not_found_without_a_traceback(client, caplog, path):
    assert client.get(f"/nexus/_dash-component-suites/{path}").status_code == 404
    assert not [entry for entry in caplog.records if entry.exc_info]


def test_dashboard_brings_its_page_and_its_scripts(client):
    page = client.get("/nexus/").get_data(as_text=True)
    script = page.partition('src="/nexus/_dash-component-suites/')[2].partition('"')[0]
    assert client.get(f"/nexus/_dash-component-suites/{script}").status_code == 200
    described = client.get("/nexus/_dash-dependencies").json
    callback = next(each for each in described if "_pages_content" in each["output"])
    inputs = [{**each, "value": {"pathname": "/nexus/", "search": ""}[each["property"]]} for each in callback["inputs"]]
    state = [{**each, "value": None} for each in callback["state"]]
    names = [name.rpartition(".") for name in callback["output"].strip(".").split("...")]
    outputs = [{"id": name, "property": value} for name, _, value in names]
    posted = {"output": callback["output"], "outputs": outputs, "inputs": inputs, "state": state, "changedPropIds": []}
    answer = client.post("/nexus/_dash-update-component", json=posted)
    assert answer.status_code == 200
    assert "children" in answer.json["response"]["_pages_content"]


def test_public_feature_keys_are_published_after_the_fact(nexus, client, partner: FakePartner):
    post(client, response("driver_1"))
    raw = until(lambda: nexus.store.call("GET", "ml:serving:features:driver_1"), "the public key")
    found = json.loads(raw)
    assert found.keys() >= {"user_id", "features", "computed_at"}
    assert (found["user_id"], found["features"]["acceptance_rate"]) == ("driver_1", 1.0)
