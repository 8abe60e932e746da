// The model's Markdown, made safe: no HTML of its own, no images from elsewhere, only links that a reader may follow.
//
// While an answer grows, only its last blocks are made anew with each frame.

import DOMPurify from "dompurify";
import { Marked } from "marked";
import { useMemo, useRef, useState } from "preact/hooks";
import { html, memo } from "./html.js";

const OPEN_BLOCKS = 4; // at the end of a text: a list goes on behind a blank line and what is no item yet

const KEPT = {
  ALLOWED_TAGS: "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr input li ol p pre strong table tbody td th thead tr ul"
    .split(" "),
  ALLOWED_ATTR: ["href", "align", "start", "type", "checked", "disabled", "target", "rel"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  RETURN_TRUSTED_TYPE: true,
};

const reader = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ raw }) => escaped(raw),
    image: ({ raw }) => escaped(raw),
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 1); // the page's own title is the first
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
  if (node.tagName === "INPUT") node.setAttribute("aria-label", node.checked ? "done" : "to do"); // of a task list
});

function escaped(text) {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

/** grows: text is still being added. */
export function Markdown({ text, grows = false }) {
  const blocks = useBlocks(text, grows).filter((token) => token.type !== "space" && token.type !== "def");
  return html`<div class="markdown">
    ${blocks.map((token, index) =>
      token.type === "code"
        ? html`<${CodeBlock} key=${index} text=${token.text} language=${token.lang ?? ""} />`
        : html`<${Block} key=${index} raw=${token.raw} token=${token} grows=${grows} />`,
    )}
  </div>`;
}

/** The blocks of a text. Those that text added to its end cannot change are kept while it grows. */
function useBlocks(text, grows) {
  const before = useRef({ text: "", blocks: [] }).current;
  const keeps = grows && text.startsWith(before.text) && !text.includes("\r"); // else lengths of blocks differ
  const kept = keeps ? before.blocks.slice(0, -OPEN_BLOCKS) : [];
  const length = kept.reduce((sum, token) => sum + token.raw.length, 0);
  const blocks = [...kept, ...reader.lexer(text.slice(length))];
  Object.assign(before, { text, blocks });
  return blocks;
}

function Block({ raw, token, grows }) {
  const safe = useMemo(() => DOMPurify.sanitize(reader.parser([token]), KEPT), [raw, grows]);
  return html`<div dangerouslySetInnerHTML=${{ __html: safe }}></div>`;
}

export const CodeBlock = memo(function CodeBlock({ text, language }) {
  return html`<figure class="code">
    <figcaption>
      <span>${language}</span>
      <${CopyButton} text=${text} />
    </figcaption>
    <pre tabindex="0"><code>${text}</code></pre>
  </figure>`;
});

export function CopyButton({ text }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await copyText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<button type="button" class="plain small" onClick=${copy}>${copied ? "Copied" : "Copy"}</button>`;
}

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // over plain HTTP from another machine there is no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
