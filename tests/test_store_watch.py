"""The store watch: ingest refuses from 85 % of the memory limit and below 64 MiB of free disk, and opens again by itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from flask.testing import FlaskClient

from pipeline.operations.store_watch import MIN_FREE_DISK, REFUSE_AT
from pipeline.runtime import Runtime
from tests.conftest import Start, client_of, runtimes
from tests.faults import HEALTH, INGEST, routes, settled
from tests.helpers import ROOT, Valkey, append, event, until


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Runtime]:
    """A Nexus whose store is where the embedded one would be."""
    folder = tmp_path / "data"
    folder.mkdir()
    server = Valkey(folder).start()
    starts = runtimes("", tmp_path)
    start: Start = next(starts)
    yield start()
    next(starts, None)
    server.kill()


@pytest.fixture
def start_own(own_server: Valkey, tmp_path: Path) -> Iterator[Start]:
    """Starts instances on `own_server`."""
    yield from runtimes(own_server.url, tmp_path)


def post(client: FlaskClient, count: int = 1) -> tuple[int, str | None, str | None]:
    """Status, Retry-After and error code of some events posted."""
    answer = client.post(INGEST, json={"events": [event() for _ in range(count)]})
    return answer.status_code, answer.headers.get("Retry-After"), (answer.json or {}).get("error", {}).get("code")


def limit_memory(server: Valkey, share: float) -> None:
    """Set the limit so that this share of it is used; 0: no limit."""
    used = int(server.client.info("memory")["used_memory"])
    server.client.config_set("maxmemory", int(used / share) if share else 0)


def is_full(nexus: Runtime) -> bool:
    return bool(nexus.serving.store_watch.status["status"] == "full")


def test_ingest_refuses_from_its_share_of_the_memory_limit_on_and_opens_again_by_itself(embedded: Runtime) -> None:
    client, server = client_of(embedded), Valkey(embedded.settings.data_dir)
    assert post(client, 5)[0] == 202
    limit_memory(server, REFUSE_AT + 0.05)  # the store itself would take more
    until(lambda: is_full(embedded), "the store to show as full")
    before = embedded.log.head()

    status, retry_after, code = post(client, 5)
    assert (status, code) == (503, "store_full")
    assert int(retry_after or 0) >= 1
    assert embedded.log.head() == before  # nothing of the batch was taken, not even its count
    assert "of the memory limit is used" in embedded.serving.store_watch.status["detail"]
    settled(routes(client))  # what had been accepted is processed all the same
    assert client.get("/api/ml/events").status_code == 200

    limit_memory(server, REFUSE_AT - 0.15)
    until(lambda: post(client)[0] == 202, "ingest to open again")
    assert not is_full(embedded)
    assert client.get(HEALTH).json["unexplained"] == 0


def test_refusal_says_so_where_it_is_not_events_that_fill_the_memory(embedded: Runtime) -> None:
    server = Valkey(embedded.settings.data_dir)
    limit_memory(server, REFUSE_AT + 0.05)  # an empty server's own memory, in truth
    until(lambda: is_full(embedded), "the store to show as full")
    detail = embedded.serving.store_watch.status["detail"]
    assert embedded.serving.store_watch.status["full_of"] == "memory"
    assert "Stored events are 0%, the rest is mostly users' state" in detail
    assert "STORE_MAX_MEMORY" in detail


def test_share_of_stored_events_is_not_the_one_before_the_store_filled(
    start_own: Start, own_server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus = start_own(ENABLE_PYTHON_BRIDGE="false")
    monkeypatch.setattr(nexus.serving, "refresh", lambda: None)  # which looks every second
    until(lambda: nexus.serving._footprint.of_events is not None, "the footprint of an empty store")
    for _ in range(20):
        append(nexus.log, [event(data={"note": "x" * 20_000}) for _ in range(50)], nexus.clock())
    monkeypatch.setattr("pipeline.operations.footprint._NOW_S", 0.0)
    limit_memory(own_server, REFUSE_AT + 0.05)
    nexus.serving.store_watch.look()
    assert is_full(nexus)
    assert nexus.serving.store_watch.status["detail"].endswith("on")


def test_remedy_for_the_full_memory_of_a_store_elsewhere_is_a_setting_of_its_own(
    start_own: Start, own_server: Valkey
) -> None:
    nexus = start_own(ENABLE_PYTHON_BRIDGE="false")
    limit_memory(own_server, REFUSE_AT + 0.05)
    until(lambda: is_full(nexus), "the store to show as full")
    assert nexus.serving.store_watch.status["detail"].endswith("raise the maxmemory of its server")


def test_user_of_the_store_who_may_do_little_sees_all_and_one_who_may_not_ask_for_its_state_is_told_so(
    own_server: Valkey, tmp_path: Path
) -> None:
    rights = re.findall(r"ACL SETUSER nexus on >password (.*)$", (ROOT / "docs/store.md").read_text(), re.M)[0].split()
    server = own_server.client
    server.execute_command("ACL", "SETUSER", "nexus", "on", ">password", *rights)
    starts = runtimes(f"unix://nexus:password@{own_server.socket}", tmp_path)
    start: Start = next(starts)
    nexus = start(ENABLE_PYTHON_BRIDGE="false")
    client, watch = client_of(nexus), nexus.serving.store_watch
    assert post(client, 3)[0] == 202
    settled(routes(client))
    watch.look()
    assert watch.status["status"] == "online"
    assert [row["error"] for row in nexus.scheduler.describe() if row["error"]] == []

    server.execute_command("ACL", "SETUSER", "nexus", "-info")
    until(lambda: watch.status["status"] == "unknown", "the right to be missed")
    assert post(client)[0] == 202
    health = client.get(HEALTH)
    assert (health.status_code, health.json["status"]) == (200, "degraded")
    [reason] = [text for text in health.json["reasons"] if text.startswith("how the store stands is not known: ")]
    assert reason.endswith("grant Nexus's user +info")

    server.execute_command("ACL", "SETUSER", "nexus", "+info")
    until(lambda: watch.status["status"] == "online", "the state to be seen again")
    next(starts, None)


def test_ingest_refuses_while_the_disk_is_nearly_full_and_opens_again_by_itself(
    embedded: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, real = client_of(embedded), shutil.disk_usage
    free = [MIN_FREE_DISK - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(real(folder).total, 0, free[0]))
    until(lambda: is_full(embedded), "the store to show as full")
    assert embedded.serving.store_watch.status["full_of"] == "disk"

    status, retry_after, code = post(client, 5)
    assert (status, code) == (503, "store_full")
    assert int(retry_after or 0) >= 1
    assert f"ingest refuses below {MIN_FREE_DISK >> 20}" in embedded.serving.store_watch.status["detail"]
    assert embedded.log.head().accepted == 0

    free[0] = MIN_FREE_DISK
    until(lambda: post(client)[0] == 202, "ingest to open again")
    assert not is_full(embedded)


def test_disk_of_a_store_elsewhere_is_not_this_machines(start_nexus: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1, 1, 0))
    nexus = start_nexus()
    nexus.serving.store_watch.look()

    assert not is_full(nexus)
    assert post(client_of(nexus))[0] == 202


def test_store_that_would_evict_at_its_limit_is_degraded(start_own: Start, own_server: Valkey) -> None:
    watch = start_own().serving.store_watch
    own_server.client.config_set("maxmemory-policy", "allkeys-lru")
    watch.look()
    assert (watch.status["status"], watch.status["durable"]) == ("online", True)  # it has no limit
    own_server.client.config_set("maxmemory", 1 << 30)
    watch.look()
    assert (watch.status["status"], watch.status["durable"]) == ("degraded", False)
    assert "set maxmemory-policy noeviction, not allkeys-lru" in watch.status["detail"]
    own_server.client.config_set("maxmemory-policy", "noeviction")
    watch.look()
    assert watch.status["status"] == "online"


def test_store_without_append_only_file_is_known_not_to_keep_all_even_once_it_is_away(
    start_own: Start, own_server: Valkey
) -> None:
    watch = start_own().serving.store_watch
    own_server.client.config_set("appendonly", "no")
    watch.look()
    assert watch.status["durable"] is False
    own_server.kill()
    until(lambda: watch.status["status"] == "offline", "the store away")
    assert watch.status["durable"] is False
