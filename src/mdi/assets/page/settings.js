// The reader's settings, kept in the browser, and the dialog that changes them.

import { html } from "./html.js";
import { Dialog } from "./dialog.js";
import { changed, state } from "./state.js";

const PLACE = "mdi-settings";
const NONE = {
  system: "",
  temperature: "",
  top_p: "",
  top_k: "",
  max_tokens: "",
  seed: "",
  schema: "",
  tools: "",
  theme: "auto",
};

export const settings = { ...NONE, ...stored() };
applyTheme();

function stored() {
  try {
    return JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    return {};
  }
}

function set(name, value) {
  settings[name] = value;
  localStorage.setItem(PLACE, JSON.stringify(settings));
  if (name === "theme") applyTheme();
  changed();
}

function applyTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

/** The fields of a request that the settings ask for. Throws an Error, in words, for JSON that is none. */
export function requestFields() {
  const fields = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"])
    if (settings[name] !== "") fields[name] = Number(settings[name]);
  const schema = parsed("schema");
  if (schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = parsed("tools");
  if (tools) fields.tools = Array.isArray(tools) ? tools : [tools];
  return fields;
}

function parsed(name) {
  if (!settings[name].trim()) return null;
  try {
    return JSON.parse(settings[name]);
  } catch (error) {
    throw new Error(`The ${LABELS[name]} in the settings is no JSON: ${error.message}.`);
  }
}

const LABELS = { schema: "schema of answers", tools: "list of tools" };

function problem(name) {
  try {
    parsed(name);
    return "";
  } catch (error) {
    return error.message;
  }
}

const EXAMPLES = {
  schema: '{"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}',
  tools: '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]',
};

function NumberField({ name, label, hint, step, min, max }) {
  return html`<label class="field">
    <span>${label}</span>
    <input
      type="number"
      name=${name}
      value=${settings[name]}
      placeholder=${hint}
      ...${{ step, min, max }}
      onInput=${(event) => set(name, event.target.value)}
    />
  </label>`;
}

function JsonField({ name, label, help }) {
  const wrong = problem(name);
  return html`<label class="field wide">
    <span>${label}</span>
    <textarea
      name=${name}
      rows="4"
      spellcheck="false"
      class="code"
      aria-invalid=${wrong ? "true" : "false"}
      aria-describedby=${`${name}-help`}
      placeholder=${EXAMPLES[name]}
      value=${settings[name]}
      onInput=${(event) => set(name, event.target.value)}
    ></textarea>
    <small id=${`${name}-help`} class=${wrong ? "wrong" : ""}>${wrong || help}</small>
  </label>`;
}

export function SettingsDialog() {
  if (state.open !== "settings") return null;
  return html`<${Dialog} title="Settings" onClose=${() => ((state.open = null), changed())}>
    <div class="fields">
      <label class="field wide">
        <span>System message</span>
        <textarea
          name="system"
          rows="2"
          value=${settings.system}
          onInput=${(event) => set("system", event.target.value)}
        ></textarea>
      </label>
      <${NumberField} name="temperature" label="Temperature" hint="the model's" step="0.1" min="0" max="2" />
      <${NumberField} name="top_p" label="Top p" hint="the model's" step="0.05" min="0" max="1" />
      <${NumberField} name="top_k" label="Top k" hint="the model's" step="1" min="0" />
      <${NumberField} name="max_tokens" label="Most tokens of an answer" hint="what fits" step="1" min="1" />
      <${NumberField} name="seed" label="Seed" hint="another each time" step="1" />
      <label class="field">
        <span>Colours</span>
        <select name="theme" value=${settings.theme} onChange=${(event) => set("theme", event.target.value)}>
          <option value="auto">as the system</option>
          <option value="light">light</option>
          <option value="dark">dark</option>
        </select>
      </label>
      <${JsonField} name="schema" label="JSON schema of answers" help="Answers then are JSON of this schema." />
      <${JsonField} name="tools" label="Tools" help="As in OpenAI's API. Calls are shown; you give their results." />
    </div>
    <p class="actions">
      <button type="button" onClick=${() => Object.entries(NONE).forEach(([name, value]) => set(name, value))}>
        Reset all
      </button>
    </p>
  <//>`;
}
