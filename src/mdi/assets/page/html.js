// Templates of Preact, written as they look in HTML; and components that are drawn again only when they change.

import { Component, h } from "preact";
import htm from "htm";

export const html = htm.bind(h);

/** The component, drawn again only when one of its properties is another value. */
export function memo(component) {
  return class extends Component {
    shouldComponentUpdate(next) {
      const names = new Set([...Object.keys(next), ...Object.keys(this.props)]);
      return [...names].some((name) => next[name] !== this.props[name]);
    }

    render(properties) {
      return h(component, properties);
    }
  };
}
