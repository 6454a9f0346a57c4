/* Keeps the last 300 points of each series, seeds the graphs with them and extends them by one point a tick. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const POINTS = 300;
  const STREAMS = ["features", "storage", "aggregates", "inference", "bridge"];

  /* Each graph: its series as [key, name, colour variable], its unit, how the pointer reads it, the least height of its axis, and
     the series with the area below it filled. */
  const CHARTS = {
    "chart-throughput": { peak: "throughput-peak", unit: "/s", read: ",.1~f", floor: 10, ticks: "~s", series: [["ingest", "ingest", "--ink-2"], ["nexus", "Nexus", "--nexus"], ["python", "Python", "--python"]], fill: "ingest" },
    "chart-response": { unit: " ms", read: ",.2~f", floor: 5, series: [["response_ms", "response time", "--python"]], fill: "response_ms" },
    "chart-freshness": { unit: " s", read: ",.2~f", floor: 1, series: [["fresh_nexus", "Nexus", "--nexus"], ["fresh_python", "Python", "--python"]] },
    "chart-errors": { unit: "", read: ",d", floor: 2, series: [["errors", "errors", "--bad"]], fill: "errors", steps: true },
  };
  const KEYS = ["ingest", "nexus", "python", "response_ms", "fresh_nexus", "fresh_python", "errors"];

  const buffer = { t: [], known: [] }; // known: seen by this page or told by Nexus, not filled in
  const SERIES = [...KEYS, "outage", ...STREAMS.map((name) => "lag." + name)];
  for (const key of SERIES) buffer[key] = [];
  let errorsBefore = null;
  let seeded = new WeakSet();

  const orNull = (x) => (nexus.known(x) ? x : null);

  const seconds = (from, before) => Array.from({ length: Math.max(0, Math.ceil((before - from) / 1000)) }, (_, i) => from + 1000 * i);

  /* Was the circuit to the Python service open at a moment? Of the outages that the feed tells. */
  function within(outages, t) {
    return (outages || []).some(({ began, ended }) => t >= Date.parse(began) && t < (ended ? Date.parse(ended) : Infinity)) ? 1 : 0;
  }

  /* Always 300 points, the unknown ones empty: the width of the window never changes. What this page has seen and the history
     does not reach, that of a Nexus which has been started again, stays. */
  function refill(history, feed) {
    const t = Array.isArray(history.t) ? history.t.slice(-POINTS) : [];
    const first = t.length ? t[0] : feed.at;
    const kept = buffer.t.map((_, i) => i).filter((i) => buffer.t[i] < first - 500 && buffer.t[i] > feed.at - 1000 * POINTS && buffer.known[i]);
    const latest = kept.length ? buffer.t[kept[kept.length - 1]] : null;
    const gap = latest === null ? [] : seconds(latest + 1000, first - 500);
    const older = kept.map((i) => buffer.t[i]);
    const missing = Math.max(0, POINTS - older.length - gap.length - t.length);
    const start = older.length ? older[0] : first;
    const before = Array.from({ length: missing }, (_, i) => start - 1000 * (missing - i));
    const blank = (values) => values.map(() => null);
    const whole = (key, values) => {
      const tail = (Array.isArray(values) ? values : []).slice(-t.length || Infinity).map(orNull);
      const padded = [...Array(Math.max(0, t.length - tail.length)).fill(null), ...tail.slice(0, t.length)];
      return [...blank(before), ...kept.map((i) => buffer[key][i]), ...blank(gap), ...padded].slice(-POINTS);
    };
    const found = { t: [...before, ...older, ...gap, ...t].slice(-POINTS) };
    for (const key of KEYS) found[key] = whole(key, history[key]);
    for (const name of STREAMS) found["lag." + name] = whole("lag." + name, (history.lag || {})[name]);
    found.outage = found.t.map((at) => within(feed.outages, at));
    found.known = [...before.map(() => false), ...older.map(() => true), ...gap.map(() => false), ...t.map(() => true)].slice(-POINTS);
    Object.assign(buffer, found);
    seeded = new WeakSet();
  }

  function point(feed) {
    const at = (path) => orNull(nexus.at(feed, path));
    const total = at("bridge_errors.total");
    const errors = total === null || errorsBefore === null ? null : Math.max(0, total - errorsBefore);
    errorsBefore = total;
    const values = { t: feed.at, ingest: at("rates.ingest"), nexus: at("rates.nexus"), python: at("rates.python"), response_ms: at("python.response_time_ms"),
      fresh_nexus: at("freshness.nexus_s"), fresh_python: at("freshness.python_s"), errors,
      known: true, outage: ["open", "half_open"].includes(nexus.at(feed, "circuit.state")) ? 1 : 0 };
    for (const name of STREAMS) values["lag." + name] = at(`streams.${name}.lag`);
    return values;
  }

  function push(values) {
    for (const key of Object.keys(buffer)) {
      buffer[key].push(values[key]);
      if (buffer[key].length > POINTS) buffer[key].splice(0, buffer[key].length - POINTS);
    }
  }

  // The dashes of the Python service let the line below it show where both run level.
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // What is drawn, from the back: the outages, the filled area (down to nothing where a figure is unknown), the lines.
  const drawn = { outage: (y) => y, area: (y) => y ?? 0, line: (y) => y };
  const traces = (chart) => [["outage", ["outage"]], ...chart.series.filter(([key]) => key === chart.fill).map((series) => ["area", series]),
    ...chart.series.map((series) => ["line", series])];

  /* Where an axis ends that is not to be flattened by a short spike: well above what nine tenths of the figures other than 0 are
     below; null where nothing is far above that. In steps, so that it seldom moves. */
  function cap(chart) {
    const shown = chart.series.flatMap(([key]) => buffer[key].filter((y) => y > 0)).sort((a, b) => a - b);
    const usual = 1.25 * Math.max(chart.floor, shown[Math.floor(0.9 * (shown.length - 1))] || 0);
    if (!(shown[shown.length - 1] > 2 * usual)) return null;
    const step = 10 ** Math.floor(Math.log10(usual)) / 2;
    return step * Math.ceil(usual / step);
  }

  /* The highest figure above the graph, and when it was. */
  function tellPeak(chart) {
    const [words, end] = [document.getElementById(chart.peak), caps[chart.peak]];
    if (!words) return;
    words.hidden = end === null;
    if (end === null) return;
    let [most, at, who] = [0, 0, ""];
    for (const [key, name] of chart.series) buffer[key].forEach((y, i) => { if (y > most) [most, at, who] = [y, buffer.t[i], name]; });
    nexus.setText(words, `Above the graph: up to ${nexus.format.rate(most)}${chart.unit} (${who}, ${nexus.format.clock(at)})`);
  }

  const caps = {}; // of each graph that has one
  function figure(chart) {
    const axis = { color: ink("--ink-3"), gridcolor: ink("--line"), zeroline: false, fixedrange: true, tickfont: { size: 11 }, showline: false, automargin: false };
    const x = buffer.t; // Plotly shows numbers by the clock of the reader's place
    const looks = {
      outage: () => ({ yaxis: "y2", hoverinfo: "skip", line: { width: 0, shape: "hv" }, fill: "tozeroy", fillcolor: ink("--bad") + "1f" }),
      area: ([key, , colour]) => ({ hoverinfo: "skip", line: { width: 0, shape: chart.steps ? "hv" : "linear" }, fill: "tozeroy", fillcolor: ink(colour) + (key === "ingest" ? "26" : "1c") }),
      line: ([key, name, colour]) => ({ name, connectgaps: false, hovertemplate: `%{y:${chart.read}}${chart.unit}`,
        line: { color: ink(colour), width: key === "ingest" ? 0 : 1.8, shape: chart.steps ? "hv" : "linear", dash: key === "python" ? "5px,4px" : "solid" } }),
    };
    return {
      data: traces(chart).map(([look, series]) => ({ type: "scatter", mode: "lines", x: [...x], y: buffer[series[0]].map(drawn[look]), ...looks[look](series) })),
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false, hovermode: "x unified",
        margin: { l: 38, r: 6, t: 6, b: 20 }, font: { family: "Geist, ui-sans-serif, system-ui, sans-serif", size: 11, color: ink("--ink-3") },
        hoverlabel: { bgcolor: ink("--raised"), bordercolor: ink("--line-2"), font: { color: ink("--ink") } },
        xaxis: { ...axis, type: "date", tickformat: "%H:%M", hoverformat: "%H:%M:%S", nticks: 5, showgrid: false, ticklabeloverflow: "hide past domain" },
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
        yaxis: { ...axis, rangemode: "tozero", nticks: chart.steps ? 3 : 5, tickformat: chart.ticks || ",~g", ...(caps[chart.peak] ? { range: [0, caps[chart.peak]] } : { autorangeoptions: { include: [0, chart.floor] } }) },
      },
    };
  }

  /* Seeds a graph that is new (or whose points were replaced); extends one that is known. */
  function draw(values) {
    for (const [id, chart] of Object.entries(CHARTS)) {
      const plot = document.querySelector(`#${id} .js-plotly-plot`);
      if (!plot) continue;
      if (chart.peak) {
        const end = cap(chart);
        if (end !== caps[chart.peak]) seeded.delete(plot);
        caps[chart.peak] = end;
        tellPeak(chart);
      }
      if (!seeded.has(plot)) {
        seeded.add(plot);
        window.dash_clientside.set_props(id, { figure: figure(chart) });
      } else if (values) {
        const all = traces(chart);
        const x = all.map(() => [values.t]);
        const y = all.map(([look, [key]]) => [drawn[look](values[key])]);
        window.dash_clientside.set_props(id, { extendData: [{ x, y }, all.map((_, i) => i), POINTS] });
      }
    }
  }

  let last = null;
  nexus.painters.push(function paintCharts(feed, history) {
    if (!nexus.known(feed.at)) return; // there is no snapshot yet
    const values = point(feed);
    if (history || !buffer.t.length) {
      refill(history || {}, feed);
      if (buffer.t[POINTS - 1] < feed.at - 500) push(values);
      last = feed.at;
      draw(null);
    } else {
      const fresh = feed.at !== last; // the same snapshot twice is one point
      last = feed.at;
      if (fresh) push(values);
      draw(fresh ? values : null);
    }
  });

  nexus.lagOf = (name) => buffer["lag." + name] || [];

  // A change of theme changes the colours: seed again.
  new MutationObserver(() => { seeded = new WeakSet(); draw(null); })
    .observe(document.documentElement, { attributes: true, attributeFilter: ["data-mantine-color-scheme"] });
})();
