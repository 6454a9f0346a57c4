/* Fetches the feed once a second, never two at a time, and hands it to the painters; counts the age of what is shown. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || []; // each is called with (feed, history or null)
  const TIMEOUT_MS = 5000;
  const PAUSE_MS = 5000; // a longer gap between two answers means the graphs missed points: ask for the history
  const SILENT_S = 3; // one missed answer is a hiccup, not a verdict

  const live = (nexus.live = { feed: null, failing: null, settings: 0 });
  let inFlight = false;
  let needHistory = true;
  let answered = null; // performance.now() of the last answer
  let moved = null; // performance.now() when the feed's own clock last moved

  const url = () => {
    const base = document.getElementById("_dash-config");
    const prefix = base ? JSON.parse(base.textContent).requests_pathname_prefix : "/nexus/";
    return prefix + "feed.json" + (needHistory ? "?history=1" : "");
  };

  async function ask() {
    const hurry = new AbortController();
    const timer = setTimeout(() => hurry.abort(), TIMEOUT_MS);
    try {
      const answer = await fetch(url(), { signal: hurry.signal, cache: "no-store", headers: { Accept: "application/json" } });
      if (!answer.ok) throw new Error("HTTP " + answer.status);
      return await answer.json();
    } finally {
      clearTimeout(timer);
    }
  }

  function take(feed) {
    const before = live.feed;
    const now = performance.now();
    const gap = answered === null ? 0 : now - answered;
    const restarted = before !== null && before.boot !== feed.boot;
    const history = feed.history || null;
    delete feed.history;
    if (before === null || before.at !== feed.at) moved = now;
    answered = now;
    live.feed = feed;
    live.failing = null;
    needHistory = history === null && (restarted || gap > PAUSE_MS);
    for (const painter of nexus.painters) painter(feed, history);
  }

  nexus.age = () => (moved === null ? null : (performance.now() - moved) / 1000);
  nexus.silent = () => live.failing !== null && (nexus.age() === null || nexus.age() >= SILENT_S);

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.nexus = Object.assign(window.dash_clientside.nexus || {}, {
    tick: function () {
      nexus.paintAge();
      if (inFlight) return;
      inFlight = true;
      ask()
        .then(take)
        .catch((error) => {
          live.failing = error.name === "AbortError" ? "no answer in " + TIMEOUT_MS / 1000 + " s" : error.message;
        })
        .finally(() => {
          inFlight = false;
          nexus.paintAge();
        });
    },
  });

  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible" && answered !== null && performance.now() - answered > PAUSE_MS) needHistory = true;
  });
})();
