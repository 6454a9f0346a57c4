/* Sends what the reader changes, shows what the feed says is true, and says "pending" in between. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const SWITCHES = ["ENABLE_PYTHON_BRIDGE", "HYBRID_FEATURE_MODE"];
  const FIELDS = ["FEATURE_SYNC_INTERVAL", "PYTHON_SERVICE_TIMEOUT", "HEALTH_CHECK_INTERVAL", "PYTHON_EVENT_API_URL"];
  const CONFIRM_MS = 10000; // an accepted change that the feed does not show by then is shown as it is
  const BUTTONS = { "bridge-pause": "pause", "bridge-resume": "resume", "bridge-reset": "reset_circuit", "open-circuit-yes": "open_circuit",
    "act-resume": "resume", "act-reset": "reset_circuit" };
  const SAID = { pause: "The bridge is paused", resume: "The bridge goes on", reset_circuit: "The circuit is reset", open_circuit: "The circuit is open" };

  const pending = {}; // name -> {value, until, sent}: asked for, not yet seen in the feed
  const draft = {}; // name -> what stands in the field, where it differs from the truth
  const refused = {}; // name -> the server's words on what was last applied
  const given = new WeakMap(); // element -> props last given, so that only changes are dispatched

  const setting = (name) => nexus.at(nexus.live.feed, "settings." + name) || {};
  const truth = (name) => setting(name).value;
  const clicked = () => (window.dash_clientside.callback_context.triggered_id || null);

  function give(id, props) {
    const element = document.getElementById(id);
    if (!element) return;
    const said = JSON.stringify(props);
    if (given.get(element) === said) return;
    given.set(element, said);
    window.dash_clientside.set_props(id, props);
  }

  nexus.notify = function (title, message, bad) {
    window.dash_clientside.set_props("notifications", {
      sendNotifications: [{ action: "show", title, message, color: bad ? "red" : "teal", withBorder: true }],
    });
  };

  /* Sends JSON and returns the answer's body; throws the server's own words. */
  nexus.send = async function (method, url, body) {
    const headers = { Accept: "application/json", ...(body && { "Content-Type": "application/json" }) };
    const answer = await fetch(url, { method, headers, body: body && JSON.stringify(body) }).catch(() => { throw new Error("no connection to Nexus"); });
    const text = await answer.text();
    let said = null;
    try { said = JSON.parse(text); } catch (notJson) { said = null; }
    if (!answer.ok) {
      const error = new Error(nexus.at(said, "error.message") || "Nexus answered " + answer.status);
      error.code = nexus.at(said, "error.code") || String(answer.status);
      throw error;
    }
    return said;
  };

  const labelOf = (name) => { const label = document.querySelector(`label[for="${name}"]`); return label ? label.textContent : name; };

  async function change(name, value) {
    delete refused[name];
    pending[name] = { value, until: Infinity };
    paintSettings();
    try {
      await nexus.send("PATCH", "/api/ml/settings", { settings: { [name]: value }, reason: "dashboard" });
      if (pending[name]) pending[name].until = performance.now() + CONFIRM_MS;
      delete draft[name];
    } catch (error) {
      delete pending[name];
      const words = error.message.replaceAll(name, labelOf(name));
      if (name in draft) refused[name] = words; else nexus.notify(labelOf(name) + " was not changed", words, true);
    }
    paintSettings();
  }

  const same = (a, b) => a === b || String(a) === String(b);
  function settle(name) {
    const wish = pending[name];
    if (!wish) {
      if (name in draft && same(draft[name], truth(name))) delete draft[name]; // nothing is left to apply
      return;
    }
    const source = setting(name).source;
    const seen = wish.value === null ? source === "environment" : same(truth(name), wish.value);
    if (seen || performance.now() > wish.until) delete pending[name];
  }

  function sourceWords(name) {
    const { source, value, default: first, environment } = setting(name);
    const is = same(environment, first) ? "default" : "environment";
    if (pending[name]) return "pending …";
    if (name in draft) return "not applied, in force: " + shown(name, value);
    if (source === "store") return "set here" + (environment === undefined || environment === null ? "" : `, ${is}${is === "default" ? "" : " says"}: ${shown(name, environment)}`);
    return source ? (is === "default" ? "the default" : "from the environment") : nexus.format.unknown;
  }

  function shown(name, value) {
    const { unit } = setting(name);
    return value === true ? "on" : value === false ? "off" : nexus.known(value) ? nexus.format.int(value) + (unit ? " " + unit : "") : String(value);
  }

  function discard(name) {
    delete draft[name];
    delete refused[name];
    given.delete(document.getElementById(name));
    paintSettings();
  }

  function paintSettings() {
    const { feed } = nexus.live;
    for (const name of [...SWITCHES, ...FIELDS]) {
      settle(name);
      const reset = document.getElementById(name + "-reset");
      if (reset) reset.hidden = setting(name).source !== "store" || Boolean(pending[name]) || name in draft;
      const back = document.getElementById(name + "-discard");
      if (back) back.hidden = !(name in draft) || Boolean(pending[name]);
      nexus.setText(document.getElementById(name + "-source"), sourceWords(name));
      const row = reset && reset.closest(".setting");
      if (row) row.dataset.pending = String(Boolean(pending[name]) || name in draft);
    }
    for (const name of SWITCHES) {
      const wish = pending[name];
      const known = typeof truth(name) === "boolean";
      const checked = wish && wish.value !== null ? wish.value : truth(name) === true;
      give(name, { checked, disabled: !known || Boolean(wish) });
    }
    for (const name of FIELDS) {
      const { value, min, max } = setting(name);
      const edited = name in draft;
      const props = edited || value === undefined ? {} : { value };
      if (nexus.known(min) && nexus.known(max)) Object.assign(props, { min, max });
      const error = !edited ? "" : refused[name] || (fits(name, draft[name]) ? "" : remedy(name));
      give(name, edited ? { error } : { ...props, error });
      give(name + "-apply", { disabled: !edited || Boolean(pending[name]) || !fits(name, draft[name]), loading: Boolean(pending[name]) });
    }
    const paused = nexus.at(feed, "circuit.paused");
    const circuit = nexus.at(feed, "circuit.state");
    give("bridge-pause", { disabled: paused === true || !feed });
    give("bridge-resume", { disabled: paused !== true });
    give("bridge-reset", { disabled: !circuit || circuit === "closed" });
    give("bridge-open", { disabled: !circuit || circuit === "open" });
  }

  function remedy(name) {
    const { min, max } = setting(name);
    if (!nexus.known(min)) return "an address such as http://localhost:8000";
    return `a whole number between ${nexus.format.int(min)} and ${nexus.format.int(max)}`;
  }
  function fits(name, value) {
    const { min, max } = setting(name);
    if (value === "" || value === null || value === undefined) return false;
    if (name === "PYTHON_EVENT_API_URL") return true; // the server judges the address
    return Number.isFinite(Number(value)) && (!nexus.known(min) || value >= min) && (!nexus.known(max) || value <= max);
  }

  nexus.painters.push(paintSettings);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && event.target.id in draft) discard(event.target.id);
  });

  async function act(action) {
    try {
      await nexus.send("POST", "/api/ml/bridge/python", { action });
      nexus.notify(SAID[action], "The page shows it within a second.", false);
    } catch (error) {
      nexus.notify("Not done: " + action.replace("_", " "), error.message, true);
    }
  }

  async function testWholeWay() {
    const list = document.getElementById("test-steps");
    const summary = document.getElementById("test-summary");
    give("bridge-test", { loading: true });
    try {
      const said = await nexus.send("POST", "/api/ml/bridge/python", { action: "test_integration" });
      nexus.setText(summary, (said.success ? "✓ all hops answer" : "✕ a hop fails") + ", " + nexus.format.ms(said.duration_ms));
      list.replaceChildren(...(said.steps || []).map((step) => {
        const row = nexus.make("li", "test-step");
        row.dataset.level = step.ok ? "ok" : "bad";
        row.append(nexus.make("span", "glyph"), nexus.make("span", "test-name", nexus.format.state(step.name)),
          nexus.make("span", "test-detail", nexus.format.note(step.detail)), nexus.make("span", "test-ms", nexus.format.ms(step.ms)));
        return row;
      }));
    } catch (error) {
      nexus.setText(summary, "");
      nexus.notify("The test did not run", error.message, true);
    }
    give("bridge-test", { loading: false });
  }

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.nexus = Object.assign(window.dash_clientside.nexus || {}, {
    /* The feed sets the switch too: only a value other than the truth is a wish of the reader. */
    toggleSetting: function (checked) {
      const name = clicked();
      if (!name || pending[name] || typeof truth(name) !== "boolean" || checked === truth(name)) return;
      given.delete(document.getElementById(name));
      change(name, checked);
    },
    editSetting: function (value) {
      const name = clicked();
      if (!name || !nexus.live.feed || (same(value, truth(name)) && !(name in draft))) return; // the feed sets it too
      if (pending[name] && same(value, pending[name].value)) return; // the field tells once more what was just applied
      delete refused[name];
      if (same(value, truth(name))) delete draft[name]; else draft[name] = value;
      given.delete(document.getElementById(name));
      paintSettings();
    },
    /* Of what stands in the field now: the last key may have come just before. */
    applySetting: function (clicks, submits, value) {
      const name = (clicked() || "").replace(/-apply$/, "");
      if (name && nexus.live.feed && !same(value, truth(name))) draft[name] = value;
      if (name in draft && fits(name, draft[name]) && !pending[name]) change(name, draft[name]);
    },
    resetSetting: function () {
      const name = (clicked() || "").replace(/-reset$/, "");
      if (name && !pending[name]) { delete draft[name]; change(name, null); }
    },
    discardSetting: function () {
      const name = (clicked() || "").replace(/-discard$/, "");
      if (!name) return;
      document.getElementById(name).focus();
      discard(name);
    },
    bridgeAction: function () {
      const id = clicked();
      if (id === "open-circuit-yes") window.dash_clientside.set_props("open-circuit", { opened: false });
      if (BUTTONS[id]) act(BUTTONS[id]);
    },
    confirmOpen: function () {
      window.dash_clientside.set_props("open-circuit", { opened: clicked() === "bridge-open" });
    },
    testWholeWay: function () { testWholeWay(); },
  });
})();
