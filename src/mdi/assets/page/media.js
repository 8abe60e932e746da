// Images and videos that the reader gives: which files are taken, and how they go to the server.

import { newId, touch } from "./conversations.js";
import { notice, state } from "./state.js";

const dataUrls = new WeakMap();

/** Adds files to what is typed and not sent yet; says in words which are not taken, and why. */
export async function attach(conversation, files) {
  for (const file of files) {
    const refusal = await refusalOf(file);
    if (refusal) notice(refusal);
    else conversation.media = [...conversation.media, entry(file)];
  }
  touch(conversation);
}

export function detach(conversation, media) {
  conversation.media = conversation.media.filter((each) => each !== media);
  touch(conversation);
}

/** What the model takes, as a file picker's filter; empty where it reads text only. */
export function accepted() {
  const reads = state.model?.modalities ?? [];
  return [["image", "image/*"], ["video", "video/*"]].filter(([kind]) => reads.includes(kind)).map(([, type]) => type).join(",");
}

function entry(file) {
  return { id: newId(), kind: kindOf(file), name: file.name || "image.png", blob: file, url: URL.createObjectURL(file) };
}

function kindOf(file) {
  return file.type.split("/")[0];
}

async function refusalOf(file) {
  const kind = kindOf(file);
  if (kind !== "image" && kind !== "video")
    return `${file.name} is neither an image nor a video${file.type ? ` (${file.type})` : ""}: it was not taken.`;
  if (state.model && !accepted().includes(kind)) return `${state.model.id} reads no ${kind}s: ${file.name} was not taken.`;
  if (!file.size) return `${file.name} is empty: it was not taken.`;
  if (kind === "image" && !(await isImage(file)))
    return `${file.name} cannot be read as an image: it was not taken. Is the file complete?`;
  return null;
}

async function isImage(file) {
  if (file.type === "image/svg+xml") return false; // the server takes none
  try {
    (await createImageBitmap(file)).close();
    return true;
  } catch {
    return false;
  }
}

/** The part of a message that carries it, as OpenAI's API has it. */
export async function contentPart(media) {
  const url = await dataUrl(media.blob);
  return media.kind === "image" ? { type: "image_url", image_url: { url } } : { type: "video_url", video_url: { url } };
}

async function dataUrl(blob) {
  if (!dataUrls.has(blob)) dataUrls.set(blob, await read(blob));
  return dataUrls.get(blob);
}

function read(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("An image or video cannot be read any more: was its file moved?"));
    reader.readAsDataURL(blob);
  });
}
