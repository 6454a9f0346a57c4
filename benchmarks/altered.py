"""The system with an altered Nexus: a module whose `nexus()` makes the application takes the place of app.py.

python -m MODULE          the supervisor, with that Nexus
python -m MODULE serve    that Nexus alone
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flask import Flask
from granian import Granian
from granian.constants import Interfaces

import app as nexus_app
from pipeline import embedded, settings, supervisor
from pipeline.operations import processes
from pipeline.runtime import Runtime


def main(module: str, words: list[str]) -> int:
    """What `python -m MODULE` does; the exit code."""
    if words != ["serve"]:
        return supervise(module)
    serve(module)
    return 0


def worker() -> Flask:
    """app.worker() of whatever has been altered before."""
    runtime = Runtime(settings.load())
    processes.tie_to_parent()
    flask = nexus_app.create_app(runtime)
    runtime.start()
    processes.at_exit(runtime.stop)
    return flask


def serve(module: str) -> None:
    chosen = settings.load()
    options: dict[str, Any] = {"factory": True, "workers": 1, "backpressure": 512, "log_enabled": False}
    Granian(
        f"{module}:nexus",
        chosen.nexus_host,
        chosen.nexus_port,
        interface=Interfaces.WSGI,
        blocking_threads=nexus_app.CONNECTIONS,
        **options,
    ).serve()


def supervise(module: str) -> int:
    usual = supervisor.parts_of

    def parts_of(chosen: settings.Settings, *rest: Any) -> list[supervisor.Part]:
        words = [sys.executable, "-m", module, "serve"]
        root, environment = Path(__file__).parent.parent, settings.child_environment(chosen)

        def spawn() -> subprocess.Popen[bytes]:
            return embedded.spawn(words, environment, cwd=root)

        return [replace(part, spawn=spawn) if part.name == "Nexus" else part for part in usual(chosen, *rest)]

    supervisor.parts_of = parts_of  # type: ignore[assignment]
    return supervisor.main([])
