"""The dashboard in a real browser, against a live server with a feed whose scenario each test chooses."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from dash.testing.browser import Browser
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
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
        drawn = "return document.querySelectorAll('.js-plotly-plot:has(.scatterlayer)').length === 4"
        return bool(self.run(drawn))

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
    chrome.driver.execute_cdp_cmd(
        "Storage.clearDataForOrigin", {"origin": nexus_server[1], "storageTypes": "local_storage"}
    )
    return Page(chrome, nexus_server[1])


def _with(nexus: FakeNexus, page: Page, scenario: str) -> Page:
    nexus.reset(scenario)
    return page.open()


def test_a_second_dashboard_in_one_process_has_every_callback_of_the_first() -> None:
    first, second = ([c["output"] for c in FakeNexus().dependencies()] for _ in range(2))
    assert len(first) > 5
    assert second == first


@pytest.mark.parametrize(
    ("scenario", "level", "words"),
    [
        ("busy", "ok", "Both systems work as one"),
        ("empty", "idle", "Nothing flows yet"),
        ("python_dead", "bad", "1,204 events wait in the log, nothing is lost"),
        ("store_away", "bad", "Store is away: ingest refuses with 503, Nexus resumes by itself"),
        ("draining", "warn", "Python service catches up: 48,210 events wait in the log"),
        ("recovering", "warn", "Python service catches up: 48,210 events wait in the log"),
        ("much_under_way", "ok", "Both systems work as one"),
        ("slow_partner", "warn", "Python service falls behind: 8,136 events wait in the log"),
        ("hanging", "warn", "Python service takes nothing: 8,136 events wait in the log"),
        ("standby", "idle", "This instance stands by"),
        ("paused", "warn", "The bridge is paused since "),
        ("unexplained", "bad", "1 event unexplained"),
        ("local_dead", "warn", "1 dead letter needs a look: inference"),
        ("store_degraded", "warn", "The store is degraded: acknowledged events are not safe in it"),
        ("store_unseen", "warn", "How the store stands is not known"),
        ("rolled_back", "bad", "Acknowledged events are lost"),
        ("job_broken", "warn", "The job retention fails: ValueError: not found"),
        ("half_open", "warn", "The bridge probes the Python service"),
        ("starting", "idle", "Nexus is starting"),
        ("streams_load", "idle", "Nexus is starting"),
        ("partner_not_asked", "idle", "Nexus runs, the Python service is being asked"),
        ("no_fields", "unknown", "figures are not known yet"),
    ],
)
def test_one_verdict_names_the_cause_and_the_impact(
    nexus: FakeNexus, page: Page, scenario: str, level: str, words: str
) -> None:
    _with(nexus, page, scenario).verdict(words)
    assert page.run("return document.getElementById('verdict').dataset.level") == level
    assert page.console_errors() == []


def test_dead_letters_of_any_stream_are_counted_and_marked_and_listed_on_demand(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "local_dead").verdict("1 dead letter needs a look: inference")
    pairs = "return [...document.querySelectorAll('#tile-store .pair')].map(e => e.textContent)"
    assert "dead letters1" in page.run(pairs)
    assert page.run("return [...document.querySelectorAll('td.dead')].map(e => e.dataset.level)").count("warn") == 1
    page.click("act-letters")
    page.wait(lambda: "amount is no number" in page.text("letters-list"), "the dead letters were not listed")
    assert "3 attempts" in page.text("letters-list")
    page.click("letters-redrive")
    page.verdict("Both systems work as one")
    assert nexus.received == [{"all": True}]
    words = "1 sent again. 1 not: it cannot be decoded."
    page.wait(lambda: words in page.run("return document.body.innerText"), "it was not told")
    page.wait(lambda: page.run("return document.getElementById('act-letters').hidden"), "there are none to show")
    words = "1 went through, 0 came back."
    page.wait(lambda: words in page.run("return document.body.innerText"), "the outcome was not told")


def test_what_was_sent_again_and_died_again_is_told_so(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "local_dead").verdict("1 dead letter needs a look")
    nexus.incurable = True
    page.click("act-letters")
    page.click("letters-redrive")
    words = "0 went through, 1 came back: amount is no number"
    page.wait(lambda: words in page.run("return document.body.innerText"), "the outcome was not told")


def test_dead_letters_that_the_reader_has_seen_are_no_news_until_more_come(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "local_dead").verdict("1 dead letter needs a look: inference")
    page.click("act-letters")
    page.verdict("Both systems work as one")
    assert "Also: 1 dead letter that you have seen." in page.text("verdict-detail")
    page.open().verdict("Both systems work as one")
    assert not page.run("return document.getElementById('act-letters').hidden")
    nexus.scenario = "more_dead"
    page.verdict("131 new dead letters need a look: bridge")
    nexus.scenario = "busy"
    page.verdict("Both systems work as one")
    assert page.run("return document.getElementById('act-letters').hidden")
    nexus.scenario = "local_dead"
    page.verdict("1 dead letter needs a look: inference")


def test_what_only_waits_for_a_checkpoint_is_told_apart_from_what_waits_to_be_processed(
    nexus: FakeNexus, page: Page
) -> None:
    _with(nexus, page, "slow_checkpoint").verdict("Stream storage falls behind: 20,000 events before it")
    rows = page.run("return [...document.querySelectorAll('#tile-streams tbody tr')].map(e => e.innerText)")
    assert rows[0].split("\t")[3:6] == ["27,846", "0 s", "27,812, 28 s"]
    parts = "return [...document.querySelectorAll('.bar-row')].map(e => e.querySelector('.bar-n').textContent)"
    assert page.run(parts)[:2] == ["481k + 27,846 + 0 + 0", "481k + 10,000 + 20,000 + 0"]
    assert "caught up" in page.text("stream-features")
    assert "20,000 behind" in page.text("stream-storage")


@pytest.mark.parametrize(
    ("scenario", "title", "detail", "acts"),
    [
        ("disk_full", "The store's disk is full", "STORE_MAX_MEMORY does not help.", []),
        ("memory_full", "until retention has made room", "Also: 13,001 events within their retention were let go", []),
        (
            "memory_full_while_paused",
            "Store is full and retention waits for the bridge",
            "The bridge has 27,500 events to read: the bridge is paused.",
            ["resume"],
        ),
        ("room_again", "13,001 events within their retention were let go of", "Raise STORE_MAX_MEMORY", []),
    ],
)
def test_full_store_is_told_with_what_is_full_and_who_holds_it_so(
    nexus: FakeNexus, page: Page, scenario: str, title: str, detail: str, acts: list[str]
) -> None:
    _with(nexus, page, scenario).verdict(title)
    told = page.text("verdict")
    assert detail in told
    assert [word for word in ("drains", "evicted", "Also: the bridge", "pipeline") if word in told] == []
    shown = "return [...document.querySelectorAll('[data-act]')].filter(e => !e.hidden).map(e => e.dataset.act)"
    assert page.run(shown) == acts
    assert ("13,001, latest" in page.text("tile-store")) == ("13,001" in told)


@pytest.mark.parametrize("scenario", ["frail_and_paused", "frail_and_away", "rolled_back"])
def test_nobody_is_told_that_nothing_is_lost_where_it_may_be(nexus: FakeNexus, page: Page, scenario: str) -> None:
    _with(nexus, page, scenario)
    title = {"frail_and_away": "Store is away", "rolled_back": "are lost"}.get(
        scenario, "The bridge is paused: 3 events"
    )
    page.verdict(title)
    told = page.text("verdict")
    assert "nothing is lost" not in told
    assert "come back with it" not in told
    assert ("some may be gone" in told) == (scenario == "frail_and_away")


def test_roll_back_is_told_with_what_health_says_of_it_and_what_else_is_wrong(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "rolled_back").verdict("Acknowledged events are lost")
    detail = page.text("verdict-detail")
    assert "The log had reached 113, now it ends at 0." in detail
    assert "Also: the bridge is paused; the job retention fails: ValueError." in detail


def test_hiccup_is_no_verdict_and_the_time_to_catch_up_is_told_only_once_it_is_known(
    nexus: FakeNexus, page: Page
) -> None:
    _with(nexus, page, "slow_partner").verdict("Both systems work as one")
    page.verdict("falls behind")  # seconds later
    assert "It takes 22 events/s, 1,240 come in." in page.text("verdict-detail")
    nexus.scenario = "recovering"
    page.wait(lambda: "Catching up." in page.text("verdict-detail"), "it does not say that it catches up")
    nexus.scenario = "draining"
    page.wait(lambda: "Caught up in about 42" in page.text("verdict-detail"), "it does not say when")


def test_standby_tells_once_that_it_is_one_and_what_else_is_wrong(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "frail_on_standby").verdict("This instance stands by")
    detail = page.text("verdict-detail")
    assert detail.count("nother instance") == 1
    assert "Also: the bridge is paused; the store is degraded." in detail
    shown = "return [...document.querySelectorAll('[data-act]')].filter(e => !e.hidden).map(e => e.dataset.act)"
    assert page.run(shown) == ["resume"]


def test_store_that_is_degraded_takes_events_and_is_not_drawn_as_refusing(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "store_degraded").verdict("The store is degraded")
    levels = "return ['node-ingest', 'node-log', 'node-combined'].map(id => document.getElementById(id).dataset.level)"
    assert page.run(levels) == ["warn"] * 3
    assert "503" not in page.text("flow")
    assert "both systems merged" in page.text("node-combined")
    assert page.run("return document.querySelectorAll('.wire[data-level=bad]').length") == 0


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("opened_by_hand", ". Reset circuit lets it send again."),
        ("half_open", "Trying now."),
        ("python_dead", "Next try in 4.0"),
    ],
)
def test_circuit_says_when_it_sends_again(nexus: FakeNexus, page: Page, scenario: str, words: str) -> None:
    _with(nexus, page, scenario)
    page.wait(lambda: words in page.text("verdict-detail"), "the next try was not told")
    assert ("Opened by hand at" in page.text("verdict-detail")) == (scenario == "opened_by_hand")


@pytest.mark.parametrize("scenario", ["paused", "opened_by_hand", "half_open", "python_dead"])
def test_features_are_not_called_merged_while_nothing_is_sent(nexus: FakeNexus, page: Page, scenario: str) -> None:
    _with(nexus, page, scenario)
    page.wait(lambda: "as last known" in page.text("node-combined"), "they count as merged")
    assert page.run("return document.getElementById('node-combined').dataset.level") == "warn"


def test_what_the_title_tells_is_not_told_again(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "probing_with_backlog").verdict("Python service is degraded: 48,210 events wait")
    assert "48,210" not in page.text("verdict-detail")
    assert "Also: 2 dead letters of bridge." in page.text("verdict-detail")


def test_buttons_of_the_verdict_do_what_it_advises(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "paused").verdict("The bridge is paused")
    shown = "return [...document.querySelectorAll('[data-act]')].filter(e => !e.hidden).map(e => e.dataset.act)"
    assert page.run(shown) == ["resume"]
    page.click("act-resume")
    page.verdict("Both systems work as one")
    nexus.scenario = "opened_by_hand"
    page.verdict("The circuit to the Python service is open")
    assert page.run(shown) == ["reset"]
    page.click("act-reset")
    page.verdict("Both systems work as one")
    assert [body["action"] for body in nexus.received] == ["resume", "reset_circuit"]
    assert page.run(shown) == []


def test_jobs_are_judged_by_their_latest_run_and_a_failed_one_says_why(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "troubled_jobs").verdict("Both systems work as one")
    rows = "return [...document.querySelectorAll('.job-row')].map(e => [e.dataset.level, e.innerText, e.title])"
    once_late, failed, late, well = page.run(rows)
    assert [row[0] for row in (once_late, failed, late, well)] == ["ok", "bad", "warn", "ok"]
    assert "3 of its turns began late" in once_late[2]
    assert "connection refused" in failed[1]


def test_outages_and_canaries_are_told_afterwards(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "after_an_outage").verdict("Both systems work as one")
    assert "6,666 queued, 6,666 delivered, 0 dead" in page.text("tile-errors")
    assert "it waits behind a backlog" in page.text("tile-bridge")


def _series(page: Page, chart: str, name: str) -> list[float | None]:
    script = "return [...document.querySelector(`#${arguments[0]} .js-plotly-plot`).data.find(d => d.name === arguments[1]).y]"
    return list(page.run(script, chart, name))


def test_errors_in_the_chart_are_the_same_after_a_reload_as_in_an_open_page(nexus: FakeNexus, page: Page) -> None:
    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    nexus.errors = 7
    page.wait(lambda: 7 in _series(page, "chart-errors", "errors"), "the errors of a tick are not in the chart")
    page.wait(lambda: _series(page, "chart-errors", "errors")[-1] == 0, "they were counted more than once")


def test_what_an_open_page_has_seen_outlasts_a_restart_of_nexus(nexus: FakeNexus, page: Page) -> None:
    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    before = sum(y is not None for y in _series(page, "chart-throughput", "ingest"))
    nexus.points, nexus.boot = 2, "two"
    page.wait(lambda: sum("history=1" in path for _, path in nexus.requests) == 2, "the history was not asked for")
    asked = len(nexus.requests)
    page.wait(lambda: len(nexus.requests) > asked + 1, "the page stopped asking")
    after = _series(page, "chart-throughput", "ingest")
    assert len(after) == 300
    assert sum(y is not None for y in after) > before - 20


def test_words_without_an_end_stay_inside_the_page(nexus: FakeNexus, page: Page) -> None:
    sizes = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    _with(nexus, page, "refusing").verdict("offline")
    wide = """return [...document.querySelectorAll('.verdict, .verdict :not(.sr-only), .error-row, .tile-foot')]
        .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.className)"""
    assert page.run(wide) == []
    assert page.run("return document.getElementById('verdict').getBoundingClientRect().height") < 420
    assert "x" * 400 in page.run("return document.querySelector('.error-detail').title")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_first_verdict_is_spoken_and_its_words_do_not_stay_to_grow_old(page: Page) -> None:
    page.open()
    page.wait(lambda: page.text("verdict-spoken") == "Both systems work as one", "nothing was spoken")
    page.wait(lambda: page.text("verdict-spoken") == "", "they stayed")


def test_nothing_moves_and_nothing_is_green_that_depends_on_a_store_which_is_away(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "store_stopped").verdict("Store is away")
    assert page.run("return document.querySelectorAll('.wire-flow[data-moves=true]').length") == 0
    level = "return document.getElementById(arguments[0]).dataset.level"
    parts = ("node-ingest", "node-log", "node-nexus", "node-combined", *[f"stream-{name}" for name in STREAMS])
    assert [part for part in parts if page.run(level, part) == "ok"] == []
    assert "–/s" in page.text("stream-features")


def test_dead_letters_of_several_streams_are_counted_in_sound_words(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "dead_while_paused").verdict("The bridge is paused")
    assert "Also: 132 dead letters: 1 of inference and 131 of bridge." in page.text("verdict-detail")


def test_no_event_took_any_time_before_there_was_one(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "empty").verdict("Nothing flows yet")
    assert "0 users at work · no event yet" in page.text("tile-freshness")
    nexus.reset()
    page.verdict("Both systems work as one")
    assert "readable after 20 ms, at Python after 60 ms" in page.text("tile-freshness")


def test_every_clock_names_its_time_zone(page: Page) -> None:
    page.driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Kolkata"})
    page.open().verdict("Both systems work as one")
    page.wait(lambda: " UTC+5:30 " in page.text("data-at"), "the header names no time zone")
    iso = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"
    for element in (".badge-age", ".error-at"):
        title = page.run("return document.querySelector(arguments[0]).title", element)
        assert re.fullmatch(iso, title), element
    assert re.search(
        r"checked \d{4}-\d\d-\d\dT.*Z$",
        page.run("return document.querySelector('#tile-python .tile-foot .figure').title"),
    )
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    ticks = "return [...document.querySelectorAll('#chart-throughput .xtick text')].map(e => e.textContent.slice(0, 5))"
    page.wait(lambda: page.run(ticks), "the graph has no clock")
    near = {time.strftime("%H:%M", time.gmtime(time.time() + 5.5 * 3600 - 60 * ago)) for ago in range(-1, 8)}
    assert set(page.run(ticks)) <= near
    page.driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": ""})


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


def test_a_silence_that_lasts_is_grave_and_so_are_figures_that_stand_still(nexus: FakeNexus, page: Page) -> None:
    page.open().verdict("Both systems work as one")
    nexus.failing = True
    level = "return document.getElementById('verdict').dataset.level"
    page.verdict("Nexus does not answer, last data")
    assert page.run(level) == "warn"
    page.wait(lambda: page.run(level) == "bad", "the silence stayed a hiccup")
    icon = "const e = document.getElementById('favicon'); return [e.dataset.level, e.href.slice(0, 18)]"
    assert page.run(icon) == ["bad", "data:image/svg+xml"]
    nexus.failing, nexus.still = False, int(time.time() * 1000)
    page.verdict("Both systems work as one")
    page.verdict("The figures of Nexus stand still")
    assert page.run(level) == "bad"


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
    page.wait(lambda: "set here, default: on" in page.text("HYBRID_FEATURE_MODE-source"), "the source was not shown")
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
    page.wait(lambda: page.run("return document.getElementById(arguments[0])?.value", name) == "300", "no value")
    _type(page, name, "999999")
    page.wait(lambda: "between 1 and 86,400" in page.text("tile-controls"), "the bounds were not said")
    assert page.run("return document.getElementById(arguments[0]).disabled", f"{name}-apply")
    _type(page, name, "60")
    page.wait(lambda: page.text(f"{name}-source") == "not applied, in force: 300 s", "the draft looks like the truth")
    page.click(f"{name}-apply")
    page.wait(lambda: "set here" in page.text(f"{name}-source"), "the new source was not shown")
    assert nexus.received == [{"settings": {name: 60}, "reason": "dashboard"}]


def _burst(page: Page, element: str, *keys: str) -> None:
    """Types over what stands in the field, all keys in one go."""
    page.run("const e = document.getElementById(arguments[0]); e.focus(); e.select()", element)
    chain = ActionChains(page.driver, duration=0)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


@pytest.mark.parametrize(
    ("name", "typed", "sent"),
    [
        ("PYTHON_EVENT_API_URL", "http://127.0.0.1:8110", "http://127.0.0.1:8110"),
        ("FEATURE_SYNC_INTERVAL", "1234", 1234),
        ("HEALTH_CHECK_INTERVAL", "86,400", 86400),
    ],
)
def test_enter_right_after_the_last_key_applies_what_stands_in_the_field(
    nexus: FakeNexus, page: Page, name: str, typed: str, sent: object
) -> None:
    page.open().verdict("Both systems work as one")
    page.driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 6})
    _burst(page, name, *typed, Keys.ENTER)
    page.wait(lambda: nexus.received, "nothing was sent")
    page.driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 1})
    page.wait(lambda: "set here" in page.text(f"{name}-source"), "the change was not confirmed")
    assert nexus.received == [{"settings": {name: sent}, "reason": "dashboard"}]


def test_apply_is_there_with_the_last_key(nexus: FakeNexus, page: Page) -> None:
    page.open().verdict("Both systems work as one")
    name = "FEATURE_SYNC_INTERVAL"
    page.run(
        """const e = document.getElementById(arguments[0]); e.focus(); e.select();
        document.execCommand('insertText', false, '77'); document.getElementById(arguments[0] + '-apply').click()""",
        name,
    )
    page.wait(lambda: nexus.received == [{"settings": {name: 77}, "reason": "dashboard"}], "it was not applied")


@pytest.mark.parametrize("typed", ["1.5", "-5", "1e3", "abc", "86,40", "999999", " ", "0"])
def test_what_is_no_whole_number_in_the_bounds_stays_as_typed_and_is_refused(
    nexus: FakeNexus, page: Page, typed: str
) -> None:
    name = "FEATURE_SYNC_INTERVAL"
    page.open().verdict("Both systems work as one")
    _burst(page, name, typed, Keys.ENTER)
    page.wait(lambda: "a whole number between 1 and 86,400" in page.text("tile-controls"), "it was not refused")
    assert page.run("return document.getElementById(arguments[0]).value", name) == typed
    assert page.run("return document.getElementById(arguments[0]).disabled", f"{name}-apply")
    assert nexus.received == []


def test_field_shows_what_is_pending_and_never_falls_back_to_the_old_value(nexus: FakeNexus, page: Page) -> None:
    name = "PYTHON_SERVICE_TIMEOUT"
    page.open().verdict("Both systems work as one")
    nexus.hold.clear()  # the feed that would confirm it is held back
    _burst(page, name, "6000", Keys.ENTER)
    page.wait(lambda: nexus.received, "nothing was sent")
    page.run(
        """window.shown = new Set(); const e = document.getElementById(arguments[0]);
        (function look() { shown.add(e.value + ' | ' + document.getElementById(e.id + '-source').textContent);
        requestAnimationFrame(look); })()""",
        name,
    )
    page.wait(lambda: page.text(f"{name}-source") == "pending …", "it does not say that it is pending")
    nexus.hold.set()
    page.wait(lambda: "set here" in page.text(f"{name}-source"), "the change was not confirmed")
    asked = len(nexus.requests)
    page.wait(lambda: len(nexus.requests) > asked + 1, "the page stopped asking")
    said = page.run("return [...shown]")
    assert {words.split(" | ")[0] for words in said} == {"6000"}
    assert [words for words in said if "not applied" in words] == []


def test_a_draft_is_discarded_by_escape_and_by_its_link(page: Page) -> None:
    name = "HEALTH_CHECK_INTERVAL"
    shown = "return document.getElementById(arguments[0])?.value"
    page.open()
    page.wait(lambda: page.run(shown, name) == "30", "no value")
    _type(page, name, "45")
    page.wait(lambda: "not applied" in page.text(f"{name}-source"), "the draft looks like the truth")
    page.driver.find_element("id", name).send_keys(Keys.ESCAPE)
    page.wait(lambda: page.run(shown, name) == "30", "escape left the draft")
    _type(page, name, "45")
    page.click(f"{name}-discard")
    page.wait(lambda: page.run(shown, name) == "30", "the link left the draft")
    assert page.text(f"{name}-source") == "the default"


def test_a_refusal_of_the_server_stands_at_the_field_it_is_about(nexus: FakeNexus, page: Page) -> None:
    name = "PYTHON_EVENT_API_URL"
    page.open()
    page.wait(lambda: page.run("return document.getElementById(arguments[0])?.value", name), "no value")
    nexus.refuse = True
    _type(page, name, "ftp://x")
    page.click(f"{name}-apply")
    page.wait(
        lambda: "Python service address: the store says no" in page.text("tile-controls"), "no words of the server"
    )
    invalid = "return document.getElementById(arguments[0]).getAttribute('aria-invalid')"
    assert page.run(invalid, name) == "true"
    _type(page, name, Keys.BACKSPACE)
    page.wait(lambda: "an address such as" in page.text("tile-controls"), "an empty field is not explained")


def test_every_control_has_a_name_of_its_own(page: Page) -> None:
    page.open().verdict("Both systems work as one")
    page.click("bridge-open")
    names = """return [...document.querySelectorAll('button')].filter(e => e.offsetParent)
        .map(e => e.ariaLabel || e.textContent.trim())"""
    page.wait(lambda: "Open the circuit" in page.run(names), "the confirmation did not open")
    found = page.run(names)
    assert "" not in found
    assert sorted(set(found)) == sorted(found)
    focus = "return document.activeElement.id"
    page.wait(lambda: page.run(focus) == "open-circuit-no", "the harmless answer does not have the focus")


def test_setting_says_what_the_environment_holds_and_not_the_default(nexus: FakeNexus, page: Page) -> None:
    nexus.overrides = {"FEATURE_SYNC_INTERVAL": 45}
    nexus.environment = {"FEATURE_SYNC_INTERVAL": 60}
    page.open()
    words = "set here, environment says: 60 s"
    page.wait(lambda: page.text("FEATURE_SYNC_INTERVAL-source") == words, "the environment's value is not shown")


def test_an_address_without_a_page_says_so_and_leads_back(nexus: FakeNexus, page: Page) -> None:
    page.open("/nexus/nothing-here")
    page.wait(lambda: "There is no page at this address" in page.run("return document.body.innerText"), "no words")
    asked = len(nexus.requests)
    page.wait(lambda: len(nexus.requests) > asked + 1, "the page stopped asking")
    assert page.run("return document.title") == "Not found · Nexus"
    client = nexus.app.test_client()
    assert [client.get(path).status_code for path in ("/nexus/nothing-here", "/nexus/", "/nexus")] == [404, 200, 308]


def test_pausing_acts_at_once_and_opening_the_circuit_asks_first(nexus: FakeNexus, page: Page) -> None:
    page.open().verdict("Both systems work as one")
    page.click("bridge-pause")
    page.verdict("The bridge is paused")
    page.click("bridge-resume")
    page.verdict("Both systems work as one")
    assert page.run("return document.getElementById('bridge-reset').disabled")
    page.click("bridge-open")
    page.click("open-circuit-yes")
    page.verdict("The circuit to the Python service is open")
    page.wait(lambda: page.run("return document.getElementById('bridge-open').disabled"), "it can be opened twice")
    page.wait(lambda: len(nexus.received) == 3, "the circuit was not opened")
    assert [body["action"] for body in nexus.received] == ["pause", "resume", "open_circuit"]


def _focus_after(page: Page, element: str) -> None:
    page.wait(lambda: page.run("return !document.getElementById(arguments[0])?.disabled", element), "not clickable")
    page.run("document.getElementById(arguments[0]).focus()", element)
    ActionChains(page.driver, duration=0).send_keys(Keys.ENTER).perform()


def test_focus_goes_on_to_the_counterpart_or_the_verdict(page: Page) -> None:
    focus = "return document.activeElement.id"
    page.open().verdict("Both systems work as one")
    _focus_after(page, "bridge-pause")
    page.wait(lambda: page.run(focus) == "bridge-resume", "the focus was lost with Pause")
    _focus_after(page, "bridge-resume")
    page.wait(lambda: page.run(focus) == "bridge-pause", "the focus was lost with Resume")
    _focus_after(page, "bridge-pause")
    page.verdict("The bridge is paused")
    _focus_after(page, "act-resume")
    page.verdict("Both systems work as one")
    page.wait(lambda: page.run(focus) == "verdict-title", "the focus was lost with the verdict's Resume")
    _focus_after(page, "bridge-open")
    page.wait(lambda: page.run(focus) == "open-circuit-no", "the confirmation did not open")
    _focus_after(page, "open-circuit-yes")
    page.verdict("The circuit to the Python service is open")
    page.wait(lambda: page.run(focus) == "bridge-reset", "the focus was lost with Open circuit")
    _focus_after(page, "bridge-reset")
    page.wait(lambda: page.run(focus) == "bridge-open", "the focus was lost with Reset circuit")


def test_verdict_offers_the_reset_also_while_the_circuit_is_probed(nexus: FakeNexus, page: Page) -> None:
    _with(nexus, page, "half_open").verdict("The bridge probes the Python service")
    assert not page.run("return document.getElementById('act-reset').hidden")


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


def test_short_spike_does_not_flatten_the_throughput_and_is_told(nexus: FakeNexus, page: Page) -> None:
    nexus.spike = 48_000.0
    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    words = "Above the graph: up to 48,000/s (Nexus, "
    page.wait(lambda: words in page.text("throughput-peak"), "the spike is not told")
    end = "return document.querySelector('#chart-throughput .js-plotly-plot').layout.yaxis.range[1]"
    page.wait(lambda: page.run(end) < 3000, "the spike flattens the graph")
    nexus.spike = None
    page.open()
    page.wait(page.graphs_drawn, "the graphs were never drawn")
    assert page.run("return document.getElementById('throughput-peak').hidden")
    assert max(y or 0 for y in _series(page, "chart-throughput", "ingest")) < page.run(end) < 3000


@pytest.mark.parametrize("width", [390, 1024, 1280, 1400, 1600])
def test_actions_are_near_the_top_and_the_tiles_leave_no_hole(page: Page, width: int) -> None:
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    page.open().verdict("Both systems work as one")
    assert page.run("return document.getElementById('bridge-test').getBoundingClientRect().bottom") < 560
    rows = """const rows = {}; const all = document.querySelector('.tiles').getBoundingClientRect();
        for (const e of document.querySelectorAll('.tiles > .tile')) {
          const r = e.getBoundingClientRect(); rows[Math.round(r.top)] = Math.max(rows[Math.round(r.top)] || 0, r.right); }
        return Object.values(rows).map(right => Math.round(all.right - right))"""
    assert set(page.run(rows)) == {0}
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_edges_of_fields_and_names_of_disabled_buttons_have_enough_contrast(page: Page, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.open().verdict("Both systems work as one")
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    panel = page.run(style, ".tile", "backgroundColor")
    field = [page.run(style, ".setting-field input", name) for name in ("borderTopColor", "backgroundColor")]
    assert min(_contrast(field[0], under) for under in (field[1], panel)) >= 3
    for button in ("#bridge-resume", "#FEATURE_SYNC_INTERVAL-apply"):
        assert page.run("return document.querySelector(arguments[0]).disabled", button)
        assert page.run(style, button, "opacity") == "1"
        assert _contrast(page.run(style, button, "color"), panel) >= 4.5
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _contrast(one: str, other: str) -> float:
    """Of two opaque colours, as WCAG 2 counts it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


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
