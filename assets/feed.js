/* Fetches the feed once a second, never two at a time, and hands it to the painters; counts the age of what is shown. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || []; // each is called with (feed, history or null)
  const TIMEOUT_MS = 5000;
  const PAUSE_MS = 5000; // a longer gap between two answers means the graphs missed points: ask for the history
  const SILENT_S = 3; // one missed answer is a hiccup, not a verdict
  const STILL_S = 15; // figures that stand still for so long are no news, though they are answered
  const FROZEN_MS = 1000; // a timer so late was not running: the page slept, Nexus is not to blame

  const live = (nexus.live = { feed: null, failing: null, settings: 0 });
  let inFlight = false;
  let needHistory = true;
  let answered = null; // performance.now() of the last answer
  let moved = null; // performance.now() when the feed's own clock last moved
  const began = performance.now();

  const url = () => {
    const base = document.getElementById("_dash-config");
    const prefix = base ? JSON.parse(base.textContent).requests_pathname_prefix : "/nexus/";
    return prefix + "feed.json" + (needHistory ? "?history=1" : "");
  };

  async function ask() {
    const hurry = new AbortController();
    const asked = performance.now();
    let slept = false;
    const timer = setTimeout(() => {
      slept = performance.now() - asked > TIMEOUT_MS + FROZEN_MS;
      hurry.abort();
    }, TIMEOUT_MS);
    try {
      const answer = await fetch(url(), { signal: hurry.signal, cache: "no-store", headers: { Accept: "application/json" } });
      if (!answer.ok) throw new Error("HTTP " + answer.status);
      return await answer.json();
    } catch (error) {
      error.slept = slept;
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  function why(error) {
    const words = { AbortError: "no answer in " + TIMEOUT_MS / 1000 + " s", TypeError: "no connection", SyntaxError: "the answer is no JSON" };
    return words[error.name] || error.message;
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
  /* How long there has been no news, by the first second of the page where there never was any. */
  nexus.waited = () => (performance.now() - (moved === null ? began : moved)) / 1000;
  const still = () => answered !== null && performance.now() - answered < 1000 * SILENT_S && nexus.waited() >= STILL_S;
  nexus.silent = () => (live.failing !== null && nexus.waited() >= SILENT_S) || still();

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.nexus = Object.assign(window.dash_clientside.nexus || {}, {
    tick: function () {
      nexus.paintAge();
      if (inFlight) return;
      inFlight = true;
      ask()
        .then(take)
        .catch((error) => {
          if (!error.slept) live.failing = why(error);
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
