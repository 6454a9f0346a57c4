"""The report of a chaos run: what was done to the system, what it was sent, and what the audit found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from chaos.audit import Findings
from chaos.system import TARGETS


@dataclass
class Run:
    """A run's figures. `trouble` holds what went wrong beside the audit: a part that never came back, say."""

    seed: int
    seconds: float = 0.0
    drain_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    acknowledged: int = 0
    looks: int = 0
    unanswered: int = 0
    findings: Findings = field(default_factory=Findings)
    trouble: list[str] = field(default_factory=list)

    @property
    def mismatches(self) -> int:
        return self.findings.mismatches + len(self.trouble)

    def text(self) -> str:
        """The run in lines for people."""
        kills = ", ".join(f"{self.faults[f'kills of {target}']} {target}" for target in TARGETS)
        stops = ", ".join(f"{self.faults[f'stops of {target}']} {target}" for target in TARGETS if target != "nexus")
        traffic, checked = self.traffic, self.findings.checked
        rows = [
            ("seed", f"{self.seed}"),
            ("time", f"{self.seconds:.0f} s, then {self.drain_s:.1f} s until drained"),
            ("kills", f"{self.faults['kills']} ({kills})"),
            ("stops", f"{self.faults['stops']} ({stops}), {self.faults['stops past the lease']} past the lease"),
            ("events", f"{self.sent} sent, {self.acknowledged} acknowledged, {checked['stored events']} stored"),
            ("late", f"{traffic['late_events']} by their time, {traffic['late_batches']} batches by their arrival"),
            ("posts", f"{traffic['posts']}: {traffic['refused']} refused, {traffic['lost_answers']} unanswered"),
            ("resends", f"{traffic['resends']}"),
            ("duplicates", f"{traffic['duplicates']} told to the clients"),
            ("looks", f"{self.looks} at the accounts, {self.unanswered} more while they could not be read"),
            ("checked", ", ".join(f"{n} {what}" for what, n in checked.most_common())),
            ("mismatches", f"{self.mismatches}"),
        ]
        lines = [f"{name:<11}{value}" for name, value in rows]
        return "\n".join([*lines, *(f"MISMATCH   {line}" for line in [*self.trouble, *self.findings.lines])])
