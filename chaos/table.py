"""Writes docs/faults.md: runs the tests of faults, kills and stops each process under load, and measures bytes, all anew.

python -m chaos.table [--out docs/faults.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from chaos.audit import HEALTH, audit, drained
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
    "store": "requests wait; beyond some seconds they are answered 503 with Retry-After",
}
_TESTS = ("test_faults_*.py", "test_bridge_faults.py")
_BYTES_OF = 20_000  # events
_SETTLE_S = 12.0  # longer than Nexus waits between two looks at its footprint
_PAGE = """# Faults

What a user sees of each fault, and how long until all is as before once its cause is gone. Nothing here needs a restart of Nexus.
Lost: acknowledged events that a recount over HTTP did not find. Doubled: effects that were there too often or too rarely, over
all streams. Meanwhile a client posts all the time, and sends each batch again until it has its 202.

All of this page is written by `make faults` (`python -m chaos.table`) from what it has just run, here on {machine}:
the tests `tests/test_faults_*.py` and `tests/test_bridge_faults.py`, which `make test` runs too, and the real processes under load.
`make chaos` does all kills and stops in a random order, and recounts everything at the end.

| fault | what the user sees | seconds to recover | lost | doubled |
|---|---|---|---|---|
{rows}

## Bytes

What the store spends, as `GET /api/ml/events/ingest?check=health` says after {events} events of {users} users. An event's bytes are
those of the log and its index; a user's those of feature tiles, payment habit and public features.

| | bytes |
|---|---|
| per stored event | {per_event:,.0f} |
| per event id | {per_id:,.0f} |
| per user | {per_user:,.0f} |
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.table", description="Write the table of faults.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "faults.md")
    out = parser.parse_args().out
    rows = [*processes(), *tests()]
    machine = f"{os.cpu_count()} cores with Python {platform.python_version()}"
    page = _PAGE.format(rows="\n".join(map(_line, rows)), machine=machine, **footprint())
    out.parent.mkdir(exist_ok=True)
    out.write_text(page)
    print(page)
    return 0 if rows and not any(row["lost"] - row.get("as_dead_letters", 0) or row["doubled"] for row in rows) else 1


def _line(row: Row) -> str:
    told = f", told as {row['as_dead_letters']} dead letters" if row.get("as_dead_letters") else ""
    return f"| {row['fault']} | {row['shows']} | {row['recovered_s']:.1f} | {row['lost']}{told} | {row['doubled']} |"


def footprint() -> dict[str, Any]:
    """The bytes that a fresh system tells of after some load."""
    with tempfile.TemporaryDirectory(prefix="nexus-bytes-") as folder:
        system, ledger = System(Path(folder)), Ledger()
        try:
            system.start()
            client = Client(system, ledger, 0, 1, _BYTES_OF, lambda: 1.0)
            client.start()
            client.join()
            system.wait(lambda: drained(system), 60, "the streams to drain")
            time.sleep(_SETTLE_S)
            _, health = system.get(HEALTH)
        finally:
            system.stop()
    users = {event["user_id"] for event in ledger.sent.values()}
    return {"events": f"{_BYTES_OF:,}", "users": len(users), **health["bytes"]}


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
        names = sorted(str(path) for pattern in _TESTS for path in (ROOT / "tests").glob(pattern))
        words = [sys.executable, "-m", "pytest", "-q", "--headless", "-o", "junit_family=xunit1"]
        done = subprocess.run([*words, f"--junitxml={report.name}", *names], cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError("a test of faults fails; there is no table then")
        found = ElementTree.parse(report.name).iter("property")
        return [json.loads(p.attrib["value"]) for p in found if p.attrib["name"] == "fault"]


if __name__ == "__main__":
    sys.exit(main())
