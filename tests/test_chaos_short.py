"""The chaos suite's short form: each part killed and stopped under load, and nothing is lost, doubled, unexplained."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.audit import Findings, Watch, audit, drained
from chaos.clients import Client, Ledger
from chaos.faults import LEASE_S, plan
from chaos.run import run
from chaos.system import TARGETS, System


def test_kills_and_stops_of_every_part_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, seed=3, kills=6, events=4_000, seconds=15, past_lease=False)

    assert result.mismatches == 0, result.text()
    assert result.faults["kills"] == 6
    assert result.faults["stops"] == 3
    assert result.acknowledged == result.sent == result.findings.checked["stored events"] == 4_000
    assert result.looks > 20


def test_a_plan_has_each_kind_of_fault_and_follows_from_its_seed() -> None:
    faults = plan(seed=5, kills=200, seconds=1200, past_lease=True)

    assert faults == plan(seed=5, kills=200, seconds=1200, past_lease=True)
    assert faults != plan(seed=6, kills=200, seconds=1200, past_lease=True)
    assert sum(fault.kills for fault in faults) == 200
    assert {fault.target for fault in faults if fault.kills} == set(TARGETS)
    assert {fault.target for fault in faults if not fault.kills} == {"worker", "service", "store"}
    assert any(fault.target == "worker" and fault.hold_s > LEASE_S for fault in faults)
    assert 1000 < sum(fault.wait_s + fault.hold_s for fault in faults) < 1400


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, Ledger]]:
    """A system that took some load undisturbed, and the ledger of it."""
    system, ledger = System(tmp_path_factory.mktemp("chaos")), Ledger()
    system.start()
    try:
        client = Client(system, ledger, number=0, seed=1, events=600, share=lambda: 1.0)
        client.start()
        client.join()
        system.wait(lambda: drained(system), 30, "the streams to drain")
        yield system, ledger
    finally:
        system.stop()


def copied(ledger: Ledger) -> Ledger:
    return Ledger(sent={i: dict(e) for i, e in ledger.sent.items()}, acknowledged=set(ledger.acknowledged))


def test_the_audit_finds_nothing_wrong_where_nothing_is(audited: tuple[System, Ledger]) -> None:
    found = audit(*audited)

    assert found.mismatches == 0, found.lines
    assert found.checked["stored events"] == 600


def test_the_audit_finds_an_acknowledged_event_that_is_lost(audited: tuple[System, Ledger]) -> None:
    ledger = copied(audited[1])
    ledger.acknowledged.add("never-stored")

    assert audit(audited[0], ledger).lines == ["never-stored was acknowledged and is lost"]


def test_the_audit_finds_an_event_that_was_never_sent(audited: tuple[System, Ledger]) -> None:
    ledger = copied(audited[1])
    del ledger.sent["c0-17"]

    assert audit(audited[0], ledger).lines == ["c0-17 is stored and was never sent"]


def test_the_audit_finds_an_event_stored_otherwise_than_sent(audited: tuple[System, Ledger]) -> None:
    ledger = copied(audited[1])
    ledger.sent["c0-17"]["user_id"] = "somebody-else"

    assert audit(audited[0], ledger).mismatches == 1


class Tampered(System):
    """A system whose answers go through a test's hand."""

    def __init__(self, real: System, path: str, change: Any) -> None:
        self.__dict__.update(real.__dict__)
        self._path, self._change = path, change

    def get(self, path: str, **options: Any) -> tuple[int, Any]:
        status, body = super().get(path, **options)
        if path.startswith(self._path):
            self._change(body)
        return status, body


def add_one_of_a_type(body: Any) -> None:
    if body["series"] and body["series"][0]["points"]:
        body["series"][0]["points"][0][1] += 1


def add_one_event_of_a_user(body: Any) -> None:
    body["combined_features"]["typescript_features"]["event_count_24h"] += 1


def add_one_at_the_service(body: Any) -> None:
    body["events"]["accepted"] += 1


def repeat_an_event(body: Any) -> None:
    body["events"] = [*body["events"], body["events"][0]]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/api/ml/aggregates?by=type&step=1m", add_one_of_a_type),
        ("/api/ml/bridge/python?action=features&user_id=driver0-3", add_one_event_of_a_user),
        ("/health", add_one_at_the_service),
        ("/api/ml/events?", repeat_an_event),
    ],
)
def test_the_audit_finds_one_event_too_many(audited: tuple[System, Ledger], path: str, change: Any) -> None:
    found: Findings = audit(Tampered(audited[0], path, change), audited[1])

    assert found.mismatches == 1, found.lines


def test_the_watch_sees_an_unexplained_event_at_once(audited: tuple[System, Ledger]) -> None:
    seen = threading.Event()

    def hide_one(body: Any) -> None:
        body["unexplained"] = 1
        seen.set()

    watch = Watch(Tampered(audited[0], "/api/ml/events/ingest?check=health", hide_one))
    watch.start()
    assert seen.wait(10)
    watch.stop()

    assert watch.unexplained
