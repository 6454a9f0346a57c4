"""The snapshot: once a second a job makes one small JSON of how everything stands; pages and callbacks only read it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline import keys
from pipeline.bridge import attempts
from pipeline.commit_log import checkpoints
from pipeline.commit_log.checkpoints import Audit
from pipeline.errors import StoreError
from pipeline.jobs import HEALTH_CHECK
from pipeline.operations import standing
from pipeline.operations.footprint import Footprint
from pipeline.operations.standing import Lag
from pipeline.operations.store_watch import StoreWatch
from pipeline.streams.aggregates import RECENT_S, Aggregates
from pipeline.streams.features import Features
from pipeline.streams.inference import Inference
from pipeline.streams.runner import STARTING

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

HISTORY_S = 300
RATE_S = 5.0  # rates are means over this long
_TOP = 6
_SHRUNK, _SURE_S = 0.98, 3.0  # a backlog of less than this share of its peak shrinks; after so long its pace is known
_encode = msgspec.json.Encoder().encode
_OUTAGES, _ERRORS = 3, 8
_OUTAGE = ("began", "ended", "caught_up", "queued", "delivered", "dead")


class Meter:
    """The mean rate of a growing count over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=int(RATE_S) + 1)

    def rate(self, count: int, now: float) -> float:
        """Per second; `now` is monotonic seconds. A count that fell (an emptied store) begins anew."""
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, count))
        first_at, first = self._seen[0]
        return (count - first) / (now - first_at) if now > first_at else 0.0


class Drain:
    """Whether a backlog shrinks and when it will be gone, by how it went since its peak of the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=int(RATE_S) + 1)

    def look(self, pending: int | None, now: float) -> tuple[bool | None, float | None]:
        """The seconds are None where it does not shrink, or not for long enough to tell; `now` is monotonic seconds."""
        if not pending:
            self._seen.clear()
            return None if pending is None else False, None
        self._seen.append((now, pending))
        at, peak = max(self._seen, key=lambda seen: (seen[1], seen[0]))
        if pending > peak * _SHRUNK:
            return False, None
        return True, pending * (now - at) / (peak - pending) if now - at >= _SURE_S else None


class Serving:
    """Makes and keeps the snapshot, with the last minutes' history for the charts."""

    def __init__(self, nexus: Runtime, clock: Callable[[], int]) -> None:
        self._nexus, self._clock = nexus, clock
        self._meters: dict[str, Meter] = {}
        self._drain = Drain()
        self._ran: set[str] = set()  # streams that were seen at work
        self._history: deque[tuple[Any, ...]] = deque(maxlen=HISTORY_S)
        self._body: dict[str, Any] = {}
        self._plain = b"{}"
        self._footprint = Footprint(nexus.store, nexus.log)
        self.store_watch = StoreWatch(nexus.store, nexus.settings, nexus.ingest, self._footprint.of_events_now)
        self.audit: Audit | None = None
        self._began = clock()
        self._errors_before: list[dict[str, object]] | None = None  # this process began; None until they are read
        self._errors_seen: deque[int] = deque([0], maxlen=61)  # the total at each of the last minute's looks

    def feed(self, history: bool) -> bytes:
        """The snapshot as JSON, with the history where asked for."""
        if not history:
            return self._plain
        return _encode({**self._body, "history": self._history_columns()})

    def lag_s(self, stream: str) -> float:
        """The age of the oldest event that a stream has yet to process, as of the last snapshot."""
        lag: float | None = self._body.get("streams", {}).get(stream, {}).get("lag_s")
        return lag or 0.0

    def backlog_age_s(self) -> float | None:
        """The age of the oldest event that waits for the Python service, as of the last snapshot."""
        age: float | None = self._body.get("backlog", {}).get("oldest_age_s")
        return age

    def backlog_eta_s(self) -> float | None:
        """When the backlog will have drained, in seconds, as of the last snapshot; None where it does not shrink."""
        eta: float | None = self._body.get("backlog", {}).get("eta_s")
        return eta

    def ingest_health(self) -> tuple[int, dict[str, Any]]:
        """The audit as ?check=health answers it: counters read now, in one consistent read; null where the store is away."""
        nexus = self._nexus
        try:
            audit = checkpoints.audit(nexus.store)
            lags = standing.lags(nexus, audit, self._clock())
        except StoreError as error:
            return 503, self._without_store(error)
        states = nexus.stream_states()
        running = nexus.runner.state == "running" or audit.owned
        reasons = standing.reasons(nexus, audit, lags, self.store_watch.status)
        status = "unhealthy" if not running else "degraded" if reasons else "healthy"
        streams = {
            name: {
                "state": states[name][0],
                "lag": account.accepted - account.processed - account.dead,
                "processed": account.processed,
                "failed": account.dead,
                "rate": self._body.get("streams", {}).get(name, {}).get("rate"),
                "pending": account.pending,
                "lag_s": round(lags[name].seconds, 3),
                "unsaved": lags[name].unsaved,
                "unsaved_s": round(lags[name].unsaved_s, 3),
            }
            for name, account in audit.accounts.items()
        }
        return (503 if status == "unhealthy" else 200), {
            "status": status,
            "reasons": [reason["text"] for reason in reasons],
            "streams": streams,
            "totals": {
                "accepted": audit.head.accepted,
                "duplicates": audit.head.duplicates,
                "rejected": audit.head.rejected,
                "bridge_only": audit.head.bridge_only,
            },
            "unexplained": audit.unexplained,
            "store": self.store_watch.status,
            "log": {
                "ids": audit.head.ids,
                "first_segment": audit.head.first_segment,
                "last_segment": audit.head.segment,
            },
            "bytes": self._footprint.latest,
            "retention": nexus.retention.told(),
        }

    def _without_store(self, error: StoreError) -> dict[str, Any]:
        """What is known of the health while the store does not answer."""
        unknown = dict.fromkeys(("lag", "processed", "failed", "rate", "pending", "lag_s", "unsaved", "unsaved_s"))
        return {
            "status": "unhealthy",
            "reasons": [error.message],
            "streams": {name: {"state": state, **unknown} for name, (state, _) in self._nexus.stream_states().items()},
            "totals": dict.fromkeys(("accepted", "duplicates", "rejected", "bridge_only")),
            "unexplained": None,
            "store": {**self.store_watch.status, "status": "offline", "detail": error.message},
            "log": dict.fromkeys(("ids", "first_segment", "last_segment")),
            "bytes": self._footprint.latest,
            "retention": self._nexus.retention.told(),
            **error.body(),
        }

    def refresh(self) -> None:
        """The job: look at everything once. A store that is away shows as such."""
        nexus, now = self._nexus, time.monotonic()
        seen: tuple[Audit, dict[str, Lag]] | None = None
        try:
            self.store_watch.look()
            self.audit = checkpoints.audit(nexus.store)
            seen = self.audit, standing.lags(nexus, self.audit, self._clock())
            self._footprint.look()
            if self._errors_before is None:
                self._errors_before = attempts.failures(nexus.store, self._began, _ERRORS)
        except StoreError:
            pass  # what was known before is not how it stands now: shown as unknown
        self._errors_seen.append(nexus.bridge.errors_total)
        self._body = self._build(now, *(seen or (None, None)))
        self._plain = _encode(self._body)
        self._remember()

    def _build(self, now: float, audit: Audit | None, lags: Mapping[str, Lag] | None) -> dict[str, Any]:
        """Of what stands in the store null where it did not answer (`audit` and `lags` are None)."""
        nexus = self._nexus
        bridge, circuit = nexus.bridge, nexus.bridge.circuit
        at = self._clock()
        streams = self._streams(now, audit, lags)
        head = audit.head if audit is not None else None
        pending = audit.accounts["bridge"].pending if audit is not None else None
        dead = audit.accounts["bridge"].dead if audit is not None else None
        python_rate = streams["bridge"]["rate"]
        ingest_rate = None if head is None else self._rate("ingest", head.accepted + head.bridge_only, now)
        ages = lags if head is not None and head.accepted + head.bridge_only else None
        shrinks, eta_s = self._drain.look(pending, now)
        features = nexus.stream("features")
        latencies = list(nexus.ingest.latencies_ms)
        cuts = quantiles(latencies, n=100) if len(latencies) > 1 else None
        recent = self._recent()
        return {
            "at": at,
            "boot": nexus.boot,
            "version": nexus.version,
            "store": self.store_watch.status,
            "pipeline": {
                "state": nexus.runner.state,
                "detail": nexus.runner.detail,
                "checkpoint_age_s": _rounded(nexus.runner.checkpoint_age_s()),
            },
            "python": self._partner(),
            "circuit": {
                "state": circuit.state,
                "opened_at": circuit.opened_at,
                "paused_at": circuit.paused_at,
                "failures": circuit.failures,
                "paused": circuit.paused,
                "forced": circuit.forced,
                "reason": circuit.reason,
                "retry_in_s": _rounded(max(0.0, (circuit.retry_at - at) / 1000))
                if circuit.state == "open" and not circuit.forced
                else None,
            },
            "backlog": {
                "pending": pending,
                "dead": dead,
                "oldest_age_s": _rounded(lags["bridge"].seconds) if lags is not None and pending else None,
                "shrinks": shrinks,
                "eta_s": _rounded(eta_s),
            },
            "streams": streams,
            "totals": {
                "accepted": head.accepted if head else None,
                "duplicates": head.duplicates if head else None,
                "rejected": head.rejected if head else None,
            },
            "unexplained": audit.unexplained if audit is not None else None,
            "reasons": standing.reasons(nexus, audit, lags or {}, self.store_watch.status),
            "retention": nexus.retention.told(),
            "rates": {
                "ingest": _rounded(ingest_rate),
                "nexus": streams["features"]["rate"],
                "python": python_rate,
            },
            "latency": {
                "ingest_p50_ms": _rounded(cuts[49]) if cuts else None,
                "ingest_p99_ms": _rounded(cuts[98]) if cuts else None,
            },
            "freshness": {  # of what waits; the delays are the latest event's
                "nexus_s": _rounded(ages["features"].seconds) if ages else None,
                "python_s": _rounded(ages["bridge"].seconds) if ages else None,
                "nexus_delay_s": _rounded(nexus.runner.delay_s("features")),
                "python_delay_s": _rounded(bridge.delay_s),
                "nexus_users": features.users if isinstance(features, Features) else None,
            },
            "bridge_errors": {
                "total": bridge.errors_total,
                "per_min": self._errors_seen[-1] - self._errors_seen[0],
                "recent": [*bridge.errors, *(self._errors_before or [])][:_ERRORS],
            },
            "outages": [{name: row[name] for name in _OUTAGE} for row in bridge.ledger.latest[:_OUTAGES]],
            "canary": _canary(nexus.actions.canary.latest),
            "models": self._models(),
            "jobs": nexus.scheduler.describe(),
            "settings": nexus.live.describe(),
            "events_per_type": _top(recent, "type:"),
            "sources": _top(recent, "source:"),
        }

    def _partner(self) -> dict[str, Any]:
        """As ?action=health has it, but not offline before it has been asked for the first time."""
        nexus = self._nexus
        found = nexus.partner_status()
        if found["status"] == "offline" and nexus.bridge.health is None and not nexus.scheduler.jobs[HEALTH_CHECK].runs:
            found["status"] = STARTING
        return found

    def _streams(self, now: float, audit: Audit | None, lags: Mapping[str, Lag] | None) -> dict[str, dict[str, Any]]:
        nexus = self._nexus
        states = nexus.stream_states()
        if nexus.runner.state in (STARTING, "running") and states["bridge"][0] in ("standby", "stopped"):
            states["bridge"] = STARTING, None  # it has yet to see that the lease is this instance's
        found = {}
        for name in keys.STREAMS:
            account = audit.accounts[name] if audit is not None else None
            state, detail = states[name]
            if state == "running":
                self._ran.add(name)
            elif state == "restarting" and name not in self._ran:
                state = STARTING  # it loads what it goes on from
            lag = None if lags is None else lags[name]
            if state == "running" and lag is not None and lag.seconds >= standing.BEHIND_S:
                state = "behind"
            found[name] = {
                "state": state,
                "detail": detail,
                "lag": account.pending if account else None,
                "lag_s": _rounded(lag.seconds if lag else None),
                "unsaved": lag.unsaved if lag else None,
                "unsaved_s": _rounded(lag.unsaved_s if lag else None),
                "processed": account.processed if account else None,
                "failed": account.dead if account else None,
                "rate": None if account is None else _rounded(self._rate(name, nexus.live_processed(name), now)),
            }
        return found

    def _models(self) -> dict[str, dict[str, Any]]:
        stream = self._nexus.stream("inference")
        if not isinstance(stream, Inference):
            return {}
        model = stream.model
        needed = self._nexus.labels_needed()
        return {
            "fraud": {
                "state": "ready" if model.ready else "warming_up",
                "detail": None if model.ready else f"needs {needed} more reported frauds",
                "scored": model.scored,
            },
            "demand": {
                "state": "warming_up" if (why := self._nexus.demand_warming) else "ready",
                "detail": why,
                "scored": None,
            },
        }

    def _recent(self) -> Counter[str]:
        stream = self._nexus.stream("aggregates")
        total: Counter[str] = Counter()
        if isinstance(stream, Aggregates):
            since = self._clock() // 1000 - RECENT_S
            for second, counts in list(stream.recent.items()):
                if second >= since:
                    total.update(dict(counts))
        return total

    def _rate(self, name: str, count: int, now: float) -> float:
        return self._meters.setdefault(name, Meter()).rate(count, now)

    def _remember(self) -> None:
        body = self._body
        self._history.append(
            (
                body["at"],
                body["rates"]["ingest"],
                body["rates"]["nexus"],
                body["rates"]["python"],
                body["python"]["response_time_ms"],
                body["freshness"]["nexus_s"],
                body["freshness"]["python_s"],
                self._errors_seen[-1] - self._errors_seen[-2],
                *(body["streams"][name]["lag"] for name in keys.STREAMS),
            )
        )

    def _history_columns(self) -> dict[str, Any]:
        rows = list(self._history)
        columns = (
            [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(8 + len(keys.STREAMS))]
        )
        names = ("t", "ingest", "nexus", "python", "response_ms", "fresh_nexus", "fresh_python", "errors")
        return {**dict(zip(names, columns, strict=False)), "lag": dict(zip(keys.STREAMS, columns[8:], strict=True))}


def _canary(latest: dict[str, Any] | None) -> dict[str, Any] | None:
    """The latest canary's report without the hops that it came through."""
    if latest is None:
        return None
    failed = [{"name": step["name"], "detail": step["detail"]} for step in latest["steps"] if not step["ok"]]
    return {**{name: latest[name] for name in ("at", "success", "duration_ms")}, "failed": failed}


def _top(counts: Counter[str], prefix: str) -> list[tuple[str, int]]:
    picked = [(name[len(prefix) :], count) for name, count in counts.items() if name.startswith(prefix)]
    return sorted(picked, key=lambda item: -item[1])[:_TOP]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2 if value < 100 else 0)
