"""The replay and its posting client, against an ingest server that misbehaves in the ways a network does."""

import csv
import gzip
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.tools import recorded, replay
from pipeline.tools.post import Outbox, Pace, Poster, Receipt, Refused, Unanswered

ROOT = Path(__file__).parents[1]
NEW_YORK = ZoneInfo("America/New_York")


class FakeNexus:
    """Takes events as Nexus does, each id once, after doing what `script` says to one request after the other.

    script: a status, ("status", headers), "drop" (close without an answer), "cut" (take the events, cut the answer off)
    """

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.stored: dict[str, dict[str, Any]] = {}
        self.bodies: list[bytes] = []
        self.largest = 10_000  # events; above: 413
        self.gate = threading.Event()  # closed, it holds every answer back
        self.gate.set()
        self.changed = threading.Condition()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with fake.changed:
                    fake.bodies.append(body)
                    step = fake.script.pop(0) if fake.script else None
                    fake.changed.notify_all()
                fake.gate.wait(30)
                status, headers, answer = fake.answer(self.path, body, step)
                payload = json.dumps(answer).encode()
                if step == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                if step == "cut":
                    self.wfile.write(payload[: len(payload) // 2])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.wfile.write(payload)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, path: str, body: bytes, step: Any) -> tuple[int, dict[str, str], dict[str, Any]]:
        if path != "/api/ml/events/ingest":
            return 404, {}, {"error": {"code": "not_found", "message": "no such route"}}
        if isinstance(step, tuple):
            return step[0], step[1], {}
        if isinstance(step, int) or step == "drop":
            return step if isinstance(step, int) else 500, {}, {}
        try:
            batch = json.loads(body)
        except ValueError:
            return 400, {}, {"error": {"code": "not_json", "message": "the body is not JSON"}}
        if len(batch["events"]) > self.largest:
            return 413, {}, {"error": {"code": "too_large", "message": "too many events"}}
        accepted = duplicates = 0
        rejected = []
        with self.changed:
            for index, event in enumerate(batch["events"]):
                user = event.get("user_id")
                if not isinstance(user, str) or not re.fullmatch(r"[^\s/\x00-\x1f\x7f]{1,128}", user):
                    rejected.append(
                        {
                            "index": index,
                            "event_id": event["event_id"],
                            "field": "user_id",
                            "code": "bad",
                            "message": "?",
                        }
                    )
                elif event["event_id"] in self.stored:
                    duplicates += 1
                else:
                    accepted += 1
                    self.stored[event["event_id"]] = event
            self.changed.notify_all()
        verdicts: dict[str, Any] = {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}
        if not accepted and not duplicates:
            return 422, {}, verdicts | {"error": {"code": "none", "message": "none", "details": {"rejected": rejected}}}
        return 202, {}, verdicts

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 20)

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def nexus() -> Iterator[FakeNexus]:
    fake = FakeNexus()
    yield fake
    fake.close()


def encoded(count: int, user: str = "u") -> list[bytes]:
    return [b'{"event_id":"e%d","event_type":"t","user_id":"%s"}' % (n, user.encode()) for n in range(count)]


def patient(nexus: FakeNexus, pauses: list[float] | None = None, **options: Any) -> Poster:
    """A poster that notes its pauses in place of making them."""

    def note(seconds: float) -> bool:
        if pauses is not None:
            pauses.append(seconds)
        return False

    return Poster(nexus.url, "replay", wait=note, **options)


def test_a_refused_batch_is_sent_again_byte_for_byte_and_not_before_retry_after(nexus: FakeNexus) -> None:
    nexus.script = [(503, {"Retry-After": "7"}), 429, 500]
    pauses: list[float] = []
    with patient(nexus, pauses) as poster:
        receipt = poster.post(encoded(10))
    assert (receipt.accepted, receipt.duplicates, receipt.rejected) == (10, 0, [])
    assert len(set(nexus.bodies)) == 1
    assert len(nexus.bodies) == 4
    assert len(pauses) == 3
    assert pauses[0] >= 7


def test_pauses_grow_to_a_ceiling_and_no_further(nexus: FakeNexus) -> None:
    nexus.script = [503] * 1_100
    pauses: list[float] = []
    with patient(nexus, pauses) as poster:
        poster.post(encoded(1))
    assert max(pauses[:1]) <= 0.2
    assert 2.5 < max(pauses) <= 5.0


def test_events_whose_answer_was_cut_off_are_stored_once(nexus: FakeNexus) -> None:
    nexus.script = ["cut", "drop"]
    with patient(nexus) as poster:
        receipt = poster.post(encoded(10))
    assert (receipt.accepted, receipt.duplicates) == (0, 10)
    assert len(nexus.stored) == 10


def test_a_batch_that_is_too_large_is_halved_and_verdicts_keep_their_places(nexus: FakeNexus) -> None:
    nexus.largest = 3
    events = encoded(10)
    events[8] = b'{"event_id":"bad","event_type":"t"}'
    with patient(nexus) as poster:
        receipt = poster.post(events)
    assert receipt.accepted == 9
    assert [(each.index, each.event_id, each.field) for each in receipt.rejected] == [(8, "bad", "user_id")]


def test_a_batch_of_which_nothing_was_taken_is_counted_as_rejected(nexus: FakeNexus) -> None:
    with patient(nexus) as poster:
        receipt = poster.post(encoded(3, user="not a user"))
    assert [(each.index, each.event_id, each.field) for each in receipt.rejected] == [
        (0, "e0", "user_id"), (1, "e1", "user_id"), (2, "e2", "user_id")]  # fmt: skip


def test_one_event_that_is_not_json_does_not_take_its_batch_with_it(nexus: FakeNexus) -> None:
    events = encoded(9)
    events[4] = b"{nonsense"
    with patient(nexus) as poster:
        receipt = poster.post(events)
    assert receipt.accepted == 8
    assert [each.index for each in receipt.rejected] == [4]
    assert "not JSON" in receipt.rejected[0].message


def test_it_gives_up_at_the_deadline(nexus: FakeNexus) -> None:
    nexus.script = [(503, {"Retry-After": "100"})]
    with Poster(nexus.url, "replay", give_up_after=50) as poster, pytest.raises(Unanswered, match="HTTP 503"):
        poster.post(encoded(1))


def test_stop_ends_a_pause(nexus: FakeNexus) -> None:
    nexus.script = [(503, {"Retry-After": "1000"})]
    with Poster(nexus.url, "replay") as poster:
        future: Future[Receipt] = Future()
        poster.submit(encoded(1), future)
        nexus.until(lambda: len(nexus.bodies) == 1)
        poster.stop()
        assert isinstance(future.exception(20), Unanswered)


def test_an_address_that_is_not_nexus_is_said_at_once(nexus: FakeNexus) -> None:
    with Poster(nexus.url + "/elsewhere", "replay") as poster, pytest.raises(Refused, match="404"):
        poster.post(encoded(1))


def test_a_change_of_state_is_told_once(nexus: FakeNexus) -> None:
    nexus.script = [503, 503, "drop", 503]
    told: list[str] = []
    with patient(nexus, on_change=told.append) as poster:
        poster.post(encoded(1))
        poster.post(encoded(2))
    assert len(told) == 2
    assert told[0] == f"Nexus does not take events at {nexus.url}/api/ml/events/ingest (HTTP 503); trying until it does"
    assert "again" in told[1]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([503, 429, 500, "drop", "cut", None]), max_size=12),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 4),
)
def test_whatever_goes_wrong_every_event_is_stored_once_and_counted_once(
    script: list[Any], count: int, largest: int, in_flight: int
) -> None:
    nexus = FakeNexus()
    nexus.script, nexus.largest = script, largest
    try:
        with patient(nexus, in_flight=in_flight) as poster:
            outbox = Outbox[int](poster, 7)
            for number, event in enumerate(encoded(count)):
                outbox.add(event, number)
            outbox.flush()
            outbox.settle(20)
            assert outbox.answered == outbox.accepted + outbox.duplicates == count
            assert not outbox.waiting
        assert len(nexus.stored) == count
    finally:
        nexus.close()


# --- the replay ------------------------------------------------------------------------------------------------------

PICKUPS = """pickup_at,lat,lon,base
2014-04-01T00:00:00,40.7637,-73.96,B02598
2014-04-01T00:02:00,40.7188,-73.9863,B02598
2014-04-01T00:02:00,40.7444,-73.9964,B02617
"""
PICKUP_FLAGS = shlex.split(
    "--event-type ride_request --time-column pickup_at --time-zone America/New_York"
    " --lat-column lat --lng-column lon --user-column base"
)
PAYMENTS = """transaction_id,timestamp,customer_id,terminal_id,amount,is_fraud
0,2018-04-01T00:00:00Z,596,3156,57.16,0
1,2018-04-03T00:00:00Z,4961,3412,146,1
2,2018-04-09T00:00:00Z,2,0012,1e2,0
3,2018-04-20T00:00:00Z,3,12,5.0,1
"""
PAYMENT_FLAGS = shlex.split(
    "--event-type payment --time-column timestamp --user-column customer_id --map data.transaction_id=transaction_id"
    " --map data.amount=amount --map data.merchant_id=terminal_id"
)


def write(folder: Path, text: str, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def run(nexus: FakeNexus, path: Path, *flags: str) -> int:
    return replay.main([str(path), "--url", nexus.url, *flags])


def test_each_pickup_becomes_a_ride_request_at_its_place_and_time(nexus: FakeNexus, tmp_path: Path) -> None:
    assert run(nexus, write(tmp_path, PICKUPS), *PICKUP_FLAGS) == 0
    first = next(iter(nexus.stored.values()))
    assert first.pop("event_id")
    assert first == {
        "event_type": "ride_request",
        "user_id": "B02598",
        "timestamp": int(datetime(2014, 4, 1, 4, tzinfo=UTC).timestamp() * 1000),
        "location": {"lat": 40.7637, "lng": -73.96},
    }
    assert json.loads(nexus.bodies[0])["source"] == "replay"


def test_a_second_run_reports_every_row_as_a_duplicate_packed_or_not(
    nexus: FakeNexus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(nexus, write(tmp_path, PICKUPS), *PICKUP_FLAGS) == 0
    assert run(nexus, write(tmp_path, PICKUPS, "same.csv.gz"), *PICKUP_FLAGS) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "read 3 rows = accepted 3 + duplicates 0 + rejected 0 + unmappable 0"
    assert second == "read 3 rows = accepted 0 + duplicates 3 + rejected 0 + unmappable 0"


def test_another_file_has_other_event_ids(nexus: FakeNexus, tmp_path: Path) -> None:
    run(nexus, write(tmp_path, PICKUPS), *PICKUP_FLAGS)
    run(nexus, write(tmp_path, PICKUPS + "2014-04-01T00:03:00,40.7,-73.9,B02617\n"), *PICKUP_FLAGS)
    assert len(nexus.stored) == 7


def test_rows_that_were_not_taken_are_told_with_number_and_reason(
    nexus: FakeNexus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        "2014-04-01T00:00:00,40.7,-73.9,B1",
        "yesterday,40.7,-73.9,B1",
        "2014-04-01T00:00:00,north,-73.9,B1",
        "2014-04-01T00:00:00,nan,-73.9,B1",
        "2014-04-01T00:00:00,40.7,-73.9,",
        "2014-04-01T00:00:00,40.7,-73.9",
        "",
        "2014-04-01T00:00:00,40.7,-73.9,two words",
        "2014-04-01T00:00:00,40.7,-73.9,B2",
    ]
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"pickup_at,lat,lon,base\n" + "\n".join(rows).encode() + b"\n2014-04-01T00:00:00,40.7,-73.9,\xff\n"
    )
    rejects = tmp_path / "rejects.ndjson"
    assert run(nexus, path, *PICKUP_FLAGS, "--rejects", str(rejects)) == 1
    out, err = capsys.readouterr()
    assert out == "read 9 rows = accepted 2 + duplicates 0 + rejected 1 + unmappable 6\n"
    reasons = {each["row"]: each["reason"] for each in map(json.loads, rejects.read_text().splitlines())}
    assert sorted(reasons) == [2, 3, 4, 5, 6, 7, 9]
    for row, word in ((2, "'pickup_at'"), (3, "'lat'"), (4, "finite"), (5, "user_id"), (6, "3 cells"), (9, "UTF-8")):
        assert word in reasons[row]
        assert f"row {row}: unmappable" in err
    assert "row 7: rejected: user_id" in err


@pytest.mark.parametrize(
    ("local", "utc"),
    [
        ("2014-07-01T12:00:00", "2014-07-01T16:00:00"),  # summer
        ("2014-12-01T12:00:00", "2014-12-01T17:00:00"),  # winter
        ("2014-11-02T01:30:00", "2014-11-02T05:30:00"),  # comes twice: the first
        ("2014-11-02T02:00:00", "2014-11-02T07:00:00"),
        ("2014-03-09T02:30:00", "2014-03-09T07:30:00"),  # does not come: by the offset before
        ("2014-03-09T03:00:00", "2014-03-09T07:00:00"),
        ("2014-11-02T01:30:00-05:00", "2014-11-02T06:30:00"),  # says itself which one
    ],
)
def test_local_times_are_right_across_the_change_of_clocks(local: str, utc: str) -> None:
    expected = datetime.fromisoformat(utc).replace(tzinfo=UTC).timestamp() * 1000
    assert recorded.time_parser("iso", NEW_YORK)(local) == expected


@given(st.datetimes(datetime(1971, 1, 1), datetime(2037, 1, 1), timezones=st.just(UTC)))
def test_any_instant_written_with_its_offset_or_as_a_number_comes_back(instant: datetime) -> None:
    exact = instant.replace(microsecond=instant.microsecond // 1000 * 1000)
    milliseconds = (exact - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert recorded.time_parser("iso", UTC)(exact.astimezone(NEW_YORK).isoformat()) == milliseconds
    assert recorded.time_parser("%d/%m/%Y %H:%M:%S.%f", UTC)(f"{exact:%d/%m/%Y %H:%M:%S.%f}") == milliseconds
    assert recorded.time_parser("ms", UTC)(str(milliseconds)) == milliseconds
    assert recorded.time_parser("s", UTC)(str(milliseconds / 1000)) == milliseconds


def test_numbers_stay_numbers_and_ids_stay_text(nexus: FakeNexus, tmp_path: Path) -> None:
    flags = ["--map", "data.raw:str=amount", "--map", "data.paid.cents:float=amount", "--map", "data.f:bool=is_fraud"]
    assert run(nexus, write(tmp_path, PAYMENTS), *PAYMENT_FLAGS, *flags) == 0
    data = [json.dumps(event["data"]) for event in nexus.stored.values()]
    assert data[1:3] == [
        '{"transaction_id": "1", "amount": 146, "merchant_id": "3412", "raw": "146", "paid": {"cents": 146.0},'
        ' "f": true}',
        '{"transaction_id": "2", "amount": 100.0, "merchant_id": "0012", "raw": "1e2", "paid": {"cents": 100.0},'
        ' "f": false}',
    ]


@given(st.integers(-(10**14), 10**14) | st.floats(allow_nan=False, allow_infinity=False).map(lambda x: round(x, 6)))
def test_a_number_is_read_as_json_reads_it(value: float) -> None:
    text = json.dumps(value)
    guessed = recorded.guess(text)
    assert guessed in (json.loads(text), text)
    assert guessed != text or "e" in text or len(text) > 15


def test_text_that_only_resembles_a_number_stays_text() -> None:
    for text in ("007", "1_000", "nan", "inf", "0x10", "1e999", "12345678901234567890", "٣", "+5", "1.", " 5", ""):
        assert recorded.guess(text) == text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["0", "1", "2", "report 1=1", "3", "report 3=1"]),
        (["--label-zeros"], ["0", "1", "report 0=0", "2", "report 1=1", "report 2=0", "3", "report 3=1"]),
    ],
)
def test_labels_come_late_each_in_its_place_in_time(
    nexus: FakeNexus, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: list[str]
) -> None:
    labels = ["--label-column", "is_fraud", "--label-delay", "7d", "--in-flight", "1", "--batch", "2", *flags]
    path = write(tmp_path, PAYMENTS)
    assert run(nexus, path, *PAYMENT_FLAGS, *labels) == 0
    told = []
    for event in nexus.stored.values():
        data = event["data"]
        report = event["event_type"] == "fraud_report"
        told.append(f"report {data['transaction_id']}={data['is_fraud']}" if report else data["transaction_id"])
    assert told == expected
    times = [event["timestamp"] for event in nexus.stored.values()]
    assert times == sorted(times)
    payment = {e["data"]["transaction_id"]: e for e in nexus.stored.values() if e["event_type"] == "payment"}["1"]
    report = next(e for e in nexus.stored.values() if e["data"] == {"transaction_id": "1", "is_fraud": 1})
    assert report["timestamp"] - payment["timestamp"] == 7 * 86_400_000
    assert report["user_id"] == payment["user_id"]
    assert run(nexus, path, *PAYMENT_FLAGS, *labels) == 0
    count = len(expected) - 4
    assert capsys.readouterr().out.splitlines()[1] == (
        f"read 4 rows + {count} late labels = accepted 0 + duplicates {4 + count} + rejected 0 + unmappable 0"
    )


def test_an_ndjson_line_passes_as_it_stands_and_gets_an_id_where_it_has_none(nexus: FakeNexus, tmp_path: Path) -> None:
    lines = [
        '{"event_type":"a","user_id":"u","event_id":"own","speed":1.50,"timestamp":1400000000000}',
        '{"event_type":"b","user_id":"u","data":{"deep":[1,{"x":null}],"word":"für"},"event_id":null}',
        "",
        '{ "event_type":"c","user_id":"u" }',
    ]
    path = write(tmp_path, "\n".join(lines), "events.ndjson.gz")
    assert run(nexus, path) == 0
    assert lines[0].encode() in nexus.bodies[0]
    own, second, third = nexus.stored.values()
    assert own["event_id"] == "own"
    assert second["data"] == {"deep": [1, {"x": None}], "word": "für"}
    assert third == {"event_id": second["event_id"].removesuffix("-2") + "-3", "event_type": "c", "user_id": "u"}
    stored = list(nexus.stored)
    assert run(nexus, path) == 0
    assert list(nexus.stored) == stored


def test_an_ndjson_line_that_is_no_event_is_unmappable(
    nexus: FakeNexus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'[1]\n{"a":\n"text"\n{"event_type":"a","user_id":"\xff"}\n{"event_type":"a","user_id":"u"}\n{}\n')
    assert run(nexus, path) == 1
    assert capsys.readouterr().out == "read 6 rows = accepted 1 + duplicates 0 + rejected 1 + unmappable 4\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--user-column x --map data.a=x --map data.a.b=y", "data.a and data.a.b"),
        ("--user-column x --map data.a.b=y --map data.a=x", "data.a and data.a.b"),
        ("--user-template {", "--user-template"),
        ("--user-template }{x}", "--user-template"),
        ("--user-template {x.real.odd}", "no column 'x.real.odd'"),
        ("--user-template {a.b}", "--user-template"),
        ("--user-template {x:{z}}", "--user-template"),
        ("--user-template {z}", "no column 'z'"),
    ],
)
def test_options_that_cannot_be_are_one_line_that_says_what_to_do(
    nexus: FakeNexus, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("x,y,a.b\n1,2,3\n")
    assert run(nexus, path, "--event-type", "e", *flags.split()) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("replay: ")]
    assert len(told) == 1
    assert said in told[0]
    assert not nexus.stored


CELLS = st.text(max_size=6) | st.sampled_from(
    ["", "1", "2014-04-01T00:00:00", "40.5", "nan", '"', "a,b", "x\ny", "\ud7ff"]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(CELLS, min_size=2, max_size=6), min_size=1, max_size=15), st.integers(1, 5))
def test_whatever_is_in_the_cells_every_row_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[list[str]], batch: int
) -> None:
    path = tmp_path / "any.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["t", "lat", "lng", "user", "extra"], *rows])
    nexus = FakeNexus()
    try:
        flags = "--event-type e --time-column t --lat-column lat --lng-column lng --user-column user --map data.x=extra"
        run(nexus, path, *flags.split(), "--batch", str(batch))
    finally:
        nexus.close()
    read, *parts = (int(number) for number in re.findall(r"\d+", capsys.readouterr().out))
    assert read == len(rows) == sum(parts)
    assert parts[0] == len(nexus.stored)


def test_user_template_start_row_and_limit_choose_and_name(nexus: FakeNexus, tmp_path: Path) -> None:
    flags = ["--event-type", "e", "--user-template", "{base}_{row}", "--start-row", "2", "--limit", "1"]
    assert run(nexus, write(tmp_path, PICKUPS), *flags) == 0
    assert [event["user_id"] for event in nexus.stored.values()] == ["B02598_2"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--event-type", "e"],
        ["--event-type", "e", "--user-column", "nobody"],
        ["--event-type", "e", "--user-template", "{nobody}"],
        ["--event-type", "e", "--user-column", "base", "--time-zone", "Mars/Olympus"],
        ["--event-type", "e", "--user-column", "base", "--map", "user=base"],
        ["--event-type", "e", "--user-column", "base", "--lat-column", "lat"],
        ["--event-type", "e", "--user-column", "base", "--speed", "0"],
        ["--event-type", "e", "--user-column", "base", "--label-column", "lat"],
    ],
)
def test_options_that_do_not_fit_end_it_with_one_line_and_code_2(
    nexus: FakeNexus, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    try:
        code: Any = run(nexus, write(tmp_path, PICKUPS), *flags)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert not nexus.bodies
    assert "replay: " in capsys.readouterr().err.splitlines()[-1]


def test_without_an_address_the_rows_go_to_where_the_settings_have_nexus_listen(
    nexus: FakeNexus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_HOST", "0.0.0.0")
    monkeypatch.setenv("NEXUS_PORT", str(nexus.server.server_port))
    assert replay.main([str(write(tmp_path, PICKUPS)), *PICKUP_FLAGS]) == 0
    assert len(nexus.stored) == 3


def test_a_wrong_setting_is_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEXUS_PORT", "four")
    assert replay.main([str(write(tmp_path, PICKUPS)), *PICKUP_FLAGS]) == 2
    assert capsys.readouterr().err == "replay: NEXUS_PORT holds 'four'; it takes a whole number from 1 to 65535\n"


def test_at_a_chosen_speed_an_event_is_sent_when_its_recorded_time_has_come(nexus: FakeNexus) -> None:
    now, sent = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Recorder(Poster):
        def submit(self, events: Any, future: Any) -> None:
            sent.append((round(now - 100.0, 3), len(events)))
            super().submit(events, future)

    class Bar:
        def update(self, count: int = 1) -> None: ...

    minutes = [0, 1, 2, 30, 15, 60]  # at 60 times the pace: 0, 1, 2, 30 s, out of order, 60 s
    items: list[recorded.Item] = [
        recorded.Event(n + 1, minute * 60_000, each)
        for n, (minute, each) in enumerate(zip(minutes, encoded(6), strict=True))
    ]
    with Recorder(nexus.url, "replay") as poster:
        replay.Replay(poster, 500, Bar()).run(iter(items), Pace(60, clock=lambda: now), sleep)
    assert sent == [(0, 1), (1, 1), (2, 1), (30, 2), (60, 1)]


def test_interrupted_it_says_how_to_resume_and_resuming_completes_the_file(nexus: FakeNexus, tmp_path: Path) -> None:
    rows = "".join(f"2014-04-01T00:00:{n % 60:02},40.7,-73.9,B{n}\n" for n in range(100))
    path = write(tmp_path, "pickup_at,lat,lon,base\n" + rows)
    nexus.script = [None, None, *[503] * 1_000]
    command = [
        sys.executable,
        "-m",
        "pipeline.tools.replay",
        str(path),
        "--url",
        nexus.url,
        "--batch",
        "10",
        *PICKUP_FLAGS,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    nexus.until(lambda: len(nexus.stored) == 20 and len(nexus.bodies) > 6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "accepted 20 " in out
    assert "not answered" in out
    resume = re.search(r"--start-row (\d+)", err)
    assert resume
    assert int(resume[1]) <= 21
    nexus.script.clear()
    assert run(nexus, path, *PICKUP_FLAGS, "--start-row", resume[1]) == 0
    assert len(nexus.stored) == 100
