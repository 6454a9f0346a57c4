"""The circuit breaker and the throttle as pure logic: time, latencies and outcomes are passed in."""

from __future__ import annotations

import random

import pytest

from pipeline.bridge import circuit as breaker
from pipeline.bridge.circuit import Circuit
from pipeline.bridge.throttle import MOST_EVENTS, MOST_LANES, Throttle

NOW = 1_000_000
PROBE_MS = 5_000


def fail(circuit: Circuit, now: int, times: int = 1, retry_after_s: float | None = None) -> int:
    """Failures, each once the circuit lets it be tried; the time then."""
    for _ in range(times):
        now = max(now, circuit.retry_at)
        assert circuit.admits(now, PROBE_MS)
        circuit.failed(now, "it failed", retry_after_s, 30.0, now)
    return now


def test_it_opens_on_failures_in_a_row_and_lets_nothing_through_until_its_pause_is_over():
    circuit = Circuit()
    now = fail(circuit, NOW, breaker.FAILURES_IN_A_ROW - 1)
    assert circuit.state == "closed"
    now = fail(circuit, now)
    assert (circuit.state, circuit.opened_at, circuit.failing_since) == ("open", now, NOW)
    assert not circuit.admits(circuit.retry_at - 1, PROBE_MS)
    assert circuit.admits(circuit.retry_at, PROBE_MS)
    assert circuit.state == "half_open"


def test_it_opens_on_the_share_of_failures_even_when_they_are_not_in_a_row():
    circuit, now = Circuit(), NOW
    for i in range(2 * breaker.LEAST_CALLS):
        if circuit.state != "closed":
            break
        now = max(now + 10, circuit.retry_at)
        if i % 2:
            circuit.succeeded(now, False, now)
        else:
            circuit.failed(now, "it failed", None, 30.0, now)
    assert circuit.state == "open"


def test_it_opens_on_the_share_of_slow_calls():
    circuit = Circuit()
    for i in range(breaker.LEAST_CALLS):
        circuit.succeeded(NOW + i, True, NOW + i)
    assert circuit.state == "open"
    assert "slow" in str(circuit.reason)


def test_old_calls_leave_the_window():
    circuit = Circuit()
    for i in range(breaker.LEAST_CALLS - 1):
        circuit.succeeded(NOW + i, True, NOW + i)
    later = NOW + breaker.WINDOW_MS + 100
    circuit.succeeded(later, True, later)
    assert circuit.state == "closed"
    assert len(circuit.window) == 1


def test_half_open_lets_one_probe_through_at_a_time():
    circuit = Circuit()
    fail(circuit, NOW, breaker.FAILURES_IN_A_ROW)
    now = circuit.retry_at
    assert circuit.admits(now, PROBE_MS)
    assert not circuit.admits(now + 1, PROBE_MS)


def test_a_probe_that_never_reports_is_given_up():
    circuit = Circuit()
    fail(circuit, NOW, breaker.FAILURES_IN_A_ROW)
    now = circuit.retry_at
    assert circuit.admits(now, PROBE_MS)
    assert not circuit.admits(now + PROBE_MS - 1, PROBE_MS)
    assert circuit.admits(now + PROBE_MS, PROBE_MS)


def test_a_probes_success_closes_and_its_failure_opens_for_longer(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    circuit = Circuit()
    now = fail(circuit, NOW, breaker.FAILURES_IN_A_ROW)
    before = circuit.retry_at - now
    now = fail(circuit, now)
    assert circuit.state == "open"
    assert circuit.retry_at - now > before
    assert circuit.admits(circuit.retry_at, PROBE_MS)
    assert circuit.succeeded(circuit.retry_at, False, circuit.retry_at)
    assert (circuit.state, circuit.failures, circuit.opened_at) == ("closed", 0, None)


def test_pauses_are_jittered_over_the_whole_range_and_bounded():
    pauses = []
    for _ in range(300):
        circuit = Circuit()
        now = fail(circuit, NOW, 10)
        pauses.append(circuit.retry_at - now)
    assert max(pauses) <= 1000 * breaker.LAST_PAUSE_S
    assert min(pauses) < 5_000 < 25_000 < max(pauses)


def test_a_health_interval_bounds_the_pause():
    circuit = Circuit()
    for _ in range(12):
        now = max(NOW, circuit.retry_at)
        circuit.failed(now, "it failed", None, 1.0, now)
        assert circuit.retry_at - now <= 1000


def test_a_long_health_interval_does_not_lengthen_the_pause(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    circuit = Circuit()
    for _ in range(20):
        now = max(NOW, circuit.retry_at)
        circuit.failed(now, "it failed", None, 3_600.0, now)
        assert circuit.retry_at - now <= 1000 * breaker.LAST_PAUSE_S


def test_retry_after_is_the_least_pause_and_good_health_does_not_shorten_it():
    circuit = Circuit()
    now = fail(circuit, NOW, 1, retry_after_s=20)
    assert circuit.retry_at >= now + 20_000
    circuit.confirm(now, "offline")
    assert not circuit.good_news(now + 100, idle=True)
    assert circuit.state == "open"
    assert not circuit.admits(now + 19_999, PROBE_MS)


def test_a_good_answer_beside_it_does_not_shorten_retry_after():
    circuit = Circuit()
    circuit.failed(NOW + 10, "429", 20.0, 30.0, NOW)
    circuit.succeeded(NOW + 20, False, NOW)
    assert not circuit.admits(NOW + 20_009, PROBE_MS)
    assert circuit.admits(NOW + 20_010, PROBE_MS)
    now = fail(circuit, NOW + 30_000, breaker.FAILURES_IN_A_ROW)
    assert circuit.admits(circuit.retry_at, PROBE_MS)
    circuit.failed(now + 40_000, "429", 20.0, 30.0, now)
    circuit.state = "half_open"
    assert circuit.succeeded(now + 40_010, False, now)
    assert not circuit.admits(now + 59_999, PROBE_MS)


@pytest.mark.parametrize("failures", [1, breaker.FAILURES_IN_A_ROW])
def test_a_clock_set_back_by_an_hour_holds_nothing_up(failures):
    circuit, hour = Circuit(), 3_600_000
    fail(circuit, NOW + hour, failures, retry_after_s=60)
    assert circuit.admits(NOW, PROBE_MS)
    circuit.failed(NOW, "it failed", None, 30.0, NOW)
    assert NOW < circuit.retry_at <= NOW + 1000 * breaker.LAST_PAUSE_S
    circuit.state, circuit.retry_at, circuit.probe_until = "half_open", 0, NOW + hour
    assert circuit.admits(NOW, PROBE_MS)


def test_a_call_that_fails_afterwards_does_not_change_a_persons_reason():
    circuit = Circuit()
    circuit.force_open(NOW)
    circuit.failed(NOW + 10, "it failed", None, 30.0, NOW - 10)
    assert (circuit.state, circuit.reason) == ("open", "opened by hand")


def test_failures_side_by_side_make_one_pause():
    circuit = Circuit()
    circuit.failed(NOW, "it failed", None, 30.0, NOW - 50)
    first = circuit.retry_at
    circuit.failed(NOW, "it failed", None, 30.0, NOW - 40)
    assert (circuit.retry_at, circuit.pauses) == (first, 1)


def test_a_health_check_confirms_a_failure_but_opens_nothing_by_itself():
    circuit = Circuit()
    assert not circuit.confirm(NOW, "offline")
    circuit.failed(NOW, "it failed", None, 30.0, NOW)
    assert circuit.confirm(NOW, "offline")
    assert circuit.state == "open"


def test_good_health_closes_an_idle_circuit_and_hurries_a_waiting_one():
    circuit = Circuit()
    fail(circuit, NOW, breaker.FAILURES_IN_A_ROW)
    assert not circuit.good_news(NOW, idle=False)
    assert circuit.admits(NOW, PROBE_MS)
    assert circuit.good_news(NOW, idle=True)
    assert circuit.state == "closed"


def test_a_call_from_before_the_opening_does_not_close_it():
    circuit = Circuit()
    now = fail(circuit, NOW, breaker.FAILURES_IN_A_ROW)
    assert not circuit.succeeded(now + 10, False, NOW - 10)
    assert circuit.state == "open"


@pytest.mark.parametrize("act", [lambda c: c.succeeded(NOW, False, NOW), lambda c: c.good_news(NOW, idle=True)])
def test_what_a_person_opened_only_a_person_closes(act):
    circuit = Circuit()
    circuit.force_open(NOW)
    act(circuit)
    assert circuit.state == "open"
    assert not circuit.admits(NOW + 10**9, PROBE_MS)
    circuit.reset()
    assert circuit.admits(NOW, PROBE_MS)


def test_paused_lets_nothing_through_and_keeps_the_state():
    circuit = Circuit(paused=True)
    assert not circuit.admits(NOW, PROBE_MS)
    assert circuit.state == "closed"


# ------------------------------------------------------------------------------------------- the throttle


def serve(throttle: Throttle, calls: int, latency_ms: float, width: int, timeout_ms: float = 5_000) -> None:
    """Calls at a partner that works on `width` of them side by side and lets the others queue."""
    for _ in range(calls):
        throttle.went_well(True, latency_ms * max(1.0, throttle.lanes / width), timeout_ms)


def test_lanes_grow_while_the_latency_holds():
    throttle = Throttle()
    serve(throttle, 1_500, 100, width=64)
    assert throttle.lanes == MOST_LANES


def test_lanes_stay_few_at_a_partner_that_works_on_one_call_at_a_time():
    throttle, seen = Throttle(), []
    for _ in range(1_000):
        serve(throttle, 1, 10, width=1)
        seen.append(throttle.lanes)
    assert max(seen) <= 5
    assert sorted(seen)[len(seen) // 2] >= 2


def test_lanes_shrink_when_the_latency_grows():
    throttle = Throttle()
    serve(throttle, 400, 100, width=8)
    before = throttle.lanes
    serve(throttle, 60, 1_000, width=1, timeout_ms=1e9)
    assert throttle.lanes < before


def test_a_call_that_ran_out_of_time_halves_the_events_and_quick_ones_double_them_again():
    throttle = Throttle()
    throttle.failed(MOST_EVENTS, timed_out=True)
    assert throttle.events == MOST_EVENTS // 2
    throttle.failed(10, timed_out=True)
    assert throttle.events == 5
    throttle.failed(1, timed_out=True)
    assert throttle.events == 1
    serve(throttle, 400, 5, width=64)
    assert throttle.events == MOST_EVENTS


def test_after_a_recovery_it_begins_with_one_lane():
    throttle = Throttle()
    serve(throttle, 300, 100, width=64)
    throttle.restart()
    assert throttle.lanes == 1


def test_another_partner_is_tried_at_once_and_answers_for_nothing_that_the_one_before_did():
    circuit = Circuit(url="http://one")
    fail(circuit, NOW, breaker.FAILURES_IN_A_ROW, retry_after_s=50.0)
    opened_at = circuit.opened_at
    circuit.another("http://two")
    assert (circuit.url, circuit.state, circuit.failures, circuit.reason) == ("http://two", "half_open", 0, None)
    assert circuit.opened_at == opened_at  # the outage goes on until somebody takes events
    assert circuit.admits(NOW, PROBE_MS)
    circuit.succeeded(NOW, False, NOW)
    assert (circuit.state, circuit.url) == ("closed", "http://two")


def test_a_circuit_opened_by_hand_stays_so_for_another_partner():
    circuit = Circuit(url="http://one")
    circuit.force_open(NOW)
    circuit.another("http://two")
    assert (circuit.state, circuit.reason, circuit.admits(NOW, PROBE_MS)) == ("open", "opened by hand", False)


def test_failures_at_another_address_do_not_add_up():
    circuit = Circuit(url="http://one")
    now = fail(circuit, NOW, breaker.FAILURES_IN_A_ROW - 1)
    circuit.another("http://two")
    fail(circuit, now)
    assert (circuit.state, circuit.failures, circuit.failing_since) == ("closed", 1, now)
