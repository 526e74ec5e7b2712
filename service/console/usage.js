// The tab Usage: tokens, requests and dollars by key, model or day, from the ledger.

import { get } from "./api.js";
import { bars, columns } from "./charts.js";
import { append, el, field, select, show, toast } from "./dom.js";
import { count, dollars, seconds, short } from "./format.js";

const SHOWN = 20; // bars
const PAGE = 200; // rows of an answer
const MEASURES = {
  tokens: { label: "tokens", of: (row) => row.tokens_in + row.tokens_out, text: short },
  requests: { label: "requests", of: (row) => row.requests, text: short },
  dollars: { label: "dollars", of: (row) => row.dollars, text: dollars },
};
const FIELDS = ["requests", "errors", "tokens_in", "tokens_cached", "tokens_out", "seconds", "held_s", "cost", "dollars"];

export function open(panel, who) {
  let rows = [], more = false, total = {}, shown = "day", latest = 0; // what the rows are by, and the load that counts
  const ending = new AbortController();
  const by = select([["day", "day"], ["model", "model"], ["key", "key"]], "day", { onchange: load });
  const since = select([["24h", "24 hours"], ["7d", "7 days"], ["30d", "30 days"], ["365d", "a year"], ["", "the beginning"]], "30d",
    { onchange: load });
  const measure = select(Object.keys(MEASURES), "tokens", { onchange: draw });
  const chart = el("div", { class: "card chart" });
  const totals = el("dl", { class: "facts totals" });
  const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Usage" });
  const pages = el("div", { class: "pages" });
  append(panel, [
    el("h2", { class: "sr" }, "Usage"),
    el("div", { class: "tools" }, field("By", by), field("Since", since), field("Chart", measure),
      el("button", { onclick: load }, "Refresh"), el("button", { onclick: save }, "CSV")),
    totals, chart, table, pages,
  ]);

  const page = (asked, offset) => {
    const query = new URLSearchParams({ by: asked, limit: PAGE, offset });
    if (since.value) query.set("since", since.value);
    return get(`/v1/usage?${query}`, ending.signal);
  };

  async function load(next = false) {
    const own = ++latest, asked = by.value;
    try {
      const answer = await page(asked, next === true ? rows.length : 0);
      if (own !== latest) return;
      shown = asked;
      rows = next === true ? rows.concat(answer.data) : answer.data;
      ({ more, total } = answer);
      draw();
    } catch (error) {
      if (own === latest && !ending.signal.aborted) show(table, el("p", { class: "error", role: "alert" }, error.message));
    }
  }

  function draw() {
    const { label, of, text } = MEASURES[measure.value];
    const isOperators = (row) => row.name.startsWith("(");
    const used = rows.filter((row) => !isOperators(row)), operator = rows.filter(isOperators);
    const sum = (name) => total[name];
    show(totals, [["Requests", count(sum("requests"))], ["Tokens in", short(sum("tokens_in"))], ["Tokens out", short(sum("tokens_out"))],
      ["Callers owe", dollars(sum("dollars"))],
      who.admin && ["Replicas cost", dollars(total.cost + operator.reduce((cost, row) => cost + row.cost, 0))]]
      .filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    const points = used.map((row) => ({ name: row.name, value: of(row), text: `${text(of(row))} ${measure.value === "dollars" ? "" : label}` }));
    if (!points.length) show(chart, el("p", { class: "muted" }, "Nothing was used in this time."));
    else if (shown === "day") {
      const days = everyDay(points);
      show(chart, el("h3", {}, `${label} a day`), columns(days, `${label} by day`),
        el("div", { class: "axis" }, el("span", {}, days[0].name), el("span", {}, days.at(-1).name)));
    } else {
      points.sort((one, other) => other.value - one.value);
      show(chart, el("h3", {}, `${label} by ${shown}`), bars(points.slice(0, SHOWN), `${label} by ${shown}`));
    }
    show(table, el("table", {},
      el("thead", {}, el("tr", {}, [shown, "Requests", "Errors", "Tokens in", "cached", "out", "Time", "Held", "Replicas' cost", "Dollars"]
        .map((name, index) => el("th", { scope: "col", class: index ? "number" : null }, name)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name),
        [count(row.requests), count(row.errors), count(row.tokens_in), count(row.tokens_cached), count(row.tokens_out), seconds(row.seconds),
          seconds(row.held_s), dollars(row.cost), dollars(row.dollars)].map((value) => el("td", { class: "number" }, value)))))));
    show(pages, more && el("button", { onclick: () => load(true) }, "More rows"));
  }

  async function save() {
    const asked = by.value;
    let all = [], answer;
    try {
      do {
        answer = await page(asked, all.length);
        all = all.concat(answer.data);
      } while (answer.more);
    } catch (error) {
      toast(error.message, true);
      return;
    }
    const url = URL.createObjectURL(new Blob([csv(asked, all)], { type: "text/csv" }));
    el("a", { href: url, download: `usage-by-${asked}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  load();
  return () => ending.abort();
}

/** Returns the points of all days up to the last one, at least two weeks of them. */
function everyDay(points) {
  const day = (name) => Date.parse(name) / 86400000;
  const known = new Map(points.map((point) => [point.name, point]));
  const last = day(points.at(-1).name), first = Math.min(day(points[0].name), last - 13);
  return Array.from({ length: last - first + 1 }, (_, index) => {
    const name = new Date((first + index) * 86400000).toISOString().slice(0, 10);
    return known.get(name) ?? { name, value: 0, text: "nothing" };
  });
}

/** Returns rows as CSV. A name that a spreadsheet would take for a formula gets an apostrophe. */
export function csv(by, rows) {
  const cell = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [[by, ...FIELDS], ...rows.map((row) => [row.name, ...FIELDS.map((name) => row[name])])]
    .map((line) => `${line.map(cell).join(",")}\r\n`).join("");
}
