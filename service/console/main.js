// Sign-in and tabs. Each tab is a module with `open(panel, who)`, which returns what ends it.

import { get, session } from "./api.js";
import { el, field, show, toast } from "./dom.js";
import * as keys from "./keys.js";
import * as models from "./models.js";
import * as playground from "./playground.js";
import * as requests from "./requests.js";
import * as usage from "./usage.js";

const TABS = [
  { id: "models", label: "Models", tab: models },
  { id: "playground", label: "Playground", tab: playground },
  { id: "requests", label: "Requests", tab: requests },
  { id: "usage", label: "Usage", tab: usage },
  { id: "keys", label: "Keys", tab: keys, admin: true },
];
const main = document.getElementById("main");
const tabList = document.getElementById("tabs");
const needsKey = document.documentElement.dataset.key === "needed";
let close = () => {};

session.onExpired = (reason) => {
  session.key = null;
  signIn(reason);
};

function signIn(reason) {
  leave();
  playground.forget();
  const input = el("input", { type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const form = el("form", { class: "card sign-in", onsubmit: (event) => {
    event.preventDefault();
    session.key = input.value.trim();
    start();
  } },
    el("h2", {}, "Sign in"),
    reason && el("p", { class: "error", role: "alert" }, reason),
    field("API key", input, "It is kept in this browser tab until you sign out or close it."),
    el("button", { class: "primary" }, "Sign in"),
    el("p", { class: "muted" }, "An admin key shows and changes more. Make one: ",
      el("code", {}, "vllm-service keys new NAME --admin")));
  show(main, form);
  input.focus();
}

function leave() {
  close();
  close = () => {};
  window.onhashchange = null;
  show(tabList);
  show(document.getElementById("who"));
}

async function start() {
  leave();
  let who;
  try {
    who = await get("/v1/key");
  } catch (error) {
    if (error.status !== 401) signIn(`The gateway cannot be asked: ${error.message}`);
    return;
  }
  show(document.getElementById("who"),
    el("span", { class: "name", title: "The name of your key" }, who.anonymous ? "no keys" : who.name),
    who.admin && el("span", { class: "tag" }, "admin"),
    !who.anonymous && el("button", { onclick: () => { session.key = null; signIn(); } }, "Sign out"));
  const tabs = TABS.filter((one) => !one.admin || who.admin);
  show(tabList, tabs.map((one) => el("button", {
    id: `tab-${one.id}`, role: "tab", "aria-controls": "panel",
    onclick: () => { location.hash = one.id; },
    onkeydown: (event) => move(event, tabs, one),
  }, one.label)));
  window.onhashchange = () => open(tabs, who);
  open(tabs, who);
}

function move(event, tabs, from) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const ends = { Home: 0, End: tabs.length - 1 };
  if (step === undefined && !(event.key in ends)) return;
  event.preventDefault();
  const at = step === undefined ? ends[event.key] : (tabs.indexOf(from) + step + tabs.length) % tabs.length;
  location.hash = tabs[at].id;
  document.getElementById(`tab-${tabs[at].id}`).focus();
}

function open(tabs, who) {
  const chosen = tabs.find((one) => `#${one.id}` === location.hash) ?? tabs[0];
  close();
  for (const one of tabs) {
    const button = document.getElementById(`tab-${one.id}`);
    button.setAttribute("aria-selected", String(one === chosen));
    button.tabIndex = one === chosen ? 0 : -1;
  }
  const panel = el("section", { id: "panel", role: "tabpanel", "aria-labelledby": `tab-${chosen.id}`, class: chosen.id });
  show(main, panel);
  document.getElementById(`tab-${chosen.id}`).scrollIntoView({ block: "nearest", inline: "nearest" });
  document.title = `${chosen.label} · vllm-service`;
  close = chosen.tab.open(panel, who) ?? (() => {});
}

window.addEventListener("unhandledrejection", (event) => toast(event.reason?.message ?? String(event.reason), true));
if (needsKey && !session.key) signIn();
else start();
