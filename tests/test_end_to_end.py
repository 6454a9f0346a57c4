"""The whole system as processes over HTTP: `python app.py` with its embedded store, `python event_api.py` beside it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from pipeline.embedded import alive
from tests.helpers import (
    LOCAL,
    STREAMS,
    Part,
    assert_counted_once,
    clean_environment,
    event,
    free_port,
    payment,
    response,
    until,
)

INGEST = "/api/ml/events/ingest"
BRIDGE = "/api/ml/bridge/python"
USERS = 12


class System:
    """Both processes on one data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        nexus_port, python_port = free_port(), free_port()
        environment = clean_environment(
            NEXUS_DATA_DIR=str(folder / "data"),
            NEXUS_LOG_DIR=str(folder / "logs"),
            NEXUS_PORT=str(nexus_port),
            API_PORT=str(python_port),
            PYTHON_EVENT_API_URL=f"http://127.0.0.1:{python_port}",
            HEALTH_CHECK_INTERVAL="1",
            STORE_MAX_MEMORY="512mb",
        )
        self.nexus = Part("app.py", nexus_port, environment, folder / "nexus.out")
        self.python = Part("event_api.py", python_port, environment, folder / "python.out")
        self.store: Any = redis.Redis(unix_socket_path=str(folder / "data" / "valkey.sock"), decode_responses=True)

    def start(self) -> System:
        self.start_nexus()
        self.start_python()
        until(lambda: self.get(f"{BRIDGE}?action=health")["status"] == "online", "the partner online")
        return self

    def start_nexus(self) -> None:
        self.nexus.start("/readyz")

    def start_python(self) -> None:
        self.python.start("/health")
        until(lambda: self.python.http.get("/health").json()["status"] == "healthy", "the Python service healthy")

    def get(self, path: str) -> Any:
        return self.nexus.http.get(path).json()

    def post(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        """Posted until it is answered, as a client does."""

        def attempt() -> Any:
            answer = self.nexus.http.post(INGEST, json={"events": events, "source": "test"})
            assert answer.status_code in (202, 503), answer.text
            return answer.json() if answer.status_code == 202 else None

        return dict(until(attempt, "an answer"))

    def settled(self, streams: tuple[str, ...] = STREAMS) -> None:
        def quiet() -> bool:
            health = self.get(f"{INGEST}?check=health")
            return all(health["streams"][name]["pending"] == 0 for name in streams)

        until(quiet, "the streams' work", 60.0)
        at = self.get("/nexus/feed.json")["at"]
        until(lambda: self.get("/nexus/feed.json")["at"] > at, "the next snapshot")

    def worker(self) -> int:
        """The web server's worker process, in which the pipeline runs."""
        for pid in self.nexus.children():
            if b"valkey" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("no worker")

    def store_process(self) -> int:
        for pid in self.nexus.children():
            if b"valkey" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("no store")

    def close(self) -> None:
        for part in (self.python, self.nexus):
            part.close()
        self.store.close()


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path)
    yield made
    made.close()


class Stream:
    """A client that posts without pause, each batch until it is answered, while parts of the system are killed."""

    def __init__(self, system: System) -> None:
        self.system, self.posted, self.errors = system, [], []
        self.accepted = self.duplicates = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    posted: list[dict[str, Any]]
    errors: list[AssertionError | httpx.HTTPError]

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self.errors == []

    def _run(self) -> None:
        n = 0
        try:
            while not self._stop.is_set():
                events = [response(f"driver_{(n + i) % USERS}", response_time=float(n + 2**i)) for i in range(15)]
                events += [payment(f"t-{n}-{i}", 10.0 + i, f"rider_{i}") for i in range(5)]
                answer = self.system.post(events)
                self.accepted += answer["accepted"]
                self.duplicates += answer["duplicates"]
                self.posted += events
                n += 1
        except (AssertionError, httpx.HTTPError) as error:
            self.errors.append(error)

    def grows(self, by: int = 200) -> None:
        """Wait until so many more events have been acknowledged."""
        goal = len(self.posted) + by
        until(lambda: len(self.posted) >= goal or self.errors, "more events")


def assert_nothing_lost_or_doubled(system: System, posted: list[dict[str, Any]]) -> None:
    system.settled()
    assert_counted_once(system.get, posted, time.time_ns() // 1_000_000)
    assert system.get(f"{INGEST}?check=health")["streams"]["bridge"]["processed"] == len(posted)
    for driver in {e["user_id"] for e in posted if e["event_type"] == "ride_request_response"}:
        own = [e for e in posted if e["user_id"] == driver]
        mean = sum(e["data"]["response_time"] for e in own) / len(own)  # one event more or less would move it
        for features in (
            system.python.http.get(f"/features/{driver}").json()["features"],
            system.get(f"/api/ml/features/{driver}")["features"],
        ):
            assert features["response_time"] == pytest.approx(mean, rel=1e-9), driver


def test_events_flow_through_all_five_streams_and_both_systems_answer(system):
    system.start()
    posted = [response("driver_1", "accepted", response_time=2.0), response("driver_1", "rejected", response_time=4.0)]
    posted += [payment("t1", 40.0, "rider_1"), event("ride_request", "rider_1", location={"lat": 14.55, "lng": 121.0})]
    assert system.post(posted)["accepted"] == 4
    system.settled()
    assert_counted_once(system.get, posted, time.time_ns() // 1_000_000)
    receipt = system.get(f"/api/ml/events/{posted[0]['event_id']}")
    assert {stream["state"] for stream in receipt["streams"].values()} == {"done"}
    both = system.get(f"{BRIDGE}?action=features&user_id=driver_1")
    expected = {"acceptance_rate": 0.5, "response_time": 3.0, "recent_rejections": 1}
    for side in ("python_features", "typescript_features", "combined"):
        assert expected.items() <= both["combined_features"][side].items(), side
    assert 0 <= system.get("/api/ml/predictions/fraud/t1")["score"] <= 1
    until(lambda: system.store.exists("ml:serving:features:driver_1"), "the public key")
    assert json.loads(system.store.get("features:driver_1"))["user_id"] == "driver_1"
    assert system.store.keys("ml:*")
    until(lambda: system.get(f"{INGEST}?check=health")["status"] == "healthy", "healthy")
    tried = system.nexus.http.post(BRIDGE, json={"action": "test_integration"}).json()
    assert tried["success"] is True, tried
    lines = (system.folder / "logs" / "nexus-ai.log").read_text().splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_kill_9_of_each_part_amid_a_stream_of_posts_loses_and_doubles_nothing(system):
    system.start()
    with Stream(system) as stream:
        stream.grows()
        os.kill(system.worker(), signal.SIGKILL)
        stream.grows()
        system.python.kill()
        stream.grows()
        system.start_python()
        stream.grows()
        system.nexus.kill()
        system.start_nexus()
        stream.grows()
    assert stream.accepted + stream.duplicates == len(stream.posted)
    assert_nothing_lost_or_doubled(system, stream.posted)


def test_kill_9_of_the_store_amid_a_stream_of_posts_loses_and_doubles_nothing(system):
    """`python app.py` does not bring its store back by itself, the supervisor does: so it is started again."""
    system.start()
    with Stream(system) as stream:
        stream.grows()
        os.kill(system.store_process(), signal.SIGKILL)
        until(lambda: system.nexus.http.get("/readyz").status_code == 503, "not ready")
        system.nexus.kill()
        system.start_nexus()
        stream.grows()
    assert_nothing_lost_or_doubled(system, stream.posted)


def test_restart_keeps_data_and_runtime_settings_and_says_where_they_override(system):
    system.start()
    posted = [response("driver_1") for _ in range(10)]
    system.post(posted)
    changed = system.nexus.http.patch(
        "/api/ml/settings", json={"settings": {"FEATURE_SYNC_INTERVAL": 77}, "reason": "x"}
    )
    assert changed.status_code == 200, changed.text
    system.settled()
    assert system.nexus.stop() == 0
    system.start_nexus()
    setting = system.get("/api/ml/settings")["settings"]["FEATURE_SYNC_INTERVAL"]
    assert (setting["value"], setting["source"]) == (77, "store")
    assert "FEATURE_SYNC_INTERVAL" in (system.folder / "logs" / "nexus-ai.log").read_text()
    line = "nexus: FEATURE_SYNC_INTERVAL is 77, set at run time (the environment says 300)\n"
    assert system.nexus.log.read_text().count(line) == 1
    system.post(more := [response("driver_1") for _ in range(5)])
    assert_nothing_lost_or_doubled(system, posted + more)
    assert system.post(posted)["duplicates"] == 10


def test_sigterm_answers_what_is_in_flight_ends_with_0_and_leaves_nothing_behind(system):
    system.start_nexus()
    children = system.nexus.children()
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(
            system.nexus.http.post(f"{INGEST}?wait=features&timeout_ms=1000", json=[event() for _ in range(3000)])
        )
    )
    asking.start()
    until(lambda: system.get(f"{INGEST}?check=health")["totals"]["accepted"] == 3000, "the request taken")
    assert system.nexus.stop() == 0
    asking.join()
    assert [answer.status_code for answer in answers] == [202]
    assert not any(alive(pid) for pid in children)


def test_stalled_uploads_hold_up_neither_the_others_nor_the_stop(system):
    system.start_nexus()
    with contextlib.ExitStack() as stalled:
        for _ in range(64):
            upload = stalled.enter_context(socket.create_connection(("127.0.0.1", system.nexus.port)))
            upload.sendall(f"POST {INGEST} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n[".encode())
        for _ in range(3):
            assert system.nexus.http.get("/healthz", timeout=5).status_code == 200
            assert system.nexus.http.post(INGEST, json=[event()], timeout=5).status_code == 202
        began = time.monotonic()
        assert system.nexus.stop() == 0
        assert time.monotonic() - began < 18  # the supervisor's grace is 20 s


def test_nexus_alone_takes_events_for_a_service_that_comes_later(system):
    system.start_nexus()
    posted = [response(f"driver_{n % USERS}") for n in range(100)]
    system.post(posted)
    system.settled(LOCAL)
    health = system.get(f"{INGEST}?check=health")
    assert (health["status"], health["streams"]["bridge"]["pending"]) == ("degraded", 100)
    system.start_python()
    assert_nothing_lost_or_doubled(system, posted)


def test_second_nexus_on_the_port_and_a_wrong_setting_are_refused_in_one_line(system):
    system.start_nexus()
    second = Part("app.py", system.nexus.port, system.nexus.environment, system.folder / "second.out")
    wrong = {**system.nexus.environment, "NEXUS_PORT": "soon"}
    third = Part("app.py", system.nexus.port, wrong, system.folder / "third.out")
    for part, name in ((second, "port"), (third, "NEXUS_PORT")):
        part.launch()
        assert part.process is not None
        assert part.process.wait(30) > 0
        lines = part.log.read_text().splitlines()
        assert len(lines) == 1
        assert name in lines[0]
        part.close()
    assert system.nexus.http.get("/readyz").status_code == 200
