// Asking the model: the messages that are sent, and the answer as it grows.

import { chat, findModel, ServerError } from "./api.js";
import { newId, touchMessage } from "./conversations.js";
import { contentPart } from "./media.js";
import { requestFields, settings } from "./settings.js";
import { state } from "./state.js";

/** Sends what is typed. */
export function send(conversation) {
  const text = conversation.draft.trim();
  if ((!text && !conversation.media.length) || state.answering) return;
  const message = { id: newId(), role: "user", text, media: conversation.media };
  conversation.messages = [...conversation.messages, message];
  conversation.draft = "";
  conversation.media = [];
  answer(conversation);
}

/** Asks anew for the answer `message`. What follows it goes. */
export function regenerate(conversation, message) {
  cutFrom(conversation, message);
  answer(conversation);
}

/** Sends a message of the user again, with another text. What follows it goes. */
export function resend(conversation, message, text) {
  const place = conversation.messages.indexOf(message);
  conversation.messages = [...conversation.messages.slice(0, place), { ...message, id: newId(), text }];
  answer(conversation);
}

/** Goes on with an answer that ended too early. */
export function proceed(conversation, message) {
  answer(conversation, message);
}

/** Gives the model the results of its calls. */
export function returnResults(conversation) {
  answer(conversation);
}

function cutFrom(conversation, message) {
  conversation.messages = conversation.messages.slice(0, conversation.messages.indexOf(message));
}

async function answer(conversation, continued = null) {
  if (state.answering) return;
  const abort = new AbortController();
  const message = continued ?? { id: newId(), role: "assistant", text: "", thought: "", calls: [] };
  Object.assign(message, { finish: null, error: null, stats: null });
  const timing = { began: performance.now(), first: null };
  state.answering = { conversation, message, timing, stop: () => abort.abort() };
  const asked = conversation.messages;
  if (!continued) conversation.messages = [...asked, message];
  touchMessage(conversation, message);
  try {
    const body = await request(asked, Boolean(continued));
    for await (const event of chat(body, abort.signal)) take(conversation, message, timing, event);
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = inWords(error);
  }
  state.answering = null;
  touchMessage(conversation, message);
}

function inWords(error) {
  if (error instanceof ServerError && error.status === 401) return "The server needs a key.";
  return error.message;
}

function take(conversation, message, timing, event) {
  if (event.usage) message.stats = stats(event.usage, timing);
  const [choice] = event.choices;
  if (!choice) return;
  const { content, reasoning, tool_calls: calls = [] } = choice.delta;
  if (content || reasoning || calls.length) timing.first ??= performance.now();
  message.text += content ?? "";
  message.thought += reasoning ?? "";
  for (const call of calls) takeCall(message, call);
  message.finish = choice.finish_reason ?? message.finish;
  touchMessage(conversation, message);
}

function takeCall(message, { index, id, function: part }) {
  const call = (message.calls[index] ??= { id, name: "", arguments: "", result: "" });
  call.name += part?.name ?? "";
  call.arguments += part?.arguments ?? "";
}

function stats(usage, timing) {
  const first = timing.first ?? performance.now();
  const seconds = (performance.now() - first) / 1000;
  const tokens = usage.completion_tokens;
  return {
    tokens,
    promptTokens: usage.prompt_tokens,
    firstSeconds: (first - timing.began) / 1000,
    rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
  };
}

async function request(messages, continues) {
  const sent = (await Promise.all(messages.map(asSent))).flat();
  if (settings.system.trim()) sent.unshift({ role: "system", content: settings.system.trim() });
  const { id: model } = await findModel();
  const goesOn = continues ? { continue_final_message: true, add_generation_prompt: false } : {};
  return { model, messages: sent, ...requestFields(), ...goesOn };
}

/** A message as OpenAI's API has it: the model's with the results of its calls after it. */
async function asSent(message) {
  if (message.role === "user") {
    if (!message.media.length) return [{ role: "user", content: message.text }];
    const parts = await Promise.all(message.media.map(contentPart));
    return [{ role: "user", content: [...parts, { type: "text", text: message.text }] }];
  }
  if (!message.calls.length) return message.text ? [{ role: "assistant", content: message.text }] : [];
  const calls = message.calls.map(({ id, name, arguments: given }) => ({
    id,
    type: "function",
    function: { name, arguments: given },
  }));
  const results = message.calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result }));
  return [{ role: "assistant", content: message.text || null, tool_calls: calls }, ...results];
}
