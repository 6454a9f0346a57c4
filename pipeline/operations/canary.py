"""Canaries: events of Nexus's own that take the whole real path, each hop timed. They count nowhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline import events as event_forms
from pipeline.commit_log.frames import ALL_STREAMS, CANARY
from pipeline.errors import NexusError, PartnerError
from pipeline.ingest import Verdicts
from pipeline.keys import LOCAL_STREAMS
from pipeline.log import Taken

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

WAIT_S = 5.0
SOURCE = "nexus"
_SLACK_S, _LOOK_S = 1.0, 0.25


class NotTried(Exception):
    """A hop that was left out, and why; not a failure."""


class Canary:
    """Sends one along and reports; `latest` is the last periodic one's report, None before the first."""

    def __init__(self, nexus: Runtime) -> None:
        self._nexus = nexus
        self.latest: dict[str, Any] | None = None

    def periodic(self) -> dict[str, Any] | None:
        """The job: by the instance that runs the pipeline; the partner has part in it where it says that it takes
        canaries."""
        if self._nexus.runner.state != "running":
            return None
        at = self._nexus.clock()
        self.latest = {"at": at, **self.run(partner_always=False)}
        return self.latest

    def run(self, partner_always: bool = True) -> dict[str, Any]:
        """{"success", "steps": [{"name", "ok", "ms", "detail"}], "duration_ms"}; of the streams, which work side by
        side, `ms` counts from the moment the log had the canary. A hop left out is ok and says why."""
        nexus, began = self._nexus, time.perf_counter()
        steps: list[dict[str, Any]] = []
        event = event_forms.canary(event_forms.uuid7(nexus.clock()), nexus.clock())
        taken: list[Taken] = []
        in_log = began

        def step(name: str, work: Callable[[], str], since: float | None = None) -> None:
            at = time.perf_counter() if since is None else since
            try:
                ok, detail = True, work()
            except NotTried as why:
                ok, detail = True, str(why)
            except Exception as error:  # noqa: BLE001  the report is there to say what fails, whatever it is
                ok = False
                detail = error.message if isinstance(error, NexusError) else f"{type(error).__name__}: {error}"
            steps.append({"name": name, "ok": ok, "ms": round((time.perf_counter() - at) * 1000, 2), "detail": detail})

        def ingest() -> str:
            taken.append(nexus.ingest.take(Verdicts([event], [0], [], [event.event_id]), SOURCE, ALL_STREAMS | CANARY))
            return f"in the log as {event.event_id}"

        def reach(name: str) -> Callable[[], str]:
            def wait() -> str:
                if not taken:
                    raise NotReached("not tried: the log did not take the canary")
                deadline = time.monotonic() + WAIT_S
                while not nexus.runner.wait_for(name, taken[0].end, min(_LOOK_S, deadline - time.monotonic())):
                    if nexus.stopping or time.monotonic() >= deadline:
                        raise NotReached(f"the {name} stream did not reach the canary within {WAIT_S:g} s")
                return "processed"

            return wait

        def bridge() -> str:
            return self._bridge(event.body, taken[0] if taken else None, partner_always)

        def combined() -> str:
            found = nexus.features.combine([event_forms.CANARY_USER])[event_forms.CANARY_USER]
            return f"{len(found.combined)} combined features"

        step("ingest", ingest)
        in_log = time.perf_counter()
        for name in LOCAL_STREAMS:
            step(name, reach(name), in_log)
        step("bridge", bridge, in_log)
        if partner_always:
            step("python_health", self._python_health)
        step("combined_features", combined)
        duration_ms = round((time.perf_counter() - began) * 1000, 2)
        return {"success": all(s["ok"] for s in steps), "steps": steps, "duration_ms": duration_ms}

    def _bridge(self, body: bytes, taken: Taken | None, partner_always: bool) -> str:
        nexus, bridge = self._nexus, self._nexus.bridge
        if not nexus.live["ENABLE_PYTHON_BRIDGE"]:
            reason = "the bridge is switched off (ENABLE_PYTHON_BRIDGE)"
            raise NotReached(reason) if partner_always else NotTried(reason)
        if "canary" not in bridge.partner.supports:
            if not partner_always:
                raise NotTried("the Python service does not say that it takes canaries")
            if bridge.gate.shut:
                raise NotReached(bridge.halted or "the bridge is halted")
            before = bridge.reached()
            delivery = nexus.in_bridge(bridge.partner.send([body]))[0]
            if delivery.error is not None:
                raise delivery.error
            if delivery.rejected:
                raise NotReached(f"the Python service refused it: {delivery.rejected[0][1]}")
            sent = f"sent directly, answered {delivery.status}"
            if taken is None or bridge.wait_for(taken.end, self._timeout_s()):
                return sent
            if bridge.reached() > before:
                return f"{sent}; a backlog is on its way"
            raise NotReached(f"{sent}, but the backlog does not move" + (f": {why}" if (why := bridge.halted) else ""))
        if taken is None:
            raise NotReached("not tried: the log did not take the canary")
        if not bridge.wait_for(taken.end, self._timeout_s()):
            raise NotReached(bridge.halted or "it waits behind a backlog, or was not answered in time")
        if (words := bridge.canary_refusals.get(taken.end - 1)) is not None:
            raise NotReached(f"the Python service refused it: {words}")
        return "delivered"

    def _python_health(self) -> str:
        health = self._nexus.in_bridge(self._nexus.bridge.check_health())
        if health.status == "offline":
            raise PartnerError(health.reason or "offline")
        took = "" if health.response_time_ms is None else f", {health.response_time_ms:.1f} ms"
        return f"{health.status}{took}"

    def _timeout_s(self) -> float:
        return float(self._nexus.live["PYTHON_SERVICE_TIMEOUT"]) / 1000 + _SLACK_S


class NotReached(NexusError):
    """A hop that the canary did not come through."""

    def __init__(self, message: str) -> None:
        super().__init__("not_reached", message)
