/* Draws the wires of the flow picture and the small lag lines of the streams table. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  nexus.painters = nexus.painters || [];
  const SVG = "http://www.w3.org/2000/svg";
  const { STREAMS } = nexus;
  // The middles of five rows with gaps, and of the two ends, in parts of the picture's height (see overview.css).
  const ROWS = [9, 29.5, 50, 70.5, 91];
  const NEXUS = 30.5;
  const PYTHON = 81.5;

  const curve = (from, to) => `M0 ${from} C 50 ${from}, 50 ${to}, 100 ${to}`;

  /* For each gap its wires: [path, colour, path of the state in the feed, path of the rate]. */
  const WIRES = {
    in: [[curve(50, 50), "plain", "derived.store", "rates.ingest"]],
    fan: STREAMS.map((name, i) => [curve(50, ROWS[i]), name === "bridge" ? "python" : "nexus", `derived.states.${name}`, `streams.${name}.rate`]),
    merge: STREAMS.map((name, i) =>
      name === "bridge" ? [curve(ROWS[i], PYTHON), "python", "derived.partner", "rates.python"] : [curve(ROWS[i], NEXUS), "nexus", `derived.states.${name}`, `streams.${name}.rate`]),
    one: [[curve(NEXUS, 50), "nexus", "derived.store", "rates.nexus"], [curve(PYTHON, 50), "python", "derived.merges", "rates.python"]],
  };

  function draw(gap) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 100 100");
    svg.setAttribute("preserveAspectRatio", "none");
    for (const [path, colour] of WIRES[gap.dataset.wires]) {
      for (const kind of ["wire", "wire-flow"]) {
        const line = document.createElementNS(SVG, "path");
        line.setAttribute("d", path);
        line.setAttribute("class", `${kind} wire-${colour}`);
        svg.append(line);
      }
    }
    gap.replaceChildren(svg);
  }

  nexus.painters.push(function paintWires(feed) {
    const shown = { ...feed, derived: nexus.derive(feed) };
    for (const gap of document.querySelectorAll("[data-wires]")) {
      if (!gap.firstChild) draw(gap);
      const lines = gap.querySelectorAll("path");
      WIRES[gap.dataset.wires].forEach(([, , state, rate], i) => {
        const level = nexus.levelOf(nexus.at(shown, state));
        const moves = nexus.at(shown, rate) > 0 && level !== "bad" && level !== "idle";
        for (const line of [lines[2 * i], lines[2 * i + 1]]) {
          if (line.dataset.level !== level) line.dataset.level = level;
          if (line.dataset.moves !== String(moves)) line.dataset.moves = String(moves);
        }
      });
    }
    for (const gap of document.querySelectorAll("[data-spark]")) spark(gap, nexus.lagOf ? nexus.lagOf(gap.dataset.spark) : []);
  });

  /* One line of at most 300 points; a flat one at the bottom while nothing lags. */
  function spark(gap, values) {
    if (!gap.firstChild) {
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("viewBox", "0 0 300 24");
      svg.setAttribute("preserveAspectRatio", "none");
      svg.append(document.createElementNS(SVG, "path"));
      gap.append(svg);
    }
    const most = Math.max(10, ...values.filter(nexus.known));
    let path = "";
    let pen = "M";
    values.forEach((value, i) => {
      if (!nexus.known(value)) { pen = "M"; return; }
      path += `${pen}${i} ${(22 - (20 * value) / most).toFixed(1)}`;
      pen = "L";
    });
    const line = gap.firstChild.firstChild;
    if (line.getAttribute("d") !== path) line.setAttribute("d", path);
  }
})();
