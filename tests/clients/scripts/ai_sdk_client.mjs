// The AI SDK of Vercel with its provider for servers that are compatible with OpenAI's.
import { readFileSync, writeFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";

console.error("ready");
const asked = JSON.parse(readFileSync(0, "utf8"));
const { messages } = asked;
const common = (apiKey = asked.key) => {
  const baseURL = `${asked.url}/v1`;
  const provider = createOpenAICompatible({
    name: "vllm", baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: true,
  });
  return { model: provider(asked.model), maxRetries: 0 };
};

const cases = {
  async chat() {
    const { text, usage } = await generateText({ ...common(), messages });
    return { text: text.trim(), tokens: usage.outputTokens };
  },
  async stream() {
    const result = streamText({ ...common(), messages });
    const pieces = [];
    for await (const piece of result.textStream) pieces.push(piece);
    return { text: pieces.join("").trim(), in_pieces: pieces.length > 1 };
  },
  async schema() {
    const output = Output.object({ schema: jsonSchema(asked.schema) });
    return (await generateText({ ...common(), messages: asked.messages_for_schema, output })).output;
  },
  async tool_is_run() {
    const [{ function: described }] = asked.tools;
    const get_weather = tool({
      description: described.description,
      inputSchema: jsonSchema(described.parameters),
      execute: async ({ city }) => {
        writeFileSync("city.txt", city);
        return { temperature_c: 18, sky: "clear" };
      },
    });
    const tools = { [described.name]: get_weather };
    const asking = { ...common(), messages: asked.messages_for_tools, tools, stopWhen: stepCountIs(3) };
    return (await generateText(asking)).text.trim();
  },
  async wrong_key() {
    return generateText({ ...common("sk-wrong"), messages });
  },
};

const outcomes = {};
for (const name of Object.keys(cases)) {
  try {
    outcomes[name] = { value: await cases[name]() };
  } catch (error) {
    outcomes[name] = { raised: error.constructor.name, status: error.statusCode ?? null, message: error.message };
  }
}
console.log(JSON.stringify(outcomes));
