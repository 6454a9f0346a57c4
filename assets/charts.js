/* Keeps the last 300 points of each series, seeds the graphs with them and extends them by one point a tick. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const POINTS = 300;
  const STREAMS = ["features", "storage", "aggregates", "inference", "bridge"];

  /* Each graph: its series as [key, name, colour variable], its unit, the least height of its axis, and whether the area below is filled. */
  const CHARTS = {
    "chart-throughput": { unit: "/s", floor: 10, ticks: "~s", series: [["ingest", "ingest", "--ink-2"], ["nexus", "Nexus", "--nexus"], ["python", "Python", "--python"]], fill: "ingest" },
    "chart-response": { unit: " ms", floor: 5, series: [["response_ms", "response time", "--python"]], fill: "response_ms" },
    "chart-freshness": { unit: " s", floor: 1, series: [["fresh_nexus", "Nexus", "--nexus"], ["fresh_python", "Python", "--python"]] },
    "chart-errors": { unit: "", floor: 2, series: [["errors", "errors", "--bad"]], fill: "errors", steps: true },
  };
  const KEYS = ["ingest", "nexus", "python", "response_ms", "fresh_nexus", "fresh_python", "errors"];

  const buffer = { t: [] };
  for (const key of [...KEYS, ...STREAMS.map((name) => "lag." + name)]) buffer[key] = [];
  let errorsBefore = null;
  let seeded = new WeakSet();

  // Plotly reads numbers as UTC: shift them, so that the axis shows the clock of the reader's place.
  const local = (ms) => ms - new Date(ms).getTimezoneOffset() * 60000;
  const orNull = (x) => (nexus.known(x) ? x : null);

  /* Always 300 points, the unknown ones empty: the width of the window never changes. */
  function refill(history, at) {
    const t = Array.isArray(history.t) ? history.t.slice(-POINTS) : [];
    const first = t.length ? t[0] : at;
    const missing = POINTS - t.length;
    buffer.t = [...Array.from({ length: missing }, (_, i) => first - 1000 * (missing - i)), ...t];
    const aligned = (values) => {
      const tail = (Array.isArray(values) ? values : []).slice(-t.length || Infinity).map(orNull);
      return [...Array(POINTS - tail.length).fill(null), ...tail];
    };
    for (const key of KEYS) buffer[key] = aligned(history[key]);
    for (const name of STREAMS) buffer["lag." + name] = aligned((history.lag || {})[name]);
    seeded = new WeakSet();
  }

  function point(feed) {
    const at = (path) => orNull(nexus.at(feed, path));
    const total = at("bridge_errors.total");
    const errors = total === null || errorsBefore === null ? null : Math.max(0, total - errorsBefore);
    errorsBefore = total;
    const values = { t: feed.at, ingest: at("rates.ingest"), nexus: at("rates.nexus"), python: at("rates.python"), response_ms: at("python.response_time_ms"),
      fresh_nexus: at("freshness.nexus_s"), fresh_python: at("freshness.python_s"), errors };
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

  function figure(chart) {
    const axis = { color: ink("--ink-3"), gridcolor: ink("--line"), zeroline: false, fixedrange: true, tickfont: { size: 11 }, showline: false, automargin: false };
    return {
      data: chart.series.map(([key, name, colour]) => ({
        type: "scatter", mode: "lines", name, x: buffer.t.map(local), y: buffer[key].slice(), connectgaps: false,
        line: { color: ink(colour), width: key === "ingest" ? 0 : 1.8, shape: chart.steps ? "hv" : "linear", dash: key === "python" ? "5px,4px" : "solid" },
        fill: chart.fill === key ? "tozeroy" : "none", fillcolor: ink(colour) + (key === "ingest" ? "26" : "1c"), hovertemplate: "%{y:.3~g}" + chart.unit,
      })),
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false, hovermode: "x unified",
        margin: { l: 38, r: 6, t: 6, b: 20 }, font: { family: "Geist, ui-sans-serif, system-ui, sans-serif", size: 11, color: ink("--ink-3") },
        hoverlabel: { bgcolor: ink("--raised"), bordercolor: ink("--line-2"), font: { color: ink("--ink") } },
        xaxis: { ...axis, type: "date", tickformat: "%H:%M", hoverformat: "%H:%M:%S", nticks: 5, showgrid: false, ticklabeloverflow: "hide past domain" },
        yaxis: { ...axis, rangemode: "tozero", nticks: chart.steps ? 3 : 5, tickformat: chart.ticks || ",~g", autorangeoptions: { include: [0, chart.floor] } },
      },
    };
  }

  /* Seeds a graph that is new (or whose points were replaced); extends one that is known. */
  function draw(values) {
    for (const [id, chart] of Object.entries(CHARTS)) {
      const plot = document.querySelector(`#${id} .js-plotly-plot`);
      if (!plot) continue;
      if (!seeded.has(plot)) {
        seeded.add(plot);
        window.dash_clientside.set_props(id, { figure: figure(chart) });
      } else if (values) {
        const x = chart.series.map(() => [local(values.t)]);
        const y = chart.series.map(([key]) => [values[key]]);
        window.dash_clientside.set_props(id, { extendData: [{ x, y }, chart.series.map((_, i) => i), POINTS] });
      }
    }
  }

  let last = null;
  nexus.painters.push(function paintCharts(feed, history) {
    const values = point(feed);
    if (history || !buffer.t.length) {
      refill(history || {}, feed.at);
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
