// A request as curl, Python and JavaScript. The key is a variable of the environment: it is never shown.

// What OpenAI's Python client takes by name; it wants all else in `extra_body`.
const OPENAI = new Set([
  "model", "messages", "stream", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "tools", "tool_choice",
  "parallel_tool_calls", "response_format", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "n",
  "stop", "user", "reasoning_effort", "metadata",
]);

/** Returns language -> program for a request to `/v1/chat/completions`. */
export function snippets(origin, body) {
  const { stream_options: _, ...shown } = body;
  const json = JSON.stringify(shown, null, 2);
  const known = Object.entries(shown).filter(([name]) => OPENAI.has(name));
  const further = Object.entries(shown).filter(([name]) => !OPENAI.has(name));
  const fields = further.length ? [...known, ["extra_body", Object.fromEntries(further)]] : known;
  const python = fields.map(([name, value]) => `    ${name}=${literal(value, 4)},`).join("\n");
  return {
    curl: `curl -N '${origin}/v1/chat/completions' \\\n  -H "Authorization: Bearer $API_KEY" \\\n  -H 'Content-Type: application/json' \\\n  -d '${json.replaceAll("'", `'\\''`)}'\n`,
    Python: `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${origin}/v1", api_key=os.environ["API_KEY"])\nstream = client.chat.completions.create(\n${python}\n)\nfor chunk in stream:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or "", end="", flush=True)\n`,
    JavaScript: `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${origin}/v1", apiKey: process.env.API_KEY });\nconst stream = await client.chat.completions.create(${json});\nfor await (const chunk of stream) {\n  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");\n}\n`,
  };
}

/** Returns a value as Python writes it. */
export function literal(value, indent = 0) {
  const inner = " ".repeat(indent + 4), outer = " ".repeat(indent);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return value.length ? `[\n${value.map((one) => `${inner}${literal(one, indent + 4)},`).join("\n")}\n${outer}]` : "[]";
  if (typeof value === "object") {
    const entries = Object.entries(value);
    return entries.length ? `{\n${entries.map(([name, one]) => `${inner}${JSON.stringify(name)}: ${literal(one, indent + 4)},`).join("\n")}\n${outer}}` : "{}";
  }
  return JSON.stringify(value);
}
