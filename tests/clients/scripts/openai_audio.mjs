// OpenAI's client for JavaScript with recordings; the cases and what they print are those of openai_audio.py.
import { createReadStream, readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

console.error("ready");
const asked = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: `${asked.url}/v1`, apiKey: asked.key, maxRetries: 0, timeout: 120_000 });
const { model } = asked;
const speech = () => createReadStream("speech.wav");

const cases = {
  async transcription() {
    const answer = await client.audio.transcriptions.create({ model, file: speech(), language: "en" });
    return { is_text: typeof answer.text === "string", usage: answer.usage ?? null };
  },
  async verbose() {
    const answer = await client.audio.transcriptions.create({
      model,
      file: speech(),
      language: "en",
      response_format: "verbose_json",
      timestamp_granularities: ["segment"],
      max_completion_tokens: 4,
    });
    return { duration: Number(answer.duration), language: answer.language };
  },
  async stream() {
    const chunks = [];
    const stream = await client.audio.transcriptions.create({ model, file: speech(), language: "en", stream: true });
    for await (const chunk of stream) chunks.push(chunk);
    return chunks.length > 0;
  },
  async translation() {
    return typeof (await client.audio.translations.create({ model, file: speech() })).text === "string";
  },
  async no_recording() {
    return client.audio.transcriptions.create({ model, file: await toFile(Buffer.from("no recording"), "a.wav") });
  },
  async unknown_model() {
    return client.audio.transcriptions.create({ model: asked.unknown, file: speech() });
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
