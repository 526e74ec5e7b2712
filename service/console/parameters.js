// What a request of the playground has beside its messages: the form, and the body that is made of both.

import { el, field } from "./dom.js";

const DEFAULTS = { model: null, system: "", temperature: "", top_p: "", max_tokens: "", seed: "", tools: "", schema: "", more: "" };
export const settings = { ...DEFAULTS };

/** Forgets what was written. */
export const reset = () => { Object.assign(settings, DEFAULTS); };

/** Returns the body of a request with these messages; throws an Error that names the field that is wrong. */
export function requestBody(messages) {
  const all = settings.system ? [{ role: "system", content: settings.system }, ...messages] : messages;
  const body = { model: settings.model, messages: all.map(withoutReasoning), stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (settings[name] !== "") body[name] = Number(settings[name]);
  if (settings.tools.trim()) body.tools = parse("Tools", settings.tools);
  if (settings.schema.trim()) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: parse("JSON schema", settings.schema) } };
  }
  return settings.more.trim() ? { ...body, ...parse("Further fields", settings.more) } : body;
}

function parse(label, written) {
  try {
    return JSON.parse(written);
  } catch (error) {
    throw new Error(`${label}: this is not JSON: ${error.message}`);
  }
}

const withoutReasoning = ({ reasoning: _, ...message }) => message;

/** Returns the form's fields. */
export function parameters() {
  const input = (name, attributes) => el("input", { type: "number", value: settings[name], placeholder: "default", oninput: (event) => { settings[name] = event.target.value; }, ...attributes });
  const area = (name, placeholder, rows = 4) => el("textarea", { rows, value: settings[name], placeholder, spellcheck: "false", oninput: (event) => { settings[name] = event.target.value; } });
  return [
    field("System prompt", area("system", "none", 2)),
    el("div", { class: "grid" },
      field("Temperature", input("temperature", { min: 0, max: 2, step: 0.1 })), field("Top p", input("top_p", { min: 0, max: 1, step: 0.05 })),
      field("Most tokens", input("max_tokens", { min: 1, step: 1 })), field("Seed", input("seed", { step: 1 }))),
    el("details", { open: Boolean(settings.tools) }, el("summary", {}, "Tools"), field("Tools", area("tools", '[{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]', 6), "A JSON list, as OpenAI has it")),
    el("details", { open: Boolean(settings.schema) }, el("summary", {}, "JSON schema"), field("Schema of the answer", area("schema", '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}', 6))),
    el("details", { open: Boolean(settings.more) }, el("summary", {}, "Further fields"), field("Fields of the body", area("more", '{"presence_penalty": 0.5}', 3), "A JSON object, such as vLLM's own parameters")),
  ];
}
