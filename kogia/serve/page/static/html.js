// The one place where elements are made, and the one where HTML becomes elements.

// The page's policy lets no script pass a string to innerHTML but through this: only what the server has rendered comes here.
const policy = globalThis.trustedTypes?.createPolicy("kogia", { createHTML: (html) => html });

/** Elements of HTML that this server has rendered and sanitised. */
export function rendered(html) {
  const template = document.createElement("template");
  template.innerHTML = policy ? policy.createHTML(html) : html;
  return template.content;
}

/** An element. Properties that begin with "on" are listeners, others attributes; null and false leave one out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** A line drawing of 20 by 20, hidden from screen readers: its button says what it is for. */
export function icon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

export const ICONS = {
  add: "M10 4v12M4 10h12",
  close: "M5 5l10 10M15 5L5 15",
  copy: "M7 7V4h9v9h-3M4 7h9v9H4z",
  edit: "M4 16l1-4 8-8 3 3-8 8zM11 6l3 3",
  experts: "M4 4h3v3H4zM13 4h3v3h-3zM4 13h3v3H4zM8.5 8.5h3v3h-3zM13 13h3v3h-3z",
  help: "M7.5 7.5a2.5 2.5 0 1 1 3.6 2.2c-.8.4-1.1 1-1.1 1.8M10 14.5v.2",
  left: "M12 5l-5 5 5 5",
  menu: "M3 6h14M3 10h14M3 14h14",
  more: "M5 10h.01M10 10h.01M15 10h.01",
  pair: "M3 4h6v12H3zM11 4h6v12h-6z",
  remove: "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10",
  right: "M8 5l5 5-5 5",
  save: "M10 3v9M6 9l4 4 4-4M4 16h12",
  open: "M10 13V4M6 8l4-4 4 4M4 16h12",
  again: "M15 6a6 6 0 1 0 1 5M16 3v4h-4",
  send: "M10 16V4M5 9l5-5 5 5",
  settings: "M4 6h7M15 6h1M4 14h1M9 14h7M13 4v4M7 12v4",
  stop: "M6 6h8v8H6z",
  theme: "M10 3a7 7 0 1 0 0 14zM10 3a7 7 0 0 1 0 14",
};

/** A button with a drawing, named for screen readers and for who hovers; `words` are shown beside it. */
export function button(name, drawing, onclick, { words = null, ...properties } = {}) {
  return h("button", { type: "button", title: name, "aria-label": name, onclick, ...properties }, icon(ICONS[drawing]), words ? h("span", {}, words) : null);
}

/** Writes to the live region that screen readers read out. */
export function announce(words) {
  document.getElementById("announced").textContent = words;
}

export function formatted(number) {
  return Math.round(number).toLocaleString("en");
}
