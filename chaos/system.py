"""The system under test: the real supervisor on free ports with a data folder of its own, and HTTP calls to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("worker", "nexus", "service", "store")
_PROGRAMS = {"store": "valkey-server", "service": "event_api.py", "nexus": "app.py"}
_SCRUBBED = ("NEXUS_", "REDIS_", "API_", "STORE_", "PYTHON_EVENT", "EMBEDDED_", "EVENT_RETENTION")


class Unanswered(Exception):
    """No whole answer came: what was asked may have been done."""


class System:
    """Store, Python service and Nexus (its main process and its web worker), as `make run` starts them."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.port, self.service_port = free_ports(2)
        self.data_dir = folder / "data"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_SCRUBBED)}
        self._environment = environment | {
            "NEXUS_PORT": str(self.port),
            "API_PORT": str(self.service_port),
            "PYTHON_EVENT_API_URL": f"http://127.0.0.1:{self.service_port}",
            "NEXUS_DATA_DIR": str(self.data_dir),
            "NEXUS_LOG_DIR": str(folder / "logs"),
            "HEALTH_CHECK_INTERVAL": "2",
            **settings,
        }
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self, timeout_s: float = 60.0) -> None:
        """Start all parts and wait until they serve. Raises TimeoutError, RuntimeError with what was printed last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._output = (self.folder / "supervisor.log").open("ab")
        self._supervisor = subprocess.Popen(
            [sys.executable, "-m", "pipeline.supervisor"],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.wait(self.healthy, timeout_s, "the system to become healthy")

    def stop(self, timeout_s: float = 60.0) -> None:
        """End all parts in order."""
        if self._supervisor is None:
            return
        for target in TARGETS:
            for pid in self.pids(target):
                send(pid, signal.SIGCONT)
        self._supervisor.terminate()
        try:
            self._supervisor.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()  # the parts get SIGTERM when it ends
            self._supervisor.wait()
        if self._output is not None:
            self._output.close()

    def pids(self, target: str) -> list[int]:
        """The running processes of a target, none while it is down."""
        if self._supervisor is None:
            return []
        if target == "worker":
            return [child for main in self.pids("nexus") for child in children(main)]
        return [pid for pid in children(self._supervisor.pid) if _PROGRAMS[target] in command_line(pid)]

    def wait_pid(self, target: str, timeout_s: float) -> int:
        """The target's process, waited for while it is down. Raises TimeoutError."""
        self.wait(lambda: bool(self.pids(target)), timeout_s, f"{target} to run again")
        found = self.pids(target)
        return found[0] if found else self.wait_pid(target, timeout_s)

    def wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> float:
        """Wait until a condition holds; how long it took, s. Raises TimeoutError; RuntimeError: all has ended."""
        began = time.monotonic()
        while not condition():
            if self._supervisor is not None and self._supervisor.poll() is not None:
                raise RuntimeError(f"the supervisor ended: {self._last_words()}")
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}; {self._last_words()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def healthy(self) -> bool:
        try:
            status, body = self.get("/api/ml/events/ingest?check=health")
            service, _ = self.get("/health", service=True)
        except Unanswered:
            return False
        return status == 200 and body["status"] == "healthy" and service == 200

    def get(self, path: str, *, service: bool = False, timeout_s: float = 30.0) -> tuple[int, Any]:
        """GET from Nexus, or from the Python service: status and decoded JSON. Raises Unanswered."""
        return self._ask("GET", path, None, service, timeout_s)

    def post(self, path: str, body: Any, *, timeout_s: float = 30.0) -> tuple[int, Any]:
        """POST JSON to Nexus: status and decoded JSON. Raises Unanswered."""
        return self._ask("POST", path, json.dumps(body).encode(), False, timeout_s)

    def _ask(self, method: str, path: str, body: bytes | None, service: bool, timeout_s: float) -> tuple[int, Any]:
        port = self.service_port if service else self.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(f"{method} {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _last_words(self) -> str:
        path = self.folder / "supervisor.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def send(pid: int, sign: signal.Signals) -> bool:
    """Send a signal; False where the process has ended meanwhile."""
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    return [child for child in _children(pid) if command_line(child)]  # a zombie has no command line


def _children(pid: int) -> Iterator[int]:
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from (int(child) for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
