"""Joint work: what waits is done together, each is told its own, and nobody waits for what has come to a stand."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app import create_app
from pipeline.concurrency.joint import Joint
from pipeline.concurrency.precedence import Precedence
from pipeline.errors import StoreUnavailable
from pipeline.routes import features_response, features_responses
from pipeline.web.connections import Turns
from pipeline.web.hot_route import SharedReads
from tests.helpers import event, until


class Held:
    """Work that is held until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.done: list[list[int]] = []

    def __call__(self, some: list[int]) -> list[int]:
        self.done.append(some)
        self.let_go.wait(20)
        if any(n < 0 for n in some):
            raise StoreUnavailable("away")
        return [n * 10 for n in some]


@pytest.fixture
def aside() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(20) as pool:
        yield pool.submit


def first_and(aside: Callable[..., Future[Any]], joint: Joint[int, int], held: Held, *later: int) -> list[Future[Any]]:
    """Ask 1, and the later ones while it is under way."""
    asked = [aside(joint.ask, 1)]
    until(lambda: held.done)
    for n in later:
        asked.append(aside(joint.ask, n))
        until(lambda: len(joint.waiting) == len(asked) - 1)
    return asked


def test_requests_that_come_while_one_is_at_work_are_done_together_and_each_is_told_its_own(aside):
    joint = Joint(held := Held(), 16)
    asked = first_and(aside, joint, held, 2, 3, 4)
    held.let_go.set()
    assert [one.result(20) for one in asked] == [10, 20, 30, 40]
    assert held.done == [[1], [2, 3, 4]]
    assert joint.ask(5) == 50


def test_as_many_are_done_together_as_their_weights_allow_and_one_that_is_heavier_alone(aside):
    joint = Joint(held := Held(), 10, weight=lambda n: n)
    asked = first_and(aside, joint, held, 5, 5, 30, 3)
    held.let_go.set()
    assert [one.result(20) for one in asked] == [10, 50, 50, 300, 30]
    assert held.done == [[1], [5, 5], [30], [3]]


def test_failure_is_told_to_all_that_were_done_together_and_the_next_go_on(aside):
    joint = Joint(held := Held(), 2)
    asked = first_and(aside, joint, held, -2, 3, 4)
    held.let_go.set()
    assert [type(one.exception(20)) for one in asked] == [type(None), StoreUnavailable, StoreUnavailable, type(None)]
    assert asked[3].result() == 40


def test_who_waits_in_vain_gives_up_and_neither_its_place_nor_the_lead_is_lost(aside):
    joint = Joint(held := Held(), 16)
    asked = first_and(aside, joint, held, 2)
    with pytest.raises(TimeoutError):
        joint.ask(3, patience_s=0.01)
    assert len(joint.waiting) == 1
    held.let_go.set()
    assert [one.result(20) for one in asked] == [10, 20]
    assert held.done == [[1], [2]]
    assert joint.ask(4) == 40


def test_who_is_called_in_the_moment_in_which_patience_ends_is_done_or_gives_up_and_the_next_go_on(aside):
    joint = Joint[int, int](lambda some: some, 16)
    for _ in range(300):
        asked = [aside(joint.ask, n, 0.0) for n in range(4)]
        for n, one in enumerate(asked):
            assert one.exception(20) is not None or one.result() == n
        assert joint.ask(9) == 9
    assert not joint.waiting


class NoStore:
    """A runtime whose store stands still until it is let go, and is away then."""

    def __init__(self) -> None:
        self.precedence = Precedence()
        self.features = self
        self.let_go = threading.Event()
        self.clock = lambda: 0
        self.asked: list[Any] = []

    def combine_each(self, asked: Any) -> Any:
        self.asked.append(asked)
        self.let_go.wait(20)
        raise StoreUnavailable("away")


def read(user: str, query: str = "") -> dict[str, Any]:
    path = f"/api/ml/features/{user}"
    return {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": query}


def test_reads_that_stand_still_with_the_store_do_not_hold_up_the_next_ones(aside, monkeypatch):
    monkeypatch.setattr("pipeline.web.hot_route.PATIENCE_S", 0.01)
    nexus: Any = NoStore()
    reads = SharedReads(lambda environ, start: [b"on its own"], nexus)
    first = aside(reads, read("u1"), lambda *_: None)
    until(lambda: nexus.asked)
    assert reads(read("u2"), lambda *_: None) == [b"on its own"]
    nexus.let_go.set()
    [body] = first.result(20)
    assert b"store_unavailable" in body


@pytest.mark.parametrize("query", ["", "names=trips_7d"])
def test_reads_take_no_turn_and_are_answered_while_every_turn_is_taken(aside, query):
    held, nexus = threading.Event(), NoStore()
    nexus.let_go.set()
    app = Turns(lambda environ, start: [str(held.wait(20)).encode()], 1)
    reads = SharedReads(app, nexus)  # type: ignore[arg-type]
    busy = aside(reads, {"REQUEST_METHOD": "GET", "PATH_INFO": "/busy"}, lambda *_: None)
    until(lambda: app.line._free == 0)
    [body] = reads(read("u1", query), lambda *_: None)
    assert b"store_unavailable" in body
    assert nexus.asked == [[("u1", frozenset({"trips_7d"}) if query else None)]]
    held.set()
    busy.result(20)


def test_reads_that_are_answered_together_are_answered_as_each_is_alone(start_nexus):
    nexus = start_nexus()
    client = create_app(nexus).test_client()
    for user in ("u1", "u2"):
        assert client.post("/api/ml/events/ingest?wait=features", json=[event(user=user)]).json["applied"]
    asked = [
        ("u1", read("u1")),
        ("nobody", read("nobody")),
        ("u2", read("u2", "names=event_count_24h")),
        ("u1", read("u1", "names=x")),
    ]
    for (user, environ), (status, _, body) in zip(asked, features_responses(nexus, asked), strict=True):
        alone_status, _, alone = features_response(nexus, environ, user)
        one, other = msgspec.json.decode(body), msgspec.json.decode(alone)
        assert (status, one.get("features"), one.get("error")) == (
            alone_status,
            other.get("features"),
            other.get("error"),
        )
    assert [status for status, _, _ in features_responses(nexus, asked)] == [200, 404, 200, 200]


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/api/ml/features/u1", "as_of=2026-01-01T00:00:00Z"),
        ("GET", "/api/ml/features/u1", "known_at=2026-01-01T00:00:00Z"),
        ("GET", "/api/ml/features/u1", "entity=merchant"),
        ("GET", "/api/ml/features/u1", "as%5Fof=2026-01-01T00:00:00Z"),
        ("GET", "/api/ml/features/u1", "names=x&%6Bnown_at=2026-01-01T00:00:00Z"),
        ("GET", "/api/ml/features/u1", "%65ntity=merchant"),
        ("GET", "/api/ml/features/u1/more", ""),
        ("POST", "/api/ml/features", ""),
        ("POST", "/api/ml/events/ingest", ""),
    ],
)
def test_only_reads_of_one_users_features_of_now_are_shared(method, path, query):
    reads = SharedReads(lambda environ, start: [b"on its own"], NoStore())  # type: ignore[arg-type]
    asked = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
    assert reads(asked, lambda *_: None) == [b"on its own"]


def test_what_was_asked_in_vain_is_gone_without_the_cycle_collector():
    def work(some: list[Held]) -> list[int]:
        raise StoreUnavailable("away")

    joint: Joint[Held, int] = Joint(work, 16)
    asked = Held()
    left = weakref.ref(asked)
    gc.disable()
    try:
        with contextlib.suppress(StoreUnavailable):
            joint.ask(asked)
        del asked
        assert left() is None
    finally:
        gc.enable()


def test_reads_that_failed_are_gone_without_the_cycle_collector():
    class Environ(dict):
        """One that a reference can be held to."""

    def away(asked: Any) -> Any:
        raise StoreUnavailable("away")

    nexus: Any = SimpleNamespace(clock=lambda: 0, features=SimpleNamespace(combine_each=away))
    environ = Environ(QUERY_STRING="")
    left = weakref.ref(environ)
    gc.disable()
    try:
        assert [status for status, _, _ in features_responses(nexus, [("user_1", environ)])] == [503]
        del environ
        assert left() is None
    finally:
        gc.enable()
