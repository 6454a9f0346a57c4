"""Drills make their faults on a running system, and their report adds up."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline.settings import load
from pipeline.tools import drill
from pipeline.tools.drill import Drill, Failed, duration
from pipeline.tools.drill_report import Report
from pipeline.tools.fault_proxy import FaultProxy
from tests.helpers import ROOT, FakePartner, Part, clean_environment, free_port, until


@pytest.fixture
def system(tmp_path: Path, partner: FakePartner) -> Iterator[dict[str, str]]:
    """Nexus as a process with an embedded store of its own, before a partner of the test's; its environment."""
    environment = clean_environment(
        NEXUS_PORT=str(free_port()),
        NEXUS_DATA_DIR=str(tmp_path / "data"),
        NEXUS_LOG_DIR=str(tmp_path / "logs"),
        PYTHON_EVENT_API_URL=partner.url,
        PYTHON_SERVICE_TIMEOUT="500",
        HEALTH_CHECK_INTERVAL="1",
    )
    nexus = Part("app.py", int(environment["NEXUS_PORT"]), environment, tmp_path / "out.log")
    nexus.start("/readyz")
    health = "/api/ml/bridge/python?action=health"
    until(lambda: nexus.http.get(health).json()["status"] == "online", "the partner online")
    yield environment
    nexus.close()


@pytest.mark.parametrize("slow", [False, True], ids=["down", "slow"])
def test_a_drill_sees_the_fault_and_accounts_for_every_event(system, partner, slow):
    made = Drill(f"http://127.0.0.1:{system['NEXUS_PORT']}", 200.0, lambda _: None)
    try:
        report = made.partner("the partner away", 3.0, slow=slow)
    finally:
        made.close()
    lines = list(report.lines())
    assert report.good, lines
    assert lines[-1] == "passed"
    assert report.moments["circuit open after"] is not None
    assert report.most_queued > 0
    assert report.outage is not None
    assert (report.outage["unexplained"], report.lost, report.unexplained) == (0, 0, 0)
    assert report.own_states == {"done": report.own.accepted + report.own.duplicates}
    assert set(partner.ids) >= set(made._traffic.ids)
    settings = httpx.get(f"http://127.0.0.1:{system['NEXUS_PORT']}/api/ml/settings").json()["settings"]
    assert settings["PYTHON_EVENT_API_URL"]["value"] == partner.url
    assert settings["PYTHON_EVENT_API_URL"]["source"] == "environment"


def test_what_goes_on_waiting_once_the_fault_is_over_is_counted_until_the_service_is_back(monkeypatch):
    made, report, online = Drill("http://127.0.0.1:1", 0.0, lambda _: None), Report("", before={}), iter([False, True])
    monkeypatch.setattr(made, "_healthy", lambda: next(online))
    monkeypatch.setattr(made, "_health", lambda: {"streams": {"bridge": {"pending": 7}}, "unexplained": 0})
    try:
        assert not made._back(report)
        assert report.most_queued == 7
        assert made._back(report)
    finally:
        made.close()


def test_the_command_prints_the_report_and_exits_with_0(system, monkeypatch, capsys):
    for name in ("NEXUS_PORT", "NEXUS_DATA_DIR", "NEXUS_LOG_DIR"):
        monkeypatch.setenv(name, system[name])
    assert drill.main(["partner-down", "1s", "--rate", "100"]) == 0
    assert "unexplained                        0\npassed\n" in capsys.readouterr().out


def test_a_drill_that_is_terminated_puts_the_setting_back(system, partner, tmp_path):
    base = f"http://127.0.0.1:{system['NEXUS_PORT']}"

    def setting() -> Any:
        return httpx.get(f"{base}/api/ml/settings").json()["settings"]["PYTHON_EVENT_API_URL"]

    with (tmp_path / "drill.log").open("w") as out:
        command = [sys.executable, "-m", "pipeline.tools.drill", "partner-down", "60s", "--nexus", base, "--rate", "0"]
        process = subprocess.Popen(command, cwd=ROOT, env=system, stdout=out, stderr=out)
    until(lambda: setting()["source"] == "store", "the drill's proxy in the partner's place")
    process.terminate()
    assert process.wait(30) == 1
    assert (setting()["source"], setting()["value"]) == ("environment", partner.url)
    assert "put back" in (tmp_path / "drill.log").read_text()


def test_an_external_store_is_not_killed():
    made = Drill("http://127.0.0.1:9", 0.0, lambda _: None)
    with pytest.raises(Failed, match="external"):
        made.store("store-restart", load({"REDIS_URL": "redis://127.0.0.1:1"}))
    made.close()


def test_a_nexus_that_is_not_there_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("NEXUS_PORT", str(free_port()))
    assert drill.main(["partner-down", "1s"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_report_with_a_lost_event_is_no_success():
    report = Report("test")
    assert report.good
    report.own.accepted, report.own_states = 3, {"done": 2, "pending": 1}
    assert (report.lost, report.good) == (1, False)
    report = Report("test", unexplained=1)
    assert not report.good


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("2m", 120), ("500ms", 0.5), ("7", 7)])
def test_durations_are_read(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "5h", "-1s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)


def test_the_proxy_passes_on_breaks_off_refuses_and_is_back(partner):
    host, port = partner.url.removeprefix("http://").split(":")
    with FaultProxy((host, int(port))) as proxy, httpx.Client(base_url=f"http://127.0.0.1:{proxy.port}") as http:
        assert http.get("/health").status_code == 200
        proxy.down()
        with pytest.raises(httpx.TransportError):
            http.get("/health")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port))
        proxy.up()
        assert http.get("/health").status_code == 200
        proxy.delay_s = 60.0
        with pytest.raises(httpx.ReadTimeout):
            http.get("/health", timeout=0.2)
