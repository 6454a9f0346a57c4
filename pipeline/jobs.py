"""The table of APScheduler jobs: name, how often, what. Late runs are counted, a job never runs beside itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_SUBMITTED, JobSubmissionEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from pipeline.errors import NexusError, StoreRefused

PIPELINE, HEALTH_CHECK = "pipeline", "health check"
_SECOND_US = 1_000_000
_SET_S = 1.0  # a clock that moves by more than the time that passed was set
log = logging.getLogger(__name__)
logging.getLogger("apscheduler").setLevel(logging.ERROR)  # it warns at each refused turn of a job that still runs


@dataclass(slots=True)
class Job:
    """A job: seconds between runs, given by a function since settings change at run time. Figures for the dashboard."""

    name: str
    every_s: Callable[[], float]
    run: Callable[[], Any]
    last_ms: float | None = None
    late: int = 0  # turns that were
    late_now: bool = False  # the latest was
    ok: bool | None = None
    error: str | None = None
    broken: bool = False  # it failed for a reason that waiting does not mend
    result: Any = None
    runs: int = field(default=0)

    def __call__(self) -> None:
        began = time.perf_counter()
        try:
            self.result = self.run()
            self.ok, self.error, self.broken = True, None, False
        except NexusError as error:  # the store or the partner is away: reported, tried again at the next run
            self.ok, self.error, self.broken = False, error.message, isinstance(error, StoreRefused)
        except Exception as error:
            self.ok, self.error, self.broken = False, f"{type(error).__name__}: {error}", True
            log.exception("job failed", extra={"job": self.name})
        self.last_ms = (time.perf_counter() - began) * 1000
        self.runs += 1
        log.debug("job ran", extra={"job": self.name, "ms": round(self.last_ms, 2), "error": self.error})


class Every(IntervalTrigger):
    """Every so many seconds; from the second run on in the job's own part of the second, where these are whole: jobs that
    begin together take each other's time, and that of every request meanwhile. `part` is from 0 up to 1."""

    def __init__(self, seconds: float, part: float) -> None:
        super().__init__(seconds=seconds, timezone=UTC)
        self._part_us, self._whole = round(part * _SECOND_US), float(seconds).is_integer()

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        at: datetime = super().get_next_fire_time(previous_fire_time, now)
        return at + timedelta(microseconds=(self._part_us - at.microsecond) % _SECOND_US) if self._whole else at


class Steady(BackgroundScheduler):
    """Goes by the time that passes: where the wall clock, which APScheduler goes by, is set, all turns are moved along with it."""

    _ahead_s = 0.0  # of the wall clock before the monotonic one, when turns were last in step with it

    def follow_clock(self) -> None:
        with self._jobstores_lock:
            ahead_s = datetime.now(UTC).timestamp() - time.monotonic()
            moved_s = ahead_s - self._ahead_s
            if abs(moved_s) < _SET_S:
                return
            self._ahead_s = ahead_s
            for job in self.get_jobs():
                job.modify(next_run_time=job.next_run_time + timedelta(seconds=moved_s))

    def _process_jobs(self) -> float | None:
        self.follow_clock()
        wait_s: float | None = super()._process_jobs()
        return None if wait_s is None else min(wait_s, _SET_S)  # the clock may be set while it works out how long


class Scheduler:
    """One BackgroundScheduler for the process, with the table of jobs."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = {job.name: job for job in jobs}
        # A long job (the pipeline, which runs until stop) holds a thread of its own: the pool has one for each job.
        self._pool = ThreadPoolExecutor(len(jobs) + 1)
        self._scheduler = Steady(
            executors={"default": self._pool},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
            timezone=UTC,
        )
        self._scheduler.add_listener(self._late, EVENT_JOB_SUBMITTED | EVENT_JOB_MAX_INSTANCES)

    def start(self) -> None:
        self._scheduler.follow_clock()
        for job in self.jobs.values():
            self._scheduler.add_job(
                job, self._trigger(job), id=job.name, name=job.name, next_run_time=datetime.now(UTC)
            )
        self._scheduler.start()

    def reschedule(self) -> None:
        """Take over intervals that were changed."""
        self._scheduler.follow_clock()  # or turns by the new clock would be moved with those by the old one
        for job in self.jobs.values():
            scheduled = self._scheduler.get_job(job.name)
            if scheduled is not None and scheduled.trigger.interval.total_seconds() != job.every_s():
                self._scheduler.reschedule_job(job.name, trigger=self._trigger(job))

    def _trigger(self, job: Job) -> Every:
        return Every(job.every_s(), list(self.jobs).index(job.name) / len(self.jobs))

    def stop(self) -> None:
        """Ends the scheduler once running jobs are through; those that run until stop must have been told before."""
        if self._scheduler.running:
            self._scheduler.pause()
            self._pool.shutdown(
                wait=True
            )  # not the scheduler's own wait, which keeps a lock that running jobs may ask for
            self._scheduler.shutdown(wait=False)

    def describe(self) -> list[dict[str, Any]]:
        now = datetime.now(UTC)
        rows = []
        for job in self.jobs.values():
            scheduled = self._scheduler.get_job(job.name) if self._scheduler.running else None
            upcoming = scheduled.next_run_time if scheduled is not None else None
            rows.append(
                {
                    "name": job.name,
                    "every_s": job.every_s(),
                    "last_ms": None if job.last_ms is None else round(job.last_ms, 2),
                    "runs": job.runs,
                    "late": job.late,
                    "late_now": job.late_now,
                    "next_in_s": None if upcoming is None else round((upcoming - now).total_seconds(), 1),
                    "ok": job.ok,
                    "error": job.error,
                }
            )
        return rows

    def broken(self) -> list[str]:
        """The jobs whose last run failed for a reason that waiting does not mend, in words. Of the pipeline its streams' states
        tell: its run ends with the process."""
        jobs = [job for job in self.jobs.values() if job.broken and job.name != PIPELINE]
        return [f"the job {job.name} fails: {job.error}" for job in jobs]

    def _late(self, event: JobSubmissionEvent) -> None:
        """Count runs that began over a second after their time, or fell together with one still running."""
        job = self.jobs[event.job_id]
        if job.name == PIPELINE:
            return  # runs until stop: its further turns are meant to be refused, they are there to start it again
        late = event.code == EVENT_JOB_MAX_INSTANCES
        late |= (datetime.now(UTC) - event.scheduled_run_times[0]).total_seconds() > 1.0
        job.late, job.late_now = job.late + late, late
