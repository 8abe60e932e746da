// A modal dialog with a title and a button that closes it.

import { useEffect, useId, useRef } from "preact/hooks";
import { html } from "./html.js";

/** onClose: called when the reader closes it; without it, the dialog cannot be closed. */
export function Dialog({ title, onClose, children }) {
  const element = useRef(null);
  const heading = useId();
  useEffect(() => {
    element.current.showModal();
    return () => element.current?.close();
  }, []);
  const cancel = (event) => {
    event.preventDefault();
    onClose?.();
  };
  return html`<dialog ref=${element} aria-labelledby=${heading} onCancel=${cancel}>
    <header>
      <h2 id=${heading}>${title}</h2>
      ${onClose && html`<button type="button" class="plain" aria-label="Close" onClick=${onClose}>✕</button>`}
    </header>
    ${children}
  </dialog>`;
}
