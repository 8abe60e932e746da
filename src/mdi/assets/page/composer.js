// Where the reader types, and adds images and videos: by choosing, dropping, pasting, or with the camera.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { send } from "./answer.js";
import { touch } from "./conversations.js";
import { Dialog } from "./dialog.js";
import { html } from "./html.js";
import { accepted, attach, detach } from "./media.js";
import { changed, notice, state } from "./state.js";

export function Composer({ conversation }) {
  const field = useRef(null);
  useLayoutEffect(() => {
    field.current.style.height = "auto";
    field.current.style.height = `${field.current.scrollHeight}px`;
  }, [conversation.draft, conversation.id]);
  useEffect(() => {
    if (matchMedia("(pointer: fine)").matches) field.current.focus();
  }, [conversation.id]);

  const submit = (event) => {
    event.preventDefault();
    send(conversation);
  };
  const keyed = (event) => {
    const newLine = event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches;
    if (event.key === "Enter" && !newLine) submit(event);
  };
  const typed = (event) => {
    conversation.draft = event.target.value;
    touch(conversation);
  };
  const empty = !conversation.draft.trim() && !conversation.media.length;
  return html`<form class="composer" onSubmit=${submit}>
    ${conversation.media.length > 0 &&
    html`<ul class="media" aria-label="To be sent">
      ${conversation.media.map(
        (media) => html`<li key=${media.id}>
          <${Preview} media=${media} />
          <button type="button" class="remove" aria-label=${`Remove ${media.name}`} onClick=${() => detach(conversation, media)}>✕</button>
        </li>`,
      )}
    </ul>`}
    <textarea
      ref=${field}
      rows="1"
      aria-label="Message"
      placeholder=${accepted() ? "Ask something; drop or paste an image" : "Ask something"}
      value=${conversation.draft}
      onInput=${typed}
      onKeyDown=${keyed}
      onPaste=${(event) => pasted(event, conversation)}
    ></textarea>
    <div class="actions">
      <${FileButton} conversation=${conversation} />
      <${CameraButton} />
      <span class="space"></span>
      ${state.answering
        ? html`<button type="button" class="main" onClick=${() => state.answering?.stop()}>Stop</button>`
        : html`<button type="submit" class="main" disabled=${empty}>Send</button>`}
    </div>
    <${Camera} conversation=${conversation} />
  </form>`;
}

function pasted(event, conversation) {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  attach(conversation, files);
}

function FileButton({ conversation }) {
  const input = useRef(null);
  if (!accepted()) return null;
  const chosen = () => {
    attach(conversation, [...input.current.files]);
    input.current.value = "";
  };
  return html`<button type="button" onClick=${() => input.current.click()}>Image or video</button>
    <input ref=${input} type="file" hidden multiple accept=${accepted()} onChange=${chosen} />`;
}

export function Preview({ media }) {
  if (media.kind === "image") return html`<img src=${media.url} alt=${media.name} />`;
  return html`<video src=${media.url} controls muted playsinline aria-label=${media.name}></video>`;
}

/** Takes files that are dropped anywhere on the page. */
export function DropTarget() {
  const [over, setOver] = useState(false);
  useEffect(() => {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    const dragged = (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(true);
    };
    const left = (event) => event.relatedTarget === null && setOver(false);
    const dropped = (event) => {
      setOver(false);
      if (!hasFiles(event)) return;
      event.preventDefault();
      attach(state.current, [...event.dataTransfer.files]);
    };
    const listeners = { dragover: dragged, dragleave: left, drop: dropped };
    for (const [name, listener] of Object.entries(listeners)) addEventListener(name, listener);
    return () => Object.entries(listeners).forEach(([name, listener]) => removeEventListener(name, listener));
  }, []);
  return over && html`<div class="drop" aria-hidden="true">Drop images and videos here</div>`;
}

function CameraButton() {
  if (!accepted() || !navigator.mediaDevices) return null; // browsers give none over plain HTTP from another machine
  return html`<button type="button" onClick=${() => ((state.open = "camera"), changed())}>Camera</button>`;
}

function Camera({ conversation }) {
  const shown = state.open === "camera";
  const video = useRef(null);
  const close = () => ((state.open = null), changed());
  useEffect(() => {
    if (!shown) return;
    let stream = null;
    let closed = false;
    navigator.mediaDevices
      .getUserMedia({ video: { facingMode: "environment" } })
      .then((given) => {
        stream = given;
        if (closed) stop();
        else video.current.srcObject = given;
      })
      .catch((error) => {
        notice(`The camera cannot be used: ${error.message}.`);
        close();
      });
    const stop = () => stream?.getTracks().forEach((track) => track.stop());
    return () => {
      closed = true;
      stop();
    };
  }, [shown]);
  if (!shown) return null;
  const take = async () => {
    const blob = await frame(video.current);
    close();
    attach(conversation, [new File([blob], "camera.jpg", { type: "image/jpeg" })]);
  };
  return html`<${Dialog} title="Camera" onClose=${close}>
    <video ref=${video} class="camera" autoplay muted playsinline aria-label="What the camera sees"></video>
    <p class="actions"><button type="button" class="main" onClick=${take}>Take the image</button></p>
  <//>`;
}

function frame(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}
