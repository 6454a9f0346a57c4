/* Sends what the reader changes, shows what the feed says is true, and says "pending" in between. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const SWITCHES = ["ENABLE_PYTHON_BRIDGE", "HYBRID_FEATURE_MODE"];
  const ADDRESS = "PYTHON_EVENT_API_URL";
  const FIELDS = ["FEATURE_SYNC_INTERVAL", "PYTHON_SERVICE_TIMEOUT", "HEALTH_CHECK_INTERVAL", ADDRESS];
  const WHOLE = /^(\d+|\d{1,3}(,\d{3})+)$/;
  const CONFIRM_MS = 10000; // an accepted change that the feed does not show by then is shown as it is
  const BUTTONS = { "bridge-pause": "pause", "bridge-resume": "resume", "bridge-reset": "reset_circuit", "open-circuit-yes": "open_circuit",
    "act-resume": "resume", "act-reset": "reset_circuit" };
  // Where the focus goes from a button that has nothing more to do.
  const COUNTERPART = { "bridge-pause": "bridge-resume", "bridge-resume": "bridge-pause", "bridge-reset": "bridge-open", "bridge-open": "bridge-reset" };
  const SAID = { pause: "The bridge is paused", resume: "The bridge goes on", reset_circuit: "The circuit is reset", open_circuit: "The circuit is open" };

  const pending = {}; // name -> {value, until, sent}: asked for, not yet seen in the feed
  const draft = {}; // name -> what the reader typed, where it says other than what is so or pending
  const refused = {}; // name -> the server's words on what was last applied
  const given = new WeakMap(); // element -> props last given, so that only changes are dispatched

  const setting = (name) => nexus.at(nexus.live.feed, "settings." + name) || {};
  const truth = (name) => setting(name).value;
  const element = (id) => document.getElementById(id);
  const clicked = () => (window.dash_clientside.callback_context.triggered_id || null);

  function give(id, props) {
    const node = element(id);
    const said = JSON.stringify(props);
    if (!node || given.get(node) === said) return;
    given.set(node, said);
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
    const typed = draft[name];
    delete refused[name];
    delete draft[name];
    pending[name] = { value, until: Infinity };
    paintSettings();
    try {
      await nexus.send("PATCH", "/api/ml/settings", { settings: { [name]: value }, reason: "dashboard" });
      if (pending[name]) pending[name].until = performance.now() + CONFIRM_MS;
    } catch (error) {
      delete pending[name];
      const words = error.message.replaceAll(name, labelOf(name));
      if (typed !== undefined && !(name in draft)) { draft[name] = typed; refused[name] = words; } else nexus.notify(labelOf(name) + " was not changed", words, true);
    }
    paintSettings();
  }

  /* What a text in a field means; null where it is nothing that the field takes. */
  function meant(name, text) {
    const words = text.trim();
    if (name === ADDRESS) return words || null;
    return WHOLE.test(words) ? Number(words.replaceAll(",", "")) : null;
  }
  const says = (name, text, value) => (nexus.known(value) || value ? meant(name, text) === value : text === "");

  /* The value that is so, or is pending. */
  function standing(name) {
    const wish = pending[name];
    return !wish ? truth(name) : wish.value === null ? setting(name).environment : wish.value;
  }

  function settle(name) {
    const wish = pending[name];
    if (!wish) {
      if (name in draft && says(name, draft[name], truth(name))) delete draft[name]; // nothing is left to apply
      return;
    }
    const seen = wish.value === null ? setting(name).source === "environment" : truth(name) === wish.value;
    if (seen || performance.now() > wish.until) delete pending[name];
  }

  function sourceWords(name) {
    const { source, value, default: first, environment } = setting(name);
    const is = environment === first ? "default" : "environment";
    if (pending[name]) return "pending …";
    if (name in draft) return "not applied, in force: " + shown(name, value);
    if (source === "store") return "set here" + (environment === undefined || environment === null ? "" : `, ${is}${is === "default" ? "" : " says"}: ${shown(name, environment)}`);
    return source ? (is === "default" ? "the default" : "from the environment") : nexus.format.unknown;
  }

  function shown(name, value) {
    const { unit } = setting(name);
    return value === true ? "on" : value === false ? "off" : nexus.known(value) ? nexus.format.int(value) + (unit ? " " + unit : "") : String(value);
  }

  /* Writes as keys would, so that React keeps it. What the page writes itself is no edit. */
  let writing = false;
  const setValue = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
  function write(field, text) {
    if (field.value === text) return;
    writing = true;
    setValue.call(field, text);
    field.dispatchEvent(new Event("input", { bubbles: true }));
    writing = false;
  }

  function edit(name, text) {
    delete refused[name];
    if (says(name, text, standing(name))) delete draft[name]; else draft[name] = text;
    paintSettings();
  }

  function discard(name) {
    delete draft[name];
    delete refused[name];
    element(name).focus();
    paintSettings();
  }

  const ready = (name) => name in draft && !pending[name] && fits(name, draft[name]);

  /* Of what stands in the field at this moment. */
  function apply(name) {
    edit(name, element(name).value);
    if (ready(name)) change(name, meant(name, draft[name]));
  }

  function reset(name) {
    if (!pending[name]) { delete draft[name]; change(name, null); }
  }

  function paintSettings() {
    for (const name of [...SWITCHES, ...FIELDS]) {
      const field = element(name);
      if (!field) continue;
      settle(name);
      const home = () => field;
      nexus.offer(element(name + "-reset"), setting(name).source === "store" && !pending[name] && !(name in draft), home);
      nexus.offer(element(name + "-discard"), name in draft && !pending[name], home);
      nexus.setText(element(name + "-source"), sourceWords(name));
      field.closest(".setting").dataset.pending = String(Boolean(pending[name]) || name in draft);
      if (SWITCHES.includes(name)) {
        const known = typeof truth(name) === "boolean";
        give(name, { checked: standing(name) === true, disabled: !known || Boolean(pending[name]) });
        continue;
      }
      if (name in draft) write(field, draft[name]);
      else if (!says(name, field.value, standing(name))) write(field, String(standing(name) ?? ""));
      give(name, { error: name in draft ? refused[name] || (fits(name, draft[name]) ? "" : remedy(name)) : "" });
      nexus.offer(element(name + "-apply"), ready(name), home, "disabled");
    }
    paintBridge();
  }

  let left = null; // the bridge's button that was used last, until the focus is somewhere again
  document.addEventListener("focusin", () => { left = null; });

  function paintBridge() {
    const { feed } = nexus.live;
    const [paused, circuit] = [nexus.at(feed, "circuit.paused"), nexus.at(feed, "circuit.state")];
    const can = { "bridge-pause": Boolean(feed) && paused !== true, "bridge-resume": paused === true,
      "bridge-reset": Boolean(circuit) && circuit !== "closed", "bridge-open": Boolean(circuit) && circuit !== "open" };
    const home = (id) => (can[COUNTERPART[id]] ? element(COUNTERPART[id]) : element("verdict-title"));
    for (const id of Object.keys(can).sort((a, b) => can[b] - can[a])) nexus.offer(element(id), can[id], () => home(id), "disabled");
    if (left !== null && !can[left] && document.activeElement === document.body) home(left).focus();
  }

  function remedy(name) {
    const { min, max } = setting(name);
    if (name === ADDRESS) return "an address such as http://localhost:8000";
    return `a whole number between ${nexus.format.int(min)} and ${nexus.format.int(max)}`;
  }
  function fits(name, text) {
    const [{ min, max }, value] = [setting(name), meant(name, text)];
    return value !== null && (name === ADDRESS || (value >= min && value <= max)); // the server judges the address
  }

  nexus.painters.push(paintSettings);
  /* The page's own listeners, not Dash's callbacks: these come later than the keys, with what stood there earlier. */
  document.addEventListener("input", ({ target }) => {
    if (!writing && FIELDS.includes(target.id)) edit(target.id, target.value);
  });
  document.addEventListener("keydown", ({ key, isComposing, target }) => {
    if (isComposing || !FIELDS.includes(target.id)) return;
    if (key === "Enter") apply(target.id);
    if (key === "Escape" && target.id in draft) discard(target.id);
  });
  document.addEventListener("click", ({ target }) => {
    const { id, dataset } = target.closest("button") || { dataset: {} };
    if (dataset.does) ({ apply, reset, discard })[dataset.does](dataset.of);
    if (id === "bridge-test") testWholeWay();
    if (["bridge-open", "open-circuit-yes", "open-circuit-no"].includes(id)) window.dash_clientside.set_props("open-circuit", { opened: id === "bridge-open" });
    if (BUTTONS[id]) { left = id === "open-circuit-yes" ? "bridge-open" : id in COUNTERPART ? id : null; act(BUTTONS[id]); }
  });

  async function act(action) {
    try {
      await nexus.send("POST", "/api/ml/bridge/python", { action });
      nexus.notify(SAID[action], "The page shows it within a second.", false);
    } catch (error) {
      nexus.notify("Not done: " + action.replace("_", " "), error.message, true);
    }
  }

  let testing = false;
  async function testWholeWay() {
    const list = element("test-steps");
    const summary = element("test-summary");
    if (testing) return;
    testing = true;
    nexus.setText(summary, "testing …");
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
    testing = false;
  }

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.nexus = Object.assign(window.dash_clientside.nexus || {}, {
    /* The feed sets the switch too: only a value other than the truth is a wish of the reader. */
    toggleSetting: function (checked) {
      const name = clicked();
      if (!name || pending[name] || typeof truth(name) !== "boolean" || checked === truth(name)) return;
      given.delete(element(name));
      change(name, checked);
    },
  });
})();
