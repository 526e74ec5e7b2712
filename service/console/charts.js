// Charts in SVG: bars of a timeline, of amounts, and a line of the last minutes.

import { el, svg } from "./dom.js";
import { seconds } from "./format.js";

const COLOURS = 12; // classes c0 … c11 of the style sheet
const ORDER = ["weights", "caches", "restore", "import", "load", "compile", "graphs", "warm-up", "sleep", "wake", "canary", "ready"];

export const colour = (name) => {
  const at = ORDER.indexOf(name);
  return `c${(at < 0 ? [...name].reduce((sum, letter) => sum + letter.codePointAt(0), 0) : at) % COLOURS}`;
};

/**
 * Returns a bar of phases.
 * @param phases [name, start, end] in seconds
 * @param length seconds of the whole width
 * @param marker seconds where a line is drawn, such as the median; null: none
 */
export function timeline(phases, length, { marker = null, now = null, label } = {}) {
  const at = (second) => `${((100 * Math.max(0, second)) / length).toFixed(3)}%`;
  const wide = (start, end) => `${Math.max(0.2, (100 * (Math.max(0, end) - Math.max(0, start))) / length).toFixed(3)}%`;
  return svg("svg", { class: "timeline", role: "img", "aria-label": label },
    svg("rect", { class: "track", width: "100%", height: "100%", rx: 3 }),
    now !== null && svg("rect", { class: "now", width: at(now), height: "100%", rx: 3 }),
    phases.filter(([, , end]) => end > 0).map(([name, start, end]) =>
      svg("rect", { class: colour(name), x: at(start), width: wide(start, end), height: "100%" },
        svg("title", {}, `${name}: ${seconds(end - start)}, from ${seconds(Math.max(0, start))}`))),
    marker !== null && svg("rect", { class: "marker", x: at(marker), width: 2, height: "100%" },
      svg("title", {}, `Median: ${seconds(marker)}`)));
}

/** Returns the names of phases with their colours. */
export const legend = (names) =>
  el("ul", { class: "legend" }, names.map((name) => el("li", {}, el("i", { class: colour(name) }), name)));

/** Returns horizontal bars: rows of { name, value, text }. */
export function bars(rows, label) {
  const most = Math.max(...rows.map((row) => row.value), Number.MIN_VALUE);
  return el("ul", { class: "bars", "aria-label": label }, rows.map((row) =>
    el("li", {}, el("span", { class: "name", title: row.name }, row.name),
      svg("svg", { class: "bar-track", "aria-hidden": "true" },
        svg("rect", { class: "bar", width: `${(100 * row.value) / most}%`, height: "100%", rx: 3 })),
      el("span", { class: "number" }, row.text))));
}

/** Returns columns over time: rows of { name, value, text }; few of them leave room at the left. */
export function columns(rows, label) {
  const most = Math.max(...rows.map((row) => row.value), Number.MIN_VALUE);
  const width = 100 / rows.length;
  return svg("svg", { class: "columns", role: "img", "aria-label": label }, rows.map((row, index) => {
    const height = (100 * row.value) / most;
    return svg("rect", { class: "bar", x: `${index * width + width * 0.1}%`, width: `${width * 0.8}%`,
      y: `${100 - height}%`, height: `${height}%` }, svg("title", {}, `${row.name}: ${row.text}`));
  }));
}

/** Returns a line through the last values, each from 0 to 1. */
export function sparkline(values, label) {
  const most = Math.max(1, values.length - 1);
  const points = values.map((value, index) => `${(100 * index) / most},${24 - 22 * Math.min(1, value)}`).join(" ");
  return svg("svg", { class: "spark", viewBox: "0 0 100 26", preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("polyline", { points, fill: "none", "vector-effect": "non-scaling-stroke" }));
}
