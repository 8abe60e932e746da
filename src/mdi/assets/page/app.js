// The page: conversations on the left, the chat, the machines on the right.

import { render } from "preact";
import { useState } from "preact/hooks";
import { useKey } from "./api.js";
import { Composer, DropTarget } from "./composer.js";
import { begin, load, remove, show, title } from "./conversations.js";
import { Dialog } from "./dialog.js";
import { html } from "./html.js";
import { Machines, Strip, watch } from "./machines.js";
import { Messages } from "./messages.js";
import { SettingsDialog } from "./settings.js";
import { changed, closeNotice, drawWith, state } from "./state.js";

function App() {
  return html`<${Header} />
    <div class="columns">
      <nav class=${`side ${state.drawer === "conversations" ? "shown" : ""}`} aria-label="Conversations"><${Conversations} /></nav>
      <main>
        <${Notices} />
        <${Messages} key=${state.current.id} conversation=${state.current} />
        <${Composer} conversation=${state.current} />
      </main>
      <aside class=${`side ${state.drawer === "machines" ? "shown" : ""}`} aria-label="Machines"><${Machines} /></aside>
    </div>
    <${DropTarget} />
    <${SettingsDialog} />
    <${KeyDialog} />`;
}

function Header() {
  return html`<header class="top">
    <${DrawerButton} name="conversations" text="Conversations" />
    <h1>${state.model?.id ?? "MDI-LLM"}</h1>
    <div class="small-strip">${state.report && html`<${Strip} report=${state.report} />`}</div>
    <${DrawerButton} name="machines" text="Machines" />
    <button type="button" onClick=${() => ((state.open = "settings"), changed())}>Settings</button>
  </header>`;
}

function DrawerButton({ name, text }) {
  const shown = state.drawer === name;
  const toggle = () => ((state.drawer = shown ? null : name), changed());
  return html`<button type="button" class=${`drawer ${name}`} aria-expanded=${shown} onClick=${toggle}>${text}</button>`;
}

function Conversations() {
  return html`<button type="button" class="new" onClick=${begin}>New conversation</button>
    <ul>
      ${state.conversations.map(
        (conversation) => html`<li key=${conversation.id}>
          <button
            type="button"
            class="plain name"
            aria-current=${conversation === state.current ? "true" : null}
            onClick=${() => show(conversation)}
          >${title(conversation)}</button>
          <button
            type="button"
            class="plain"
            aria-label=${`Delete ${title(conversation)}`}
            onClick=${() => confirm(`Delete "${title(conversation)}"?`) && remove(conversation)}
          >✕</button>
        </li>`,
      )}
    </ul>`;
}

function Notices() {
  return html`<div class="notices" role="status">
    ${state.awaySince !== null && html`<p class="error">The server does not answer. What you type is kept; the page asks again each second.</p>`}
    ${state.notices.map(
      (text) => html`<p key=${text}>
        <span>${text}</span>
        <button type="button" class="plain" aria-label="Close this message" onClick=${() => closeNotice(text)}>✕</button>
      </p>`,
    )}
  </div>`;
}

function KeyDialog() {
  const [key, setKey] = useState("");
  const [remember, setRemember] = useState(false);
  if (!state.needsKey) return null;
  const given = (event) => {
    event.preventDefault();
    useKey(key, remember);
    setKey("");
  };
  return html`<${Dialog} title="This server needs a key">
    <form onSubmit=${given}>
      <label class="field wide">
        <span>API key</span>
        <input type="password" autocomplete="off" value=${key} onInput=${(event) => setKey(event.target.value)} />
      </label>
      ${state.refusedKey && html`<p class="error" role="alert">The server refused the key that it was given.</p>`}
      <label class="check">
        <input type="checkbox" checked=${remember} onChange=${(event) => setRemember(event.target.checked)} />
        Keep it in this browser
      </label>
      <p class="actions"><button type="submit" class="main" disabled=${!key.trim()}>Use this key</button></p>
    </form>
  <//>`;
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) state.answering?.stop();
});

begin();
drawWith(() => {
  render(html`<${App} />`, document.body);
  performance.mark("drawn");
});
changed();
load();
watch();
