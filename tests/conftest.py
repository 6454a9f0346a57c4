"""Fixtures: a real Valkey, the store connection, a Nexus started in this process, and its HTTP routes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import apscheduler.schedulers.base
import apscheduler.triggers.interval
import dash
import pytest
from flask.testing import FlaskClient

import pipeline.jobs
from app import create_app
from pipeline.log import Log
from pipeline.runtime import Runtime
from pipeline.settings import Settings, load
from pipeline.store import Store
from tests.helpers import Clock, FakePartner, Valkey, free_port, until

Start = Callable[..., Runtime]


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One server for all tests; `store` empties it for each."""
    server = Valkey(tmp_path_factory.mktemp("valkey")).start()
    yield server
    server.kill()


@pytest.fixture
def store(store_server: Valkey) -> Iterator[Store]:
    """A connection to an empty store."""
    store_server.client.flushall()
    connection = Store(store_server.url)
    yield connection
    connection.close()


@pytest.fixture
def log(store: Store) -> Log:
    return Log(store)


@pytest.fixture
def scheduler_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By how many seconds, its first entry, the wall clock that jobs go by is off."""
    off = [0.0]

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(datetime.now(tz).timestamp() + off[0], tz)

    for module in (apscheduler.schedulers.base, apscheduler.triggers.interval, pipeline.jobs):
        monkeypatch.setattr(module, "datetime", Shifted)
    return off


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def partner() -> Iterator[FakePartner]:
    fake = FakePartner()
    yield fake
    fake.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Valkey]:
    """A server of the test's own, to kill and start again."""
    server = Valkey(tmp_path).start()
    yield server
    server.kill()


def quick(url: str, folder: Path, **environment: Any) -> Settings:
    """Settings for a Nexus of a test: nobody at the partner's address unless given, health asked for every second."""
    values = {
        "REDIS_URL": url,
        "NEXUS_DATA_DIR": folder / "data",
        "NEXUS_LOG_DIR": folder / "logs",
        "PYTHON_EVENT_API_URL": f"http://127.0.0.1:{free_port()}",
        "PYTHON_SERVICE_TIMEOUT": 1000,
        "HEALTH_CHECK_INTERVAL": 1,
        **environment,
    }
    return load({name: str(value) for name, value in values.items()})


def runtimes(url: str, folder: Path) -> Iterator[Start]:
    """Starts instances of Nexus in this process; stops them and puts the interpreter's settings back at the end."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    started: list[Runtime] = []

    def start(wait_for: str = "running", folder: Path = folder, **environment: Any) -> Runtime:
        nexus = Runtime(quick(url, folder, **environment))
        started.append(nexus)
        nexus.start()
        until(lambda: nexus.runner.state == wait_for, f"the pipeline {wait_for}")
        return nexus

    yield start
    for nexus in reversed(started):
        nexus.stop()
    sys.setswitchinterval(interval)
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.fixture
def start_nexus(store: Store, store_server: Valkey, tmp_path: Path) -> Iterator[Start]:
    """Starts instances of Nexus on the empty store; environment variables by keyword."""
    yield from runtimes(store_server.url, tmp_path)


@pytest.fixture
def nexus(start_nexus: Start, partner: FakePartner) -> Runtime:
    """A started Nexus whose partner is `partner`."""
    return start_nexus(PYTHON_EVENT_API_URL=partner.url)


@pytest.fixture
def client(nexus: Runtime) -> FlaskClient:
    """The routes of `nexus`."""
    return client_of(nexus)


def client_of(nexus: Runtime) -> FlaskClient:
    """The routes of an instance. Dash keeps its pages in a module global, which must be empty for each application."""
    dash.page_registry.clear()
    return create_app(nexus).test_client()
