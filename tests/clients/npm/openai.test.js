// OpenAI's client for JavaScript: chats, streams, tools, schemas, responses, errors.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.MDI_URL}/v1`, apiKey: process.env.MDI_KEY, maxRetries: 0 });
const star = `data:image/png;base64,${readFileSync(process.env.MDI_STAR).toString("base64")}`;
const question = "Tell me the shape of the purple shape.";
const model = "bundled";
const messages = [
  { role: "user", content: [{ type: "image_url", image_url: { url: star } }, { type: "text", text: question }] },
];
const schema = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};

test("a stream is the whole answer, and sees the picture", async () => {
  const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.match(whole.choices[0].message.content, /star/);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, stream: true })) {
    text += chunk.choices[0].delta.content ?? "";
  }
  assert.equal(text, whole.choices[0].message.content);
  const collected = await client.chat.completions.stream({ model, messages, temperature: 0 }).finalContent();
  assert.equal(collected, text);
});

test("tools are called, whole and streamed", async () => {
  const settings = {
    model,
    messages: [{ role: "user", content: "What is the weather in Oslo?" }],
    tools: [{ type: "function", function: { name: "get_weather", parameters: schema, strict: true } }],
    tool_choice: "required",
    parallel_tool_calls: false,
    temperature: 0,
  };
  const whole = await client.chat.completions.create(settings);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  assert.ok(schema.properties.city.enum.includes(JSON.parse(call.function.arguments).city));
  const final = await client.chat.completions.stream(settings).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
});

test("answers follow a schema", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "city", schema, strict: true } };
  const answer = await client.chat.completions.parse({ model, messages, response_format });
  assert.ok(schema.properties.city.enum.includes(JSON.parse(answer.choices[0].message.content).city));
});

test("responses, whole and streamed", async () => {
  const input = [
    { role: "user", content: [{ type: "input_image", image_url: star }, { type: "input_text", text: question }] },
  ];
  const whole = await client.responses.create({ model, input, temperature: 0 });
  assert.match(whole.output_text, /star/);
  const final = await client.responses.stream({ model, input, temperature: 0 }).finalResponse();
  assert.equal(final.output_text, whole.output_text);
});

test("errors are the client's own", async () => {
  await assert.rejects(client.chat.completions.create({ model, messages, temperature: -1 }), OpenAI.BadRequestError);
  await assert.rejects(client.chat.completions.create({ model: "other", messages }), OpenAI.NotFoundError);
  const stranger = new OpenAI({ baseURL: `${process.env.MDI_URL}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});
