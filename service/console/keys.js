// The tab Keys, for admins: list, make, limit, rotate and revoke the keys of API clients.

import { get, post } from "./api.js";
import { append, confirm, copyButton, dialog, el, field, select, show, toast } from "./dom.js";
import { count } from "./format.js";

const PAGE = 100;
const LIMITS = [
  ["requests_per_minute", "Requests a minute", "number"],
  ["tokens_per_minute", "Tokens a minute", "number"],
  ["tokens_per_day", "Tokens a day", "number"],
  ["dollars_per_month", "Dollars a month", "number"],
  ["concurrency", "Requests at once", "number"],
  ["models", "Models", "text", "qwen3-8b, tiny"],
  ["expires", "Ends", "text", "2027-01-31"],
];

export function open(panel, who) {
  if (who.anonymous) {
    append(panel, [el("div", { class: "card" }, el("h2", {}, "Keys"),
      el("p", {}, "The service has no keys, so everybody who can connect may use it. Make the first one in a terminal: "),
      el("pre", {}, "vllm-service keys new admin --admin"))]);
    return undefined;
  }
  let keys = [], more = false;
  const ending = new AbortController();
  const text = el("input", { type: "search", placeholder: "name", oninput: draw });
  const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Keys" });
  const pages = el("div", { class: "pages" });
  append(panel, [
    el("h2", { class: "sr" }, "Keys"),
    el("div", { class: "tools" }, field("Filter", text), el("button", { class: "primary", onclick: make }, "New key")),
    table, pages,
  ]);

  async function load(next = false) {
    try {
      const after = next === true ? `&after=${encodeURIComponent(keys.at(-1).name)}` : "";
      const answer = await get(`/admin/keys?limit=${PAGE}${after}`, ending.signal);
      keys = next === true ? keys.concat(answer.keys) : answer.keys;
      more = answer.more;
      draw();
    } catch (error) {
      if (!ending.signal.aborted) show(table, el("p", { class: "error", role: "alert" }, error.message));
    }
  }

  function draw() {
    const wanted = text.value.trim().toLowerCase();
    const found = keys.filter((key) => key.name.toLowerCase().includes(wanted));
    show(table, el("table", {},
      el("thead", {}, el("tr", {}, ["Name", "State", "Keys", "Limits", ""].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, found.map((key) => el("tr", {},
        el("th", { scope: "row" }, key.name),
        el("td", {}, el("span", { class: `status ${key.state === "valid" ? "ok" : key.state === "environment" ? "" : "bad"}` }, key.state)),
        el("td", {}, key.keys.map((one) => el("div", {}, `since ${one.created}`, one.ends && `, until ${one.ends}`))),
        el("td", {}, limitsText(key.limits)),
        el("td", {}, key.state === "environment" || key.state === "revoked" ? null : el("div", { class: "actions" },
          el("button", { "aria-label": `Limits of ${key.name}`, onclick: () => limit(key) }, "Limits"),
          el("button", { "aria-label": `Rotate ${key.name}`, onclick: () => rotate(key) }, "Rotate"),
          el("button", { "aria-label": `Revoke ${key.name}`, class: "danger", onclick: () => revoke(key) }, "Revoke"))))))));
    show(pages, more && el("button", { onclick: () => load(true) }, "More keys"));
  }

  async function change(what, body, done) {
    const answer = await post(`/admin/keys${what}`, body);
    toast(done);
    load();
    return answer;
  }

  function make() {
    const name = el("input", { required: true, pattern: "[A-Za-z0-9][A-Za-z0-9._@\\-]{0,63}", autocomplete: "off" });
    const admin = el("input", { type: "checkbox" });
    form("New key", "Make key", [field("Name", name, "1 to 64 letters, digits, dots, dashes, underscores and @"), field("Admin", admin)], {},
      async (limits) => {
        const answer = await change("", { name: name.value, ...limits, ...(admin.checked ? { admin: true } : {}) }, `The key ${name.value} is made.`);
        reveal(answer);
      });
  }

  function limit(key) {
    const admin = el("input", { type: "checkbox" });
    admin.checked = Boolean(key.limits.admin);
    form(`Limits of ${key.name}`, "Save", [field("Admin", admin)], key.limits, async (limits) => {
      const lifted = Object.fromEntries(LIMITS.map(([name]) => [name, null]));
      await change("/limit", { name: key.name, ...lifted, ...limits, admin: admin.checked }, `The limits of ${key.name} are changed.`);
    });
  }

  function rotate(key) {
    const grace = select([["0", "at once"], ["3600", "after an hour"], ["86400", "after a day"], ["604800", "after a week"]], "86400");
    const one = dialog(`Rotate ${key.name}`, el("form", { method: "dialog", onsubmit: async (event) => {
      event.preventDefault();
      try {
        const answer = await change("/rotate", { name: key.name, grace_s: Number(grace.value) }, `${key.name} has another key.`);
        one.close();
        reveal(answer);
      } catch (error) { toast(error.message, true); }
    } }, field("The old key ends", grace), buttons(() => one.close(), "Rotate")));
  }

  async function revoke(key) {
    if (!(await confirm(`Revoke ${key.name}?`, "All its keys end at once. Requests that run are finished.", "Revoke"))) return;
    try { await change("/revoke", { name: key.name }, `${key.name} is revoked.`); } catch (error) { toast(error.message, true); }
  }

  load();
  return () => ending.abort();
}

const buttons = (cancel, yes) => el("div", { class: "actions" },
  el("button", { type: "button", onclick: cancel }, "Cancel"), el("button", { class: "primary" }, yes));

/** Shows fields for limits and calls `save` with those that are filled in. */
function form(title, yes, first, limits, save) {
  const inputs = LIMITS.map(([name, label, type, placeholder = "no limit"]) => {
    const value = Array.isArray(limits[name]) ? limits[name].join(", ") : (limits[name] ?? "");
    const attributes = type === "number" ? { type, min: 0, step: name === "dollars_per_month" ? "any" : 1 } : { type };
    return [name, label, el("input", { ...attributes, value, placeholder })];
  });
  const problem = el("p", { class: "error", role: "alert" });
  const one = dialog(title, el("form", { method: "dialog", onsubmit: async (event) => {
    event.preventDefault();
    try {
      await save(filled(inputs));
      one.close();
    } catch (error) { problem.textContent = error.message; }
  } }, first, el("details", { open: Object.keys(limits).length > 0 }, el("summary", {}, "Limits"),
    el("div", { class: "grid" }, inputs.map(([, label, input]) => field(label, input)))),
  problem, buttons(() => one.close(), yes)));
}

function filled(inputs) {
  const found = {};
  for (const [name, , input] of inputs) {
    const value = input.value.trim();
    if (!value) continue;
    if (name === "models") found[name] = value.split(",").map((one) => one.trim()).filter(Boolean);
    else found[name] = input.type === "number" ? Number(value) : value;
  }
  return found;
}

/** Shows a key once: nobody can read it again. */
function reveal({ name, key }) {
  const one = dialog(`The key of ${name}`, el("p", {}, "It is shown once, here."),
    el("pre", { class: "secret", tabindex: 0 }, key),
    el("div", { class: "actions" }, copyButton(key), el("button", { class: "primary", onclick: () => one.close() }, "Done")));
}

function limitsText(limits) {
  const known = LIMITS.filter(([name]) => limits[name] !== undefined).map(([name, label]) =>
    `${label}: ${Array.isArray(limits[name]) ? limits[name].join(", ") : typeof limits[name] === "number" ? count(limits[name]) : limits[name]}`);
  return [limits.admin && "admin", ...known].filter(Boolean).join("; ") || "none";
}
