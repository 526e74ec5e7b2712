// The tab Playground: a chat with a model. What is written here stays in this tab.

import { ApiError, events, get, send } from "./api.js";
import { append, copyButton, dialog, el, field, select, show, toast } from "./dom.js";
import { count, dollars, seconds } from "./format.js";
import { call, content, reasoning, text } from "./messages.js";
import { parameters, requestBody, reset, settings } from "./parameters.js";
import { snippets } from "./snippets.js";

let conversation = []; // messages as the API has them, until sign-out; an answer is added to the one that it belongs to
const COST_TRIES = 5, COST_PAUSE_MS = 300;

/** Forgets what was written, for the next who signs in. */
export function forget() {
  conversation = [];
  reset();
}

export function open(panel) {
  let running = null; // AbortController of the answer that streams
  let images = [];
  const log = el("div", { class: "log", role: "log", "aria-label": "Conversation", tabindex: 0 });
  const status = el("p", { class: "muted status-line", role: "status" });
  const prompt = el("textarea", { rows: 3, placeholder: "Ask something", "aria-label": "Message", onkeydown: (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  } });
  const chosen = el("ul", { class: "images" });
  const picker = el("input", { type: "file", accept: "image/*", multiple: true, class: "sr", tabindex: -1, "aria-label": "Images",
    onchange: () => addImages(picker.files) });
  const go = el("button", { class: "primary" }, "Send");
  const stop = el("button", { type: "button", class: "danger", hidden: true, onclick: () => running?.abort() }, "Stop");
  const form = el("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); ask(); } },
    prompt, chosen, el("div", { class: "actions" },
      el("button", { type: "button", onclick: () => picker.click() }, "Images"), picker,
      el("button", { type: "button", onclick: showCode }, "As code"),
      el("button", { type: "button", onclick: clear }, "Clear"), stop, go));
  const model = select([], null, { onchange: () => { settings.model = model.value; } });
  append(panel, [el("h2", { class: "sr" }, "Playground"),
    el("div", { class: "chat" }, log, status, form),
    el("aside", { class: "card", "aria-label": "Parameters" }, field("Model", model), parameters())]);
  loadModels();
  redraw();

  async function loadModels() {
    try {
      const { data } = await get("/v1/models");
      show(model, data.map((row) => el("option", { value: row.id }, `${row.id}${row.state === "ready" ? "" : ` (${row.state.replaceAll("_", " ")})`}`)));
      const ids = data.map((row) => row.id);
      model.value = settings.model = ids.includes(settings.model) ? settings.model : (ids[0] ?? null);
    } catch (error) { toast(error.message, true); }
  }

  function redraw() {
    show(log, conversation.length ? conversation.map((message) => bubble(message).node)
      : el("p", { class: "muted" }, "A request to a cold model wakes it. What you write goes to the model and is kept nowhere else."));
    log.scrollTop = log.scrollHeight;
    if (!running) showToolForm();
  }

  function clear() {
    running?.abort();
    conversation = [];
    status.textContent = "";
    redraw();
  }

  async function addImages(files) {
    for (const file of files) images.push({ name: file.name, url: await dataUrl(file) });
    picker.value = "";
    drawImages();
  }

  function drawImages() {
    show(chosen, images.map((image) => el("li", {}, el("img", { src: image.url, alt: image.name }),
      el("button", { type: "button", "aria-label": `Remove ${image.name}`, onclick: () => {
        images = images.filter((one) => one !== image);
        drawImages();
      } }, "×"))));
  }

  function ask() {
    const written = prompt.value.trim();
    if (running || (!written && !images.length)) return;
    const parts = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    if (!add({ role: "user", content: parts.length ? [...parts, { type: "text", text: written }] : written })) return;
    prompt.value = "";
    images = [];
    drawImages();
  }

  /** Adds messages and asks for the answer; adds none where a field is wrong. Returns whether they were added. */
  function add(...messages) {
    let body;
    try {
      body = requestBody([...conversation, ...messages]);
    } catch (error) {
      toast(error.message, true);
      return false;
    }
    conversation.push(...messages);
    answer(body);
    return true;
  }

  async function answer(body) {
    const asked = conversation;
    running = new AbortController();
    redraw();
    setBusy(true);
    const reply = { role: "assistant", content: "" };
    const shown = bubble(reply);
    log.append(shown.node);
    const began = performance.now();
    const found = { first: null, usage: null, id: null, reason: null };
    try {
      await stream(body, reply, shown, found, began);
    } catch (error) {
      if (error.name === "AbortError") found.reason = "stopped";
      else append(shown.node, [el("p", { class: "error", role: "alert" }, error.message)]);
    }
    running = null;
    setBusy(false);
    shown.done();
    if (asked !== conversation) { // it was cleared
      status.textContent = "";
      return;
    }
    if (reply.content || reply.reasoning || reply.tool_calls) conversation.push(reply);
    showStatistics(found, began, performance.now());
    showToolForm();
    prompt.focus({ preventScroll: true });
  }

  async function stream(body, reply, shown, found, began) {
    const response = await send("/v1/chat/completions", { method: "POST", body, signal: running.signal });
    found.id = response.headers.get("x-request-id");
    for await (const event of events(response)) {
      if (event.comment !== undefined) { status.textContent = event.comment; continue; }
      if (event.error) throw new ApiError(event.error.status ?? 500, event.error, found.id);
      found.usage = event.usage ?? found.usage;
      const choice = event.choices?.find((one) => one.index === 0); // of several answers the first
      found.reason = choice?.finish_reason ?? found.reason;
      if (!choice?.delta || !merge(reply, choice.delta)) continue;
      if (found.first === null) {
        found.first = performance.now() - began;
        status.textContent = "";
      }
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      shown.update();
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  }

  async function showStatistics(found, began, ended) {
    const tokens = found.usage?.completion_tokens;
    const after = (ended - began - (found.first ?? 0)) / 1000;
    const parts = [found.reason, found.first !== null && `first token after ${seconds(found.first / 1000)}`, `${seconds((ended - began) / 1000)} in all`,
      tokens && `${count(found.usage.prompt_tokens)} tokens in, ${count(tokens)} out`,
      tokens > 1 && `${rate(tokens, after, (ended - began) / 1000)} tokens/s`];
    const line = (more) => { status.textContent = [...parts, more].filter(Boolean).join(" · "); };
    line();
    const row = found.id && (await recorded(found.id));
    if (!row || running) return;
    if (!tokens && row.tokens_out) parts.push(`${count(row.tokens_in)} tokens in, ${count(row.tokens_out)} out`);
    line(row.dollars === null ? "no price on this machine" : `cost ${dollars(row.dollars)}`);
  }

  function setBusy(isBusy) {
    stop.hidden = !isBusy;
    go.disabled = isBusy;
    log.setAttribute("aria-busy", String(isBusy));
    if (isBusy) status.textContent = "Waiting for the first token";
  }

  /** Asks for the results of the tools that the model called last. */
  function showToolForm() {
    log.querySelector(".tool-form")?.remove();
    const calls = conversation.at(-1)?.tool_calls;
    if (!calls) return;
    const inputs = calls.map((one) => el("textarea", { rows: 2, placeholder: "{}" }));
    log.append(el("form", { class: "tool-form", onsubmit: (event) => {
      event.preventDefault();
      add(...calls.map((one, index) => ({ role: "tool", tool_call_id: one.id, content: inputs[index].value })));
    } }, calls.map((one, index) => field(`Result of ${one.function.name}`, inputs[index])), el("button", { class: "primary" }, "Send results")));
    log.scrollTop = log.scrollHeight;
  }

  function showCode() {
    let body;
    try {
      body = requestBody(shownAsCode(prompt.value.trim()));
    } catch (error) {
      toast(error.message, true);
      return;
    }
    const code = el("pre", { tabindex: 0 });
    const found = snippets(location.origin, body);
    let current = "curl";
    const choose = (name) => {
      current = name;
      code.textContent = found[name];
      for (const button of names.children) button.setAttribute("aria-pressed", String(button.textContent === name));
    };
    const names = el("div", { class: "actions", role: "group", "aria-label": "Language" },
      Object.keys(found).map((name) => el("button", { type: "button", onclick: () => choose(name) }, name)));
    choose(current);
    const one = dialog("The request as code", names, code, el("div", { class: "actions" },
      copyButton(() => found[current]), el("button", { class: "primary", onclick: () => one.close() }, "Close")));
    one.classList.add("wide");
  }

  return () => running?.abort();
}

/** Returns the messages with one that is not sent yet, or without it those of the request that was answered. */
function shownAsCode(unsent) {
  if (unsent) return [...conversation, { role: "user", content: unsent }];
  return conversation.slice(0, conversation.findLastIndex((message) => message.role !== "assistant") + 1);
}

/** Adds what a stream's event says to a message; returns whether it says anything. */
function merge(reply, delta) {
  const thought = delta.reasoning ?? delta.reasoning_content;
  if (thought) reply.reasoning = (reply.reasoning ?? "") + thought;
  if (delta.content) reply.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    const calls = (reply.tool_calls ??= []);
    const one = (calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } });
    one.id = part.id ?? one.id;
    one.function.name += part.function?.name ?? "";
    one.function.arguments += part.function?.arguments ?? "";
  }
  return Boolean(thought || delta.content || delta.tool_calls?.length);
}

/** Returns the element of a message, and what brings it up to date. */
function bubble(message) {
  const body = el("div", { class: "body" });
  const thoughts = reasoning();
  const calls = el("div", {});
  const isAnswer = message.role === "assistant";
  const node = el("article", { class: `message ${message.role}` }, el("h3", {}, message.role), isAnswer && thoughts.node, body, calls);
  const writer = text(body);
  const update = () => {
    thoughts.update(message.reasoning ?? "", !message.content);
    if (typeof message.content === "string") writer(message.content);
    show(calls, (message.tool_calls ?? []).map(call));
  };
  update();
  if (Array.isArray(message.content)) show(body, content(message.content));
  return { node, update, done: () => { thoughts.update(message.reasoning ?? "", false); } };
}

/** Returns tokens a second after the first one; of an answer that came at once, of its whole time. */
const rate = (tokens, after, all) => (after > 0.1 ? (tokens - 1) / after : tokens / all).toFixed(1);

async function recorded(id) {
  for (let tries = 0; tries < COST_TRIES; tries++) {
    try {
      const answer = await get(`/v1/requests?id=${encodeURIComponent(id)}`);
      if (answer.data.length) return Object.fromEntries(answer.columns.map((name, index) => [name, answer.data[0][index]]));
    } catch { return null; }
    await new Promise((next) => setTimeout(next, COST_PAUSE_MS));
  }
  return null;
}

const dataUrl = (file) => new Promise((found, failed) => {
  const reader = new FileReader();
  reader.onload = () => found(reader.result);
  reader.onerror = () => failed(reader.error);
  reader.readAsDataURL(file);
});
