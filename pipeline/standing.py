"""How things stand: how old what waits is, and why all is not well, each reason with what it is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from pipeline.checkpoints import Audit

if TYPE_CHECKING:
    from pipeline.runtime import Runtime

BEHIND_S = 10.0


class Reason(TypedDict):
    """`about`: stream, partner, store, log, accounts, retention or job."""

    about: str
    text: str


def lag_seconds(nexus: Runtime, audit: Audit, now: int) -> dict[str, float]:
    """For each stream that has events to process the age of the oldest of them; `now` in epoch ms."""
    behind = {
        name: account.position
        for name, account in audit.accounts.items()
        if account.pending > 0 and nexus.live_ordinal(name) < audit.head.ordinal
    }
    arrivals = nexus.log.arrivals(list(behind.values()))
    return {name: max(0.0, (now - at) / 1000) for name, at in zip(behind, arrivals, strict=True) if at is not None}


def reasons(
    nexus: Runtime, audit: Audit | None, lags: Mapping[str, float], store: Mapping[str, object]
) -> list[Reason]:
    """Why all is not well, in words; `audit` is None where the store does not answer."""
    found: list[Reason] = []

    def add(about: str, text: str) -> None:
        found.append({"about": about, "text": text})

    elsewhere = nexus.runner.state == "standby" and audit is not None and audit.owned
    for name, (state, detail) in nexus.stream_states().items():
        lag = lags.get(name, 0.0)
        if (state != "running" and name != "bridge" and not elsewhere) or lag >= BEHIND_S:
            add("stream", f"{name}: {state}, {lag:.0f} s behind" + (f" ({detail})" if detail else ""))
    if (partner := nexus.partner_status())["status"] not in ("online", "disabled"):
        add("partner", f"the Python service is {partner['status']}: {partner['reason']}")
    if store["status"] != "online":
        add("store", f"the store is {store['status']}: {store['detail']}")
    if fell := nexus.log.mark.reason:
        add("log", fell)
    if audit is not None and audit.unexplained:
        add("accounts", f"events unexplained: {audit.unexplained}")
    if held_by := nexus.retention.latest["held_back"]:
        add("retention", f"events past their retention are kept for {', '.join(held_by)}, yet to read them")
    for text in nexus.scheduler.broken():
        add("job", text)
    return found
