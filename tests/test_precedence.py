"""Who has somebody waiting goes first."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from pipeline.concurrency.precedence import Precedence
from pipeline.log import Log, Request, Taken
from pipeline.runtime import Runtime
from pipeline.streams import group
from tests.conftest import Start, client_of
from tests.helpers import until


def test_it_is_taken_until_the_last_has_left() -> None:
    precedence = Precedence()

    def come_and_go() -> None:
        for _ in range(2_000):
            with precedence:
                assert precedence.taken

    with precedence:
        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert precedence.taken
    assert not precedence.taken


@pytest.fixture
def nexus(start_nexus: Start) -> Runtime:
    return start_nexus(ENABLE_PYTHON_BRIDGE="false")


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_has_precedence_while_it_is_worked_on_however_it_ends(
    nexus: Runtime, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    seen: list[bool] = []
    accept = Log.accept

    def looks(log: Log, requests: Sequence[Request], now: int) -> list[Taken]:
        if [posted.event_id for request in requests for posted in request.events] == ["a"]:  # no canary
            seen.append(nexus.precedence.taken)
            if fails:
                raise RuntimeError
        return accept(log, requests, now)

    monkeypatch.setattr(Log, "accept", looks)
    answer = client_of(nexus).post("/api/ml/events/ingest", json=[_event("a")])
    assert answer.status_code == (500 if fails else 202)
    assert seen == [True]
    until(lambda: not nexus.precedence.taken, "the end of all short work")


def test_who_reads_events_or_aggregates_finds_what_the_features_have_however_much_others_are_given_way_to(
    nexus: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(nexus)
    with nexus.precedence:  # all the time, and for ever
        monkeypatch.setattr(group, "GIVE_WAY_S", 1e9)
        for name in ("a", "b"):
            posted = client.post("/api/ml/events/ingest?wait=features", json=[_event(name)])
            assert posted.json["applied"]
            assert name in {found["event_id"] for found in client.get("/api/ml/events?user_id=u").json["events"]}
        assert client.post("/api/ml/events/ingest?wait=features", json=[_event("c")]).json["applied"]
        [row] = client.get("/api/ml/aggregates").json["series"]
        assert sum(n for _, n in row["points"]) == 3


def _event(name: str) -> dict[str, str]:
    return {"event_id": name, "event_type": "ping", "user_id": "u"}
