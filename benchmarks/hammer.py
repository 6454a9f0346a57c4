"""Closed-loop load at the highest rate, by wrk where it is installed: a generator in Python would be measured too."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import closed_loop, load

WRK = shutil.which("wrk")
TOOL = "wrk" if WRK else "a Python client, since wrk is not installed: it takes part of the processors"
_SCRIPT = Path(__file__).with_name("wrk.lua")


@dataclass(frozen=True)
class Closed:
    """Requests/s, and latencies in ms."""

    rps: float
    p50: float
    p99: float


def hammer(port: int, requests: list[bytes], clients: int, seconds: float) -> Closed:
    """Keep `clients` connections busy with the requests in turn. Raises RuntimeError when one fails."""
    if WRK is None:
        result = load(closed_loop, port, requests, clients, None, seconds).only(200, 202)
        return Closed(len(result.latencies) / result.seconds, result.ms(0.5), result.ms(0.99))
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\0".join(requests))
        file.flush()
        words = [WRK, "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(_SCRIPT)]
        done = subprocess.run(
            [*words, f"http://127.0.0.1:{port}", "--", file.name], capture_output=True, text=True, check=True
        )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} of {found['requests']} requests failed")
    return Closed(found["requests"] / found["seconds"], found["p50"], found["p99"])
