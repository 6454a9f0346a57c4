"""The partner's client: what a call's answer means, redirects, capabilities found out and forgotten, odd bytes."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx
import pytest

from pipeline.bridge.replies import on_proof_alone, perhaps_its_events, retry_after_s, retryable, target_of, verdicts
from pipeline.errors import PartnerStatus, PartnerUnreachable
from pipeline.partner import LACKS_MS, MOST_QUESTIONS, Partner
from tests import misbehaving as partners
from tests.helpers import Clock
from tests.misbehaving import Behaviour, Misbehaving

T = TypeVar("T")
BODIES = [b'{"event_id":"e%d","event_type":"t","user_id":"u%d"}' % (i, i % 3) for i in range(6)]
NESTED = b"[" * 100_000


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving()
    yield made
    made.close()


def using(url: Callable[[], str], clock: Clock, work: Callable[[Partner], Awaitable[T]]) -> T:
    """What comes of some work with a client of its own, whose partner's health has been asked for."""

    async def body() -> T:
        partner = Partner(url, lambda: 400, clock)
        try:
            await partner.health()
            return await work(partner)
        finally:
            await partner.close()

    return asyncio.run(body())


def batches(behave: Behaviour) -> Behaviour:
    """Behaves so for batches alone."""
    return lambda server, asked, answer: (
        behave if asked.path.endswith("/batch") else partners.answer_well
    )(server, asked, answer)  # fmt: skip


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_post_redirected_on_its_host_is_repeated_as_it_was(status, server, clock):
    server.supports = None
    server.on_post = partners.redirects(status, "/events/")
    [delivery] = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    assert (delivery.error, delivery.events) == (None, len(BODIES))
    assert server.applied == [f"e{i}" for i in range(6)]


@pytest.mark.parametrize(("status", "to"), [(301, "https://other.example/ml/events"), (303, "/ml/events")])
def test_a_redirect_that_is_not_followed_says_which_address_to_set(status, to, server, clock):
    server.supports = None
    server.on_post = partners.says(status, None, [f"Location: {to}"])
    [delivery] = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    base = to.removesuffix("/events") if to.startswith("http") else f"{server.url}/ml"
    assert f"set PYTHON_EVENT_API_URL to {base}" in str(delivery.error).rstrip(".")
    assert delivery.error is not None
    assert retryable(delivery.error)


def test_name_and_password_of_the_address_go_with_each_call(server, clock):
    url = server.url.replace("http://", "http://me:s%3At@")
    using(lambda: url, clock, lambda partner: partner.send(BODIES))
    assert {asked.headers["authorization"] for asked in server.requests} == {"Basic bWU6czp0"}
    assert server.applied == [f"e{i}" for i in range(6)]


def test_name_and_password_go_along_where_the_partner_redirects_to_a_whole_address_of_its_own(server, clock):
    def behave(s: Misbehaving, asked: Any, answer: Any) -> None:
        whole = f"Location: {s.url}/events/"
        answer.send(200, s.apply(asked)) if asked.path == "/events/" else answer.send(308, None, [whole])

    server.supports, server.on_post = None, behave
    url = server.url.replace("http://", "http://me:s%3At@")
    [delivery] = using(lambda: url, clock, lambda partner: partner.send(BODIES))
    assert delivery.error is None
    assert {asked.headers["authorization"] for asked in server.requests} == {"Basic bWU6czp0"}


@pytest.mark.parametrize(
    ("at", "to", "leads"),
    [
        ("http://me:s%3At@h/events", "https://h/x", "https://me:s%3At@h/x"),
        ("http://me:s%3At@h:81/events", "//h/x", "http://me:s%3At@h/x"),
        ("http://me:s%3At@h/events", "x", "http://me:s%3At@h/x"),
        ("http://me:s%3At@h/events", "http://you:t@h/x", "http://you:t@h/x"),
        ("https://me:s%3At@h/events", "http://h/x", "http://h/x"),  # never where anyone can read it
        ("https://me:s%3At@h/events", "https://h/x", "https://me:s%3At@h/x"),
        ("http://h/events", "https://h/x", "https://h/x"),
    ],
)
def test_a_password_is_redirected_to_the_same_host_alone_and_never_out_of_tls(at, to, leads):
    assert target_of(httpx.URL(at), "POST", "/events", 308, httpx.Headers({"Location": to})) == httpx.URL(leads)


def test_a_password_is_not_told_to_another_host():
    with pytest.raises(PartnerStatus, match=r"set PYTHON_EVENT_API_URL to https://other/ml$"):
        target_of(
            httpx.URL("http://me:s@h/events"),
            "POST",
            "/events",
            308,
            httpx.Headers({"Location": "https://other/ml/events"}),
        )


@pytest.mark.parametrize("status", [401, 403, 404, 405, 410, 411, 429, 500, 503])
def test_a_call_that_met_a_wrong_address_or_a_busy_partner_is_made_again(status):
    assert retryable(PartnerStatus("no", status))


@pytest.mark.parametrize(
    ("status", "alone"), [(500, False), (502, False), (422, False), (503, True), (429, True), (404, True), (307, True)]
)
def test_any_status_may_be_an_events_fault_but_some_are_held_against_it_on_proof_alone(status, alone):
    assert perhaps_its_events(PartnerStatus("no", status))
    assert on_proof_alone(PartnerStatus("no", status)) is alone


def test_a_partner_that_falls_over_a_call_may_do_so_for_what_it_held(server, clock):
    server.on_post = lambda s, asked, answer: answer.close()
    [fell] = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    server.leave()
    [gone] = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    assert fell.error is not None
    assert gone.error is not None
    assert (perhaps_its_events(fell.error), perhaps_its_events(gone.error)) == (True, False)


def test_a_passing_404_on_batches_is_forgotten_at_good_health_some_minutes_later(server, clock):
    async def work(partner: Partner) -> list[bool]:
        server.on_post = batches(partners.says(404))
        await partner.send(BODIES)
        server.on_post = partners.answer_well
        found = ["batch" in partner.supports]
        for ms in (LACKS_MS - 1, 1):
            clock.advance(ms)
            await partner.health()
            found.append("batch" in partner.supports)
        return found

    assert using(lambda: server.url, clock, work) == [False, False, True]
    assert len(server.applied) == 6


def test_what_an_earlier_partner_lacks_is_not_held_against_the_one_now_at_its_place(server, clock):
    other, urls = Misbehaving(), [server.url]

    async def work(partner: Partner) -> dict[str, str]:
        sending = asyncio.create_task(partner.send(BODIES))
        await asyncio.wait((sending,))
        return partner.lacks

    def late(s: Misbehaving, asked: Any, answer: Any) -> None:
        urls.append(other.url)
        answer.send(404)

    server.on_post = late
    assert using(lambda: urls[-1], clock, work) == {}
    assert len(other.applied) == 6
    other.close()


def test_an_answer_that_refuses_one_event_twice_is_not_the_agreed_one():
    """Its counts add up, but of one of the three events it says nothing."""
    twice = [{"index": 0, "message": "no"}] * 2
    with pytest.raises(ValueError, match="not sent"):
        verdicts(json.dumps({"accepted": 1, "rejected": twice}).encode(), 3)


def test_questions_side_by_side_are_so_many_at_most(server, clock):
    async def ask(partner: Partner) -> int:
        under_way, most = 0, 0

        async def slow(*_: Any) -> tuple[int, httpx.Headers, bytes]:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            for _turn in range(10):
                await asyncio.sleep(0)
            under_way -= 1
            return 200, httpx.Headers(), b"{}"

        partner._call = slow  # type: ignore[method-assign, assignment]
        questions = [
            question for _ in range(MOST_QUESTIONS) for question in (partner.predict(b"{}"), partner.features("u"))
        ]
        await asyncio.gather(*questions)
        return most

    assert using(lambda: server.url, clock, ask) == MOST_QUESTIONS


def test_a_lone_event_that_a_batch_is_refused_for_is_tried_by_itself(server, clock):
    async def work(partner: Partner) -> Any:
        return [await partner.send(BODIES[:1]), dict(partner.lacks), await partner.send(BODIES)]

    server.on_post = batches(partners.says(422, {"detail": "field required: items"}))
    first, lacks, rest = using(lambda: server.url, clock, work)
    assert (first[0].error, len(first)) == (None, 1)
    assert "field required" in lacks["batch"]
    assert [d.events for d in rest] == [6]
    assert len(server.applied) == 6
    # Where batches have been taken before, the one event is strange, and not the partner.
    server.on_post = partners.answer_well

    async def again(partner: Partner) -> Any:
        await partner.send(BODIES)
        server.on_post = batches(partners.says(422, {"detail": "no"}))
        return [await partner.send(BODIES[:1]), dict(partner.lacks)]

    [only], lacks = using(lambda: server.url, clock, again)
    assert (only.error, lacks) == (None, {})


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_says_it_is_packed_and_is_not_tells_by_its_status(encoding, server, clock):
    server.supports = None
    server.on_post = partners.says(200, b"taken", [f"Content-Encoding: {encoding}"])
    [delivery] = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    assert (delivery.error, delivery.events) == (None, len(BODIES))
    assert [len(server.posts()), server.applied] == [len(BODIES), [f"e{i}" for i in range(6)]]


@pytest.mark.parametrize("change", ["address", "timeout"])
def test_call_that_hangs_is_freed_by_another_address_or_a_shorter_timeout(change, server, clock):
    urls, timeouts = [server.url], [60_000]

    async def work() -> Any:
        partner = Partner(lambda: urls[-1], lambda: timeouts[-1], clock)
        try:
            partner.look()
            sending = asyncio.create_task(partner.send(BODIES))
            while not server.posts():
                await asyncio.sleep(0.01)
            if change == "address":
                urls.append("http://127.0.0.1:9")
            else:
                timeouts.append(50)
            partner.look()
            return await asyncio.wait_for(sending, 20)
        finally:
            await partner.close()

    server.supports, server.on_post = None, partners.hangs
    [delivery] = asyncio.run(work())
    why = "the address is another now" if change == "address" else "not answered within 0.05 s"
    assert why in str(delivery.error)


def test_a_refusal_stands_where_single_events_have_no_route(server, clock):
    server.on_post = lambda s, asked, answer: answer.send(422 if asked.path.endswith("/batch") else 404)
    [delivery] = using(lambda: server.url, clock, lambda partner: partner.send(BODIES[:1]))
    assert isinstance(delivery.error, PartnerStatus)
    assert delivery.error.status_code == 422


def test_single_events_with_the_same_outcome_are_one_delivery_and_each_error_has_its_own(server, clock):
    server.supports = None
    server.refuse = lambda event: event["event_id"] in ("e2", "e4")
    made = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    assert [(d.events, d.status, d.error is None) for d in made] == [(2, 200, True), (1, 422, False)]
    server.on_post = lambda s, asked, answer: answer.send(200, s.apply(asked))
    made = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    words = "I will not have this one"
    assert [(d.events, d.rejected) for d in made] == [(2, []), (1, [(0, words)]), (1, []), (1, [(0, words)]), (1, [])]


def test_a_call_whose_answer_has_begun_is_not_made_again_by_itself(server, clock):
    server.on_post = partners.cuts_answers
    [delivery] = using(lambda: server.url, clock, lambda partner: partner.send(BODIES))
    assert isinstance(delivery.error, PartnerUnreachable)
    assert len(server.posts()) == 1


def test_single_events_end_where_the_address_has_become_another(server, clock):
    other, at = Misbehaving(), [server.url]
    server.supports = other.supports = None

    def moves(server: Misbehaving, asked: partners.Asked, answer: partners.Answer) -> None:
        at[0] = other.url
        partners.answer_well(server, asked, answer)

    server.on_post = moves
    made = using(lambda: at[0], clock, lambda partner: partner.send(BODIES))
    assert ([d.events for d in made], server.applied, other.applied) == ([1], ["e0"], [])
    other.close()


@pytest.mark.parametrize("raw", [NESTED, b'{"rejected":' + NESTED, b"\xff\xfe", b'{"accepted":{}}', b""])
def test_no_bytes_that_a_partner_answers_break_the_client(raw, server, clock):
    async def work(partner: Partner) -> list[Any]:
        return [await partner.send(BODIES), (await partner.health()).status]

    server.on_post = partners.says(200, raw)
    [delivery], status = using(lambda: server.url, clock, work)
    assert (delivery.error, delivery.events, status) == (None, 6, "online")
    server.on_health = partners.says(200, raw)
    [delivery], status = using(lambda: server.url, clock, work)
    assert (delivery.error, delivery.events, status) == (None, 6, "online")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("600", 60.0), ("9" * 400, 60.0), ("\xb2", None), ("", None), ("soon", None), ("-1", None),
     ("Mon, 01 Jan 2024 00:00:10 GMT", 10.0), ("Sun, 31 Dec 2023 00:00:00 GMT", 0.0),
     ("Mon, 01 Jan 99999 00:00:00 GMT", None)],
)  # fmt: skip
def test_retry_after_is_read_as_seconds_or_as_a_date_and_bounded(text, seconds):
    headers = httpx.Headers([(b"Retry-After", text.encode("latin-1"))])
    assert retry_after_s(headers, now=1_704_067_200.0) == seconds


def test_a_large_health_answer_is_understood_but_not_passed_on_whole(server, clock):
    server.on_health = partners.says(200, {"status": "degraded", "supports": ["batch"], "x": ["y" * 100] * 30_000})
    health, supports = using(lambda: server.url, clock, lambda partner: _ask(partner))
    assert (health.status, supports) == ("degraded", {"batch"})
    assert len(health.body) <= 500


async def _ask(partner: Partner) -> Any:
    return await partner.health(), partner.supports


@pytest.mark.parametrize(
    "behave", [partners.hangs, partners.loses_answers, partners.says(500), partners.redirects(303, "/x")]
)
def test_a_call_that_failed_is_gone_without_the_cycle_collector(behave, server, clock):
    async def work(partner: Partner) -> None:
        server.on_post = behave
        [delivery] = await partner.send(BODIES)
        assert delivery.error is not None
        left = weakref.ref(delivery.error)
        del delivery
        async with asyncio.timeout(10):
            while left() is not None:
                await asyncio.sleep(0.001)

    gc.disable()
    try:
        using(lambda: server.url, clock, work)
    finally:
        gc.enable()
