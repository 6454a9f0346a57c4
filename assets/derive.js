/* What follows from several fields of the feed at once: the levels and words that no single field holds. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  const STREAMS = (nexus.STREAMS = ["features", "storage", "aggregates", "inference", "bridge"]);
  const STORE = { online: "ok", degraded: "warn", unknown: "warn", loading: "warn" };
  const RANK = ["ok", "idle", "unknown", "warn", "bad"];
  const worse = (a, b) => RANK[Math.max(RANK.indexOf(a), RANK.indexOf(b))];

  /* [stream, number] of those that have dead letters. */
  nexus.deadLetters = (feed) => STREAMS.map((name) => [name, nexus.at(feed, `streams.${name}.failed`)]).filter(([, n]) => n > 0);

  /* Events that a stream has yet to process: its lag counts those too that no checkpoint holds yet. */
  nexus.behind = (stream) => (stream && nexus.known(stream.lag) ? Math.max(0, stream.lag - (stream.unsaved || 0)) : null);

  /* What waits to be read; events under way for less than a second are work, not a lag. */
  nexus.unread = (stream) => (stream && nexus.known(stream.lag) && stream.lag_s < 1 ? 0 : nexus.behind(stream));

  /* [processed, waits for a checkpoint, unread, dead] of a stream: together what it was given. */
  nexus.accountOf = function (stream) {
    const [{ processed, lag, failed }, unread] = [stream || {}, nexus.unread(stream)];
    return [processed, nexus.known(lag) ? lag - unread : lag, unread, failed];
  };

  /* A store that is degraded takes events; every other state but online refuses them. */
  nexus.refuses = (feed) => !["online", "degraded", "unknown", undefined, null].includes(nexus.at(feed, "store.status"));

  /* Nothing can be read of such a store, nor written to it: what runs waits for it. */
  const away = (feed) => ["offline", "loading"].includes(nexus.at(feed, "store.status"));
  const stateOf = (feed, state) => (away(feed) && ["running", "behind"].includes(state) ? "waiting" : state);

  function partner(feed) {
    const { at } = nexus;
    const status = at(feed, "python.status");
    const circuit = at(feed, "circuit.state");
    if (!status) return "unknown";
    if (["disabled", "starting"].includes(status) || at(feed, "settings.ENABLE_PYTHON_BRIDGE.value") === false) return "idle";
    if (status === "offline" || circuit === "open") return "bad";
    return at(feed, "circuit.paused") || status === "degraded" || circuit === "half_open" ? "warn" : "ok";
  }

  function combined(feed, store, python) {
    const hybrid = nexus.at(feed, "settings.HYBRID_FEATURE_MODE.value");
    const sends = ["ok", "warn"].includes(python) && !nexus.at(feed, "circuit.paused") && nexus.at(feed, "circuit.state") === "closed";
    if (nexus.refuses(feed)) return [store, "wait for the store"];
    if (hybrid === false) return ["idle", "Nexus's own only"];
    if (hybrid === undefined || python === "unknown") return ["unknown", null];
    return [worse(store, python === "bad" ? "warn" : python), sends ? "both systems merged" : "Nexus's own, Python's as last known"];
  }

  function pythonWords(feed, clock) {
    const checked = nexus.at(feed, "python.checked_at");
    const is = nexus.at(feed, "python.reason") || nexus.at(feed, "python.url") || nexus.format.unknown;
    return is + (nexus.known(checked) ? " · checked " + clock(checked) : "");
  }

  /* Events that retention let go of before their time, and when it last had to. */
  function early(feed) {
    const [n, latest] = [nexus.at(feed, "retention.within_retention"), Date.parse(nexus.at(feed, "retention.within_retention_at"))];
    return nexus.format.int(n) + (n > 0 && nexus.known(latest) ? ", latest " + nexus.format.clock(latest) : "");
  }

  /* How soon an event was readable, and was at the Python service; the canaries of an idle Nexus are no event. */
  function delays(feed) {
    if (nexus.at(feed, "totals.accepted") === 0) return "no event yet";
    const [nexus_words, python_words] = ["nexus", "python"].map((side) => milliseconds(nexus.at(feed, `freshness.${side}_delay_s`)));
    return `readable after ${nexus_words}, at Python after ${python_words}`;
  }

  const milliseconds = (s) => nexus.format.ms(nexus.known(s) ? 1000 * s : s);

  nexus.derive = function (feed) {
    const { at, format, known } = nexus;
    const status = at(feed, "store.status");
    const store = status ? STORE[status] || "bad" : "unknown";
    const python = partner(feed);
    const [merged, hybrid_words] = combined(feed, store, python);
    const used = at(feed, "store.used_bytes") / at(feed, "store.max_bytes");
    const pending = at(feed, "backlog.pending");
    const oldest = at(feed, "backlog.oldest_age_s");
    const streams = STREAMS.map((name) => [name, at(feed, "streams." + name) || {}]);
    const counts = streams.map(([, stream]) => stream.failed).filter(known);
    return {
      store, partner: python, combined: merged, hybrid_words,
      merges: at(feed, "settings.HYBRID_FEATURE_MODE.value") === false ? "idle" : python,
      memory: !known(used) ? "unknown" : used >= 0.85 ? "bad" : used >= 0.7 ? "warn" : "ok",
      used: known(used) ? used : null,
      memory_words: known(used) ? format.percent(used) + " used; ingest refuses at 85 %" : "no figures",
      early: early(feed),
      delays: delays(feed),
      states: Object.fromEntries(streams.map(([name, stream]) => [name, stateOf(feed, stream.state)])),
      pipeline: stateOf(feed, at(feed, "pipeline.state")),
      ingest_words: nexus.refuses(feed) ? "refuses: 503" : "p99 " + format.ms(at(feed, "latency.ingest_p99_ms")),
      unexplained: !known(feed.unexplained) ? "unknown" : feed.unexplained === 0 ? "ok" : "bad",
      waiting: !known(pending) ? null : pending === 0 ? "nothing waits" : format.compact(pending) + " wait" + (known(oldest) ? ", oldest " + format.age(oldest) : ""),
      python_words: pythonWords(feed, format.clock),
      titles: { "derived.python_words": pythonWords(feed, format.iso) }, // for the pointer, where it differs
      dead: counts.length ? counts.reduce((sum, n) => sum + n, 0) : null,
      died: Object.fromEntries(streams.map(([name, { failed }]) => [name, failed > 0 ? "warn" : "unknown"])),
      lags: Object.fromEntries(streams.map(([name, stream]) => [name, nexus.unread(stream)])),
      unsaved: Object.fromEntries(streams.map(([name, { unsaved, unsaved_s }]) => [name,
        !known(unsaved) ? format.unknown : unsaved === 0 ? "0" : format.int(unsaved) + ", " + format.age(unsaved_s)])),
    };
  };
})();
