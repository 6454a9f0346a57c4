"""How things stand: how old what waits is, and why all is not well, each reason with what it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from pipeline import keys
from pipeline.commit_log.checkpoints import Audit
from pipeline.commit_log.frames import Position

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

BEHIND_S = 10.0
BRIDGE_OFF = (
    "Set ENABLE_PYTHON_BRIDGE to true, with a Python service that takes them (event_api.py does):"
    " nothing of its backlog is given up, and ingest refuses once the memory is full of it"
)


class Reason(TypedDict):
    """`about`: stream, partner, store, log, accounts, retention or job."""

    about: str
    text: str


class Lag(NamedTuple):
    """How far a stream is behind: `seconds` is the age of the oldest event that it has yet to process. Of those that it has
    processed and no checkpoint holds yet there are `unsaved`, the oldest `unsaved_s` old: read again after a crash."""

    seconds: float = 0.0
    unsaved: int = 0
    unsaved_s: float = 0.0


def lags(nexus: Runtime, audit: Audit, now: int) -> dict[str, Lag]:
    """Of each stream, from where it stands itself where it runs here, else from its checkpoint; `now` in epoch ms."""
    places: dict[str, tuple[Position, Position]] = {}
    for name, account in audit.accounts.items():
        if account.pending > 0:
            saved, live = account.position, nexus.live_position(name)
            places[name] = saved, live if live is not None and live.ordinal > saved.ordinal else saved
    frames = nexus.log.next_frames([position for both in places.values() for position in both])
    found = dict.fromkeys(audit.accounts, Lag())
    for (name, (_, at)), unsaved, waiting in zip(places.items(), frames[::2], frames[1::2], strict=True):
        left = pending = audit.accounts[name].pending
        if at.ordinal >= audit.head.ordinal:
            left = 0
        elif waiting is not None:
            stream = keys.STREAMS.index(name)
            left = min(pending, max(0, audit.head.addressed[stream] - waiting[1][stream] - at.index))
        lag_s = _age_s(waiting, now) if left else 0.0
        found[name] = Lag(lag_s, pending - left, _age_s(unsaved, now) if left < pending else 0.0)
    return found


def _age_s(frame: tuple[int, list[int]] | None, now: int) -> float:
    return 0.0 if frame is None else max(0.0, (now - frame[0]) / 1000)


def reasons(nexus: Runtime, audit: Audit | None, lags: Mapping[str, Lag], store: Mapping[str, object]) -> list[Reason]:
    """Why all is not well, in words; `audit` is None where the store does not answer."""
    found: list[Reason] = []

    def add(about: str, text: str) -> None:
        found.append({"about": about, "text": text})

    elsewhere = nexus.runner.state == "standby" and audit is not None and audit.owned
    for name, (state, detail) in nexus.stream_states().items():
        lag = lags[name].seconds if name in lags else 0.0
        if (state != "running" and name != "bridge" and not elsewhere) or lag >= BEHIND_S:
            add("stream", f"{name}: {state}, {lag:.0f} s behind" + (f" ({detail})" if detail else ""))
    if (partner := nexus.partner_status())["status"] not in ("online", "disabled"):
        add("partner", f"the Python service is {partner['status']}: {partner['reason']}")
    if store["status"] != "online":
        stands = (
            "how the store stands is not known" if store["status"] == "unknown" else f"the store is {store['status']}"
        )
        add("store", f"{stands}: {store['detail']}")
    if fell := nexus.log.mark.reason:
        add("log", fell)
    if audit is not None and audit.unexplained:
        add("accounts", f"events unexplained: {audit.unexplained}")
    kept = nexus.retention.told()  # some seconds ago
    if held_by := [name for name in kept["held_back"] if audit is None or audit.accounts[name].pending]:
        due = "events past their retention" if kept["due_for"] == "age" else "for want of memory events should go, but"
        off = "bridge" in held_by and not nexus.live["ENABLE_PYTHON_BRIDGE"]
        remedy = f": it is switched off. {BRIDGE_OFF}" if off else ""
        add("retention", f"{due} are kept for {', '.join(held_by)}, yet to read them{remedy}")
    for text in nexus.scheduler.broken():
        add("job", text)
    return found
