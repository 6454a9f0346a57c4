/* The newest dead letters, fetched when the reader asks for them, and the button that sends them all again. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  const SHOWN = 5;

  const element = (id) => document.getElementById(id);

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
    line.append(nexus.make("span", "letter-at", nexus.format.clock(Date.parse(letter.last_at))), nexus.make("span", "letter-stream", letter.stream),
      nexus.make("span", "letter-event", event_type ? `${event_type} of ${user_id}` : "cannot be read"), nexus.make("span", "letter-reason", letter.reason));
    return line;
  }

  async function list() {
    const rows = element("letters-list");
    try {
      const letters = await fetchNewest();
      rows.replaceChildren(...(letters.length ? letters.map(row) : [nexus.make("li", "quiet", "None are left.")]));
    } catch (error) {
      rows.replaceChildren(nexus.make("li", "quiet", "They could not be fetched: " + error.message));
    }
  }

  async function redrive() {
    const button = element("letters-redrive");
    button.disabled = true;
    try {
      const { redriven, failed } = await nexus.send("POST", "/api/ml/dead-letters/redrive", { all: true });
      const why = failed.length ? ` ${nexus.format.int(failed.length)} not: ${failed[0].reason}.` : "";
      nexus.notify("Dead letters", `${nexus.format.int(redriven)} sent again.${why}`, failed.length > 0);
      show(false);
    } catch (error) {
      nexus.notify("The dead letters were not sent again", error.message, true);
    }
    button.disabled = false;
  }

  /* Nothing to list any more: sent again here or elsewhere. */
  (nexus.painters = nexus.painters || []).push((feed) => {
    const panel = element("letters");
    if (panel && !panel.hidden && nexus.at(feed, "store.status") !== "offline" && !nexus.deadLetters(feed).length) unfold(false);
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
