/* The newest dead letters, fetched when the reader asks for them, the button that sends them all again, and what becomes of those;
   and how many the reader has seen, kept in the browser. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  const SHOWN = 5;
  const A_PAGE = 1000;
  const SEEN = "nexus-dead-letters-seen";

  const element = (id) => document.getElementById(id);

  /* Of each stream how many; a browser that keeps nothing remembers them for this page. */
  let seen = {};
  try { seen = JSON.parse(localStorage.getItem(SEEN)) || {}; } catch (unreadable) { seen = {}; }
  function keep(counts) {
    seen = counts;
    try { localStorage.setItem(SEEN, JSON.stringify(seen)); } catch (full) { /* remembered for this page */ }
  }
  const see = (feed) => keep(Object.fromEntries(nexus.deadLetters(feed)));
  nexus.unseenLetters = (feed) => nexus.deadLetters(feed).map(([name, n]) => [name, n - (seen[name] || 0)]).filter(([, n]) => n > 0);
  nexus.seenLetters = (feed) => nexus.deadLetters(feed).reduce((sum, [name, n]) => sum + Math.min(n, seen[name] || 0), 0);

  function unfold(open) {
    element("letters").hidden = !open;
    element("act-letters").setAttribute("aria-expanded", String(open));
  }

  function show(open) {
    unfold(open);
    (open ? element("letters") : element("act-letters")).focus();
  }

  /* The newest of all streams that have any; an answer lists stream by stream. */
  async function fetchNewest() {
    const streams = nexus.deadLetters(nexus.live.feed || {}).map(([name]) => name);
    const answers = await Promise.all(streams.map((name) => nexus.send("GET", `/api/ml/dead-letters?stream=${name}&limit=${SHOWN}`)));
    return answers.flatMap((said) => said.dead_letters).sort((a, b) => b.last_at.localeCompare(a.last_at)).slice(0, SHOWN);
  }

  function row(letter) {
    const { event_type, user_id } = letter.event;
    const line = nexus.make("li", "letter");
    const at = nexus.make("span", "letter-at", nexus.format.clock(Date.parse(letter.last_at)));
    at.title = letter.last_at;
    line.append(at, nexus.make("span", "letter-stream", letter.stream),
      nexus.make("span", "letter-event", event_type ? `${event_type} of ${user_id}` : "cannot be read"), nexus.make("span", "letter-tries", letter.attempts + (letter.attempts === 1 ? " attempt" : " attempts")),
      nexus.make("span", "letter-reason", letter.reason));
    return line;
  }

  async function list() {
    const rows = element("letters-list");
    const feed = nexus.live.feed || {};
    try {
      const letters = await fetchNewest();
      see(feed);
      rows.replaceChildren(...(letters.length ? letters.map(row) : [nexus.make("li", "quiet", "None are left.")]));
    } catch (error) {
      rows.replaceChildren(nexus.make("li", "quiet", "They could not be fetched: " + error.message));
    }
  }

  /* What was sent again: when (the feed's clock), how many, of which streams. Its outcome is known once all that came before is
     through and has its checkpoint. */
  let sent = null;

  const through = (feed) => feed.at >= sent.at + 2000 && sent.streams.every((name) => {
    const { lag, lag_s, unsaved_s } = nexus.at(feed, "streams." + name) || {};
    return lag === 0 || (nexus.known(lag_s) && Math.max(lag_s, unsaved_s || 0) < (feed.at - sent.at) / 1000 - 1);
  });

  /* Those of a stream that had died before a moment and did again since: [how many, the latest one's reason]. */
  async function cameBack(stream, at) {
    let [count, reason, cursor] = [0, null, ""];
    while (cursor !== null) {
      const said = await nexus.send("GET", `/api/ml/dead-letters?stream=${stream}&limit=${A_PAGE}${cursor && "&cursor=" + encodeURIComponent(cursor)}`);
      const since = said.dead_letters.filter((letter) => Date.parse(letter.last_at) >= at);
      const again = since.filter((letter) => Date.parse(letter.first_at) < at);
      count += again.length;
      if (reason === null && again.length) reason = again[0].reason;
      cursor = since.length === said.dead_letters.length ? said.cursor : null;
    }
    return [count, reason];
  }

  async function tellOutcome(feed) {
    const { at, redriven, streams } = sent;
    sent = null;
    try {
      const found = await Promise.all(streams.map((name) => cameBack(name, at)));
      const back = found.reduce((sum, [n]) => sum + n, 0);
      const [, why] = found.find(([n]) => n > 0) || [0, null];
      nexus.notify("Dead letters", `${nexus.format.int(Math.max(0, redriven - back))} went through, ${nexus.format.int(back)} came back` + (why ? ": " + why : "."), back > 0);
      see(feed);
    } catch (error) {
      nexus.notify("What became of the dead letters is not known", error.message, true);
    }
  }

  async function redrive() {
    const button = element("letters-redrive");
    const feed = nexus.live.feed || {};
    button.disabled = true;
    try {
      const { redriven, failed } = await nexus.send("POST", "/api/ml/dead-letters/redrive", { all: true });
      const why = failed.length ? ` ${nexus.format.int(failed.length)} not: ${failed[0].reason}.` : "";
      nexus.notify("Dead letters", `${nexus.format.int(redriven)} sent again.${why} What becomes of them is told here.`, failed.length > 0);
      sent = { at: feed.at, redriven, streams: nexus.deadLetters(feed).map(([name]) => name) };
      show(false);
    } catch (error) {
      nexus.notify("The dead letters were not sent again", error.message, true);
    }
    button.disabled = false;
  }

  (nexus.painters = nexus.painters || []).push((feed) => {
    if (sent !== null && through(feed)) tellOutcome(feed);
    const now = Object.fromEntries(nexus.deadLetters(feed));
    const left = Object.fromEntries(Object.entries(seen).map(([name, n]) => [name, Math.min(n, now[name] || 0)]));
    if (nexus.known(nexus.at(feed, "streams.features.failed")) && JSON.stringify(left) !== JSON.stringify(seen)) keep(left); // what comes is new
  });

  /* Nothing to list any more: sent again here or elsewhere. */
  nexus.painters.push((feed) => {
    const panel = element("letters");
    if (panel && !panel.hidden && nexus.at(feed, "store.status") !== "offline" && !nexus.deadLetters(feed).length) {
      const held = panel.contains(document.activeElement);
      unfold(false);
      if (held) element("verdict-title").focus();
    }
  });

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.nexus = Object.assign(window.dash_clientside.nexus || {}, {
    showLetters: function () {
      const open = element("letters").hidden;
      show(open);
      if (open) list();
    },
    redriveLetters: function () { redrive(); },
  });
})();
