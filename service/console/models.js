// The tab Models: what each model does now, its last boots, and for admins wake and stop. Looking wakes nothing.

import { get, post } from "./api.js";
import { colour, legend, sparkline, timeline } from "./charts.js";
import { append, confirm, el, show, toast } from "./dom.js";
import { NONE, count, day, dollars, percent, seconds, short } from "./format.js";
import { poll } from "./poll.js";

const KEPT = 60; // points of a line: two minutes
const STATES = {
  ready: "ready", waking: "waking", cold: "cold", failed: "failed",
  not_deployed: "not deployed", does_not_fit: "does not fit",
};

export function open(panel, who) {
  const cards = new Map();
  const problem = el("p", { class: "error", role: "alert", hidden: true });
  const summary = el("p", { class: "summary", "aria-live": "polite" });
  const list = el("div", { class: "cards" });
  append(panel, [el("h2", { class: "sr" }, "Models"), summary, problem, list]);

  const polling = poll(async (signal) => {
    const rows = who.admin ? (await get("/admin/pools", signal)).data : await listed(signal);
    for (const row of rows) {
      const name = `${row.id} ${row.gpu}`;
      if (!cards.has(name)) cards.set(name, card(row, who, () => polling.now()));
      cards.get(name).update(row);
    }
    const names = new Set(rows.map((row) => `${row.id} ${row.gpu}`));
    for (const name of cards.keys()) if (!names.has(name)) cards.delete(name);
    const order = [...cards.values()].map((one) => one.node);
    if (order.some((node, index) => list.children[index] !== node) || list.children.length !== order.length) {
      list.replaceChildren(...order);
    }
    const up = rows.filter((row) => row.state === "ready" || row.state === "waking");
    const price = up.reduce((sum, row) => sum + (row.dollars_per_hour ?? 0), 0);
    show(summary, `${rows.length} models, ${up.length} up`, price > 0 && `, from ${dollars(price)} an hour`);
  }, (error) => {
    problem.hidden = !error;
    problem.textContent = error ? `Not current: ${error.message}` : "";
  });
  return () => polling.stop();
}

/** Returns what a key that is no admin's sees: each model once, under its own name. */
async function listed(signal) {
  const { data } = await get("/v1/models", signal);
  return data.filter((row) => row.id === row.display_name);
}

function card(first, who, refresh) {
  const state = el("span", { class: "state" });
  const facts = el("dl", { class: "facts" });
  const wake = el("div", { class: "wake", hidden: true });
  const reason = el("p", { class: "reason", hidden: true });
  const figures = el("dl", { class: "figures", hidden: true });
  const buttons = {
    wake: el("button", { onclick: () => act("wake") }, "Wake"),
    stop: el("button", { onclick: () => act("stop") }, "Stop"),
  };
  const boots = el("div", { class: "boots" });
  const details = el("details", { ontoggle: () => details.open && loadBoots() },
    el("summary", {}, "Last boots"), boots);
  const node = el("article", { class: "card model", "aria-label": first.id },
    el("header", {}, el("h3", { title: first.root }, first.id), state,
      who.admin && el("div", { class: "actions" }, buttons.wake, buttons.stop), facts),
    reason, wake, figures, who.admin && details);
  const cache = [], speed = [];
  let before = null, shown = null;

  async function act(what) {
    if (what === "stop" && !(await confirm(`Stop ${first.id}?`,
      "Requests that run may finish within its grace period. The next request wakes it again.", "Stop"))) return;
    try {
      await post(`/admin/pools/${what}`, { model: first.name });
      toast(what === "wake" ? `${first.id} is waking.` : `${first.id} is stopping.`);
    } catch (error) {
      toast(error.message, true);
    }
    refresh();
  }

  async function loadBoots() {
    try {
      showBoots(boots, (await get(`/admin/boots?model=${encodeURIComponent(first.name)}`)).data);
    } catch (error) {
      show(boots, el("p", { class: "error" }, error.message));
    }
  }

  function update(row) {
    show(state, el("i", { class: `dot ${row.state}`, "aria-hidden": "true" }), STATES[row.state] ?? row.state);
    show(facts, fact("GPU", row.gpu), fact("Context", row.max_model_len ? `${count(row.max_model_len)} tokens` : NONE),
      fact("Price", row.dollars_per_hour === null ? "none here" : `${dollars(row.dollars_per_hour)}/h`),
      row.root !== row.id && fact("Weights", row.root));
    reason.hidden = !row.reason;
    reason.textContent = row.reason ?? "";
    wake.hidden = row.state !== "waking";
    if (!wake.hidden) showWake(wake, row);
    if (!who.admin) return;
    buttons.wake.disabled = !["cold", "failed"].includes(row.state);
    buttons.stop.disabled = row.state !== "ready";
    figures.hidden = row.state !== "ready" && !row.in_use;
    if (!figures.hidden) showFigures(row);
    if (shown === "waking" && row.state !== "waking" && details.open) loadBoots();
    shown = row.state;
  }

  function showFigures(row) {
    const engine = row.engine;
    if (engine) {
      const at = performance.now() / 1000;
      if (before) speed.push(Math.max(0, engine.generation_tokens - before.tokens) / (at - before.at));
      before = { at, tokens: engine.generation_tokens };
      cache.push(engine.kv_cache_usage_perc ?? 0);
      for (const line of [cache, speed]) line.splice(0, Math.max(0, line.length - KEPT));
    }
    const most = Math.max(1, ...speed);
    show(figures,
      fact("Running", count(engine?.num_requests_running ?? row.answering)),
      fact("Waiting", count(engine?.num_requests_waiting ?? row.in_use - row.answering)),
      engine && fact("KV cache", percent(engine.kv_cache_usage_perc), sparkline(cache, "KV-cache use, two minutes")),
      engine && fact("Tokens/s", short(speed.at(-1) ?? 0), sparkline(speed.map((one) => one / most), "Tokens a second")),
      engine && fact("Preemptions", count(engine.num_preemptions)),
      !engine && fact("Engine", "asked while it answers"));
  }

  return { node, update };
}

const fact = (name, value, ...more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more));

/** Shows how far a wake is: elapsed time against the usual one, and where they are known its phases. */
function showWake(wake, row) {
  const usual = row.usual_s, phases = row.phases ?? [];
  const length = Math.max(row.waking_s * 1.1, (usual ?? 0) * 1.1, 5);
  const left = usual ? `, usually ${seconds(usual)}` : ", no boot is recorded yet";
  const text = `Waking for ${seconds(row.waking_s)}${left}`;
  show(wake, el("p", {}, text),
    timeline(phases, length, { marker: usual, now: row.waking_s, label: text }),
    phases.length > 0 && legend([...new Set(phases.map(([name]) => name))]));
}

function showBoots(boots, records) {
  if (!records.length) return show(boots, el("p", { class: "muted" }, "No boot is recorded."));
  const length = Math.max(...records.map((record) => record.seconds), 1);
  const names = [...new Set(records.flatMap((record) => record.phases.map((phase) => phase.name)))]
    .sort((one, other) => colour(one).localeCompare(colour(other), "en", { numeric: true }));
  show(boots, legend(names), el("ol", {}, records.map((record) => el("li", {},
    el("time", { datetime: record.at }, day(Date.parse(record.at) / 1000)),
    el("span", { class: "kind" }, `${record.gpu}, ${record.restored ? "restored" : record.strategy === "off" ? "no snapshot" : `${record.strategy}, first boot`}`),
    timeline(record.phases.map(({ name, start, end }) => [name, start, end]), length, { label:
      `${record.outcome} after ${seconds(record.seconds)}: ${record.phases.map(({ name, start, end }) => `${name} ${seconds(end - start)}`).join(", ")}` }),
    el("span", { class: "number" }, seconds(record.seconds)),
    record.outcome !== "ready" && el("p", { class: "reason" }, `${record.outcome}: ${record.reason ?? "no reason is recorded"}`)))));
}
