// Builds elements. Text becomes text nodes and nothing else: no function here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Returns an HTML element. `on…` attributes are listeners; false, null and undefined leave an attribute out. */
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** Returns an SVG element. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name.startsWith("on")) throw new TypeError(`${name} must be a function`);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

/** Appends elements and texts, lists of them included; what is empty is left out. */
export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Replaces what an element holds. */
export function show(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

/** Returns a field with its label. */
export function field(label, input, hint) {
  const id = (input.id ||= `f${++fields}`);
  const note = hint && el("small", { id: `${id}-hint` }, hint);
  if (note) input.setAttribute("aria-describedby", note.id);
  return el("div", { class: "field" }, el("label", { for: id }, label), input, note);
}
let fields = 0;

/** Returns a select of texts or of [value, text]. */
export function select(options, value, attributes = {}) {
  const one = el("select", attributes);
  append(one, options.map((option) => {
    const [own, text] = Array.isArray(option) ? option : [option, option];
    return el("option", { value: own }, text);
  }));
  one.value = value;
  return one;
}

/** Shows a sentence for a few seconds; screen readers read it. */
export function toast(text, isError = false) {
  const one = el("div", { class: isError ? "toast error" : "toast" }, text);
  document.getElementById("toasts").append(one);
  setTimeout(() => one.remove(), isError ? 10000 : 4000);
}

/** Opens a dialog with these contents and returns it; it leaves the page when it is closed. */
export function dialog(title, ...children) {
  const id = `d${++fields}`;
  const one = el("dialog", { "aria-labelledby": id, onclose: () => one.remove() }, el("h2", { id }, title), children);
  document.body.append(one);
  one.showModal();
  return one;
}

/** Asks a question; returns whether the answer is yes. */
export function confirm(title, text, yes) {
  return new Promise((answer) => {
    const one = dialog(title, el("p", {}, text), el("form", { method: "dialog", class: "actions" },
      el("button", { value: "no", autofocus: true }, "Cancel"),
      el("button", { value: "yes", class: "danger" }, yes)));
    one.addEventListener("close", () => answer(one.returnValue === "yes"));
  });
}

/** Returns a button that copies a text. */
export function copyButton(text, label = "Copy") {
  return el("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(typeof text === "function" ? text() : text);
      toast("Copied.");
    } catch {
      toast("The browser does not let this page copy; select the text instead.", true);
    }
  } }, label);
}
