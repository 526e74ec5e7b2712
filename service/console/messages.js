// What a message looks like: its text with blocks of code, reasoning that folds, images, calls of tools.

import { append, el, show } from "./dom.js";

/** Returns a function that shows a text that grows: paragraphs as they are, fenced code in blocks of its own. */
export function text(parent) {
  let shown = null;
  return (written) => {
    if (written === shown) return;
    shown = written;
    show(parent, parts(written));
  };
}

function parts(written) {
  return written.split(/^```/m).map((part, index) => {
    if (index % 2 === 0) return part.trim() ? el("p", {}, part.trim()) : null;
    const end = part.indexOf("\n");
    return el("pre", { tabindex: 0, "aria-label": part.slice(0, end).trim() || "code" }, end < 0 ? "" : part.slice(end + 1).trimEnd());
  });
}

/** Returns reasoning that is open while it grows, until the user folds it or the answer begins. */
export function reasoning() {
  const body = el("div", { class: "thoughts" });
  const summary = el("summary", {}, "Reasoning");
  const node = el("details", { hidden: true }, summary, body);
  let wasOpen = null;
  return {
    node,
    update: (written, isThinking) => {
      node.hidden = !written;
      body.textContent = written;
      if (wasOpen !== isThinking) node.open = wasOpen = isThinking;
    },
  };
}

/** Returns the elements of a message of several parts. */
export const content = (list) => list.map((part) =>
  part.type === "image_url" ? el("img", { src: part.image_url.url, alt: "An image of the message" }) : el("p", {}, part.text));

/** Returns the element of a tool's call. */
export function call(one) {
  const node = el("div", { class: "call" }, el("strong", {}, `calls ${one.function.name}`));
  append(node, [el("pre", { tabindex: 0 }, pretty(one.function.arguments))]);
  return node;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
