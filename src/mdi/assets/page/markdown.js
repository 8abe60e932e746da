// The model's Markdown, made safe: no HTML of its own, no images from elsewhere, only links that a reader may follow.
//
// While an answer grows, only its last block is made anew with each frame.

import DOMPurify from "dompurify";
import { Marked } from "marked";
import { useMemo, useState } from "preact/hooks";
import { html, memo } from "./html.js";

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

export function Markdown({ text }) {
  const blocks = reader.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
  return html`<div class="markdown">
    ${blocks.map((token, index) =>
      token.type === "code"
        ? html`<${CodeBlock} key=${index} text=${token.text} language=${token.lang ?? ""} />`
        : html`<${Block} key=${index} raw=${token.raw} token=${token} />`,
    )}
  </div>`;
}

function Block({ raw, token }) {
  const safe = useMemo(() => DOMPurify.sanitize(reader.parser([token]), KEPT), [raw]);
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
