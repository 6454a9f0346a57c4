"""The scheduler: one run of a job at a time, late ones counted, intervals changed at run time, an end that waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StoreRefused, StoreUnavailable
from pipeline.jobs import Every, Job, Scheduler
from tests.helpers import DEADLINE_S, until


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a job of a test waits for."""
    event = threading.Event()
    yield event
    event.set()


def row(scheduler: Scheduler, name: str) -> dict[str, object]:
    return next(row for row in scheduler.describe() if row["name"] == name)


def test_job_that_is_still_running_is_not_run_beside_itself_and_its_turn_counts_as_late(gate):
    at_once, most = 0, 0

    def work() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        gate.wait(DEADLINE_S)
        at_once -= 1

    scheduler = Scheduler([Job("slow", lambda: 0.05, work), Job("other", lambda: 0.05, lambda: None)])
    scheduler.start()
    until(lambda: scheduler.jobs["slow"].late >= 2, "late turns")
    until(lambda: scheduler.jobs["other"].runs >= 5, "the other job's turns")
    gate.set()
    until(lambda: scheduler.jobs["slow"].runs >= 2, "the turn after the late ones")
    scheduler.stop()
    assert most == 1


@pytest.mark.parametrize("hours", [-1, 1, 24 * 366])
def test_clock_that_is_set_neither_stops_a_job_nor_brings_its_turn_forward(hours, scheduler_clock):
    often, seldom = Job("often", lambda: 0.05, lambda: None), Job("seldom", lambda: 1800.0, lambda: None)
    scheduler = Scheduler([often, seldom])
    scheduler.start()
    until(lambda: often.runs >= 3, "the turns before")
    scheduler_clock[0] = hours * 3600.0
    before = often.runs
    until(lambda: often.runs >= before + 20, "the turns after")  # a second's: more than one wait
    upcoming: Any = row(scheduler, "seldom")["next_in_s"]
    scheduler.stop()
    assert seldom.runs == 1
    assert 1800 - DEADLINE_S < upcoming <= 1801
    assert (often.late, seldom.late) == (0, 0)


@pytest.mark.parametrize("hours", [-1, 1])
def test_interval_changed_just_after_the_clock_was_set_counts_from_then(hours, scheduler_clock):
    every = [3600.0]
    scheduler = Scheduler([Job("job", lambda: every[0], lambda: None)])
    scheduler.start()
    until(lambda: scheduler.jobs["job"].runs == 1, "the first run")
    scheduler_clock[0] = hours * 3600.0
    every[0] = 1000.0
    scheduler.reschedule()
    scheduler._scheduler._process_jobs()  # as in the second after
    upcoming: Any = row(scheduler, "job")["next_in_s"]
    scheduler.stop()
    assert 1000 - DEADLINE_S < upcoming <= 1001


def test_job_that_was_late_is_told_as_late_until_a_turn_is_on_time(gate):
    scheduler = Scheduler([Job("job", lambda: 0.05, lambda: gate.wait(DEADLINE_S))])
    scheduler.start()
    until(lambda: row(scheduler, "job")["late_now"], "a late turn")
    gate.set()
    until(lambda: not row(scheduler, "job")["late_now"], "a turn on time")
    scheduler.stop()
    assert row(scheduler, "job")["late"]


def test_job_that_throws_is_told_and_run_again():
    tries = iter([StoreUnavailable("away"), ValueError("a bug")])

    def work() -> str:
        for error in tries:
            raise error
        return "well"

    scheduler = Scheduler([Job("job", lambda: 0.05, work)])
    job = scheduler.jobs["job"]
    scheduler.start()
    until(lambda: job.result == "well", "a good run")
    scheduler.stop()
    assert job.runs >= 3
    assert (job.ok, job.error) == (True, None)


def test_job_is_broken_as_long_as_it_fails_for_a_reason_that_waiting_does_not_mend():
    errors = [StoreUnavailable("away"), ValueError("a bug"), StoreRefused("a wrong key"), None]

    def work() -> None:
        if (error := errors.pop(0)) is not None:
            raise error

    job = Job("job", lambda: 1.0, work)
    scheduler, told = Scheduler([job]), []
    while errors:
        job()
        told.append(scheduler.broken())
    assert told == [[], ["the job job fails: ValueError: a bug"], ["the job job fails: a wrong key"], []]


def test_interval_changed_at_run_time_is_taken_over_at_once():
    every = [3600.0]
    scheduler = Scheduler([Job("job", lambda: every[0], lambda: None)])
    scheduler.start()
    until(lambda: scheduler.jobs["job"].runs == 1, "the first run")
    every[0] = 0.05
    scheduler.reschedule()
    until(lambda: scheduler.jobs["job"].runs >= 3, "further runs")
    scheduler.stop()


@given(part=st.floats(0, 0.999), every=st.integers(1, 100), began=st.floats(0, 1e9))
def test_job_of_whole_seconds_runs_in_its_own_part_of_the_second_and_never_before_its_time(part, every, began):
    trigger = Every(every, part)
    first = datetime.fromtimestamp(began, UTC)
    second = trigger.get_next_fire_time(first, first)
    assert every <= (second - first).total_seconds() < every + 1
    assert second.microsecond == round(part * 1e6)
    third = trigger.get_next_fire_time(second, second)
    assert (third - second).total_seconds() == every


def test_jobs_of_one_interval_do_not_begin_together():
    scheduler = Scheduler([Job(name, lambda: 1.0, lambda: None) for name in "abcd"])
    now = datetime.fromtimestamp(1e9, UTC)
    times = {scheduler._trigger(job).get_next_fire_time(now, now) for job in scheduler.jobs.values()}
    assert sorted((at - now).total_seconds() for at in times) == [1.0, 1.25, 1.5, 1.75]


def test_stop_waits_for_a_running_job_even_where_that_job_looks_at_the_table(gate):
    seen: list[object] = []
    began = threading.Event()

    def work() -> None:
        began.set()
        gate.wait(DEADLINE_S)
        seen.append(row(scheduler, "job"))

    scheduler = Scheduler([Job("job", lambda: 3600.0, work)])
    scheduler.start()
    assert began.wait(DEADLINE_S)
    stopping = threading.Thread(target=scheduler.stop, daemon=True)
    stopping.start()
    until(lambda: scheduler._scheduler.state == 2, "the scheduler paused")
    gate.set()
    stopping.join(DEADLINE_S)
    assert not stopping.is_alive()
    assert len(seen) == 1
