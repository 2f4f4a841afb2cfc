// OpenAI's and Anthropic's official clients for Node, unchanged, before a gateway. Prints what each saw, as one JSON document.
//
//     node clients.mjs GATEWAY MODEL CUT
//
// CUT is a gateway whose upstream ends every stream after its first token.

import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [url, model, cut] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-node-0123456789", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "sk-ant-node-0123456789", maxRetries: 0 });
const messages = [{ role: "user", content: "Say something about the sea." }];
const city = { type: "object", properties: { city: { enum: ["Oslo"] } }, required: ["city"], additionalProperties: false };
const weather = { type: "function", function: { name: "get_weather", parameters: city, strict: true } };
const seen = {};

// What each case saw, with the generation that the gateway's header names.
async function saw(name, headers, what) {
  seen[name] = { generation: headers.get("x-tokentape-generation"), ...what };
}

async function raises(name, ask) {
  try {
    await ask();
    seen[name] = { raised: null };
  } catch (error) {
    seen[name] = { raised: error.constructor.name, status: error.status, message: error.message };
  }
}

async function chat(name, options) {
  const { data, response } = await openai.chat.completions.create({ model, messages, max_tokens: 8, ...options }).withResponse();
  const choices = data.choices.map(({ message, finish_reason }) => ({
    text: message.content,
    calls: (message.tool_calls ?? []).map((call) => [call.id, call.function.name, call.function.arguments]),
    finish: finish_reason,
  }));
  await saw(name, response.headers, { choices, input: data.usage.prompt_tokens, output: data.usage.completion_tokens });
}

async function chatStreamed() {
  const asked = { model, messages, max_tokens: 8, n: 3, stream: true, stream_options: { include_usage: true } };
  const { data, response } = await openai.chat.completions.create(asked).withResponse();
  const choices = [0, 1, 2].map(() => ({ text: "", calls: [], finish: null }));
  let usage;
  for await (const chunk of data) {
    usage = chunk.usage ?? usage;
    for (const { index, delta, finish_reason } of chunk.choices) {
      choices[index].text += delta.content ?? "";
      choices[index].finish ??= finish_reason;
    }
  }
  await saw("chat_streamed", response.headers, { choices, input: usage.prompt_tokens, output: usage.completion_tokens });
}

async function respond(name, stream) {
  const asked = { model, input: "The sea?", max_output_tokens: 20 };
  const { data, response } = await openai.responses.create({ ...asked, stream }).withResponse();
  let final = data;
  if (stream) for await (const event of data) final = event.response ?? final;
  const text = final.output.flatMap((item) => item.content ?? []).map((part) => part.text).join("");
  const choices = [{ text, calls: [], finish: "length" }];
  await saw(name, response.headers, { choices, status: final.status, input: final.usage.input_tokens, output: final.usage.output_tokens });
}

async function message(name, options) {
  const { data, response } = await anthropic.messages.create({ model, messages, max_tokens: 8, ...options }).withResponse();
  await saw(name, response.headers, answered(data));
}

async function messageStreamed(name, options) {
  const stream = anthropic.messages.stream({ model, messages, max_tokens: 8, ...options });
  let text = "";
  stream.on("text", (piece) => (text += piece));
  const { response } = await stream.withResponse();
  const final = await stream.finalMessage();
  await saw(name, response.headers, { pieces: text, ...answered(final) });
}

function answered({ content, stop_reason, usage }) {
  const text = content.map((block) => block.text ?? "").join("");
  const calls = content.filter((block) => block.type === "tool_use").map((block) => [block.id, block.name, JSON.stringify(block.input)]);
  const finish = { max_tokens: "length", end_turn: "stop", tool_use: "tool_calls" }[stop_reason];
  const input = usage.input_tokens + (usage.cache_read_input_tokens ?? 0);
  return { choices: [{ text, calls, finish }], input, output: usage.output_tokens };
}

// What came before the error that ends a stream, and that error.
async function ends(name, open, textOf) {
  let text = "";
  await raises(name, async () => {
    for await (const event of await open()) text += textOf(event) ?? "";
  });
  seen[name].text = text;
}

const schema = { type: "json_schema", json_schema: { name: "place", schema: city } };
await chat("chat", { n: 3 });
await chatStreamed();
await chat("chat_tool", { temperature: 0, tools: [weather], tool_choice: { type: "function", function: { name: "get_weather" } }, max_tokens: 60 });
await chat("chat_structured", { response_format: schema, temperature: 0, max_tokens: 60 });
await respond("responses", false);
await respond("responses_streamed", true);
await message("message", {});
await messageStreamed("message_streamed", {});
const tool = { name: "get_weather", input_schema: city, strict: true };
await message("message_tool", { temperature: 0, tools: [tool], tool_choice: { type: "tool", name: "get_weather" }, max_tokens: 60 });
await raises("openai_no_model", () => openai.chat.completions.create({ model: "nobody", messages }));
await raises("openai_bad", () => openai.chat.completions.create({ model, messages: "none" }));
await raises("openai_no_response", () => openai.responses.create({ model, input: "x", previous_response_id: "resp_1" }));
await raises("anthropic_no_model", () => anthropic.messages.create({ model: "nobody", messages, max_tokens: 1 }));
await raises("anthropic_bad", () => anthropic.messages.create({ model, messages, max_tokens: 1, container: "c" }));
const off = { openai: openai.withOptions({ baseURL: `${cut}/v1` }), anthropic: anthropic.withOptions({ baseURL: cut }) };
const asked = { model: "m", messages, max_tokens: 9, stream: true };
await ends("chat_cut", () => off.openai.chat.completions.create(asked), (event) => event.choices[0]?.delta.content);
await ends("responses_cut", () => off.openai.responses.create({ model: "m", input: "x", stream: true }), (event) => event.delta);
await ends("message_cut", () => off.anthropic.messages.create(asked), (event) => event.delta?.text);
seen.models = (await openai.models.list()).data.map(({ id }) => id);
seen.counted = (await anthropic.messages.countTokens({ model, messages })).input_tokens;
console.log(JSON.stringify(seen));
