"""An event that the partner cannot bear holds up nobody else, and a partner that bears none loses no event."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from pipeline.bridge import sender, suspects
from pipeline.bridge.sender import Sender
from pipeline.bridge.suspects import PROOFS
from pipeline.commit_log import checkpoints
from pipeline.streams.bridge import DEPTH
from tests import misbehaving as partners
from tests.bridging import post, reconcile, run, take
from tests.conftest import Start, client_of
from tests.helpers import event, until
from tests.misbehaving import Answer, Asked, Behaviour, Misbehaving


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    made = Misbehaving(supports=("batch",))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little proof, and short pauses on the way to it."""
    monkeypatch.setattr(suspects, "PROOFS", 2)
    monkeypatch.setattr(sender, "_SUSPECT_PAUSE_S", 0.05)


def poisoned_by(bad: Behaviour) -> Behaviour:
    """Does so to calls with an event that has `poison` in its data."""

    def behave(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        poisoned = any(e["data"].get("poison") for e in asked.events)
        (bad if poisoned else partners.answer_well)(server, asked, answer)

    return behave


POISONS: dict[str, Behaviour] = {
    "500": partners.says(500, {"detail": "boom"}),
    "hangs": partners.hangs,
    "falls": lambda server, asked, answer: answer.close(),
    **{
        str(status): partners.says(status, {"detail": "boom"})
        for status in (401, 403, 404, 405, 408, 410, 423, 429, 503)
    },
    "redirects": partners.says(307, None, ["Location: http://elsewhere.example/events"]),
}
WORDS = {"hangs": "not answered", "falls": "broke off", "redirects": "redirected"}


@pytest.mark.parametrize("supports", [("batch",), None], ids=["batches", "singles"])
@pytest.mark.parametrize("poison", POISONS)
def test_one_event_that_the_partner_cannot_bear_is_a_dead_letter_and_all_others_arrive_in_order(
    poison, supports, start_nexus, server
):
    server.supports, server.on_post = supports, poisoned_by(POISONS[poison])
    nexus = run(start_nexus, server, PYTHON_SERVICE_TIMEOUT=150 if poison == "hangs" else 2_000)
    nexus.bridge.control("pause")
    posted = [*post(nexus, 20), *take(nexus, event(user="user_3", data={"poison": 1})), *post(nexus, 60)]
    nexus.bridge.control("resume")
    reconcile(nexus, server, posted, dead=1)
    [letter] = client_of(nexus).get("/api/ml/dead-letters?stream=bridge").json["dead_letters"]
    assert letter["event"]["data"] == {"poison": 1}
    assert letter["attempts"] >= suspects.MAX_ATTEMPTS
    assert WORDS.get(poison, "boom") in letter["reason"]


@pytest.mark.parametrize("status", [404, 429, 500])
def test_one_event_that_is_not_taken_does_not_hold_up_a_trickle_of_others_behind_it(status, start_nexus, server):
    """Each comes only once the one before it has been taken: no more than a few windows of one event each."""
    server.supports, server.on_post = None, poisoned_by(partners.says(status))
    nexus = run(start_nexus, server)
    posted = take(nexus, event(user="user_gone", data={"poison": 1}))
    until(lambda: nexus.bridge.sender.starved, "no other event at hand")
    for n in range(3 * DEPTH):
        (sent,) = take(nexus, event(user=f"user_{n}"))
        until(partial(server.applied.count, sent["event_id"]), "the event taken")
        posted.append(sent)
    reconcile(nexus, server, posted, dead=1)


@pytest.mark.parametrize("supports", [("batch",), None], ids=["batches", "singles"])
def test_user_none_of_whose_events_is_taken_holds_up_nobody_though_most_are_of_that_user(supports, start_nexus, server):
    server.supports = supports
    server.on_post = poisoned_by(partners.says(403, {"detail": "deleted"}))
    nexus = run(start_nexus, server)
    nexus.bridge.control("pause")
    posted = []
    for n in range(30):
        bad = [event(user="user_gone", data={"poison": 1}) for _ in range(2)]
        posted += take(nexus, *bad, event(user=f"user_{n % 7}"))
    nexus.bridge.control("resume")
    reconcile(nexus, server, posted, dead=60)


def test_user_whose_events_are_taken_again_is_believed_to_be_refused_no_more(start_nexus, server):
    server.supports, server.on_post = None, poisoned_by(partners.says(404))
    nexus = run(start_nexus, server)
    posted = [*take(nexus, event(user="user_3", data={"poison": 1})), *post(nexus, 30)]
    reconcile(nexus, server, posted, dead=1)
    server.on_post = partners.says(404)
    more = post(nexus, 10, users=4)
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    server.on_post = partners.answer_well
    reconcile(nexus, server, [*posted, *more], dead=1)


@pytest.mark.parametrize("retry_after", [(), ("Retry-After: 1",)], ids=["", "retry after"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_partner_that_takes_so_many_calls_a_second_gets_all_events(
    status, retry_after, start_nexus, server, monkeypatch
):
    """None is given up, though each that is taken makes the next one fail."""
    monkeypatch.setattr(suspects, "PROOFS", PROOFS)
    apart_s, refused = (1.0 if retry_after else 0.25), partners.says(status, {"detail": "slow down"}, retry_after)
    free_at = 0.0

    def limited(server: Misbehaving, asked: Asked, answer: Answer) -> None:
        nonlocal free_at
        if time.monotonic() < free_at:
            refused(server, asked, answer)
            return
        free_at = time.monotonic() + apart_s
        partners.answer_well(server, asked, answer)

    server.supports, server.on_post = None, limited
    nexus = run(start_nexus, server)
    reconcile(nexus, server, post(nexus, 10, users=10))


@pytest.mark.parametrize("status", [429, 503])
def test_a_pause_that_is_asked_for_one_user_alone_holds_up_the_others_once(status, start_nexus, server):
    server.supports = None
    server.on_post = poisoned_by(partners.says(status, None, ["Retry-After: 1"]))
    nexus = run(start_nexus, server)
    nexus.bridge.control("pause")
    [poison] = take(nexus, event(user="user_3", data={"poison": 1}))
    posted = [poison, *post(nexus, 40)]
    others = [e["event_id"] for e in posted if e["user_id"] != "user_3"]
    nexus.bridge.control("resume")
    until(lambda: set(others) <= set(server.applied), "the others taken")
    assert server.seen[poison["event_id"]] <= 3

    def proven_while_others_come() -> bool:
        posted.extend(take(nexus, event(user="user_1")))
        return checkpoints.audit(nexus.store).accounts["bridge"].dead == 1

    until(proven_while_others_come, "the proof")
    reconcile(nexus, server, posted, dead=1)


def test_events_behind_it_that_arrive_later_prove_it_too(start_nexus, server):
    server.on_post = poisoned_by(POISONS["500"])
    nexus = run(start_nexus, server)
    posted = take(nexus, event(user="user_3", data={"poison": 1}))
    until(lambda: nexus.bridge.sender.starved, "no other event at hand")
    posted += post(nexus, 10)
    reconcile(nexus, server, posted, dead=1)


def test_several_in_a_row_are_found_one_by_one(start_nexus, server):
    server.on_post = poisoned_by(POISONS["500"])
    nexus = run(start_nexus, server)
    nexus.bridge.control("pause")
    posted = [*post(nexus, 3, users=3, data={"poison": 1}), *post(nexus, 40)]
    nexus.bridge.control("resume")
    reconcile(nexus, server, posted, dead=3)


def test_a_partner_that_fails_at_everything_while_its_health_is_fine_costs_no_event(start_nexus, server):
    server.on_post = partners.says(500)
    nexus = run(start_nexus, server)
    posted = post(nexus, 60)
    until(lambda: nexus.bridge.errors_total > 20, "many failures")
    server.on_post = partners.answer_well
    reconcile(nexus, server, posted)


def test_an_event_that_nothing_can_be_held_against_is_given_up_after_long_at_good_health(
    start_nexus, server, monkeypatch
):
    monkeypatch.setattr(suspects, "HOLD_S", 0.0)
    server.on_post = poisoned_by(POISONS["500"])
    nexus = run(start_nexus, server)
    reconcile(nexus, server, take(nexus, event(data={"poison": 1})), dead=1)


@pytest.mark.parametrize("status", [401, 403, 404, 405, 410, 429, 503])
def test_a_wrong_address_or_password_or_a_busy_partner_buries_nothing_however_long(
    status, start_nexus, server, monkeypatch
):
    monkeypatch.setattr(suspects, "HOLD_S", 0.0)
    server.supports, server.on_post = None, partners.says(status, b"<html>nginx</html>", content_type="text/html")
    nexus = run(start_nexus, server, PYTHON_SERVICE_TIMEOUT=20_000)
    posted = post(nexus, 20)
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    server.on_post = partners.answer_well
    reconcile(nexus, server, posted)


@pytest.mark.parametrize("supports", [("batch",), None], ids=["batches", "singles"])
def test_a_partner_that_refuses_everything_opens_the_circuit_after_a_few_dead_letters(supports, start_nexus, server):
    server.supports, server.on_post = supports, partners.says(422, {"detail": "who are you"})
    nexus = run(start_nexus, server)
    posted = post(nexus, 40)
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    assert "it refuses everything: " in str(nexus.bridge.circuit.reason)
    assert "who are you" in str(nexus.partner_status()["reason"])
    server.on_post = partners.answer_well
    reconcile(nexus, server, posted, dead=suspects.MAX_REFUSALS)


def test_many_bad_events_in_a_row_are_refused_one_by_one_at_a_partner_that_takes_the_others(start_nexus, server):
    server.on_post = partners.refuses_batches_with(lambda e: e["data"].get("amount") == -1)
    nexus = run(start_nexus, server)
    nexus.bridge.control("pause")
    posted = [*post(nexus, 12, users=1, data={"amount": -1}), *post(nexus, 30)]
    nexus.bridge.control("resume")
    reconcile(nexus, server, posted, dead=12)


def test_batches_in_another_form_than_agreed_are_sent_as_single_events(start_nexus, server):
    server.on_post = lambda s, asked, answer: (
        answer.send(422, {"detail": [{"loc": ["body", "items"], "msg": "field required"}]})
        if asked.path.endswith("/batch")
        else partners.answer_well(s, asked, answer)
    )
    nexus = run(start_nexus, server)
    reconcile(nexus, server, post(nexus, 50))
    assert "field required" in nexus.bridge.partner.lacks["batch"]


@pytest.mark.parametrize("fails", ["401", "403", "429", "500", "503", "hangs", "falls"])
def test_a_partner_whose_batches_fail_though_it_lists_them_gets_single_events(fails, start_nexus, server):
    behave = POISONS[fails]
    server.on_post = lambda s, asked, answer: (
        behave if asked.path.endswith("/batch") else partners.answer_well
    )(s, asked, answer)  # fmt: skip
    nexus = run(start_nexus, server, PYTHON_SERVICE_TIMEOUT=150 if fails == "hangs" else 2_000)
    reconcile(nexus, server, post(nexus, 50))
    assert "POST /events took the same event" in nexus.bridge.partner.lacks["batch"]


def test_calls_that_are_too_large_are_made_smaller_and_stay_so(start_nexus, server):
    server.on_post = lambda s, asked, answer: (
        answer.send(413) if len(asked.events) > 100 else partners.answer_well(s, asked, answer)
    )
    nexus = run(start_nexus, server)
    nexus.bridge.control("pause")
    posted = post(nexus, 1_500, users=40)
    nexus.bridge.control("resume")
    reconcile(nexus, server, posted)
    refused = sum(len(asked.events) > 100 for asked in server.posts())
    assert refused < len(server.posts()) / 3


@pytest.mark.parametrize("crash_at", [0, 1])
def test_what_stands_behind_a_lane_that_crashed_is_not_sent(crash_at, start_nexus: Start, server, monkeypatch):
    nexus = run(start_nexus, server)
    settle: Callable[..., Any] = Sender._settle
    crashed: list[int] = []

    def crash_once(*args: Any) -> None:
        if len(server.posts()) > crash_at and not crashed:
            crashed.append(len(server.posts()))
            raise RuntimeError("a fault in the sender")
        settle(*args)

    nexus.bridge.control("pause")
    posted = post(nexus, 60, users=2)
    nexus.bridge.throttle.events = 10
    monkeypatch.setattr(Sender, "_settle", crash_once)
    nexus.bridge.control("resume")
    reconcile(nexus, server, posted)
    assert crashed == [crash_at + 1]
    firsts = list(dict.fromkeys(e["event_id"] for asked in server.posts() for e in asked.events))
    assert firsts == [e["event_id"] for e in posted]
