"""Starts the whole system as `make run` does, in a folder of its own, and looks at its processes and accounts."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from pipeline.embedded import is_long, spawn

ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"  # made by `make bench`
INGEST = "/api/ml/events/ingest"
_TICK = os.sysconf("SC_CLK_TCK")
_LOOK_S = 3.0  # the publisher's first round after a load does next to nothing: it goes by how busy the one before was
_IDLE_SHARE = 0.15  # of one core, by all parts together: they use 0.05 to 0.08 when nothing is asked of them
# By a word of the command line; the web server's own process is Nexus's too.
_PARTS = (("valkey-server", "store"), ("event_api.py", "python"), ("app.py", "nexus"), (" serve", "nexus"))


@dataclass
class Options:
    """How much to measure. `found` carries figures from one topic to later ones, such as `top_rate` in events/s."""

    quick: bool = False
    full: bool = False
    data: Path = Path("/tmp")
    recorded: Path = ROOT.parent / "shared" / "data"
    found: dict[str, float] = field(default_factory=dict)

    def pick(self, quick: Any, default: Any, full: Any = None) -> Any:
        """The value for the run's length."""
        return quick if self.quick else full if self.full and full is not None else default

    @property
    def repetitions(self) -> int:
        return int(self.pick(1, 3, 5))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.02) -> Any:
    """Ask until the answer is true, and return it. Raises TimeoutError that names `what`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(every)
    return found


def call(port: int, method: str, path: str, body: Any = None, timeout: float = 30.0) -> tuple[int, Any]:
    """One HTTP call, for control, not for load: status and decoded JSON (None where it is none)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        sent = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json"} if sent is not None else {})
        answer = connection.getresponse()
        raw = answer.read()
    finally:
        connection.close()
    try:
        return answer.status, json.loads(raw)
    except ValueError:
        return answer.status, None


def tethered(
    words: Sequence[str | Path], out: Path = Path("/dev/null"), environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process in the project's folder that ends with this one, even by kill -9; what it says is appended to `out`."""
    return spawn(["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(out), *map(str, words)], environment, cwd=ROOT)


class System:
    """The store, the Python service and Nexus under their supervisor; `environment` adds settings."""

    supervisor = "pipeline.supervisor"  # the module that is run

    def __init__(self, data: Path, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nexus-bench-", dir=data))
        self.port, self.api_port = free_port(), free_port()
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("REDIS_", "NEXUS_", "API_"))},
            "NEXUS_DATA_DIR": str(self.folder / "data"),
            "NEXUS_LOG_DIR": str(self.folder / "logs"),
            "NEXUS_PORT": str(self.port),
            "API_PORT": str(self.api_port),
            "PYTHON_EVENT_API_URL": f"http://127.0.0.1:{self.api_port}",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._store: redis.Redis | None = None

    def start(self, seconds: float = 60.0) -> float:
        """Start all parts; seconds until all of them are ready."""
        began = time.monotonic()
        words = [sys.executable, "-m", self.supervisor]
        self._process = tethered(words, self.folder / "out.log", self._environment)
        wait_until(lambda: self._alive() and self.ready(), seconds, "the start")
        return time.monotonic() - began

    def stop(self) -> None:
        """Stop all parts in order."""
        if self._process is not None:
            if self._store is not None:
                self._store.close()
                self._store = None
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(90)
            self._process = None

    def crash(self) -> None:
        """kill -9 of everything at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)  # or it would start again what dies
        for pid in [*_descendants(self._process.pid), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)
        self._process, self._store = None, None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _alive(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the system ended: {(self.folder / 'out.log').read_text()[-2000:]}")
        return True

    def ready(self) -> bool:
        """Nexus serves with a running pipeline, and it knows the Python service online."""
        try:
            up = call(self.port, "GET", "/readyz", timeout=2)[0] == 200
            up = up and call(self.port, "GET", f"{INGEST}?check=health", timeout=2)[1]["status"] == "healthy"
        except (OSError, http.client.HTTPException, KeyError, TypeError):
            return False
        return up

    @property
    def socket_path(self) -> str:
        return str(self.folder / "data" / "valkey.sock")

    @property
    def store(self) -> redis.Redis:
        """A client of the embedded store, to look, never to write."""
        if self._store is None:
            self._store = redis.Redis(unix_socket_path=self.socket_path, protocol=2)
        return self._store

    def accounts(self) -> dict[str, Any]:
        """The answer of ?check=health."""
        answer: dict[str, Any] = call(self.port, "GET", f"{INGEST}?check=health")[1]
        return answer

    def pending(self, *streams: str) -> int:
        """Events that wait for the streams, all five where none is named; -1 while the accounts cannot be read."""
        accounts = self.accounts()
        if "streams" not in accounts:
            return -1
        return sum(s["pending"] for name, s in accounts["streams"].items() if not streams or name in streams)

    def drained(self, seconds: float, *streams: str) -> None:
        """Wait until all streams, or those named, have processed everything, and their checkpoints say so."""
        wait_until(lambda: self.pending(*streams) == 0, seconds, "the drain of the backlog", 0.05)

    def quiet(self, seconds: float = 120.0, *streams: str) -> None:
        """drained(), and what follows it is done too: public keys are written, and the store's file is short. Next to nothing
        runs."""
        self.drained(seconds, *streams)

        def still() -> bool:
            before = sum(self.cpu_s().values())
            time.sleep(_LOOK_S)
            return sum(self.cpu_s().values()) - before < _IDLE_SHARE * _LOOK_S and not self.rewrites()

        wait_until(still, seconds, "the end of all work")

    def rewrites(self) -> bool:
        """The store is writing its append-only file anew, by a process of its own, or will be asked to as soon as there is little
        to do."""
        found = self.store.info("persistence")
        base, size = int(found["aof_base_size"]), int(found["aof_current_size"])
        return is_long(base, size - base) or bool(found["aof_rewrite_in_progress"])

    def processes(self) -> dict[str, list[int]]:
        """The process ids of each part: store, python, nexus."""
        assert self._process is not None
        found: dict[str, list[int]] = {name: [] for _, name in _PARTS}
        for pid in _descendants(self._process.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            part = next((name for word, name in _PARTS if word in words), None)
            if part is None and "multiprocessing" in words:
                part = "nexus"  # the web server's worker
            if part is not None:
                found[part].append(pid)
        return found

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds that each part has used since its processes started."""
        return {part: sum(_cpu_s(pid) for pid in pids) for part, pids in self.processes().items()}

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of each part, MiB."""
        return {part: sum(_rss(pid) for pid in pids) / 2**20 for part, pids in self.processes().items()}

    def aof_bytes(self) -> int:
        """Bytes that the store's append-only file has by now."""
        return int(self.store.info("persistence")["aof_current_size"])


@contextlib.contextmanager
def running(data: Path, kind: type[System] = System, **environment: str) -> Iterator[System]:
    """A started system, stopped and removed at the end."""
    system = kind(data, **environment)
    try:
        system.start()
        yield system
    finally:
        system.stop()
        system.remove()


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _cpu_s(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / _TICK


def _rss(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
