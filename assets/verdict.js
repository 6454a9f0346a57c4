/* Says in one sentence whether the two systems work as one: the cause first, its impact after it. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  const { format, at, known } = nexus;
  const LOCAL = ["features", "storage", "aggregates", "inference"];
  const BEHIND_S = 10; // the same line that the health check draws
  const SILENT_S = 15; // by then it is no hiccup
  const TOLD = ["stream", "partner", "store", "log", "accounts"]; // of health's reasons those that have words of their own here
  const MOST_ALSO = 3;
  const EARLY_MS = 600000;
  const LATE_S = 1; // events under way for less are work, not a backlog,
  const LATE_MS = 5000; // and what is late for less is a hiccup

  const events = (n) => format.int(n) + (n === 1 ? " event" : " events");
  const since = (ms) => (known(ms) ? " since " + format.minute(ms) : "");
  const reasons = (feed) => feed.reasons || [];
  const fell = (feed) => reasons(feed).find((reason) => reason.about === "log");
  /* Said only where the store keeps what it acknowledges, and has not come back with less. */
  const nothingLost = (feed) => (feed.unexplained === 0 && at(feed, "store.durable") === true && !fell(feed) ? ", nothing is lost" : "");

  function wait(feed) {
    const pending = at(feed, "backlog.pending");
    if (!known(pending)) return "events wait in the log" + nothingLost(feed);
    if (pending === 0) return "no event waits";
    return events(pending) + (pending === 1 ? " waits" : " wait") + " in the log" + nothingLost(feed);
  }

  /* Since when (the feed's clock) the oldest event that waits for the Python service has been late. */
  let late = null;
  function lateMs(feed) {
    if (!(at(feed, "backlog.oldest_age_s") > LATE_S)) late = null;
    else if (late === null || late > feed.at) late = feed.at;
    return late === null ? 0 : feed.at - late;
  }

  /* How a backlog goes, as a verb and in words. */
  function pace(feed) {
    const [out, into, eta] = [at(feed, "rates.python"), at(feed, "rates.ingest"), at(feed, "backlog.eta_s")];
    if (at(feed, "backlog.shrinks") === true) return ["catches up", known(eta) ? "Caught up in about " + format.age(eta) + "." : "Catching up."];
    if (out === 0) return ["takes nothing", "It has taken no event for some seconds."];
    return ["falls behind", known(out) && known(into) ? "It takes " + format.rate(out) + " events/s, " + format.rate(into) + " come in." : ""];
  }

  const list = (words) => (words.length < 2 ? words.join("") : words.slice(0, -1).join(", ") + " and " + words[words.length - 1]);
  /* A partner may say much: enough to know it by, and room for what follows. */
  const brief = (words) => (words && words.length > 140 ? words.slice(0, 139).trimEnd() + "…" : words);
  const upper = (words) => words[0].toUpperCase() + words.slice(1);
  const sentence = (words) => (words ? upper(words).replace(/\.$/, "") + ". " : "");

  const ALL_AGES = ["backlog", "nexus age", "python age"];

  /* What becomes of the acknowledged events once a store that is away comes back. */
  function kept(feed) {
    const durable = at(feed, "store.durable");
    if (durable === false) return " It was not set to keep all that it acknowledges: some may be gone when it is back.";
    return durable === true && !fell(feed) ? " Acknowledged events are in the store and come back with it." : "";
  }

  function store(feed) {
    const status = at(feed, "store.status");
    const said = {
      offline: ["bad", "Store is away: ingest refuses with 503, Nexus resumes by itself", "The Python service keeps what it knows." + kept(feed)],
      loading: ["warn", "Store is loading: ingest refuses with 503 until it is done", "Nexus resumes by itself."],
      readonly: ["bad", "Store is read-only: ingest refuses with 503, Nexus resumes by itself", "Usual causes: a failover, or a replica taken for the primary."],
    }[status];
    if (status === "full") return full(feed, sentence(at(feed, "store.detail")));
    return said && { level: said[0], title: said[1], detail: sentence(at(feed, "store.detail")) + said[2], rings: "apart",
      covers: ["pipeline", "streams", "asked", ...ALL_AGES] };
  }

  /* What limits the memory: of the embedded store a setting, of another one what its server is told. */
  const limit = (feed) => (at(feed, "store.embedded") === false ? "maxmemory" : "STORE_MAX_MEMORY");

  /* Of a full disk the store refuses every write. In a full memory the streams go on, and retention makes room as far as they came:
     who holds it back is the cause. */
  function full(feed, why) {
    if (at(feed, "store.full_of") === "disk") {
      return { level: "bad", title: "The store's disk is full: ingest refuses with 503, Nexus resumes by itself", rings: "apart",
        detail: why + "Free room on that disk; a higher " + limit(feed) + " does not help.", covers: ["pipeline", "streams"] };
    }
    const held = (at(feed, "retention.held_back") || []).filter((name) => nexus.behind(at(feed, "streams." + name)) !== 0); // it looks every ten seconds
    if (!held.length) {
      return { level: "bad", title: "Store is full: ingest refuses with 503 until retention has made room", rings: "apart",
        detail: why + "It lets go of the oldest events, those within their retention too: raise " + limit(feed) + " to keep them." };
    }
    const cause = held.includes("bridge") ? bridge(feed) : null;
    const called = (name) => (name === "bridge" ? "the bridge" : name);
    return { level: "bad", title: "Store is full and retention waits for " + list(held.map(called)) + ": ingest refuses with 503", rings: "apart",
      detail: why + upper(list(held.map((name) => called(name) + " has " + events(nexus.behind(at(feed, "streams." + name))) + " to read"))) + (cause ? ": " + cause.also : "")
        + ". Room comes as far as " + (held.length > 1 ? "they get" : "it gets") + ", or by a higher " + limit(feed) + ".",
      acts: cause ? cause.acts : [], covers: ["retention", ...(cause ? ["bridge", "backlog", "python age"] : [])] };
  }

  /* Told for a while after the latest, and counted in the store's tile for good. */
  function early(feed) {
    const [n, latest] = [at(feed, "retention.within_retention"), Date.parse(at(feed, "retention.within_retention_at"))];
    if (!(n > 0) || !(feed.at - latest < EARLY_MS)) return null;
    return { level: "warn", title: events(n) + " within their retention were let go of for want of memory", rings: "joined",
      detail: "The latest at " + format.minute(latest) + ". Raise " + limit(feed) + ", or lower EVENT_RETENTION_HOURS to what it holds.",
      also: events(n) + " within their retention were let go of for want of memory" };
  }

  const loads = (feed) => at(feed, "pipeline.state") === "running" && LOCAL.some((name) => at(feed, "streams." + name + ".state") === "starting");

  function pipeline(feed) {
    const state = loads(feed) ? "starting" : at(feed, "pipeline.state");
    const why = sentence(at(feed, "pipeline.detail"));
    const said = {
      stopped: ["bad", "The pipeline is stopped: accepted events wait in the log" + nothingLost(feed), why + "Features and scores do not move until it runs."],
      restarting: ["warn", "The pipeline restarts: accepted events wait in the log" + nothingLost(feed), why + "It goes on from its checkpoint."],
      starting: ["idle", "Nexus is starting", why + "The pipeline goes on from its checkpoint."],
      standby: ["idle", "This instance stands by: it serves reads and ingest", "Another instance owns the pipeline; this one takes over when that one is gone."],
    }[state];
    return said && { level: said[0], title: said[1], detail: said[2], rings: said[0] === "idle" ? "joined" : "apart", about: "pipeline",
      covers: { starting: ["streams", "asked", ...ALL_AGES], standby: ["asked"] }[state] || ["streams", "nexus age"],
      also: { stopped: "the pipeline is stopped", restarting: "the pipeline restarts" }[state] };
  }

  function lost(feed) {
    const reason = fell(feed);
    return reason && { level: "bad", title: "Acknowledged events are lost: the store came back without its latest ones", rings: "joined",
      detail: sentence(reason.text.replace(/^the store came back without its latest events: /, "")) + "Nexus goes on from there. Senders may send them again: a known event id counts once.", also: "acknowledged events are lost" };
  }

  function accounts(feed) {
    if (!known(feed.unexplained) || feed.unexplained === 0) return null;
    return { level: "bad", title: events(feed.unexplained) + " unexplained: accepted, but neither processed, pending nor dead",
      detail: "The accounts of the streams below show where. This must never happen.", rings: "apart",
      also: events(feed.unexplained) + " unexplained" };
  }

  function localStream(feed, states) {
    const hit = LOCAL.filter((name) => states.includes(at(feed, "streams." + name + ".state")));
    if (!hit.length) return null;
    const first = hit[0];
    const is = at(feed, "streams." + first + ".state");
    const lag = nexus.behind(at(feed, "streams." + first));
    const held = known(lag) ? events(lag) + " before it" : "its events wait in the log";
    const who = hit.length > 1 ? "Streams " + hit.join(", ") + " are " : "Stream " + first + " ";
    const verb = hit.length > 1 ? "" : is === "behind" ? "falls " : is === "restarting" ? "" : is === "failed" ? "has " : "is ";
    const word = is === "restarting" && hit.length === 1 ? "restarts" : is;
    return { level: is === "failed" ? "bad" : "warn", title: who + verb + word + ": " + held,
      detail: "The other streams go on" + nothingLost(feed) + ".", rings: "joined", about: "streams", also: first + " " + is };
  }

  /* When the circuit lets something through again. */
  function again(feed) {
    const [retry, opened] = [at(feed, "circuit.retry_in_s"), at(feed, "circuit.opened_at")];
    if (at(feed, "circuit.forced") === true) return "Opened by hand" + (known(opened) ? " at " + format.minute(opened) : "") + ". Reset circuit lets it send again.";
    if (at(feed, "circuit.state") === "half_open" || retry === 0) return "Trying now.";
    return known(retry) ? "Next try in " + format.age(retry) + "." : "The bridge tries again by itself.";
  }

  function bridge(feed) {
    const status = at(feed, "python.status");
    const circuit = at(feed, "circuit.state");
    const because = sentence(brief(at(feed, "python.reason")));
    const go = "Nexus's own features go on. ";
    const apart = { rings: "apart", about: "bridge", covers: ["backlog", "python age"] };
    const joined = { ...apart, rings: "joined" };
    const reset = ["open", "half_open"].includes(circuit) ? ["reset"] : [];
    if (status === "disabled" || at(feed, "settings.ENABLE_PYTHON_BRIDGE.value") === false) {
      return { ...apart, level: "idle", title: "The bridge is switched off: Nexus works alone",
        detail: go + "Events for the Python service are not sent: " + wait(feed) + ".", also: "the bridge is off" };
    }
    if (at(feed, "circuit.paused") === true) {
      return { ...apart, level: "warn", title: "The bridge is paused" + since(at(feed, "circuit.paused_at")) + ": " + wait(feed), detail: go, acts: ["resume"], also: "the bridge is paused" };
    }
    if (status === "offline") {
      return { ...apart, level: "bad", title: "Python service is offline" + since(at(feed, "python.since")) + ": " + wait(feed),
        detail: because + go + again(feed), acts: reset, also: "the Python service is offline" };
    }
    if (circuit === "open") {
      return { ...apart, level: "bad", title: "The circuit to the Python service is open" + since(at(feed, "circuit.opened_at")) + ": " + wait(feed),
        detail: because + go + again(feed), acts: reset, also: "the circuit is open" };
    }
    if (at(feed, "streams.bridge.state") === "failed") {
      return { ...apart, level: "bad", title: "The bridge has failed: " + wait(feed), detail: go, also: "the bridge has failed" };
    }
    if (status === "degraded" || circuit === "half_open") {
      return { ...joined, level: "warn", title: (status === "degraded" ? "Python service is degraded: " : "The bridge probes the Python service: ") + wait(feed),
        detail: because + go + (circuit === "half_open" ? again(feed) : ""), acts: reset, also: status === "degraded" ? "the Python service is degraded" : "the circuit is half open" };
    }
    if (status === "starting" || at(feed, "streams.bridge.state") === "starting") {
      return { ...joined, level: "idle", title: "Nexus runs, the Python service is being asked", detail: "Its first answer is awaited.", about: "asked", also: "the Python service has yet to answer" };
    }
    return null;
  }

  /* Its events are taken, and may yet be lost: the store's own words say how. */
  function frail(feed) {
    if (at(feed, "store.status") === "unknown") {
      return { level: "warn", title: "How the store stands is not known", rings: "joined", detail: sentence(at(feed, "store.detail")) + "Both systems go on.",
        also: "how the store stands is not known" };
    }
    if (at(feed, "store.status") !== "degraded") return null;
    return { level: "warn", title: "The store is degraded: acknowledged events are not safe in it", rings: "joined",
      detail: sentence(at(feed, "store.detail")) + "Both systems go on.", also: "the store is degraded" };
  }

  function backlog(feed) {
    const pending = at(feed, "backlog.pending");
    const oldest = at(feed, "backlog.oldest_age_s");
    const long = lateMs(feed) >= LATE_MS || oldest > BEHIND_S;
    if (!(pending > 0) || !long) return null;
    const [verb, words] = pace(feed);
    return { level: "warn", title: "Python service " + verb + ": " + wait(feed), rings: "joined", also: wait(feed), about: "backlog", covers: ["python age"],
      detail: "The oldest is " + format.age(oldest) + " old. " + words };
  }

  function stale(feed) {
    return [["nexus_s", "Nexus"], ["python_s", "Python"]].map(([side, name]) => {
      const old = at(feed, "freshness." + side);
      if (!known(old) || old <= 60) return null;
      return { level: "warn", title: name + " features are " + format.age(old) + " behind the newest event", rings: "joined", about: name.toLowerCase() + " age",
        detail: "Combined features carry the age and say so.", also: name + " features are " + format.age(old) + " behind" };
    });
  }

  const ofStreams = (letters) => list(letters.map(([name, n]) => (letters.length > 1 ? format.int(n) + " of " : "") + name));

  /* Those that this reader has not looked at yet. */
  function dead(feed) {
    const letters = nexus.unseenLetters(feed);
    if (!letters.length) return null;
    const n = letters.reduce((sum, [, count]) => sum + count, 0);
    const called = format.int(n) + (nexus.seenLetters(feed) ? " new" : "") + (n === 1 ? " dead letter" : " dead letters");
    return { level: "warn", title: called + (n === 1 ? " needs" : " need") + " a look: " + ofStreams(letters), acts: ["letters"],
      detail: "All else goes on. What is malformed fails again; all else can be sent again once its cause is gone.", rings: "joined",
      also: called + (letters.length > 1 ? ": " : " of ") + ofStreams(letters) };
  }

  /* The count of those that this reader has seen, which are no news. */
  function seen(feed) {
    const n = nexus.seenLetters(feed);
    return n > 0 && !nexus.unseenLetters(feed).length ? { also: format.int(n) + (n === 1 ? " dead letter" : " dead letters") + " that you have seen", acts: ["letters"] } : null;
  }

  /* What health finds wrong and nothing above has words for. */
  function others(feed) {
    return reasons(feed).filter(({ about }) => !TOLD.includes(about)).map(({ about, text }) => (
      { level: "warn", title: sentence(brief(text)).replace(/\. $/, ""), detail: "All else goes on" + nothingLost(feed) + ".", rings: "joined", about, also: brief(text) }));
  }

  function hybrid(feed) {
    if (at(feed, "settings.HYBRID_FEATURE_MODE.value") !== false) return null;
    return { level: "idle", title: "Hybrid mode is off: combined features are Nexus's own", detail: "Both systems run and receive every event.", rings: "joined", also: "hybrid mode is off" };
  }

  function empty(feed) {
    if (at(feed, "totals.accepted") !== 0) return null;
    const online = at(feed, "python.status") === "online";
    return { level: "idle", title: "Nothing flows yet", rings: "joined",
      detail: (online ? "Both systems are up and wait" : "Nexus is up and waits") + " for the first event at POST /api/ml/events/ingest." };
  }

  function asOne(feed) {
    const rate = at(feed, "rates.ingest");
    const pace = known(rate) ? (rate > 0 ? format.rate(rate) + " events/s. " : "No events right now. ") : "";
    const fresh = ["nexus_s", "python_s"].map((side) => at(feed, "freshness." + side));
    const ages = fresh.every(known) ? "Nexus features are " + format.age(fresh[0]) + " old, Python features " + format.age(fresh[1]) + "." : "";
    return { level: "ok", title: "Both systems work as one", detail: (pace + ages).trim() || "Every part answers.", rings: "one" };
  }

  /* One verdict for a feed: {level, title, detail, rings, acts}. What hangs on a graver cause is not told again. */
  nexus.verdict = function (feed) {
    if (!at(feed, "store.status") && !at(feed, "pipeline.state") && !at(feed, "python.status")) {
      return { level: "unknown", title: "Nexus runs, its figures are not known yet", detail: "The page asks once a second.", rings: "unknown" };
    }
    const found = [store(feed), pipeline(feed), lost(feed), accounts(feed), localStream(feed, ["failed"]), bridge(feed),
      localStream(feed, ["behind", "restarting", "paused"]), frail(feed), early(feed), ...others(feed), empty(feed), backlog(feed), dead(feed), ...stale(feed),
      hybrid(feed)].filter(Boolean);
    if (!found.length) found.push(asOne(feed));
    const covered = found.flatMap((one) => one.covers || []);
    const [first, ...rest] = found.filter((one) => !covered.includes(one.about));
    const told = [...rest.filter((one) => one.also).slice(0, MOST_ALSO), seen(feed)].filter(Boolean);
    const acts = [first, ...told].flatMap((one) => one.acts || []);
    return { ...first, acts, detail: first.detail.trim() + (told.length ? " Also: " + told.map((one) => one.also).join("; ") + "." : "") };
  };

  /* What the page says while Nexus itself does not answer. */
  nexus.verdictOfSilence = function (age, waited, why, last) {
    const old = known(age) ? Math.round(age) + " s old" : "";
    return { level: waited < SILENT_S ? "warn" : "bad", rings: "unknown",
      title: why === null ? "The figures of Nexus stand still, " + old : "Nexus does not answer" + (old && ", last data " + old),
      detail: (last ? "Before that: " + last + ". " : "") + "The page asks again every second" + (why ? " (" + why + ")." : ".") };
  };
})();
