"""Settings at run time: bounds, all or none, audit, what acts at once, and who may change them."""

from __future__ import annotations

import logging
import socket
import threading
from typing import Any
from unittest.mock import MagicMock

import pytest

from pipeline.operations.live_settings import LiveSettings
from pipeline.settings import RUNTIME, load
from pipeline.store import Store
from tests.conftest import client_of
from tests.helpers import Clock, event, free_port, until

SETTINGS = "/api/ml/settings"


def change(client: Any, reason: str | None = None, **settings: Any) -> Any:
    return client.patch(SETTINGS, json={"settings": settings, "reason": reason})


def value(client: Any, name: str) -> Any:
    return client.get(SETTINGS).json["settings"][name]["value"]


def test_every_runtime_setting_is_described(client):
    found = client.get(SETTINGS).json["settings"]
    assert found.keys() == set(RUNTIME)
    for setting in found.values():
        assert setting.keys() >= {"value", "default", "source", "min", "max", "unit", "meaning"}
        assert setting["source"] == "environment"
        assert setting["meaning"]
    assert (found["PYTHON_SERVICE_TIMEOUT"]["default"], found["PYTHON_SERVICE_TIMEOUT"]["unit"]) == (5000, "ms")
    assert found["FEATURE_SYNC_INTERVAL"]["min"] == 1


def test_change_acts_at_once_is_stored_and_null_goes_back_to_the_environment(nexus, client):
    answer = change(client, FEATURE_SYNC_INTERVAL=60)
    assert answer.status_code == 200
    assert answer.json["settings"]["FEATURE_SYNC_INTERVAL"]["value"] == 60
    assert answer.json["settings"]["FEATURE_SYNC_INTERVAL"]["source"] == "store"
    assert nexus.live["FEATURE_SYNC_INTERVAL"] == 60
    change(client, FEATURE_SYNC_INTERVAL=None)
    setting = client.get(SETTINGS).json["settings"]["FEATURE_SYNC_INTERVAL"]
    assert (setting["value"], setting["source"]) == (300, "environment")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("PYTHON_EVENT_API_URL", "localhost:8000"),
        ("PYTHON_EVENT_API_URL", "ftp://host"),
        ("PYTHON_EVENT_API_URL", "file:///etc/passwd"),
        ("PYTHON_EVENT_API_URL", 5),
        ("PYTHON_SERVICE_TIMEOUT", 0),
        ("PYTHON_SERVICE_TIMEOUT", "soon"),
        ("PYTHON_SERVICE_TIMEOUT", 1.5),
        ("PYTHON_SERVICE_TIMEOUT", True),
        ("ENABLE_PYTHON_BRIDGE", "perhaps"),
        ("HYBRID_FEATURE_MODE", []),
        ("FEATURE_SYNC_INTERVAL", 0),
        ("FEATURE_SYNC_INTERVAL", 10**9),
        ("HEALTH_CHECK_INTERVAL", -1),
        ("NEXUS_PORT", 5000),
        ("NO_SUCH", 1),
    ],
)
def test_wrong_value_is_422_that_names_the_setting_and_changes_nothing(client, name, wrong):
    before = client.get(SETTINGS).json
    answer = change(client, **{"HEALTH_CHECK_INTERVAL": 20, name: wrong})
    assert answer.status_code == 422
    assert name in answer.json["error"]["message"]
    assert client.get(SETTINGS).json == before
    assert client.get(f"{SETTINGS}/audit").json["changes"] == []


def test_changes_are_audited_newest_first_with_reason_and_author(client):
    change(client, "slower", FEATURE_SYNC_INTERVAL=60)
    change(client, FEATURE_SYNC_INTERVAL=90)
    latest, first = client.get(f"{SETTINGS}/audit").json["changes"]
    assert latest.keys() >= {"at", "name", "from", "to", "reason", "by"}
    assert (first["name"], first["from"], first["to"], first["reason"]) == ("FEATURE_SYNC_INTERVAL", 300, 60, "slower")
    assert (latest["from"], latest["to"], latest["reason"]) == (60, 90, None)
    assert first["by"]
    assert len(client.get(f"{SETTINGS}/audit?limit=1").json["changes"]) == 1


def test_change_and_its_record_are_one_step(store, monkeypatch):
    """Else a store that goes away between them leaves a change that nobody is on record for."""
    live = LiveSettings(store, load({}), Clock())
    with monkeypatch.context() as patched:
        patched.setattr(store, "run", run := MagicMock(side_effect=store.run))
        live.change({"FEATURE_SYNC_INTERVAL": 60}, None, "test")
    assert [called.args[0] for called in run.call_args_list] == ["write"]
    assert len(live.audit()) == 1


def test_orders_to_the_bridge_are_in_the_audit_too(client):
    for action in ("pause", "resume", "open_circuit", "reset_circuit"):
        assert client.post("/api/ml/bridge/python", json={"action": action}).status_code == 200
    changes = client.get(f"{SETTINGS}/audit").json["changes"]
    assert [(c["name"], c["from"], c["to"], c["reason"]) for c in reversed(changes)] == [
        ("bridge", "running", "paused", None),
        ("bridge", "paused", "running", None),
        ("circuit", "closed", "open", None),
        ("circuit", "open", "closed", None),
    ]
    assert all(c["by"] == "127.0.0.1" and c["at"] for c in changes)


def test_changes_and_orders_are_told_in_the_log_without_a_password(client, caplog):
    caplog.set_level(logging.INFO)
    change(client, "moved", PYTHON_EVENT_API_URL="http://user:secret@127.0.0.1:1")
    client.post("/api/ml/bridge/python", json={"action": "pause"})
    told = {r.getMessage(): vars(r) for r in caplog.records if r.name == "pipeline.operations.live_settings"}
    address, pause = told["PYTHON_EVENT_API_URL was changed"], told["bridge was changed"]
    assert (address["levelname"], address["reason"], address["by"]) == ("INFO", "moved", "127.0.0.1")
    assert address["to"] == "http://user:***@127.0.0.1:1"
    assert (pause["from"], pause["to"], pause["by"]) == ("running", "paused", "127.0.0.1")
    assert "secret" not in str(address)


def test_value_that_is_set_again_is_no_change(client):
    change(client, FEATURE_SYNC_INTERVAL=60)
    change(client, FEATURE_SYNC_INTERVAL=60, HEALTH_CHECK_INTERVAL=7)
    change(client, HYBRID_FEATURE_MODE=None)
    changes = client.get(f"{SETTINGS}/audit").json["changes"]
    assert [c["name"] for c in changes] == ["HEALTH_CHECK_INTERVAL", "FEATURE_SYNC_INTERVAL"]


@pytest.mark.parametrize("body", [{}, {"settings": []}, {"settings": {}, "reason": 5}])
def test_patch_of_another_form_is_400(client, body):
    answer = client.patch(SETTINGS, json=body)
    assert answer.status_code == 400
    assert answer.json["error"]["message"]


def test_patch_demands_a_json_content_type_and_the_servers_own_host_and_origin(client):
    body = '{"settings": {"FEATURE_SYNC_INTERVAL": 60}}'
    for refused in (
        client.patch(SETTINGS, data=body, content_type="text/plain"),
        client.patch(SETTINGS, data=body, content_type="application/x-www-form-urlencoded"),
        client.patch(SETTINGS, data=body, content_type="application/json", headers={"Host": "evil.example"}),
        client.patch(SETTINGS, data=body, content_type="application/json", headers={"Origin": "http://evil.example"}),
    ):
        assert refused.status_code in (403, 415)
        assert refused.json["error"]["code"]
    assert value(client, "FEATURE_SYNC_INTERVAL") == 300
    for host in ("localhost:4000", "127.0.0.1:4000", "[::1]:4000", "localhost"):
        taken = client.patch(SETTINGS, data=body, content_type="application/json", headers={"Host": host})
        assert taken.status_code == 200, host


def answers(client: Any, host: str, origin: str | None = None) -> int:
    headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
    body = '{"settings": {"FEATURE_SYNC_INTERVAL": 60}}'
    return int(client.patch(SETTINGS, data=body, content_type="application/json", headers=headers).status_code)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("LocalHost:4000", 200),
        ("localhost:9999", 403),
        ("localhost:4000:80", 403),
        ("localhost:", 403),
        ("[::1", 403),
        ("8.8.8.8:4000", 403),
        ("224.0.0.1:4000", 403),
        ("0.0.0.0:4000", 403),
    ],
)
def test_host_is_the_servers_own_in_any_case_and_with_its_own_port(client, host, status):
    assert answers(client, host) == status


def test_origin_is_compared_in_any_case(client):
    assert answers(client, "LOCALHOST:4000", "http://localhost:4000") == 200
    assert answers(client, "localhost:4000", "http://localhost:4001") == 403


def test_server_on_all_addresses_takes_each_of_its_own_and_its_name_in_any_case(start_nexus):
    nexus = start_nexus(NEXUS_HOST="0.0.0.0", ENABLE_PYTHON_BRIDGE="false")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address by which others reach this machine
        own = probe.getsockname()[0]
    for host in (own, "127.0.0.2", socket.gethostname().upper()):
        assert answers(client_of(nexus), f"{host}:4000") == 200, host


def test_reason_has_at_most_500_characters(client):
    assert change(client, "x" * 500, FEATURE_SYNC_INTERVAL=60).status_code == 200
    refused = change(client, "x" * 501, FEATURE_SYNC_INTERVAL=61)
    assert (refused.status_code, refused.json["error"]["code"]) == (422, "reason_too_long")
    assert value(client, "FEATURE_SYNC_INTERVAL") == 60


def test_hybrid_mode_off_serves_nexus_values_alone_at_once(nexus, client):
    nexus.store.call("SET", "features:u1", '{"user_id":"u1","features":{"theirs":1},"computed_at":null}')
    client.post("/api/ml/events/ingest?wait=features", json=event(user="u1"))
    assert client.get("/api/ml/features/u1").json["features"]["theirs"] == 1
    change(client, HYBRID_FEATURE_MODE=False)
    assert "theirs" not in client.get("/api/ml/features/u1").json["features"]


def test_another_instance_takes_a_change_over(start_nexus):
    first = start_nexus(ENABLE_PYTHON_BRIDGE="false")
    second = start_nexus("standby", ENABLE_PYTHON_BRIDGE="false")
    change(client_of(first), FEATURE_SYNC_INTERVAL=60)
    until(lambda: second.live["FEATURE_SYNC_INTERVAL"] == 60, "the other instance's change")


def test_password_in_the_partners_address_is_shown_nowhere(start_nexus, partner, caplog):
    address = partner.url.removeprefix("http://")
    nexus = start_nexus(PYTHON_EVENT_API_URL=f"http://user:first-secret@{address}")
    client = client_of(nexus)
    name, shown = "PYTHON_EVENT_API_URL", f"http://user:***@{address}"
    assert value(client, name) == shown
    assert change(client, **{name: f"http://user:other-secret@{address}"}).json["settings"][name]["value"] == shown
    until(lambda: client.get("/api/ml/bridge/python?action=health").json["status"] == "online", "online")
    change(client, **{name: f"http://user:third-secret@127.0.0.1:{free_port()}"})
    client.post("/api/ml/events/ingest", json=event())
    until(lambda: client.get("/api/ml/bridge/python?action=health").json["status"] == "offline", "offline")
    nexus.serving.refresh()
    pages = ("settings", "settings/audit", "bridge/python?action=health", "bridge/attempts", "bridge/outages", "models")
    said = [client.get(f"/api/ml/{page}").get_data(as_text=True) for page in pages]
    said += [client.get("/nexus/feed.json?history").get_data(as_text=True), *nexus.live.overridden(), caplog.text]
    assert client.get("/api/ml/settings/audit").json["changes"][-1]["from"] == shown
    assert not [text for text in said if "secret" in text]
    assert nexus.live[name].startswith("http://user:third-secret@")


def test_address_given_back_as_it_is_shown_keeps_its_password(start_nexus, partner):
    url = partner.url.replace("http://", "http://user:secret@")
    nexus = start_nexus(PYTHON_EVENT_API_URL=url)
    client = client_of(nexus)
    assert change(client, PYTHON_EVENT_API_URL=value(client, "PYTHON_EVENT_API_URL")).status_code == 200
    assert nexus.live["PYTHON_EVENT_API_URL"] == url
    refused = change(client, PYTHON_EVENT_API_URL="http://user:***@elsewhere.example")
    assert (refused.status_code, refused.json["error"]["code"]) == (422, "masked_password")
    assert nexus.live["PYTHON_EVENT_API_URL"] == url


def test_override_that_this_version_does_not_take_leaves_the_environments_value(nexus, client):
    nexus.store.call("HSET", "ml:{p}:settings", "FEATURE_SYNC_INTERVAL", '"gibberish"', "GONE", "1")
    nexus.live.refresh()
    assert value(client, "FEATURE_SYNC_INTERVAL") == 300


def test_refresh_that_read_before_a_change_does_not_undo_it(store, store_server):
    """The change comes between the refresh's answer from the store and its use."""
    changing: list[threading.Thread] = []

    class Interrupted(Store):
        def call(self, *words: Any) -> Any:
            answer = super().call(*words)
            if words[0] == "HGETALL" and not changing:
                thread = threading.Thread(target=lambda: live.change({"FEATURE_SYNC_INTERVAL": 60}, None, "test"))
                changing.append(thread)
                thread.start()
                thread.join(0.3)
            return answer

    live = LiveSettings(Interrupted(store_server.url), load({}), Clock())
    live.refresh()
    changing[0].join()
    assert live["FEATURE_SYNC_INTERVAL"] == 60
