"""Turns: requests that wait for a stream or for the partner hold up nobody, and no turn is lost or doubled by it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import app
from pipeline.concurrency.turns import Line, turn_passed_on
from pipeline.partner import MOST_QUESTIONS, Partner
from pipeline.runtime import Runtime
from pipeline.streams.awaited import Awaited
from pipeline.streams.features import Features
from pipeline.web.connections import Turns
from tests.conftest import Start, client_of
from tests.helpers import FakePartner, event, payment, until

INGEST, BRIDGE = "/api/ml/events/ingest", "/api/ml/bridge/python"
Aside = Callable[..., Future[Any]]


@pytest.fixture
def aside() -> Iterator[Aside]:
    """Runs something in another thread."""
    with ThreadPoolExecutor(40) as pool:
        yield pool.submit


def start(*_: Any) -> None:
    """Of WSGI: what takes status and headers."""


def ask(turns: Turns, path: str = "/") -> Any:
    return turns({"PATH_INFO": path}, start)


def test_request_that_waits_passes_its_turn_on_and_has_one_again_before_it_goes_on(aside):
    let_go, order = threading.Event(), list[str]()

    def work(environ: dict[str, Any], _: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/waits":
            with turn_passed_on():
                order.append("waits")
                let_go.wait(20)
            order.append("goes on")
        else:
            order.append(environ["PATH_INFO"])
            let_go.set()
            until(lambda: turns.line.waiting)  # the other one has had what it waited for, and no turn as yet
            order.append("ends")
        return []

    turns = Turns(work, 1)
    waits = aside(ask, turns, "/waits")
    until(lambda: order == ["waits"])
    ask(turns, "/other")
    waits.result(20)
    assert order == ["waits", "/other", "ends", "goes on"]


@pytest.mark.parametrize("fails", ["inside", "before", "after", "nowhere"])
def test_no_turn_is_lost_or_doubled_however_a_wait_ends(fails):
    def work(*_: Any) -> list[bytes]:
        if fails == "before":
            raise ValueError
        with turn_passed_on(), turn_passed_on():
            assert turns.line._free == 2
            if fails == "inside":
                raise ValueError
        assert turns.line._free == 1
        if fails == "after":
            raise ValueError
        return []

    turns = Turns(work, 2)
    for _ in range(3):
        if fails == "nowhere":
            ask(turns)
        else:
            with pytest.raises(ValueError, match=""):
                ask(turns)
        assert turns.line._free == 2


def test_thread_without_a_turn_passes_none_on(aside):
    def work(*_: Any) -> list[bytes]:
        aside(lambda: turn_passed_on().__enter__()).result(20)
        assert turns.line._free == 0
        return []

    turns = Turns(work, 1)
    ask(turns)
    with turn_passed_on():
        assert turns.line._free == 1


def test_turns_stay_as_many_as_they_are_while_many_take_and_pass_them_on(aside):
    line, busy, most = Line(3), list[int](), list[int]()

    def work() -> None:
        for _ in range(200):
            with line:
                for _ in range(2):
                    busy.append(1)
                    most.append(len(busy))
                    busy.pop()
                    with turn_passed_on():
                        pass

    for done in [aside(work) for _ in range(12)]:
        done.result(60)
    assert max(most) <= 3
    assert (line._free, len(line.waiting)) == (3, 0)


def test_who_waits_for_a_stream_is_woken_once_it_is_there_and_not_before(aside):
    at = [0]
    awaited = Awaited(lambda: at[0])
    waiting = {ordinal: aside(awaited.wait, ordinal, 20) for ordinal in (1, 2, 3)}
    until(lambda: len(awaited._waiting) == 3)
    for ordinal in (1, 2):
        at[0] = ordinal
        awaited.moved()
        waiting[ordinal].result(20)
        assert sorted(place[0] for place in awaited._waiting) == list(range(ordinal + 1, 4))
    awaited.wait(2, 20)
    awaited.wait(9, 0.001)
    at[0] = 3
    awaited.moved()
    waiting[3].result(20)
    assert awaited._waiting == []


# the routes, with one turn for all of them


@pytest.fixture
def slow_partner() -> Iterator[FakePartner]:
    """It answers no POST until its gate is opened."""
    fake = FakePartner(("batch", "predict", "canary"))
    fake.gate.clear()
    yield fake
    fake.close()


@pytest.fixture
def one_turn(start_nexus: Start, slow_partner: FakePartner, monkeypatch: pytest.MonkeyPatch) -> tuple[Runtime, Any]:
    """An instance whose requests have one turn between them, and its application."""
    monkeypatch.setattr(app, "TURNS", 1)
    nexus = start_nexus(PYTHON_EVENT_API_URL=slow_partner.url, PYTHON_SERVICE_TIMEOUT=20_000, HEALTH_CHECK_INTERVAL=60)
    until(lambda: "predict" in nexus.bridge.partner.supports, "the partner's capabilities")
    until(lambda: nexus.stream("inference") and nexus.stream("features"), "the streams")
    return nexus, client_of(nexus).application


def assert_others_are_answered(application: Any, waits: Future[Any]) -> None:
    for _ in range(3):
        posted = application.test_client().post(INGEST, json=[event()])
        assert (posted.status_code, posted.json["accepted"]) == (202, 1)
        assert application.test_client().get("/api/ml/settings").status_code == 200
    assert not waits.done()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/ml/predict", {"model": "fraud", "event": payment("t-1")}),
        (BRIDGE, {"action": "send_batch", "events": [event()]}),
        (BRIDGE, {"action": "hybrid_process", "events": [event()]}),
        (BRIDGE, {"action": "test_integration"}),
    ],
)
def test_request_that_waits_for_the_partner_holds_up_nobody(one_turn, slow_partner, aside, path, body):
    _, application = one_turn
    waits = aside(lambda: application.test_client().post(path, json=body))
    until(lambda: slow_partner.came, "the partner to be asked")
    assert_others_are_answered(application, waits)
    slow_partner.gate.set()
    assert waits.result(20).status_code == 200


def test_requests_that_wait_for_a_stream_hold_up_nobody(one_turn, slow_partner, aside, monkeypatch):
    nexus, application = one_turn
    slow_partner.gate.set()
    goes_on, began, process = threading.Event(), threading.Event(), Features.process

    def stalls(self: Features, *given: Any) -> Any:
        began.set()
        goes_on.wait(20)
        return process(self, *given)

    monkeypatch.setattr(Features, "process", stalls)
    waits = [
        aside(lambda: application.test_client().post(f"{INGEST}?wait=features&timeout_ms=20000", json=[event()]))
        for _ in range(20)
    ]
    until(lambda: began.is_set() and nexus.log.head().accepted >= 20, "all of them in the log")
    assert_others_are_answered(application, waits[0])
    goes_on.set()
    assert [answer.result(20).json["applied"] for answer in waits] == [True] * 20


def test_pause_holds_up_nobody(one_turn, aside):
    """Handing a model over is waited for so, a checkpoint at a time."""
    nexus, application = one_turn
    began = threading.Event()

    def pauses() -> str:
        began.set()
        nexus.pause(20)
        return ""

    application.add_url_rule("/pause", view_func=pauses)
    waits = aside(lambda: application.test_client().get("/pause"))
    began.wait(20)
    assert_others_are_answered(application, waits)
    nexus.stop()
    waits.result(20)


def test_questions_to_the_partner_leave_room_for_its_health_however_many_wait(slow_partner):
    async def body() -> None:
        partner = Partner(lambda: slow_partner.url, lambda: 20_000, lambda: 0)
        asked = [asyncio.create_task(partner.predict(b"{}")) for _ in range(3 * MOST_QUESTIONS)]
        while len(slow_partner.came) < MOST_QUESTIONS:
            await asyncio.sleep(0.001)
        assert (await partner.health()).status == "online"
        assert len(slow_partner.came) == MOST_QUESTIONS
        slow_partner.gate.set()
        await asyncio.gather(*asked, return_exceptions=True)
        await partner.close()

    asyncio.run(body())
