// Calls of the server that the page came from, with the reader's key where it needs one.

import { changed, state } from "./state.js";

const PLACE = "mdi-api-key";

/** An error of a call, in words for the reader. status: of HTTP; 0 where nothing answered. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const AWAY = "The server does not answer.";

export function useKey(given, remember) {
  sessionStorage.setItem(PLACE, given.trim());
  if (remember) localStorage.setItem(PLACE, given.trim());
  else localStorage.removeItem(PLACE);
  state.needsKey = false;
  changed();
}

function key() {
  return sessionStorage.getItem(PLACE) ?? localStorage.getItem(PLACE);
}

function headers() {
  return key() === null ? {} : { Authorization: `Bearer ${inBytes(key())}` };
}

/** The text's bytes in UTF-8, as a header takes them. */
function inBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(AWAY);
  }
  if (answer.status === 401) {
    state.needsKey = true;
    state.refusedKey = key() !== null;
    changed();
  }
  if (!answer.ok) throw new ServerError(await reason(answer), answer.status);
  return answer;
}

async function reason(answer) {
  const text = await answer.text();
  try {
    const said = JSON.parse(text);
    return said.error?.message ?? said.detail ?? text;
  } catch {
    return text || `The server answered with status ${answer.status}.`;
  }
}

export async function get(path) {
  return (await call(path, { cache: "no-store", signal: AbortSignal.timeout(5000) })).json();
}

/** The served model, asked for once. */
export async function findModel() {
  state.model ??= (await get("v1/models")).data[0];
  return state.model;
}

/** The events of a streamed answer of /v1/chat/completions, parsed. Throws ServerError, also for an event of one. */
export async function* chat(body, signal) {
  const answer = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, Number(event.error.code) || 500);
    yield event;
  }
  throw new ServerError("The connection broke before the end of the answer.");
}

/** The data of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html). */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection broke before the end of the answer.");
    });
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice("data: ".length);
  }
}
