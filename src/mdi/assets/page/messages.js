// The messages of a conversation, and what may be done with each.

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { proceed, regenerate, resend, returnResults } from "./answer.js";
import { Preview } from "./composer.js";
import { touchMessage } from "./conversations.js";
import { html, memo } from "./html.js";
import { CodeBlock, CopyButton, Markdown } from "./markdown.js";
import { state } from "./state.js";

const NEAR_PX = 80; // of the end: who has scrolled further up reads something else

export function Messages({ conversation }) {
  const element = useRef(null);
  const follows = useRef(true);
  const { messages } = conversation;
  const answering = state.answering?.conversation === conversation;
  const scrolled = ({ target }) => {
    follows.current = target.scrollHeight - target.scrollTop - target.clientHeight < NEAR_PX;
  };
  useEffect(() => {
    follows.current = true;
  }, [conversation.id, messages.length]);
  useLayoutEffect(() => {
    if (follows.current) element.current.scrollTop = element.current.scrollHeight;
  });
  return html`<div class="messages" ref=${element} onScroll=${scrolled} tabindex="0" role="log" aria-label="Conversation" aria-busy=${answering}>
    ${messages.length === 0 && html`<${Welcome} />`}
    ${messages.map((message, index) => {
      const shared = { key: message.id, conversation, message, version: message.version };
      const idle = !state.answering;
      if (message.role === "user") return html`<${UserMessage} ...${shared} idle=${idle} />`;
      const last = index === messages.length - 1;
      const waits = answering && last ? waitingFor() : "";
      return html`<${ModelMessage} ...${shared} last=${last} idle=${idle} waits=${waits} />`;
    })}
  </div>`;
}

function Welcome() {
  const { model } = state;
  if (!model) return null;
  const reads = { image: "images", video: "videos" };
  const kinds = ["text", ...model.modalities.map((kind) => reads[kind]).filter(Boolean)];
  return html`<div class="welcome">
    <h2>${model.id}</h2>
    <p>Reads ${kinds.join(", ").replace(/, ([^,]*)$/, " and $1")}, up to ${model.max_model_len.toLocaleString("en")} tokens.</p>
  </div>`;
}

/** Why no words come yet, or any more. */
function waitingFor() {
  const { message } = state.answering;
  if (state.awaySince) return "The server does not answer";
  if (state.report?.recovering) return "A machine was lost. It is being brought back, and the answer goes on";
  if (message.text || message.thought || message.calls.length) return "";
  return state.report?.requests.waiting ? "Waiting for its turn" : "Reading";
}

const UserMessage = memo(function UserMessage({ conversation, message, idle }) {
  const [edited, setEdited] = useState(null);
  if (edited !== null)
    return html`<article class="message user" aria-label="You">
      <${Editor}
        text=${edited}
        onInput=${setEdited}
        onCancel=${() => setEdited(null)}
        onSend=${() => (setEdited(null), resend(conversation, message, edited.trim()))}
      />
    </article>`;
  return html`<article class="message user" aria-label="You">
    ${message.media.length > 0 &&
    html`<ul class="media">
      ${message.media.map((media) => html`<li key=${media.id}><${Preview} media=${media} /></li>`)}
    </ul>`}
    <p class="text">${message.text}</p>
    <footer>
      <${CopyButton} text=${message.text} />
      <button type="button" class="plain small" disabled=${!idle} onClick=${() => setEdited(message.text)}>Edit</button>
    </footer>
  </article>`;
});

function Editor({ text, onInput, onCancel, onSend }) {
  const field = useRef(null);
  useEffect(() => field.current.focus(), []);
  return html`<textarea
      ref=${field}
      aria-label="Edited message"
      rows=${Math.min(12, text.split("\n").length + 1)}
      value=${text}
      onInput=${(event) => onInput(event.target.value)}
      onKeyDown=${(event) => event.key === "Escape" && (event.stopPropagation(), onCancel())}
    ></textarea>
    <p class="actions">
      <button type="button" onClick=${onCancel}>Cancel</button>
      <button type="button" class="main" disabled=${!text.trim()} onClick=${onSend}>Send again</button>
    </p>`;
}

const ModelMessage = memo(function ModelMessage({ conversation, message, last, idle, waits }) {
  return html`<article class="message model" aria-label="The model">
    ${message.thought &&
    html`<details class="thought"><summary>Thoughts</summary><${Markdown} text=${message.thought} /></details>`}
    ${asJson(message) ? html`<${CodeBlock} language="JSON" text=${asJson(message)} />` : html`<${Markdown} text=${message.text} grows=${!message.finish && !message.error} />`}
    ${message.calls.map((call, index) => html`<${Call} key=${index} ...${{ conversation, message, call, idle }} answered=${!last} version=${message.version} />`)}
    ${waits && html`<p class="waits" role="status">${waits}<span class="dots" aria-hidden="true"></span></p>`}
    ${message.error && html`<p class="error" role="alert">${message.error}</p>`}
    ${message.finish === "stopped" && html`<p class="note">Stopped.</p>`}
    ${message.finish === "length" && html`<p class="note">The answer ended at its most tokens.</p>`}
    ${idle && html`<${Footer} ...${{ conversation, message, last }} version=${message.version} />`}
  </article>`;
});

function Footer({ conversation, message, last }) {
  const ended = message.finish === "stop" || message.finish === "tool_calls";
  const waitsForResults = last && message.calls.length > 0 && message.finish === "tool_calls";
  return html`<footer>
    ${waitsForResults &&
    html`<button type="button" class="small" disabled=${!message.calls.every((call) => call.result)} onClick=${() => returnResults(conversation)}>Give the results</button>`}
    ${message.text && html`<${CopyButton} text=${message.text} />`}
    ${last && !ended && message.text &&
    html`<button type="button" class="plain small" onClick=${() => proceed(conversation, message)}>Go on</button>`}
    ${last && html`<button type="button" class="plain small" onClick=${() => regenerate(conversation, message)}>${message.error && !message.text ? "Try again" : "Another answer"}</button>`}
    ${message.stats && html`<${Stats} ...${message.stats} />`}
  </footer>`;
}

function Stats({ tokens, promptTokens, firstSeconds, rate }) {
  const parts = [
    `${promptTokens.toLocaleString("en")} + ${tokens.toLocaleString("en")} tokens`,
    `the first after ${firstSeconds.toFixed(2)} s`,
  ];
  if (rate) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  return html`<small class="stats">${parts.join(" · ")}</small>`;
}

function Call({ conversation, message, call, answered, idle }) {
  const typed = (event) => {
    call.result = event.target.value;
    touchMessage(conversation, message);
  };
  return html`<section class="call" aria-label=${`Call of ${call.name}`}>
    <h2>Calls <code>${call.name}</code></h2>
    <pre tabindex="0"><code>${indented(call.arguments)}</code></pre>
    <label>
      <span>Its result</span>
      <textarea rows="2" spellcheck="false" readonly=${answered || !idle} value=${call.result} onInput=${typed}></textarea>
    </label>
  </section>`;
}

/** An answer that is a JSON object or list, written with line ends; otherwise nothing. */
function asJson({ text, finish }) {
  return finish === "stop" && /^\s*[{[]/.test(text) ? indented(text, "") : "";
}

function indented(text, otherwise = text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return otherwise;
  }
}
