"""A stand-in for Nexus behind the dashboard: feeds of several scenarios, and a server that a test can steer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dash
from flask import Flask, Response, jsonify, request

from pipeline.web.dashboard import create_dashboard

Feed = dict[str, Any]
STREAMS = ("features", "storage", "aggregates", "inference", "bridge")
DEADLINE_S = 20.0
DIED = "2026-11-26T22:53:44.000Z"  # a dead letter's first time


def _setting(value: object, unit: str | None = None, low: int | None = None, high: int | None = None) -> Feed:
    return {
        "value": value,
        "default": value,
        "environment": value,
        "source": "environment",
        "unit": unit,
        "min": low,
        "max": high,
        "meaning": "",
    }


def busy() -> Feed:
    """Both systems at work."""
    at = int(time.time() * 1000)
    stream = {"state": "running", "lag": 3, "lag_s": 0.1, "processed": 481_204, "failed": 0, "rate": 1240.0}
    stream |= {"unsaved": 2, "unsaved_s": 0.3}
    return {
        "at": at,
        "boot": "one",
        "version": "1.0.0",
        "store": {"status": "online", "detail": None, "used_bytes": 312e6, "max_bytes": 3.2e9, "embedded": True}
        | {"durable": True, "full_of": None},
        "pipeline": {"state": "running", "detail": None, "checkpoint_age_s": 0.4},
        "python": {
            "status": "online",
            "reason": None,
            "url": "http://localhost:8000",
            "response_time_ms": 3.1,
            "checked_at": at,
            "since": at - 3_600_000,
        },
        "circuit": {
            "state": "closed",
            "opened_at": None,
            "paused_at": None,
            "failures": 0,
            "paused": False,
            "retry_in_s": None,
        }
        | {"forced": False, "reason": None},
        "backlog": {"pending": 3, "dead": 0, "oldest_age_s": 0.2, "eta_s": None, "shrinks": False},
        "streams": {name: dict(stream) for name in STREAMS},
        "totals": {"accepted": 481_207, "duplicates": 12, "rejected": 3},
        "unexplained": 0,
        "reasons": [],
        "retention": {"trimmed": 0, "held_back": [], "due_for": None, "past_retention": 0}
        | {"within_retention": 0, "within_retention_at": None},
        "rates": {"ingest": 1240.0, "nexus": 1238.0, "python": 1236.0},
        "latency": {"ingest_p50_ms": 0.8, "ingest_p99_ms": 4.2},
        "freshness": {"nexus_s": 0.2, "python_s": 0.4, "nexus_users": 10_204}
        | {"nexus_delay_s": 0.02, "python_delay_s": 0.06},
        "bridge_errors": {
            "total": 2,
            "per_min": 0.0,
            "recent": [
                {"at": at - 90_000, "kind": "timeout", "status": None, "detail": "no answer in 5000 ms"},
                {"at": at - 95_000, "kind": "status", "status": 503, "detail": "store is loading"},
            ],
        },
        "models": {
            "fraud": {"state": "ready", "detail": None, "scored": 48_120},
            "demand": {"state": "warming_up", "detail": "needs 14 more labels", "scored": 0},
        },
        "jobs": [
            {"name": name, "every_s": every, "last_ms": 2.4, "next_in_s": every / 2, "ok": True, "error": None}
            | {"late": 0, "late_now": False}
            for name, every in (("health_check", 30), ("feature_sync", 300), ("trim", 60), ("forecast", 60))
        ],
        "outages": [],
        "canary": {"at": at - 12_000, "success": True, "duration_ms": 14.2, "failed": []},
        "settings": {
            "ENABLE_PYTHON_BRIDGE": _setting(True),
            "HYBRID_FEATURE_MODE": _setting(True),
            "FEATURE_SYNC_INTERVAL": _setting(300, "s", 1, 86400),
            "PYTHON_SERVICE_TIMEOUT": _setting(5000, "ms", 10, 60000),
            "HEALTH_CHECK_INTERVAL": _setting(30, "s", 1, 86400),
            "PYTHON_EVENT_API_URL": _setting("http://localhost:8000"),
        },
        "events_per_type": [["ride_request", 31_204], ["ride_request_response", 29_440], ["payment", 12_100]],
        "sources": [["driver_app", 51_000], ["rider_app", 21_744]],
    }


def empty() -> Feed:
    feed = busy()
    feed["totals"] = {"accepted": 0, "duplicates": 0, "rejected": 0}
    feed["rates"] = {"ingest": 0.0, "nexus": 0.0, "python": 0.0}
    feed["backlog"] = {"pending": 0, "dead": 0, "oldest_age_s": None, "eta_s": None}
    feed["freshness"] = {"nexus_s": None, "python_s": None, "nexus_users": 0}
    feed["latency"] = {"ingest_p50_ms": None, "ingest_p99_ms": None}
    feed["bridge_errors"] = {"total": 0, "per_min": 0, "recent": []}
    feed.update(events_per_type=[], sources=[])
    for stream in feed["streams"].values():
        stream.update(lag=0, lag_s=0.0, processed=0, rate=0.0)
    return feed


def python_dead() -> Feed:
    feed = busy()
    feed["python"].update(status="offline", reason="connection refused", response_time_ms=None)
    feed["circuit"].update(state="open", opened_at=feed["at"] - 60_000, failures=5, retry_in_s=4.0)
    feed["backlog"] = {"pending": 1204, "dead": 0, "oldest_age_s": 61.0, "eta_s": None}
    feed["streams"]["bridge"].update(state="behind", lag=1204, lag_s=61.0, rate=0.0)
    feed["rates"]["python"] = 0.0
    feed["freshness"]["python_s"] = 61.0
    feed["bridge_errors"].update(per_min=12.0, total=14)
    return feed


def store_away() -> Feed:
    feed = busy()
    feed["store"].update(status="offline", detail="connection refused", used_bytes=None, max_bytes=None)
    feed["pipeline"]["state"] = "restarting"
    for stream in feed["streams"].values():
        stream.update(state="restarting", rate=0.0, lag=None, lag_s=None)
    feed["rates"] = {"ingest": 0.0, "nexus": 0.0, "python": 0.0}
    feed["unexplained"] = None
    return feed


def store_stopped() -> Feed:
    """The store hangs: the streams' threads run, and can read and write nothing."""
    feed = busy()
    feed["store"].update(status="offline", detail="no answer in 5 s")
    for stream in feed["streams"].values():
        stream.update(dict.fromkeys(("lag", "lag_s", "processed", "failed", "rate", "unsaved", "unsaved_s")))
    feed["rates"] = dict.fromkeys(("ingest", "nexus", "python"))
    feed["unexplained"] = None
    return feed


def draining() -> Feed:
    feed = busy()
    feed["backlog"] = {"pending": 48_210, "dead": 2, "oldest_age_s": 310.0, "eta_s": 42.0, "shrinks": True}
    feed["streams"]["bridge"].update(state="behind", lag=48_210, lag_s=310.0, rate=4120.0, failed=2)
    feed["freshness"]["python_s"] = 300.0
    return feed


def recovering() -> Feed:
    feed = draining()
    feed["backlog"]["eta_s"] = None
    return feed


def much_under_way() -> Feed:
    feed = busy()
    feed["backlog"].update(pending=1996, oldest_age_s=0.2)
    return feed


def slow_partner() -> Feed:
    feed = busy()
    feed["backlog"].update(pending=8136, oldest_age_s=2.5)
    feed["rates"]["python"] = 22.0
    return feed


def hanging() -> Feed:
    feed = slow_partner()
    feed["rates"]["python"] = 0.0
    return feed


def standby() -> Feed:
    feed = busy()
    feed["pipeline"].update(state="standby", checkpoint_age_s=None)
    for stream in feed["streams"].values():
        stream["state"] = "standby"
    return feed


def simulated() -> Feed:
    feed = busy()
    feed["sources"] = [["simulator", 800]]
    return feed


def paused() -> Feed:
    feed = busy()
    feed["circuit"].update(paused=True, paused_at=feed["at"] - 60_000)
    feed["streams"]["bridge"]["state"] = "paused"
    return feed


def local_dead() -> Feed:
    feed = busy()
    feed["streams"]["inference"]["failed"] = 1
    return feed


def dead_while_paused() -> Feed:
    feed = paused()
    feed["streams"]["inference"]["failed"], feed["streams"]["bridge"]["failed"] = 1, 131
    return feed


def disk_full() -> Feed:
    feed = busy()
    feed["store"].update(status="full", full_of="disk", detail="0 MiB are free in .nexus; ingest refuses below 64")
    feed["pipeline"].update(state="restarting", detail="MISCONF Errors writing to the AOF file")
    return feed


def memory_full() -> Feed:
    feed = busy()
    detail = "86% of the memory limit is used; ingest refuses from 85% on"
    feed["store"].update(status="full", full_of="memory", detail=detail, used_bytes=2.75e9)
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(feed["at"] / 1000 - 60))
    feed["retention"].update(trimmed=1, within_retention=13_001, within_retention_at=at)
    return feed


def memory_full_while_paused() -> Feed:
    feed = memory_full()
    feed["retention"] = {"trimmed": 0, "held_back": ["bridge"], "due_for": "memory", "within_retention": 0}
    feed["circuit"]["paused"] = True
    feed["backlog"].update(pending=27_500, oldest_age_s=90.0, eta_s=None)
    feed["streams"]["bridge"].update(state="paused", lag=27_500, lag_s=90.0, unsaved=0)
    feed["reasons"] = [{"about": "retention", "text": "for want of memory events should go, but are kept for bridge"}]
    return feed


def room_again() -> Feed:
    feed = busy()
    feed["retention"] = memory_full()["retention"]
    return feed


def slow_checkpoint() -> Feed:
    feed = busy()
    feed["streams"]["features"].update(lag=27_846, lag_s=0.0, unsaved=27_812, unsaved_s=28.1)
    feed["streams"]["storage"].update(state="behind", lag=30_000, lag_s=12.0, unsaved=10_000, unsaved_s=28.1)
    return feed


def more_dead() -> Feed:
    feed = local_dead()
    feed["streams"]["bridge"]["failed"] = 131
    return feed


def store_degraded() -> Feed:
    feed = busy()
    feed["store"].update(status="degraded", detail="append-only file is off: a crash of the store loses events")
    feed["store"]["durable"] = False
    return feed


def store_unseen() -> Feed:
    feed = busy()
    feed["store"].update(status="unknown", detail="grant +info", used_bytes=None, max_bytes=None, durable=None)
    return feed


def frail_and_paused() -> Feed:
    feed = store_degraded()
    feed["circuit"]["paused"] = True
    return feed


def frail_and_away() -> Feed:
    feed = store_away()
    feed["store"]["durable"] = False
    return feed


def frail_on_standby() -> Feed:
    feed = standby()
    feed["pipeline"]["detail"] = "another instance runs the pipeline"
    feed["store"].update(store_degraded()["store"])
    feed["circuit"]["paused"] = True
    return feed


def rolled_back() -> Feed:
    feed = paused()
    words = "the store came back without its latest events: the log had reached 113, now it ends at 0"
    feed["reasons"] = [{"about": "log", "text": words}, {"about": "job", "text": "the job retention fails: ValueError"}]
    return feed


def job_broken() -> Feed:
    return {**busy(), "reasons": [{"about": "job", "text": "the job retention fails: ValueError: not found"}]}


def opened_by_hand() -> Feed:
    feed = busy()
    opened = {"state": "open", "opened_at": feed["at"] - 60_000, "forced": True, "reason": "opened by hand"}
    feed["circuit"].update(opened)
    return feed


def half_open() -> Feed:
    feed = busy()
    feed["circuit"].update(state="half_open", opened_at=feed["at"] - 60_000, failures=5)
    return feed


def probing_with_backlog() -> Feed:
    feed = draining()
    feed["python"].update(status="degraded", reason="it is slow: GET /health took 3.1 s")
    return feed


def starting() -> Feed:
    feed = busy()
    feed["pipeline"]["state"] = feed["python"]["status"] = "starting"
    for stream in feed["streams"].values():
        stream["state"] = "starting"
    return feed


def streams_load() -> Feed:
    feed = starting()
    feed["pipeline"]["state"], feed["python"]["status"] = "running", "online"
    return feed


def partner_not_asked() -> Feed:
    feed = busy()
    feed["python"].update(status="starting", reason="not asked yet", checked_at=None, response_time_ms=None)
    return feed


def troubled_jobs() -> Feed:
    feed = busy()
    feed["jobs"][0].update(late=3, late_now=False)
    feed["jobs"][1].update(ok=False, error="the store is away: connection refused")
    feed["jobs"][2].update(late=1, late_now=True)
    return feed


def after_an_outage() -> Feed:
    feed = busy()
    began, ended, caught_up = (f"2026-11-26T22:53:{second}.000Z" for second in ("14", "44", "51"))
    outage = {"began": began, "ended": ended, "caught_up": caught_up, "queued": 6666, "delivered": 6666, "dead": 0}
    feed["outages"] = [outage]
    failed = [{"name": "bridge", "detail": "it waits behind a backlog"}]
    feed["canary"].update(success=False, failed=failed)
    return feed


def refusing() -> Feed:
    feed = python_dead()
    feed["python"]["reason"] = "it refuses everything: POST /events answered 422: " + "x" * 400
    feed["bridge_errors"]["recent"][0]["detail"] = feed["python"]["reason"]
    return feed


def unexplained() -> Feed:
    return {**busy(), "unexplained": 1}


def every_field_null() -> Feed:
    def hollow(value: object) -> object:
        return {key: hollow(inner) for key, inner in value.items()} if isinstance(value, dict) else None

    return {key: hollow(value) for key, value in busy().items()} | {"at": int(time.time() * 1000), "boot": "one"}


def no_fields() -> Feed:
    return {"at": int(time.time() * 1000), "boot": "one"}


SCENARIOS: dict[str, Callable[[], Feed]] = {
    make.__name__: make
    for make in (
        busy,
        empty,
        python_dead,
        store_away,
        store_stopped,
        draining,
        recovering,
        much_under_way,
        slow_partner,
        hanging,
        standby,
        simulated,
        paused,
        local_dead,
        more_dead,
        dead_while_paused,
        disk_full,
        memory_full,
        memory_full_while_paused,
        room_again,
        slow_checkpoint,
        store_degraded,
        store_unseen,
        frail_and_paused,
        frail_and_away,
        frail_on_standby,
        rolled_back,
        job_broken,
        opened_by_hand,
        half_open,
        probing_with_backlog,
        starting,
        streams_load,
        partner_not_asked,
        troubled_jobs,
        after_an_outage,
        refusing,
        unexplained,
        every_field_null,
        no_fields,
    )
}


def history(feed: Feed, points: int = 300) -> Feed:
    """The last seconds, made up, at 1 Hz; oldest first."""
    wave = [1 + 0.15 * ((i * 7919) % 13 - 6) / 6 for i in range(points)]

    def line(path: tuple[str, str]) -> list[float | None]:
        value = (feed.get(path[0]) or {}).get(path[1])
        return [None if value is None else value * part for part in wave]

    return {
        "t": [feed["at"] - 1000 * (points - 1 - i) for i in range(points)],
        "ingest": line(("rates", "ingest")),
        "nexus": line(("rates", "nexus")),
        "python": line(("rates", "python")),
        "response_ms": line(("python", "response_time_ms")),
        "fresh_nexus": line(("freshness", "nexus_s")),
        "fresh_python": line(("freshness", "python_s")),
        "errors": [1 if i % 40 == 0 else 0 for i in range(points)],
        "lag": {name: [(i * 31) % 9 for i in range(points)] for name in STREAMS},
    }


class FakeNexus:
    """A Flask application with the dashboard, and in place of Nexus a feed and two routes that a test can steer."""

    def __init__(self) -> None:
        self.reset()
        self.app = Flask(__name__)
        dash.page_registry.clear()
        create_dashboard(self.app)
        self.app.add_url_rule("/nexus/feed.json", "feed", self.feed)
        self.app.add_url_rule("/api/ml/settings", "settings", self.settings, methods=["PATCH"])
        self.app.add_url_rule("/api/ml/bridge/python", "bridge", self.bridge, methods=["POST"])
        self.app.add_url_rule("/api/ml/events/ingest", "ingest", self.ingest, methods=["POST"])
        self.app.add_url_rule("/api/ml/dead-letters", "dead_letters", self.dead_letters)
        self.app.add_url_rule("/api/ml/dead-letters/redrive", "redrive", self.redrive, methods=["POST"])
        self.app.before_request(lambda: self.requests.append((request.method, request.full_path.rstrip("?"))))

    def reset(self, scenario: str = "busy") -> None:
        self.scenario, self.failing, self.refuse = scenario, False, False
        self.incurable, self.died = False, ""  # what is sent again dies again, and when it did
        self.overrides: Feed = {}
        self.environment: Feed = {}
        self.errors = 0  # of the bridge, since the start
        self.spike: float | None = None  # of the Nexus line, for some seconds of the history
        self.points = 300  # that the history holds
        self.still: int | None = None  # the moment that the feed goes on telling
        self.boot = "one"
        self.hold = threading.Event()
        self.hold.set()
        self.requests: list[tuple[str, str]] = []
        self.received: list[Feed] = []

    def dependencies(self) -> list[Feed]:
        """The callbacks that a browser is told of."""
        return list(self.app.test_client().get("/nexus/_dash-dependencies").json or [])

    def feed(self) -> Response | tuple[Response, int]:
        self.hold.wait(DEADLINE_S)
        if self.failing:
            return jsonify(error={"code": "away", "message": "away", "details": {}}), 503
        feed = SCENARIOS[self.scenario]()
        feed["boot"] = self.boot
        if self.errors:
            feed["bridge_errors"]["total"] += self.errors
        if self.still is not None:
            feed["at"] = self.still
        for name, value in self.environment.items():
            feed["settings"][name].update(environment=value)
        for name, value in self.overrides.items():
            feed["settings"][name].update(value=value, source="store")
        if not request.args.get("history"):
            return jsonify(feed)
        told = history(feed, self.points)
        if self.spike is not None:
            told["nexus"][100:112] = [self.spike] * 12
        return jsonify({**feed, "history": told})

    def settings(self) -> Response | tuple[Response, int]:
        body = request.get_json()
        self.received.append(body)
        if self.refuse:
            message = f"{next(iter(body['settings']))}: the store says no"
            return jsonify(error={"code": "out_of_bounds", "message": message, "details": {}}), 422
        for name, value in body["settings"].items():
            if value is None:
                self.overrides.pop(name, None)
            else:
                self.overrides[name] = value
        return jsonify(settings={})

    def bridge(self) -> Response:
        body = request.get_json()
        self.received.append(body)
        if body["action"] == "test_integration":
            hops = ("ingest", "log", "bridge", "python")
            steps = [{"name": name, "ok": True, "ms": 4.5, "detail": "seen"} for name in hops]
            return jsonify(success=True, duration_ms=18.2, steps=steps)
        after = {"pause": "paused", "resume": "busy", "open_circuit": "opened_by_hand", "reset_circuit": "busy"}
        self.scenario = after[body["action"]]
        return jsonify(ok=True)

    def dead_letters(self) -> Response:
        stream = request.args["stream"]
        event = {"event_type": "payment", "user_id": "rider_7"}
        letter = {"id": f"{stream}-1", "stream": stream, "event": event, "reason": "amount is no number", "attempts": 3}
        return jsonify(dead_letters=[{**letter, "first_at": DIED, "last_at": self.died or DIED}], cursor=None)

    def redrive(self) -> Response:
        self.received.append(request.get_json())
        if self.incurable:
            self.died = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() + 1))
        else:
            self.scenario = "busy"
        return jsonify(redriven=1, failed=[{"id": "inference-2", "reason": "it cannot be decoded"}])

    def ingest(self) -> tuple[Response, int]:
        body = request.get_json()
        self.received.append(body)
        self.scenario = "simulated"
        return jsonify(accepted=len(body["events"]), duplicates=0, rejected=[], event_ids=[]), 202
