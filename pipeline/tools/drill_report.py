"""What a drill prints: when the fault was noticed and got over, and what became of every event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.tools.post import Receipt


@dataclass
class Report:
    """What the drill saw. Times in seconds; `moments` counts them from the beginning or the end of the fault."""

    what: str
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    moments: dict[str, float | None] = field(default_factory=dict)
    unexplained: int = 0  # the most at any look
    most_queued: int = 0
    outage: dict[str, Any] | None = None
    own: Receipt = field(default_factory=Receipt)
    own_states: dict[str, int] = field(default_factory=dict)
    unanswered: int = 0
    calm_p99_ms: float | None = None
    fault_p99_ms: float | None = None

    @property
    def lost(self) -> int:
        """Events of the drill's own that were acknowledged and are now neither delivered nor dead letters."""
        settled = self.own_states.get("done", 0) + self.own_states.get("dead", 0)
        return self.own.accepted + self.own.duplicates - settled

    @property
    def good(self) -> bool:
        proven = self.outage is None or self.outage["unexplained"] == 0
        return self.unexplained == 0 and self.lost == 0 and self.unanswered == 0 and proven

    def lines(self) -> Iterator[str]:
        def row(name: str, value: object) -> str:
            return f"  {name:<34} {value}"

        def delta(of: Callable[[dict[str, Any]], int]) -> int:
            return of(self.after) - of(self.before)

        yield f"drill: {self.what}"
        yield row("accepted for the Python service", delta(accepted))
        yield row("  of these the drill's own", self.own.accepted + self.own.duplicates)
        yield row("most that waited at once", self.most_queued)
        yield row("delivered", delta(lambda health: int(health["streams"]["bridge"]["processed"])))
        yield row("dead letters", delta(lambda health: int(health["streams"]["bridge"]["failed"])))
        for name, seconds in self.moments.items():
            yield row(name, "never" if seconds is None else f"{seconds:.1f} s")
        if self.outage is not None:
            o = self.outage
            yield row("outage, as the ledger has it", f"{o['began']} to {o['ended']}: {o['reason']}")
            yield row("  queued, delivered, dead", f"{o['queued']}, {o['delivered']}, {o['dead']}")
            yield row("  users affected", o["users"])
            yield row("  caught up with in", f"{o['catch_up_s']} s, {o['catch_up_rate'] or '-'} events/s")
        if self.calm_p99_ms is not None and self.fault_p99_ms is not None:
            yield row("ingest p99 before, during", f"{self.calm_p99_ms:.1f} ms, {self.fault_p99_ms:.1f} ms")
        yield row(
            "receipts of the drill's own", ", ".join(f"{n} {s}" for s, n in sorted(self.own_states.items())) or "-"
        )
        yield row("lost", self.lost)
        yield row("unexplained", self.unexplained)
        yield "passed" if self.good else "FAILED"


def accepted(health: dict[str, Any]) -> int:
    """Events accepted for the Python service, of an answer of ?check=health."""
    return int(health["totals"]["accepted"]) + int(health["totals"]["bridge_only"])
