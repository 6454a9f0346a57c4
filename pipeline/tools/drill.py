"""Drills: make a fault for real on a running system, see it through, and print what became of every event.

    python -m pipeline.tools.drill partner-down 60s     the Python service is away for so long
    python -m pipeline.tools.drill partner-slow 60s     its answers take longer than the timeout
    python -m pipeline.tools.drill store-restart        the embedded store is killed; the supervisor starts it again

A proxy takes the Python service's place by PATCH /api/ml/settings, and the setting is put back at the end, however
the drill ends. Meanwhile the drill posts events of its own (source "drill"), and asks for each one's receipt
afterwards. Exit code 0: nothing is unexplained and nothing is lost.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from pipeline.errors import NexusError, SettingError
from pipeline.events import uuid7
from pipeline.settings import Settings, load
from pipeline.store import Store
from pipeline.tools.drill_report import Report, accepted
from pipeline.tools.fault_proxy import FaultProxy
from pipeline.tools.post import Poster, Receipt, Unanswered

SOURCE = "drill"
USERS = 20
_LOOK_S, _BATCH_S = 0.1, 0.25
_CATCH_UP_S = 600.0
_URL = "PYTHON_EVENT_API_URL"


class Failed(Exception):
    """The drill cannot be made, or its system did not come back; the message says why."""


@dataclass
class Traffic:
    """The drill's own events, posted from a thread: each until it is answered."""

    poster: Poster
    rate: float
    ids: list[str] = field(default_factory=list)
    total: Receipt = field(default_factory=Receipt)
    waits_ms: list[float] = field(default_factory=list)
    unanswered: int = 0

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if self.rate > 0:
            self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(60.0)

    def _run(self) -> None:
        due, number = time.monotonic(), 0
        while not self._over.is_set():
            batch = [self._event(number + i) for i in range(max(1, round(self.rate * _BATCH_S)))]
            number += len(batch)
            began = time.perf_counter()
            try:
                receipt = self.poster.post([msgspec.json.encode(event) for event in batch])
            except Unanswered:
                self.unanswered += len(batch)
                continue
            self.waits_ms.append((time.perf_counter() - began) * 1000)
            self.total.accepted += receipt.accepted
            self.total.duplicates += receipt.duplicates
            self.total.rejected += receipt.rejected
            self.ids += [event["event_id"] for event in batch]
            due += _BATCH_S
            self._over.wait(max(0.0, due - time.monotonic()))

    @staticmethod
    def _event(number: int) -> dict[str, Any]:
        return {
            "event_id": f"drill-{uuid7(time.time_ns() // 1_000_000)}",
            "event_type": "ui_interaction",
            "user_id": f"drill-user-{number % USERS}",
            "data": {"screen": "drill", "element": str(number)},
        }


class Drill:
    """One drill against the Nexus at `base`."""

    def __init__(self, base: str, rate: float, say: Callable[[str], None]) -> None:
        self._http = httpx.Client(base_url=base, timeout=30.0, trust_env=False)
        self._poster = Poster(base, SOURCE, give_up_after=120.0)
        self._traffic = Traffic(self._poster, rate)
        self._say = say

    def close(self) -> None:
        self._traffic.stop()
        self._poster.close()
        self._http.close()

    def partner(self, what: str, seconds: float, slow: bool) -> Report:
        """The Python service away, or slower than the timeout, for so many seconds."""
        settings = self._get("/api/ml/settings")["settings"]
        url = urlsplit(str(settings[_URL]["value"]))
        if url.scheme != "http" or url.password is not None:
            raise Failed(f"{_URL} is {url.geturl()}; the drill's proxy can stand before http without a password only")
        report = self._calm(what)
        timeout_s = settings["PYTHON_SERVICE_TIMEOUT"]["value"] / 1000
        with (
            FaultProxy((url.hostname or "localhost", url.port or 80)) as proxy,
            self._in_place(url.path, proxy, settings),
        ):
            placed = time.time()
            self._until(lambda: self._online(placed), 60.0, "the Python service online behind the drill's proxy")
            self._say(f"fault: {what}")
            calm = len(self._traffic.waits_ms)
            began = time.monotonic()
            if slow:
                proxy.delay_s = timeout_s * 1.5
            else:
                proxy.down()
            noticed = self._watch(report, began, seconds)
            report.moments |= {"noticed after": noticed.get("status"), "circuit open after": noticed.get("circuit")}
            report.fault_p99_ms = _p99(self._traffic.waits_ms[calm:])
            self._say("fault over")
            proxy.delay_s = 0.0
            if not slow:
                proxy.up()
            self._recover(report, time.monotonic())
        self._finish(report)
        return report

    def store(self, what: str, settings: Settings) -> Report:
        """The embedded store killed; whoever keeps it starts it again."""
        if not settings.embedded:
            raise Failed("the store is an external one; the drill ends only the embedded store's process")
        report = self._calm(what)
        store = Store(settings.store_url)
        pid = int(store.client.info("server")["process_id"])
        store.close()
        self._say(f"fault: kill -9 {pid}")
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._recover(report, began)
        self._finish(report)
        return report

    def _calm(self, what: str) -> Report:
        """The state before the fault, with the drill's traffic running."""
        report = Report(what, before=self._health())
        self._traffic.start()
        if self._traffic.rate > 0:
            self._until(lambda: len(self._traffic.waits_ms) >= 8, 60.0, "the drill's first events accepted")
            report.calm_p99_ms = _p99(self._traffic.waits_ms)
        return report

    @contextmanager
    def _in_place(self, path: str, proxy: FaultProxy, settings: dict[str, Any]) -> Iterator[None]:
        """The proxy in the Python service's place, and what was there before put back."""
        before = settings[_URL]["value"] if settings[_URL]["source"] == "store" else None
        try:
            self._set_url(f"http://127.0.0.1:{proxy.port}{path}", "a drill begins")
            yield
        finally:
            self._set_url(before, "a drill ends")

    def _set_url(self, url: str | None, reason: str) -> None:
        answer = self._http.patch("/api/ml/settings", json={"settings": {_URL: url}, "reason": reason})
        if answer.status_code != 200:
            raise Failed(f"{_URL} could not be set: {answer.status_code} {answer.text[:200]}")

    def _watch(self, report: Report, began: float, seconds: float) -> dict[str, float]:
        """Look on while the fault lasts: when it is noticed, how much waits, and that all is explained."""
        noticed: dict[str, float] = {}
        while (passed := time.monotonic() - began) < seconds:
            bridge = self._get("/api/ml/bridge/python?action=health")
            if bridge["status"] != "online":
                noticed.setdefault("status", passed)
            if bridge["circuit"]["state"] != "closed":
                noticed.setdefault("circuit", passed)
            self._account(report)
            time.sleep(_LOOK_S)
        return noticed

    def _recover(self, report: Report, over: float) -> None:
        """Until the service is online and what had waited when the fault was over is through; then the traffic stops."""
        self._until(lambda: self._back(report), 120.0, "the service online again")
        report.moments["online again after"] = time.monotonic() - over
        goal = accepted(self._health())
        self._until(lambda: self._settled(self._account(report)) >= goal, _CATCH_UP_S, "the backlog delivered")
        report.moments["caught up after"] = time.monotonic() - over
        self._traffic.stop()
        self._until(lambda: self._account(report)["streams"]["bridge"]["pending"] == 0, _CATCH_UP_S, "an empty backlog")

    def _finish(self, report: Report) -> None:
        """The accounts afterwards, the ledger's record, and the receipt of each event of the drill's own."""
        report.after = self._account(report)
        if (
            report.moments.get("circuit open after") is not None
        ):  # its record is complete a moment after the backlog is empty
            self._until(lambda: self._outage(report) is not None, 30.0, "the outage's record complete")
        report.outage = self._outage(report)
        report.own, report.unanswered = self._traffic.total, self._traffic.unanswered
        for event_id in self._traffic.ids:
            state = self._bridge_state(event_id)
            report.own_states[state] = report.own_states.get(state, 0) + 1

    def _outage(self, report: Report) -> dict[str, Any] | None:
        outages = self._get("/api/ml/bridge/outages?limit=5")["outages"]
        return next((o for o in outages if o["caught_up"] and o["began"] >= report.before["at"]), None)

    def _bridge_state(self, event_id: str) -> str:
        """What an event's receipt says of the bridge; asked again while Nexus cannot tell."""
        deadline = time.monotonic() + 60.0
        while (answer := self._http.get(f"/api/ml/events/{event_id}")).status_code != 200:
            if answer.status_code < 500 or time.monotonic() > deadline:
                return f"unknown ({answer.status_code})"
            time.sleep(_LOOK_S)
        return str(answer.json()["streams"]["bridge"]["state"])

    def _account(self, report: Report) -> dict[str, Any]:
        health = self._health()
        if "streams" in health:
            report.unexplained = max(report.unexplained, int(health["unexplained"]))
            report.most_queued = max(report.most_queued, int(health["streams"]["bridge"]["pending"]))
        return health

    def _health(self) -> dict[str, Any]:
        """The accounts of all streams, read now; asked again while the store is away."""
        deadline = time.monotonic() + 60.0
        while True:
            at = _now()
            answer = self._http.get("/api/ml/events/ingest?check=health")
            if "error" not in (body := answer.json()):
                return {**body, "at": at}
            if time.monotonic() > deadline:
                raise Failed(f"the accounts cannot be read: {answer.text[:200]}")
            time.sleep(_LOOK_S)

    def _get(self, path: str) -> dict[str, Any]:
        answer = self._http.get(path)
        if answer.status_code != 200:
            raise Failed(f"GET {path} answered {answer.status_code}: {answer.text[:200]}")
        return dict(answer.json())

    def _online(self, since: float = 0.0) -> bool:
        """The partner is online, by a check not older than `since` (epoch s)."""
        answer = self._http.get("/api/ml/bridge/python?action=health")
        if answer.status_code != 200 or answer.json()["status"] != "online":
            return False
        checked_at = answer.json()["python_service"]["checked_at"]
        return datetime.fromisoformat(checked_at).timestamp() >= since

    def _back(self, report: Report) -> bool:
        """All is healthy again; until then events go on waiting, more than there were when the fault ended."""
        healthy = self._healthy()
        if not healthy:
            self._account(report)
        return healthy

    def _healthy(self) -> bool:
        return self._online() and self._http.get("/readyz").status_code == 200

    @staticmethod
    def _settled(health: dict[str, Any]) -> int:
        bridge = health["streams"]["bridge"]
        return int(bridge["processed"]) + int(bridge["failed"])

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"{what}: not within {seconds:g} s")
            time.sleep(_LOOK_S)


def _p99(values: Sequence[float]) -> float | None:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))] if values else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"


def duration(text: str) -> float:
    """Seconds of "60s", "2m", "500ms" or a plain number. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; it takes 60s, 2m or 500ms")
    return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, None: 1.0}[match[2]]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is explained and nothing lost, 1 when not or the drill could not be made, 2 for a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tools.drill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", choices=("partner-down", "partner-slow", "store-restart"))
    parser.add_argument("duration", type=duration, nargs="?", default=60.0, help="of the fault: 60s, 2m; default 60s")
    parser.add_argument("--nexus", help="its address; default as the settings say")
    parser.add_argument("--rate", type=float, default=40.0, help="events/s of the drill's own; 0: none; default 40")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does: the setting is put back
    try:
        settings = load()
        drill = Drill(given.nexus or settings.nexus_url, given.rate, say)
        try:
            if given.fault == "store-restart":
                report = drill.store(given.fault, settings)
            else:
                what = f"{given.fault} {given.duration:g}s"
                report = drill.partner(what, given.duration, slow=given.fault == "partner-slow")
        finally:
            drill.close()
    except SettingError as error:
        print(f"drill: {error}", file=sys.stderr)
        return 2
    except (Failed, NexusError, httpx.HTTPError, OSError) as error:
        print(f"drill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("drill: ended by hand; the setting has been put back", file=sys.stderr)
        return 1
    for line in report.lines():
        print(line)
    return 0 if report.good else 1


def say(text: str) -> None:
    print(f"drill: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
