"""The combined feature store: both systems' values merged, with owner, age and verdict of each."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from pipeline.events import rfc3339
from pipeline.runtime import Runtime
from tests.helpers import HOUR_MS, event, payment, response, until


def now() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def nexus(start_nexus: Any) -> Runtime:
    return start_nexus(ENABLE_PYTHON_BRIDGE="false")


def post(client: Any, *events: dict[str, Any]) -> None:
    answer = client.post("/api/ml/events/ingest?wait=features&timeout_ms=20000", json=list(events))
    assert answer.json["applied"] is True


def write(nexus: Runtime, user: str, features: dict[str, Any], at: int | None = None) -> None:
    """What the Python service writes."""
    computed = None if at is None else rfc3339(at)
    body = json.dumps({"user_id": user, "features": features, "computed_at": computed})
    nexus.store.call("SET", f"features:{user}", body)


def both(client: Any, user: str) -> dict[str, Any]:
    return client.get(f"/api/ml/bridge/python?action=features&user_id={user}").json


def test_where_both_have_a_value_nexus_is_served_and_the_other_one_shown(nexus, client):
    post(client, response("u1"))
    write(nexus, "u1", {"acceptance_rate": 0.25, "theirs": 7}, now())
    found = both(client, "u1")
    assert found["combined_features"]["combined"]["acceptance_rate"] == 1.0
    assert found["combined_features"]["python_features"] == {"acceptance_rate": 0.25, "theirs": 7}
    meta = found["meta"]["acceptance_rate"]
    assert meta["owner"] == "nexus"
    assert 0.25 in meta.values()


def test_value_that_only_the_partner_has_is_served_with_its_age(nexus, client):
    post(client, response("u1"))
    write(nexus, "u1", {"theirs": 7}, now() - 5_000)
    found = both(client, "u1")
    meta = found["meta"]["theirs"]
    assert found["combined_features"]["combined"]["theirs"] == 7
    assert (meta["owner"], meta["verdict"]) == ("python", "fresh")
    assert 4.9 < meta["age_s"] < 60


@pytest.mark.parametrize(("age_ms", "verdict"), [(2 * HOUR_MS, "stale"), (48 * HOUR_MS, "expired")])
def test_old_value_of_the_partner_is_never_called_fresh(nexus, client, age_ms, verdict):
    write(nexus, "u1", {"theirs": 7}, now() - age_ms)
    found = both(client, "u1")
    assert found["meta"]["theirs"]["verdict"] == verdict
    assert found["combined_features"]["combined"]["theirs"] == (7 if verdict == "stale" else None)


def test_time_that_has_yet_to_come_tells_no_age_beyond_what_clocks_may_differ(nexus, client):
    write(nexus, "u1", {"theirs": 7}, now() + 30_000)
    assert both(client, "u1")["meta"]["theirs"]["verdict"] == "fresh"
    write(nexus, "u1", {"theirs": 7}, now() + 300_000)
    found = both(client, "u1")
    assert found["meta"]["theirs"]["verdict"] == "stale"
    assert "it takes a time up to now" in found["malformed"]


def test_shared_feature_of_a_user_that_nexus_does_not_know_is_a_fallback(nexus, client):
    write(nexus, "u1", {"acceptance_rate": 0.5}, now())
    found = both(client, "u1")
    assert found["combined_features"]["typescript_features"] == {}
    assert found["combined_features"]["combined"]["acceptance_rate"] == 0.5
    assert found["meta"]["acceptance_rate"]["verdict"] == "fallback"


def test_hash_of_plain_fields_is_read_too(nexus, client):
    nexus.store.call("HSET", "features:u1", "score", "0.5", "name", "gold", "computed_at", rfc3339(now()))
    found = both(client, "u1")
    assert found["combined_features"]["combined"] == {"score": 0.5, "name": "gold"}


@pytest.mark.parametrize("raw", ["not json", "[]", "5", '{"features": []}', "\udcff"])
def test_what_a_foreign_partner_wrote_wrongly_does_not_spoil_the_answer(nexus, client, raw):
    nexus.store.call("SET", "features:u1", raw.encode(errors="surrogateescape"))
    post(client, response("u1"))
    found = both(client, "u1")
    assert found["combined_features"]["python_features"] == {}
    assert found["combined_features"]["combined"]["acceptance_rate"] == 1.0


@pytest.mark.parametrize("stamp", ["1795632937098228568", "1795632937098228", "1e300", "-1e20", "9999-01-01T00:00:00Z"])
def test_foreign_stamp_that_is_no_past_time_is_of_unknown_age(nexus, client, stamp):
    post(client, response("u2"))
    nexus.store.call("HSET", "features:u1", "score", "0.5", "computed_at", stamp)
    nexus.store.call("SET", "features:u2", json.dumps({"features": {"score": 1}, "computed_at": stamp}))
    one, many = client.get("/api/ml/features/u1"), client.post("/api/ml/features", json={"user_ids": ["u1", "u2"]})
    assert one.status_code == many.status_code == 200
    for meta in (one.json["meta"], both(client, "u1")["meta"], *[u["meta"] for u in many.json["users"].values()]):
        assert (meta["score"]["computed_at"], meta["score"]["age_s"]) == (None, None)
        assert meta["score"]["verdict"] == "stale"


def test_foreign_whole_number_beyond_any_float_does_not_spoil_the_answer(nexus, client):
    post(client, response("u1"))
    nexus.store.call("HSET", "features:u1", "acceptance_rate", "9" * 400)
    assert both(client, "u1")["meta"]["acceptance_rate"]["agrees"] is False


def test_key_of_another_type_does_not_spoil_the_answer(nexus, client):
    nexus.store.call("RPUSH", "features:u1", "x")
    post(client, response("u1"))
    assert both(client, "u1")["combined_features"]["combined"]["acceptance_rate"] == 1.0


def test_past_values_equal_the_live_ones_of_that_moment(nexus, client):
    at = now() - 30 * 60_000
    post(client, *[response("u1", "accepted" if n % 3 else "rejected", timestamp=at + n * 60_000) for n in range(20)])
    live = client.get("/api/ml/features/u1").json
    past = client.get("/api/ml/features/u1", query_string={"as_of": live["as_of"]}).json
    assert past["features"] == live["features"]
    early = client.get(f"/api/ml/features/u1?as_of={at + 4 * 60_000}").json["features"]
    assert early["event_count_24h"] == 5
    assert early["acceptance_rate"] == pytest.approx(3 / 5)


def test_past_values_count_what_arrived_late(nexus, client):
    at = now() - HOUR_MS
    post(client, response("u1", "rejected", timestamp=at))
    before = client.get(f"/api/ml/features/u1?as_of={at + 1000}").json["features"]
    post(client, response("u1", "rejected", timestamp=at - 1000))
    after = client.get(f"/api/ml/features/u1?as_of={at + 1000}").json["features"]
    assert (before["recent_rejections"], after["recent_rejections"]) == (1, 2)


def test_past_values_are_nexus_own_alone(nexus, client):
    post(client, event(user="u1", timestamp=now() - 60_000))
    write(nexus, "u1", {"theirs": 7}, now())
    found = client.get(f"/api/ml/features/u1?as_of={now() - 30_000}").json
    assert "theirs" not in found["features"]


def test_public_key_equals_what_the_route_serves(nexus, client):
    post(client, response("u1"), response("u1", "rejected"))
    served = client.get("/api/ml/features/u1").json["features"]
    published = until(lambda: nexus.store.call("GET", "ml:serving:features:u1"), "the public key")
    shared = {"acceptance_rate", "response_time", "recent_rejections", "event_count_24h"}
    found = json.loads(published)["features"]
    assert {name: found[name] for name in shared} == {name: served[name] for name in shared}


def test_past_value_names_the_moment_before_which_nothing_is_stored_any_more(nexus, client, monkeypatch):
    post(client, event(user="u1"))
    monkeypatch.setattr(nexus.features, "covers_from", lambda names, at: {"event_count_24h": "then"})
    meta = client.get(f"/api/ml/features/u1?as_of={now()}").json["meta"]
    assert (meta["event_count_24h"]["covers_from"], "covers_from" in meta["event_count_1h"]) == ("then", False)


def test_moment_before_1970_is_refused(nexus, client):
    answer = client.get("/api/ml/features/u1?as_of=1969-12-31T23:59:59Z")
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "before_1970")


def test_route_answers_for_payees_and_zones_and_names_what_it_does_not_take(nexus, client):
    post(client, payment("t", 30.0, data={"merchant_id": "m"}))
    found = client.get("/api/ml/features/m?entity=merchant&names=payee_amount_mean_30d").json
    assert (found["entity"], found["id"], found["features"]) == ("merchant", "m", {"payee_amount_mean_30d": 30.0})
    wrong = {"m?entity=car": 400, f"m?entity=merchant&as_of={now()}": 400, "nobody?entity=zone": 404}
    assert {rest: client.get(f"/api/ml/features/{rest}").status_code for rest in wrong} == wrong
    assert client.get("/api/ml/features/rider_1?entity=user").json["user_id"] == "rider_1"


def test_definition_shows_its_share_quantile_and_half_life_where_it_has_one(nexus, client):
    shown = {d["name"]: d for d in client.get("/api/ml/feature-definitions").json["definitions"]}
    assert shown["acceptance_rate"]["share"] == "accepted"
    assert shown["response_time_p90_24h"]["quantile"] == 0.9
    assert shown["response_time_recent"]["half_life_s"] == 3600
    assert not shown["event_count_1h"].keys() & {"share", "quantile", "half_life_s"}


@pytest.mark.parametrize("stamp", ["1970-01-01T07:59:59+08:00", "0001-01-01T00:00:00Z", "1901-05-05T05:05:05Z"])
def test_event_of_long_ago_passes_every_stream(nexus, client, stamp):
    zoned = {"location": {"lat": 14.5, "lng": 121.0}, "timestamp": stamp}
    posted = [payment("t", timestamp=stamp, data={"merchant_id": "m"}), event("ride_request", "rider_1", **zoned)]
    post(client, *posted, event(user="rider_1"))

    def settled() -> bool:
        streams = client.get("/api/ml/events/ingest?check=health").json["streams"]
        return all(s["pending"] == 0 and s["state"] == "running" for name, s in streams.items() if name != "bridge")

    until(settled)
    until(lambda: nexus.store.call("GET", "ml:serving:features:rider_1"), "the public key")
    assert client.get("/api/ml/features/rider_1").json["features"]["event_count_24h"] == 1
    assert client.get("/api/ml/dead-letters").json["dead_letters"] == []
    assert len(client.get("/api/ml/events?user_id=rider_1").json["events"]) == 3
    assert nexus.runner.state == "running"
