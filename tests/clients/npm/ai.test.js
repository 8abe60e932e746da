// Vercel's AI SDK over chats and responses: generateText, streamText, a picture, a tool, objects.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const server = { baseURL: `${process.env.MDI_URL}/v1`, apiKey: process.env.MDI_KEY };
const compatible = createOpenAICompatible({ name: "mdi", supportsStructuredOutputs: true, includeUsage: true, ...server });
const openai = createOpenAI(server);
const image = readFileSync(process.env.MDI_STAR);
const messages = [
  {
    role: "user",
    content: [
      { type: "file", data: image, mediaType: "image/png" },
      { type: "text", text: "Tell me the shape of the purple shape." },
    ],
  },
];
const seen = z.object({ shape: z.enum(["circle", "star"]) });
const models = { compatible: compatible("bundled"), chat: openai.chat("bundled"), responses: openai.responses("bundled") };

for (const [name, model] of Object.entries(models)) {
  const settings = { model, temperature: 0, maxRetries: 0 };

  test(`${name}: a stream is the whole answer, and sees the picture`, async () => {
    const whole = await generateText({ ...settings, messages });
    assert.match(whole.text, /star/);
    assert.equal(whole.finishReason, "stop");
    assert.ok(whole.usage.outputTokens > 0);
    const streamed = streamText({ ...settings, messages });
    let text = "";
    for await (const part of streamed.textStream) text += part;
    assert.equal(text, whole.text);
    assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);
  });

  test(`${name}: a tool is called and its result goes back`, async () => {
    const called = [];
    const look = tool({
      description: "Looks at one side of the picture.",
      inputSchema: z.object({ side: z.enum(["left", "right"]) }),
      execute: async ({ side }) => called.push(side) && `a star on the ${side}`,
    });
    const asked = { ...settings, prompt: "Which shape is left?", tools: { look }, toolChoice: "required" };
    const answer = await generateText({ ...asked, stopWhen: stepCountIs(2) });
    assert.equal(answer.steps.length, 2);
    assert.equal(answer.steps[0].finishReason, "tool-calls");
    assert.ok(called.length >= 2);
    const streamed = streamText(asked);
    const calls = await streamed.toolCalls;
    assert.ok(["left", "right"].includes(calls[0].input.side));
  });

  test(`${name}: answers are objects`, async () => {
    const answer = await generateText({ ...settings, messages, output: Output.object({ schema: seen }) });
    assert.equal(seen.safeParse(answer.output).success, true);
  });

  test(`${name}: errors are its own`, async () => {
    await assert.rejects(generateText({ ...settings, prompt: "Hello", temperature: -1 }), (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.equal(error.statusCode, 400);
      return true;
    });
  });
}
