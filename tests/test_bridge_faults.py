"""Whatever the partner does, each accepted event reaches it once and in order, or is a dead letter with the partner's
words."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.runtime import Runtime
from tests import misbehaving as partners
from tests.bridging import INTERVAL_S, TIMEOUT_MS, post, reconcile, run, settled, take
from tests.faults import Fault
from tests.helpers import event, until
from tests.misbehaving import Behaviour, Misbehaving


@pytest.fixture
def make() -> Iterator[Callable[..., Misbehaving]]:
    """Starts misbehaving partners."""
    made: list[Misbehaving] = []

    def start(**how: Any) -> Misbehaving:
        made.append(Misbehaving(**how))
        return made[-1]

    yield start
    for server in made:
        server.close()


def tell(record: Any, fault: str, shows: str, took_s: float, server: Misbehaving, posted: list[dict[str, Any]]) -> None:
    """For the table of faults: what of these events the partner never applied, and what it applied twice."""
    mine = {e["event_id"] for e in posted}
    applied = [i for i in server.applied if i in mine]
    lost, doubled = len(mine - set(applied)), len(applied) - len(set(applied))
    Fault(record).seen(f"the Python service {fault}", shows, took_s, lost, doubled)


def caught_up(nexus: Runtime) -> dict[str, Any] | None:
    """The latest outage, once it is over and done with."""
    latest = nexus.bridge.ledger.latest
    return latest[0] if latest and latest[0]["caught_up"] else None


# Of these the partner applied nothing: each event arrives there once.
APPLIES_NOTHING = (
    "answers 500", "answers 503 with Retry-After", "answers 429 with Retry-After", "answers 401", "redirects elsewhere",
)  # fmt: skip

# Faults that pass: what the partner does to POSTs meanwhile, and to health checks where they fail too.
PASSING: dict[str, tuple[Behaviour, Behaviour | None]] = {
    "hangs": (partners.hangs, partners.hangs),
    "drips a byte at a time": (partners.drips, partners.drips),
    "answers 500": (partners.says(500, {"detail": "broken"}), None),
    "answers 503 with Retry-After": (partners.says(503, None, ["Retry-After: 1"]), None),
    "answers 429 with Retry-After": (partners.says(429, None, ["Retry-After: 1"]), None),
    "loses its answers": (partners.loses_answers, None),
    "breaks off its answers": (partners.cuts_answers, None),
    "answers 401": (partners.says(401, {"detail": "who are you"}), None),
    "redirects elsewhere": (partners.says(307, None, ["Location: http://other.example/events"]), None),
    "slower than the timeout": (partners.slow(TIMEOUT_MS / 1000 + 0.3), None),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_loses_nothing_and_applies_nothing_twice(fault, start_nexus, make, record_property):
    server = make()
    nexus = run(start_nexus, server)
    posted = post(nexus, 50)
    settled(nexus)
    server.on_post, health = PASSING[fault]
    server.on_health = health or partners.healthy
    began = time.monotonic()
    posted += post(nexus, 200)
    until(lambda: nexus.bridge.errors_total > 0, "the fault noticed")
    until(lambda: nexus.bridge.circuit.state != "closed", "the circuit open")
    opened_s = time.monotonic() - began
    assert nexus.partner_status()["status"] in ("offline", "degraded")
    posted += post(nexus, 50)
    server.on_post, server.on_health = partners.answer_well, partners.healthy
    back = time.monotonic()
    calls = len(server.posts())
    until(lambda: len(server.posts()) > calls, "a call after the partner's return")
    delivering_s = time.monotonic() - back
    reconcile(nexus, server, posted)
    until(lambda: nexus.partner_status()["status"] == "online", "the partner online")
    resent = sum(n - 1 for n in server.seen.values())
    shows = f"offline or degraded after {opened_s:.1f} s, an outage with its reason; its events wait in the log"
    tell(record_property, fault, shows, time.monotonic() - back, server, posted)
    out_of_time = any(error["kind"] == "timeout" for error in nexus.bridge.errors)  # on a loaded machine
    assert resent == 0 or fault not in APPLIES_NOTHING or out_of_time
    assert delivering_s < 2 * INTERVAL_S + TIMEOUT_MS / 1000
    outage = until(lambda: caught_up(nexus), "the outage caught up with")
    assert (outage["unexplained"], outage["dead"], outage["delivered"]) == (0, 0, outage["queued"])
    assert outage["users"] == 7


def test_a_partner_that_is_gone_is_noticed_at_once_and_served_when_it_is_back(start_nexus, make, record_property):
    server = make()
    nexus = run(start_nexus, server)
    posted = post(nexus, 50)
    settled(nexus)
    server.leave()
    began = time.monotonic()
    posted += post(nexus, 200)
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    opened_s = time.monotonic() - began
    assert nexus.partner_status()["status"] == "offline"
    posted += post(nexus, 100)
    server.listen()
    back = time.monotonic()
    reconcile(nexus, server, posted)
    took_s = time.monotonic() - back
    assert max(server.seen.values()) == 1
    shows = f"offline after {opened_s:.1f} s, an outage with its reason; its events wait in the log"
    tell(record_property, "refuses connections", shows, took_s, server, posted)
    assert took_s < 2 * INTERVAL_S + 1


def test_the_partner_asked_for_a_pause_and_gets_it(start_nexus, make):
    server = make(supports=("batch",))
    nexus = run(start_nexus, server)
    server.on_post = partners.says(503, None, ["Retry-After: 2"])
    posted = post(nexus, 20)
    until(lambda: server.posts(), "the refused call")
    server.on_post = partners.answer_well
    reconcile(nexus, server, posted)
    first, second = server.posts()[:2]
    assert second.at - first.at >= 1.9


def test_a_batch_refused_for_one_event_leaves_that_one_alone_in_the_dead_letters(start_nexus, make):
    server = make()
    server.on_post = partners.refuses_batches_with(lambda e: e["data"].get("amount") == -1)
    nexus = run(start_nexus, server)
    posted = post(nexus, 60, data={"amount": 3})
    bad = event(user="user_3", data={"amount": -1})
    posted += [*take(nexus, bad), *post(nexus, 60, data={"amount": 3})]
    reconcile(nexus, server, posted, dead=1)
    receipt = nexus.lookups.receipt(bad["event_id"])["streams"]["bridge"]
    assert receipt["state"] == "dead"
    assert "amount must not be negative" in receipt["result"]["reason"]
    assert nexus.bridge.circuit.state == "closed"


def test_events_refused_within_an_answer_are_dead_letters_and_the_rest_is_delivered(start_nexus, make):
    server = make(refuse=lambda e: e["user_id"] == "user_2")
    nexus = run(start_nexus, server)
    posted = post(nexus, 70)
    reconcile(nexus, server, posted, dead=10)


# Partners that are strange for good. None of these needs help to be served.
FOREIGN: dict[str, tuple[dict[str, Any], Behaviour, Behaviour]] = {
    "only the two routes": ({"supports": None}, partners.answer_well, partners.healthy),
    "201 and other JSON": ({"supports": None}, partners.says(201, {"ok": True, "n": [1]}), partners.healthy),
    "204 and no body": ({"supports": None}, partners.says(204), partners.says(204)),
    "HTML": ({"supports": None}, partners.says(200, b"<h1>thanks</h1>", content_type="text/html"),
             partners.says(200, b"<p>fine</p>", content_type="text/html")),
    "plain text health": ({"supports": None}, partners.answer_well, partners.says(200, b"OK", (), "text/plain")),
    "closes each connection": ({}, partners.closes_after_each, partners.healthy),
    "chunked": ({}, partners.chunked, partners.healthy),
    "huge answers": ({"supports": None}, partners.huge, partners.healthy),
    "a path prefix": ({"prefix": "/ml/v2"}, partners.answer_well, partners.healthy),
    "redirects to another path": ({"supports": None}, partners.redirects(308, "/events/"), partners.healthy),
    "says batch, lacks it": ({}, partners.says(404), partners.healthy),
    "counts wrongly": ({}, partners.miscounts, partners.healthy),
    "batch answered with HTML": ({}, partners.says(200, b"<h1>hi</h1>", content_type="text/html"), partners.healthy),
    "batch answered with 204": ({}, partners.says(204), partners.healthy),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_partner_gets_every_event_once(kind, start_nexus, make):
    how, on_post, on_health = FOREIGN[kind]
    server = make(**how)
    server.on_post, server.on_health = on_post, on_health
    if kind == "says batch, lacks it":
        server.on_post = lambda s, asked, answer: (
            answer.send(404) if asked.path.endswith("/batch") else partners.answer_well(s, asked, answer)
        )
    nexus = run(start_nexus, server)
    began = time.monotonic()
    posted = post(nexus, 100)
    reconcile(nexus, server, posted)
    until(lambda: nexus.partner_status()["status"] == "online", "the partner online")
    assert nexus.bridge.circuit.state == "closed"
    resent = sum(n - 1 for n in server.seen.values())
    print(f"| foreign: {kind} | - | - | {time.monotonic() - began:.2f} | 0 | 0 | {resent} |")


def test_https_is_trusted_by_the_certificate_in_ssl_cert_file(start_nexus, make, tmp_path, monkeypatch):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *name], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = make(tls=context)
    untrusting = run(start_nexus, server)
    assert untrusting.partner_status()["status"] == "offline"
    assert "certificate" in str(untrusting.partner_status()["reason"]).lower()
    untrusting.stop()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    nexus = run(start_nexus, server)
    reconcile(nexus, server, post(nexus, 50))


def test_idempotency_keys_stay_the_same_when_a_call_is_made_again(start_nexus, make):
    server = make(supports=("batch",))  # no canary that may be in a call before the event
    nexus = run(start_nexus, server)
    server.on_post = partners.loses_answers
    posted = post(nexus, 1)
    until(lambda: len(server.posts()) >= 3, "several tries")
    server.on_post = partners.answer_well
    reconcile(nexus, server, posted)
    assert {asked.headers["idempotency-key"] for asked in server.posts()} == {posted[0]["event_id"]}


def test_capabilities_are_found_out_again_after_a_recovery(start_nexus, make):
    server = make(supports=None)
    nexus = run(start_nexus, server)
    settled(nexus)
    posted = post(nexus, 20)
    reconcile(nexus, server, posted)
    assert {asked.path for asked in server.posts()} == {"/events"}
    server.leave()
    posted += post(nexus, 20)
    until(lambda: nexus.bridge.circuit.state == "open", "the circuit open")
    server.supports = ("batch",)
    server.listen()
    reconcile(nexus, server, posted)
    until(lambda: "batch" in nexus.bridge.partner.supports, "batch found out")
    posted += post(nexus, 20)
    reconcile(nexus, server, posted)
    assert "/events/batch" in {asked.path for asked in server.posts()}


def test_a_partner_slow_per_event_is_served_in_smaller_calls(start_nexus, make):
    server = make()
    server.on_post = partners.slow_per_event(0.004)
    nexus = run(start_nexus, server)
    posted = post(nexus, 400, users=20)
    reconcile(nexus, server, posted)
    assert nexus.bridge.throttle.events < 500


def test_calls_run_side_by_side_at_a_distant_partner_and_users_stay_in_order(start_nexus, make):
    server = make()
    server.on_post = partners.slow(0.05)
    nexus = run(start_nexus, server)
    nexus.bridge.control("pause")
    posted = post(nexus, 15_000, users=50)
    nexus.bridge.control("resume")
    until(lambda: nexus.bridge.throttle.lanes > 2, "several calls in flight")
    reconcile(nexus, server, posted)
