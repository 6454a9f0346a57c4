/* Puts the feed's figures into the elements that ask for them by data attributes; touches only what changed.
   Text is set on leaf elements that the layout leaves alone, which spares a hundred component updates a second. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const { format, at, known } = nexus;

  const LEVELS = {
    ok: ["online", "running", "closed", "ready"],
    warn: ["degraded", "restarting", "behind", "loading", "half_open", "paused"],
    bad: ["offline", "failed", "full", "readonly", "open", "stopped"],
    idle: ["standby", "disabled", "warming_up"],
  };
  const LEVEL_OF = {};
  for (const [level, words] of Object.entries(LEVELS)) for (const word of words) LEVEL_OF[word] = level;
  for (const level of ["ok", "warn", "bad", "idle"]) LEVEL_OF[level] = level;
  const levelOf = (nexus.levelOf = (word) => LEVEL_OF[word] || "unknown");

  const setText = (nexus.setText = (element, text) => {
    if (element && element.textContent !== text) element.textContent = text;
  });
  const setData = (element, name, value) => {
    if (element && element.dataset[name] !== value) element.dataset[name] = value;
  };
  const make = (nexus.make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  });

  /* What follows from several fields at once. */
  function derive(feed) {
    const store = at(feed, "store.status");
    const used = at(feed, "store.used_bytes") / at(feed, "store.max_bytes");
    const status = at(feed, "python.status");
    const pending = at(feed, "backlog.pending");
    const oldest = at(feed, "backlog.oldest_age_s");
    const hybrid = at(feed, "settings.HYBRID_FEATURE_MODE.value");
    const alone = hybrid === false || status === "offline" || status === "disabled";
    const words = { true: "both systems merged", false: "Nexus's own only" }[hybrid];
    const checked = at(feed, "python.checked_at");
    return {
      ingest: !store ? "unknown" : store === "online" ? "ok" : store === "loading" ? "warn" : "bad",
      combined: store !== "online" ? (store ? "bad" : "unknown") : hybrid === false || status === "disabled" ? "idle" : alone || status === "degraded" ? "warn" : status ? "ok" : "unknown",
      hybrid_words: store && store !== "online" ? "wait for the store" : hybrid === true && (status === "offline" || status === "disabled") ? "Nexus's own, Python's as last known" : words,
      memory: !known(used) ? "unknown" : used >= 0.85 ? "bad" : used >= 0.7 ? "warn" : "ok",
      used: known(used) ? used : null,
      memory_words: known(used) ? format.percent(used) + " used; ingest refuses at 85 %" : "no figures",
      ingest_words: store && store !== "online" ? "refuses: 503" : "p99 " + format.ms(at(feed, "latency.ingest_p99_ms")),
      unexplained: !known(feed.unexplained) ? "unknown" : feed.unexplained === 0 ? "ok" : "bad",
      waiting: !known(pending) ? null : pending === 0 ? "nothing waits" : format.compact(pending) + " wait" + (known(oldest) ? ", oldest " + format.age(oldest) : ""),
      python_words: (at(feed, "python.reason") || at(feed, "python.url") || format.unknown) + (known(checked) ? " · checked " + format.clock(checked) : ""),
    };
  }

  function clockWords(feed) {
    const age = nexus.age();
    if (!feed || age === null) return ["", "no data yet"];
    return ["Data as of " + format.clock(feed.at) + " · ", String(Math.floor(age)).padStart(2, "\u2007") + " s ago"];
  }

  function rows(name, items, build) {
    const list = document.querySelector(`[data-list="${name}"]`);
    if (!list) return;
    const said = JSON.stringify(items);
    if (list.dataset.said === said) return;
    list.dataset.said = said;
    list.replaceChildren(...items.map(build));
  }

  function rank(name, pairs) {
    const most = Math.max(1, ...pairs.map((pair) => pair[1] || 0));
    rows(name, pairs.length ? pairs : [["no events", null]], ([label, n]) => {
      const row = make("div", "rank-row");
      const bar = make("span", "rank-bar");
      bar.style.width = (100 * (n || 0)) / most + "%";
      row.append(make("span", "rank-name", format.text(label)), make("span", "rank-track"), make("span", "rank-n", format.compact(n)));
      row.children[1].append(bar);
      return row;
    });
  }

  function lists(feed) {
    rank("types", (feed.events_per_type || []).slice(0, 6));
    rank("sources", (feed.sources || []).slice(0, 4));
    const errors = (at(feed, "bridge_errors.recent") || []).slice(0, 8);
    rows("errors", errors.length ? errors : [null], (error) => {
      const row = make("div", "error-row");
      if (!error) { row.append(make("span", "quiet", "No errors kept")); return row; }
      row.append(make("span", "error-at", format.clock(error.at)),
        make("span", "error-kind", format.text(error.kind) + (known(error.status) ? " " + error.status : "")),
        make("span", "error-detail", format.note(error.detail)));
      return row;
    });
    const jobs = feed.jobs || [];
    rows("jobs", jobs.length ? jobs : [null], (job) => {
      const row = make("div", "job-row");
      if (!job) { row.append(make("span", "quiet", "No jobs known")); return row; }
      row.dataset.level = job.ok === false ? "bad" : job.late ? "warn" : job.ok ? "ok" : "unknown";
      const next = job.late ? "late" : known(job.next_in_s) ? "in " + format.span(job.next_in_s) : format.unknown;
      row.append(make("span", "glyph"), make("span", "job-name", format.text(job.name)),
        make("span", "job-every", "every " + format.span(job.every_s)), make("span", "job-last", format.ms(job.last_ms)),
        make("span", "job-next", job.ok === false ? "failed" : next));
      return row;
    });
    const streams = ["features", "storage", "aggregates", "inference", "bridge"].map((name) => [name, at(feed, "streams." + name)]);
    rows("conservation", streams.map(([name, s]) => [name, at(s || {}, "processed"), at(s || {}, "lag"), at(s || {}, "failed")]), ([name, done, pending, dead]) => {
      const row = make("div", "bar-row");
      const track = make("span", "bar-track");
      for (const [kind, n] of [["done", done], ["pending", pending], ["dead", dead]]) {
        const part = make("span", "bar-part bar-" + kind);
        part.style.flexGrow = known(n) ? n : 0;
        part.hidden = !n;
        track.append(part);
      }
      row.title = `${name}: ${format.int(done)} processed, ${format.int(pending)} pending, ${format.int(dead)} dead`;
      row.append(make("span", "bar-name", name), track, make("span", "bar-n", `${format.compact(done)} + ${format.compact(pending)} + ${format.compact(dead)}`));
      return row;
    });
  }

  /* A figure and its unit stay on one line. */
  const bound = (text) => text.replace(/(\d) (?=(?:ms|s|min|h)\b)/g, "$1\u00a0");
  let lastTitle = null;
  let lastSpoken = null;
  function verdict(feed) {
    const silent = nexus.silent();
    const said = silent ? nexus.verdictOfSilence(nexus.age(), nexus.live.failing, lastTitle) : feed ? nexus.verdict(feed) : null;
    if (!said) return;
    if (!silent) lastTitle = said.title;
    const box = document.getElementById("verdict");
    setData(box, "level", said.level);
    setData(box, "rings", said.rings);
    setText(document.getElementById("verdict-title"), bound(said.title));
    setText(document.getElementById("verdict-detail"), bound(said.detail));
    const kind = said.title.replace(/\d[\d,.]*/g, "#");
    if (kind !== lastSpoken) { lastSpoken = kind; setText(document.getElementById("verdict-spoken"), said.title); }
    setData(document.getElementById("overview"), "silent", String(silent));
    const mark = { ok: "✓", warn: "!", bad: "✕", idle: "–", unknown: "?" }[said.level];
    const title = mark + " Nexus";
    if (document.title !== title) document.title = title;
    const icon = document.getElementById("favicon");
    const href = icon && icon.getAttribute("href").replace(/favicon-\w+/, "favicon-" + (said.level === "unknown" ? "idle" : said.level));
    if (icon && icon.getAttribute("href") !== href) icon.setAttribute("href", href);
  }

  nexus.paintAge = function () {
    const feed = nexus.live.feed;
    const age = nexus.age();
    setData(document.getElementById("data-age"), "level", age === null ? "unknown" : age > 15 ? "bad" : age > 5 ? "warn" : "ok");
    clockWords(feed).forEach((words, i) => setText(document.getElementById(["data-at", "data-ago"][i]), words));
    if (nexus.silent() || !feed) verdict(feed);
  };

  nexus.painters.push(function paint(feed) {
    const shown = { ...feed, derived: derive(feed) };
    for (const element of document.querySelectorAll("[data-bind]")) {
      const write = format[element.dataset.format] || format.text;
      setText(element, write(at(shown, element.dataset.bind)));
    }
    for (const element of document.querySelectorAll("[data-level-of]")) {
      setData(element, "level", levelOf(at(shown, element.dataset.levelOf)));
    }
    const simulated = (feed.sources || []).some(([name, n]) => name === "simulator" && n > 0);
    for (const element of document.querySelectorAll('[data-show="simulated"]')) element.hidden = !simulated;
    const gauge = document.querySelector('[data-gauge="store"]');
    if (gauge) gauge.style.width = Math.min(100, 100 * (shown.derived.used || 0)) + "%";
    lists(feed);
    verdict(feed);
  });

  /* Which page the reader is on, told to the navigation. */
  function markPage() {
    for (const link of document.querySelectorAll(".nav-link")) {
      const here = link.pathname.replace(/\/$/, "") === location.pathname.replace(/\/$/, "");
      if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
  }
  nexus.painters.push(markPage);
})();
