"""GET /metrics: Prometheus figures, read at scrape time from the snapshot and live objects; no event costs anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import msgspec
from flask import Blueprint, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.events import parse_rfc3339

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

QUANTILES = {"0.5": 49, "0.9": 89, "0.99": 98}
CIRCUIT_STATES = ("closed", "half_open", "open")
PARTNER_STATES = ("online", "degraded", "offline", "disabled", "starting")
STREAM_STATES = ("running", "behind", "failed", "paused", "restarting", "standby", "starting", "stopped")
STORE_STATES = ("online", "degraded", "loading", "readonly", "full", "offline", "unknown")
_decode = msgspec.json.Decoder().decode


def metrics_routes(nexus: Runtime) -> Blueprint:
    api = Blueprint("metrics", __name__)
    registry = CollectorRegistry()
    registry.register(NexusCollector(nexus))

    @api.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    return api


class NexusCollector(Collector):
    """All families of Nexus. A figure that is not known is left out, never made up; states are one gauge for each word,
    1 for the one in force."""

    def __init__(self, nexus: Runtime) -> None:
        self._nexus = nexus

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering it collects nothing

    def collect(self) -> Iterator[Metric]:
        nexus = self._nexus
        seen: dict[str, Any] = _decode(nexus.serving.feed(False))
        yield gauge("build_info", "The version that runs, as a label.", [({"version": nexus.version}, 1)])
        if not seen:
            return  # the first snapshot is still to come
        yield plain("snapshot_age_seconds", "How old the figures are.", (nexus.clock() - seen["at"]) / 1000)
        yield from _totals(seen)
        yield from _streams(seen)
        yield from _bridge(seen)
        yield from _partner(seen)
        yield from _store(seen)
        yield from _jobs(seen)
        yield from _freshness(seen)
        yield from self._ingest()
        yield from self._features()
        yield from _models(seen)

    def _ingest(self) -> Iterator[Metric]:
        """Of the latest requests."""
        latencies = list(self._nexus.ingest.latencies_ms)
        if len(latencies) > 1:
            cuts = quantiles(latencies, n=100)
            rows = [({"quantile": name}, cuts[at] / 1000) for name, at in QUANTILES.items()]
            yield gauge("ingest_latency_seconds", "Time to answer an ingest request, of the latest ones.", rows)

    def _features(self) -> Iterator[Metric]:
        health: Mapping[str, Mapping[str, Any]] = self._nexus.feature_health.snapshot()["features"]
        for figure, name, text in (
            ("age_s", "feature_age_seconds", "Time since the latest event that a feature is made of."),
            ("null_rate", "feature_null_ratio", "Share of the latest vectors in which the feature is null."),
            ("out_of_range_rate", "feature_out_of_range_ratio", "Share of them in which it lies out of its range."),
        ):
            yield gauge(name, text, [({"feature": feature}, row[figure]) for feature, row in health.items()])


def _totals(seen: Mapping[str, Any]) -> Iterator[Metric]:
    for name, text in (
        ("accepted", "Events that the log has taken for all streams."),
        ("duplicates", "Events whose id was known already."),
        ("rejected", "Events that were refused at ingest."),
    ):
        yield counter(f"events_{name}", text, [({}, seen["totals"][name])])
    yield plain(
        "unexplained_events", "Accepted less processed, dead and pending, over all streams.", seen["unexplained"]
    )


def _streams(seen: Mapping[str, Any]) -> Iterator[Metric]:
    rows = seen["streams"]

    def of(figure: str) -> list[tuple[dict[str, str], Any]]:
        return [({"stream": name}, row[figure]) for name, row in rows.items()]

    yield counter("stream_processed_events", "Events that the stream has processed.", of("processed"))
    yield gauge("stream_dead_events", "Events that are dead letters of the stream now.", of("failed"))
    yield gauge("stream_pending_events", "Events accepted for the stream and neither processed nor dead.", of("lag"))
    yield gauge("stream_lag_seconds", "Age of the oldest event that the stream has yet to process.", of("lag_s"))
    yield gauge("stream_unsaved_events", "Events processed that no checkpoint holds yet.", of("unsaved"))
    yield gauge("stream_unsaved_seconds", "Age of the oldest of these.", of("unsaved_s"))
    yield gauge("stream_rate_events_per_second", "Events that the stream processes a second, here.", of("rate"))
    words = [
        ({"stream": name, "state": state}, float(row["state"] == state))
        for name, row in rows.items()
        for state in STREAM_STATES
    ]
    yield gauge("stream_state", "1 for the state that the stream is in.", words)
    yield plain(
        "checkpoint_age_seconds", "Time since the local streams' last checkpoint.", seen["pipeline"]["checkpoint_age_s"]
    )


def _bridge(seen: Mapping[str, Any]) -> Iterator[Metric]:
    backlog, circuit = seen["backlog"], seen["circuit"]
    yield plain("bridge_backlog_events", "Events that wait for the Python service.", backlog["pending"])
    yield plain("bridge_backlog_age_seconds", "Age of the oldest of them.", backlog["oldest_age_s"])
    yield plain("bridge_backlog_drain_seconds", "When they will be through, at the present pace.", backlog["eta_s"])
    yield counter("bridge_errors", "Failed attempts since the start.", [({}, seen["bridge_errors"]["total"])])
    yield states("bridge_circuit_state", "1 for the circuit breaker's state.", CIRCUIT_STATES, circuit["state"])
    yield plain("bridge_circuit_failures", "Failures in a row.", circuit["failures"])
    yield plain("bridge_paused", "1 while paused by hand.", float(circuit["paused"]))


def _partner(seen: Mapping[str, Any]) -> Iterator[Metric]:
    partner = seen["python"]
    took = partner["response_time_ms"]
    yield states("partner_status", "1 for the Python service's status.", PARTNER_STATES, partner["status"])
    yield plain("partner_response_seconds", "Time of its latest health answer.", None if took is None else took / 1000)


def _store(seen: Mapping[str, Any]) -> Iterator[Metric]:
    store = seen["store"]
    yield states("store_status", "1 for the store's status.", STORE_STATES, store["status"])
    yield plain("store_memory_used_bytes", "Memory that the store uses.", store["used_bytes"])
    kept = seen["retention"]
    gone = [({"due_for": due}, kept[name]) for due, name in (("age", "past_retention"), ("memory", "within_retention"))]
    yield counter("events_let_go", "Events that retention let go of since the start, for age or want of memory.", gone)
    at = kept["within_retention_at"]
    latest = None if at is None else parse_rfc3339(at)[0] / 1000
    yield plain("events_let_go_early_timestamp_seconds", "When some went for want of memory, the latest time.", latest)
    yield plain("store_memory_limit_bytes", "Its limit; ingest refuses at 85 % of it.", store["max_bytes"])


def _jobs(seen: Mapping[str, Any]) -> Iterator[Metric]:
    rows = seen["jobs"]

    def of(figure: str, scale: float = 1.0) -> list[tuple[dict[str, str], Any]]:
        return [({"job": row["name"]}, None if row[figure] is None else row[figure] * scale) for row in rows]

    yield counter("job_runs", "Runs of the job that have ended.", of("runs"))
    yield counter("job_late", "Runs that began over a second late or fell together with one.", of("late"))
    yield gauge("job_last_duration_seconds", "How long the latest run took.", of("last_ms", 0.001))
    yield gauge("job_ok", "1 where the latest run went well.", of("ok"))


def _freshness(seen: Mapping[str, Any]) -> Iterator[Metric]:
    fresh = seen["freshness"]
    for name, figure, text in (
        ("feature_freshness_seconds", "s", "How far the system's features are behind the newest event."),
        ("feature_delay_seconds", "delay_s", "From the latest event's arrival until the system's features had it."),
    ):
        yield gauge(name, text, [({"system": system}, fresh[f"{system}_{figure}"]) for system in ("nexus", "python")])


def _models(seen: Mapping[str, Any]) -> Iterator[Metric]:
    rows = [({"model": name}, float(row["state"] == "ready")) for name, row in seen["models"].items()]
    yield gauge("model_ready", "1 where the model is ready, 0 while it is warming up.", rows)


def gauge(name: str, text: str, rows: Iterable[tuple[dict[str, str], float | None]]) -> GaugeMetricFamily:
    return _family(GaugeMetricFamily, name, text, rows)


def counter(name: str, text: str, rows: Iterable[tuple[dict[str, str], float | None]]) -> CounterMetricFamily:
    """Its name ends in _total as it is shown."""
    return _family(CounterMetricFamily, name, text, rows)


def plain(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    return gauge(name, text, [({}, value)])


def states(name: str, text: str, words: Iterable[str], present: str) -> GaugeMetricFamily:
    return gauge(name, text, [({"state": word}, float(word == present)) for word in words])


def _family(kind: type[Any], name: str, text: str, rows: Iterable[tuple[dict[str, str], float | None]]) -> Any:
    known = [(labels, float(value)) for labels, value in rows if value is not None]
    names = list(known[0][0]) if known else []
    made = kind(f"nexus_{name}", text, labels=names)
    for labels, value in known:
        made.add_metric(list(labels.values()), value)
    return made
