"""Writes docs/faults.md: runs the tests of faults, and a chaos run, and puts what they saw into one table.

python -m chaos.table [--out docs/faults.md]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from chaos.audit import audit, drained
from chaos.clients import Client, Ledger
from chaos.faults import LEASE_S, Fault, Saboteur
from chaos.run import CLIENTS
from chaos.system import ROOT, System

Row = dict[str, Any]
_WORDS = {"worker": "Nexus's worker", "nexus": "Nexus", "service": "the Python service", "store": "the store"}
_KILLED = {
    "worker": "connections refused; clients send again",
    "nexus": "connections refused; clients send again",
    "service": "the partner shows as offline; Nexus goes on, the bridge's backlog is the log",
    "store": "503 with Retry-After; the store shows as offline",
}
_STOPPED = {
    "worker": "requests wait or time out; clients send again",
    "service": "the partner shows as offline after its timeout; Nexus goes on, the bridge's backlog is the log",
    "store": "requests wait, after 5 s they are answered 503",
}
_HEAD = """# Faults

What each fault shows, how long until all is healthy again once its cause is gone, and what was lost and doubled: acknowledged
events that were not there at the recount, and effects that were there too often or too rarely, over all streams.

Written by `python -m chaos.table` from real runs; the tests are `tests/test_faults_*.py`, the runs under load `make chaos`.

| fault | what the user sees | s until healthy | lost | doubled |
|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.table", description="Write the table of faults.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "faults.md")
    out = parser.parse_args().out
    rows = [*processes(), *tests()]
    lines = [
        f"| {row['fault']} | {row['shows']} | {row['recovered_s']:.1f} | {row['lost']} | {row['doubled']} |"
        for row in rows
    ]
    out.parent.mkdir(exist_ok=True)
    out.write_text(_HEAD + "\n".join(lines) + "\n")
    print(f"{out}: {len(rows)} faults")
    return 0 if rows and not any(row["lost"] or row["doubled"] for row in rows) else 1


def processes() -> list[Row]:
    """Kill and stop each process of a system under load, one after the other."""
    faults = [Fault(target, 0.5) for target in _WORDS]
    faults += [Fault("worker", 0.5, LEASE_S + 2.0), Fault("service", 0.5, 3.0), Fault("store", 0.5, 3.0)]
    return [_under_load(fault) for fault in faults]


def _under_load(fault: Fault) -> Row:
    with tempfile.TemporaryDirectory(prefix="nexus-faults-") as folder:
        system, ledger = System(Path(folder)), Ledger()
        try:
            system.start()
            saboteur = Saboteur(system, [fault])
            clients = [Client(system, ledger, n, 1, 500, saboteur.progress) for n in range(CLIENTS)]
            for thread in (saboteur, *clients):
                thread.start()
            saboteur.join()
            began = time.monotonic()
            system.wait(lambda: system.healthy() and drained(system), 120, "the system to be healthy")
            recovered_s = time.monotonic() - began
            for client in clients:
                client.join()
            system.wait(lambda: drained(system), 60, "the streams to drain")
            found = audit(system, ledger)
        finally:
            system.stop()
    lost = sum("is lost" in line for line in found.lines)
    what = "killed -9" if fault.kills else f"stopped for {fault.hold_s:g} s"
    shows = (_KILLED if fault.kills else _STOPPED)[fault.target]
    name = f"{_WORDS[fault.target]} {what}"
    row = {"fault": name, "shows": shows, "recovered_s": recovered_s}
    return row | {"lost": lost, "doubled": found.mismatches - lost}


def tests() -> list[Row]:
    """What the tests of faults saw. Raises RuntimeError where one fails."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        names = sorted(str(path) for path in (ROOT / "tests").glob("test_faults_*.py"))
        words = [sys.executable, "-m", "pytest", "-q", "--headless", "-o", "junit_family=xunit1"]
        done = subprocess.run([*words, f"--junitxml={report.name}", *names], cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError("a test of faults fails; there is no table then")
        found = ElementTree.parse(report.name).iter("property")
        return [json.loads(p.attrib["value"]) for p in found if p.attrib["name"] == "fault"]


if __name__ == "__main__":
    sys.exit(main())
