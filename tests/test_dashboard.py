"""The dashboard in a real browser, against a live server with a feed whose scenario each test chooses."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from dash.testing.browser import Browser
from werkzeug.serving import make_server

from tests.fake_nexus import DEADLINE_S, STREAMS, FakeNexus


@pytest.fixture(scope="module")
def nexus_server() -> Iterator[tuple[FakeNexus, str]]:
    fake = FakeNexus()
    server = make_server("127.0.0.1", 0, fake.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield fake, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(DEADLINE_S)


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    downloads = str(tmp_path_factory.mktemp("downloads"))
    with Browser("Chrome", headless=True, percy_run=False, download_path=downloads) as browser:
        yield browser


class Page:
    """The overview in the browser, with waits that have a deadline."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.driver = browser.driver
        self.url = url

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, element: str) -> str:
        return str(self.run("const e = document.getElementById(arguments[0]); return e ? e.textContent : ''", element))

    def wait(self, condition: Callable[[], object], what: str) -> None:
        limit = time.monotonic() + DEADLINE_S
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < limit, f"{what}; the verdict says: {self.text('verdict-title')!r}"
            pause.wait(0.05)

    def open(self, path: str = "/nexus/") -> Page:
        self.driver.get(self.url + path)
        return self

    def verdict(self, words: str) -> None:
        self.wait(lambda: words in self.text("verdict-title"), f"the verdict never said {words!r}")

    def click(self, element: str) -> None:
        self.wait(
            lambda: self.run("const e = document.getElementById(arguments[0]); return e && !e.disabled", element),
            f"{element} never became clickable",
        )
        self.run("document.getElementById(arguments[0]).click()", element)

    def checked(self, element: str) -> bool:
        return bool(self.run("return document.getElementById(arguments[0])?.checked", element))

    def graphs_drawn(self) -> bool:
        return bool(self.run("return document.querySelectorAll('.js-plotly-plot .scatterlayer').length === 4"))

    def console_errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def nexus(nexus_server: tuple[FakeNexus, str]) -> Iterator[FakeNexus]:
    nexus_server[0].reset()
    yield nexus_server[0]
    nexus_server[0].reset()


@pytest.fixture
def page(nexus: FakeNexus, nexus_server: tuple[FakeNexus, str], chrome: Browser) -> Page:
    chrome.driver.get_log("browser")  # what an earlier test left is not this one's
    return Page(chrome, nexus_server[1])


def _with(nexus: FakeNexus, page: Page, scenario: str) -> Page:
    nexus.reset(scenario)
    return page.open()


def test_a_second_dashboard_in_one_process_has_every_callback_of_the_first() -> None:
    first, second = ([c["output"] for c in FakeNexus().dependencies()] for _ in range(2))
    assert len(first) > 10
    assert second == first


@pytest.mark.parametrize(
    ("scenario", "level", "words"),
    [
        ("busy", "ok", "Both systems work as one"),
        ("empty", "idle", "Nothing flows yet"),
        ("python_dead", "bad", "1,204 events wait in the log, nothing is lost"),
        ("store_away", "bad", "Store is away: ingest refuses with 503, Nexus resumes by itself"),
        ("draining", "warn", "Python service catches up: 48,210 events wait in the log"),
        ("standby", "idle", "This instance stands by"),
        ("paused", "warn", "The bridge is paused"),
        ("unexplained", "bad", "1 event unexplained"),
        ("no_fields", "unknown", "figures are not known yet"),
    ],
)
def test_one_verdict_names_the_cause_and_the_impact(
    nexus: FakeNexus, page: Page, scenario: str, level: str, words: str
) -> None:
    _with(nexus, page, scenario).verdict(words)
    assert page.run("return document.getElementById('verdict').dataset.level") == level
    assert page.console_errors() == []


@pytest.mark.parametrize("scenario", ["every_field_null", "no_fields", "store_away"])
def test_missing_figures_show_a_dash_and_break_nothing(nexus: FakeNexus, page: Page, scenario: str) -> None:
    _with(nexus, page, scenario)
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    page.wait(lambda: len([r for r in nexus.requests if "feed.json" in r[1]]) > 3, "the page stopped asking")
    shown = page.run("return document.body.innerText")
    assert [word for word in ("NaN", "undefined", "null") if word in shown] == []
    assert page.console_errors() == []


def test_a_sick_element_is_marked_by_word_and_level_and_the_others_are_not(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "python_dead").verdict("offline")
    level = "return document.getElementById(arguments[0]).dataset.level"
    assert page.run(level, "node-python") == "bad"
    assert page.run(level, "stream-bridge") == "warn"
    assert [page.run(level, f"stream-{name}") for name in STREAMS[:4]] == ["ok"] * 4
    assert "offline" in page.text("node-python")


def test_an_idle_page_asks_for_the_feed_alone_and_runs_no_callback_on_the_server(nexus: FakeNexus, page: Page) -> None:
    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    nexus.requests.clear()
    page.wait(lambda: len(nexus.requests) >= 5, "the page stopped asking")
    assert {path.split("?")[0] for _, path in nexus.requests} == {"/nexus/feed.json"}


def test_nothing_is_requested_from_another_host(page: Page) -> None:
    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    entries = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(entries) > 10
    assert {urlsplit(name).netloc for name in entries if not name.startswith("data:")} == {urlsplit(page.url).netloc}


def test_the_history_is_asked_for_at_load_and_after_a_restart_only(nexus: FakeNexus, page: Page) -> None:
    def asked() -> int:
        return sum("history=1" in path for _, path in nexus.requests)

    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    assert asked() == 1
    nexus.boot = "two"
    page.wait(lambda: asked() == 2, "the history was not asked for after a restart")


def test_graphs_hold_at_most_300_points(page: Page) -> None:
    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    size = "const [d] = document.querySelector('#chart-throughput .js-plotly-plot').data; return [d.x.length, d.x[299]]"
    page.wait(lambda: page.run(size)[0] == 300, "the graph was never seeded")
    newest = page.run(size)[1]
    page.wait(lambda: page.run(size)[1] > newest, "the graph was never extended")
    assert page.run(size)[0] == 300


def test_a_feed_that_fails_is_said_calmly_and_the_page_recovers(nexus: FakeNexus, page: Page) -> None:
    page.open().verdict("Both systems work as one")
    nexus.failing = True
    page.verdict("Nexus does not answer, last data")
    assert "Both systems work as one" in page.text("verdict-detail")
    assert "1,240" in page.text("tile-throughput")
    nexus.failing = False
    page.verdict("Both systems work as one")


def test_a_slow_answer_is_waited_for_and_never_asked_twice(nexus: FakeNexus, page: Page) -> None:
    page.open().verdict("Both systems work as one")
    nexus.hold.clear()
    before = len(nexus.requests)
    page.wait(lambda: len(nexus.requests) > before, "the page stopped asking")
    age = "return Number(document.getElementById('data-ago').textContent.trim().split(' ')[0])"
    page.wait(lambda: page.run(age) >= 3, "the age was not counted while the answer was awaited")
    assert len(nexus.requests) == before + 1
    nexus.hold.set()
    page.wait(lambda: page.run(age) <= 1, "the page did not go on")


def test_a_switch_sends_the_change_and_shows_what_the_feed_says(nexus: FakeNexus, page: Page) -> None:
    page.open()
    page.wait(lambda: page.checked("HYBRID_FEATURE_MODE"), "the switch never showed the truth")
    page.click("HYBRID_FEATURE_MODE")
    page.verdict("Hybrid mode is off")
    assert nexus.received == [{"settings": {"HYBRID_FEATURE_MODE": False}, "reason": "dashboard"}]
    assert not page.checked("HYBRID_FEATURE_MODE")
    page.wait(lambda: "set here" in page.text("HYBRID_FEATURE_MODE-source"), "the source was not shown")
    page.click("HYBRID_FEATURE_MODE-reset")
    page.verdict("Both systems work as one")
    assert nexus.received[-1]["settings"] == {"HYBRID_FEATURE_MODE": None}
    assert page.checked("HYBRID_FEATURE_MODE")


def test_a_refused_switch_goes_back_and_shows_the_words_of_the_server(nexus: FakeNexus, page: Page) -> None:
    page.open()
    page.wait(lambda: page.checked("ENABLE_PYTHON_BRIDGE"), "the switch never showed the truth")
    nexus.refuse = True
    page.click("ENABLE_PYTHON_BRIDGE")
    page.wait(lambda: "the store says no" in page.run("return document.body.innerText"), "no words of the server")
    page.wait(lambda: page.checked("ENABLE_PYTHON_BRIDGE"), "the switch does not show the truth")


def _type(page: Page, element: str, text: str) -> None:
    field = page.driver.find_element("id", element)
    page.run("arguments[0].focus(); arguments[0].select()", field)
    field.send_keys(text)


def test_a_number_is_applied_within_its_bounds_only(nexus: FakeNexus, page: Page) -> None:
    name = "FEATURE_SYNC_INTERVAL"
    page.open()
    page.wait(lambda: page.run("return document.getElementById(arguments[0])?.value", name) == "300 s", "no value")
    _type(page, name, "999999")
    page.wait(lambda: "between 1 and 86,400" in page.text("tile-controls"), "the bounds were not said")
    assert page.run("return document.getElementById(arguments[0]).disabled", f"{name}-apply")
    _type(page, name, "60")
    page.click(f"{name}-apply")
    page.wait(lambda: "set here" in page.text(f"{name}-source"), "the new source was not shown")
    assert nexus.received == [{"settings": {name: 60}, "reason": "dashboard"}]


def test_pausing_acts_at_once_and_opening_the_circuit_asks_first(nexus: FakeNexus, page: Page) -> None:
    page.open().verdict("Both systems work as one")
    page.click("bridge-pause")
    page.verdict("The bridge is paused")
    page.click("bridge-resume")
    page.verdict("Both systems work as one")
    page.click("bridge-open")
    page.click("open-circuit-yes")
    page.wait(lambda: len(nexus.received) == 3, "the circuit was not opened")
    assert [body["action"] for body in nexus.received] == ["pause", "resume", "open_circuit"]


def test_the_whole_way_is_tested_hop_by_hop(page: Page) -> None:
    page.open().click("bridge-test")
    page.wait(lambda: "all hops answer" in page.text("test-summary"), "no result")
    assert page.run("return document.querySelectorAll('#test-steps li').length") == 4


def test_an_empty_nexus_offers_sample_traffic_and_says_it_is_simulated(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "empty").verdict("Nothing flows yet")
    page.click("sample-send")
    page.wait(lambda: len(nexus.received) >= 2, "no traffic came")
    first = copy.deepcopy(nexus.received[0])
    assert (first["source"], len(first["events"])) == ("simulator", 40)
    assert {"event_type", "user_id", "timestamp", "data"} <= first["events"][0].keys()
    assert len(json.dumps(first)) < 64 * 1024
    page.wait(
        lambda: page.run("return [...document.querySelectorAll('.badge-simulated')].every(e => !e.hidden)"),
        "the traffic is not marked as simulated",
    )


@pytest.mark.parametrize("width", [390, 1280, 2560])
def test_the_page_fits_its_window(page: Page, width: int) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    page.open().verdict("Both systems work as one")
    widths = page.run("const d = document.documentElement; return [window.innerWidth, d.scrollWidth - d.clientWidth]")
    assert widths == [width, 0]
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_theme_follows_the_system_and_a_choice_is_remembered(page: Page) -> None:
    scheme = "return document.documentElement.dataset.mantineColorScheme"
    for system in ("dark", "light"):
        media = {"features": [{"name": "prefers-color-scheme", "value": system}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        page.open().verdict("Both systems work as one")
        assert page.run(scheme) == system
    page.click("theme")
    page.wait(lambda: page.run(scheme) == "dark", "the theme did not change")
    page.open().verdict("Both systems work as one")
    assert page.run(scheme) == "dark"
    page.run("localStorage.clear()")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
