// OpenAI's client for JavaScript; the cases and what they print are those of openai_client.py.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

console.error("ready");
const asked = JSON.parse(readFileSync(0, "utf8"));
const options = { baseURL: `${asked.url}/v1`, maxRetries: 0, timeout: 120_000 };
const client = new OpenAI({ ...options, apiKey: asked.key });
const { model, messages, prompt } = asked;

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const cases = {
  async chat() {
    const answer = await client.chat.completions.create({ model, messages });
    const [choice] = answer.choices;
    return { text: choice.message.content.trim(), ended: choice.finish_reason, tokens: answer.usage.completion_tokens };
  },
  async stream() {
    const stream_options = { include_usage: true };
    const chunks = await all(await client.chat.completions.create({ model, messages, stream: true, stream_options }));
    const choices = chunks.flatMap((chunk) => chunk.choices);
    const pieces = choices.map((choice) => choice.delta.content ?? "").filter(Boolean);
    return {
      text: pieces.join("").trim(),
      ended: choices.at(-1).finish_reason,
      tokens: chunks.at(-1).usage.completion_tokens,
      in_pieces: pieces.length > 1,
    };
  },
  async completion() {
    return (await client.completions.create({ model, prompt, max_tokens: 100 })).choices[0].text;
  },
  async completion_stream() {
    const chunks = await all(await client.completions.create({ model, prompt, max_tokens: 100, stream: true }));
    return chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.text ?? "")).join("");
  },
  async schema() {
    const json_schema = { name: "person", schema: asked.schema };
    const response_format = { type: "json_schema", json_schema };
    const answer = await client.chat.completions.create({ model, messages: asked.messages_for_schema, response_format });
    return JSON.parse(answer.choices[0].message.content);
  },
  async choice() {
    const structured_outputs = { choice: asked.choices }; // a field that is not OpenAI's goes where the others are
    const body = { model, messages: asked.messages_for_choice, structured_outputs };
    return (await client.chat.completions.create(body)).choices[0].message.content;
  },
  async tools() {
    const body = { model, messages: asked.messages_for_tools, tools: asked.tools, tool_choice: "auto" };
    const [call] = (await client.chat.completions.create(body)).choices[0].message.tool_calls;
    return { name: call.function.name, arguments: JSON.parse(call.function.arguments) };
  },
  async models() {
    const ids = (await all(await client.models.list())).map((one) => one.id);
    return Promise.all(ids.map(async (id) => (await client.models.retrieve(id)).id));
  },
  async wrong_key() {
    return new OpenAI({ ...options, apiKey: "sk-wrong" }).chat.completions.create({ model, messages });
  },
  async unknown_model() {
    return client.chat.completions.create({ model: asked.unknown, messages });
  },
  async broken_model() {
    const patient = client.withOptions({ maxRetries: 2 });
    return patient.chat.completions.create({ model: asked.broken, messages });
  },
  async too_long() {
    try {
      return await client.chat.completions.create({ model, messages: asked.messages_too_long });
    } catch (error) {
      return { code: error.code, type: error.type, param: error.param };
    }
  },
  async batch() {
    const endpoint = "/v1/chat/completions";
    const line = (custom_id) => JSON.stringify({ custom_id, method: "POST", url: endpoint, body: { model, messages } });
    const content = [...["a", "b", "c"].map(line), "nonsense"].join("\n");
    const file = await client.files.create({ file: new File([content], "in.jsonl"), purpose: "batch" });
    const create = { input_file_id: file.id, endpoint, completion_window: "24h", metadata: { k: "v" } };
    const made = await client.batches.create(create);
    const listed = (await all(await client.batches.list({ limit: 1 }))).some((one) => one.id === made.id);
    let done = made;
    while (done.status !== "completed") {
      await new Promise((resolve) => setTimeout(resolve, 100));
      done = await client.batches.retrieve(made.id);
    }
    const records = async (id) => (await (await client.files.content(id)).text()).trim().split("\n").map(JSON.parse);
    const answers = await records(done.output_file_id);
    const [{ error }] = await records(done.error_file_id);
    const deleted = [];
    for (const id of [file.id, done.output_file_id, done.error_file_id]) deleted.push((await client.files.delete(id)).deleted);
    const counts = done.request_counts;
    return {
      listed,
      counts: [counts.total, counts.completed, counts.failed],
      ids: answers.map((one) => one.custom_id).sort(),
      texts: answers.map((one) => one.response.body.choices[0].message.content.trim()),
      error: [error.line, error.code],
      metadata: done.metadata,
      deleted: deleted.every(Boolean),
    };
  },
};

const outcomes = {};
for (const name of asked.cases ?? Object.keys(cases)) {
  try {
    outcomes[name] = { value: await cases[name]() };
  } catch (error) {
    outcomes[name] = { raised: error.constructor.name, status: error.status ?? null, message: error.message };
  }
}
console.log(JSON.stringify(outcomes));
