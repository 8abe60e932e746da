// The reader's conversations. They stay in the browser (IndexedDB), with their images and videos.
//
// A conversation: {id, updated, messages, draft, media}. draft, media: what is typed and not sent yet.
// A message: {id, role, text, media, version} of the user; the model's has also {thought, calls, finish, error, stats}.
// Its version changes whenever it does. A call: {id, name, arguments, result}. Media: {kind, name, blob, url}.

import { del, entries, set } from "idb-keyval";
import { changed, notice, state } from "./state.js";

const SAVE_AFTER_MS = 400;
const TITLE_LENGTH = 60;

let unsaved = new Set();
let timer = null;

export function newId() {
  return `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
}

/** Reads all conversations, and shows the latest. */
export async function load() {
  let stored = [];
  try {
    stored = (await entries()).map(([, conversation]) => conversation);
  } catch {
    notice("This browser keeps no conversations (a private window?): they are gone when the page is closed.");
  }
  for (const conversation of stored) revive(conversation);
  state.conversations = [...stored, ...state.conversations].sort((one, other) => other.updated - one.updated);
  if (stored.length && !state.current?.messages.length && !state.current?.draft) state.current = state.conversations[0];
  changed();
}

function revive(conversation) {
  const media = [...conversation.media, ...conversation.messages.flatMap((message) => message.media ?? [])];
  for (const each of media) each.url = URL.createObjectURL(each.blob);
  const last = conversation.messages.at(-1);
  if (last?.role === "assistant" && !last.finish && !last.error) last.error = "The page was closed during this answer.";
}

/** Shows an empty conversation. It is kept from its first words on. */
export function begin() {
  state.current = { id: newId(), updated: Date.now(), messages: [], draft: "", media: [] };
  state.drawer = null;
  changed();
}

export function show(conversation) {
  state.current = conversation;
  state.drawer = null;
  changed();
}

export function title(conversation) {
  const text = conversation.messages.find((message) => message.text)?.text || conversation.draft;
  const line = text.trim().split("\n")[0];
  if (line.length > TITLE_LENGTH) return `${line.slice(0, TITLE_LENGTH)}…`;
  return line || (conversation.messages.length ? "An image" : "New conversation");
}

/** Notes that a conversation changed: it is drawn, and soon saved. */
export function touch(conversation) {
  conversation.updated = Date.now();
  if (!state.conversations.includes(conversation)) state.conversations = [conversation, ...state.conversations];
  unsaved.add(conversation);
  timer ??= setTimeout(save, SAVE_AFTER_MS);
  changed();
}

export function touchMessage(conversation, message) {
  message.version = (message.version ?? 0) + 1;
  touch(conversation);
}

export async function save() {
  timer = null;
  const saved = [...unsaved];
  unsaved = new Set();
  for (const conversation of saved)
    if (state.conversations.includes(conversation))
      try {
        await set(conversation.id, conversation);
      } catch (error) {
        notice(`This conversation could not be kept in the browser: ${error.message}`);
      }
}

export async function remove(conversation) {
  state.conversations = state.conversations.filter((each) => each !== conversation);
  if (state.answering?.conversation === conversation) state.answering.stop();
  if (state.current === conversation) {
    if (state.conversations.length) show(state.conversations[0]);
    else begin();
  }
  changed();
  await del(conversation.id).catch(() => {});
}

addEventListener("pagehide", save);
