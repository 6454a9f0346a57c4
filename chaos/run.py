"""One chaos run from start to verdict."""

from __future__ import annotations

import time
from pathlib import Path

from chaos.audit import Watch, audit, drained
from chaos.clients import Client, Ledger
from chaos.faults import Saboteur, plan
from chaos.report import Run
from chaos.system import System, Unanswered

CLIENTS = 4
_DRAIN_S = 300.0
_RECOVER_S = 90.0


def run(folder: Path, seed: int, kills: int, events: int, seconds: float, past_lease: bool) -> Run:
    """Load a system of its own in `folder` for about `seconds` while it is sabotaged, drain it, audit it, end it."""
    system, result = System(folder), Run(seed)
    try:
        system.start()
        _sabotage(system, result, kills, events, seconds, past_lease)
    except (TimeoutError, RuntimeError, Unanswered) as error:
        result.trouble.append(str(error))
    finally:
        system.stop()
    return result


def _sabotage(system: System, result: Run, kills: int, events: int, seconds: float, past_lease: bool) -> None:
    began = time.monotonic()
    ledger, watch = Ledger(), Watch(system)
    saboteur = Saboteur(system, plan(result.seed, kills, seconds, past_lease))
    each = -(-events // CLIENTS)
    clients = [Client(system, ledger, n, result.seed, each, saboteur.progress) for n in range(CLIENTS)]
    for thread in (watch, saboteur, *clients):
        thread.start()
    for thread in (saboteur, *clients):
        thread.join()
    result.seconds = time.monotonic() - began
    result.faults, result.traffic = saboteur.figures, ledger.figures
    result.sent, result.acknowledged = len(ledger.sent), len(ledger.acknowledged)
    result.trouble += [client.gave_up for client in clients if client.gave_up]
    result.trouble += [saboteur.not_back] if saboteur.not_back else []
    try:
        system.wait(system.healthy, _RECOVER_S, "the system to become healthy after the last fault")
        result.drain_s = system.wait(lambda: drained(system), _DRAIN_S, "the streams to drain")
    finally:
        watch.stop()
        result.looks, result.unanswered = watch.looks, watch.unanswered
        result.trouble += [*watch.unexplained[:5], *ledger.contradictions[:5]]
    result.findings = audit(system, ledger)
