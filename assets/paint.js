/* Puts the feed's figures into the elements that ask for them by data attributes; touches only what changed.
   Text is set on leaf elements that the layout leaves alone, which spares a hundred component updates a second. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const { format, at, known } = nexus;
  const SPOKEN_MS = 5000;

  const LEVELS = {
    ok: ["online", "running", "closed", "ready"],
    warn: ["degraded", "restarting", "behind", "loading", "half_open", "paused"],
    bad: ["offline", "failed", "full", "readonly", "open", "stopped"],
    idle: ["standby", "disabled", "warming_up", "starting", "waiting"],
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
  /* Shows a button (or, `by` "disabled", enables it) or takes it back; the focus, where it stood there, goes on to what `home` finds. */
  nexus.offer = function (button, offered, home, by = "hidden") {
    if (!button || button[by] === !offered) return;
    const held = document.activeElement === button;
    button[by] = !offered;
    if (held && !offered) home().focus();
  };
  const make = (nexus.make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  });

  /* From when to when the latest outage was, and what became of the events that waited. */
  function outageWords(feed, clock) {
    const [outage] = feed.outages || [];
    if (!outage) return "No outage of the Python service is known";
    const { int } = format;
    const ended = outage.ended ? " to " + clock(Date.parse(outage.ended)) : ", still open";
    const counts = outage.ended ? `, ${int(outage.delivered)} delivered, ${int(outage.dead)} dead` + (outage.caught_up ? "" : " so far") : "";
    return `Latest outage ${clock(Date.parse(outage.began))}${ended}: ${int(outage.queued)} queued${counts}`;
  }

  function canaryWords(feed, clock) {
    const canary = feed.canary;
    if (!canary) return "No canary has gone the whole way yet";
    const failed = (canary.failed || []).map((step) => `${format.state(step.name)}: ${step.detail}`).join("; ");
    return `Canary of ${clock(canary.at)}: ` + (failed || `every hop in ${format.ms(canary.duration_ms)}`);
  }

  function clockWords(feed) {
    const age = nexus.age();
    if (!feed || age === null) return ["", "no data yet"];
    return ["Data as of " + format.clock(feed.at) + " " + format.zone(feed.at) + " · ", String(Math.floor(age)).padStart(2, "\u2007") + " s ago"];
  }

  function rows(name, items, build) {
    const list = document.querySelector(`[data-list="${name}"]`);
    if (!list) return;
    const said = JSON.stringify(items);
    if (list.dataset.said === said) return;
    list.dataset.said = said;
    list.replaceChildren(...items.map(build));
  }

  function rank(name, pairs, none) {
    const most = Math.max(1, ...pairs.map((pair) => pair[1] || 0));
    rows(name, pairs.length ? pairs : [none], (pair) => {
      if (pair === none) return make("div", "quiet", none);
      const [label, n] = pair;
      const row = make("div", "rank-row");
      const bar = make("span", "rank-bar");
      bar.style.width = (100 * (n || 0)) / most + "%";
      row.append(make("span", "rank-name", format.text(label)), make("span", "rank-track"), make("span", "rank-n", format.compact(n)));
      row.children[1].append(bar);
      return row;
    });
  }

  function lists(feed) {
    const none = known(at(feed, "streams.aggregates.processed")) ? "No events in the last minute" : format.unknown;
    rank("types", (feed.events_per_type || []).slice(0, 6), none);
    rank("sources", (feed.sources || []).slice(0, 4), none);
    const errors = (at(feed, "bridge_errors.recent") || []).slice(0, 8);
    rows("errors", errors.length ? errors : [null], (error) => {
      const row = make("div", "error-row");
      if (!error) { row.append(make("span", "quiet", "No errors kept")); return row; }
      const when = make("span", "error-at", format.clock(error.at));
      when.title = format.iso(error.at);
      row.append(when, make("span", "error-kind", format.text(error.kind) + (known(error.status) ? " " + error.status : "")),
        make("span", "error-detail", format.note(error.detail)));
      row.lastChild.title = format.note(error.detail);
      return row;
    });
    const jobs = feed.jobs || [];
    rows("jobs", jobs.length ? jobs : [null], (job) => {
      const row = make("div", "job-row");
      if (!job) { row.append(make("span", "quiet", "No jobs known")); return row; }
      const runs = job.name === "pipeline" && job.ok !== false ? at(feed, "pipeline.state") : null; // until the stop
      row.dataset.level = job.ok === false ? "bad" : job.late_now ? "warn" : job.ok ? "ok" : levelOf(runs);
      const next = runs ? format.state(runs) : job.late_now ? "late" : known(job.next_in_s) ? "in " + format.span(job.next_in_s) : format.unknown;
      const every = make("span", "job-every");
      every.append(make("span", "job-word", "every "), format.span(job.every_s));
      row.append(make("span", "glyph"), make("span", "job-name", format.text(job.name)), every, make("span", "job-last", format.ms(job.last_ms)),
        make("span", "job-next", job.ok === false ? "failed" : next));
      if (job.ok === false && job.error) row.append(make("span", "job-error", job.error));
      row.title = [`every ${format.span(job.every_s)}`, job.error, job.late > 0 ? `${format.int(job.late)} of its turns began late, since the start` : ""].filter(Boolean).join("; ");
      return row;
    });
    rows("conservation", nexus.STREAMS.map((name) => [name, ...nexus.accountOf(at(feed, "streams." + name))]), ([name, done, unsaved, unread, dead]) => {
      const row = make("div", "bar-row");
      const track = make("span", "bar-track");
      for (const [kind, n] of [["done", done], ["unsaved", unsaved], ["pending", unread], ["dead", dead]]) {
        const part = make("span", "bar-part bar-" + kind);
        part.style.flexGrow = known(n) ? n : 0;
        part.hidden = !n;
        track.append(part);
      }
      row.title = `${name}: ${format.int(done)} processed, ${format.int(unsaved)} processed or under way without a checkpoint, ${format.int(unread)} unread, ${format.int(dead)} dead`;
      row.append(make("span", "bar-name", name), track, make("span", "bar-n", [done, unsaved, unread, dead].map(format.compact).join(" + ")));
      return row;
    });
  }

  /* The icons of the tab, fetched while Nexus is there: the one that says it is not is needed when it can send none. */
  const icons = {};
  const first = document.getElementById("favicon");
  for (const level of first ? ["ok", "warn", "bad", "idle"] : []) {
    fetch(first.getAttribute("href").replace(/favicon-\w+/, "favicon-" + level)).then((answer) => (answer.ok ? answer.text() : Promise.reject(answer.status)))
      .then((svg) => { icons[level] = "data:image/svg+xml," + encodeURIComponent(svg); }).catch(() => {}); // a tab without an icon
  }

  /* A figure and its unit stay on one line. */
  const bound = (text) => text.replace(/(\d) (?=(?:ms|s|min|h)\b)/g, "$1\u00a0");
  let lastTitle = null;
  let lastSpoken = null;
  let forgets = null;
  function verdict(feed) {
    const silent = nexus.silent();
    const said = silent ? nexus.verdictOfSilence(nexus.age(), nexus.waited(), nexus.live.failing, lastTitle) : feed ? nexus.verdict(feed) : null;
    if (!said) return;
    nexus.painted = true; // the page's own watchdog (see dashboard.py) waits for this
    if (!silent) lastTitle = said.title;
    const box = document.getElementById("verdict");
    const words = document.getElementById("verdict-title");
    for (const button of document.querySelectorAll("[data-act]")) nexus.offer(button, (said.acts || []).includes(button.dataset.act), () => words);
    setData(box, "level", said.level);
    setData(box, "rings", said.rings);
    setText(words, bound(said.title));
    setText(document.getElementById("verdict-detail"), bound(said.detail));
    const kind = said.title.replace(/\d[\d,.]*/g, "#");
    // A live region is read out only where it stood there before its words came; they go again, for their figures grow old.
    const spoken = document.getElementById("verdict-spoken");
    if (spoken && !spoken.dataset.stands) { spoken.dataset.stands = "true"; lastSpoken = null; }
    else if (spoken && kind !== lastSpoken) {
      lastSpoken = kind;
      setText(spoken, said.title);
      clearTimeout(forgets);
      forgets = setTimeout(() => setText(spoken, ""), SPOKEN_MS);
    }
    setData(document.getElementById("overview"), "silent", String(silent));
    const mark = { ok: "✓", warn: "!", bad: "✕", idle: "–", unknown: "?" }[said.level];
    const title = mark + " Nexus";
    if (box && document.title !== title) document.title = title; // of another page the title is its own
    const icon = document.getElementById("favicon");
    const mood = said.level === "unknown" ? "idle" : said.level;
    if (icon && icon.dataset.level !== mood && icons[mood]) { icon.dataset.level = mood; icon.setAttribute("href", icons[mood]); }
  }

  nexus.paintAge = function () {
    const feed = nexus.live.feed;
    const age = nexus.age();
    const badge = document.getElementById("data-age");
    if (badge && feed) badge.title = format.iso(feed.at);
    setData(badge, "level", age === null ? "unknown" : age > 15 ? "bad" : age > 5 ? "warn" : "ok");
    clockWords(feed).forEach((words, i) => setText(document.getElementById(["data-at", "data-ago"][i]), words));
    if (nexus.silent() || !feed) verdict(feed);
  };

  nexus.painters.push(function paint(feed) {
    const derived = { ...nexus.derive(feed), outage_words: outageWords(feed, format.clock), canary_words: canaryWords(feed, format.clock) };
    Object.assign(derived.titles, { "derived.outage_words": outageWords(feed, format.iso), "derived.canary_words": canaryWords(feed, format.iso) });
    derived.canary = !feed.canary ? "unknown" : feed.canary.success ? "ok" : "bad";
    const shown = { ...feed, derived };
    for (const element of document.querySelectorAll("[data-bind]")) {
      const write = format[element.dataset.format] || format.text;
      const text = write(at(shown, element.dataset.bind));
      setText(element, text);
      if (!element.dataset.whole) continue; // it may be cut
      const whole = derived.titles[element.dataset.bind] || text;
      if (element.title !== whole) element.title = whole;
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

  /* A page that comes after the feed shows it at once. */
  let mounted = null;
  new MutationObserver(() => {
    const page = document.getElementById("overview");
    if (page === mounted) return;
    mounted = page;
    if (page && nexus.live.feed) for (const painter of nexus.painters) painter(nexus.live.feed, null);
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
