/* Writes figures for people: the same in every locale, a dash for what is unknown. */
(function () {
  "use strict";
  const nexus = (window.nexus = window.nexus || {});
  const UNKNOWN = "–";
  const known = (x) => typeof x === "number" && Number.isFinite(x);
  const group = (n) => String(n).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
  const two = (n) => String(n).padStart(2, "0");

  /* Three figures are enough for a quantity that moves. */
  function short(x) {
    const size = Math.abs(x);
    if (size === 0) return "0";
    if (size < 0.1) return x.toFixed(2);
    return size < 10 ? x.toFixed(1) : String(Math.round(x));
  }

  function age(s) {
    if (!known(s)) return UNKNOWN;
    if (s < 0) s = 0;
    if (s < 0.05) return "0 s";
    if (s < 9.95) return s.toFixed(1) + " s";
    if (s < 119.5) return Math.round(s) + " s";
    if (s < 7170) return Math.floor(s / 60) + " min " + two(Math.floor(s % 60)) + " s";
    if (s < 172800) return Math.floor(s / 3600) + " h " + two(Math.floor((s % 3600) / 60)) + " min";
    return Math.floor(s / 86400) + " days";
  }

  /* A span in one word and unit, for narrow columns. */
  function span(s) {
    if (!known(s)) return UNKNOWN;
    return s < 100 ? Math.round(s) + " s" : s < 5400 ? Math.round(s / 60) + " min" : Math.round(s / 3600) + " h";
  }

  function bytes(n) {
    if (!known(n)) return UNKNOWN;
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = 0;
    while (n >= 1000 && step < units.length - 1) { n /= 1024; step += 1; }
    return (step === 0 ? String(Math.round(n)) : n < 10 ? n.toFixed(1) : String(Math.round(n))) + " " + units[step];
  }

  function compact(n) {
    if (!known(n)) return UNKNOWN;
    if (Math.abs(n) < 1e5) return group(Math.round(n));
    const [scale, unit] = Math.abs(n) < 1e6 ? [1e3, "k"] : Math.abs(n) < 1e9 ? [1e6, "M"] : [1e9, "G"];
    const value = n / scale;
    return (value < 100 ? value.toFixed(1) : String(Math.floor(value))) + unit;
  }

  /* The clock of the reader's own place, in 24 hours; with the day where the hour alone could mislead. */
  function clock(ms, seconds) {
    if (!known(ms)) return UNKNOWN;
    const then = new Date(ms);
    const time = two(then.getHours()) + ":" + two(then.getMinutes()) + (seconds ? ":" + two(then.getSeconds()) : "");
    if (Math.abs(Date.now() - ms) < 12 * 3600 * 1000) return time;
    return then.getFullYear() + "-" + two(then.getMonth() + 1) + "-" + two(then.getDate()) + " " + time;
  }

  /* The reader's own time zone, as it was at a moment. */
  function zone(ms) {
    const east = -new Date(ms).getTimezoneOffset();
    const [hours, minutes] = [Math.floor(Math.abs(east) / 60), Math.abs(east) % 60];
    return "UTC" + (east === 0 ? "" : (east > 0 ? "+" : "−") + hours + (minutes ? ":" + two(minutes) : ""));
  }

  nexus.known = known;
  nexus.format = {
    text: (x) => (x === null || x === undefined || x === "" ? UNKNOWN : String(x)),
    note: (x) => (x === null || x === undefined ? "" : String(x)),
    state: (x) => (x ? String(x).replace(/_/g, " ") : "unknown"),
    int: (x) => (known(x) ? group(Math.round(x)) : UNKNOWN),
    rate: (x) => (known(x) ? (Math.abs(x) < 10 ? short(x) : group(Math.round(x))) : UNKNOWN),
    ms: (x) => (known(x) ? (x < 1000 ? short(x) + " ms" : age(x / 1000)) : UNKNOWN),
    circuit: (x) => "circuit " + (x ? String(x).replace(/_/g, " ") : "unknown"),
    lag: (x) => (known(x) ? (x <= 0 ? "caught up" : compact(x) + " behind") : UNKNOWN),
    percent: (x) => (known(x) ? (x < 0.1 ? (100 * x).toFixed(1) : String(Math.round(100 * x))) + " %" : UNKNOWN),
    age, bytes, compact, span,
    clock: (x) => clock(x, true),
    minute: (x) => clock(x, false),
    iso: (x) => (known(x) ? new Date(x).toISOString() : ""),
    zone,
    unknown: UNKNOWN,
  };

  /* The value at a dotted path, or undefined where any part of the way is missing. */
  nexus.at = function (object, path) {
    let here = object;
    for (const key of path.split(".")) {
      if (here === null || here === undefined) return undefined;
      here = here[key];
    }
    return here;
  };
})();
