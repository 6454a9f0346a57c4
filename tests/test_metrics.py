"""GET /metrics: what a scrape reads, in Prometheus's own form, and that the figures are those of the routes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pipeline.runtime import Runtime
from tests.conftest import Start, client_of, runtimes
from tests.helpers import STREAMS, FakePartner, Valkey, event, report, until

UNITS = ("seconds", "bytes", "events", "ratio", "per_second", "total")
WORDS = ("info", "state", "status", "failures", "paused", "ok", "ready", "runs", "late", "errors")
NAMED = ("accepted", "duplicates", "rejected")


def families(client) -> dict[str, Metric]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(answer.get_data(as_text=True))}


def value(found: dict[str, Metric], name: str, **labels: str) -> float | None:
    """A sample's value, None where it is not there."""
    family = found.get("nexus_" + name)
    return next((s.value for s in family.samples if s.labels == labels), None) if family is not None else None


@pytest.fixture
def scraped(client, nexus: Runtime):
    """After a duplicate, a rejected event, a dead letter and four accepted events, all of them in the snapshot."""
    events = [event(event_id="known-1"), event(), event(), report("t-1", is_fraud="perhaps")]
    client.post("/api/ml/events/ingest", json=events)
    client.post("/api/ml/events/ingest", json=[event(event_id="known-1"), {"event_type": "BAD", "user_id": "u"}])

    def through() -> bool:
        found = families(client)
        return all(value(found, "stream_pending_events", stream=s) == 0 for s in STREAMS) and (
            value(found, "events_accepted") == len(events)
        )

    until(through, "the snapshot of all events processed")
    return client


def test_totals_are_those_of_the_health_route(scraped):
    found = families(scraped)
    totals = scraped.get("/api/ml/events/ingest?check=health").json["totals"]
    assert {name: value(found, f"events_{name}") for name in NAMED} == {name: totals[name] for name in NAMED}
    assert (totals["accepted"], totals["duplicates"], totals["rejected"]) == (4, 1, 1)
    assert value(found, "unexplained_events") == 0


@pytest.mark.parametrize("stream", STREAMS)
def test_each_stream_has_its_account(scraped, stream: str):
    found = families(scraped)
    health = scraped.get("/api/ml/events/ingest?check=health").json["streams"][stream]
    assert value(found, "stream_processed_events", stream=stream) == health["processed"]
    assert value(found, "stream_dead_events", stream=stream) == health["failed"]
    assert value(found, "stream_lag_seconds", stream=stream) == 0
    assert value(found, "stream_rate_events_per_second", stream=stream) is not None
    assert value(found, "stream_state", stream=stream, state="running") == 1


def test_bridge_partner_store_jobs_and_freshness_are_there(scraped):
    found = families(scraped)
    assert value(found, "bridge_backlog_events") == 0
    assert value(found, "bridge_circuit_state", state="closed") == 1
    assert value(found, "bridge_circuit_state", state="open") == 0
    assert value(found, "partner_status", state="online") == 1
    assert 0 < (value(found, "partner_response_seconds") or 0) < 5
    assert (value(found, "store_memory_used_bytes") or 0) > 100_000
    assert value(found, "store_status", state="online") == 1
    assert (value(found, "job_runs", job="snapshot") or 0) >= 1
    assert [value(found, "events_let_go", due_for=due) for due in ("age", "memory")] == [0, 0]
    assert value(found, "events_let_go_early_timestamp_seconds") is None
    assert value(found, "job_late", job="snapshot") is not None
    assert value(found, "job_last_duration_seconds", job="snapshot") is not None
    assert (value(found, "checkpoint_age_seconds") or 0) >= 0
    assert value(found, "feature_freshness_seconds", system="nexus") is not None
    assert 0 < (value(found, "ingest_latency_seconds", quantile="0.5") or 0) < 5
    assert value(found, "feature_delay_seconds", system="python") is not None
    assert value(found, "feature_age_seconds", feature="event_count_5m") is not None
    assert value(found, "model_ready", model="fraud") == 0


def test_every_family_has_its_prefix_help_and_unit(scraped):
    text = scraped.get("/metrics").get_data(as_text=True)
    helps = dict(re.findall(r"^# HELP (\w+) (.+)$", text, re.MULTILINE))
    assert len(helps) > 25
    for name, words in helps.items():
        assert re.fullmatch(r"nexus_[a-z_]+", name), name
        assert name.endswith((*UNITS, *WORDS)), name
        assert words.endswith("."), name


def test_figure_that_is_not_known_is_left_out(start_nexus: Start):
    client = client_of(start_nexus())  # nobody at the partner's address
    until(lambda: "nexus_partner_status" in families(client), "the first snapshot")
    assert value(families(client), "partner_response_seconds") is None


def test_scrape_asks_the_store_nothing(scraped, nexus: Runtime, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    here = threading.get_ident()
    for name in ("call", "many", "run"):
        real = getattr(nexus.store, name)

        def watched(*args, real=real, name=name, **more):
            if threading.get_ident() == here:
                asked.append(name)
            return real(*args, **more)

        monkeypatch.setattr(nexus.store, name, watched)
    families(scraped)
    assert asked == []


def test_store_that_is_away_shows_and_the_scrape_goes_on(start_own, own_server: Valkey):
    client = client_of(start_own())
    until(lambda: value(families(client), "store_status", state="online"), "the store online")
    own_server.kill()
    until(lambda: value(families(client), "store_status", state="offline"), "the store offline")
    assert value(families(client), "stream_state", stream="features", state="running") == 0


@pytest.fixture
def start_own(own_server: Valkey, tmp_path) -> Iterator[Start]:
    yield from runtimes(own_server.url, tmp_path)


def test_open_circuit_shows(client, partner: FakePartner):
    client.post("/api/ml/bridge/python", json={"action": "open_circuit"})
    until(lambda: value(families(client), "bridge_circuit_state", state="open"), "the open circuit")
