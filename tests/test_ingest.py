"""Ingest: a posted body in any of its forms, verdicts per event, and requests that go to the log together."""

from __future__ import annotations

import codecs
import gzip
import json
import threading
import time
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import events
from pipeline.errors import BadRequest, NexusError, StoreFull, StoreUnavailable, TooLarge
from pipeline.ingest import Ingest, Verdicts, judge, judge_plain
from pipeline.log import Log
from pipeline.store import Store
from pipeline.web import posted as module
from pipeline.web.posted import MAX_BODY_BYTES, MAX_EVENTS, read_body, read_plain
from tests.helpers import NOON, event, frames


@pytest.fixture
def ingest(log: Log) -> Ingest:
    return Ingest(log, lambda: NOON, lambda: None, lambda end, timeout_s: True)


def post(ingest: Ingest, posted: Any, kind: str = "application/json", encoding: str = "", **query: str) -> Any:
    body = posted if isinstance(posted, bytes) else json.dumps(posted).encode()
    return ingest.post(body, kind, encoding, query)


def bodies(log: Log) -> list[dict[str, Any]]:
    return [json.loads(record[8:]) for frame in frames(log) for record in frame.records]


def test_batch_with_source_is_taken_and_answered_by_position(ingest, log):
    status, answer = post(ingest, {"events": [event(event_id="a"), event(event_id="b")], "source": "driver_app"})
    assert status == 202
    assert answer == {"accepted": 2, "duplicates": 0, "rejected": [], "event_ids": ["a", "b"]}
    assert [frame.source for frame in frames(log)] == ["driver_app"]


@pytest.mark.parametrize(
    ("posted", "kind"),
    [
        ([event(event_id="a")], "application/json"),
        (event(event_id="a"), "application/json"),
        (event(event_id="a"), ""),
        ({"events": [event(event_id="a")]}, "application/json; charset=utf-8"),
        (b'\n{"event_id":"a","event_type":"t","user_id":"u"}\r\n\n', "application/x-ndjson"),
        (b'{"event_id":"a","event_type":"t","user_id":"u"}', "Application/X-NDJSON; charset=utf-8"),
    ],
)
def test_every_form_of_a_body_brings_its_event(ingest, log, posted, kind):
    assert post(ingest, posted, kind)[1]["event_ids"] == ["a"]
    assert [body["event_id"] for body in bodies(log)] == ["a"]


@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson"])
def test_byte_order_mark_before_a_body_is_no_part_of_it(ingest, kind):
    body = codecs.BOM_UTF8 + b'{"event_id":"a","event_type":"t","user_id":"u"}'
    assert post(ingest, body, kind)[1]["event_ids"] == ["a"]
    assert post(ingest, gzip.compress(body), kind, encoding="gzip")[1] == {
        "accepted": 0, "duplicates": 1, "rejected": [], "event_ids": ["a"],
    }  # fmt: skip


def test_gzip_is_unpacked(ingest):
    status, answer = post(ingest, gzip.compress(json.dumps([event(event_id="a")]).encode()), encoding="gzip")
    assert (status, answer["accepted"]) == (202, 1)


def test_one_bad_event_never_spoils_its_batch(ingest, log):
    posted = [event(event_id="a"), {"event_id": "bad", "event_type": "UPPER", "user_id": "u"}, 7, event(event_id="d")]
    status, answer = post(ingest, posted)
    assert status == 202
    assert (answer["accepted"], answer["event_ids"]) == (2, ["a", None, None, "d"])
    first, second = answer["rejected"]
    assert first.keys() == {"index", "event_id", "field", "code", "message"}
    assert (first["index"], first["event_id"], first["field"]) == (1, "bad", "event_type")
    assert (second["index"], second["event_id"]) == (2, None)
    assert [body["event_id"] for body in bodies(log)] == ["a", "d"]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b'"\\ud800"', "not_unicode"),
        (b'"\xff"', "not_unicode"),
        (b"1e999", "not_finite"),
        (b"9" * 5000, "not_finite"),
        (b"[" * 3000 + b"]" * 3000, "too_deep"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "too_deep"),
    ],
)
def test_event_that_cannot_be_decoded_never_spoils_the_others(ingest, log, value, code):
    good = [b'{"event_id":"a","event_type":"t","user_id":"u"}', b'{"event_id":"d","event_type":"t","user_id":"u"}']
    bad = b'{"event_id":"b","event_type":"t","user_id":"u","x":' + value + b"}"
    batch = b",".join([good[0], bad, good[1]])
    for posted in (b"[" + batch + b"]", b'{"source":"app","events":[' + batch + b"]}"):
        status, answer = post(ingest, posted)
        assert (status, answer["event_ids"]) == (202, ["a", None, "d"])
        assert [(r["index"], r["code"]) for r in answer["rejected"]] == [(1, code)]
    assert post(ingest, bad)[0] == 422


@pytest.mark.parametrize("key", [b"event_id", b"event_type", b"\\ud800", b"data"])
def test_text_that_is_no_unicode_is_named_in_an_answer_that_can_be_written(ingest, key):
    answer = post(ingest, b'[{"event_type":"t","user_id":"u","' + key + b'":"\\ud800"}]')[1]
    assert answer["rejected"][0]["code"] == "not_unicode"
    assert answer["rejected"][0]["message"] == "texts are valid Unicode; one in this event is not"
    msgspec.json.encode(answer)


def test_bad_line_of_ndjson_never_spoils_the_others(ingest):
    good = [b'{"event_id":"a","event_type":"t","user_id":"u"}', b'{"event_id":"d","event_type":"t","user_id":"u"}']
    lines = b"\n".join([good[0], b'{"event_id": ', b"\xff\xfe", good[1]])
    status, answer = post(ingest, lines, "application/x-ndjson")
    assert (status, answer["event_ids"]) == (202, ["a", None, None, "d"])
    assert [r["code"] for r in answer["rejected"]] == ["not_json", "not_json"]


@pytest.mark.parametrize("last", ["", "\n{"])
def test_line_is_one_event_whatever_the_others_are(ingest, last):
    one, two, three = (LINE.replace("{", f'{{"event_id":"{name}",') for name in "abc")
    lines = "\n".join([one + two, one.replace(",", ",\n", 1), three]) + last
    _, answer = post(ingest, lines.encode(), "application/x-ndjson")
    assert answer["event_ids"][:4] == [None, None, None, "c"]
    assert [(r["index"], r["code"]) for r in answer["rejected"]][:3] == [(n, "not_json") for n in range(3)]


def test_duplicates_alone_are_202_and_rejections_alone_are_422(ingest, log):
    post(ingest, [event(event_id="a")])
    assert post(ingest, [event(event_id="a")]) == (
        202,
        {"accepted": 0, "duplicates": 1, "rejected": [], "event_ids": ["a"]},
    )
    status, answer = post(ingest, [{"user_id": "u"}])
    assert (status, answer["accepted"], answer["duplicates"]) == (422, 0, 0)
    assert answer["error"].keys() == {"code", "message", "details"}
    assert log.head().rejected == 1


@pytest.mark.parametrize("posted", [[], {"events": []}, b""])
def test_no_event_at_all_is_refused(ingest, posted):
    if posted == b"":
        with pytest.raises(BadRequest):
            post(ingest, posted)
    else:
        assert post(ingest, posted)[0] == 422


@pytest.mark.parametrize(
    "posted",
    [
        b"{",
        b"not json",
        b"[NaN]",
        b"[1e999}",
        b"\xff\xfe",
        b"[" * 10_000,
        b'["\\ud800",]',
        "text",
        7,
        None,
        {"events": {}},
        {"events": None},
        {"source": "x"},
    ],
)
def test_what_is_no_events_is_a_bad_request(ingest, log, posted):
    with pytest.raises(BadRequest):
        post(ingest, posted)
    assert frames(log) == []


@pytest.mark.parametrize("ends", [b"", b'"', b"\\"])
def test_string_full_of_escapes_in_what_is_nested_without_end_is_read_once(ingest, ends):
    """Read again from each of its escapes it took 20 s, all of them with the interpreter's lock held."""
    began = time.thread_time()
    with pytest.raises(BadRequest):
        post(ingest, b"[" * 3000 + b'"' + b'\\"' * 30_000 + ends)
    assert time.thread_time() - began < 5


@pytest.mark.parametrize("inside", [b"[", b"[]", b"[],", b'"",', b"[x"])
def test_brackets_without_end_are_given_up_early(inside):
    """Of a gzip of 5 KB each bracket was looked at, some seconds of the interpreter."""
    looked = 0

    class Text(str):
        def __getitem__(self, at: Any) -> Any:
            nonlocal looked
            looked += isinstance(at, int)
            return str.__getitem__(self, at)

    text = Text("[" * 3000 + (inside * (MAX_BODY_BYTES // len(inside))).decode())
    assert module._flattened(text) == ""
    assert looked <= (1 if inside == b"[" else 1_000_000)


def test_text_is_flattened_as_bracket_by_bracket(monkeypatch):
    monkeypatch.setattr(module, "_PARSED_DEPTH", 2)
    for text, flat in {
        "[[[1]]]": "[[null]]",
        "[[[[1],[2]],3],[4]]": "[[null,3],[4]]",
        '{"a":[{"b":"]"}],"c":[[[]],[]]}': '{"a":[null],"c":[null,null]}',
        "[[],[[{}]]]": "[[],[null]]",
        "[[[": "",
        "[[[]]": "",
    }.items():
        assert module._flattened(text) == flat


@pytest.mark.parametrize("text", [b'"]', b'"\\\\"', b'"\\"]"', b'"\\\n]"', b"", b'"' + b"x" * (1 << 20) + b'"'])
def test_brackets_within_texts_are_no_nesting(ingest, text):
    bad = b'{"event_type":"t","user_id":"u","x":' + b"[" * 3000 + text + b"]" * 3000 + b"}"
    posted = b'[{"event_id":"a","event_type":"t","user_id":"u"},' + bad + b"]"
    if text in (b'"]', b'"\\\n]"'):  # a string without an end, an escape that is none
        with pytest.raises(BadRequest):
            post(ingest, posted)
    else:
        assert post(ingest, posted)[1]["event_ids"] == ["a", None]


@pytest.mark.parametrize("field", ["user_id", "location", "timestamp"])
def test_value_too_deep_to_be_shown_in_its_verdict_never_spoils_the_others(ingest, field):
    for levels in range(900, 1000):  # up to what the decoder just bears
        bad = f'{{"event_type":"t","user_id":"u","{field}":{"[" * levels}{"]" * levels}}}'
        answer = post(ingest, f'[{{"event_id":"a","event_type":"t","user_id":"u"}},{bad}]'.encode())[1]
        assert answer["event_ids"] == ["a", None]


@pytest.mark.parametrize("source", ["", 5, [], "s" * 65, "\U0001f600" * 33, "\ud800"])
def test_source_of_another_form_is_a_bad_request(ingest, source):
    with pytest.raises(BadRequest):
        post(ingest, {"events": [event()], "source": source})


def test_5000_events_are_taken_and_one_more_is_too_large(ingest):
    assert post(ingest, [event() for _ in range(MAX_EVENTS)])[1]["accepted"] == MAX_EVENTS
    with pytest.raises(TooLarge):
        post(ingest, [event() for _ in range(MAX_EVENTS + 1)])


@pytest.mark.parametrize(
    ("posted", "kind"),
    [
        (b"x\n" * MAX_EVENTS + b"\n \r\n\nx", "application/x-ndjson"),
        (b"[" + b'"\\ud800",' * MAX_EVENTS + b"7]", "application/json"),
    ],
)
def test_events_are_counted_before_any_gets_a_verdict(ingest, monkeypatch, posted, kind):
    """A gzip of 5 KB holds 2.6 million lines that are no JSON."""
    for each in ("_line", "sound"):
        monkeypatch.setattr(module, each, lambda given: pytest.fail("a verdict on an event that is one too many"))
    with pytest.raises(TooLarge, match=f"this one {MAX_EVENTS + 1};"):
        post(ingest, posted, kind)


def test_lines_without_an_event_do_not_count(ingest):
    lines = b"\n \r\n" * MAX_EVENTS + b'{"event_id":"a","event_type":"t","user_id":"u","x":1}\n\nx'
    assert post(ingest, lines, "application/x-ndjson")[1]["event_ids"] == ["a", None]


def test_body_beyond_5_mib_is_too_large_packed_or_not(ingest):
    large = json.dumps([event(text="x" * MAX_BODY_BYTES)]).encode()
    with pytest.raises(TooLarge):
        post(ingest, large)
    with pytest.raises(TooLarge):
        post(ingest, gzip.compress(large, mtime=0), encoding="gzip")


def test_gzip_of_several_members_is_unpacked_up_to_the_limit(ingest):
    text = json.dumps([event(event_id=f"e-{n}", text="x" * 1000) for n in range(100)]).encode()
    members = [gzip.compress(text[at : at + 700], mtime=0) for at in range(0, len(text), 700)]
    assert post(ingest, b"".join(members), encoding="gzip")[1]["accepted"] == 100
    half = gzip.compress(b" " * (MAX_BODY_BYTES // 2 + 1), mtime=0)
    with pytest.raises(TooLarge):
        post(ingest, half + half, encoding="gzip")


_WHOLE = gzip.compress(b"[]", mtime=0)


@pytest.mark.parametrize("packed", [b"plain", b"", _WHOLE[:-4], _WHOLE + b"more", _WHOLE + _WHOLE[:9]])
def test_broken_gzip_is_a_bad_request(ingest, packed):
    with pytest.raises(BadRequest):
        post(ingest, packed, encoding="gzip")


def test_encoding_of_another_kind_is_refused(ingest):
    with pytest.raises(NexusError) as caught:
        post(ingest, b"[]", encoding="br")
    assert caught.value.status == 415


@pytest.mark.parametrize(
    "query",
    [
        {"wait": "storage"},
        {"wait": ""},
        {"wait": "features", "timeout_ms": "-1"},
        {"wait": "features", "timeout_ms": "soon"},
        {"wait": "features", "timeout_ms": "²"},
        {"wait": "features", "timeout_ms": "１０"},
        {"wait": "features", "timeout_ms": "9" * 30},
        {"wait": "features", "timeout_ms": "9" * 5000},
    ],
)
def test_wait_of_another_form_is_a_bad_request_and_takes_nothing(ingest, log, query):
    with pytest.raises(BadRequest):
        post(ingest, [event()], **query)
    assert frames(log) == []


def test_wait_answers_whether_it_was_applied(log):
    asked: list[tuple[int, float]] = []

    def applied(end: int, timeout_s: float) -> bool:
        asked.append((end, timeout_s))
        return False

    ingest = Ingest(log, lambda: NOON, lambda: None, applied)
    assert post(ingest, [event(), event()], wait="features", timeout_ms="250")[1]["applied"] is False
    assert asked == [(2, 0.25)]


def test_who_reads_the_log_is_woken_once_for_a_body_when_the_log_has_it(log):
    seen: list[int] = []
    ingest = Ingest(log, lambda: NOON, lambda: seen.append(log.head().ordinal), lambda end, timeout_s: True)
    post(ingest, [event(), event()])
    assert seen == [2]


def test_closed_ingest_refuses_with_its_reason_and_takes_nothing(ingest, log):
    ingest.closed = "86 % of the memory limit is used"
    with pytest.raises(StoreFull, match="86 %"):
        post(ingest, [event()])
    assert frames(log) == []


def test_full_store_refuses_and_nothing_of_the_batch_is_taken(own_server):
    connection = Store(own_server.url)
    log = Log(connection)
    ingest = Ingest(log, lambda: NOON, lambda: None, lambda end, s: True)
    post(ingest, [event(event_id="a")])
    before = connection.call("GET", "ml:{p}:head")
    connection.call("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StoreFull):
        post(ingest, [event(event_id="b"), event(event_id="c")])
    connection.call("CONFIG", "SET", "maxmemory", 0)
    assert connection.call("GET", "ml:{p}:head") == before
    assert post(ingest, [event(event_id="b")])[1]["accepted"] == 1
    connection.close()


def test_every_waiting_request_is_told_when_the_store_is_away(tmp_path):
    ingest = Ingest(Log(Store(f"unix://{tmp_path}/nobody.sock")), lambda: NOON, lambda: None, lambda end, s: True)
    told: list[type] = []

    def send() -> None:
        try:
            post(ingest, [event()])
        except NexusError as error:
            told.append(type(error))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [StoreUnavailable] * 8


def test_requests_that_come_together_are_each_answered_with_their_own_verdicts(ingest, log):
    answers: dict[int, Any] = {}

    def send(n: int) -> None:
        answers[n] = post(ingest, [event(event_id=f"own-{n}"), event(event_id="shared")])[1]

    threads = [threading.Thread(target=send, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(a["accepted"] for a in answers.values()) == 17
    assert sum(a["duplicates"] for a in answers.values()) == 15
    assert all(a["event_ids"] == [f"own-{n}", "shared"] for n, a in answers.items())
    assert len(bodies(log)) == 17


LINE = '{"event_type":"t","user_id":"u"}'


def deep(levels: int) -> str:
    return '{"x":[' * (levels // 2) + ("{}" if levels % 2 else "1") + "]}" * (levels // 2)


TEXTS = (
    '"a"', '"b"', '""', '"a b"', '"a/b"', '"\\u00e9\\ud83d\\ude00"', '"\\ud800"', '"a\\u2028b"', '"a\\u0000"', '"t.2-x_y"',
    '"UPPER"', '"nexus.canary"', '"' + "n" * 128 + '"', '"' + "n" * 129 + '"', '"' + "\u00e9" * 128 + '"', '"z\u00e4z"',
)  # fmt: skip
NUMBERS = (
    "0", "-0", "-0.0", "1.50", "7e2", "90", "-90.5", "180", "1e308", "1e309", "-1e999", "9007199254740993", "1" * 25, "1" * 310,
    "9" * 500, "9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809", "0.1e-400",
)  # fmt: skip
TIMES = (
    '"2026-06-01T12:00:00Z"', '"2026-06-01T12:00:00.000Z"', '"2026-06-01T11:59:59.25Z"', '"2026-06-01T11:59:60Z"',
    '"2026-06-01T12:00:00"', '"2026-06-01 12:00:00z"', '"2026-06-01T20:00:00.123456+08:00"', '"2026-06-01T13:00:00.001Z"',
    '"1815-12-10T00:00:00Z"', '"2026-02-30T00:00:00Z"', '"2026-06-01T12:0000Z"', '"2026-06-01T1\u0662:00:00Z"',
    str(NOON), str(NOON // 1000), f"{NOON}.75", str(NOON + 3_600_001), "1e300", "253402300800000",
)  # fmt: skip
OTHERS = ("true", "false", "null", "[]", "{}", '[1,"a",null]', *(deep(levels) for levels in range(5, 12)))
MEMBERS = {
    "event_id": TEXTS, "event_type": TEXTS, "user_id": TEXTS, "session_id": TEXTS, "timestamp": TIMES, "app_version": TEXTS,
    "device_type": TEXTS, "driver_id": TEXTS, "x": NUMBERS,
}  # fmt: skip
anything = st.sampled_from(TEXTS + NUMBERS + TIMES + OTHERS)


def objects(values: dict[str, st.SearchStrategy[str]], least: int = 0, most: int = 7) -> st.SearchStrategy[str]:
    """JSON objects as text, so that a key may come twice and in any order."""
    pairs = st.one_of([st.builds(f'"{name}":{{}}'.format, value) for name, value in values.items()])
    return st.lists(pairs, min_size=least, max_size=most).map(lambda chosen: "{" + ",".join(chosen) + "}")


spots = objects({name: st.sampled_from(NUMBERS + OTHERS) for name in ("lat", "lng", "accuracy")})
data = objects(dict.fromkeys(("a", "b", "x"), anything))
sound = st.builds(
    lambda id_, user, at, data: f'{{"event_id":"{id_}","event_type":"t","user_id":{user},"timestamp":{at},"data":{data}}}',
    st.integers(0, 9), st.sampled_from(TEXTS[:2]), st.sampled_from(TIMES[:3]), data,
)  # fmt: skip
members: dict[str, st.SearchStrategy[str]] = {
    name: st.sampled_from(texts) | anything for name, texts in MEMBERS.items()
}
members |= {"location": spots | anything, "data": data | anything}
# The last of a key counts, so that this is sound but for one member.
nearly_sound = st.builds(lambda one, more: one[:-1] + "," + more[1:], sound, objects(members, 1, 1))
posted_events = st.one_of(sound, nearly_sound, nearly_sound, objects(members), anything)
batches = st.lists(posted_events, max_size=4)
posted_bodies = st.one_of(
    batches.map(lambda batch: (f"[{','.join(batch)}]", "application/json")),
    batches.map(lambda batch: ("\n".join(batch), "application/x-ndjson")),
    batches.map(lambda batch: ("\r\n \n".join(["", *batch, ""]), "application/jsonl")),
    st.tuples(batches, objects({"source": anything, "y": anything})).map(
        lambda given: (given[1].replace("{", f'{{"events":[{",".join(given[0])}],', 1).replace(",}", "}"), "")
    ),
    posted_events.map(lambda one: (one, "application/json")),
)


@settings(max_examples=400, deadline=None)
@given(posted_bodies)
@example(('[{"event_type":"t","user_id":"u","data":{"n":' + "1" * 4400 + "}}]", ""))
@example(('[{"event_type":"t","user_id":"u","data":{"s":"' + "x" * 65_400 + '"}}]', ""))
@example((f"[{','.join(['{}'] * 5001)}]", ""))
@example((f"{LINE}{LINE}\n{LINE}", "application/x-ndjson"))
@example((LINE.replace(",", ",\n") + "\n" + LINE, "application/x-ndjson"))
@example((f"{LINE} {LINE}\n" + LINE.replace(",", ",\n"), "application/x-ndjson"))
@example((f"\x0b\n{LINE}\x0c\n{LINE}\r\n \r\n\n{LINE}", "application/x-ndjson"))
def test_plain_bodies_get_the_verdicts_and_the_stored_form_that_each_event_gets_by_itself(given_body):
    text, kind = given_body
    body = text.encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "uuid7", lambda now: "made")
        slow = outcome(lambda: read_body(body, kind), lambda found: judge(found, NOON))
        plain = outcome(lambda: read_plain(body, kind), lambda found: judge_plain(found, NOON))
    assert plain in (slow, None)


def outcome(read: Any, judged: Any) -> Any:
    """The verdicts, the stored bytes, their times and the source; or the error; None where the reader passes."""
    try:
        found = read()
        if found is None:
            return None
        verdicts: Verdicts | None = judged(found[0])
    except NexusError as error:
        return type(error), str(error)
    if verdicts is None:
        return None
    kept = [(event.event_id, event.ts, event.body, forms(event.stored)) for event in verdicts.kept]
    return kept, verdicts.positions, verdicts.rejected, verdicts.event_ids, found[1]


def forms(stored: events.Stored) -> dict[str, Any]:
    """Each field with its type, which == alone does not tell for numbers."""
    return {name: repr(getattr(stored, name)) for name in events.Stored.__struct_fields__}


def test_most_bodies_are_plain():
    one = '{"event_type":"t","user_id":"z\u00e4z","location":{"lat":1,"lng":2.5,"accuracy":9},"data":{"a":{"b":[1,null]}}}'
    for body, kind in (
        (f"[{one}]", ""),
        (one, ""),
        (f'{{"events":[{one},{one}],"source":"app"}}', "application/json"),
        (f"{one}\n\n{one}\n", "application/x-ndjson"),
    ):
        found = read_plain(body.encode(), kind)
        assert found is not None
        assert judge_plain(found[0], NOON) is not None
