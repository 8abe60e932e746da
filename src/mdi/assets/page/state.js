// All that the page knows. Whoever changes it calls `changed()`: the page is drawn with the next frame.

export const state = {
  model: null, // as /v1/models describes it
  conversations: [], // the latest first; see conversations.js
  current: null, // the conversation that is shown
  answering: null, // {conversation, message, stop()} while an answer comes
  report: null, // of /v1/nodes, the last one
  rates: new Map(), // bytes a second of each node's links, by its key
  tokensPerSecond: 0,
  awaySince: null, // when the server stopped answering, in milliseconds
  events: [], // what happened to the machines: {when, text, bad}
  notices: [], // texts that the reader closes
  needsKey: false,
  refusedKey: false, // whether a key that the reader gave was refused
  open: null, // which dialog: "settings" or "camera"
  drawer: null, // on narrow windows: "conversations" or "machines"
};

let draw = () => {};
let waiting = false;

/** Calls `drawn` with every frame before which something changed. */
export function drawWith(drawn) {
  draw = drawn;
}

export function changed() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

export function notice(text) {
  if (!state.notices.includes(text)) state.notices = [...state.notices, text];
  changed();
}

export function closeNotice(text) {
  state.notices = state.notices.filter((each) => each !== text);
  changed();
}
