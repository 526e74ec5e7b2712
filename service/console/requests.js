// The tab Requests: those that run, and the last 1,000 that have ended. Metadata only; the gateway keeps no content.

import { get, unpack } from "./api.js";
import { append, el, field, select, show } from "./dom.js";
import { NONE, clock, count, dollars, seconds } from "./format.js";
import { poll } from "./poll.js";

const KEPT = 1000, PAGE = 50;

export function open(panel, who) {
  let rows = [], last = 0, page = 0, isLive = true;
  const text = el("input", { type: "search", placeholder: "id, key, model, path, code", oninput: filter });
  const status = select([["", "all"], ["ok", "succeeded"], ["error", "failed"], ["left", "client left"]], "",
    { onchange: filter });
  const live = el("button", { "aria-pressed": "true", onclick: () => {
    isLive = !isLive;
    live.setAttribute("aria-pressed", String(isLive));
    if (isLive) polling.now();
  } }, "Live");
  const running = el("div", {});
  const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Requests that have ended" });
  const pages = el("div", { class: "pages" });
  const problem = el("p", { class: "error", role: "alert", hidden: true });
  append(panel, [
    el("div", { class: "tools" }, field("Filter", text), field("Status", status), live),
    problem, el("h2", {}, "Running"), running, el("h2", {}, "Ended"), table, pages,
  ]);

  function filter() { page = 0; draw(); }

  function matches(row) {
    if (status.value === "left" && !row.client_left) return false;
    if (status.value === "ok" && row.status >= 400) return false;
    if (status.value === "error" && (row.status < 400 || row.client_left)) return false;
    const wanted = text.value.trim().toLowerCase();
    return !wanted || [row.id, row.key, row.model, row.path, row.code, row.gpu, String(row.status)]
      .some((value) => value?.toLowerCase().includes(wanted));
  }

  function draw() {
    const found = rows.filter(matches);
    const most = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(page, most);
    show(table, found.length ? endedTable(found.slice(page * PAGE, (page + 1) * PAGE), who)
      : el("p", { class: "muted" }, rows.length ? "No request matches." : "No request has ended since the gateway started."));
    show(pages,
      el("button", { disabled: page === 0, onclick: () => { page--; draw(); } }, "Newer"),
      el("span", {}, `${count(found.length)} of ${count(rows.length)} requests, page ${page + 1} of ${most + 1}`),
      el("button", { disabled: page === most, onclick: () => { page++; draw(); } }, "Older"));
  }

  const polling = poll(async (signal) => {
    if (!isLive && last) return;
    let answer = await get(`/v1/requests?after=${last}`, signal);
    if (answer.last < last) { rows = []; last = 0; return; } // the gateway was started anew
    let found = unpack(answer);
    for (let oldest; answer.more && found.length < KEPT;) {
      oldest = found.at(-1).number;
      answer = { ...(await get(`/v1/requests?after=${last}&before=${oldest}`, signal)), running: answer.running, last: answer.last };
      found = found.concat(unpack(answer));
    }
    const isNew = last === 0 || found.length > 0;
    last = answer.last;
    rows = found.concat(rows).slice(0, KEPT);
    show(running, runningTable(answer.running, who));
    if (isNew) draw();
  }, (error) => {
    problem.hidden = !error;
    problem.textContent = error ? `Not current: ${error.message}` : "";
  });
  return () => polling.stop();
}

function runningTable(running, who) {
  if (!running.count) return el("p", { class: "muted" }, "None.");
  const rows = unpack(running);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Requests that run" },
    el("table", {}, head(["State", who.admin && "Key", "Model", "Route", "Since", "First byte", "Sent", "Id"]),
      el("tbody", {}, rows.map((row) => el("tr", {},
        el("td", {}, row.held ? "waits for a wake" : row.first_byte_s === null ? "waits" : "answers"),
        who.admin && el("td", {}, row.key), el("td", {}, row.model), el("td", {}, route(row)),
        number(seconds(row.seconds)), number(seconds(row.first_byte_s)), number(`${count(row.bytes_out)} B`),
        el("td", { class: "id" }, row.id))))),
    running.count > rows.length && el("p", { class: "muted" }, `And ${count(running.count - rows.length)} more.`));
}

function endedTable(rows, who) {
  return el("table", {},
    head(["Ended", "Status", who.admin && "Key", "Model", "GPU", "Route", "Held", "First byte", "Duration", "Tokens in", "cached", "out", "Cost", "Id"]),
    el("tbody", {}, rows.map((row) => el("tr", {},
      el("td", {}, clock(row.ended_at)),
      el("td", {}, el("span", { class: `status ${row.client_left ? "left" : row.status < 400 ? "ok" : "bad"}` },
        row.client_left ? "client left" : row.status), row.code && ` ${row.code}`),
      who.admin && el("td", {}, row.key), el("td", {}, row.model), el("td", {}, row.gpu), el("td", {}, route(row)),
      number(row.held_s ? seconds(row.held_s) : NONE), number(seconds(row.first_byte_s)), number(seconds(row.seconds)),
      number(count(row.tokens_in)), number(count(row.tokens_cached)), number(count(row.tokens_out)),
      number(dollars(row.dollars)), el("td", { class: "id", title: row.replica && `replica ${row.replica}` }, row.id)))));
}

const NUMBERS = new Set(["Since", "First byte", "Sent", "Held", "Duration", "Tokens in", "cached", "out", "Cost"]);
const head = (names) => el("thead", {}, el("tr", {}, names.filter(Boolean).map((name) =>
  el("th", { scope: "col", class: NUMBERS.has(name) ? "number" : null }, name))));
const number = (text) => el("td", { class: "number" }, text);
const route = (row) => `${row.path.replace("/v1/", "")}${row.stream ? ", stream" : ""}`;
