"""Nexus: the composition root. `python app.py` serves the dashboard, the routes, the jobs and the pipeline on one
port."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from flask import Flask, redirect
from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.log import LogLevels

from pipeline import settings
from pipeline.errors import NexusError, SettingError
from pipeline.operations import logs, processes
from pipeline.routes import register
from pipeline.runtime import Runtime
from pipeline.settings import Settings
from pipeline.supervisor import banner, say
from pipeline.web.connections import Turns
from pipeline.web.dashboard import create_dashboard
from pipeline.web.hot_route import HotRoute, SharedReads, takes_long

CONNECTIONS = 512  # each may hold a thread, which is there only as long as it is needed
TURNS = 16  # requests that are worked on at a time


def create_app(nexus: Runtime) -> Flask:
    """The Flask application around a runtime; starts nothing."""
    app = Flask("nexus", root_path=str(Path(__file__).parent), static_folder=None)
    app.extensions["nexus"] = nexus
    register(app, nexus)
    create_dashboard(app)
    app.add_url_rule("/", "root", lambda: redirect("/nexus/"))
    turns = Turns(HotRoute(app.wsgi_app, nexus), TURNS, takes_long)
    app.wsgi_app = SharedReads(turns, nexus)  # type: ignore[method-assign]
    return app


def worker() -> Flask:
    """What the web server's worker process serves: a started runtime, stopped again when the process ends."""
    nexus = Runtime(settings.load())
    processes.tie_to_parent()
    app = create_app(nexus)
    nexus.start()
    for line in nexus.live.overridden():
        print(f"nexus: {line}", file=sys.stderr)
    processes.at_exit(nexus.stop)
    processes.heed_signals()  # nothing but the server's wait is left to the main thread
    return app


def main() -> int:
    parser = argparse.ArgumentParser(description="Nexus: the dashboard, the routes, the jobs and the pipeline.")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--no-banner", action="store_true", help="print no addresses: who starts it has done so")
    given = parser.parse_args()
    level = given.log_level
    try:
        chosen = settings.load()
        settings.make_folders(chosen)
        logs.configure(chosen.log_dir, level)
        processes.require_free_port(chosen.nexus_host, chosen.nexus_port, "NEXUS_PORT")
        with processes.own_store(chosen):
            if not given.no_banner:
                say(banner(chosen, sys.stdout.isatty(), alone=True))
            serve(chosen, level)
    except NexusError as error:
        print(f"nexus: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    return 0


def serve(chosen: Settings, level: str) -> None:
    """Run the web server with its one worker until SIGTERM or SIGINT."""
    options: dict[str, Any] = {"factory": True, "workers": 1, "respawn_failed_workers": True, "respawn_interval": 0.2}
    Granian(
        "app:worker",
        chosen.nexus_host,
        chosen.nexus_port,
        interface=Interfaces.WSGI,
        http=HTTPModes.http1,  # a connection that says nothing is closed after 30 s; one that may be HTTP/2 never is
        blocking_threads=CONNECTIONS,
        backpressure=CONNECTIONS,
        workers_kill_timeout=25,
        log_level=LogLevels(level),
        log_enabled=False,
        **options,
    ).serve()


if __name__ == "__main__":
    sys.exit(main())
