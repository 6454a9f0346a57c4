"""The synthetic city: what it sends obeys the wire contract, save for what it plans to send wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tools import demo
from pipeline.tools.demo import CATCH_UP, City, demand, is_weekend, run
from pipeline.tools.post import Poster
from tests.helpers import clean_environment

ROOT = Path(__file__).parents[1]
TUESDAY = datetime.fromisoformat("2024-03-05T00:00:00+08:00").timestamp()
SATURDAY = datetime.fromisoformat("2024-03-09T00:00:00+08:00").timestamp()
DAY = 86_400.0
ENVELOPE = {
    "event_id", "event_type", "user_id", "session_id", "timestamp", "app_version", "device_type", "location"
}  # fmt: skip
WORD = r"[^\s/\x00-\x1f\x7f]{1,128}"


def epoch_s(event: dict[str, Any]) -> float:
    at = event["timestamp"]
    return at / 1000 if isinstance(at, int) else datetime.fromisoformat(at).timestamp()


def data_of(event: dict[str, Any]) -> dict[str, Any]:
    """The event's data, whichever shape it came in."""
    return event["data"] if "data" in event else {key: event[key] for key in event.keys() - ENVELOPE}


def faults(event: dict[str, Any]) -> list[str]:
    """Where an event breaks the rules of section 3 of the contract."""
    found = []
    for name, pattern in (
        ("event_id", WORD),
        ("user_id", WORD),
        ("session_id", WORD),
        ("event_type", "[a-z0-9_.-]{1,64}"),
    ):
        if not re.fullmatch(pattern, str(event.get(name, ""))):
            found.append(name)
    at = event["timestamp"]
    if isinstance(at, int) and at < 10**11:
        found.append("timestamp")
    place = event.get("location", {"lat": 0, "lng": 0})
    if not (place.keys() == {"lat", "lng"} and abs(place["lat"]) <= 90 and abs(place["lng"]) <= 180):
        found.append("location")
    json.dumps(data_of(event), allow_nan=False)
    return found


@pytest.fixture(scope="module")
def tuesday() -> tuple[City, list[dict[str, Any]]]:
    city = City(seed=7, start=TUESDAY, rate=2.0)
    return city, list(city.events(TUESDAY + DAY))


@pytest.fixture(scope="module")
def whole(tuesday: tuple[City, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The day's good events, each once."""
    return list({event["event_id"]: event for event in tuesday[1] if not faults(event)}.values())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1_000), st.lists(st.floats(1, 900), min_size=1, max_size=5))
def test_a_seed_and_a_start_decide_every_event_however_often_it_is_asked(seed: int, steps: list[float]) -> None:
    whole_at_once, in_steps = (City(seed, TUESDAY, 5.0, riders=50, drivers=20) for _ in range(2))
    now = TUESDAY
    events: list[dict[str, Any]] = []
    for step in steps:
        now += step
        events += in_steps.events(now)
    assert events == list(whole_at_once.events(now))


def test_another_start_gives_other_events_of_the_same_people() -> None:
    one, two = City(3, TUESDAY), City(3, TUESDAY + 1)
    ids = [{event["event_id"] for event in city.events(TUESDAY + 120)} for city in (one, two)]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
    assert one._riders[0].home == two._riders[0].home != City(4, TUESDAY)._riders[0].home


def test_every_event_obeys_the_contract_save_for_the_planned_ones(tuesday: tuple[City, list[dict[str, Any]]]) -> None:
    city, events = tuesday
    found = Counter(fault for event in events for fault in faults(event))
    assert found.total() == sum(bool(faults(event)) for event in events) == city.planned["bad"]
    assert found.keys() == {"user_id", "timestamp", "location"}
    assert 0.001 < city.planned["bad"] / len(events) < 0.003


def test_duplicates_and_late_events_are_as_many_as_planned(tuesday: tuple[City, list[dict[str, Any]]]) -> None:
    city, events = tuesday
    good = [event for event in events if not faults(event)]
    assert len(good) - len({event["event_id"] for event in good}) == city.planned["duplicate"] > 100
    newest, late = 0.0, set()
    for event in good:
        if epoch_s(event) < newest - 1:
            late.add(event["event_id"])
        newest = max(newest, epoch_s(event))
    assert 0.8 * city.planned["late"] < len(late) <= city.planned["late"]


def test_no_event_is_ahead_of_the_clock() -> None:
    city = City(1, TUESDAY)
    for minute in range(1, 30):
        now = TUESDAY + minute * 60
        assert all(epoch_s(event) <= now for event in city.events(now))


def test_both_shapes_and_both_kinds_of_timestamp_occur(whole: list[dict[str, Any]]) -> None:
    shapes = Counter(("data" in event, type(event["timestamp"]), event["device_type"]) for event in whole)
    assert shapes.keys() == {(False, int, "android"), (True, str, "ios")}
    assert min(shapes.values()) > len(whole) / 10


def test_rides_are_coherent(tuesday: tuple[City, list[dict[str, Any]]], whole: list[dict[str, Any]]) -> None:
    rides = defaultdict(list)
    # A cancellation for want of a driver comes in the same instant as the last driver's answer.
    for event in sorted(whole, key=lambda each: (epoch_s(each), each["event_type"] == "ride_cancelled")):
        if "request_id" in data_of(event):
            rides[data_of(event)["request_id"]].append(event)
    ended: Counter[str] = Counter()
    settled = TUESDAY + DAY - 7_200  # later ones may still be on their way
    for ride in rides.values():
        kinds = [event["event_type"] for event in ride]
        if epoch_s(ride[0]) > settled:
            continue
        request = ride[0]
        assert kinds[0] == "ride_request"
        assert kinds.count("ride_request") == 1
        responses = [data_of(event) for event in ride if event["event_type"] == "ride_request_response"]
        accepted = [each["response"] == "accepted" for each in responses]
        assert not any(accepted[:-1])
        assert all(0 < each["response_time"] <= 15 for each in responses)
        end = kinds[1 + len(responses)]
        ended[end] += 1
        assert kinds[1 + len(responses) :] in (["ride_cancelled"], ["ride_completed"], ["ride_completed", "payment"])
        driver = next((e["user_id"] for e in ride if data_of(e).get("response") == "accepted"), None)
        if end == "ride_completed":
            done = data_of(ride[1 + len(responses)])
            assert done["driver_id"] == driver
            assert done["fare"] > 0
            assert done["distance_km"] > 0
            for paid in (data_of(event) for event in ride if event["event_type"] == "payment"):
                assert paid["amount"] == done["fare"]
                assert paid["merchant_id"] == driver
        else:
            assert (data_of(ride[-1])["cancelled_by"] == "system") == (driver is None)
        riders = {(e["user_id"], e["session_id"]) for e in ride if e["event_type"] != "ride_request_response"}
        assert len(riders) == 1
        assert not request["user_id"].startswith("driver")
    assert ended["ride_completed"] > 5 * ended["ride_cancelled"] > 0


def test_a_rider_and_a_driver_are_in_one_ride_at_a_time(whole: list[dict[str, Any]]) -> None:
    spans = defaultdict(list)
    for event in whole:
        if event["event_type"] in ("ride_request", "ride_completed", "ride_cancelled"):
            spans[event["user_id"], data_of(event)["request_id"]].append(epoch_s(event))
        if "driver_id" in data_of(event) and event["event_type"] == "ride_completed":
            spans[data_of(event)["driver_id"], data_of(event)["request_id"]].append(epoch_s(event))
        if data_of(event).get("response") == "accepted":
            spans[event["user_id"], data_of(event)["request_id"]].append(epoch_s(event))
    by_person = defaultdict(list)
    for (person, _), times in spans.items():
        by_person[person].append((min(times), max(times)))
    assert len(by_person) > 1_000
    for rides in by_person.values():
        rides.sort()
        assert all(one[1] <= other[0] for one, other in pairwise(rides))


def test_half_a_percent_of_payments_are_fraud_larger_and_labelled_late() -> None:
    city = City(seed=2, start=TUESDAY + 6 * 3_600, rate=20.0)
    kinds: dict[str, dict[str, dict[str, Any]]] = {"payment": {}, "fraud_report": {}}
    for event in city.events(TUESDAY + 10 * 3_600):
        if event["event_type"] in kinds and not faults(event):
            kinds[event["event_type"]][data_of(event)["transaction_id"]] = event
    payments, labels = kinds.values()
    fraud = {one for one, label in labels.items() if data_of(label)["is_fraud"] == 1}
    assert 0.003 < city.planned["fraud"] / city.planned["payment"] < 0.008
    assert 0.5 * city.planned["fraud"] < len(fraud) <= city.planned["fraud"]
    assert len(labels) > 2 * len(fraud)  # honest ones are reported on too
    delays = []
    for one, label in labels.items():
        if one in payments:
            assert label["user_id"] == payments[one]["user_id"]
            delays.append(epoch_s(label) - epoch_s(payments[one]))
    assert min(delays) >= 295
    assert max(delays) <= 43_200 + 1

    def mean(chosen: list[str]) -> float:
        return sum(data_of(payments[one])["amount"] for one in chosen) / len(chosen)

    assert mean([one for one in payments if one in fraud]) > 2 * mean([one for one in payments if one not in fraud])


def test_the_rate_is_a_mean_over_the_day_with_peaks_at_the_commute(whole: list[dict[str, Any]]) -> None:
    assert 1.8 < len(whole) / DAY < 2.2
    by_hour = Counter(int((epoch_s(event) - TUESDAY) // 3_600) for event in whole)
    assert by_hour[8] > 5 * by_hour[3]
    assert by_hour[18] > 1.5 * by_hour[14]


def test_a_day_has_the_demand_of_one_day_on_average() -> None:
    for midnight, weekend in ((TUESDAY, False), (SATURDAY, True), (SATURDAY + DAY, True), (SATURDAY + 2 * DAY, False)):
        assert is_weekend(midnight) == is_weekend(midnight + DAY - 1) == weekend
        assert sum(demand(midnight + minute * 60) for minute in range(1_440)) / 1_440 == pytest.approx(1, abs=0.01)


# --- posting ---------------------------------------------------------------------------------------------------------


class Sink:
    """Takes every event, unless `away`: then it answers 503."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.sources: set[str] = set()
        self.away = False
        self.refusals = 0
        self.changed = threading.Condition()
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with sink.changed:
                    away = sink.away
                    if away:
                        sink.refusals += 1
                    else:
                        sink.events += batch["events"]
                        sink.sources.add(batch["source"])
                    sink.changed.notify_all()
                answer = {"accepted": len(batch["events"]), "duplicates": 0, "rejected": []}
                payload = json.dumps(answer).encode()
                self.send_response(503 if away else 202)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def until(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 20)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def sink() -> Any:
    server = Sink()
    yield server
    server.close()


def test_without_an_address_it_posts_to_where_the_settings_have_nexus_listen(sink: Sink) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.tools.demo", "--history", "2m"],
        cwd=ROOT,
        env=clean_environment(PYTHONPATH=str(ROOT), NEXUS_HOST="0.0.0.0", NEXUS_PORT=str(sink.server.server_port)),
    )
    sink.until(lambda: sink.events)
    process.terminate()
    assert process.wait(20) == 0


def test_a_wrong_setting_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEXUS_PORT", "four")
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "demo: NEXUS_PORT holds 'four'; it takes a whole number from 1 to 65535\n"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_outlives_an_absence_of_nexus_says_so_once_and_stops_cleanly(sink: Sink, stop: signal.Signals) -> None:
    sink.away = True
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.tools.demo", "--url", sink.url, "--rate", "200", "--history", "2m"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    sink.until(lambda: sink.refusals >= 3)
    sink.away = False
    sink.until(lambda: len(sink.events) > 2_000)
    process.send_signal(stop)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 0, said
    assert sink.sources == {"simulator"}
    assert said.count("does not take events") == said.count("answers again") == 1
    assert "Traceback" not in said
    posted = re.search(r"accepted ([\d,]+)", said)
    assert posted
    assert int(posted[1].replace(",", "")) == len(sink.events), said


class Stop(Exception):
    """Ends a run from within."""


def run_at(sink: Sink, city: City, times: list[float], speedup: float | None = None) -> tuple[list[int], list[str]]:
    """Run with a clock that shows these times one after the other; how many events had been sent by each."""
    said: list[str] = []
    counts: list[int] = []
    clock = iter(times)

    def tick() -> float:
        for now in clock:
            return now
        raise Stop

    with Poster(sink.url, "simulator", in_flight=1) as poster, pytest.raises(Stop):
        run(city, poster, said.append, speedup, clock=tick, sleep=lambda seconds: counts.append(len(sink.events)))
    return counts, said


def test_history_comes_at_once_and_then_life_goes_on(sink: Sink) -> None:
    city = City(1, TUESDAY, rate=5.0)
    run_at(sink, city, [TUESDAY + 3_600, TUESDAY + 3_600, TUESDAY + 3_660])
    expected = [event["event_id"] for event in City(1, TUESDAY, rate=5.0).events(TUESDAY + 3_660)]
    assert [event["event_id"] for event in sink.events] == expected


def test_history_at_a_multiple_of_the_pace_never_passes_the_present(sink: Sink) -> None:
    noon = TUESDAY + 12 * 3_600
    city = City(1, noon - 3_600, rate=5.0)
    run_at(sink, city, [noon, noon + 10, noon + 20], speedup=60)
    assert city.now == noon - 3_600 + 20 * 60
    run_at(sink, city, [noon + 20, noon + 1_000], speedup=60)
    assert city.now == noon + 1_000


def test_after_a_long_absence_only_the_last_hour_is_made_up_for_and_that_is_said(sink: Sink) -> None:
    city = City(1, TUESDAY, rate=5.0)
    later = TUESDAY + 5 * 3_600
    _, said = run_at(sink, city, [TUESDAY + 60, TUESDAY + 60, later])
    again = City(1, TUESDAY, rate=5.0)
    before, let_go, recent = (list(again.events(until)) for until in (TUESDAY + 60, later - CATCH_UP, later))
    assert f"{len(let_go):,} events" in said[0]
    assert [e["event_id"] for e in sink.events] == [e["event_id"] for e in before + recent]
